"""Ranks forked from the test process, which has imported everything already.

They meet as torchrun's do, at a store of their launcher. That is kept by a process of its own, because a process with
threads, as a store has, cannot safely fork others.
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch._inductor  # so that the ranks need not
from torch.distributed import TCPStore

import train
from runtime import launcher

GUARD_S = 300  # ends a test that hangs

# A process whose torch has threads of its own, as for a GPU, cannot be forked.
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="forks processes, which those that use CUDA cannot")


@pytest.fixture(scope="module", autouse=True)
def brief():
    """What takes more time than the training of a few steps is cut short: plots, samples, and the watchdog's sleep."""
    with pytest.MonkeyPatch.context() as patch:
        continued = train.continued
        patch.setattr(train, "continued", lambda model, text, prompt, n, seed: continued(model, text, prompt, 20, seed))
        patch.setattr("runtime.run.Run.plot", lambda run: None)
        patch.setattr("runtime.distributed.POLL_S", 0.05)
        yield


def store() -> tuple[int, BinaryIO]:
    """Fork a process that keeps a store, until the file that is returned with its port is closed."""
    (is_open, keep_open), (answer, ask) = os.pipe(), os.pipe()
    if not os.fork():
        os.close(keep_open)
        kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(ask, str(kept.port).encode())
        os.read(is_open, 1)  # returns when the last process that holds the other end has closed it
        os._exit(0)
    os.close(is_open)
    os.close(ask)
    port = int(os.read(answer, 8))
    os.close(answer)
    return port, open(keep_open, "wb")


class Launcher:
    """Starts ranks, again and again, as torchrun does for one job."""

    def __init__(self, output: Path, job: str = "none"):
        """Each rank's output is appended to a file in the folder `output`: 0.out, 0.err, 1.out, ..."""
        self.output, self.job, self.restarts = output, job, 0
        output.mkdir(parents=True, exist_ok=True)
        self.port, self.keep_open = store()

    def start(self, size: int, run: Callable[[int], int]) -> list[int]:
        """Fork `size` ranks, in each of which `run(rank)` is called. Returns their process ids."""
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        for rank in range(size):
            pid = os.fork()
            if not pid:
                self._become(rank, size, run)
            pids.append(pid)
        self.restarts += 1
        return pids

    def run(self, size: int, run: Callable[[int], int]) -> list[int]:
        """Fork `size` ranks and wait for them. Returns their exit codes, negative for a signal."""
        return [code_of(pid) for pid in self.start(size, run)]

    def die_in(self, size: int, run: Callable[[int], int]) -> None:
        """Have `size` ranks started by another process, their launcher, which `run` in one of them kills by
        `kill_launcher`. Returns when all have ended."""
        read, write = os.pipe()  # is at its end when no process holds it open for writing
        pid = os.fork()
        if not pid:
            self.start(size, run)
            time.sleep(GUARD_S)
            os._exit(0)
        os.close(write)
        assert code_of(pid) == -signal.SIGKILL
        assert os.read(read, 1) == b""
        os.close(read)

    def said(self, rank: int = 0, stream: str = "err") -> str:
        """What a rank has printed so far."""
        return (self.output / f"{rank}.{stream}").read_text()

    def _become(self, rank: int, size: int, run: Callable[[int], int]) -> None:
        """Become a rank, in a forked process, and end it."""
        code = 70
        try:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(self.output / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", buffering=1) for stream in (1, 2))
            faulthandler.dump_traceback_later(GUARD_S, exit=True, file=sys.stderr)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": self.job,
                "TORCHELASTIC_RESTART_COUNT": str(self.restarts),
            }  # fmt: skip
            launcher.PARENT = os.getppid()
            launcher.watch()
            torch.set_num_threads(1)
            code = run(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def kill_launcher() -> int:
    """Kill the launcher of this rank, and wait for the end of it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(GUARD_S)
    return 70


def code_of(pid: int) -> int:
    """Wait for a process. Returns its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
