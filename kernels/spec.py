"""The definition of an op: implementations, test inputs, launch parameters, and a lower bound on its work.

Tests, benches, tuning and the compile gate are parametrised over `Op`. Registering an op in the table of `kernels` is
all it takes to have it tested, benched, tuned and compiled.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


class KernelError(ValueError):
    """A choice that names no implementation, one that this machine cannot run, or one that lacks a feature."""


@dataclass(frozen=True)
class Cost:
    """Minimum work of an op: bytes if every input is read once and every output written once, and FLOPs of the
    algorithm without recomputation."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class LaunchTable:
    """Launch parameters of one kernel by size class and card, and the candidates that `bench.tune` times.

    kernel: name, for reports.
    entries: `entries[size][card]` is a frozen record of the op's own type (block sizes, `num_warps`, ...). The card ""
        is the default for cards without an entry.
    candidates: the records worth timing for a size, most promising first.
    shapes: the shapes of the op to time a size at, as in `Op.bench_shapes`.
    backward: time the backward pass, not the forward.
    """

    kernel: str
    entries: dict[Hashable, dict[str, Any]]
    candidates: Callable[[Any], Iterable[Any]]
    shapes: Callable[[Any], tuple[Mapping[str, int], ...]]
    backward: bool = False

    def pick(self, size: Hashable, card: str) -> Any | None:
        """The record for a size on a card such as `sm_90`; None if the kernel does not run at that size there."""
        by_card = self.entries.get(size, {})
        return by_card.get(card, by_card.get(""))


@dataclass(frozen=True)
class Op:
    """An op, with everything that tests and benches need to know about it.

    implementations: functions of one signature, by name; `"torch"` is the reference, correct in every dtype up to
        float64.
    inputs: `inputs(shape, make)` builds the keyword arguments of a call from a shape (sizes by name) and a factory:
        `make(*size)` draws a normal tensor of the dtype and device under test.
    differentiable: names of the arguments that get a gradient.
    cost, backward_cost: `cost(shape, itemsize)` of the forward and of the backward, for inputs of `itemsize` bytes.
    test_shapes, bench_shapes: shapes to test and to time at; the compile gate compiles for the latter.
    compiled_shapes: more shapes for the compile gate.
    preferred: the implementation that `auto` takes, by device type; the reference for other types.
    mutates: names of the arguments, tensors or lists of tensors, that a call writes to. They are results of the op,
        which may return others or None.
    launches: tables of the launch parameters of its kernels.
    lacks: `lacks[implementation]` holds the features that it does not have, each with advice on what to use instead.
    cards: the cards whose instructions its Triton kernels need; none for any card.
    flops_rate: the rate of its matrix products on a card that has it, at most, over that of bf16.
    workspace: `workspace[implementation]` takes the arguments of a call and returns the bytes that its peak has beside
        arguments and results.
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    inputs: Callable[[Mapping[str, int], Callable[..., torch.Tensor]], dict[str, Any]]
    differentiable: tuple[str, ...]
    cost: Callable[[Mapping[str, int], int], Cost]
    backward_cost: Callable[[Mapping[str, int], int], Cost]
    test_shapes: tuple[Mapping[str, int], ...]
    bench_shapes: tuple[Mapping[str, int], ...]
    compiled_shapes: tuple[Mapping[str, int], ...] = ()
    preferred: Mapping[str, str] = field(default_factory=lambda: {"cuda": "triton"})
    mutates: tuple[str, ...] = ()
    launches: tuple[LaunchTable, ...] = ()
    lacks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cards: tuple[str, ...] = ()
    flops_rate: float = 1.0
    workspace: Mapping[str, Callable[..., int]] = field(default_factory=dict)

    def draw(self, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of a call at `shape`, drawn from `seed`; on the meta device their shapes alone."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

        def make(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=dtype, device=device)

        return self.inputs(shape, make)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32 for half precision, else the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)
