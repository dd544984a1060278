"""Attention: causal or full, with grouped queries, a sliding window, packed documents, a softcap, a sink and slopes.

    s_ij = scale * q_i . k_j,  or softcap * tanh(scale * q_i . k_j / softcap) with a softcap;  plus slope * (j - i)
    p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij)) over the keys j that query i sees,  o_i = sum_j p_ij v_j

Query head h reads key/value head h // (H / KV). Queries are the last T of the S tokens that have keys, so that query i
stands at i + S - T (generation with a cache). It sees the keys up to its own place (all, when not causal), of those
the last `window`, and of those the ones of its own document. The sink is a logit per head of a key whose value is 0;
without one exp(sink) is 0, and a query that sees nothing gives 0.

With delta_i = do_i . o_i the gradients are dv = p^T do, ds = p * (do v^T - delta), dq = scale * ds k,
dk = scale * ds^T q, each head of k and v summed over the queries' heads that read it, and dsink the sum of
-exp(sink - lse_i) delta_i; with a softcap ds is first multiplied by 1 - tanh^2. Slopes are constants. Saved: q, k, v, o
and lse_i, the log of the sum above. A query that sees nothing, without a sink, has the lse of a sink of -1e38.

The Triton kernels tile queries and keys and never hold more than a tile of the scores. The keys that a query sees, and
the queries that see a key, are a range, and neither end of it moves back from one token to the next: so tiles outside
the ranges of a tile's first and last row are skipped, and those inside all of its rows' ranges are not masked. The
backward computes the tiles again, once for dk and dv and once for dq, so that every sum has one program and one order;
where all keys fit a tile, one pass makes all three. Exponentials are to base 2, with log2(e) folded into the scale.

Sources: Vaswani et al., 2017, equation 1; Ainslie et al., "GQA", 2023; Dao, "FlashAttention-2", 2023, algorithms 1, 2;
Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023; Gemma 2 (softcap), 2024; Press et al.,
"Train Short, Test Long" (ALiBi), 2021.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import card, heads_of, library_op, multiprocessors, tanh, tl, triton
from kernels.spec import Cost, Op, accumulation_dtype

LOWEST = -1e38  # the logit of no sink: finite, so that the difference of two is no NaN


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


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(ptr, rows, stride, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """Rows of one head: `[rows, BLOCK_D]`, 0 beyond D and, unless they are all there, beyond `n_rows`."""
    d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + d
    if WHOLE and D == BLOCK_D:
        return tl.load(ptrs)
    inside = d < D if WHOLE else (rows[:, None] < n_rows) & (d < D)
    return tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def _store_tile(ptr, x, rows, stride, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d, x, mask=(rows[:, None] < n_rows) & (d < D))


@triton.jit
def _partners(at, before, after, n, shift, S, starts_ptr, ends_ptr):
    """The first of the `n` partners of the tokens at the places `at`, and their end: a query's keys, a key's queries.

    `shift` leads from a place to that of the token's key."""
    key = at + shift
    first, end = tl.maximum(at - before, 0), tl.where(key < S, tl.minimum(at + after + 1, n), 0)
    if starts_ptr is not None:
        known = (key >= 0) & (key < S)
        first = tl.maximum(first, tl.load(starts_ptr + key, mask=known, other=0) - shift)
        end = tl.minimum(end, tl.load(ends_ptr + key, mask=known, other=0) - shift)
    return first, end


@triton.jit
def _tiles(at, last, before, after, n, shift, S, starts_ptr, ends_ptr, BLOCK: tl.constexpr):
    """How the partners of the tokens from `at` to `last` are cut into tiles: the first partner; how many tiles at the
    left edge, which some of the tokens do not wholly see; how many next that all wholly see; how many in all."""
    first, end = _partners(at, before, after, n, shift, S, starts_ptr, ends_ptr)
    last_first, last_end = _partners(last, before, after, n, shift, S, starts_ptr, ends_ptr)
    left = tl.cdiv(last_first - first, BLOCK)
    whole = tl.maximum(end - first - left * BLOCK, 0) // BLOCK
    right = tl.cdiv(tl.maximum(last_end - first - (left + whole) * BLOCK, 0), BLOCK)
    return first, left, whole, left + whole + right


@triton.jit
def _tile_of(i, left, whole, EDGE: tl.constexpr):
    """The place in the row of tiles of the i-th of those at an edge, or of the others."""
    return i + tl.where(i < left, 0, whole) if EDGE else i + left


@triton.jit
def _products(a, b, scale, softcap, SOFTCAP: tl.constexpr):
    """What times `_factor` gives the scores to base 2: the rows of `a` times those of `b`, a softcap's tanh of that."""
    x = tl.dot(a, tl.trans(b), input_precision="ieee")
    if SOFTCAP:
        x = tanh(x * (scale / softcap), a.dtype != tl.float32)
    return x


@triton.jit
def _factor(scale, softcap, SOFTCAP: tl.constexpr):
    return (softcap if SOFTCAP else scale) * LOG2E


@triton.jit
def _tilt(slopes_ptr, h, scale, softcap, SOFTCAP: tl.constexpr):
    """What a head adds to what times `_factor` gives the scores, for every place from query to key."""
    return 0.0 if slopes_ptr is None else tl.load(slopes_ptr + h) / (softcap if SOFTCAP else scale)


@triton.jit
def _attend(
    out, most, total, q, k_ptr, v_ptr, places, row_first, row_end, first, left, whole, n_tiles, S,
    stride_ks, stride_vs, scale, softcap, tilt,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, TILTED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Take tiles of keys into the rows' sum of weighted values, largest score and sum of weights."""
    factor = _factor(scale, softcap, SOFTCAP)
    for i in range(0, n_tiles - whole if EDGE else whole):
        keys = first + _tile_of(i, left, whole, EDGE) * BLOCK_S + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, keys, stride_ks, S, D, BLOCK_D, not EDGE)
        x = _products(q, k, scale, softcap, SOFTCAP)
        if TILTED:
            x += tilt * (keys.to(tl.float32)[None, :] - places[:, None])
        if EDGE:
            x = tl.where((keys >= row_first[:, None]) & (keys < row_end[:, None]), x, float("-inf"))
        higher = tl.maximum(most, tl.max(x, axis=1) * factor)
        weights = tl.exp2(x * factor - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(weights, axis=1)
        v = _load_tile(v_ptr, keys, stride_vs, S, D, BLOCK_D, not EDGE)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        most = higher
    return out, most, total


@triton.jit(do_not_specialize=["behind", "ahead"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, slopes_ptr, sink_ptr, o_ptr, lse_ptr,
    T, S, H, group, behind, ahead, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, the last, with the most keys, first. `lse` `[B, H, T]` is to base 2."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b * S, ends_ptr + b * S
    rows = start + tl.arange(0, BLOCK_T)
    q = _load_tile(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D)
    row_first, row_end = _partners(rows + S - T, behind, ahead, S, 0, S, starts_ptr, ends_ptr)
    first, left, whole, n_tiles = _tiles(
        start + S - T, tl.minimum(start + BLOCK_T, T) - 1 + S - T, behind, ahead, S, 0, S, starts_ptr, ends_ptr, BLOCK_S
    )
    tilt, places = _tilt(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    # No sink is one that weighs nothing beside any score.
    logit = LOWEST if sink_ptr is None else tl.maximum(tl.load(sink_ptr + h).to(tl.float32) * LOG2E, LOWEST)
    most = tl.zeros([BLOCK_T], dtype=tl.float32) + logit
    total = tl.full([BLOCK_T], 1.0, dtype=tl.float32)
    out = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for EDGE in tl.static_range(2):
        out, most, total = _attend(
            out, most, total, q, k_ptr, v_ptr, places, row_first, row_end, first, left, whole, n_tiles, S,
            stride_ks, stride_vs, scale, softcap, tilt, D, BLOCK_S, BLOCK_D, SOFTCAP, slopes_ptr is not None, EDGE == 1,
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
def _accumulate_dkv(
    dk, dv, k, v, keys, q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, key_first, key_end, first, left, whole, n_tiles,
    T, S, H, stride_qt, stride_dot, scale, softcap, tilt,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, TILTED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what tiles of one head's queries give; scores are computed transposed, keys by queries."""
    factor = _factor(scale, softcap, SOFTCAP)
    for i in range(0, n_tiles - whole if EDGE else whole):
        rows = first + _tile_of(i, left, whole, EDGE) * BLOCK_T + tl.arange(0, BLOCK_T)
        q = _load_tile(q_ptr, rows, stride_qt, T, D, BLOCK_D, not EDGE)
        do = _load_tile(do_ptr, rows, stride_dot, T, D, BLOCK_D, not EDGE)
        if EDGE:
            lse = tl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        x = _products(k, q, scale, softcap, SOFTCAP)
        places = (rows + S - T).to(tl.float32)
        y = x + tilt * (keys.to(tl.float32)[:, None] - places[None, :]) if TILTED else x
        weights = tl.exp2(y * factor - lse[None, :])
        if EDGE:
            weights = tl.where((rows >= key_first[:, None]) & (rows < key_end[:, None]), weights, 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        dscores = weights * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        if SOFTCAP:
            dscores *= 1 - x * x
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
        if dq_ptr is not None:  # there are no other keys; transposed, since the scores are
            dq = tl.dot(tl.trans(k), dscores.to(k.dtype), input_precision="ieee") * scale
            d = tl.arange(0, BLOCK_D)[:, None]
            tl.store(dq_ptr + rows.to(tl.int64)[None, :] * (H * D) + d, dq, mask=(rows[None, :] < T) & (d < D))
    return dk, dv


@triton.jit(do_not_specialize=["behind", "ahead"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, slopes_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    T, S, H, KV, behind, ahead, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of one head, over all queries that see it. With `dq_ptr` it holds all, and makes dq."""
    start = tl.program_id(1) * BLOCK_S
    b, kv = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b * S, ends_ptr + b * S
    keys = start + tl.arange(0, BLOCK_S)
    k = _load_tile(k_ptr + b * stride_kb + kv * stride_kh, keys, stride_ks, S, D, BLOCK_D)
    v = _load_tile(v_ptr + b * stride_vb + kv * stride_vh, keys, stride_vs, S, D, BLOCK_D)
    key_first, key_end = _partners(keys + T - S, ahead, behind, T, S - T, S, starts_ptr, ends_ptr)
    first, left, whole, n_tiles = _tiles(
        start + T - S, tl.minimum(start + BLOCK_S, S) - 1 + T - S, ahead, behind, T, S - T, S, starts_ptr, ends_ptr,
        BLOCK_T,
    )  # fmt: skip
    if dq_ptr is not None and S < BLOCK_S:  # mask the rows of k that are not there in every tile
        left, whole = n_tiles, 0
    dk = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], dtype=tl.float32)
    for h in range(kv * (H // KV), (kv + 1) * (H // KV)):
        head, tilt = (b * H + h) * T, _tilt(slopes_ptr, h, scale, softcap, SOFTCAP)
        for EDGE in tl.static_range(2):
            dk, dv = _accumulate_dkv(
                dk, dv, k, v, keys, q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_dob + h * stride_doh,
                lse_ptr + head, delta_ptr + head, None if dq_ptr is None else dq_ptr + (b * T * H + h) * D,
                key_first, key_end, first, left, whole, n_tiles, T, S, H, stride_qt, stride_dot, scale, softcap, tilt,
                D, BLOCK_T, BLOCK_D, SOFTCAP, slopes_ptr is not None, EDGE == 1,
            )  # fmt: skip
    offset = (b * S * KV + kv) * D
    _store_tile(dk_ptr + offset, dk * scale, keys, KV * D, S, D, BLOCK_D)
    _store_tile(dv_ptr + offset, dv, keys, KV * D, S, D, BLOCK_D)


@triton.jit
def _accumulate_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, places, row_first, row_end, first, left, whole, n_tiles, S,
    stride_ks, stride_vs, scale, softcap, tilt,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, TILTED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what tiles of keys give."""
    factor = _factor(scale, softcap, SOFTCAP)
    for i in range(0, n_tiles - whole if EDGE else whole):
        keys = first + _tile_of(i, left, whole, EDGE) * BLOCK_S + tl.arange(0, BLOCK_S)
        k = _load_tile(k_ptr, keys, stride_ks, S, D, BLOCK_D, not EDGE)
        v = _load_tile(v_ptr, keys, stride_vs, S, D, BLOCK_D, not EDGE)
        x = _products(q, k, scale, softcap, SOFTCAP)
        y = x + tilt * (keys.to(tl.float32)[None, :] - places[:, None]) if TILTED else x
        weights = tl.exp2(y * factor - lse[:, None])
        if EDGE:
            weights = tl.where((keys >= row_first[:, None]) & (keys < row_end[:, None]), weights, 0.0)
        dscores = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        if SOFTCAP:
            dscores *= 1 - x * x
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["behind", "ahead"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, slopes_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    T, S, H, group, behind, ahead, scale, softcap,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_dob, stride_dot, stride_doh,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile of the queries of one head, those with the most keys first."""
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    if starts_ptr is not None:
        starts_ptr, ends_ptr = starts_ptr + b * S, ends_ptr + b * S
    rows = start + tl.arange(0, BLOCK_T)
    q = _load_tile(q_ptr + b * stride_qb + h * stride_qh, rows, stride_qt, T, D, BLOCK_D)
    do = _load_tile(do_ptr + b * stride_dob + h * stride_doh, rows, stride_dot, T, D, BLOCK_D)
    lse = tl.load(lse_ptr + (b * H + h) * T + rows, mask=rows < T, other=float("inf"))
    delta = tl.load(delta_ptr + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    row_first, row_end = _partners(rows + S - T, behind, ahead, S, 0, S, starts_ptr, ends_ptr)
    first, left, whole, n_tiles = _tiles(
        start + S - T, tl.minimum(start + BLOCK_T, T) - 1 + S - T, behind, ahead, S, 0, S, starts_ptr, ends_ptr, BLOCK_S
    )
    tilt, places = _tilt(slopes_ptr, h, scale, softcap, SOFTCAP), (rows + S - T).to(tl.float32)
    dq = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for EDGE in tl.static_range(2):
        dq = _accumulate_dq(
            dq, q, do, lse, delta, k_ptr, v_ptr, places, row_first, row_end, first, left, whole, n_tiles, S,
            stride_ks, stride_vs, scale, softcap, tilt, D, BLOCK_S, BLOCK_D, SOFTCAP, slopes_ptr is not None, EDGE == 1,
        )  # fmt: skip
    _store_tile(dq_ptr + (b * T * H + h) * D, dq * scale, rows, H * D, T, D, BLOCK_D)


# Rows of queries and of keys a tile, warps, and stages of loads: by kernel and width of a head, then by card, in half
# precision. Chosen from machine code, by spills, which there are none of up to 128 with Triton 3.7.1, and the estimate
# for sm_90: `python -m bench.compile --kernel attention`.
CONFIGS = {
    ("fwd", 64): {"": (128, 64, 8, 2), "sm_90": (64, 128, 4, 2), "sm_100": (128, 64, 8, 3)},
    ("fwd", 128): {
        "": (128, 32, 8, 3), "sm_90": (128, 64, 8, 3), "sm_100": (128, 64, 8, 3), "gfx942": (128, 64, 8, 2),
    },
    ("fwd", 256): {"": (64, 32, 8, 2), "sm_90": (64, 64, 8, 2)},
    ("dkv", 64): {"": (32, 64, 4, 2), "sm_90": (64, 128, 8, 2), "sm_100": (32, 64, 4, 1)},
    ("dkv", 128): {"": (32, 64, 8, 2), "sm_90": (32, 128, 8, 2), "sm_100": (32, 64, 8, 1), "gfx942": (32, 64, 4, 2)},
    ("dkv", 256): {"": (32, 32, 8, 2), "sm_90": (16, 64, 8, 2), "gfx942": (16, 32, 8, 2)},
    ("one pass", 64): {
        "": (16, 128, 8, 2), "sm_90": (64, 128, 8, 1), "sm_100": (16, 128, 8, 1), "gfx942": (16, 128, 8, 1),
    },
    ("one pass", 128): {  # no tile of 128 keys fits sm_89 and sm_120
        "sm_80": (16, 128, 8, 2), "sm_90": (16, 128, 8, 2), "sm_100": (16, 128, 8, 1), "gfx942": (16, 128, 8, 1),
    },
    ("dq", 64): {"": (64, 64, 8, 2), "sm_90": (64, 128, 4, 2), "sm_100": (64, 32, 4, 2), "gfx942": (64, 64, 4, 2)},
    ("dq", 128): {"": (64, 32, 4, 2), "sm_90": (64, 64, 4, 2)},
    ("dq", 256): {"": (32, 32, 4, 2), "sm_90": (64, 64, 8, 2)},
}  # fmt: skip
ONE_PASS = 128  # keys that a tile of the one-pass backward holds


def tiles_of(kernel: str, width: int, device: torch.device) -> tuple[int, int, int, int] | None:
    """A kernel's entry in the table for the card; None where that card does not run it at this width."""
    by_card = CONFIGS.get((kernel, width), {})
    return by_card.get(card(device), by_card.get(""))


def _config(kernel: str, q: Tensor, t: int, s: int, **constants) -> dict | None:
    """Keyword arguments of a launch, tiles no longer than the sequences and no shorter than a matrix unit takes; None
    for a kernel that this card does not run at this width."""
    d = q.shape[-1]
    width = 64 if d <= 64 else 128 if d <= 128 else 256
    tiles = tiles_of(kernel, width, q.device)
    if tiles is None:
        return None
    block_t, block_s, warps, stages = tiles
    if q.element_size() > 2:
        block_t, block_s, warps, stages = min(block_t, 32), min(block_s, 32), 4, 2
    block_t, block_s = (min(b, max(16, triton.next_power_of_2(n))) for b, n in ((block_t, t), (block_s, s)))
    blocks = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    return {"D": d, **blocks, **constants, "num_warps": warps, "num_stages": stages}


def _reach(t: int, s: int, causal: bool, window: int) -> tuple[int, int]:
    """How many keys before a query's own place it sees, and how many after: more than there are for no limit."""
    return window - 1 if window else t + s, 0 if causal else t + s


def _starts_ends(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if documents is None else documents.contiguous().unbind()


def _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap):
    b, t, h, d = q.shape
    return q.new_empty((b, t, h, d)), q.new_empty((b, h, t), dtype=torch.float32)


@library_op(_allocate_fwd)
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sink: Tensor | None, slopes: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and the log-sum-exp of each row's scores to base 2."""
    o, lse = _allocate_fwd(q, k, v, documents, sink, slopes, scale, causal, window, softcap)
    (b, t, h, _), (s, kv) = q.shape, k.shape[1:3]
    q, k, v = map(heads_of, (q, k, v))
    config = _config("fwd", q, t, s, SOFTCAP=softcap != 0, LOWEST=LOWEST)
    if o.numel():
        _attention_fwd_kernel[(b * h, triton.cdiv(t, config["BLOCK_T"]))](
            q, k, v, *_starts_ends(documents), slopes, sink, o, lse, t, s, h, h // kv, *_reach(t, s, causal, window),
            scale, softcap, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **config,
        )  # fmt: skip
    return o, lse


def _allocate_bwd(do, q, k, v, documents, slopes, o, lse, scale, causal, window, softcap):
    return *(x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(lse)


@library_op(_allocate_bwd)
def _attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, slopes: Tensor | None,
    o: Tensor, lse: Tensor, scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, and delta."""
    dq, dk, dv, delta = _allocate_bwd(do, q, k, v, documents, slopes, o, lse, scale, causal, window, softcap)
    (b, t, h, d), (s, kv) = q.shape, k.shape[1:3]
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    do, q, k, v = map(heads_of, (do, q, k, v))
    block_d = max(16, triton.next_power_of_2(d))
    _attention_bwd_delta_kernel[(b * h, triton.cdiv(t, 32))](
        o, do, delta, t, h, *do.stride()[:3], D=d, BLOCK_T=32, BLOCK_D=block_d, num_warps=4
    )
    tokens, saved = (q, k, v, *_starts_ends(documents), slopes), (do, lse, delta)
    rest = *_reach(t, s, causal, window), scale, softcap, *(n for x in (q, k, v, do) for n in x.stride()[:3])
    config = None
    if t <= s <= ONE_PASS and q.element_size() == 2 and b * kv >= multiprocessors(q.device):
        # All keys fit a tile, all queries see one of them, and the heads alone are programs enough.
        config = _config("one pass", q, t, s, SOFTCAP=softcap != 0)
    one_pass = config is not None
    config = config or _config("dkv", q, t, s, SOFTCAP=softcap != 0)
    _attention_bwd_dkv_kernel[(b * kv, triton.cdiv(s, config["BLOCK_S"]))](
        *tokens, *saved, dq if one_pass else None, dk, dv, t, s, h, kv, *rest, **config
    )
    if not one_pass:
        config = _config("dq", q, t, s, SOFTCAP=softcap != 0)
        _attention_bwd_dq_kernel[(b * h, triton.cdiv(t, config["BLOCK_T"]))](
            *tokens, *saved, dq, t, s, h, h // kv, *rest, **config
        )
    return dq, dk, dv, delta


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, sink, slopes, *options):
        o, lse = _attention_fwd(q, k, v, documents, sink, slopes, *options)
        ctx.save_for_backward(q, k, v, documents, slopes, o, lse, sink)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *saved, lse, sink = ctx.saved_tensors
        dq, dk, dv, delta = _attention_bwd(do, *saved, lse, *ctx.options)
        dsink = None
        if sink is not None and ctx.needs_input_grad[4]:
            weights = torch.exp2(sink.float()[:, None] * LOG2E.value - lse)
            dsink = -(weights * delta).sum((0, 2)).to(sink.dtype)
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
    if q.shape[-1] > 256:
        raise ValueError(f"the triton kernel of attention has heads of up to 256, not {q.shape[-1]}")
    if dropout:
        raise ValueError("the triton kernel of attention has no dropout: take --kernels.attention=sdpa")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sink, slopes = (None if x is None else x.contiguous() for x in (sink, slopes))
    return _Attention.apply(q, k, v, documents, sink, slopes, scale, causal, window, softcap)


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
        _shape(4, 4096, 4096, 32, 8, 128, W=512),
        _shape(4, 4096, 4096, 16, 16, 128, L=512),
        _shape(4, 4096, 4096, 8, 8, 256),
    ),
    compiled_shapes=(
        _shape(128, 128, 128, 12, 12, 128),
        *(_shape(128, 128, 128, 8, 8, d, L=32, C=50) for d in (64, 128)),
        *(_shape(4, 4096, 4096, 8, 8, d, L=512, C=50) for d in (64, 96, 128)),
        *(_shape(4, 4096, 4096, 8, 8, d, A=1) for d in (64, 128)),
    ),
    preferred={"cuda": "sdpa"},
)
