"""The memory planner against what real runs keep, and the search for the frontier."""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import train
from experiments import ledger, memory
from experiments.run import configuration
from experiments.spec import Outcome, Results
from kernels import bind
from model.gpt import GPT
from model.optim import build_optimizers
from runtime import hardware
from runtime.config import ConfigError

SHAPE = {
    "device": "cpu", "compile": "off", "precision": "fp32", "optimizer": "adamw", "steps": 1, "data.tokenizer": "bytes",
    "model.n_layer": 2, "model.n_head": 2, "model.d_model": 32, "model.seq_len": 64, "batch_size": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_base(monkeypatch):
    """Measuring it takes a process, which one test is enough for."""
    monkeypatch.setattr(memory, "_base", lambda config: 0)


def plan(**changes):
    return memory.predict(configuration(SHAPE | {key.replace("__", "."): value for key, value in changes.items()}))


def real(config: train.Config):
    """A model of a configuration, on true tensors, and its optimizers."""
    model = GPT(config.model.resolved(config.data.expected_vocab_size), bind(config.kernels))
    return model, build_optimizers(model, config)


def saved_bytes(model: GPT, rows: int) -> int:
    """Of what autograd saves up to the head, each tensor once, parameters aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(torch.zeros(rows, model.config.seq_len, dtype=torch.int64))
    assert hidden.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_activations_are_what_autograd_saves(layers, rows, kernels):
    changes = {"model.n_layer": layers, "batch_size": rows, "kernels": kernels, "kernels.attention": "sdpa"}
    config = configuration(SHAPE | changes)
    assert memory.predict(config).activations == pytest.approx(saved_bytes(real(config)[0], rows), rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_exact(optimizer):
    config = configuration(SHAPE | {"optimizer": optimizer})
    model, optimizers = real(config)
    ids = torch.zeros(1, 64, dtype=torch.int64)
    model(ids, ids).backward()
    for each in optimizers:
        each.step()
    planned = memory.predict(config)
    assert planned.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [state for each in optimizers for state in each.state.values()]
    assert planned.optimizer == sum(tensor.nbytes for state in states for tensor in state.values())


def test_recomputing_more_keeps_less():
    plans = [plan(model__n_layer=4, model__recompute=share) for share in (0.0, 0.25, 0.5, 1.0)]
    for key in ("activations", "peak"):
        sizes = [getattr(each, key) for each in plans]
        assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert plans[-1].peak > plans[-1].activations + plans[-1].weights  # a layer's are back while its gradient is made


def test_what_takes_more_or_less():
    usual = plan()
    assert plan(precision="bf16").activations < usual.activations < plan(model__dropout=0.1).activations
    assert plan(kernels="triton").activations < usual.activations
    assert plan(micro_batch=2).activations == pytest.approx(usual.activations / 2, rel=0.01)
    # Of two micro-batches, the second finds all gradients there.
    assert plan(micro_batch=2, batch_size=4).peak > plan(batch_size=2).peak


def test_the_chunk_of_logits_inside_the_triton_head_counts():
    planned = plan(kernels="triton", model__vocab_size=50_000)
    assert planned.logits > 4 * 64 * 50_000 * 4 + 50_000 * 32 * 4  # of the chunk and of the head's gradient
    assert planned.peak >= planned.weights + planned.optimizer + planned.activations + planned.logits


def test_graphs_keep_the_memory_of_a_step_beside_what_runs_between_them(monkeypatch):
    eager = plan()
    monkeypatch.setattr(hardware, "pick_capture", lambda *args: (True, "yes"))
    replayed, diagnosed = plan(), plan(diag=10)
    assert eager.peak < replayed.peak < diagnosed.peak
    assert diagnosed.peak - eager.peak == pytest.approx(eager.peak - eager.weights - eager.optimizer, rel=0.02)
    assert replayed.activations == eager.activations and replayed.logits == eager.logits


def test_a_plan_reads_as_a_table():
    table = str(memory.Plan(2**20, 2**20, 2**21, 3 * 2**29, 0, 2**31, 2**30))
    rows = {line.split()[0]: line.split()[1:3] for line in table.splitlines()}
    assert (
        rows["weights"] == ["1.0", "MiB"]
        and rows["activations"] == ["1.50", "GiB"]
        and rows["total"] == ["3.00", "GiB"]
    )


@pytest.mark.parametrize("text, size", [("600MB", 600 * 10**6), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("2kB", 2000)])
def test_sizes_are_read(text, size):
    assert memory.read_bytes(text) == size


def test_what_is_no_size_is_refused():
    with pytest.raises(ValueError, match="600 megs"):
        memory.read_bytes("600 megs")


@pytest.mark.parametrize("low, high", [(1, 1), (1, 64), (3, 77)])
def test_bisection_finds_the_frontier_in_few_questions(low, high):
    for frontier in range(low - 1, high + 1):
        asked = []
        found = memory.bisect(lambda n, asked=asked, frontier=frontier: asked.append(n) or n <= frontier, low, high)
        assert found == (frontier if frontier >= low else 0)
        assert len(asked) == len(set(asked)) <= 2 + math.ceil(math.log2(max(1, high - low)))


class FakeJob:
    """In the place of a run: one whose micro-batch fits under `LIMITS`, by configuration."""

    LIMITS = {"small": 0, "middling": 5, "large": 99, "broken": -1}  # noqa: RUF012
    started: list = []  # noqa: RUF012

    def __init__(self, trial, out, machine, version, limit, command):
        self.trial, self.machine = trial, machine
        FakeJob.started.append(dict(trial.labels))

    def ended(self):
        labels, knobs = dict(self.trial.labels), dict(self.trial.knobs)
        limit, n = self.LIMITS[labels["configuration"]], labels["micro_batch"]
        status = "crashed" if limit < 0 else "finished" if n <= limit else "oom"
        final = {"memory": 1000 * n, "tok_s_steady": 10.0} if status == "finished" else {}
        began = f"2025-01-01T00:00:{len(self.started):02}"
        key, machine = self.trial.key, self.machine
        return Outcome(key, "memory", "tiny", labels, knobs, status, 1.0, began, "", machine, final=final)

    def kill(self):
        pass


@pytest.fixture
def search(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.runner, "Job", FakeJob)
    monkeypatch.setattr(memory, "predict", lambda config: SimpleNamespace(peak=1, total=900 * config.batch_size))
    FakeJob.started = []
    said = []
    return memory.Search("tiny", tmp_path / "results", tmp_path / "out", cap=10**9, say=said.append), said


def test_the_frontier_of_each_configuration_and_its_record(search):
    where, said = search
    found = memory.frontier(SHAPE, {name: {} for name in FakeJob.LIMITS}, 1, 16, where)
    assert [(point.configuration, point.micro_batch) for point in found] == [
        ("small", 0),
        ("middling", 5),
        ("large", 16),
    ]
    assert asdict(found[1]) | {"measured": 5000, "predicted": 4500} == asdict(found[1])
    assert "nothing fits" in str(found[0]) and any("no frontier of broken" in line for line in said)
    results = Results(ledger.read(where.ledger))
    assert memory.largest(results, "middling") == 5 and memory.largest(results, "small") == 0
    assert memory.points(results, "large") == [(1, 1000, 900), (16, 16000, 14400)]
    with pytest.raises(LookupError, match="absent"):
        memory.largest(results, "absent")


def test_what_the_ledger_has_is_not_probed_again_but_under_another_cap_it_is(search):
    where, _ = search
    first = memory.frontier(SHAPE, {"middling": {}}, 1, 16, where)
    before = len(FakeJob.started)
    assert memory.frontier(SHAPE, {"middling": {}}, 1, 16, where) == first and len(FakeJob.started) == before
    other = memory.Search(where.scale, where.results, where.out, cap=2 * 10**9, say=where.say)
    memory.frontier(SHAPE, {"middling": {}}, 1, 16, other)
    assert len(FakeJob.started) == 2 * before
    FakeJob.LIMITS, limits = FakeJob.LIMITS | {"broken": 3}, FakeJob.LIMITS  # it crashed: asked again
    try:
        assert memory.frontier(SHAPE, {"broken": {}}, 1, 2, other)[0].micro_batch == 2
    finally:
        FakeJob.LIMITS = limits


def test_the_suite_compares_all_at_one_micro_batch_and_times_each_at_its_largest(search, monkeypatch):
    where, _ = search
    setting = memory.Setting(SHAPE, {name: {} for name in ("small", "middling", "large")}, high=16, timed=7, cap=10**9)
    monkeypatch.setattr(memory, "SETTINGS", {"tiny": setting})
    memory.run("tiny", where.results, where.out, where.say)
    results = Results(ledger.read(where.ledger))
    assert 5 in {n for n, *_ in memory.points(results, "large")}
    assert memory.speeds(results, "large") == [10.0, 10.0] and memory.speeds(results, "small") == []
    assert {o.labels["micro_batch"] for o in results.where(configuration="large", repeat=0)} == {16}
    assert all(o.knobs["steps"] == 7 for o in results.where(repeat=1))


def test_a_search_on_a_cpu_takes_a_cap(tmp_path):
    with pytest.raises(ConfigError, match="--cap=600MB"):
        memory.frontier(SHAPE, {"any": {}}, 1, 2, memory.Search("tiny", tmp_path, tmp_path))


@pytest.mark.parametrize("scale", memory.SETTINGS)
def test_every_setting_is_one_that_the_trainer_takes(scale):
    setting = memory.SETTINGS[scale]
    for changes in setting.configurations.values():
        assert (
            configuration(setting.base | changes | {"batch_size": setting.high, "steps": 3}).batch_size == setting.high
        )


def test_a_real_run_under_a_cap_fits_or_is_out_of_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.undo()  # with the base
    knobs = dict(flag.removeprefix("--").split("=", 1) for flag in tiny(tmp_path, save_every=10))
    knobs = {k: v for k, v in knobs.items() if k not in ("out", "batch_size", "steps")} | {"model.seq_len": 256}
    search = memory.Search("tiny", tmp_path / "results", tmp_path / "out", cap=450 * 10**6)
    fits, starves = (search.probe("any", knobs, n) for n in (1, 1024))
    assert (fits.status, starves.status) == ("finished", "oom"), fits.error + starves.error
    assert "allocate memory" in starves.error
    assert fits.final["predicted"] == pytest.approx(fits.final["memory"], rel=0.2)
    assert memory.points(Results(ledger.read(search.ledger)), "any")[0][0] == 1
