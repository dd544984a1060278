"""The ops on FP8 codes: quantisation in one pass, and products against dequantised values."""

import math

import pytest
import torch
from parity import DEVICE, assert_accurate, checked, draw, interpreted

from bench.harness import check
from kernels import OPS, fp8_linear
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
