"""Kernels: every implementation of every op beside its rivals, in one process and in turns.

    pytest bench/bench_kernels.py --kernel rmsnorm

What is timed has first been checked against float64. On a GPU: the card's time by CUDA-graph replay, with the inputs
cold or warm in L2, the host's time for an eager call, and peak memory. pytest-benchmark shows our kernel's samples with
cold inputs; all of it goes to bench/results/kernels.jsonl. Without a GPU: torch against torch.compile at a 132nd of the
rows or fewer, the bytes that the Triton kernels move, counted in Triton's interpreter, and the functions that the host
calls around them.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from bench.cases import PASSES, small_share
from bench.contest import DTYPE, GPU, TAPE, contenders
from bench.report import written
from kernels import OPS

ROOT = Path(__file__).parents[1]
# What they move, their kernels move: the rest is in matmuls.
COUNTED = [op for op in OPS.values() if op.name in ("rmsnorm", "rope", "swiglu", "cross_entropy", "adamw")]
WASTE = 1.05


def pytest_generate_tests(metafunc):
    if "op" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.getoption("kernel")
    # On a GPU bench_attention times attention, at more shapes than a first look takes.
    ops = [op for op in OPS.values() if wanted == op.name or (wanted is None and not (GPU and op.name == "attention"))]
    if not ops:
        raise pytest.UsageError(f"--kernel {wanted}: there are {', '.join(OPS)}")
    if "shape" in metafunc.fixturenames:
        shapes = [[(op, shape) for shape in (op.bench_shapes if GPU else [small_enough(op)])] for op in ops]
        cases = [case for turn in zip_longest(*shapes) for case in turn if case]  # --within cuts no op altogether
        cases = [(*case, name) for case in cases for name in PASSES if name == "forward" or case[0].differentiable]
        ids = [f"{op.name}-{'x'.join(map(str, shape.values()))}-{name}" for op, shape, name in cases]
        metafunc.parametrize("op, shape, name", cases, ids=ids)
    else:
        ops = [op for op in ops if op in COUNTED]
        metafunc.parametrize("op", ops, ids=[op.name for op in ops])


def small_enough(op) -> dict[str, int]:
    """The op's first shape with rows for a CPU."""
    return small_share(op.bench_shapes[0], lambda shape: op.cost(shape, DTYPE.itemsize).flops, 2_000_000_000)


@pytest.mark.benchmark(timer=TAPE)
def test_speed(op, shape, name, contest, left_out):
    functions = contenders(op, lambda who, why: left_out[why].add(f"{op.name} by {who}"))
    contest("kernels", op, shape, name, functions)


@pytest.fixture(scope="module")
def counters(pytestconfig) -> Iterator[dict[str, subprocess.Popen]]:
    """The process that counts, for each op, all at work at once."""
    wanted, command = pytestconfig.getoption("kernel"), [sys.executable, "-m", "bench.bytes_moved"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    names = [op.name for op in COUNTED if wanted in (None, op.name)]
    found = {name: subprocess.Popen([*command, name], cwd=ROOT, **pipes) for name in names}
    yield found
    for process in found.values():
        process.kill()


@pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")
def test_bytes_moved(op, counters, record, capsys):
    """At most 1.05 of the least possible, for cross-entropy where a row fits: up to 50,304 logits."""
    stdout, stderr = counters[op.name].communicate()
    assert counters[op.name].returncode == 0, stderr
    for row in map(json.loads, stdout.splitlines()):
        record("kernels", {"bench": "bytes moved"} | row)
        ratios = {name: row[name][0] / row[name][1] for name in PASSES if name in row}
        with capsys.disabled():
            shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
            print(f"\n{op.name} {written(row['shape'])} bfloat16, bytes moved, of the least: {shown}", end="")
        if row["shape"].get("V", 0) <= 50304:
            assert max(ratios.values()) <= WASTE


@pytest.mark.skipif(GPU, reason="the host's time is measured where there is a GPU")
def test_host_calls(record, capsys):
    done = subprocess.run([sys.executable, "-m", "bench.host"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in map(json.loads, done.stdout.splitlines()):
        record("kernels", {"bench": "host calls"} | row)
        shown = [f"{name} {' / '.join(map(str, calls.values()))}" for name, calls in row["calls"].items()]
        with capsys.disabled():
            print(
                f"\n{row['op']}, functions that the host calls, {' / '.join(row['launches'])}: {', '.join(shown)}",
                end="",
            )
