"""A job: the processes that train one model, and how they end."""

from contextlib import ExitStack
from types import TracebackType
from typing import Any

from runtime.distributed import ALONE, World, joined
from runtime.failure import Failure
from runtime.run import Run, end_early


class Job:
    """A context that ends all ranks of a job as one, if one fails: with a record, one sentence and one exit code.

    The caller sets `run` and `trainer`, which has a `step` and a `saver`, when there are any. An error that a sentence
    explains is suppressed, and `code` is then the exit code. Any other one of a single process is raised."""

    def __init__(self, refusals: tuple[type[Exception], ...]):
        """`refusals` are the errors of the user's making."""
        self.refusals, self.world, self.code = refusals, ALONE, 0
        self.run: Run | None = None
        self.trainer: Any = None
        self._ranks = ExitStack()

    def join(self) -> World:
        """Join the other ranks of this job, if it has any. Raises `LaunchError`."""
        self.world = self._ranks.enter_context(joined(self._end))
        return self.world

    def _end(self, failure: Failure) -> int:
        """Record and say how the job failed. The watchdog calls this if another rank has failed."""
        if self.trainer:
            self.trainer.saver.settle()
        code = end_early(failure, self.run, self.trainer.step if self.trainer else 0)
        self._release()
        return code

    def _release(self) -> None:
        if self.run:
            self.run.release()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if isinstance(error, Exception | KeyboardInterrupt):
            failure = self.world.fail(error, self.refusals)  # which does not return if there are other ranks
            self.code = self._end(failure)
            return not failure.is_bug
        self._release()
        self._ranks.__exit__(kind, error, traceback)
        return False
