"""Options of the benches, and the record that they append to."""

import json
import platform
import time
from pathlib import Path

import pytest
import torch

from model.hardware import device_name, pick_device
from model.run import commit

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption(
        "--seconds", type=float, default=30.0, help="training time of each run in bench_train (default 30)"
    )


@pytest.fixture(scope="session")
def machine() -> dict:
    """What a result is worth nothing without: where and with what it was measured."""
    return {
        "date": time.strftime("%F"),
        "commit": commit(),
        "device": device_name(pick_device("auto")),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@pytest.fixture(scope="session")
def record(machine):
    """Append a row to `bench/results/<name>.jsonl`, from which `python -m bench.report` makes the README's tables."""

    def append(name: str, row: dict) -> None:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(machine | row) + "\n")

    return append
