"""Time candidates of every kernel's launch parameters on this card beside its table's: `python -m bench.tune`.

    python -m bench.tune --kernel attention    kernels by a part of the name of their op or their own

Each candidate of a size replaces the table's entry in turn. All are compiled, checked against float64, then timed in
turns by CUDA-graph replay, in bf16; a backward kernel within forward and backward. A candidate that raises, is wrong or
spills more than the table's entry is listed with the reason. The entries for the tables are printed last; they are
yours to write there.

Each size of a kernel has a process of its own, since an illegal access ends a process; it is then started again without
the candidate that was running. Some run side by side: one is alone on the card while the others compile.
"""

import argparse
import faulthandler
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter, truediv
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest.mock import patch

import torch

from bench import processes, records
from bench.harness import DEVICE, DTYPE, META, PASSES, Case, contest, on_meta
from bench.processes import card_held
from bench.report import written
from kernels import OPS, has_card
from kernels.common import card
from kernels.launch import triton
from kernels.spec import LaunchTable, Op
from runtime.config import Parser, number
from runtime.program import program

CHILD = [sys.executable, "-m", "bench.tune"]
# Sizes of an op that are begun while another op begins one, after its part of a 124M model's training step.
WEIGHTS = {"attention": 4, "linear_cross_entropy": 3, "cross_entropy": 3, "rmsnorm": 2}
GAIN = 0.01  # the smallest that is not noise
HANGS_S, RESTARTS = 60, 8


@dataclass(frozen=True)
class Job:
    """A size in the table of a kernel, tuned by one process."""

    op: Op
    table: LaunchTable
    size: Any

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.table.kernel} {self.size!r}"

    @property
    def step(self) -> str:
        return PASSES[self.table.backward]

    def variant(self, entry: Any | None) -> Callable:
        """The op with `entry` in the table, where the backward finds it too; None leaves the table as it is."""

        def function(**inputs):
            by_card = self.table.entries[self.size]
            by_card.pop(card(DEVICE), None)
            if entry is not None:
                by_card[card(DEVICE)] = entry
            return self.op.implementations["triton"](**inputs)

        return function


def jobs(part: str = "") -> list[Job]:
    """All whose name contains `part`, the ops in turns, those of a large weight more often."""
    tables = [(op, table) for op in OPS.values() if has_card(op, DEVICE) for table in op.launches]
    turns = [
        (i / WEIGHTS.get(op.name, 1), Job(op, table, size))
        for op, table in tables for i, size in enumerate(table.entries, 1)
    ]  # fmt: skip
    return [job for _, job in sorted(turns, key=itemgetter(0)) if part in job.name]


# In the process of one job.


def say(event: dict) -> None:
    """Tell the parent process which candidate this one is `trying`, or its `row` at the end."""
    print(json.dumps(event), flush=True)


def watched(functions: Mapping[str, Callable]) -> dict[str, Callable]:
    """The functions, which say when another of them is tried, and end the process if that one hangs."""
    trying = [""]

    def call(name: str, **inputs):
        if trying != [name]:
            trying[:] = [name]
            say({"trying": name})
            faulthandler.dump_traceback_later(HANGS_S, exit=True)
        return functions[name](**inputs)

    return {name: partial(call, name) for name in functions}


def compile_all(job: Job, functions: Mapping[str, Callable]) -> dict[str, list]:
    """Compile the kernels that each function launches, side by side, without running any. Returns them or futures of
    them. One that does not compile raises when it is launched."""
    kernels, launched, run = {name: [] for name in functions}, [], triton.JITFunction.run

    def compile_only(*args, warmup, **options):
        launched.append(run(*args, warmup=True, **options))

    with (
        on_meta(),
        patch.object(triton.JITFunction, "run", compile_only),
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for shape, name in product(job.table.shapes(job.size), functions):
            launched.clear()
            Case(job.op, shape, DTYPE, META).call(functions[name], job.step).run()
            kernels[name] += launched
    return kernels


def spills(kernels: Iterable) -> int:
    """Bytes per thread that the worst of the kernels spills, known once a kernel is loaded."""
    done = (kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels)
    return 4 * max((getattr(kernel, "n_spills", 0) for kernel in done), default=0)


def tune(job: Job, most: int, lock: Path, known: Mapping[str, str]) -> dict:
    """Try up to `most` candidates, except those `known` to fail, with the reason. Returns the row to record: the
    table's `own` entry (None if this card does not run the kernel) and the `results`, best first, each with seconds by
    shape and their mean ratio to those of `own` (or the first that was timed), or `failed`. It changes the table."""
    own, shapes = job.table.pick(job.size, card(DEVICE)), job.table.shapes(job.size)
    entries = list(dict.fromkeys([own, *job.table.candidates(job.size)]))[: most + 1]
    failed = {repr(entry): known[repr(entry)] for entry in entries if repr(entry) in known}
    variants = {repr(entry): job.variant(entry) for entry in entries if repr(entry) not in failed}
    seconds = {name: [] for name in variants}
    kernels = compile_all(job, variants)
    variants = watched(variants)
    for shape in shapes:
        try:
            with card_held(lock):
                row, _ = contest(job.op, shape, job.step, variants, {})
        finally:
            faulthandler.cancel_dump_traceback_later()
        for name, result in row["results"].items():
            if "failed" in result:
                failed[name] = result["failed"]
                del variants[name]
            else:
                seconds[name].append(result.get("cold", result["warm"]))
    for name in variants.keys() - {repr(own)}:
        if spills(kernels[name]) > spills(kernels.get(repr(own), ())):
            failed[name] = f"spills {spills(kernels[name])} bytes per thread"
            del variants[name]
    results = [{"entry": name, "failed": why} for name, why in failed.items()]
    base = repr(own) if repr(own) in variants else next(iter(variants), None)
    for name in variants:
        ratio = geometric_mean(map(truediv, seconds[name], seconds[base]))
        results.append({"entry": name, "seconds": seconds[name], "ratio": ratio})
    results.sort(key=lambda result: result.get("ratio", math.inf))
    return {
        "bench": "tune", "op": job.op.name, "kernel": job.table.kernel, "size": repr(job.size), "card": card(DEVICE),
        "dtype": str(DTYPE).removeprefix("torch."), "pass": job.step, "shapes": list(shapes), "own": repr(own),
        "results": results,
    }  # fmt: skip


# In the process that starts the others.


def attempt(job: Job, most: int, lock: Path, results: Path, last_start: float, deadline: float) -> dict | None:
    """The row of a job, printed and recorded. Its process is started again after each candidate that ends it, until
    `last_start`, and killed at the `deadline`. None if there is no row by then."""
    known: dict[str, str] = {}
    while time.monotonic() < last_start and len(known) < RESTARTS:
        options = {"job": job.name, "candidates": most, "lock": lock, "known": json.dumps(known)}
        command = [*CHILD, *(f"--{key}={value}" for key, value in options.items())]
        ended = processes.run(command, deadline - time.monotonic())
        if row := ended.said.get("row"):
            records.append(results, "tune", row)
            print(table(row), flush=True)
            return row
        trying = ended.said.get("trying", "")
        print(f"{job.name} {trying}: ended its process: {ended.failure}", flush=True)
        if not trying:
            break
        known[trying] = ended.failure
    return None


def tune_all(wanted: list[Job], most: int, results: Path, seconds: float, workers: int) -> tuple[list[dict], list[str]]:
    """The rows of the jobs, and the names of those that have none. No job starts after 0.75 of the seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        limits = {"last_start": begin + 0.75 * seconds, "deadline": begin + seconds}
        one = partial(attempt, most=most, lock=Path(folder, "lock"), results=results, **limits)
        rows = list(pool.map(one, wanted))
    return [row for row in rows if row], [job.name for job, row in zip(wanted, rows, strict=True) if not row]


def table(row: dict) -> str:
    """The candidates by time, then those that were not timed."""
    head = f"{row['op']} {row['kernel']} {row['size']}, {row['card']}, {row['pass']}"
    lines = [f"{head}: time to that of {row['own']}, us at {'; '.join(map(written, row['shapes']))}"]
    width = max(len(result["entry"]) for result in row["results"])
    for result in row["results"]:
        times = "".join(f" {1e6 * seconds:10,.1f}" for seconds in result.get("seconds", ()))
        outcome = result.get("failed") or f"{result['ratio']:.3f}"
        lines.append(f"  {result['entry']:{width}s} {outcome}{times}")
    return "\n".join(lines)


def entry(row: dict) -> str:
    """The entry of a size for this card: the fastest if it gains more than noise, else the table's own."""
    best, own, start = row["results"][0], row["own"], f'    {row["size"]}: "{row["card"]}": '
    own_failed = next((each.get("failed") for each in row["results"] if each["entry"] == own), None)
    if "failed" in best:
        return f"{start}none could be timed"
    if own_failed:
        return f"{start}{best['entry']},  # changed: {own} could not be timed: {own_failed}"
    if best["ratio"] >= 1 - GAIN:
        return f"{start}{own},"
    return f"{start}{best['entry']},  # changed: {best['ratio']:.3f} of the time of {own}"


def entries(rows: list[dict]) -> str:
    """The entries of each table, ready to be written there."""
    tables: dict[str, list[str]] = {}
    for row in rows:
        tables.setdefault(f"entries of {row['op']}'s {row['kernel']}:", []).append(entry(row))
    return "\n".join(line for head, lines in tables.items() for line in (head, *lines))


@program
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if no size was timed; exits with 2 without a GPU."""
    parser = Parser(prog="python -m bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", default="", help="a part of the name of an op or a kernel (all)")
    parser.add_argument("--candidates", type=number(int, "[1, inf)"), default=8, help="to try of a size, at most (8)")
    parser.add_argument("--seconds", type=number(float, "(0, inf)"), default=150, help="for all (150)")
    parser.add_argument("--results", **records.OPTION)
    for option in ("--job", "--lock", "--known"):  # of the process of one job
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        (job,) = (job for job in jobs() if job.name == args.job)
        say({"row": tune(job, args.candidates, Path(args.lock), json.loads(args.known))})
        return 0
    if not torch.cuda.is_available():
        instead = "`python -m bench.compile` shows registers and spills without one"
        parser.exit(2, f"bench.tune times a GPU, and torch finds none here: {instead}\n")
    workers = max(1, min(6, (os.cpu_count() or 1) // 3))
    rows, untried = tune_all(jobs(args.kernel), args.candidates, args.results, args.seconds, workers)
    print(entries(rows))
    if untried:
        print(f"not tried in {args.seconds:g} s: {', '.join(untried)}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
