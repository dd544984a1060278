"""Other implementations of our ops, each behind the signature of its op: what bench_kernels times beside ours.

`RIVALS[op][name]` imports what it needs and returns a function of the op's inputs, which the table of ops lists. It
raises ImportError or AttributeError where this machine or this torch does not have it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

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


RIVALS: dict[str, dict[str, Callable[[], Callable]]] = {
    "rmsnorm": {"F.rms_norm": torch_rmsnorm, "Liger": liger_rmsnorm, "QuACK": quack_rmsnorm},
    "rope": {"Liger": liger_rope, "QuACK": quack_rope},
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
