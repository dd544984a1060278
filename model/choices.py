"""The options of the hardware, and what they come to on a device, where each `auto` becomes a choice."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch

from kernels import Kernels, bind
from model.gpt import check_kernels
from model.memory import Setup
from model.parallel import ShardChoice, pick_shard
from model.precision import check_head, check_whole
from runtime import hardware
from runtime.config import Heading
from runtime.distributed import World


@dataclass(frozen=True)
class HardwareConfig:
    """The device of a run, and how it is used."""

    hardware_and_precision: Heading
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    precision: Annotated[
        hardware.PrecisionChoice, "dtype (auto: bf16 if fast; fp8, mxfp8, nvfp4: of linear layers)"
    ] = "auto"
    head_precision: Annotated[Literal["auto", "fp8"], "the head and its loss (auto: not in FP8)"] = "auto"
    residual: Annotated[Literal["auto", "fp32", "bf16"], "residual stream (auto: bf16 on a GPU in bf16)"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile (auto: on a CPU with a C++ compiler)"] = "auto"
    capture: Annotated[Literal["auto", "on", "off"], "run the step as CUDA graphs (auto: on a GPU)"] = "auto"
    deterministic: Annotated[bool, "torch.use_deterministic_algorithms"] = False
    shard: Annotated[ShardChoice, "off: DDP; full: FSDP2; hybrid: HSDP (auto: off if the model fits)"] = "auto"


@dataclass(frozen=True)
class Choices:
    """Device, precision, kernels and modes of execution of a run."""

    device: torch.device
    precision: hardware.Precision
    kernels: Kernels
    compiled: bool
    captured: bool
    setup: Setup
    notes: dict[str, str]  # the lines of the modes, by label


def choose(config: Any, world: World) -> Choices:
    """Choose for the options `config` of train.py, and set the process up for the device. Raises `HardwareError`,
    `KernelError`, `ShardError` or `ConfigError`."""
    device = hardware.pick_device(world.device(config.device))
    hardware.set_up(device, config.deterministic)  # before anything is allocated, on another rank's GPU
    precision = hardware.pick_precision(config.precision, device)
    residual = hardware.pick_residual(config.residual, device, precision)
    kernels = bind(config.kernels, device)
    check_kernels(config.shape, kernels)
    check_head(config.head_precision, precision, device, config.shape, kernels)
    setup = Setup(config.shape, device.type, precision, residual, config.kernels, config)
    setup = pick_shard(config.shard, setup, device, world)
    check_whole(config.precision, config.head_precision, setup.shard)
    sharded, recompute_dropout = setup.shard != "off", bool(config.model.recompute and config.model.dropout)
    compiled, compile_note = hardware.pick_compile(config.compile, device, sharded)
    captured, capture_note = hardware.pick_capture(
        config.capture, device, precision, compiled, recompute_dropout, sharded
    )
    notes = {"shard": f"{setup.shard}, over {setup.shards} ranks"} if sharded else {}
    notes |= {"compile": compile_note, "capture": capture_note}
    return Choices(device, precision, kernels, compiled, captured, replace(setup, captured=captured), notes)
