"""What an op is: its implementations, inputs to try it on, and the least work it can do.

Tests and benches are parametrised from `Op`, so an op that is in the table is tested and benched, and one that is not
does not exist.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """The least an op can do: every input read once and every output written once, and the algorithm's own FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class LaunchTable:
    """Launch parameters of one kernel by size and card, and what `bench.tune` tries instead of them.

    `entries[size][card]` is a frozen record of the op's own type (block sizes, `num_warps`, ...); the card "" stands
    for any that is not named. `candidates(size)` are the records worth timing, the most promising first, and
    `shapes(size)` the op's shapes to time them at, like `Op.bench_shapes`; `backward` times the backward alone.
    """

    kernel: str
    entries: dict[Hashable, dict[str, Any]]
    candidates: Callable[[Any], Iterable[Any]]
    shapes: Callable[[Any], tuple[Mapping[str, int], ...]]
    backward: bool = False

    def pick(self, size: Hashable, card: str) -> Any | None:
        """The record for a size on a card such as `sm_90`; None where that card does not run the kernel at it."""
        by_card = self.entries.get(size, {})
        return by_card.get(card, by_card.get(""))


@dataclass(frozen=True)
class Op:
    """One op and all that tests and benches need to know of it.

    `implementations` all share one signature; `"torch"` is the reference, correct in every dtype up to float64.
    `inputs(shape, make)` builds the keyword arguments of a call from a shape (named sizes) and a tensor factory:
    `make(*size)` draws normal values of the dtype and device under test. `differentiable` names the arguments that
    take a gradient. `cost(shape, itemsize)` counts the forward pass and `backward_cost` the backward, of inputs all of
    that size. `compiled_shapes` are for the compile gate alone, besides those of the bench. `preferred` is what `auto`
    takes on a device type, the reference where it names none. `mutates` names the arguments, tensors or lists of them,
    that a call writes to: they are its results, and it returns None. `launches` are the tables of its kernels' launch
    parameters.

    `lacks[implementation]` holds the features that one does not have, each with advice on what to take instead.
    `workspace[implementation]` takes the arguments of a call and counts the bytes that its peak has beside arguments
    and results.
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
    workspace: Mapping[str, Callable[..., int]] = field(default_factory=dict)

    def draw(self, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
        """The keyword arguments of a call at `shape`, drawn from `seed`; on the meta device their shapes alone."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

        def make(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, dtype=dtype, device=device)

        return self.inputs(shape, make)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype statistics are taken in: float32 for the half precisions, the tensor's own above."""
    return torch.promote_types(x.dtype, torch.float32)
