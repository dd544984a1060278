"""Linear layers in MXFP8 or NVFP4, in blocks with scales of their own.

    y = x W^T        dx = dy W        dW = dy^T x        all products of the op `block_scaled_linear`

A product sums over blocks, so every tensor is quantised along its features and along its tokens, or for a weight along
either dimension. The codes of x along tokens are kept for the backward, and x is not. NVFP4 has one scale for 16 x 16
weights, rounds gradients stochastically, and multiplies dW of tokens that a random Hadamard transform has mixed. The
weights are quantised once an optimizer step.

The torch implementation of the op simulates: it multiplies dequantised values in bf16. That shows what a format does to
a model, and is slower than bf16.

Sources: Mishra et al., "Recipes for Pre-training LLMs with MXFP8", 2025; NVIDIA, "Pretraining Large Language Models
with NVFP4", 2025.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import Kernels
from kernels.formats import BLOCK_FORMATS, NVFP4, BlockScaled, random_signs
from model.gpt import Linear

BF16 = torch.bfloat16


class BlockScaledLayer:
    """What a linear layer multiplies by in MXFP8 or NVFP4: codes of its weight `[N, K]` and of the transpose."""

    def __init__(self, linear: Linear, kernels: Kernels, precision: str):
        self.linear, self.kernels, self.format = linear, kernels, BLOCK_FORMATS[precision]
        is_nvfp4, device = self.format is NVFP4, linear.weight.device
        # Options of the op `block_quantize`, by what it quantises.
        self.of_weight = {"square": True} if is_nvfp4 else {}
        self.of_input = {"signs": random_signs(0, device)} if is_nvfp4 else {}
        self.of_gradient = self.of_input | {"stochastic": True} if is_nvfp4 else {}
        self.codes, self.codes_t = self._empty(linear.weight), self._empty(linear.weight.t())
        self.refresh()

    def _empty(self, x: Tensor) -> BlockScaled:
        return BlockScaled.empty(self.format, *x.shape, x.device)

    def refresh(self) -> None:
        """Quantise the weight, in both layouts."""
        self.kernels.block_quantize(self.linear.weight.detach(), *self.codes, *self.codes_t, **self.of_weight)

    def quantize(self, x: Tensor, both: bool, **options: Any) -> tuple[BlockScaled, BlockScaled | None]:
        """Quantise a matrix along its rows and, for a weight gradient, its transpose, with options of the op."""
        codes, codes_t = self._empty(x), self._empty(x.t()) if both else None
        self.kernels.block_quantize(x, *codes, *(codes_t or ()), **options)
        return codes, codes_t

    def product(self, a: BlockScaled, b: BlockScaled, dtype: torch.dtype = BF16) -> Tensor:
        """a b^T in `dtype`."""
        return self.kernels.block_scaled_linear(*a, *b, dtype)

    def target(self) -> None:
        """A kernel quantises in blocks only what it has whole, so the layer quantises x itself."""

    def __call__(self, x: Tensor, codes: None = None) -> Tensor:
        y = _BlockScaledLinear.apply(x.to(BF16), self.linear.weight, self, torch.is_grad_enabled())
        return y if self.linear.bias is None else y + self.linear.bias.to(BF16)


class _BlockScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer, training):
        options = layer.of_input if training else {}
        codes, codes_t = layer.quantize(x.flatten(0, -2), training, **options)
        ctx.save_for_backward(*(codes_t or ()))
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, weight.dtype
        return layer.product(codes, layer.codes).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layer, x_t = ctx.layer, BlockScaled(*ctx.saved_tensors)
        codes, codes_t = layer.quantize(dy.flatten(0, -2), True, **layer.of_gradient)
        dx = layer.product(codes, layer.codes_t).view(ctx.shape)
        return dx, layer.product(codes_t, x_t, ctx.dtype), None, None
