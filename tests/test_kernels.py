"""Every implementation of every op against the reference in float64, and the choice of implementations.

Triton kernels run compiled on a GPU, elsewhere in the interpreter with all checks of the sanitizer.
"""

import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, LOSS, assert_accurate, checked, draw

import kernels
from kernels import OPS, KernelChoice, KernelError, Kernels, bind, has_card
from kernels.linear_cross_entropy import IGNORE
from kernels.rope import rope_tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def case(op, name, shape, **options):
    label = [op.name, name, "x".join(map(str, shape.values())), *(f"{k}={v}" for k, v in options.items())]
    return pytest.param(op, name, shape, options, id="-".join(label))


PURE = [op for op in OPS.values() if not op.mutates]  # an op that writes to its arguments has tests of its own
CASES = [
    case(op, name, shape)
    for op in PURE
    for name in op.implementations
    for shape in op.test_shapes
    if name != "triton" or has_card(op, DEVICE)
]
REFERENCES = [p for p in CASES if p.values[1] == "torch" and p.values[0].differentiable]


def options_of(op, *choices, shape=1):
    """Cases of the Triton implementation at one shape, with these arguments instead of the defaults."""
    return [case(OPS[op], "triton", OPS[op].test_shapes[shape], **options) for options in choices]


OPTIONS = [
    *options_of("rmsnorm", {"gain": None}, {"residual": None}, {"gain": None, "residual": None}, {"eps": 0.1}, shape=2),
    *options_of("rope", {"q_gain": None, "k_gain": None}, {"interleaved": True}, {"eps": 0.1}),
    *options_of("rope", {"q_gain": None, "k_gain": None, "interleaved": True}, shape=2),
    *options_of("attention", {"scale": 0.3}),
    *options_of("swiglu", *({"activation": a, "gated": g} for a in ("silu", "gelu", "relu", "relu2") for g in (0, 1))),
    *(
        parameters for op in ("cross_entropy", "linear_cross_entropy") for parameters in options_of(
            op, *({k: v} for k, v in LOSS.items()), LOSS, {"reduction": "sum"}, {"reduction": "none"},
            {"reduction": "none", **LOSS},
        )
    ),
    *options_of("cross_entropy", {"inplace": True}),
    *options_of("cross_entropy", LOSS, shape=2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, name, shape, options", CASES)
def test_parity(op, name, shape, options, dtype):
    assert_accurate(op, name, draw(op, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, name, shape, options", OPTIONS)
def test_parity_with_options(op, name, shape, options, dtype):
    assert_accurate(op, name, draw(op, shape, dtype), **options)


@pytest.mark.parametrize("interleaved", [False, True])
def test_parity_at_positions_that_restart(interleaved):
    op, shape = OPS["rope"], {"B": 2, "T": 7, "H": 4, "KV": 2, "D": 32}
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 6], [5, 6, 0, 0, 1, 2, 3]], device=DEVICE)
    inputs = draw(op, shape)
    assert_accurate(op, "triton", inputs, positions=positions, interleaved=interleaved)


@pytest.mark.parametrize("op, name, shape, options", REFERENCES)
def test_reference_gradients(op, name, shape, options):
    inputs = draw(op, shape, torch.float64)
    leaves = [inputs[key].detach().clone().requires_grad_() for key in op.differentiable]
    assert torch.autograd.gradcheck(
        lambda *values: op.implementations["torch"](**inputs | dict(zip(op.differentiable, values, strict=True))),
        leaves,
        fast_mode=True,
    )


def strided_like(value, kind):
    """A view of equal values in a larger tensor of NaN: every other column, or the right half of every row."""
    wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), math.nan, device=DEVICE).to(value.dtype)
    view = wide[..., ::2] if kind == "columns" else wide[..., value.shape[-1] :]
    view.copy_(value)
    return view


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("op, name, shape, options", CASES)
def test_strided_inputs_give_the_same(op, name, shape, options, kind):
    inputs = draw(op, shape)
    strided = {k: strided_like(v, kind) if torch.is_tensor(v) else v for k, v in inputs.items()}
    with checked(name):
        torch.testing.assert_close(op.implementations[name](**strided), op.implementations[name](**inputs))


def test_rmsnorm_is_torchs():
    x, gain, residual = torch.randn(5, 48), torch.randn(48), torch.randn(5, 48)
    y, stream = bind(KernelChoice()).rmsnorm(x, gain, residual, 1e-5)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (48,), gain, 1e-5))


def test_rope_is_multiplication_by_a_unit_complex_number():
    b, t, h, kv, d = 2, 9, 4, 2, 16
    qkv = torch.randn(b, t, (h + 2 * kv) * d, dtype=torch.float64)
    cos, sin = rope_tables(t, d, theta=500.0)
    q, k, v = bind(KernelChoice()).rope(qkv, cos, sin, h, kv)
    heads = qkv.unflatten(-1, (h + 2 * kv, d))
    turn = torch.exp(1j * torch.outer(torch.arange(t), 500.0 ** (-torch.arange(0, d, 2) / d)))[:, None]
    for ours, theirs in ((q, heads[:, :, :h]), (k, heads[:, :, h : h + kv])):
        turned = torch.complex(*theirs.chunk(2, -1)) * turn
        torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1), atol=1e-6, rtol=0)
    assert torch.equal(v, heads[:, :, h + kv :])


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 32).double()
    cos, sin = rope_tables(64, 32)

    def score(i, j):
        rotated = []
        for x, at in ((q, i), (k, j)):
            packed = torch.cat((x, x, x), -1)
            rotated.append(bind(KernelChoice()).rope(packed, cos[at : at + 1], sin[at : at + 1], 1, 1)[0])
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 2), score(60, 57), atol=1e-5, rtol=0)
    assert (score(5, 2) - score(5, 4)).abs() > 1e-3


def test_swiglu_is_silu_times_up():
    gate, up = torch.randn(2, 5, 24)
    torch.testing.assert_close(bind(KernelChoice()).swiglu(torch.cat((gate, up), -1)), F.silu(gate) * up)


@pytest.mark.parametrize("name", OPS["attention"].implementations)
def test_attention_is_causal_and_grouped(name):
    q, k, v = (torch.randn(2, 6, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    out = OPS["attention"].implementations[name](q, k, v)
    for i in range(6):  # one query, one head at a time, over what it may see
        for head in range(4):
            keys, values = k[:, : i + 1, head // 2], v[:, : i + 1, head // 2]
            weights = torch.einsum("bd,bsd->bs", q[:, i, head], keys).div(4).softmax(-1)
            torch.testing.assert_close(out[:, i, head], torch.einsum("bs,bsd->bd", weights, values))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_is_torchs(reduction):
    x, weight, targets = torch.randn(2, 7, 16), torch.randn(50, 16), torch.randint(50, (2, 7))
    targets[0, :3] = IGNORE
    ours = bind(KernelChoice()).linear_cross_entropy(x, weight, targets, reduction)
    theirs = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
    torch.testing.assert_close(ours.flatten(), theirs.flatten())


def test_linear_cross_entropy_of_nothing_is_zero():
    x = torch.randn(4, 8, requires_grad=True)
    loss = bind(KernelChoice()).linear_cross_entropy(x, torch.randn(5, 8), torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_costs_count_a_call():
    shape = {"B": 1, "T": 4, "S": 4, "H": 2, "KV": 1, "D": 8}
    cost = OPS["attention"].cost(shape, 2)
    assert cost.bytes == 2 * (2 * 4 * 2 * 8 + 2 * 4 * 8)  # q and o, k and v
    assert cost.flops == 2 * 2 * 8 * 2 * (1 + 2 + 3 + 4)  # two products, by head and visible pair


CHOSEN = [field.name for field in fields(KernelChoice)][1:]


def test_choice_names_the_ops_and_their_implementations():
    hints = get_type_hints(KernelChoice, include_extras=True)
    for name in CHOSEN:
        assert hints[name].__metadata__ == (" or ".join((*OPS[name].implementations, "path.py:function")),)
    assert [field.name for field in fields(Kernels)] == [*CHOSEN, "rmsnorm_fp8", "swiglu_fp8", "names"]


def test_choice_by_op_and_for_every_op():
    bound = bind(KernelChoice(every="torch", attention="sdpa"))
    assert bound.names == dict.fromkeys(CHOSEN, "torch") | {"attention": "sdpa"}
    assert bound.attention is OPS["attention"].implementations["sdpa"]
    assert bound.swiglu_fp8 is OPS["swiglu_fp8"].implementations["torch"]
    assert bind(KernelChoice()).names == dict.fromkeys(CHOSEN, "torch")  # auto, on a CPU


def test_choice_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        KernelError, match=r"attention has no 'sdp' kernel; it has torch, triton, sdpa, auto \(did you mean sdpa\?\)"
    ):
        bind(KernelChoice(attention="sdp"))


def test_triton_without_a_gpu_names_both_ways_out(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="--kernels=torch, or set TRITON_INTERPRET=1"):
        bind(KernelChoice(swiglu="triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bind(KernelChoice(swiglu="triton")).names["swiglu"] == "triton"


def test_automatic_choice_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "c_compiler", lambda: "gcc")
    assert bind(KernelChoice(), "cuda").names == dict.fromkeys(CHOSEN, "triton") | {
        "attention": "auto", "fp8_linear": "cublas",
    }  # fmt: skip


@pytest.mark.parametrize("card, has", [("sm_90", False), ("sm_100", True), ("sm_103", True), ("sm_120", True)])
def test_kernels_that_need_other_cards_are_not_taken_and_refused_by_name(monkeypatch, card, has):
    monkeypatch.setattr(kernels, "c_compiler", lambda: "gcc")
    monkeypatch.setattr(kernels, "card", lambda device: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = "triton" if has else "torch"
    for every in ("auto", "triton"):
        names = bind(KernelChoice(every=every), "cuda").names
        assert names["block_scaled_linear"] == names["block_quantize"] == name and names["fp8_quantize"] == "triton"
    asked = KernelChoice(block_scaled_linear="triton")
    if has:
        assert bind(asked, "cuda").names["block_scaled_linear"] == "triton"
    else:
        with pytest.raises(KernelError, match=r"needs instructions of sm_100, .* card is sm_90: use --kernels\.block"):
            bind(asked, "cuda")


def test_what_an_implementation_lacks_is_said_with_advice():
    bound = replace(bind(KernelChoice()), names={"attention": "triton", "swiglu": "torch"})
    with pytest.raises(KernelError, match=r"the triton kernel of attention has no dropout: use --kernels\.attention="):
        bound.require("attention", "dropout")
    bound.require("attention", "windows")
    bound.require("swiglu", "dropout")


def test_what_an_implementation_is_said_to_lack_it_refuses():
    """And the others, which the advice names, have it."""
    inputs = draw(OPS["attention"], {"B": 1, "T": 3, "S": 3, "H": 1, "KV": 1, "D": 16})
    lacks = OPS["attention"].lacks
    for name, function in OPS["attention"].implementations.items():
        if "dropout" in lacks.get(name, {}):
            with pytest.raises(ValueError, match=re.escape(lacks[name]["dropout"].split(" (")[0])):
                function(**inputs, dropout=0.5)
        else:
            function(**inputs, dropout=0.5)


def test_workspace_is_of_the_bound_implementation():
    """A chunk of all seven rows and the padded copy of the head, of a vocabulary of 101; torch declares none."""
    inputs = draw(OPS["linear_cross_entropy"], {"N": 7, "D": 33, "V": 101})
    bound = bind(KernelChoice())
    assert bound.workspace("linear_cross_entropy", **inputs) == 0
    bound = replace(bound, names={"linear_cross_entropy": "triton"})
    assert bound.workspace("linear_cross_entropy", **inputs) == (7 + 33) * 128 * 4
    cast = torch.zeros(128, 33, dtype=torch.bfloat16, device=DEVICE)
    assert bound.workspace("linear_cross_entropy", **inputs, head_cast=cast) == 7 * 128 * 2


def test_a_system_without_triton_has_the_other_kernels():
    program = """if True:
        import sys
        sys.modules["triton"] = None
        from kernels import KernelChoice, KernelError, bind
        print(bind(KernelChoice()))
        try:
            bind(KernelChoice(every="torch", rope="triton"))
        except KernelError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=kernels.__path__[0] + "/.."
    )
    assert done.stdout.count("torch") >= len(CHOSEN) and "Triton is not installed" in done.stdout, done.stderr
