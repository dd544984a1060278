"""How long a call takes, and how much memory.

On a GPU a sample is one replay of a CUDA graph of several calls, so that it holds no time of the host. Cold, the calls
go round enough sets of inputs that none is in L2 when its turn comes; warm, there is one set. The host's time for an
eager call is taken apart, without waiting for the device. On a CPU calls are eager and warm.

A graph reads and writes fixed addresses, whoever owns them by then. So a captured loop keeps its inputs alive, and its
results are compared after all timing with those before.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import torch
from torch import Tensor

SAMPLE_S = 4e-3  # the least time of a sample: launching its graph takes some 10 us
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A function on inputs of its own, and `restore`, which puts back those that it has written to."""

    run: Callable[[], Results]
    restore: Callable[[], object] = tuple


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stopwatch(run: Callable[[], object]) -> float:
    """Seconds that `run` takes: the device's where there is one."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def repeated(calls: Sequence[Call], n: int) -> Callable[[], Results]:
    """`n` calls, going round `calls`; returns the last one's results. The last results of each stay until the end, so
    that it writes to memory of its own."""

    def run() -> Results:
        results = deque(maxlen=len(calls))
        for call in islice(cycle(calls), n):
            results.append(call.run())
        return results[-1]

    return run


class Captured:
    """`run` as a CUDA graph. It keeps `run`, and with it the inputs, whose addresses every replay reads."""

    def __init__(self, run: Callable[[], Results], pool: tuple[int, int]):
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = run()
        self.graph.replay()

    def __call__(self) -> Results:
        self.graph.replay()
        return self.results


def synchronizes(call: Callable[[], object]) -> bool:
    """Whether the host waits for the device within a call, which then cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_seconds(call: Callable[[], object], n: int) -> float:
    """Seconds for the host to enqueue a call: the median of seven runs of `n`."""
    spent = []
    for _ in range(7):
        synchronize()
        begin = time.perf_counter()
        for _ in range(n):
            call()
        spent.append((time.perf_counter() - begin) / n)
    return median(spent)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call holds beyond its inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def take_turns(runs: Mapping[object, Callable[[], object]], budget: float) -> dict[object, list[float]]:
    """Samples of each run for `budget` seconds in all, one of each after the other: drift of the clock hits all."""
    samples = {key: [] for key in runs}
    begin, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - begin < budget:
        for key, run in runs.items():
            samples[key].append(stopwatch(run))
        turns += 1
    return samples


def relative_error(results: Results, truth: Results) -> float:
    """The largest ‖result - truth‖ / ‖truth‖ of several tensors; NaN where one holds a NaN."""
    errors = []
    for result, exact in zip(results, truth, strict=True):
        exact = exact.double()
        errors.append((result.double() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float64).tiny))
    return torch.stack(errors).max().item() if errors else 0.0


class Contender:
    """A function's calls, one on each set of inputs, as loops of `n` calls that are ready to be timed."""

    def __init__(self, calls: Sequence[Call], pool: tuple[int, int] | None):
        for call in calls:  # compile, load
            call.run()
        run, self.restore = calls[0].run, calls[0].restore
        self.n, self.facts = max(len(calls), math.ceil(SAMPLE_S / stopwatch(run))), {}
        self.loops = {"warm": repeated(calls[:1], self.n)}
        if pool is not None:
            if len(calls) > 1:
                self.loops["cold"] = repeated(calls, self.n)
            graph = not synchronizes(run)
            self.facts = {"graph": graph, "memory": peak_bytes(run), "host": host_seconds(run, min(self.n, 10))}
            if graph:
                self.restore()
                self.loops = {kind: Captured(loop, pool) for kind, loop in self.loops.items()}
        self.before = self.results()

    def results(self) -> Results:
        """Results of the warm loop from its inputs as they were drawn."""
        self.restore()
        return tuple(x.detach().clone() for x in self.loops["warm"]())


def measure(contenders: Mapping[str, Callable[[], Sequence[Call]]], budget: float) -> dict[str, dict]:
    """Seconds and bytes a call of each contender, which makes its calls, one on each set of inputs.

    `warm` and, on a GPU, `cold` are samples; `host`, `memory` and `graph` (False: the host waits within a call, so that
    eager calls were timed) are of a GPU only. `drift` is the relative error of the results after all turns to those
    before them. A contender that raises has only `failed`, the reason.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    ready, results = {}, {}
    for name, make in contenders.items():
        try:
            ready[name] = Contender(make(), pool)
            results[name] = ready[name].facts
        except Exception as error:  # whatever a rival raises, the others are timed
            results[name] = {"failed": reason(error)}
    runs = {(name, kind): loop for name, own in ready.items() for kind, loop in own.loops.items()}
    for (name, kind), samples in take_turns(runs, budget).items():
        results[name][kind] = [seconds / ready[name].n for seconds in samples]
    for name, own in ready.items():
        results[name]["drift"] = relative_error(own.results(), own.before)
        if pool is not None:  # one set of inputs is more than L2 holds
            results[name].setdefault("cold", results[name]["warm"])
    return results


def reason(error: Exception) -> str:
    """The type and the first line of an error, or two where that ends in a colon."""
    first, *more = filter(None, str(error).split("\n")) if str(error) else [""]
    return f"{type(error).__name__}: {first}" + (f" {more[0]}" if more and first.endswith(":") else "")


def ceilings(device: torch.device) -> dict[str, float]:
    """The best of this machine: bytes a second, read and written, of a large copy, and FLOP/s of a matrix product."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    copy, product = (min(stopwatch(run) for _ in range(10)) for run in (lambda: target.copy_(source), lambda: a @ b))
    return {"copy": 2 * source.nbytes / copy, "matmul": 2 * size**3 / product}
