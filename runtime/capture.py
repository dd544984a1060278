"""A step as CUDA graphs: recorded once, then replayed without the host's time.

A graph replays kernels on the addresses that they had. So what it is made of keeps its place (parameters, gradients,
optimizer state, inputs), what changes is read from tensors, and nothing in it waits for the device.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from runtime.errors import UserError

WARM_UP = 3  # eager steps before the capture: they compile what is compiled at its first call


class Step:
    """The parts of a training step, which take and return nothing, run eagerly or as CUDA graphs."""

    def __init__(self, parts: Sequence[Callable[[], None]], captured: bool, insist: bool, say: Callable[[str], None]):
        """With `captured` the parts become graphs after `WARM_UP` eager steps, unless they make the host wait for the
        device: `say` is then told, or with `insist` a `CaptureError` raised."""
        self.parts, self.captured, self.insist, self.say = parts, captured, insist, say
        self.steps = 0  # so far, those that were to be eager aside
        pool = torch.cuda.graph_pool_handle() if captured else None
        self.graphs = [Captured(part, pool) for part in parts]

    @property
    def replaying(self) -> bool:
        """Whether there are graphs, whose memory must not be replaced."""
        return self.captured and self.steps > WARM_UP

    @contextmanager
    def __call__(self, eager: bool = False) -> Iterator[Sequence[Callable[[], None]]]:
        """The parts, to be called inside as one step goes; with `eager` it is not to be a replay."""
        self.steps += not eager
        watched = self.captured and not eager and self.steps == WARM_UP
        if eager or not self.replaying:
            with synchronizations() if watched else nullcontext() as found:
                yield self.parts
            if found:
                self._give_up(f"the host waits for the device in the step, first at {found[0]}")
        elif self.steps == WARM_UP + 1:
            # The gradients have just got their place in the graphs' memory. The optimizers see it eagerly first: their
            # kernel makes a table of addresses.
            yield [*self.graphs[:-1], self.parts[-1]]
        else:
            yield self.graphs

    def _give_up(self, why: str) -> None:
        self.captured = False
        if self.insist:
            raise CaptureError(f"cannot capture the step: {why}; --capture=off runs without")
        self.say(f"capture  no: {why}")


class CaptureError(UserError):
    """A step that cannot be captured, though it was to be."""


class Captured:
    """`run`, which takes and returns nothing, as a CUDA graph: captured when first called, replayed at every call.

    Graphs of one `pool` share memory: they must be replayed in the order in which they were captured.
    """

    def __init__(self, run: Callable[[], None], pool: tuple[int, int]):
        self.run, self.pool, self.graph = run, pool, None

    def __call__(self) -> None:
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Of this thread alone: the one that reads batches ahead may pin memory meanwhile.
            with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
                self.run()
        self.graph.replay()


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """What makes the host wait for the device inside, a line for each time: it cannot be captured."""
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
    """Lets the host be at most `most` steps ahead of a GPU; on a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device, most: int = 2):
        self.most, self.gpu = most, device.type == "cuda"
        self.steps: deque[torch.cuda.Event] = deque()

    def launched(self) -> None:
        """A step has been launched: wait for the one `most` before it."""
        if self.gpu:
            event = torch.cuda.Event()
            event.record()
            self.steps.append(event)
            if len(self.steps) > self.most:
                self.steps.popleft().synchronize()
