"""Other launch parameters for every kernel on this card, timed beside those of its table: `python -m bench.tune`.

    python -m bench.tune --kernel attention    kernels by a part of the name of their op or their own

The candidates of a size take the place of the table's entry in turn. All are compiled side by side, held against
float64, then timed by CUDA-graph replay in turns, in bf16; a kernel of a backward within forward and backward. What is
not timed is listed with the reason: it raises, is wrong, or spills where the table's own does not. At the end are the
entries for the tables: it is for you to write them there.

Each kernel has a process of its own, since an illegal access ends a process. It is begun again without the candidate
that was running. Some processes work side by side, the kernels with the largest share of a training step first: while
one has the card for itself, the others compile.
"""

import argparse
import faulthandler
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any
from unittest.mock import patch

import torch

from bench import records
from bench.cases import PASSES, Case
from bench.contest import DEVICE, DTYPE, Checker, doubt, input_sets, least_seconds
from bench.timing import Call, card_held, measure, reason, synchronize
from kernels import TESTED
from kernels.launch import IMPLEMENTATIONS, card, triton
from kernels.spec import LaunchTable, Op
from runtime.hardware import device_name

CHILD = [sys.executable, "-m", "bench.tune"]
# An op's share of the seconds, after its share of a 124M model's training step; its kernels share it out.
WEIGHTS = {"attention": 4, "linear_cross_entropy": 3, "cross_entropy": 3, "rmsnorm": 2}
TURNS_S, GAIN = 0.05, 0.01  # some ten samples of each candidate at each shape; a gain that is more than noise
HANGS_S, RESTARTS = 30, 8
BEGUN = 0.75  # of the seconds there are: after that no size is begun


@dataclass(frozen=True)
class Job:
    """The kernel of an op, whose table is gone over by one process."""

    op: Op
    table: LaunchTable

    @property
    def name(self) -> str:
        return f"{self.op.name}:{self.table.kernel}"

    @property
    def step(self) -> str:
        return PASSES[self.table.backward]


def jobs(part: str = "") -> list[Job]:
    """All whose name has `part` in it, the most telling first."""
    found = [Job(op, table) for op in TESTED for table in op.launches]
    found.sort(key=lambda job: -WEIGHTS.get(job.op.name, 1))
    return [job for job in found if part in job.name]


# In the process of one kernel.


def say(event: dict) -> None:
    """To the process that started this one: `trying` what, a `row`, or what is `left` at the end."""
    print(json.dumps(event), flush=True)


def in_place(table: LaunchTable, size: Any, entry: Any | None) -> AbstractContextManager:
    """While it is entered, `entry` is the table's for this card; None leaves the table as it is."""
    return nullcontext() if entry is None else patch.dict(table.entries[size], {card(DEVICE): entry})


@contextmanager
def on_meta() -> Iterator[list]:
    """Host functions run on meta tensors, and what they launch is compiled, not run: the list of it."""
    library, launched = torch.library.Library("nanofuse", "IMPL"), []
    for name, function in IMPLEMENTATIONS.items():
        library.impl(name, function, "Meta", allow_override=True)
    run = triton.JITFunction.run

    def compile_only(*args, warmup, **options):
        launched.append(run(*args, warmup=True, **options))

    with (
        patch.object(triton.JITFunction, "run", compile_only),
        patch.object(torch, "is_autocast_enabled", lambda device: False),  # torch has none for meta, and raises
    ):
        yield launched
    library._destroy()


def compile_all(job: Job, size: Any, variants: dict[str, Any]) -> dict[str, list]:
    """The kernels that each variant launches, compiled side by side. One that does not compile raises its error when it
    is launched."""
    found = {name: [] for name in variants}
    with on_meta() as launched, ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for shape in job.table.shapes(size):
            call = Case(job.op, shape, DTYPE, torch.device("meta")).call(job.op.implementations["triton"], job.step)
            for name, entry in variants.items():
                launched.clear()
                with in_place(job.table, size, entry):
                    call.run()
                found[name] += launched
    return found


def spilled(kernels: list) -> int:
    """Bytes a thread of the one that spills most; it is known once a kernel has been loaded."""
    done = (kernel.result() if hasattr(kernel, "result") else kernel for kernel in kernels)
    return 4 * max((getattr(kernel, "n_spills", 0) for kernel in done), default=0)


def check(
    job: Job, size: Any, shape: dict[str, int], variants: dict[str, Any], compiled: dict[str, list], own: str
) -> dict[str, str]:
    """Why a variant is not to be timed; it may spill where the table's `own` does. Raises when the card fails."""
    checker, failed = Checker(job.op, shape, job.step), {}
    for name, entry in variants.items():
        say({"trying": [repr(size), name]})
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        try:
            with in_place(job.table, size, entry):
                _, wrong = checker.error(job.op.implementations["triton"])
            if wrong:
                failed[name] = wrong
            elif spilled(compiled[name]) and not spilled(compiled.get(own, [])):
                failed[name] = f"spills {spilled(compiled[name])} bytes a thread"
        except Exception as error:  # whatever one raises, the others are timed
            synchronize()  # raises where the card takes no more work from this process
            failed[name] = reason(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
    say({"trying": None})
    return failed


def calls_of(job: Job, size: Any, entry: Any | None, calls: list[Call]) -> list[Call]:
    """The calls with an entry in place; all variants share their inputs."""

    def placed(run: Callable) -> Callable:
        def placed_run():
            with in_place(job.table, size, entry):
                return run()

        return placed_run

    return [Call(placed(call.run), call.restore) for call in calls]


def tune(job: Job, size: Any, most: int, lock: Path, known: dict[str, str]) -> dict:
    """Try up to `most` candidates for a size; `known` are those not to be tried, and why. Returns the row to record:
    the table's `own` entry, None where this card does not run the kernel, and the `results`, best first, each with
    seconds by shape and their mean ratio to those of `own` (or the first that could be timed), or `failed`."""
    own = job.table.pick(size, card(DEVICE))
    variants = {repr(own): own}
    for entry in job.table.candidates(size):
        if len(variants) <= most:
            variants.setdefault(repr(entry), entry)
    failed = {name: why for name, why in known.items() if name in variants}
    left = {name: entry for name, entry in variants.items() if name not in failed}
    compiled = compile_all(job, size, left)
    seconds = {name: [] for name in variants}
    with card_held(lock):
        for shape in job.table.shapes(size):
            failed |= check(job, size, shape, left, compiled, repr(own))
            left = {name: entry for name, entry in left.items() if name not in failed}
            case = Case(job.op, shape, DTYPE, DEVICE)
            sets = [case.call(job.op.implementations["triton"], job.step) for _ in range(input_sets(case))]
            timed = {name: partial(calls_of, job, size, entry, sets) for name, entry in left.items()}
            least = least_seconds(case, job.step, device_name(DEVICE))
            say({"trying": [repr(size), ""]})
            for name, result in measure(timed, TURNS_S * len(left)).items():
                if why := result.get("failed") or doubt(result, least):
                    failed[name] = why
                else:
                    seconds[name].append(median(result.get("cold", result["warm"])))
            synchronize()
            left = {name: entry for name, entry in left.items() if name not in failed}
            say({"trying": None})
    results = [{"entry": name, "failed": why} for name, why in failed.items()]
    base = repr(own) if repr(own) in left else next(iter(left), None)
    for name in left:
        ratio = geometric_mean(map(truediv, seconds[name], seconds[base]))
        results.append({"entry": name, "seconds": seconds[name], "ratio": ratio})
    results.sort(key=lambda result: result.get("ratio", math.inf))
    row = {"bench": "tune", "op": job.op.name, "kernel": job.table.kernel, "size": repr(size), "card": card(DEVICE)}
    row |= {"dtype": str(DTYPE).removeprefix("torch."), "pass": job.step, "shapes": list(job.table.shapes(size))}
    return row | {"own": repr(own), "results": results}


def run_job(job: Job, most: int, seconds: float, lock: Path, known: dict[str, dict[str, str]]) -> None:
    """Go over the sizes of a table for so many seconds; one with `known[size][""]` is left out."""
    begin, left = time.monotonic(), [size for size in job.table.entries if "" not in known.get(repr(size), ())]
    while left and time.monotonic() - begin < seconds:
        size = left.pop(0)
        say({"row": tune(job, size, most, lock, known.get(repr(size), {}))})
    say({"left": list(map(repr, left))})


# In the process that starts the others.


class Tuner:
    """Goes over jobs within some seconds: prints and records what comes of each."""

    def __init__(self, results: Path, seconds: float, most: int, workers: int):
        self.results, self.most, self.workers = results, most, workers
        self.until, self.deadline = (time.monotonic() + share * seconds for share in (BEGUN, 1))
        self.rows: list[dict] = []
        self.untried: list[str] = []
        self.printing = threading.Lock()

    def run(self, wanted: list[Job]) -> None:
        kernels = Counter(job.op.name for job in wanted)
        weights = [WEIGHTS.get(job.op.name, 1) / kernels[job.op.name] for job in wanted]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(self.workers) as pool:
            shares = [self.workers * weight / sum(weights[i:]) for i, weight in enumerate(weights)]
            list(pool.map(self.tune, wanted, shares, [Path(folder, "lock")] * len(wanted)))

    def tune(self, job: Job, share: float, lock: Path) -> None:
        """One job, begun again after each candidate that ends its process."""
        known: dict[str, dict[str, str]] = {}
        for _ in range(RESTARTS):
            seconds = min(1.0, share) * (self.until - time.monotonic())
            if seconds <= 0:
                self.untried.append(job.name)
                return
            trying, why = self.attempt(job, seconds, lock, known)
            if why is None:
                return
            size, name = trying or (None, "")
            self.say(f"{job.name} {size or ''} {name}: ended its process: {why}")
            if size is None:
                return
            known.setdefault(size, {})[name] = why

    def attempt(self, job: Job, seconds: float, lock: Path, known: dict) -> tuple[list[str] | None, str | None]:
        """What ran when the process ended, and why it did: None where it came to its end."""
        options = {"job": job.name, "seconds": seconds, "candidates": self.most, "lock": lock}
        command = [*CHILD, *(f"--{key}={value}" for key, value in options.items()), f"--known={json.dumps(known)}"]
        trying, ended = None, False
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            over = threading.Timer(self.deadline - time.monotonic(), process.kill)
            over.start()
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                said = json.loads(line)
                trying, ended = said.get("trying", trying), "left" in said
                if "row" in said:
                    self.rows.append(said["row"])
                    records.append(self.results, "tune", said["row"])
                    known.setdefault(said["row"]["size"], {})[""] = "done"
                    self.say(table(said["row"]))
                self.untried += [f"{job.name} {size}" for size in said.get("left", ())]
            process.wait()
            over.cancel()
            if ended:
                return None, None
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()] or [f"exit code {process.returncode}"]
        return trying, next((line for line in lines if line.startswith("Timeout")), lines[-1])

    def say(self, text: str) -> None:
        with self.printing:
            print(text, flush=True)


def table(row: dict) -> str:
    """Who is faster than whom, then who was not timed."""
    shapes = "; ".join(" ".join(f"{key}={size}" for key, size in shape.items()) for shape in row["shapes"])
    head = f"{row['op']} {row['kernel']} {row['size']}, {row['card']}, {row['pass']}"
    lines = [f"{head}: time to that of {row['own']}, us at {shapes}"]
    width = max(len(result["entry"]) for result in row["results"])
    for result in row["results"]:
        times = [f"{1e6 * seconds:10,.1f}" for seconds in result.get("seconds", ())]
        lines.append(
            " ".join((f"  {result['entry']:{width}s}", result.get("failed") or f"{result['ratio']:.3f}", *times))
        )
    return "\n".join(lines)


def entry(row: dict) -> str:
    """The entry of a size and this card: the fastest where it gains more than noise, else what is there."""
    best, own, start = row["results"][0], row["own"], f'    {row["size"]}: "{row["card"]}": '
    if "failed" in best:
        return f"{start}none could be timed"
    own_failed = next(
        (result["failed"] for result in row["results"] if result["entry"] == own and "failed" in result), ""
    )
    if own_failed:
        return f"{start}{best['entry']},  # changed: {own} could not be timed: {own_failed}"
    if best["ratio"] >= 1 - GAIN:
        return f"{start}{own},"
    return f"{start}{best['entry']},  # changed: {best['ratio']:.3f} of the time of {own}"


def entries(rows: list[dict]) -> str:
    """The entries by table, ready to be written there."""
    lines = []
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in rows):
        lines.append(f"entries of {op}'s {kernel}:")
        lines += [entry(row) for row in rows if (row["op"], row["kernel"]) == (op, kernel)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 where no size was timed; exits with 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", default="", help="a part of the name of an op or a kernel (all)")
    parser.add_argument("--candidates", type=int, default=8, help="to try of a size, at most (8)")
    parser.add_argument("--seconds", type=float, default=150, help="for all (150)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")
    for option in ("--job", "--lock", "--known"):  # of the process of one kernel
        parser.add_argument(option, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        (job,) = (job for job in jobs() if job.name == args.job)
        run_job(job, args.candidates, args.seconds, Path(args.lock), json.loads(args.known))
        return 0
    if not torch.cuda.is_available():
        instead = "`python -m bench.compile` shows registers, spills and an estimate without one"
        parser.exit(2, f"bench.tune times a GPU, and torch finds none here: {instead}\n")
    tuner = Tuner(args.results, args.seconds, args.candidates, max(1, min(6, (os.cpu_count() or 1) // 3)))
    tuner.run(jobs(args.kernel))
    print(entries(tuner.rows))
    if tuner.untried:
        print(f"not tried in {args.seconds:g} s: {', '.join(tuner.untried)}")
    return 0 if tuner.rows else 1


if __name__ == "__main__":
    sys.exit(main())
