"""What `python train.py` chooses without a config, on machines that are made up."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train
from data import fetch
from model.command_line import CONFIGS
from runtime import defaults
from runtime.budget import LENGTHS
from runtime.config import build, flatten, merge, read_file
from runtime.defaults import NAMES, SMALL, STORIES, WITHOUT_DOWNLOAD, Machine, choose
from runtime.hardware import rated_flops

GB = 10**9
SMALLEST, MIDDLE, LARGEST = STORIES


def card(name: str, gigabytes: float) -> Machine:
    return Machine("cuda", f"NVIDIA {name}", int(gigabytes * GB), rated_flops(f"NVIDIA {name}"))


MACHINES = {
    "CPU": (Machine("cpu", "AMD EPYC, 2 threads"), SMALL),
    "mps": (Machine("mps", "Apple M4"), SMALL),
    "a GPU with 2 GB": (card("GeForce GT 1030", 2), SMALL),
    "a GPU with 4 GB": (card("GeForce GTX 1650", 3.8), SMALLEST),
    "T4": (card("Tesla T4", 15.6), SMALLEST),
    "3090": (card("GeForce RTX 3090", 24), SMALLEST),
    "4090": (card("GeForce RTX 4090", 24), SMALLEST),
    "5090": (card("GeForce RTX 5090", 32), SMALLEST),
    "A100": (card("A100-SXM4-80GB", 80), SMALLEST),
    "H100": (card("H100 80GB HBM3", 80), MIDDLE),
    "H200": (card("H200", 141), MIDDLE),
    "B200": (card("B200", 180), LARGEST),
    "MI300X": (Machine("cuda", "AMD Instinct MI300X", 192 * GB, rated_flops("AMD Instinct MI300X")), MIDDLE),
    "an H100 that others hold": (card("H100 80GB HBM3", 1), SMALL),
}


@pytest.mark.parametrize("machine, name", MACHINES.values(), ids=MACHINES)
def test_each_machine_has_its_config(machine, name):
    chosen, why = choose(machine, "", lambda config: "")
    assert chosen == name and len(why) == 4 and f"--config={name}" in why[0] and machine.name in why[1]
    without, why = choose(machine, "", lambda config: "no network")
    assert without == (WITHOUT_DOWNLOAD if name in STORIES else name)
    assert ("no network" in why[3]) == (name in STORIES)


def test_only_a_gpu_asks_for_a_text():
    choose(Machine("cpu", "AMD EPYC"), "", lambda config: pytest.fail("asked"))


def config_of(name):
    return build(train.Config, merge([flatten(train.Config, read_file(name, CONFIGS))], LENGTHS))


def test_the_stories_have_the_stated_sizes_and_share_their_tokens():
    for name, parameters in STORIES.items():
        assert config_of(name).shape.n_parameters() == pytest.approx(parameters, rel=0.02), name
        assert config_of(name).seconds == defaults.SECONDS
    assert len({config_of(name).data for name in STORIES}) == 1


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Makes a run on a CPU choose as if it were on an H100, without a network."""
    monkeypatch.setattr(defaults, "machine", lambda device: MACHINES["H100"][0])
    monkeypatch.setattr(fetch, "_download", lambda name: f"{name} was not downloaded")


def without(flags, *keys):
    return [flag for flag in flags if not flag.removeprefix("--").startswith(keys)]


def test_a_run_is_named_by_its_config_and_resumes_without_a_name(tiny, tmp_path, on_a_gpu, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = tiny(out, steps=2, sample_every=2, eval_tokens=64, **{"data.cache": tmp_path / "cache"})
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert f"config   {WITHOUT_DOWNLOAD}: --config={WITHOUT_DOWNLOAD}" in said and "MB" in said
    folder = out / Path(WITHOUT_DOWNLOAD).stem
    assert json.loads((folder / "config.json").read_text())["config"] == WITHOUT_DOWNLOAD
    (sample,) = [line for line in said.splitlines() if line.startswith("sample   ")]
    assert len(sample) <= len("sample   ") + 100
    monkeypatch.setattr(defaults, "machine", lambda device: pytest.fail("chosen anew"))
    assert train.main(["--resume", f"--out={out}", "--steps=3"]) == 0
    assert json.loads((folder / "status.json").read_text())["step"] == 3
    assert [path.name for path in out.iterdir()] == [folder.name]


@pytest.mark.parametrize("flags, reason", [
    ({}, "tinystories was not downloaded"),
    ({"data.corpus": "docstrings"}, "it has some 10 MB"),
    ({"data.corpus": "fineweb-edu"}, ""),
], ids=["default", "small", "the user's of the hub"])  # fmt: skip
def test_the_text_decides_the_size_on_a_gpu(on_a_gpu, tmp_path, flags, reason):
    assert fetch.lacking(flags | {"data.cache": str(tmp_path)}, MIDDLE) == reason


def test_a_users_text_is_measured(on_a_gpu, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("A line of text.\n" * 1000)
    flags = {"data.corpus": str(tmp_path / "mine.txt")}
    assert fetch.lacking(flags, MIDDLE) == "it has 0.0 MB"
    monkeypatch.setattr(fetch, "LARGE", 10_000)
    assert fetch.lacking(flags, MIDDLE) == ""


def test_prepared_tokens_need_no_download(on_a_gpu, tmp_path):
    data = replace(config_of(MIDDLE).data, cache=str(tmp_path))
    from data.prepare import SPLIT_PATTERN, _folder, open_corpus

    _folder(data, "tinystories", open_corpus("tinystories").fingerprint, SPLIT_PATTERN).mkdir()
    assert fetch.lacking({"data.cache": str(tmp_path)}, MIDDLE) == ""


def test_without_an_answer_the_hub_is_given_up(monkeypatch, capsys):
    def slow(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", slow)
    assert fetch._download("tinystories") == "tinystories was not downloaded within 60 s"
    assert "for up to 60 s" in capsys.readouterr().out


def test_the_newest_run_of_a_default_config_is_resumed(tmp_path):
    assert defaults.last_config(tmp_path) == SMALL
    for age, name in enumerate(("small", "docstrings-2", "tinystories_31m", "docstrings", "mine", "docstrings-mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (1000 - age, 1000 - age))
    assert defaults.last_config(tmp_path) == SMALL
    os.utime(tmp_path / "docstrings-2" / "config.json", (2000, 2000))
    assert defaults.last_config(tmp_path) == WITHOUT_DOWNLOAD in NAMES


def test_one_shard_of_each_split_is_fetched(tmp_path):
    pytest.importorskip("pyarrow")
    from hub_server import HubServer
    from test_hub import VAL, closed_port, parquet

    shards = {f"data/train-0000{i}-of-00002.parquet": parquet(["Once upon a time"]) for i in range(2)}
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_ETAG_TIMEOUT": "30"}

    def ended(endpoint):
        command = [sys.executable, "-m", "data.fetch", "tinystories"]
        environment["HF_ENDPOINT"] = endpoint
        return subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True)

    refused = ended(closed_port())
    assert refused.returncode == 1 and "did not give the dataset roneneldan/TinyStories" in refused.stdout
    with HubServer("roneneldan/TinyStories", shards | {VAL: parquet(["The end."])}) as server:
        assert ended(server.url).returncode == 0
        got = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".parquet")]
    assert len(got) == 2 and not any("00001-of-00002" in path for path in got)
