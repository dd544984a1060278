"""Options of the benches, the record that they append to, and the cases that they leave out."""

import os
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

# Kernels are counted in the interpreter where there is no GPU: read when Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import harness, records
from bench.report import bound, line, written
from bench.timing import ceilings

BEGIN = time.monotonic()
LEFT_OUT = pytest.StashKey[dict[str, set[str]]]()


class Tape:
    """A timer for pytest-benchmark that plays back samples taken before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="train small.py and the baseline for so long each, in bench_train")
    parser.addoption("--kernel", help="the one op to time in bench_kernels")
    parser.addoption("--grid", choices=("short", "all"), default="short", help="shapes of bench_attention")
    parser.addoption("--within", type=float, help="seconds after which no case begins; the rest are listed")
    parser.addoption("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")


def pytest_runtest_setup(item):
    within = item.config.getoption("within")
    if within is not None and time.monotonic() - BEGIN > within:
        why = f"the {within:g} s of --within were over"
        item.config.stash.setdefault(LEFT_OUT, defaultdict(set))[why].add(item.name)
        pytest.skip(why)


@pytest.fixture(scope="session")
def record(pytestconfig):
    """Append a row to `<name>.jsonl` of the results, from which `python -m bench.report` makes the README's tables."""
    records.machine()  # before a bench changes the number of threads
    return partial(records.append, pytestconfig.getoption("results"))


@pytest.fixture(scope="session")
def left_out(pytestconfig) -> dict[str, set[str]]:
    """The names of what is not timed on this machine, by the reason; printed once, at the end."""
    return pytestconfig.stash.setdefault(LEFT_OUT, defaultdict(set))


@pytest.fixture
def show(capsys):
    """Print a line whatever pytest captures."""

    def shown(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="")

    return shown


@pytest.fixture(scope="module")
def ceiling():
    """The machine's best rates; a CPU's on one thread, since sharing out such small work takes longer than doing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ceilings(harness.DEVICE)
    torch.set_num_threads(threads)


@pytest.fixture
def contest(benchmark, record, ceiling, show):
    """Check and time functions, print and record the row, and give pytest-benchmark the samples of the first function,
    which must be right. `measure` chooses what rates are of: by default the work that limits the op."""

    def held(table, op, shape, name, functions, measure=bound) -> None:
        row, samples = harness.contest(op, shape, name, functions, ceiling)
        record(table, row)
        show(f"{op.name} {written(shape)} {row['dtype']}, {name}")
        show("\n".join(line(who, result, *measure(row)) for who, result in row["results"].items()))
        ours = next(iter(functions))
        assert "failed" not in row["results"][ours], row["results"][ours]["failed"]
        benchmark.extra_info, benchmark._timer = row, Tape()
        taken = samples[ours]
        benchmark.pedantic(benchmark._timer.advance, setup=lambda: ((taken.pop(),), {}), rounds=len(taken))

    return held


def pytest_terminal_summary(terminalreporter, config):
    for reason, names in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"left out: {', '.join(sorted(names))}: {reason}")
