"""How long a call takes, and how much memory.

A GPU's time is that of a CUDA graph of several calls, so that launching is not in it. Cold, the calls go round enough
sets of inputs that none is in the L2 cache when its turn comes; warm, there is one set. What a host spends on an eager
call is timed apart, without waiting for the device. On a CPU there are no graphs, and only warm calls.

A graph reads and writes fixed addresses, whoever owns them by then. So a captured loop keeps the inputs of its calls
alive, and what it computes is compared once all is timed with what it computed before.
"""

import fcntl
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

SAMPLE_S = 4e-3  # a sample is at least so long: launching its graph, some 10 us, is then nothing
Results = tuple[Tensor, ...]


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """A function on inputs of its own, and `restore`, which puts back those that it has written to."""

    run: Callable[[], Results]
    restore: Callable[[], None] = nothing


Calls = Sequence[Call]


@contextmanager
def card_held(lock: Path, alone: bool = True) -> Iterator[None]:
    """Among processes that name the same file, one that holds the card `alone` keeps all others from it meanwhile."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


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


def repeated(calls: Calls, n: int) -> Callable[[], Results]:
    """`n` calls, going round `calls`; returns the last one's results. The last results of each stay until the end, so
    that it writes to memory of its own."""

    def run() -> Results:
        results = deque(maxlen=len(calls))
        for call in islice(cycle(calls), n):
            results.append(call.run())
        return results[-1]

    return run


class Captured:
    """`run` as one CUDA graph, on the current stream. Called, it replays, and returns the results that it overwrites.

    It keeps `run`, and with it the inputs: the graph goes on reading their addresses when they are freed and given to
    others. Graphs share the memory of `pool`, where each writes what it reads, but for results, which are kept.
    """

    def __init__(self, run: Callable[[], Results], pool: tuple[int, int]):
        self.run, self.graph = run, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.results = run()
        self.graph.replay()

    def __call__(self) -> Results:
        self.graph.replay()
        return self.results


def synchronizes(call: Callable[[], object]) -> bool:
    """Whether the host waits for the device within a call, which keeps it out of a graph."""
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
    """Seconds for the host to enqueue a call: the median of several runs of `n`."""
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


def take_turns(runs: Mapping[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Samples of each run for `budget` seconds in all, one of each after the other: what drifts, drifts for all."""
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


def copies(results: Iterable[Tensor]) -> Results:
    return tuple(x.detach().clone() for x in results)


@dataclass
class Loops:
    """A contender's calls in a row, ready to be timed, and what the warm ones gave before."""

    warm: Callable[[], Results]
    cold: Callable[[], Results] | None
    n: int
    restore: Callable[[], None]
    before: Results = ()

    def runs(self) -> dict[str, Callable[[], Results]]:
        return {"warm": self.warm} | ({"cold": self.cold} if self.cold else {})

    def results(self) -> Results:
        """What the warm loop gives from its inputs as they were drawn."""
        self.restore()
        return copies(self.warm())


def prepare(calls: Calls, pool: tuple[int, int] | None) -> tuple[Loops, dict]:
    """The loops of a contender, each call run once before, and what is known of it without turns."""
    for call in calls:  # compiles, loads
        call.run()
    first = calls[0]
    n = max(len(calls), math.ceil(SAMPLE_S / stopwatch(first.run)))
    warm, cold, found = repeated(calls[:1], n), repeated(calls, n) if pool and len(calls) > 1 else None, {}
    if pool is not None:
        graph = not synchronizes(first.run)
        found = {"graph": graph, "memory": peak_bytes(first.run), "host": host_seconds(first.run, min(n, 10))}
        if graph:
            first.restore()
            warm, cold = Captured(warm, pool), cold and Captured(cold, pool)
    loops = Loops(warm, cold, n, first.restore)
    loops.before = loops.results()
    return loops, found


def measure(contenders: Mapping[str, Callable[[], Calls]], budget: float) -> dict[str, dict]:
    """What each contender takes, in seconds and bytes a call; it makes its `Calls`, one on each set of inputs.

    `warm` and, on a GPU, `cold` are samples; `host`, `memory` and `graph` (False: the host waits within a call, so that
    eager calls were timed) are of a GPU only. `drift` is the relative error of the results after all turns to those
    before them. A contender that raises has only `failed`, the reason.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    results, loops = {}, {}
    for name, make in contenders.items():
        try:
            loops[name], results[name] = prepare(make(), pool)
        except Exception as error:  # whatever a rival raises, the others are timed
            results[name] = {"failed": reason(error)}
    runs = {(name, kind): run for name, own in loops.items() for kind, run in own.runs().items()}
    for (name, kind), samples in take_turns(runs, budget).items():
        results[name][kind] = [seconds / loops[name].n for seconds in samples]
    for name, own in loops.items():
        results[name]["drift"] = relative_error(own.results(), own.before)
        if pool is not None and own.cold is None:
            results[name]["cold"] = results[name]["warm"]  # one set of inputs is more than L2 holds
    return results


def reason(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def best(run: Callable[[], object]) -> float:
    """Seconds of `run`, at its best of ten."""
    return min(stopwatch(run) for _ in range(10))


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine does at most: bytes a second, read and written, of a large copy, and FLOP/s of a product."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return {
        "copy": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "matmul": 2 * size**3 / best(lambda: a @ b),
    }
