"""All that takes a GPU, in some five minutes on 16 cores: `make gpu`, or `python -m bench.gpu`.

    python -m bench.gpu steps tune    some parts of it, in its order

In this order: `tests`, those of the kernels, compiled, on all cores; `steps`, whole training steps; `kernels` and
`attention`, beside their rivals; `tune`, other launch parameters. It installs nothing and needs torch, triton, numpy,
pytest and pytest-benchmark. Each part has a time limit, and its rows are kept whatever becomes of the later parts. The
exit code is 0 if all passed.

Compiling kernels takes nearly all of the tests' time, so there is a process for each core. This module is also the
pytest plugin that shares them out, without pytest-xdist: `pytest -p bench.gpu --shard=0/16` runs every 16th test.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench import processes, records
from runtime.config import Parser
from runtime.program import program

SUBJECTS = (
    "attention", "kernels", "triton", "cross_entropy", "adamw", "fp8", "block_scaled", "precision", "model", "capture",
)  # fmt: skip
TESTS = [f"tests/test_{subject}.py" for subject in SUBJECTS]
# Strides are arguments of a launch, so one shape shows all they do; float32 attention takes longest to compile.
NEEDED = "not (test_strided_inputs and attention-triton and not 2x17x17)"

Part = tuple[str, float, list[list[str]]]  # name, time limit in seconds, and commands, which run side by side


def parts(results: Path, cores: int) -> list[Part]:
    """All parts, in order. Those that measure stop by themselves some seconds before they are killed."""
    python, to = [sys.executable, "-m"], f"--results={results}"
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider"]
    tests, kernels = [*pytest, *TESTS, "-k", NEEDED, "-p", "bench.gpu"], [*pytest, "bench/bench_kernels.py", to]
    return [
        ("tests", 85, [[*tests, f"--shard={i}/{cores}"] for i in range(cores)]),
        ("steps", 95, [[*python, "bench.steps", to, "--seconds=90"]]),
        ("kernels", 50, [[*kernels, "--within=38"]]),
        ("attention", 25, [[*kernels, "--kernel=attention", "--within=17"]]),
        ("tune", 45, [[*python, "bench.tune", to, "--seconds=40"]]),
    ]


def run_part(name: str, limit: float, commands: list[list[str]]) -> dict:
    """Run the commands of a part and show their output. Returns the row to record, with the last line of a command
    that failed and the lines that say FAILED."""
    begin = time.monotonic()
    print(f"\n=== {name}: {' '.join(commands[0])}", flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if len(commands) > 1 else {}
    with ThreadPoolExecutor(len(commands)) as pool:
        done = list(pool.map(partial(processes.run, limit=limit, echo=True, **threads), commands))
    telling = next((each for each in done if each.status != "passed"), done[-1])
    print(*telling.errors, sep="\n", file=sys.stderr)
    failures = [line for each in done for line in each.lines if line.startswith("FAILED")]
    row = {"part": name, "seconds": time.monotonic() - begin, "status": telling.status, "failures": failures}
    return row | {"last": (telling.lines or telling.errors or [""])[-1]}


def run_all(parts: list[Part], results: Path) -> int:
    """Run part after part; record each, and print a table. Returns the exit code."""
    rows = []
    for part in parts:
        rows.append(run_part(*part))
        records.append(results, "gpu", rows[-1])
    for row in rows:
        line = f"{row['part']:12s} {row['status']:14s} {row['seconds']:5.0f} s  {row['last']}"
        print(line, *row["failures"], sep="\n")
    return int(any(row["status"] != "passed" for row in rows))


def pytest_addoption(parser):
    parser.addoption("--shard", help="i/n: every n-th test, starting with number i, counted from 0")


def pytest_collection_modifyitems(config, items):
    if shard := config.getoption("--shard"):
        i, n = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % n != i])
        items[:] = items[i::n]


@program
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all passed, 1 otherwise and without a GPU."""
    names = [name for name, *_ in parts(Path(), 1)]
    parser = Parser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--results", **records.OPTION)
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    if not torch.cuda.is_available():
        print("make gpu: torch finds no GPU here; make test checks the kernels without one", file=sys.stderr)
        return 1
    everything = parts(args.results.absolute(), os.cpu_count() or 1)
    return run_all([part for part in everything if part[0] in (args.parts or names)], args.results)


if __name__ == "__main__":
    sys.exit(main())
