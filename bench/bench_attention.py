"""Attention beside its rivals, by heads, length and mask: FLOP/s of the scores that are not masked.

    pytest bench/bench_attention.py --grid=all

On a GPU, 16,384 tokens in bf16, checked and timed as in bench_kernels. `--grid=short`, the default, takes some seconds:
the shapes that tell most, without contenders that torch.compile compiles. Without a GPU: the products that the Triton
kernels make, counted in Triton's interpreter. Rows go to bench/results/attention.jsonl.
"""

import pytest

from bench import count
from bench.harness import GPU, PASSES
from bench.report import multiplied, sees, written
from kernels import OPS

OP = OPS["attention"]
TOKENS = 16384
HEADS = ((12, 12, 64), (16, 16, 64), (32, 8, 128), (16, 16, 128), (8, 8, 256))  # of queries, of keys, width
SWEPT = (HEADS[0], HEADS[3])  # over lengths and masks
LENGTHS = tuple(128 << i for i in range(8))
WINDOWED = {"B": 4, "T": 4096, "S": 4096, "H": 12, "KV": 12, "D": 64}  # where the window is swept


def shaped(heads: tuple[int, int, int], t: int, **mask: int) -> dict[str, int]:
    h, kv, d = heads
    return {"B": TOKENS // t, "T": t, "S": t, "H": h, "KV": kv, "D": d, **mask}


def grid(size: str) -> list[dict[str, int]]:
    """The shapes of a grid, the most telling first."""
    shapes = [shaped(HEADS[0], t) for t in (128, 256, 512, 1024, 4096)]
    shapes += [shaped(HEADS[3], t) for t in (1024, 4096)] + [shaped(HEADS[3], 4096, W=512)]
    if size == "all":
        shapes += [shaped(heads, t) for t in (1024, 4096) for heads in HEADS]
        shapes += [shaped(heads, 4096, **mask) for heads in SWEPT for mask in ({"W": 256}, {"W": 1024}, {"L": 1024})]
        shapes += [shaped(heads, t) for heads in SWEPT for t in LENGTHS]
        shapes += [WINDOWED | {"W": 64 << i} for i in range(6)]
    return list({written(shape): shape for shape in shapes}.values())


def left_out(shape: dict[str, int], size: str) -> set[str]:
    """Contenders that a grid does not time at a shape: those that compile, but at one shape of heads, and scores held
    in memory beyond the length where they may win."""
    if size == "short":
        return {"torch", "torch.compile", "FlexAttention"}
    names = {"torch", "torch.compile"} if shape["T"] > 1024 else set()
    if (shape["H"], shape["KV"], shape["D"]) != HEADS[0]:
        names |= {"torch.compile", "FlexAttention"}
    return names | ({"FlexAttention"} if shape["T"] != WINDOWED["T"] else set())


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", grid(metafunc.config.getoption("grid")), ids=written)


@pytest.mark.skipif(not GPU, reason="there is no GPU to time attention on")
@pytest.mark.parametrize("name", PASSES)
def test_speed(shape, name, contest, pytestconfig):
    contest("attention", OP, shape, name, left_out(shape, pytestconfig.getoption("grid")), multiplied)


@pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")
@pytest.mark.parametrize("mask, forward, backward", count.MASKS, ids=str)
def test_work_done(mask, forward, backward, record, show):
    row = count.work_done(mask)
    record("attention", row)
    ratios = [row[name][0] / row[name][1] for name in ("forward", "backward")]
    shown = "forward {:.2f}, backward {:.2f}".format(*ratios)
    show(f"attention, a query of {mask['T']:,} sees {sees(mask)}, products made, of those asked for: {shown}")
    assert ratios[0] <= forward and ratios[1] <= backward
