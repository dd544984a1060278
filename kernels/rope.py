"""Rotary position embedding on the packed QKV projection, with optional QK-norm before it.

Each head of q and k is normalised (RMSNorm with gain) when QK-norm is on, then rotated: with (a, b) a pair of the
head's values and the angle table t[pos, i] = pos * theta^(-2i/D),

    (a, b) -> (a cos t - b sin t, b cos t + a sin t)

The i-th pair is (x[i], x[i + D/2]) in the half-split layout of Llama and Qwen, (x[2i], x[2i + 1]) in RoFormer's
interleaved one. The gradient is the rotation by the opposite angle, then RMSNorm's (kernels/rmsnorm.py). Values pass
unchanged, as a view. Saved for backward: the packed projection, with QK-norm; its statistics are computed again.

Sources: Su et al., "RoFormer", 2021, equation 34; Dehghani et al., "Scaling Vision Transformers to 22 Billion
Parameters", 2023, section 2 (QK normalisation).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, cdiv, heads_of, n_sm, next_power_of_2, rows_of
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype


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
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the packed projection into heads and rotate q and k.

    Args:
        qkv: `[B, T, (n_head + 2 * n_kv_head) * D]`, heads of q, then k, then v.
        cos, sin: `[at least T, D / 2]` float32, from `rope_tables`.
        n_head, n_kv_head: how many heads q has, and k and v have.
        q_gain, k_gain: `[D]`, QK-norm with these gains; None, both, for no QK-norm.
        eps: of QK-norm.
        positions: `[B, T]` int64, rows of the tables, for sequences that do not count from 0 (packed documents, a
            cache); None counts from 0. One past the tables is the caller's error, unchecked on a GPU.
        interleaved: which values make a pair.

    Returns:
        q `[B, T, n_head, D]`, k and v `[B, T, n_kv_head, D]`, in the dtype of `qkv`. Raises `ValueError` when these
        shapes do not fit together.
    """
    _check(qkv, cos, sin, n_head, n_kv_head, q_gain, k_gain, positions)
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=-2)
    at = slice(qkv.shape[1]) if positions is None else positions
    cos, sin = cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)  # [T or B T, 1, D / 2]: the same for every head
    q, k = (_norm_and_rotate(x, cos, sin, gain, eps, interleaved) for x, gain in ((q, q_gain), (k, k_gain)))
    return q, k, v


def _norm_and_rotate(x, cos, sin, gain, eps, interleaved):
    wide = x.to(accumulation_dtype(x))
    if gain is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain.to(wide.dtype)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)


def _check(qkv, cos, sin, n_head, n_kv_head, q_gain, k_gain, positions):
    heads = n_head + 2 * n_kv_head
    d = qkv.shape[-1] // heads
    if qkv.ndim != 3 or qkv.shape[-1] != heads * d or d % 2:
        raise ValueError(
            f"{n_head} heads of q and {n_kv_head} of k and v, of an even width, do not fill a projection of "
            f"{list(qkv.shape)}"
        )
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != d // 2:
        raise ValueError(f"tables {list(cos.shape)} and {list(sin.shape)} are not [T, {d // 2}], for heads of {d}")
    if positions is None and len(cos) < qkv.shape[1]:
        raise ValueError(f"tables of {len(cos)} positions are short of the sequence's {qkv.shape[1]}")
    if positions is not None and positions.shape != qkv.shape[:2]:
        raise ValueError(f"positions {list(positions.shape)} are not one for each token of {list(qkv.shape[:2])}")
    if (q_gain is None) != (k_gain is None):
        raise ValueError("QK-norm takes a gain for q and one for k")
    if q_gain is not None and not q_gain.shape == k_gain.shape == (d,):
        raise ValueError(f"gains {list(q_gain.shape)} and {list(k_gain.shape)} are not [{d}], as wide as a head")


@triton.jit
def _load_pairs(ptrs, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both values of every pair of the heads that start at `ptrs` `[T, 1]`: two `[T, BLOCK]`, float32."""
    if INTERLEAVED:  # one wide load, dealt out
        d = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(ptrs + d, mask=mask & (d < 2 * HALF), other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
    else:
        d = tl.arange(0, BLOCK)[None, :]
        a = tl.load(ptrs + d, mask=mask & (d < HALF), other=0.0)
        b = tl.load(ptrs + HALF + d, mask=mask & (d < HALF), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(ptrs, a, b, mask, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.reshape(tl.join(a, b), [a.shape[0], 2 * BLOCK])
        tl.store(ptrs + d, x, mask=mask & (d < 2 * HALF))
    else:
        d = tl.arange(0, BLOCK)[None, :]
        tl.store(ptrs + d, a, mask=mask & (d < HALF))
        tl.store(ptrs + HALF + d, b, mask=mask & (d < HALF))


@triton.jit
def _load_gain(gain_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Two `[1, BLOCK]`."""
    first = tl.zeros([1, 1], dtype=tl.int32)
    return _load_pairs(gain_ptr + first, first == 0, HALF, BLOCK, INTERLEAVED)


@triton.jit
def _load_angles(cos_ptr, sin_ptr, positions_ptr, tokens, mask, T, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Two `[T, BLOCK]`, which serve every head."""
    at = tokens % T if positions_ptr is None else tl.load(positions_ptr + tokens, mask=mask, other=0)
    d = tl.arange(0, BLOCK)[None, :]
    mask = mask & (d < HALF)
    cos = tl.load(cos_ptr + at * HALF + d, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + at * HALF + d, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def _rope_fwd_heads(
    x_ptrs, out_ptrs, gain_ptr, cos, sin, mask, n_heads, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The heads of q, or of k, of the tokens whose first head is at `x_ptrs` and goes to `out_ptrs`, `[T, 1]`."""
    if gain_ptr is not None:
        gain_a, gain_b = _load_gain(gain_ptr, HALF, BLOCK, INTERLEAVED)
    for head in range(n_heads):
        a, b = _load_pairs(x_ptrs + head * 2 * HALF, mask, HALF, BLOCK, INTERLEAVED)
        if gain_ptr is not None:
            rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
            a *= rstd * gain_a
            b *= rstd * gain_b
        out = out_ptrs + head * 2 * HALF
        _store_pairs(out, a * cos - b * sin, b * cos + a * sin, mask, HALF, BLOCK, INTERLEAVED)


@triton.jit
def _rope_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, positions_ptr, q_ptr, k_ptr,
    n_tokens, T, n_head, n_kv_head, stride_qkv, eps,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    mask = tokens < n_tokens
    cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, tokens, mask, T, HALF, BLOCK)
    tokens = tokens.to(tl.int64)
    q = qkv_ptr + tokens * stride_qkv
    out = q_ptr + tokens * n_head * 2 * HALF
    _rope_fwd_heads(q, out, q_gain_ptr, cos, sin, mask, n_head, eps, HALF, BLOCK, INTERLEAVED)
    k = q + n_head * 2 * HALF
    out = k_ptr + tokens * n_kv_head * 2 * HALF
    _rope_fwd_heads(k, out, k_gain_ptr, cos, sin, mask, n_kv_head, eps, HALF, BLOCK, INTERLEAVED)


@triton.jit
def _rope_bwd_heads(
    dout_ptrs, x_ptrs, dx_ptrs, gain_ptr, dgain_a, dgain_b, cos, sin, mask, n_heads, stride_dh, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the heads; return `dgain_a`, `dgain_b` `[T, BLOCK]` with these heads' sums added."""
    if gain_ptr is not None:
        gain_a, gain_b = _load_gain(gain_ptr, HALF, BLOCK, INTERLEAVED)
    for head in range(n_heads):
        turned_a, turned_b = _load_pairs(dout_ptrs + head * stride_dh, mask, HALF, BLOCK, INTERLEAVED)
        da = turned_a * cos + turned_b * sin
        db = turned_b * cos - turned_a * sin
        if gain_ptr is not None:
            a, b = _load_pairs(x_ptrs + head * 2 * HALF, mask, HALF, BLOCK, INTERLEAVED)
            rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
            a *= rstd
            b *= rstd
            dgain_a += da * a
            dgain_b += db * b
            da *= gain_a
            db *= gain_b
            mean = (tl.sum(da * a + db * b, axis=1) / (2 * HALF))[:, None]
            da = (da - a * mean) * rstd
            db = (db - b * mean) * rstd
        _store_pairs(dx_ptrs + head * 2 * HALF, da, db, mask, HALF, BLOCK, INTERLEAVED)
    return dgain_a, dgain_b


@triton.jit
def _rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, q_gain_ptr, k_gain_ptr, positions_ptr, dqkv_ptr, dgain_ptr,
    n_tokens, T, n_head, n_kv_head, stride_qkv, eps,
    stride_dqb, stride_dqt, stride_dqh, stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`qkv_ptr` and `dgain_ptr` `[programs, 2, D]`, each program's share for q and for k, are None without QK-norm."""
    dq_gain_a = tl.zeros([BLOCK_T, BLOCK], dtype=tl.float32)
    dq_gain_b, dk_gain_a, dk_gain_b = dq_gain_a, dq_gain_a, dq_gain_a
    for start in range(tl.program_id(0) * BLOCK_T, n_tokens, tl.num_programs(0) * BLOCK_T):
        tokens = (start + tl.arange(0, BLOCK_T))[:, None]
        mask = tokens < n_tokens
        cos, sin = _load_angles(cos_ptr, sin_ptr, positions_ptr, tokens, mask, T, HALF, BLOCK)
        b, t = (tokens // T).to(tl.int64), (tokens % T).to(tl.int64)
        tokens = tokens.to(tl.int64)
        x = tokens if qkv_ptr is None else qkv_ptr + tokens * stride_qkv
        dx = dqkv_ptr + tokens * (n_head + 2 * n_kv_head) * 2 * HALF
        dq_gain_a, dq_gain_b = _rope_bwd_heads(
            dq_ptr + b * stride_dqb + t * stride_dqt, x, dx, q_gain_ptr, dq_gain_a, dq_gain_b, cos, sin, mask,
            n_head, stride_dqh, eps, HALF, BLOCK, INTERLEAVED,
        )  # fmt: skip
        x += n_head * 2 * HALF
        dx += n_head * 2 * HALF
        dk_gain_a, dk_gain_b = _rope_bwd_heads(
            dk_ptr + b * stride_dkb + t * stride_dkt, x, dx, k_gain_ptr, dk_gain_a, dk_gain_b, cos, sin, mask,
            n_kv_head, stride_dkh, eps, HALF, BLOCK, INTERLEAVED,
        )  # fmt: skip
        dx += n_kv_head * 2 * HALF
        for head in range(n_kv_head):
            va, vb = _load_pairs(
                dv_ptr + b * stride_dvb + t * stride_dvt + head * stride_dvh, mask, HALF, BLOCK, INTERLEAVED
            )
            _store_pairs(dx + head * 2 * HALF, va, vb, mask, HALF, BLOCK, INTERLEAVED)
    if dgain_ptr is not None:
        first = tl.zeros([1, 1], dtype=tl.int64)
        share = dgain_ptr + tl.program_id(0) * 4 * HALF + first
        for i in tl.static_range(2):
            a, b = (dq_gain_a, dq_gain_b) if i == 0 else (dk_gain_a, dk_gain_b)
            a, b = tl.sum(a, axis=0)[None, :], tl.sum(b, axis=0)[None, :]
            _store_pairs(share + i * 2 * HALF, a, b, first == 0, HALF, BLOCK, INTERLEAVED)


@dataclass(frozen=True)
class Tile:
    """Launch parameters: pairs of a block (tokens times half a head), warps, and the backward's programs on an SM, each
    walking over its share of the tokens; the forward has a program for every block."""

    pairs: int
    num_warps: int
    programs_per_sm: int = 0


# A size is the width of a head, up to a power of two.
SIZES = (64, 128, 256)


def _shapes(size):
    shapes = tuple(s for s in OP.bench_shapes if _size(s["D"]) == size)
    return shapes or ({"B": 4, "T": 4096, "H": 8, "KV": 4, "D": size},)


def _size(d: int) -> int:
    return min(256, max(64, next_power_of_2(d)))


_FORWARD = Tile(1024, 4), Tile(512, 4), Tile(2048, 4), Tile(2048, 8), Tile(512, 2), Tile(4096, 8)
# Four programs an SM are as many as are resident at once, at 128 registers a thread.
_BACKWARD = (
    Tile(1024, 4, 4), Tile(512, 4, 4), Tile(512, 4, 8), Tile(1024, 4, 8), Tile(2048, 8, 2), Tile(512, 2, 8),
    Tile(512, 2, 16),
)  # fmt: skip
FORWARD = LaunchTable("_rope_fwd_kernel", {size: {"": _FORWARD[0]} for size in SIZES}, lambda size: _FORWARD, _shapes)
BACKWARD = LaunchTable(
    "_rope_bwd_kernel", {size: {"": _BACKWARD[0]} for size in SIZES}, lambda size: _BACKWARD, _shapes, backward=True
)


def _pick(table: LaunchTable, x: Tensor, half: int) -> tuple[Tile, dict[str, int]]:
    """The tile for heads of `2 * half`, and the arguments of a kernel that follow from it."""
    tile = table.pick(_size(2 * half), card(x.device))
    block = next_power_of_2(half)
    return tile, {"BLOCK_T": max(1, tile.pairs // block), "BLOCK": block, "num_warps": tile.num_warps}


def _allocate_fwd(qkv, cos, sin, q_gain, k_gain, positions, n_head, n_kv_head, eps, interleaved):
    b, t, d = *qkv.shape[:2], qkv.shape[-1] // (n_head + 2 * n_kv_head)
    return qkv.new_empty((b, t, n_head, d)), qkv.new_empty((b, t, n_kv_head, d))


@library_op(_allocate_fwd)
def _rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_gain: Tensor | None, k_gain: Tensor | None, positions: Tensor | None,
    n_head: int, n_kv_head: int, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k."""
    q, k = _allocate_fwd(qkv, cos, sin, q_gain, k_gain, positions, n_head, n_kv_head, eps, interleaved)
    t, half, qkv = q.shape[1], q.shape[-1] // 2, rows_of(qkv)
    _, blocks = _pick(FORWARD, qkv, half)
    n_tokens = qkv.shape[0]
    _rope_fwd_kernel[(max(1, cdiv(n_tokens, blocks["BLOCK_T"])),)](
        qkv, cos, sin, q_gain, k_gain, positions, q, k,
        n_tokens, t, n_head, n_kv_head, qkv.stride(0), eps, half, interleaved, **blocks,
    )  # fmt: skip
    return q, k


def _allocate_bwd(dq, dk, dv, qkv, cos, sin, q_gain, k_gain, positions, eps, interleaved):
    width = (dq.shape[2] + 2 * dk.shape[2]) * dq.shape[3]
    gains = dq.new_empty((2, dq.shape[3]), dtype=torch.float32) if q_gain is not None else dq.new_empty(0)
    return dq.new_empty((*dq.shape[:2], width)), gains


@library_op(_allocate_bwd)
def _rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor, sin: Tensor,
    q_gain: Tensor | None, k_gain: Tensor | None, positions: Tensor | None, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of the packed projection, and `[2, D]` those of the gains (empty without QK-norm)."""
    dqkv, dgains = _allocate_bwd(dq, dk, dv, qkv, cos, sin, q_gain, k_gain, positions, eps, interleaved)
    _, t, n_head, d = dq.shape
    n_tokens, n_kv_head = dqkv.shape[0] * t, dk.shape[2]
    dq, dk, dv = map(heads_of, (dq, dk, dv))
    qkv = None if qkv is None else rows_of(qkv)
    tile, blocks = _pick(BACKWARD, dq, d // 2)
    programs = max(1, min(tile.programs_per_sm * n_sm(dq.device), cdiv(n_tokens, blocks["BLOCK_T"])))
    partial_sums = None if q_gain is None else dq.new_empty((programs, 2, d), dtype=torch.float32)
    _rope_bwd_kernel[(programs,)](
        dq, dk, dv, qkv, cos, sin, q_gain, k_gain, positions, dqkv, partial_sums,
        n_tokens, t, n_head, n_kv_head, 0 if qkv is None else qkv.stride(0), eps,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        d // 2, interleaved, **blocks,
    )  # fmt: skip
    return dqkv, dgains if q_gain is None else partial_sums.sum(0)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, q_gain, k_gain, positions, n_head, n_kv_head, eps, interleaved):
        q, k = _rope_fwd(qkv, cos, sin, q_gain, k_gain, positions, n_head, n_kv_head, eps, interleaved)
        v = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))[..., n_head + n_kv_head :, :]
        ctx.save_for_backward(qkv if q_gain is not None else None, cos, sin, q_gain, k_gain, positions)
        ctx.options = eps, interleaved
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        saved = ctx.saved_tensors
        dqkv, dgains = _rope_bwd(dq, dk, dv, *saved, *ctx.options)
        q_gain, k_gain = saved[3:5]
        dq_gain, dk_gain = (None, None) if q_gain is None else (dgains[0].to(q_gain.dtype), dgains[1].to(k_gain.dtype))
        return dqkv, None, None, dq_gain, dk_gain, *[None] * 5


def rope_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass over q and k forward, and one over the packed gradient backward; v is a view of `qkv`."""
    _check(qkv, cos, sin, n_head, n_kv_head, q_gain, k_gain, positions)
    cos, sin = cos.contiguous(), sin.contiguous()
    q_gain, k_gain, positions = (None if x is None else x.contiguous() for x in (q_gain, k_gain, positions))
    return _RoPE.apply(qkv, cos, sin, q_gain, k_gain, positions, n_head, n_kv_head, eps, interleaved)


def _inputs(shape, make):
    b, t, h, kv, d = (shape[k] for k in ("B", "T", "H", "KV", "D"))
    qkv = make(b, t, (h + 2 * kv) * d)
    cos, sin = rope_tables(t, d, device=qkv.device)
    return {
        "qkv": qkv, "cos": cos, "sin": sin, "n_head": h, "n_kv_head": kv, "q_gain": make(d), "k_gain": make(d),
    }  # fmt: skip


def _cost(s, itemsize):
    """The values of v are not touched."""
    elements = s["B"] * s["T"] * (s["H"] + s["KV"]) * s["D"]
    return Cost((2 * elements + 2 * s["D"]) * itemsize + 4 * s["T"] * s["D"], 8 * elements)


def _backward_cost(s, itemsize):
    """q and k are read besides the gradients, for QK-norm; the gradient of v is copied to its place."""
    tokens, heads = s["B"] * s["T"], s["H"] + s["KV"]
    elements = tokens * (3 * heads + 2 * s["KV"]) * s["D"]
    return Cost((elements + 4 * s["D"]) * itemsize + 4 * s["T"] * s["D"], 20 * tokens * heads * s["D"])


OP = Op(
    name="rope",
    implementations={"torch": rope_torch, "triton": rope_triton},
    inputs=_inputs,
    differentiable=("qkv", "q_gain", "k_gain"),
    cost=_cost,
    backward_cost=_backward_cost,
    test_shapes=(
        {"B": 1, "T": 1, "H": 1, "KV": 1, "D": 16},
        {"B": 2, "T": 7, "H": 4, "KV": 2, "D": 32},
        {"B": 1, "T": 13, "H": 6, "KV": 1, "D": 64},
        {"B": 1, "T": 3, "H": 3, "KV": 3, "D": 96},
        {"B": 1, "T": 2, "H": 2, "KV": 1, "D": 256},
    ),
    bench_shapes=(
        {"B": 16, "T": 1024, "H": 12, "KV": 12, "D": 64},
        {"B": 4, "T": 4096, "H": 16, "KV": 8, "D": 128},
        {"B": 4, "T": 4096, "H": 32, "KV": 8, "D": 128},
    ),
    launches=(FORWARD, BACKWARD),
)
