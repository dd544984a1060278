"""Files that commit a08ca20 wrote still work: its checkpoints, its configuration keys and its flags.

`files/a08ca20` holds two runs of six steps, and in `flags.json` the keys of its `train.Config`, each with values to try
(its choices, or else its default), and the flags of its other programs.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from model import checkpoint, export, generate
from model.huggingface import from_huggingface
from runtime.config import build, read_flags

FILES = Path(__file__).parent / "files" / "a08ca20"
FLAGS = json.loads((FILES / "flags.json").read_text())

# Losses of steps 7 to 10, and the evaluation after them, when commit a08ca20 itself resumed the runs to step 10.
RESUMED = {
    "adamw": ([5.131747245788574, 5.136834621429443, 5.052966117858887, 4.930083274841309], 4.954045057296753),
    "muon": ([5.2397942543029785, 5.232141017913818, 5.176342010498047, 5.076533317565918], 5.091421484947205),
}


@pytest.fixture(params=RESUMED)
def old_run(request, tmp_path, monkeypatch) -> Path:
    """A copy of an old run's folder, in the working folder that its relative paths start from."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FILES / "corpus.txt", tmp_path)
    return Path(shutil.copytree(FILES / request.param, Path("out") / request.param))


def test_an_old_run_resumes_with_the_losses_of_its_own_commit(old_run):
    losses, val_loss = RESUMED[old_run.name]
    assert train.main(["--resume", f"--run={old_run.name}", "--steps=10"]) == 0
    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["loss"] for row in rows if "loss" in row][6:] == pytest.approx(losses, rel=1e-5)
    assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)


@pytest.mark.parametrize("old_run", ["adamw"], indirect=True)
def test_an_old_run_warms_up_from_a_rate_of_0_as_it_began(old_run):
    """However many times it is resumed."""
    for steps in (8, 10):
        assert train.main(["--resume", "--run=adamw", f"--steps={steps}", "--warmup=20", "--lr=0.02"]) == 0
    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if "lr" in row][6:] == pytest.approx([0.006, 0.007, 0.008, 0.009])


def test_an_old_run_generates(old_run, capsys):
    assert generate.main([f"--run={old_run}", "--prompt=The quick", "--tokens=8", "--device=cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("The quick") and len(text) > len("The quick\n")


def test_an_old_run_exports(old_run):
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert export.main([f"--run={old_run}", "--to=exported"]) == 0
    theirs = json.loads(Path("exported/config.json").read_text())
    _, weights = from_huggingface(theirs, load_file("exported/model.safetensors"))
    saved = checkpoint.load(old_run / "last.pt")["model"]
    assert weights.keys() == saved.keys() and all(torch.equal(weights[key], saved[key]) for key in saved)


def test_old_configuration_keys_and_flags_are_accepted():
    for key, values in FLAGS["config"].items():
        for value in values:
            assert read_flags(train.Config, [f"--{key}={value}"], "") == {key: value}
    # One configuration of all keys at once: a file or a checkpoint of that commit.
    build(train.Config, {key: values[0] for key, values in FLAGS["config"].items()} | {"steps": 1})


@pytest.mark.parametrize("program", [generate, export], ids=["generate", "export"])
def test_old_flags_of_other_programs_are_accepted(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["-h"])
    words = capsys.readouterr().out.replace("[", " ").replace("]", " ").replace(",", " ").split()
    assert set(FLAGS[program.__name__]) <= set(words)
