"""Sweeps: what trials a suite comes to, what is recorded of each, and what a killed sweep leaves."""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import __main__ as cli
from experiments import ledger
from experiments.run import (
    START_S,
    Plan,
    expected,
    forecast,
    kernel_ooms,
    machine,
    meta_model,
    offline,
    rough,
    share_of_card,
    sweep,
    trials,
)
from experiments.run import configuration as configured
from experiments.spec import Outcome, Results, Suite
from runtime.budget import LENGTHS
from runtime.config import ConfigError

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
at = [{"step": i + 1, "tokens": i, "seconds": i} for i in range(200)]
rows = [row | {"loss": 2.0, "lr": 1, "grad_norm": 1, "memory": row["step"]} for row in at]
rows += [row | {"diag": {"noise_scale": row["step"], "snr": {"head": 1}}} for row in at[:3]]
rows += [row | {"val_loss": 3.0 / row["step"], "val_bpb": 1.0} for row in at[:2]]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"torn')
(folder / "environment.json").write_text(json.dumps(dict(os.environ) | flags))
time.sleep(float(flags.get("for", 0)))
if do == "raise":
    raise ValueError("what went wrong")
if do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
status.write_text(json.dumps({"status": do, "val_loss": 2.0}))
sys.exit(do != "finished")
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("fake") / "train.py"
    path.write_text(FAKE)
    return [sys.executable, "-S", "-E", str(path)]


@pytest.fixture
def run(fake, tmp_path):
    """Sweep a suite of the fake at tiny scale: what it returned, and what was said."""

    def start(suite: Suite, jobs: int = 4, rerun: bool = False, **options):
        said = []
        plan = Plan(trials(suite, "tiny"), tmp_path, rerun)
        environments = [{"OMP_NUM_THREADS": "1", "PLACE": str(i)} for i in range(jobs)]
        options = {"command": fake, "say": said.append} | options
        return sweep(plan, tmp_path / "out", environments, **options), said

    start.command = fake
    return start


def suite(name: str = "s", base: dict | None = None, **fields) -> Suite:
    return Suite(name, "A suite", (1,), {"tiny": base or {}}, (), **fields)


def statuses(*names: str) -> Suite:
    return suite(variants={name: {"do": name} for name in names})


def recorded(folder: Path, name: str = "s") -> Results:
    return Results(ledger.read(ledger.place(folder, "tiny", name)))


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


@pytest.mark.parametrize(("rule", "power"), [("fixed", 0), ("sqrt", 0.5), ("linear", 1)])
def test_rates_follow_the_batch_by_the_rule(rule, power):
    base = {"lr": 1e-3, "batch_size": 16, "steps": 10}
    declared = suite(base=base, grid={"batch_size": [4, 16, 64]}, variants={"a": {}, "b": {"lr": 3e-3}})
    for trial in trials(declared, "tiny", rule=rule):
        factor = {4: 0.5, 16: 1, 64: 2}[trial.labels["batch_size"]] ** (2 * power)
        assert trial.knobs["lr"] == factor * {"a": 1e-3, "b": 3e-3}[trial.labels["variant"]]
        assert trial.knobs.get("muon_lr", 2e-2) == factor * 2e-2


def budgets(axis, base, **fields) -> list[dict]:
    """The budgets of trials: that of the base at a batch of 8, and what a batch of 16 gets."""
    declared = suite(base=SHAPE | {"batch_size": 8} | base, grid={"batch_size": [8, 16]}, axis=axis, **fields)
    return [{k: v for k, v in trial.knobs.items() if k in LENGTHS} for trial in trials(declared, "tiny")]


@pytest.mark.parametrize(
    ("axis", "base", "expected"),
    [
        (None, {"steps": 10}, {"steps": 10}),
        ("steps", {"steps": 10}, {"steps": 10}),
        ("tokens", {"steps": 10}, {"tokens": 10 * 8 * 64}),
        ("steps", {"tokens": 1000}, {"steps": 2}),
        ("flops", {"tokens": 1000}, {"tokens": 1000}),
        ("seconds", {"seconds": 7}, {"seconds": 7}),
    ],
)
def test_budget_is_equal_on_the_axis(axis, base, expected):
    assert budgets(axis, base) == [expected, expected]


@pytest.mark.parametrize(("axis", "base"), [("seconds", {"steps": 10}), ("tokens", {"seconds": 3})])
def test_seconds_convert_to_nothing(axis, base):
    with pytest.raises(ConfigError, match=rf"--set {axis}=\.\.\. gives one"):
        budgets(axis, base)
    declared = suite(base=SHAPE | base, axis=axis)
    assert trials(declared, "tiny", extra={axis: 9})[0].knobs[axis] == 9


def test_a_length_of_its_own_stays_with_a_trial():
    variants = {"a": {}, "b": {"steps": 3}}
    assert budgets("tokens", {"steps": 10}, variants=variants)[2:] == [{"steps": 3}] * 2


def test_variants_that_are_to_match_have_as_many_parameters():
    variants = {"gated": {}, "plain": {"model.activation": "relu"}, "larger": {"model.d_ff": 200}}
    base = SHAPE | {"steps": 1}
    assert len(trials(suite(base=base, variants=variants), "tiny")) == 3
    with pytest.raises(ConfigError, match=r"as many parameters, and has gated [\d,]+, plain [\d,]+, larger"):
        trials(suite(base=base, variants=variants, matched=True), "tiny")
    del variants["larger"]
    assert len(trials(suite(base=base, variants=variants, matched=True), "tiny")) == 2


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
    assert len(found.steps) == ledger.STEPS
    assert [found.steps[0]["step"], found.steps[-1]["step"]] == [1, 200]
    assert set(found.steps[0]) == {"step", "tokens", "seconds", "loss", "lr", "grad_norm"}
    assert [row["val_loss"] for row in found.evals] == [3.0, 1.5]
    assert found.diag["noise_scale"] == 3
    assert [row["noise_scale"] for row in found.diag["series"]] == [1, 2, 3]
    folder = tmp_path / "out" / "tiny" / "s" / found.key
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "metrics.jsonl", "status.json"]
    given = json.loads((folder / "environment.json").read_text())
    assert given["WANDB_RUN_GROUP"] == "s"
    assert int(given["save_every"]) > 10**6  # no checkpoints but the last
    assert found.machine.endswith("4 at once")
    assert found.started
    assert found.seconds > 0
    assert len(ledger.place(tmp_path, "tiny", "s").read_bytes()) < 10_000


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
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_a_kill_is_out_of_memory_where_the_kernel_says_so(run, tmp_path, monkeypatch):
    assert kernel_ooms() >= 0
    counts = iter((4, 5))
    monkeypatch.setattr("experiments.run.kernel_ooms", lambda: next(counts))
    run(statuses("kill"))
    assert one(tmp_path).status == "oom"


def test_a_trial_that_hangs_is_ended(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["experiments.run"].PATIENCE_S, "tiny", 0.5)
    begin = time.monotonic()
    run(suite(base={"for": 60}))
    assert one(tmp_path).status == "time_limit"
    assert time.monotonic() - begin < 10


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
    path = ledger.place(tmp_path, "tiny", "s")
    assert len(ledger.history(path)) == 4  # the old rows are kept
    assert len(recorded(tmp_path).outcomes) == 2
    assert one(tmp_path, variant="nan").started > first.started


def test_an_interrupted_trial_is_run_again(run, tmp_path):
    run(statuses("interrupted"))
    run(statuses("interrupted"))
    assert len(starts(tmp_path)) == 2


def test_equal_knobs_run_once_and_serve_all_their_labels(run, tmp_path):
    twins = suite(variants={"a": {"x": 1}, "b": {"x": 1}})
    run(twins)
    assert len(starts(tmp_path)) == 1
    a, b = (one(tmp_path, variant=name) for name in "ab")
    assert a == replace(b, labels=a.labels)
    path = ledger.place(tmp_path, "tiny", "s")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])  # as if killed between the two
    run(suite(variants={"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}))
    assert len(starts(tmp_path)) == 1
    assert recorded(tmp_path).values("variant") == ["a", "b", "c"]


def test_other_knobs_at_the_same_labels_take_the_place_and_give_it_back(run, tmp_path):
    first, second = (suite(variants={"a": {"do": "nan", "x": x}}) for x in (1, 2))
    for declared, x in ((first, 1), (second, 2), (first, 1), (first, 1)):
        run(declared)
        assert one(tmp_path).knobs["x"] == x
    assert len(starts(tmp_path)) == 2
    assert len(ledger.history(ledger.place(tmp_path, "tiny", "s"))) == 3


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
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
    history = ledger.history(ledger.place(tmp_path, "tiny", "s"))
    assert kills >= 3
    assert sorted(o.labels["x"] for o in history) == list(range(12))  # each once, none lost
    assert {o.status for o in history} == {"finished"}
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
    for path in (ledger.place(tmp_path, "tiny", "s"), tmp_path / "out" / "tiny" / "s.lock"):
        with ledger.locked(path), pytest.raises(ledger.LedgerError, match=f"another sweep holds {path}"):
            run(statuses("finished"))
    assert run(statuses("finished"))[0]


def test_a_torn_line_is_passed_over_and_cut_off(tmp_path):
    path = tmp_path / "tiny" / "s.jsonl"
    assert ledger.read(path) == []
    for key, began in (("a", "2027"), ("b", "2026")):
        ledger.append(path, outcome(key=key, labels={"x": key}, started=began))
    assert [o.key for o in ledger.read(path)] == ["b", "a"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [o.key for o in ledger.read(path)] == ["a"]
    ledger.append(path, outcome(key="b", labels={"x": "b"}, started="2026"))
    assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ledger.LedgerError, match="line 1, is no outcome"):
        ledger.read(path)


def test_the_past_tells_how_long_it_takes():
    declared = trials(suite(grid={"x": range(3)}), "tiny")
    here = machine(declared[0], 2)
    past = [outcome(key=key, seconds=s, machine=here) for key, s in ((declared[0].key, 9), ("a", 1), ("b", 3))]
    elsewhere = outcome(key=declared[1].key, seconds=99, machine="elsewhere")
    assert forecast([], past, 2) == 0
    assert forecast(declared, [elsewhere], 2) is None
    assert forecast(declared, [*past, elsewhere], 2) == (9 + 2 * 3) / 2


def test_what_never_ran_is_estimated_by_its_flops():
    small, large = (trials(suite(base=SHAPE | {"steps": n}), "tiny")[0] for n in (100, 10**6))
    clocked = trials(suite(base=SHAPE | {"seconds": 50}), "tiny")[0]
    assert rough(small) < rough(large) / 10
    assert rough(clocked) == START_S + 50
    other = outcome(key="x", suite="other", seconds=3 * rough(small), knobs=small.knobs)
    assert expected(large, [other]) == pytest.approx(3 * rough(large))  # the machine is a third as fast as thought


def test_within_a_time_the_cheapest_suites_come_first_and_none_that_would_not_end(fake, tmp_path):
    """By what the ledger has of this machine: `slow` took 60 s, `quick` and `brief` less."""
    declared = {name: suite(name, {"for": 0.1}, grid={"x": range(2)}) for name in ("slow", "brief", "quick")}
    here = machine(trials(declared["slow"], "tiny")[0], 1)
    for name, seconds in (("slow", 60.0), ("brief", 0.3), ("quick", 0.2)):
        past = outcome(key="past", suite=name, labels={"x": -1}, seconds=seconds, machine=here)
        ledger.append(ledger.place(tmp_path, "tiny", name), past)
    said = []
    plan = Plan([t for each in declared.values() for t in trials(each, "tiny")], tmp_path)
    assert sweep(plan, tmp_path / "out", [{}], command=fake, say=said.append, within=20)
    assert [line.split()[1] for line in said[:-1]] == ["quick", "quick", "brief", "brief"]
    assert said[-1].startswith("2 trials are left, for want of time")


def test_a_trial_that_is_late_after_all_is_killed_and_not_recorded(run, tmp_path):
    declared = suite(base={"for": 60})
    past = outcome(key="past", labels={"x": -1}, seconds=0.1, machine=machine(trials(declared, "tiny")[0], 4))
    ledger.append(ledger.place(tmp_path, "tiny", "s"), past)
    ended, said = run(declared, within=1.0)
    assert ended and len(recorded(tmp_path).outcomes) == 1
    assert said == ["1 trials are left, for want of time: the same command goes on"]
    assert len(starts(tmp_path)) == 1 and not alive(starts(tmp_path)[0][1])


def test_small_trials_share_a_card_as_its_memory_allows(run, tmp_path, monkeypatch):
    shares = {0: 0.4, 1: 0.4, 2: 0.4, 3: 1.0}
    monkeypatch.setattr("experiments.run.share_of_card", lambda trial: shares[trial.labels["x"]])
    declared = suite(base={"for": 0.4}, grid={"x": range(4)})
    environments = [{"CUDA_VISIBLE_DEVICES": "0"}] * 3
    plan = Plan(trials(declared, "tiny"), tmp_path)
    assert sweep(plan, tmp_path / "out", environments, command=run.command, say=lambda line: None)
    began = {o.labels["x"]: datetime.fromisoformat(o.started).timestamp() for o in recorded(tmp_path).outcomes}
    ended = {o.labels["x"]: began[o.labels["x"]] + o.seconds for o in recorded(tmp_path).outcomes}
    assert began[1] < ended[0]  # side by side
    assert began[2] >= min(ended[0], ended[1])  # three would not fit
    assert began[3] >= max(ended[0], ended[1], ended[2])  # alone


def test_the_share_of_a_card_is_as_planned(monkeypatch):
    planned = []

    def predict(config, base):
        planned.append((config.steps, config.model.n_layer))
        return SimpleNamespace(total=1000 * config.model.n_layer + base)

    monkeypatch.setattr("experiments.memory.predict", predict)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda card: SimpleNamespace(total_memory=2**32))
    declared = suite(base=SHAPE | {"tokens": 640}, grid={"lr": (1e-3, 1e-2), "model.n_layer": (2, 4)})
    shares = [share_of_card(trial) for trial in trials(declared, "tiny")]
    assert shares == [1.15 * (1000 * n + 2**30) / 2**32 for n in (2, 4, 2, 4)]
    assert planned == [(1, 2), (1, 4)]  # rates take no memory, and no plan of their own
    by_clock, refused = suite(base=SHAPE | {"seconds": 9}), suite(base=SHAPE | {"steps": 9, "precision": "fp8"})
    assert [share_of_card(trials(each, "tiny")[0]) for each in (by_clock, refused)] == [1.0, 1.0]
    assert share_of_card(trials(suite(base=SHAPE | {"device": "cpu"}), "tiny")[0]) == 0.0


def test_offline_trials_have_text_that_is_there_and_a_tokenizer_of_the_same_size():
    knobs = {"data.corpus": "pile", "data.tokenizer": "gpt2"}
    moved = offline(trials(suite(base=knobs), "tiny")[0])
    assert moved.knobs == {"data.corpus": "docstrings", "data.tokenizer": "bpe", "data.vocab_size": 50_257, "seed": 0}
    owt = trials(suite(base={"data.corpus": "openwebtext", "data.tokenizer": "bpe", "data.vocab_size": 9}), "tiny")[0]
    assert offline(owt).knobs == dict(owt.knobs) | {"data.corpus": "stdlib"}
    bytes_ = trials(suite(base={"data.corpus": "docstrings", "data.tokenizer": "bytes"}), "tiny")[0]
    assert offline(bytes_) == bytes_


# The command


@pytest.fixture
def command(fake, tmp_path, monkeypatch, capsys):
    """`python -m experiments` with the fake and two suites: the exit code and what was printed."""
    suites = {
        "s": statuses("finished", "nan"),
        "t": replace(suite("t", {"steps": 4}), rows=(2, 3)),
        "memory": suite("memory", {"steps": 4}),
    }

    def search(scale, results, out, say):
        say(f"searched at scale {scale}")
        raise ConfigError("there is no GPU")

    def write(names, scale, results, suites):
        return results / f"{'-'.join(names)}-{scale}.html"

    for name, holds in {"suites": {"SUITES": suites}, "report": {"write": write}, "memory": {"run": search}}.items():
        stub = SimpleNamespace(**holds)
        monkeypatch.setitem(sys.modules, f"experiments.{name}", stub)
        monkeypatch.setattr(f"experiments.{name}", stub, raising=False)

    def start(*argv):
        code = cli.main([*argv, f"--results={tmp_path}", f"--out={tmp_path / 'out'}"], fake)
        return code, "".join(capsys.readouterr())

    return start


def test_a_command_lists_shows_runs_and_reports(command, tmp_path):
    code, text = command()
    assert code == 0
    assert "s              A suite (row 1)" in text
    assert "(rows 2, 3)" in text
    assert "tiny 2 trials\n" in text

    code, text = command("all", "--dry-run", "--set", "clip=3", "--jobs=2")
    assert code == 0
    assert "3 trials at scale tiny, 0 of them done, 3 runs to start, and the memory frontier to search" in text
    assert "searched" not in text
    assert not ledger.place(tmp_path, "tiny", "s").exists()

    code, text = command("s")
    assert code == 0
    assert text.endswith(f"report   {tmp_path}/s-tiny.html\n")
    assert "2 trials at scale tiny, 2 of them done, 0 runs to start" in command("s", "--dry-run")[1]
    assert "tiny 2 trials, 0:00:0" in command()[1]
    code, text = command("s", "memory")
    assert code == 0
    assert "searched at scale tiny" in text
    assert "error: there is no GPU" in text
    assert f"report   {tmp_path}/s-memory-tiny.html" in text
    assert command("report", "t") == (0, f"report   {tmp_path}/t-tiny.html\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x",), "no suite called x: there are s, t, memory, and all"),
        (("s", "--set", "lrr=3"), "no flag called --lrr (did you mean --lr?)"),
        (("s", "--set", "lr=-3"), "lr must be more than 0"),
        (("s", "--scale=full"), "suite s has no scale full: it has tiny"),
        (("t", "--axis=seconds"), "--set seconds=... gives one"),
        (("memory", "--rerun"), "memory is a search: --rerun, --seeds"),
        (("--grid", "lr=1,2"), "--base=small.py says of what"),
        (("--base", "trial.py", "--grid", "lrr=1,2"), "no knob called lrr"),
        (("--base", "trial.py", "--budget", "60 parsecs"), "--budget is a number and one of s, min"),
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
    plan = Plan(trials(suite(base=given, variants={"good": {}, "bad": {"precision": "int3"}}), "tiny"), tmp_path)
    assert sweep(plan, tmp_path / "out", [{"OMP_NUM_THREADS": "1"}] * 2)
    good, bad = (one(tmp_path, variant=name) for name in ("good", "bad"))
    assert good.status == "finished", good.error
    assert good.val_loss < math.log(257)
    assert [row["step"] for row in good.steps] == [1, 4, 8, 12]
    assert [row["step"] for row in good.evals] == [6, 12]
    assert good.final["memory"] > 0
    assert bad.status == "unsupported"
    assert bad.error.startswith("error: precision must be")
    assert not list((tmp_path / "out").rglob("*.pt"))
