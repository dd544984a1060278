"""Quantisation of a matrix to MXFP8 or NVFP4, in blocks along its rows, and of its transpose.

    MXFP8    s = 2^ceil(log2(amax of 32 / 448))     code = round(x / s)          to e4m3
    NVFP4    S = amax of the matrix / (6 * 448)
             s = round(amax of 16 / (6 S))          code = round(x / (s S))      to e4m3, to e2m1

Rounding saturates, to nearest with ties to even. A linear layer sums over the features of x in one product and over its
tokens in another, which take blocks along either dimension: the codes of x and of x^T. A GPU reads x once for both, and
for S once before.

NVFP4 has three options: blocks of 16 x 16, whose scales x and x^T share, for weights; stochastic rounding, for
gradients; and a random Hadamard transform of every 16 columns of x^T, for the factors of a weight gradient.

A program loops over tiles. For S a first launch leaves the largest magnitude that each program has seen, and every
program of the second takes the maximum of those. Magnitudes are compared as integers, in which NaN is the largest.

Sources: OCP Microscaling Formats (MX) 1.0, 2023; Mishra et al., "Recipes for Pre-training LLMs with MXFP8", 2025;
NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, appendix C; Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", 2011 (Philox).
"""

import torch
from torch import Tensor

from kernels.common import cdiv, n_sm, next_power_of_2, rows_of
from kernels.formats import (
    BLOCK_SCALED_CARDS,
    MXFP8,
    NVFP4,
    BlockScaled,
    block_format,
    pad,
    quantize_mx,
    quantize_nvfp4,
    random_signs,
    rotate,
)
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, Op

# Reference


@torch.no_grad()
def block_quantize_torch(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    codes_t: Tensor | None = None,
    block_scale_t: Tensor | None = None,
    scale_t: Tensor | None = None,
    square: bool = False,
    stochastic: bool = False,
    signs: Tensor | None = None,
) -> None:
    """Quantise a matrix in plain torch, the reference.

    Args:
        x: `[rows, columns]`, float32 or half precision.
        codes, block_scale, scale: the result, a `BlockScaled` matrix of that shape. The dtype of `codes` says whether
            it is MXFP8 or NVFP4.
        codes_t, block_scale_t, scale_t: the same of the transpose; None for none.
        square: one scale for 16 rows and columns. This and the others are options of NVFP4.
        stochastic: round codes up or down at random, by torch's random numbers, so that their mean is x.
        signs: float32 `[16]`, 1 or -1: the transpose is that of `kernels.formats.rotate(x.t(), signs)`.

    Raises:
        ValueError: shapes do not match, or MXFP8 with an option.
    """
    _check(x, codes, block_scale, codes_t, block_scale_t, square or stochastic or signs is not None)

    def quantize(x: Tensor, out: BlockScaled) -> None:
        if block_format(out.codes) is MXFP8:
            out.copy_(quantize_mx(x, (1, 32)))
        else:
            out.copy_(quantize_nvfp4(x, (16 if square else 1, 16), stochastic=stochastic))

    x = x.float()
    quantize(pad(x), BlockScaled(codes, block_scale, scale))
    if codes_t is not None:
        x_t = pad(x.t().contiguous())
        quantize(x_t if signs is None else rotate(x_t, signs), BlockScaled(codes_t, block_scale_t, scale_t))


def _check(
    x: Tensor, codes: Tensor, block_scale: Tensor, codes_t: Tensor | None, block_scale_t: Tensor | None, options: bool
) -> None:
    format = block_format(codes)
    given = {"codes": (x, codes, block_scale)}
    if codes_t is not None:
        given["codes_t"] = x.t(), codes_t, block_scale_t
    for name, (matrix, *tensors) in given.items():
        expected = BlockScaled.empty(format, *matrix.shape, torch.device("meta"))
        if [(y.shape, y.dtype) for y in tensors] != [(y.shape, y.dtype) for y in expected[:2]]:
            shapes, wanted = ([list(tensor.shape) for tensor in some] for some in (tensors, expected[:2]))
            raise ValueError(
                f"{name} {shapes[0]} with scales {shapes[1]} are not those of a matrix {list(matrix.shape)} in "
                f"{format.name}: {wanted[0]}, {wanted[1]}"
            )
    if options and format is not NVFP4:
        raise ValueError(f"square blocks, stochastic rounding and signs are options of nvfp4, not of {format.name}")


# Kernels


@triton.jit
def _load_tile(x_ptr, row, column, n_rows, n_columns, stride_x, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    rows, columns = row + tl.arange(0, TILE_R), column + tl.arange(0, TILE_C)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_x + columns[None, :]
    return tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _blocks(x, signs_ptr, BLOCK: tl.constexpr):
    """A tile `[rows, columns]` as blocks `[rows, columns / BLOCK, BLOCK]`, transformed if there are signs."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1] // BLOCK
    x = tl.reshape(x, (ROWS, BLOCKS, BLOCK))
    if signs_ptr is not None:
        x = tl.reshape(x * tl.load(signs_ptr + tl.arange(0, 16)), (ROWS, BLOCKS, 2, 2, 2, 2))
        for _ in tl.static_range(4):
            first, second = tl.split(x)
            x = tl.permute(tl.join(first + second, first - second), (0, 1, 5, 2, 3, 4))
        x = tl.reshape(x, (ROWS, BLOCKS, BLOCK)) * 0.25
    return x


@triton.jit
def _magnitude(x):
    """|x| as an integer of the same order; NaN is the largest."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _inverse(x):
    """1 / x, rounded as IEEE says, and 0 for 0."""
    return tl.where(x == 0, 0.0, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x))


@triton.jit
def _e2m1(x, random):
    """Codes of e2m1, int32: to nearest, or up with the probability of the remainder if there are `random` numbers."""
    magnitude = tl.minimum(tl.abs(x), 6.0)
    exponent = (magnitude >= 2).to(tl.int32) + (magnitude >= 4).to(tl.int32)
    steps = magnitude * tl.where(exponent == 0, 2.0, tl.where(exponent == 1, 1.0, 0.5))
    # Adding 2^23 rounds to the nearest integer and leaves it in the low bits.
    steps = (steps + 8388608.0).to(tl.int32, bitcast=True) & 7 if random is None else (steps + random).to(tl.int32)
    negative = (x.to(tl.int32, bitcast=True) >> 31) & 8
    return tl.minimum(steps + 2 * exponent, 7) | negative


@triton.jit
def _scale(amax_ptr, scale_ptr, N_AMAX: tl.constexpr):
    """The scale of the matrix by the largest magnitude that each program has seen. The first program stores it."""
    if amax_ptr is None:
        scale = 1.0
    else:
        amax = tl.max(tl.load(amax_ptr + tl.arange(0, N_AMAX)), axis=0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(amax, 2688.0)  # 6 * 448
    if tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)
    return scale


@triton.jit
def _store_mxfp8(x, codes_ptr, block_scale_ptr, rows, column, mask, stride_codes, stride_scale):
    """Quantise blocks `[R, C / 32, 32]` and store them at `rows` `[R, 1]` from a column."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1]
    largest = tl.max(_magnitude(x), axis=2)
    # The exponent of the least power of two that does not saturate: 448 is 1.75 * 2^8.
    exponent = tl.maximum((largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32), 0)
    finite = largest < 0x7F800000
    x *= tl.where(finite, ((254 - exponent) << 23).to(tl.float32, bitcast=True), float("nan"))[:, :, None]
    x = tl.clamp(tl.reshape(x, (ROWS, 32 * BLOCKS)), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    columns, blocks = column + tl.arange(0, 32 * BLOCKS), column // 32 + tl.arange(0, BLOCKS)
    tl.store(codes_ptr + rows * stride_codes + columns[None, :], x.to(tl.float8e4nv), mask=mask)
    exponent = tl.where(finite, exponent, 255).to(tl.uint8)
    tl.store(block_scale_ptr + rows * stride_scale + blocks[None, :], exponent, mask=mask)


@triton.jit
def _store_nvfp4(
    x, scale, seed, codes_ptr, block_scale_ptr, rows, column, width, mask, stride_codes, stride_scale,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """Quantise blocks `[R, C / 16, 16]` and store them at `rows` `[R, 1]` from a column; stochastic if there is a
    seed."""
    ROWS: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1]
    largest = tl.max(_magnitude(x), axis=2)
    if SQUARE:
        squares = tl.max(tl.reshape(largest, (ROWS // 16, 16, BLOCKS)), axis=1)
        squares = tl.broadcast_to(squares[:, None, :], (ROWS // 16, 16, BLOCKS))
        largest = tl.reshape(squares, (ROWS, BLOCKS))
    block_scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 6.0) * _inverse(scale)
    block_scale = tl.minimum(block_scale, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    x *= _inverse(block_scale.to(tl.float32) * scale)[:, :, None]
    random = None
    if seed is not None:
        fours = column // 4 + tl.arange(0, 4 * BLOCKS)
        a, b, c, d = tl.rand4x(seed, rows * (width // 4) + fours[None, :])
        random = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, BLOCKS, 16))
    first, second = tl.split(tl.reshape(_e2m1(x, random), (ROWS, 8 * BLOCKS, 2)))
    columns, blocks = column // 2 + tl.arange(0, 8 * BLOCKS), column // 16 + tl.arange(0, BLOCKS)
    tl.store(codes_ptr + rows * stride_codes + columns[None, :], (first | second << 4).to(tl.uint8), mask=mask)
    tl.store(block_scale_ptr + rows * stride_scale + blocks[None, :], block_scale, mask=mask)


@triton.jit
def _block_amax_kernel(
    x_ptr, signs_ptr, amax_ptr, amax_t_ptr, n_rows, n_columns, stride_x, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """The largest magnitude in this program's tiles of x and, if there are signs, in the transform of x^T."""
    largest = tl.zeros([TILE_R, TILE_C], dtype=tl.int32)
    largest_t = tl.zeros([TILE_C, TILE_R // 16, 16], dtype=tl.int32)
    tiles_per_row = tl.cdiv(n_columns, TILE_C)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, TILE_R) * tiles_per_row, tl.num_programs(0)):
        row, column = tile // tiles_per_row * TILE_R, tile % tiles_per_row * TILE_C
        x = _load_tile(x_ptr, row, column, n_rows, n_columns, stride_x, TILE_R, TILE_C)
        largest = tl.maximum(largest, _magnitude(x))
        if signs_ptr is not None:
            largest_t = tl.maximum(largest_t, _magnitude(_blocks(tl.trans(x), signs_ptr, 16)))
    tl.store(amax_ptr + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))
    if signs_ptr is not None:
        tl.store(amax_t_ptr + tl.program_id(0), tl.max(tl.max(tl.max(largest_t, axis=2), axis=1), axis=0))


@triton.jit
def _block_quantize_kernel(
    x_ptr, signs_ptr, seed_ptr, amax_ptr, amax_t_ptr,
    codes_ptr, block_scale_ptr, scale_ptr, codes_t_ptr, block_scale_t_ptr, scale_t_ptr,
    n_rows, n_columns, width, width_t, stride_x, stride_codes, stride_scale, stride_codes_t, stride_scale_t,
    N_AMAX: tl.constexpr, SQUARE: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = 32 if amax_ptr is None else 16
    scale, seed, seed_t = _scale(amax_ptr, scale_ptr, N_AMAX), None, None
    if codes_t_ptr is not None:
        scale_t = _scale(amax_t_ptr, scale_t_ptr, N_AMAX)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        seed_t = seed + 1
    tiles_per_row = width // TILE_C
    for tile in range(tl.program_id(0), tl.cdiv(width_t, TILE_R) * tiles_per_row, tl.num_programs(0)):
        row, column = tile // tiles_per_row * TILE_R, tile % tiles_per_row * TILE_C
        x = _load_tile(x_ptr, row, column, n_rows, n_columns, stride_x, TILE_R, TILE_C)
        rows = (row + tl.arange(0, TILE_R)).to(tl.int64)[:, None]
        out = codes_ptr, block_scale_ptr, rows, column
        if amax_ptr is None:
            _store_mxfp8(_blocks(x, None, BLOCK), *out, rows < n_rows, stride_codes, stride_scale)
        else:
            strides = stride_codes, stride_scale
            _store_nvfp4(_blocks(x, None, BLOCK), scale, seed, *out, width, rows < n_rows, *strides, SQUARE)
        if codes_t_ptr is not None:
            x = _blocks(tl.trans(x), signs_ptr, BLOCK)
            rows = (column + tl.arange(0, TILE_C)).to(tl.int64)[:, None]
            out_t, strides_t = (codes_t_ptr, block_scale_t_ptr, rows, row), (stride_codes_t, stride_scale_t)
            if amax_ptr is None:
                _store_mxfp8(x, *out_t, rows < n_columns, *strides_t)
            else:
                _store_nvfp4(x, scale_t, seed_t, *out_t, width_t, rows < n_columns, *strides_t, SQUARE)


# Torch op

MOST_AMAX = 1024  # programs that look for the largest magnitude


@library_op(
    lambda x, codes, block_scale, scale, codes_t, block_scale_t, scale_t, square, seed, signs: None,
    mutates=("codes", "block_scale", "scale", "codes_t", "block_scale_t", "scale_t"),
)
def _block_quantize_(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    codes_t: Tensor | None,
    block_scale_t: Tensor | None,
    scale_t: Tensor | None,
    square: bool,
    seed: Tensor | None,
    signs: Tensor | None,
) -> None:
    if not x.numel():
        return
    format, x, both = block_format(codes), rows_of(x), codes_t is not None
    tile_r, tile_c = (64, 64) if both else (16, 256)
    amax, n_amax = (None, None), 0
    if format is NVFP4:
        n_amax = min(MOST_AMAX, next_power_of_2(cdiv(len(x), tile_r) * cdiv(x.shape[1], tile_c)))
        amax = torch.empty(2, n_amax, dtype=torch.int32, device=x.device).unbind()
        _block_amax_kernel[(n_amax,)](x, signs, *amax, *x.shape, x.stride(0), tile_r, tile_c, num_warps=4)
    width = format.block * block_scale.shape[1]
    width_t = format.block * block_scale_t.shape[1] if both else len(x)
    strides_t = (codes_t.stride(0), block_scale_t.stride(0)) if both else (0, 0)
    _block_quantize_kernel[(min(cdiv(width_t, tile_r) * (width // tile_c), 8 * n_sm(x.device)),)](
        x, signs, seed, amax[0], amax[0] if signs is None else amax[1],
        codes, block_scale, scale, codes_t, block_scale_t, scale_t,
        *x.shape, width, width_t, x.stride(0), codes.stride(0), block_scale.stride(0), *strides_t,
        n_amax, square, tile_r, tile_c, num_warps=4,
    )  # fmt: skip


# Public function


@torch.no_grad()
def block_quantize_triton(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    codes_t: Tensor | None = None,
    block_scale_t: Tensor | None = None,
    scale_t: Tensor | None = None,
    square: bool = False,
    stochastic: bool = False,
    signs: Tensor | None = None,
) -> None:
    """Quantise a matrix by the Triton kernels; arguments of `block_quantize_torch`.

    Stochastic rounding draws a seed on the device, so that a CUDA graph draws another at each replay."""
    _check(x, codes, block_scale, codes_t, block_scale_t, square or stochastic or signs is not None)
    seed = torch.randint(2**62, (1,), device=x.device) if stochastic else None
    _block_quantize_(x, codes, block_scale, scale, codes_t, block_scale_t, scale_t, square, seed, signs)


# OP


def _inputs(shape, make):
    """Of activations, with a Hadamard transform in NVFP4; of a weight (`square`); or of a gradient (`stochastic`)."""
    x, is_nvfp4, square = make(shape["rows"], shape["columns"]), shape["bits"] == 4, bool(shape.get("square"))
    arguments = {"x": x}
    for matrix, suffix in ((x, ""), (x.t(), "_t")):
        out = BlockScaled.empty(NVFP4 if is_nvfp4 else MXFP8, *matrix.shape, x.device)
        if suffix and shape.get("forward"):
            out = None, None, None
        arguments |= zip((f"codes{suffix}", f"block_scale{suffix}", f"scale{suffix}"), out, strict=True)
    signs = random_signs(0, x.device) if is_nvfp4 and not square and not shape.get("forward") else None
    return arguments | {"square": square, "stochastic": bool(shape.get("stochastic")), "signs": signs}


def _cost(s, itemsize):
    """Reads x, of NVFP4 twice, and writes codes and block scales once or twice."""
    passes, written = (2, 1 / 2 + 1 / 16) if s["bits"] == 4 else (1, 1 + 1 / 32)
    n = s["rows"] * s["columns"]
    return Cost(int(n * (passes * itemsize + written * (2 - s.get("forward", 0)))), 3 * n)


OP = Op(
    name="block_quantize",
    implementations={"torch": block_quantize_torch, "triton": block_quantize_triton},
    inputs=_inputs,
    differentiable=(),
    cost=_cost,
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=(
        {"rows": 1, "columns": 1, "bits": 8},
        {"rows": 7, "columns": 300, "bits": 8},
        {"rows": 7, "columns": 300, "bits": 4},
        {"rows": 70, "columns": 90, "bits": 4, "square": 1},
    ),
    bench_shapes=(
        {"rows": 32768, "columns": 768, "bits": 8},
        {"rows": 32768, "columns": 768, "bits": 4},
        {"rows": 768, "columns": 4096, "bits": 4, "square": 1},
    ),
    compiled_shapes=(
        {"rows": 32768, "columns": 768, "bits": 8, "forward": 1},
        {"rows": 32768, "columns": 768, "bits": 4, "forward": 1},
        {"rows": 32768, "columns": 768, "bits": 4, "stochastic": 1},
    ),
    mutates=("codes", "block_scale", "scale", "codes_t", "block_scale_t", "scale_t"),
    cards=BLOCK_SCALED_CARDS,
)
