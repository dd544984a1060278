"""What an op does, counted where there is no GPU to time it on: bytes and FLOPs of its kernels, calls of the host.

Kernels run in Triton's interpreter (TRITON_INTERPRET=1), so shapes are small. Counts do not depend on the machine.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch

from bench.harness import N_SM, Case, fewer_rows, shrink
from bench.processes import ROOT
from kernels import OPS
from kernels.common import tanh
from kernels.sanitizer import sanitize
from kernels.spec import Op

DTYPE, CPU = torch.bfloat16, torch.device("cpu")
LARGE = 2**21  # bytes of a counted shape: fewer rows only raise the share of what every program reads once
WASTE = 1.05  # times the least bytes, at most
ONE_HEAD = {"B": 1, "H": 1, "KV": 1, "D": 64}
# Masks of one head of attention, and the most FLOPs, in times of those on scores that are not masked, forward and
# backward: tiles hold masked scores too, and a backward in two kernels makes seven products instead of five.
MASKS = [
    ({"T": 128, "S": 128}, 2.0, 2.0), ({"T": 2048, "S": 2048}, 1.1, 1.55),
    ({"T": 2048, "S": 2048, "W": 256}, 1.3, 2.05), ({"T": 2048, "S": 2048, "W": 1024}, 1.1, 1.6),
    ({"T": 2048, "S": 2048, "L": 512}, 1.2, 1.75),
]  # fmt: skip


def work(op: Op, shape: Mapping[str, int]) -> dict[str, dict[str, tuple[int, int]]]:
    """Bytes and FLOPs of each pass, `(done, least)`. FLOPs are those of matrix products."""
    case, counts = Case(op, shape, DTYPE, CPU), {"bytes": {}, "flops": {}}
    for name in case.passes:
        with sanitize(bounds=False, races=False, overflow=False) as record:
            case.call(op.implementations["triton"], name).run()
        least = case.cost(name)
        counts["bytes"][name] = record.bytes_read + record.bytes_written, least.bytes
        counts["flops"][name] = record.flops, least.flops
    return counts


def bytes_moved(op: Op) -> list[dict]:
    """A row for each of the op's bench shapes, with fewer rows."""
    shapes = (shrink(fewer_rows(shape, N_SM), lambda s: op.cost(s, 2).bytes <= LARGE) for shape in op.bench_shapes)
    distinct = {tuple(shape.values()): shape for shape in shapes}.values()
    return [{"bench": "bytes moved", "op": op.name, "shape": s} | work(op, s)["bytes"] for s in distinct]


def work_done(mask: Mapping[str, int]) -> dict:
    """The FLOPs of one head of attention, `(done, least)`, forward and backward."""
    shape = ONE_HEAD | mask
    flops = work(OPS["attention"], shape)["flops"]
    forward, both = flops["forward"], flops["forward+backward"]
    backward = both[0] - forward[0], both[1] - forward[1]
    return {"bench": "work done", "op": "attention", "shape": shape, "forward": forward, "backward": backward}


def calls_of(run: Callable[[], object]) -> Counter:
    """What the host does in a call: functions of Python and C that it `calls` in this thread, of them those of `own`
    code and of triton.`language`, and `launches` of kernels, also by name. No kernel is compiled or runs.

    Launches return at once, so that it counts what stands around them: checks, dispatch, autograd, allocation."""
    counts = Counter()

    def note(frame, event, argument) -> None:
        file = frame.f_code.co_filename
        counts["calls"] += event in ("call", "c_call")
        counts["own"] += event == "call" and file.startswith(str(ROOT / "kernels"))
        counts["language"] += event == "call" and "triton/language" in file

    def launch(kernel, *arguments, **options) -> None:
        counts.update(("launches", kernel.__name__))

    with patch.object(type(tanh), "run", launch):
        run()  # the first call imports and fills caches
        counts.clear()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(before)
    counts["calls"] -= 2  # `run` itself, and setprofile
    return counts


def host_calls(op: Op) -> dict:
    """Calls of each implementation by pass, and launches of ours, at a small shape."""
    case, counts = Case(op, op.test_shapes[1], DTYPE, CPU), {}
    for who, function in op.implementations.items():
        counts[who] = {name: calls_of(case.call(function, name).run) for name in case.passes}
    row = {"bench": "host calls", "op": op.name, "shape": case.shape, "dtype": "bfloat16"}
    row["launches"] = {name: count["launches"] for name, count in counts["triton"].items()}
    return row | {"calls": {who: {n: c["calls"] for n, c in passes.items()} for who, passes in counts.items()}}
