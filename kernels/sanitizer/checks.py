"""A sanitizer for Triton kernels: reports what a GPU does not, and counts what launches do.

It finds accesses out of bounds, races between programs, two lanes of a store at one address, integer overflow and
dependence on the order of programs. It does not see races between the threads of one program.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
import triton.language as tl

from .interpreter import Access, Index, Observer, observe


class SanitizerError(AssertionError):
    """A kernel did what on a GPU is undefined: the message names kernel, program, argument and byte."""


@dataclass
class Counts:
    """What launches did. An atomic is a read and a write; FLOPs are those of `tl.dot`, 2 a multiply-add."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0


@dataclass
class Record(Counts):
    """What all launches did, and those of each kernel by its name."""

    kernels: dict[str, Counts] = field(default_factory=dict)


@contextlib.contextmanager
def sanitize(
    *, bounds: bool = True, races: bool = True, overflow: bool = True, shuffle: int | None = None
) -> Iterator[Record]:
    """Check every launch within the block, and count what it moves.

    Args:
        bounds: each access stays within the extents (by shape and strides) of the tensor that its pointer came from.
            A pointer cast from an integer or another type may go to any tensor of the launch.
        races: no program touches an element that another one stores; atomics may meet atomics; no store has two lanes
            at one address. Programs that wait for each other through atomics are reported all the same.
        overflow: integer sums, differences and products fit their type, in masked lanes too.
        shuffle: seed of a random order of programs; None for the order of their numbers.

    Yields the `Record` of this block. Raises `SanitizerError` from the launch.
    """
    sanitizer = _Sanitizer(bounds, races, None if shuffle is None else np.random.default_rng(shuffle))
    with observe(sanitizer, debug=True, sanitize_overflow=overflow):
        yield sanitizer.record


@dataclass
class _Argument:
    """A tensor argument: its bytes are addresses `start` to `end`."""

    name: str
    start: int
    end: int
    itemsize: int
    pointer: tl.dtype  # kept alive: arguments are known by its id
    shadow: "_Shadow | None" = None


class _Sanitizer(Observer):
    """The checks, the record, and the state of the launch under way."""

    def __init__(self, bounds: bool, races: bool, rng: np.random.Generator | None):
        self.bounds, self.races, self.rng = bounds, races, rng
        self.record = Record()

    def launch(self, kernel: str) -> None:
        self.kernel = kernel
        self.arguments: dict[int, _Argument] = {}  # by id of their pointer type
        self._count(launches=1)

    def argument(self, name: str, tensor: torch.Tensor, pointer: tl.dtype) -> None:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        end = start + (last + 1) * itemsize if tensor.numel() else start
        self.arguments[id(pointer)] = _Argument(name, start, end, itemsize, pointer)

    def grid(self, size: Index) -> None:
        self.size = size
        self.order = None if self.rng is None else self.rng.permutation(math.prod(size))
        if self.races:
            _share_shadows(self.arguments.values())

    def program(self, index: Index) -> Index:
        self.running = index if self.order is None else self._index(self.order[self._number(index)])
        return self.running

    def access(self, kind: Access, addresses: np.ndarray, itemsize: int, pointer: tl.dtype) -> None:
        moved = addresses.size * itemsize
        self._count(bytes_read=moved * (kind != "store"), bytes_written=moved * (kind != "load"))
        own = self.arguments.get(id(pointer))
        for argument in [own] if own else self.arguments.values():
            inside = (addresses >= argument.start) & (addresses + np.uint64(itemsize) <= argument.end)
            if self.races and inside.any():
                self._check_races(kind, argument, addresses[inside], itemsize)
            addresses = addresses[~inside]
            if not addresses.size:
                return
        if self.bounds and addresses.size:
            at = int(addresses.view(np.int64)[0])
            nearest = own or min(self.arguments.values(), key=lambda a: min(abs(at - a.start), abs(at - a.end)))
            self._fail(
                f"{kind} of {itemsize} bytes at byte {at - nearest.start} of {nearest.name}, which has "
                f"{nearest.end - nearest.start} ({addresses.size} lanes out of bounds)"
            )

    def dot(self, flops: int) -> None:
        self._count(flops=flops)

    def assertion_failed(self, message: str) -> None:
        self._fail(message)

    def _check_races(self, kind, argument, addresses, itemsize):
        number = self._number(self.running) + 1
        if conflict := argument.shadow.touch(kind, addresses, itemsize, number):
            address, earlier, other = conflict
            special = {number: "another lane of this program", _SEVERAL: "several programs"}
            self._fail(
                f"race: {kind} at byte {address - argument.start} of {argument.name}, where "
                f"{special.get(other) or f'program {self._index(other - 1)}'} did {earlier}"
            )

    def _fail(self, message: str) -> NoReturn:
        raise SanitizerError(f"{self.kernel}, program {self.running}: {message}")

    def _count(self, **amounts: int) -> None:
        for counts in (self.record, self.record.kernels.setdefault(self.kernel, Counts())):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)

    def _number(self, index: Index) -> int:
        return int(np.ravel_multi_index(index, self.size))

    def _index(self, number: int) -> Index:
        return tuple(int(i) for i in np.unravel_index(number, self.size))


_CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}
_SEVERAL = -1


class _Shadow:
    """Shadow memory: which program has touched each element of a piece of memory, during one launch.

    A program is its number + 1, so that 0 is nobody and a large tensor costs nothing until it is touched.
    """

    def __init__(self, start: int, end: int, grain: int):
        """`grain` is the bytes of an element."""
        self.start, self.grain = start, grain
        self.program = {kind: np.zeros((end - start) // grain, np.int32) for kind in _CONFLICTS}
        self.lane = np.zeros((end - start) // grain, np.int32)

    def touch(self, kind: Access, addresses: np.ndarray, itemsize: int, program: int) -> tuple[int, str, int] | None:
        """Note an access, or give the address, kind and program of an earlier one that it conflicts with."""
        if itemsize < self.grain:
            self.program = {kind: touched.repeat(self.grain // itemsize) for kind, touched in self.program.items()}
            self.lane = self.lane.repeat(self.grain // itemsize)
            self.grain = itemsize
        elements = (addresses - np.uint64(self.start)).astype(np.int64) // self.grain
        if itemsize > self.grain:
            elements = (elements[:, None] + np.arange(itemsize // self.grain)).ravel()
        if kind == "store":
            lanes = np.arange(elements.size, dtype=np.int32)
            self.lane[elements] = lanes
            overwritten = self.lane[elements] != lanes
            if overwritten.any():
                return self._first(elements, overwritten), kind, program
        for earlier in _CONFLICTS[kind]:
            touched = self.program[earlier][elements]
            conflict = (touched != 0) & (touched != program)
            if conflict.any():
                return self._first(elements, conflict), earlier, int(touched[conflict][0])
        touched = self.program[kind][elements]
        self.program[kind][elements] = np.where((touched == 0) | (touched == program), program, _SEVERAL)
        return None

    def _first(self, elements: np.ndarray, among: np.ndarray) -> int:
        return self.start + int(elements[among][0]) * self.grain


def _share_shadows(arguments: Iterable[_Argument]) -> None:
    """Give each argument its shadow memory, and arguments that overlap the same one."""
    groups: list[list[_Argument]] = []
    end = 0
    for argument in sorted(arguments, key=lambda argument: argument.start):
        if argument.start >= end:
            groups.append([])
        groups[-1].append(argument)
        end = max(end, argument.end)
    for group in groups:
        start, end = group[0].start, max(argument.end for argument in group)
        shadow = _Shadow(start, end, grain=min(argument.itemsize for argument in group))
        for argument in group:
            argument.shadow = shadow
