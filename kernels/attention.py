"""Attention: causal or full, with grouped queries, a sliding window, packed documents, a softcap, a sink and ALiBi.

    s_ij = scale * q_i . k_j,  or softcap * tanh(scale * q_i . k_j / softcap) with a softcap;  plus slope * (j - i)
    p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)) over the keys j that query i sees,  o_i = sum_j p_ij v_j

Query head h reads key/value head h // (H / KV). Queries are the last T of the S positions: query i is at position
i + S - T (decoding with a cache). It sees the keys up to its own position (all keys, if not causal), within the last
`window` positions, and in its own document. The sink is a logit per head with no key and a value of 0; without a sink
exp(sink) is 0. A query that sees no key returns 0.

The gradients, with delta_i = do_i . o_i, are

    dv = p^T do,  ds = p * (do v^T - delta),  dq = scale * ds k,  dk = scale * ds^T q,
    dsink = - sum_i exp(sink - lse_i) delta_i

dk and dv are summed over the query heads that share a key/value head; a softcap multiplies ds by 1 - tanh^2; slopes
are constants. Saved for backward: q, k, v, o and lse_i, the log of the denominator of p_ij.

The plain causal flash-attention forward is tests/plain_attention.py, forty lines: a program holds a block of queries
and walks over the blocks of keys with an online softmax, so that the scores never reach memory. Read it first. The
kernels below take these steps beyond it:

1. Hidden blocks are skipped. A query sees one contiguous range of keys, and both ends of the range never decrease with
   the position of the query. So the first and the last query of a block bound the loop over keys. Cost follows the
   visible scores, with windows and packed documents too.
2. Full blocks are not masked. A block that every query of the program sees runs in a loop without comparisons and
   selects; only blocks at the edges run in the masked loop.
3. Exponentials are exp2, one instruction, with log2(e) folded into the softmax scale. The online softmax subtracts the
   unscaled maximum, so that scaling and subtracting are one multiply-add per score.
4. In float32 the row maximum and the log-sum relative to it are saved as two numbers. A single log-sum-exp of a large
   score would round off digits of every p_ij. Half precision saves the sum of both.
5. The backward recomputes p from lse in two kernels: one owns blocks of queries and writes dq and delta, the other owns
   blocks of keys and writes dk and dv. A single kernel would need atomics for dq; two cost two more products, and every
   sum has one program and one order, so that gradients are bitwise reproducible.
6. Short causal sequences have kernels of their own. One program holds all keys of a head, so the softmax needs no
   online update and the backward needs one kernel: delta is the sum of p_ij dp_ij and o is not read.
7. Blocks may be loaded through tensor descriptors (TMA) in place of pointers. One thread asks for a whole block, and
   the hardware computes the addresses and pads beyond the bounds.

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

LOWEST = -1e30  # logit of an absent sink: finite, so that LOWEST - LOWEST is 0 and not NaN, also when scaled


# Reference


def document_ranges(documents: Tensor) -> Tensor:
    """Convert document ids to the `documents` argument of attention.

    Args:
        documents: `[B, S]` integers, the document of each token; they never decrease along a row.

    Returns:
        int32 `[2, B, S]`: the position where the document of each token starts, and where it ends (exclusive).
    """
    documents = documents.contiguous()
    starts, ends = (torch.searchsorted(documents, documents, right=right, out_int32=True) for right in (False, True))
    return torch.stack((starts, ends))


def _relative_positions(t: int, s: int, device) -> Tensor:
    """`[T, S]`: position of the key minus position of the query."""
    return torch.arange(s, device=device) - torch.arange(s - t, s, device=device)[:, None]


def visible(t: int, s: int, causal: bool, window: int, documents: Tensor | None, device) -> Tensor:
    """The mask: True where a query sees a key. `[T, S]`, or `[B, T, S]` with documents."""
    q_pos, kv_pos = torch.arange(s - t, s, device=device)[:, None], torch.arange(s, device=device)
    mask = kv_pos <= q_pos if causal else torch.ones(t, s, dtype=torch.bool, device=device)
    if window:
        mask = mask & (kv_pos > q_pos - window)
    if documents is not None:
        starts, ends = documents[..., -t:, None]
        if t > s:  # the first queries are before the first key and belong to no document
            starts, ends = (F.pad(x, (0, 0, t - s, 0)) for x in (starts, ends))
        mask = mask & (kv_pos >= starts) & (kv_pos < ends)
    return mask


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
    """Attention scores before the softmax, `[B, KV, H / KV, T, S]`; -inf where a query does not see a key.

    The arguments are those of `attention_torch`.
    """
    (_, t, h, d), (_, s, kv, _) = q.shape, k.shape
    grouped = q.unflatten(2, (kv, h // kv))
    qk = torch.einsum("btkgd,bskd->bkgts", grouped, k).to(accumulation_dtype(q))
    qk = qk * (d**-0.5 if scale is None else scale)
    if softcap:
        qk = softcap * torch.tanh(qk / softcap)
    if slopes is not None:
        qk = qk + slopes.to(qk.dtype).view(kv, h // kv, 1, 1) * _relative_positions(t, s, q.device)
    if (causal and t > 1) or window or documents is not None:  # the last query alone sees every key
        hidden = ~visible(t, s, causal, window, documents, q.device)
        qk = qk.masked_fill(hidden if hidden.ndim == 2 else hidden[:, None, None], float("-inf"))
    return qk


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
    """Attention in plain torch, the reference.

    Args:
        q: `[B, T, H, D]`.
        k, v: `[B, S, KV, D]`; H is a multiple of KV.
        scale: softmax scale, positive; None for 1 / sqrt(D).
        causal: hide the keys after the query.
        window: sliding window, the number of keys up to its own position that a query sees; 0 for no limit.
        documents: int32 `[2, B, S]` from `document_ranges`: a query sees only its own document. None for one document.
        softcap: bound on the scores, applied by tanh; 0 for none.
        sink: `[H]`, a logit per head that enters the softmax without a key; None for none.
        dropout: probability of dropping an attention weight.
        slopes: `[H]`, ALiBi slopes: slope * (key position - query position) is added to the score. None for none.

    Returns:
        `[B, T, H, D]` in the dtype of `q`.

    Raises:
        ValueError: shapes do not match, or an argument is out of range.
    """
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    logits = scores(q, k, scale, causal, window, documents, softcap, slopes)
    if sink is None and q.shape[1] <= k.shape[1]:
        weights = logits.softmax(-1)
    else:
        # A query that sees no key has only a sink to attend to, and so returns 0.
        sink = torch.full(q.shape[2:3], LOWEST, device=q.device) if sink is None else sink
        sink = sink.to(logits.dtype).view(*logits.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
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
    """Attention by `F.scaled_dot_product_attention`, which chooses its own backend; arguments of `attention_torch`.

    SDPA supports neither softcap nor sink: either raises `ValueError`.
    """
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    if softcap or sink is not None:
        raise ValueError("SDPA has no softcap and no sink: use --kernels.attention=triton or torch")
    t, s = q.shape[1], k.shape[1]
    causal = causal and t > 1  # a single query is at the last position and sees every key
    is_causal = causal and t == s and not window and documents is None and slopes is None
    mask = None
    if not is_causal and (causal or window or documents is not None):
        mask = visible(t, s, causal, window, documents, q.device)
        mask = mask if mask.ndim == 2 else mask[:, None]
    if slopes is not None:
        bias = (slopes.view(-1, 1, 1) * _relative_positions(t, s, q.device)).to(q.dtype)
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


# Kernels: loads, stores, visible ranges

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _to_head(x, b, h, stride_b, stride_h, DESC: tl.constexpr = False):
    """Move pointer `x` to head h of sequence b. A descriptor stays: it takes b and h at each load."""
    return x if DESC else x + b.to(tl.int64) * stride_b + h * stride_h


@triton.jit
def _load_tile(
    x, b, h, start, stride, n_rows,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr = False, DESC: tl.constexpr = False,
):  # fmt: skip
    """Load rows `start` to `start + BLOCK` of a head, `[BLOCK, BLOCK_D]`, padded with 0 beyond `n_rows` and D.

    FULL promises that no row is beyond `n_rows`.
    """
    if DESC:
        return tl.reshape(x.load([b, h, start, 0]), [BLOCK, BLOCK_D])
    else:
        rows, d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
        ptrs = x + rows.to(tl.int64)[:, None] * stride + d
        if FULL and D == BLOCK_D:
            return tl.load(ptrs)
        else:
            mask = d < D if FULL else (rows[:, None] < n_rows) & (d < D)
            return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, x, start, stride, n_rows, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d, x, mask=(rows[:, None] < n_rows) & (d < D))


@triton.jit
def _visible_range(pos, window_left, window_right, n, shift, S, starts_ptr, ends_ptr):
    """Visible range of each row, from `window_left` before `pos` to `window_right` after it, clipped to `n`.

    Returns (kv_start, kv_end), the keys that the queries at `pos` see. With query and key, left and right exchanged:
    (q_start, q_end), the queries that see the keys at `pos`. `pos + shift` is the index of the document bounds.
    """
    kv_pos = pos + shift
    start, end = tl.maximum(pos - window_left, 0), tl.where(kv_pos < S, tl.minimum(pos + window_right + 1, n), 0)
    if starts_ptr is not None:
        mask = (kv_pos >= 0) & (kv_pos < S)
        start = tl.maximum(start, tl.load(starts_ptr + kv_pos, mask=mask, other=0) - shift)
        end = tl.minimum(end, tl.load(ends_ptr + kv_pos, mask=mask, other=0) - shift)
    return start, end


@triton.jit
def _block_range(pos, last, window_left, window_right, n, shift, S, starts_ptr, ends_ptr, BLOCK: tl.constexpr):
    """Split the range visible from rows `pos` to `last` into blocks.

    Returns (lo, n_left, n_full, n_blocks): the start of the first block; the number of masked blocks at the left edge;
    the number of full blocks after them, visible from every row; the number of all blocks.
    """
    lo, end = _visible_range(pos, window_left, window_right, n, shift, S, starts_ptr, ends_ptr)
    last_lo, hi = _visible_range(last, window_left, window_right, n, shift, S, starts_ptr, ends_ptr)
    n_left = tl.cdiv(last_lo - lo, BLOCK)
    n_full = tl.maximum(end - lo - n_left * BLOCK, 0) // BLOCK
    n_right = tl.cdiv(tl.maximum(hi - lo - (n_left + n_full) * BLOCK, 0), BLOCK)
    return lo, n_left, n_full, n_left + n_full + n_right


@triton.jit
def _block_start(i, lo, n_left, n_full, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Start of the i-th masked block, or of the i-th full block."""
    return lo + (i + tl.where(i < n_left, 0, n_full) if MASKED else i + n_left) * BLOCK


@triton.jit
def _visible_keys(
    start, T, S, window_left, window_right, starts_ptr, ends_ptr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Keys that the queries of rows `start` to `start + BLOCK_T` see.

    Returns (kv_start, kv_end, blocks): the range of each row, `[BLOCK_T]`, and the `_block_range` of all rows.
    """
    pos = start + tl.arange(0, BLOCK_T) + S - T
    kv_start, kv_end = _visible_range(pos, window_left, window_right, S, 0, S, starts_ptr, ends_ptr)
    blocks = _block_range(
        start + S - T, tl.minimum(start + BLOCK_T, T) - 1 + S - T, window_left, window_right, S, 0, S,
        starts_ptr, ends_ptr, BLOCK_S,
    )  # fmt: skip
    return kv_start, kv_end, blocks


@triton.jit
def _in_range(pos, start, end):
    """The mask `[rows, positions]`: whether a position is in the visible range of a row."""
    return (pos >= start[:, None]) & (pos < end[:, None])


# Kernels: scores. `qk`, the maximum `m_i`, sink and slopes are unscaled; times `qk_scale` they are log2-domain scores.


@triton.jit
def _qk_scale(scale, softcap, SOFTCAP: tl.constexpr):
    """The score scale, with log2(e) folded in so that exp2 serves as exp."""
    return (softcap if SOFTCAP else scale) * LOG2E


@triton.jit
def _qk(q, k, scale, softcap, SOFTCAP: tl.constexpr):
    """q k^T, tanh-capped if SOFTCAP; multiply by `qk_scale` for log2-domain scores. With q and k swapped: k q^T."""
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        qk = tanh(qk * (scale / softcap), q.dtype != tl.float32)
    return qk


@triton.jit
def _sink_or_slope(ptr, h, scale, softcap, SOFTCAP: tl.constexpr):
    """Sink or ALiBi slope of head h, divided by the score scale; 0 if `ptr` is None."""
    return 0.0 if ptr is None else tl.load(ptr + h).to(tl.float32) / (softcap if SOFTCAP else scale)


@triton.jit
def _subtract_max(qk, m, qk_scale, EXACT: tl.constexpr):
    """(qk - m) * qk_scale. EXACT, for float32, subtracts first, which rounds nothing where the result is near 0.
    Otherwise scaling and subtracting are one multiply-add."""
    return (qk - m) * qk_scale if EXACT else qk * qk_scale - m * qk_scale


@triton.jit
def _recompute_p(qk, lse, m, qk_scale):
    """Softmax weights from the saved log-sum-exp, which is relative to the row maximum `m` unless that is None."""
    return tl.exp2(qk * qk_scale - lse) if m is None else tl.exp2((qk - m) * qk_scale - lse)


# Kernels: forward


@triton.jit
def _fwd_blocks(
    acc, m_i, l_i, q, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, blocks, S,
    stride_ks, stride_vs, scale, softcap, slope,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Online softmax over the masked blocks of keys, or over the full blocks."""
    lo, n_left, n_full, n_blocks = blocks
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    for i in range(0, n_blocks - n_full if MASKED else n_full):
        start = _block_start(i, lo, n_left, n_full, BLOCK_S, MASKED)
        kv_pos = start + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        qk = _qk(q, k, scale, softcap, SOFTCAP)
        if ALIBI:
            qk += slope * (kv_pos.to(tl.float32)[None, :] - q_pos[:, None])
        if MASKED:
            qk = tl.where(_in_range(kv_pos, kv_start, kv_end), qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, axis=1))
        p = tl.exp2(_subtract_max(qk, m_new[:, None], qk_scale, q.dtype == tl.float32))
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
    """One program computes a block of queries of one head. Causal blocks with the most keys start first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    kv = h // group
    k_ptr = _to_head(k_ptr, b, kv, stride_kb, stride_kh, DESC)
    v_ptr = _to_head(v_ptr, b, kv, stride_vb, stride_vh, DESC)
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b.to(tl.int64) * S, ends_ptr + b.to(tl.int64) * S
    q_ptr = _to_head(q_ptr, b, h, stride_qb, stride_qh, DESC)
    q = _load_tile(q_ptr, b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D, False, DESC)
    rows = start + tl.arange(0, BLOCK_T)
    kv_start, kv_end, blocks = _visible_keys(
        start, T, S, window_left, window_right, starts_ptr, ends_ptr, BLOCK_T, BLOCK_S
    )
    slope, q_pos = _sink_or_slope(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    # The softmax starts from the sink. An absent sink is LOWEST: its weight underflows to 0 beside any score.
    sink = LOWEST if sink_ptr is None else tl.maximum(_sink_or_slope(sink_ptr, h, scale, softcap, SOFTCAP), LOWEST)
    m_i = tl.zeros([BLOCK_T], dtype=tl.float32) + sink
    l_i = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        acc, m_i, l_i = _fwd_blocks(
            acc, m_i, l_i, q, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, blocks, S,
            stride_ks, stride_vs, scale, softcap, slope,
            D, BLOCK_S, BLOCK_D, SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
        )  # fmt: skip
    o_ptr = _to_head(o_ptr, b.to(tl.int64) * T, h, H * D, D)
    _store_tile(o_ptr, acc / l_i[:, None], start, H * D, T, BLOCK_T, D, BLOCK_D)
    offset = tl.program_id(0).to(tl.int64) * T
    if m_ptr is None:
        tl.store(lse_ptr + offset + rows, m_i * _qk_scale(scale, softcap, SOFTCAP) + tl.log2(l_i), mask=rows < T)
    else:
        tl.store(lse_ptr + offset + rows, tl.log2(l_i), mask=rows < T)
        tl.store(m_ptr + offset + rows, m_i, mask=rows < T)


# Kernels: backward, dq and delta first, then dk and dv


@triton.jit
def _dq_blocks(
    dq, q, do, lse, m, delta, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, blocks, S,
    stride_ks, stride_vs, scale, softcap, slope,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Accumulate dq over the masked blocks of keys, or over the full blocks."""
    lo, n_left, n_full, n_blocks = blocks
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    for i in range(0, n_blocks - n_full if MASKED else n_full):
        start = _block_start(i, lo, n_left, n_full, BLOCK_S, MASKED)
        kv_pos = start + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        v = _load_tile(v_ptr, b, kv, start, stride_vs, S, BLOCK_S, D, BLOCK_D, not MASKED, DESC)
        qk = _qk(q, k, scale, softcap, SOFTCAP)
        biased = qk + slope * (kv_pos.to(tl.float32)[None, :] - q_pos[:, None]) if ALIBI else qk
        p = _recompute_p(biased, lse[:, None], None if m is None else m[:, None], qk_scale)
        if MASKED:
            p = tl.where(_in_range(kv_pos, kv_start, kv_end), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SOFTCAP:
            ds *= 1 - qk * qk
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
    """One program computes dq of a block of queries of one head, and delta for the dk/dv kernel."""
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
    kv_start, kv_end, blocks = _visible_keys(
        start, T, S, window_left, window_right, starts_ptr, ends_ptr, BLOCK_T, BLOCK_S
    )
    slope, q_pos = _sink_or_slope(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    dq = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        dq = _dq_blocks(
            dq, q, do, lse, m, delta, k_ptr, v_ptr, b, kv, q_pos, kv_start, kv_end, blocks, S,
            stride_ks, stride_vs, scale, softcap, slope,
            D, BLOCK_S, BLOCK_D, SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
        )  # fmt: skip
    _store_tile(_to_head(dq_ptr, b.to(tl.int64) * T, h, H * D, D), dq * scale, start, H * D, T, BLOCK_T, D, BLOCK_D)


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, kv_pos, q_ptr, do_ptr, lse_ptr, m_ptr, delta_ptr, starts_ptr, ends_ptr, b, h, blocks,
    T, S, window_left, window_right, stride_qt, stride_dot, scale, softcap, slope,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """Accumulate dk and dv over the masked blocks of one head's queries, or over the full blocks.

    Scores are transposed, `[BLOCK_S, BLOCK_T]`, so that p and ds are left operands of the products as they are.
    """
    lo, n_left, n_full, n_blocks = blocks
    qk_scale = _qk_scale(scale, softcap, SOFTCAP)
    if MASKED:  # computed here and not by the caller, to leave its registers to the loop over full blocks
        q_start, q_end = _visible_range(kv_pos + T - S, window_right, window_left, T, S - T, S, starts_ptr, ends_ptr)
    # Without hoisting of loop invariants: they would live in registers, and spill up to 56 bytes a thread on sm_90.
    for i in tl.range(0, n_blocks - n_full if MASKED else n_full, disable_licm=True):
        start = _block_start(i, lo, n_left, n_full, BLOCK_T, MASKED)
        rows = start + tl.arange(0, BLOCK_T)
        q = _load_tile(q_ptr, b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D, not MASKED, DESC)
        do = _load_tile(do_ptr, b, h, start, stride_dot, T, BLOCK_T, D, BLOCK_D, not MASKED, DESC)
        mask = rows < T if MASKED else None
        lse = tl.load(lse_ptr + rows, mask=mask, other=float("inf") if MASKED else None)
        delta = tl.load(delta_ptr + rows, mask=mask, other=0.0 if MASKED else None)
        m = None if m_ptr is None else tl.load(m_ptr + rows, mask=mask, other=0.0 if MASKED else None)[None, :]
        qk = _qk(k, q, scale, softcap, SOFTCAP)
        q_pos = (rows + S - T).to(tl.float32)
        biased = qk + slope * (kv_pos.to(tl.float32)[:, None] - q_pos[None, :]) if ALIBI else qk
        p = _recompute_p(biased, lse[None, :], m, qk_scale)
        if MASKED:
            p = tl.where(_in_range(rows, q_start, q_end), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        if SOFTCAP:
            ds *= 1 - qk * qk
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
    """One program computes dk and dv of a block of keys of one key/value head, over all queries that see it."""
    start = tl.program_id(1) * BLOCK_S
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b.to(tl.int64) * S, ends_ptr + b.to(tl.int64) * S
    k_ptr = _to_head(k_ptr, b, kv, stride_kb, stride_kh, DESC)
    v_ptr = _to_head(v_ptr, b, kv, stride_vb, stride_vh, DESC)
    k = _load_tile(k_ptr, b, kv, start, stride_ks, S, BLOCK_S, D, BLOCK_D, False, DESC)
    v = _load_tile(v_ptr, b, kv, start, stride_vs, S, BLOCK_S, D, BLOCK_D, False, DESC)
    kv_pos = start + tl.arange(0, BLOCK_S)
    # The query at the position of key j is row j + T - S. Left and right are exchanged: keys look at queries.
    blocks = _block_range(
        start + T - S, tl.minimum(start + BLOCK_S, S) - 1 + T - S, window_right, window_left, T, S - T, S,
        starts_ptr, ends_ptr, BLOCK_T,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for h in range(kv * (H // KV), (kv + 1) * (H // KV)):
        offset = (b * H + h).to(tl.int64) * T
        slope = _sink_or_slope(slopes_ptr, h, scale, softcap, SOFTCAP)
        for MASKED in tl.static_range(2):
            dk, dv = _dkv_blocks(
                dk, dv, k, v, kv_pos, _to_head(q_ptr, b, h, stride_qb, stride_qh, DESC),
                _to_head(do_ptr, b, h, stride_dob, stride_doh, DESC), lse_ptr + offset,
                None if m_ptr is None else m_ptr + offset, delta_ptr + offset, starts_ptr, ends_ptr, b, h, blocks,
                T, S, window_left, window_right, stride_qt, stride_dot, scale, softcap, slope,
                D, BLOCK_T, BLOCK_D, SOFTCAP, slopes_ptr is not None, MASKED == 1, DESC,
            )  # fmt: skip
    _store_tile(_to_head(dk_ptr, b.to(tl.int64) * S, kv, KV * D, D), dk * scale, start, KV * D, S, BLOCK_S, D, BLOCK_D)
    _store_tile(_to_head(dv_ptr, b.to(tl.int64) * S, kv, KV * D, D), dv, start, KV * D, S, BLOCK_S, D, BLOCK_D)


# Kernels: short sequences, causal and in half precision; one program holds all keys of a head in one block


@triton.jit
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, T, H, KV, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program serves a key/value head and all query heads that read it. The softmax is not online."""
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    k = _load_tile(_to_head(k_ptr, b, kv, stride_kb, stride_kh), b, kv, 0, stride_ks, T, BLOCK_S, D, BLOCK_D)
    v = _load_tile(_to_head(v_ptr, b, kv, stride_vb, stride_vh), b, kv, 0, stride_vs, T, BLOCK_S, D, BLOCK_D)
    kv_pos = tl.arange(0, BLOCK_S)
    n_blocks, qk_scale = tl.cdiv(T, BLOCK_T), scale * LOG2E
    for i in range(0, H // KV * n_blocks):
        h, start = kv * (H // KV) + i // n_blocks, i % n_blocks * BLOCK_T
        q = _load_tile(_to_head(q_ptr, b, h, stride_qb, stride_qh), b, h, start, stride_qt, T, BLOCK_T, D, BLOCK_D)
        rows = start + tl.arange(0, BLOCK_T)
        qk = tl.where(kv_pos <= rows[:, None], tl.dot(q, tl.trans(k)), float("-inf"))
        m = tl.max(qk, axis=1)
        p = tl.exp2(_subtract_max(qk, m[:, None], qk_scale, False))
        sum_exp = tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v) / sum_exp[:, None]
        _store_tile(_to_head(o_ptr, b.to(tl.int64) * T, h, H * D, D), o, start, H * D, T, BLOCK_T, D, BLOCK_D)
        tl.store(lse_ptr + (b * H + h).to(tl.int64) * T + rows, m * qk_scale + tl.log2(sum_exp), mask=rows < T)


@triton.jit
def _attention_short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, T, H, KV, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes all three gradients of a key/value head, with transposed scores.

    A program sees every key of a query, so that delta is the sum of p * dp over keys and o need not be read.
    """
    b, kv = tl.program_id(0) // KV, tl.program_id(0) % KV
    k = _load_tile(_to_head(k_ptr, b, kv, stride_kb, stride_kh), b, kv, 0, stride_ks, T, BLOCK_S, D, BLOCK_D)
    v = _load_tile(_to_head(v_ptr, b, kv, stride_vb, stride_vh), b, kv, 0, stride_vs, T, BLOCK_S, D, BLOCK_D)
    kv_pos, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)[:, None]
    n_blocks, qk_scale = tl.cdiv(T, BLOCK_T), scale * LOG2E
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for i in range(0, H // KV * n_blocks):
        h, start = kv * (H // KV) + i // n_blocks, i % n_blocks * BLOCK_T
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
    """Launch parameters of a kernel.

    block_t, block_s: queries and keys of a block.
    num_warps, num_stages: of a program, and of the software pipeline over blocks.
    descriptors: load blocks through tensor descriptors (TMA) and not through pointers.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


HEAD_DIMS = (64, 128, 256)  # a table has an entry for head dimensions up to each of these
LENGTHS = (128, 256, 512, 1024)  # and for as many keys; the last entry serves all longer sequences
FLOAT32 = Tile(32, 32, 4, 2)  # for every kernel in float32, which has no tensor cores
REGISTERS, LANES, SHARED = 255, 32, 227 * 1024  # per thread; threads per warp; bytes per CTA on sm_90 and sm_100
TUNED_HEADS, TUNED_TOKENS = {64: 12, 128: 16, 256: 8}, 16384  # by head dimension; per batch


def _size(d: int, s: int) -> tuple[int, int]:
    """Key of a `LaunchTable`: head dimension and number of keys, each rounded up to a size class."""
    return next(n for n in HEAD_DIMS if d <= n), next((n for n in LENGTHS if s <= n), LENGTHS[-1])


def _tile_distance(tile: Tile, other: Tile) -> float:
    """Number of doublings and halvings that turn one tile into the other."""
    sizes = ((tile.block_t, tile.block_s, tile.num_warps, tile.num_stages) for tile in (tile, other))
    return sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True)) + (tile.descriptors != other.descriptors)


def _candidates(kernel: str, size: tuple[int, int]) -> list[Tile]:
    """Tiles worth timing, nearest to the tile in use on sm_90 first.

    Accumulators and scores, in float32, must fit the registers, and the pipelined loads must fit shared memory. Kernels
    need more registers than this counts, so that some candidates spill.

    Backward candidates of 4 warps step in blocks of 64 or more. Triton is known to access memory illegally where one
    warpgroup multiplies tiles of 32 columns: 3.7.1 does, and an earlier kernel did on an H100 under 3.6.
    """
    (head_dim, length), short = size, kernel.startswith("short")
    keys_stay = kernel in ("dkv", "short bwd")  # a program owns a block of keys and loops over queries
    owned_blocks = [length] if short else [n for n in ((64, 128) if head_dim <= 128 else (32, 64)) if n <= length]
    tiles = []
    for owned, step, num_warps, num_stages in product(owned_blocks, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        if short:
            owned, step = (owned, step) if keys_stay else (step, owned)
        n_scores = 1 if kernel.endswith("fwd") else 2  # p; p and ds
        held = owned * ((2 if keys_stay else 1) * head_dim + n_scores * step)
        loaded = 2 * 2 * head_dim * (max(1, num_stages - 1) * step + owned)
        narrow = kernel != "fwd" and num_warps == 4 and step < 64
        if held <= REGISTERS * LANES * num_warps and loaded <= SHARED and not narrow:
            block_t, block_s = (step, owned) if keys_stay else (owned, step)
            descriptors = (False, True) if length >= 512 and not short else (False,)
            tiles += [Tile(block_t, block_s, num_warps, num_stages, use_tma) for use_tma in descriptors]
    in_use = TABLES[kernel].pick(size, "sm_90")
    return sorted(tiles, key=lambda tile: _tile_distance(tile, in_use))


def _tuned_shapes(kernel: str, size: tuple[int, int]) -> tuple[dict[str, int], ...]:
    """Shapes to time a size class at: plain causal attention of that length, the last class at four times it too.

    A general kernel gets a window at the sizes that a short kernel serves, so that it is the one that runs.
    """
    head_dim, length = size
    served = size in (SHORT_BWD if TABLES[kernel].backward else SHORT_FWD).entries
    window = {"W": length // 2} if served and not kernel.startswith("short") else {}
    lengths, h = ((length, 4 * length) if length == LENGTHS[-1] else (length,)), TUNED_HEADS[head_dim]
    return tuple(_shape(TUNED_TOKENS // t, t, t, h, h, head_dim, **window) for t in lengths)


def _table(kernel: str, by_head_dim: dict[int, dict[str, Tile]], lengths: tuple[int, ...] = LENGTHS) -> LaunchTable:
    """A table that starts with the same tiles at all `lengths`."""
    return LaunchTable(
        kernel,
        {(head_dim, length): dict(cards) for head_dim, cards in by_head_dim.items() for length in lengths},
        partial(_candidates, kernel),
        partial(_tuned_shapes, kernel),
        backward="fwd" not in kernel,
    )


# On sm_90, fwd and dkv up to a head dimension of 64 were timed at lengths of 1024 and 4096 (bench.tune). The others
# come from the machine code, which `python -m bench.compile --kernel attention` shows: no spills up to a head dimension
# of 128.
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


# Torch ops and autograd


def _tile_and_options(table: LaunchTable, q: Tensor, s: int) -> tuple[Tile, dict] | None:
    """The tile to launch with, and the constexprs and options that follow; None where the card has no such kernel.

    Blocks are cut to the number of queries `[B, T, H, D]` and of keys `s`, but not below the 16 rows of a tensor core.
    """
    t, d = q.shape[1], q.shape[-1]
    tile = FLOAT32 if q.element_size() > 2 else table.pick(_size(d, s), card(q.device))
    if tile is None:
        return None
    block_t, block_s = (min(b, max(16, triton.next_power_of_2(n))) for b, n in ((tile.block_t, t), (tile.block_s, s)))
    tile = replace(tile, block_t=block_t, block_s=block_s)
    blocks = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    return tile, {"D": d, **blocks, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _general_launch(table: LaunchTable, q: Tensor, k: Tensor, v: Tensor, *do: Tensor) -> tuple[Tile, list, dict]:
    """Tile, inputs and options of a general kernel; inputs are tensors, or descriptors if the tile asks for them."""
    tile, options = _tile_and_options(table, q, k.shape[1])
    tensors, rows = (q, k, v, *do), (tile.block_t, tile.block_s, tile.block_s, tile.block_t)
    options["DESC"] = tile.descriptors and all(map(_fits_tma, tensors))
    if options["DESC"]:
        tensors = [_descriptor(x, n, options["BLOCK_D"]) for x, n in zip(tensors, rows, strict=False)]
    return tile, tensors, options


def _fits_tma(x: Tensor) -> bool:
    """Whether TMA can load from `x`: its address and its strides must be multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in x.stride()[:3])


def _descriptor(x: Tensor, rows: int, block_d: int):
    """Tensor descriptor of `[B, T, H, D]` for blocks of `rows` of one head; loads pad with 0 beyond T and D."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # only where kernels launch is Triton sure to be there

    (b, t, h, d), (stride_b, stride_t, stride_h, _) = x.shape, x.stride()
    return TensorDescriptor(x, [b, h, t, d], [stride_b, stride_h, stride_t, 1], [1, 1, rows, block_d])


def _short_options(table: LaunchTable, q: Tensor, k: Tensor, plain: bool) -> dict | None:
    """Options of a short kernel, or None where the general kernels serve.

    The short kernels take `plain` causal attention of as many queries as keys, in half precision, at the lengths in
    their table, if the key/value heads, one to a program, occupy every SM.
    """
    if not plain or q.shape[1] != k.shape[1] or q.element_size() != 2:
        return None
    if k.shape[0] * k.shape[2] < n_sm(q.device):
        return None
    launch = _tile_and_options(table, q, k.shape[1])
    return launch and launch[1]


def _is_plain(causal: bool, window: int, softcap: float, *others: Tensor | None) -> bool:
    """Whether attention is causal without a window, a softcap or any of the optional tensors."""
    return causal and not window and not softcap and all(x is None for x in others)


def _window_left_right(t: int, s: int, causal: bool, window: int) -> tuple[int, int]:
    """Number of keys that a query sees before and after its position; t + s stands for no limit."""
    return window - 1 if window else t + s, 0 if causal else t + s


def _starts_ends(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The two rows of `documents`, `[B, S]` each."""
    return (None, None) if documents is None else documents.contiguous().unbind()


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of all dimensions but the last, whose values are adjacent."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _row_max(lse: Tensor) -> Tensor | None:
    """The row maximum that `lse` is relative to: its second part in float32, else None."""
    return lse[1] if len(lse) == 2 else None


def _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap):
    b, t, h, d = q.shape
    return q.new_empty((b, t, h, d)), q.new_empty((1 + (q.element_size() > 2), b, h, t), dtype=torch.float32)


@library_op(_allocate_fwd)
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sink: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns o `[B, T, H, D]` and the base-2 log-sum-exp of each row, `[1, B, H, T]`.

    In float32 it is `[2, B, H, T]`: log-sum-exp relative to the row maximum, and that maximum before `qk_scale`.
    """
    o, lse = _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap)
    (b, t, h, _), (s, kv) = q.shape, k.shape[1:3]
    if o.numel() == 0:
        return o, lse
    q, k, v = map(heads_of, (q, k, v))
    if options := _short_options(SHORT_FWD, q, k, _is_plain(causal, window, softcap, documents, sink, slopes)):
        _attention_short_fwd_kernel[(b * kv,)](q, k, v, o, lse, t, h, kv, scale, *_strides(q, k, v), **options)
        return o, lse
    tile, tensors, options = _general_launch(FWD, q, k, v)
    _attention_fwd_kernel[(b * h, triton.cdiv(t, tile.block_t))](
        *tensors, *_starts_ends(documents), slopes, sink, o, lse, _row_max(lse), t, s, h, h // kv,
        *_window_left_right(t, s, causal, window), scale, softcap, *_strides(q, k, v),
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
    """Returns dq, dk, dv and dsink; dsink is float32, and empty without a sink."""
    dq, dk, dv, dsink = _allocate_bwd(do, q, k, v, documents, sink, slopes, o, lse, scale, causal, window, softcap)
    (b, t, h, _), (s, kv) = q.shape, k.shape[1:3]
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsink.zero_()
    do, q, k, v = map(heads_of, (do, q, k, v))
    strides = _strides(q, k, v, do)
    if options := _short_options(SHORT_BWD, q, k, _is_plain(causal, window, softcap, documents, sink, slopes)):
        _attention_short_bwd_kernel[(b * kv,)](q, k, v, do, lse, dq, dk, dv, t, h, kv, scale, *strides, **options)
        return dq, dk, dv, dsink
    delta, m = torch.empty_like(lse[0]), _row_max(lse)
    saved = *_starts_ends(documents), slopes, lse, m
    masks_and_strides = *_window_left_right(t, s, causal, window), scale, softcap, *strides
    tile, tensors, options = _general_launch(DQ, q, k, v, do)
    _attention_bwd_dq_kernel[(b * h, triton.cdiv(t, tile.block_t))](
        *tensors, *saved, o, delta, dq, t, s, h, h // kv, *masks_and_strides, SOFTCAP=softcap != 0, **options
    )
    tile, tensors, options = _general_launch(DKV, q, k, v, do)
    _attention_bwd_dkv_kernel[(b * kv, triton.cdiv(s, tile.block_s))](
        *tensors, *saved, delta, dk, dv, t, s, h, kv, *masks_and_strides, SOFTCAP=softcap != 0, **options
    )
    if sink is not None:
        log_p = sink.float()[:, None] * LOG2E.value - lse[0]
        if m is not None:  # lse is relative to m
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
        saved = ctx.saved_tensors  # read once: activation checkpointing hands recomputed tensors out only once
        dq, dk, dv, dsink = _attention_bwd(do, *saved, *ctx.options)
        dsink = dsink.to(saved[4].dtype) if ctx.needs_input_grad[4] else None
        return dq, dk, dv, None, dsink, None, *(None for _ in ctx.options)


# Public functions


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
    """Attention by the Triton kernels, deterministic forward and backward; arguments of `attention_torch`.

    Head dimensions beyond 256 and dropout are not supported and raise `ValueError`. `slopes` get no gradient.
    """
    _check(q, k, v, scale, window, documents, softcap, sink, slopes)
    if q.shape[-1] > HEAD_DIMS[-1]:
        raise ValueError(f"the triton kernel of attention has heads of up to {HEAD_DIMS[-1]}, not {q.shape[-1]}")
    if dropout:
        raise ValueError("the triton kernel of attention has no dropout: use --kernels.attention=sdpa")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = 0 if causal and window >= k.shape[1] else window
    sink, slopes = (None if x is None else x.contiguous() for x in (sink, slopes))
    return _Attention.apply(q, k, v, documents, sink, slopes, scale, causal, window, softcap)


# The implementation that `auto` chooses, call by call.

# Largest (head dimension, length) at which our kernels beat SDPA, training plain causal attention in half precision.
# Measured on an H100 in bf16, forward and backward, in bench/results/kernels.jsonl, before the short kernels: 219 us
# to cuDNN's 227 at 128 x 128 tokens and 12 heads of 64. SDPA was faster from 256 tokens on, and in every forward.
FASTER_THAN_SDPA = ((64, 128),)


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
    """The implementation that `auto` takes on a GPU, and the reason in a few words.

    Args:
        t, s, d: number of queries, number of keys, head dimension.
        training: whether a backward pass follows.
        half: whether q, k and v are in half precision.
        causal, ..., slopes: as in `attention_torch`; of tensors, only whether they are None.
    """
    features = {
        "windows": 0 < window < (s if causal else math.inf),
        "documents": documents is not None,
        "softcap": softcap != 0,
        "sink": sink is not None,
        "slopes": slopes is not None,
        "fewer queries than keys": causal and 1 < t != s,
    }
    used = [name for name, value in features.items() if value]
    sdpa_lacks_it = features["softcap"] or features["sink"]
    if dropout or d > HEAD_DIMS[-1] or not AVAILABLE:
        why = "dropout" if dropout else f"heads of {d}" if d > HEAD_DIMS[-1] else "no Triton"
        return ("torch", f"{why} and {' and '.join(used)}") if sdpa_lacks_it else ("sdpa", why)
    if used:
        return "triton", ", ".join(used)
    if training and half and causal and any(d <= head_dim and s <= length for head_dim, length in FASTER_THAN_SDPA):
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
    """Attention by the implementation that `choice` returns, the reference on a CPU; arguments of `attention_torch`."""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    options = (causal, window, documents, softcap, sink, dropout, slopes)
    name = "torch"
    if q.is_cuda:
        name, _ = choice(q.shape[1], k.shape[1], q.shape[-1], training, q.element_size() == 2, *options)
    return IMPLEMENTATIONS[name](q, k, v, scale, *options)


IMPLEMENTATIONS = {
    "torch": attention_torch, "triton": attention_triton, "sdpa": attention_sdpa, "auto": attention_auto,
}  # fmt: skip


# OP


def _inputs(shape, make):
    """Shape keys besides the dimensions: W window, C softcap (with a sink), A ALiBi, L length of each document."""
    b, t, s, h, kv, d = (shape[k] for k in ("B", "T", "S", "H", "KV", "D"))
    inputs = {"q": make(b, t, h, d), "k": make(b, s, kv, d), "v": make(b, s, kv, d)}
    if shape.get("W"):
        inputs["window"] = shape["W"]
    if shape.get("C"):
        inputs |= {"softcap": float(shape["C"]), "sink": make(h)}
    if shape.get("A"):
        inputs["slopes"] = 2.0 ** -torch.linspace(8 / h, 8, h, device=inputs["q"].device)
    if shape.get("L"):
        positions = torch.arange(s, device=inputs["q"].device).expand(b, s)
        inputs["documents"] = document_ranges(positions // shape["L"])
    return inputs


def _visible_pairs(s) -> int:
    """Number of unmasked scores in one head of one sequence."""
    q_pos = torch.arange(s["S"] - s["T"], s["S"])
    n_keys = q_pos % s["L"] + 1 if s.get("L") else q_pos + 1
    return int(n_keys.clamp(max=s.get("W") or s["S"]).sum())


def _cost(s, itemsize):
    """Reads q, k, v and writes o; two products of 2 D FLOPs for every unmasked score."""
    elements = s["B"] * s["D"] * (2 * s["T"] * s["H"] + 2 * s["S"] * s["KV"])
    return Cost(elements * itemsize, 4 * s["B"] * s["H"] * s["D"] * _visible_pairs(s))


def _backward_cost(s, itemsize):
    """Reads q, k, v, o, do and writes dq, dk, dv; five products, where the forward has two."""
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
    lacks={"triton": {"dropout": "use --kernels.attention=sdpa (or torch)"}},
    launches=tuple(TABLES.values()),
)
