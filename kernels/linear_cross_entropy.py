"""The head and the loss in one op: hidden states to cross-entropy, holding the logits of only some rows at a time.

    z = x W^T,  or softcap * tanh(x W^T / softcap) with a softcap
    loss_i = logsumexp(z_i) - (1 - s) z_i[target_i] - s mean(z_i) + z_loss * logsumexp(z_i)^2,  s the label smoothing

Rows whose target is `ignore_index` count for nothing. With p = softmax(z),

    dz_i = p_i (1 + 2 z_loss logsumexp(z_i)) - (1 - s) onehot(target_i) - s / V,  dx = dz W,  dW = dz^T x

with a softcap dz times 1 - (z / softcap)^2.

The Triton implementation walks over chunks of rows whose logits fit `CHUNK_BYTES`: a library's matrix product into one
buffer, the cross-entropy kernel that turns the buffer into dz in place, and two more products, dW summed in float32.
The gradient is thus made in the forward pass, as of a sum over rows, and scaled in the backward by what arrives there.
Only `reduction="none"`, where each row has its own factor, computes the chunks again. Saved: dx and dW (`none`: x, W).

The loss of a confident row loses nothing to cancellation: with S the sum of exp(z_j - z_target) over the other classes,
it is log1p(S), and the target's gradient is -S / (1 + S) rather than p - 1.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 3; Hsu et al., "Liger
Kernel", 2024, section 3.2 (chunks, gradients in the forward pass); Chowdhery et al., "PaLM", 2022, section 5 (z-loss).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from kernels.launch import library_op, rows_of, tanh, tl, triton
from kernels.spec import Cost, Op, accumulation_dtype

IGNORE = -1  # what this project's targets hold where there is none
CHUNK_BYTES = 2**29  # 5,000 rows of 50,000 classes in bf16: large enough for the products to run at full speed
Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy_torch(
    x: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """Cross-entropy of `x @ head_weight.T` against `targets`, in nats.

    Args:
        x: `[..., D]` hidden states.
        head_weight: `[V, D]`.
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
    logits = F.linear(x, head_weight)
    return cross_entropy_torch(logits, targets, reduction, label_smoothing, z_loss, softcap, ignore_index)


def cross_entropy_torch(
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The same of logits `[..., V]`."""
    z = logits.flatten(0, -2).to(accumulation_dtype(logits))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    rows = F.cross_entropy(z, targets.flatten(), **options)
    if z_loss:
        rows = rows + z_loss * z.logsumexp(-1).square() * (targets.flatten() != ignore_index)
    if reduction == "none":
        return rows.view(targets.shape)
    return rows.sum() / _n_counted(targets, ignore_index) if reduction == "mean" else rows.sum()


def _n_counted(targets: Tensor, ignore_index: int) -> Tensor:
    """How many rows are not ignored, at least 1; left on the device."""
    return (targets != ignore_index).sum().clamp(min=1)


@triton.jit
def _squeeze(z, softcap, SOFTCAP: tl.constexpr):
    """Logits as the loss takes them, float32."""
    wide = z.to(tl.float32)
    if SOFTCAP:
        wide = softcap * tanh(wide / softcap, z.dtype != tl.float32)
    return wide


@triton.jit
def _log1p(x):
    """log(1 + x) for small x too: the rounding of 1 + x is divided out (Goldberg, 1991, theorem 4)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def _tally(z, columns, target, most, rest, total, label_smoothing, softcap, V: tl.constexpr, SOFTCAP: tl.constexpr):
    """Take a block into the largest logit and the sum of exp(z - most), both without the target, and the sum of z."""
    z = _squeeze(z, softcap, SOFTCAP)
    if label_smoothing != 0:
        total += tl.sum(tl.where(columns < V, z, 0.0), axis=0)
    z = tl.where((columns == target) | (columns >= V), float("-inf"), z)
    higher = tl.maximum(most, tl.max(z, axis=0))
    return higher, rest * tl.exp(most - higher) + tl.sum(tl.exp(z - higher), axis=0), total


@triton.jit
def _gradient(z, columns, target, most, scale, smooth, at_target, weight, softcap, SOFTCAP: tl.constexpr):
    z = _squeeze(z, softcap, SOFTCAP)
    dz = tl.where(columns == target, at_target, tl.exp(z - most) * scale - smooth)
    if SOFTCAP:
        dz *= 1 - (z / softcap) * (z / softcap)
    return tl.where(weight == 0, 0.0, dz * weight)


@triton.jit
def _again(z, zero):
    """`z`, but not seen to be by the compiler, which would keep what it made of `z` before in registers, and spill."""
    bits: tl.constexpr = tl.int16 if z.dtype.primitive_bitwidth == 16 else tl.int32
    return (z.to(bits, bitcast=True) ^ zero.to(bits)).to(z.dtype, bitcast=True)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, weights_ptr, loss_ptr, dlogits_ptr, stride_z, stride_dz, stride_w,
    label_smoothing, z_loss, softcap, ignore_index,
    V: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, N_HELD: tl.constexpr,
):  # fmt: skip
    """One row. `N_HELD` full blocks and the last, ragged one stay in registers; those between are read twice."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_V)
    N_FULL: tl.constexpr = V // BLOCK_V
    logits_ptr += row * stride_z
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    valid = (target >= 0) & (target < V) & (target != ignore_index)
    target = tl.where(valid, target, -1).to(tl.int32)
    z_target = _squeeze(tl.load(logits_ptr + target, mask=valid, other=0.0), softcap, SOFTCAP)

    most = -1e30  # finite, so that -inf - most is no NaN
    rest = 0.0
    total = 0.0
    held = ()
    for i in tl.static_range(N_HELD):
        held += (tl.load(logits_ptr + i * BLOCK_V + lanes),)
    tail = N_FULL * BLOCK_V + lanes
    last = tl.load(logits_ptr + tail, mask=tail < V, other=0.0)
    for i in tl.static_range(N_HELD):
        columns = i * BLOCK_V + lanes
        most, rest, total = _tally(
            held[i], columns, target, most, rest, total, label_smoothing, softcap, V, SOFTCAP
        )  # fmt: skip
    for i in range(N_HELD, N_FULL):
        columns = i * BLOCK_V + lanes
        z = tl.load(logits_ptr + columns)
        most, rest, total = _tally(z, columns, target, most, rest, total, label_smoothing, softcap, V, SOFTCAP)
    if N_FULL * BLOCK_V < V:
        most, rest, total = _tally(last, tail, target, most, rest, total, label_smoothing, softcap, V, SOFTCAP)

    confident = z_target >= most
    higher = tl.maximum(most, z_target)
    rest *= tl.exp(most - higher)
    most = higher
    partition = tl.exp(z_target - most) + rest
    log_partition = tl.where(confident, _log1p(rest), tl.log(partition))
    loss = log_partition + (most - z_target)  # the second is 0 where it would cancel
    loss += label_smoothing * (z_target - total / V)
    lse = most + log_partition
    loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.where(valid, loss, float("nan"))))

    if dlogits_ptr is not None:
        dlogits_ptr += row * stride_dz
        weight = 1.0
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row * stride_w).to(tl.float32)
        weight = tl.where(valid, weight, 0.0)
        scale = (1 + 2 * z_loss * lse) / partition
        smooth = label_smoothing / V
        at_target = 2 * z_loss * lse * tl.exp(z_target - most) / partition - rest / partition + label_smoothing - smooth
        zero = partition < 0
        for i in tl.static_range(N_HELD):
            columns = i * BLOCK_V + lanes
            z = _again(held[i], zero)
            dz = _gradient(z, columns, target, most, scale, smooth, at_target, weight, softcap, SOFTCAP)
            tl.store(dlogits_ptr + columns, dz)
        for i in range(N_HELD, N_FULL):
            columns = i * BLOCK_V + lanes
            z = tl.load(logits_ptr + columns)
            dz = _gradient(z, columns, target, most, scale, smooth, at_target, weight, softcap, SOFTCAP)
            tl.store(dlogits_ptr + columns, dz)
        z = _again(last, zero)
        dz = _gradient(z, tail, target, most, scale, smooth, at_target, weight, softcap, SOFTCAP)
        tl.store(dlogits_ptr + tail, dz, mask=tail < V)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, columns, stride_x, stride_f, BLOCK: tl.constexpr):
    """Part of a row times its factor; nothing is read or written where that is 1."""
    per_row = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // per_row).to(tl.int64)
    column = tl.program_id(0) % per_row * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr + row * stride_f).to(tl.float32)
    if factor != 1:
        x = tl.load(x_ptr + row * stride_x + column, mask=column < columns, other=0.0)
        tl.store(x_ptr + row * stride_x + column, x.to(tl.float32) * factor, mask=column < columns)


def _aligned(n: int, v: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[n, v]` whose rows begin on 16 bytes, whatever the vocabulary, so that they load and store wide."""
    return torch.empty((n, triton.cdiv(v, 16) * 16), dtype=dtype, device=device)[:, :v]


def _launch(logits: Tensor, targets: Tensor, weights: Tensor | None, loss: Tensor, dlogits: Tensor | None, options):
    """Loss of each row of `logits` `[N, V]` and, unless it is None, the gradient into `dlogits`, which may be `logits`,
    each row's counted `weights` times, a scalar or `[N]`."""
    n, v = logits.shape
    *_, softcap, _ = options
    # What the registers of 8 warps hold beside the ragged block. A wider row, or one that loads value by value, taking
    # a register for each, is read twice, the second time from the L2 cache, by programs of which four fit at once.
    full, limit = v // 2048, (24 if softcap else 46) // logits.element_size()
    held = min(full, limit) if dlogits is not None and full <= limit + 1 and logits.stride(0) % 16 == 0 else 0
    if n:
        _cross_entropy_kernel[(n,)](
            logits, targets, weights, loss, dlogits, logits.stride(0), 0 if dlogits is None else dlogits.stride(0),
            weights.stride(0) if weights is not None and weights.ndim else 0, *options,
            V=v, SOFTCAP=softcap != 0, BLOCK_V=min(2048, triton.next_power_of_2(v)), N_HELD=held,
            num_warps=8 if v > 1024 else 4,
        )  # fmt: skip


def _allocate_cross_entropy(logits, targets, weight, label_smoothing, z_loss, softcap, ignore_index, with_gradient):
    loss = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    return loss, _aligned(len(logits) if with_gradient else 0, logits.shape[1], logits.dtype, logits.device)


@library_op(_allocate_cross_entropy)
def _cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor | None,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int, with_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss of each row of `[N, V]`, and `weight` times the gradient of their sum."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, dlogits = outputs = _allocate_cross_entropy(logits, targets, weight, *options, with_gradient)
    _launch(rows_of(logits), targets, weight, loss, dlogits if with_gradient else None, options)
    return outputs


def _allocate_cross_entropy_(logits, targets, weight, label_smoothing, z_loss, softcap, ignore_index):
    return torch.empty(targets.shape, dtype=torch.float32, device=logits.device)


@library_op(_allocate_cross_entropy_, mutates=("logits",))
def _cross_entropy_(
    logits: Tensor, targets: Tensor, weight: Tensor | None,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    """The same with the gradient in the place of the logits."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss = _allocate_cross_entropy_(logits, targets, weight, *options)
    _launch(logits, targets, weight, loss, logits, options)
    increment_version(logits)
    return loss


@library_op(lambda x, factor: None, mutates=("x",))
def _scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply `x` `[rows, columns]`, columns adjacent, by `factor`, a scalar or one for each row."""
    columns = x.shape[-1]
    if x.numel():
        _scale_kernel[(x.numel() // columns * triton.cdiv(columns, 2048),)](
            x, factor, columns, x.stride(0), factor.stride(0) if factor.ndim else 0, BLOCK=2048
        )
    increment_version(x)  # so that a second backward, which would scale again, is refused by autograd


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row, or `weight` times their sum."""

    @staticmethod
    def forward(ctx, logits, targets, weight, options, with_gradient, inplace):
        if with_gradient and inplace:
            loss, dlogits = _cross_entropy_(logits, targets, weight, *options), logits
        else:
            loss, dlogits = _cross_entropy(logits, targets, weight, *options, with_gradient)
        ctx.save_for_backward(dlogits)
        return loss if weight is None else loss.sum() * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (dlogits,) = ctx.saved_tensors
        _scale_(dlogits, upstream.contiguous())
        return dlogits, *[None] * 5


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
    """The same, reading the logits once, where a row fits registers, and writing the gradient once: over the logits,
    which are then lost, with `inplace`. One backward only, which scales that gradient unless by 1."""
    _check(targets, logits.shape[:-1], reduction)
    flat, flat_targets, weight = logits.flatten(0, -2), targets.flatten().contiguous(), None
    if inplace and (flat.data_ptr() != logits.data_ptr() or flat.stride(-1) != 1):
        raise ValueError(f"logits of strides {logits.stride()} cannot be flattened in place; give contiguous ones")
    # A mean's gradient in float16 would underflow before a loss scale reaches it: there it is a sum's, divided by N.
    divided = reduction == "mean" and logits.dtype == torch.float16
    if reduction == "mean" and not divided:
        weight = 1 / _n_counted(targets, ignore_index)
    elif reduction != "none":
        weight = torch.ones((), device=logits.device)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss = _CrossEntropy.apply(flat, flat_targets, weight, options, with_gradient, inplace)
    if divided:
        loss = loss / _n_counted(targets, ignore_index)
    return loss.view(targets.shape) if reduction == "none" else loss


def _check(targets: Tensor, leading: torch.Size, reduction: str) -> None:
    if targets.shape != leading:
        raise ValueError(f"targets {list(targets.shape)} are not one for each of {list(leading)} rows")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of mean, sum, none")


def _allocate_chunks(
    x, head_weight, targets, weights, dtype, label_smoothing, z_loss, softcap, ignore_index, with_dx, with_dw
):
    return (
        x.new_empty(x.shape[:1], dtype=torch.float32),
        torch.empty(x.shape if with_dx else (0,), dtype=x.dtype, device=x.device),
        x.new_empty(head_weight.shape if with_dw else (0,), dtype=torch.float32),
    )


@library_op(_allocate_chunks)
def _linear_cross_entropy(
    x: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor | None, dtype: torch.dtype,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int, with_dx: bool, with_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss of each row of `x` `[N, D]`; dx and dW of their sum, each row counted `weights` `[N]` times when given."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, dx, dw = outputs = _allocate_chunks(x, head_weight, targets, weights, dtype, *options, with_dx, with_dw)
    n, v = len(x), len(head_weight)
    w = head_weight.to(dtype)
    rows = triton.cdiv(n, max(1, triton.cdiv(n * v * w.element_size(), CHUNK_BYTES)))
    buffer = _aligned(rows, v, dtype, x.device)
    if with_dw:
        dw.zero_()
    for start in range(0, n, max(1, rows)):
        chunk = slice(start, start + rows)
        xs = x[chunk].to(dtype)
        logits = torch.mm(xs, w.t(), out=buffer[: len(xs)])
        weight = None if weights is None else weights[chunk]
        _launch(logits, targets[chunk], weight, loss[chunk], logits if with_dx or with_dw else None, options)
        if with_dx:
            dx[chunk] = logits @ w
        if with_dw:
            _add_product(dw, logits.t(), xs)
    return outputs


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the products of half precision summed in the float32 of `total`."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """The sum over rows, its gradient made at once."""

    @staticmethod
    def forward(ctx, x, head_weight, targets, dtype, options, with_dx, with_dw):
        loss, dx, dw = _linear_cross_entropy(x, head_weight, targets, None, dtype, *options, with_dx, with_dw)
        ctx.save_for_backward(dx if with_dx else None, dw if with_dw else None)
        ctx.weight_dtype = head_weight.dtype
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, upstream)
        dx, dw = gradients
        return dx, None if dw is None else dw.to(ctx.weight_dtype), *[None] * 5


class _RowsLinearCrossEntropy(torch.autograd.Function):
    """The loss of every row: what arrives in the backward differs by row, so the chunks are computed again there."""

    @staticmethod
    def forward(ctx, x, head_weight, targets, dtype, options):
        ctx.save_for_backward(x, head_weight, targets)
        ctx.dtype, ctx.options = dtype, options
        return _linear_cross_entropy(x, head_weight, targets, None, dtype, *options, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, head_weight, targets = ctx.saved_tensors
        with_dx, with_dw = ctx.needs_input_grad[:2]
        arguments = x, head_weight, targets, upstream.contiguous(), ctx.dtype, *ctx.options
        _, dx, dw = _linear_cross_entropy(*arguments, with_dx, with_dw)
        return dx if with_dx else None, dw.to(head_weight.dtype) if with_dw else None, None, None, None


def linear_cross_entropy_triton(
    x: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The same in memory of one chunk of logits and a float32 gradient of the head; nothing waits for the device."""
    _check(targets, x.shape[:-1], reduction)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    flat, flat_targets = rows_of(x), targets.flatten().contiguous()
    options = (label_smoothing, z_loss, softcap, ignore_index)
    if reduction == "none":
        rows = _RowsLinearCrossEntropy.apply(flat, head_weight, flat_targets, dtype, options)
        return rows.view(targets.shape)
    tracked = torch.is_grad_enabled()
    with_dx, with_dw = tracked and x.requires_grad, tracked and head_weight.requires_grad
    loss = _SummedLinearCrossEntropy.apply(flat, head_weight, flat_targets, dtype, options, with_dx, with_dw)
    return loss / _n_counted(targets, ignore_index) if reduction == "mean" else loss


def _targets(n: int, v: int, make) -> Tensor:
    """`[N]`, every third ignored."""
    targets = (make(n).float().abs() * 1e4).long() % v
    targets[::3] = IGNORE
    return targets


def _inputs(shape, make):
    n, d, v = shape["N"], shape["D"], shape["V"]
    return {"x": make(n, d), "head_weight": make(v, d), "targets": _targets(n, v, make)}


def _cross_entropy_inputs(shape, make):
    n, v = shape["N"], shape["V"]
    return {"logits": make(n, -(-v // 16) * 16)[:, :v], "targets": _targets(n, v, make)}  # aligned, as in the linear op


CROSS_ENTROPY = Op(
    name="cross_entropy",
    implementations={"torch": cross_entropy_torch, "triton": cross_entropy_triton},
    inputs=_cross_entropy_inputs,
    differentiable=("logits",),
    cost=lambda s, itemsize: Cost(s["N"] * s["V"] * itemsize + 12 * s["N"], 4 * s["N"] * s["V"]),
    backward_cost=lambda s, itemsize: Cost(s["N"] * s["V"] * itemsize + 4 * s["N"], 4 * s["N"] * s["V"]),
    test_shapes=({"N": 1, "V": 2}, {"N": 7, "V": 101}, {"N": 5, "V": 9001}),
    bench_shapes=tuple({"N": 4096, "V": v} for v in (50257, 50304, 128256)),
)

OP = Op(
    name="linear_cross_entropy",
    implementations={"torch": linear_cross_entropy_torch, "triton": linear_cross_entropy_triton},
    inputs=_inputs,
    differentiable=("x", "head_weight"),
    cost=lambda s, itemsize: Cost((s["N"] + s["V"]) * s["D"] * itemsize + 12 * s["N"], 2 * s["N"] * s["V"] * s["D"]),
    backward_cost=lambda s, itemsize: Cost((s["N"] + s["V"]) * s["D"] * itemsize, 4 * s["N"] * s["V"] * s["D"]),
    test_shapes=({"N": 1, "D": 8, "V": 2}, {"N": 7, "D": 33, "V": 101}, {"N": 32, "D": 64, "V": 257}),
    bench_shapes=tuple({"N": 16384, "D": d, "V": v} for d, v in ((768, 50257), (768, 50304), (4096, 128256))),
)
