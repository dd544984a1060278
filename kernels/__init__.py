"""The table of ops, and the choice of an implementation for each.

A choice is a value: `KernelChoice` (what the user asked for) goes through `bind`, which checks it against the table and
the device and gives `Kernels`, plain functions that the model stores. Two models with different kernels live in one
process.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated

import torch

from kernels import adamw, attention, cross_entropy, linear_cross_entropy, rmsnorm, rope, swiglu
from kernels.launch import AVAILABLE
from kernels.spec import Op

OPS: dict[str, Op] = {
    room.OP.name: room.OP
    for room in (
        rmsnorm,
        rope,
        attention,
        swiglu,
        linear_cross_entropy,
        adamw,
    )
}

# What tests and benches go over: the table, and the part of an op that is usable alone.
TESTED: tuple[Op, ...] = (*OPS.values(), cross_entropy.OP, cross_entropy.IN_PLACE_OP)

if os.environ.get("TRITON_INTERPRET") == "1" and AVAILABLE:
    from kernels.interpreter import install

    install()

KernelChoice = make_dataclass(
    "KernelChoice",
    [
        (
            "every",
            Annotated[str, "kernels of every op: auto, or an implementation's name"],
            field(default="auto"),
        )
    ]
    + [(name, Annotated[str, " or ".join(op.implementations)], field(default="")) for name, op in OPS.items()],
    frozen=True,
)
KernelChoice.__doc__ = "`every` op's implementation, and per op another (an empty string follows `every`)."


class KernelError(ValueError):
    """A choice that names no implementation, or one that this machine cannot run."""


@dataclass(frozen=True)
class Kernels:
    """The bound functions, one an op, and the name of the implementation each one is."""

    functions: dict[str, Callable]
    names: dict[str, str]

    def __getattr__(self, op: str) -> Callable:
        try:
            return self.__dict__["functions"][op]
        except KeyError:
            raise AttributeError(f"no op called {op!r}") from None

    def __str__(self) -> str:
        return ", ".join(f"{op} {name}" for op, name in self.names.items())


def bind(choice: KernelChoice, device: torch.device | str = "cpu") -> Kernels:
    """Turn a choice into functions that run on `device`.

    `auto` takes what each op prefers on this type of device. Raises `KernelError`, naming what there is, for an
    implementation that does not exist or cannot run here.
    """
    device = torch.device(device)
    names = {}
    for op in OPS.values():
        wanted = getattr(choice, op.name) or choice.every
        names[op.name] = _automatic(op, device) if wanted == "auto" else _named(op, wanted, device)
    return Kernels({op: OPS[op].implementations[name] for op, name in names.items()}, names)


def _automatic(op: Op, device: torch.device) -> str:
    preferred = op.preferred.get(device.type, "torch")
    return preferred if preferred in op.implementations else "torch"


def _named(op: Op, wanted: str, device: torch.device) -> str:
    if wanted not in op.implementations:
        near = difflib.get_close_matches(wanted, op.implementations, 1)
        hint = f" (did you mean {near[0]}?)" if near else f": give it one of them with --kernels.{op.name}"
        raise KernelError(f"{op.name} has no {wanted!r} kernel; it has {', '.join(op.implementations)}{hint}")
    if wanted == "triton" and not AVAILABLE:
        raise KernelError("Triton is not installed (it is published for Linux): take --kernels=torch")
    if wanted == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"the triton kernel of {op.name} needs a GPU and this run is on {device.type}: take --kernels=torch, "
            "or set TRITON_INTERPRET=1 to run it, slowly, in Triton's interpreter"
        )
    return wanted


__all__ = ["OPS", "TESTED", "KernelChoice", "KernelError", "Kernels", "bind"]
