"""Other implementations of our ops, timed beside ours.

`RIVALS[op][name]` imports what it needs and returns a function of the op's inputs. It raises ImportError or
AttributeError if this machine or this version of torch does not have it.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import visible
from kernels.formats import BlockScaled
from kernels.linear_cross_entropy import IGNORE

RIVALS: dict[str, dict[str, Callable[[], Callable]]] = {}


def rival(op: str, name: str, *needs: str) -> Callable[[Callable], Callable]:
    """Register a function that takes the objects it `needs`, each `package.module:name`, and the inputs of the op."""

    def load(path: str):
        module, _, attribute = path.partition(":")
        return getattr(import_module(module), attribute)

    def register(function: Callable) -> Callable:
        RIVALS.setdefault(op, {})[name] = lambda: partial(function, *map(load, needs))
        return function

    return register


@rival("rmsnorm", "F.rms_norm")
def torch_rmsnorm(x, gain, residual):
    stream = x + residual
    return F.rms_norm(stream, gain.shape, gain, 1e-6), stream


@rival("rmsnorm", "Liger", "liger_kernel.ops:LigerFusedAddRMSNormFunction")
def liger_rmsnorm(fused, x, gain, residual):
    return fused.apply(x, residual, gain, 1e-6, 0.0, "gemma")  # as ours: all in float32


@rival("rmsnorm", "QuACK", "quack:rmsnorm")
def quack_rmsnorm(rmsnorm, x, gain, residual):
    return rmsnorm(x, gain, residual=residual, prenorm=True)


def _heads(qkv: Tensor, n_head: int, n_kv_head: int, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[B, T, H, D]`, normed by torch: no rival norms in the kernel that rotates."""
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=-2)
    return F.rms_norm(q, q_gain.shape, q_gain, 1e-6), F.rms_norm(k, k_gain.shape, k_gain, 1e-6), v


@rival("rope", "Liger", "liger_kernel.ops:LigerRopeFunction")
def liger_rope(function, qkv, cos, sin, **heads):
    q, k, v = _heads(qkv, **heads)
    cos, sin = (torch.cat((table, table), -1)[None] for table in (cos, sin))
    q, k = (x.transpose(1, 2) for x in function.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    return q, k, v


@rival("rope", "QuACK", "quack.rotary:apply_rotary_emb")
def quack_rope(rotate, qkv, cos, sin, **heads):
    q, k, v = _heads(qkv, **heads)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


@rival("swiglu", "Liger", "liger_kernel.ops.swiglu:LigerFusedGateUpSiLUMulFunction")
def liger_swiglu(fused, x):
    return fused.apply(x)


@rival("cross_entropy", "F.cross_entropy")
def torch_cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, ignore_index=IGNORE).float()


@rival("cross_entropy", "Liger", "liger_kernel.ops:LigerCrossEntropyFunction")
def liger_cross_entropy(function, logits, targets):
    return function.apply(logits, targets, None, IGNORE)[0]  # the gradient overwrites the logits


@rival("cross_entropy", "QuACK", "quack:cross_entropy")
def quack_cross_entropy(function, logits, targets):
    return function(logits, targets, ignore_index=IGNORE)


def half_linear() -> Callable:
    """The product that FP8 stands in for, of values that were dequantised before."""

    @cache
    def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (codes.float() * scale).to(dtype)

    def linear(x, weight, scale, weight_scale, dtype, precise):
        return F.linear(dequantized(x, scale, dtype), dequantized(weight, weight_scale, dtype))

    return linear


def half_block_linear() -> Callable:
    """The product that MXFP8 and NVFP4 stand in for, likewise."""

    @cache
    def dequantized(codes: Tensor, block_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return BlockScaled(codes, block_scale, scale).dequantize().to(dtype)

    def linear(x, block_scale, scale, weight, weight_block_scale, weight_scale, dtype):
        dense = dequantized(weight, weight_block_scale, weight_scale, dtype)
        return F.linear(dequantized(x, block_scale, scale, dtype), dense)

    return linear


RIVALS["fp8_linear"] = {"F.linear": half_linear}
RIVALS["block_scaled_linear"] = {"F.linear": half_block_linear}
LINEAR = "linear_cross_entropy"


@rival(LINEAR, "F.linear_cross_entropy", f"torch.nn.functional:{LINEAR}", "torch.nn.modules:LinearCrossEntropyOptions")
def torch_linear_cross_entropy(function, options, x, head_weight, targets):
    return function(x, head_weight, targets, ignore_index=IGNORE, options=options())


@rival(LINEAR, "Liger", "liger_kernel.ops:LigerFusedLinearCrossEntropyFunction")
def liger_linear_cross_entropy(function, x, head_weight, targets):
    bias = class_weights = softcap = None
    smoothing, z_loss, return_z_loss, sum_in = 0.0, 0.0, False, torch.float32
    options = bias, class_weights, IGNORE, z_loss, smoothing, "mean", softcap, return_z_loss, sum_in
    return function.apply(x, head_weight, targets, *options)[0]


@rival(LINEAR, "QuACK", "quack.linear_cross_entropy:chunked_linear_cross_entropy")
def quack_linear_cross_entropy(function, x, head_weight, targets):
    return function(x, head_weight, targets, ignore_index=IGNORE)


def sdpa(backend: str) -> Callable:
    """SDPA with one backend, given a mask, which is kept, if its own causal one is not enough."""
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
    """Why a backend of SDPA refuses a call, from its warnings, without those about backends that are switched off."""
    with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError):
        warnings.simplefilter("always")
        call()
    texts = (str(warning.message).partition(" (Triggered")[0] for warning in said)
    return " ".join(text for text in texts if not text.endswith(("because:", "disabled.")))


def flex_attention() -> Callable:
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


def flash_attention(module: str) -> Callable:
    """FlashAttention by its module. It takes packed documents as sequences of their own."""
    library = import_module(module)
    dense, packed = library.flash_attn_func, library.flash_attn_varlen_func

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
        out = out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too
        return out.view(q.shape)

    return attention


RIVALS["attention"] = {
    "SDPA flash": partial(sdpa, "FLASH_ATTENTION"),
    "SDPA cuDNN": partial(sdpa, "CUDNN_ATTENTION"),
    "SDPA efficient": partial(sdpa, "EFFICIENT_ATTENTION"),
    "FlexAttention": flex_attention,
    "FlashAttention 2": partial(flash_attention, "flash_attn"),
    "FlashAttention 3": partial(flash_attention, "flash_attn_interface"),
}
