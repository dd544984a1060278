"""An op at a shape: inputs, calls of an implementation forward and with gradients, and the least work."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.timing import Call
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
    """One multiprocessor's share of the rows, halved while the `amount` of work it is exceeds `most`."""
    shape = share_of_rows(shape)
    while amount(shape) > most and (fewer := share_of_rows(shape, 2)) != shape:
        shape = fewer
    return shape


def checked_share(op: Op, shape: dict[str, int]) -> dict[str, int]:
    """The shape with fewer sequences or rows, then fewer heads, so that the reference in float64 fits in memory and
    takes little time. Sequences and rows stay as long as they are: other lengths may have other kernels."""

    def large(shape: dict[str, int]) -> bool:
        cost = op.cost(shape, 2)
        return cost.flops > 5e10 or cost.bytes > 2**26

    while large(shape):
        fewer = share_of_rows(shape, 2)
        if fewer.get("T") != shape.get("T"):
            fewer = shape | {"H": shape["H"] // shape["KV"], "KV": 1}
        if fewer == shape:
            break
        shape = fewer
    return shape


class Case:
    """`op` at `shape`, on random inputs that are the same each time."""

    def __init__(self, op: Op, shape: dict[str, int], dtype: torch.dtype, device: torch.device):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device

    def passes(self) -> tuple[str, ...]:
        """Both passes; the forward alone of an op without gradients."""
        return PASSES if self.op.differentiable else PASSES[:1]

    def draw(self) -> tuple[dict, tuple[Tensor, ...]]:
        """New inputs, those to differentiate requiring it, and the gradients arriving at the outputs (1 at a loss)."""
        inputs = self.op.draw(self.shape, self.dtype, self.device)
        for key in self.op.differentiable:
            inputs[key].requires_grad_()
        if not self.op.differentiable:
            return inputs, ()
        shapes = self.op.draw(self.shape, self.dtype, torch.device("meta"))
        outputs = as_tuple(self.op.implementations["torch"](**shapes))
        generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(1)
        options = {"device": self.device, "generator": generator}
        ones = torch.ones((), dtype=torch.float32, device=self.device)
        return inputs, tuple(torch.randn(o.shape, dtype=o.dtype, **options) if o.ndim else ones for o in outputs)

    def call(self, function: Callable, name: str) -> Call:
        """A call on inputs of its own. It returns outputs, then what gradients it takes; of an op that writes to its
        arguments, those."""
        inputs, upstream = self.draw()
        leaves = [inputs[key] for key in self.op.differentiable]
        written = [x for key in self.op.mutates for x in tree_leaves(inputs[key]) if torch.is_tensor(x)]

        def forward():
            with torch.no_grad():
                outputs = function(**inputs)
            return tuple(written) if self.op.mutates else as_tuple(outputs)

        def forward_backward():
            outputs = as_tuple(function(**inputs))
            return *outputs, *torch.autograd.grad(outputs, leaves, upstream)

        def restore():
            drawn, _ = self.draw()
            with torch.no_grad():
                for old, new in zip(tree_leaves(inputs), tree_leaves(drawn), strict=True):
                    if torch.is_tensor(old):
                        old.copy_(new)

        return Call(forward if name == "forward" else forward_backward, restore)

    def cost(self, name: str) -> Cost:
        """The least work of a pass."""
        forward = self.op.cost(self.shape, self.dtype.itemsize)
        if name == "forward":
            return forward
        backward = self.op.backward_cost(self.shape, self.dtype.itemsize)
        return Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
