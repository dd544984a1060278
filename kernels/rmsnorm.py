"""RMSNorm, with the residual add in the same pass.

    s = x + r                          the residual stream, when there is a residual r
    y = g * s / sqrt(mean(s^2) + eps)  over the last dimension, statistics in float32

With h = s / rms the gradient is ds = (g*dy - h * mean(g*dy*h)) / rms, plus the gradient arriving at s itself, and
dx = dr = ds, dg = sum over rows of dy*h. Saved for backward: s and 1/rms.

A program of the Triton kernels holds whole rows in registers, in one block as wide as the next power of two, so that
each value is read once; lanes beyond the width touch no memory. Rows of more than 8192 columns are read twice.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, cdiv, empty_like, n_sm, next_power_of_2, rows_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype


def rmsnorm_torch(
    x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Normalise `x + residual` over its last dimension.

    Args:
        x: `[..., D]`, any floating dtype.
        gain: `[D]` or None for no gain.
        residual: `[..., D]`, added to `x` first; None adds nothing.
        eps: added to the mean square.

    Returns:
        The normalised value in the dtype of `x`, and the new residual stream in that of `residual` (`x` itself when
        there is none), both `[..., D]`. Raises `ValueError` when shapes do not fit together.
    """
    _check(x, gain, residual)
    stream = x if residual is None else residual + x.to(residual.dtype)
    wide = stream.to(accumulation_dtype(stream))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        y = y * gain.to(y.dtype)
    return y.to(x.dtype), stream


def _check(x, gain, residual):
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(f"gain {list(gain.shape)} is not [{x.shape[-1]}], as wide as x")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {list(residual.shape)} is not {list(x.shape)}, the shape of x")


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_stream(x_ptr, residual_ptr, mask):
    """x, or x + residual rounded to the dtype of the residual."""
    s = tl.load(x_ptr, mask=mask, other=0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr, mask=mask, other=0.0)
        s = (s.to(r.dtype).to(tl.float32) + r.to(tl.float32)).to(r.dtype)
    return s.to(tl.float32)


@triton.jit
def _rmsnorm_fwd_kernel(
    x_ptr, residual_ptr, gain_ptr, y_ptr, stream_ptr, rstd_ptr, n_rows, D, stride_x, stride_r, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows a program. A row of one block stays in registers; a wider one is read twice, block by block."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    x_ptr += rows * stride_x
    residual_ptr = None if residual_ptr is None else residual_ptr + rows * stride_r
    squares = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    s = squares
    for i in range(N_BLOCKS):
        d = i * BLOCK_D + columns
        mask = (rows < n_rows) & (d < D)
        s = _load_stream(x_ptr + d, None if residual_ptr is None else residual_ptr + d, mask)
        squares += s * s
        if residual_ptr is not None:
            tl.store(stream_ptr + rows * D + d, s, mask=mask)
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    for i in range(N_BLOCKS):
        d = i * BLOCK_D + columns
        mask = (rows < n_rows) & (d < D)
        if N_BLOCKS > 1:
            s = _load_stream(x_ptr + d, None if residual_ptr is None else residual_ptr + d, mask)
        y = s * rstd
        if gain_ptr is not None:
            y *= _load(gain_ptr + d, d < D)
        tl.store(y_ptr + rows * D + d, y, mask=mask)


@triton.jit
def _rmsnorm_bwd_kernel(
    dy_ptr, dstream_ptr, stream_ptr, gain_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dgain_ptr, n_rows, D,
    stride_dy, stride_ds, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program walks over rows, and sums the gain's gradient of its rows in `dgain_ptr` `[programs, D]`: lane by lane
    in registers, or in memory for rows of several blocks. `dresidual_ptr` is None where dx serves for it."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    dgain = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    gain = dgain
    if dgain_ptr is not None:
        dgain_ptr += tl.program_id(0).to(tl.int64) * D
    if N_BLOCKS > 1:
        tl.static_assert(BLOCK_R == 1, "one row at a time is summed in memory")
        if dgain_ptr is not None:
            for i in range(N_BLOCKS):
                d = i * BLOCK_D + columns
                tl.store(dgain_ptr + d, dgain, mask=d < D)
    elif gain_ptr is not None:
        gain = _load(gain_ptr + columns, columns < D)
    for start in tl.range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R, num_stages=STAGES):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        rstd = _load(rstd_ptr + rows, rows < n_rows)
        dot = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        dy, h = dot, dot
        for i in range(N_BLOCKS):
            d = i * BLOCK_D + columns
            mask = (rows < n_rows) & (d < D)
            dy = _load(dy_ptr + rows * stride_dy + d, mask)
            h = _load(stream_ptr + rows * stride_s + d, mask) * rstd
            if gain_ptr is None:
                dot += dy * h
            else:
                dot += dy * (gain if N_BLOCKS == 1 else _load(gain_ptr + d, d < D)) * h
        mean = (tl.sum(dot, axis=1) / D)[:, None]
        if N_BLOCKS > 1:
            tl.debug_barrier()  # sums in memory may have been stored by other threads than those that load them
        for i in range(N_BLOCKS):
            d = i * BLOCK_D + columns
            mask = (rows < n_rows) & (d < D)
            if N_BLOCKS > 1:
                dy = _load(dy_ptr + rows * stride_dy + d, mask)
                h = _load(stream_ptr + rows * stride_s + d, mask) * rstd
                gain = gain if gain_ptr is None else _load(gain_ptr + d, d < D)
            if dgain_ptr is not None:
                if N_BLOCKS == 1:
                    dgain += dy * h
                else:
                    tl.store(dgain_ptr + d, _load(dgain_ptr + d, d < D) + dy * h, mask=d < D)
            if gain_ptr is not None:
                dy *= gain
            ds = (dy - h * mean) * rstd
            if dstream_ptr is not None:
                ds += _load(dstream_ptr + rows * stride_ds + d, mask)
            tl.store(dx_ptr + rows * D + d, ds, mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + rows * D + d, ds, mask=mask)
    if dgain_ptr is not None and N_BLOCKS == 1:
        tl.store(dgain_ptr + columns, tl.sum(dgain, axis=0)[None, :], mask=columns < D)


@triton.jit
def _sum_rows_kernel(x_ptr, y_ptr, n_rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        acc += tl.load(x_ptr + rows * D + d, mask=(rows < n_rows) & (d < D), other=0.0)
    tl.store(y_ptr + d, tl.sum(acc, axis=0)[None, :], mask=d < D)


MAX_BLOCK = 8192  # columns of a block; of twice as many the backward spills registers


@dataclass(frozen=True)
class RowTile:
    """Launch parameters at a size.

    block_r: rows of a block, when it has 1024 columns or more; narrower rows are taken together to as many values.
    num_warps, num_stages: of the kernel, and of the pipeline over the rows of a program.
    programs_per_sm: in the backward, each walking over its share of the rows; the forward has one for every block.
    """

    block_r: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 0


# A size is the columns of a block and whether the residual stream is float32.
SIZES = tuple((columns, wide) for columns in (1024, 2048, 4096, 8192) for wide in (False, True))


def _columns(d: int) -> int:
    return min(MAX_BLOCK, max(1024, next_power_of_2(d)))


def _shapes(size):
    columns, wide = size
    widths = sorted({s["D"] for s in OP.bench_shapes if _columns(s["D"]) == columns})
    return tuple({"rows": 2**25 // columns, "D": d, "fp32_residual": int(wide)} for d in widths)


def _scaled(size, *tiles):
    """Of tiles for 1024 columns, those with as many values a thread and as much under way on an SM."""
    times = size[0] // 1024
    scaled = (
        replace(t, num_warps=min(16, t.num_warps * times), programs_per_sm=math.ceil(t.programs_per_sm / times))
        for t in tiles
    )
    return tuple(dict.fromkeys(scaled))


def _forward_tiles(size):
    tiles = (1, 4), (1, 2), (2, 4), (4, 4), (2, 8), (4, 8), (1, 8), (1, 1)
    return _scaled(size, *(RowTile(*tile) for tile in tiles))


def _backward_tiles(size):
    """The first is an H100's best at 768 columns."""
    if size[1]:
        tiles = (1, 2, 1, 8), (1, 2, 1, 16), (1, 8, 3, 2), (1, 8, 2, 4), (2, 2, 2, 16)
    else:
        tiles = (1, 2, 3, 8), (4, 4, 3, 8), (1, 2, 3, 4), (1, 4, 3, 16), (1, 4, 1, 8), (1, 4, 1, 16)
    return _scaled(size, *(RowTile(*tile) for tile in tiles))


FORWARD = LaunchTable(
    "_rmsnorm_fwd_kernel", {size: {"": _forward_tiles(size)[0]} for size in SIZES}, _forward_tiles, _shapes
)
BACKWARD = LaunchTable(
    "_rmsnorm_bwd_kernel",
    {
        # An MI300 has no room for three stages of the widest rows.
        size: {"": _backward_tiles(size)[0], "gfx942": replace(_backward_tiles(size)[0], num_stages=1)}
        for size in SIZES
    },
    _backward_tiles,
    _shapes,
    backward=True,
)


def _pick(table: LaunchTable, stream: Tensor) -> tuple[RowTile, dict[str, int]]:
    """The tile for rows of `stream`, and the arguments of a kernel that follow from it and the width."""
    d = stream.shape[-1]
    columns = _columns(d)
    tile = table.pick((columns, stream.dtype.itemsize > 2), card(stream.device))
    block_d = min(columns, next_power_of_2(d))
    n_blocks = cdiv(d, block_d)
    block_r = tile.block_r * columns // block_d if n_blocks == 1 else 1
    return tile, {"BLOCK_R": block_r, "BLOCK_D": block_d, "N_BLOCKS": n_blocks, "num_warps": tile.num_warps}


def _allocate_fwd(x, gain, residual, eps):
    stream = x.new_empty(0) if residual is None else empty_like(residual)
    return empty_like(x), stream, x.new_empty(x.shape[:-1], dtype=torch.float32)


@library_op(_allocate_fwd)
def _rmsnorm_fwd(x: Tensor, gain: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the stream (empty without a residual) and 1/rms."""
    y, stream, rstd = _allocate_fwd(x, gain, residual, eps)
    x = rows_of(x)
    residual = None if residual is None else rows_of(residual)
    _, blocks = _pick(FORWARD, x if residual is None else residual)
    _rmsnorm_fwd_kernel[(cdiv(x.shape[0], blocks["BLOCK_R"]),)](
        x, residual, gain, y, None if residual is None else stream, rstd,
        *x.shape, x.stride(0), 0 if residual is None else residual.stride(0), eps, **blocks,
    )  # fmt: skip
    return y, stream, rstd


def _sum_rows(x: Tensor, out: Tensor) -> None:
    """Sum the programs' partial sums, `x` `[programs, D]` float32, into `out` `[D]` of any dtype, in a fixed order.

    One launch where `x.sum(0).to(dtype)` takes two. The many partial sums of a GPU are read 16 columns a program, which
    spreads a gain of 768 over 48 SMs.
    """
    n_rows, d = x.shape
    block_r = min(256, next_power_of_2(n_rows))
    block_d = 4096 // block_r
    _sum_rows_kernel[(cdiv(d, block_d),)](x, out, n_rows, d, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=8)


def _allocate_bwd(dy, dstream, stream, gain, rstd, separate):
    return (
        empty_like(stream, dtype=dy.dtype),
        empty_like(stream) if separate else stream.new_empty(0),
        dy.new_empty(0) if gain is None else torch.empty_like(gain),
    )


@library_op(_allocate_bwd)
def _rmsnorm_bwd(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, gain: Tensor | None, rstd: Tensor, separate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in the dtype of `dy`; of the residual, if `separate`, in that of `stream`; of the gain."""
    dx, dresidual, dgain = _allocate_bwd(dy, dstream, stream, gain, rstd, separate)
    dy, stream = rows_of(dy), rows_of(stream)
    dstream = None if dstream is None else rows_of(dstream)
    tile, blocks = _pick(BACKWARD, stream)
    n_rows, d = stream.shape
    programs = max(1, min(tile.programs_per_sm * n_sm(dy.device), cdiv(n_rows, blocks["BLOCK_R"])))
    partial_sums = None if gain is None else dy.new_empty((programs, d), dtype=torch.float32)
    _rmsnorm_bwd_kernel[(programs,)](
        dy, dstream, stream, gain, rstd, dx, dresidual if separate else None, partial_sums,
        n_rows, d, dy.stride(0), 0 if dstream is None else dstream.stride(0), stream.stride(0),
        STAGES=tile.num_stages, **blocks,
    )  # fmt: skip
    if gain is not None:
        _sum_rows(partial_sums, dgain)
    return dx, dresidual, dgain


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, residual, eps):
        y, stream, rstd = _rmsnorm_fwd(x, gain, residual, eps)
        ctx.save_for_backward(x if residual is None else stream, gain, rstd)
        ctx.dtype = x.dtype
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstream):
        stream, gain, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(stream, dtype=ctx.dtype)
        separate = ctx.has_residual and stream.dtype != ctx.dtype
        dx, dresidual, dgain = _rmsnorm_bwd(dy, dstream if ctx.has_residual else None, stream, gain, rstd, separate)
        if not separate:
            dresidual = dx if ctx.has_residual else None
        return dx, None if gain is None else dgain, dresidual, None


def rmsnorm_triton(
    x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The same in one pass over memory forward and one backward; the gain's gradient is summed in a fixed order."""
    _check(x, gain, residual)
    y, stream = _RMSNorm.apply(x, None if gain is None else gain.contiguous(), residual, eps)
    return y, x if residual is None else stream


def _inputs(shape, make):
    """`fp32_residual`: the residual stream is float32, whatever the dtype of x."""
    rows, d = shape["rows"], shape["D"]
    residual = make(rows, d)
    return {
        "x": make(rows, d),
        "gain": make(d),
        "residual": residual.float() if shape.get("fp32_residual") else residual,
    }


def _cost(s, itemsize):
    """x, the residual, y and the new residual stream; and 1/rms."""
    wide = 4 if s.get("fp32_residual") else itemsize
    return Cost(s["rows"] * (s["D"] * 2 * (itemsize + wide) + 4) + s["D"] * itemsize, 5 * s["rows"] * s["D"])


def _backward_cost(s, itemsize):
    """Read: the gradients of y and of the new stream, and that stream. The gradient of x serves for the residual, too,
    unless their dtypes differ."""
    wide = 4 if s.get("fp32_residual") else itemsize
    written = itemsize if wide == itemsize else itemsize + wide
    values = s["D"] * (itemsize + 2 * wide + written)
    return Cost(s["rows"] * (values + 4) + 2 * s["D"] * itemsize, 10 * s["rows"] * s["D"])


OP = Op(
    name="rmsnorm",
    implementations={"torch": rmsnorm_torch, "triton": rmsnorm_triton},
    inputs=_inputs,
    differentiable=("x", "gain", "residual"),
    cost=_cost,
    backward_cost=_backward_cost,
    test_shapes=(
        {"rows": 1, "D": 1}, {"rows": 1, "D": 64}, {"rows": 7, "D": 127}, {"rows": 150, "D": 200},
        {"rows": 3, "D": 1601}, {"rows": 2, "D": 65537},
    ),
    bench_shapes=(
        {"rows": 65536, "D": 768}, *({"rows": 16384, "D": d} for d in (1024, 1600, 2048, 4096, 5120, 8192)),
    ),
    compiled_shapes=(
        *({"rows": 16384, "D": d, "fp32_residual": 1} for d in (768, 2048, 4096, 8192)),
        {"rows": 256, "D": 64}, {"rows": 256, "D": 20480},
    ),
    launches=(FORWARD, BACKWARD),
)  # fmt: skip
