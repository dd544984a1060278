"""What an eager op costs the host, in calls: times depend on the machine, and counts do not."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Calls of our own Python code and launches, forward and then backward.
EXPECTED = {
    "rmsnorm": (16, 18, {"_rmsnorm_fwd_kernel": 1, "_rmsnorm_bwd_kernel": 1, "_sum_rows_kernel": 1}),
    "rope": (18, 18, {"_rope_fwd_kernel": 1, "_rope_bwd_kernel": 1}),
    "swiglu": (13, 12, {"_swiglu_fwd_kernel": 1, "_swiglu_bwd_kernel": 1}),
}


@pytest.fixture(scope="module")
def counts():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__.replace("test_host_calls", "host_calls")]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("op", EXPECTED)
def test_calls_of_an_eager_op(counts, op):
    """Also, none of `triton.language`: `triton.cdiv` and the like take six calls each on the host."""
    forward, backward, launches = EXPECTED[op]
    found = counts[op]
    assert found["forward"]["own"] <= forward
    assert found["forward+backward"]["own"] <= forward + backward
    assert found["forward+backward"]["launches"] == launches
    assert found["forward+backward"]["language"] == 0
