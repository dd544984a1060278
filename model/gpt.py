"""A decoder-only transformer like Llama and Qwen3, built on bound kernels.

Default: pre-norm RMSNorm, RoPE, QK-norm, SwiGLU, a tied head, no biases. Options: grouped-query attention,
sliding windows by layer, document masking, dropout, activation recomputation. For ablations: other norms, norm places,
position encodings, activations and initialisations, and biases. Generation uses a KV cache.

Shapes: B batch, T query tokens, S key tokens (cached ones included), H query heads, KV key/value heads, D head
dimension, C = d_model, F = d_ff, V vocabulary.

Parameter names, shapes and layouts do not depend on the kernels, so a checkpoint loads under any kernel choice.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import Kernels
from kernels.attention import choice, document_ranges
from kernels.rope import rope_tables
from model.tensors import whole
from runtime.config import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of the model. `resolved` replaces each 0 that stands for a derived value."""

    n_layer: Annotated[int, "[1, 10000]", "layers"] = 12
    n_head: Annotated[int, "[1, inf)", "query heads"] = 12
    n_kv_head: Annotated[int, "[0, inf)", "key/value heads (0: n_head)"] = 0
    head_dim: Annotated[int, "[0, inf)", "head dimension, even (0: d_model / n_head)"] = 0
    d_model: Annotated[int, "[1, inf)", "width of the residual stream"] = 768
    d_ff: Annotated[
        int,
        "[0, inf)",
        "hidden width of the feed-forward layer (0: 8/3 d_model, rounded up to a multiple of 64, and 1.5 times that "
        "without a gate, for the same number of weights)",
    ] = 0
    seq_len: Annotated[int, "[1, inf)", "context length in tokens"] = 1024
    vocab_size: Annotated[int, "[0, inf)", "rows of the embedding (0: the tokenizer's vocabulary size)"] = 0
    tied: Annotated[bool, "tie the head's weight to the embedding"] = True
    qk_norm: Annotated[bool, "RMSNorm on each head of q and k"] = True
    rope_theta: Annotated[float, "(0, inf)", "base of the RoPE frequencies"] = 10000.0
    norm_eps: Annotated[float, "(0, inf)", "epsilon of every norm"] = 1e-6
    window: Annotated[
        str,
        "sliding window by layer, in keys: 256; or a pattern of S (sliding) and L (full), repeated: SSSL:256, or SSSL "
        "for half of seq_len (empty: full attention)",
    ] = ""
    separator: Annotated[
        int, "[-1, inf)", "id of the token that starts a document, for document masking (-1: off; set by data.packing)"
    ] = -1
    dropout: Annotated[float, "[0, 1)", "dropout on the embedding, the attention weights and the sub-layer outputs"] = (
        0.0
    )
    norm: Annotated[Literal["rms", "layer", "none"], "RMSNorm, LayerNorm or none; QK-norm is separate"] = "rms"
    norm_place: Annotated[
        Literal["pre", "post", "res-post"], "x + f(norm(x)), norm(x + f(x)) or x + norm(f(x)); all have a final norm"
    ] = "pre"
    position: Annotated[
        Literal["rope", "rope-interleaved", "learned", "sinusoidal", "alibi", "none"],
        "RoPE that pairs halves or neighbours, a learned or sinusoidal position embedding, ALiBi, or none",
    ] = "rope"
    activation: Annotated[
        Literal["swiglu", "silu", "gelu", "relu", "relu2"],
        "activation of the feed-forward layer; only swiglu has a gate",
    ] = "swiglu"
    bias: Annotated[bool, "biases in the blocks' linear layers"] = False
    init: Annotated[
        Literal["fan-in", "xavier", "look-back"],
        "std of weights. fan-in: 1/sqrt(in), over sqrt(2 n_layer) for residual projections; xavier: sqrt(2/(in+out)), "
        "truncated at three std; look-back: fan-in, with previous-token heads in the first layer",
    ] = "fan-in"
    embedding_std: Annotated[
        float, "[0, inf)", "std of the embedding and of a head tied to it (0: 0.25/sqrt(d_model))"
    ] = 0.0
    recompute: Annotated[
        float, "[0, 1]", "fraction of layers that recompute activations in the backward pass, to save memory"
    ] = 0.0
    logit_softcap: Annotated[
        float, "[0, inf)", "bound on the logits, softcap * tanh(logits / softcap), in generation too (0: none)"
    ] = 0.0
    label_smoothing: Annotated[
        float, "[0, 1)", "target probability spread over the vocabulary; in the training loss only, as z_loss is"
    ] = 0.0
    z_loss: Annotated[float, "[0, inf)", "weight of logsumexp(logits)^2 in the training loss, such as 1e-4"] = 0.0

    def __post_init__(self):
        if not self.head_dim and self.d_model % self.n_head:
            raise ConfigError(
                f"d_model {self.d_model} must be a multiple of n_head {self.n_head}, or head_dim must be given"
            )
        if (self.head_dim or self.d_model // self.n_head) % 2:
            raise ConfigError(f"head_dim {self.head_dim or self.d_model // self.n_head} must be even, for RoPE")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.norm == "none" and self.norm_place != "pre":
            raise ConfigError(f"norm_place {self.norm_place} needs a norm: norm must be rms or layer, not none")
        needed = {"position": "rope", "norm_place": "pre", "qk_norm": True} if self.init == "look-back" else {}
        for knob, value in needed.items():
            if getattr(self, knob) != value:
                raise ConfigError(f"init look-back needs {knob} {value}, not {getattr(self, knob)}; or use init fan-in")
        self._window_pattern()  # raises if `window` is malformed

    @property
    def trains_on_validation_loss(self) -> bool:
        """Whether the loss in training mode is the one in evaluation mode."""
        return not (self.dropout or self.label_smoothing or self.z_loss)

    @property
    def windows(self) -> tuple[int, ...]:
        """Window size of each layer in keys, the query's own position included; 0 for full attention."""
        pattern = self._window_pattern()
        return tuple(pattern[layer % len(pattern)] for layer in range(self.n_layer))

    def _window_pattern(self) -> list[int]:
        """The window sizes that layers repeat. Raises `ConfigError` if `window` is malformed."""
        match = re.fullmatch(r"([SL]+)(?::([1-9][0-9]*))?|([1-9][0-9]*)?", self.window)
        if match is None:
            raise ConfigError(
                f"window must be a number of keys, such as 256, or S and L by layer, such as SSSL or SSSL:256, not "
                f"{self.window!r}"
            )
        pattern, pattern_size, uniform_size = match.groups()
        size = int(pattern_size or uniform_size or self.seq_len // 2)
        sizes = {"S": size if size < self.seq_len else 0, "L": 0}
        return [sizes[letter] for letter in pattern or ("S" if uniform_size else "L")]

    def resolved(self, vocab_size: int, separator: int = -1) -> "ModelConfig":
        """Replace every 0 by the value it stands for.

        `vocab_size` is the tokenizer's; `separator` comes from the data's packing. Raises `ConfigError` if the
        tokenizer has more ids than the embedding has rows."""
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size {self.vocab_size} is less than the tokenizer's {vocab_size}")
        d_ff = 64 * -(-self.d_model // 24)  # 8/3 d_model, rounded up to a multiple of 64
        derived = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.d_model // self.n_head,
            "d_ff": self.d_ff or (d_ff if self.activation == "swiglu" else d_ff * 3 // 2),
            "vocab_size": self.vocab_size or vocab_size,
            "separator": separator if separator >= 0 else self.separator,
        }
        return replace(self, **derived)

    def n_parameters(self) -> int:
        """Number of parameters of the resolved config, as `GPT.n_parameters` counts them, for any size at once."""
        width, heads, kv_heads = self.d_model, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        gated, norm = self.activation == "swiglu", {"rms": 1, "layer": 2, "none": 0}[self.norm] * width
        projections = (  # (in, out) of a layer's matrices
            (width, heads + 2 * kv_heads), (heads, width), (width, (1 + gated) * self.d_ff), (self.d_ff, width),
        )  # fmt: skip
        layer = sum((n_in + self.bias) * n_out for n_in, n_out in projections)
        layer += 2 * norm + 2 * self.head_dim * self.qk_norm
        embeddings = (2 - self.tied) * self.vocab_size + (self.position == "learned") * self.seq_len
        return self.n_layer * layer + norm + embeddings * width


class KVCache:
    """Keys and values of the tokens that a batch has processed, at most `seq_len`; for inference only.

    `GPT.hidden` takes the ids that follow and appends their keys and values. `padding` `[B]`, on the model's device, is
    the number of left padding tokens of each row. Padding is masked as a document of its own, so rows of different
    lengths do not affect each other.
    """

    def __init__(self, config: ModelConfig, padding: Tensor):
        self.max_length, self.length = config.seq_len, 0
        # [2, B, KV, seq_len, D] in the dtype of the first keys. In this order a batched product with the keys of all
        # heads needs no copy of them.
        self.layers: dict[int, Tensor] = {}
        self.document_starts = None  # bool [B, seq_len]: True where a document starts
        if config.separator >= 0 or padding.any():
            self.document_starts = torch.arange(self.max_length, device=padding.device) == padding[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values `[B, T, KV, D]`. Returns views of all of them, `[B, S, KV, D]`."""
        if layer not in self.layers:
            self.layers[layer] = k.new_zeros(2, len(k), k.shape[2], self.max_length, k.shape[3])
        kv = self.layers[layer].transpose(2, 3)[:, :, : self.length + k.shape[1]]
        kv[0, :, self.length :], kv[1, :, self.length :] = k, v
        return kv[0], kv[1]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows of the batch."""
        self.layers = {layer: kv[:, rows] for layer, kv in self.layers.items()}
        self.document_starts = None if self.document_starts is None else self.document_starts[rows]


class StaticKVCache:
    """A `KVCache` that runs in a CUDA graph: its tensors keep their addresses and shapes, and its length is a tensor.

    It takes one token per row. Attention covers all `seq_len` keys, of which each row sees only its own.
    """

    def __init__(self, cache: KVCache, config: ModelConfig):
        """Take over the buffers of `cache`."""
        self.config, self.layers = config, cache.layers
        first = next(iter(cache.layers.values()))
        self.length = torch.zeros(1, dtype=torch.int64, device=first.device)
        self.starts = self.length.repeat(first.shape[1], 1)  # [B, 1], of the current documents
        self.load(cache)

    def load(self, cache: KVCache) -> None:
        """Copy the contents of `cache`, which has as many rows."""
        for layer, kv in self.layers.items():
            kv.copy_(cache.layers[layer])
        self.length.fill_(cache.length)
        self.starts.zero_()
        if cache.document_starts is not None:
            places = torch.arange(cache.length, device=self.starts.device)
            self.starts.copy_((places * cache.document_starts[:, : cache.length]).amax(1, keepdim=True))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values `[B, 1, KV, D]`. Returns the whole buffers `[B, seq_len, KV, D]`."""
        self.layers[layer].index_copy_(3, self.length, torch.stack((k, v)).transpose(2, 3))
        k, v = self.layers[layer].transpose(2, 3)
        return k, v

    def visible(self, ids: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Positions `[B, 1]` of the next `ids` `[B, 1]`, and the keys that they see with each window size, as the
        argument `documents` of attention. Only its last column, of the query, counts."""
        if self.config.separator >= 0:
            self.starts.copy_(torch.where(ids == self.config.separator, self.length, self.starts))
        end, ranges = self.length + 1, {}
        for window in set(self.config.windows):
            start = torch.maximum(self.starts, end - window) if window else self.starts
            bounds = torch.stack((start, end.expand_as(start))).to(torch.int32)
            ranges[window] = bounds.expand(-1, -1, self.config.seq_len).contiguous()
        return self.length - self.starts, ranges


class Context(NamedTuple):
    """Inputs that all layers of one forward pass share."""

    cos: Tensor  # RoPE table [>= T, D / 2]; `sin` has the same shape
    sin: Tensor
    positions: Tensor | None  # [B, T], rows of the tables; None for the first T rows
    documents: Tensor | None  # [2, B, S] of `document_ranges`; None for no document masking
    cache: KVCache | StaticKVCache | None
    visible: dict[int, Tensor] | None = None  # of a `StaticKVCache`, in place of the causal mask, windows and documents


class CodesTarget(NamedTuple):
    """What a kernel needs to quantise its result for the linear layer that takes it. Both are float32 `[1]`."""

    scale: Tensor
    amax: Tensor | None  # raised to the largest magnitude; None while evaluating


class GradientTarget(NamedTuple):
    """The same for the gradient of a linear layer's result. Its codes come back as the gradient of `codes`, which is
    empty and of the result's shape."""

    codes: Tensor
    scale: Tensor
    amax: Tensor


class LowLayer(Protocol):
    """What `model.precision.lower` puts in place of a linear layer's product. The head's has `cross_entropy` too."""

    def __call__(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """The product of x, whose `codes` are given if it was quantised where it was computed."""

    def target(self) -> CodesTarget | None:
        """For whoever computes x and can quantise it too; None if the layer quantises x itself."""

    def with_gradient_target(self, x: Tensor, codes: Tensor | None) -> tuple[Tensor, GradientTarget]:
        """The product, and a target for whatever takes it; for layers that have a `target`, in training."""

    def refresh(self) -> None:
        """Quantise the weight, which has changed."""


class Linear(nn.Linear):
    """`nn.Linear` that multiplies by `copy`, a half-precision copy of its weight, if `GPT.keep_copies` made one; or as
    `low` does, if `model.precision.lower` gave it that."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("copy", None, persistent=False)
        self.low: LowLayer | None = None

    def target(self) -> CodesTarget | None:
        """As `LowLayer.target`; None without low precision."""
        return None if self.low is None else self.low.target()

    def with_gradient_target(self, x: Tensor, codes: Tensor | None) -> tuple[Tensor, GradientTarget | tuple[()]]:
        """As `LowLayer.with_gradient_target`; an empty target without low precision and while evaluating."""
        if self.target() is None or not torch.is_grad_enabled():
            return self(x, codes), ()
        return self.low.with_gradient_target(x, codes)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """`codes` of x for the layer's `target`, or None."""
        if self.low is not None:
            return self.low(x, codes)
        if self.copy is None:
            return super().forward(x)
        return _HalfLinear.apply(x, self.weight, self.bias, self.copy)


class _HalfLinear(torch.autograd.Function):
    """x @ copy.T + bias. The gradient of `weight` has half-precision inputs, and the weight's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, copy):
        cast = x.to(copy.dtype)
        ctx.save_for_backward(cast, copy)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return F.linear(cast, copy, None if bias is None else bias.to(copy.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, copy), (x_dtype, weight_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        dy_2d = dy.flatten(0, -2)
        dw = matmul(dy_2d.t(), x.flatten(0, -2), weight_dtype)
        db = None if bias_dtype is None else dy_2d.sum(0, dtype=torch.float32).to(bias_dtype)
        return (dy @ copy).to(x_dtype), dw, db, None


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`. A GPU accumulates in `dtype` too, so the result is not rounded to half precision first."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a @ b).to(dtype)


class Attention(nn.Module):
    """Causal self-attention with a packed q, k, v projection, C to (H + 2 KV) D."""

    def __init__(self, config: ModelConfig, kernels: Kernels, layer: int):
        super().__init__()
        self.config, self.kernels, self.layer = config, kernels, layer
        self.window = config.windows[layer]
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = Linear(config.d_model, heads * config.head_dim, bias=config.bias)
        self.out = Linear(config.n_head * config.head_dim, config.d_model, bias=config.bias)
        self.q_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.interleaved = config.position == "rope-interleaved"
        self.register_buffer("slopes", None, persistent=False)  # of ALiBi: set by GPT.init_weights

    def forward(self, x: Tensor, context: Context, codes: Tensor | None = None) -> Tensor:
        """Takes the normalised input `[B, T, C]`, and its codes for `qkv` if it has any; returns `[B, T, C]`."""
        c, (cos, sin, positions, documents, cache, visible) = self.config, context
        gains = self.q_gain, self.k_gain
        q, k, v = self.kernels.rope(
            self.qkv(x, codes), cos, sin, c.n_head, c.n_kv_head, *gains, c.norm_eps, positions, self.interleaved
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        dropout = c.dropout if self.training else 0.0
        mask = {"window": self.window, "documents": documents}
        if visible is not None:
            mask = {"causal": False, "documents": visible[self.window]}
        o = self.kernels.attention(q, k, v, dropout=dropout, slopes=self.slopes, **mask)
        return self.out(o.flatten(2))


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """ALiBi slopes 2^(-8/H), 2^(-16/H), ... 2^-8: float32 `[H]` (Press et al., "Train Short, Test Long", 2022)."""
    return torch.exp2(-8 / n_head * torch.arange(1, n_head + 1, device=device))


class FeedForward(nn.Module):
    """SwiGLU with a packed gate and up projection, C to 2 F; or another activation without a gate, C to F."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kernels, gated = kernels, config.activation == "swiglu"
        self.activation = ("silu" if gated else config.activation), gated
        self.gate_up = Linear(config.d_model, (1 + gated) * config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """Takes the normalised input `[B, T, C]`, and its codes for `gate_up` if it has any; returns `[B, T, C]`."""
        target = self.down.target()
        if target is None or self.kernels.swiglu_fp8 is None:
            return self.down(self.kernels.swiglu(self.gate_up(x, codes), *self.activation))
        x, gradient_target = self.gate_up.with_gradient_target(x, codes)
        return self.down(*self.kernels.swiglu_fp8(x, *self.activation, *target, *gradient_target))


class RMSNorm(nn.Module):
    """RMSNorm with a fused residual add. Returns (y, x + residual, codes), where y = norm(x + residual). The codes are
    of y for `target`, that of the linear layer which takes it; None without."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.eps, self.kernels = config.norm_eps, kernels
        self.gain = nn.Parameter(torch.ones(config.d_model))

    def forward(
        self, x: Tensor, residual: Tensor | None, target: CodesTarget | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if target is None or self.kernels.rmsnorm_fp8 is None:
            return *self.kernels.rmsnorm(x, self.gain, residual, self.eps), None
        return self.kernels.rmsnorm_fp8(x, self.gain, residual, self.eps, *target)


class LayerNorm(nn.Module):
    """LayerNorm with the interface of `RMSNorm`, without codes."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.eps = config.norm_eps
        self.gain = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model))

    def forward(
        self, x: Tensor, residual: Tensor | None, target: CodesTarget | None = None
    ) -> tuple[Tensor, Tensor, None]:
        residual = x if residual is None else residual + x
        return F.layer_norm(residual, self.gain.shape, self.gain, self.bias, self.eps).to(x.dtype), residual, None


class NoNorm(nn.Module):
    """The residual add alone, with the interface of `RMSNorm`, without codes."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()

    def forward(
        self, x: Tensor, residual: Tensor | None, target: CodesTarget | None = None
    ) -> tuple[Tensor, Tensor, None]:
        residual = x if residual is None else residual + x
        return residual, residual, None


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "none": NoNorm}


class Block(nn.Module):
    """A pre-norm layer. Takes and returns (x, residual): the last sub-layer's output `[B, T, C]`, and the residual
    stream before it is added. The next norm fuses that add."""

    def __init__(self, config: ModelConfig, kernels: Kernels, layer: int):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config, kernels)
        self.attention = Attention(config, kernels, layer)
        self.feed_forward_norm = NORMS[config.norm](config, kernels)
        self.feed_forward = FeedForward(config, kernels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        h, residual, codes = self.attention_norm(x, residual, self.attention.qkv.target())
        x = self.dropout(self.attention(h, context, codes))
        h, residual, codes = self.feed_forward_norm(x, residual, self.feed_forward.gate_up.target())
        return self.dropout(self.feed_forward(h, codes)), residual


class PostNormBlock(Block):
    """A post-norm layer, norm(x + f(x)). The residual stream keeps its dtype in x; `residual` is None."""

    def forward(self, x: Tensor, residual: None, context: Context) -> tuple[Tensor, None]:
        x = self.attention_norm(self.dropout(self.attention(x, context)).to(x.dtype), x)[0]
        x = self.feed_forward_norm(self.dropout(self.feed_forward(x)).to(x.dtype), x)[0]
        return x, None


class ResPostNormBlock(Block):
    """A res-post-norm layer, x + norm(f(x)) (Liu et al., "Swin Transformer V2", 2022). Its residual is None."""

    def forward(self, x: Tensor, residual: None, context: Context) -> tuple[Tensor, None]:
        x = x + self.dropout(self.attention_norm(self.attention(x, context), None)[0])
        x = x + self.dropout(self.feed_forward_norm(self.feed_forward(x), None)[0])
        return x, None


BLOCKS = {"pre": Block, "post": PostNormBlock, "res-post": ResPostNormBlock}


def sinusoidal(config: ModelConfig, std: float, device: torch.device) -> Tensor:
    """Sinusoidal position embedding `[seq_len, C]` (Vaswani et al., 2017, section 3.5).

    It is scaled by the token embedding's `std`. The paper scales the embedding up instead, to the same ratio."""
    cos, sin = rope_tables(config.seq_len, config.d_model + config.d_model % 2, device=device)
    return std * torch.stack((sin, cos), -1).flatten(1)[:, : config.d_model]


def fan_in(name: str, weight: Tensor, config: ModelConfig) -> None:
    """Initialise `weight` with std 1/sqrt(in).

    The two residual projections of a layer are scaled by 1/sqrt(2 n_layer), so that the residual stream's variance does
    not grow with depth (GPT-2). The head is scaled by s = 0.25: its logits then have std s, which adds only s^2/2 nats
    to the ideal first loss ln V."""
    std = weight.shape[1] ** -0.5
    if name.endswith(("out.weight", "down.weight")):
        std *= (2 * config.n_layer) ** -0.5
    nn.init.normal_(weight, std=0.25 * std if name == "head.weight" else std)


def xavier(name: str, weight: Tensor, config: ModelConfig) -> None:
    """Initialise `weight` with std sqrt(2 / (in + out)), truncated at three std (Glorot and Bengio, 2010; Stanford's
    CS336). The parts of a packed projection count as separate matrices."""
    packed = {
        "qkv.weight": [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)],
        "gate_up.weight": config.d_ff,
    }
    for part in weight.split(next((rows for key, rows in packed.items() if name.endswith(key)), len(weight))):
        std = (2 / sum(part.shape)) ** 0.5
        nn.init.trunc_normal_(part, std=std, a=-3 * std, b=3 * std)


INITS = {"fan-in": fan_in, "xavier": xavier, "look-back": fan_in}


def look_back(model: "GPT", std: float) -> None:
    """Initialise the heads of the first layer to attend to the previous token.

    Induction heads, which copy from the context (Olsson et al., 2022), need a previous-token head in an earlier layer.
    Neither helps without the other, so training finds the pair late.

    A constant vector of three times the embedding's `std` is added to every row of the embedding; the softmax of a tied
    head is invariant to it. The layer's q and k read only this vector. Both lie in the fastest quarter of RoPE's pairs,
    with k rotated by one extra position, so that q.k peaks at distance one. The gain of q makes the attention weight
    there exceed 0.9. Training is free to change all of it.
    """
    config, attention = model.config, model.blocks[0].attention
    shared = torch.randn(config.d_model, device=model.embedding.weight.device).sign()
    direction, half, n_fast = shared * config.d_model**-0.5, config.head_dim // 2, math.ceil(config.head_dim / 8)
    cos, sin = (table[1, :n_fast, None] for table in rope_tables(2, config.head_dim, config.rope_theta, shared.device))
    with whole(model.embedding.weight) as embedding:
        embedding.add_(3 * std * shared)
    with whole(attention.qkv.weight) as qkv:
        heads = qkv.unflatten(0, (-1, config.head_dim))
        q, k, _ = heads.split((config.n_head, config.n_kv_head, config.n_kv_head))
        nn.init.zeros_(q)
        nn.init.zeros_(k)
        q[:, :n_fast] = direction
        k[:, :n_fast], k[:, half : half + n_fast] = cos * direction, sin * direction
    with whole(attention.q_gain) as gain:
        nn.init.constant_(gain, 3.0)


def check_kernels(config: ModelConfig, kernels: Kernels) -> None:
    """Raise `KernelError` if a bound kernel lacks what the model needs."""
    if config.dropout:
        kernels.require("attention", "dropout")


class GPT(nn.Module):
    """The language model: token ids to the cross-entropy of the next tokens, or to logits.

    `residual` is the dtype of the residual stream; None (the default) is the embedding's.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels):
        """`config` must be resolved. Parameters are float32, on the default device. Raises `KernelError` if the config
        has dropout and the bound attention kernel does not."""
        super().__init__()
        self.residual: torch.dtype | None = None
        check_kernels(config, kernels)
        self.config, self.kernels = config, kernels
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        block = BLOCKS[config.norm_place]
        self.blocks = nn.ModuleList(block(config, kernels, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config, kernels)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        if config.position == "learned":
            self.position = nn.Parameter(torch.empty(config.seq_len, config.d_model))
        else:
            self.register_buffer("position", None, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill parameters and buffers: matrices by `config.init`, the token and position embeddings with their std,
        norm gains with 1, biases with 0.

        Of a sharded parameter the whole is drawn, one at a time, as one process draws it."""
        config, device = self.config, self.embedding.weight.device
        std = config.embedding_std or 0.25 * config.d_model**-0.5
        self.cos, self.sin = rope_tables(config.seq_len, config.head_dim, config.rope_theta, device)
        if not config.position.startswith("rope"):  # the identity rotation
            self.cos, self.sin = torch.ones_like(self.cos), torch.zeros_like(self.sin)
        if config.position == "sinusoidal":
            self.position = sinusoidal(config, std, device)
        for block in self.blocks:
            if config.position == "alibi":
                block.attention.slopes = alibi_slopes(config.n_head, device)
        for name, parameter in self.named_parameters():
            with whole(parameter) as weight:
                if name in ("embedding.weight", "position"):
                    nn.init.normal_(weight, std=std)
                elif weight.ndim == 2:
                    INITS[config.init](name, weight, config)
                elif name.endswith("gain"):
                    nn.init.ones_(weight)
                else:
                    nn.init.zeros_(weight)
        if config.init == "look-back":
            look_back(self, std)

    def hidden(self, ids: Tensor, cache: KVCache | StaticKVCache | None = None) -> Tensor:
        """Final hidden states `[B, T, C]`, normalised, of ids `[B, T]`. With a cache, the ids follow the cached tokens.

        Raises `ValueError` if cached and new tokens are more than `config.seq_len`."""
        context = self._context(ids, cache)
        x, residual = self.embedding(ids), None
        if self.residual is not None:
            x = x.to(self.residual)
        if self.position is not None:
            start = 0 if cache is None else cache.length
            positions = slice(start, start + ids.shape[1]) if context.positions is None else context.positions
            x = x + self.position[positions].to(x.dtype)
        x, n_recomputed = self.dropout(x), round(self.config.recompute * len(self.blocks))
        for layer, block in enumerate(self.blocks):
            if layer < n_recomputed:
                # Only dropout needs the RNG state; reading it is an error while a CUDA graph is captured.
                options = {"use_reentrant": False, "preserve_rng_state": bool(self.config.dropout)}
                x, residual = checkpoint(block, x, residual, context, **options)
            else:
                x, residual = block(x, residual, context)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x, residual)[0]

    def _context(self, ids: Tensor, cache: KVCache | StaticKVCache | None) -> Context:
        """Positions and document mask of `ids` `[B, T]` after the cached tokens."""
        if isinstance(cache, StaticKVCache):
            positions, visible = cache.visible(ids)
            return Context(self.cos, self.sin, positions, None, cache, visible)
        separator, start = self.config.separator, 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.config.seq_len:
            raise ValueError(f"{end} tokens are more than the model's seq_len {self.config.seq_len}")
        document_starts = None
        if cache is None and separator >= 0:
            document_starts = ids == separator
        elif cache is not None and cache.document_starts is not None:
            document_starts = cache.document_starts[:, :end]
            document_starts[:, start:] |= ids == separator
        if document_starts is None:
            return Context(self.cos[start:end], self.sin[start:end], None, None, cache)
        documents = document_ranges(document_starts.cumsum(1))
        positions = torch.arange(start, end, device=ids.device) - documents[0, :, start:]
        return Context(self.cos, self.sin, positions, documents, cache)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean", scale: Tensor | None = None) -> Tensor:
        """Cross-entropy (nats) of `targets` `[B, T]` given `ids` `[B, T]`, times the scalar tensor `scale`. Targets of
        `IGNORE` do not count. Label smoothing and z-loss are for training mode; the softcap is part of the model."""
        hidden, head, c = self.hidden(ids), self.head, self.config
        smoothing, z_loss = (c.label_smoothing, c.z_loss) if self.training else (0.0, 0.0)
        options = targets, reduction, smoothing, z_loss, c.logit_softcap
        if head.low is not None:
            return head.low.cross_entropy(hidden, *options, scale=scale)
        loss = self.kernels.linear_cross_entropy
        return loss(hidden, head.weight, *options, scale=scale, head_cast=head.copy)

    def logits(self, ids: Tensor, cache: KVCache | StaticKVCache | None = None) -> Tensor:
        """Next-token logits, float32 `[B, V]`, after the last of ids `[B, T]`; `cache` as in `hidden`."""
        return self.project(self.hidden(ids, cache)[:, -1])

    def project(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32 `[..., V]`, of final hidden states `[..., C]`."""
        logits = self.head(hidden)[..., : self.config.vocab_size].float()
        softcap = self.config.logit_softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def keep_copies(self, dtype: torch.dtype) -> None:
        """Keep a copy in `dtype` of the weight of every linear layer, so that the forward pass casts none.

        Optimizers and `load_state_dict` update the copies with the weights. The head's copy is padded with zero rows to
        a multiple of 64, for which GEMMs on tensor cores are faster."""
        for module in self.modules():
            if isinstance(module, Linear):
                rows = 64 * math.ceil(len(module.weight) / 64) if module is self.head else len(module.weight)
                module.copy = module.weight.new_zeros(rows, module.in_features, dtype=dtype)
        self.refresh_copies()

    def copies(self) -> dict[Tensor, Tensor]:
        """The half-precision copies by parameter, without the head's padding rows."""
        linears = [module for module in self.modules() if isinstance(module, Linear) and module.copy is not None]
        return {module.weight: module.copy[: len(module.weight)] for module in linears}

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Copy the current weights to their half-precision copies, and to what low precision keeps of them."""
        for weight, copy in self.copies().items():
            copy.copy_(weight)
        for module in self.modules():
            if isinstance(module, Linear) and module.low is not None:
                module.low.refresh()

    def load_state_dict(self, *args, **options):
        """`nn.Module.load_state_dict`, which also updates the half-precision copies."""
        result = super().load_state_dict(*args, **options)
        self.refresh_copies()
        return result

    def attention_choice(self, half: bool) -> str:
        """Implementations that `auto` attention trains with on a GPU, in half precision or fp32, and the reasons."""
        c = self.config
        options = {"documents": c.separator >= 0 or None, "dropout": c.dropout, "slopes": c.position == "alibi" or None}
        sizes = c.seq_len, c.seq_len, c.head_dim
        chosen = (choice(*sizes, True, half, window=window, **options) for window in c.windows)
        return ", ".join(f"{name} for {why}" for name, why in dict.fromkeys(chosen))

    def attention_notes(self, half: bool) -> list[str]:
        """A line about the choice of attention, if that is left to `auto`."""
        is_auto = self.kernels.names["attention"] == "auto"
        return [f"attention auto: {self.attention_choice(half)}"] if is_auto else []

    def n_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matrix weight (head included, embedding lookup not), and in each layer 12 H D
        per visible key.

        A token sees T/2 keys on average, or W - W^2 / 2T with a window W. Document masking is not subtracted."""
        c = self.config
        matrices = sum(p.numel() for b in self.blocks for p in b.parameters() if p.ndim == 2)
        windows = (window or c.seq_len for window in c.windows)
        visible = sum(w * (2 * c.seq_len - w) for w in windows)  # mean visible keys, summed over layers, times 2 T
        return 6 * (matrices + self.head.weight.numel()) + 6 * c.n_head * c.head_dim * visible // c.seq_len
