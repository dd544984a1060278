"""CUDA graph capture of the training step: the step is captured once and replayed at almost no cost to the host.

A graph replays its kernels on the same addresses. So parameters, gradients, optimizer state and inputs must stay where
they are, values that change must be read from tensors, and no operation in the step may synchronize with the device.

Collective operations stay out of graphs (`outside_graphs`), because a replayed one has no time-out: if another rank had
died it would wait forever.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ClassVar

import torch

from runtime.errors import UserError

Part = Callable[[], None]  # of a step
WARM_UP = 3  # eager steps before the capture; kernels are compiled at their first call


class Step:
    """A training step in parts (functions without arguments or results), run eagerly or as CUDA graphs."""

    def __init__(self, parts: Sequence[Part], captured: bool, required: bool, say: Callable[[str], None]):
        """If `captured`, each part becomes a graph after `WARM_UP` eager steps.

        Parts that synchronize with the device cannot be captured and stay eager; `say` is told so. If `required`,
        `CaptureError` is raised instead."""
        self.parts, self.captured, self.required, self.say = parts, captured, required, say
        self.steps = 0  # steps so far, except those called with `eager`
        pool = torch.cuda.graph_pool_handle() if captured else None
        self.graphs = [Captured(part, pool) for part in parts]

    @property
    def replaying(self) -> bool:
        """Whether the parts are replayed, so that the tensors they use must stay where they are."""
        return self.captured and self.steps > WARM_UP

    @contextmanager
    def __call__(self, eager: bool = False) -> Iterator[Sequence[Part]]:
        """A context that yields the parts to call for one step: graphs, or functions if `eager` or not yet captured."""
        self.steps += not eager
        last_warm_up = self.captured and not eager and self.steps == WARM_UP
        if eager or not self.replaying:
            with synchronizations() if last_warm_up else nullcontext() as found:
                yield self.parts
            if found:
                self._stay_eager(f"the host waits for the device in the step, first at {found[0]}")
        elif self.steps == WARM_UP + 1:
            # The capture of the backward pass moved the gradients to graph memory. The optimizers run eagerly once more
            # because their kernel builds a table of the gradients' addresses on the host.
            yield [*self.graphs[:-1], self.parts[-1]]
        else:
            yield self.graphs

    def _stay_eager(self, why: str) -> None:
        self.captured = False
        if self.required:
            raise CaptureError(f"cannot capture the step: {why}; --capture=off runs without")
        self.say(f"capture  no: {why}")


class CaptureError(UserError):
    """The step cannot be captured, and `--capture=on` requires it."""


class Captured:
    """The function `run` as CUDA graphs: captured at the first call, replayed at every call.

    `run` has no arguments and no result. It is one graph, or several with what it runs `outside_graphs` between them.
    Graphs of one `pool` share memory, so they must be replayed in the order of their capture.
    """

    capturing: ClassVar["Captured | None"] = None

    def __init__(self, run: Part, pool: tuple[int, int]):
        self.run, self.pool = run, pool
        self.stages: list[Part] = []  # replays of graphs, and functions between them

    def __call__(self) -> None:
        if self.stages:
            for stage in self.stages:
                stage()
            return
        Captured.capturing = self
        try:
            with ExitStack() as self.open:
                self.open.enter_context(self._graph())
                self.run()
        finally:
            Captured.capturing = None

    @contextmanager
    def _graph(self) -> Iterator[None]:
        """A context that captures a graph and then replays it, since a capture runs nothing."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are restricted: the prefetching thread may pin memory during the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            yield
        graph.replay()
        self.stages.append(graph.replay)

    def split(self, between: Part) -> None:
        """End the graph that is being captured, call `between`, and begin another graph."""
        self.open.close()
        between()
        self.stages.append(between)
        self.open.enter_context(self._graph())


def outside_graphs(run: Part) -> None:
    """Call `run`, and have every replay call it too if this code is being captured: its graph is split in two there.

    `run` must hold references to the tensors it uses, so that they keep their addresses."""
    if Captured.capturing:
        Captured.capturing.split(run)
    else:
        run()


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """A context that yields a list; on exit it holds "file:line" of every call that waited for the device."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class InFlight:
    """Keeps the host at most `limit` steps ahead of a GPU, so that few batches are queued. Does nothing on a CPU."""

    def __init__(self, device: torch.device, limit: int = 2):
        self.limit, self.gpu = limit, device.type == "cuda"
        self.steps: deque[torch.cuda.Event] = deque()

    def launched(self) -> None:
        """Call after launching a step: waits for the step that was launched `limit` steps earlier."""
        if self.gpu:
            event = torch.cuda.Event()
            event.record()
            self.steps.append(event)
            if len(self.steps) > self.limit:
                self.steps.popleft().synchronize()
