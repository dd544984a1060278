"""Cross-entropy of logits, with label smoothing, z-loss and a softcap.

    z      = logits, or softcap * tanh(logits / softcap) with a softcap
    loss_i = logsumexp(z_i) - (1 - s) z_i[target_i] - s mean(z_i) + z_loss * logsumexp(z_i)^2,  s the label smoothing

Rows whose target is `ignore_index` have no loss and no gradient. With p = softmax(z) and lse_i = logsumexp(z_i),

    dz_i = p_i (1 + 2 z_loss lse_i) - (1 - s) onehot(target_i) - s / V

times the gradient of loss_i, and with a softcap times 1 - (z / softcap)^2.

The Triton kernels walk over rows. The forward pass reads a row once and keeps an online softmax in every lane, which is
reduced across lanes once a row. The backward pass reads the row again and rounds the gradient once, whatever gradient
arrives. Saved for backward: logits, targets, and three float32 values a row (m, rest and z_target below). A caller that
knows the gradient of the loss beforehand (`loss_and_gradient`) has both in one kernel, which finds the row in L2.

With m the largest logit of a row and rest the sum of exp(z_j - m) over the other classes than the target, the loss of a
confident row (m = z_target) is log1p(rest), and its target's gradient is -rest / (1 + rest): nothing cancels, as it
would in p - 1.

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

from kernels.common import card, cdiv, n_sm, next_power_of_2, rows_of, tanh
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

IGNORE = -1  # the target of rows that do not count
Reduction = Literal["mean", "sum", "none"]
Options = tuple[float, float, float, int]  # label_smoothing, z_loss, softcap, ignore_index
LOG2E = tl.constexpr(1.4426950408889634)


def cross_entropy_torch(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Cross-entropy of `logits` against `targets`, in nats.

    Args:
        logits: `[..., V]`.
        targets: `[...]` int64 in `[0, V)`, or `ignore_index`. Others are an error: raised here on a CPU, an assertion
            of the device on a GPU; the Triton implementation, which waits for no device, gives NaN for the row.
        reduction: `mean` over the rows not ignored (0 when all are), `sum`, or `none`.
        label_smoothing: share of the target's probability spread over all classes, 0 to 1.
        z_loss: factor of the squared log-partition, which keeps the logits from drifting.
        softcap: bound that the logits are squeezed under by tanh; 0 for none.
        ignore_index: the target of rows that do not count.

    Returns:
        A scalar, or `[...]` for `none` (0 where ignored), in float32 or wider.
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
) -> None:
    """Loss and gradient at once, where the gradient that will arrive is known beforehand.

    Args:
        logits: `[N, width]`, overwritten by the gradient of the sum of `weights * loss`. Its first `vocab_size` columns
            (None for all) are classes, the others are padding, and their gradient 0.
        targets: `[N]`.
        loss: `[N]`, float32 or wider, overwritten by the loss of each row.
        weights: a scalar or `[N]`; None for 1.
    """
    classes = logits[:, :vocab_size]
    z = classes.to(accumulation_dtype(logits))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    rows = cross_entropy_torch(classes, targets, "none", label_smoothing, z_loss, softcap, ignore_index)
    lse = z.logsumexp(-1, keepdim=True)
    dz = (z - lse).exp() * (1 + 2 * z_loss * lse) - label_smoothing / z.shape[1]
    at_target = torch.full_like(lse, label_smoothing - 1)
    dz = dz.scatter_add(1, targets.where(targets != ignore_index, 0)[:, None], at_target)
    if softcap:
        dz = dz * (1 - (z / softcap).square())
    if weights is not None:
        dz = dz * weights.to(dz.dtype).expand(len(dz))[:, None]
    loss.copy_(rows)
    logits.zero_()[:, :vocab_size] = torch.where((targets != ignore_index)[:, None], dz, 0.0)


def n_counted(targets: Tensor, ignore_index: int) -> Tensor:
    """Number of rows that are not ignored, at least 1; left on the device."""
    return (targets != ignore_index).sum().clamp(min=1)


def check_arguments(targets: Tensor, leading: torch.Size, reduction: str) -> None:
    """Raise `ValueError` where targets are not one a row, or the reduction is unknown."""
    if targets.shape != leading:
        raise ValueError(f"targets {list(targets.shape)} are not one for each of {list(leading)} rows")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of mean, sum, none")


# Kernels.


@triton.jit
def _exp(x):
    """exp(x) of x <= 0, the largest of which is 0: one exp2, whose argument was subtracted before it was scaled."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """log(1 + x) for small x too: the rounding of 1 + x is divided out (Goldberg, 1991, theorem 4)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    """Logits in float32, under the softcap if there is one."""
    if SOFTCAP:
        return softcap * tanh(z.to(tl.float32) / softcap, z.dtype != tl.float32)
    return z.to(tl.float32)


@triton.jit
def _columns(start, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """`[DEPTH, LANES]` columns from `start`. A thread has whole columns of this tile, so that reductions over DEPTH
    cross no threads, and all its loads are on their way before the first is needed."""
    return start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _online_softmax(
    z, columns, target, has_target, m_i, l_i, z_sum, softcap, V,
    MASKED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Update each lane's maximum and sum of exp(z - m_i), both without the target, and for label smoothing the sum of
    z. A `MASKED` block reaches beyond the classes."""
    z = _capped(z, softcap, SOFTCAP)
    if SMOOTH:
        z_sum += tl.sum(tl.where(columns < V, z, 0.0) if MASKED else z, axis=0)
    if MASKED:
        z = tl.where(columns < V, z, float("-inf"))
    if has_target:  # a branch, so that one block of a row pays for it
        z = tl.where(columns == target, float("-inf"), z)
    m_new = tl.maximum(m_i, tl.max(z, axis=0))
    return m_new, l_i * _exp(m_i - m_new) + tl.sum(_exp(z - m_new[None, :]), axis=0), z_sum


@triton.jit
def _log_sum(m, rest, z_target):
    """log of the sum of exp(z - m) over all classes."""
    return tl.where(z_target >= m, _log1p(rest), tl.log(_exp(z_target - m) + rest))


@triton.jit
def _gradient(z, m, scale, smooth, counted, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr):
    """Of classes other than the target."""
    z = _capped(z, softcap, SOFTCAP)
    dz = _exp(z - m) * scale
    if SMOOTH:
        dz -= smooth
    if SOFTCAP:
        dz *= 1 - (z / softcap) * (z / softcap)
    if counted == 0:  # whatever the logits are
        dz = tl.zeros_like(dz)
    return dz


@triton.jit
def _store_gradient(
    logits_ptr, dlogits_ptr, target, m, rest, z_target, weight, label_smoothing, z_loss, softcap, V, width,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`weight` times the gradient of a row; 0 in its padding, columns `V` to `width`.

    Blocks go from the last to the first: of a row that was just read, the end is the likeliest to be in L2."""
    exp_target = _exp(z_target - m)
    total = exp_target + rest
    lse_slope = 2 * z_loss * (m + _log_sum(m, rest, z_target))
    scale = weight * (1 + lse_slope) / total
    smooth = weight * label_smoothing / V
    counted = weight != 0

    BLOCK: tl.constexpr = DEPTH * LANES
    end = V // BLOCK * BLOCK
    for start in range(end, width, LANES):
        columns = _columns(start, 1, LANES)
        z = tl.load(logits_ptr + columns, mask=columns < width, other=0.0)
        dz = _gradient(z, m, scale, smooth, counted, softcap, SMOOTH, SOFTCAP)
        tl.store(dlogits_ptr + columns, tl.where(columns < V, dz, 0.0), mask=columns < width)
    for start in range(0, end, BLOCK):
        columns = _columns(end - BLOCK - start, DEPTH, LANES)
        z = tl.load(logits_ptr + columns, eviction_policy="evict_first")
        dz = _gradient(z, m, scale, smooth, counted, softcap, SMOOTH, SOFTCAP)
        tl.store(dlogits_ptr + columns, dz, eviction_policy="evict_first")

    at_target = weight * (lse_slope * exp_target / total - rest / total + label_smoothing) - smooth
    if SOFTCAP:
        at_target *= 1 - (z_target / softcap) * (z_target / softcap)
    tl.debug_barrier()  # after the store of what another thread made of the target's logit
    tl.store(dlogits_ptr + target, at_target, mask=counted)


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, loss_ptr, stats_ptr, n_rows, stride_z, stride_w,
    label_smoothing, z_loss, softcap, ignore_index, V, width, GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss of each row; what the backward needs where `stats_ptr` is given, with GRADIENT the gradient in place."""
    BLOCK: tl.constexpr = DEPTH * LANES
    end = V // BLOCK * BLOCK  # of full blocks; the rest of a row is taken in shallow ones, which are masked
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
        # Not before: where it waits for `target`, the loads of the row would wait behind it.
        z_target = _capped(tl.load(row_ptr + target, mask=valid, other=0.0), softcap, SOFTCAP)
        m_others = tl.max(m_i, axis=0)
        rest = tl.sum(l_i * _exp(m_i - m_others), axis=0)

        m = tl.maximum(m_others, z_target)
        rest *= _exp(m_others - m)
        log_sum = _log_sum(m, rest, z_target)
        lse = m + log_sum
        loss = log_sum + (m - z_target) + z_loss * lse * lse  # m - z_target is 0 where it would cancel
        if SMOOTH:
            loss += label_smoothing * (z_target - tl.sum(z_sum, axis=0) / V)
        tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.where(valid, loss, float("nan"))))
        if stats_ptr is not None:
            tl.store(stats_ptr + row, m)
            tl.store(stats_ptr + n_rows + row, rest)
            tl.store(stats_ptr + 2 * n_rows + row, z_target)
        if GRADIENT:
            weight = 1.0
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + tl.cast(row, tl.int64) * stride_w).to(tl.float32)
            _store_gradient(
                row_ptr, row_ptr, target, m, rest, z_target, tl.where(valid, weight, 0.0),
                label_smoothing, z_loss, softcap, V, width, SMOOTH, SOFTCAP, DEPTH, LANES,
            )  # fmt: skip


@triton.jit
def _cross_entropy_bwd_kernel(
    logits_ptr, targets_ptr, weights_ptr, stats_ptr, dlogits_ptr, n_rows, stride_z, stride_dz, stride_w,
    label_smoothing, z_loss, softcap, ignore_index, V, width,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The gradient of each row, `weights` of its loss, from what the forward saved."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        far = tl.cast(row, tl.int64)
        target = tl.load(targets_ptr + row)
        valid = (target >= 0) & (target < V) & (target != ignore_index)
        weight = tl.where(valid, tl.load(weights_ptr + far * stride_w).to(tl.float32), 0.0)
        m = tl.load(stats_ptr + row)
        rest = tl.load(stats_ptr + n_rows + row)
        z_target = tl.load(stats_ptr + 2 * n_rows + row)
        _store_gradient(
            logits_ptr + far * stride_z, dlogits_ptr + far * stride_dz, target.to(tl.int32), m, rest, z_target,
            weight, label_smoothing, z_loss, softcap, V, width, SMOOTH, SOFTCAP, DEPTH, LANES,
        )  # fmt: skip


# Launch parameters, by the smallest of SIZES that the vocabulary fits.

SIZES = (1024, 8192, 65536, 2**31)


@dataclass(frozen=True)
class RowTile:
    """`depth` x `lanes` columns of a row are worked on at a time, by one of `ctas_per_sm` programs a multiprocessor,
    each of which takes row after row. Half of all rows in work should fit L2, where they are read again."""

    depth: int
    lanes: int
    num_warps: int
    ctas_per_sm: int


def _candidates(size: int) -> Iterator[RowTile]:
    """8 values a lane are one 128-bit load in half precision. Of 4 deep tiles registers hold 16 to 24 warps' worth."""
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
            "sm_100": RowTile(2, 512, num_warps=2, ctas_per_sm=8),  # the other spills there
        },
        65536: {
            "": RowTile(4, 2048, num_warps=8, ctas_per_sm=2),
            "sm_120": RowTile(4, 4096, num_warps=16, ctas_per_sm=1),  # likewise
        },
        2**31: {"": RowTile(4, 4096, num_warps=16, ctas_per_sm=1)},
    }
    return LaunchTable(kernel, entries, _candidates, _shapes, backward)


LOSS = _table("_cross_entropy_fwd_kernel")
GRADIENT = _table("_cross_entropy_bwd_kernel", backward=True)
IN_PLACE = _table("_cross_entropy_fwd_kernel, GRADIENT")


def _launch(kernel, table: LaunchTable, logits: Tensor, vocab_size: int, options: Options, *arguments, **constants):
    """Launch `kernel` on the rows of `logits` `[N, width]`, of which the first `vocab_size` columns are classes."""
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
    """Write the loss of each row of `[N, width]`, and to `stats` `[3, N]` what its gradient is made from."""
    arguments = targets, None, loss, stats, len(logits), logits.stride(0), 0
    _launch(_cross_entropy_fwd_kernel, LOSS, logits, vocab_size, options, *arguments, GRADIENT=False)


def launch_in_place(
    logits: Tensor, targets: Tensor, loss: Tensor, weights: Tensor | None, options: Options, vocab_size: int
) -> None:
    """What `cross_entropy_in_place_torch` does."""
    stride_w = weights.stride(0) if weights is not None and weights.ndim else 0
    arguments = targets, weights, loss, None, len(logits), logits.stride(0), stride_w
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
    """Loss of each row of `[N, V]`, and what its gradient is made from."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, stats = outputs = _allocate_fwd(logits, targets, *options)
    launch_loss(logits, targets, loss, stats, options, logits.shape[1])
    return outputs


def _allocate_bwd(dloss, logits, targets, stats, label_smoothing, z_loss, softcap, ignore_index):
    n, v = logits.shape
    return logits.new_empty((n, cdiv(v, 16) * 16))[:, :v]  # rows begin on 16 bytes, so that they store wide


@library_op(_allocate_bwd)
def _cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, stats: Tensor,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """Gradient of the logits from that of each row's loss."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    dlogits = _allocate_bwd(dloss, logits, targets, stats, *options)
    _launch_backward(dloss, logits, targets, stats, dlogits, options)
    return dlogits


@library_op(lambda *arguments: None, mutates=("logits",))
def _cross_entropy_bwd_(
    dloss: Tensor, logits: Tensor, targets: Tensor, stats: Tensor,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int,
) -> None:  # fmt: skip
    """The same with the gradient in the place of the logits."""
    _launch_backward(dloss, logits, targets, stats, logits, (label_smoothing, z_loss, softcap, ignore_index))
    increment_version(logits)  # so that autograd refuses a second backward, and one of what needs the logits


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row."""

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
    """The same, waiting for no device. With `inplace` the backward writes the gradient over the logits, which are then
    lost: `logits` is an intermediate result that nothing else needs, and there is one backward."""
    check_arguments(targets, logits.shape[:-1], reduction)
    flat = logits.flatten(0, -2)
    if inplace and (flat.data_ptr() != logits.data_ptr() or flat.stride(-1) != 1):
        raise ValueError(f"logits of strides {logits.stride()} cannot be flattened in place; give contiguous ones")
    options = (label_smoothing, z_loss, softcap, ignore_index)
    rows = _CrossEntropy.apply(rows_of(flat), targets.flatten().contiguous(), options, inplace)
    if reduction == "none":
        return rows.view(targets.shape)
    return rows.sum() / n_counted(targets, ignore_index) if reduction == "mean" else rows.sum()


@library_op(lambda *arguments: None, mutates=("logits", "loss"))
def _cross_entropy_in_place(
    logits: Tensor, targets: Tensor, loss: Tensor, weights: Tensor | None,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int, vocab_size: int,
) -> None:  # fmt: skip
    options = (label_smoothing, z_loss, softcap, ignore_index)
    launch_in_place(logits, targets, loss, weights, options, vocab_size)
    increment_version((logits, loss))


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
) -> None:
    """The same in one kernel. Columns of `logits` are adjacent, and so are `targets` and `loss`."""
    if logits.stride(-1) != 1 or not (targets.is_contiguous() and loss.is_contiguous()):
        raise ValueError(f"logits of strides {logits.stride()}, targets and loss must be contiguous to work in place")
    options = (label_smoothing, z_loss, softcap, ignore_index)
    _cross_entropy_in_place(logits, targets, loss, weights, *options, vocab_size or logits.shape[1])


def random_targets(n: int, v: int, make) -> Tensor:
    """`[N]`, every third ignored."""
    targets = (make(n).float().abs() * 1e4).long() % v
    targets[::3] = IGNORE
    return targets


def _inputs(shape, make):
    n, v = shape["N"], shape["V"]
    return {"logits": make(n, -(-v // 64) * 64)[:, :v], "targets": random_targets(n, v, make)}  # aligned rows


def _in_place_inputs(shape, make):
    n, v = shape["N"], shape["V"]
    logits, loss = make(n, -(-v // 64) * 64), make(n).float()  # padded and aligned, as in linear cross-entropy
    return {"logits": logits, "targets": random_targets(n, v, make), "loss": loss, "vocab_size": v}


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
    mutates=("logits", "loss"),
    cost=lambda s, itemsize: Cost(2 * s["N"] * s["V"] * itemsize + 12 * s["N"], 8 * s["N"] * s["V"]),
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=OP.test_shapes,
    bench_shapes=OP.bench_shapes,
    launches=(IN_PLACE,),
)
