"""How long a call takes, and how much memory it needs.

On a GPU a sample is one replay of a CUDA graph of several calls, so it holds no time of the host. Cold samples rotate
through enough sets of inputs that every call finds L2 cold; warm ones use one set. The host's time is that of an eager
call, without waiting for the device. On a CPU calls are eager and warm.

A graph reads and writes fixed addresses, whatever lies there later. So a captured loop keeps its inputs alive, and its
results after all timing are compared with those before.

A function that keeps results gains nothing. Each set of inputs is drawn from another seed, and the warm one is drawn
anew before every sample. Results are compared for two draws at the same addresses, and have to differ between them.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

SAMPLE_S = 4e-3  # the least time of a sample: launching its graph takes some 10 us
Results = tuple[Tensor, ...]
# What times are read from, as it was before a contender was imported.
TIMERS = [
    (owner, name, getattr(owner, name))
    for owner, names in {
        time: ("perf_counter", "monotonic", "time"), torch.cuda: ("Event", "CUDAGraph", "graph", "synchronize"),
        torch.cuda.Event: ("record", "synchronize", "elapsed_time"), torch.cuda.CUDAGraph: ("replay",),
    }.items()
    for name in names
]  # fmt: skip


def patched() -> list[str]:
    """Names of the timers that something has replaced since this module was imported."""
    return [f"{owner.__name__}.{name}" for owner, name, own in TIMERS if getattr(owner, name) is not own]


@dataclass(frozen=True)
class Call:
    """A function on inputs of its own. `restore(seed)` draws them anew, at their addresses; None if it cannot."""

    run: Callable[[], Results]
    restore: Callable[[int], object] | None = None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stopwatch(run: Callable[[], object]) -> float:
    """Seconds that `run` takes, on the device if there is one."""
    if not torch.cuda.is_available():
        begin = perf_counter()
        run()
        return perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def repeated(calls: Sequence[Call], n: int) -> Callable[[], Results]:
    """A loop of `n` calls that returns the results of the last. The last results of each call live until the end, so
    that each writes to memory of its own."""

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
        begin = perf_counter()
        for _ in range(n):
            call()
        spent.append((perf_counter() - begin) / n)
    return median(spent)


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak memory of a call beyond its inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def relative_error(results: Results, truth: Results) -> float:
    """The largest ‖result - truth‖ / ‖truth‖ of several tensors; NaN if one holds a NaN."""
    tiny, errors = torch.finfo(torch.float64).tiny, [torch.zeros(())]
    for result, exact in zip(results, truth, strict=True):
        error = (result.double() - exact.double()).norm() / exact.double().norm().clamp(min=tiny)
        errors.append(error.cpu())
    return torch.stack(errors).max().item()


class Contender:
    """A function's calls, one for each set of inputs, as loops of `n` calls that are ready to be timed."""

    def __init__(self, calls: Sequence[Call], pool: tuple[int, int] | None):
        for call in calls:  # compile, load
            call.run()
        run, self.restore = calls[0].run, calls[0].restore
        self.n, self.facts = max(len(calls), math.ceil(SAMPLE_S / stopwatch(run))), {}
        self.loops = {"warm": repeated(calls[:1], self.n)}
        if pool is not None:
            self.loops["cold"] = repeated(calls, self.n)
            graph = not synchronizes(run)
            self.facts = {"graph": graph, "memory": peak_bytes(run), "host": host_seconds(run, min(self.n, 10))}
            if graph:
                self.redraw(0)
                self.loops = {kind: Captured(loop, pool) for kind, loop in self.loops.items()}
        self.before = self.results(0), self.results(1)
        if self.restore and all(map(torch.equal, *self.before)):
            raise ValueError("stale: other inputs at the same addresses gave the same results")

    def redraw(self, seed: int) -> None:
        if self.restore:
            self.restore(seed)

    def results(self, seed: int) -> Results:
        """Results of the warm loop from inputs drawn from `seed`."""
        self.redraw(seed)
        return tuple(x.detach().clone() for x in self.loops["warm"]())

    def drift(self) -> float:
        """The relative error of its results now over those before it was timed."""
        return max(relative_error(self.results(seed), before) for seed, before in enumerate(self.before))


def measure(contenders: Mapping[str, Callable[[], Sequence[Call]]], budget: float) -> dict[str, dict]:
    """Time contenders for `budget` seconds in all. Each makes its calls, one for each set of inputs.

    Returns for each the seconds per call of its `warm` samples and, on a GPU, its `cold` ones, `host` seconds, peak
    bytes as `memory`, and `graph`: False if the host waits within a call, so that eager calls were timed. `drift` is
    the relative error of its results after all timing. A contender that raises has only `failed`, the reason.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    ready, results = {}, {}
    for name, make in contenders.items():
        try:
            ready[name] = Contender(make(), pool)
            results[name] = ready[name].facts | {kind: [] for kind in ready[name].loops}
        except Exception as error:  # whatever a rival raises, the others are timed
            results[name] = {"failed": reason(error)}
    begin, turns = perf_counter(), 0
    while turns < 3 or perf_counter() - begin < budget:  # in turns, so that a drifting clock hits all alike
        for name, own in ready.items():
            own.redraw(2 + turns)
            for kind, loop in own.loops.items():
                results[name][kind].append(stopwatch(loop) / own.n)
        turns += 1
    for name, own in ready.items():
        results[name]["drift"] = own.drift()
    return results


def reason(error: Exception) -> str:
    """The type and the first line of an error, or two lines if the first ends in a colon."""
    first, *more = filter(None, str(error).split("\n")) if str(error) else [""]
    return f"{type(error).__name__}: {first}" + (f" {more[0]}" if more and first.endswith(":") else "")


def ceilings(device: torch.device) -> dict[str, float]:
    """The machine's best rates: bytes per second, read and written, of a large copy; FLOP/s of a matrix product."""
    gpu = device.type == "cuda"
    source = torch.randn(2**28 if gpu else 2**24, device=device)
    target = torch.empty_like(source)
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    copy, product = (min(stopwatch(run) for _ in range(10)) for run in (lambda: target.copy_(source), lambda: a @ b))
    return {"copy": 2 * source.nbytes / copy, "matmul": 2 * size**3 / product}
