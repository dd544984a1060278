"""Other implementations of our ops, each behind the signature of its op: the benches time them beside ours.

`RIVALS[op][name]` imports what it needs and returns a function of the op's inputs. It raises ImportError or
AttributeError where this machine or this torch does not have it.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F

from kernels.attention import visible
from kernels.linear_cross_entropy import IGNORE


def torch_rmsnorm():
    def rmsnorm(x, gain, residual):
        residual = x + residual
        return F.rms_norm(residual, gain.shape, gain, 1e-6), residual

    return rmsnorm


def liger_rmsnorm():
    from liger_kernel.ops import LigerFusedAddRMSNormFunction as fused

    return lambda x, gain, residual: fused.apply(x, residual, gain, 1e-6, 0.0, "gemma")  # like ours: all in float32


def torch_cross_entropy():
    return lambda logits, targets: F.cross_entropy(logits, targets, ignore_index=IGNORE).float()


def liger_cross_entropy():
    from liger_kernel.ops import LigerCrossEntropyFunction as function

    return lambda logits, targets: function.apply(logits, targets, None, IGNORE)[0]  # overwrites the logits


def torch_linear_cross_entropy():
    function, options = F.linear_cross_entropy, torch.nn.modules.LinearCrossEntropyOptions()
    return lambda x, head_weight, targets: function(x, head_weight, targets, ignore_index=IGNORE, options=options)


def liger_linear_cross_entropy():
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as function

    # bias, class weights, ignored target, z-loss, smoothing, reduction, softcap, return_z_loss, dtype of the sums
    options = None, None, IGNORE, 0.0, 0.0, "mean", None, False, torch.float32
    return lambda x, head_weight, targets: function.apply(x, head_weight, targets, *options)[0]


def sdpa_through(backend: str):
    """SDPA by one backend, with a mask, made once, where its causal one is not enough."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen, kept = getattr(SDPBackend, backend), cache(visible)

    def attention(q, k, v, window=0, documents=None):
        mask = None
        if window or documents is not None:
            mask = kept(q.shape[1], k.shape[1], True, window, documents, q.device)
            mask = mask if mask.ndim == 2 else mask[:, None]
        options = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": q.shape[2] != k.shape[2]}
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)

    return attention


def flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    @cache
    def block_mask(b, t, window, documents, device):
        def seen(b, h, query, key):
            near = (key <= query) & (key > query - window) if window else key <= query
            return near if documents is None else near & (key >= documents[0, b, query])

        return create_block_mask(seen, None if documents is None else b, None, t, t, device=device)

    def attention(q, k, v, window=0, documents=None):
        mask = block_mask(*q.shape[:2], window, documents, q.device)
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return attention


RIVALS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rmsnorm": {"F.rms_norm": torch_rmsnorm, "Liger": liger_rmsnorm},
    "attention": {
        "SDPA flash": partial(sdpa_through, "FLASH_ATTENTION"),
        "SDPA cuDNN": partial(sdpa_through, "CUDNN_ATTENTION"),
        "FlexAttention": flex_attention,
    },
    "cross_entropy": {"F.cross_entropy": torch_cross_entropy, "Liger": liger_cross_entropy},
    "linear_cross_entropy": {
        "F.linear_cross_entropy": torch_linear_cross_entropy,
        "Liger": liger_linear_cross_entropy,
    },
}
