"""Trials forked from a warm process, by multiprocessing's fork server: each begins where it has imported everything.

That is for a CPU on Linux alone. CUDA does not survive a fork, and other systems' libraries may not.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec no lock may be waited for


class Fork:
    """A run of train.py, forked from the warm process: the leader of a session, with the interface of a `Popen`."""

    def __init__(self, argv: Sequence[str], stdout: Path, stderr: Path, env: Mapping[str, str], cap: int | None):
        """Train by the flags `argv`. Output is appended to files; for `env` and `cap` see `_train`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.warm"])
        _ensure_running()
        self._process = context.Process(target=_train, args=(list(argv), stdout, stderr, dict(env), cap))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _ensure_running() -> None:
    """Start the warm process, if it is not running, with modules found where they are here."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({} if before is None else {"PYTHONPATH": before})


def _train(argv: list[str], stdout: Path, stderr: Path, env: dict[str, str], cap: int | None) -> None:
    """In the forked process: become as one that was started as `env train.py argv`, and train."""
    import torch

    import train

    os.setsid()
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    confine(sys.modules["experiments.warm"].PID, cap)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:  # which OpenMP read when it was loaded
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [train.__file__, *argv]
    sys.exit(train.main())


def confine(parent: int, cap: int | None) -> None:
    """In the process forked from `parent`: be killed when that one dies, and let allocations beyond `cap` bytes of
    private memory fail."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    if cap:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))


def die_with_parent() -> None:
    """Be killed when the parent dies (Linux's prctl PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGKILL)
