"""An op at a shape: inputs, calls of an implementation forward and with gradients, the least work, and the truth."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.spec import Cost, Op

PASSES = ("forward", "forward+backward")
MULTIPROCESSORS = 132  # of an H100


def share_of_rows(shape: dict[str, int], parts: int = MULTIPROCESSORS) -> dict[str, int]:
    """The shape with its rows, or tokens, shared out: by default one multiprocessor's, small enough for a CPU."""
    sizes = dict(shape)
    if "B" in sizes:
        sizes["B"] = max(1, shape["B"] // parts)
        sizes["T"] = max(1, min(shape["T"], shape["B"] * shape["T"] // parts // sizes["B"]))
        if shape.get("S") == shape["T"]:
            sizes["S"] = sizes["T"]
    else:
        key = "rows" if "rows" in sizes else "N"
        sizes[key] = max(1, shape[key] // parts)
    return sizes


def small_share(shape: dict[str, int], amount: Callable[[dict[str, int]], int], most: int) -> dict[str, int]:
    """One multiprocessor's share of the rows, halved until the `amount` of work it is does not exceed `most`."""
    shape = share_of_rows(shape)
    while amount(shape) > most:
        shape = share_of_rows(shape, 2)
    return shape


class Case:
    """`op` at `shape`, on random inputs that are the same each time."""

    def __init__(self, op: Op, shape: dict[str, int], dtype: torch.dtype, device: torch.device):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device

    def draw(self) -> tuple[dict, tuple[Tensor, ...]]:
        """New inputs, those to differentiate requiring it, and the gradients arriving at the outputs (1 at a loss)."""
        generator = torch.Generator(self.device).manual_seed(0)

        def make(*size):
            return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

        inputs = self.op.inputs(self.shape, make)
        for key in self.op.differentiable:
            inputs[key].requires_grad_()
        shapes = self.op.inputs(self.shape, lambda *size: torch.empty(size, dtype=self.dtype, device="meta"))
        outputs = as_tuple(self.op.implementations["torch"](**shapes))
        ones = torch.ones((), dtype=torch.float32, device=self.device)
        return inputs, tuple(make(*out.shape).to(out.dtype) if out.ndim else ones for out in outputs)

    def call(self, function: Callable, name: str, exact: bool = False) -> Callable[[], tuple[Tensor, ...]]:
        """A call on inputs of its own, in float64 with `exact`. It returns outputs, then what gradients it takes."""
        inputs, upstream = self.draw()
        if exact:
            inputs = {key: _widened(value) for key, value in inputs.items()}
            upstream = tuple(map(_widened, upstream))
        leaves = [inputs[key] for key in self.op.differentiable]

        def forward():
            with torch.no_grad():
                return as_tuple(function(**inputs))

        def forward_backward():
            outputs = as_tuple(function(**inputs))
            return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

        return forward if name == "forward" else forward_backward

    def cost(self, name: str) -> Cost:
        """The least work of a pass."""
        forward = self.op.cost(self.shape, self.dtype.itemsize)
        if name == "forward":
            return forward
        backward = self.op.backward_cost(self.shape, self.dtype.itemsize)
        return Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _widened(value):
    if not (torch.is_tensor(value) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def relative_error(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest ‖result - truth‖ / ‖truth‖ of several tensors; NaN where one holds a NaN."""
    errors = []
    for result, exact in zip(results, truth, strict=True):
        errors.append((result.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
    return torch.stack(errors).max().item()
