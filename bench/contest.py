"""A contest: an op at a shape by all that do it, in one process and in turns, once each was checked against float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.cases import PASSES, Case, checked_share
from bench.report import rate
from bench.rivals import RIVALS
from bench.timing import measure, reason
from kernels.accuracy import Truth, evaluate, truth
from kernels.spec import Op
from runtime.hardware import device_name, pick_device, rated_flops

DEVICE = pick_device("auto")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
TURNS_S = 0.4 if GPU else 0.2  # for the turns of one case
RIVALS_ERROR = 4.0  # times what rounding explains: a rival may round more often than the reference does

# Bytes a second of a card's memory, by torch's name for the card, from NVIDIA's data sheets.
RATED_BANDWIDTH = {
    "NVIDIA B200": 8.0e12, "NVIDIA H200": 4.8e12,
    "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H100 NVL": 3.9e12, "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12, "NVIDIA A100 80GB PCIe": 1.935e12, "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-PCIE-40GB": 1.555e12, "NVIDIA L40S": 0.864e12, "NVIDIA L4": 0.3e12,
    "NVIDIA GeForce RTX 5090": 1.792e12, "NVIDIA GeForce RTX 4090": 1.008e12, "NVIDIA GeForce RTX 3090": 0.936e12,
}  # fmt: skip


class Tape:
    """A timer for pytest-benchmark that plays back samples taken before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


TAPE = Tape()


def contenders(op: Op, say: Callable[[str, str], None]) -> dict[str, Callable]:
    """Functions by name, ours first, without `auto`, which calls one of the others; `say` is told what is left out, and
    why."""
    found = {name: f for name, f in op.implementations.items() if name not in ("torch", "auto")}
    if not GPU and found.pop("triton", None):
        say("Triton", "there is no GPU")
    found["torch"] = op.implementations["torch"]
    torch._dynamo.reset()
    found["torch.compile"] = torch.compile(op.implementations["torch"], fullgraph=True, dynamic=False)
    for name, make in RIVALS.get(op.name, {}).items() if GPU else ():
        try:
            found[name] = make()
        except (ImportError, AttributeError) as error:
            say(name, reason(error))
    return found


def truth_of_written(op: Op, inputs: dict) -> Truth:
    """What an op is to write to its arguments, by its reference in float64; half-precision ones are rounded from that.

    The reference may call fused operations over lists, which `truth` does not follow. So what rounding explains is
    taken to be a unit in the last place."""

    def widened(key: str, x: Tensor) -> Tensor:
        half = key in op.mutates and x.itemsize < 4
        return x.double() if x.is_floating_point() and not half else x

    wide = {key: tree_map_only(Tensor, partial(widened, key), value) for key, value in inputs.items()}
    exact = {key: x.double() for key, x in evaluate(op, op.implementations["torch"], wide).items()}
    dtypes = {key: x.dtype for key, x in evaluate(op, lambda **_: None, inputs).items()}
    return Truth(exact, {key: torch.finfo(dtypes[key]).eps * x.abs() for key, x in exact.items()}, dtypes)


class Checker:
    """Holds functions against an op in float64 in a pass, by the rule in kernels/accuracy.py, at a share of a shape."""

    def __init__(self, op: Op, shape: dict[str, int], name: str):
        self.op = op if name == PASSES[1] else replace(op, differentiable=())
        self.inputs, _ = Case(self.op, checked_share(op, shape), DTYPE, DEVICE).draw()
        self.truth = (truth_of_written if op.mutates else truth)(self.op, self.inputs)

    def error(self, function: Callable, allowed: float = 1.0) -> tuple[float, str | None]:
        """The error over what rounding explains of the result that is furthest off; and, where that is over what is
        `allowed`, what is wrong. Results may be in another dtype than the reference's."""
        results = evaluate(self.op, function, self.inputs)
        result, ratio = self.truth.worst({key: x.to(self.truth.dtypes[key]) for key, x in results.items()})
        wrong = f"wrong: {result} is off by {ratio:.1f} times what rounding explains"
        return ratio, None if ratio <= allowed else wrong


def check(op: Op, shape: dict[str, int], functions: dict[str, Callable], name: str) -> dict[str, dict]:
    """The error of each function over what rounding explains, or why it is not to be timed: it failed, or is wrong."""
    checker, results = Checker(op, shape, name), {}
    for contender, function in functions.items():
        try:
            error, wrong = checker.error(function, 1.0 if contender in op.implementations else RIVALS_ERROR)
            results[contender] = {"error": error} | ({"failed": wrong} if wrong else {})
        except Exception as error:  # whatever a rival raises, the others are checked
            results[contender] = {"failed": reason(error)}
    return results


def least_seconds(case: Case, name: str, card: str) -> float:
    """What a pass takes at least at the rated speeds of the card's memory and tensor cores; 0 for an unknown card.

    Of both passes in one call, the bytes of the one that moves more: what the second reads again may be in L2, or be
    left out by a kernel that does both at once."""
    passes = [case.cost(each) for each in PASSES[: 1 + PASSES.index(name)]]
    moved = max(passes[0].bytes, passes[-1].bytes - passes[0].bytes)
    bandwidth, flops = RATED_BANDWIDTH.get(card, math.inf), rated_flops(card) or math.inf
    return max(moved / bandwidth, passes[-1].flops / flops)


def doubt(measured: dict, least: float) -> str | None:
    """Why what was measured is not believed: other results after timing than before, or a speed beyond the card's."""
    drift, allowed = measured["drift"], torch.finfo(DTYPE).eps + 1e-5
    if not drift <= allowed:
        return f"other results after it was timed: relative error {drift:.1e}, where {allowed:.1e} is allowed"
    seconds = median(measured.get("cold", measured["warm"]))
    if seconds < least:
        return f"impossible: {1e6 * seconds:,.1f} us, where the card's rated speeds allow {1e6 * least:,.1f}"
    return None


def input_sets(case: Case) -> int:
    """Of how many sets of inputs none is still in L2 when its turn comes again."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if GPU else 0
    return max(1, math.ceil(3 * cache / case.cost("forward").bytes))


def hold(op: Op, shape: dict[str, int], name: str, functions: dict[str, Callable], ceiling: dict[str, float]):
    """Check and time functions in a pass. Returns the row to record, and the samples of each that was timed."""
    results = check(op, shape, functions, name)
    case = Case(op, shape, DTYPE, DEVICE)
    sets = input_sets(case)
    right = {contender: f for contender, f in functions.items() if "failed" not in results[contender]}
    calls = {key: lambda f=f: [case.call(f, name) for _ in range(sets)] for key, f in right.items()}
    samples = {}
    least = least_seconds(case, name, device_name(DEVICE))
    for contender, measured in measure(calls, TURNS_S).items():
        if "failed" not in measured and (why := doubt(measured, least)):
            measured = {"failed": why}
        samples[contender] = measured.get("cold", measured.get("warm"))
        medians = {key: median(measured[key]) for key in ("cold", "warm") if key in measured}
        results[contender] |= measured | medians
    cost, dtype = case.cost(name), str(DTYPE).removeprefix("torch.")
    row = {"bench": "speed", "on": DEVICE.type, "op": op.name, "shape": shape, "dtype": dtype, "pass": name}
    return row | {"bytes": cost.bytes, "flops": cost.flops, "ceiling": ceiling, "results": results}, samples


def line(contender: str, result: dict, amount: float, unit: str, most: float) -> str:
    """What is said of a contender that does an `amount` in a call, where the machine does `most` in a second."""
    if "failed" in result:
        return f"  {contender:22s} {result['failed']}"
    seconds = result.get("cold", result["warm"])
    speed = amount / seconds
    text = f"  {contender:22s} {seconds * 1e6:11,.1f} us {rate(speed, unit):>15s} {speed / most:4.0%}"
    if GPU:
        text += f", {result['warm'] * 1e6:,.1f} us warm, {result['host'] * 1e6:,.1f} us of the host"
        text += f", {result['memory'] / 2**20:,.0f} MiB" + ("" if result["graph"] else ", eager: the host waits")
    return f"{text}, error {result['error']:.2f} of what rounding explains"
