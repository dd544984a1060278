"""Kernels: every implementation of every op beside its rivals, in one process and in turns.

    pytest bench/bench_kernels.py --kernel rmsnorm

All are first checked against float64. On a GPU: the card's time by CUDA-graph replay, with inputs cold or warm in L2,
the host's time for an eager call, and peak memory; pytest-benchmark shows our kernel's samples with cold inputs.
Without a GPU: torch against torch.compile at the rows of one SM; and of the Triton kernels, in Triton's interpreter,
their accuracy, the bytes that they move, and the functions that the host calls around them. Rows go to
bench/results/kernels.jsonl.
"""

from itertools import zip_longest

import pytest

from bench import count
from bench.harness import GPU, PASSES, check, cpu_shape
from bench.report import written
from kernels import OPS

# Their kernels move all their bytes: the others leave some to matrix products.
COUNTED = ("rmsnorm", "rope", "swiglu", "cross_entropy", "adamw")
without_gpu = pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("kernel")
    # On a GPU bench_attention times attention.
    ops = [op for op in OPS.values() if wanted == op.name or (wanted is None and not (GPU and op.name == "attention"))]
    if not ops:
        raise pytest.UsageError(f"--kernel {wanted}: there are {', '.join(OPS)}")
    if "shape" in metafunc.fixturenames:
        cases = [[(op, s) for s in (op.bench_shapes if GPU else [cpu_shape(op, op.bench_shapes[0])])] for op in ops]
        cases = [case for turn in zip_longest(*cases) for case in turn if case]  # --within leaves no op out altogether
        cases = [(*case, name) for case in cases for name in PASSES if name == "forward" or case[0].differentiable]
        ids = [f"{op.name}-{'x'.join(map(str, shape.values()))}-{name}" for op, shape, name in cases]
        metafunc.parametrize("op, shape, name", cases, ids=ids)
    else:
        ops = [op for op in ops if op.name in COUNTED or metafunc.function is not test_bytes_moved]
        metafunc.parametrize("op", ops, ids=lambda op: op.name)


@without_gpu
def test_accuracy(op, show):
    """At the op's test shapes, by the rule in kernels/accuracy.py, with gradients."""
    for shape in op.test_shapes:
        results = check(op, shape, op.implementations, PASSES[bool(op.differentiable)])
        errors = (f"{who} " + (result.get("failed") or f"{result['error']:.2f}") for who, result in results.items())
        show(f"{op.name} {written(shape)} float32, error of what rounding explains: {', '.join(errors)}")
        assert not any("failed" in result for result in results.values())


def test_speed(op, shape, name, contest):
    contest("kernels", op, shape, name)


@without_gpu
def test_bytes_moved(op, record, show):
    """At most 1.05 of the least possible, for cross-entropy where a row fits: up to 50,304 logits."""
    for row in count.bytes_moved(op):
        record("kernels", row)
        ratios = {name: row[name][0] / row[name][1] for name in PASSES if name in row}
        shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        show(f"{op.name} {written(row['shape'])} bfloat16, bytes moved, of the least: {shown}")
        assert max(ratios.values()) <= count.WASTE or row["shape"].get("V", 0) > 50304


@without_gpu
def test_host_calls(op, record, show):
    row = count.host_calls(op)
    record("kernels", row)
    shown = ", ".join(f"{who} {' / '.join(map(str, calls.values()))}" for who, calls in row["calls"].items())
    show(f"{op.name}, functions that the host calls, {' / '.join(row['launches'])}: {shown}")
