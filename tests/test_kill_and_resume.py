"""Kill a run at random times and resume it each time; the final weights must equal those of an undisturbed run.

    python tests/test_kill_and_resume.py --kills 20

The test suite runs a short version.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from model import checkpoint


def start(flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output


def kill_and_resume(flags: list[str], out: Path, kills: int, seed: int = 0) -> int:
    """Train with `flags` once undisturbed and once with `kills` kills at random times, and compare the weights.

    After a kill before the first checkpoint the run starts from the beginning. Returns the number of kills that hit a
    running process.
    """
    flags, rng, n_hits = [*flags, f"--out={out}"], random.Random(seed), 0
    finish(start([*flags, "--run=whole"]))
    duration = json.loads((out / "whole" / "status.json").read_text())["seconds"]
    last = out / "killed" / "last.pt"

    def start_or_resume() -> subprocess.Popen:
        return start([*flags, "--run=killed", "--resume" if last.exists() else "--overwrite"])

    for _ in range(kills):
        process = start_or_resume()
        while not process.stdout.readline().startswith("compile"):  # the last line before training
            assert process.poll() is None
        time.sleep(rng.uniform(0, 2 * duration / kills))
        n_hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start_or_resume())
    ours, theirs = (checkpoint.load(out / name / "last.pt") for name in ("killed", "whole"))
    assert ours["step"] == theirs["step"]
    for key in theirs["model"]:
        assert torch.equal(ours["model"][key], theirs["model"][key]), f"{key} differs"
    return n_hits


def test_killed_three_times(tiny, tmp_path):
    flags = tiny(tmp_path, steps=400, save_every=20, eval_every=100, log_every=50)
    assert kill_and_resume(flags, tmp_path, kills=3) >= 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = "--model.n_layer=2 --model.d_model=64 --model.n_head=2 --model.seq_len=64 --batch_size=8 --compile=off"
    cadence = "--steps=1500 --save_every=25 --eval_every=200 --log_every=50 --data.corpus=stdlib"
    with tempfile.TemporaryDirectory() as folder:
        n_hits = kill_and_resume([*size.split(), *cadence.split()], Path(folder), args.kills, args.seed)
    print(f"killed {n_hits} times in training, resumed each time, and ended with the same weights")
