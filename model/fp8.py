"""Linear layers in FP8: e4m3 for inputs and weights, e5m2 for gradients, one scale for each tensor.

    y = x W^T        dx = dy W        in FP8, the products of the op `fp8_linear`
    dW = dy^T x                       in bf16

Scaling is delayed: the scale of a step comes of the largest magnitude of the steps before, so that quantising takes one
pass, or none: RMSNorm and SwiGLU return codes of what they compute, and the backward of SwiGLU does. The weights are
quantised once an optimizer step.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import Kernels
from kernels.formats import E4M3, E5M2, Format
from model.gpt import CodesTarget, GradientTarget, Linear, matmul

HISTORY = 16  # steps whose largest magnitude sets the scale
MARGIN = 2.0  # a tensor may grow by this much in one step before it saturates
BF16 = torch.bfloat16


class Scales:
    """Delayed scaling of tensors: device buffers that advance once an optimizer step, without a word to the host.

    scale: float32 `[n, 1]`, what codes are multiplied by.
    amax: float32 `[n, 1]`, the largest magnitude of this step.
    history: float32 `[HISTORY, n, 1]`, those of the steps before, the newest first.
    """

    def __init__(self, formats: list[Format], device: torch.device):
        """One scale for each tensor, given the format of its codes."""
        self.largest = torch.tensor([[format.largest] for format in formats], device=device)
        self.scale, self.amax = torch.ones_like(self.largest), torch.zeros_like(self.largest)
        self.history = self.amax.new_zeros(HISTORY, *self.amax.shape)
        self.known = False  # whether the scales come of a history: those of the first step are of its own tensors

    @torch.no_grad()
    def measure(self, i: int, x: Tensor) -> None:
        """Set the scale of a tensor by the tensor itself."""
        largest = x.abs().amax().float()
        self.scale[i] = torch.where(largest > 0, largest / self.largest[i], 1.0)

    @torch.no_grad()
    def advance(self) -> None:
        """Set the scales of the next step. That of a tensor which was always 0 stays."""
        self.history.copy_(torch.cat((self.amax[None], self.history[:-1])))
        largest = self.history.amax(0)
        self.scale.copy_(torch.where(largest > 0, MARGIN * largest / self.largest, self.scale))
        self.amax.zero_()
        self.known = True

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "amax": self.amax, "history": self.history}


class FP8Layer:
    """What a linear layer multiplies by in FP8: codes of its weight `[N, K]` and of the transpose, and three scales."""

    FORMATS = E4M3, E4M3, E5M2  # of x, W and dy, the tensors of the scales `first`, `first + 1` and `first + 2`

    def __init__(self, linear: Linear, kernels: Kernels, scales: Scales, first: int, rows: int = 0):
        """`rows` of codes, more than the weight has, pad it by rows of 0."""
        self.linear, self.kernels, self.scales, self.first = linear, kernels, scales, first
        weight = linear.weight
        self.codes = weight.new_zeros(rows or len(weight), weight.shape[1], dtype=E4M3.dtype)
        self.codes_t = self.codes.new_zeros(self.codes.shape[::-1])
        self.refresh()

    def refresh(self) -> None:
        """Quantise the weight, in both layouts."""
        weight = self.linear.weight.detach()
        codes, codes_t = self.codes[: len(weight)], self.codes_t[:, : len(weight)]
        self._quantize(1, weight, codes, self.scales.amax[self.first + 1], codes_t)

    def quantized(self, tensor: int, x: Tensor, amax: Tensor | None) -> Tensor:
        """Codes of tensor 0 or 2 of `FORMATS`, whose largest magnitude raises `amax`."""
        codes = torch.empty_like(x, dtype=self.FORMATS[tensor].dtype, memory_format=torch.contiguous_format)
        self._quantize(tensor, x, codes, amax)
        return codes

    def _quantize(
        self, tensor: int, x: Tensor, codes: Tensor, amax: Tensor | None, codes_t: Tensor | None = None
    ) -> None:
        i = self.first + tensor
        if not self.scales.known:
            self.scales.measure(i, x)
        self.kernels.fp8_quantize(x, self.scales.scale[i], codes, amax, codes_t)

    def amax(self) -> Tensor | None:
        """That of x, which counts for later scales in training only."""
        return self.scales.amax[self.first] if torch.is_grad_enabled() else None

    def target(self) -> CodesTarget | None:
        """None in the first step, whose scales are measured before anything is quantised."""
        return CodesTarget(self.scales.scale[self.first], self.amax()) if self.scales.known else None

    def product(self, tensor: int, codes: Tensor, weight: Tensor) -> Tensor:
        """The product of tensor 0 or 2 with codes of the weight, in bf16."""
        scales = self.scales.scale[self.first + tensor], self.scales.scale[self.first + 1]
        return self.kernels.fp8_linear(codes, weight, *scales, BF16, tensor == 2)

    def __call__(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        return self._multiply(x, codes)[0]

    def with_gradient_target(self, x: Tensor, codes: Tensor | None) -> tuple[Tensor, GradientTarget]:
        y, dy_codes = self._multiply(x, codes, has_target=True)
        i = self.first + 2
        return y, GradientTarget(dy_codes, self.scales.scale[i], self.scales.amax[i])

    def _multiply(self, x: Tensor, codes: Tensor | None, has_target: bool = False) -> tuple[Tensor, Tensor | None]:
        if codes is None:
            codes = self.quantized(0, x.detach(), self.amax())
        y, dy_codes = _FP8Linear.apply(x.to(BF16), codes, self.linear.weight, self, has_target)
        return y if self.linear.bias is None else y + self.linear.bias.to(BF16), dy_codes


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, weight, layer, has_target):
        ctx.save_for_backward(x)
        ctx.layer, ctx.dtype = layer, weight.dtype
        ctx.set_materialize_grads(False)
        y = layer.product(0, codes, layer.codes)
        return y, y.new_empty(1, dtype=E5M2.dtype).expand(y.shape) if has_target else None

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, codes):
        (x,), layer = ctx.saved_tensors, ctx.layer
        if codes is None:
            codes = layer.quantized(2, dy, layer.scales.amax[layer.first + 2])
        dw = matmul(dy.flatten(0, -2).t(), x.flatten(0, -2), ctx.dtype)[: layer.linear.out_features]
        return layer.product(2, codes, layer.codes_t), None, dw, None, None
