"""Linear layer on MXFP8 or NVFP4 codes, whose tensor cores scale by block: y = x W^T.

    y_mn = scale * weight_scale * sum over k of (x_mk s_mk) (W_nk t_nk)

The block scales s and t are the same for 32 (MXFP8) or 16 (NVFP4) adjacent k. Both factors have the dimension that is
summed over adjacent in memory, in the form of `kernels.formats.BlockScaled`. So the input gradient dx = dy W takes the
codes of W^T, and the weight gradient dW = dy^T x those of dy^T and x^T.

The torch implementation multiplies dequantised values, in bf16 on a GPU: the reference, and the simulation on cards
that cannot scale by block. In the Triton kernel a program computes one tile of y by `tl.dot_scaled`: `tcgen05.mma` on
sm_100, `mma.sync` with `block_scale` on sm_120. Scales are in rows, like codes. If each row begins at a multiple of 16
bytes, the compiler loads them as widely, and needs about as many registers, as from cuBLAS's interleaved layout.

Sources: OCP Microscaling Formats (MX) 1.0, 2023; NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.common import card, cdiv, rows_of, store_tile, tile_of_product
from kernels.formats import (
    BLOCK_SCALED_CARDS,
    MXFP8,
    NVFP4,
    PADDED,
    BlockFormat,
    BlockScaled,
    block_format,
    block_values,
    pad,
    quantize_mx,
    quantize_nvfp4,
)
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op

# Reference


def block_scaled_linear_torch(
    x: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Product of block-scaled codes in plain torch, the reference.

    Args:
        x, block_scale, scale: a `BlockScaled` matrix `[M, K]`.
        weight, weight_block_scale, weight_scale: one `[N, K]` of the same format.
        dtype: of the result.

    Returns:
        `[M, N]` in `dtype`.

    Raises:
        ValueError: shapes or formats do not match.
    """
    _check(x, block_scale, weight, weight_block_scale)
    values, weight_values = block_values(x, block_scale), block_values(weight, weight_block_scale)
    if x.is_cuda:  # bf16 has all of these values
        y = torch.mm(values.bfloat16(), weight_values.bfloat16().t(), out_dtype=torch.float32) * scale
    else:
        y = (values * scale) @ weight_values.t()
    return (y * weight_scale).to(dtype)


def _check(x: Tensor, block_scale: Tensor, weight: Tensor, weight_block_scale: Tensor) -> None:
    format = block_format(x)
    if weight.dtype != x.dtype or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight {weight.dtype} {list(weight.shape)} does not have the format and columns of x, {x.dtype} "
            f"{list(x.shape)}"
        )
    for codes, scales in ((x, block_scale), (weight, weight_block_scale)):
        rows, width = codes.shape[0], _width(codes)
        if width % PADDED or list(scales.shape) != [rows, width // format.block] or scales.dtype != format.scale_dtype:
            raise ValueError(
                f"block scales {scales.dtype} {list(scales.shape)} are not those of {format.name} codes "
                f"{list(codes.shape)}, padded to a multiple of {PADDED} columns"
            )


def _width(codes: Tensor) -> int:
    """Columns of the matrix, of which e2m1 has two in a byte."""
    return codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)


# Kernel


@triton.jit
def _block_scaled_linear_kernel(
    x_ptr, block_scale_ptr, scale_ptr, weight_ptr, weight_block_scale_ptr, weight_scale_ptr, y_ptr,
    M, N, K, stride_x, stride_xs, stride_w, stride_ws,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    rows, columns = tile_of_product(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    BYTES_K: tl.constexpr = BLOCK_K // 2 if FORMAT == "e2m1" else BLOCK_K
    k, k_block = tl.arange(0, BYTES_K), tl.arange(0, BLOCK_K // BLOCK)
    # Rows beyond the end are loaded as others, and not stored: a mask would cost registers in the loop.
    x_row, w_row = (rows % M).to(tl.int64), (columns % N).to(tl.int64)
    x_ptrs = x_ptr + x_row[:, None] * stride_x + k[None, :]
    w_ptrs = weight_ptr + w_row[None, :] * stride_w + k[:, None]
    xs_ptrs = block_scale_ptr + x_row[:, None] * stride_xs + k_block[None, :]
    ws_ptrs = weight_block_scale_ptr + w_row[:, None] * stride_ws + k_block[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i in range(K // BLOCK_K):
        x, w = tl.load(x_ptrs + i * BYTES_K), tl.load(w_ptrs + i * BYTES_K)
        xs, ws = tl.load(xs_ptrs + i * (BLOCK_K // BLOCK)), tl.load(ws_ptrs + i * (BLOCK_K // BLOCK))
        acc = tl.dot_scaled(x, xs, FORMAT, w, ws, FORMAT, acc)
    acc *= tl.load(scale_ptr) * tl.load(weight_scale_ptr)
    store_tile(y_ptr, acc, rows, columns, M, N)


# Launch parameters


@dataclass(frozen=True)
class Tile:
    """Launch parameters.

    block_m, block_n: rows and columns of a tile of y.
    block_k: terms summed at a time, which divide `PADDED`.
    num_warps, num_stages: warps of a program, and stages of the software pipeline over K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILES = {
    "mxfp8": (
        Tile(128, 128, 128, 4, 4), Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 128, 128, 8, 2),
        Tile(128, 64, 128, 4, 3),
    ),
    "nvfp4": (
        Tile(128, 128, 256, 4, 4), Tile(128, 256, 256, 8, 3), Tile(128, 128, 256, 8, 3), Tile(128, 128, 128, 8, 3),
        Tile(128, 64, 256, 4, 3),
    ),
}  # fmt: skip
# sm_120 has 99 KiB of shared memory.
LAUNCHES = LaunchTable(
    "_block_scaled_linear_kernel",
    {
        "mxfp8": {"": TILES["mxfp8"][0], "sm_120": Tile(128, 128, 128, 8, 2)},
        "nvfp4": {"": TILES["nvfp4"][0], "sm_120": Tile(128, 128, 128, 8, 3)},
    },
    lambda size: TILES[size],
    lambda size: tuple(shape for shape in OP.bench_shapes if _format(shape).name == size),
)
GROUP_M = 8


# Torch op


def _allocate(x, block_scale, scale, weight, weight_block_scale, weight_scale, dtype):
    return x.new_empty((len(x), len(weight)), dtype=dtype)


@library_op(_allocate)
def _block_scaled_linear(
    x: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    y = _allocate(x, block_scale, scale, weight, weight_block_scale, weight_scale, dtype)
    format, (m, n) = block_format(x), y.shape
    tile = LAUNCHES.pick(format.name, card(x.device))
    x, block_scale, weight, weight_block_scale = map(rows_of, (x, block_scale, weight, weight_block_scale))
    if m and n:
        _block_scaled_linear_kernel[(cdiv(m, tile.block_m) * cdiv(n, tile.block_n),)](
            x, block_scale, scale, weight, weight_block_scale, weight_scale, y, m, n, _width(x),
            x.stride(0), block_scale.stride(0), weight.stride(0), weight_block_scale.stride(0),
            format.codes.name, format.block, tile.block_m, tile.block_n, tile.block_k, GROUP_M,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return y


# Public function


def block_scaled_linear_triton(
    x: Tensor,
    block_scale: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_block_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Product of block-scaled codes by the Triton kernel; arguments of `block_scaled_linear_torch`."""
    _check(x, block_scale, weight, weight_block_scale)
    return _block_scaled_linear(x, block_scale, scale, weight, weight_block_scale, weight_scale, dtype)


# OP


def _format(shape) -> BlockFormat:
    return NVFP4 if shape["bits"] == 4 else MXFP8


def _inputs(shape, make):
    """Of a forward, or of a weight gradient, which is float32."""
    factors, format = [], _format(shape)
    for rows in (shape["rows"], shape["N"]):
        x = pad(make(rows, shape["K"]))
        factors.append(BlockScaled.empty(format, *x.shape, x.device))
        factors[-1].copy_(quantize_mx(x, (1, 32)) if format is MXFP8 else quantize_nvfp4(x, (1, 16)))
    names = ("x", "block_scale", "scale", "weight", "weight_block_scale", "weight_scale")
    dtype = torch.float32 if shape.get("gradient") else make(1).dtype
    return dict(zip(names, (*factors[0], *factors[1]), strict=True)) | {"dtype": dtype}


def _cost(s, itemsize):
    """Reads codes and their scales, writes y."""
    read = (s["rows"] + s["N"]) * s["K"] * (s["bits"] / 8 + 1 / _format(s).block)
    itemsize = 4 if s.get("gradient") else itemsize
    return Cost(int(read) + s["rows"] * s["N"] * itemsize, 2 * s["rows"] * s["N"] * s["K"])


def _shapes(rows: int, *layers: tuple[int, int]) -> tuple[dict[str, int], ...]:
    """Of linear layers, from K to N, in both formats."""
    return tuple({"rows": rows, "K": k, "N": n, "bits": bits} for bits in (8, 4) for k, n in layers)


OP = Op(
    name="block_scaled_linear",
    implementations={"torch": block_scaled_linear_torch, "triton": block_scaled_linear_triton},
    inputs=_inputs,
    differentiable=(),
    cost=_cost,
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=(
        *_shapes(1, (16, 16)),
        *_shapes(33, (300, 48)),
        {"rows": 150, "K": 80, "N": 160, "bits": 4, "gradient": 1},
    ),
    # qkv and down of GPT-2 124M, qkv of M4 of the experiments, gate and up of a model of 1B.
    bench_shapes=(
        *_shapes(32768, (768, 2304), (2048, 768)),
        *_shapes(8192, (768, 1152)),
        *_shapes(8192, (2048, 11008)),
    ),
    compiled_shapes=tuple({"rows": 2304, "K": 32768, "N": 768, "bits": bits, "gradient": 1} for bits in (8, 4)),
    launches=(LAUNCHES,),
    cards=BLOCK_SCALED_CARDS,
    flops_rate=8.0,  # a GeForce multiplies MXFP8 at four times the rate of bf16, NVFP4 at eight times
)
