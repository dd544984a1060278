"""The record of what was measured: rows of JSON in `<name>.jsonl`, with where and with what each was."""

import json
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from kernels.launch import triton
from runtime.hardware import device_name, pick_device
from runtime.run import commit

RESULTS = Path(__file__).parent / "results"


def driver() -> str | None:
    """The version of the NVIDIA driver, None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return next(iter(subprocess.run(command, capture_output=True, text=True).stdout.splitlines()), None)


@cache
def machine() -> dict:
    """Where and with what a row was measured."""
    return {
        "date": time.strftime("%F"), "commit": commit(), "device": device_name(pick_device("auto")),
        "driver": driver(), "cuda": torch.version.cuda, "python": platform.python_version(),
        "torch": torch.__version__, "triton": getattr(triton, "__version__", None),
    }  # fmt: skip


def append(folder: Path, name: str, row: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(machine() | row) + "\n")


def read(folder: Path, name: str) -> list[dict]:
    """The rows of a name, oldest first; none where nothing was recorded."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
