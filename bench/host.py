"""What an op costs the host, counted where there is no GPU to time it on: `python -m bench.host`.

One line of JSON for each op that has Triton kernels, the other implementations beside them: the functions of Python and
of C that an eager call calls (`sys.setprofile` sees both), forward and forward+backward, and the Triton kernels that
it launches. Launches return at once, so that what is counted is what stands around them: checks, dispatch, autograd,
allocation. Shapes are small and on the CPU, where the same host code runs.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

if __name__ == "__main__":  # read when Triton is imported: the interpreter launches in another way
    os.environ.pop("TRITON_INTERPRET", None)

import torch

from bench.cases import Case
from kernels import TESTED
from kernels.launch import triton
from kernels.spec import Op


def python_calls(call: Callable[[], object]) -> int:
    """Functions of Python and of C that one call of `call` calls in this thread. Call it once before: the first
    call imports and fills caches."""
    counted = 0

    def count(frame, event, argument) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return counted - 2  # `call` itself, and setprofile


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the kernels launched, in order; none is compiled or runs."""
    launched = []
    with patch.object(triton.JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__)):
        yield launched


def count(op: Op, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Calls and launches of an implementation by pass."""
    case, calls, launches = Case(op, op.test_shapes[1], torch.bfloat16, torch.device("cpu")), {}, {}
    for step in case.passes():
        call = case.call(op.implementations[name], step)
        with counted_launches() as launched:
            call.run()
            launched.clear()
            calls[step], launches[step] = python_calls(call.run), len(launched)
    return calls, launches


def main() -> None:
    for op in TESTED:
        if "triton" in op.implementations:
            counts = {name: count(op, name) for name in op.implementations}
            row = {"op": op.name, "shape": op.test_shapes[1], "dtype": "bfloat16", "launches": counts["triton"][1]}
            print(json.dumps(row | {"calls": {name: calls for name, (calls, _) in counts.items()}}), flush=True)


if __name__ == "__main__":
    main()
