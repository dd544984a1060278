"""Number formats of 8 and 4 bits in plain torch: rounding, scales, random Hadamard transforms.

    value = code * scale                  one scale for a tensor or for each block of it
    value = code * scale * tensor_scale   NVFP4, whose block scales are e4m3

            bits: sign, exponent, mantissa    largest    subnormal step    infinity    NaN
    e4m3    1 4 3                             448        2^-9              no          yes
    e5m2    1 5 2                             57,344     2^-16             yes         yes
    e2m1    1 2 1                             6          1/2               no          no

Rounding saturates, as the conversions of a GPU do: what lies beyond the largest value, infinity included, becomes the
largest. NaN stays NaN.

`Quantized` holds codes as the numbers that they stand for, in a dtype that has all of them. `BlockScaled` holds MXFP8
and NVFP4 in bits, as tensor cores and `tl.dot_scaled` take them.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1; OCP Microscaling Formats (MX) 1.0, 2023;
Mishra et al., "Recipes for Pre-training LLMs with MXFP8", 2025 (scales rounded up); NVIDIA, "Pretraining Large Language
Models with NVFP4", 2025 (arXiv 2509.25149), section 4 and appendix C.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

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
FP8_CARDS = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")  # with instructions for e4m3 and e5m2; AMD's differ


@dataclass(frozen=True)
class BlockFormat:
    """A format with a scale for each `block` of adjacent values in a row. `scale_dtype` is uint8 for e8m0, a power of
    two by its exponent plus 127; 255 is NaN. Codes without a dtype of their own are two in a byte."""

    name: str
    codes: Format
    block: int
    scale_dtype: torch.dtype


MXFP8 = BlockFormat("mxfp8", E4M3, 32, torch.uint8)
NVFP4 = BlockFormat("nvfp4", E2M1, 16, E4M3.dtype)
BLOCK_FORMATS = {each.name: each for each in (MXFP8, NVFP4)}
# Cards that multiply both. Triton 3.7 multiplies MXFP8 in bf16 on others, and its compiler crashes for NVFP4.
BLOCK_SCALED_CARDS = ("sm_100", "sm_103", "sm_120")


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


@torch.no_grad()
def codes_of(x: Tensor, scale: Tensor, format: Format, amax: Tensor | None = None) -> Tensor:
    """FP8 codes of `x` with a given scale, in the dtype of `format` and contiguous: round(x / scale), saturating.

    `scale` and `amax` are float32 `[1]`. `amax` is raised to the largest magnitude in `x`, of which NaN is none; None
    leaves that unmeasured."""
    if amax is not None and x.numel():
        # max, in which NaN wins, would take the maximum of all steps to NaN; the codes tell already.
        amax.copy_(torch.fmax(amax, x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax().float()))
    codes = (x.float() * (1 / scale)).clamp(-format.largest, format.largest).to(format.dtype)
    return codes.contiguous()


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
    mantissa, exponent = torch.frexp(largest)  # the mantissa is in [1/2, 1); 448 is 0.875 * 2^9
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp(-127, 127).float()
    scale = torch.where(largest > 0, torch.exp2(exponent), 2.0**-127)
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


class BlockScaled(NamedTuple):
    """A matrix in MXFP8 or NVFP4, with blocks along its rows, in bits.

    codes: e4m3 `[rows, K]`; or uint8 `[rows, K / 2]`, e2m1 two in a byte, the first in its low bits. K is the number of
        columns, padded by zeros to a multiple of `PADDED`, so that a product needs no masks along K.
    block_scale: `[rows, K / block]`, e8m0 in uint8 or e4m3. Each row begins at a multiple of 16 bytes, so that kernels
        load several scales at once.
    scale: float32 `[1]`, the scale of the whole matrix; 1 for MXFP8.
    """

    codes: Tensor
    block_scale: Tensor
    scale: Tensor

    @classmethod
    def empty(cls, format: BlockFormat, rows: int, columns: int, device: torch.device) -> "BlockScaled":
        """Memory for a matrix of that shape."""
        width = columns + -columns % PADDED
        dtype, n_codes = (torch.uint8, width // 2) if format.codes.dtype is None else (format.codes.dtype, width)
        n_blocks = width // format.block
        block_scale = torch.empty(rows, n_blocks + -n_blocks % 16, dtype=format.scale_dtype, device=device)
        codes = torch.empty(rows, n_codes, dtype=dtype, device=device)
        return cls(codes, block_scale[:, :n_blocks], torch.empty(1, device=device))

    def copy_(self, quantized: Quantized) -> None:
        """Take over the numbers of a matrix whose columns are padded."""
        scale = quantized.scale.repeat_interleave(quantized.block[0], 0)[: len(self.codes)]
        if quantized.tensor_scale is None:
            self.codes.copy_(quantized.codes)
            self.block_scale.copy_(scale.view(torch.int32) >> 23 & 255)
            self.scale.fill_(1)
        else:
            self.codes.copy_(pack(quantized.codes))
            self.block_scale.copy_(scale)
            self.scale.copy_(quantized.tensor_scale)

    def dequantize(self) -> Tensor:
        """The values `[rows, K]`, float32."""
        return block_values(self.codes, self.block_scale) * self.scale


PADDED = 256


def pad(x: Tensor) -> Tensor:
    """A matrix with columns of zeros up to a multiple of `PADDED`."""
    return F.pad(x, (0, -x.shape[1] % PADDED))


def block_format(codes: Tensor) -> BlockFormat:
    """The format of `BlockScaled.codes`."""
    return NVFP4 if codes.dtype == torch.uint8 else MXFP8


def block_values(codes: Tensor, block_scale: Tensor) -> Tensor:
    """`codes` of a `BlockScaled` times the scales of their blocks, float32 `[rows, K]`; bfloat16 has all of them."""
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        # As e5m2 a code has its two bits of exponent and one of mantissa, and a bias that is larger by 14.
        values = 2.0**14 * ((codes & 7) << 1 | (codes & 8) << 4).view(E5M2.dtype).float()
        factors = block_scale.float()
    else:
        values, exponent = codes.float(), block_scale.float()
        factors = torch.where(exponent == 255, torch.nan, torch.exp2(exponent - 127))
    blocks = values.unflatten(1, (-1, values.shape[1] // factors.shape[1]))
    return (blocks * factors[:, :, None]).flatten(1)


def pack(values: Tensor) -> Tensor:
    """Values of e2m1 `[rows, K]` as uint8 `[rows, K / 2]`, as `block_values` takes them. NaN, which e2m1 lacks, becomes
    6."""
    bits = (2.0**-14 * values).to(E5M2.dtype).view(torch.uint8)
    codes = bits >> 1 & 7 | bits >> 4 & 8
    return codes[:, ::2] | codes[:, 1::2] << 4


ROTATED = 16  # columns that a Hadamard transform mixes


def random_signs(seed: int, device: torch.device | None = None) -> Tensor:
    """1 or -1 for each of `ROTATED` columns, float32."""
    bits = torch.randint(2, (ROTATED,), generator=torch.Generator().manual_seed(seed))
    return (1.0 - 2.0 * bits).to(device)


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply every `ROTATED` columns of a float32 matrix by `signs` and by the orthogonal Hadamard matrix (Sylvester
    1867). The number of columns is a multiple of `ROTATED`.

    The product `rotate(a, signs) @ rotate(b, signs).T` is `a @ b.T`, while an outlier is spread over all columns."""
    y = (x.unflatten(-1, (-1, ROTATED)) * signs).unflatten(-1, (2, 2, 2, 2))
    for axis in (-1, -2, -3, -4):  # the order in which the kernel adds
        first, second = y.unbind(axis)
        y = torch.stack((first + second, first - second), axis)
    return y.flatten(-5) * ROTATED**-0.5
