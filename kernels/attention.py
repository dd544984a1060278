"""Causal attention with grouped queries.

    o = softmax(scale * q k^T + mask) v

Query head h reads key/value head h // (H / KV). The mask aligns the last query with the last key, so that T queries
over S >= T keys are the last T of a longer sequence (generation with a cache).

With p the weights and delta_i = do_i . o_i the gradients are dv = p^T do, ds = p * (do v^T - delta), dq = scale * ds k,
dk = scale * ds^T q, each head of k and v summed over the queries' heads that read it. Saved: q, k, v, o and the
log-sum-exp of every row's scores.

The Triton kernels tile queries and keys and never hold more than a tile of the scores. Tiles right of the diagonal are
skipped, those on it masked. The backward computes the tiles again, once for dk and dv and once for dq, so that every
sum has one program and one order. Exponentials are to base 2, with log2(e) folded into the scale.

Sources: Vaswani et al., 2017, equation 1; Ainslie et al., "GQA", 2023; Dao, "FlashAttention-2", 2023, algorithms 1, 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import adjacent, backend, library_op, tl, triton
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


@triton.jit
def _load_tile(ptr, rows, stride, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head: `[rows, BLOCK_D]`, 0 beyond `n_rows` and beyond D."""
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = rows[:, None] < n_rows
    if D < BLOCK_D:
        mask = mask & (d < D)
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d, mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, x, rows, stride, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = rows[:, None] < n_rows
    if D < BLOCK_D:
        mask = mask & (d < D)
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d, x, mask=mask)


@triton.jit
def _attend(
    out, most, total, q, k_ptr, v_ptr, first, end, last_key, S, stride_ks, stride_vs, scale,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take the keys from `first` to `end` into the rows' sum of weighted values, largest score and sum of weights."""
    for start in range(first, end, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, keys, stride_ks, S, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weights, axis=1)
        v = _load_tile(v_ptr, keys, stride_vs, S, D, BLOCK_D)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        most = higher
    return out, most, total


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, S, H, group, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, those with the most keys first. `lse` `[B, H, T]` is to base 2."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    rows = start + tl.arange(0, BLOCK_T)
    last_key = rows + S - T
    q = _load_tile(q_ptr, rows, stride_qt, T, D, BLOCK_D)
    out = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    most = tl.full([BLOCK_T], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    whole = (start + S - T + 1) // BLOCK_S * BLOCK_S  # before this all rows see all keys
    end = tl.minimum(start + BLOCK_T + S - T, S)
    for MASKED in tl.static_range(2):
        first, last = (0, whole) if MASKED == 0 else (whole, end)
        out, most, total = _attend(
            out, most, total, q, k_ptr, v_ptr, first, last, last_key, S, stride_ks, stride_vs, scale,
            D, BLOCK_S, BLOCK_D, MASKED == 1,
        )  # fmt: skip
    _store_tile(o_ptr + (b * T * H + h) * D, out / total[:, None], rows, H * D, T, D, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * T + rows, most + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_bwd_delta_kernel(
    o_ptr, do_ptr, delta_ptr, T, H, stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`delta` `[B, H, T]`: the dot product of every row of the output with its gradient."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = _load_tile(o_ptr + (b * T * H + h) * D, rows, H * D, T, D, BLOCK_D).to(tl.float32)
    do = _load_tile(do_ptr + b * stride_dob + h * stride_doh, rows, stride_dot, T, D, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + rows, tl.sum(o * do, axis=1), mask=rows < T)


@triton.jit
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, T, S, H, KV, scale, scale2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of one head, over all queries that see it. Scores are computed transposed, keys by queries."""
    start = tl.program_id(1) * BLOCK_S
    b, kv = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    keys = start + tl.arange(0, BLOCK_S)
    k = _load_tile(k_ptr + b * stride_kb + kv * stride_kh, keys, stride_ks, S, D, BLOCK_D)
    v = _load_tile(v_ptr + b * stride_vb + kv * stride_vh, keys, stride_vs, S, D, BLOCK_D)
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    first = tl.maximum(start - (S - T), 0) // BLOCK_T * BLOCK_T
    for h in range(kv * (H // KV), (kv + 1) * (H // KV)):
        for t in range(first, T, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            q = _load_tile(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D)
            do = _load_tile(do_ptr + b * stride_dob + h * stride_doh, rows, stride_dot, T, D, BLOCK_D)
            lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
            delta = tl.load(delta_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2
            seen = keys[:, None] <= rows[None, :] + (S - T)
            weights = tl.exp2(tl.where(seen, scores, float("-inf")) - lse[None, :])
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
            dscores = weights * (dweights - delta[None, :])
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    offset = (b * S * KV + kv) * D
    _store_tile(dk_ptr + offset, dk * scale, keys, KV * D, S, D, BLOCK_D)
    _store_tile(dv_ptr + offset, dv, keys, KV * D, S, D, BLOCK_D)


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, T, S, H, group, scale, scale2,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, those with the most keys first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    rows = start + tl.arange(0, BLOCK_T)
    q = _load_tile(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D)
    do = _load_tile(do_ptr + b * stride_dob + h * stride_doh, rows, stride_dot, T, D, BLOCK_D)
    lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
    delta = tl.load(delta_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    dq = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for s in range(0, tl.minimum(start + BLOCK_T + S - T, S), BLOCK_S):
        keys = s + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, keys, stride_ks, S, D, BLOCK_D)
        v = _load_tile(v_ptr, keys, stride_vs, S, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        seen = keys[None, :] <= rows[:, None] + (S - T)
        weights = tl.exp2(tl.where(seen, scores, float("-inf")) - lse[:, None])
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    _store_tile(dq_ptr + (b * T * H + h) * D, dq * scale, rows, H * D, T, D, BLOCK_D)


LOG2E = 1.4426950408889634


def _tile(length: int, most: int) -> int:
    """Rows of a tile: no more than the sequence needs, no fewer than a matrix unit takes."""
    return min(most, max(16, triton.next_power_of_2(length)))


def _allocate_fwd(q, k, v, scale):
    b, t, h, d = q.shape
    return q.new_empty((b, t, h, d)), q.new_empty((b, h, t), dtype=torch.float32)


@library_op(_allocate_fwd)
def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each row's scores to base 2."""
    o, lse = _allocate_fwd(q, k, v, scale)
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    q, k, v = map(adjacent, (q, k, v))
    half = q.element_size() < 4
    block_t, block_s = _tile(t, 128 if half and d <= 128 else 64 if half else 32), _tile(s, 64 if half else 32)
    if o.numel():
        _attention_fwd_kernel[(b * h, triton.cdiv(t, block_t))](
            q, k, v, o, lse, t, s, h, h // kv, scale * LOG2E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            d, block_t, block_s, max(16, triton.next_power_of_2(d)),
            num_warps=8 if block_t == 128 else 4, num_stages=2 if d <= 64 or backend(q.device) == "hip" else 3,
        )  # fmt: skip
    return o, lse


def _allocate_bwd(do, q, k, v, o, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@library_op(_allocate_bwd)
def _attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = _allocate_bwd(do, q, k, v, o, lse, scale)
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    do, q, k, v = map(adjacent, (do, q, k, v))
    block_d = max(16, triton.next_power_of_2(d))
    if dq.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    block_t = _tile(t, 64)
    _attention_bwd_delta_kernel[(b * h, triton.cdiv(t, block_t))](
        o, do, delta, t, h, *do.stride()[:3], d, block_t, block_d, num_warps=4
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    # Tiles that spill on no card up to heads of 128.
    narrow, half = d <= 64, q.element_size() < 4
    tile_t, tile_s = _tile(t, 32), _tile(s, 64 if half and d <= 128 else 32)
    _attention_bwd_dkv_kernel[(b * kv, triton.cdiv(s, tile_s))](
        q, k, v, do, lse, delta, dk, dv, t, s, h, kv, scale, scale * LOG2E, *strides,
        d, tile_t, tile_s, block_d, num_warps=4 if narrow or backend(q.device) == "hip" else 8, num_stages=2,
    )  # fmt: skip
    tile_t, tile_s = _tile(t, 64 if half and d <= 128 else 32), _tile(s, 64 if narrow and half else 32)
    _attention_bwd_dq_kernel[(b * h, triton.cdiv(t, tile_t))](
        q, k, v, do, lse, delta, dq, t, s, h, h // kv, scale, scale * LOG2E, *strides,
        d, tile_t, tile_s, block_d, num_warps=4, num_stages=2,
    )  # fmt: skip
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        o, lse = _attention_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        return *_attention_bwd(do, *ctx.saved_tensors, ctx.scale), None


def attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The same in tiles, forward and backward; deterministic."""
    if k.shape != v.shape or q.shape[2] % k.shape[2] or q.shape[1] > k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {list(q.shape)} cannot attend to k {list(k.shape)} and v {list(v.shape)}")
    return _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


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
    implementations={"torch": attention_torch, "triton": attention_triton, "sdpa": attention_sdpa},
    inputs=_inputs,
    differentiable=("q", "k", "v"),
    cost=_cost,
    backward_cost=_backward_cost,
    test_shapes=(
        _shape(1, 1, 1, 1, 1, 16),
        _shape(2, 17, 17, 4, 4, 32),
        _shape(1, 31, 31, 6, 2, 16),
        _shape(2, 5, 23, 4, 1, 16),
        _shape(1, 150, 150, 2, 1, 64),
        _shape(1, 40, 100, 2, 2, 96),
        _shape(1, 20, 70, 1, 1, 256),
    ),
    bench_shapes=(
        _shape(128, 128, 128, 12, 12, 64),
        _shape(16, 1024, 1024, 12, 12, 64),
        _shape(4, 4096, 4096, 32, 8, 128),
    ),
    preferred={"cuda": "sdpa"},
)
