"""What the options of a run come to on its device: each `auto` becomes a choice, with a line that says why."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels import Kernels, bind
from model.gpt import check_kernels
from model.memory import Setup
from model.parallel import pick_shard
from model.precision import check_whole
from runtime import hardware
from runtime.distributed import World


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
    """Choose for the options `config` of train.py. Raises `HardwareError`, `KernelError`, `ShardError` or
    `ConfigError`."""
    device = hardware.pick_device(world.device(config.device))
    if device.index is not None:
        torch.cuda.set_device(device)  # before anything is allocated on another rank's GPU
    precision = hardware.pick_precision(config.precision, device)
    residual = hardware.pick_residual(config.residual, device, precision)
    kernels = bind(config.kernels, device)
    check_kernels(config.shape, kernels)
    setup = Setup(config.shape, device.type, precision, residual, config.kernels, config)
    setup = pick_shard(config.shard, setup, device, world)
    check_whole(config.precision, setup.shard)
    sharded, recompute_dropout = setup.shard != "off", bool(config.model.recompute and config.model.dropout)
    compiled, compile_note = hardware.pick_compile(config.compile, device, sharded)
    captured, capture_note = hardware.pick_capture(
        config.capture, device, precision, compiled, recompute_dropout, sharded
    )
    notes = {"shard": f"{setup.shard}, over {setup.shards} ranks"} if sharded else {}
    notes |= {"compile": compile_note, "capture": capture_note}
    return Choices(device, precision, kernels, compiled, captured, replace(setup, captured=captured), notes)
