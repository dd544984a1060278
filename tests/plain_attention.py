"""The plain causal flash-attention forward. Read it first: kernels/attention.py lists the steps that go beyond it.

One program holds a block of queries of one head. It walks over the blocks of keys up to its own, and keeps of every
query the maximum of the scores so far (m_i), the sum of their exponentials relative to it (l_i) and the weighted sum of
values (acc). When the maximum grows, alpha rescales both sums: an online softmax (Dao, "FlashAttention-2", 2023,
algorithm 1). Scores stay in registers, so memory is O(T), not O(T^2).
"""

import torch

from kernels.launch import tl, triton


@triton.jit
def _plain_attention_kernel(q_ptr, k_ptr, v_ptr, o_ptr, T, H, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    q_start = tl.program_id(0) * BLOCK
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    head = (b * T * H + h) * D  # of contiguous [B, T, H, D]; a row, a position, is H * D further
    block, d = tl.arange(0, BLOCK), tl.arange(0, D)
    q_pos = q_start + block
    offsets = head + q_pos[:, None] * (H * D) + d
    q = tl.load(q_ptr + offsets, mask=q_pos[:, None] < T, other=0.0)
    m_i = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK], dtype=tl.float32)
    acc = tl.zeros([BLOCK, D], dtype=tl.float32)
    for kv_start in range(0, q_start + BLOCK, BLOCK):
        kv_pos = kv_start + block
        kv_offsets = head + kv_pos[:, None] * (H * D) + d
        k = tl.load(k_ptr + kv_offsets, mask=kv_pos[:, None] < T, other=0.0)
        v = tl.load(v_ptr + kv_offsets, mask=kv_pos[:, None] < T, other=0.0)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        qk = tl.where(q_pos[:, None] >= kv_pos, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, axis=1))
        p = tl.exp(qk - m_new[:, None])
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m_i = m_new
    tl.store(o_ptr + offsets, acc / l_i[:, None], mask=q_pos[:, None] < T)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Causal attention of contiguous q, k, v `[B, T, H, D]`; D is a power of two, at least 16."""
    b, t, h, d = q.shape
    o = torch.empty_like(q)
    _plain_attention_kernel[(triton.cdiv(t, block), b * h)](q, k, v, o, t, h, d**-0.5, d, block)
    return o
