"""All that takes a GPU, in five minutes on 16 cores: `make gpu`, or `python -m bench.gpu`.

    python -m bench.gpu steps tune    some parts of it, in its order

In this order: `tests`, the kernels' own, compiled, on all cores; `steps`, whole training steps; `kernels` and
`attention`, beside their rivals; `tune`, other launch parameters. It installs nothing: torch, triton, numpy, pytest and
pytest-benchmark do. Each part has a time limit, and what it has recorded stays, whatever becomes of those after it; one
whose time is up says what it left out. The exit code is 0 when all passed.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import records

ROOT = Path(__file__).parents[1]
SUBJECTS = ("attention", "kernels", "triton", "cross_entropy", "adamw", "model", "capture")
TESTS = [f"tests/test_{subject}.py" for subject in SUBJECTS]
# Strides are arguments of a launch: at one shape they show all that they do. In float32, whose attention compiles
# longest, the other shapes would be a third of it.
NEEDED = "not (test_strided_inputs and attention-triton and not 2x17x17)"


@dataclass(frozen=True)
class Part:
    """Commands that run side by side, with a time limit in seconds."""

    name: str
    commands: Sequence[Sequence[str]]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


def run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> dict:
    """Run a command, its output passing through. Returns its status, last line, and the lines that say FAILED."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=os.environ | environment, **pipes)
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the pipe

    timer = threading.Timer(limit, expire)
    timer.start()
    last, failures = "", []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            failures += [line.strip()] if line.startswith("FAILED") else []
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = f"over {limit:g} s" if expired.is_set() else f"failed ({code})" if code else "passed"
    return {"status": status, "last": last, "failures": failures}


def run_part(part: Part) -> dict:
    """Run the commands of a part. Returns name, status, seconds, the last line of the one to look at, and failures."""
    begin = time.monotonic()
    print(f"\n=== {part.name}: {' '.join(part.commands[0])}", flush=True)
    with ThreadPoolExecutor(len(part.commands)) as pool:
        done = list(pool.map(lambda command: run(command, part.environment, part.limit), part.commands))
    telling = next((each for each in done if each["status"] != "passed"), done[-1])
    failures = [line for each in done for line in each["failures"]]
    return {"part": part.name, "seconds": time.monotonic() - begin} | telling | {"failures": failures}


def run_all(parts: Sequence[Part], results: Path) -> int:
    """Run part after part; record each, and show a table. Returns the exit code."""
    rows = []
    for part in parts:
        rows.append(run_part(part))
        records.append(results, "gpu", rows[-1])
    print(f"\n{'part':12s} {'':14s} {'seconds':>7s}")
    for row in rows:
        print(f"{row['part']:12s} {row['status']:14s} {row['seconds']:7.0f}  {row['last']}")
    print("\n".join(line for row in rows for line in row["failures"]))
    return int(any(row["status"] != "passed" for row in rows))


def parts(results: Path, cores: int) -> list[Part]:
    """All of them. What is timed ends by itself some seconds before it is killed."""
    python, to = [sys.executable, "-m"], f"--results={results}"
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, *TESTS, "-k", NEEDED, "-p", "bench.shard"]
    one_thread = {"OMP_NUM_THREADS": "1"}
    return [
        Part("tests", [[*tests, f"--shard={i}/{cores}"] for i in range(cores)], 90, one_thread),
        Part("steps", [[*python, "bench.steps", to, "--seconds=80"]], 85),
        Part("kernels", [[*pytest, "bench/bench_kernels.py", to, "--within=38"]], 50),
        Part("attention", [[*pytest, "bench/bench_attention.py", to, "--grid=first", "--within=17"]], 25),
        Part("tune", [[*python, "bench.tune", to, "--seconds=45"]], 50),
    ]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when all passed, 1 otherwise and without a GPU."""
    names = [part.name for part in parts(Path(), 1)]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; make test checks the kernels without one", file=sys.stderr)
        return 1
    wanted = [
        part for part in parts(args.results.absolute(), os.cpu_count() or 1) if part.name in (args.parts or names)
    ]
    return run_all(wanted, args.results)


if __name__ == "__main__":
    sys.exit(main())
