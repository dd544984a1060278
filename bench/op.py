"""Check one op and time it on this machine: `python -m bench.op swiglu`, the first thing to run on a new kernel.

    python -m bench.op swiglu --shape rows=512 F=2048

Every implementation is checked against float64 by the rule in kernels/accuracy.py. On a GPU they are timed beside their
rivals, at the op's bench shapes. Without one, Triton kernels are checked in Triton's interpreter at the op's test
shapes, their bytes and the functions that the host calls are counted, and the reference is timed, eager and compiled,
at the rows of one SM. Nothing is recorded. The exit code is 1 where an implementation is wrong.
"""

import argparse
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from bench import count
from bench.harness import DEVICE, GPU, PASSES, check, contenders, contest, cpu_shape
from bench.report import bound, line, written
from bench.timing import ceilings
from kernels import TESTED


def main(argv: list[str] | None = None) -> int:
    ops = {op.name: op for op in TESTED}
    parser = argparse.ArgumentParser(prog="python -m bench.op", description=__doc__.partition("\n")[0])
    parser.add_argument("op", choices=ops, metavar="OP", help=", ".join(ops))
    parser.add_argument("--shape", nargs="+", metavar="NAME=SIZE", help="time it at this shape only")
    args = parser.parse_args(argv)
    op = ops[args.op]
    passes = PASSES if op.differentiable else PASSES[:1]
    shapes = op.bench_shapes if GPU else [cpu_shape(op, op.bench_shapes[0])]
    if args.shape:
        shapes = [{name: int(size) for name, _, size in (each.partition("=") for each in args.shape)}]
    wrong = False
    if not GPU:
        torch.set_num_threads(1)
        for shape in op.test_shapes:
            results = check(op, shape, op.implementations, passes[-1])
            wrong |= any("failed" in result for result in results.values())
            errors = (result.get("failed") or f"{result['error']:.2f}" for result in results.values())
            said = ", ".join(map(" ".join, zip(results, errors, strict=True)))
            print(f"{written(shape)} float32, {passes[-1]}, error over what rounding explains: {said}", flush=True)
        shape = shapes[0] if args.shape else op.test_shapes[-1]
        for amount, passes_done in count.work(op, shape).items():
            done = (f"{name} {n:,} of at least {least:,}" for name, (n, least) in passes_done.items())
            print(f"{written(shape)} bfloat16, {amount} of the Triton kernels: {', '.join(done)}", flush=True)
        for who, calls in count.host_calls(op)["calls"].items():
            print(f"functions that the host calls, {who}: " + ", ".join(f"{n} {calls[n]}" for n in calls))
    ceiling = ceilings(DEVICE)
    for shape in shapes:
        for name in passes:
            functions = contenders(op, lambda who, why: print(f"left out: {who}: {why}"))
            row, _ = contest(op, shape, name, functions, ceiling)
            print(f"{written(shape)} {row['dtype']}, {name}")
            for who, result in row["results"].items():
                wrong |= "failed" in result and who in op.implementations
                print(line(who, result, *bound(row)), flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
