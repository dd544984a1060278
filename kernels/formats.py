"""Number formats of 8 and 4 bits in plain torch: rounding, scales, random Hadamard transforms.

    value = code * scale               one scale for a tensor or for each block of it
    value = code * scale * tensor_scale    NVFP4, whose block scales are e4m3

            bits: sign, exponent, mantissa    largest    subnormal step    infinity    NaN
    e4m3    1 4 3                             448        2^-9              no          yes
    e5m2    1 5 2                             57,344     2^-16             yes         yes
    e2m1    1 2 1                             6          1/2               no          no

Rounding saturates, as the conversions of a GPU do: what lies beyond the largest value, infinity included, becomes the
largest. NaN stays NaN.

Codes are held as the numbers that they stand for, in a dtype that has all of them. Products of bfloat16 codes are then
what a tensor core computes of the codes themselves, up to the order of sums.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1; OCP Microscaling Formats (MX) 1.0, 2023;
Mishra et al., "Recipes for Pre-training LLMs with MXFP8", 2025 (scales rounded up); NVIDIA, "Pretraining Large Language
Models with NVFP4", 2025 (arXiv 2509.25149), section 4 and appendix C.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A floating-point format. `dtype` is torch's for it; e2m1 has none."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    dtype: torch.dtype | None = None

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number, which subnormals share."""
        return 2 - 2 ** (self.exponent_bits - 1)


E4M3 = Format("e4m3", 4, 3, 448.0, torch.float8_e4m3fn)
E5M2 = Format("e5m2", 5, 2, 57344.0, torch.float8_e5m2)
E2M1 = Format("e2m1", 2, 1, 6.0)
FORMATS = {each.name: each for each in (E4M3, E5M2, E2M1)}
FP8_CARDS = ("sm_89", "sm_90", "sm_100", "sm_120")  # with instructions for e4m3 and e5m2; AMD's have other biases


def round_to(x: Tensor, format: Format, generator: torch.Generator | None = None, stochastic: bool = False) -> Tensor:
    """The values of `format` nearest to float32 `x`, ties to even; in float32.

    `stochastic`: the value above or below instead, at random, so that the mean is `x` wherever it does not saturate.
    The random numbers are those of `generator`, or of torch's own for the device."""
    if format.dtype is not None and not stochastic:
        return x.clamp(-format.largest, format.largest).to(format.dtype).to(x.dtype)
    exponent = (x.view(torch.int32) >> 23 & 255) - 127
    ulp = torch.exp2(exponent.clamp(format.smallest_exponent, 127).to(x.dtype) - format.mantissa_bits)
    steps = x / ulp
    if stochastic:
        steps = (steps + torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)).floor()
    else:
        steps = steps.round()
    return (steps * ulp).clamp(-format.largest, format.largest)


@dataclass(frozen=True)
class Quantized:
    """A matrix in a low-precision format.

    codes: `[rows, columns]`, the numbers that the codes stand for, in any dtype that has them.
    scale: float32, what codes are multiplied by: `[1, 1]`, or a scale of each block, `[rows / block[0], columns /
        block[1]]` rounded up.
    format: name of the codes' format.
    block: rows and columns of a block; (0, 0) if the whole matrix is one.
    tensor_scale: float32 `[]`, a second factor, which `dequantize` leaves to whoever multiplies; None for none.
    """

    codes: Tensor
    scale: Tensor
    format: str
    block: tuple[int, int] = (0, 0)
    tensor_scale: Tensor | None = None

    def copy_(self, other: "Quantized") -> None:
        """Take over the numbers of a matrix of this shape and format."""
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)
        if self.tensor_scale is not None:
            self.tensor_scale.copy_(other.tensor_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times their scales. In bfloat16 that is exact for NVFP4 (2 times 4 significant bits) and MXFP8 (powers
        of two)."""
        scale = self.scale
        if self.block != (0, 0):
            rows, columns = self.codes.shape
            scale = scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]
        return (self.codes.float() * scale).to(dtype)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0: a block so small has codes of 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def quantize(x: Tensor, format: Format) -> Quantized:
    """Quantise a matrix with one scale, which takes its largest magnitude to the largest value of `format`."""
    x = x.float()
    scale = x.abs().amax().view(1, 1) / format.largest
    return Quantized(round_to(x * _inverse(scale), format), scale, format.name)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`x` as `[blocks of rows, rows, blocks of columns, columns]`, padded by zeros."""
    (rows, columns), (r, c) = x.shape, block
    padded = F.pad(x, (0, -columns % c, 0, -rows % r))
    return padded.view(math.ceil(rows / r), r, math.ceil(columns / c), c)


def quantize_mx(x: Tensor, block: tuple[int, int]) -> Quantized:
    """MXFP8: e4m3 with a power of two (e8m0) for each block, (1, 32) or (32, 1): the least that does not saturate."""
    blocks = _blocks(x.float(), block)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    exponent = torch.log2(largest / E4M3.largest).ceil().clamp(-127, 127)
    scale = torch.where(largest > 0, torch.exp2(exponent), 2.0**-127)
    scale = torch.where(largest > scale * E4M3.largest, 2 * scale, scale)  # log2 rounds too
    scale = torch.where(largest.isfinite(), scale, torch.nan)  # e8m0 has NaN and no infinity
    codes = round_to(blocks / scale, E4M3)
    return _quantized(x, codes, scale, E4M3, block)


def quantize_nvfp4(
    x: Tensor, block: tuple[int, int], generator: torch.Generator | None = None, stochastic: bool = False
) -> Quantized:
    """NVFP4: e2m1 with an e4m3 scale for each block, (1, 16), (16, 1) or (16, 16), and a float32 scale of the tensor,
    which takes the largest of the block scales to 448. `generator` and `stochastic` as in `round_to`."""
    blocks = _blocks(x.float(), block)
    largest = blocks.abs().amax((1, 3), keepdim=True)
    tensor_scale = largest.amax() / (E2M1.largest * E4M3.largest)
    scale = round_to(largest / E2M1.largest * _inverse(tensor_scale), E4M3)
    codes = round_to(blocks * _inverse(scale * tensor_scale), E2M1, generator, stochastic)
    return _quantized(x, codes, scale, E2M1, block, tensor_scale)


def _quantized(x, codes, scale, format, block, tensor_scale=None) -> Quantized:
    """The matrix `x` from its padded blocks."""
    rows, columns = x.shape
    codes = codes.reshape(codes.shape[0] * block[0], -1)[:rows, :columns]
    return Quantized(codes, scale[:, 0, :, 0], format.name, block, tensor_scale)


def hadamard(size: int, seed: int | None = None, device: torch.device | None = None) -> Tensor:
    """The orthogonal Hadamard matrix `[size, size]`, float32, for a power of two (Sylvester 1867); with a `seed`, its
    columns have random signs."""
    h = torch.ones(1, 1, device=device)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    if seed is not None:
        bits = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed))
        h = h * (1.0 - 2.0 * bits).to(h.device)
    return h / size**0.5


def rotate_rows(x: Tensor, h: Tensor) -> Tensor:
    """Multiply every `len(h)` rows of a float32 matrix by `h`, padded by zeros to a multiple.

    With an orthogonal `h` the product `rotate_rows(a, h).T @ rotate_rows(b, h)` is `a.T @ b`, while outliers of one row
    are spread over all."""
    groups = _blocks(x, (len(h), 1)).squeeze(3)
    return torch.einsum("ij,gjc->gic", h, groups).flatten(0, 1)
