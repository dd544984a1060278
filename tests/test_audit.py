"""What fools a bench is seen: each implementation of tests/zoo.py by the name of its fault, and no right one."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from zoo import ZOO, own

from bench import harness, timing
from bench.audit import INTERPRETED, audit
from kernels import OPS
from kernels.swiglu import swiglu_torch

ROOT = Path(__file__).parents[1]
OP = OPS["swiglu"]
SHAPES = ({"rows": 5, "F": 127},)


@pytest.mark.parametrize("name", ZOO)
def test_each_fault_is_found_by_name(name, monkeypatch):
    fault, make = ZOO[name]
    if fault == "undefined" and not INTERPRETED:
        pytest.skip("the sanitizer needs the interpreter")
    monkeypatch.setattr(time, "perf_counter", time.perf_counter)  # put back what the implementation replaces
    found = audit(OP, make(), SHAPES)
    assert fault in found, found


@pytest.mark.parametrize("op, name", [
    ("swiglu", "torch"), ("swiglu", "triton"), ("rmsnorm", "triton"), ("rope", "torch"), ("attention", "torch"),
    ("linear_cross_entropy", "triton"), ("adamw", "torch"), ("cross_entropy_in_place", "triton"),
])  # fmt: skip
def test_right_implementations_have_no_fault(op, name):
    assert audit(OPS[op], OPS[op].implementations[name], OPS[op].test_shapes[1:2]) == {}


def test_what_is_right_until_it_is_timed_is_not_believed(monkeypatch):
    """It computes for the first thirty calls, and then returns what it has."""
    monkeypatch.setattr(timing, "stopwatch", lambda run: run() and timing.SAMPLE_S)
    kept = []

    def tires(x):
        if len(kept) < 30:
            kept.append(swiglu_torch(x))
        return kept[-1]

    (row, _) = harness.contest(OP, {"rows": 64, "F": 64}, "forward", {"honest": swiglu_torch, "tires": own(tires)}, {})
    by_shape = harness.contest(OP, {"rows": 64, "F": 64}, "forward", {"cached": ZOO["caches_by_shape"][1]()}, {})[0]
    assert "failed" not in row["results"]["honest"]
    assert row["results"]["tires"]["failed"].startswith("other results after it was timed")
    assert "stale" in by_shape["results"]["cached"]["failed"]


def test_a_replaced_timer_is_seen_while_timing(monkeypatch):
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda *_: 0.0)
    assert harness.doubt({"drift": 0.0, "warm": [1.0]}, 0.0) == "patched: Event.elapsed_time"


def test_a_file_is_audited_from_the_command_line(tmp_path):
    """It fails by the fault's name, and nothing is written to the results."""
    (tmp_path / "mine.py").write_text(
        "from kernels.swiglu import swiglu_torch\nkept = {}\n"
        "def cached(x, activation='silu', gated=True):\n    return kept.setdefault(x.shape, swiglu_torch(x))\n"
    )
    command = [sys.executable, "-m", "bench.op", "swiglu", "--implementation", f"{tmp_path}/mine.py:cached"]
    before = sorted((ROOT / "bench/results").iterdir())
    done = subprocess.run([*command, "-k", "audited or compiles"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "new inputs gave the results of old ones" in done.stdout, done
    assert "1 failed, 1 skipped" in done.stdout and sorted((ROOT / "bench/results").iterdir()) == before
