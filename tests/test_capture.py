"""CUDA graph capture of the training step, emulated on a CPU by recording a step's operators and replaying them."""

import json
import warnings
from contextlib import closing, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from recording import Eager, Recorded, emulate_graphs
from torch.utils._pytree import tree_leaves

import runtime.capture
import train
from model import checkpoint
from runtime.capture import WARM_UP, Captured, CaptureError, InFlight, Step, outside_graphs, synchronizations
from runtime.hardware import HardwareError, pick_capture, pick_residual


@pytest.fixture
def recorded(monkeypatch):
    """Makes training on a CPU replay recordings in place of CUDA graphs."""
    emulate_graphs(monkeypatch)


@pytest.fixture
def eagerly(recorded, monkeypatch):
    """A function that turns replays off."""
    return lambda: monkeypatch.setattr(runtime.capture, "Captured", Eager)


COLUMNS = ("step", "loss", "grad_norm", "lr", "val_loss", "diag")
STEPS = WARM_UP + 2 + 20  # eager steps, two steps that capture parts, and replays


def trained(folder):
    """Final weights and moments of a run, and its metrics."""
    state = checkpoint.load(folder / "last.pt")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    leaves = tree_leaves([state["model"], [optimizer["state"] for optimizer in state["optimizers"]]])
    return leaves, [[row.get(column) for column in COLUMNS] for row in rows]


def assert_same(a, b):
    assert a[1] == b[1]
    assert len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


CASES = {
    "adamw": {"optimizer": "adamw"},
    "adam": {"optimizer": "adam"},
    "muon": {"optimizer": "muon"},
    "accumulation": {"micro_batch": 1},
    "documents": {"data.packing": "documents", "model.window": "SL:8", "model.n_kv_head": 1},
    "dropout": {"model.dropout": 0.1, "micro_batch": 2},
    "recomputed": {"model.recompute": 0.5},
    "loss": {"model.label_smoothing": 0.1, "model.z_loss": 1e-3, "model.logit_softcap": 5},
    "bf16": {"precision": "bf16", "residual": "bf16", "optimizer": "muon", "micro_batch": 2},
    "fp8": {"precision": "fp8", "micro_batch": 2},
    "nvfp4": {"precision": "nvfp4"},
    "diagnosed": {"diag": 7, "micro_batch": 2},
}


@pytest.mark.parametrize("knobs", CASES.values(), ids=CASES)
def test_replays_equal_eager_steps_to_the_bit(run, eagerly, knobs):
    """Compares losses, norms, weights and moments of whole runs."""
    quiet = {"steps": STEPS, "log_every": 1, "eval_every": 10, "save_every": 100}
    code, replayed = run(run="replayed", **quiet, **knobs)
    parts = 2 if knobs.get("micro_batch", 4) == 4 else 1 + 4 // knobs["micro_batch"]
    assert code == 0 and Recorded.replays >= parts * 20 - 4 * ("diag" in knobs) * parts
    eagerly()
    _, eager = run(run="eager", **quiet, **knobs)
    assert_same(trained(replayed), trained(eager))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_is_replayed_with_the_weights_of_its_time(run, recorded, eager_losses, precision):
    few = {"steps": WARM_UP, "eval_every": 1, "eval_tokens": 1024, "precision": precision, "model.dropout": 0.5}
    assert run(**few, **{"model.bias": True})[0] == 0
    assert Recorded.replays == WARM_UP * 8 - (WARM_UP + 1) - 1  # batches, but for the eager ones and the recorded
    assert [found for found, _ in eager_losses] == [eager for _, eager in eager_losses]
    assert len({found for found, _ in eager_losses}) == WARM_UP


def test_a_resumed_run_replays_on(run, eagerly):
    schedule = {"schedule": "constant", "log_every": 1, "eval_every": 100, "save_every": 100}
    run(run="parts", steps=9, **schedule)
    assert run("--resume", run="parts", steps=STEPS, **schedule)[0] == 0
    eagerly()
    _, whole = run(run="whole", steps=STEPS, **schedule)
    parts = whole.parent / "parts"
    (weights, rows), (expected, all_rows) = trained(parts), trained(whole)
    assert all(torch.equal(x, y) for x, y in zip(weights, expected, strict=True))
    losses = {row[0]: row[1:4] for row in rows if row[1]}
    assert losses == {row[0]: row[1:4] for row in all_rows if row[1]}


def test_profiling_replays_changes_nothing(run, recorded):
    knobs = {"steps": WARM_UP + 8, "log_every": 1, "eval_every": 100, "save_every": 100}
    plain, profiled = (run(run=f"profile{window}", profile=window, **knobs)[1] for window in ("", WARM_UP + 4))
    assert_same(trained(plain), trained(profiled))
    assert (profiled / "profile" / f"step-{WARM_UP + 4}.txt").exists()


def test_triton_kernels_replay(run, eagerly):
    small = {"model.n_layer": 1, "model.n_head": 1, "model.seq_len": 16, "batch_size": 1, "eval_tokens": 16}
    small |= {"optimizer": "adamw", "precision": "bf16"}
    knobs = small | {"steps": WARM_UP + 4, "log_every": 1, "eval_every": 100, "save_every": 100, "kernels": "triton"}
    _, replayed = run(run="replayed", **knobs)
    assert Recorded.replays == 5
    eagerly()
    _, eager = run(run="eager", **knobs)
    assert_same(trained(replayed), trained(eager))


def read_on_the_host(self, take):
    take()
    self.norm.item()


def rebind_the_input(self, take):
    self.ids = self.ids.clone()
    take()


def rebind_the_rate(self, take):
    for optimizer in self.optimizers:
        optimizer.rates = [rate.clone() for rate in optimizer.rates]
    take()


def use_the_rate_of_the_host(self, take):
    for optimizer in self.optimizers:
        for group, rate in zip(optimizer.param_groups, optimizer.rates, strict=True):
            rate.fill_(group["lr"])
    take()


def allocate_state_in_the_step(self, take):
    if self.step > WARM_UP:  # in the step that captures this part
        if not hasattr(self, "decay"):
            self.decay = torch.ones_like(self.loss)
        self.decay *= 0.5
        self.model.head.weight.grad *= self.decay
    take()


FAULTS = {
    "host read": ("update", read_on_the_host),
    "rebound input": ("forward_backward", rebind_the_input),
    "rebound rate": ("update", rebind_the_rate),
    "host rate": ("update", use_the_rate_of_the_host),
    "late state": ("update", allocate_state_in_the_step),
}


@pytest.mark.parametrize("part, fault", FAULTS.values(), ids=FAULTS)
def test_faults_that_a_graph_would_hide_are_found(run, eagerly, monkeypatch, part, fault):
    """Each fault is harmless in eager steps; replays refuse it or give other results."""
    right = getattr(train.Trainer, part)

    def wrong(self, *args, **options):
        fault(self, lambda: right(self, *args, **options))

    knobs = {"steps": WARM_UP + 7, "log_every": 1, "eval_every": 100, "save_every": 100, "optimizer": "adamw"}
    monkeypatch.setattr(train.Trainer, part, wrong)
    if fault is read_on_the_host:  # on a GPU the last warm-up step would report it
        with pytest.raises(RuntimeError, match="makes the host wait for the device"):
            run(run="replayed", **knobs)
        return
    _, replayed = run(run="replayed", **knobs)
    assert Recorded.replays > 0
    eagerly()
    _, eager = run(run="eager", **knobs)
    assert trained(replayed)[1] != trained(eager)[1]


# Whether the step is captured, and the reasons that are reported.

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "device, precision, compiled, recompute_dropout, why",
    [
        (torch.device("cpu"), "bf16", False, False, "cpu has no CUDA graphs"),
        (CUDA, "fp16", False, False, "fp16's loss scaling is decided on the host"),
        (CUDA, "bf16", False, True, "model.recompute with model.dropout reads the RNG state on the host"),
    ],
)
def test_reasons_against_capture_are_reported_or_refused(device, precision, compiled, recompute_dropout, why):
    assert pick_capture("auto", device, precision, compiled, recompute_dropout) == (False, f"no: {why}")
    assert pick_capture("off", device, precision, compiled, recompute_dropout) == (False, "no")
    with pytest.raises(HardwareError, match=f"{why}; --capture=off runs without"):
        pick_capture("on", device, precision, compiled, recompute_dropout)


def test_a_gpus_step_is_captured_unless_the_model_is_compiled():
    assert pick_capture("auto", CUDA, "bf16", False, False)[0] and pick_capture("on", CUDA, "fp32", True, False)[0]
    assert pick_capture("auto", CUDA, "bf16", True, False) == (
        False, "no: the model is compiled; --capture=on does both",
    )  # fmt: skip
    assert pick_capture("off", CUDA, "bf16", False, False) == (False, "no")


def test_the_residual_stream_is_bf16_on_a_gpu_in_bf16():
    assert pick_residual("auto", CUDA, "bf16") == pick_residual("bf16", torch.device("cpu"), "bf16") == torch.bfloat16
    assert pick_residual("auto", torch.device("cpu"), "bf16") is pick_residual("fp32", CUDA, "bf16") is None
    assert pick_residual("auto", CUDA, "fp16") is None
    with pytest.raises(HardwareError, match="needs --precision=bf16, not fp32"):
        pick_residual("bf16", CUDA, "fp32")


@pytest.mark.parametrize("required", [False, True])
def test_a_step_that_waits_for_the_device_is_not_captured(recorded, monkeypatch, required):
    said = []
    monkeypatch.setattr(runtime.capture, "synchronizations", lambda: nullcontext(["loss.py:7"]))
    step = Step([lambda: None], True, required, said.append)
    for _ in range(WARM_UP - 1):
        with step() as parts:
            assert parts is step.parts
    if required:
        with pytest.raises(CaptureError, match=r"first at loss.py:7; --capture=off runs without"), step():
            pass
        return
    with step():
        pass
    assert said == ["capture  no: the host waits for the device in the step, first at loss.py:7"]
    with step() as parts:
        assert parts is step.parts


def test_a_step_that_is_watched_runs_eagerly_between_replays(recorded):
    step, taken = Step([str, int], True, True, print), []
    for eager in (True, *[False] * (WARM_UP + 2), True, False):
        with step(eager) as parts:
            taken.append(list(parts))
    eagerly, replayed = list(step.parts), list(step.graphs)
    warm_up = [eagerly] * (1 + WARM_UP)
    # The last part is captured one step later than the others.
    assert taken == [*warm_up, [step.graphs[0], int], replayed, eagerly, replayed]


def test_synchronizations_are_noted_and_other_warnings_pass(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.warns(UserWarning, match="something else"), synchronizations() as found:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"] and len(found) == 1 and __file__ in found[0]


def test_at_most_two_steps_are_in_flight(monkeypatch):
    log = []

    class Event:
        def __init__(self):
            self.number = sum(kind == "record" for kind, _ in log)

        def record(self):
            log.append(("record", self.number))

        def synchronize(self):
            log.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    in_flight = InFlight(CUDA)
    for _ in range(4):
        in_flight.launched()
    assert log == [("record", 0), ("record", 1), ("record", 2), ("wait", 0), ("record", 3), ("wait", 1)]
    InFlight(torch.device("cpu")).launched()
    assert len(log) == 6


def test_a_graph_is_captured_once_and_replayed_each_time(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: nullcontext(log.append(how)))
    captured = Captured(lambda: log.append("run"), (0, 1))
    captured()
    captured()
    assert log == [{"pool": (0, 1), "capture_error_mode": "thread_local"}, "run", "replay", "replay"]


def test_a_graph_is_split_around_what_no_graph_may_contain(monkeypatch):
    log = []

    def run():
        log.append("compute")
        outside_graphs(lambda: log.append("gather"))
        log.append("apply")

    run()
    eager, log[:] = list(log), []
    graphs = (SimpleNamespace(replay=partial(log.append, f"replay {i}")) for i in range(2))
    capture = SimpleNamespace(close=partial(log.append, "end"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: next(graphs))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: closing(capture))
    captured = Captured(run, (0, 1))
    captured()
    assert eager == ["compute", "gather", "apply"]
    assert log == ["compute", "end", "replay 0", "gather", "apply", "end", "replay 1"]
    log.clear()
    captured()
    assert log == ["replay 0", "gather", "replay 1"]
    run()
    assert log[3:] == eager


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")


@ON_A_GPU
@pytest.mark.parametrize("knobs", [{"optimizer": "adamw"}, {"optimizer": "muon", "micro_batch": 2}], ids=str)
def test_graphs_equal_eager_steps_on_a_gpu(run, knobs):
    """The inputs change while the previous step is still running."""
    knobs |= {"steps": STEPS, "log_every": STEPS, "eval_every": 100, "save_every": 100, "device": "cuda"}
    captured, eager = (run(run=f"capture-{mode}", capture=mode, precision="bf16", **knobs)[1] for mode in ("on", "off"))
    assert_same(trained(captured), trained(eager))


@ON_A_GPU
@pytest.mark.parametrize("capture", ["on", "off"])
def test_no_step_waits_for_the_gpu(tiny, tmp_path, capture):
    trainer = train.Trainer(*train.configure(tiny(tmp_path, capture=capture, device="cuda", precision="bf16")))
    for step in range(2 * WARM_UP):
        inputs, targets = (x.pin_memory() for x in trainer.data.batches.get(4 * step, 4))
        if step not in (0, WARM_UP, WARM_UP + 1):  # these steps compile kernels or capture graphs
            torch.cuda.set_sync_debug_mode("error")
        trainer.train_step(inputs, targets, 0.5)
        torch.cuda.set_sync_debug_mode("default")
