"""Several processes that train one model: who they are, what they tell each other, and how they end together.

A process is a rank, one for each GPU. torchrun starts them (`torchrun --nproc-per-node=8 -- train.py`), or Slurm does
(`srun python train.py`). `joined` reads the variables that these set and yields a `World`. Its methods do nothing for a
single process, so callers need not ask how many there are.

A job ends as one: with one message and one exit code, within seconds. A rank that fails publishes why, in a store that
rank 0 keeps. A thread of every rank, the watchdog, reads that. It also notices a rank that died, a machine that is
gone, and a launcher that was killed. It ends its process whatever the main thread waits for, since NCCL and gloo cannot
be told to stop waiting.

These are all the time-outs:

    CONNECT_S     to connect to the launcher's store, which is there before its ranks are
    JOIN_S        for all ranks to join
    POLL_S        between two looks of the watchdog: for a failure, or a rank that died on this machine
    LOST_S        for the watchdog to find out who has died, after an operation with other ranks has failed
    DEAD_S        until a rank that is not heard of is dead
    COLLECTIVE_S  for one operation on gradients; only a deadlock, with every rank alive, takes longer
    REPORT_S      for rank 0 to record a failure; it may have to wait for a checkpoint to be written
    COURTESY_S    before another rank than 0 refuses the options, which rank 0 most often does itself
    LINGER_S      for rank 0, which keeps the store that the ranks meet at, to end after the others

Waiting for rank 0 has no limit: it may prepare a corpus for hours, and if it dies the watchdog ends the wait.
"""

import json
import os
import select
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime import launcher
from runtime.failure import Failure
from runtime.launcher import POLL_S, Launch, LaunchError

T = TypeVar("T")

CONNECT_S, JOIN_S, COLLECTIVE_S = 10.0, 600.0, 1800.0  # torch's store takes twice as long to give up connecting
LOST_S, REPORT_S, COURTESY_S, LINGER_S = 5.0, 20.0, 1.0, 5.0
# A thread of each rank says twice a second that it is alive, whatever the rank computes. Only swapping, or a call that
# holds Python's lock, can delay that for seconds. torchrun gives up a machine after 15 s without a word of its agent.
# This is twice as patient, because a false alarm is worse than a late one.
DEAD_S = 30.0
NO_LIMIT = timedelta(days=365)


@dataclass(frozen=True)
class World:
    """The ranks of a job, as one of them sees it. This class is a single process; `Ranks` are several.

    All ranks must call the methods that communicate, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    job: str = ""  # an id that a job keeps when its launcher restarts it
    restarted: bool = False  # whether the launcher has started the job before

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all files and prints all lines."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"{self.size}, {self.local_size} on this machine"

    def device(self, name: str) -> str:
        """The device of this rank where the job's is called `name`."""
        return name

    def silent(self) -> "World":
        """This rank without the others: a world of as many ranks, whose methods communicate with none."""
        return World(self.rank, self.size, self.local_rank, self.local_size, self.job)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, a picklable object."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, a picklable object."""
        return [value]

    def check_same(self, what: str, value: Any) -> None:
        """Raise `LaunchError` unless `value`, described by `what`, is equal on all ranks."""
        values = self.gather(value)
        if others := [rank for rank, other in enumerate(values) if other != values[0]]:
            raise LaunchError(f"{what} is another on rank {others[0]} than on rank 0")

    def sum(self, *values: float) -> list[float]:
        """Sums of numbers over all ranks."""
        return list(values)

    def max(self, *values: float) -> list[float]:
        """Maxima of numbers over all ranks."""
        return list(values)

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """A context that the first rank of each machine leaves before the others enter it."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def fail(self, error: BaseException, refusals: tuple[type[Exception], ...]) -> Failure:
        """End the job because of `error`, with a message only if it is one of `refusals`. Of several ranks none
        returns. Returns the failure that is to be reported."""
        return Failure.of(error, refusals)


ALONE = World()


@dataclass(frozen=True)
class Ranks(World):
    """Several ranks, or one that a launcher may restart."""

    host: dist.ProcessGroup | None = None  # gloo, for what is in host memory
    watchdog: "Watchdog | None" = None

    def device(self, name: str) -> str:
        """The GPU of this rank's local rank, or the CPU. Raises `LaunchError` for one GPU for all."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            return name
        if name != "cuda" and self.size > 1:
            raise LaunchError(f"device {name} is one, and {self.size} ranks take one each: use --device=cuda or cpu")
        alone = self.job.startswith("slurm-") and torch.cuda.device_count() == 1  # Slurm shows each task its own
        return name if name != "cuda" else f"cuda:{0 if alone else self.local_rank}"

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def sum(self, *values: float) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: tuple[float, ...], operation: dist.ReduceOp.RedOpType) -> list[float]:
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(numbers, operation, group=self.host)
        return numbers.tolist()

    def replicate(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        self.sum(0.0)

    def fail(self, error: BaseException, refusals: tuple[type[Exception], ...]) -> NoReturn:
        failure = Failure.of(error, refusals, self.watchdog.names[self.rank])
        if failure.may_be_lost and self.size > 1:
            self.watchdog.thread.join(LOST_S)  # which may find that another rank has died
        elif self.rank and not failure.is_bug:
            self.watchdog.thread.join(COURTESY_S)  # what is wrong here may be so on rank 0 too, which then says it
        if failure.is_bug:
            traceback.print_exception(error)
        self.watchdog.fail(failure if self.rank or failure.is_bug else replace(failure, rank=""))


@contextmanager
def joined(report: Callable[[Failure], int]) -> Iterator[World]:
    """A context in which this process is a rank of its job; it yields a plain `World` if no launcher started it.

    `report` records and prints how the job failed, and returns the exit code. It is called on one rank, usually 0, by
    the watchdog, while the main thread may be anywhere. Raises `LaunchError`."""
    launch = Launch.read(os.environ)
    if launch is None:
        yield ALONE
        return
    store, job, starts = _meet(launch)
    watchdog = Watchdog(store, launch, report)
    launcher.met.set()
    try:
        with watchdog.explains():
            nccl = torch.cuda.is_available() and dist.is_nccl_available()
            timeout = timedelta(seconds=COLLECTIVE_S)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo", store=dist.PrefixStore("groups", store), rank=launch.rank,
                world_size=launch.size, timeout=timeout,
            )  # fmt: skip
            host = dist.new_group(backend="gloo", timeout=NO_LIMIT)
            sizes = launch.rank, launch.size, launch.local_rank, launch.local_size
            world = Ranks(*sizes, host=host, watchdog=watchdog)
            restarted = any(world.gather(starts > 1 or launch.restarts > 0))
            world = Ranks(*sizes, world.broadcast(job), restarted, host, watchdog)
        yield world
    except SystemExit as end:  # rank 0 has done what its options ask for in place of training
        watchdog.leave(end.code or 0)
    with watchdog.explains():
        world.barrier()
    watchdog.close()
    dist.destroy_process_group()  # a thread of a group that is left aborts the process at its exit


def _meet(launch: Launch) -> tuple[dist.TCPStore, str, int]:
    """Connect to the store of this start of the job, which rank 0 keeps.

    Returns it and, on rank 0, the job's id and how often it has been started."""
    options = {"timeout": timedelta(seconds=JOIN_S), "wait_for_workers": False}
    try:
        if not launch.agent:
            return dist.TCPStore(launch.address, launch.port, is_master=launch.rank == 0, **options), launch.job, 1
        at_once = options | {"timeout": timedelta(seconds=CONNECT_S)}
        agent = dist.TCPStore(launch.address, launch.port, is_master=False, **at_once)
        agent.set_timeout(options["timeout"])
        if launch.rank == 0:
            store = dist.TCPStore(launch.address, 0, is_master=True, **options)
            _welcome(agent, store, launch.size)
            job = launch.job or agent.compare_set("nanofuse/job", "", uuid.uuid4().hex).decode()
            return store, job, agent.add("nanofuse/starts", 1)
        token = uuid.uuid4().hex
        agent.set(f"nanofuse/joins/{launch.rank}", token)
        port = int(agent.get(f"nanofuse/port/{token}"))
        store = dist.TCPStore(launch.address, port, is_master=False, **options)
        store.set(f"joined/{launch.rank}", "")
        return store, "", 0
    except dist.DistError as error:
        time.sleep(2 * launcher.POLL_S)  # in which the watch ends this process if the launcher was killed
        where, reason = f"{launch.address}:{launch.port}", str(error).partition("\n")[0]
        raise LaunchError(f"rank {launch.rank} has not met the others at {where}: {reason}") from error


def _welcome(agent: dist.TCPStore, store: dist.TCPStore, size: int) -> None:
    """On rank 0, tell the other ranks the port of `store`, and wait until they have joined.

    torchrun's own store, `agent`, outlives a restart, and so does what ranks that are gone have written there. So
    each rank writes a token, and waits for an answer to that."""
    awaited, answered, deadline = set(range(1, size)), set(), time.monotonic() + JOIN_S
    while awaited:
        for rank in awaited:
            if agent.check([f"nanofuse/joins/{rank}"]):
                token = agent.get(f"nanofuse/joins/{rank}").decode()
                if token not in answered:
                    agent.set(f"nanofuse/port/{token}", str(store.port))
                    answered.add(token)
        awaited = {rank for rank in awaited if not store.check([f"joined/{rank}"])}
        if time.monotonic() > deadline:
            raise LaunchError(f"rank {min(awaited)} of {size} has not come within {JOIN_S:.0f} s")
        time.sleep(0.01)


class Watchdog:
    """The thread of a rank that ends its process when the job has failed.

    It talks to the store of rank 0. A second thread ends the process if that does not answer."""

    def __init__(self, store: dist.TCPStore, launch: Launch, report: Callable[[Failure], int]):
        self.launch, self.rank, self.size, self.report = launch, launch.rank, launch.size, report
        self.store = store.clone()  # a client of its own: one that waits for a key makes others wait
        self.closing, self.wake = False, threading.Event()
        store.set(f"who/{self.rank}", json.dumps([socket.gethostname(), os.getpid(), _machine()]))
        everyone = [json.loads(who) for who in store.multi_get([f"who/{rank}" for rank in range(self.size)])]
        self.names = [f"rank {rank} (process {pid} on {host})" for rank, (host, pid, _) in enumerate(everyone)]
        self.processes = {}  # readable when that rank of this machine has ended
        for rank, (_, pid, machine) in enumerate(everyone):
            if rank != self.rank and machine and machine == _machine():
                with suppress(OSError):
                    self.processes[os.pidfd_open(pid)] = rank
        self.poll = select.poll()
        for process in self.processes:
            self.poll.register(process, select.POLLIN)
        self.beats, self.neighbour, self.pulse = 0, (self.rank + 1) % self.size, Pulse()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        if self.rank:
            threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def fail(self, failure: Failure) -> NoReturn:
        """Publish `failure`, unless another came first, and wait for the end of this process."""
        self._publish(failure)
        self.wake.set()
        while True:
            self.thread.join()

    def leave(self, code: int) -> NoReturn:
        """End all ranks with this exit code, without a message."""
        self.store.set("code", str(code))
        self.wake.set()
        while True:
            self.thread.join()

    @contextmanager
    def explains(self) -> Iterator[None]:
        """A context for operations with other ranks. If one fails because a rank has died, the watchdog reports that
        and ends this process."""
        try:
            yield
        except RuntimeError:
            self.thread.join(LOST_S)
            raise

    def close(self) -> None:
        """End the watch, when all ranks have done their work."""
        self.store.set(f"done/{self.rank}", "")
        self.closing = True
        self.wake.set()
        self.thread.join()
        self._leave()

    def _run(self) -> None:
        with _fatal():
            while not self.closing:
                self.wake.wait(POLL_S)
                self._look()

    def _guard(self) -> None:
        """End this process if the watchdog waits for a store that does not answer: rank 0's machine is gone."""
        pulse = Pulse()
        with _fatal():
            while self.thread.is_alive():
                self.thread.join(POLL_S)
                if pulse.has_stopped(self.beats):
                    self._end_without_main(f"has not been heard of for {DEAD_S:.0f} s")

    def _look(self) -> None:
        """End this process if the job has failed."""
        try:
            main_ended = 0 in self._ended()
            if not self.closing and not main_ended and self._has_failed():
                self._end()
        except dist.DistError:  # rank 0, which keeps the store, is gone
            main_ended = True
        if main_ended and not self.closing:
            self._end_without_main("died")

    def _has_failed(self) -> bool:
        """Whether the job has failed; then the store says how."""
        self.beats += 1
        self.store.set(f"beat/{self.rank}", str(self.beats))
        if self.store.check(["code"]) or self.store.check(["failure"]):
            return True
        if reason := self._death():
            self._publish(Failure("crashed", reason))
            return True
        return False

    def _death(self) -> str:
        """Who has died, in words, as far as this rank can tell."""
        if self.launch.was_killed():
            return f"the launcher of {self.names[self.rank]} was killed"
        for rank in self._ended():
            if not self.store.check([f"done/{rank}"]):
                return f"{self.names[rank]} died"
        beat = f"beat/{self.neighbour}"
        heard = int(self.store.get(beat)) if self.store.check([beat]) else 0
        if self.pulse.has_stopped(heard) and not self.store.check([f"done/{self.neighbour}"]):
            return f"{self.names[self.neighbour]} has not been heard of for {DEAD_S:.0f} s"
        return ""

    def _ended(self) -> set[int]:
        """The ranks on this machine whose processes have ended."""
        return {self.processes[process] for process, _ in self.poll.poll(0)}

    def _publish(self, failure: Failure) -> None:
        with suppress(dist.DistError):
            self.store.compare_set("failure", "", json.dumps(asdict(failure)))

    def _end(self) -> NoReturn:
        """End this process as the job has ended. Rank 0 reports that, and then says with which code to exit."""
        if not self.store.check(["code"]) and self.rank == 0:
            code = self.report(Failure(**json.loads(self.store.get("failure"))))
            self.store.set("code", str(code))
        elif self.rank:
            with suppress(dist.DistStoreError):
                self.store.wait(["code"], timedelta(seconds=REPORT_S))
        code = int(self.store.get("code")) if self.store.check(["code"]) else 1
        self._leave()
        _exit(code)

    def _end_without_main(self, what: str) -> NoReturn:
        """End this process because of `what` happened to rank 0. Rank 1 reports it."""
        _exit(self.report(Failure("crashed", f"{self.names[0]} {what}")) if self.rank == 1 else 1)

    def _leave(self) -> None:
        """Say that this rank needs the store no more. Rank 0, which keeps it, waits until none does."""
        deadline, others = time.monotonic() + LINGER_S, set(range(1, self.size))
        with suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "")
            while self.rank == 0 and others and time.monotonic() < deadline:
                others = {rank for rank in others - self._ended() if not self.store.check([f"left/{rank}"])}
                time.sleep(0.01)


class Pulse:
    """Tells that a count which should grow has stopped."""

    def __init__(self):
        self.count, self.silence = -1, 0.0

    def has_stopped(self, count: int) -> bool:
        """Whether `count` has not changed for `DEAD_S`. To be called every `POLL_S`: time in which this process itself
        was stopped does not count."""
        self.silence = self.silence + POLL_S if count == self.count else 0.0
        self.count = count
        return self.silence > DEAD_S


def _machine() -> str:
    """An id of this machine and its process ids, which a container may have of its own; "" if there is none."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return ""


@contextmanager
def _fatal() -> Iterator[None]:
    """A context of a thread that is to end the process, which an error in it ends too."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
        _exit(1)


def _exit(code: int) -> NoReturn:
    """End the process, whatever its other threads are doing."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
