"""A contest: an op at a shape by all that do it, in one process and in turns, once each was checked against float64."""

import math
from collections.abc import Callable
from statistics import median

import torch

from bench.cases import Case, relative_error, share_of_rows
from bench.report import rate
from bench.rivals import RIVALS
from bench.timing import measure, reason
from kernels.spec import Op
from model.hardware import pick_device

DEVICE = pick_device("auto")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
TURNS_S = 0.4 if GPU else 0.2  # for the turns of one case


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
    """Functions by name, ours first; `say` is told what is left out, and why."""
    found = {name: f for name, f in op.implementations.items() if name != "torch"}
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


def check(op: Op, shape: dict[str, int], functions: dict[str, Callable], name: str) -> dict[str, dict]:
    """The relative error of each function, or why it is not to be timed: it failed, or is further from float64 than
    twice the reference, one roundoff and what another order of float32 sums makes. On as many of the rows as the
    reference in float64 has memory for."""
    reference = op.implementations["torch"]
    try:
        case = Case(op, shape, DTYPE, DEVICE)
        truth = case.call(reference, name, exact=True)()
        allowed = 2 * relative_error(case.call(reference, name)(), truth) + torch.finfo(DTYPE).eps + 1e-5
    except torch.OutOfMemoryError:
        fewer = share_of_rows(shape, 2)
        if fewer == shape:
            raise
        truth = None
    if truth is None:
        torch.cuda.empty_cache()
        return check(op, fewer, functions, name)
    results = {}
    for contender, function in functions.items():
        try:
            error = relative_error(case.call(function, name)(), truth)
            results[contender] = {"error": error}
            if not error <= allowed:
                results[contender]["failed"] = f"wrong: relative error {error:.1e}, where {allowed:.1e} is allowed"
        except Exception as error:  # whatever a rival raises, the others are checked
            results[contender] = {"failed": reason(error)}
    return results


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
    for contender, measured in measure(calls, TURNS_S).items():
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
    return f"{text}, error {result['error']:.0e}"
