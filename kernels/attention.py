"""Causal attention with grouped queries.

    o = softmax(scale * q k^T + mask) v

Query head h reads key/value head h // (H / KV). The mask aligns the last query with the last key, so that T queries
over S >= T keys are the last T of a longer sequence (generation with a cache).

Sources: Vaswani et al., 2017, equation 1; Ainslie et al., "GQA", 2023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.spec import Cost, Op, accumulation_dtype


def _causal_mask(t: int, s: int, device: torch.device) -> Tensor:
    """`[T, S]`, True where query t may attend key s."""
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


def attention_torch(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attend causally.

    Args:
        q: `[B, T, H, D]`.
        k, v: `[B, S, KV, D]`, H a multiple of KV, S >= T.
        scale: of the scores; None for 1 / sqrt(D).

    Returns:
        `[B, T, H, D]` in the dtype of `q`.
    """
    (_, t, h, d), (_, s, kv, _) = q.shape, k.shape
    grouped = q.unflatten(2, (kv, h // kv))
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k).to(accumulation_dtype(q))
    scores = scores * (d**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~_causal_mask(t, s, q.device), float("-inf")).softmax(-1)
    return torch.einsum("bkgts,bskd->btkgd", weights.to(v.dtype), v).flatten(2, 3)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The same through `F.scaled_dot_product_attention`, which picks its own backend."""
    t, s = q.shape[1], k.shape[1]
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=None if t == s else _causal_mask(t, s, q.device),
        is_causal=t == s,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _inputs(shape, make):
    b, t, s, h, kv, d = (shape[k] for k in ("B", "T", "S", "H", "KV", "D"))
    return {"q": make(b, t, h, d), "k": make(b, s, kv, d), "v": make(b, s, kv, d)}


def _cost(s, itemsize):
    visible = s["T"] * (2 * s["S"] - s["T"] + 1) // 2  # pairs of query and key under the mask
    elements = s["B"] * s["D"] * (2 * s["T"] * s["H"] + 2 * s["S"] * s["KV"])
    return Cost(elements * itemsize, 4 * s["B"] * s["H"] * s["D"] * visible)


def _backward_cost(s, itemsize):
    """q, k, v, o and its gradient read, three gradients written; five products to the forward's two."""
    forward = _cost(s, itemsize)
    elements = s["B"] * s["D"] * (4 * s["T"] * s["H"] + 4 * s["S"] * s["KV"])
    return Cost(elements * itemsize, forward.flops * 5 // 2)


def _shape(b, t, s, h, kv, d):
    return {"B": b, "T": t, "S": s, "H": h, "KV": kv, "D": d}


OP = Op(
    name="attention",
    implementations={"torch": attention_torch, "sdpa": attention_sdpa},
    inputs=_inputs,
    differentiable=("q", "k", "v"),
    cost=_cost,
    backward_cost=_backward_cost,
    test_shapes=(
        _shape(1, 1, 1, 1, 1, 16),
        _shape(2, 17, 17, 4, 4, 32),
        _shape(1, 31, 31, 6, 2, 16),
        _shape(2, 5, 23, 4, 1, 16),
    ),
    bench_shapes=(
        _shape(128, 128, 128, 12, 12, 64),
        _shape(16, 1024, 1024, 12, 12, 64),
        _shape(4, 4096, 4096, 32, 8, 128),
    ),
    preferred={"cuda": "sdpa"},
)
