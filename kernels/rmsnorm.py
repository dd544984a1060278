"""RMSNorm, with the residual add in the same pass.

    s = x + r                          the residual stream, when there is a residual r
    y = g * s / sqrt(mean(s^2) + eps)  over the last dimension, statistics in float32

With h = s / rms the gradient is ds = (g*dy - h * mean(g*dy*h)) / rms, plus the gradient arriving at s itself, and
dx = dr = ds, dg = sum over rows of dy*h. Saved for backward: s and 1/rms.

A program of the Triton kernels walks over rows, holding a row in registers as blocks of columns, so that each value is
read once and a width that is no power of two wastes little. Rows wider than some 32,768 spill registers: right, slow.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import library_op, multiprocessors, rows_of, tl, triton
from kernels.spec import Cost, Op, accumulation_dtype


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
def _rmsnorm_fwd_kernel(
    x_ptr, residual_ptr, gain_ptr, y_ptr, stream_ptr, rstd_ptr, n_rows, D, stride_x, stride_r, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)[None, :]
    gains = ()
    if gain_ptr is not None:
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            gains += (tl.load(gain_ptr + d, mask=d < D, other=0.0),)
    for start in range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        squares = tl.zeros([BLOCK_R], dtype=tl.float32)
        streams = ()
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            mask = (rows < n_rows) & (d < D)
            s = tl.load(x_ptr + rows * stride_x + d, mask=mask, other=0.0)
            if residual_ptr is not None:
                r = tl.load(residual_ptr + rows * stride_r + d, mask=mask, other=0.0)
                s = (s.to(r.dtype).to(tl.float32) + r.to(tl.float32)).to(r.dtype)
                tl.store(stream_ptr + rows * D + d, s, mask=mask)
            streams += (s,)
            s = s.to(tl.float32)
            squares += tl.sum(s * s, axis=1)
        rstd = tl.rsqrt(squares / D + eps)[:, None]
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            y = streams[i].to(tl.float32) * rstd
            if gain_ptr is not None:
                y *= gains[i].to(tl.float32)
            tl.store(y_ptr + rows * D + d, y, mask=(rows < n_rows) & (d < D))


@triton.jit
def _rmsnorm_bwd_kernel(
    dy_ptr, dstream_ptr, stream_ptr, gain_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dgain_ptr, n_rows, D,
    stride_dy, stride_ds, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """`dresidual_ptr` is None where dx serves for it, `dgain_ptr` `[programs, D]` takes each program's share."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    gains = ()
    dgains = ()
    for i in tl.static_range(N_BLOCKS):
        d = i * BLOCK_D + columns
        if gain_ptr is not None:
            gains += (tl.load(gain_ptr + d, mask=d < D, other=0.0),)
        if dgain_ptr is not None:
            dgains += (tl.zeros([1, BLOCK_D], dtype=tl.float32),)
    for start in range(tl.program_id(0) * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        dot = tl.zeros([BLOCK_R], dtype=tl.float32)
        dys = ()
        streams = ()
        dstreams = ()
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            mask = (rows < n_rows) & (d < D)
            dy = tl.load(dy_ptr + rows * stride_dy + d, mask=mask, other=0.0)
            s = tl.load(stream_ptr + rows * stride_s + d, mask=mask, other=0.0)
            if dstream_ptr is not None:
                dstreams += (tl.load(dstream_ptr + rows * stride_ds + d, mask=mask, other=0.0),)
            dys += (dy,)
            streams += (s,)
            dh = dy.to(tl.float32)
            if gain_ptr is not None:
                dh *= gains[i].to(tl.float32)
            dot += tl.sum(dh * (s.to(tl.float32) * rstd), axis=1)
        mean = (dot / D)[:, None]
        shares = ()
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            mask = (rows < n_rows) & (d < D)
            dh = dys[i].to(tl.float32)
            h = streams[i].to(tl.float32) * rstd
            if dgain_ptr is not None:
                shares += (dgains[i] + tl.sum(dh * h, axis=0)[None, :],)
            if gain_ptr is not None:
                dh *= gains[i].to(tl.float32)
            ds = (dh - h * mean) * rstd
            if dstream_ptr is not None:
                ds += dstreams[i].to(tl.float32)
            tl.store(dx_ptr + rows * D + d, ds, mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + rows * D + d, ds, mask=mask)
        dgains = shares
    if dgain_ptr is not None:
        for i in tl.static_range(N_BLOCKS):
            d = i * BLOCK_D + columns
            tl.store(dgain_ptr + tl.program_id(0).to(tl.int64) * D + d, dgains[i], mask=d < D)


def _tiling(d: int, per_thread: int) -> dict[str, int]:
    """Rows and columns of a block, and warps: about `per_thread` values of a row, or of some short rows, a thread."""
    warps = 2 ** round(math.log2(min(32, max(4, d / (32 * per_thread)))))
    least = 256 * warps  # 8 values a thread: loads of 16 bytes in half precision
    block = min(least, triton.next_power_of_2(d))
    while block > 256 and triton.cdiv(d, block) * block > 1.3 * d:
        block //= 2
    n_blocks = triton.cdiv(d, block)
    rows = max(least // block, 32 * warps * per_thread // (n_blocks * block))
    rows = min(32, 2 ** (rows.bit_length() - 1))
    return {"BLOCK_R": rows, "BLOCK_D": block, "N_BLOCKS": n_blocks, "num_warps": warps}


def _n_programs(x: Tensor, n_rows: int, tiling: dict[str, int]) -> int:
    """As many as are resident at once with 16 warps on a multiprocessor, and no more than there are blocks of rows."""
    resident = multiprocessors(x.device) * max(1, 16 // tiling["num_warps"])
    return max(1, min(resident, triton.cdiv(n_rows, tiling["BLOCK_R"])))


def _allocate_fwd(x, gain, residual, eps):
    stream = x.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), stream, x.new_empty(x.shape[:-1], dtype=torch.float32)


@library_op(_allocate_fwd)
def _rmsnorm_fwd(x: Tensor, gain: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, the stream (empty without a residual) and 1/rms."""
    y, stream, rstd = _allocate_fwd(x, gain, residual, eps)
    d, x = x.shape[-1], rows_of(x)
    residual = None if residual is None else rows_of(residual)
    tiling = _tiling(d, per_thread=32)
    _rmsnorm_fwd_kernel[(_n_programs(x, len(x), tiling),)](
        x, residual, gain, y, None if residual is None else stream, rstd,
        len(x), d, x.stride(0), 0 if residual is None else residual.stride(0), eps, **tiling,
    )  # fmt: skip
    return y, stream, rstd


def _allocate_bwd(dy, dstream, stream, gain, rstd, twin):
    return (
        torch.empty(stream.shape, dtype=dy.dtype, device=dy.device),
        torch.empty(stream.shape if twin else (0,), dtype=stream.dtype, device=dy.device),
        dy.new_empty(0) if gain is None else torch.empty_like(gain),
    )


@library_op(_allocate_bwd)
def _rmsnorm_bwd(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, gain: Tensor | None, rstd: Tensor, twin: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in the dtype of `dy`; of the residual, with `twin`, in that of `stream`; and of the gain."""
    dx, dresidual, dgain = _allocate_bwd(dy, dstream, stream, gain, rstd, twin)
    d, dy, stream = stream.shape[-1], rows_of(dy), rows_of(stream)
    dstream = None if dstream is None else rows_of(dstream)
    tiling = _tiling(d, per_thread=16)
    programs = _n_programs(dy, len(dy), tiling)
    shares = None if gain is None else dy.new_empty((programs, d), dtype=torch.float32)
    _rmsnorm_bwd_kernel[(programs,)](
        dy, dstream, stream, gain, rstd, dx, dresidual if twin else None, shares,
        len(dy), d, dy.stride(0), 0 if dstream is None else dstream.stride(0), stream.stride(0), **tiling,
    )  # fmt: skip
    return dx, dresidual, dgain if gain is None else shares.sum(0).to(gain.dtype)


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
        twin = ctx.has_residual and stream.dtype != ctx.dtype
        dx, dresidual, dgain = _rmsnorm_bwd(dy, dstream if ctx.has_residual else None, stream, gain, rstd, twin)
        if not twin:
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
    rows, d = shape["rows"], shape["D"]
    return {"x": make(rows, d), "gain": make(d), "residual": make(rows, d)}


OP = Op(
    name="rmsnorm",
    implementations={"torch": rmsnorm_torch, "triton": rmsnorm_triton},
    inputs=_inputs,
    differentiable=("x", "gain", "residual"),
    cost=lambda s, itemsize: Cost((4 * s["rows"] + 1) * s["D"] * itemsize + 4 * s["rows"], 5 * s["rows"] * s["D"]),
    backward_cost=lambda s, itemsize: Cost(
        (4 * s["rows"] + 2) * s["D"] * itemsize + 4 * s["rows"], 10 * s["rows"] * s["D"]
    ),
    test_shapes=(
        {"rows": 1, "D": 1}, {"rows": 1, "D": 64}, {"rows": 7, "D": 127}, {"rows": 150, "D": 200},
        {"rows": 3, "D": 1601}, {"rows": 2, "D": 65537},
    ),
    bench_shapes=(
        {"rows": 65536, "D": 768}, *({"rows": 16384, "D": d} for d in (1024, 1600, 2048, 4096, 5120, 8192)),
    ),
)  # fmt: skip
