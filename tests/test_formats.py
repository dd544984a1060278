"""Rounding to e4m3, e5m2 and e2m1, scales by block, stochastic rounding and Hadamard transforms."""

import math

import pytest
import torch

from kernels.formats import (
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    block_values,
    pack,
    quantize,
    quantize_mx,
    quantize_nvfp4,
    random_signs,
    rotate,
    round_to,
)

by_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
INFINITY = math.inf


def decode(format, code):
    """The number that a code stands for, by the definition of the format."""
    sign = -1 if code >> (format.exponent_bits + format.mantissa_bits) else 1
    exponent = code >> format.mantissa_bits & (1 << format.exponent_bits) - 1
    mantissa = code & (1 << format.mantissa_bits) - 1
    bias, top = 2 ** (format.exponent_bits - 1) - 1, (1 << format.exponent_bits) - 1
    if format is E5M2 and exponent == top:
        return sign * INFINITY if mantissa == 0 else math.nan
    if format is E4M3 and exponent == top and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - format.mantissa_bits)
    return sign * (1 + mantissa / 2**format.mantissa_bits) * 2.0 ** (exponent - bias)


def finite(format):
    """All finite values in ascending order, zero once; their codes' last bits in the same order."""
    bits = format.exponent_bits + format.mantissa_bits
    by_value = {decode(format, code): code & 1 for code in range(1 << bits) if math.isfinite(decode(format, code))}
    return torch.tensor(sorted(by_value)), [by_value[value] for value in sorted(by_value)]


@by_format
def test_every_code_is_its_own_nearest(format):
    values, _ = finite(format)
    assert len(values) == {"e4m3": 127, "e5m2": 124, "e2m1": 8}[format.name]
    assert values[-1] == format.largest and values[1] == 2.0 ** (format.smallest_exponent - format.mantissa_bits)
    for sign in (1, -1):
        assert torch.equal(round_to(sign * values, format), sign * values)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_codes_are_torchs(format):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([decode(format, code) for code in range(256)])
    torch.testing.assert_close(codes.view(format.dtype).float(), expected, rtol=0, atol=0, equal_nan=True)


@by_format
def test_ties_go_to_even_and_neighbours_of_ties_to_the_nearest(format):
    values, odd = finite(format)
    middle = (values[1:] + values[:-1]) / 2
    even = torch.where(torch.tensor(odd[1:]) == 0, values[1:], values[:-1])
    for sign in (1, -1):
        assert torch.equal(round_to(sign * middle, format), sign * even)
        assert torch.equal(round_to(sign * torch.nextafter(middle, values[1:]), format), sign * values[1:])
        assert torch.equal(round_to(sign * torch.nextafter(middle, values[:-1]), format), sign * values[:-1])


@by_format
@pytest.mark.parametrize("stochastic", [False, True])
def test_saturation_nan_infinity_and_the_smallest_numbers(format, stochastic):
    tiny = torch.finfo(torch.float32).tiny / 4
    x = torch.tensor([format.largest * 1.01, -3e38, INFINITY, -INFINITY, math.nan, 0.0, -tiny])
    rounded = round_to(x, format, stochastic=stochastic)
    assert rounded[:4].tolist() == [format.largest, -format.largest] * 2
    assert rounded[4].isnan() and rounded[5] == 0
    assert -rounded[6] in (0, stochastic * 2.0 ** (format.smallest_exponent - format.mantissa_bits))


@by_format
def test_rounding_by_steps_is_that_of_torch(format):
    """On random numbers of all magnitudes: a format without torch's dtype takes the path of stochastic rounding."""
    x = torch.randn(20_000) * torch.exp2(torch.randint(-20, 20, (20_000,)).float())
    values, _ = finite(format)
    values = torch.cat((-values.flip(0), values[1:]))
    at = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    low, high = values[at - 1], values[at]
    nearest = torch.where((x - low).abs() < (high - x).abs(), low, high)
    is_tie = (x - low).abs() == (high - x).abs()
    assert torch.equal(round_to(x, format)[~is_tie], nearest[~is_tie])


@by_format
def test_stochastic_rounding_is_unbiased_and_reproducible(format):
    n = 4096
    values, _ = finite(format)
    low = values[:-1:3]
    gap = values[1::3][: len(low)] - low
    x = torch.cat([low + gap * share for share in (0.03, 0.5, 0.9)])
    sample = x.expand(n, -1)
    rounded = [round_to(sample, format, torch.Generator().manual_seed(seed), stochastic=True) for seed in (0, 0, 1)]
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])
    for share, mean in zip((0.03, 0.5, 0.9), rounded[0].double().mean(0).chunk(3), strict=True):
        sigma = gap.double() * (share * (1 - share)) ** 0.5
        assert ((mean - (low + gap * share).double()).abs() < 5 * sigma / n**0.5).all()
    assert torch.isin(rounded[0], values).all()


def test_stochastic_rounding_by_default_follows_torchs_seed():
    x = torch.randn(100)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(round_to(x, E2M1, stochastic=True))
    assert torch.equal(*runs)


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda format: format.name)
def test_a_tensors_scale_takes_its_largest_magnitude_to_the_formats(format):
    x = torch.randn(5, 7) * 1e-4
    q = quantize(x, format)
    assert (q.format, q.block) == (format.name, (0, 0)) and q.codes.abs().max() == format.largest
    torch.testing.assert_close(q.dequantize(), x, rtol=2.0**-format.mantissa_bits / 2, atol=1e-4 * 2.0**-16)
    zero = quantize(torch.zeros(2, 2), format)
    assert not zero.dequantize().any()


@pytest.mark.parametrize("block", [(1, 32), (32, 1)])
def test_mxfp8_scales_are_powers_of_two_that_do_not_saturate(block):
    x = torch.randn(65, 70) * torch.exp2(torch.randint(-12, 12, (65, 1)).float())
    x[0, :32] = 0
    q = quantize_mx(x, block)
    assert q.scale.shape == (-(-65 // block[0]), -(-70 // block[1])) and q.block == block
    mantissa, _ = torch.frexp(q.scale)
    assert (mantissa == 0.5).all() and q.codes.abs().max() <= E4M3.largest
    blocks = q.scale.repeat_interleave(block[0], 0)[:65].repeat_interleave(block[1], 1)[:, :70]
    assert ((q.dequantize() - x).abs() <= (x.abs() * 2.0**-4).maximum(blocks * 2.0**-10)).all()
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize())
    exact = torch.full((1, 32), 448.0 * 2**5)
    assert quantize_mx(exact, (1, 32)).scale == 2**5 and torch.equal(quantize_mx(exact, (1, 32)).dequantize(), exact)


@pytest.mark.parametrize("block", [(1, 16), (16, 1), (16, 16)])
def test_nvfp4_has_e4m3_block_scales_under_a_tensor_scale(block):
    x = torch.randn(40, 50) * torch.exp2(torch.randint(-3, 4, (40, 1)).float())
    q = quantize_nvfp4(x, block)
    assert q.scale.shape == (-(-40 // block[0]), -(-50 // block[1])) and (q.format, q.block) == ("e2m1", block)
    assert torch.equal(round_to(q.scale, E4M3), q.scale) and q.scale.max() == E4M3.largest
    assert torch.equal(round_to(q.codes, E2M1), q.codes) and q.codes.abs().max() == E2M1.largest
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize())
    # An error is at most half the widest step, 1, and what rounding the scale down saturates.
    blocks = q.scale.repeat_interleave(block[0], 0)[:40].repeat_interleave(block[1], 1)[:, :50] * q.tensor_scale
    assert ((q.dequantize() * q.tensor_scale - x).abs() <= 1.0 * blocks + 1e-6).all()


def test_nan_reaches_the_values_of_its_block():
    """e2m1 has no NaN: the block's scale is NaN. So is MXFP8's, for infinity too."""
    x = torch.ones(2, 32)
    x[0, 3] = math.nan
    assert quantize_nvfp4(x, (1, 16)).dequantize()[0, :16].isnan().all()
    assert quantize_mx(x, (1, 32)).dequantize()[0].isnan().all() and quantize_mx(x, (1, 32)).dequantize()[1].all()
    x[0, 3] = INFINITY
    assert quantize_mx(x, (1, 32)).dequantize()[0].isnan().all()


def test_a_hadamard_transform_changes_no_product_and_spreads_outliers():
    signs = random_signs(0)
    h = rotate(torch.eye(16), signs)
    torch.testing.assert_close(h @ h.T, torch.eye(16))
    assert torch.equal(h.abs(), torch.full((16, 16), 0.25)) and not torch.equal(signs, random_signs(1))
    assert torch.equal(rotate(torch.eye(16), torch.ones(16))[0], torch.full((16,), 0.25))
    a, b = torch.randn(5, 48), torch.randn(7, 48)
    torch.testing.assert_close(rotate(a, signs), (a.unflatten(1, (3, 16)) @ h).flatten(1))
    torch.testing.assert_close(rotate(a, signs) @ rotate(b, signs).T, a @ b.T)
    a[:, 3] *= 100
    assert rotate(a, signs)[:, :16].abs().max() < a.abs().max() / 3


def test_every_code_of_e2m1_is_packed_and_unpacked():
    values, _ = finite(E2M1)
    values = torch.cat((values, -values))
    pairs = torch.cartesian_prod(values, values)
    codes = pack(pairs)
    assert codes.flatten().tolist() == [low | high << 4 for low in range(16) for high in range(16)]
    ones = torch.ones(256, 1).to(E4M3.dtype)
    assert torch.equal(block_values(codes, ones), pairs) and block_values(codes, math.nan * ones.float()).isnan().all()


def test_exponents_are_powers_of_two_and_255_is_nan():
    exponents = torch.arange(256, dtype=torch.uint8)[:, None]
    values = block_values(torch.ones(256, 32).to(E4M3.dtype), exponents)[:, 0]
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)] and values[255].isnan()
