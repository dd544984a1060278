"""Cross-entropy of logits, with label smoothing, z-loss and a softcap.

    z      = logits, or softcap * tanh(logits / softcap) with a softcap
    loss_i = logsumexp(z_i) - (1 - s) z_i[target_i] - s mean(z_i) + z_loss * logsumexp(z_i)^2,  s the label smoothing

Rows whose target is `ignore_index` have no loss and no gradient. With p = softmax(z) and lse_i = logsumexp(z_i),

    dz_i = p_i (1 + 2 z_loss lse_i) - (1 - s) onehot(target_i) - s / V

times the gradient of loss_i, and with a softcap times 1 - (z / softcap)^2.

The Triton kernels loop over rows. The forward reads a row once, with an online softmax per lane that is reduced across
lanes once per row. The backward reads the row again and rounds the gradient once, upstream gradient included. Saved for
backward: logits, targets, and three float32 values per row (m, sum_exp and z_target, below). If the upstream gradient
is known in advance (`cross_entropy_in_place`), one kernel computes the loss and overwrites the logits by their
gradient, rereading each row from L2. It also writes the FP8 codes of the gradient if it is given a place for them.

m is the largest logit of a row, and sum_exp the sum of exp(z_j - m) over all classes except the target. Leaving the
target out keeps the digits of confident rows, where m = z_target: the loss is log1p(sum_exp), and the gradient of the
target's logit is -sum_exp / (1 + sum_exp), where p - 1 would cancel.

Sources: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Chowdhery et al., "PaLM", 2022,
section 5 (z-loss).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from kernels.common import card, cdiv, fp8_codes, n_sm, next_power_of_2, rows_of, tanh
from kernels.formats import E5M2, codes_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

IGNORE = -1  # default target of ignored rows
Reduction = Literal["mean", "sum", "none"]
Options = tuple[float, float, float, int]  # label_smoothing, z_loss, softcap, ignore_index
LOG2E = tl.constexpr(1.4426950408889634)


# Reference


def cross_entropy_torch(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Cross-entropy in nats, the reference in plain torch.

    Args:
        logits: `[..., V]`.
        targets: `[...]` int64 in `[0, V)`, or `ignore_index`. Other targets raise on a CPU and are a device-side assert
            on a GPU. The Triton implementation does not synchronise: it returns NaN for such a row.
        reduction: `mean` over the rows that are not ignored (0 if all are), `sum`, or `none`.
        label_smoothing: probability mass spread evenly over all classes, 0 to 1.
        z_loss: coefficient of logsumexp^2, which keeps the logits from drifting.
        softcap: bound on the logits, applied by tanh; 0 for none.
        ignore_index: target of rows without loss and gradient.

    Returns:
        A scalar, or `[...]` for `none` (0 in ignored rows), in float32 or wider.
    """
    z = logits.flatten(0, -2).to(accumulation_dtype(logits))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    rows = F.cross_entropy(z, targets.flatten(), **options)
    if z_loss:
        rows = rows + z_loss * z.logsumexp(-1).square() * (targets.flatten() != ignore_index)
    if reduction == "none":
        return rows.view(targets.shape)
    return rows.sum() / n_counted(targets, ignore_index) if reduction == "mean" else rows.sum()


def cross_entropy_in_place_torch(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
    codes: Tensor | None = None,
    codes_scale: Tensor | None = None,
) -> None:
    """Loss and gradient in one call, for an upstream gradient that is known in advance; the reference in plain torch.

    Args:
        logits: `[N, width]`, overwritten by the gradient of sum(weights * loss). Its first `vocab_size` columns are
            classes; the others are padding and get a gradient of 0.
        targets: `[N]`.
        loss: `[N]`, float32 or wider, overwritten by the loss of each row.
        weights: the upstream gradient, a scalar or `[N]`; None for 1.
        label_smoothing, z_loss, softcap, ignore_index: as in `cross_entropy_torch`.
        vocab_size: number of classes; None for `width`.
        codes: e5m2 `[N, width]`, contiguous, overwritten by the gradient over `codes_scale`, rounded once; None to
            leave them out. They saturate; NaN stays.
        codes_scale: float32 `[1]`, what codes are multiplied by to give the gradient; more than 0.

    Raises:
        ValueError: `codes` do not fit the logits.
    """
    _check_codes(logits, codes, codes_scale)
    classes = logits[:, :vocab_size]
    z = classes.to(accumulation_dtype(logits))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    rows = cross_entropy_torch(classes, targets, "none", label_smoothing, z_loss, softcap, ignore_index)
    lse = z.logsumexp(-1, keepdim=True)
    dz = (z - lse).exp() * (1 + 2 * z_loss * lse) - label_smoothing / z.shape[1]
    minus_one_hot = torch.full_like(lse, label_smoothing - 1)
    dz = dz.scatter_add(1, targets.where(targets != ignore_index, 0)[:, None], minus_one_hot)
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    if weights is not None:
        dz = dz * weights.to(dz.dtype).expand(len(dz))[:, None]
    dz = F.pad(torch.where((targets != ignore_index)[:, None], dz, 0.0), (0, logits.shape[1] - dz.shape[1]))
    loss.copy_(rows)
    logits.copy_(dz)
    if codes is not None:
        codes.copy_(codes_of(dz, codes_scale, E5M2))


def _check_codes(logits: Tensor, codes: Tensor | None, codes_scale: Tensor | None) -> None:
    if (codes is None) != (codes_scale is None):
        raise ValueError("codes and codes_scale go together")
    if codes is not None and (codes.shape != logits.shape or codes.dtype != E5M2.dtype or not codes.is_contiguous()):
        raise ValueError(f"codes {list(codes.shape)} of {codes.dtype} are not contiguous e5m2 {list(logits.shape)}")


def n_counted(targets: Tensor, ignore_index: int) -> Tensor:
    """Number of rows that are not ignored, at least 1, as a tensor on their device (no synchronisation)."""
    return (targets != ignore_index).sum().clamp(min=1)


def check_arguments(targets: Tensor, leading: torch.Size, reduction: str) -> None:
    """Raise `ValueError` unless `targets` has the shape `leading` and the reduction is known."""
    if targets.shape != leading:
        raise ValueError(f"targets {list(targets.shape)} are not one for each of {list(leading)} rows")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of mean, sum, none")


# Kernels: one row at a time, in blocks of [DEPTH, LANES] columns


@triton.jit
def _exp(x):
    """exp(x) for x <= 0, by one exp2. The maximum is subtracted before scaling, so that exp(0) is exactly 1."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """log(1 + x), accurate for small x: it divides out the rounding of 1 + x (Goldberg, 1991, theorem 4)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    """Logits in float32, tanh-capped if SOFTCAP."""
    if SOFTCAP:
        return softcap * tanh(z.to(tl.float32) / softcap, z.dtype != tl.float32)
    return z.to(tl.float32)


@triton.jit
def _columns(start, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Column indices of a block, `[DEPTH, LANES]`.

    A lane belongs to one thread. So reductions over DEPTH stay within a thread, which has DEPTH independent loads in
    flight.
    """
    return start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _online_softmax(
    z, columns, target, has_target, m_i, l_i, z_sum, softcap, V,
    MASKED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online-softmax update over the non-target classes, per lane; also sums the logits for label smoothing.

    MASKED: the block has columns beyond the V classes.
    """
    z = _capped(z, softcap, SOFTCAP)
    if SMOOTH:
        z_sum += tl.sum(tl.where(columns < V, z, 0.0) if MASKED else z, axis=0)
    if MASKED:
        z = tl.where(columns < V, z, float("-inf"))
    if has_target:  # a uniform branch: only one block of a row has the target
        z = tl.where(columns == target, float("-inf"), z)
    m_new = tl.maximum(m_i, tl.max(z, axis=0))
    return m_new, l_i * _exp(m_i - m_new) + tl.sum(_exp(z - m_new[None, :]), axis=0), z_sum


@triton.jit
def _log_sum(m, sum_exp, z_target):
    """logsumexp(z) - m, from the sum over the non-target classes and the target's logit."""
    return tl.where(z_target >= m, _log1p(sum_exp), tl.log(_exp(z_target - m) + sum_exp))


@triton.jit
def _gradient(z, m, scale, smooth, counted, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr):
    """Gradient of the non-target logits: exp(z - m) * scale - smooth, times the softcap's derivative."""
    z = _capped(z, softcap, SOFTCAP)
    dz = _exp(z - m) * scale
    if SMOOTH:
        dz -= smooth
    if SOFTCAP:
        dz *= 1 - (z / softcap) * (z / softcap)
    if counted == 0:  # ignored rows: exactly 0, even for NaN logits
        dz = tl.zeros_like(dz)
    return dz


@triton.jit
def _store_codes(codes_ptr, columns, dz, inverse, mask):
    """Store the FP8 codes of dz * inverse, if there is a place for them."""
    if codes_ptr is not None:
        ptrs = codes_ptr + columns
        if columns.type.is_block():  # 8 to a thread, as the logits; else Triton takes 16, and moves all between threads
            ptrs = tl.max_contiguous(ptrs, [1, 8])
        tl.store(ptrs, fp8_codes(dz, inverse, codes_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, codes_ptr, target, m, sum_exp, z_target, weight, inverse,
    label_smoothing, z_loss, softcap, V, width,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a row times `weight`, and 0 in its padding, columns `V` to `width`; its FP8 codes too, of
    the gradient times `inverse`, unless `codes_ptr` is None.

    Blocks run from the last to the first: the end of a row that was just read is the likeliest to be in L2.
    """
    exp_target = _exp(z_target - m)
    denominator = exp_target + sum_exp
    lse_slope = 2 * z_loss * (m + _log_sum(m, sum_exp, z_target))
    scale = weight * (1 + lse_slope) / denominator
    smooth = weight * label_smoothing / V
    counted = weight != 0

    BLOCK: tl.constexpr = DEPTH * LANES
    end = V // BLOCK * BLOCK
    for start in range(end, width, LANES):
        columns = _columns(start, 1, LANES)
        z = tl.load(logits_ptr + columns, mask=columns < width, other=0.0)
        dz = tl.where(columns < V, _gradient(z, m, scale, smooth, counted, softcap, SMOOTH, SOFTCAP), 0.0)
        tl.store(dlogits_ptr + columns, dz, mask=columns < width)
        _store_codes(codes_ptr, columns, dz, inverse, columns < width)
    for start in range(0, end, BLOCK):
        columns = _columns(end - BLOCK - start, DEPTH, LANES)
        z = tl.load(logits_ptr + columns, eviction_policy="evict_first")
        dz = _gradient(z, m, scale, smooth, counted, softcap, SMOOTH, SOFTCAP)
        tl.store(dlogits_ptr + columns, dz, eviction_policy="evict_first")
        _store_codes(codes_ptr, columns, dz, inverse, None)

    dz_target = weight * (lse_slope * exp_target / denominator - sum_exp / denominator + label_smoothing) - smooth
    if SOFTCAP:
        dz_target *= 1 - (z_target / softcap) * (z_target / softcap)
    tl.debug_barrier()  # another thread has stored to this column as if it were a non-target class
    tl.store(dlogits_ptr + target, dz_target, mask=counted)
    _store_codes(codes_ptr, target, dz_target, inverse, counted)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, loss_ptr, stats_ptr, codes_ptr, codes_scale_ptr, n_rows, stride_z, stride_w,
    label_smoothing, z_loss, softcap, ignore_index, V, width, GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss of each row. Also stores m, sum_exp and z_target if `stats_ptr` is given, the gradient in place of the
    logits if GRADIENT, and its codes if `codes_ptr` is given too."""
    BLOCK: tl.constexpr = DEPTH * LANES
    end = V // BLOCK * BLOCK  # of the full blocks; the tail of a row is read in masked blocks of depth 1
    policy: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * stride_z
        target = tl.load(targets_ptr + row)
        ignored = target == ignore_index
        valid = (target >= 0) & (target < V) & (target != ignore_index)
        target = tl.where(valid, target, -1).to(tl.int32)

        m_i = tl.full([LANES], -1e30, tl.float32)  # finite, so that -inf - m_i is no NaN
        l_i = tl.zeros([LANES], tl.float32)
        z_sum = tl.zeros([LANES], tl.float32)
        for start in range(0, end, BLOCK):
            columns = _columns(start, DEPTH, LANES)
            z = tl.load(row_ptr + columns, eviction_policy=policy)
            has_target = (start <= target) & (target < start + BLOCK)
            m_i, l_i, z_sum = _online_softmax(
                z, columns, target, has_target, m_i, l_i, z_sum, softcap, V, False, SMOOTH, SOFTCAP
            )  # fmt: skip
        for start in range(end, width, LANES):
            columns = _columns(start, 1, LANES)
            z = tl.load(row_ptr + columns, mask=columns < width, other=0.0, eviction_policy=policy)
            m_i, l_i, z_sum = _online_softmax(
                z, columns, target, target >= end, m_i, l_i, z_sum, softcap, V, True, SMOOTH, SOFTCAP
            )  # fmt: skip
        # Loaded only now: before the loops, the loads of the row would queue behind a load that waits for `target`.
        z_target = _capped(tl.load(row_ptr + target, mask=valid, other=0.0), softcap, SOFTCAP)
        m_others = tl.max(m_i, axis=0)
        sum_exp = tl.sum(l_i * _exp(m_i - m_others), axis=0)

        m = tl.maximum(m_others, z_target)
        sum_exp *= _exp(m_others - m)
        log_sum = _log_sum(m, sum_exp, z_target)
        lse = m + log_sum
        loss = log_sum + (m - z_target) + z_loss * lse * lse  # m - z_target is exactly 0 for confident rows
        if SMOOTH:
            loss += label_smoothing * (z_target - tl.sum(z_sum, axis=0) / V)
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.where(valid, loss, float("nan"))))
        if stats_ptr is not None:
            tl.store(stats_ptr + row, m)
            tl.store(stats_ptr + n_rows + row, sum_exp)
            tl.store(stats_ptr + 2 * n_rows + row, z_target)
        if GRADIENT:
            weight, inverse, row_codes_ptr = 1.0, 1.0, None
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + tl.cast(row, tl.int64) * stride_w).to(tl.float32)
            if codes_ptr is not None:
                inverse, row_codes_ptr = 1 / tl.load(codes_scale_ptr), codes_ptr + tl.cast(row, tl.int64) * width
            _store_gradient(
                row_ptr, row_ptr, row_codes_ptr, target, m, sum_exp, z_target, tl.where(valid, weight, 0.0), inverse,
                label_smoothing, z_loss, softcap, V, width, SMOOTH, SOFTCAP, DEPTH, LANES,
            )  # fmt: skip


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, stats_ptr, dlogits_ptr, n_rows, stride_z, stride_dz, stride_w,
    label_smoothing, z_loss, softcap, ignore_index, V, width,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradient of each row, from the statistics that the forward saved; `weights` is the gradient of the losses."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row64 = tl.cast(row, tl.int64)
        target = tl.load(targets_ptr + row)
        valid = (target >= 0) & (target < V) & (target != ignore_index)
        weight = tl.where(valid, tl.load(weights_ptr + row64 * stride_w).to(tl.float32), 0.0)
        m = tl.load(stats_ptr + row)
        sum_exp = tl.load(stats_ptr + n_rows + row)
        z_target = tl.load(stats_ptr + 2 * n_rows + row)
        _store_gradient(
            logits_ptr + row64 * stride_z, dlogits_ptr + row64 * stride_dz, None, target.to(tl.int32),
            m, sum_exp, z_target, weight, 1.0,
            label_smoothing, z_loss, softcap, V, width, SMOOTH, SOFTCAP, DEPTH, LANES,
        )  # fmt: skip


# Launch parameters

SIZES = (1024, 8192, 65536, 2**31)  # the key of a table: the smallest that is not below the vocabulary


@dataclass(frozen=True)
class RowTile:
    """Launch parameters of a size class.

    depth, lanes: a block has `depth * lanes` columns of a row.
    num_warps: warps of a program.
    ctas_per_sm: programs per SM; each loops over rows. Half of the rows in flight should fit L2, where they are reread.
    """

    depth: int
    lanes: int
    num_warps: int
    ctas_per_sm: int


def _candidates(size: int) -> Iterator[RowTile]:
    """Tiles of 8 values per thread and depth, one 128-bit load in half precision; 16 to 32 warps per SM."""
    for depth, warps, ctas in product((4, 2, 1), (8, 4, 16, 2, 1, 32), (2, 4, 1, 3, 8, 16)):
        if depth * warps * 256 <= size and 16 <= ctas * warps <= (24 if depth == 4 else 32):
            yield RowTile(depth, warps * 256, warps, ctas)


def _shapes(size: int) -> tuple[dict[str, int], ...]:
    vocabularies = {1024: (1000,), 8192: (8192,), 65536: (50304, 50257), 2**31: (128256,)}[size]
    return tuple({"N": max(4096, 2**26 // v), "V": v} for v in vocabularies)


def _table(kernel: str, backward: bool = False) -> LaunchTable:
    entries = {
        1024: {"": RowTile(4, 256, num_warps=1, ctas_per_sm=16)},
        8192: {
            "": RowTile(4, 512, num_warps=2, ctas_per_sm=8),
            "sm_100": RowTile(2, 512, num_warps=2, ctas_per_sm=8),  # a depth of 4 spills on this card
        },
        65536: {
            "": RowTile(4, 2048, num_warps=8, ctas_per_sm=2),
            "sm_120": RowTile(4, 4096, num_warps=16, ctas_per_sm=1),  # 8 warps spill on this card
        },
        2**31: {"": RowTile(4, 4096, num_warps=16, ctas_per_sm=1)},
    }
    return LaunchTable(kernel, entries, _candidates, _shapes, backward)


LOSS = _table("_cross_entropy_fwd_kernel")
GRADIENT = _table("_cross_entropy_bwd_kernel", backward=True)
IN_PLACE = _table("_cross_entropy_fwd_kernel, GRADIENT")


# Torch ops and autograd


def _launch(kernel, table: LaunchTable, logits: Tensor, vocab_size: int, options: Options, *arguments, **constants):
    """Launch `kernel` on the rows of `logits` `[N, width]`; the first `vocab_size` columns are classes."""
    n, width = logits.shape
    label_smoothing, _, softcap, _ = options
    tile = table.pick(next(size for size in SIZES if vocab_size <= size), card(logits.device))
    lanes = min(tile.lanes, next_power_of_2(width))
    depth = min(tile.depth, next_power_of_2(cdiv(width, lanes)))
    if n:
        kernel[(min(n, tile.ctas_per_sm * n_sm(logits.device)),)](
            logits, *arguments, *options, vocab_size, width, **constants,
            SMOOTH=label_smoothing != 0, SOFTCAP=softcap != 0, DEPTH=depth, LANES=lanes, num_warps=tile.num_warps,
        )  # fmt: skip


def launch_loss(
    logits: Tensor, targets: Tensor, loss: Tensor, stats: Tensor | None, options: Options, vocab_size: int
) -> None:
    """Write the loss of each row of `logits` `[N, width]`; and m, sum_exp, z_target to `stats` `[3, N]` unless None."""
    arguments = targets, None, loss, stats, None, None, len(logits), logits.stride(0), 0
    _launch(_cross_entropy_fwd_kernel, LOSS, logits, vocab_size, options, *arguments, GRADIENT=False)


def launch_in_place(
    logits: Tensor, targets: Tensor, loss: Tensor, weights: Tensor | None, options: Options, vocab_size: int,
    codes: Tensor | None = None, codes_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel of `cross_entropy_in_place_triton`, on tensors that it accepts."""
    stride_w = weights.stride(0) if weights is not None and weights.ndim else 0
    arguments = targets, weights, loss, None, codes, codes_scale, len(logits), logits.stride(0), stride_w
    _launch(_cross_entropy_fwd_kernel, IN_PLACE, logits, vocab_size, options, *arguments, GRADIENT=True)


def _launch_backward(dloss, logits, targets, stats, dlogits, options):
    strides = logits.stride(0), dlogits.stride(0), dloss.stride(0)
    arguments = targets, dloss, stats, dlogits, len(logits), *strides
    _launch(_cross_entropy_bwd_kernel, GRADIENT, logits, logits.shape[1], options, *arguments)


def _allocate_fwd(logits, targets, label_smoothing, z_loss, softcap, ignore_index):
    n = len(logits)
    return logits.new_empty(n, dtype=torch.float32), logits.new_empty((3, n), dtype=torch.float32)


@library_op(_allocate_fwd)
def _cross_entropy_fwd(
    logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each row, `[N]`, and its statistics for the backward, `[3, N]`."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, stats = outputs = _allocate_fwd(logits, targets, *options)
    launch_loss(logits, targets, loss, stats, options, logits.shape[1])
    return outputs


def _allocate_bwd(dloss, logits, targets, stats, label_smoothing, z_loss, softcap, ignore_index):
    n, v = logits.shape
    return logits.new_empty((n, cdiv(v, 16) * 16))[:, :v]  # rows start at multiples of 16 bytes, for 128-bit stores


@library_op(_allocate_bwd)
def _cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, stats: Tensor,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Returns dlogits `[N, V]` for `dloss` `[N]`."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    dlogits = _allocate_bwd(dloss, logits, targets, stats, *options)
    _launch_backward(dloss, logits, targets, stats, dlogits, options)
    return dlogits


@library_op(lambda *arguments: None, mutates=("logits",))
def _cross_entropy_bwd_(
    dloss: Tensor, logits: Tensor, targets: Tensor, stats: Tensor,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int,
) -> None:  # fmt: skip
    """`_cross_entropy_bwd` in place: overwrites the logits by their gradient."""
    _launch_backward(dloss, logits, targets, stats, logits, (label_smoothing, z_loss, softcap, ignore_index))
    increment_version(logits)  # autograd then refuses a second backward, and any other that saved the logits


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row; reductions are left to torch."""

    @staticmethod
    def forward(ctx, logits, targets, options, inplace):
        loss, stats = _cross_entropy_fwd(logits, targets, *options)
        ctx.save_for_backward(logits, targets, stats)
        ctx.options, ctx.inplace = options, inplace
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, *saved = ctx.saved_tensors
        if ctx.inplace:
            _cross_entropy_bwd_(dloss, logits, *saved, *ctx.options)
            return logits, None, None, None
        return _cross_entropy_bwd(dloss, logits, *saved, *ctx.options), None, None, None


# Public functions


def cross_entropy_triton(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy by the Triton kernels, without synchronisation; arguments of `cross_entropy_torch`.

    With `inplace` the backward overwrites the logits by their gradient. `logits` must then be an intermediate result
    that nothing else needs, and only one backward is possible.
    """
    check_arguments(targets, logits.shape[:-1], reduction)
    flat = logits.flatten(0, -2)
    if inplace and (flat.data_ptr() != logits.data_ptr() or flat.stride(-1) != 1):
        raise ValueError(f"logits of strides {logits.stride()} cannot be flattened in place; give contiguous ones")
    options = (label_smoothing, z_loss, softcap, ignore_index)
    rows = _CrossEntropy.apply(rows_of(flat), targets.flatten().contiguous(), options, inplace)
    if reduction == "none":
        return rows.view(targets.shape)
    return rows.sum() / n_counted(targets, ignore_index) if reduction == "mean" else rows.sum()


@library_op(lambda *arguments: None, mutates=("logits", "loss", "codes"))
def _cross_entropy_in_place(
    logits: Tensor, targets: Tensor, loss: Tensor, weights: Tensor | None,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int, vocab_size: int,
    codes: Tensor | None, codes_scale: Tensor | None,
) -> None:  # fmt: skip
    options = (label_smoothing, z_loss, softcap, ignore_index)
    launch_in_place(logits, targets, loss, weights, options, vocab_size, codes, codes_scale)
    increment_version([x for x in (logits, loss, codes) if x is not None])


def cross_entropy_in_place_triton(
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
    codes: Tensor | None = None,
    codes_scale: Tensor | None = None,
) -> None:
    """Loss and gradient by one Triton kernel; arguments of `cross_entropy_in_place_torch`.

    The last dimension of `logits`, `targets` and `loss` must be contiguous, or `ValueError` is raised.
    """
    if logits.stride(-1) != 1 or not (targets.is_contiguous() and loss.is_contiguous()):
        raise ValueError(f"logits of strides {logits.stride()}, targets and loss must be contiguous to work in place")
    _check_codes(logits, codes, codes_scale)
    options = (label_smoothing, z_loss, softcap, ignore_index)
    _cross_entropy_in_place(logits, targets, loss, weights, *options, vocab_size or logits.shape[1], codes, codes_scale)


# OP


def random_targets(n: int, v: int, make) -> Tensor:
    """Targets `[N]` for tests and benches; every third row is ignored."""
    targets = (make(n).float().abs() * 1e4).long() % v
    targets[::3] = IGNORE
    return targets


def _inputs(shape, make):
    n, v = shape["N"], shape["V"]
    return {"logits": make(n, -(-v // 64) * 64)[:, :v], "targets": random_targets(n, v, make)}  # aligned rows


def _in_place_inputs(shape, make):
    n, v = shape["N"], shape["V"]
    logits, loss = make(n, -(-v // 64) * 64), make(n).float()  # padded and aligned, as in linear cross-entropy
    inputs = {"logits": logits, "targets": random_targets(n, v, make), "loss": loss, "vocab_size": v, "codes": None}
    if shape.get("codes"):  # as the FP8 head asks for them
        codes, scale = torch.empty_like(logits, dtype=E5M2.dtype), torch.full_like(loss[:1], 2**-13)
        inputs |= {"weights": torch.ones_like(loss[0]), "codes": codes, "codes_scale": scale}
    return inputs


def _in_place_cost(s, itemsize):
    """Reads logits, writes their gradient and its codes."""
    return Cost(s["N"] * s["V"] * (2 * itemsize + s.get("codes", 0)) + 12 * s["N"], 8 * s["N"] * s["V"])


OP = Op(
    name="cross_entropy",
    implementations={"torch": cross_entropy_torch, "triton": cross_entropy_triton},
    inputs=_inputs,
    differentiable=("logits",),
    cost=lambda s, itemsize: Cost(s["N"] * s["V"] * itemsize + 12 * s["N"], 4 * s["N"] * s["V"]),
    backward_cost=lambda s, itemsize: Cost(2 * s["N"] * s["V"] * itemsize + 16 * s["N"], 4 * s["N"] * s["V"]),
    test_shapes=({"N": 1, "V": 2}, {"N": 7, "V": 101}, {"N": 5, "V": 9001}),
    bench_shapes=tuple({"N": 4096, "V": v} for v in (50257, 50304, 128256)),
    launches=(LOSS, GRADIENT),
)

IN_PLACE_OP = Op(
    name="cross_entropy_in_place",
    implementations={"torch": cross_entropy_in_place_torch, "triton": cross_entropy_in_place_triton},
    inputs=_in_place_inputs,
    differentiable=(),
    mutates=("logits", "loss", "codes"),
    cost=_in_place_cost,
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=(*OP.test_shapes, {"N": 7, "V": 101, "codes": 1}),
    bench_shapes=(*OP.bench_shapes, *(dict(shape) | {"codes": 1} for shape in OP.bench_shapes)),
    launches=(IN_PLACE,),
)
