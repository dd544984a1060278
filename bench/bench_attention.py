"""Attention beside its rivals, by heads, length and mask: FLOP/s of the scores that are not masked.

    pytest bench/bench_attention.py --grid=all

On a GPU, 16,384 tokens in bf16, checked and timed as in bench_kernels. `--grid=short`, the default, takes some seconds:
the shapes that tell most, without FlexAttention, which compiles for each. Without a GPU: the products that the Triton
kernels make, counted in Triton's interpreter. Rows go to bench/results/attention.jsonl.
"""

import pytest

from bench import count
from bench.harness import GPU, PASSES
from bench.report import multiplied, sees, written
from kernels import OPS

OP = OPS["attention"]
TOKENS = 16384
NARROW, WIDE = (12, 12, 64), (16, 16, 128)  # heads of queries, of keys, width


def shaped(heads: tuple[int, int, int], t: int, **mask: int) -> dict[str, int]:
    h, kv, d = heads
    return {"B": TOKENS // t, "T": t, "S": t, "H": h, "KV": kv, "D": d, **mask}


def grid(size: str) -> list[dict[str, int]]:
    """The shapes of a grid, the most telling first."""
    shapes = [shaped(NARROW, t) for t in (128, 256, 512, 1024, 4096)]
    shapes += [shaped(WIDE, t) for t in (1024, 4096)] + [shaped(WIDE, 4096, W=512)]
    if size == "all":
        shapes += [dict(shape) for shape in OP.bench_shapes]
        shapes += [shaped(heads, t) for heads in (NARROW, WIDE) for t in (2048, 8192, 16384)]
        shapes += [shaped(NARROW, 4096, W=64 << i) for i in range(6)]
    return list({written(shape): shape for shape in shapes}.values())


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", grid(metafunc.config.getoption("grid")), ids=written)


@pytest.mark.skipif(not GPU, reason="there is no GPU to time attention on")
@pytest.mark.parametrize("name", PASSES)
def test_speed(shape, name, contest, pytestconfig):
    """The references hold all scores in memory, and are timed by `pytest bench/bench_kernels.py --kernel attention`."""
    compiled = {"FlexAttention"} if pytestconfig.getoption("grid") == "short" else set()
    contest("attention", OP, shape, name, {"torch", "torch.compile"} | compiled, multiplied)


@pytest.mark.skipif(GPU, reason="counted where there is no GPU to time")
@pytest.mark.parametrize("mask, forward, backward", count.MASKS, ids=str)
def test_work_done(mask, forward, backward, record, show):
    row = count.work_done(mask)
    record("attention", row)
    ratios = [row[name][0] / row[name][1] for name in ("forward", "backward")]
    shown = "forward {:.2f}, backward {:.2f}".format(*ratios)
    show(f"attention, a query of {mask['T']:,} sees {sees(mask)}, products made, of those asked for: {shown}")
    assert ratios[0] <= forward and ratios[1] <= backward
