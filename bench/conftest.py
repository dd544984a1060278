"""Options of the benches, and the record that they append to."""

import os
import time
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


class Tape:
    """A timer for pytest-benchmark that plays back samples taken before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


TAPE = Tape()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="train small.py and the baseline for so long each, in bench_train")
    parser.addoption("--kernel", help="the one op of bench_kernels")
    parser.addoption("--grid", choices=("short", "all"), default="short", help="shapes of bench_attention")
    parser.addoption("--within", type=float, help="seconds after which no case begins; the rest are skipped")
    parser.addoption("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")


def pytest_collection_modifyitems(items):
    for item in items:
        if "contest" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=TAPE))


def pytest_runtest_setup(item):
    within = item.config.getoption("within")
    if within is not None and time.monotonic() - BEGIN > within:
        pytest.skip(f"the {within:g} s of --within were over")


@pytest.fixture(scope="session")
def record(pytestconfig):
    """Append a row to `<name>.jsonl` of the results, from which `python -m bench.report` makes the README's tables."""
    records.machine()  # before a bench changes the number of threads
    return partial(records.append, pytestconfig.getoption("results"))


@pytest.fixture
def show(capsys):
    """Print lines whatever pytest captures."""

    def shown(*lines: str) -> None:
        with capsys.disabled():
            print("", *lines, sep="\n", end="")

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
    """Check and time an op in a pass by its contenders, but not those `without`; print and record the row, and give
    pytest-benchmark the samples of the first, which must be right. `measure` chooses what rates are of."""

    def held(table, op, shape, name, without=(), measure=bound) -> None:
        functions, absent = harness.contenders(op)
        functions = {who: f for who, f in functions.items() if who not in without}
        row, samples = harness.contest(op, shape, name, functions, ceiling)
        record(table, row)
        missing = {who: {"failed": f"left out: {why}"} for who, why in absent.items()}
        lines = (line(who, result, *measure(row)) for who, result in (row["results"] | missing).items())
        show(f"{op.name} {written(shape)} {row['dtype']}, {name}", *lines)
        ours = next(iter(functions))
        assert "failed" not in row["results"][ours], row["results"][ours]["failed"]
        benchmark.extra_info = row
        taken = samples[ours]
        benchmark.pedantic(TAPE.advance, setup=lambda: ((taken.pop(),), {}), rounds=len(taken))

    return held
