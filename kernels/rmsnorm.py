"""RMSNorm, with the residual add in the same pass.

    s = x + r                          the residual stream, when there is a residual r
    y = g * s / sqrt(mean(s^2) + eps)  over the last dimension, statistics in float32

With h = s / rms the gradient is ds = (g*dy - h * mean(g*dy*h)) / rms, plus the gradient arriving at s itself, and
dx = dr = ds, dg = sum over rows of dy*h.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
"""

import torch
from torch import Tensor

from kernels.spec import Cost, Op, accumulation_dtype


def rmsnorm_torch(
    x: Tensor, gain: Tensor | None = None, residual: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Normalise `x + residual` over its last dimension.

    Args:
        x: `[..., D]`, any floating dtype.
        gain: `[D]` or None for no gain.
        residual: `[..., D]`, added to `x` first; None adds nothing.
        eps: added to the mean square.

    Returns:
        The normalised value and the new residual stream (`x` itself when `residual` is None), both `[..., D]` in the
        stream's dtype.
    """
    stream = x if residual is None else residual + x.to(residual.dtype)
    wide = stream.to(accumulation_dtype(stream))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        y = y * gain.to(y.dtype)
    return y.to(stream.dtype), stream


def _inputs(shape, make):
    rows, d = shape["rows"], shape["D"]
    return {"x": make(rows, d), "gain": make(d), "residual": make(rows, d)}


OP = Op(
    name="rmsnorm",
    implementations={"torch": rmsnorm_torch},
    inputs=_inputs,
    differentiable=("x", "gain", "residual"),
    cost=lambda s, itemsize: Cost((4 * s["rows"] + 1) * s["D"] * itemsize, 5 * s["rows"] * s["D"]),
    test_shapes=({"rows": 1, "D": 1}, {"rows": 1, "D": 64}, {"rows": 7, "D": 127}, {"rows": 33, "D": 200}),
    bench_shapes=tuple({"rows": 16384, "D": d} for d in (768, 1024, 2048, 4096, 8192)),
)
