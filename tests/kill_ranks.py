"""Kill ranks and launchers of a job at random moments: it must end with the weights and losses of an undisturbed one.

    python tests/kill_ranks.py --kills 20                 # a rank or its launcher, each time
    python tests/kill_ranks.py --kills 20 --shard=full
    python tests/kill_ranks.py --machines                 # two launchers with one rendezvous, of which one is killed

A launcher is torchrun, and starts two ranks, which meet over gloo. After the death of a rank it starts them again by
itself; after its own death a new one is started. Syncing to disk is slow here, so that many kills hit a job that writes
a checkpoint.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Queue

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from test_kill_and_resume import losses

from model import checkpoint
from runtime.run import read_status

SLOW = """
import os, sys, time
sync = os.fsync
def slow(file):
    os.write(1, b"syncing\\n")
    time.sleep(0.05)
    sync(file)
os.fsync = slow
import train
sys.exit(train.main())
"""
GUARD_S = 600  # ends a script that hangs
SIZE = "--model.n_layer=2 --model.d_model=32 --model.n_head=2 --model.seq_len=32 --batch_size=4 --compile=off"
CADENCE = "--steps=200 --save_every=10 --eval_every=40 --eval_tokens=1024 --sample_every=0 --log_every=5"
FLAGS = [*SIZE.split(), *CADENCE.split(), "--data.corpus=stdlib", "--data.tokenizer=bytes", "--data.max_tokens=200000"]
DROPOUT = "--model.dropout=0.1"


class Job:
    """A launcher and its ranks, with the lines that they have printed."""

    def __init__(self, script: Path, flags: list[str], *options: str):
        command = [sys.executable, "-m", "torch.distributed.run", *options, "--", str(script), *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.launcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        self.printed: list[str] = []
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.launcher.stdout:
            self.printed.append(line)
            self._lines.put(line)
        self._lines.put("")  # the end

    def next_line(self) -> str:
        """The next line that was printed, "" at the end."""
        line = self._lines.get(timeout=GUARD_S)
        if not line:
            self._lines.put("")
        return line

    def wait_for(self, start: str) -> bool:
        """Read lines until one begins with `start`. Returns whether one did."""
        while line := self.next_line():
            if line.startswith(start):
                return True
        return False

    @property
    def ranks(self) -> list[int]:
        """The process ids of the ranks."""
        try:
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in children.split()]

    @property
    def runs(self) -> bool:
        return self.launcher.poll() is None

    def kill_launcher(self) -> None:
        """Kill the launcher, and wait for the ranks, which must end by themselves."""
        ranks = self.ranks
        self.launcher.kill()
        self.launcher.wait()
        deadline = time.monotonic() + GUARD_S
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline, "ranks outlive their launcher"
            time.sleep(0.2)

    def kill_all(self) -> None:
        """Kill the launcher and its ranks, as the end of a machine does."""
        for pid in (self.launcher.pid, *self.ranks):
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def finish(self) -> None:
        """Wait for the end of the job, which must be a good one."""
        while self.next_line():
            pass
        assert self.launcher.wait() == 0, "".join(self.printed)


def start_or_resume(folder: Path, script: Path, flags: list[str], *options: str) -> Job:
    known = "--resume" if (folder / "last.pt").exists() else "--overwrite"
    return Job(script, [*flags, f"--run={folder.name}", known], *options)


def compare(ours: Path, theirs: Path, tolerance: float = 0.0) -> None:
    """Assert that two runs have the same losses and weights, up to a relative `tolerance`."""
    assert read_status(ours)["status"] == "finished"
    # Other rows are of events, such as the resumptions of a job.
    rows, others = ([row for row in losses(folder) if row[1] or row[2]] for folder in (ours, theirs))
    assert [row[0] for row in rows] == [row[0] for row in others]
    for row, other in zip(rows, others, strict=True):
        for a, b in zip(row[1:], other[1:], strict=True):
            assert a == b or abs(a - b) <= tolerance * b, f"step {row[0]}: loss {a}, not {b}"
    for name in ("last.pt", "best.pt"):
        weights, expected = (checkpoint.load(folder / name)["model"] for folder in (ours, theirs))
        for key, tensor in expected.items():
            close = (weights[key] - tensor).norm() <= 10 * tolerance * tensor.norm()
            assert torch.equal(weights[key], tensor) or close, f"{key} of {name} differs"


def kill_at_random(out: Path, script: Path, flags: list[str], kills: int, seed: int) -> None:
    rng, options, killed = (
        random.Random(seed),
        ("--standalone", "--nproc-per-node=2", "--max-restarts=1000"),
        out / "killed",
    )
    begin = time.monotonic()
    whole = Job(script, [*flags, "--run=whole"], *options)
    whole.finish()
    n_lines = sum(line.startswith("step") for line in whole.printed)
    per_line = json.loads((out / "whole" / "status.json").read_text())["seconds"] / n_lines
    print(f"undisturbed: {n_lines} lines, {time.monotonic() - begin:.0f} s", flush=True)
    job, n_ranks, n_launchers, n_writing = start_or_resume(killed, script, flags, *options), 0, 0, 0
    for kill in range(kills):
        if rng.random() < 0.8:  # in training, in the rest in the start
            job.wait_for("compile")  # the last line before training
            for _ in range(rng.randint(0, max(1, 2 * n_lines // kills))):
                job.next_line()
            if rng.random() < 0.5:
                job.wait_for("syncing")
            time.sleep(rng.uniform(0, per_line))
        else:
            time.sleep(rng.uniform(0, 10 * per_line))
        if not job.runs:
            job.finish()
            print(f"kill {kill + 1}: the run had finished", flush=True)
            break
        victims = job.ranks
        n_writing += (killed / "last.pt.partial").exists()
        if victims and rng.random() < 0.6:
            rank = rng.choice(victims)
            print(f"kill {kill + 1}: rank {rank}", flush=True)
            os.kill(rank, signal.SIGKILL)
            n_ranks += 1
        else:
            print(f"kill {kill + 1}: the launcher", flush=True)
            job.kill_launcher()
            n_launchers += 1
            job = start_or_resume(killed, script, flags, *options)
    job.finish()
    compare(killed, out / "whole")
    print(f"killed {n_ranks} ranks and {n_launchers} launchers, {n_writing} times while a checkpoint was written;")
    print("the run ended with the same weights and losses as an undisturbed one")


def kill_a_machine(out: Path, script: Path, flags: list[str], seed: int) -> None:
    rng = random.Random(seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = Job(script, [*flags, "--run=whole"], "--standalone", "--nproc-per-node=2")
    whole.finish()
    options = [
        "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-id={seed}",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    mine = [*flags, "--run=killed"]
    machines = [Job(script, mine, *options)]
    time.sleep(1)  # so that it keeps the rendezvous
    machines.append(Job(script, mine, *options))
    speaker = machines[0]  # keeps the rendezvous; either may have rank 0
    folder, deadline = out / "killed", time.monotonic() + GUARD_S
    while not (folder / "last.pt").exists():
        assert speaker.runs and time.monotonic() < deadline, "".join(speaker.printed)
        time.sleep(0.2)
    time.sleep(rng.uniform(0, 2))
    machines[1].kill_all()
    print("killed the second machine", flush=True)
    begin = time.monotonic()
    speaker.finish()
    print(f"the first went on, and was done after {time.monotonic() - begin:.0f} s", flush=True)
    compare(folder, out / "whole", 1e-4)
    events = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "event" in row]
    print(f"it ended with the same losses and weights, up to rounding, as an undisturbed one; record: {events}")


def refuse_once(out: Path, script: Path, flags: list[str]) -> None:
    job = Job(script, [*flags, "--lr=fast"], "--standalone", "--nproc-per-node=2")
    assert job.launcher.wait(GUARD_S)
    while job.next_line():
        pass
    errors = [line for line in job.printed if line.startswith("error: ")]
    assert len(errors) == 1 and "lr must be a number" in errors[0], "".join(job.printed)
    assert not list(out.glob("*/config.json"))
    print(f"bad input is refused once: {errors[0].strip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machines", action="store_true")
    parser.add_argument("--shard", choices=("off", "full"), default="off")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script, out = folder / "train_slowly.py", folder / "out"
        script.write_text(SLOW)
        always = [f"--out={out}", f"--data.cache={folder / 'cache'}", f"--optimizer={args.optimizer}"]
        flags = [*FLAGS, *always, f"--shard={args.shard}"]
        refuse_once(out, script, flags)
        if args.machines:
            kill_a_machine(out, script, flags, args.seed)
        else:
            kill_at_random(out, script, [*flags, DROPOUT], args.kills, args.seed)


if __name__ == "__main__":
    main()
