"""The length of a run, and its progress."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from runtime.config import ConfigError, Heading

AT_START = {"step": 0, "tokens": 0, "seconds": 0.0, "progress": 0.0}  # the state of a run before its first step
LENGTHS = {"steps", "tokens", "seconds"}  # mutually exclusive options


@dataclass(frozen=True)
class Length:
    """Length of a run: exactly one of `steps`, `tokens` and `seconds`."""

    length_of_the_run: Heading
    steps: Annotated[int, "[0, inf)", "optimizer steps; one of steps, tokens and seconds is the length"] = 0
    tokens: Annotated[int, "[0, inf)", "training tokens"] = 0
    seconds: Annotated[float, "[0, inf)", "seconds of training, including compilation and evaluation"] = 0.0
    time_limit: Annotated[
        float, "[0, inf)", "stop this process after this many seconds; --resume continues (0: never)"
    ] = 0.0

    def __post_init__(self):
        if sum(map(bool, (self.steps, self.tokens, self.seconds))) != 1:
            raise ValueError(
                f"exactly one of steps, tokens and seconds gives the run's length, not steps={self.steps}, "
                f"tokens={self.tokens}, seconds={self.seconds}"
            )

    @property
    def doubled(self) -> str:
        """The flag for a run of twice this length."""
        name = next(name for name in LENGTHS if getattr(self, name))
        return f"--{name}={2 * getattr(self, name)}"

    def reached(self, state: Mapping[str, Any]) -> bool:
        """Whether this length is no greater than that of a finished run, or than what it has done, by its last
        checkpoint `state`. A run in seconds may have saved that just before its end."""
        return all(getattr(self, unit) <= max(done, state["config"][unit]) for unit, done in _done(state).items())

    def check_resumes(self, state: Mapping[str, Any]) -> None:
        """Raise `ConfigError` if this length is not that of the checkpoint `state`, and less than what is done."""
        for unit, done in _done(state).items():
            length = getattr(self, unit)
            if length != state["config"][unit] and 0 < length < done:
                raise ConfigError(
                    f"{unit} {length:,} is less than the {done:,} that the run has done: --resume can only train on"
                )


def _done(state: Mapping[str, Any]) -> dict[str, float]:
    """What a run has done by the checkpoint `state`, in each unit of a length."""
    position = AT_START | state.get("budget", {})
    return {"steps": state["step"], "tokens": position["tokens"], "seconds": position["seconds"]}


class Budget:
    """A run's length in optimizer steps, tokens or seconds, and the fraction of it that is done.

    A run with a length in seconds counts wall-clock time, including evaluation and saving. Its schedule starts after
    the first step: compiling in that step may take half a minute, longer than the warm-up.
    """

    def __init__(self, length: Length, tokens_per_step: int, previous: Mapping[str, float] = AT_START):
        """A length in tokens is rounded up to whole steps. `previous` is the `state` that an earlier process of the run
        saved; its length and its tokens per step may have been different."""
        self.tokens_per_step, self.seconds, self.time_limit = tokens_per_step, length.seconds, length.time_limit
        self.previous = {**AT_START, "length": length.seconds, **previous}
        if self.seconds and self.previous["length"] != self.seconds:
            self.previous["progress"] = min(1.0, self.previous["seconds"] / self.seconds)
        remaining_tokens = max(0, length.tokens - self.previous["tokens"])
        self.steps = length.steps or self.previous["step"] + math.ceil(remaining_tokens / tokens_per_step)
        # Fraction of the run that one step is: nominal for a run in seconds, whose number of steps is not known.
        self.step_fraction = 0.001 if self.seconds else 1 / self.steps
        self.start()

    def warmup_fraction(self, warmup: float) -> float:
        """Convert the option `warmup` to a fraction of the run: below 1 it is one already, otherwise a number of steps.

        The fraction may exceed 1. Raises `ConfigError` for steps if the run's length is in seconds."""
        if warmup < 1:
            return warmup
        if self.seconds:
            raise ConfigError(
                f"warmup {warmup:g} is in steps, and a run of {self.seconds:g} seconds has no known number of steps: "
                "give a fraction of the run, below 1, or the run's length in steps or tokens"
            )
        return warmup / self.steps

    def warmup_notes(self, warmup: float) -> list[str]:
        """A line that says so if the whole run is warm-up."""
        never_ends = self.warmup_fraction(warmup) >= 1
        return [f"{warmup:g} steps of {self.steps}: the rate rises to the end"] if never_ends else []

    def start(self) -> None:
        """Start the clock of this process."""
        self._started, self._first_step_ended = time.perf_counter(), None

    def is_late(self) -> bool:
        """Whether this process has reached its time limit."""
        return 0 < self.time_limit <= time.perf_counter() - self._started

    def state(self, step: int) -> dict[str, float]:
        """State to pass as `previous` to the process that resumes the run."""
        return self.position(step) | {"progress": self.progress(step), "length": self.seconds}

    def step_ended(self) -> None:
        """Call after every step: the schedule of a run in seconds starts after the first."""
        self._first_step_ended = self._first_step_ended or time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training so far, in this process and in earlier ones."""
        return self.previous["seconds"] + time.perf_counter() - self._started

    def remaining(self, step: int) -> float | None:
        """Seconds until the run's length is reached; None until the second step of this process, by whose speed they
        are estimated."""
        if self.seconds:
            return max(0.0, self.seconds - self.elapsed())
        steps_after_first = step - self.previous["step"] - 1
        if self._first_step_ended is None or steps_after_first < 1:
            return None
        return (time.perf_counter() - self._first_step_ended) / steps_after_first * (self.steps - step)

    def position(self, step: int) -> dict[str, float]:
        """Step, tokens and seconds after `step` steps: the first columns of every row of metrics."""
        tokens = self.previous["tokens"] + (step - self.previous["step"]) * self.tokens_per_step
        return {"step": step, "tokens": tokens, "seconds": self.elapsed()}

    def progress(self, step: int) -> float:
        """Fraction of the run that is done after `step` steps, 0 to 1."""
        if not self.seconds:
            return min(1.0, step / self.steps)
        start_progress = self.previous["progress"]
        if self._first_step_ended is None:
            return start_progress
        # This process covers the rest of the schedule in the time that is left after its first step.
        remaining = self.seconds - self.previous["seconds"] - (self._first_step_ended - self._started)
        fraction = (time.perf_counter() - self._first_step_ended) / remaining if remaining > 0 else 1.0
        return min(1.0, start_progress + (1 - start_progress) * fraction)
