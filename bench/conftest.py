"""Options of the benches, the record that they append to, and what they leave out."""

from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest

from bench import records

LEFT_OUT = pytest.StashKey[dict[str, set[str]]]()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="train small.py and the baseline for so long each, in bench_train")
    parser.addoption("--kernel", help="the one op to time in bench_kernels")
    parser.addoption(
        "--results", type=Path, default=records.RESULTS, help="folder of the record (default bench/results)"
    )


@pytest.fixture(scope="session")
def record(pytestconfig):
    """Append a row to `<name>.jsonl` of the results, from which `python -m bench.report` makes the README's tables."""
    records.machine()  # as it is before a bench changes the number of threads
    return partial(records.append, pytestconfig.getoption("results"))


@pytest.fixture(scope="session")
def left_out(pytestconfig) -> dict[str, set[str]]:
    """What is not timed on this machine, by the reason: said once, at the end."""
    return pytestconfig.stash.setdefault(LEFT_OUT, defaultdict(set))


def pytest_terminal_summary(terminalreporter, config):
    for reason, names in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"left out: {', '.join(sorted(names))}: {reason}")
