"""Data parallelism: every rank trains the model on its rows of the batch, and gradients are summed over the ranks.

`build_model` builds the model, whole on every rank or sharded (`model/shard.py`), and `wrap` returns the way to sum.
Losses are scaled by the number of targets of the whole batch, so gradients are summed, not averaged.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from kernels import Kernels
from model.gpt import GPT
from model.memory import USABLE, Setup, predict
from model.tensors import is_sharded
from runtime.distributed import World
from runtime.errors import UserError
from runtime.hardware import DTYPES, free_memory

ShardChoice = Literal["auto", "off", "full", "hybrid"]
BUCKET_BYTES = 25 * 2**20  # torch's default size of a bucket


class ShardError(UserError):
    """A run whose model cannot be sharded."""


def pick_shard(name: ShardChoice, setup: Setup, device: torch.device, world: World) -> Setup:
    """Choose how the ranks share the model's weights, gradients and optimizer state. Returns `setup` with that.

    With `off` each rank has the whole model (DDP). `full` shards it over all ranks; `hybrid` over those of a machine,
    and replicates it across machines (HSDP). `auto` shards if the whole model takes more memory than a GPU has free,
    and then within a machine if that suffices. Raises `ShardError`."""
    setup = replace(setup, ranks=world.size, local_ranks=world.local_size, shard="off")
    hybrid, full = replace(setup, shard="hybrid"), replace(setup, shard="full")
    if name == "auto" and world.size > 1 and device.type == "cuda":
        room = min(world.gather(int(USABLE * free_memory(device))))
        if predict(setup, 1).peak > room:
            within = world.size > world.local_size and predict(hybrid, 1).peak <= room
            name = "hybrid" if within else "full"
    if name in ("auto", "off"):
        return setup
    if not dist.is_initialized():
        raise ShardError(f"shard {name} needs several ranks: start the job with torchrun, or use --shard=off")
    if setup.precision == "fp16":
        raise ShardError(f"shard {name} needs precision bf16 or fp32, not fp16, whose losses each rank would scale")
    if name == "hybrid" and world.size % world.local_size:
        raise ShardError(f"shard hybrid needs as many ranks on each machine, and {world.size} are not")
    return full if name == "full" else hybrid


def build_model(setup: Setup, kernels: Kernels, device: torch.device) -> GPT:
    """Build the model of `setup` on `device`. Its initial weights do not depend on the sharding."""
    half = None if setup.precision == "fp32" else DTYPES[setup.precision]
    if setup.shard != "off":
        from model.shard import build_sharded  # torch's FSDP2 takes half a second to import

        model = build_sharded(setup.shape, kernels, device, half, setup.shards)
    else:
        with device:
            model = GPT(setup.shape, kernels)
        if half:
            model.keep_copies(half)
    model.residual = setup.residual
    return model


class Parallel:
    """A model on one rank, or sharded by FSDP2, which sums gradients in every backward pass: nothing is left to sum."""

    def __init__(self, model: nn.Module, forward: nn.Module):
        """`forward` is the model or its compiled form."""
        self.model, self.forward = model, forward

    def __call__(self, *args: Any) -> Tensor:
        """The model's forward pass, in training."""
        return self.forward(*args)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """A context for the forward and backward passes of all micro-batches but the last: their gradients are left
        to be summed with those of a later one."""
        yield

    def reduce(self) -> None:
        """Call after the last micro-batch: sum over the ranks the gradients that no backward pass has summed."""


class Buckets(Parallel):
    """Gradients are summed after the backward pass, in flat buckets. A CUDA graph of that pass then has no collective
    operation in it, whose time-out would be lost."""

    def __init__(self, model: nn.Module, forward: nn.Module):
        super().__init__(model, forward)
        self.buckets: list[list[nn.Parameter]] = [[]]
        size = 0
        for p in reversed(list(model.parameters())):
            if size and size + p.nbytes > BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes

    @torch.no_grad()
    def reduce(self) -> None:
        sums = []
        for bucket in self.buckets:
            grads = [p.grad for p in bucket]
            flat = _flatten_dense_tensors(grads)
            sums.append((grads, flat, dist.all_reduce(flat, async_op=True)))
        for grads, flat, work in sums:
            work.wait()
            torch._foreach_copy_(grads, _unflatten_dense_tensors(flat, grads))


class Overlapped(Buckets):
    """Gradients are summed by torch's DDP while the backward pass runs."""

    def __init__(self, model: nn.Module, forward: nn.Module):
        super().__init__(model, forward)
        # The model's buffers are constants, and half-precision copies of weights, which the optimizers update.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a later torch may rename this option
            self.ddp = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.ddp.register_comm_hook(None, _sum)
        self.left = False  # whether the last backward pass left its gradients

    def __call__(self, *args: Any) -> Tensor:
        self.left = not self.ddp.require_backward_grad_sync
        return self.ddp(*args)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self.ddp.no_sync():
            yield

    def reduce(self) -> None:
        if self.left:
            super().reduce()


def _sum(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the ranks, where DDP would take their mean."""
    done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


def wrap(model: nn.Module, forward: nn.Module, world: World, captured: bool) -> Parallel:
    """The way to train `model`, whose weights are equal on all ranks, by its forward pass `forward`.

    `captured`: whether the step becomes CUDA graphs."""
    if world.size == 1 or is_sharded(next(model.parameters())):
        return Parallel(model, forward)
    return (Buckets if captured else Overlapped)(model, forward)
