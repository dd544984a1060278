"""Attention beside its rivals, by heads, length and mask: FLOP/s of the scores that are not masked.

    pytest bench/bench_attention.py --grid=all

On a GPU, 16,384 tokens in bf16, checked and timed as in bench_kernels. `--grid=short`, the default, is the part that
tells most, and leaves out what takes long to compile or to run; it takes a few minutes. `--grid=first` are its first
shapes, without what takes torch.compile: some seconds.
Without a GPU: the products that the Triton kernels make, of those asked for, counted in Triton's interpreter. All of it
goes to bench/results/attention.jsonl.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases import PASSES
from bench.contest import GPU, TAPE, contenders
from bench.report import multiplied, written
from kernels import OPS

ROOT = Path(__file__).parents[1]
OP = OPS["attention"]
TOKENS = 16384
HEADS = ((12, 12, 64), (16, 16, 64), (32, 8, 128), (16, 16, 128), (8, 8, 256))  # of queries, of keys, width
SWEPT = (HEADS[0], HEADS[3])  # over lengths and masks, in the short grid
LENGTHS = tuple(128 << i for i in range(8))
WINDOWS = (256, 1024)
WINDOWED = {"B": 4, "T": 4096, "S": 4096, "H": 12, "KV": 12, "D": 64}  # where the window is swept


def shaped(heads: tuple[int, int, int], t: int, **mask: int) -> dict[str, int]:
    h, kv, d = heads
    return {"B": TOKENS // t, "T": t, "S": t, "H": h, "KV": kv, "D": d, **mask}


def masks(t: int) -> list[dict[str, int]]:
    """Causal, windows that are shorter than the sequence, documents of a quarter of it."""
    return [{}, *({"W": window} for window in WINDOWS if window < t), {"L": t // 4}]


def grid(size: str) -> list[dict[str, int]]:
    """The shapes of a grid, the most telling first."""
    shapes = [shaped(HEADS[0], t) for t in (128, 256, 512, 1024, 4096)]
    shapes += [shaped(HEADS[3], t) for t in (1024, 4096)] + [shaped(HEADS[3], 4096, W=512)]
    if size == "first":
        return shapes
    shapes += [shaped(heads, t) for t in (1024, 4096) for heads in HEADS]
    shapes += [shaped(heads, 4096, **mask) for heads in SWEPT for mask in masks(4096)]
    shapes += [shaped(heads, t) for heads in SWEPT for t in LENGTHS]
    shapes += [WINDOWED | {"W": 64 << i} for i in range(6)]
    if size == "all":
        shapes += [shaped(heads, t, **mask) for heads in HEADS for t in LENGTHS for mask in masks(t)]
    return list({tuple(shape.items()): shape for shape in shapes}.values())


def spared(shape: dict[str, int], size: str) -> set[str]:
    """Whom a grid goes without: compilers but for one shape of heads, and scores held in memory but up to a length
    where they may win; both in the first one."""
    if size == "all":
        return set()
    if size == "first":
        return {"torch", "torch.compile", "FlexAttention"}
    names = {"torch", "torch.compile"} if shape["T"] > 1024 else set()
    if (shape["H"], shape["KV"], shape["D"]) != HEADS[0]:
        names |= {"torch.compile", "FlexAttention"}
    return names | ({"FlexAttention"} if shape["T"] != WINDOWED["T"] else set())


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", grid(metafunc.config.getoption("grid")), ids=written)


@pytest.mark.skipif(not GPU, reason="there is no GPU to time attention on")
@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize("name", PASSES)
def test_speed(shape, name, contest, left_out, pytestconfig):
    functions = contenders(OP, lambda who, why: left_out[why].add(f"attention by {who}"))
    for who in spared(shape, pytestconfig.getoption("grid")) & functions.keys():
        del functions[who]
        left_out["at some shapes, timed with --grid=all"].add(f"attention by {who}")
    contest("attention", OP, shape, name, functions, multiplied)


@pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")
def test_work_done(record, capsys):
    """No more than the tiles explain."""
    done = subprocess.run([sys.executable, "-m", "bench.work_done"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in map(json.loads, done.stdout.splitlines()):
        record("attention", {"bench": "work done"} | row)
        ratios = {name: row[name][0] / row[name][1] for name in row["most"]}
        with capsys.disabled():
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"\nattention {written(row['shape'])} bfloat16, products made, of those asked for: {shown}", end="")
        assert all(ratio <= row["most"][name] for name, ratio in ratios.items()), row
