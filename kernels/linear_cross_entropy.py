"""The head and the loss in one op: hidden states to cross-entropy, holding the logits of only some rows at a time.

    loss_i = cross_entropy(x_i W^T, target_i),  dx = dz W,  dW = dz^T x

with the loss and its gradient dz of `kernels/cross_entropy.py`.

The Triton implementation walks over chunks of rows whose logits fit `CHUNK_BYTES`: a library's matrix product into one
buffer, the cross-entropy kernel that turns the buffer into dz in place, and two more products. The gradient is thus
made in the forward pass, times the `scale` of the loss. dx and dW are summed and kept in float32, so that another
gradient that arrives in the backward is multiplied in before they are rounded, once. Only `reduction="none"`, where
each row has a factor of its own, computes the chunks again. Saved: dx and dW (`none`: x, W).

The vocabulary is padded to a multiple of 64 in the buffer and in the copy of W that is multiplied, whose rows there are
0: rows of 50,257 values are not aligned, and a library's products of them take three times as long.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 3; Hsu et al., "Liger
Kernel", 2024, section 3.2 (chunks, gradients in the forward pass).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from kernels.common import cdiv, n_sm, rows_of
from kernels.cross_entropy import (
    IGNORE,
    Options,
    Reduction,
    check_arguments,
    cross_entropy_torch,
    launch_in_place,
    launch_loss,
    n_counted,
    random_targets,
)
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, Op

CHUNK_BYTES = 3 * 2**27  # 4,000 rows of 50,000 classes in bf16: large enough for the products to run at full speed
PADDING = 64  # what the vocabulary is padded to a multiple of


def linear_cross_entropy_torch(
    x: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    scale: Tensor | None = None,
    head_cast: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `x @ head_weight.T` against `targets`, in nats.

    Args:
        x: `[..., D]` hidden states.
        head_weight: `[V, D]`.
        targets, reduction, label_smoothing, z_loss, softcap, ignore_index: as in `cross_entropy_torch`.
        scale: what the loss is multiplied by, a tensor without dimensions; it takes no gradient. Given here rather than
            applied to the result, it saves a pass over the gradient of the head.
        head_cast: `head_weight` in the dtype that the products are made in, kept by the caller to save the cast:
            `[V, D]`, or padded by rows of 0 to the next multiple of `PADDING`. The gradient goes to `head_weight`.

    Returns:
        A scalar, or `[...]` for `none` (0 where ignored), in float32 or wider. Raises `ValueError` when shapes do not
        fit together.
    """
    _check_cast(head_weight, head_cast)
    if head_cast is None:
        logits = F.linear(x, head_weight)
    else:
        logits = F.linear(x.to(head_cast.dtype), _HeadCast.apply(head_weight, head_cast))
    loss = cross_entropy_torch(logits, targets, reduction, label_smoothing, z_loss, softcap, ignore_index)
    return loss if scale is None else loss * scale


class _HeadCast(torch.autograd.Function):
    """The copy, whose gradient is that of the weight."""

    @staticmethod
    def forward(ctx, head_weight, head_cast):
        ctx.dtype = head_weight.dtype
        return head_cast[: len(head_weight)]

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


def padded(vocab_size: int) -> int:
    """The vocabulary as the products see it."""
    return cdiv(vocab_size, PADDING) * PADDING


def _check_cast(head_weight: Tensor, head_cast: Tensor | None) -> None:
    if head_cast is None:
        return
    v, d = head_weight.shape
    if head_cast.shape not in ((v, d), (padded(v), d)):
        raise ValueError(f"head_cast {list(head_cast.shape)} is neither {[v, d]} nor {[padded(v), d]}")


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """Multiply `n` values by a factor; they are neither read nor written where that is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
            tl.store(x_ptr + offsets, x * factor, mask=offsets < n)


@library_op(lambda x, factor: None, mutates=("x",))
def _scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply `x`, contiguous and float32, by a scalar."""
    n = x.numel()
    if n:
        _scale_kernel[(min(cdiv(n, 4096), 8 * n_sm(x.device)),)](x, factor, n, BLOCK=4096, num_warps=8)
    increment_version(x)  # so that a second backward, which would scale again, is refused by autograd


def chunk_rows(n: int, vocab_size: int, itemsize: int) -> int:
    """How many of `n` rows make a chunk: equal chunks within `CHUNK_BYTES`, but of whole tiles of the products."""
    n_chunks = max(1, math.ceil(n * padded(vocab_size) * itemsize / CHUNK_BYTES))
    rows = max(1, math.ceil(n / n_chunks))
    return math.ceil(rows / 128) * 128 if rows > 128 else rows


def _allocate(x, w, targets, weights, vocab_size, label_smoothing, z_loss, softcap, ignore_index, with_dx, with_dw):
    return (
        x.new_empty(x.shape[:1], dtype=torch.float32),
        x.new_empty(x.shape if with_dx else (0,), dtype=torch.float32),
        x.new_empty(w.shape if with_dw else (0,), dtype=torch.float32),
    )


@library_op(_allocate)
def _linear_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, weights: Tensor | None, vocab_size: int,
    label_smoothing: float, z_loss: float, softcap: float, ignore_index: int, with_dx: bool, with_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss of each row of `x` `[N, D]`; dx `[N, D]` and dW `[padded V, D]` of the sum of `weights` (a scalar or `[N]`;
    None for 1) times the losses. `w` is `[padded V, D]`, in the dtype of the products."""
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, dx, dw = outputs = _allocate(x, w, targets, weights, vocab_size, *options, with_dx, with_dw)
    n = len(x)
    rows = chunk_rows(n, vocab_size, w.element_size())
    buffer = w.new_empty(min(rows, n), len(w))
    for start in range(0, n, rows):
        chunk = slice(start, start + rows)
        xs = x[chunk].to(w.dtype)
        logits = torch.mm(xs, w.t(), out=buffer[: len(xs)])
        if not (with_dx or with_dw):
            launch_loss(logits, targets[chunk], loss[chunk], None, options, vocab_size)
            continue
        weight = weights[chunk] if weights is not None and weights.ndim else weights
        launch_in_place(logits, targets[chunk], loss[chunk], weight, options, vocab_size)
        if with_dx:
            _product(dx[chunk], logits, w)
        if with_dw:
            _product(dw, logits.t(), xs, add=start > 0)
    return outputs if n else (loss, dx, dw.zero_())


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; products of half precision are summed in the float32 of `out`."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


def _operand(head_weight: Tensor, head_cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The head as it is multiplied: `[padded V, D]` in `dtype`."""
    w = head_weight if head_cast is None else head_cast
    rows = padded(len(head_weight))
    if len(w) == rows:
        return w.to(dtype)
    operand = w.new_empty((rows, w.shape[1]), dtype=dtype)
    operand[: len(w)] = w
    operand[len(w) :] = 0
    return operand


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """`scale` times the sum over rows, its gradient made at once."""

    @staticmethod
    def forward(ctx, x, head_weight, head_cast, targets, scale, dtype, options, with_dx, with_dw):
        w = _operand(head_weight, head_cast, dtype)
        loss, dx, dw = _linear_cross_entropy(x, w, targets, scale, len(head_weight), *options, with_dx, with_dw)
        ctx.save_for_backward(dx if with_dx else None, dw if with_dw else None)
        ctx.dtypes, ctx.vocab_size = (x.dtype, head_weight.dtype), len(head_weight)
        return loss.sum() if scale is None else loss.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = torch.mul(dx, upstream, out=torch.empty_like(dx, dtype=ctx.dtypes[0]))
        if dw is not None:
            _scale_(dw, upstream)
            dw = dw[: ctx.vocab_size].to(ctx.dtypes[1])
        return dx, dw, *[None] * 7


class _RowsLinearCrossEntropy(torch.autograd.Function):
    """The loss of every row: what arrives in the backward differs by row, so the chunks are computed again there."""

    @staticmethod
    def forward(ctx, x, head_weight, head_cast, targets, dtype, options):
        ctx.save_for_backward(x, head_weight, head_cast, targets)
        ctx.dtype, ctx.options = dtype, options
        w = _operand(head_weight, head_cast, dtype)
        return _linear_cross_entropy(x, w, targets, None, len(head_weight), *options, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, head_weight, head_cast, targets = ctx.saved_tensors
        with_dx, with_dw = ctx.needs_input_grad[:2]
        w, v = _operand(head_weight, head_cast, ctx.dtype), len(head_weight)
        _, dx, dw = _linear_cross_entropy(x, w, targets, upstream, v, *ctx.options, with_dx, with_dw)
        dx = dx.to(x.dtype) if with_dx else None
        return dx, dw[:v].to(head_weight.dtype) if with_dw else None, *[None] * 4


def _product_dtype(x: Tensor, head_cast: Tensor | None) -> torch.dtype:
    if head_cast is not None:
        return head_cast.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear_cross_entropy_triton(
    x: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    scale: Tensor | None = None,
    head_cast: Tensor | None = None,
) -> Tensor:
    """The same in memory of one chunk of logits and a float32 gradient of the head; nothing waits for the device."""
    check_arguments(targets, x.shape[:-1], reduction)
    _check_cast(head_weight, head_cast)
    dtype = _product_dtype(x, head_cast)
    arguments = rows_of(x), head_weight, head_cast, targets.flatten().contiguous()
    options: Options = (label_smoothing, z_loss, softcap, ignore_index)
    if reduction == "none":
        rows = _RowsLinearCrossEntropy.apply(*arguments, dtype, options).view(targets.shape)
        return rows if scale is None else rows * scale
    if reduction == "mean":
        scale = (1 if scale is None else scale) / n_counted(targets, ignore_index)
    # In float16 the gradient of a mean would underflow before a loss scale reaches it: there it is made of the sum.
    inside = None if dtype == torch.float16 else scale
    tracked = torch.is_grad_enabled()
    with_dx, with_dw = tracked and x.requires_grad, tracked and head_weight.requires_grad
    loss = _SummedLinearCrossEntropy.apply(*arguments, inside, dtype, options, with_dx, with_dw)
    return loss if inside is scale else loss * scale


def _workspace(
    x: Tensor, head_weight: Tensor, targets: Tensor, *options, head_cast: Tensor | None = None, **named
) -> int:
    """A chunk of logits, and the head as it is multiplied where that is a copy."""
    (v, d), n, dtype = head_weight.shape, targets.numel(), _product_dtype(x, head_cast)
    is_copied = head_cast is None and (head_weight.dtype != dtype or padded(v) != v)
    chunk = min(n, chunk_rows(n, v, dtype.itemsize))
    return (chunk + (d if is_copied else 0)) * padded(v) * dtype.itemsize


def _inputs(shape, make):
    n, d, v = shape["N"], shape["D"], shape["V"]
    return {"x": make(n, d), "head_weight": make(v, d), "targets": random_targets(n, v, make)}


OP = Op(
    name="linear_cross_entropy",
    implementations={"torch": linear_cross_entropy_torch, "triton": linear_cross_entropy_triton},
    inputs=_inputs,
    differentiable=("x", "head_weight"),
    cost=lambda s, itemsize: Cost((s["N"] + s["V"]) * s["D"] * itemsize + 12 * s["N"], 2 * s["N"] * s["V"] * s["D"]),
    backward_cost=lambda s, itemsize: Cost((s["N"] + s["V"]) * s["D"] * itemsize, 4 * s["N"] * s["V"] * s["D"]),
    test_shapes=({"N": 1, "D": 8, "V": 2}, {"N": 7, "D": 33, "V": 101}, {"N": 32, "D": 64, "V": 257}),
    workspace={"triton": _workspace},
    bench_shapes=tuple({"N": 16384, "D": d, "V": v} for d, v in ((768, 50257), (768, 50304), (4096, 128256))),
)
