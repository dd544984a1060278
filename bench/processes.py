"""Child processes with a time limit, and a card that several of them share."""

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a process ended: `passed`, `failed (<exit code>)` or `over <limit> s`; and the lines that it printed."""

    status: str
    lines: list[str]
    errors: list[str]

    @property
    def failure(self) -> str | None:
        """Its last words, or that its time was up; None if it passed."""
        if self.status == "passed":
            return None
        timeouts = [line for line in self.errors if line.startswith("Timeout")]  # faulthandler's; a traceback follows
        words = () if self.status.startswith("over") else (timeouts, self.errors, self.lines)
        return next((lines[-1] for lines in words if lines), self.status)

    @property
    def said(self) -> dict:
        """The JSON objects among its lines, merged."""
        return {k: v for line in self.lines if line.startswith("{") for k, v in json.loads(line).items()}


def run(command: Sequence[object], limit: float = threading.TIMEOUT_MAX, echo: bool = False, **env: str) -> Ended:
    """Run a command in the repository. It is killed after `limit` seconds, with its children, which hold its pipe."""
    lines, expired = [], threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "errors": "replace"}
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, start_new_session=True, env=os.environ | env, **pipes
        )

        def kill() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, limit), kill)
        timer.start()
        try:
            for line in process.stdout:
                lines += [line.strip()] if line.strip() else []
                if echo:
                    print(line.rstrip("\n"), flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                kill()
        errors.seek(0)
        status = f"over {limit:g} s" if expired.is_set() else f"failed ({code})" if code else "passed"
        return Ended(status, lines, [line.strip() for line in errors if line.strip()])


@contextmanager
def card_held(lock: Path, alone: bool = True) -> Iterator[None]:
    """Among processes that name the same file, one that holds the card `alone` keeps all others from it meanwhile."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
