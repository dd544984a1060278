"""Labels of a step's phases, for the profiler (runtime/profile.py)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Label a phase of the step for the profiler; a context, or a decorator."""
    torch = sys.modules.get("torch")  # a program that only reads runs need not wait for it
    profiling = torch is not None and torch.autograd._profiler_enabled()
    with torch.profiler.record_function(name) if profiling else nullcontext():
        yield
