"""SwiGLU on the packed gate and up projection; also GELU, ReLU and squared ReLU, gated or not.

    y = a(gate) * up        gated, x = [gate, up]
    y = a(x)                not gated

    silu(z) = z * sigmoid(z)                gelu(z) = z * sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3)), the tanh form
    relu(z) = max(z, 0)                     relu2(z) = max(z, 0)^2

`swiglu_fp8` also returns FP8 codes of y, as the linear layers of FP8 training take them, and measures amax:

    codes = round(y / scale)           e4m3, of y as it is returned; saturating
    amax = max(amax, max |y|)          by one atomic a program, whose result does not depend on their order

Its backward does the same for dx, in e5m2. Those codes reach the layer that computed x as the gradient of `dx_codes`,
an empty tensor that came with x.

The gradient is dup = dy * a(gate), dgate = dy * up * a'(gate). Saved for backward: x alone; a and a' are recomputed,
which is cheaper than reading them from memory.

The op is bound by memory, so forward and backward are one pass each. A program takes a block of rows and columns, wide
enough for 128-bit loads.

Sources: Shazeer, "GLU Variants Improve Transformer", 2020, equations 5 and 6; Hendrycks and Gimpel, "Gaussian Error
Linear Units", 2016, section 2; So et al., "Primer", 2021, section 4 (squared ReLU).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, cdiv, empty_like, fp8_codes, next_power_of_2, raise_amax, rows_of
from kernels.formats import E4M3, E5M2, FP8_CARDS, codes_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

Activation = Literal["silu", "gelu", "relu", "relu2"]
ACTIVATIONS = get_args(Activation)


# Reference


def swiglu_torch(x: Tensor, activation: Activation = "silu", gated: bool = True) -> Tensor:
    """Gated activation in plain torch, the reference.

    Args:
        x: `[..., 2F]`, gate in the first half and up projection in the second; `[..., F]` if not gated.
        activation: the activation a, applied to the gate.
        gated: whether `x` packs a gate and an up projection.

    Returns:
        `[..., F]` in the dtype of `x`.

    Raises:
        ValueError: the activation is unknown, or the packed width is odd.
    """
    _check(x, activation, gated)
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    gate = gate.to(accumulation_dtype(x))
    if activation == "silu":
        y = gate * torch.sigmoid(gate)  # not F.silu: Inductor computes its exponential twice in the backward on a CPU
    elif activation == "gelu":
        y = F.gelu(gate, approximate="tanh")
    else:
        y = F.relu(gate)
        y = y.square() if activation == "relu2" else y
    return (y if up is None else y * up).to(x.dtype)


def swiglu_fp8_torch(
    x: Tensor,
    activation: Activation,
    gated: bool,
    scale: Tensor,
    amax: Tensor | None = None,
    dx_codes: Tensor | None = None,
    dx_scale: Tensor | None = None,
    dx_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated activation that also quantises its result, in plain torch, the reference.

    Args:
        x, activation, gated: as in `swiglu_torch`.
        scale: float32 `[1]`, what codes are multiplied by to give values; more than 0.
        amax: float32 `[1]`, raised to the largest magnitude in y; None to leave that unmeasured.
        dx_codes: e5m2, of the shape of `x`, whose values are not read: its gradient is codes of dx. None for no codes.
        dx_scale, dx_amax: of dx, as `scale` and `amax` of y; needed with `dx_codes`.

    Returns:
        (y, codes): the result of `swiglu_torch`, and its e4m3 codes, contiguous `[..., F]`.

    Raises:
        ValueError: the activation is unknown, or the packed width is odd.
    """
    if dx_codes is not None:
        x = _QuantizeGradient.apply(x, dx_codes, dx_scale, dx_amax)
    y = swiglu_torch(x, activation, gated)
    return y, codes_of(y, scale, E4M3, amax)


class _QuantizeGradient(torch.autograd.Function):
    """The identity on x. The gradient of `codes` is codes of the gradient of x."""

    @staticmethod
    def forward(ctx, x, codes, scale, amax):
        ctx.target = scale, amax
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        scale, amax = ctx.target
        return dx, codes_of(dx, scale, E5M2, amax), None, None


def _check(x: Tensor, activation: str, gated: bool) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if gated and x.shape[-1] % 2:
        raise ValueError(f"a packed gate and up projection has an even width, not {x.shape[-1]}")


# Kernels


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """a(z) and a'(z). The forward kernel ignores a'(z), and the compiler removes the code for it."""
    if ACTIVATION == "silu" or ACTIVATION == "gelu":
        w, dw = z, 1.0  # a(z) = z * sigmoid(w), and dw = dw/dz
        if ACTIVATION == "gelu":
            w = z * (1.5957691216057308 + 0.07135481627260025 * z * z)
            dw = 1.5957691216057308 + 0.21406444881780075 * z * z
        e = tl.exp(-tl.abs(w))
        small = e / (1 + e)
        large = 1 / (1 + e)
        sigmoid = tl.where(w < 0, small, large)
        y = z * sigmoid
        dy = sigmoid + y * tl.where(w < 0, large, small) * dw  # sigmoid(-w), since 1 - sigmoid(w) would cancel
    else:
        y = tl.where(z < 0, 0.0, z)  # tl.maximum would turn NaN into 0
        dy = tl.where(z > 0, 1.0, 0.0)
        if ACTIVATION == "relu2":
            dy = 2 * y
            y = y * y
    return y, dy


@triton.jit
def _block(F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows `[BLOCK_R, 1]` and columns `[1, BLOCK_F]` of this program. Neighbouring programs share rows."""
    blocks_per_row = tl.cdiv(F, BLOCK_F)
    row, column = tl.program_id(0) // blocks_per_row, tl.program_id(0) % blocks_per_row
    rows = (row * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    return rows[:, None], (column * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]


@triton.jit
def _store_codes(codes_ptr, offsets, mask, x, x_ptr, scale_ptr):
    """Store FP8 codes of x as it is stored at `x_ptr`, and return its magnitudes, of NaN 0."""
    x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(codes_ptr + offsets, fp8_codes(x, 1.0 / tl.load(scale_ptr), codes_ptr.dtype.element_ty), mask=mask)
    return tl.maximum(tl.abs(x), 0.0)


@triton.jit
def _swiglu_fwd_kernel(
    x_ptr, y_ptr, codes_ptr, scale_ptr, amax_ptr, n_rows, F, stride_x,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns = _block(F, BLOCK_R, BLOCK_F)
    mask = (rows < n_rows) & (columns < F)
    gate = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    y, _ = _activate(gate.to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(x_ptr + rows * stride_x + F + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * F + columns, y, mask=mask)
    if codes_ptr is not None:
        largest = _store_codes(codes_ptr, rows * F + columns, mask, y, y_ptr, scale_ptr)
        if amax_ptr is not None:
            raise_amax(amax_ptr, largest)


@triton.jit
def _swiglu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, codes_ptr, scale_ptr, amax_ptr, n_rows, F, stride_dy, stride_x,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns = _block(F, BLOCK_R, BLOCK_F)
    mask = (rows < n_rows) & (columns < F)
    dy = tl.load(dy_ptr + rows * stride_dy + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + rows * stride_x + columns, mask=mask, other=0.0)
    a, da = _activate(gate.to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(x_ptr + rows * stride_x + F + columns, mask=mask, other=0.0).to(tl.float32)
        dgate, dup = dy * up * da, dy * a
        tl.store(dx_ptr + rows * 2 * F + columns, dgate, mask=mask)
        tl.store(dx_ptr + rows * 2 * F + F + columns, dup, mask=mask)
        if codes_ptr is not None:
            largest = _store_codes(codes_ptr, rows * 2 * F + columns, mask, dgate, dx_ptr, scale_ptr)
            largest = tl.maximum(
                largest, _store_codes(codes_ptr, rows * 2 * F + F + columns, mask, dup, dx_ptr, scale_ptr)
            )
            raise_amax(amax_ptr, largest)
    else:
        dgate = dy * da
        tl.store(dx_ptr + rows * F + columns, dgate, mask=mask)
        if codes_ptr is not None:
            largest = _store_codes(codes_ptr, rows * F + columns, mask, dgate, dx_ptr, scale_ptr)
            raise_amax(amax_ptr, largest)


# Launch parameters


@dataclass(frozen=True)
class Tile:
    """Launch parameters of both kernels.

    values: rows times columns of a block.
    max_columns: the widest block; narrow matrices have narrower blocks with more rows.
    num_warps: warps of a program.
    """

    values: int
    max_columns: int
    num_warps: int


def _table(kernel: str, best: Tile, backward: bool = False) -> LaunchTable:
    """One entry for all sizes and cards: a block of a memory-bound kernel is full at any width."""
    tiles = (
        best, Tile(2048, 1024, 4), Tile(4096, 1024, 4), Tile(4096, 2048, 8), Tile(1024, 1024, 4), Tile(1024, 1024, 2),
        Tile(2048, 512, 4), Tile(8192, 2048, 8),
    )  # fmt: skip
    candidates = tuple(dict.fromkeys(tiles))
    return LaunchTable(kernel, {"any": {"": best}}, lambda size: candidates, lambda size: OP.bench_shapes, backward)


# 16 values a thread, two 128-bit loads in half precision. On an H100: 85 to 100% of the bandwidth of a copy.
FORWARD = _table("_swiglu_fwd_kernel", Tile(2048, 1024, 4))
BACKWARD = _table("_swiglu_bwd_kernel", Tile(2048, 1024, 4), backward=True)


def _grid(table: LaunchTable, x: Tensor, f: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of a launch over `[rows, f]`. At most an eighth of the columns of its blocks is padding."""
    tile = table.pick("any", card(x.device))
    block_f = min(tile.max_columns, next_power_of_2(f))
    while block_f > 128 and cdiv(f, block_f) * block_f > 1.125 * f:
        block_f //= 2
    block_r = tile.values // block_f
    grid = (cdiv(x.shape[0], block_r) * cdiv(f, block_f),)
    return grid, {"BLOCK_R": block_r, "BLOCK_F": block_f, "num_warps": tile.num_warps}


# Torch ops and autograd


def _allocate_fwd(x, activation, gated):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // (1 + gated)))


@library_op(_allocate_fwd)
def _swiglu_fwd(x: Tensor, activation: str, gated: bool) -> Tensor:
    y = _allocate_fwd(x, activation, gated)
    _launch_fwd(x, activation, gated, y)
    return y


def _allocate_fp8_fwd(x, activation, gated, scale, amax):
    y = _allocate_fwd(x, activation, gated)
    return y, torch.empty_like(y, dtype=E4M3.dtype)


@library_op(_allocate_fp8_fwd, mutates=("amax",))
def _swiglu_fp8_fwd(
    x: Tensor, activation: str, gated: bool, scale: Tensor, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns y and codes of y."""
    y, codes = _allocate_fp8_fwd(x, activation, gated, scale, amax)
    _launch_fwd(x, activation, gated, y, codes, scale, amax)
    return y, codes


def _launch_fwd(x, activation, gated, y, codes=None, scale=None, amax=None) -> None:
    x = rows_of(x)
    f = y.shape[-1]
    grid, options = _grid(FORWARD, x, f)
    if y.numel():
        _swiglu_fwd_kernel[grid](
            x, y, codes, scale, amax, x.shape[0], f, x.stride(0), activation, gated, **options
        )  # fmt: skip


def _allocate_bwd(dy, x, activation, gated):
    return empty_like(x)


@library_op(_allocate_bwd)
def _swiglu_bwd(dy: Tensor, x: Tensor, activation: str, gated: bool) -> Tensor:
    dx = _allocate_bwd(dy, x, activation, gated)
    _launch_bwd(dy, x, activation, gated, dx)
    return dx


def _allocate_fp8_bwd(dy, x, activation, gated, scale, amax):
    return empty_like(x), empty_like(x, dtype=E5M2.dtype)


@library_op(_allocate_fp8_bwd, mutates=("amax",))
def _swiglu_fp8_bwd(
    dy: Tensor, x: Tensor, activation: str, gated: bool, scale: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns dx and codes of dx."""
    dx, codes = _allocate_fp8_bwd(dy, x, activation, gated, scale, amax)
    _launch_bwd(dy, x, activation, gated, dx, codes, scale, amax)
    return dx, codes


def _launch_bwd(dy, x, activation, gated, dx, codes=None, scale=None, amax=None) -> None:
    dy, x = rows_of(dy), rows_of(x)
    f = dy.shape[-1]
    grid, options = _grid(BACKWARD, x, f)
    if dx.numel():
        _swiglu_bwd_kernel[grid](
            dy, x, dx, codes, scale, amax, x.shape[0], f, dy.stride(0), x.stride(0), activation, gated, **options
        )  # fmt: skip


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, activation, gated, scale=None, amax=None, dx_codes=None, dx_scale=None, dx_amax=None):
        ctx.save_for_backward(x)
        ctx.options, ctx.dx_target = (activation, gated), None if dx_codes is None else (dx_scale, dx_amax)
        if scale is None:
            return _swiglu_fwd(x, activation, gated)
        y, codes = _swiglu_fp8_fwd(x, activation, gated, scale, amax)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return y, codes

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        codes = None
        if ctx.dx_target is None:
            dx = _swiglu_bwd(dy, *ctx.saved_tensors, *ctx.options)
        else:
            dx, codes = _swiglu_fp8_bwd(dy, *ctx.saved_tensors, *ctx.options, *ctx.dx_target)
        return dx, None, None, None, None, codes, None, None


# Public function


def swiglu_triton(x: Tensor, activation: Activation = "silu", gated: bool = True) -> Tensor:
    """Gated activation by the Triton kernels, one pass forward and one backward; arguments of `swiglu_torch`."""
    _check(x, activation, gated)
    return _SwiGLU.apply(x, activation, gated)


def swiglu_fp8_triton(
    x: Tensor,
    activation: Activation,
    gated: bool,
    scale: Tensor,
    amax: Tensor | None = None,
    dx_codes: Tensor | None = None,
    dx_scale: Tensor | None = None,
    dx_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated activation that also quantises its result, in the same pass; arguments of `swiglu_fp8_torch`."""
    _check(x, activation, gated)
    return _SwiGLU.apply(x, activation, gated, scale, amax, dx_codes, dx_scale, dx_amax)


# OP


def _inputs(shape, make):
    return {"x": make(shape["rows"], 2 * shape["F"])}


def _fp8_inputs(shape, make):
    inputs = _inputs(shape, make)
    one = torch.ones(1, device=inputs["x"].device)
    inputs |= {"activation": "silu", "gated": True, "scale": 0.01 * one, "amax": 0 * one}
    dx_codes = torch.zeros_like(inputs["x"], dtype=E5M2.dtype)
    return inputs | {"dx_codes": dx_codes, "dx_scale": 0.01 * one, "dx_amax": 0 * one}


def _cost(s, itemsize):
    """Reads gate and up, writes y."""
    n = s["rows"] * s["F"]
    return Cost(3 * n * itemsize, 5 * n)


def _fp8_cost(s, itemsize):
    """Writes the codes too."""
    cost, n = _cost(s, itemsize), s["rows"] * s["F"]
    return Cost(cost.bytes + n, cost.flops + 3 * n)


def _backward_cost(s, itemsize):
    """Reads dy, gate and up, writes dgate and dup."""
    n = s["rows"] * s["F"]
    return Cost(5 * n * itemsize, 10 * n)


def _fp8_backward_cost(s, itemsize):
    """Writes the codes of dgate and dup too."""
    cost, n = _backward_cost(s, itemsize), s["rows"] * s["F"]
    return Cost(cost.bytes + 2 * n, cost.flops + 6 * n)


OP = Op(
    name="swiglu",
    implementations={"torch": swiglu_torch, "triton": swiglu_triton},
    inputs=_inputs,
    differentiable=("x",),
    cost=_cost,
    backward_cost=_backward_cost,
    test_shapes=({"rows": 1, "F": 1}, {"rows": 5, "F": 127}, {"rows": 33, "F": 192}, {"rows": 2, "F": 1601}),
    bench_shapes=({"rows": 65536, "F": 2048}, *({"rows": 16384, "F": f} for f in (2816, 5504, 11008))),
    launches=(FORWARD, BACKWARD),
)
FP8_OP = Op(
    name="swiglu_fp8",
    implementations={"torch": swiglu_fp8_torch, "triton": swiglu_fp8_triton},
    inputs=_fp8_inputs,
    differentiable=("x",),
    cost=_fp8_cost,
    backward_cost=_fp8_backward_cost,
    test_shapes=({"rows": 1, "F": 1}, {"rows": 33, "F": 192}, {"rows": 2, "F": 1601}),
    bench_shapes=({"rows": 32768, "F": 2048}, {"rows": 8192, "F": 5504}),
    mutates=("amax", "dx_amax"),
    cards=FP8_CARDS,
)
