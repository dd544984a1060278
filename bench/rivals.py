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


def torch_cross_entropy():
    return lambda logits, targets: F.cross_entropy(logits, targets, ignore_index=IGNORE).float()


def liger_cross_entropy():
    from liger_kernel.ops import LigerCrossEntropyFunction as function

    def cross_entropy(logits, targets):
        loss, *_ = function.apply(logits, targets, None, IGNORE)  # the gradient overwrites the logits
        return loss

    return cross_entropy


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


RIVALS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rmsnorm": {"F.rms_norm": torch_rmsnorm, "Liger": liger_rmsnorm},
    "attention": {
        "SDPA flash": partial(sdpa_through, "FLASH_ATTENTION"),
        "SDPA cuDNN": partial(sdpa_through, "CUDNN_ATTENTION"),
        "SDPA efficient": partial(sdpa_through, "EFFICIENT_ATTENTION"),
        "FlexAttention": flex_attention,
    },
    "cross_entropy": {"F.cross_entropy": torch_cross_entropy, "Liger": liger_cross_entropy},
    "linear_cross_entropy": {
        "F.linear_cross_entropy": torch_linear_cross_entropy,
        "Liger": liger_linear_cross_entropy,
    },
}
