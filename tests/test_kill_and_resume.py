"""Kill a run at random times and resume it each time: it must end with the weights, the losses and the samples of an
undisturbed run. Syncing to disk is slow and said here, so that most kills hit a run that writes a checkpoint.

    python tests/test_kill_and_resume.py --kills 20

The test suite runs a short version.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ranks import forks

import train
from model import checkpoint
from runtime.run import read_status

FORK = multiprocessing.get_context("fork")  # spares each run the import of torch
SYNC_S = 0.02


def start(flags: list[str]) -> tuple[BaseProcess, TextIO]:
    """Train in a process of its own. Returns it and what it prints."""
    ours, theirs = os.pipe()
    process = FORK.Process(target=train_slowly, args=(flags, theirs))
    process.start()
    os.close(theirs)
    return process, open(ours)


def train_slowly(flags: list[str], output: int) -> None:
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    sync = os.fsync

    def slow(file):
        os.write(1, b"syncing\n")
        time.sleep(SYNC_S)
        sync(file)

    os.fsync = slow
    torch.set_num_threads(1)  # those of the parent are not in its fork
    sys.exit(train.main(flags))


def finish(process: BaseProcess, output: TextIO) -> list[str]:
    """Wait for the end of a run. Returns the lines that it printed in training."""
    with output:
        text = output.read()
    process.join()
    assert process.exitcode == 0, text
    return [line for line in text.splitlines() if line.startswith("step")]


def kill_and_resume(flags: list[str], out: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """Train with `flags` once undisturbed and once with `kills` kills at random times, and compare all that they made.

    A kill comes at a random time after a random number of lines, or in a sync after them, so that slow and fast
    machines are killed at the same places. After a kill before the first checkpoint the run starts from the beginning.
    Returns the number of kills that hit a running process, and how many of these hit it while it wrote a checkpoint.
    """
    flags, rng, n_hits, n_writing = [*flags, f"--out={out}"], random.Random(seed), 0, 0
    n_lines = len(finish(*start([*flags, "--run=whole"])))
    seconds_per_line = json.loads((out / "whole" / "status.json").read_text())["seconds"] / n_lines
    whole, killed = out / "whole", out / "killed"

    def start_or_resume() -> tuple[BaseProcess, TextIO]:
        return start([*flags, "--run=killed", "--resume" if (killed / "last.pt").exists() else "--overwrite"])

    for _ in range(kills):
        if killed.exists() and read_status(killed)["status"] == "finished":
            break
        process, output = start_or_resume()
        with output:
            while not output.readline().startswith("compile"):  # the last line before training
                assert process.is_alive()
            for _ in range(rng.randint(0, max(1, 2 * n_lines // kills - 1))):
                output.readline()
            if rng.random() < 0.7:  # in what follows the start of a sync: the file's, the links, the folder's
                while (line := output.readline()) and "syncing" not in line:
                    pass
                time.sleep(rng.uniform(0, 3 * SYNC_S))
            else:
                time.sleep(rng.uniform(0, seconds_per_line))
            running = process.is_alive()
            process.kill()
            process.join()
        n_hits += running
        n_writing += running and (killed / "last.pt.partial").exists()
        if read_status(killed)["status"] == "finished":  # before its kill: nothing is left to resume
            break
        assert read_status(killed)["status"] == "killed"
    finish(*start_or_resume())
    for name in ("last.pt", "best.pt"):
        ours, theirs = checkpoint.load(killed / name), checkpoint.load(whole / name)
        assert ours["step"] == theirs["step"]
        for key in theirs["model"]:
            assert torch.equal(ours["model"][key], theirs["model"][key]), f"{key} of {name} differs"
    assert losses(killed) == losses(whole)
    assert (killed / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    return n_hits, n_writing


def losses(folder: Path) -> list[tuple[int, float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows]


# What a resumed run could get wrong: the dropout's random state, documents, and the parts of a batch.
VARIED = {"model.dropout": 0.1, "data.packing": "documents", "micro_batch": 2}


@forks
def test_killed_three_times(tiny, tmp_path):
    flags = tiny(tmp_path, steps=80, save_every=4, eval_every=20, log_every=10, sample_every=40, **VARIED)
    n_hits, _ = kill_and_resume(flags, tmp_path, kills=3)
    assert n_hits >= 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = "--model.n_layer=2 --model.d_model=64 --model.n_head=2 --model.seq_len=64 --batch_size=8 --compile=off"
    cadence = "--steps=600 --save_every=10 --eval_every=80 --eval_tokens=8192 --sample_every=60 --log_every=20"
    flags = [*size.split(), *cadence.split(), "--data.corpus=stdlib", *(f"--{key}={VARIED[key]}" for key in VARIED)]
    with tempfile.TemporaryDirectory() as folder:
        n_hits, n_writing = kill_and_resume(flags, Path(folder), args.kills, args.seed)
    print(f"killed {n_hits} times in training, {n_writing} of them while a checkpoint was written; resumed each time,")
    print("and ended with the same weights, losses and samples")
