"""LM head and cross-entropy in one op, which never holds the logits of more than a chunk of rows.

    loss_i = cross_entropy(x_i W^T, target_i),  dx = dz W,  dW = dz^T x

with the loss and its gradient dz of `kernels/cross_entropy.py`.

The Triton implementation loops over chunks of rows whose logits fit `CHUNK_BYTES`. For each chunk it multiplies x by
W^T into one buffer (cuBLAS), turns the buffer into dz by the in-place cross-entropy kernel, and multiplies twice more.
So the gradients, times `scale`, are made in the forward pass; the logits are neither stored nor recomputed. dx and dW
are accumulated and kept in float32. The backward multiplies them by the upstream gradient and rounds them once. Under
`reduction="none"` each row has an upstream gradient of its own, and the backward recomputes the chunks. Saved for
backward: dx and dW (`none`: x, W and targets).

The vocabulary is padded to a multiple of 64, in the buffer and in the copy of W that is multiplied, by rows of 0. Rows
of 50,257 values are not aligned, and cuBLAS takes three times as long for them.

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

CHUNK_BYTES = 3 * 2**27  # 4,000 rows of 50,000 classes in bf16: enough for matrix products at full speed
PADDING = 64  # the vocabulary is padded to a multiple of this


# Reference


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
    """Cross-entropy of `x @ head_weight.T` in nats, the reference in plain torch.

    Args:
        x: hidden states, `[..., D]`.
        head_weight: `[V, D]`.
        targets, reduction, label_smoothing, z_loss, softcap, ignore_index: as in `cross_entropy_torch`.
        scale: factor of the loss, a 0-dimensional tensor without gradient. A scale given here, and not applied to the
            result, saves a pass over the gradient of the head.
        head_cast: a copy of `head_weight` in the dtype of the matrix products, which saves the cast: `[V, D]`, or
            padded by rows of 0 to a multiple of `PADDING`. `head_weight` gets the gradient.

    Returns:
        A scalar, or `[...]` for `none` (0 in ignored rows), in float32 or wider.

    Raises:
        ValueError: shapes do not match.
    """
    _check_cast(head_weight, head_cast)
    if head_cast is None:
        logits = F.linear(x, head_weight)
    else:
        logits = F.linear(x.to(head_cast.dtype), _HeadCast.apply(head_weight, head_cast))
    loss = cross_entropy_torch(logits, targets, reduction, label_smoothing, z_loss, softcap, ignore_index)
    return loss if scale is None else loss * scale


class _HeadCast(torch.autograd.Function):
    """Returns `head_cast` in place of `head_weight`; a straight-through gradient goes to `head_weight`."""

    @staticmethod
    def forward(ctx, head_weight, head_cast):
        ctx.dtype = head_weight.dtype
        return head_cast[: len(head_weight)]

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


def padded(vocab_size: int) -> int:
    """The vocabulary size of the matrix products, rounded up to a multiple of `PADDING`."""
    return cdiv(vocab_size, PADDING) * PADDING


def _check_cast(head_weight: Tensor, head_cast: Tensor | None) -> None:
    if head_cast is None:
        return
    v, d = head_weight.shape
    if head_cast.shape not in ((v, d), (padded(v), d)):
        raise ValueError(f"head_cast {list(head_cast.shape)} is neither {[v, d]} nor {[padded(v), d]}")


# Kernels


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """Multiply `n` values by a factor in place. A factor of 1, known on the device alone, costs no memory traffic."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
            tl.store(x_ptr + offsets, x * factor, mask=offsets < n)


# Torch ops and autograd


@library_op(lambda x, factor: None, mutates=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply contiguous float32 `x` by a scalar tensor, in place."""
    n = x.numel()
    if n:
        _scale_kernel[(min(cdiv(n, 4096), 8 * n_sm(x.device)),)](x, factor, n, BLOCK=4096, num_warps=8)
    increment_version(x)  # autograd then refuses a second backward, which would scale again


def chunk_rows(n: int, vocab_size: int, itemsize: int) -> int:
    """Rows per chunk: equal chunks within `CHUNK_BYTES`, rounded up to 128 rows, the tile of a matrix product."""
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
    """Loss of each row and the gradients of sum(weights * loss).

    Takes x `[N, D]`, w `[padded V, D]` in the dtype of the matrix products, and weights, a scalar or `[N]`, None for 1.
    Returns the loss `[N]`, dx `[N, D]` and dW `[padded V, D]`, all float32; a gradient that is not asked for is empty.
    """
    options = (label_smoothing, z_loss, softcap, ignore_index)
    loss, dx, dw = outputs = _allocate(x, w, targets, weights, vocab_size, *options, with_dx, with_dw)
    n = len(x)
    rows = chunk_rows(n, vocab_size, w.element_size())
    buffer = w.new_empty(min(rows, n), len(w))
    for start in range(0, n, rows):
        chunk = slice(start, start + rows)
        x_chunk = x[chunk].to(w.dtype)
        logits = torch.mm(x_chunk, w.t(), out=buffer[: len(x_chunk)])
        if not (with_dx or with_dw):
            launch_loss(logits, targets[chunk], loss[chunk], None, options, vocab_size)
            continue
        weight = weights[chunk] if weights is not None and weights.ndim else weights
        launch_in_place(logits, targets[chunk], loss[chunk], weight, options, vocab_size)
        dz = logits  # overwritten by its gradient
        if with_dx:
            matmul_into(dx[chunk], dz, w)
        if with_dw:
            matmul_into(dw, dz.t(), x_chunk, add=start > 0)
    return outputs if n else (loss, dx, dw.zero_())


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; half precision is accumulated in float32."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=int(add))


def _padded_head(head_weight: Tensor, head_cast: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The head as the matrix products take it: `[padded V, D]` in `dtype`."""
    w = head_weight if head_cast is None else head_cast
    rows = padded(len(head_weight))
    if len(w) == rows:
        return w.to(dtype)
    head = w.new_empty((rows, w.shape[1]), dtype=dtype)
    head[: len(w)] = w
    head[len(w) :] = 0
    return head


class _SummedLinearCrossEntropy(torch.autograd.Function):
    """`scale` times the sum of the losses; the gradients are computed in the forward."""

    @staticmethod
    def forward(ctx, x, head_weight, head_cast, targets, scale, dtype, options, with_dx, with_dw):
        w = _padded_head(head_weight, head_cast, dtype)
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
            scale_(dw, upstream)
            dw = dw[: ctx.vocab_size].to(ctx.dtypes[1])
        return dx, dw, *[None] * 7


class _RowsLinearCrossEntropy(torch.autograd.Function):
    """The loss of every row; upstream gradients differ by row, so the backward recomputes the chunks."""

    @staticmethod
    def forward(ctx, x, head_weight, head_cast, targets, dtype, options):
        ctx.save_for_backward(x, head_weight, head_cast, targets)
        ctx.dtype, ctx.options = dtype, options
        w = _padded_head(head_weight, head_cast, dtype)
        return _linear_cross_entropy(x, w, targets, None, len(head_weight), *options, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, head_weight, head_cast, targets = ctx.saved_tensors
        with_dx, with_dw = ctx.needs_input_grad[:2]
        w, v = _padded_head(head_weight, head_cast, ctx.dtype), len(head_weight)
        _, dx, dw = _linear_cross_entropy(x, w, targets, upstream, v, *ctx.options, with_dx, with_dw)
        dx = dx.to(x.dtype) if with_dx else None
        return dx, dw[:v].to(head_weight.dtype) if with_dw else None, *[None] * 4


def _product_dtype(x: Tensor, head_cast: Tensor | None) -> torch.dtype:
    if head_cast is not None:
        return head_cast.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# Public function


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
    """Head and loss in chunks, with the Triton cross-entropy; arguments of `linear_cross_entropy_torch`.

    Peak memory is one chunk of logits plus float32 gradients of `x` and the head. No synchronisation. Matrix products
    run in the dtype of autocast where it is enabled.
    """
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
    # In float16 dz of a mean would underflow, since the loss scale only arrives in the backward: scale the sum later.
    early_scale = None if dtype == torch.float16 else scale
    grad_enabled = torch.is_grad_enabled()
    with_dx, with_dw = grad_enabled and x.requires_grad, grad_enabled and head_weight.requires_grad
    loss = _SummedLinearCrossEntropy.apply(*arguments, early_scale, dtype, options, with_dx, with_dw)
    return loss if early_scale is scale else loss * scale


# OP


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
