"""Sharing out work on whole matrices: each is worked on by one rank, its owner."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from model.tensors import local, shard_group
from runtime.capture import outside_graphs
from runtime.distributed import ALONE, World


class Owners:
    """The owners of matrices that all ranks have (DDP) or of which each has some rows (FSDP2).

        whole = owners.collect(gradients)      # of this rank's own matrices
        parts = owners.spread(updates, dtype)  # from the updates of those: what this rank has of every matrix

    The largest matrix left goes to the rank with the least. Replicas of a sharded model (HSDP) each do all the work."""

    def __init__(self, matrices: Sequence[Tensor], world: World = ALONE):
        sharding = shard_group(matrices[0])
        self.sharded = sharding is not None
        self.group = dist.group.WORLD if world.size > 1 and not self.sharded else sharding
        self.size = self.group.size() if self.group else 1
        self.rank = self.group.rank() if self.group else 0
        self.device = matrices[0].device
        self.shapes = [tuple(x.shape) for x in matrices]
        self.owned: list[list[int]] = [[] for _ in range(self.size)]  # by rank, the matrices' indices in order
        loads = [0] * self.size
        for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].numel()):
            rank = loads.index(min(loads))
            loads[rank] += matrices[i].numel()
            self.owned[rank].append(i)
        for indices in self.owned:
            indices.sort()

    @property
    def mine(self) -> list[int]:
        """Indices of this rank's matrices."""
        return self.owned[self.rank]

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's matrices whole, from what every rank has of all."""
        if not self.sharded:
            return [parts[i] for i in self.mine]
        outgoing = [[local(parts[i]) for i in indices] for indices in self.owned]
        incoming = [[self._rows(i, rank) for i in self.mine] for rank in range(self.size)]
        return list(map(torch.cat, zip(*self._exchange(outgoing, incoming, parts[0].dtype), strict=True)))

    def spread(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return what this rank has of every matrix, from this rank's own ones, which are whole and in `dtype`."""
        if self.size == 1:
            return list(matrices)
        if self.sharded:
            pieces = [
                x.split([self._rows(i, rank)[0] for rank in range(self.size)])
                for i, x in zip(self.mine, matrices, strict=True)
            ]
            outgoing = [[rows[rank] for rows in pieces] for rank in range(self.size)]
            incoming = [[self._rows(i, self.rank) for i in indices] for indices in self.owned]
            found = self._exchange(outgoing, incoming, dtype)
        else:
            found = self._gather(matrices, dtype)
        parts = dict(zip(chain(*self.owned), chain(*found), strict=True))
        return [parts[i] for i in range(len(parts))]

    def gather(self, matrices: Iterable[Tensor]) -> list[Tensor]:
        """Return every matrix on rank 0, in host memory if another rank owns it. `matrices` has this rank's own ones;
        the others, on the meta device, stay so on other ranks, and everywhere if the model is sharded."""
        gathered = list(matrices)
        if self.sharded or self.size == 1:
            return gathered
        owners = {i: rank for rank, indices in enumerate(self.owned) for i in indices}
        for i, matrix in enumerate(gathered):
            if owners[i] and self.rank == 0:
                matrix = torch.empty(matrix.shape, dtype=matrix.dtype, device=self.device)
                dist.recv(matrix, owners[i], group=self.group)
                gathered[i] = matrix.cpu()
            elif owners[i] == self.rank != 0:
                dist.send(matrix, 0, group=self.group)
        return gathered

    def _rows(self, i: int, rank: int) -> tuple[int, int]:
        """The shape of the rows of matrix `i` that FSDP2 leaves with `rank`: chunks, the last of which may be shorter
        or empty."""
        rows, columns = self.shapes[i]
        chunk = -(-rows // self.size)
        return max(0, min(chunk, rows - rank * chunk)), columns

    def _exchange(
        self, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int]]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send a list of matrices to each rank. Returns those from each rank, whose shapes are `incoming`."""
        sizes = [sum(math.prod(shape) for shape in shapes) for shapes in incoming]
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        sent = [_flat(matrices, received) for matrices in outgoing]
        dist.all_to_all_single(received, torch.cat(sent), sizes, [len(x) for x in sent], group=self.group)
        return [_unflat(flat, shapes) for flat, shapes in zip(received.split(sizes), incoming, strict=True)]

    def _gather(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> list[list[Tensor]]:
        """Send this rank's matrices to all. Returns those of each rank."""
        shapes = [[self.shapes[i] for i in indices] for indices in self.owned]
        sizes = [sum(math.prod(shape) for shape in of_rank) for of_rank in shapes]
        received = torch.empty(self.size, max(sizes), dtype=dtype, device=self.device)
        sent = torch.empty_like(received[0])
        sent[: sizes[self.rank]] = _flat(matrices, sent)
        outside_graphs(partial(dist.all_gather_into_tensor, received.view(-1), sent, group=self.group))
        flats = (flat[:size] for flat, size in zip(received, sizes, strict=True))
        return [_unflat(flat, of_rank) for flat, of_rank in zip(flats, shapes, strict=True)]


def _flat(matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    """All values of `matrices` in one vector, empty and like `like` if there are none."""
    return torch.cat([x.flatten() for x in matrices]) if matrices else like.new_empty(0)


def _unflat(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The matrices of `shapes` whose values `flat` has, as views."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
