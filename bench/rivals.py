"""Other implementations of our ops, each behind the signature of its op: what the benches time beside ours.

`RIVALS[op][name]` imports what it needs and returns a function of the op's inputs, which the table of ops lists. It
raises ImportError or AttributeError where this machine or this torch does not have it.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import visible
from kernels.linear_cross_entropy import IGNORE


def torch_rmsnorm():
    def rmsnorm(x, gain, residual):
        stream = x + residual
        return F.rms_norm(stream, gain.shape, gain, 1e-6), stream

    return rmsnorm


def liger_rmsnorm():
    from liger_kernel.ops import LigerFusedAddRMSNormFunction as fused

    return lambda x, gain, residual: fused.apply(x, residual, gain, 1e-6, 0.0, "gemma")  # as we do: all in float32


def quack_rmsnorm():
    from quack import rmsnorm

    return lambda x, gain, residual: rmsnorm(x, gain, residual=residual, prenorm=True)


def _with_qk_norm(rotate: Callable) -> Callable:
    """`rotate(q, k, cos, sin)` takes and returns `[B, T, H, D]`; nobody else norms in the same kernel."""

    def rope(qkv, cos, sin, n_head, n_kv_head, q_gain, k_gain):
        heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
        q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=-2)
        q, k = F.rms_norm(q, q_gain.shape, q_gain, 1e-6), F.rms_norm(k, k_gain.shape, k_gain, 1e-6)
        return *rotate(q, k, cos, sin), v

    return rope


def liger_rope():
    from liger_kernel.ops import LigerRopeFunction

    def rotate(q, k, cos, sin):
        cos, sin = (torch.cat((table, table), -1)[None] for table in (cos, sin))
        return (x.transpose(1, 2) for x in LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin))

    return _with_qk_norm(rotate)


def quack_rope():
    from quack.rotary import apply_rotary_emb

    return _with_qk_norm(lambda q, k, cos, sin: (apply_rotary_emb(x, cos, sin) for x in (q, k)))


def liger_swiglu():
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction as fused

    return lambda x: fused.apply(x)


def torch_cross_entropy():
    return lambda logits, targets: F.cross_entropy(logits, targets, ignore_index=IGNORE).float()


def liger_cross_entropy():
    from liger_kernel.ops import LigerCrossEntropyFunction as function

    def cross_entropy(logits, targets):
        loss, *_ = function.apply(logits, targets, None, IGNORE)  # the gradient overwrites the logits
        return loss

    return cross_entropy


def quack_cross_entropy():
    from quack import cross_entropy

    return lambda logits, targets: cross_entropy(logits, targets, ignore_index=IGNORE)


def torch_linear_cross_entropy():
    function, options = F.linear_cross_entropy, torch.nn.modules.LinearCrossEntropyOptions()
    return lambda x, head_weight, targets: function(x, head_weight, targets, ignore_index=IGNORE, options=options)


def liger_linear_cross_entropy():
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as function

    def linear_cross_entropy(x, head_weight, targets):
        bias = class_weights = softcap = None
        smoothing, z_loss, return_z_loss, sum_in = 0.0, 0.0, False, torch.float32
        options = bias, class_weights, IGNORE, z_loss, smoothing, "mean", softcap, return_z_loss, sum_in
        return function.apply(x, head_weight, targets, *options)[0]

    return linear_cross_entropy


def quack_linear_cross_entropy():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

    return lambda x, head_weight, targets: function(x, head_weight, targets, ignore_index=IGNORE)


def sdpa_through(backend: str):
    """SDPA by the one backend, given a mask, made once, where its own causal one is not enough."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen, kept = getattr(SDPBackend, backend), cache(visible)

    def attention(q, k, v, window=0, documents=None):
        mask = None
        if window or documents is not None:
            mask = kept(q.shape[1], k.shape[1], True, window, documents, q.device)
            mask = mask if mask.ndim == 2 else mask[:, None]
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[2] != k.shape[2]}

        def attend() -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)

        try:
            return attend().transpose(1, 2)
        except RuntimeError as error:
            raise RuntimeError(_refusal(attend) or str(error)) from error

    return attention


def _refusal(call: Callable[[], object]) -> str:
    """Why a backend of SDPA does not take a call: it warns of that, and of each backend that is switched off."""
    with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError):
        warnings.simplefilter("always")
        call()
    texts = (str(warning.message).partition(" (Triggered")[0] for warning in said)
    return " ".join(text for text in texts if not text.endswith(("because:", "disabled.")))


def flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @cache
    def block_mask(b: int, t: int, window: int, documents: Tensor | None, device: torch.device):
        def seen(b, h, query, key):
            near = key <= query
            if window:
                near = near & (key > query - window)
            return near if documents is None else near & (key >= documents[0, b, query])

        return create_block_mask(seen, None if documents is None else b, None, t, t, device=device)

    def attention(q, k, v, window=0, documents=None):
        mask = block_mask(*q.shape[:2], window, documents, q.device)
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return attention


def flash_attention_2():
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _flash_attention(flash_attn_func, flash_attn_varlen_func)


def flash_attention_3():
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _flash_attention(flash_attn_func, flash_attn_varlen_func)


def _flash_attention(dense: Callable, packed: Callable) -> Callable:
    """Documents are sequences of their own, one after the other; where each begins is found once."""

    @cache
    def lengths(documents: Tensor) -> tuple[Tensor, Tensor, int, int]:
        starts, ends = documents
        begins = (starts == torch.arange(starts.shape[1], device=starts.device)).flatten().nonzero().flatten()
        offsets = F.pad(begins, (0, 1), value=starts.numel()).int()
        longest = int((ends - starts).max())
        return offsets, offsets, longest, longest

    def attention(q, k, v, window=0, documents=None):
        options = {"causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}
        if documents is None:
            out = dense(q, k, v, **options)
        else:
            out = packed(*(x.flatten(0, 1) for x in (q, k, v)), *lengths(documents), **options)
        out = out[0] if isinstance(out, tuple) else out  # some releases give the log-sum-exp too
        return out.view(q.shape)

    return attention


RIVALS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rmsnorm": {"F.rms_norm": torch_rmsnorm, "Liger": liger_rmsnorm, "QuACK": quack_rmsnorm},
    "rope": {"Liger": liger_rope, "QuACK": quack_rope},
    "attention": {
        "SDPA flash": partial(sdpa_through, "FLASH_ATTENTION"),
        "SDPA cuDNN": partial(sdpa_through, "CUDNN_ATTENTION"),
        "SDPA efficient": partial(sdpa_through, "EFFICIENT_ATTENTION"),
        "FlexAttention": flex_attention,
        "FlashAttention 2": flash_attention_2,
        "FlashAttention 3": flash_attention_3,
    },
    "swiglu": {"Liger": liger_swiglu},
    "cross_entropy": {
        "F.cross_entropy": torch_cross_entropy,
        "Liger": liger_cross_entropy,
        "QuACK": quack_cross_entropy,
    },
    "linear_cross_entropy": {
        "F.linear_cross_entropy": torch_linear_cross_entropy,
        "Liger": liger_linear_cross_entropy,
        "QuACK": quack_linear_cross_entropy,
    },
}
