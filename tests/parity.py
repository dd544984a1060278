"""How tests draw the inputs of an op, call an implementation with gradients, and check it against float64.

On a GPU the Triton kernels run compiled; elsewhere in the interpreter, with every check of it on.
"""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.accuracy import evaluate, truth
from kernels.sanitizer import sanitize
from kernels.spec import Op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="asks the interpreter what was launched")

LOSS = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}  # options of both losses


def draw(op: Op, shape: dict[str, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    return op.draw(shape, dtype, DEVICE, seed)


def draw_leaves(op: Op, shape: dict[str, int]) -> dict[str, Any]:
    """Inputs in float32, those that the op is differentiable in requiring a gradient."""
    inputs = draw(op, shape)
    return inputs | {key: inputs[key].requires_grad_() for key in op.differentiable}


def checked(name: str) -> AbstractContextManager:
    """The sanitizer, for an implementation that runs Triton kernels in the interpreter."""
    return sanitize(shuffle=0) if name in ("triton", "auto") and DEVICE.type == "cpu" else nullcontext()


def results_of(op: Op, name: str, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of one implementation, by name. Memory is handed out filled with NaN, so that what is not
    written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with checked(name):
            return evaluate(op, op.implementations[name], inputs | options)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_accurate(op: Op, name: str, inputs: dict[str, Any], **options: Any) -> None:
    """By the rule in kernels/accuracy.py. `inplace` is no option of the reference."""
    expected = truth(op, inputs | {k: v for k, v in options.items() if k != "inplace"})
    result, ratio = expected.worst(results_of(op, name, inputs, **options))
    assert ratio <= 1, f"{result}: {ratio:.2f} of the error that rounding explains"


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> SimpleNamespace:
    """A device that torch takes for a GPU of this compute capability, called `a card`."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.version, "hip", hip)
    return SimpleNamespace(type="cuda")
