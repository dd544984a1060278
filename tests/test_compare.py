"""bench.compare: which kernels are swapped, and what is measured and recorded of a run's steps."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

import bench.compare as comparing
import kernels
from bench.compare import called, compare, main, table, use, variants
from bench.steps import random_step, trainer_of
from kernels import KernelChoice, bind
from runtime.run import Run

KNOBS = {
    "model.n_layer": 1, "model.n_head": 2, "model.d_model": 32, "model.seq_len": 32, "batch_size": 4, "micro_batch": 2,
    "precision": "fp32", "compile": "off", "device": "cpu",
}  # fmt: skip


@pytest.fixture
def trainer(tmp_path):
    return trainer_of(KNOBS, tmp_path)


def test_on_a_gpu_each_op_is_swapped_for_torchs(trainer, monkeypatch):
    """The ops themselves are not called."""
    monkeypatch.setattr(kernels, "_check_triton", lambda *args: None)
    monkeypatch.setattr(kernels, "c_compiler", lambda: "cc")
    trainer.device, trainer.model.kernels = torch.device("cuda"), bind(KernelChoice(), "cuda")
    own = trainer.model.kernels.names
    ops = own.keys() - {"fp8_linear"}
    found = {(op, other): bound.names for op, other, bound in variants(trainer, ops)}
    assert (
        own["attention"] == "auto" and {("attention", "sdpa"), ("attention", "triton"), ("all", "torch")} < found.keys()
    )
    assert ("attention", "torch") not in found and ("swiglu", "triton") not in found
    for op in ops - {"attention"}:
        assert found[op, "torch"] == own | {op: "torch"}
    assert ("fp8_linear", "torch") not in found
    assert found["all", "torch"] == own | dict.fromkeys(ops, "torch") | {"attention": "sdpa"}


def test_a_swapped_kernel_is_called(trainer):
    called = []
    own = trainer.model.kernels
    swapped = bind(KernelChoice(attention="sdpa"), "cpu")
    for op in ("rmsnorm", "adamw"):
        function = getattr(own, op)
        fake = lambda *args, op=op, function=function, **options: called.append(op) or function(*args, **options)  # noqa: E731
        object.__setattr__(swapped, op, fake)
    use(trainer, swapped)
    random_step(trainer)()
    assert set(called) == {"rmsnorm", "adamw"}
    called.clear()
    use(trainer, own)
    random_step(trainer)()
    assert not called


def test_only_what_the_steps_call_is_swapped(trainer):
    own = trainer.model.kernels
    ops = {"rmsnorm", "rope", "attention", "swiglu", "linear_cross_entropy", "adamw"}
    assert called(trainer) == ops and trainer.model.kernels is own


def test_steps_alternate_and_a_lack_of_memory_is_a_result(trainer, monkeypatch):
    own = trainer.model.kernels
    other, vast = (replace(own, names={"of": name}) for name in ("other", "vast"))
    clock, used = [0.0], []
    swapped = [("rope", "torch", other), ("attention", "sdpa", vast)]
    monkeypatch.setattr(comparing, "variants", lambda trainer, ops: swapped)
    monkeypatch.setattr(comparing, "called", lambda trainer: set())
    monkeypatch.setattr(comparing, "use", lambda trainer, kernels: used.append(kernels))
    monkeypatch.setattr(comparing.time, "monotonic", lambda: clock[0])

    def seconds_of(step, n):
        clock[0] += 1
        if used[-1] is vast:
            raise torch.OutOfMemoryError("80 GB")
        return 0.5 if used[-1] is own else 0.75

    monkeypatch.setattr(comparing, "seconds_of", seconds_of)
    one, two = compare(trainer, 20)
    assert (one["own_ms"], one["ms"], one["ratio"], one["turns"]) == (500, 750, 1.5, 3)
    assert two["failed"] == "out of memory" and used.count(vast) == 1
    assert used[:4] == [own, other, own, vast] and used[4:] == [own, other] * 2
    assert "1.50 x" in table([one, two]) and "out of memory" in table([one, two])


def test_what_there_is_no_time_for_is_said(trainer):
    (row,) = compare(trainer, 1e-9)
    assert row["op"] == "attention" and row["failed"] == "the time was up"


def test_a_runs_own_steps_are_recorded_in_its_folder(run, monkeypatch, capsys):
    """As train.py does at its end, in this process."""
    commands, really = [], subprocess.run

    def start(command, **options):
        return commands.append(command) if "bench.compare" in command else really(command, **options)

    monkeypatch.setattr(subprocess, "run", start)
    shape = {"data.packing": "documents", "model.dropout": 0.1, "batch_size": 6, "micro_batch": 3}
    code, folder = run(steps=2, compare=0.5, **shape)
    assert code == 0 and commands[-1][1:] == ["-m", "bench.compare", "--run", str(folder), "--seconds=0.5"]
    knobs = comparing.knobs_of(folder)
    assert knobs["batch_size"] == 6 and knobs["micro_batch"] == 3 and knobs["model.vocab_size"] == 257
    assert knobs["data.packing"] == "documents" and "data.corpus" not in knobs and "steps" not in knobs
    capsys.readouterr()
    assert main(commands[-1][3:]) == 0
    recorded = json.loads((folder / "compare.json").read_text())
    assert [(row["op"], row["other"]) for row in recorded["rows"]] == [("attention", "sdpa")]
    assert recorded["rows"][0]["ratio"] > 0 and recorded["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert said.startswith("op ") and "attention" in said


@pytest.mark.parametrize("changes", [{"compare": 1, "steps": 2, "lr": 1e30, "warmup": 0, "optimizer": "adamw"}])
def test_a_run_that_failed_is_not_compared(run, monkeypatch, changes):
    monkeypatch.setattr(Run, "compare", lambda *args: pytest.fail("compared"))
    assert run(**changes)[0] == 1
