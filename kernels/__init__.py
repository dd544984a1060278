"""The table of ops, and the choice of an implementation for each.

A choice is a value: `KernelChoice` (what the user asked for) goes through `bind`, which checks it against the table and
the device and gives `Kernels`, plain functions that the model stores. Two models with different kernels live in one
process.
"""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from kernels import adamw, attention, cross_entropy, linear_cross_entropy, rmsnorm, rope, swiglu
from kernels.launch import AVAILABLE
from kernels.spec import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        rmsnorm.OP,
        rope.OP,
        attention.OP,
        swiglu.OP,
        linear_cross_entropy.OP,
        adamw.OP,
        cross_entropy.OP,
        cross_entropy.IN_PLACE_OP,
    )
}

if os.environ.get("TRITON_INTERPRET") == "1" and AVAILABLE:
    from kernels.sanitizer import install

    install()


@dataclass(frozen=True)
class KernelChoice:
    """The implementation of `every` op, and another for single ones (an empty string follows `every`).

    There is a field for each op that a model or its trainer calls, as in `Kernels`.
    """

    every: Annotated[str, "kernels of every op: auto, or an implementation's name"] = "auto"
    rmsnorm: Annotated[str, "torch or triton"] = ""
    rope: Annotated[str, "torch or triton"] = ""
    attention: Annotated[str, "torch or triton or sdpa or auto"] = ""
    swiglu: Annotated[str, "torch or triton"] = ""
    linear_cross_entropy: Annotated[str, "torch or triton"] = ""
    adamw: Annotated[str, "torch or triton"] = ""


class KernelError(ValueError):
    """A choice that names no implementation, one that this machine cannot run, or one that lacks a feature."""


@dataclass(frozen=True)
class Kernels:
    """The bound functions, one for each op, and by op the name of the implementation each one is."""

    rmsnorm: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    adamw: Callable[..., None]
    names: Mapping[str, str]

    def require(self, op: str, feature: str) -> None:
        """Raise `KernelError` where the implementation of `op` lacks `feature`."""
        name = self.names[op]
        if advice := OPS[op].lacks.get(name, {}).get(feature):
            raise KernelError(f"the {name} kernel of {op} has no {feature}: {advice}")

    def workspace(self, op: str, *arguments: Any, **options: Any) -> int:
        """Bytes at the peak of a call of `op` beside its arguments and results, as far as its implementation declares
        them: what it holds within a custom op, where torch's modes see nothing."""
        count = OPS[op].workspace.get(self.names[op])
        return 0 if count is None else count(*arguments, **options)

    def __str__(self) -> str:
        return ", ".join(f"{op} {name}" for op, name in self.names.items())


def bind(choice: KernelChoice, device: torch.device | str = "cpu") -> Kernels:
    """Turn a choice into functions that run on `device`.

    `auto` takes what each op prefers on this type of device. Raises `KernelError`, naming what there is, for an
    implementation that does not exist or cannot run here.
    """
    device, names = torch.device(device), {}
    by_op = dict(vars(choice))
    every = by_op.pop("every")
    for op, name in by_op.items():
        wanted = name or every
        names[op] = _automatic(OPS[op], device) if wanted == "auto" else _named(OPS[op], wanted, device)
    return Kernels(**{op: OPS[op].implementations[name] for op, name in names.items()}, names=names)


def _automatic(op: Op, device: torch.device) -> str:
    preferred = op.preferred.get(device.type, "torch")
    return preferred if preferred in op.implementations else "torch"


def _named(op: Op, wanted: str, device: torch.device) -> str:
    if wanted not in op.implementations:
        near = difflib.get_close_matches(wanted, op.implementations, 1)
        hint = f" (did you mean {near[0]}?)" if near else f": give it one of them with --kernels.{op.name}"
        raise KernelError(f"{op.name} has no {wanted!r} kernel; it has {', '.join(op.implementations)}{hint}")
    if wanted == "triton" and not AVAILABLE:
        raise KernelError("Triton is not installed (it is published for Linux): use --kernels=torch")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"the triton kernel of {op.name} needs a GPU and this run is on {device.type}: use --kernels=torch, "
            "or set TRITON_INTERPRET=1 to run it, slowly, in Triton's interpreter"
        )
    return wanted


__all__ = ["OPS", "KernelChoice", "KernelError", "Kernels", "bind"]
