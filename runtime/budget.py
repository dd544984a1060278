"""How long a run lasts, and how far it is."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from runtime.config import ConfigError

NOTHING = {"step": 0, "tokens": 0, "seconds": 0.0, "progress": 0.0}  # the state of a run before its first step


LENGTHS = {"steps", "tokens", "seconds"}  # of which one holds


@dataclass(frozen=True)
class Length:
    """How long a run is: exactly one of `steps`, `tokens` and `seconds`."""

    steps: Annotated[int, "[0, inf)", "optimizer steps"] = 0
    tokens: Annotated[int, "[0, inf)", "training tokens"] = 0
    seconds: Annotated[float, "[0, inf)", "seconds of training, compiling and evaluating included"] = 0.0
    time_limit: Annotated[float, "[0, inf)", "stop this process after so many seconds, to be resumed (0: never)"] = 0.0

    def __post_init__(self):
        if sum(map(bool, (self.steps, self.tokens, self.seconds))) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and seconds gives the run's length, not steps={self.steps}, "
                f"tokens={self.tokens}, seconds={self.seconds}"
            )


class Budget:
    """A run's length in optimizer steps, tokens or seconds, and the share of it that is used.

    A run of some seconds is measured by the clock, all that training takes counted: its schedule begins when the first
    step is done, since that may spend half a minute compiling at what would be the start of the warm-up.
    """

    def __init__(self, length: Length, tokens_per_step: int, before: Mapping[str, float] = NOTHING):
        """Tokens are rounded up to whole steps. `before` is the `state` in which an earlier process left the run; it
        may have had another length, and other tokens a step."""
        self.tokens_per_step, self.seconds = tokens_per_step, length.seconds
        self.before = {**NOTHING, "length": length.seconds, **before}
        if self.seconds and self.before["length"] != self.seconds:
            self.before["progress"] = min(1.0, self.before["seconds"] / self.seconds)
        left = max(0, length.tokens - self.before["tokens"])
        self.steps = length.steps or self.before["step"] + math.ceil(left / tokens_per_step)
        self.start()

    def share(self, warmup: float) -> float:
        """The share of the run that a warm-up is: itself below 1, else that of so many steps, which may be more than 1.
        Raises `ConfigError` for steps of a run whose steps are not known."""
        if warmup < 1:
            return warmup
        if self.seconds:
            raise ConfigError(
                f"warmup {warmup:g} is in steps, and a run of some seconds does not know how many it has: give a share "
                "of the run, below 1, or the run's length in steps or tokens"
            )
        return warmup / self.steps

    def start(self) -> float:
        """Begin to count. Returns the time."""
        self._started, self._first_step_ended = time.perf_counter(), None
        return self._started

    def state(self, step: int) -> dict[str, float]:
        """What another process needs as its `before` to go on from here."""
        return self.position(step) | {"progress": self.progress(step), "length": self.seconds}

    def step_ended(self) -> None:
        self._first_step_ended = self._first_step_ended or time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training, in this process and those before it."""
        return self.before["seconds"] + time.perf_counter() - self._started

    def position(self, step: int) -> dict[str, float]:
        """How far the run is after `step` steps, as every row of its record says."""
        tokens = self.before["tokens"] + (step - self.before["step"]) * self.tokens_per_step
        return {"step": step, "tokens": tokens, "seconds": self.elapsed()}

    def progress(self, step: int) -> float:
        """Share of the run that is done after `step` steps, 0 to 1."""
        if not self.seconds:
            return min(1.0, step / self.steps)
        spent, progress = self.before["seconds"], self.before["progress"]
        if self._first_step_ended is None:
            return progress
        left = self.seconds - spent - (self._first_step_ended - self._started)
        share = (time.perf_counter() - self._first_step_ended) / left if left > 0 else 1.0
        return min(1.0, progress + (1 - progress) * share)
