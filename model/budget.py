"""How long a run lasts, and how far it is."""

import math
import time


class Budget:
    """A run's length in optimizer steps or in seconds, whichever is given, and the share of it that is used.

    A run of some seconds is measured by the clock, all that training takes counted: its schedule begins when the first
    step is done, since that may spend half a minute compiling at what would be the start of the warm-up.
    """

    def __init__(self, steps: int, seconds: float):
        self.steps, self.seconds = steps, seconds
        self._before = (0.0, 0.0)  # seconds and progress when this process took the run up
        self._started, self._first_step_ended = time.perf_counter(), None

    @classmethod
    def of(cls, steps: int, tokens: int, seconds: float, tokens_per_step: int) -> "Budget":
        """From whichever of the three is not 0; tokens are rounded up to whole steps."""
        return cls(steps or math.ceil(tokens / tokens_per_step), seconds)

    def state(self, step: int) -> dict[str, float]:
        """What `start` needs to go on from here in another process."""
        return {"seconds": self.elapsed(), "progress": self.progress(step)}

    def start(self, seconds: float = 0.0, progress: float = 0.0) -> None:
        """Begin to count, on top of what earlier processes used."""
        self._before = (seconds, progress)
        self._started, self._first_step_ended = time.perf_counter(), None

    def step_ended(self) -> None:
        self._first_step_ended = self._first_step_ended or time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training, in this process and those before it."""
        return self._before[0] + time.perf_counter() - self._started

    def progress(self, step: int) -> float:
        """Share of the run that is done after `step` steps, 0 to 1."""
        if not self.seconds:
            return min(1.0, step / self.steps)
        spent, progress = self._before
        if self._first_step_ended is None:
            return progress
        left = self.seconds - spent - (self._first_step_ended - self._started)
        share = (time.perf_counter() - self._first_step_ended) / left if left > 0 else 1.0
        return min(1.0, progress + (1 - progress) * share)
