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

from kernels import (
    adamw,
    attention,
    block_quantize,
    block_scaled_linear,
    cross_entropy,
    fp8_linear,
    fp8_quantize,
    linear_cross_entropy,
    own,
    rmsnorm,
    rope,
    swiglu,
)
from kernels.common import card
from kernels.launch import AVAILABLE, c_compiler
from kernels.spec import KernelError, Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        rmsnorm.OP,
        rope.OP,
        attention.OP,
        swiglu.OP,
        linear_cross_entropy.OP,
        adamw.OP,
        fp8_linear.OP,
        fp8_quantize.OP,
        block_scaled_linear.OP,
        block_quantize.OP,
        cross_entropy.OP,
        cross_entropy.IN_PLACE_OP,
        rmsnorm.FP8_OP,
        swiglu.FP8_OP,
    )
}

EMITTING = ("rmsnorm", "swiglu")  # the ops that another, `<name>_fp8`, does with FP8 codes of its result

if os.environ.get("TRITON_INTERPRET") == "1" and AVAILABLE:
    from kernels.sanitizer import install

    install()


@dataclass(frozen=True)
class KernelChoice:
    """The implementation of `every` op, and another for single ones (an empty string follows `every`).

    An op also takes a function of the user's own, as `path.py:function`: kernels/own.py says what it must be like.
    There is a field for each op that a model or its trainer calls.
    """

    every: Annotated[str, "kernels of every op: auto, or an implementation's name"] = "auto"
    rmsnorm: Annotated[str, "torch or triton or path.py:function"] = ""
    rope: Annotated[str, "torch or triton or path.py:function"] = ""
    attention: Annotated[str, "torch or triton or sdpa or auto or path.py:function"] = ""
    swiglu: Annotated[str, "torch or triton or path.py:function"] = ""
    linear_cross_entropy: Annotated[str, "torch or triton or path.py:function"] = ""
    adamw: Annotated[str, "torch or triton or path.py:function"] = ""
    fp8_linear: Annotated[str, "torch or cublas or triton or path.py:function"] = ""
    fp8_quantize: Annotated[str, "torch or triton or path.py:function"] = ""
    block_scaled_linear: Annotated[str, "torch or triton or path.py:function"] = ""
    block_quantize: Annotated[str, "torch or triton or path.py:function"] = ""


@dataclass(frozen=True)
class Kernels:
    """The bound functions, one for each op, and by op the name of the implementation each one is.

    `rmsnorm_fp8` and `swiglu_fp8`, which also return FP8 codes, are of the same implementation as `rmsnorm` and
    `swiglu`; None where that is a function of the user's own.
    """

    rmsnorm: Callable[..., tuple[Tensor, Tensor]]
    rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    adamw: Callable[..., None]
    fp8_linear: Callable[..., Tensor]
    fp8_quantize: Callable[..., None]
    block_scaled_linear: Callable[..., Tensor]
    block_quantize: Callable[..., None]
    rmsnorm_fp8: Callable[..., tuple[Tensor, Tensor, Tensor]] | None
    swiglu_fp8: Callable[..., tuple[Tensor, Tensor]] | None
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

    `auto` takes what each op prefers on this type of device, and torch's where there is no C compiler. Triton kernels
    that need instructions of other cards are never taken for `auto`, nor for `triton` as the choice for every op.
    Raises `KernelError`, naming what there is, for an implementation that does not exist or cannot run here.
    """
    device, names, functions = torch.device(device), {}, {}
    by_op = dict(vars(choice))
    every = by_op.pop("every")
    if own.is_own(every):
        raise KernelError(f"{every} is one op's kernel: choose it with --kernels.{_op_of(every, by_op)}={every}")
    for op, name in by_op.items():
        wanted = name or every
        if own.is_own(wanted):
            functions[op] = _own(OPS[op], wanted, device)
        else:
            wanted = _automatic(OPS[op], device) if wanted == "auto" else _named(OPS[op], wanted, device, name != "")
            functions[op] = OPS[op].implementations[wanted]
        names[op] = wanted
    functions |= {f"{op}_fp8": OPS[f"{op}_fp8"].implementations.get(names[op]) for op in EMITTING}
    return Kernels(**functions, names=names)


def _op_of(name: str, ops: Mapping[str, str]) -> str:
    """The op that a user's function is most likely meant for."""
    return next(iter(difflib.get_close_matches(name.rpartition(":")[2], ops, 1)), "swiglu")


def _own(op: Op, wanted: str, device: torch.device) -> Callable:
    """The user's function. `torch.compile` calls it as it is, since it may launch kernels in ways unknown to it."""
    function = own.load(wanted, op)
    if own.has_triton_kernels(wanted):
        _check_triton(f"{wanted} has Triton kernels, which need", device)
    return torch.compiler.disable(function)


def has_card(op: Op, device: torch.device) -> bool:
    """Whether the card of `device` has the instructions that the Triton kernels of `op` need. Without a GPU they are
    interpreted, or compiled for a card elsewhere."""
    return not op.cards or device.type != "cuda" or not torch.cuda.is_available() or card(device) in op.cards


def _automatic(op: Op, device: torch.device) -> str:
    preferred = op.preferred.get(device.type, "torch")
    if preferred in ("triton", "auto") and c_compiler() is None:  # Triton can launch nothing
        preferred = "sdpa"
    if preferred == "triton" and not has_card(op, device):
        preferred = "torch"
    return preferred if preferred in op.implementations else "torch"


def _named(op: Op, wanted: str, device: torch.device, for_this_op: bool) -> str:
    if wanted not in op.implementations:
        near = difflib.get_close_matches(wanted, op.implementations, 1)
        hint = f" (did you mean {near[0]}?)" if near else f": give it one of them with --kernels.{op.name}"
        raise KernelError(f"{op.name} has no {wanted!r} kernel; it has {', '.join(op.implementations)}{hint}")
    if wanted == "triton" and not AVAILABLE:
        raise KernelError("Triton is not installed (it is published for Linux): use --kernels=torch")
    if wanted == "triton":
        _check_triton(f"the triton kernel of {op.name} needs", device)
        if not has_card(op, device):
            if for_this_op:
                raise KernelError(
                    f"the triton kernel of {op.name} needs instructions of {', '.join(op.cards)}, and this card is "
                    f"{card(device)}: use --kernels.{op.name}=torch"
                )
            return "torch"
    return wanted


def _check_triton(needs: str, device: torch.device) -> None:
    """Raise `KernelError` where Triton kernels can neither be compiled nor interpreted."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"{needs} a GPU and this run is on {device.type}: use --kernels=torch, "
            "or set TRITON_INTERPRET=1 to run it, slowly, in Triton's interpreter"
        )


__all__ = ["OPS", "KernelChoice", "KernelError", "Kernels", "bind", "has_card"]
