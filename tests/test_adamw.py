"""The AdamW op: torch's optimizers step by step, in one launch, on the tensors that it was given and no others."""

import pytest
import torch
from parity import DEVICE, checked, interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import OPS, adamw
from kernels.adamw import Chunk
from kernels.sanitizer import SanitizerError, sanitize

IMPLEMENTATIONS = pytest.mark.parametrize("name", OPS["adamw"].implementations)
SHAPES = [(1,), (7, 9), (64,), (3, 5, 11), (0,), (130,)]
MUTATED = ("params", "exp_avgs", "exp_avg_sqs", "copies")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(adamw.LAUNCHES.entries, "any", {"": Chunk(64, 32, num_warps=4)})


class State:
    """A list of tensors and all that a step takes, drawn from a seed, in `dtype`."""

    def __init__(self, dtype=torch.float32, shapes=SHAPES, copies=torch.bfloat16):
        self.generator = torch.Generator().manual_seed(0)
        self.dtype, self.shapes = dtype, shapes
        self.params = self.draw()
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.copies = [torch.full_like(p, torch.nan, dtype=copies) if copies else None for p in self.params]
        self.lr, self.step, self.grad_scale = (torch.tensor(x, device=DEVICE) for x in (1e-2, 0.0, 1.0))

    def draw(self):
        values = [torch.randn(s, generator=self.generator, dtype=torch.float64) for s in self.shapes]
        return [x.float().to(DEVICE, self.dtype) for x in values]

    def take(self, name, grads, lr=1e-2, grad_scale=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decoupled=True):
        self.step += 1
        self.lr.fill_(lr)
        self.grad_scale.fill_(grad_scale)
        lists = self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.copies
        with checked(name):
            result = OPS["adamw"].implementations[name](
                *lists, self.lr, self.step, self.grad_scale, *betas, eps, weight_decay, decoupled
            )
        assert result is None


@IMPLEMENTATIONS
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("betas, eps, weight_decay", [((0.9, 0.95), 1e-8, 0.1), ((0.8, 0.999), 1e-2, 0.0)])
def test_follows_torchs_optimizer(name, decoupled, betas, eps, weight_decay):
    """Four steps at changing rates and clipping factors; the truth is torch's own, in float64."""
    ours, truth = State(), State(torch.float64)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(truth.params, betas=betas, eps=eps, weight_decay=weight_decay)
    for lr, clip in (1e-2, 1.0), (3e-2, 0.25), (0.0, 1.0), (1e-3, 0.7):
        grads = ours.draw()
        given = [g.clone() for g in grads]
        ours.take(name, grads, lr, clip, betas, eps, weight_decay, decoupled)
        assert all(torch.equal(g, same) for g, same in zip(grads, given, strict=True))
        theirs.param_groups[0]["lr"] = ours.lr.double().item()
        for p, g in zip(truth.params, grads, strict=True):
            p.grad = g.double() * ours.grad_scale.double()
        theirs.step()
    states = [theirs.state[p] for p in truth.params]
    for mine, exact in (
        (ours.params, truth.params),
        (ours.exp_avgs, [s["exp_avg"] for s in states]),
        (ours.exp_avg_sqs, [s["exp_avg_sq"] for s in states]),
    ):
        torch.testing.assert_close([x.double() for x in mine], exact, rtol=1e-6, atol=3e-7)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(ours.copies, ours.params, strict=True))


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_reference_is_exact_in_float64(decoupled):
    ours, truth = State(torch.float64, copies=None), State(torch.float64)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(truth.params, lr=0.25, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(2):
        grads = ours.draw()
        ours.take("torch", grads, lr=0.25, grad_scale=0.5, decoupled=decoupled)
        for p, g in zip(truth.params, grads, strict=True):
            p.grad = g / 2
        theirs.step()
    torch.testing.assert_close(ours.params, truth.params, rtol=1e-13, atol=1e-13)


@IMPLEMENTATIONS
@pytest.mark.parametrize("step", [1, 2, 30, 100_000])
def test_bias_corrections_keep_their_digits(name, step):
    """From empty moments and beta near 1: the corrections are as small as the moments, 1e-5, and cancel them."""
    state = State(shapes=[(100,)])
    before, grads = [p.double() for p in state.params], state.draw()
    state.step.fill_(step - 1)
    state.take(name, grads, lr=1.0, betas=(0.99999, 0.99999), eps=0.0, weight_decay=0.0)
    share = 1e-5 / -torch.expm1(step * torch.log(torch.tensor(0.99999, dtype=torch.float64)))
    for p, old, g in zip(state.params, before, grads, strict=True):
        torch.testing.assert_close(p.double(), old - share.sqrt().to(DEVICE) * g.double().sign(), rtol=1e-6, atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_where_they_are_wanted(name, dtype):
    """One tensor has none; another's is the upper part of a padded one, whose rest is left alone."""
    state = State(copies=dtype)
    padded = torch.full((16, 9), 7.0, dtype=dtype, device=DEVICE)
    state.copies[1], state.copies[2] = padded[:7], None
    state.take(name, state.draw())
    for copy, p in zip(state.copies, state.params, strict=True):
        assert copy is None or torch.equal(copy, p.to(dtype))
    assert torch.equal(padded[7:], torch.full_like(padded[7:], 7.0))


@IMPLEMENTATIONS
def test_tensors_that_are_not_aligned(name):
    """Views one element into their memory get the same step as tensors of their own, by narrower accesses."""
    aligned, shifted = State(), State()
    for key in ("params", "exp_avgs", "exp_avg_sqs", "copies"):
        tensors = getattr(shifted, key)
        tensors[:] = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x) for x in tensors]
    for state, n_wide in (aligned, 1 + 2 + 2), (shifted, 0):
        lists = [state.params, state.params, state.exp_avgs, state.exp_avg_sqs, state.copies]
        assert adamw._chunk_table(lists, 64)[:, -1].sum() == n_wide
        state.take(name, state.draw())
    for key in MUTATED:
        torch.testing.assert_close(getattr(shifted, key), getattr(aligned, key), rtol=0, atol=0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (3,)]], ids=str)
def test_nothing_to_do(name, shapes):
    state = State(shapes=shapes)
    state.take(name, state.draw())


@interpreted
def test_one_launch_and_one_table_for_a_list(monkeypatch):
    """Tensors in place share a table; it is of their sizes too, and a moved tensor has another."""
    monkeypatch.setattr(adamw, "_TABLES", {})
    state = State(shapes=[(i,) for i in range(1, 60)])
    grads = state.draw()
    with sanitize() as record:
        for _ in range(3):
            OPS["adamw"].implementations["triton"](*arguments(state, grads))
    assert record.launches == 3 and len(adamw._TABLES) == 1
    state.take("triton", [g.clone() for g in grads])
    assert len(adamw._TABLES) == 2
    for key in ("params", "exp_avgs", "exp_avg_sqs", "copies"):
        getattr(state, key)[-1] = getattr(state, key)[-1][:5]
    state.take("triton", [*grads[:-1], grads[-1][:5]])
    assert len(adamw._TABLES) == 3


def arguments(state, grads):
    lists = state.params, grads, state.exp_avgs, state.exp_avg_sqs, state.copies
    state.step.fill_(1.0)
    return *lists, state.lr, state.step, state.grad_scale, 0.9, 0.95, 1e-8, 0.1


def test_tables_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(adamw, "_TABLES", {})
    state = State(shapes=[(3,)])
    gradients = [torch.ones(3, device=DEVICE) for _ in range(70)]
    for g in gradients:
        adamw._chunk_table([state.params, [g], state.exp_avgs, state.exp_avg_sqs, state.copies], 64)
    assert len(adamw._TABLES) == 64


def test_a_table_is_not_made_during_a_capture(monkeypatch):
    """And one that a graph reads outlives all others."""
    monkeypatch.setattr(adamw, "_TABLES", {})
    monkeypatch.setattr(adamw, "_CAPTURED", [])
    state = State(shapes=[(3,)])
    lists = [state.params, state.draw(), state.exp_avgs, state.exp_avg_sqs, state.copies]
    monkeypatch.setattr(adamw, "_capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="once before the capture"):
        adamw._chunk_table(lists, 64)
    monkeypatch.setattr(adamw, "_capturing", lambda x: False)
    table = adamw._chunk_table(lists, 64)
    monkeypatch.setattr(adamw, "_capturing", lambda x: True)
    assert adamw._chunk_table(lists, 64) is table
    assert len(adamw._CAPTURED) == 1 and adamw._CAPTURED[0] is table


@interpreted
@pytest.mark.parametrize("column, change", [(0, 4 * 130), (4, -2), (5, 1)])
def test_the_sanitizer_sees_through_addresses(monkeypatch, column, change):
    """A table that is wrong by a chunk, an element or a count is found out, though its addresses are but numbers."""
    make = adamw._chunk_table

    def wrong(*arguments):
        table = make(*arguments).clone()
        table[-1, column] += change
        return table

    monkeypatch.setattr(adamw, "_chunk_table", wrong)
    state = State(shapes=[(130,)])
    with pytest.raises(SanitizerError, match="_adamw_kernel"):
        state.take("triton", state.draw())


@pytest.mark.parametrize("name", ["triton"])
def test_a_mode_sees_one_op_and_can_run_it_again(name):
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append((function, args, kwargs or {}))
            return function(*args, **kwargs or {})

    recorded, eager = State(), State()
    grads = eager.draw()
    given = arguments(recorded, grads)
    with Recorder():
        OPS["adamw"].implementations[name](*given)
    ((function, args, kwargs),) = calls
    assert function is torch.ops.nanofuse.adamw_.default
    function(*args, **kwargs)
    for _ in range(2):
        OPS["adamw"].implementations[name](*arguments(eager, grads))
    for key in MUTATED:
        torch.testing.assert_close(getattr(recorded, key), getattr(eager, key), rtol=0, atol=0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("change, message", [
    ({"grads": slice(1)}, "1 grads do not fit 6 params"),
    ({"copies": torch.float32}, "float32, not all in bf16 or all in fp16"),
    ({"exp_avgs": "strided"}, "exp_avgs .* is not contiguous"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(name, change, message):
    state = State(copies=change.get("copies", torch.bfloat16))
    grads = state.draw()[change.get("grads", slice(None))]
    if "exp_avgs" in change:
        state.exp_avgs[1] = state.exp_avgs[1].T.contiguous().T
    with pytest.raises(ValueError, match=message):
        state.take(name, grads)


def test_triton_is_for_float32():
    state = State(torch.float64)
    with pytest.raises(ValueError, match="float32"):
        state.take("triton", state.draw())
