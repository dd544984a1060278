"""Rotary position embedding on the packed QKV projection, with optional QK-norm before it.

Each head of q and k is normalised (RMSNorm with gain) when QK-norm is on, then rotated: with the head's halves (a, b)
and the angle table t[pos, i] = pos * theta^(-2i/D),

    (a, b) -> (a cos t - b sin t, b cos t + a sin t)

The half-split layout of Llama and Qwen. The gradient is the rotation by the opposite angle. Values pass unchanged.

Sources: Su et al., "RoFormer", 2021, equation 34; Dehghani et al., "Scaling Vision Transformers to 22 Billion
Parameters", 2023, section 2 (QK normalisation).
"""

import torch
from torch import Tensor

from kernels.spec import Cost, Op, accumulation_dtype


def rope_tables(
    seq_len: int, head_dim: int, theta: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle: two float32 tensors `[seq_len, head_dim / 2]`.

    The angles are taken in float64: at position 100,000 a float32 product is already off by 0.004 radians.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rope_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the packed projection into heads and rotate q and k.

    Args:
        qkv: `[B, T, (n_head + 2 * n_kv_head) * D]`, heads of q, then k, then v.
        cos, sin: `[T, D / 2]`, from `rope_tables`.
        n_head, n_kv_head: how many heads q has, and k and v have.
        q_gain, k_gain: `[D]`, QK-norm with these gains; None for no QK-norm.
        eps: of QK-norm.

    Returns:
        q `[B, T, n_head, D]`, k and v `[B, T, n_kv_head, D]`, in the dtype of `qkv`.
    """
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=-2)
    return _norm_and_rotate(q, cos, sin, q_gain, eps), _norm_and_rotate(k, cos, sin, k_gain, eps), v


def _norm_and_rotate(x, cos, sin, gain, eps):
    wide = x.to(accumulation_dtype(x))
    if gain is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.to(wide.dtype)
    cos, sin = (
        cos[:, None].to(wide.dtype),
        sin[:, None].to(wide.dtype),
    )  # [T, 1, D / 2]: the same for every head
    a, b = wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _inputs(shape, make):
    b, t, h, kv, d = (shape[k] for k in ("B", "T", "H", "KV", "D"))
    qkv = make(b, t, (h + 2 * kv) * d)
    cos, sin = rope_tables(t, d, device=qkv.device)
    return {
        "qkv": qkv, "cos": cos, "sin": sin, "n_head": h, "n_kv_head": kv, "q_gain": make(d), "k_gain": make(d),
    }  # fmt: skip


def _cost(s, itemsize):
    elements = s["B"] * s["T"] * (s["H"] + 2 * s["KV"]) * s["D"]
    return Cost(2 * elements * itemsize + 4 * s["T"] * s["D"], 8 * elements)


OP = Op(
    name="rope",
    implementations={"torch": rope_torch},
    inputs=_inputs,
    differentiable=("qkv", "q_gain", "k_gain"),
    cost=_cost,
    test_shapes=(
        {"B": 1, "T": 1, "H": 1, "KV": 1, "D": 16},
        {"B": 2, "T": 7, "H": 4, "KV": 2, "D": 32},
        {"B": 1, "T": 13, "H": 6, "KV": 1, "D": 64},
    ),
    bench_shapes=(
        {"B": 16, "T": 1024, "H": 12, "KV": 12, "D": 64},
        {"B": 4, "T": 4096, "H": 32, "KV": 8, "D": 128},
    ),
)
