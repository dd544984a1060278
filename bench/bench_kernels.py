"""Kernels: every implementation of every op beside its rivals, in one process and in turns.

    pytest bench/bench_kernels.py --kernel attention --grid all

All are first checked against float64. On a GPU: device time by CUDA-graph replay with inputs cold or warm in L2, host
time of an eager call, and peak memory; pytest-benchmark shows our kernel's cold samples. Attention has more shapes
there, and is only timed if named. Without a GPU: the reference, eager and compiled, at a small shape; and in Triton's
interpreter the accuracy of the Triton kernels and the bytes that they move.

    pytest bench --implementation mine.py:swiglu

audits a function of your own by bench/audit.py, compiles its Triton kernels for six cards, and times it beside ours.
Give the op as `--kernel` if the function has another name.
"""

import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest

from bench import processes
from bench.audit import audit
from bench.harness import DTYPE, GPU, PASSES, bytes_moved, check, shrink
from bench.report import written
from kernels import OPS, KernelError, own

TOKENS = 16384  # of each shape of attention
NARROW, WIDE = {"H": 12, "KV": 12, "D": 64}, {"H": 16, "KV": 16, "D": 128}


def attention_shapes(grid: str) -> list[dict[str, int]]:
    """Shapes of attention, the most telling first; `short` takes some seconds."""

    def shaped(heads: dict[str, int], t: int, **mask: int) -> dict[str, int]:
        return {"B": TOKENS // t, "T": t, "S": t, **heads, **mask}

    shapes = [shaped(NARROW, t) for t in (128, 256, 512, 1024, 4096)]
    shapes += [shaped(WIDE, t) for t in (1024, 4096)] + [shaped(WIDE, 4096, W=512)]
    if grid == "all":
        shapes += [dict(shape) for shape in OPS["attention"].bench_shapes]
        shapes += [shaped(heads, t) for heads in (NARROW, WIDE) for t in (2048, 8192, 16384)]
        shapes += [shaped(NARROW, 4096, W=64 << i) for i in range(6)]
    return list({written(shape): shape for shape in shapes}.values())


def timed_shapes(op, grid: str) -> list[dict[str, int]]:
    if not GPU:
        return [shrink(op, op.bench_shapes[0], DTYPE.itemsize, max_bytes=2**23, max_flops=2e9)]
    return attention_shapes(grid) if op.name == "attention" else list(op.bench_shapes)


def pytest_generate_tests(metafunc):
    wanted, grid, implementation = map(metafunc.config.getoption, ("kernel", "grid", "implementation"))
    if implementation is not None:
        wanted = wanted or implementation.rpartition(":")[2]
    ops = [op for op in OPS.values() if wanted == op.name or (wanted is None and not (GPU and op.name == "attention"))]
    if not ops:
        raise pytest.UsageError(f"--kernel {wanted}: there are {', '.join(OPS)}")
    if implementation is not None:
        ops = [with_own(op, implementation) for op in ops]
    if metafunc.function is not test_speed:
        return metafunc.parametrize("op", ops, ids=lambda op: op.name)
    turns = zip_longest(*([(op, shape) for shape in timed_shapes(op, grid)] for op in ops))
    cases = [case for turn in turns for case in turn if case]  # in turns: --within leaves no op out altogether
    cases = [(*case, name) for case in cases for name in PASSES if name == "forward" or case[0].differentiable]
    ids = [f"{op.name}-{'x'.join(map(str, shape.values()))}-{name}" for op, shape, name in cases]
    metafunc.parametrize("op, shape, name", cases, ids=ids)


def with_own(op, implementation: str):
    """The op with an implementation from a file, before all others."""
    try:
        function = own.load(implementation, op)
    except KernelError as error:
        raise pytest.UsageError(str(error)) from error
    return replace(op, implementations={implementation: function, **op.implementations})


def test_audited(op, pytestconfig):
    """Right at all test shapes in three dtypes, with gradients and strides, and honest."""
    found = audit(op, op.implementations[pytestconfig.getoption("implementation")])
    assert not found, "\n".join(f"{name}: {what}" for name, what in found.items())


def test_compiles(op, pytestconfig, show):
    """Its Triton kernels compile for the cards of bench/compile.py."""
    name = pytestconfig.getoption("implementation")
    if not own.has_triton_kernels(name):
        pytest.skip(f"{name} has no Triton kernels")
    command = sys.executable, "-m", "bench.compile", "--implementation", Path(name).absolute(), "--op", op.name
    ended = processes.run(command, TRITON_INTERPRET="0")
    show(*ended.lines)
    assert ended.status == "passed", "\n".join(ended.lines + ended.errors)


@pytest.mark.skipif(GPU, reason="kernels are interpreted where there is no GPU")
def test_interpreted(op, show):
    """Accuracy at the op's test shapes, by the rule in kernels/accuracy.py, with gradients; bytes at a bench shape."""
    for shape in op.test_shapes:
        results = check(op, shape, op.implementations, PASSES[bool(op.differentiable)])
        errors = (f"{who} " + (result.get("failed") or f"{result['error']:.2f}") for who, result in results.items())
        show(f"{op.name} {written(shape)} float32, error over what rounding explains: {', '.join(errors)}")
        assert not any("failed" in result for result in results.values())
    cost, small = op.cost(op.bench_shapes[0], 2), shrink(op, op.bench_shapes[0], 2, max_bytes=2**21)
    if cost.flops > 10 * cost.bytes:  # matrix products, not bytes, limit it
        return
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in bytes_moved(op, small).items())
    show(f"{op.name} {written(small)} bfloat16, bytes loaded and stored over the least: {ratios}")


def test_speed(op, shape, name, contest, pytestconfig):
    without = set()
    if GPU and op.name == "attention":  # the references hold all scores in memory; FlexAttention compiles each shape
        without = {"torch", "torch.compile", *["FlexAttention"] * (pytestconfig.getoption("grid") == "short")}
    contest(op, shape, name, without)
