"""A sweep declared by flags, and the comparison of runs that are there."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from data.formats import DataError
from experiments import __main__ as cli
from experiments import own
from experiments.judges import DIFFERENT, best, versus
from experiments.run import trials
from runtime.config import ConfigError

# Stands for train.py: a loss that is lower for `post` and for larger rates, apart by a little more for each seed.
FAKE = """
import json, sys
from pathlib import Path
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:])
folder = Path(flags["out"], flags["run"])
folder.mkdir()
loss = 3 - float(flags["lr"]) - (flags["model.norm_place"] == "post") * (1 + int(flags["seed"]) / 1000)
final = {"status": "finished", "val_loss": loss, "step": 5, "tokens": 10, "seconds": 1.0, "tok_s_steady": 7.0}
(folder / "status.json").write_text(json.dumps(final | {"flags_seen": flags}))
(folder / "config.json").write_text(json.dumps({"seed": int(flags["seed"]), "lr": float(flags["lr"])}))
"""
FAN_IN = {"model.init": "fan-in"}
FLAGS = (
    "--base=trial.py",
    "--grid",
    "lr=1e-3,3e-3,1e-2",
    "--versus",
    "model.norm_place=pre,post",
    "--set=model.init=fan-in",
    "--seeds=3",
)


def declared(judge):
    return judge.func, judge.args, judge.keywords


def test_flags_declare_a_suite():
    suite = own.suite(
        "small.py", ["lr=1e-3,3e-3"], ["model.norm_place=pre,post", "kernels=torch,auto"], 2, "60s", "mine", FAN_IN
    )
    found = trials(suite, "own")
    assert len(found) == 4 * 2 * 2
    knobs = {"config": "small.py", "seconds": 60.0, "lr": 3e-3, "seed": 1}
    assert found[-1].knobs == knobs | {"model.norm_place": "post", "kernels.every": "auto"}
    sides = ("pre, auto", "post, torch", "post, auto")
    assert [declared(claim.judge) for claim in suite.claims] == [
        declared(versus(side, "pre, torch", DIFFERENT, best_over="lr")) for side in sides
    ]
    (three,) = own.suite("small.py", ["lr=1,2,3"], [], 1, "", "mine", {}).claims
    with pytest.raises(
        ConfigError, match=r"mine variant=post seed=0: model.init look-back needs norm_place pre.*--set"
    ):
        own.suite("small.py", [], ["model.norm_place=pre,post"], 1, "", "mine", {})
    assert declared(three.judge) == declared(best("lr", "inside", where={"variant": "base"}))


def test_trials_may_differ_by_their_ranks():
    suite = own.suite("small.py", ["ranks=1,2"], [], 1, "60s", "scaling", {"batch_size": 8})
    assert [trial.ranks for trial in trials(suite, "own")] == [1, 2]
    with pytest.raises(DataError, match=r"batch_size 8 must be a multiple of 3 \(3 ranks\)"):
        own.suite("small.py", ["ranks=3"], [], 1, "", "scaling", {"batch_size": 8})
    with pytest.raises(ConfigError, match="ranks must be at least 1, not 0"):
        own.read_values("ranks=0", "--grid")


BUDGETS = {
    "60s": ("seconds", 60.0),
    "1.5min": ("seconds", 90.0),
    "500steps": ("steps", 500),
    "2Mtokens": ("tokens", 2e6),
}


@pytest.mark.parametrize("text", BUDGETS)
def test_budgets(text):
    assert own.read_budget(text) == dict([BUDGETS[text]])


def test_a_sweep_of_ones_own_ends_in_the_report_and_is_not_repeated(tmp_path, capsys):
    fake = tmp_path / "train.py"
    fake.write_text(FAKE)
    argv = [*FLAGS, "--budget=5steps", f"--results={tmp_path / 'results'}", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-S", "-E", str(fake)]
    assert cli.main(argv, command) == 0
    said = capsys.readouterr().out
    assert "18 trials at scale own, 0 of them done, 18 runs to start" in said
    assert said.rstrip().endswith("results/own/index.html")
    page = (tmp_path / "results" / "own" / "index.md").read_text()
    line = next(line for line in page.splitlines() if "post differs from pre, each at its best lr" in line)
    assert line.endswith("| 1.989 at 0.01 for 2.990 at 0.01 | -1.001 ± 0.0025 | reproduced |")
    assert "refuted" in next(line for line in page.splitlines() if "the best lr of post is inside the grid" in line)
    assert (tmp_path / "results" / "own" / "sweep.csv").read_text().count("\n") == 19
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "18 of them done, 0 runs to start" in capsys.readouterr().out


def write_run(folder, seed, loss, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": seed} | config))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "val_loss": loss, "tok_s_steady": 100.0}))


def test_groups_of_runs_are_compared_by_seed(tmp_path):
    for seed, (a, b) in enumerate([(2.0, 1.8), (3.0, 2.7), (4.1, 3.9)]):
        write_run(tmp_path / "a" / str(seed), seed, a, lr=1e-3, model={"n_layer": 2})
        write_run(tmp_path / "b" / str(seed), seed, b, lr=1e-3, model={"n_layer": 4})
    said = own.compare(tmp_path / "a", tmp_path / "b").splitlines()
    assert said[0] == "model.n_layer: 2 against 4"
    assert len(said) == 8 and said[1].endswith("a/0  seed 0  finished, val loss 2.0000, 100 tok/s")
    assert said[-1] == "difference in loss +0.2333 ± 0.14, 3 seeds, paired by seed, p 0.02"


def test_two_runs_of_one_seed_tell_nothing_of_the_noise(tmp_path):
    write_run(tmp_path / "a", 0, 2.0)
    write_run(tmp_path / "b", 0, 1.5)
    assert own.compare(tmp_path / "a", tmp_path / "b").splitlines()[-1] == (
        "difference in loss +0.5000, 1 seeds, paired by seed; one seed cannot measure the noise"
    )
    with pytest.raises(ConfigError, match="c has no run"):
        own.compare(tmp_path / "a", tmp_path / "c")
    write_run(tmp_path / "c", 0, 1.5)
    (tmp_path / "c" / "status.json").write_text('{"status": "oom"}')
    with pytest.raises(ConfigError, match="c ended as oom"):
        own.compare(tmp_path / "a", tmp_path / "c")
    for name, text in (("status.json", "{"), ("status.json", "[]"), ("config.json", "{"), ("config.json", "3")):
        shutil.rmtree(tmp_path / "c")
        write_run(tmp_path / "c", 0, 1.5)
        (tmp_path / "c" / name).write_text(text)
        with pytest.raises(ConfigError, match="c is no run that can be read"):
            own.compare(tmp_path / "a", tmp_path / "c")


def test_runs_are_named_by_their_path_or_as_in_out(tmp_path, monkeypatch):
    write_run(tmp_path / "out" / "a", 0, 2.0)
    monkeypatch.chdir(tmp_path)
    assert own.runs(Path("a")) == own.runs(Path("out/a")) != []


def test_runs_of_other_seeds_are_compared_by_their_means(tmp_path):
    for seed, loss in enumerate((2.0, 2.1)):
        write_run(tmp_path / "a" / str(seed), seed, loss)
        write_run(tmp_path / "b" / str(seed), seed + 10, loss + 1)
    last = own.compare(tmp_path / "a", tmp_path / "b").splitlines()[-1]
    assert last.startswith("difference in loss -1.0000 ± 0.3, 2 seeds, means")


def test_what_reports_need_is_said_when_it_is_missing(monkeypatch, capsys):
    for name in ("experiments.suites", "experiments.judges", "experiments.own"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    assert cli.main([]) == 2
    assert "pip install -c constraints.txt '.[experiments]'" in capsys.readouterr().err
