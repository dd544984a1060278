"""How a run ends, in plain values, which one rank can tell another."""

from dataclasses import dataclass
from typing import Literal

from runtime.errors import error_message
from runtime.hardware import out_of_memory

Status = Literal[
    "running", "finished", "diverged", "nan", "oom", "crashed", "interrupted", "killed", "time_limit", "unsupported"
]  # "killed" is never written: a run that says "running" and whose lock is free was killed


@dataclass(frozen=True)
class Failure:
    """What ended a run early, in plain values, so that another rank can record it."""

    status: Status
    message: str  # for the user
    error: str = ""  # for status.json: the error's type and text
    is_bug: bool = False  # neither of the user's making, nor a signal or a lack of memory
    may_be_lost: bool = False  # whether it may only be the sign of another rank's death
    rank: str = ""  # whose failure it is, in words, if it is not that of the process that says so

    @classmethod
    def of(cls, error: BaseException, refusals: tuple[type[Exception], ...], rank: str = "") -> "Failure":
        """The failure that `error` is, on the rank of this name. `refusals` are the errors of the user's making."""
        status: Status = "crashed"
        if isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        elif out_of_memory(error):
            status = "oom"
        is_bug = status == "crashed" and not isinstance(error, refusals)
        # An operation with a dead rank fails so. NCCL and torch's store raise a DistError, which is a RuntimeError, and
        # gloo a plain one. In a backward pass that communicates they come from C++, without a trace of where.
        may_be_lost = is_bug and isinstance(error, RuntimeError)
        name = f"{type(error).__name__}: {error}"
        return cls(status, name if is_bug else error_message(error), name, is_bug, may_be_lost, rank)
