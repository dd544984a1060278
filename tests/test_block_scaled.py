"""The ops on MXFP8 and NVFP4: codes and scales against kernels/formats.py, and products of them."""

import math

import pytest
import torch
from parity import DEVICE, checked, draw

from bench.harness import check
from kernels import OPS, has_card
from kernels.formats import (
    BLOCK_FORMATS,
    MXFP8,
    NVFP4,
    BlockScaled,
    quantize_mx,
    quantize_nvfp4,
    random_signs,
    rotate,
)

QUANTIZE, LINEAR = OPS["block_quantize"], OPS["block_scaled_linear"]
NAMES = [name for name in QUANTIZE.implementations if name != "triton" or has_card(QUANTIZE, DEVICE)]
by_name = pytest.mark.parametrize("name", NAMES)
by_format = pytest.mark.parametrize("format", BLOCK_FORMATS.values(), ids=BLOCK_FORMATS)


def quantized(name, x, format, both=False, **options):
    """The codes of x, or those and the codes of its transpose."""
    matrices = [BlockScaled.empty(format, *matrix.shape, DEVICE) for matrix in (x, x.t())[: 1 + both]]
    with checked(name):
        QUANTIZE.implementations[name](x, *(tensor for codes in matrices for tensor in codes), **options)
    return matrices if both else matrices[0]


def bits(codes):
    """What a matrix is made of, to compare bit for bit."""
    return [codes.codes.view(torch.uint8), codes.block_scale.view(torch.uint8), codes.scale.view(torch.int32)]


def expected(x, format, square=False):
    """The values that kernels/formats.py gives."""
    if format is MXFP8:
        return quantize_mx(x, (1, 32)).dequantize()
    q = quantize_nvfp4(x, (16 if square else 1, 16))
    return q.dequantize() * q.tensor_scale


@by_name
@by_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_those_of_the_format_in_both_layouts_and_padding_is_zero(name, format, dtype):
    x = torch.randn(70, 304, device=DEVICE) * torch.exp2(torch.randint(-12, 12, (70, 1), device=DEVICE))
    x = x.to(dtype).clamp(-6e4, 6e4)
    codes, codes_t = quantized(name, x, format, both=True)
    for ours, matrix in ((codes, x), (codes_t, x.t()), (quantized(name, x, format), x)):
        values, columns = ours.dequantize(), matrix.shape[1]
        assert torch.equal(values[:, :columns], expected(matrix, format)) and not values[:, columns:].any()
        assert ours.block_scale.stride(0) % 16 == 0 and values.shape[1] % 256 == 0


@by_name
@pytest.mark.parametrize("shape", [(16, 16), (70, 90)], ids=str)
def test_square_blocks_are_shared_with_the_transpose(name, shape):
    x = torch.randn(shape, device=DEVICE)
    codes, codes_t = quantized(name, x, NVFP4, both=True, square=True)
    values = codes.dequantize()[:, : shape[1]]
    assert torch.equal(values, expected(x, NVFP4, square=True))
    assert torch.equal(values, codes_t.dequantize()[:, : shape[0]].t())


@by_name
@pytest.mark.parametrize("rows", [48, 7])
def test_the_transpose_alone_is_transformed(name, rows):
    x, signs = torch.randn(rows, 20, device=DEVICE), random_signs(3, DEVICE)
    codes, codes_t = quantized(name, x, NVFP4, both=True, signs=signs)
    assert torch.equal(codes.dequantize()[:, :20], expected(x, NVFP4))
    x_t = torch.nn.functional.pad(x.t(), (0, -rows % 16))
    assert torch.equal(codes_t.dequantize()[:, : x_t.shape[1]], expected(rotate(x_t, signs), NVFP4))


@pytest.mark.skipif("triton" not in NAMES, reason="this card lacks the instructions")
@pytest.mark.parametrize(
    "format, options",
    [(MXFP8, {}), (NVFP4, {}), (NVFP4, {"square": True}), (NVFP4, {"signs": random_signs(0, DEVICE)})],
    ids=["mxfp8", "nvfp4", "nvfp4-square", "nvfp4-rotated"],
)
def test_the_kernels_give_the_same_bits(format, options):
    """Of all numbers of bfloat16 below 2^123, whose sums of 16 are finite; of small ones alone; and of zeros."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 2.0**123].view(-1, 250).to(DEVICE)
    for part in (x, x[x.abs().amax(1) < 1e4], torch.zeros(3, 40, device=DEVICE)):
        for ours, theirs in zip(*(quantized(name, part, format, True, **options) for name in NAMES), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(bits(ours), bits(theirs), strict=True))


@by_name
def test_nan_and_infinity_reach_the_values(name):
    """Of their block in MXFP8, of the whole matrix in NVFP4, whose scale they are in."""
    for value in (math.nan, math.inf, -math.inf):
        x = torch.ones(2, 64, device=DEVICE)
        x[0, 3] = value
        values = quantized(name, x, MXFP8).dequantize()
        assert values[0, :32].isnan().all() and (values[0, 32:64] == 1).all() and (values[1, :64] == 1).all()
        assert quantized(name, x, NVFP4).dequantize()[:, :64].isnan().all()


@by_name
def test_stochastic_rounding_is_unbiased_and_follows_torchs_seed(name):
    n = 2048
    shares = torch.linspace(0.03, 5.97, 15, device=DEVICE)
    block = torch.cat((shares, shares.new_tensor([6.0]))) * torch.tensor([1, -1], device=DEVICE).repeat(8)
    x = block.repeat(n // 16, 16)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(quantized(name, x, NVFP4, stochastic=True))
    assert torch.equal(runs[0].codes, runs[1].codes) and not torch.equal(runs[0].codes, runs[2].codes)
    assert torch.equal(runs[0].block_scale.float(), quantized(name, x, NVFP4).block_scale.float())
    both = quantized(name, x, NVFP4, both=True, stochastic=True)
    assert not torch.equal(both[0].dequantize(), both[1].dequantize()[:256, : n // 16].t())
    values, block = runs[0].dequantize().view(n, 16).double(), block.double()
    steps = torch.where(block.abs() < 2, 0.5, torch.where(block.abs() < 4, 1.0, 2.0))
    low = (block.abs() / steps).floor() * steps
    assert ((values.abs() - low) / steps - 0.5).abs().le(0.5 + 1e-6).all()  # one of the two neighbours
    sigma = ((block.abs() - low) * (low + steps - block.abs())).clamp(min=0).sqrt()
    assert ((values.mean(0) - block).abs() <= 5 * sigma / n**0.5 + 1e-6).all()


@by_name
def test_the_bench_checks_codes_of_four_bits(name):
    function = QUANTIZE.implementations[name]

    def wrong(x, *codes, **options):
        function(-x, *codes, **options)

    with checked(name):
        results = check(QUANTIZE, QUANTIZE.test_shapes[2], {"right": function, "wrong": wrong}, "forward")
    assert "failed" not in results["right"] and "wrong: codes" in results["wrong"]["failed"]


@by_name
def test_what_does_not_match_is_refused(name):
    x, function = torch.randn(7, 300, device=DEVICE), QUANTIZE.implementations[name]
    codes = BlockScaled.empty(MXFP8, 7, 300, DEVICE)
    with pytest.raises(ValueError, match=r"codes \[7, 256\] with scales \[7, 8\] are not .*: \[7, 512\], \[7, 16\]"):
        function(x, *BlockScaled.empty(MXFP8, 7, 256, DEVICE))
    with pytest.raises(ValueError, match=r"codes_t \[7, 512\] .* a matrix \[300, 7\] in mxfp8: \[300, 256\]"):
        function(x, *codes, *codes)
    with pytest.raises(ValueError, match="options of nvfp4, not of mxfp8"):
        function(x, *codes, stochastic=True)
    inputs, product = draw(LINEAR, LINEAR.test_shapes[3]), LINEAR.implementations[name]
    with pytest.raises(ValueError, match=r"weight .* does not have the format and columns of x"):
        product(**inputs | {"weight": inputs["weight"][:, :128]})
    with pytest.raises(ValueError, match=r"block scales .* are not those of nvfp4 codes \[48, 256\]"):
        product(**inputs | {"weight_block_scale": inputs["weight_block_scale"][:, :16]})


@by_name
@by_format
def test_products_are_of_values(name, format):
    x, weight = torch.randn(33, 300, device=DEVICE), torch.randn(48, 300, device=DEVICE)
    a, b = (quantized("torch", each, format) for each in (x, weight))
    with checked(name):
        y = LINEAR.implementations[name](*a, *b, torch.float32)
        none = LINEAR.implementations[name](a.codes[:0], a.block_scale[:0], a.scale, *b)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
    assert none.shape == (0, 48) and none.dtype == torch.bfloat16
