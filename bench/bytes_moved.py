"""Bytes that the kernels of an op move, counted in the interpreter: `python -m bench.bytes_moved rmsnorm`.

One line of JSON for each width of the op's bench shapes, in bf16, with the least possible beside it. It needs no GPU,
and a process of its own, since TRITON_INTERPRET is read when Triton is imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from bench.cases import Case, small_share
from kernels import OPS
from kernels.sanitizer import sanitize
from kernels.spec import Op

LARGE = 2**21  # bytes: fewer rows only add to the share of what is read once a program, and take less long


def count(op: Op, shape: dict[str, int]) -> dict:
    """Bytes moved and the least possible, `[moved, least]`, of each pass."""
    case = Case(op, shape, torch.bfloat16, torch.device("cpu"))
    moved = {}
    for name in case.passes():
        with sanitize(bounds=False, races=False, overflow=False) as record:
            case.call(op.implementations["triton"], name).run()
        moved[name] = [record.bytes_read + record.bytes_written, case.cost(name).bytes]
    return {"op": op.name, "shape": shape} | moved


def main(name: str) -> None:
    op = OPS[name]
    shapes = {}
    for shape in op.bench_shapes:
        shape = small_share(shape, lambda shape: op.cost(shape, 2).bytes, LARGE)
        shapes[tuple(shape.values())] = shape
    for shape in shapes.values():
        print(json.dumps(count(op, shape)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
