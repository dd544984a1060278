"""The record of what was measured: rows of JSON in `<name>.jsonl`, each with the machine, the versions and the commit.

Tools append to out/bench, which git ignores, unless `--results` names another folder. `python -m bench.report` reads
bench/results, which git tracks.
"""

import json
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

from bench.processes import ROOT
from kernels.launch import triton
from runtime.hardware import device_name, pick_device
from runtime.run import commit

TRACKED, RESULTS = ROOT / "bench/results", ROOT / "out/bench"
OPTION = {"type": Path, "default": RESULTS, "help": "folder to record rows in (out/bench)"}  # of --results


@cache
def machine() -> dict:
    """Where and with what a row was measured. `driver` is NVIDIA's."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
    return {
        "date": time.strftime("%F"), "commit": commit(), "device": device_name(pick_device("auto")),
        "driver": next(iter(said.splitlines()), None), "cuda": torch.version.cuda, "python": platform.python_version(),
        "torch": torch.__version__, "triton": getattr(triton, "__version__", None),
    }  # fmt: skip


def append(folder: Path, name: str, row: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(machine() | row) + "\n")


def read(folder: Path, name: str) -> list[dict]:
    """The rows of a name, oldest first; none if nothing was recorded."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
