"""SwiGLU on the packed gate and up projection.

    y = silu(gate) * up,  silu(z) = z * sigmoid(z)

With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)). Only the packed input is
needed for the gradient.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.spec import Cost, Op, accumulation_dtype


def swiglu_torch(gate_up: Tensor) -> Tensor:
    """`gate_up`: `[..., 2F]`, the gate in the first half. Returns `[..., F]` in its dtype."""
    gate, up = gate_up.to(accumulation_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


OP = Op(
    name="swiglu",
    implementations={"torch": swiglu_torch},
    inputs=lambda shape, make: {"gate_up": make(shape["rows"], 2 * shape["F"])},
    differentiable=("gate_up",),
    cost=lambda s, itemsize: Cost(3 * s["rows"] * s["F"] * itemsize, 5 * s["rows"] * s["F"]),
    test_shapes=({"rows": 1, "F": 1}, {"rows": 5, "F": 127}, {"rows": 33, "F": 192}),
    bench_shapes=tuple({"rows": 16384, "F": f} for f in (2048, 2816, 5504, 11008)),
)
