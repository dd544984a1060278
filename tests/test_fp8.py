"""The ops on FP8 codes: quantisation in one pass, and products against dequantised values."""

import inspect
import math

import pytest
import torch
from parity import DEVICE, assert_accurate, checked, draw, interpreted

from bench.harness import check
from kernels import EMITTING, OPS, fp8_linear
from kernels.formats import E4M3, E5M2, round_to

QUANTIZE, LINEAR = OPS["fp8_quantize"], OPS["fp8_linear"]
by_name = pytest.mark.parametrize("name", QUANTIZE.implementations)


def quantized(name, x, format=E4M3, scale=0.01, amax=0.0, transposed=True):
    """Codes, codes of the transpose and amax."""
    codes = torch.full(x.shape, math.nan, device=DEVICE).to(format.dtype)
    codes_t = codes.flatten(0, -2).t().contiguous() if transposed else None
    scale, amax = (torch.full((1,), value, device=DEVICE) for value in (scale, amax))
    with checked(name):
        QUANTIZE.implementations[name](x, scale, codes, amax, codes_t)
    return codes, codes_t, amax


@by_name
@pytest.mark.parametrize("shape", QUANTIZE.test_shapes, ids=lambda shape: "x".join(map(str, shape.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_codes_are_the_nearest_in_both_layouts(name, shape, dtype, format):
    x = draw(QUANTIZE, shape, dtype)["x"]
    codes, codes_t, amax = quantized(name, x, format)
    expected = round_to(x.float() * (1 / torch.tensor(0.01, device=DEVICE)), format)
    assert torch.equal(codes.float(), expected) and torch.equal(codes_t.float(), expected.t())
    assert amax == x.abs().max().float()


@by_name
def test_nan_stays_and_what_is_too_large_saturates(name):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 5.0, -1e30, 0.0]], device=DEVICE)
    codes, _, amax = quantized(name, x)
    assert codes.float().nan_to_num(nan=7)[0].tolist() == [7, 448, -448, 448, -448, 0] and amax == math.inf
    assert quantized(name, x[:, [0, 3]])[2] == 5  # NaN shows in the codes, and would stay in the maximum of steps


@by_name
def test_amax_is_raised_and_may_be_left(name):
    x = draw(QUANTIZE, QUANTIZE.test_shapes[1])["x"]
    assert quantized(name, x, amax=100.0)[2] == 100
    codes, expected = torch.empty_like(x, dtype=E4M3.dtype), quantized(name, x)[0]
    QUANTIZE.implementations[name](x, torch.full((1,), 0.01, device=DEVICE), codes)
    assert torch.equal(codes.float(), expected.float())


@by_name
def test_more_dimensions_strides_and_nothing(name):
    x = torch.randn(2, 5, 24, device=DEVICE)
    codes, codes_t, _ = quantized(name, x)
    assert torch.equal(codes.float().flatten(0, 1).t(), codes_t.float())
    strided = torch.randn(10, 48, device=DEVICE)[:, :24]
    assert torch.equal(quantized(name, strided)[0].float(), quantized(name, strided.clone())[0].float())
    assert quantized(name, x[:0], transposed=False)[2] == 0


@by_name
def test_the_bench_checks_codes(name):
    """Its rule allows a code one unit in the last place, and no more."""
    function = QUANTIZE.implementations[name]

    def wrong(x, scale, codes, amax=None, codes_t=None):
        function(x, 2 * scale, codes, amax, codes_t)

    with checked(name):
        results = check(QUANTIZE, QUANTIZE.test_shapes[1], {"right": function, "wrong": wrong}, "forward")
    assert "failed" not in results["right"] and "wrong: codes" in results["wrong"]["failed"]


@by_name
@pytest.mark.parametrize("change, message", [
    ({"codes": torch.zeros(7, 3)}, r"codes \[7, 3\] are not \[7, 300\]"),
    ({"codes_t": torch.zeros(7, 300)}, r"transposed codes \[7, 300\] are not \[300, 7\]"),
])  # fmt: skip
def test_shapes_that_do_not_match_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        QUANTIZE.implementations[name](**draw(QUANTIZE, QUANTIZE.test_shapes[1]) | change)


@interpreted
@pytest.mark.parametrize("shape", LINEAR.test_shapes, ids=lambda shape: "x".join(map(str, shape.values())))
def test_block_scaled_products_with_scales_of_one_are_those_of_codes(shape, monkeypatch):
    """As sm_120 multiplies."""
    monkeypatch.setattr(fp8_linear, "DOT_SCALED", ("sm_90",))
    assert_accurate(LINEAR, "triton", draw(LINEAR, shape, torch.bfloat16))


@pytest.mark.parametrize("name", LINEAR.implementations)
def test_leading_dimensions_and_nothing(name):
    inputs = draw(LINEAR, LINEAR.test_shapes[1], torch.bfloat16)
    expected = LINEAR.implementations["torch"](**inputs)
    with checked(name):
        three = LINEAR.implementations[name](**inputs | {"x": inputs["x"].view(3, 11, -1)})
        none = LINEAR.implementations[name](**inputs | {"x": inputs["x"][:0]})
    torch.testing.assert_close(three.flatten(0, 1), expected)
    assert none.shape == (0, 48)


# Ops that quantise their result in the same pass

EMITTED = [
    pytest.param(OPS[f"{op}_fp8"], name, shape, id="-".join([op, name, "x".join(map(str, shape.values()))]))
    for op in EMITTING for name in OPS[f"{op}_fp8"].implementations for shape in OPS[f"{op}_fp8"].test_shapes
]  # fmt: skip
by_emitting = pytest.mark.parametrize("op, name, shape", EMITTED)


@by_emitting
def test_results_and_codes_of_one_pass_are_accurate(op, name, shape):
    assert_accurate(op, name, draw(op, shape, torch.bfloat16))


def plain_of(op, name):
    """The implementation without codes, of the inputs of the one with them."""
    function = OPS[op.name.removesuffix("_fp8")].implementations[name]
    names = inspect.signature(function).parameters
    return lambda inputs: function(**{key: x for key, x in inputs.items() if key in names})


@by_emitting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_equals_two(op, name, shape, dtype):
    """The plain op, and then quantisation: results, codes and amax, bit for bit."""
    inputs, plain = draw(op, shape, dtype), plain_of(op, name)
    scale, amax = inputs["scale"], inputs["amax"].clone()
    inputs["x"][-1, 0] = math.nan
    with checked(name):
        *results, codes = op.implementations[name](**inputs)
        *unmeasured, _ = op.implementations[name](**inputs | {"amax": None})
        expected = plain(inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    expected_codes = torch.empty_like(codes)
    QUANTIZE.implementations["torch"](expected[0], scale, expected_codes, amax)
    for ours in (results, unmeasured):
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8)) and torch.equal(inputs["amax"], amax)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("op", EMITTING)
def test_nan_alone_leaves_amax(op, name):
    """In blocks without padding."""
    op = OPS[f"{op}_fp8"]
    inputs = draw(op, {"rows": 2, "D": 1024, "F": 1024})
    inputs["x"].fill_(math.nan)
    with checked(name):
        assert op.implementations[name](**inputs)[-1].float().isnan().all() and inputs["amax"] == 0


@by_emitting
def test_amax_of_one_pass_only_rises(op, name, shape):
    inputs = draw(op, shape) | {"amax": torch.full((1,), 1e6, device=DEVICE)}
    with checked(name):
        op.implementations[name](**inputs)
    assert inputs["amax"] == 1e6


@pytest.mark.parametrize("gated, large", [(True, slice(72)), (True, slice(72, 144)), (False, slice(0))], ids=str)
@pytest.mark.parametrize("name", OPS["swiglu_fp8"].implementations)
def test_codes_of_swiglus_gradient_are_the_gradient_of_an_empty_tensor(name, gated, large):
    """With the larger gradient in either half."""
    op = OPS["swiglu_fp8"]
    inputs = draw(op, {"rows": 5, "F": 72}, torch.bfloat16) | {"gated": gated}
    inputs["x"][:, large] *= 16
    inputs["dx_codes"] = torch.zeros(1, device=DEVICE).to(E5M2.dtype).expand(5, 144)
    leaves = [inputs[key].requires_grad_() for key in ("x", "dx_codes")]
    with checked(name):
        y, _ = op.implementations[name](**inputs)
        dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
        dx, codes = torch.autograd.grad(y, leaves, dy)
        (expected,) = torch.autograd.grad(plain_of(op, name)(inputs), leaves[:1], dy)
    expected_codes, amax = torch.empty_like(codes), torch.zeros(1, device=DEVICE)
    QUANTIZE.implementations["torch"](expected, inputs["dx_scale"], expected_codes, amax)
    assert torch.equal(dx, expected) and torch.equal(codes.float(), expected_codes.float())
    assert torch.equal(inputs["dx_amax"], amax) and codes.dtype == E5M2.dtype
