"""Training in FP8, MXFP8 or NVFP4: which linear layers multiply in low precision.

`lower` replaces the products of the blocks' linear layers, by those of `model/fp8.py` or `model/block_scaled.py`, and
those of the head by `model/fp8_head.py`. The two are chosen apart: either may be in bf16. Embedding, norms, attention,
residual stream and optimizer compute as in bf16, and the weights that are trained and saved stay float32. NVFP4 leaves
the last sixth of the layers in bf16.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import EMITTING, OPS, Kernels
from kernels.fp8_linear import MULTIPLE
from model import checkpoint
from model.block_scaled import BlockScaledLayer
from model.fp8 import FP8Layer, Scales
from model.fp8_head import FP8Head
from model.gpt import GPT, Linear, ModelConfig
from runtime.config import ConfigError
from runtime.distributed import World
from runtime.hardware import LOW, Precision, check_fp8


def low_layers(model: GPT, precision: str) -> Iterator[tuple[str, Linear]]:
    """The linear layers that `precision` lowers, with their names: those of the blocks, but of NVFP4 not the last sixth
    of the blocks, if both dimensions are multiples of 16."""
    n = model.config.n_layer - (math.ceil(model.config.n_layer / 6) if precision == "nvfp4" else 0)
    for name, module in model.blocks[:n].named_modules():
        if isinstance(module, Linear) and not any(size % MULTIPLE for size in module.weight.shape):
            yield name, module


class LowPrecision:
    """The layers of a model in low precision, and its head; none if it trains in fp32, bf16 or fp16. Their scales and
    their share."""

    def __init__(self, model: GPT, precision: str, layers: list[tuple[str, Linear]], fp8_head: bool):
        self.model, self.precision, self.layers, self.fp8_head = model, precision, layers, fp8_head
        linears = [linear for _, linear in layers]
        self.scales = None
        if precision == "fp8":
            self.scales = Scales([*FP8Layer.FORMATS] * len(layers), model.embedding.weight.device)
        for i, linear in enumerate(linears):
            if self.scales:
                linear.low = FP8Layer(linear, model.kernels, self.scales, len(FP8Layer.FORMATS) * i)
            else:
                linear.low = BlockScaledLayer(linear, model.kernels, precision)
        # Of the 6 FLOPs of a weight and token, FP8 leaves the 2 of dW in bf16.
        flops = (4 if precision == "fp8" else 6) * sum(linear.weight.numel() for linear in linears)
        if fp8_head:
            model.head.low = FP8Head(model.head, model.kernels)
            flops += 4 * model.head.weight.numel()
        self.share = flops / model.flops_per_token()

    @property
    def all_scales(self) -> dict[str, Scales]:
        """The scales of the layers and of the head, by their name in a checkpoint."""
        found = {"scales": self.scales} if self.scales else {}
        return found | ({"head_scales": self.model.head.low.scales} if self.fp8_head else {})

    @property
    def formats(self) -> list[str]:
        """The formats of the layers and of the head."""
        return list(dict.fromkeys([self.precision] * bool(self.layers) + ["fp8"] * self.fp8_head))

    @property
    def simulated(self) -> bool:
        """Whether there are products of a wider format, on dequantised values."""
        return bool(self.simulated_formats)

    @property
    def simulated_formats(self) -> list[str]:
        ops = {format: "fp8_linear" if format == "fp8" else "block_scaled_linear" for format in self.formats}
        return [format for format, op in ops.items() if self.model.kernels.names[op] == "torch"]

    def reduce(self) -> None:
        """Call after the last micro-batch: the ranks agree on the largest magnitudes, and so on scales."""
        for scales in self.all_scales.values() if dist.is_initialized() else ():
            dist.all_reduce(scales.amax, dist.ReduceOp.MAX)

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """A context whose forward passes do not count for scales. Those of a compiled model do otherwise, in evaluation
        too, since it computes gradients as in training."""
        before = {scales: scales.amax.clone() for scales in self.all_scales.values()}
        try:
            yield
        finally:
            for scales, amax in before.items():
                scales.amax.copy_(amax)

    def advance(self) -> None:
        """Call after the optimizers' step: set the scales of the next one, and quantise the weights."""
        for scales in self.all_scales.values():
            scales.advance()
        self._quantize_weights()

    def _quantize_weights(self) -> None:
        for _, linear in self.layers:
            linear.low.refresh()
        if self.fp8_head:
            self.model.head.low.refresh()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The scales, for a checkpoint."""
        return {"scales": {}} | {name: scales.state() for name, scales in self.all_scales.items()}

    def restore(self, state: dict[str, Any], path: Path, world: World) -> None:
        """Go on from the checkpoint `state`, whose weights are loaded; scales that it lacks are measured anew.

        Raises `CheckpointError`."""
        for name, scales in self.all_scales.items():
            if state.get(name):
                checkpoint.restore({name: scales.state()}, state, path, world)
                scales.known = bool(scales.history.any())
        self._quantize_weights()

    def facts(self) -> dict[str, float]:
        """For the record of a run: the share of FLOPs in low precision, and whether it is simulated."""
        return {"low_flops": self.share, "simulated": self.simulated} if self.formats else {}

    def lines(self) -> list[str]:
        """What is in low precision, for people."""
        if not self.formats:
            return []
        parts = []
        if self.layers:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in self.layers))
            blocks = len({name.partition(".")[0] for name, _ in self.layers})
            parts.append(f"{self.precision}: {kinds} of {blocks} of {self.model.config.n_layer} layers")
        if self.fp8_head:
            parts.append("the head in fp8")
        found = [
            f"{' and '.join(parts)}, {self.share:.0%} of the training FLOPs; the rest in bf16, and MFU by the peak of "
            "bf16"
        ]
        own = [op for op in EMITTING if getattr(self.model.kernels, f"{op}_fp8") is None] if self.scales else []
        found += [
            f"{op} {self.model.kernels.names[op]}: its results are quantised in a pass of its own, by fp8_quantize"
            for op in own
        ]
        if self.simulated:
            found.append(
                f"SIMULATED: values are quantised to {' and '.join(self.simulated_formats)}, dequantised and "
                "multiplied in a wider format, which shows the quality of a run and not its speed"
            )
        return found


def check_whole(precision: str, head_precision: str, shard: str) -> None:
    """Raise `ConfigError` for low precision with sharded weights, of which no rank has a whole one to quantise."""
    low = [f"--precision={precision}"] if precision in LOW else []
    low += ["--head_precision=fp8"] if head_precision == "fp8" else []
    if low and shard != "off":
        raise ConfigError(f"{low[0]} quantises whole weights, which --shard={shard} divides: use --shard=off")


def check_head(
    head_precision: str, precision: Precision, device: torch.device, shape: ModelConfig, kernels: Kernels
) -> None:
    """Raise `ConfigError` or `HardwareError` for an FP8 head beside fp32 or fp16, on a device without FP8, of another
    width than `lower` takes, or with a user's own loss."""
    if head_precision != "fp8":
        return
    option, loss = "--head_precision=fp8", kernels.names["linear_cross_entropy"]
    if precision != "bf16":
        raise ConfigError(f"{option} goes with --precision=bf16, fp8, mxfp8 or nvfp4, not {precision}")
    check_fp8(device, "--head_precision=auto")
    if shape.d_model % MULTIPLE:
        raise ConfigError(f"{option} needs a model.d_model that is a multiple of {MULTIPLE}, not {shape.d_model}")
    if loss not in OPS["linear_cross_entropy"].implementations:
        raise ConfigError(f"{option} has its own loss, and would not call --kernels.linear_cross_entropy={loss}")


def lower(model: GPT, precision: str, head_precision: str = "auto") -> LowPrecision:
    """Make the linear layers of `low_layers` multiply in `precision`: fp8, mxfp8 or nvfp4; for others none. Make the
    head multiply in FP8 if `head_precision` is fp8.

    Call it once the weights are on their device, and `advance` after every optimizer step. Raises `ConfigError` if no
    layer can be lowered."""
    layers = list(low_layers(model, precision)) if precision in LOW else []
    if precision in LOW and not layers:
        raise ConfigError(
            f"--precision={precision} finds no layer to lower: the model's widths must be multiples of {MULTIPLE}, "
            "and nvfp4 takes 2 layers or more"
        )
    fp8_head = head_precision == "fp8"
    for linear in [linear for _, linear in layers] + [model.head] * fp8_head:
        linear.copy = None
    return LowPrecision(model, precision, layers, fp8_head)
