"""An op timed by all that do it, in one process and in turns, once each was checked against float64."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.rivals import RIVALS
from bench.timing import Call, measure, reason, synchronize
from kernels.accuracy import Truth, evaluate, truth
from kernels.launch import IMPLEMENTATIONS
from kernels.spec import Cost, Op
from runtime.hardware import device_name, pick_device, rated_bandwidth, rated_flops

PASSES = ("forward", "forward+backward")
DEVICE = pick_device("auto")
META = torch.device("meta")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
TURNS_S = 0.4 if GPU else 0.2  # seconds of timing for a case
RIVALS_ERROR = 4.0  # times what rounding explains: a rival may round more often than the reference does
N_SM = 132  # of an H100


def fewer_rows(shape: Mapping[str, int], parts: int = 2) -> dict[str, int]:
    """The shape with a part of its rows or sequences; of a single sequence, a part of its tokens."""
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


def fewer_rows_or_heads(shape: Mapping[str, int]) -> dict[str, int]:
    """Sequences and rows stay as long as they are: other lengths may have other kernels."""
    fewer = fewer_rows(shape)
    if fewer.get("T") == shape.get("T"):
        return fewer
    return dict(shape) | {"H": shape["H"] // shape["KV"], "KV": 1}


def shrink(shape: Mapping[str, int], fits: Callable[[Mapping], bool], smaller: Callable = fewer_rows) -> dict[str, int]:
    """The shape, made smaller until it fits or cannot be made so."""
    while not fits(shape) and (less := smaller(shape)) != shape:
        shape = less
    return dict(shape)


def cpu_shape(op: Op, shape: Mapping[str, int]) -> dict[str, int]:
    """The shape with the rows of one SM, or fewer, to be timed on a CPU."""
    return shrink(fewer_rows(shape, N_SM), lambda s: op.cost(s, DTYPE.itemsize).flops <= 2e9)


def checked_shape(op: Op, shape: Mapping[str, int]) -> dict[str, int]:
    """The shape with fewer sequences or rows, then fewer heads, so that float64 fits and takes little time."""

    def fits(shape: Mapping[str, int]) -> bool:
        cost = op.cost(shape, 2)
        return cost.flops <= 5e10 and cost.bytes <= 2**26

    return shrink(shape, fits, fewer_rows_or_heads)


class Case:
    """`op` at `shape`, on random inputs that are the same each time."""

    def __init__(self, op: Op, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device
        self.passes = PASSES if op.differentiable else PASSES[:1]

    def draw(self) -> tuple[dict, tuple[Tensor, ...]]:
        """New inputs, those to differentiate requiring it, and the gradients arriving at the outputs (1 at a loss)."""
        inputs = self.op.draw(self.shape, self.dtype, self.device)
        for key in self.op.differentiable:
            inputs[key].requires_grad_()
        if not self.op.differentiable:
            return inputs, ()
        outputs = as_tuple(self.op.implementations["torch"](**self.op.draw(self.shape, self.dtype, META)))
        options = {"device": self.device, "generator": None}
        if self.device != META:
            options["generator"] = torch.Generator(self.device).manual_seed(1)
        ones = torch.ones((), dtype=torch.float32, device=self.device)
        return inputs, tuple(torch.randn(x.shape, dtype=x.dtype, **options) if x.ndim else ones for x in outputs)

    def call(self, function: Callable, name: str) -> Call:
        """A call on inputs of its own. It returns outputs and gradients, or the arguments that the op writes to."""
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

    def least_seconds(self, name: str, card: str) -> float:
        """The least time of a pass at the rated speeds of a card's memory and tensor cores; 0 for an unknown card.

        Of both passes in one call, the bytes of the one that moves more: the second may find in L2 what it reads."""
        total, forward = self.cost(name), self.cost("forward")
        moved = max(forward.bytes, total.bytes - forward.bytes)
        return max(moved / (rated_bandwidth(card) or math.inf), total.flops / (rated_flops(card) or math.inf))

    def input_sets(self) -> int:
        """How many copies of the inputs to rotate so that every call finds L2 cold."""
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if GPU else 0
        return max(1, math.ceil(3 * cache / self.cost("forward").bytes))


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def on_meta() -> Iterator[None]:
    """Host functions run on meta tensors, and so come as far as the launches of their kernels."""
    library = torch.library.Library("nanofuse", "IMPL")
    for name, function in IMPLEMENTATIONS.items():  # in place of the fake, which launches nothing
        library.impl(name, function, "Meta", allow_override=True)
    try:
        with patch.object(torch, "is_autocast_enabled", lambda device: False):  # torch has none for meta, and raises
            yield
    finally:
        library._destroy()


def contenders(op: Op) -> tuple[dict[str, Callable], dict[str, str]]:
    """Functions by name, ours first; and why others cannot be had here. `auto` only calls one of them."""
    found = {name: f for name, f in op.implementations.items() if name not in ("torch", "auto")}
    absent = {} if GPU or not found.pop("triton", None) else {"triton": "there is no GPU"}
    found["torch"] = op.implementations["torch"]
    torch._dynamo.reset()
    found["torch.compile"] = torch.compile(op.implementations["torch"], fullgraph=True, dynamic=False)
    for name, make in RIVALS.get(op.name, {}).items() if GPU else ():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            absent[name] = reason(error)
    return found, absent


def truth_of_written(op: Op, inputs: dict) -> Truth:
    """The exact values of an op's arguments after it wrote to them; half-precision ones are rounded from that.

    The reference may call fused operations over lists, which `truth` does not follow: rounding is taken to explain one
    unit in the last place."""

    def widened(key: str, x: Tensor) -> Tensor:
        half = key in op.mutates and x.itemsize < 4
        return x.double() if x.is_floating_point() and not half else x

    wide = {key: tree_map_only(Tensor, partial(widened, key), value) for key, value in inputs.items()}
    exact = {key: x.double() for key, x in evaluate(op, op.implementations["torch"], wide).items()}
    dtypes = {key: x.dtype for key, x in evaluate(op, lambda **_: None, inputs).items()}
    return Truth(exact, {key: torch.finfo(dtypes[key]).eps * x.abs() for key, x in exact.items()}, dtypes)


def check(op: Op, shape: Mapping[str, int], functions: Mapping[str, Callable], name: str) -> dict[str, dict]:
    """Compare functions in a pass with float64, by the rule in kernels/accuracy.py, at a part of the shape.

    Returns the largest `error` of each, over what rounding explains; and `failed`, the reason, where it is wrong or
    raised. Results may be in another dtype than the reference's. Raises where a function has left the card unable to
    work: all that follow would fail too."""
    op = op if name == PASSES[1] else replace(op, differentiable=())
    inputs, _ = Case(op, checked_shape(op, shape), DTYPE, DEVICE).draw()
    exact = (truth_of_written if op.mutates else truth)(op, inputs)
    rivals, results = {"torch.compile", *RIVALS.get(op.name, ())}, {}
    for who, function in functions.items():
        try:
            found = evaluate(op, function, inputs)
            worst, ratio = exact.worst({key: x.to(exact.dtypes[key]) for key, x in found.items()})
            results[who] = {"error": ratio}
            if ratio > (RIVALS_ERROR if who in rivals else 1.0):
                results[who]["failed"] = f"wrong: {worst} is off by {ratio:.1f} times what rounding explains"
        except Exception as error:  # whatever a rival raises, the others are checked
            results[who] = {"failed": reason(error)}
        synchronize()
    return results


def doubt(measured: dict, least: float) -> str | None:
    """Why a measurement is not believed: other results after timing than before, or a speed beyond the card's."""
    drift, allowed = measured["drift"], torch.finfo(DTYPE).eps + 1e-5
    if not drift <= allowed:
        return f"other results after it was timed: relative error {drift:.1e}, where {allowed:.1e} is allowed"
    seconds = median(measured.get("cold", measured["warm"]))
    if seconds < least:
        return f"impossible: {1e6 * seconds:,.1f} us, where the card's rated speeds allow {1e6 * least:,.1f}"
    return None


def contest(
    op: Op, shape: Mapping[str, int], name: str, functions: Mapping[str, Callable], ceiling: Mapping[str, float]
) -> tuple[dict, dict[str, list[float]]]:
    """Check and time functions in a pass. Returns the row to record, with medians, and the samples of each by name."""
    results, case = check(op, shape, functions, name), Case(op, shape, DTYPE, DEVICE)
    right = {who: f for who, f in functions.items() if "failed" not in results[who]}
    calls = {who: lambda f=f: [case.call(f, name) for _ in range(case.input_sets())] for who, f in right.items()}
    samples, least = {}, case.least_seconds(name, device_name(DEVICE))
    for who, measured in measure(calls, TURNS_S).items():
        if "failed" not in measured and (why := doubt(measured, least)):
            measured = {"failed": why}
        samples[who] = measured.get("cold", measured.get("warm"))
        medians = {key: median(measured[key]) for key in ("cold", "warm") if key in measured}
        results[who] |= measured | medians
    cost, dtype = case.cost(name), str(DTYPE).removeprefix("torch.")
    row = {"bench": "speed", "on": DEVICE.type, "op": op.name, "shape": dict(shape), "dtype": dtype, "pass": name}
    return row | {"bytes": cost.bytes, "flops": cost.flops, "ceiling": dict(ceiling), "results": results}, samples
