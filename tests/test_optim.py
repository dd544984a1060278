"""Optimizers, the learning-rate schedule and the budget."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from kernels import KernelChoice, bind
from model import checkpoint
from model.gpt import GPT, ModelConfig
from model.optim import Muon, OptimizerConfig, build_optimizers, lr_factor, orthogonalize, set_lr
from runtime.budget import Budget, Length
from runtime.config import ConfigError


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, seq_len=8, tied=False).resolved(11)
    return GPT(config, bind(KernelChoice()))


def load_state(optimizers, states):
    current = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    checkpoint.restore(current, {"optimizers": states}, Path("last.pt"))


def optimizers_of(model, name="muon", lr=1e-2, weight_decay=0.1):
    return build_optimizers(model, OptimizerConfig(name, lr, weight_decay=weight_decay))


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(model, name):
    names = {id(p): key for key, p in model.named_parameters()}
    seen = {}
    for optimizer in optimizers_of(model, name):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in seen
                seen[id(p)] = type(optimizer).__name__
                assert bool(group["weight_decay"]) == (p.ndim == 2)
    assert seen.keys() == names.keys()
    by_muon = {names[i] for i, kind in seen.items() if kind == "Muon"}
    hidden = {key for key, p in model.named_parameters() if key.startswith("blocks") and p.ndim == 2}
    assert by_muon == (hidden if name == "muon" else set())


def test_weight_decay_is_decoupled(model):
    before = model.head.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers = optimizers_of(model, "adamw", lr=0.5, weight_decay=0.2)
    set_lr(optimizers, 0.1)
    optimizers[0].step()
    torch.testing.assert_close(model.head.weight, before * (1 - 0.05 * 0.2))


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adam_and_adamw_differ_in_weight_decay_only(model, weight_decay):
    start = {key: value.clone() for key, value in model.state_dict().items()}
    ends = []
    for name in ("adam", "adamw"):
        model.load_state_dict(start)
        optimizer = optimizers_of(model, name, weight_decay=weight_decay)[0]
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    same = [torch.equal(a, b) for a, b in zip(*ends, strict=True)]
    assert same == [not weight_decay or p.ndim < 2 for p in model.parameters()]


def test_adam_adds_weight_decay_to_the_gradient(model):
    """With a gradient of 0 only the decay term is left, and Adam normalizes its size."""
    before = model.head.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers_of(model, "adam", lr=0.5, weight_decay=0.2)[0].step()
    torch.testing.assert_close(model.head.weight, before - 0.5 * before.sign(), rtol=0, atol=0.01)


def test_muon_is_torchs():
    """Compare several steps on wide, tall and square matrices, some of which are orthogonalized in one batch."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(24, 16), (16, 24), (16, 16), (16, 16), (8, 40)]]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    mine = Muon(ours, lr=0.05, weight_decay=0.1)
    oracle = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        oracle.step()
    for p, q, begun in zip(ours, theirs, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - begun).norm()


def test_orthogonalized_matrices_have_singular_values_about_one():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_schedules_rise_hold_and_end_where_they_should(schedule):
    factor = [lr_factor(OptimizerConfig(schedule=schedule, final_lr=0.2), i / 1000, 0.1, 0.001) for i in range(1001)]
    assert factor[0] == pytest.approx(0.01) and factor[49] == pytest.approx(0.5) and factor[99] == pytest.approx(1)
    assert factor[100] == pytest.approx(1)
    assert factor[1000] == pytest.approx(1 if schedule == "constant" else 0.2)
    assert all(a >= b for a, b in itertools.pairwise(factor[100:]))
    middle = {"linear": 0.6, "cosine": 0.6, "wsd": 1, "constant": 1}[schedule]
    assert factor[550] == pytest.approx(middle)
    if schedule == "cosine":
        assert factor[325] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    if schedule == "wsd":
        assert factor[600] == pytest.approx(1) and factor[800] == pytest.approx(0.6)


def test_a_schedule_without_warm_up_begins_at_its_peak():
    assert lr_factor(OptimizerConfig(schedule="linear"), 0.0, 0.0, 0.001) == 1


@pytest.mark.parametrize("length", [Length(steps=1), Length(tokens=1), Length(seconds=1.0)], ids=str)
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.9])
def test_the_first_step_trains(length, warmup):
    budget = Budget(length, 100)
    rate = lr_factor(OptimizerConfig(), budget.progress(0), warmup, budget.step_fraction)
    assert 0 < rate <= 1 and (rate == 1 or length.seconds)


def test_loading_state_keeps_the_configured_hyperparameters(model):
    first = optimizers_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in first:
        optimizer.step()
    second = optimizers_of(model, lr=7.0, weight_decay=0.3)
    load_state(second, [optimizer.state_dict() for optimizer in first])
    assert [g["peak_lr"] for o in second for g in o.param_groups] == [7.0, 7.0, 2e-2]
    assert second[0].param_groups[0]["weight_decay"] == 0.3
    weight = model.head.weight
    assert torch.equal(second[0].state[weight]["exp_avg"], first[0].state[weight]["exp_avg"])


def test_a_warm_up_as_long_as_the_run_rises_to_its_end():
    cosine, wsd = OptimizerConfig(schedule="cosine"), OptimizerConfig(schedule="wsd")
    assert [lr_factor(cosine, i / 4, 1.0, 0.25) for i in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [lr_factor(wsd, i / 4, 2.0, 0.25) for i in range(4)] == [0.125, 0.25, 0.375, 0.5]


def test_a_warm_up_is_a_fraction_or_steps():
    budget = Budget(Length(tokens=1000), 100)
    assert [budget.warmup_fraction(warmup) for warmup in (0.0, 0.3, 1.0, 5.0, 20.0)] == [0, 0.3, 0.1, 0.5, 2]
    assert Budget(Length(seconds=9.0), 100).warmup_fraction(0.3) == 0.3
    with pytest.raises(ConfigError, match=r"warmup 5 is in steps, .* give a fraction of the run, below 1, or"):
        Budget(Length(seconds=9.0), 100).warmup_fraction(5.0)


def test_budget_in_tokens_is_whole_steps():
    budget = Budget(Length(tokens=1000), 300)
    assert [budget.progress(step) for step in (0, 2, 4, 5)] == [0, 0.5, 1, 1]
    resumed = Budget(Length(tokens=1000), 100, budget.state(2))
    assert [resumed.position(step)["tokens"] for step in (2, 4)] == [600, 800]
    assert [resumed.progress(step) for step in (3, 6)] == [0.5, 1]
    assert Budget(Length(tokens=10), 100, budget.state(2)).progress(2) == 1


def test_budget_by_the_clock_begins_after_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    budget = Budget(Length(seconds=50.0), 1)
    now[0] = 110.0
    assert budget.progress(0) == 0  # compiling
    budget.step_ended()
    now[0] = 130.0
    assert budget.progress(9) == pytest.approx(0.5)
    saved = budget.state(9)
    assert saved == {"step": 9, "tokens": 9, "seconds": 30.0, "progress": pytest.approx(0.5), "length": 50.0}

    late = Budget(Length(seconds=5.0), 1)
    now[0] = 140.0
    late.step_ended()
    assert late.progress(1) == 1  # the first step took longer than the budget

    now[0] = 1000.0
    # The same seconds are a smaller fraction of a longer run.
    assert Budget(Length(seconds=120.0), 1, saved).progress(9) == 0.25
    resumed = Budget(Length(seconds=50.0), 1, saved)
    assert resumed.elapsed() == 30 and resumed.progress(9) == pytest.approx(0.5)
    now[0] = 1010.0
    resumed.step_ended()
    now[0] = 1015.0
    assert resumed.progress(12) == pytest.approx(0.75)
    now[0] = 1020.0
    assert resumed.progress(15) == 1


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_every_step_writes_the_copies(model, name):
    model.keep_copies(torch.bfloat16)
    optimizers = optimizers_of(model, name)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    before = [copy.clone() for copy in model.copies().values()]
    for optimizer in optimizers:
        optimizer.step()
    for (weight, copy), old in zip(model.copies().items(), before, strict=True):
        assert torch.equal(copy, weight.bfloat16()) and not torch.equal(copy, old)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_a_clipped_step_is_the_step_of_smaller_gradients(model, name):
    start, ends = {key: value.clone() for key, value in model.state_dict().items()}, []
    for factor, scale in ((0.25, None), (1.0, torch.tensor(0.25))):
        model.load_state_dict(start)
        generator, optimizers = torch.Generator().manual_seed(0), optimizers_of(model, name)
        for p in model.parameters():
            p.grad = factor * torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step(scale)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_loaded_state_keeps_the_tensors_of_a_graph(model):
    """A captured graph reads learning rates and step counts from fixed addresses."""
    optimizers = optimizers_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    steps, rates = optimizers[0].steps, [rate for optimizer in optimizers for rate in optimizer.rates]
    load_state(optimizers, [optimizer.state_dict() for optimizer in optimizers])
    set_lr(optimizers, 0.5)
    assert optimizers[0].steps is steps and steps == 1
    assert all(state["step"] is steps for state in optimizers[0].state.values())
    assert [rate.item() for rate in rates] == pytest.approx([5e-3, 5e-3, 1e-2])


def test_state_of_torchs_adamw_loads(model):
    """The state has the format of `torch.optim.AdamW`."""
    ours = optimizers_of(model, "adamw")[0]
    theirs = torch.optim.AdamW([dict(group) for group in ours.param_groups], lr=1e-2, betas=(0.9, 0.95), fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    theirs.step()
    load_state([ours], [theirs.state_dict()])
    assert ours.steps == 1
    for p, state in theirs.state.items():
        assert torch.equal(ours.state[p]["exp_avg_sq"], state["exp_avg_sq"])
