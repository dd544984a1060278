"""What started this process as a rank, torchrun or Slurm, and the watch that ends a rank whose launcher was killed.

The watch begins when this package is imported, before torch is, and ends when the watchdog of `runtime/distributed.py`
takes over. In between a rank imports torch and waits for others, which may never come if their launcher is gone.
"""

import os
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from runtime.errors import UserError

POLL_S = 0.5  # between two looks at the launcher
PARENT = os.getppid()  # read at once: a parent that is killed later has another process id than this
met = threading.Event()  # set when this rank has met the others


class LaunchError(UserError):
    """Variables of a launcher that name no job, or ranks that do not find each other."""


@dataclass(frozen=True)
class Launch:
    """What a launcher's variables say."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # of the machine of rank 0
    port: int
    supervised: bool = False  # whether the launcher lives as long as its ranks
    agent: bool = False  # whether the launcher keeps a store at that port, as torchrun does
    job: str = ""
    restarts: int = 0

    @classmethod
    def read(cls, env: Mapping[str, str]) -> "Launch | None":
        """Read torchrun's variables, or Slurm's for a step of several tasks. None for a process that neither has
        started. Raises `LaunchError`."""
        try:
            if "RANK" in env and "WORLD_SIZE" in env:
                return cls._torchrun(env)
            if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone: a batch script is one process
                return cls._slurm(env)
        except (KeyError, ValueError, IndexError) as error:
            what = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error)
            raise LaunchError(f"the launcher's variables name no rank: {what}; start the job with torchrun") from error
        return None

    @classmethod
    def _torchrun(cls, env: Mapping[str, str]) -> "Launch":
        rank, size, job = int(env["RANK"]), int(env["WORLD_SIZE"]), env.get("TORCHELASTIC_RUN_ID", "none")
        return cls(
            rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)),
            env["MASTER_ADDR"], int(env["MASTER_PORT"]), "TORCHELASTIC_RUN_ID" in env,
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True", "" if job == "none" else job,
            int(env.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )  # fmt: skip

    @classmethod
    def _slurm(cls, env: Mapping[str, str]) -> "Launch":
        counts: list[int] = []  # tasks of each node, from a form like 4(x2),3
        for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
            count, _, times = part.partition("(x")
            counts += [int(count)] * int(times.rstrip(")") or 1)
        # The first name of a form like node[03-05,7],other
        first = re.sub(r"^([^,\[]*)\[([^\],-]+)[^\]]*\]", r"\1\2", env["SLURM_STEP_NODELIST"]).split(",")[0]
        job = int(env["SLURM_JOB_ID"])
        return cls(
            int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]),
            counts[int(env["SLURM_NODEID"])], env.get("MASTER_ADDR", first),
            int(env.get("MASTER_PORT", 20000 + job % 10000)), supervised=True,
            job=f"slurm-{job}", restarts=int(env.get("SLURM_RESTART_COUNT", 0)),
        )  # fmt: skip

    def was_killed(self) -> bool:
        """Whether the launcher was killed, and this process left behind.

        A shell or a script that sets the variables itself may end before its ranks, which then go on."""
        return self.supervised and os.getppid() != PARENT


def watch() -> None:
    """If this process is a rank, begin the thread that ends it when its launcher is killed."""
    with suppress(LaunchError):  # which joining the others raises again
        launch = Launch.read(os.environ)
        if launch and launch.supervised:
            threading.Thread(target=_end_with_launcher, args=(launch,), daemon=True).start()


def _end_with_launcher(launch: Launch) -> None:
    while not met.wait(POLL_S):
        if launch.was_killed():
            with suppress(OSError):  # the launcher may have been the reader of a pipe
                if launch.local_rank == 0:
                    print("error: the launcher was killed before its ranks had met", file=sys.stderr, flush=True)
            os._exit(1)
