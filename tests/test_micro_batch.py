"""`--micro_batch=auto`: the size that is planned and tried, and steps that begin anew when memory does not suffice."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_capture import STEPS, Recorded, recorded  # noqa: F401 - a fixture

import train
from model import checkpoint, micro_batch
from model.gpt import GPT, ModelConfig
from model.memory import Setup
from model.micro_batch import MicroBatch
from runtime.hardware import HardwareError, out_of_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUIET = {"log_every": 1, "eval_every": 100, "save_every": 100}


def shortage(*args):
    raise torch.OutOfMemoryError("tried to allocate 80 GB")


class Shortage(torch.autograd.Function):
    """The identity, whose backward pass is out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    backward = staticmethod(shortage)


@pytest.fixture
def lacking(monkeypatch):
    """A function that makes passes of more than `most` sequences run out of memory, in a `place` of training.

    `spared` is how many of them succeed first. Its `sizes` are those of all passes that began."""
    forward, sizes = GPT.forward, []

    def start(most, place="forward", spared=0):
        def short(model, ids, *args, **options):
            if not torch.is_grad_enabled():
                return forward(model, ids, *args, **options)
            sizes.append(len(ids))
            too_large = len(ids) > most and len(sizes) > spared
            if place == "capture":
                too_large &= torch._C._len_torch_dispatch_stack() > 0
            loss = forward(model, ids, *args, **options)
            if too_large and place != "backward":
                shortage()
            return Shortage.apply(loss) if too_large else loss

        monkeypatch.setattr(GPT, "forward", short)

    start.sizes = sizes
    return start


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(row["loss"], row["grad_norm"]) for row in rows(folder) if "loss" in row]


def diagnostics(folder):
    return [row["diag"] for row in rows(folder) if "diag" in row]


def near(a, b):
    """Whether the losses of two runs are equal up to rounding, which grows with training."""
    return [loss for loss, _ in losses(a)] == pytest.approx([loss for loss, _ in losses(b)], rel=5e-3)


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


def status(folder):
    return json.loads((folder / "status.json").read_text())


CASES = {
    "forward": ({}, "forward", [4, 2, 1]),
    "backward": ({"optimizer": "adamw"}, "backward", [4, 2, 1]),
    "dropout": ({"model.dropout": 0.2}, "backward", [4, 2, 1]),
    "diagnosed": ({"diag": 1}, "backward", [4, 2, 1]),
    "batches of 6": ({"batch_size": 6}, "forward", [6, 3, 1]),
}


@pytest.mark.parametrize("knobs, place, sizes", CASES.values(), ids=CASES)
def test_a_step_without_memory_begins_anew_as_if_it_had_been_small(run, lacking, knobs, place, sizes, capsys):
    """To the bit: losses, norms and weights are those of a run whose micro-batch is small from the start."""
    _, small = run(run="small", steps=3, **QUIET, **(knobs | {"micro_batch": 1}))
    lacking(1, place)
    code, folder = run(run="found", steps=3, **QUIET, **knobs)
    assert code == 0 and lacking.sizes[: len(sizes)] == sizes and set(lacking.sizes[len(sizes) :]) == {1}
    assert losses(folder) == losses(small) and diagnostics(folder) == diagnostics(small)
    assert all(map(torch.equal, weights(folder).values(), weights(small).values()))
    assert status(folder)["micro_batch"] == checkpoint.load(folder / "last.pt")["micro_batch"] == 1
    assert "micro-batches of 1 (auto), as memory did not suffice in step 1" in capsys.readouterr().out


def test_memory_that_runs_short_during_accumulation(run, lacking):
    """The sums before the failure are dropped. After it, sums are of other parts: equal up to rounding."""
    _, large = run(run="large", steps=4, **QUIET)
    _, small = run(run="small", steps=4, micro_batch=1, diag=3, **QUIET)
    lacking(2)
    assert run(run="found", steps=1, **QUIET)[0] == 0
    lacking.sizes.clear()
    lacking(1, "backward", spared=3)
    code, folder = run("--resume", run="found", steps=4, diag=3, **QUIET)
    assert code == 0 and lacking.sizes == [2, 2, 2, 2, *[1] * 8]
    assert near(folder, large)
    ((coherence,), (expected,)) = ([row["coherence"] for row in diagnostics(of)] for of in (folder, small))
    assert coherence == pytest.approx(expected, rel=1e-3)
    assert status(folder)["micro_batch"] == 1


@pytest.mark.parametrize("place", ["forward", "capture"])
def test_graphs_are_captured_anew(run, recorded, lacking, place):  # noqa: F811
    _, small = run(run="small", steps=STEPS, micro_batch=2, **QUIET)
    replays, Recorded.replays = Recorded.replays, 0
    lacking(2, place)
    code, folder = run(run="found", steps=STEPS, **QUIET)
    assert code == 0 and {4, 2} == set(lacking.sizes)
    if place == "forward":
        assert Recorded.replays == replays and losses(folder) == losses(small)
    else:
        assert 0 < Recorded.replays < replays and near(folder, small)


def test_what_was_found_is_used_when_the_run_resumes(run, lacking):
    lacking(2)
    _, folder = run(run="found", steps=2, **QUIET)
    lacking.sizes.clear()
    assert run("--resume", run="found", steps=3, **QUIET)[0] == 0 and lacking.sizes == [2, 2]
    assert json.loads((folder / "config.json").read_text())["micro_batch"] == "auto"


@pytest.mark.parametrize(
    "asked, message", [(4, "--micro_batch=2 needs less memory"), (0, "--micro_batch=2 needs"), (1, "80 GB\n")]
)
def test_a_size_that_was_asked_for_stays(run, lacking, capsys, asked, message):
    lacking(0)
    code, folder = run(micro_batch=asked)
    assert code == 1 and lacking.sizes == [asked or 4] and status(folder)["status"] == "oom"
    assert message in capsys.readouterr().err


def test_one_sequence_that_does_not_fit_ends_the_run(run, lacking):
    lacking(0)
    code, folder = run()
    assert code == 1 and lacking.sizes == [4, 2, 1] and status(folder)["status"] == "oom"


def test_an_update_without_memory_ends_the_run(run, monkeypatch):
    """It may have changed some parameters."""
    monkeypatch.setattr(train.Trainer, "update", shortage)
    code, folder = run()
    assert code == 1 and status(folder)["status"] == "oom" and status(folder)["step"] == 0


def test_other_errors_are_not_a_lack_of_memory(run, monkeypatch):
    monkeypatch.setattr(GPT, "forward", lambda *args, **options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        run()


def test_a_capture_that_memory_ended_is_a_lack_of_memory():
    try:
        try:
            shortage()
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert out_of_memory(error) and not out_of_memory(error.with_traceback(None).__cause__ or ValueError())


@pytest.fixture
def gpu(monkeypatch):
    """Makes `MicroBatch` plan for a GPU: passes of more than `most` sequences take all of its memory, and those of more
    than `planned` more than was planned."""

    def start(free, most=64, planned=64):
        tried = []

        def passes():
            tried.append(batch.size)
            if batch.size > most:
                shortage()

        def peak(device):
            return batch.limit + (batch.size > planned)

        for name, fake in {
            "reset_peak_memory_stats": lambda device: None, "max_memory_allocated": peak,
            "get_rng_state": lambda device: None, "set_rng_state": lambda state, device: None,
            "current_stream": lambda device: None, "set_stream": lambda stream: None,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=10**11),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        monkeypatch.setattr(micro_batch, "free_memory", lambda device: free)
        batch = MicroBatch("auto", 64, 0, SETUP, GPU)
        allocated = []
        batch.confirm(lambda: allocated.append(batch.size), passes)
        return batch.size, tried, allocated

    return start


SETUP = Setup(ModelConfig(n_layer=2, n_head=2, d_model=64, seq_len=128).resolved(512, -1))


def test_the_planned_size_is_tried(gpu):
    size, tried, allocated = gpu(10**10)
    assert size == 64 and tried == [64] and allocated == []
    less, tried, _ = gpu(3 * 10**7)
    assert 1 < less < 64 and tried == [less]
    assert gpu(10**10, most=16) == (16, [64, 32, 16], [32, 16])
    assert gpu(10**10, planned=8) == (8, [64, 32, 16, 8], [32, 16, 8])


def test_a_model_that_does_not_fit_is_refused(gpu):
    with pytest.raises(HardwareError, match=r"one sequence takes 0.0 GB, and 0.0 GB of the GPU's memory are free"):
        gpu(10**6)


@pytest.mark.parametrize("asked, known, device, size", [
    (0, 0, CPU, 64), (16, 0, CPU, 16), (0, 0, GPU, 64), (16, 4, GPU, 16), ("auto", 0, CPU, 64), ("auto", 8, GPU, 8),
    ("auto", 8, CPU, 8), ("auto", 48, CPU, 64),
])  # fmt: skip
def test_sizes_without_a_plan(monkeypatch, asked, known, device, size):
    properties = lambda device: SimpleNamespace(total_memory=10**11)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: 10**10)
    batch = MicroBatch(asked, 64, known, SETUP, device)
    assert batch.size == size and not batch.planned


@pytest.mark.parametrize("free, advice", [(3 * 10**7, "--micro_batch=16 fits"), (10**10, "--micro_batch=32 fits")])
def test_the_error_on_a_gpu_names_a_size_that_fits(monkeypatch, free, advice):
    properties = lambda device: SimpleNamespace(total_memory=10**11)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: free)
    with pytest.raises(torch.OutOfMemoryError) as error:
        MicroBatch(64, 64, 0, SETUP, GPU).attempt(shortage)
    assert error.value.__notes__ == [advice]
