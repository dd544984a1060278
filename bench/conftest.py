"""Options of the benches, the record that they append to, and what they leave out."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import contest as contests
from bench import records
from bench.report import bound, written
from bench.timing import ceilings

BEGIN = time.monotonic()
LEFT_OUT = pytest.StashKey[dict[str, set[str]]]()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="train small.py and the baseline for so long each, in bench_train")
    parser.addoption("--kernel", help="the one op to time in bench_kernels")
    parser.addoption("--grid", choices=("first", "short", "all"), default="short", help="shapes of bench_attention")
    parser.addoption(
        "--within", type=float, help="seconds after which no more cases are begun; those left out are said"
    )
    parser.addoption(
        "--results", type=Path, default=records.RESULTS, help="folder of the record (default bench/results)"
    )


def pytest_runtest_setup(item):
    within = item.config.getoption("within")
    if within is not None and time.monotonic() - BEGIN > within:
        why = f"the {within:g} s of --within were over"
        item.config.stash.setdefault(LEFT_OUT, defaultdict(set))[why].add(item.name)
        pytest.skip(why)


@pytest.fixture(scope="session")
def record(pytestconfig):
    """Append a row to `<name>.jsonl` of the results, from which `python -m bench.report` makes the README's tables."""
    records.machine()  # as it is before a bench changes the number of threads
    return partial(records.append, pytestconfig.getoption("results"))


@pytest.fixture(scope="session")
def left_out(pytestconfig) -> dict[str, set[str]]:
    """What is not timed on this machine, by the reason: said once, at the end."""
    return pytestconfig.stash.setdefault(LEFT_OUT, defaultdict(set))


@pytest.fixture(scope="module")
def ceiling() -> Iterator[dict[str, float]]:
    """What the machine does at most; a CPU on one thread: to share out such small work takes longer than to do it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ceilings(contests.DEVICE)
    torch.set_num_threads(threads)


@pytest.fixture
def contest(benchmark, record, ceiling, capsys) -> Callable:
    """Hold a contest: print it, record it under the name of a table, and show pytest-benchmark our samples. The first
    of the functions is ours, and must be right. `measure` says what a row is measured in: `bound`, what takes the time.
    """

    def held(table, op, shape, name, functions, measure=bound) -> None:
        row, samples = contests.hold(op, shape, name, functions, ceiling)
        record(table, row)
        with capsys.disabled():
            print(f"\n{op.name} {written(shape)} {row['dtype']}, {name}")
            print("\n".join(contests.line(who, result, *measure(row)) for who, result in row["results"].items()))
        ours = next(iter(functions))
        assert "failed" not in row["results"][ours], row["results"][ours]["failed"]
        benchmark.extra_info = row
        taken = samples[ours]
        benchmark.pedantic(contests.TAPE.advance, setup=lambda: ((taken.pop(),), {}), rounds=len(taken))

    return held


def pytest_terminal_summary(terminalreporter, config):
    for reason, names in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"left out: {', '.join(sorted(names))}: {reason}")
