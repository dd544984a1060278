"""What an eager op costs the host, in calls: times depend on the machine, and counts do not."""

import pytest
import torch

pytest.importorskip("triton")

from bench.count import calls_of
from bench.harness import Case
from kernels import OPS

# Calls of our own Python code and launches, forward and then backward.
EXPECTED = {
    "rmsnorm": (16, 18, {"_rmsnorm_fwd_kernel": 1, "_rmsnorm_bwd_kernel": 1, "_sum_rows_kernel": 1}),
    "rope": (18, 18, {"_rope_fwd_kernel": 1, "_rope_bwd_kernel": 1}),
    "swiglu": (13, 12, {"_swiglu_fwd_kernel": 1, "_swiglu_bwd_kernel": 1}),
}


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
