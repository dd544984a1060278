"""How long a call takes, and how much memory.

A GPU's time is that of a CUDA graph of several calls, so that launching is not in it. Cold, the calls go round enough
sets of inputs that none is in the L2 cache when its turn comes; warm, there is one set. What a host spends on an eager
call is timed apart, without waiting for the device. On a CPU there are no graphs, and only warm calls.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from statistics import median

import torch

SAMPLE_S = 4e-3  # a sample is at least so long: launching its graph, some 10 us, is then nothing
Calls = Sequence[Callable[[], object]]


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


def repeated(calls: Calls, n: int) -> Callable[[], None]:
    """`n` calls, going round `calls`. The last results of each stay, so that it writes to memory of its own."""

    def run() -> None:
        results = deque(maxlen=len(calls))
        for call in islice(cycle(calls), n):
            results.append(call())

    return run


def captured(run: Callable[[], None], pool: tuple[int, int]) -> Callable[[], None]:
    """`run` as one CUDA graph. Graphs share the memory of `pool`: each writes what it reads."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    graph.replay()
    return graph.replay


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


def take_turns(runs: Mapping[str, Callable[[], None]], budget: float) -> dict[str, list[float]]:
    """Samples of each run for `budget` seconds in all, one of each after the other: what drifts, drifts for all."""
    samples = {key: [] for key in runs}
    begin, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - begin < budget:
        for key, run in runs.items():
            samples[key].append(stopwatch(run))
        turns += 1
    return samples


def measure(contenders: Mapping[str, Callable[[], Calls]], budget: float) -> dict[str, dict]:
    """What each contender takes, in seconds and bytes a call; it makes its `Calls`, one on each set of inputs.

    `warm` and, on a GPU, `cold` are samples; `host`, `memory` and `graph` (False: the host waits within a call, so that
    eager calls were timed) are of a GPU only. A contender that raises has only `failed`, the reason.
    """
    pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
    results, runs, n_calls = {}, {}, {}
    for name, make in contenders.items():
        try:
            calls = make()
            for call in calls:  # compiles, loads
                call()
            seconds = stopwatch(calls[0])
            n = n_calls[name] = max(len(calls), math.ceil(SAMPLE_S / seconds))
            loops, result = {"warm": repeated(calls[:1], n)}, {}
            if pool is not None:
                if len(calls) > 1:
                    loops["cold"] = repeated(calls, n)
                graph = not synchronizes(calls[0])
                result = {"graph": graph, "memory": peak_bytes(calls[0]), "host": host_seconds(calls[0], min(n, 10))}
                if graph:
                    loops = {kind: captured(loop, pool) for kind, loop in loops.items()}
            runs |= {(name, kind): loop for kind, loop in loops.items()}
            results[name] = result
        except Exception as error:  # whatever a rival raises, the others are timed
            results[name] = {"failed": reason(error)}
    for (name, kind), samples in take_turns(runs, budget).items():
        results[name][kind] = [seconds / n_calls[name] for seconds in samples]
        if pool is not None and (name, "cold") not in runs:
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
