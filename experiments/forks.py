"""Trials forked from a process that has imported everything already: multiprocessing's fork server.

This is for CPUs on Linux only. CUDA does not survive a fork, and other systems' libraries may not.
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
    """A run of train.py in a forked process with a session of its own. The interface is that of `subprocess.Popen`."""

    def __init__(self, argv: Sequence[str], stdout: Path, stderr: Path, env: Mapping[str, str], cap: int | None):
        """Start it with the flags `argv` and the environment `env`. Output is appended to two files. Allocations beyond
        `cap` bytes of private memory fail."""
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
    """Start the fork server, if it is not running, with this process's search path for modules."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({} if before is None else {"PYTHONPATH": before})


def _train(argv: list[str], stdout: Path, stderr: Path, env: dict[str, str], cap: int | None) -> None:
    """Runs in the forked process: set it up as if it had been started as `env train.py argv`, and train."""
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
    """Runs in a process forked from `parent`: it is killed when the parent dies, and allocations beyond `cap` bytes of
    private memory fail."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    if cap:
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))


def die_with_parent() -> None:
    """Have this process killed when its parent dies (Linux's prctl PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGKILL)
