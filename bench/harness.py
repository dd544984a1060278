"""Check and time an op: every implementation in one process and in turns, once each was compared with float64."""

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
from bench.timing import Call, measure, patched, reason, synchronize
from kernels import has_card, own
from kernels.accuracy import Truth, evaluate, truth
from kernels.launch import IMPLEMENTATIONS
from kernels.sanitizer import sanitize
from kernels.spec import Cost, Op
from runtime.hardware import device_name, pick_device, rated_bandwidth, rated_flops

PASSES = ("forward", "forward+backward")
DEVICE = pick_device("auto")
META = torch.device("meta")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
TURNS_S = 0.4 if GPU else 0.2  # seconds of timing per op, shape and pass
RIVALS_ERROR = 4.0  # times what rounding explains: a rival may round more often than the reference does


def halved(shape: Mapping[str, int], same_length: bool) -> dict[str, int]:
    """The shape with half the rows or sequences. A single sequence has half the tokens, or with `same_length`, since
    other lengths may run other kernels, the heads of one key head."""
    if "B" not in shape:
        key = "rows" if "rows" in shape else "N"
        return dict(shape) | {key: max(1, shape[key] // 2)}
    if shape["B"] > 1:
        return dict(shape) | {"B": shape["B"] // 2}
    if same_length:
        return dict(shape) | {"H": shape["H"] // shape["KV"], "KV": 1}
    tokens = max(1, shape["T"] // 2)
    return dict(shape) | {"T": tokens} | ({"S": tokens} if shape.get("S") == shape["T"] else {})


def shrink(
    op: Op,
    shape: Mapping[str, int],
    itemsize: int,
    max_bytes: float,
    max_flops: float = math.inf,
    same_length: bool = False,
) -> dict[str, int]:
    """The shape, halved until the cost of the op's forward fits, or as far as possible."""
    while (cost := op.cost(shape, itemsize)).bytes > max_bytes or cost.flops > max_flops:
        if (less := halved(shape, same_length)) == shape:
            break
        shape = less
    return dict(shape)


class Case:
    """`op` at `shape`, on random inputs that are the same for a seed."""

    def __init__(self, op: Op, shape: Mapping[str, int], dtype: torch.dtype, device: torch.device):
        self.op, self.shape, self.dtype, self.device = op, shape, dtype, device
        self.passes = PASSES if op.differentiable else PASSES[:1]

    def draw(self, seed: int = 0) -> tuple[dict, tuple[Tensor, ...]]:
        """New inputs from a seed, the differentiable ones requiring a gradient, and the gradients of the outputs (1 for
        a loss)."""
        inputs = self.op.draw(self.shape, self.dtype, self.device, seed)
        for key in self.op.differentiable:
            inputs[key].requires_grad_()
        if not self.op.differentiable:
            return inputs, ()
        outputs = as_tuple(self.op.implementations["torch"](**self.op.draw(self.shape, self.dtype, META)))
        options = {"device": self.device, "generator": None}
        if self.device != META:
            options["generator"] = torch.Generator(self.device).manual_seed(1)
        ones = torch.ones((), dtype=torch.float32, device=self.device)
        outputs = (x for x in outputs if x.itemsize > 1)  # codes have no gradient
        return inputs, tuple(torch.randn(x.shape, dtype=x.dtype, **options) if x.ndim else ones for x in outputs)

    def call(self, function: Callable, name: str, seed: int = 0) -> Call:
        """A call on inputs of its own. It returns outputs and gradients, or the arguments that the op writes to."""
        inputs, upstream = self.draw(seed)
        leaves = [inputs[key] for key in self.op.differentiable]
        written = [x for key in self.op.mutates for x in tree_leaves(inputs[key]) if torch.is_tensor(x)]

        def forward():
            with torch.no_grad():
                outputs = function(**inputs)
            return *as_tuple(outputs), *written

        def forward_backward():
            outputs = as_tuple(function(**inputs))
            differentiable = [x for x in outputs if x.itemsize > 1]
            return *outputs, *written, *torch.autograd.grad(differentiable, leaves, upstream)

        def restore(seed: int) -> None:
            drawn, _ = self.draw(seed)
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

        A backward may find in L2 what the forward left, so forward+backward is only charged the larger of the two."""
        total, forward = self.cost(name), self.cost("forward")
        moved = max(forward.bytes, total.bytes - forward.bytes)
        rate = self.op.flops_rate * (rated_flops(card) or math.inf)
        return max(moved / (rated_bandwidth(card) or math.inf), total.flops / rate)

    def input_sets(self) -> int:
        """How many copies of the inputs to rotate so that every call finds L2 cold."""
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if GPU else 0
        return max(1, math.ceil(3 * cache / self.cost("forward").bytes))


def as_tuple(outputs) -> tuple[Tensor, ...]:
    if outputs is None:  # an op that writes to its arguments
        return ()
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def on_meta() -> Iterator[None]:
    """Run host functions on meta tensors, up to the launches of their kernels."""
    library = torch.library.Library("nanofuse", "IMPL")
    for name, function in IMPLEMENTATIONS.items():  # in place of the fake, which launches nothing
        library.impl(name, function, "Meta", allow_override=True)
    try:
        with patch.object(torch, "is_autocast_enabled", lambda device: False):  # torch has none for meta, and raises
            yield
    finally:
        library._destroy()


def contenders(op: Op) -> tuple[dict[str, Callable], dict[str, str]]:
    """Functions by name, ours first, and the reason why others are missing here. `auto` only calls one of them."""
    found = {name: f for name, f in op.implementations.items() if name not in ("torch", "auto")}
    kernels = {"triton"} | {name for name in found if own.is_own(name) and own.has_triton_kernels(name)}
    why = "" if GPU else "there is no GPU"
    if not has_card(op, DEVICE):
        why = f"it needs {', '.join(op.cards)}"
    absent = {name: why for name in kernels if why and found.pop(name, None)}
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
    """The exact values of the arguments that an op has written to, those in half precision rounded afterwards.

    The reference may call fused operations over lists, which `truth` does not follow: rounding is taken to explain one
    unit in the last place."""

    def widened(key: str, x: Tensor) -> Tensor:
        half = key in op.mutates and x.itemsize < 4
        return x.double() if x.is_floating_point() and not half else x

    wide = {key: tree_map_only(Tensor, partial(widened, key), value) for key, value in inputs.items()}
    exact = {key: x.double() for key, x in evaluate(op, op.implementations["torch"], wide).items()}
    dtypes = {key: x.dtype for key, x in evaluate(op, op.implementations["torch"], inputs).items()}
    eps = {key: torch.finfo(dtype).eps if dtype.is_floating_point else 0.0 for key, dtype in dtypes.items()}
    return Truth(exact, {key: eps[key] * x.abs() for key, x in exact.items()}, dtypes)


def check(op: Op, shape: Mapping[str, int], functions: Mapping[str, Callable], name: str) -> dict[str, dict]:
    """Compare functions in a pass with float64, by the rule in kernels/accuracy.py, at a shape where float64 fits.

    Returns the largest `error` of each over what rounding explains, and `failed`, the reason, if it is wrong or raised.
    Results may be in another dtype than the reference's. Raises if a function has left the card unable to work: all
    that follow would fail too."""
    op = op if name == PASSES[1] else replace(op, differentiable=())
    small = shrink(op, shape, 2, max_bytes=2**26, max_flops=5e10, same_length=True)
    inputs, _ = Case(op, small, DTYPE, DEVICE).draw()
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
    """Why a measurement is not believed: a timer was replaced, results changed while it was timed, or it is faster than
    the card can be."""
    if timers := patched():
        return f"patched: {', '.join(timers)}"
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
    calls = {
        who: lambda f=f: [case.call(f, name, seed) for seed in range(case.input_sets())] for who, f in right.items()
    }
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


def bytes_moved(op: Op, shape: Mapping[str, int]) -> dict[str, float]:
    """Bytes that the Triton kernels load and store in bf16 over the least possible, by pass, counted in Triton's
    interpreter (TRITON_INTERPRET=1). What caches serve counts again; what matrix products of torch move does not."""
    case, ratios = Case(op, shape, torch.bfloat16, torch.device("cpu")), {}
    for name in case.passes:
        with sanitize(bounds=False, races=False, overflow=False) as record:
            case.call(op.implementations["triton"], name).run()
        ratios[name] = (record.bytes_read + record.bytes_written) / case.cost(name).bytes
    return ratios
