"""Tensors that may be sharded over ranks (`DTensor`): the local part, the whole, and values across both."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a `DTensor`, whose module takes half a second to import: plain tensors do without."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This rank's part of `x`, at the same address; `x` itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


@contextmanager
def whole(x: Tensor) -> Iterator[Tensor]:
    """A context that yields the whole of `x`, to change it in place. Each rank keeps its part of what that made.

    Called on all ranks, which must make the same changes."""
    if not is_sharded(x):
        yield x
        return
    gathered = x.full_tensor()
    yield gathered
    assign(x, gathered)


@torch.no_grad()
def assign(target: Tensor, source: Tensor) -> None:
    """Copy the whole tensor `source` to `target`, of which each rank takes its own part. Nothing is communicated."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    local(target).copy_(local(source))


def norms(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The 2-norm of each tensor, `[number of tensors]` on their device. Each is this rank's part of one that the ranks
    of `group` share, or whole if that is None."""
    result = torch.stack([torch.linalg.vector_norm(x) for x in tensors])
    return result if group is None else summed(result.square(), group).sqrt()


def summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up `x`, in place, over the ranks of `group`."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of the gradients of all parameters as one vector: a scalar."""
    parameters = list(parameters)
    norm = get_total_norm([local(p.grad) for p in parameters])
    group = shard_group(parameters[0])
    return norm if group is None else summed(norm.square(), group).sqrt()


def shard_group(x: Tensor) -> dist.ProcessGroup | None:
    """The group of ranks that hold the parts of `x`; None if it is not sharded."""
    if not is_sharded(x):
        return None
    return x.device_mesh.get_group(next(i for i, placement in enumerate(x.placements) if placement.is_shard()))
