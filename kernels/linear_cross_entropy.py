"""The head and the loss in one op: hidden states to cross-entropy.

    z = x W^T,  loss_i = logsumexp(z_i) - z_i[target_i]

Rows whose target is `IGNORE` count for nothing. With p = softmax(z): dz = p - onehot(target), dx = dz W, dW = dz^T x.
The seam takes hidden states and the head's weight rather than logits, so that an implementation need never hold
`[N, V]`; this reference does.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024, section 3.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kernels.spec import Cost, Op, accumulation_dtype

IGNORE = -1


def linear_cross_entropy_torch(
    x: Tensor, head_weight: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    """Cross-entropy of `x @ head_weight.T` against `targets`, in nats.

    Args:
        x: `[..., D]` hidden states.
        head_weight: `[V, D]`.
        targets: `[...]` int64 in `[0, V)`, or `IGNORE`.
        reduction: `mean` over the rows not ignored (0 when all are), `sum`, or `none`.

    Returns:
        A scalar, or `[...]` for `none` (0 where ignored), in float32 or wider.
    """
    logits = F.linear(x, head_weight).flatten(0, -2)
    loss = F.cross_entropy(
        logits.to(accumulation_dtype(logits)),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none" if reduction == "none" else "sum",
    )
    if reduction == "none":
        return loss.view_as(targets)
    return loss / (targets != IGNORE).sum().clamp(min=1) if reduction == "mean" else loss


def _inputs(shape, make):
    n, d, v = shape["N"], shape["D"], shape["V"]
    x = make(n, d)
    targets = (make(n).float().abs() * 1e4).long() % v
    targets[::3] = IGNORE
    return {"x": x, "head_weight": make(v, d), "targets": targets}


OP = Op(
    name="linear_cross_entropy",
    implementations={"torch": linear_cross_entropy_torch},
    inputs=_inputs,
    differentiable=("x", "head_weight"),
    cost=lambda s, itemsize: Cost((s["N"] + s["V"]) * s["D"] * itemsize + 8 * s["N"], 2 * s["N"] * s["V"] * s["D"]),
    test_shapes=({"N": 1, "D": 8, "V": 2}, {"N": 7, "D": 33, "V": 101}, {"N": 32, "D": 64, "V": 257}),
    bench_shapes=tuple({"N": 16384, "D": d, "V": v} for d, v in ((768, 50257), (768, 50304), (4096, 128256))),
)
