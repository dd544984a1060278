"""Options and fixtures of the benches."""

import os
import time
from functools import partial
from statistics import median

import pytest
import torch

# Without a GPU kernels run in the interpreter. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import harness, records
from bench.report import line, paces, written
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
# Whether a bench runs with --implementation, without it, or both; those not listed run without.
FOR = {"test_audited": (True,), "test_compiles": (True,), "test_speed": (True, False)}


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="train small.py and the baseline for so long each, in bench_train")
    parser.addoption("--kernel", help="the one op of bench_kernels")
    parser.addoption("--implementation", help="audit and time one of your own, path.py:function, of the op --kernel")
    parser.addoption("--grid", choices=("short", "all"), default="short", help="shapes of attention on a GPU")
    parser.addoption("--size", choices=("usual", "full", "tiny"), default="usual", help="of text in bench_waits")
    parser.addoption("--within", type=float, help="seconds after which no case begins; the rest are skipped")
    parser.addoption("--results", **records.OPTION)


def pytest_collection_modifyitems(config, items):
    own = config.getoption("implementation") is not None
    unwanted = [item for item in items if own not in FOR.get(item.originalname, (False,))]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]
    for item in items:
        if {"contest", "race"} & set(item.fixturenames):
            item.add_marker(pytest.mark.benchmark(timer=TAPE))


def pytest_runtest_setup(item):
    within = item.config.getoption("within")
    if within is not None and time.monotonic() - BEGIN > within:
        pytest.skip(f"the {within:g} s of --within were over")


@pytest.fixture(scope="session")
def record(pytestconfig):
    """Append a row to `<name>.jsonl` in the folder of results."""
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
    """The machine's best rates; a CPU's on one thread, since several are slower on work this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ceilings(harness.DEVICE)
    torch.set_num_threads(threads)


@pytest.fixture
def contest(benchmark, record, ceiling, show, pytestconfig):
    """Check and time the contenders of an op in a pass, except those `without`; print the row, record it unless
    --implementation is given, and give pytest-benchmark the samples of the first, which must be right."""

    def held(op, shape, name, without=()) -> None:
        functions, absent = harness.contenders(op)
        functions = {who: f for who, f in functions.items() if who not in without}
        row, samples = harness.contest(op, shape, name, functions, ceiling)
        if pytestconfig.getoption("implementation") is None:
            record("kernels", row)
        missing = {who: {"failed": f"left out: {why}"} for who, why in absent.items()}
        lines = (line(row, who, result) for who, result in (row["results"] | missing).items())
        show(f"{op.name} {written(shape)} {row['dtype']}, {name}", *lines)
        ours = next(iter(functions))
        assert "failed" not in row["results"][ours], row["results"][ours]["failed"]
        benchmark.extra_info = row
        taken = samples[ours]
        benchmark.pedantic(TAPE.advance, setup=lambda: ((taken.pop(),), {}), rounds=len(taken))

    return held


@pytest.fixture
def race(benchmark, record, show):
    """Let contenders take turns, ours first; print and record the medians. A turn returns `seconds` and, if it was
    measured, `memory` in bytes and the `amount` that was done, in `unit`."""

    def held(name, turns, contenders, unit="") -> dict:
        samples = {who: [] for who in contenders}
        for _ in range(turns):
            for who, turn in contenders.items():
                samples[who].append(turn())
        results = {who: {key: median(row[key] for row in rows) for key in rows[0]} for who, rows in samples.items()}
        row = {"bench": name, "unit": unit, "results": results}
        record("waits", row)
        show(f"{name}: {', '.join(paces(row))}")
        benchmark.extra_info = row
        taken = [turn["seconds"] for turn in samples[next(iter(samples))]]
        benchmark.pedantic(TAPE.advance, setup=lambda: ((taken.pop(),), {}), rounds=len(taken))
        return row

    return held
