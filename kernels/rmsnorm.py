"""RMSNorm fused with the residual add before it.

    s = x + r                          the new residual; s = x without a residual r
    y = g * s / sqrt(mean(s^2) + eps)  over the last dimension, statistics in float32

`rmsnorm_fp8` also returns FP8 codes of y, as the linear layers of FP8 training take them, and measures amax:

    codes = round(y / scale)           e4m3, of y as it is returned; saturating
    amax = max(amax, max |y|)

With h = s / rms the gradient is ds = (g*dy - h * mean(g*dy*h)) / rms, plus the gradient that arrives at s itself;
dx = dr = ds, and dg is the sum of dy*h over rows. Saved for backward: s and rstd = 1/rms.

The forward kernel has one program per block of rows. A row fits one block, as wide as the next power of two, stays in
registers and is read once; only rows of more than 8192 columns are read twice, block by block. The backward kernel has
a fixed number of programs per SM, each of which loops over rows and keeps a partial sum of dg. A second kernel adds the
partial sums in a fixed order: no atomics, so that dg is bitwise reproducible. amax is raised by one atomic a program,
whose result does not depend on their order.

Sources: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4; NVIDIA, "Transformer Engine"
(norms that return codes).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, cdiv, empty_like, fp8_codes, n_sm, next_power_of_2, raise_amax, rows_of
from kernels.formats import E4M3, FP8_CARDS, codes_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

# Reference


def rmsnorm_torch(
    x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm in plain torch, the reference.

    Args:
        x: `[..., D]`, any floating dtype.
        gain: `[D]`; None for no gain.
        residual: `[..., D]`, added to `x` before the norm; None for no residual.
        eps: added to the mean square.

    Returns:
        (y, new residual), both `[..., D]`: y in the dtype of `x`, and x + residual in the dtype of `residual`. Without
        a residual, the second is `x` itself.

    Raises:
        ValueError: shapes do not match.
    """
    _check(x, gain, residual)
    s = x if residual is None else residual + x.to(residual.dtype)
    s_fp32 = s.to(accumulation_dtype(s))
    y = s_fp32 * torch.rsqrt(s_fp32.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        y = y * gain.to(y.dtype)
    return y.to(x.dtype), s


def rmsnorm_fp8_torch(
    x: Tensor,
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float,
    scale: Tensor,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm that also quantises its result, in plain torch, the reference.

    Args:
        x, gain, residual, eps: as in `rmsnorm_torch`.
        scale: float32 `[1]`, what codes are multiplied by to give values; more than 0.
        amax: float32 `[1]`, raised to the largest magnitude in y; None to leave that unmeasured.

    Returns:
        (y, new residual, codes): the results of `rmsnorm_torch`, and e4m3 codes of y, contiguous `[..., D]`.

    Raises:
        ValueError: shapes do not match.
    """
    y, s = rmsnorm_torch(x, gain, residual, eps)
    return y, s, codes_of(y, scale, E4M3, amax)


def _check(x, gain, residual):
    if gain is not None and gain.shape != x.shape[-1:]:
        raise ValueError(f"gain {list(gain.shape)} is not [{x.shape[-1]}], as wide as x")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {list(residual.shape)} is not {list(x.shape)}, the shape of x")


# Kernels: forward


@triton.jit
def _load(ptr, mask):
    """Load as float32, 0 where masked."""
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(x_ptr, residual_ptr, mask):
    """s in float32: x, or x + residual rounded to the dtype of the residual, as it is stored."""
    s = tl.load(x_ptr, mask=mask, other=0.0)
    if residual_ptr is not None:
        r = tl.load(residual_ptr, mask=mask, other=0.0)
        s = (s.to(r.dtype).to(tl.float32) + r.to(tl.float32)).to(r.dtype)
    return s.to(tl.float32)


@triton.jit
def _rmsnorm_fwd_kernel(
    x_ptr, residual_ptr, gain_ptr, y_ptr, stream_ptr, rstd_ptr, codes_ptr, scale_ptr, amax_ptr,
    n_rows, D, stride_x, stride_r, eps,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_R rows. A row of one block stays in registers; a wider row is read twice."""
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    x_ptr += rows * stride_x
    residual_ptr = None if residual_ptr is None else residual_ptr + rows * stride_r
    squares = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    s = squares
    for i in range(N_BLOCKS):
        d = i * BLOCK_D + columns
        mask = (rows < n_rows) & (d < D)
        s = _load_sum(x_ptr + d, None if residual_ptr is None else residual_ptr + d, mask)
        squares += s * s
        if residual_ptr is not None:
            tl.store(stream_ptr + rows * D + d, s, mask=mask)
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    inverse = 1.0 if codes_ptr is None else 1.0 / tl.load(scale_ptr)
    largest = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i in range(N_BLOCKS):
        d = i * BLOCK_D + columns
        mask = (rows < n_rows) & (d < D)
        if N_BLOCKS > 1:
            s = _load_sum(x_ptr + d, None if residual_ptr is None else residual_ptr + d, mask)
        y = s * rstd
        if gain_ptr is not None:
            y *= _load(gain_ptr + d, d < D)
        tl.store(y_ptr + rows * D + d, y, mask=mask)
        if codes_ptr is not None:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # as it is stored: the codes are those of fp8_quantize
            tl.store(codes_ptr + rows * D + d, fp8_codes(y, inverse, codes_ptr.dtype.element_ty), mask=mask)
            if amax_ptr is not None:
                largest = tl.maximum(largest, tl.abs(y))  # NaN loses
    if amax_ptr is not None:
        raise_amax(amax_ptr, largest)


# Kernels: backward


@triton.jit
def _rmsnorm_bwd_kernel(
    dy_ptr, dstream_ptr, stream_ptr, gain_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dgain_ptr, n_rows, D,
    stride_dy, stride_ds, stride_s,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, N_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program loops over rows and writes the partial sum of their dgain to its row of `dgain_ptr` `[programs, D]`.

    The partial sum is kept in registers, or in memory for rows of several blocks. `dresidual_ptr` is None where dx
    serves as dresidual too, because both have one dtype.
    """
    columns = tl.arange(0, BLOCK_D)[None, :]
    dgain = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    gain = dgain
    if dgain_ptr is not None:
        dgain_ptr += tl.program_id(0).to(tl.int64) * D
    if N_BLOCKS > 1:
        tl.static_assert(BLOCK_R == 1, "dgain in memory takes one row at a time")
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
            tl.debug_barrier()  # another thread may have stored the partial sums that this one loads
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


# Launch parameters

MAX_BLOCK = 8192  # columns of a block; the backward spills registers at twice as many


@dataclass(frozen=True)
class RowTile:
    """Launch parameters of a size class.

    block_r: rows of a block of 1024 columns or more. Narrower blocks have more rows, for as many values.
    num_warps: warps of a program.
    num_stages: of the software pipeline over the rows of a program; backward only.
    programs_per_sm: backward only. The forward has a program for every block.
    """

    block_r: int
    num_warps: int
    num_stages: int = 1
    programs_per_sm: int = 0


# The key of a table: columns of a block, and whether the residual is float32.
SIZES = tuple((columns, fp32) for columns in (1024, 2048, 4096, 8192) for fp32 in (False, True))


def _columns(d: int) -> int:
    """Columns of a block for rows of width `d`, as a size class."""
    return min(MAX_BLOCK, max(1024, next_power_of_2(d)))


def _shapes(size):
    columns, fp32 = size
    widths = sorted({s["D"] for s in OP.bench_shapes if _columns(s["D"]) == columns})
    return tuple({"rows": 2**25 // columns, "D": d, "fp32_residual": int(fp32)} for d in widths)


def _scaled(size, *tiles):
    """Scale tiles for 1024 columns to a size: the same number of values per thread, and of warps per SM."""
    factor = size[0] // 1024
    scaled = (
        replace(t, num_warps=min(16, t.num_warps * factor), programs_per_sm=math.ceil(t.programs_per_sm / factor))
        for t in tiles
    )
    return tuple(dict.fromkeys(scaled))


def _forward_tiles(size):
    tiles = (1, 4), (1, 2), (2, 4), (4, 4), (2, 8), (4, 8), (1, 8), (1, 1)
    return _scaled(size, *(RowTile(*tile) for tile in tiles))


def _backward_tiles(size):
    """The first tile was the fastest on an H100 at 768 columns."""
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
        # Three stages of the widest rows exceed the shared memory of an MI300.
        size: {"": _backward_tiles(size)[0], "gfx942": replace(_backward_tiles(size)[0], num_stages=1)}
        for size in SIZES
    },
    _backward_tiles,
    _shapes,
    backward=True,
)


def _tile_and_options(table: LaunchTable, s: Tensor) -> tuple[RowTile, dict[str, int]]:
    """The tile for rows of `s`, and the constexprs and options of a launch that follow from it and the width."""
    d = s.shape[-1]
    columns = _columns(d)
    tile = table.pick((columns, s.dtype.itemsize > 2), card(s.device))
    block_d = min(columns, next_power_of_2(d))
    n_blocks = cdiv(d, block_d)
    block_r = tile.block_r * columns // block_d if n_blocks == 1 else 1
    return tile, {"BLOCK_R": block_r, "BLOCK_D": block_d, "N_BLOCKS": n_blocks, "num_warps": tile.num_warps}


# Torch ops and autograd


def _allocate_fwd(x, gain, residual, eps):
    s = x.new_empty(0) if residual is None else empty_like(residual)
    return empty_like(x), s, x.new_empty(x.shape[:-1], dtype=torch.float32)


@library_op(_allocate_fwd)
def _rmsnorm_fwd(x: Tensor, gain: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, s (empty without a residual) and rstd."""
    outputs = _allocate_fwd(x, gain, residual, eps)
    _launch_fwd(x, gain, residual, eps, *outputs)
    return outputs


def _allocate_fp8_fwd(x, gain, residual, eps, scale, amax):
    return *_allocate_fwd(x, gain, residual, eps), empty_like(x, dtype=E4M3.dtype)


@library_op(_allocate_fp8_fwd, mutates=("amax",))
def _rmsnorm_fp8_fwd(
    x: Tensor, gain: Tensor | None, residual: Tensor | None, eps: float, scale: Tensor, amax: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, s (empty without a residual), rstd and codes of y."""
    outputs = _allocate_fp8_fwd(x, gain, residual, eps, scale, amax)
    _launch_fwd(x, gain, residual, eps, *outputs, scale, amax)
    return outputs


def _launch_fwd(x, gain, residual, eps, y, s, rstd, codes=None, scale=None, amax=None) -> None:
    x = rows_of(x)
    residual = None if residual is None else rows_of(residual)
    _, options = _tile_and_options(FORWARD, x if residual is None else residual)
    _rmsnorm_fwd_kernel[(cdiv(x.shape[0], options["BLOCK_R"]),)](
        x, residual, gain, y, None if residual is None else s, rstd, codes, scale, amax,
        *x.shape, x.stride(0), 0 if residual is None else residual.stride(0), eps, **options,
    )  # fmt: skip


def _sum_rows(x: Tensor, out: Tensor) -> None:
    """Sum the programs' partial sums, `x` `[programs, D]` float32, into `out` `[D]` of any dtype, in a fixed order.

    One launch where `x.sum(0).to(dtype)` takes two. The many partial sums of a GPU are read 16 columns a program, which
    spreads a gain of 768 over 48 SMs.
    """
    n_rows, d = x.shape
    block_r = min(256, next_power_of_2(n_rows))
    block_d = 4096 // block_r
    _sum_rows_kernel[(cdiv(d, block_d),)](x, out, n_rows, d, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=8)


def _allocate_bwd(dy, ds, s, gain, rstd, separate):
    return (
        empty_like(s, dtype=dy.dtype),
        empty_like(s) if separate else s.new_empty(0),
        dy.new_empty(0) if gain is None else torch.empty_like(gain),
    )


@library_op(_allocate_bwd)
def _rmsnorm_bwd(
    dy: Tensor, ds: Tensor | None, s: Tensor, gain: Tensor | None, rstd: Tensor, separate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx in the dtype of `dy`, dresidual in the dtype of `s` (empty unless `separate`), and dgain."""
    dx, dresidual, dgain = _allocate_bwd(dy, ds, s, gain, rstd, separate)
    dy, s = rows_of(dy), rows_of(s)
    ds = None if ds is None else rows_of(ds)
    tile, options = _tile_and_options(BACKWARD, s)
    n_rows, d = s.shape
    programs = max(1, min(tile.programs_per_sm * n_sm(dy.device), cdiv(n_rows, options["BLOCK_R"])))
    partial_sums = None if gain is None else dy.new_empty((programs, d), dtype=torch.float32)
    _rmsnorm_bwd_kernel[(programs,)](
        dy, ds, s, gain, rstd, dx, dresidual if separate else None, partial_sums,
        n_rows, d, dy.stride(0), 0 if ds is None else ds.stride(0), s.stride(0),
        STAGES=tile.num_stages, **options,
    )  # fmt: skip
    if gain is not None:
        _sum_rows(partial_sums, dgain)
    return dx, dresidual, dgain


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, residual, eps, scale=None, amax=None):
        codes = None
        if scale is None:
            y, s, rstd = _rmsnorm_fwd(x, gain, residual, eps)
        else:
            y, s, rstd, codes = _rmsnorm_fp8_fwd(x, gain, residual, eps, scale, amax)
            ctx.mark_non_differentiable(codes)
        ctx.save_for_backward(x if residual is None else s, gain, rstd)
        ctx.dtype = x.dtype
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y, s, codes

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds, _):
        s, gain, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(s, dtype=ctx.dtype)
        separate = ctx.has_residual and s.dtype != ctx.dtype
        dx, dresidual, dgain = _rmsnorm_bwd(dy, ds if ctx.has_residual else None, s, gain, rstd, separate)
        if not separate:
            dresidual = dx if ctx.has_residual else None
        return dx, None if gain is None else dgain, dresidual, None, None, None


# Public function


def rmsnorm_triton(
    x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm by the Triton kernels, one pass forward and one backward; arguments of `rmsnorm_torch`.

    Deterministic: the gradient of the gain is summed in a fixed order.
    """
    _check(x, gain, residual)
    y, s, _ = _RMSNorm.apply(x, None if gain is None else gain.contiguous(), residual, eps)
    return y, x if residual is None else s


def rmsnorm_fp8_triton(
    x: Tensor,
    gain: Tensor | None,
    residual: Tensor | None,
    eps: float,
    scale: Tensor,
    amax: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm that also quantises its result, in the same pass; arguments of `rmsnorm_fp8_torch`."""
    _check(x, gain, residual)
    y, s, codes = _RMSNorm.apply(x, None if gain is None else gain.contiguous(), residual, eps, scale, amax)
    return y, x if residual is None else s, codes


# OP


def _inputs(shape, make):
    """The shape key `fp32_residual` makes the residual float32, whatever the dtype of x."""
    rows, d = shape["rows"], shape["D"]
    residual = make(rows, d)
    return {
        "x": make(rows, d),
        "gain": make(d),
        "residual": residual.float() if shape.get("fp32_residual") else residual,
    }


def _fp8_inputs(shape, make):
    inputs = _inputs(shape, make)
    one = torch.ones(1, device=inputs["x"].device)
    return inputs | {"eps": 1e-6, "scale": 0.01 * one, "amax": 0 * one}


def _cost(s, itemsize):
    """Reads x, residual and gain, writes y, the new residual and rstd."""
    residual = 4 if s.get("fp32_residual") else itemsize
    return Cost(s["rows"] * (s["D"] * 2 * (itemsize + residual) + 4) + s["D"] * itemsize, 5 * s["rows"] * s["D"])


def _fp8_cost(s, itemsize):
    """Writes the codes too."""
    cost = _cost(s, itemsize)
    return Cost(cost.bytes + s["rows"] * s["D"], cost.flops + 3 * s["rows"] * s["D"])


def _backward_cost(s, itemsize):
    """Reads dy, ds, s, rstd and gain; writes dx, which serves as dresidual unless their dtypes differ, and dgain."""
    residual = 4 if s.get("fp32_residual") else itemsize
    written = itemsize if residual == itemsize else itemsize + residual
    values = s["D"] * (itemsize + 2 * residual + written)
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
FP8_OP = Op(
    name="rmsnorm_fp8",
    implementations={"torch": rmsnorm_fp8_torch, "triton": rmsnorm_fp8_triton},
    inputs=_fp8_inputs,
    differentiable=("x", "gain", "residual"),
    cost=_fp8_cost,
    backward_cost=_backward_cost,
    test_shapes=({"rows": 1, "D": 1}, {"rows": 7, "D": 127}, {"rows": 2, "D": 8200}),
    bench_shapes=({"rows": 32768, "D": 768}, {"rows": 8192, "D": 2048}),
    compiled_shapes=({"rows": 32768, "D": 768, "fp32_residual": 1}, {"rows": 256, "D": 20480}),
    mutates=("amax",),
    cards=FP8_CARDS,
)
