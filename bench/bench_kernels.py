"""Kernels: every implementation of every op beside its rivals, in one process and in turns.

    pytest bench/bench_kernels.py --kernel rmsnorm

What is timed has first been checked against float64. On a GPU: the card's time by CUDA-graph replay, with the inputs
cold or warm in L2, the host's time for an eager call, and peak memory. pytest-benchmark shows our kernel's samples with
cold inputs; all of it goes to bench/results/kernels.jsonl. Without a GPU: torch against torch.compile at a 132nd of the
rows or fewer, and the bytes that the Triton kernels move, counted in Triton's interpreter.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch

from bench.cases import PASSES, Case, relative_error, share_of_rows, small_share
from bench.report import bound, rate, written
from bench.rivals import RIVALS
from bench.timing import ceilings, measure, reason
from kernels import TESTED
from model.hardware import pick_device

ROOT = Path(__file__).parents[1]
DEVICE = pick_device("auto")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
TURNS_S = 0.4 if GPU else 0.2  # for the turns of one case: all of them take some four minutes on a GPU
COUNTED = ("rmsnorm", "rope", "swiglu", "cross_entropy")  # what they move, their kernels move: the rest is in matmuls
WASTE = 1.05


class Tape:
    """A timer for pytest-benchmark that plays back samples taken before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


TAPE = Tape()


def pytest_generate_tests(metafunc):
    if "op" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("kernel")
    ops = [op for op in TESTED if wanted in (None, op.name)]
    if not ops:
        raise pytest.UsageError(f"--kernel {wanted}: there are {', '.join(op.name for op in TESTED)}")
    if "shape" in metafunc.fixturenames:
        cases = [(op, shape) for op in ops for shape in (op.bench_shapes if GPU else [small_enough(op)])]
        metafunc.parametrize(
            "op, shape", cases, ids=[f"{op.name}-{'x'.join(map(str, shape.values()))}" for op, shape in cases]
        )
    else:
        ops = [op for op in ops if op.name in COUNTED]
        metafunc.parametrize("op", ops, ids=[op.name for op in ops])


def small_enough(op) -> dict[str, int]:
    """The op's first shape with rows for a CPU."""
    return small_share(op.bench_shapes[0], lambda shape: op.cost(shape, DTYPE.itemsize).flops, 2_000_000_000)


def contenders(op, say) -> dict:
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


def check(op, shape, functions, name: str) -> dict[str, dict]:
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


def line(contender: str, result: dict, row: dict) -> str:
    if "failed" in result:
        return f"  {contender:22s} {result['failed']}"
    seconds = result.get("cold", result["warm"])
    amount, unit, most = bound(row)
    speed = amount / seconds
    text = f"  {contender:22s} {seconds * 1e6:11,.1f} us {rate(speed, unit):>15s} {speed / most:4.0%}"
    if GPU:
        text += f", {result['warm'] * 1e6:,.1f} us warm, {result['host'] * 1e6:,.1f} us of the host"
        text += f", {result['memory'] / 2**20:,.0f} MiB" + ("" if result["graph"] else ", eager: the host waits")
    return f"{text}, error {result['error']:.0e}"


@pytest.fixture(scope="module")
def ceiling() -> Iterator[dict[str, float]]:
    """What the machine does at most; a CPU on one thread: to share out such small work takes longer than to do it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ceilings(DEVICE)
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize("name", PASSES)
def test_speed(op, shape, name, benchmark, record, ceiling, left_out, capsys):
    functions = contenders(op, lambda who, why: left_out[why].add(f"{op.name} by {who}"))
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
    row |= {"bytes": cost.bytes, "flops": cost.flops, "ceiling": ceiling, "results": results}
    record("kernels", row)
    with capsys.disabled():
        print(f"\n{op.name} {written(shape)} {dtype}, {name}")
        print("\n".join(line(contender, result, row) for contender, result in results.items()))
    ours = next(iter(functions))
    assert "failed" not in results[ours], results[ours]["failed"]
    benchmark.extra_info = row
    benchmark.pedantic(TAPE.advance, setup=lambda: ((samples[ours].pop(),), {}), rounds=len(samples[ours]))


@pytest.fixture(scope="module")
def counters(pytestconfig) -> Iterator[dict[str, subprocess.Popen]]:
    """The process that counts, for each op, all at work at once."""
    wanted, command = pytestconfig.getoption("kernel"), [sys.executable, "-m", "bench.bytes_moved"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = {n: subprocess.Popen([*command, n], cwd=ROOT, **pipes) for n in COUNTED if wanted in (None, n)}
    yield found
    for process in found.values():
        process.kill()


@pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")
def test_bytes_moved(op, counters, record, capsys):
    """At most 1.05 of the least possible, for cross-entropy where a row fits: up to 50,304 logits."""
    stdout, stderr = counters[op.name].communicate()
    assert counters[op.name].returncode == 0, stderr
    for row in map(json.loads, stdout.splitlines()):
        record("kernels", {"bench": "bytes moved"} | row)
        ratios = {name: row[name][0] / row[name][1] for name in PASSES}
        with capsys.disabled():
            shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
            print(f"\n{op.name} {written(row['shape'])} bfloat16, bytes moved, of the least: {shown}", end="")
        if row["shape"].get("V", 0) <= 50304:
            assert max(ratios.values()) <= WASTE
