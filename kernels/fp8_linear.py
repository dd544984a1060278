"""Linear layer on FP8 codes with one scale for each tensor: the product of forward and input gradient in FP8.

    y = scale * weight_scale * (x weight^T)

x and weight are e4m3, or x is e5m2 for a gradient; sums are in float32. Both have the dimension that is summed over
adjacent in memory, which the tensor cores of sm_89 and sm_90 ask for. So the input gradient dx = dy W takes the codes
of W^T.

The torch implementation multiplies dequantised values: the reference, and the emulation on cards without FP8. `cublas`
is `torch._scaled_mm`. In the Triton kernel a program computes one tile of y. On sm_120 it multiplies by `tl.dot_scaled`
with scales of 1, which has the same results as `tl.dot` and takes the block-scaled instructions, of twice the rate.

Tensor cores of sm_90 sum FP8 products in some 14 bits. That serves in the forward; `precise`, for gradients, adds the
sums of every 128 terms in float32.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024,
section 3.3.2 (the precision of sums).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common import card, cdiv, rows_of, store_tile, tile_of_product
from kernels.formats import E4M3, E5M2, FORMATS, FP8_CARDS, quantize
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op

MULTIPLE = 16  # of both dimensions of a weight: rows of codes are then aligned to 16 bytes, which cuBLAS demands
DOT_SCALED = ("sm_120",)

# Reference


def fp8_linear_torch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    precise: bool = False,
) -> Tensor:
    """Product of FP8 codes in plain torch, the reference.

    Args:
        x: codes `[..., K]`, e4m3 or e5m2.
        weight: codes `[N, K]`, e4m3.
        scale, weight_scale: float32 `[1]`, what the codes of `x` and `weight` are multiplied by.
        dtype: of the result.
        precise: add in float32 at least every 128 terms. The reference always does.

    Returns:
        `[..., N]` in `dtype`.

    Raises:
        ValueError: shapes do not match, or K or N is no multiple of `MULTIPLE`.
    """
    _check(x, weight)
    return ((x.float() * scale) @ (weight.float() * weight_scale).t()).to(dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not end in {k}, as a weight {[n, k]} needs")
    if n % MULTIPLE or k % MULTIPLE:
        raise ValueError(f"a weight of FP8 codes has dimensions that are multiples of {MULTIPLE}, not {[n, k]}")


def fp8_linear_cublas(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    precise: bool = False,
) -> Tensor:
    """Product of FP8 codes by torch, which calls cuBLASLt on a GPU; arguments of `fp8_linear_torch`."""
    _check(x, weight)
    options = {"out_dtype": dtype, "use_fast_accum": not precise}
    y = torch._scaled_mm(rows_of(x).contiguous(), weight.contiguous().t(), scale, weight_scale, **options)
    return y.view(*x.shape[:-1], len(weight))


# Kernel


@triton.jit
def _fp8_linear_kernel(
    x_ptr, weight_ptr, y_ptr, scale_ptr, weight_scale_ptr, M, N, K, stride_x, stride_w,
    X_FORMAT: tl.constexpr, SCALED: tl.constexpr, MAX_IMPRECISE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    rows, columns = tile_of_product(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the end are loaded as others, and not stored: a mask would cost registers in the loop.
    x_ptrs = x_ptr + (rows % M).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = weight_ptr + (columns % N).to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + start)
            w = tl.load(w_ptrs + start)
        else:
            x = tl.load(x_ptrs + start, mask=start + k[None, :] < K, other=0.0)
            w = tl.load(w_ptrs + start, mask=start + k[:, None] < K, other=0.0)
        if SCALED:
            one = tl.full([BLOCK_M, BLOCK_K // 32], 127, tl.uint8)  # e8m0
            weight_one = tl.full([BLOCK_N, BLOCK_K // 32], 127, tl.uint8)
            acc = tl.dot_scaled(x, one, X_FORMAT, w, weight_one, "e4m3", acc)
        else:
            acc = tl.dot(x, w, acc, max_num_imprecise_acc=MAX_IMPRECISE)
    acc *= tl.load(scale_ptr) * tl.load(weight_scale_ptr)
    store_tile(y_ptr, acc, rows, columns, M, N)


# Launch parameters


@dataclass(frozen=True)
class Tile:
    """Launch parameters.

    block_m, block_n: rows and columns of a tile of y.
    block_k: terms summed at a time.
    num_warps, num_stages: warps of a program, and stages of the software pipeline over K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILES = (
    Tile(128, 128, 128, 8, 4), Tile(128, 128, 128, 4, 4), Tile(128, 256, 128, 8, 3), Tile(256, 128, 128, 8, 3),
    Tile(64, 128, 128, 4, 4), Tile(128, 128, 64, 4, 3), Tile(128, 64, 128, 4, 3),
)  # fmt: skip
SMALL = Tile(128, 128, 64, 8, 3)  # sm_89 and sm_120 have 99 KiB of shared memory
LAUNCHES = LaunchTable(
    "_fp8_linear_kernel",
    {"any": {"": TILES[0], "sm_89": SMALL, "sm_120": SMALL}},
    lambda size: TILES,
    lambda size: OP.bench_shapes,
)
GROUP_M = 8


# Torch op


def _allocate(x, weight, scale, weight_scale, dtype, precise):
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)


@library_op(_allocate)
def _fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, dtype: torch.dtype, precise: bool
) -> Tensor:
    y = _allocate(x, weight, scale, weight_scale, dtype, precise)
    here = card(x.device)
    tile = LAUNCHES.pick("any", here)
    x_format = "e4m3" if x.dtype == E4M3.dtype else "e5m2"
    x, weight = rows_of(x), rows_of(weight)
    (m, k), n = x.shape, len(weight)
    if m:
        _fp8_linear_kernel[(cdiv(m, tile.block_m) * cdiv(n, tile.block_n),)](
            x, weight, y, scale, weight_scale, m, n, k, x.stride(0), weight.stride(0),
            x_format, here in DOT_SCALED, tile.block_k if precise else None, k % tile.block_k == 0,
            tile.block_m, tile.block_n, tile.block_k, GROUP_M, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


# Public function


def fp8_linear_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    precise: bool = False,
) -> Tensor:
    """Product of FP8 codes by the Triton kernel; arguments of `fp8_linear_torch`."""
    _check(x, weight)
    return _fp8_linear(x, weight, scale, weight_scale, dtype, precise)


# OP


def _inputs(shape, make):
    """Of a forward, or of the input gradient, for which x is a `gradient`."""
    is_gradient = shape.get("gradient", 0)
    x = quantize(make(shape["rows"], shape["K"]), E5M2 if is_gradient else E4M3)
    weight = quantize(make(shape["N"], shape["K"]), E4M3)
    codes = {"x": x.codes.to(FORMATS[x.format].dtype), "weight": weight.codes.to(E4M3.dtype)}
    scales = {"scale": x.scale.view(1), "weight_scale": weight.scale.view(1)}
    return codes | scales | {"dtype": make(1).dtype, "precise": bool(is_gradient)}


def _cost(s, itemsize):
    """Reads codes, writes y."""
    return Cost((s["rows"] + s["N"]) * s["K"] + s["rows"] * s["N"] * itemsize, 2 * s["rows"] * s["N"] * s["K"])


def _layers(rows: int, d: int, heads: int, f: int) -> tuple[dict[str, int], ...]:
    """The linear layers of a block of width `d`: qkv to `heads` columns, out, gate and up of `f` each, and down."""
    return tuple({"rows": rows, "K": k, "N": n} for k, n in ((d, heads), (d, d), (d, 2 * f), (f, d)))


OP = Op(
    name="fp8_linear",
    implementations={"torch": fp8_linear_torch, "cublas": fp8_linear_cublas, "triton": fp8_linear_triton},
    inputs=_inputs,
    differentiable=(),
    cost=_cost,
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=(
        {"rows": 1, "K": 16, "N": 16},
        {"rows": 33, "K": 80, "N": 48},
        {"rows": 150, "K": 256, "N": 160, "gradient": 1},
    ),
    # GPT-2 124M, with a chunk of its head; M4 of the experiments, which has three heads of keys and values; a 1B model.
    bench_shapes=(
        *_layers(32768, 768, 2304, 2048),
        {"rows": 2560, "K": 768, "N": 50304},
        {"rows": 2560, "K": 50304, "N": 768, "gradient": 1},
        {"rows": 8192, "K": 768, "N": 1152},
        *_layers(8192, 2048, 3072, 5504),
    ),
    compiled_shapes=({"rows": 32768, "K": 768, "N": 768, "gradient": 1}, {"rows": 256, "K": 1392, "N": 16}),
    preferred={"cuda": "cublas"},
    launches=(LAUNCHES,),
    cards=FP8_CARDS,
    flops_rate=4.0,  # a GeForce sums FP8 in float32 at twice the rate of bf16, and block-scaled FP8 at four times
)
