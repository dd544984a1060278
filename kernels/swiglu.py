"""SwiGLU on the packed gate and up projection, and its relatives.

    y = a(gate) * up        or, not gated,  y = a(x)

    silu(z) = z * sigmoid(z)                gelu(z) = z * sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)), the tanh form
    relu(z) = max(z, 0)                     relu2(z) = max(z, 0)^2

The gradient is dup = dy * a(gate), dgate = dy * up * a'(gate). Only the packed input is saved for it: a and a' are
computed again.

Sources: Shazeer, "GLU Variants Improve Transformer", 2020, equations 5 and 6; Hendrycks and Gimpel, "Gaussian Error
Linear Units", 2016, section 2; So et al., "Primer", 2021, section 4 (squared ReLU).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, cdiv, empty_like, next_power_of_2, rows_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

Activation = Literal["silu", "gelu", "relu", "relu2"]
ACTIVATIONS = get_args(Activation)


def swiglu_torch(x: Tensor, activation: Activation = "silu", gated: bool = True) -> Tensor:
    """Apply the activation, and the gate when `gated`.

    Args:
        x: `[..., 2F]`, the gate in the first half, what it multiplies in the second; `[..., F]` when not gated.
        activation: of the gate.
        gated: whether `x` is packed.

    Returns:
        `[..., F]` in the dtype of `x`. Raises `ValueError` for an unknown activation or an odd packed width.
    """
    _check(x, activation, gated)
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    gate = gate.to(accumulation_dtype(x))
    if activation == "silu":
        y = gate * torch.sigmoid(gate)  # F.silu's gradient, compiled for a CPU, takes the exponential twice
    elif activation == "gelu":
        y = F.gelu(gate, approximate="tanh")
    else:
        y = F.relu(gate)
        y = y.square() if activation == "relu2" else y
    return (y if up is None else y * up).to(x.dtype)


def _check(x: Tensor, activation: str, gated: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if gated and x.shape[-1] % 2:
        raise ValueError(f"a packed gate and up projection has an even width, not {x.shape[-1]}")


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """a(z) and a'(z). The forward kernel drops the second, which the compiler then removes."""
    if ACTIVATION == "silu" or ACTIVATION == "gelu":
        w, slope = z, 1.0
        if ACTIVATION == "gelu":
            w = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
            slope = 1.5957691216057308 + 0.21406444881780075 * z * z
        e = tl.exp(-tl.abs(w))
        small = e / (1 + e)
        large = 1 / (1 + e)
        s = tl.where(w < 0, small, large)
        y = z * s
        dy = s + y * tl.where(w < 0, large, small) * slope  # 1 - s would cancel
    else:
        y = tl.where(z < 0, 0.0, z)  # not maximum, which turns NaN into 0
        dy = tl.where(z > 0, 1.0, 0.0)
        if ACTIVATION == "relu2":
            dy = 2 * y
            y = y * y
    return y, dy


@triton.jit
def _tile(F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows `[BLOCK_R, 1]` and columns `[1, BLOCK_F]` of this program: along a row first, as memory lies."""
    per_row = tl.cdiv(F, BLOCK_F)
    row, column = tl.program_id(0) // per_row, tl.program_id(0) % per_row
    rows = (row * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    return rows[:, None], (column * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]


@triton.jit
def _swiglu_fwd_kernel(
    x_ptr, y_ptr, n_rows, F, stride_x,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns = _tile(F, BLOCK_R, BLOCK_F)
    mask = (rows < n_rows) & (columns < F)
    gate = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    y, _ = _activate(gate.to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x_ptr + rows * stride_x + F + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * F + columns, y, mask=mask)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, n_rows, F, stride_dy, stride_x,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns = _tile(F, BLOCK_R, BLOCK_F)
    mask = (rows < n_rows) & (columns < F)
    dy = tl.load(dy_ptr + rows * stride_dy + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    y, slope = _activate(gate.to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(x_ptr + rows * stride_x + F + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * 2 * F + columns, dy * up * slope, mask=mask)
        tl.store(dx_ptr + rows * 2 * F + F + columns, dy * y, mask=mask)
    else:
        tl.store(dx_ptr + rows * F + columns, dy * slope, mask=mask)


@dataclass(frozen=True)
class Tile:
    """Launch parameters: values of a block, the most columns it may have, and warps."""

    values: int
    max_columns: int
    num_warps: int


def _table(kernel, best, backward=False):
    tiles = (
        best, Tile(2048, 1024, 4), Tile(4096, 1024, 4), Tile(4096, 2048, 8), Tile(1024, 1024, 4), Tile(1024, 1024, 2),
        Tile(2048, 512, 4), Tile(8192, 2048, 8),
    )  # fmt: skip
    candidates = tuple(dict.fromkeys(tiles))
    return LaunchTable(kernel, {"any": {"": best}}, lambda size: candidates, lambda size: OP.bench_shapes, backward)


# 16 values a thread, two loads of 16 bytes in half precision: 85 to 100% of an H100's copy.
FORWARD = _table("_swiglu_fwd_kernel", Tile(2048, 1024, 4))
BACKWARD = _table("_swiglu_bwd_kernel", Tile(2048, 1024, 4), backward=True)


def _grid(table: LaunchTable, x: Tensor, f: int) -> tuple[tuple[int], dict[str, int]]:
    """A grid over `[rows, f]`, in blocks narrow enough that an eighth of their columns at most lie beyond f."""
    tile = table.pick("any", card(x.device))
    block = min(tile.max_columns, next_power_of_2(f))
    while block > 128 and cdiv(f, block) * block > 1.125 * f:
        block //= 2
    rows = tile.values // block
    return (cdiv(x.shape[0], rows) * cdiv(f, block),), {
        "BLOCK_R": rows, "BLOCK_F": block, "num_warps": tile.num_warps,
    }  # fmt: skip


def _allocate_fwd(x, activation, gated):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (1 + gated)))


@library_op(_allocate_fwd)
def _swiglu_fwd(x: Tensor, activation: str, gated: bool) -> Tensor:
    y = _allocate_fwd(x, activation, gated)
    x = rows_of(x)
    f = y.shape[-1]
    grid, blocks = _grid(FORWARD, x, f)
    if y.numel():
        _swiglu_fwd_kernel[grid](x, y, x.shape[0], f, x.stride(0), activation, gated, **blocks)
    return y


def _allocate_bwd(dy, x, activation, gated):
    return empty_like(x)


@library_op(_allocate_bwd)
def _swiglu_bwd(dy: Tensor, x: Tensor, activation: str, gated: bool) -> Tensor:
    dx = _allocate_bwd(dy, x, activation, gated)
    dy, x = rows_of(dy), rows_of(x)
    f = dy.shape[-1]
    grid, blocks = _grid(BACKWARD, x, f)
    if dx.numel():
        _swiglu_bwd_kernel[grid](dy, x, dx, x.shape[0], f, dy.stride(0), x.stride(0), activation, gated, **blocks)
    return dx


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, gated):
        ctx.save_for_backward(x)
        ctx.options = activation, gated
        return _swiglu_fwd(x, activation, gated)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _swiglu_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None


def swiglu_triton(x: Tensor, activation: Activation = "silu", gated: bool = True) -> Tensor:
    """The same in one pass over memory forward and one backward."""
    _check(x, activation, gated)
    return _SwiGLU.apply(x, activation, gated)


OP = Op(
    name="swiglu",
    implementations={"torch": swiglu_torch, "triton": swiglu_triton},
    inputs=lambda shape, make: {"x": make(shape["rows"], 2 * shape["F"])},
    differentiable=("x",),
    cost=lambda s, itemsize: Cost(3 * s["rows"] * s["F"] * itemsize, 5 * s["rows"] * s["F"]),
    backward_cost=lambda s, itemsize: Cost(5 * s["rows"] * s["F"] * itemsize, 10 * s["rows"] * s["F"]),
    test_shapes=({"rows": 1, "F": 1}, {"rows": 5, "F": 127}, {"rows": 33, "F": 192}, {"rows": 2, "F": 1601}),
    bench_shapes=({"rows": 65536, "F": 2048}, *({"rows": 16384, "F": f} for f in (2816, 5504, 11008))),
    launches=(FORWARD, BACKWARD),
)
