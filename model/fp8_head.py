"""The head and its cross-entropy in FP8.

    z  = x W^T       in FP8, e4m3 by e4m3
    dx = dz W        in FP8, e5m2 by e4m3
    dW = dz^T x      in bf16, summed in float32

As in kernels/linear_cross_entropy.py, only a chunk of the logits z exists at a time, and the gradients are computed in
the forward pass. The kernel that overwrites z by its gradient dz also writes the codes of dz, so no pass quantises it.

x and W have delayed scales, as in the other layers. That of dz is static, since |dz| is at most the factor of the loss,
or with a z-loss 1 + 2 z_loss logsumexp(z) times that. The codes leave room for 7 times the factor; probabilities of
2^-30 still have a code that is not 0.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import OPS, Kernels
from kernels.common import rows_of
from kernels.cross_entropy import IGNORE, Options, Reduction, check_arguments, n_counted
from kernels.formats import E5M2
from kernels.linear_cross_entropy import chunk_rows, matmul_into, padded, scale_
from model.fp8 import BF16, FP8Layer, Scales
from model.gpt import Linear

DZ_SCALE = 2.0**-13  # what codes of dz are multiplied by, over the factor of the loss
ITEMSIZE = BF16.itemsize + E5M2.dtype.itemsize  # of a logit and the code of its gradient


class FP8Head(FP8Layer):
    """The head: an `FP8Layer` for generation, with a cross-entropy for training and evaluation.

    The loss is computed by the implementation that `kernels` has of linear cross-entropy, torch or triton."""

    def __init__(self, head: Linear, kernels: Kernels):
        scales = Scales([*self.FORMATS], head.weight.device)
        super().__init__(head, kernels, scales, 0, padded(len(head.weight)))
        self.implementation = kernels.names["linear_cross_entropy"]
        self.loss = OPS["cross_entropy"].implementations[self.implementation]
        self.loss_in_place = OPS["cross_entropy_in_place"].implementations[self.implementation]

    def cross_entropy(
        self, x: Tensor, targets: Tensor, reduction: Reduction, label_smoothing: float, z_loss: float, softcap: float,
        scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross-entropy of the logits of `x` `[..., D]`; arguments and result as of `linear_cross_entropy_torch`.

        `none` has no gradient. Raises `ValueError` if one is required."""
        check_arguments(targets, x.shape[:-1], reduction)
        weight, options = self.linear.weight, (label_smoothing, z_loss, softcap, IGNORE)
        with_dx, with_dw = (torch.is_grad_enabled() and each.requires_grad for each in (x, weight))
        rows, flat = rows_of(x.to(BF16)), targets.flatten().contiguous()
        scale = torch.ones((), device=x.device) if scale is None else scale
        if reduction == "none":
            if with_dx or with_dw:
                raise ValueError("the FP8 head has no gradient with reduction none: take the sum or the mean")
            return self.losses(rows, flat, scale, options, False, False)[0].view(targets.shape) * scale
        if reduction == "mean":
            scale = scale / n_counted(flat, IGNORE)
        return _FP8LinearCrossEntropy.apply(rows, weight, flat, scale, self, options, with_dx, with_dw)

    def losses(
        self, x: Tensor, targets: Tensor, scale: Tensor, options: Options, with_dx: bool, with_dw: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of each row of `x` `[N, D]`, float32, and the gradients of `scale` times their sum: dx in bf16, and
        dW `[padded V, D]` in float32; None for one that is not asked for."""
        n, vocab_size, training = len(x), len(self.linear.weight), with_dx or with_dw
        loss = x.new_empty(n, dtype=torch.float32)
        dx = torch.empty_like(x) if with_dx else None
        dw = (x.new_empty if n else x.new_zeros)(self.codes.shape, dtype=torch.float32) if with_dw else None
        x_codes = self.quantized(0, x, self.scales.amax[0] if training else None)
        rows = chunk_rows(n, vocab_size, ITEMSIZE)
        dz_scale = (DZ_SCALE * scale.abs().float()).clamp(min=torch.finfo(torch.float32).tiny).view(1)
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            z = self.product(0, x_codes[chunk], self.codes)
            if training:
                codes = torch.empty_like(z, dtype=E5M2.dtype)
                self.loss_in_place(z, targets[chunk], loss[chunk], scale, *options, vocab_size, codes, dz_scale)
                if with_dx:
                    dx[chunk] = self.kernels.fp8_linear(codes, self.codes_t, dz_scale, self.scales.scale[1], BF16, True)
                if with_dw:
                    matmul_into(dw, z.t(), x[chunk], add=start > 0)  # z holds its gradient now
                del codes
            else:
                loss[chunk] = self.loss(z[:, :vocab_size], targets[chunk], "none", *options)
            del z  # before the next is computed, which takes its memory
        return loss, dx, dw


class _FP8LinearCrossEntropy(torch.autograd.Function):
    """`scale` times the sum of the losses; the gradients are computed in the forward."""

    @staticmethod
    def forward(ctx, x, weight, targets, scale, head, options, with_dx, with_dw):
        loss, dx, dw = head.losses(x, targets, scale, options, with_dx, with_dw)
        ctx.save_for_backward(dx, dw)
        ctx.is_triton, ctx.shape, ctx.dtype = head.implementation == "triton", weight.shape, weight.dtype
        return loss.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx * upstream
        if dw is not None:
            if ctx.is_triton:
                scale_(dw, upstream)  # no pass over dw for a factor of 1
            else:
                dw = dw * upstream
            dw = dw[: ctx.shape[0]].to(ctx.dtype)
        return dx, dw, *[None] * 6
