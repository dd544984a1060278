"""Sweeps: what trials a suite comes to, what is recorded of each, and what a killed sweep leaves."""

import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from experiments import __main__ as cli
from experiments import ledger
from experiments.run import (
    START_S,
    Sweep,
    digest_of,
    expected,
    is_done,
    kernel_ooms,
    machine,
    meta_model,
    places,
    trials,
)
from experiments.run import configuration as configured
from experiments.spec import Claim, Outcome, Results, Suite
from runtime.budget import LENGTHS
from runtime.config import ConfigError
from runtime.records import RECIPE
from runtime.run import read_status

# Stands for train.py: does as the knob `do` says, in `for` seconds, and leaves what train.py would. `starts` beside the
# runs' folders gets a line for every start.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:])
folder, do = Path(flags["out"], flags["run"]), flags.get("do", "finished")
with (folder.parent / "starts").open("a") as starts:
    starts.write(f"{folder.name} {os.getpid()}\\n")
if do == "refuse":
    sys.exit(print("error: no knob called so", file=sys.stderr) or 2)
folder.mkdir()
status = folder / "status.json"
status.write_text('{"status": "running"}')
(folder / "last.pt").write_text("large")
(folder / "shards-9").mkdir()
(folder / "shards-9/part").write_text("large")
at = [{"step": i + 1, "tokens": i, "seconds": i} for i in range(200)]
rows = [row | {"loss": 2.0, "lr": 1, "grad_norm": 1, "memory": row["step"]} for row in at]
rows += [row | {"diag": {"noise_scale": row["step"], "gradient": {"head": row["step"]}}} for row in at[:3]]
rows += [row | {"val_loss": 3.0 / row["step"], "val_bpb": 1.0} for row in at[:2]]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"torn')
(folder / "environment.json").write_text(json.dumps(dict(os.environ) | flags))
time.sleep(float(flags.get("for", 0)))
if do == "raise":
    raise ValueError("what went wrong")
if do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
status.write_text(json.dumps({"status": do, "val_loss": 2.0}))
time.sleep(float(flags.get("after", 0)))
if "fail" in flags:
    raise ValueError("beside the run")
sys.exit(do != "finished")
"""


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("fake") / "train.py"
    path.write_text(FAKE)
    return [sys.executable, "-S", "-E", str(path)]


@pytest.fixture
def run(fake, tmp_path, monkeypatch):
    """Sweep a suite of the fake at tiny scale: what it returned, and what was said."""
    monkeypatch.setattr("experiments.run._digest", lambda data: f"of {data.corpus}")  # the fake reads no text

    def start(suite: Suite, jobs: int = 4, rerun: bool = False, **options):
        said = []
        sweep = Sweep(trials(suite, "tiny"), tmp_path, rerun=rerun)
        sweep.places = [{"OMP_NUM_THREADS": "1", "PLACE": str(i)} for i in range(jobs)]
        return sweep.run(tmp_path / "out", **{"command": fake, "say": said.append} | options), said

    start.command = fake
    return start


def suite(name: str = "s", base: dict | None = None, **fields) -> Suite:
    return Suite(name, "A suite", {"tiny": base or {}}, (Claim(1, "", ""),), **fields)


def statuses(*names: str) -> Suite:
    return suite(variants={name: {"do": name} for name in names})


def recorded(folder: Path, name: str = "s") -> Results:
    """The latest outcome of each key."""
    return Results(list({o.key: o for o in history(folder, name)}.values()))


def history(folder: Path, name: str = "s") -> list[Outcome]:
    return ledger.read(ledger.place(folder, "tiny", name))


def one(folder: Path, **labels) -> Outcome:
    (found,) = recorded(folder).where(labels)
    return found


def starts(folder: Path) -> list[list[str]]:
    """Key and process of every start of a trial."""
    path = folder / "out" / "tiny" / "s" / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def outcome(**fields) -> Outcome:
    plain = {
        "key": "k", "suite": "s", "scale": "tiny", "labels": {}, "knobs": {}, "status": "finished", "seconds": 1.0,
        "started": "2026", "commit": "c", "machine": "here",
    }  # fmt: skip
    return Outcome(**plain | fields)


# Trials


def test_trials_are_variants_at_points_by_seeds():
    declared = suite(
        base={"lr": 1, "steps": 10}, variants={"a": {"x": 1}, "b": {"lr": 2}}, grid={"y": [3, 4]},
        grids={"tiny": {"y": [5]}}, seeds={"tiny": 2},
    )  # fmt: skip
    found = trials(declared, "tiny", extra={"z": 9})
    assert [dict(trial.labels) for trial in found] == [
        {"variant": v, "y": 5, "seed": s} for v in ("a", "b") for s in (0, 1)
    ]
    assert found[0].knobs == {"lr": 1, "steps": 10, "x": 1, "y": 5, "z": 9, "seed": 0}
    assert found[3].knobs == {"lr": 2, "steps": 10, "y": 5, "z": 9, "seed": 1}
    assert len(trials(declared, "tiny", seeds=3)) == 6
    with pytest.raises(ConfigError, match="no scale low: it has tiny"):
        trials(declared, "low")
    for knob in ("x", "y", "lr", "seed"):
        with pytest.raises(ConfigError, match=f"{knob} is what trials of suite s differ by"):
            trials(declared, "tiny", extra={knob: 9})
    lengths = suite(base={"seconds": 9}, grid={"steps": [3, 4]})
    with pytest.raises(ConfigError, match="tokens is what trials of suite s differ by"):
        trials(lengths, "tiny", extra={"tokens": 9})


SHAPE = {"model.n_layer": 2, "model.d_model": 32, "model.n_head": 2, "model.seq_len": 64, "data.tokenizer": "bytes"}


def budgets(axis, base, **fields) -> list[dict]:
    """The budgets of trials: that of the base at a batch of 8, and what a batch of 16 gets."""
    declared = suite(base=SHAPE | {"batch_size": 8} | base, grid={"batch_size": [8, 16]}, axis=axis, **fields)
    return [{k: v for k, v in trial.knobs.items() if k in LENGTHS} for trial in trials(declared, "tiny")]


@pytest.mark.parametrize(
    ("axis", "base", "expected"),
    [
        (None, {"steps": 10}, {"steps": 10}),
        ("tokens", {"steps": 10}, {"tokens": 10 * 8 * 64}),
        ("tokens", {"tokens": 1000}, {"tokens": 1000}),
        ("flops", {"tokens": 1000}, {"tokens": 1000}),
    ],
)
def test_budget_is_equal_on_the_axis(axis, base, expected):
    assert budgets(axis, base) == [expected, expected]


@pytest.mark.parametrize("length", ["steps", "tokens", "seconds"])
def test_a_length_given_to_all_trials_takes_the_place_of_the_axis(length):
    declared = suite(base=SHAPE | {"steps": 10}, grid={"batch_size": [8, 16]}, axis="flops")
    given = [trial.knobs for trial in trials(declared, "tiny", extra={length: 9})]
    assert [{k: v for k, v in knobs.items() if k in LENGTHS} for knobs in given] == [{length: 9}] * 2


def test_a_length_of_its_own_stays_with_a_trial():
    variants = {"a": {}, "b": {"steps": 3}}
    assert budgets("tokens", {"steps": 10}, variants=variants)[2:] == [{"steps": 3}] * 2


def test_equal_flops_are_fewer_tokens_for_a_larger_model():
    variants = {"small": {}, "large": {"model.n_layer": 8}, "bad": {"model.n_head": 5}}
    small, _, large, _, bad, _ = budgets("flops", {"steps": 100}, variants=variants)
    models = [meta_model(configured(SHAPE | {"steps": 1} | variants[v])) for v in ("small", "large")]
    per_token = [model.flops_per_token() for model in models]
    assert small["tokens"] == 100 * 8 * 64
    assert large["tokens"] * per_token[1] == pytest.approx(small["tokens"] * per_token[0], rel=1e-3)
    assert large["tokens"] < small["tokens"] / 2
    assert bad == small  # and train.py says what is wrong with it


# What is recorded


def test_an_outcome_has_the_run_and_its_end(run, tmp_path):
    ended, said = run(statuses("finished"))
    (found,) = recorded(tmp_path).outcomes
    assert ended
    assert said[0].startswith("1/1  s variant=finished seed=0  finished, val loss 2.0000, ")
    assert said[0].endswith("ETA 0:00:00")
    assert found.val_loss == 2.0
    assert found.final["memory"] == 200  # the peak is in the last row
    assert found.steps == [{"step": s, "seconds": s - 1, "loss": 2.0} for s in (1, 200)]
    assert [row["val_loss"] for row in found.evals] == [3.0, 1.5]
    assert found.diag["gradient"] == {"head": 3}
    assert [row["noise_scale"] for row in found.diag["series"]] == [1, 2, 3]
    folder = tmp_path / "out" / "tiny" / "s" / found.key
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "metrics.jsonl", "status.json"]
    given = json.loads((folder / "environment.json").read_text())
    assert given["WANDB_RUN_GROUP"] == "s"
    assert int(given["save_every"]) > 10**6  # no checkpoints but the last
    assert found.machine.endswith("4 at once")
    assert found.started
    assert found.seconds > 0
    assert (found.knobs, found.recipe) == ({"do": "finished", "seed": 0}, RECIPE)  # what the base does not have
    assert found.digest == digest_of(trials(statuses("finished"), "tiny")[0])
    assert len(ledger.place(tmp_path, "tiny", "s").read_bytes()) < 2000


def test_every_end_is_an_outcome(run, tmp_path):
    ended, _ = run(statuses("finished", "nan", "diverged", "oom", "raise", "refuse", "kill"))
    found = {o.labels["variant"]: (o.status, o.error.split("\n")[-1]) for o in recorded(tmp_path).outcomes}
    assert ended
    assert found == {
        "finished": ("finished", ""),
        "nan": ("nan", ""),
        "diverged": ("diverged", ""),
        "oom": ("oom", ""),
        "raise": ("crashed", "ValueError: what went wrong"),
        "refuse": ("unsupported", "error: no knob called so"),
        "kill": ("crashed", "killed by SIGKILL"),
    }
    assert all(math.isinf(o.val_loss) for o in recorded(tmp_path).outcomes if o.status != "finished")
    assert not [*(tmp_path / "out").rglob("*.pt"), *(tmp_path / "out").rglob("shards-*")]


def test_a_kill_is_out_of_memory_where_the_kernel_says_so(run, tmp_path, monkeypatch):
    assert kernel_ooms() >= 0
    counts = iter((4, 5))
    monkeypatch.setattr("experiments.run.kernel_ooms", lambda: next(counts))
    run(statuses("kill"))
    assert one(tmp_path).status == "oom"


def test_a_trial_that_hangs_is_ended_as_it_recorded(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["experiments.run"].PATIENCE_S, "tiny", 2)
    begin = time.monotonic()
    run(suite(variants={"never": {"for": 60}, "after its end": {"after": 60}, "beside": {"fail": 1}}))
    ends = {o.labels["variant"]: (o.status, o.error) for o in recorded(tmp_path).outcomes}
    assert ends == {"never": ("time_limit", "killed by SIGKILL"), "after its end": ("finished", ""),
                    "beside": ("finished", "")}  # fmt: skip
    assert time.monotonic() - begin < 60


def test_trials_run_side_by_side_each_in_its_place(run, tmp_path):
    run(suite(base={"for": 0.5}, grid={"x": range(4)}), jobs=2)
    began = sorted((o.started, o.seconds) for o in recorded(tmp_path).outcomes)
    environments = [json.loads(p.read_text()) for p in tmp_path.rglob("environment.json")]
    assert sorted(e["PLACE"] for e in environments) == ["0", "0", "1", "1"]
    assert len(began) == 4
    assert sum(seconds for _, seconds in began) > 2


# Resuming


def test_what_is_done_is_not_repeated_and_a_rerun_supersedes(run, tmp_path):
    declared = statuses("finished", "nan")
    run(declared)
    first = one(tmp_path, variant="nan")
    run(declared)
    assert len(starts(tmp_path)) == 2
    run(declared, rerun=True)
    assert len(starts(tmp_path)) == 4
    assert len(history(tmp_path)) == 4  # the old rows are kept
    assert len(recorded(tmp_path).outcomes) == 2
    assert one(tmp_path, variant="nan").started > first.started


def test_an_interrupted_trial_is_run_again(run, tmp_path):
    run(statuses("interrupted"))
    run(statuses("interrupted"))
    assert len(starts(tmp_path)) == 2


def test_equal_knobs_run_once(run, tmp_path):
    run(suite(grid={"@name,x": (("a", 1), ("b", 1), ("c", 2))}))
    assert len(starts(tmp_path)) == len(history(tmp_path)) == 2


def test_an_outcome_of_another_recipe_or_text_is_not_that_of_the_trial(run, tmp_path):
    (trial,) = trials(suite(), "tiny")
    good = outcome(key=trial.key, recipe=RECIPE, digest=digest_of(trial))
    assert good.digest and is_done(trial, good) and not is_done(trial, None)
    assert is_done(trial, replace(good, digest="", status="unsupported"))  # it never got to a text
    for change in ({"recipe": RECIPE - 1}, {"digest": "0"}, {"status": "interrupted"}):
        assert not is_done(trial, replace(good, **change))
    ledger.append(ledger.place(tmp_path, "tiny", "s"), replace(good, digest="0"))
    run(suite())
    assert len(starts(tmp_path)) == 1 and len(history(tmp_path)) == 2


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@ON_LINUX
def test_a_killed_sweep_goes_on(run, tmp_path):
    declared, rng, kills, jobs = suite(base={"for": 0.1}, grid={"x": range(12)}), random.Random(0), 0, 3
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    while len(recorded(tmp_path).outcomes) < 12:
        process = multiprocessing.get_context("fork").Process(target=run, args=(declared, jobs))
        before = len(starts(tmp_path))
        process.start()
        while len(starts(tmp_path)) == before and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        if kills < len(signals) and process.is_alive():
            os.kill(process.pid, signals[kills])
            kills += 1
        process.join()
        time.sleep(0.02)
        assert not any(alive(pid) for _, pid in starts(tmp_path))
    assert kills >= 3
    assert sorted(o.labels["x"] for o in history(tmp_path)) == list(range(12))  # each once, none lost
    assert {o.status for o in history(tmp_path)} == {"finished"}
    assert len(starts(tmp_path)) <= 12 + kills * jobs  # no others than those in flight were begun again


def test_an_interrupted_sweep_leaves_no_process(run, tmp_path):
    declared = suite(variants={"short": {}, "long": {"for": 60}})
    assert run(declared, say=lambda line: signal.raise_signal(signal.SIGTERM))[0] is False
    assert [o.labels["variant"] for o in recorded(tmp_path).outcomes] == ["short"]
    assert len(starts(tmp_path)) == 2
    assert not any(alive(process) for _, process in starts(tmp_path))


def test_no_trials_start_after_the_time_limit(run, tmp_path):
    ended, said = run(suite(base={"for": 0.3}, grid={"x": range(9)}), jobs=2, time_limit=0.2)
    assert ended
    assert len(recorded(tmp_path).outcomes) == 2
    assert said[-1].startswith("7 trials are left")


def test_two_sweeps_of_a_suite_are_one_too_many(run, tmp_path):
    """Whether they share the ledger or only the runs' folders."""
    for path in (ledger.place(tmp_path, "tiny", "s"), ledger.place(tmp_path / "out", "tiny", "s")):
        with ledger.locked(path), pytest.raises(ledger.LedgerError, match=f"another sweep holds {path}"):
            run(statuses("finished"))
    assert run(statuses("finished"))[0]


def test_a_torn_line_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "tiny" / "s.jsonl"
    assert ledger.read(path) == []
    for key, began in (("a", "2027"), ("b", "2026")):
        ledger.append(path, outcome(key=key, labels={"x": key}, started=began))
    assert [o.key for o in ledger.read(path)] == ["a", "b"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [o.key for o in ledger.read(path)] == ["a"]
    ledger.append(path, outcome(key="b", labels={"x": "b"}, started="2026"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line, what",
    [
        ("{}", "missing"), ("[]", "must be"), ("nonsense", "Expecting"), ('{"key": 1}', "missing"),
        ({"final": []}, "final is"), ({"final": {"val_loss": "low"}}, "val_loss is 'low'"),
        ({"labels": 3}, "labels is 3"),
        ({"steps": [1]}, "row is 1"), ({"evals": [{"step": "x"}]}, "step is 'x'"), ({"seconds": "9"}, "seconds is"),
        ({"labels": {"seed": "a"}}, "seed is 'a'"), ({"recipe": None}, "recipe is None"), ({"other": 1}, "other"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path, line, what):
    path = tmp_path / "s.jsonl"
    text = line if isinstance(line, str) else json.dumps(asdict(outcome()) | line)
    path.write_text(json.dumps(asdict(outcome())) + "\n" + text + "\n")
    with pytest.raises(ledger.LedgerError, match=f"line 2, is no outcome .*{what}"):
        ledger.read(path)


def test_what_is_no_number_is_null(tmp_path):
    path = tmp_path / "s.jsonl"
    ledger.append(path, outcome(final={"val_loss": math.nan}, evals=[{"step": 1, "val_loss": math.inf}]))
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    (found,) = ledger.read(path)
    assert math.isinf(found.val_loss) and found.evals == [{"step": 1, "val_loss": None}]


def test_what_a_line_leaves_out_is_empty(tmp_path):
    bare = outcome(seconds=0.0, commit="", machine="")
    ledger.append(tmp_path / "s.jsonl", bare)
    assert ledger.read(tmp_path / "s.jsonl") == [bare] and "error" not in (tmp_path / "s.jsonl").read_text()


def test_a_ledger_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "s.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path}/s.jsonl'"):
        ledger.read(tmp_path / "s.jsonl")
    for path in (tmp_path / "s.jsonl", tmp_path / "file" / "s.jsonl"):
        with pytest.raises(OSError, match=str(tmp_path)):
            ledger.append(path, outcome())


def test_the_past_tells_how_long_it_takes(tmp_path):
    declared = trials(suite(grid={"x": range(3)}), "tiny")
    sweep = Sweep(declared, tmp_path)
    sweep.places = [{}] * 2
    here = machine(declared[0], 2)
    past = [outcome(key=key, seconds=s, machine=here) for key, s in ((declared[0].key, 9), ("a", 1), ("b", 3))]
    sweep.past = [*past, outcome(key=declared[1].key, seconds=99, machine="elsewhere")]
    assert sweep.forecast([]) == 0
    assert sweep.forecast(declared) == (9 + 2 * 3) / 2


def test_what_never_ran_is_estimated_by_its_flops():
    small, large = (trials(suite(base=SHAPE | {"steps": n}), "tiny")[0] for n in (100, 10**6))
    clocked = trials(suite(base=SHAPE | {"seconds": 50}), "tiny")[0]
    refused = trials(suite(base=SHAPE | {"optimizer": "sgd", "steps": 1}), "tiny")[0]
    assert expected(small, []) < expected(large, []) / 10
    assert (expected(clocked, []), expected(refused, [])) == (START_S + 50, START_S)
    done = {"tokens": 100 * 16 * 64, "flops_per_token": meta_model(configured(small.knobs)).flops_per_token()}
    other = outcome(key="x", suite="other", seconds=3 * expected(small, []), final=done)
    assert expected(large, [other]) == pytest.approx(3 * expected(large, []))  # the machine is a third as fast


def test_within_a_time_the_cheapest_suites_come_first_and_none_that_would_not_end(fake, tmp_path):
    """By what the ledger has of this machine: `slow` took 60 s, `quick` and `brief` less."""
    declared = {name: suite(name, {"for": 0.1}, grid={"x": range(2)}) for name in ("slow", "brief", "quick")}
    here = machine(trials(declared["slow"], "tiny")[0], 1)
    for name, seconds in (("slow", 60.0), ("brief", 0.3), ("quick", 0.2)):
        past = outcome(key="past", suite=name, labels={"x": -1}, seconds=seconds, machine=here)
        ledger.append(ledger.place(tmp_path, "tiny", name), past)
    said = []
    sweep = Sweep([t for each in declared.values() for t in trials(each, "tiny")], tmp_path, jobs=1)
    assert sweep.run(tmp_path / "out", command=fake, say=said.append, within=20)
    assert [line.split()[1] for line in said[:-1]] == ["quick", "quick", "brief", "brief"]
    assert said[-1].startswith("2 trials are left because the time is up")


def test_a_trial_that_is_late_after_all_is_killed_and_not_recorded(run, tmp_path):
    declared = suite(base={"for": 60})
    past = outcome(key="past", labels={"x": -1}, seconds=0.1, machine=machine(trials(declared, "tiny")[0], 4))
    ledger.append(ledger.place(tmp_path, "tiny", "s"), past)
    ended, said = run(declared, within=1.0)
    assert ended and len(recorded(tmp_path).outcomes) == 1
    assert said == ["1 trials are left because the time is up: the same command continues"]
    assert len(starts(tmp_path)) == 1 and not alive(starts(tmp_path)[0][1])


def test_small_trials_share_a_card(run, tmp_path, monkeypatch):
    """A trial that measures the card has it alone; what ran out of memory beside others is run again by itself."""
    monkeypatch.setattr("experiments.run.kernel_ooms", iter(range(99)).__next__)
    small = suite(base={"for": 0.4}, grid={"do": ("finished", "kill")})
    measured = suite("m", {"for": 0.4}, alone=True)
    sweep = Sweep([*trials(small, "tiny"), *trials(measured, "tiny")], tmp_path)
    sweep.places = [{"CUDA_VISIBLE_DEVICES": "0"}] * 3
    assert sweep.run(tmp_path / "out", command=run.command, say=lambda line: None)
    assert [o.status for o in history(tmp_path)] == ["finished", "oom"]
    assert len(starts(tmp_path)) == 3  # the second twice
    spans = {}
    for o in (*history(tmp_path), *history(tmp_path, "m")):
        began = datetime.fromisoformat(o.started).timestamp()
        spans[o.suite, o.status] = (began, began + o.seconds)
    (first, killed, alone) = (spans[key] for key in (("s", "finished"), ("s", "oom"), ("m", "finished")))
    assert killed[0] >= first[1] - 0.1 and (alone[0] >= killed[1] - 0.1 or alone[1] <= killed[0] + 0.1)


LAUNCHER = """
import os, subprocess, sys
ranks, command = int(sys.argv[1].partition("=")[2]), sys.argv[3:]
codes = [subprocess.call(command, env=os.environ | {"RANK": str(rank)}) for rank in range(ranks)]
if any(codes):
    print(f"E1127 04:24:23 1 api.py:1] failed (exitcode: {codes[0]}) local_rank: 0\\nTraceback", file=sys.stderr)
sys.exit(any(codes))
"""


def test_trials_of_several_ranks_come_last_each_on_cards_of_its_own(run, tmp_path, monkeypatch):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    monkeypatch.setattr("experiments.run.TORCHRUN", [sys.executable, "-S", "-E", str(launcher)])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,2,0")
    assert places(ranks=2) == [{"CUDA_VISIBLE_DEVICES": "3,1"}, {"CUDA_VISIBLE_DEVICES": "2,0"}]
    scaling = suite(grid={"@ranks": (3, 1, 2)})
    assert len({trial.key for trial in trials(scaling, "tiny")}) == 3
    refused = suite("r", {"do": "refuse"}, grid={"@ranks": (2,)})
    sweep = Sweep([t for each in (scaling, refused) for t in trials(each, "tiny")], tmp_path)
    assert sweep.run(tmp_path / "out", command=run.command, say=lambda line: None)
    found = {o.labels["ranks"]: o for o in history(tmp_path)}
    assert list(found) == [1, 2, 3]
    counts = {o.key: sum(key == o.key for key, _ in starts(tmp_path)) for o in found.values()}
    assert counts == {found[1].key: 1, found[2].key: 2, found[3].key: 3}
    (ended,) = history(tmp_path, "r")
    assert (ended.status, ended.error.splitlines()) == ("unsupported", 2 * ["error: no knob called so"])
    with pytest.raises(ConfigError, match="a trial takes 5 ranks, and this machine has 4 GPUs"):
        Sweep(trials(suite(grid={"@ranks": (5,)}), "tiny"), tmp_path).run(tmp_path / "out", command=run.command)


def test_offline_trials_have_text_that_is_there_and_a_tokenizer_of_the_same_size():
    knobs = {"data.corpus": "pile", "data.tokenizer": "gpt2"}
    (moved,) = trials(suite(base=knobs), "tiny", offline=True)
    assert moved.knobs == {"data.corpus": "docstrings", "data.tokenizer": "bpe", "data.vocab_size": 50_257, "seed": 0}
    knobs = {"data.corpus": "openwebtext", "data.tokenizer": "bpe", "data.vocab_size": 9}
    assert trials(suite(base=knobs), "tiny", offline=True)[0].knobs == knobs | {"data.corpus": "stdlib", "seed": 0}
    there = suite(base={"data.corpus": "docstrings", "data.tokenizer": "bytes"})
    assert trials(there, "tiny", offline=True) == trials(there, "tiny")


# The command


@pytest.fixture
def command(fake, tmp_path, monkeypatch, capsys):
    """`python -m experiments` with the fake and two suites: the exit code and what was printed."""
    suites = {"s": statuses("finished", "nan"), "t": suite("t", {"steps": 4})}
    stub = SimpleNamespace(
        write=lambda names, suites, scale, results, *how: results / f"{'-'.join(names)}-{scale}.html"
    )
    for name, holds in {"suites": SimpleNamespace(SUITES=suites), "report": stub}.items():
        monkeypatch.setitem(sys.modules, f"experiments.{name}", holds)
        monkeypatch.setattr(f"experiments.{name}", holds, raising=False)

    def start(*argv):
        code = cli.main([*argv, f"--results={tmp_path}", f"--out={tmp_path / 'out'}"], fake)
        return code, "".join(capsys.readouterr())

    return start


def test_the_list_does_not_wait_for_torch():
    code = "import sys; from experiments.__main__ import main; assert main([]) == 0 and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], check=True, capture_output=True)


def test_a_command_lists_shows_runs_and_reports(command, tmp_path):
    code, text = command()
    assert code == 0
    assert "s              A suite (row 1)" in text
    assert "tiny 2 trials\n" in text

    code, text = command("all", "--dry-run", "--set", "clip=3", "--jobs=2")
    assert code == 0
    assert "s variant=nan seed=0\n" in text
    assert "3 trials at scale tiny, 0 of them done, 3 runs to start" in text
    assert not ledger.place(tmp_path, "tiny", "s").exists()

    code, text = command("s")
    assert code == 0
    assert text.endswith(f"report   {tmp_path}/s-tiny.html\n")
    dry = command("s", "--dry-run")[1]
    assert "2 trials at scale tiny, 2 of them done, 0 runs to start" in dry
    assert "s variant=finished seed=0  finished, val loss 2.0000\n" in dry
    assert "tiny 2 trials (2 ran, " in command()[1]
    assert command("report", "t") == (0, f"report   {tmp_path}/t-tiny.html\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x",), "no suite called x: there are s, t, and all"),
        (("s", "--set", "lrr=3"), "no flag called --lrr (did you mean --lr?)"),
        (("s", "--set", "lr=-3"), "lr must be more than 0"),
        (("s", "--scale=full"), "suite s has no scale full: it has tiny"),
        (("s", "--set", "out=x"), "--set out has no effect"),
        (("s", "--set", "seed=1"), "--set seed has no effect"),
        (("s", "--set", "do=1"), "no flag called --do"),
        (("s", "--set", "lr"), "--set takes KNOB=VALUE, not 'lr'"),
        (("s", "--base", "trial.py"), "--base declares a sweep of its own, without the suite s"),
        (("--grid", "lr=1,2"), "--base=small.py says of what"),
        (("--base", "trial.py", "--grid", "lrr=1,2"), "no knob called 'lrr'"),
        (("--base", "trial.py", "--grid", "lr=1,1"), "has a value twice"),
        (("--base", "trial.py", "--grid", "lr=1,2", "--versus", "lr=3,4"), "lr is given twice"),
        (("--base", "trial.py", "--grid", "steps=1,2", "--budget", "60s"), "is given twice"),
        (("--base", "trial.py", "--grid", "out=1,2"), "--grid cannot give out"),
        (("--base", "trial.py", "--grid", "lr="), "lr must be"),
        (("--base", "trial.py", "--grid", "lr=-1,2"), "lr must be more than 0"),
        (("--base", "trial.py", "--name", "../x"), "--name is the name of a file, not '../x'"),
        (("--base", "absent.py"), "no config file 'absent.py'"),
        (("--base", "trial.py", "--budget", "60 parsecs"), "--budget is a number and one of s, min"),
        (("--base", "trial.py", "--budget", "1.5.2s"), "--budget is a number and one of s, min"),
        (("--base", "trial.py", "--budget", "0s"), "--budget must be more than 0, not '0s'"),
        (("compare", "a"), "compare takes two folders"),
        (("compare", "a", "b"), "a has no run"),
    ],
)
def test_what_cannot_be_run_is_refused(command, argv, message):
    code, text = command(*argv)
    assert code == 2
    assert message in text


def test_the_trainer_is_run(tiny, tmp_path):
    """What a fake cannot show: train.py itself, finished and refused."""
    given = dict(flag[2:].split("=", 1) for flag in tiny(tmp_path))
    del given["out"], given["save_every"]
    variants = {"good": {}, "bad": {"precision": "int3"}, "large": {"batch_size": 1024, "model.seq_len": 256}}
    declared = suite(base=given, variants=variants, cap={"tiny": 450 * 10**6})
    assert Sweep(trials(declared, "tiny"), tmp_path).run(tmp_path / "out")
    good, bad, large = (one(tmp_path, variant=name) for name in variants)
    assert good.status == "finished", good.error
    assert good.val_loss < math.log(257)
    assert [row["step"] for row in good.steps] == [1, 12]
    assert [row["step"] for row in good.evals] == [6, 12]
    assert good.final["memory"] > 0
    assert bad.status == "unsupported"
    assert bad.error.startswith("error: precision must be")
    assert large.status == "oom", large.error  # beyond the cap
    assert not list((tmp_path / "out").rglob("*.pt"))


def forked(tiny, folder: Path, **changes) -> Sweep:
    """A sweep of one run of train.py, forked from the warm process as on a CPU."""
    given = dict(flag[2:].split("=", 1) for flag in tiny(folder, **changes))
    del given["out"], given["save_every"]
    return Sweep(trials(suite(base=given), "tiny"), folder)


@ON_LINUX
def test_a_forked_trial_is_as_a_process_of_its_own(tiny, tmp_path, monkeypatch):
    """With the threads of its place, output in its own files, and the same losses, wherever the sweep was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.run.TRAIN", ())  # one that is not forked fails
    before = os.environ.copy()
    for threads in (1, 3):
        sweep = forked(tiny, tmp_path, clip=threads)
        sweep.places = [{"OMP_NUM_THREADS": str(threads)}]
        assert sweep.run(tmp_path / "out", command=())
        log = (tmp_path / "out" / "tiny" / "s" / f"{history(tmp_path)[-1].key}.log").read_text()
        assert f"{threads} threads)" in log and "finished: " in log
    assert os.environ == before
    assert train.main(tiny(tmp_path, config="trial.py", clip=3, run="alone")) == 0
    assert history(tmp_path)[-1].val_loss == pytest.approx(read_status(tmp_path / "alone")["val_loss"], rel=1e-5)


@ON_LINUX
def test_a_forked_trial_dies_with_its_sweep(tiny, tmp_path):
    sweep, lock = forked(tiny, tmp_path, steps=10**6), "out/tiny/s/*/run.lock"

    def run():
        multiprocessing.forkserver._forkserver.__init__()  # the warm process of these tests is not a child's to use
        sweep.run(tmp_path / "out")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while not (found := [path for path in tmp_path.glob(lock) if path.read_text()]) and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    trial = found[0].read_text()
    for _ in range(3000):
        if not alive(trial):
            break
        time.sleep(0.02)
    assert not alive(trial)
