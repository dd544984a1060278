"""What an eager op costs the host, in calls: times depend on the machine, and counts do not."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from bench.harness import Case
from kernels import OPS
from kernels.common import tanh

KERNELS = str(Path(__file__).parents[1] / "kernels")

# Calls of our own Python code and launches, forward and then backward.
EXPECTED = {
    "rmsnorm": (17, 18, {"_rmsnorm_fwd_kernel": 1, "_rmsnorm_bwd_kernel": 1, "_sum_rows_kernel": 1}),
    "rope": (18, 18, {"_rope_fwd_kernel": 1, "_rope_bwd_kernel": 1}),
    "swiglu": (14, 13, {"_swiglu_fwd_kernel": 1, "_swiglu_bwd_kernel": 1}),
}


def calls_of(run: Callable[[], object]) -> Counter:
    """Functions of Python and C that the host `calls` in this thread; of them those of `own` code and of
    triton.`language`; and `launches` of kernels, also by name. No kernel is compiled or run: launches return at once,
    so this counts checks, dispatch, autograd and allocation."""
    counts = Counter()

    def note(frame, event, argument) -> None:
        file = frame.f_code.co_filename
        counts["calls"] += event in ("call", "c_call")
        counts["own"] += event == "call" and file.startswith(KERNELS)
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


def test_calls_of_functions_are_counted():
    def inner(n):
        return [abs(i) for i in range(n)]  # from Python 3.12 on the list is no function of its own

    counts = [calls_of(lambda n=n: inner(n))["calls"] for n in (1, 11)]
    assert counts[1] - counts[0] == 10


@pytest.mark.parametrize("op", EXPECTED)
def test_calls_of_an_eager_op(op):
    """Also, none of `triton.language`: `triton.cdiv` and the like take six calls each on the host."""
    forward, backward, launches = EXPECTED[op]
    case = Case(OPS[op], OPS[op].test_shapes[1], torch.bfloat16, torch.device("cpu"))
    triton = OPS[op].implementations["triton"]
    found = {name: calls_of(case.call(triton, name).run) for name in case.passes}
    assert found["forward"]["own"] <= forward
    assert found["forward+backward"]["own"] <= forward + backward
    assert {name: n for name, n in found["forward+backward"].items() if name.endswith("_kernel")} == launches
    assert found["forward+backward"]["language"] == 0
    assert found["forward"]["launches"] == 1 and 10 < found["forward"]["calls"] < found["forward+backward"]["calls"]
