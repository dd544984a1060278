"""Quantisation of a matrix to FP8 with a given scale, which also measures what the next scale should be.

    codes = round(x / scale)            saturating, nearest, ties to even; NaN stays NaN
    amax = max(amax, max |x|)

With delayed scaling the scale comes of the `amax` of earlier steps, so one pass does both. It also writes the codes of
x^T where a product needs those: an input gradient takes the codes of W^T. A GPU reads x once.

A program loops over blocks of the matrix and keeps their largest magnitude. At the end it raises `amax` by one atomic,
whose result does not depend on their order.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; NVIDIA, "Transformer Engine" (delayed scaling).
"""

import torch
from torch import Tensor

from kernels.common import cdiv, fp8_codes, n_sm, raise_amax, rows_of
from kernels.formats import E4M3, E5M2, FORMATS, FP8_CARDS, codes_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, Op

FORMAT_OF = {format.dtype: format for format in FORMATS.values() if format.dtype}

# Reference


@torch.no_grad()
def fp8_quantize_torch(
    x: Tensor, scale: Tensor, codes: Tensor, amax: Tensor | None = None, codes_t: Tensor | None = None
) -> None:
    """Quantise a matrix in plain torch, the reference.

    Args:
        x: `[..., columns]`, float32 or half precision; rows in all are the product of the others.
        scale: float32 `[1]`, what codes are multiplied by to give values; more than 0.
        codes: the result, of the shape of `x`: contiguous e4m3 or e5m2.
        amax: float32 `[1]`, raised to the largest magnitude in `x`; None to leave that unmeasured.
        codes_t: the result, transposed: `[columns, rows]` with adjacent rows; None for none.

    Raises:
        ValueError: shapes do not match.
    """
    _check(x, codes, codes_t)
    codes.copy_(codes_of(x, scale, FORMAT_OF[codes.dtype], amax))
    if codes_t is not None:
        codes_t.copy_(rows_of(codes).t())


def _check(x: Tensor, codes: Tensor, codes_t: Tensor | None) -> None:
    if codes.shape != x.shape:
        raise ValueError(f"codes {list(codes.shape)} are not {list(x.shape)}, the shape of x")
    transposed = [x.shape[-1], x.numel() // max(1, x.shape[-1])]
    if codes_t is not None and list(codes_t.shape) != transposed:
        raise ValueError(f"transposed codes {list(codes_t.shape)} are not {transposed}")


# Kernel


@triton.jit
def _fp8_quantize_kernel(
    x_ptr, scale_ptr, codes_ptr, amax_ptr, codes_t_ptr, n_rows, n_columns, stride_x, stride_t,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    inverse = 1.0 / tl.load(scale_ptr)
    largest = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    blocks_per_row = tl.cdiv(n_columns, BLOCK_C)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_R) * blocks_per_row, tl.num_programs(0)):
        rows = ((block // blocks_per_row) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        columns = ((block % blocks_per_row) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        mask = (rows < n_rows) & (columns < n_columns)
        x = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
        if amax_ptr is not None:
            largest = tl.maximum(largest, tl.abs(x))  # NaN loses
        codes = fp8_codes(x, inverse, codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + rows * n_columns + columns, codes, mask=mask)
        if codes_t_ptr is not None:
            tl.store(codes_t_ptr + columns * stride_t + rows, codes, mask=mask)
    if amax_ptr is not None:
        raise_amax(amax_ptr, largest)


# Torch op


@library_op(lambda x, scale, codes, amax, codes_t: None, mutates=("codes", "amax", "codes_t"))
def _fp8_quantize_(x: Tensor, scale: Tensor, codes: Tensor, amax: Tensor | None, codes_t: Tensor | None) -> None:
    columns, x = x.shape[-1], rows_of(x)
    block_r, block_c = (64, 64) if codes_t is not None else (16, 256)
    blocks = cdiv(len(x), block_r) * cdiv(columns, block_c)
    if blocks:
        _fp8_quantize_kernel[(min(blocks, 8 * n_sm(x.device)),)](
            x, scale, codes, amax, codes_t, len(x), columns, x.stride(0), 0 if codes_t is None else codes_t.stride(0),
            BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip


# Public function


@torch.no_grad()
def fp8_quantize_triton(
    x: Tensor, scale: Tensor, codes: Tensor, amax: Tensor | None = None, codes_t: Tensor | None = None
) -> None:
    """Quantise a matrix by the Triton kernel, in one pass; arguments of `fp8_quantize_torch`."""
    _check(x, codes, codes_t)
    _fp8_quantize_(x, scale, codes, amax, codes_t)


# OP


def _inputs(shape, make):
    """Of a weight, which has codes in both layouts, or of a `gradient`."""
    x, is_gradient = make(shape["rows"], shape["columns"]), shape.get("gradient", 0)
    codes = torch.empty_like(x, dtype=(E5M2 if is_gradient else E4M3).dtype)
    one = torch.ones(1, device=x.device)
    codes_t = None if is_gradient else torch.empty_like(codes.t(), memory_format=torch.contiguous_format)
    return {"x": x, "scale": 0.01 * one, "codes": codes, "amax": 0 * one, "codes_t": codes_t}


def _cost(s, itemsize):
    """Reads x, writes codes once or twice."""
    n = s["rows"] * s["columns"]
    return Cost(n * (itemsize + 2 - s.get("gradient", 0)), 3 * n)


OP = Op(
    name="fp8_quantize",
    implementations={"torch": fp8_quantize_torch, "triton": fp8_quantize_triton},
    inputs=_inputs,
    differentiable=(),
    cost=_cost,
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=({"rows": 1, "columns": 1}, {"rows": 7, "columns": 300}, {"rows": 130, "columns": 70}),
    bench_shapes=({"rows": 768, "columns": 4096}, {"rows": 32768, "columns": 768, "gradient": 1}),
    mutates=("codes", "amax", "codes_t"),
    cards=FP8_CARDS,
)
