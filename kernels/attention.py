"""Attention: causal or full, with grouped queries, a sliding window, packed documents, a softcap, a sink and slopes.

    s_ij = scale * q_i . k_j,  or softcap * tanh(scale * q_i . k_j / softcap) with a softcap;  plus slope * (j - i)
    p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)) over the keys j that query i sees,  o_i = sum_j p_ij v_j

Query head h reads key/value head h // (H / KV). Queries are the last T of the S tokens that have keys, so that query i
is at position i + S - T (generation with a cache). It sees the keys up to its own position (all, when not causal), of
those the last `window`, and of those the ones of its own document. The sink is a logit per head of a key whose value is
0; without one exp(sink) is 0, and a query that sees nothing gives 0.

With delta_i = do_i . o_i the gradients are dv = p^T do, ds = p * (do v^T - delta), dq = scale * ds k,
dk = scale * ds^T q, each head of k and v summed over the queries' heads that read it, and dsink the sum of
-exp(sink - lse_i) delta_i; with a softcap ds is first multiplied by 1 - tanh^2. Slopes are constants. Saved: q, k, v, o
and lse_i, the log of the sum above. In float32 that is saved in two terms, the largest score and the log of the sum
relative to it: rounded as one number, a large lse_i would take digits off every p_ij.

The Triton kernels work on tiles of queries and keys and never hold more than a tile of the scores. The keys that a
query sees, and the queries that see a key, are a range whose ends never move back from one token to the next: tiles
outside the ranges of a tile's first and last row are skipped, and those inside all of its rows' ranges are not masked.
The backward computes the scores again, once for dq and delta and once for dk and dv, so that every sum has one program
and one order. Short causal sequences, which are bound by memory, have kernels of their own: a program holds all keys of
a head, so that the softmax is a plain one, and one backward makes all three gradients, with delta as the sum of
p_ij dp_ij. Exponentials are to base 2, with log2(e) folded into the scale.

Sources: Vaswani et al., 2017, equation 1; Ainslie et al., "GQA", 2023; Dao, "FlashAttention-2", 2023, algorithms 1, 2;
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023; Gemma 2 (softcap), 2024; Press et al.,
"Train Short, Test Long" (ALiBi), 2021.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.common import card, heads_of, n_sm, tanh
from kernels.launch import AVAILABLE, library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

LOWEST = -1e30  # the logit of no sink: finite, so that the difference of two is no NaN, and that times a scale is too


def document_ranges(documents: Tensor) -> Tensor:
    """From the document of each token, `[B, S]` integers that never decrease along a row, to what `attention` takes:
    int32 `[2, B, S]`, where the document of each token starts and where it ends (exclusive)."""
    documents = documents.contiguous()
    starts, ends = (torch.searchsorted(documents, documents, right=right, out_int32=True) for right in (False, True))
    return torch.stack((starts, ends))


def _distance(t: int, s: int, device) -> Tensor:
    """`[T, S]`: how many places a key is after a query."""
    return torch.arange(s, device=device) - torch.arange(s - t, s, device=device)[:, None]


def visible(t: int, s: int, causal: bool, window: int, documents: Tensor | None, device) -> Tensor:
    """`[T, S]`, or `[B, T, S]` with documents: True where a query sees a key."""
    query, key = torch.arange(s - t, s, device=device)[:, None], torch.arange(s, device=device)
    seen = key <= query if causal else torch.ones(t, s, dtype=torch.bool, device=device)
    if window:
        seen = seen & (key > query - window)
    if documents is not None:
        starts, ends = documents[..., -t:, None]  # the queries' documents; those before the first key have none
        if t > s:
            starts, ends = (F.pad(x, (0, 0, t - s, 0)) for x in (starts, ends))
        seen = seen & (key >= starts) & (key < ends)
    return seen


def scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """What the softmax is taken of, `[B, KV, H / KV, T, S]`, -inf where a query does not see a key; arguments as of
    `attention_torch`."""
    (_, t, h, d), (_, s, kv, _) = q.shape, k.shape
    grouped = q.unflatten(2, (kv, h // kv))
    found = torch.einsum("btkgd,bskd->bkgts", grouped, k).to(accumulation_dtype(q))
    found = found * (d**-0.5 if scale is None else scale)
    if softcap:
        found = softcap * torch.tanh(found / softcap)
    if slopes is not None:
        found = found + slopes.to(found.dtype).view(kv, h // kv, 1, 1) * _distance(t, s, q.device)
    if causal or window or documents is not None:
        hidden = ~visible(t, s, causal, window, documents, q.device)
        found = found.masked_fill(hidden if hidden.ndim == 2 else hidden[:, None, None], float("-inf"))
    return found


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attend.

    Args:
        q: `[B, T, H, D]`.
        k, v: `[B, S, KV, D]`, H a multiple of KV.
        scale: of the scores, more than 0; None for 1 / sqrt(D).
        causal: hide the keys after a query's own place.
        window: how many keys a query sees at most, its own place the last of them; 0 for no limit.
        documents: int32 `[2, B, S]` from `document_ranges`, to see keys of the same document only; None for one.
        softcap: bound that the scores are squeezed under by tanh; 0 for none.
        sink: `[H]`, the logit per head that takes weight from all keys; None for none.
        dropout: probability of dropping a weight.
        slopes: `[H]`, what each head adds to a score for every place that the key is after the query (ALiBi: as much
            less for every place before it); None for nothing.

    Returns:
        `[B, T, H, D]` in the dtype of `q`. Raises `ValueError` when shapes do not fit together, or a number is out of
        its range.
    """
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    logits = scores(q, k, scale, causal, window, documents, softcap, slopes)
    if sink is None and q.shape[1] <= k.shape[1]:
        weights = logits.softmax(-1)
    else:
        last = torch.full(q.shape[2:3], LOWEST, device=q.device) if sink is None else sink
        last = last.to(logits.dtype).view(*logits.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat((logits, last), -1).softmax(-1)[..., :-1]
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.einsum("bkgts,bskd->btkgd", weights.to(v.dtype), v).flatten(2, 3)


def _check(q, k, v, scale, window, documents, softcap, sink, slopes):
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {list(q.shape)} cannot attend to k {list(k.shape)} and v {list(v.shape)}")
    for name, value in (("window", window), ("softcap", softcap)):
        if value < 0:
            raise ValueError(f"{name} must be 0, for none, or more, not {value}")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be more than 0, not {scale}")
    if documents is not None and (documents.shape != (2, *k.shape[:2]) or documents.dtype != torch.int32):
        raise ValueError(
            f"documents {list(documents.shape)} {documents.dtype} are not int32 {[2, *k.shape[:2]]}, which "
            "document_ranges gives"
        )
    for name, values in (("sink", sink), ("slopes", slopes)):
        if values is not None and values.shape != q.shape[2:3]:
            raise ValueError(f"{name} {list(values.shape)} is not one number for each of {q.shape[2]} heads")


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """The same through `F.scaled_dot_product_attention`, which picks its own backend; it has no softcap and no sink."""
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    if softcap or sink is not None:
        raise ValueError("SDPA has no softcap and no sink: take --kernels.attention=triton or torch")
    t, s = q.shape[1], k.shape[1]
    causal = causal and t > 1  # a lone query is the last and sees every key
    is_causal = causal and t == s and not window and documents is None and slopes is None
    mask = None
    if not is_causal and (causal or window or documents is not None):
        mask = visible(t, s, causal, window, documents, q.device)
        mask = mask if mask.ndim == 2 else mask[:, None]
    if slopes is not None:
        bias = (slopes.view(-1, 1, 1) * _distance(t, s, q.device)).to(q.dtype)
        mask = bias if mask is None else bias.where(mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


# Masks and tiles, for all kernels

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _to_head(x, b, h, stride_b, stride_h, DESC: tl.constexpr = False):
    """`x` moved to a head of a sequence, if it is a pointer; a descriptor is asked for both at each load."""
    return x if DESC else x + b.to(tl.int64) * stride_b + h * stride_h


@triton.jit
def _load_tile(
    x, b, h, start, stride, n_rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr = False, DESC: tl.constexpr = False,
):  # fmt: skip
    """Rows `start` to `start + BLOCK` of a head, `[BLOCK, BLOCK_D]`, 0 beyond `n_rows` and D. FULL: all are rows."""
    if DESC:
        return tl.reshape(x.load([b, h, start, 0]), [BLOCK, BLOCK_D])
    else:
        rows, d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
        ptrs = x + rows.to(tl.int64)[:, None] * stride + d
        if FULL and D == BLOCK_D:
            return tl.load(ptrs)
        else:
            inside = d < D if FULL else (rows[:, None] < n_rows) & (d < D)
            return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _store_tile(ptr, x, start, stride, n_rows, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d, x, mask=(rows[:, None] < n_rows) & (d < D))


@triton.jit
def _visible_range(pos, window_left, window_right, n, shift, S, starts_ptr, ends_ptr):
    """(kv_start, kv_end) of the keys that the queries at `pos` see, or (q_start, q_end) of the queries that see the
    keys at `pos`: of `n` in all, `window_left` before `pos` and `window_right` after it. `pos + shift` is a key's
    index, by which documents are looked up."""
    key = pos + shift
    start, end = tl.maximum(pos - window_left, 0), tl.where(key < S, tl.minimum(pos + window_right + 1, n), 0)
    if starts_ptr is not None:
        known = (key >= 0) & (key < S)
        start = tl.maximum(start, tl.load(starts_ptr + key, mask=known, other=0) - shift)
        end = tl.minimum(end, tl.load(ends_ptr + key, mask=known, other=0) - shift)
    return start, end


@triton.jit
def _block_range(pos, last, window_left, window_right, n, shift, S, starts_ptr, ends_ptr, BLOCK: tl.constexpr):
    """Split what the tokens `pos` to `last` see into blocks. Returns (lo, n_left, n_full, n_blocks): where the first
    block starts; how many blocks at the left edge, then how many that every token sees whole; and how many in all."""
    lo, end = _visible_range(pos, window_left, window_right, n, shift, S, starts_ptr, ends_ptr)
    last_lo, hi = _visible_range(last, window_left, window_right, n, shift, S, starts_ptr, ends_ptr)
    n_left = tl.cdiv(last_lo - lo, BLOCK)
    n_full = tl.maximum(end - lo - n_left * BLOCK, 0) // BLOCK
    n_right = tl.cdiv(tl.maximum(hi - lo - (n_left + n_full) * BLOCK, 0), BLOCK)
    return lo, n_left, n_full, n_left + n_full + n_right


@triton.jit
def _block_start(i, lo, n_left, n_full, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th of the masked blocks, or of the full ones, starts."""
    return lo + (i + tl.where(i < n_left, 0, n_full) if MASKED else i + n_left) * BLOCK


# Scores, for all kernels: `x`, q k^T or a softcap's tanh of it, with a slope added, times `qk_scale` is to base 2.


@triton.jit
def _qk_scale(scale, softcap, SOFTCAP: tl.constexpr):
    return (softcap if SOFTCAP else scale) * LOG2E


@triton.jit
def _scores(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """a b^T, or tanh(scale * a b^T / softcap)."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        x = tanh(x * (scale / softcap), a.dtype != tl.float32)
    return x


@triton.jit
def _unscaled(ptr, h, scale, softcap, SOFTCAP: tl.constexpr):
    """A head's sink or slope, in units of `x`; 0 for none."""
    return 0.0 if ptr is None else tl.load(ptr + h).to(tl.float32) / (softcap if SOFTCAP else scale)


@triton.jit
def _scaled_difference(x, m, qk_scale, EXACT: tl.constexpr):
    """(x - m) * qk_scale. The difference of two large scores is exact, that of their rounded products is not: float32
    takes the first, half precision what is one instruction."""
    return (x - m) * qk_scale if EXACT else x * qk_scale - m * qk_scale


@triton.jit
def _probabilities(x, lse, m, qk_scale):
    """The softmax again. In float32 `lse` is relative to the row's maximum `m`, elsewhere `m` is None."""
    return tl.exp2(x * qk_scale - lse) if m is None else tl.exp2((x - m) * qk_scale - lse)


# Forward


@triton.jit
def _fwd_blocks(
    acc, m_i, l_i, q, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, lo, n_left, n_full, n_blocks, S,
    stride_ks, stride_vs, scale, softcap, slope,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Online softmax over the masked blocks of keys, or over the full ones; `m_i` is in units of `x`."""
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    for i in range(0, n_blocks - n_full if MASKED else n_full):
        start = _block_start(i, lo, n_left, n_full, BLOCK_S, MASKED)
        kv_pos = start + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        x = _scores(q, k, scale, softcap, SOFTCAP)
        if ALIBI:
            x += slope * (kv_pos.to(tl.float32)[None, :] - q_pos[:, None])
        if MASKED:
            x = tl.where((kv_pos >= kv_start[:, None]) & (kv_pos < kv_end[:, None]), x, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(x, axis=1))
        p = tl.exp2(_scaled_difference(x, m_new[:, None], qk_scale, q.dtype == tl.float32))
        alpha = tl.exp2((m_i - m_new) * qk_scale)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        v = _load_tile(v_ptr, b, kv, start, stride_vs, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return acc, m_i, l_i


@triton.jit(do_not_specialize=["window_left", "window_right"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, slopes_ptr, sink_ptr, o_ptr, lse_ptr, m_ptr,
    T, S, H, group, window_left, window_right, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, the last, with the most keys, first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    kv = h // group
    k_ptr = _to_head(k_ptr, b, kv, stride_kb, stride_kh, DESC)
    v_ptr = _to_head(v_ptr, b, kv, stride_vb, stride_vh, DESC)
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b.to(tl.int64) * S, ends_ptr + b.to(tl.int64) * S
    q = _load_tile(
        _to_head(q_ptr, b, h, stride_qb, stride_qh, DESC), b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D, False, DESC
    )
    rows = start + tl.arange(0, BLOCK_T)
    kv_start, kv_end = _visible_range(rows + S - T, window_left, window_right, S, 0, S, starts_ptr, ends_ptr)
    lo, n_left, n_full, n_blocks = _block_range(
        start + S - T, tl.minimum(start + BLOCK_T, T) - 1 + S - T, window_left, window_right, S, 0, S,
        starts_ptr, ends_ptr, BLOCK_S,
    )  # fmt: skip
    slope, q_pos = _unscaled(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    # The softmax starts with the sink; no sink is one that weighs nothing beside any score.
    sink = LOWEST if sink_ptr is None else tl.maximum(_unscaled(sink_ptr, h, scale, softcap, SOFTCAP), LOWEST)
    m_i = tl.zeros([BLOCK_T], dtype=tl.float32) + sink
    l_i = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        acc, m_i, l_i = _fwd_blocks(
            acc, m_i, l_i, q, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, lo, n_left, n_full, n_blocks, S,
            stride_ks, stride_vs, scale, softcap, slope, D, BLOCK_S, BLOCK_D,
            SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
        )  # fmt: skip
    o_ptr = _to_head(o_ptr, b.to(tl.int64) * T, h, H * D, D)
    _store_tile(o_ptr, acc / l_i[:, None], start, H * D, T, BLOCK_T, D, BLOCK_D)
    offset = tl.program_id(0).to(tl.int64) * T
    if m_ptr is None:
        tl.store(lse_ptr + offset + rows, m_i * _qk_scale(scale, softcap, SOFTCAP) + tl.log2(l_i), mask=rows < T)
    else:
        tl.store(lse_ptr + offset + rows, tl.log2(l_i), mask=rows < T)
        tl.store(m_ptr + offset + rows, m_i, mask=rows < T)


# Backward: a kernel for dq and delta, then one for dk and dv


@triton.jit
def _dq_blocks(
    dq, q, do, lse, m, delta, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, lo, n_left, n_full, n_blocks, S,
    stride_ks, stride_vs, scale, softcap, slope,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Add to dq what the masked blocks of keys, or the full ones, give."""
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    for i in range(0, n_blocks - n_full if MASKED else n_full):
        start = _block_start(i, lo, n_left, n_full, BLOCK_S, MASKED)
        kv_pos = start + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        v = _load_tile(v_ptr, b, kv, start, stride_vs, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        x = _scores(q, k, scale, softcap, SOFTCAP)
        y = x + slope * (kv_pos.to(tl.float32)[None, :] - q_pos[:, None]) if ALIBI else x
        p = _probabilities(y, lse[:, None], None if m is None else m[:, None], qk_scale)
        if MASKED:
            p = tl.where((kv_pos >= kv_start[:, None]) & (kv_pos < kv_end[:, None]), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SOFTCAP:
            ds *= 1 - x * x
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["window_left", "window_right"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, starts_ptr, ends_ptr, slopes_ptr, lse_ptr, m_ptr, o_ptr, delta_ptr, dq_ptr,
    T, S, H, group, window_left, window_right, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    DESC: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, those with the most keys first: dq, and delta for the other kernel."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    kv = h // group
    q_ptr = _to_head(q_ptr, b, h, stride_qb, stride_qh, DESC)
    do_ptr = _to_head(do_ptr, b, h, stride_dob, stride_doh, DESC)
    k_ptr = _to_head(k_ptr, b, kv, stride_kb, stride_kh, DESC)
    v_ptr = _to_head(v_ptr, b, kv, stride_vb, stride_vh, DESC)
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b.to(tl.int64) * S, ends_ptr + b.to(tl.int64) * S
    rows, offset = start + tl.arange(0, BLOCK_T), tl.program_id(0).to(tl.int64) * T
    do = _load_tile(do_ptr, b, h, start, stride_dot, T, BLOCK_T, D, BLOCK_D, False, DESC)
    o = _load_tile(_to_head(o_ptr, b.to(tl.int64) * T, h, H * D, D), b, h, start, H * D, T, BLOCK_T, D, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + offset + rows, delta, mask=rows < T)
    q = _load_tile(q_ptr, b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D, False, DESC)
    lse = tl.load(lse_ptr + offset + rows, mask=rows < T, other=float("inf"))
    m = None if m_ptr is None else tl.load(m_ptr + offset + rows, mask=rows < T, other=0.0)
    kv_start, kv_end = _visible_range(rows + S - T, window_left, window_right, S, 0, S, starts_ptr, ends_ptr)
    lo, n_left, n_full, n_blocks = _block_range(
        start + S - T, tl.minimum(start + BLOCK_T, T) - 1 + S - T, window_left, window_right, S, 0, S,
        starts_ptr, ends_ptr, BLOCK_S,
    )  # fmt: skip
    slope, q_pos = _unscaled(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    dq = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        dq = _dq_blocks(
            dq, q, do, lse, m, delta, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, lo, n_left, n_full, n_blocks, S,
            stride_ks, stride_vs, scale, softcap, slope, D, BLOCK_S, BLOCK_D,
            SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
        )  # fmt: skip
    _store_tile(_to_head(dq_ptr, b.to(tl.int64) * T, h, H * D, D), dq * scale, start, H * D, T, BLOCK_T, D, BLOCK_D)


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, kv_pos, q_ptr, do_ptr, lse_ptr, m_ptr, delta_ptr, starts_ptr, ends_ptr, b, h,
    lo, n_left, n_full, n_blocks, T, S, window_left, window_right, stride_qt, stride_dot, scale, softcap, slope,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the masked blocks of one head's queries, or the full ones, give; scores are transposed."""
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    if MASKED:  # here, so that the loop over full blocks has the registers
        q_start, q_end = _visible_range(kv_pos + T - S, window_right, window_left, T, S - T, S, starts_ptr, ends_ptr)
    # What does not change is computed again in each turn: kept, it spills up to 56 bytes a thread on sm_90.
    for i in tl.range(0, n_blocks - n_full if MASKED else n_full, disable_licm=True):
        start = _block_start(i, lo, n_left, n_full, BLOCK_T, MASKED)
        rows = start + tl.arange(0, BLOCK_T)
        q = _load_tile(q_ptr, b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D, not MASKED, DESC)
        do = _load_tile(do_ptr, b, h, start, stride_dot, T, BLOCK_T, D, BLOCK_D, not MASKED, DESC)
        inside = rows < T if MASKED else None
        lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf") if MASKED else None)
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0 if MASKED else None)
        m = None if m_ptr is None else tl.load(m_ptr + rows, mask=inside, other=0.0 if MASKED else None)[None, :]
        x = _scores(k, q, scale, softcap, SOFTCAP)
        q_pos = (rows + S - T).to(tl.float32)
        y = x + slope * (kv_pos.to(tl.float32)[:, None] - q_pos[None, :]) if ALIBI else x
        p = _probabilities(y, lse[None, :], m, qk_scale)
        if MASKED:
            p = tl.where((rows >= q_start[:, None]) & (rows < q_end[:, None]), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        if SOFTCAP:
            ds *= 1 - x * x
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["window_left", "window_right"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, starts_ptr, ends_ptr, slopes_ptr, lse_ptr, m_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, S, H, KV, window_left, window_right, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    DESC: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of one head, over all queries that see it."""
    start = tl.program_id(1) * BLOCK_S
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b.to(tl.int64) * S, ends_ptr + b.to(tl.int64) * S
    k_ptr = _to_head(k_ptr, b, kv, stride_kb, stride_kh, DESC)
    v_ptr = _to_head(v_ptr, b, kv, stride_vb, stride_vh, DESC)
    k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, False, DESC)
    v = _load_tile(v_ptr, b, kv, start, stride_vs, S, BLOCK_S, D, BLOCK_D, False, DESC)
    kv_pos = start + tl.arange(0, BLOCK_S)
    # The query at the position of key j is row j + T - S; a key sees the window from its other end.
    lo, n_left, n_full, n_blocks = _block_range(
        start + T - S, tl.minimum(start + BLOCK_S, S) - 1 + T - S, window_right, window_left, T, S - T, S,
        starts_ptr, ends_ptr, BLOCK_T,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for h in range(kv * (H // KV), (kv + 1) * (H // KV)):
        offset = (b * H + h).to(tl.int64) * T
        slope = _unscaled(slopes_ptr, h, scale, softcap, SOFTCAP)
        for MASKED in tl.static_range(2):
            dk, dv = _dkv_blocks(
                dk, dv, k, v, kv_pos, _to_head(q_ptr, b, h, stride_qb, stride_qh, DESC),
                _to_head(do_ptr, b, h, stride_dob, stride_doh, DESC), lse_ptr + offset,
                None if m_ptr is None else m_ptr + offset, delta_ptr + offset, starts_ptr, ends_ptr, b, h,
                lo, n_left, n_full, n_blocks, T, S, window_left, window_right, stride_qt, stride_dot,
                scale, softcap, slope,
                D, BLOCK_T, BLOCK_D, SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
            )  # fmt: skip
    _store_tile(_to_head(dk_ptr, b.to(tl.int64) * S, kv, KV * D, D), dk * scale, start, KV * D, S, BLOCK_S, D, BLOCK_D)
    _store_tile(_to_head(dv_ptr, b.to(tl.int64) * S, kv, KV * D, D), dv, start, KV * D, S, BLOCK_S, D, BLOCK_D)


# Short sequences: causal, in half precision, all keys of a head in one tile of one program


@triton.jit
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, H, KV, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A head of keys, and in tiles all queries that read it: a plain softmax."""
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    k = _load_tile(_to_head(k_ptr, b, kv, stride_kb, stride_kh), b, kv, 0, stride_ks, T, BLOCK_S, D, BLOCK_D)
    v = _load_tile(_to_head(v_ptr, b, kv, stride_vb, stride_vh), b, kv, 0, stride_vs, T, BLOCK_S, D, BLOCK_D)
    kv_pos = tl.arange(0, BLOCK_S)
    n_tiles, qk_scale = tl.cdiv(T, BLOCK_T), scale * LOG2E
    for i in range(0, H // KV * n_tiles):
        h, start = kv * (H // KV) + i // n_tiles, i % n_tiles * BLOCK_T
        q = _load_tile(_to_head(q_ptr, b, h, stride_qb, stride_qh), b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D)
        rows = start + tl.arange(0, BLOCK_T)
        x = tl.where(kv_pos <= rows[:, None], tl.dot(q, tl.trans(k)), float("-inf"))
        m = tl.max(x, axis=1)
        p = tl.exp2(_scaled_difference(x, m[:, None], qk_scale, False))
        total = tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v) / total[:, None]
        _store_tile(_to_head(o_ptr, b.to(tl.int64) * T, h, H * D, D), o, start, H * D, T, BLOCK_T, D, BLOCK_D)
        tl.store(lse_ptr + (b * H + h).to(tl.int64) * T + rows, m * qk_scale + tl.log2(total), mask=rows < T)


@triton.jit
def _attention_short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, T, H, KV, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All three gradients, scores transposed. Delta is the sum of p * dp over all keys, so that o is not read."""
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    k = _load_tile(_to_head(k_ptr, b, kv, stride_kb, stride_kh), b, kv, 0, stride_ks, T, BLOCK_S, D, BLOCK_D)
    v = _load_tile(_to_head(v_ptr, b, kv, stride_vb, stride_vh), b, kv, 0, stride_vs, T, BLOCK_S, D, BLOCK_D)
    kv_pos, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)[:, None]
    n_tiles, qk_scale = tl.cdiv(T, BLOCK_T), scale * LOG2E
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i in range(0, H // KV * n_tiles):
        h, start = kv * (H // KV) + i // n_tiles, i % n_tiles * BLOCK_T
        q = _load_tile(_to_head(q_ptr, b, h, stride_qb, stride_qh), b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D)
        do = _load_tile(_to_head(do_ptr, b, h, stride_dob, stride_doh), b, h, start, stride_dot, T, BLOCK_T, D, BLOCK_D)
        rows = start + tl.arange(0, BLOCK_T)
        lse = tl.load(lse_ptr + (b * H + h).to(tl.int64) * T + rows, mask=rows < T, other=float("inf"))
        p = tl.exp2(tl.dot(k, tl.trans(q)) * qk_scale - lse[None, :])
        p = tl.where(kv_pos[:, None] <= rows[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        dp = tl.dot(v, tl.trans(do))
        ds = (p * (dp - tl.sum(p * dp, axis=0)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        dq = tl.dot(tl.trans(k), ds) * scale  # [BLOCK_D, BLOCK_T]
        ptrs = _to_head(dq_ptr, b.to(tl.int64) * T, h, H * D, D) + rows.to(tl.int64)[None, :] * (H * D) + d
        tl.store(ptrs, dq, mask=(rows[None, :] < T) & (d < D))
    _store_tile(_to_head(dk_ptr, b.to(tl.int64) * T, kv, KV * D, D), dk * scale, 0, KV * D, T, BLOCK_S, D, BLOCK_D)
    _store_tile(_to_head(dv_ptr, b.to(tl.int64) * T, kv, KV * D, D), dv, 0, KV * D, T, BLOCK_S, D, BLOCK_D)


# Launch parameters


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, and options of a launch. `descriptors`: tiles are loaded by TMA, not by pointers."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


WIDTHS = (64, 128, 256)  # of heads, up to which a table's entries are for
LENGTHS = (128, 256, 512, 1024)  # of the keys likewise; the last stands for all longer ones
FLOAT32 = Tile(32, 32, 4, 2)  # products without tensor cores, in all kernels
REGISTERS, LANES, SHARED = 255, 32, 227 * 1024  # of a thread, threads of a warp, bytes of a block on sm_90 and sm_100
TUNED_HEADS, TUNED_TOKENS = {64: 12, 128: 16, 256: 8}, 16384


def _size(d: int, s: int) -> tuple[int, int]:
    """The key of a table: head width and length, each rounded up to a class."""
    return next(w for w in WIDTHS if d <= w), next((n for n in LENGTHS if s <= n), LENGTHS[-1])


def _distance_of(tile: Tile, other: Tile) -> float:
    """How many doublings and halvings are between two tiles."""
    sizes = ((tile.block_t, tile.block_s, tile.num_warps, tile.num_stages) for tile in (tile, other))
    return sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True)) + (tile.descriptors != other.descriptors)


def _candidates(kernel: str, size: tuple[int, int]) -> list[Tile]:
    """Tiles by their distance from the one in use on sm_90. Registers can hold the sums and scores, in float32, and
    shared memory what is loaded ahead; they need more, so that some spill.

    In a backward, 4 warps take no moving tile below 64: a tile of that kind, of an earlier kernel, made an illegal
    access on an H100 under Triton 3.6, though its PTX stays in bounds, and Triton 3.7.1 is known to do so where one
    warpgroup multiplies tiles of 32 columns."""
    (width, length), short = size, kernel.startswith("short")
    keys_kept = kernel in ("dkv", "short bwd")  # in a tile that stays, while queries move past it
    stay = [length] if short else [n for n in ((64, 128) if width <= 128 else (32, 64)) if n <= length]
    found = []
    for kept, moving, warps, stages in product(stay, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        if short:
            kept, moving = (kept, moving) if keys_kept else (moving, kept)
        held = 2 * kept * (width + moving) if keys_kept else kept * (width + moving * (2 if kernel == "dq" else 1))
        loaded = 2 * 2 * width * (max(1, stages - 1) * moving + kept)
        narrow = kernel != "fwd" and warps == 4 and moving < 64
        if held <= REGISTERS * LANES * warps and loaded <= SHARED and not narrow:
            block_t, block_s = (moving, kept) if keys_kept else (kept, moving)
            designs = (False, True) if length >= 512 and not short else (False,)
            found += [Tile(block_t, block_s, warps, stages, descriptors) for descriptors in designs]
    start = TABLES[kernel].pick(size, "sm_90")
    return sorted(found, key=lambda tile: _distance_of(tile, start))


def _tuned_shapes(kernel: str, size: tuple[int, int]) -> tuple[dict[str, int], ...]:
    """Causal attention of the class's length, and of four times the last; what the short kernels serve is given a
    window, so that it is the kernel's."""
    width, length = size
    served = size in (SHORT_BWD if TABLES[kernel].backward else SHORT_FWD).entries
    window = {"W": length // 2} if served and not kernel.startswith("short") else {}
    lengths, h = ((length, 4 * length) if length == LENGTHS[-1] else (length,)), TUNED_HEADS[width]
    return tuple(_shape(TUNED_TOKENS // t, t, t, h, h, width, **window) for t in lengths)


def _table(kernel: str, by_width: dict[int, dict[str, Tile]], lengths: tuple[int, ...] = LENGTHS) -> LaunchTable:
    return LaunchTable(
        kernel,
        {(width, length): dict(cards) for width, cards in by_width.items() for length in lengths},
        partial(_candidates, kernel),
        partial(_tuned_shapes, kernel),
        backward="fwd" not in kernel,
    )


# Measured on sm_90: fwd and dkv up to a width of 64, at lengths of 1024 and 4096 (bench.tune). The others are chosen by
# machine code: no spills up to a width of 128, then `python -m bench.compile --kernel attention`'s estimate.
FWD = _table("fwd", {
    64: {"": Tile(128, 64, 8, 2), "sm_90": Tile(64, 64, 4, 4), "sm_100": Tile(128, 64, 8, 3)},
    128: {
        "": Tile(128, 32, 8, 3), "sm_90": Tile(128, 64, 8, 3), "sm_100": Tile(128, 64, 8, 3),
        "gfx942": Tile(128, 32, 8, 2),
    },
    256: {"": Tile(64, 32, 8, 2), "sm_90": Tile(64, 64, 8, 2)},
})  # fmt: skip
DQ = _table("dq", {
    64: {
        "": Tile(64, 64, 8, 2), "sm_90": Tile(64, 64, 4, 2), "sm_100": Tile(64, 32, 4, 2), "gfx942": Tile(64, 64, 4, 2),
    },
    128: {"": Tile(64, 32, 4, 2), "sm_90": Tile(64, 64, 4, 2)},
    256: {"": Tile(32, 32, 4, 2), "sm_90": Tile(64, 64, 8, 2)},
})  # fmt: skip
DKV = _table("dkv", {
    64: {"": Tile(32, 64, 4, 2), "sm_90": Tile(64, 128, 8, 1), "sm_100": Tile(32, 64, 8, 1)},
    128: {
        "": Tile(32, 64, 8, 2), "sm_90": Tile(32, 128, 8, 1), "sm_100": Tile(32, 64, 8, 1),
        "gfx942": Tile(32, 64, 4, 2),
    },
    256: {"": Tile(32, 32, 8, 2), "sm_90": Tile(16, 64, 8, 1), "gfx942": Tile(16, 32, 8, 2)},
})  # fmt: skip
SHORT_FWD = _table("short fwd", {64: {"": Tile(64, 128, 4, 2)}}, lengths=(128,))
SHORT_BWD = _table("short bwd", {
    64: {
        "": Tile(16, 128, 8, 2), "sm_90": Tile(64, 128, 8, 2), "sm_100": Tile(16, 128, 8, 1),
        "gfx942": Tile(16, 128, 8, 1),
    },
}, lengths=(128,))  # fmt: skip
SHORT_BWD.entries[64, 256] = {"sm_90": Tile(16, 256, 8, 2)}
TABLES = {table.kernel: table for table in (FWD, DQ, DKV, SHORT_FWD, SHORT_BWD)}


def _launch(table: LaunchTable, q: Tensor, s: int) -> tuple[Tile, dict] | None:
    """The table's tile for queries `[B, T, H, D]` and `s` keys, no longer than they are and no shorter than matrix
    units take, and the constants and options of a launch with it; None where the card does not run the kernel."""
    t, d = q.shape[1], q.shape[-1]
    tile = FLOAT32 if q.element_size() > 2 else table.pick(_size(d, s), card(q.device))
    if tile is None:
        return None
    block_t, block_s = (min(b, max(16, triton.next_power_of_2(n))) for b, n in ((tile.block_t, t), (tile.block_s, s)))
    tile = replace(tile, block_t=block_t, block_s=block_s)
    blocks = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    return tile, {"D": d, **blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _general(table: LaunchTable, q: Tensor, k: Tensor, v: Tensor, *do: Tensor) -> tuple[Tile, list, dict]:
    """For a launch of a general kernel: the tile, its tensors, or their descriptors, and its options."""
    tile, options = _launch(table, q, k.shape[1])
    rows = {"q": tile.block_t, "k": tile.block_s, "v": tile.block_s, "do": tile.block_t}.values()
    tensors = (q, k, v, *do)
    options["DESC"] = tile.descriptors and all(map(_describable, tensors))
    if options["DESC"]:
        tensors = [_descriptor(x, n, options["BLOCK_D"]) for x, n in zip(tensors, rows, strict=False)]
    return tile, tensors, options


def _describable(x: Tensor) -> bool:
    """Whether TMA can load tiles of it: it starts, and its rows and heads are apart, by multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3])


def _descriptor(x: Tensor, rows: int, block_d: int):
    """Of `[B, T, H, D]`, for tiles of `rows` of a head, zeros beyond T and D."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # there is no Triton where nothing is launched

    (b, t, h, d), (stride_b, stride_t, stride_h, _) = x.shape, x.stride()
    return TensorDescriptor(x, [b, h, t, d], [stride_b, stride_h, stride_t, 1], [1, 1, rows, block_d])


def _short(table: LaunchTable, q: Tensor, k: Tensor, plain: bool) -> dict | None:
    """Options of a short kernel's launch, where it does what is asked: `plain` causal attention, of as many queries as
    keys and in half precision, where the table has their number and the heads of the keys are programs enough."""
    if not plain or q.shape[1] != k.shape[1] or q.element_size() != 2:
        return None
    launch = _launch(table, q, k.shape[1]) if k.shape[0] * k.shape[2] >= n_sm(q.device) else None
    return launch and launch[1]


def _is_plain(causal: bool, window: int, softcap: float, *others: Tensor | None) -> bool:
    """Whether attention is causal and has nothing else."""
    return causal and not window and not softcap and all(x is None for x in others)


def _reach(t: int, s: int, causal: bool, window: int) -> tuple[int, int]:
    """How many keys before its own position a query sees, and how many after: more than there are for no limit."""
    return window - 1 if window else t + s, 0 if causal else t + s


def _starts_ends(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if documents is None else documents.contiguous().unbind()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _row_max(lse: Tensor) -> Tensor | None:
    return lse[1] if len(lse) == 2 else None


def _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap):
    b, t, h, d = q.shape
    return q.new_empty((b, t, h, d)), q.new_empty((1 + (q.element_size() > 2), b, h, t), dtype=torch.float32)


@library_op(_allocate_fwd)
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sink: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and each row's log-sum-exp to base 2, `[1, B, H, T]`; in float32 `[2, B, H, T]`, relative to the row's
    maximum, and that in units of `x`."""
    o, lse = _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap)
    (b, t, h, _), (s, kv) = q.shape, k.shape[1:3]
    if o.numel() == 0:
        return o, lse
    q, k, v = map(heads_of, (q, k, v))
    if options := _short(SHORT_FWD, q, k, _is_plain(causal, window, softcap, documents, sink, slopes)):
        _attention_short_fwd_kernel[(b * kv,)](q, k, v, o, lse, t, h, kv, scale, *_strides(q, k, v), **options)
        return o, lse
    tile, tensors, options = _general(FWD, q, k, v)
    _attention_fwd_kernel[(b * h, triton.cdiv(t, tile.block_t))](
        *tensors, *_starts_ends(documents), slopes, sink, o, lse, _row_max(lse), t, s, h, h // kv,
        *_reach(t, s, causal, window), scale, softcap, *_strides(q, k, v),
        SOFTCAP=softcap != 0, LOWEST=LOWEST, **options,
    )  # fmt: skip
    return o, lse


def _allocate_bwd(do, q, k, v, documents, sink, slopes, o, lse, scale, causal, window, softcap):
    return *(x.new_empty(x.shape) for x in (q, k, v)), lse.new_empty(0 if sink is None else sink.shape)


@library_op(_allocate_bwd)
def _attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sink: Tensor | None, slopes: Tensor | None,
    o: Tensor, lse: Tensor, scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and, in float32, of the sink: empty without one."""
    dq, dk, dv, dsink = _allocate_bwd(do, q, k, v, documents, sink, slopes, o, lse, scale, causal, window, softcap)
    (b, t, h, _), (s, kv) = q.shape, k.shape[1:3]
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsink.zero_()
    do, q, k, v = map(heads_of, (do, q, k, v))
    strides = _strides(q, k, v, do)
    if options := _short(SHORT_BWD, q, k, _is_plain(causal, window, softcap, documents, sink, slopes)):
        _attention_short_bwd_kernel[(b * kv,)](q, k, v, do, lse, dq, dk, dv, t, h, kv, scale, *strides, **options)
        return dq, dk, dv, dsink
    delta, m = torch.empty_like(lse[0]), _row_max(lse)
    saved = *_starts_ends(documents), slopes, lse, m
    rest = *_reach(t, s, causal, window), scale, softcap, *strides
    tile, tensors, options = _general(DQ, q, k, v, do)
    _attention_bwd_dq_kernel[(b * h, triton.cdiv(t, tile.block_t))](
        *tensors, *saved, o, delta, dq, t, s, h, h // kv, *rest, SOFTCAP=softcap != 0, **options
    )
    tile, tensors, options = _general(DKV, q, k, v, do)
    _attention_bwd_dkv_kernel[(b * kv, triton.cdiv(s, tile.block_s))](
        *tensors, *saved, delta, dk, dv, t, s, h, kv, *rest, SOFTCAP=softcap != 0, **options
    )
    if sink is not None:
        log_p = sink.float()[:, None] * LOG2E.value - lse[0]
        if m is not None:  # `lse` is relative to it
            log_p -= m * ((softcap or scale) * LOG2E.value)
        dsink = -(torch.exp2(log_p) * delta).sum((0, 2))
    return dq, dk, dv, dsink


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, sink, slopes, *options):
        o, lse = _attention_fwd(q, k, v, documents, sink, slopes, *options)
        ctx.save_for_backward(q, k, v, documents, sink, slopes, o, lse)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        saved = ctx.saved_tensors  # once: recomputed activations are given out once
        dq, dk, dv, dsink = _attention_bwd(do, *saved, *ctx.options)
        dsink = dsink.to(saved[4].dtype) if ctx.needs_input_grad[4] else None
        return dq, dk, dv, None, dsink, None, *(None for _ in ctx.options)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """The same in tiles, forward and backward; deterministic. It has no dropout, and slopes take no gradient."""
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    if q.shape[-1] > WIDTHS[-1]:
        raise ValueError(f"the triton kernel of attention has heads of up to {WIDTHS[-1]}, not {q.shape[-1]}")
    if dropout:
        raise ValueError("the triton kernel of attention has no dropout: take --kernels.attention=sdpa")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = 0 if causal and window >= k.shape[1] else window
    sink, slopes = (None if x is None else x.contiguous() for x in (sink, slopes))
    return _Attention.apply(q, k, v, documents, sink, slopes, scale, causal, window, softcap)


# The choice of an implementation, call by call

# Where ours beats SDPA at plain causal attention in half precision, for training: head widths up to the first number,
# lengths up to the second. Measured on an H100, bf16, forward+backward, in bench/results/attention.jsonl, with the
# kernels before the short ones: 219 us to cuDNN's 227 at 128 x 128 tokens, 12 heads of 64. At 256 tokens and more SDPA
# was ahead, and in every forward.
AHEAD = ((64, 128),)


def choice(
    t: int,
    s: int,
    d: int,
    training: bool,
    half: bool = True,
    causal: bool = True,
    window: int = 0,
    documents: object = None,
    softcap: float = 0.0,
    sink: object = None,
    dropout: float = 0.0,
    slopes: object = None,
) -> tuple[str, str]:
    """What `auto` takes on a GPU for `t` queries of `s` keys, heads of width `d`: the implementation, and why, in a few
    words. Cheap: it looks at no tensor's values."""
    asked = {
        "windows": 0 < window < (s if causal else math.inf),
        "documents": documents is not None,
        "softcap": softcap != 0,
        "sink": sink is not None,
        "slopes": slopes is not None,
        "fewer queries than keys": causal and 1 < t != s,
    }
    masks = [name for name, value in asked.items() if value]
    alone = asked["softcap"] or asked["sink"]
    if dropout or d > WIDTHS[-1] or not AVAILABLE:
        why = "dropout" if dropout else f"heads of {d}" if d > WIDTHS[-1] else "no Triton"
        return ("torch", f"{why} and {' and '.join(masks)}") if alone else ("sdpa", why)
    if masks:
        return "triton", ", ".join(masks)
    if training and half and causal and any(d <= width and s <= length for width, length in AHEAD):
        return "triton", f"training on {s} tokens"
    return "sdpa", "a plain mask"


def attention_auto(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """The same by the implementation that `choice` names; on a CPU by the reference."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    options = (causal, window, documents, softcap, sink, dropout, slopes)
    name = "torch"
    if q.is_cuda:
        name, _ = choice(q.shape[1], k.shape[1], q.shape[-1], training, q.element_size() == 2, *options)
    return IMPLEMENTATIONS[name](q, k, v, scale, *options)


IMPLEMENTATIONS = {
    "torch": attention_torch, "triton": attention_triton, "sdpa": attention_sdpa, "auto": attention_auto,
}  # fmt: skip


def _inputs(shape, make):
    b, t, s, h, kv, d = (shape[k] for k in ("B", "T", "S", "H", "KV", "D"))
    inputs = {"q": make(b, t, h, d), "k": make(b, s, kv, d), "v": make(b, s, kv, d)}
    if shape.get("W"):
        inputs["window"] = shape["W"]
    if shape.get("C"):
        inputs |= {"softcap": float(shape["C"]), "sink": make(h)}
    if shape.get("A"):
        inputs["slopes"] = 2.0 ** -torch.linspace(8 / h, 8, h, device=inputs["q"].device)
    if shape.get("L"):
        places = torch.arange(s, device=inputs["q"].device).expand(b, s)
        inputs["documents"] = document_ranges(places // shape["L"])
    return inputs


def _visible_pairs(s) -> int:
    """Pairs of a query and a key that it sees, in one head of one sequence."""
    place = torch.arange(s["S"] - s["T"], s["S"])
    reach = s.get("W") or s["S"]
    within = place % s["L"] + 1 if s.get("L") else place + 1
    return int(within.clamp(max=reach).sum())


def _cost(s, itemsize):
    elements = s["B"] * s["D"] * (2 * s["T"] * s["H"] + 2 * s["S"] * s["KV"])
    return Cost(elements * itemsize, 4 * s["B"] * s["H"] * s["D"] * _visible_pairs(s))


def _backward_cost(s, itemsize):
    """q, k, v, o and its gradient read, three gradients written; five products to the forward's two."""
    forward = _cost(s, itemsize)
    elements = s["B"] * s["D"] * (4 * s["T"] * s["H"] + 4 * s["S"] * s["KV"])
    return Cost(elements * itemsize, forward.flops * 5 // 2)


def _shape(b, t, s, h, kv, d, **more):
    return {"B": b, "T": t, "S": s, "H": h, "KV": kv, "D": d, **more}


OP = Op(
    name="attention",
    implementations=IMPLEMENTATIONS,
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
        _shape(4, 4096, 4096, 32, 8, 128, W=512),
        _shape(4, 4096, 4096, 16, 16, 128, L=512),
        _shape(4, 4096, 4096, 8, 8, 256),
    ),
    compiled_shapes=(
        _shape(128, 128, 128, 12, 12, 128),
        _shape(64, 256, 256, 8, 8, 64),
        *(_shape(128, 128, 128, 8, 8, d, L=32, C=50) for d in (64, 128)),
        *(_shape(4, 4096, 4096, 8, 8, d, L=512, C=50) for d in (64, 96, 128)),
        *(_shape(4, 4096, 4096, 8, 8, d, A=1) for d in (64, 128)),
    ),
    preferred={"cuda": "auto"},
    lacks={"triton": {"dropout": "take --kernels.attention=sdpa (or torch)"}},
    launches=tuple(TABLES.values()),
)
