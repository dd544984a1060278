"""All that takes a GPU, in nine minutes: `make gpu`, or `python -m bench.gpu --results DIR`.

The kernels' tests, compiled; their bench, and attention's; then the same short training run with the Triton kernels and
with torch's. It installs nothing: torch, triton, numpy, pytest and pytest-benchmark do. Each part has a time limit, and
what it has recorded stays, whatever becomes of those after it; a bench whose time is up says which cases it left out.
The exit code is 0 when all passed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import records

ROOT = Path(__file__).parents[1]
# 30M parameters, most of them in a vocabulary of the usual size: the same steps for both kernels, unless too slow.
TRAINING = shlex.split("""
    --data=stdlib --data.tokenizer=bytes --model.vocab_size=50304 --model.n_layer=6 --model.n_head=6 --model.d_model=384
    --model.seq_len=512 --batch_size=64 --steps=300 --time_limit=55 --precision=bf16 --device=cuda
    --eval_every=300 --save_every=300 --sample_every=0 --kernels.attention=sdpa
""")


@dataclass(frozen=True)
class Part:
    """A command with a time limit in seconds; `facts` reads what it left, to be recorded when it passed."""

    name: str
    command: Sequence[str]
    limit: float
    facts: Callable[[], dict] = dict


def run(part: Part) -> dict:
    """Run a part, its output passing through. Returns name, status, seconds, its last line, and its facts."""
    begin = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(part.command, cwd=ROOT, start_new_session=True, **pipes)
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the pipe

    timer = threading.Timer(part.limit, expire)
    timer.start()
    last = ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = f"over {part.limit:g} s" if expired.is_set() else f"failed ({code})" if code else "passed"
    row = {"part": part.name, "status": status, "seconds": time.monotonic() - begin, "last": last}
    return row | (part.facts() if status == "passed" else {})


def run_all(stages: Sequence[Sequence[Part]], results: Path) -> int:
    """Run stage after stage, the parts of one side by side; record each, and show a table. Returns the exit code."""
    rows = []
    for stage in stages:
        for part in stage:
            print(f"\n=== {part.name}: {' '.join(part.command)}", flush=True)
        with ThreadPoolExecutor(len(stage)) as pool:
            done = list(pool.map(run, stage))
        for row in done:
            records.append(results, "gpu", row)
        rows += done
    print(f"\n{'part':16s} {'':12s} {'seconds':>7s}")
    for row in rows:
        said = f"{row['tok_s']:,.0f} tok/s, loss {row['loss']:.4f}" if "tok_s" in row else row["last"]
        print(f"{row['part']:16s} {row['status']:12s} {row['seconds']:7.0f}  {said}")
    return int(any(row["status"] != "passed" for row in rows))


def training(kernels: str, out: Path) -> Part:
    """The run with those kernels, which leaves its speed and its losses."""

    def facts() -> dict:
        folder = out / kernels
        status = json.loads((folder / "status.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
        found = {"tok_s": status["tok_s_steady"], "steps": status["step"], "loss": losses[max(losses)]}
        return found | {"losses": losses, "memory": max(row["memory"] for row in rows if "memory" in row)}

    flags = [f"--kernels={kernels}", f"--run={kernels}", f"--out={out}", f"--data.cache={out / 'cache'}"]
    return Part(f"train {kernels}", [sys.executable, "train.py", *TRAINING, *flags], 75, facts)


def stages(results: Path, out: Path) -> list[list[Part]]:
    """Tests side by side, since compiling their many small variants is the host's work; what is timed, alone."""
    pytest = [sys.executable, "-m", "pytest", "-q"]
    dtypes = {"float32": "not float16", "bfloat16": "bfloat16", "float16": "float16 and not bfloat16"}
    tests = [Part(f"test {d}", [*pytest, "tests/test_kernels.py", "-k", k], 130) for d, k in dtypes.items()]
    timed = [*pytest, f"--results={results}"]
    return [
        [
            *tests,
            Part("test use", [*pytest, "tests/test_triton.py", "tests/test_model.py"], 130),
            Part("test attention", [*pytest, "tests/test_attention.py"], 130),
        ],
        [Part("bench", [*timed, "bench/bench_kernels.py", "--within=95"], 110)],
        [Part("bench attention", [*timed, "bench/bench_attention.py", "--within=130"], 145)],
        [training("auto", out)],
        [training("torch", out)],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")
    results = parser.parse_args().results.absolute()
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; make test checks the kernels without one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as out:
        return run_all(stages(results, Path(out)), results)


if __name__ == "__main__":
    sys.exit(main())
