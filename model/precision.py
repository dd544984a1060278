"""Training in FP8, MXFP8 or NVFP4: which linear layers multiply in low precision, and how.

`lower` replaces the products of the blocks' linear layers. Embedding, norms, attention, residual stream, head and
optimizer compute as in bf16, and the weights that are trained and saved stay float32.

    y = x W^T        dx = dy W        dW = dy^T x

fp8: the first two in FP8, e4m3 but for dy, which is e5m2; dW in bf16. Each tensor has one scale. Scaling is delayed:
the scale of a step comes of the largest magnitude of the steps before, so that quantising takes one pass. The weights
are quantised once an optimizer step. The products are those of the op `fp8_linear`.

mxfp8, nvfp4: all three in blocks with scales of their own, simulated: values are quantised and dequantised, and
multiplied in bf16. That shows what the format does to a model, and is slower than bf16. NVFP4 rounds gradients
stochastically, multiplies dW of tokens that a random Hadamard transform has mixed, and leaves the last sixth of the
layers in bf16.

Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; Mishra et al., "Recipes for Pre-training LLMs with
MXFP8", 2025; NVIDIA, "Pretraining Large Language Models with NVFP4", 2025.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import Kernels
from kernels.formats import (
    E4M3,
    E5M2,
    Format,
    Quantized,
    hadamard,
    quantize_mx,
    quantize_nvfp4,
    rotate_rows,
)
from kernels.fp8_linear import MULTIPLE
from model import checkpoint
from model.gpt import GPT, Linear, matmul
from runtime.config import ConfigError
from runtime.distributed import World
from runtime.hardware import LOW

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

    def __init__(self, linear: Linear, kernels: Kernels, scales: Scales, first: int):
        self.linear, self.kernels, self.scales, self.first = linear, kernels, scales, first
        weight = linear.weight
        self.codes = torch.empty_like(weight, dtype=E4M3.dtype)
        self.codes_t = self.codes.new_empty(weight.shape[::-1])
        self.refresh()

    def refresh(self) -> None:
        """Quantise the weight, in both layouts."""
        self.quantize(1, self.linear.weight.detach(), self.codes, self.codes_t)

    def quantize(self, tensor: int, x: Tensor, codes: Tensor, codes_t: Tensor | None = None, amax: bool = True) -> None:
        """Quantise tensor 0, 1 or 2 of `FORMATS` into `codes`; `amax` says whether it counts for later scales."""
        i = self.first + tensor
        if not self.scales.known:
            self.scales.measure(i, x)
        self.kernels.fp8_quantize(x, self.scales.scale[i], codes, self.scales.amax[i] if amax else None, codes_t)

    def product(self, tensor: int, codes: Tensor, weight: Tensor) -> Tensor:
        """The product of tensor 0 or 2 with codes of the weight, in bf16."""
        scales = self.scales.scale[self.first + tensor], self.scales.scale[self.first + 1]
        return self.kernels.fp8_linear(codes, weight, *scales, BF16, tensor == 2)

    def __call__(self, x: Tensor) -> Tensor:
        y = _FP8Linear.apply(x.to(BF16), self.linear.weight, self, torch.is_grad_enabled())
        return y if self.linear.bias is None else y + self.linear.bias.to(BF16)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer, training):
        ctx.save_for_backward(x)
        ctx.layer, ctx.dtype = layer, weight.dtype
        codes = torch.empty_like(x, dtype=E4M3.dtype, memory_format=torch.contiguous_format)
        layer.quantize(0, x, codes, amax=training)
        return layer.product(0, codes, layer.codes)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        codes = torch.empty_like(dy, dtype=E5M2.dtype, memory_format=torch.contiguous_format)
        layer.quantize(2, dy, codes)
        dw = matmul(dy.flatten(0, -2).t(), x.flatten(0, -2), ctx.dtype)
        return layer.product(2, codes, layer.codes_t), dw, None, None


class SimulatedLayer:
    """A linear layer in MXFP8 or NVFP4, whose weight is kept as it is quantised for y and for dx."""

    def __init__(self, linear: Linear, precision: str):
        self.linear, self.is_nvfp4 = linear, precision == "nvfp4"
        self.hadamard = hadamard(16, seed=0, device=linear.weight.device)
        self.weight, self.weight_t = self._quantized_weights()

    @torch.no_grad()
    def _quantized_weights(self) -> tuple[Quantized, Quantized]:
        """The weight for y and for dx: of NVFP4 in squares, which serve both, of MXFP8 along either dimension."""
        weight = self.linear.weight
        if self.is_nvfp4:
            return (quantize_nvfp4(weight, (16, 16)),) * 2
        return quantize_mx(weight, (1, 32)), quantize_mx(weight, (32, 1))

    def refresh(self) -> None:
        """Quantise the weight, in place, as CUDA graphs need it."""
        for old, new in zip((self.weight, self.weight_t), self._quantized_weights(), strict=True):
            old.copy_(new)

    def along_columns(self, x: Tensor, is_gradient: bool = False) -> Quantized:
        """Quantise `[tokens, features]` in blocks of features."""
        return quantize_nvfp4(x, (1, 16), stochastic=is_gradient) if self.is_nvfp4 else quantize_mx(x, (1, 32))

    def along_rows(self, x: Tensor, is_gradient: bool = False) -> Quantized:
        """Quantise `[tokens, features]` in blocks of tokens, for dW."""
        if not self.is_nvfp4:
            return quantize_mx(x, (32, 1))
        return quantize_nvfp4(rotate_rows(x.float(), self.hadamard), (16, 1), stochastic=is_gradient)

    def __call__(self, x: Tensor) -> Tensor:
        y = _SimulatedLinear.apply(x.to(BF16), self.linear.weight, self)
        return y if self.linear.bias is None else y + self.linear.bias.to(BF16)


class _SimulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x)
        ctx.layer, ctx.dtype = layer, weight.dtype
        y = _product(layer.along_columns(x.flatten(0, -2)), layer.weight, transposed=1)
        return y.to(BF16).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,), layer = ctx.saved_tensors, ctx.layer
        x_2d, dy_2d = x.flatten(0, -2), dy.flatten(0, -2)
        dx = _product(layer.along_columns(dy_2d, is_gradient=True), layer.weight_t)
        dw = _product(layer.along_rows(dy_2d, is_gradient=True), layer.along_rows(x_2d), transposed=0)
        return dx.to(BF16).view(x.shape), dw.to(ctx.dtype), None


def _product(a: Quantized, b: Quantized, transposed: int | None = None) -> Tensor:
    """The product of two matrices in float32, the first (0) or second (1) of them transposed.

    The values of both are exact in bf16, in which a GPU multiplies them."""
    dtype = BF16 if a.codes.is_cuda else torch.float32
    factors = [each.dequantize(dtype) for each in (a, b)]
    if transposed is not None:
        factors[transposed] = factors[transposed].t()
    product = matmul(*factors, torch.float32)
    for each in (a, b):
        product = product if each.tensor_scale is None else product * each.tensor_scale
    return product


def low_layers(model: GPT, precision: str) -> Iterator[tuple[str, Linear]]:
    """The linear layers that `precision` lowers, with their names: those of the blocks, but of NVFP4 not the last sixth
    of the blocks, if both dimensions are multiples of 16."""
    n = model.config.n_layer - (math.ceil(model.config.n_layer / 6) if precision == "nvfp4" else 0)
    for name, module in model.blocks[:n].named_modules():
        if isinstance(module, Linear) and not any(size % MULTIPLE for size in module.weight.shape):
            yield name, module


class LowPrecision:
    """The layers of a model in low precision, none if it trains in fp32, bf16 or fp16; their scales and their share."""

    def __init__(self, model: GPT, precision: str, layers: list[tuple[str, Linear]]):
        self.model, self.precision, self.layers = model, precision, layers
        linears = [linear for _, linear in layers]
        self.scales = None
        if precision == "fp8":
            self.scales = Scales([*FP8Layer.FORMATS] * len(layers), model.embedding.weight.device)
        for i, linear in enumerate(linears):
            if self.scales:
                linear.low = FP8Layer(linear, model.kernels, self.scales, len(FP8Layer.FORMATS) * i)
            else:
                linear.low = SimulatedLayer(linear, precision)
        products = 4 if precision == "fp8" else 6  # of the FLOPs of a weight and token: without dW, or all
        self.share = products * sum(linear.weight.numel() for linear in linears) / model.flops_per_token()

    @property
    def simulated(self) -> bool:
        """Whether the products are of a wider format, on dequantised values."""
        return bool(self.layers) and (self.precision != "fp8" or self.model.kernels.names["fp8_linear"] == "torch")

    def reduce(self) -> None:
        """Call after the last micro-batch: the ranks agree on the largest magnitudes, and so on scales."""
        if self.scales and dist.is_initialized():
            dist.all_reduce(self.scales.amax, dist.ReduceOp.MAX)

    def advance(self) -> None:
        """Call after the optimizers' step: set the scales of the next one, and quantise the weights."""
        if self.scales:
            self.scales.advance()
        self._quantize_weights()

    def _quantize_weights(self) -> None:
        for _, linear in self.layers:
            linear.low.refresh()

    def state(self) -> dict[str, Tensor]:
        """The scales, for a checkpoint."""
        return self.scales.state() if self.scales else {}

    def restore(self, state: dict[str, Any], path: Path, world: World) -> None:
        """Go on from the checkpoint `state`, whose weights are loaded; without scales in it, they are measured anew.

        Raises `CheckpointError`."""
        if self.scales and state.get("scales"):
            checkpoint.restore({"scales": self.scales.state()}, state, path, world)
            self.scales.known = bool(self.scales.history.any())
        self._quantize_weights()

    def facts(self) -> dict[str, float]:
        """For the record of a run: the share of FLOPs in low precision, and whether it is simulated."""
        return {"low_flops": self.share, "simulated": self.simulated} if self.layers else {}

    def lines(self) -> list[str]:
        """What is in low precision, for people."""
        if not self.layers:
            return []
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in self.layers))
        blocks = len({name.partition(".")[0] for name, _ in self.layers})
        found = [
            f"{self.precision}: {kinds} of {blocks} of {self.model.config.n_layer} layers, {self.share:.0%} of the "
            "training FLOPs; the rest in bf16, and MFU by the peak of bf16"
        ]
        if self.simulated:
            found.append(
                f"SIMULATED: values are quantised to {self.precision}, dequantised and multiplied in a wider format, "
                "which shows the quality of a run and not its speed"
            )
        return found


def check_whole(precision: str, shard: str) -> None:
    """Raise `ConfigError` for low precision with sharded weights, of which no rank has a whole one to quantise."""
    if precision in LOW and shard != "off":
        raise ConfigError(
            f"--precision={precision} quantises whole weights, which --shard={shard} divides: use --shard=off"
        )


def lower(model: GPT, precision: str) -> LowPrecision:
    """Make the linear layers of `low_layers` multiply in `precision`: fp8, mxfp8 or nvfp4; for others none.

    Call it once the weights are on their device, and `advance` after every optimizer step. Raises `ConfigError` if no
    layer can be lowered."""
    layers = list(low_layers(model, precision)) if precision in LOW else []
    if precision in LOW and not layers:
        raise ConfigError(
            f"--precision={precision} finds no layer to lower: the model's widths must be multiples of {MULTIPLE}, "
            "and nvfp4 takes 2 layers or more"
        )
    for _, linear in layers:
        linear.copy = None
    return LowPrecision(model, precision, layers)
