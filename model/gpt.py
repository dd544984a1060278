"""A decoder-only transformer in the manner of Llama and Qwen3, built on bound kernels.

Pre-norm RMSNorm, rotary positions, optional QK-norm, grouped-query attention, SwiGLU, tied or untied head, no biases.
Optional: windows, by layer; documents that do not see each other; dropout; layers whose activations are computed again.
For experiments: another norm, or at another place; other positions, activations and initial weights; biases.
Generation keeps keys and values in a cache.
Shapes: B batch, T sequence, S sequence with what is cached before it, H query heads, KV key/value heads, D head dim,
C = d_model, V vocabulary.

The kernels never show in the parameters: their names, shapes and layouts are the same whatever is bound, so that a
checkpoint trained with one choice loads under any other.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import Kernels
from kernels.attention import choice, document_ranges
from kernels.rope import rope_tables
from runtime.config import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. A 0 stands for a value derived from others; `resolved` fills it in."""

    n_layer: Annotated[int, "[1, inf)", "layers"] = 12
    n_head: Annotated[int, "[1, inf)", "query heads"] = 12
    n_kv_head: Annotated[int, "[0, inf)", "key and value heads (0: as many as query heads)"] = 0
    head_dim: Annotated[int, "[0, inf)", "width of a head, even (0: d_model / n_head)"] = 0
    d_model: Annotated[int, "[1, inf)", "width of the residual stream"] = 768
    d_ff: Annotated[
        int,
        "[0, inf)",
        "width of the feed-forward layer (0: 8/3 of d_model, rounded up to 64; without a gate 3/2 of that, for as many "
        "weights)",
    ] = 0
    seq_len: Annotated[int, "[1, inf)", "tokens in a sequence"] = 1024
    vocab_size: Annotated[int, "[0, inf)", "rows of the embedding (0: the tokenizer's vocabulary)"] = 0
    tied: Annotated[bool, "the head is the embedding"] = True
    qk_norm: Annotated[bool, "normalise each head of q and k"] = True
    rope_theta: Annotated[float, "(0, inf)", "base of the rotary frequencies"] = 10000.0
    norm_eps: Annotated[float, "(0, inf)", "added to the mean square in every norm"] = 1e-6
    window: Annotated[
        str,
        "keys that a query sees, by layer: 256; or a pattern of S (short) and L (all), repeated: SSSL:256, or SSSL for "
        "half of seq_len (nothing: all)",
    ] = ""
    separator: Annotated[
        int, "[-1, inf)", "id that begins a document, which then sees no other (-1: none; set by data.packing)"
    ] = -1
    dropout: Annotated[
        float, "[0, 1)", "share dropped in training of the embedding, attention's weights and what sub-layers say"
    ] = 0.0
    norm: Annotated[Literal["rms", "layer", "none"], "RMSNorm, LayerNorm or none; QK-norm is apart"] = "rms"
    norm_place: Annotated[
        Literal["pre", "post", "res-post"], "x + f(norm(x)), norm(x + f(x)) or x + norm(f(x)); each with a last norm"
    ] = "pre"
    position: Annotated[
        Literal["rope", "rope-interleaved", "learned", "sinusoidal", "alibi", "none"],
        "rotary, of halves or of neighbours; a table added to the embedding; or scores that fall with distance",
    ] = "rope"
    activation: Annotated[
        Literal["swiglu", "silu", "gelu", "relu", "relu2"], "of the feed-forward layer; all but swiglu without a gate"
    ] = "swiglu"
    bias: Annotated[bool, "biases in the blocks' projections"] = False
    init: Annotated[
        Literal["fan-in", "xavier", "look-back"],
        "standard deviation of weights: 1/sqrt(in), and less with depth where they write to the stream; or "
        "sqrt(2/(in+out)), cut off at three; look-back is fan-in but for heads of the first layer that attend to the "
        "token before",
    ] = "fan-in"
    embedding_std: Annotated[
        float, "[0, inf)", "standard deviation of the embedding, and of a head tied to it (0: 0.25/sqrt(d_model))"
    ] = 0.0
    recompute: Annotated[
        float, "[0, 1]", "share of the layers whose activations are computed again in the backward, to save memory"
    ] = 0.0

    def __post_init__(self):
        if not self.head_dim and self.d_model % self.n_head:
            raise ConfigError(
                f"d_model {self.d_model} must be a multiple of n_head {self.n_head}, or head_dim be given"
            )
        if (self.head_dim or self.d_model // self.n_head) % 2:
            raise ConfigError(f"head_dim {self.head_dim or self.d_model // self.n_head} must be even, for RoPE")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.norm == "none" and self.norm_place != "pre":
            raise ConfigError(f"norm_place {self.norm_place} takes a norm: norm must be rms or layer, not none")
        needed = {"position": "rope", "norm_place": "pre", "qk_norm": True} if self.init == "look-back" else {}
        for knob, value in needed.items():
            if getattr(self, knob) != value:
                raise ConfigError(f"init look-back takes {knob} {value}, not {getattr(self, knob)}: give init fan-in")
        _ = self.windows  # which raises where it cannot be read

    @property
    def windows(self) -> tuple[int, ...]:
        """How many keys a query sees at most, its own the last of them, in each layer; 0 for all."""
        match = re.fullmatch(r"([SL]+)(?::([1-9][0-9]*))?|([1-9][0-9]*)?", self.window)
        if match is None:
            raise ConfigError(
                f"window must be a number of keys, such as 256, or S and L by layer, such as SSSL or SSSL:256, not "
                f"{self.window!r}"
            )
        pattern, beside, alone = match.groups()
        size = int(beside or alone or self.seq_len // 2)
        sizes = {"S": size if size < self.seq_len else 0, "L": 0}
        pattern = pattern or ("S" if alone else "L")
        return tuple(sizes[pattern[layer % len(pattern)]] for layer in range(self.n_layer))

    def resolved(self, vocab_size: int, separator: int = -1) -> "ModelConfig":
        """The same with every 0 replaced; `vocab_size` is the tokenizer's, and `separator` what the packing of the data
        makes of it. Raises `ConfigError` when the vocabulary is larger than the embedding."""
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size {self.vocab_size} is less than the tokenizer's {vocab_size}")
        d_ff = 64 * math.ceil(self.d_model * 8 / 3 / 64)
        derived = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.d_model // self.n_head,
            "d_ff": self.d_ff or (d_ff if self.activation == "swiglu" else d_ff * 3 // 2),
            "vocab_size": self.vocab_size or vocab_size,
            "separator": separator if separator >= 0 else self.separator,
        }
        return replace(self, **derived)


class Cache:
    """Keys and values of the tokens that a batch has so far, at most `seq_len` of them: `GPT.hidden` takes those that
    follow, and adds theirs. Without gradients.

    `padding` `[B]`, on the model's device, is how many tokens at the left of each row are there for the length only:
    they are a document of their own, so that rows of different lengths are each as if alone.
    """

    def __init__(self, config: ModelConfig, padding: Tensor):
        self.room, self.length = config.seq_len, 0
        self.layers: dict[int, Tensor] = {}  # [2, B, seq_len, KV, D], made of the first keys' dtype
        self.begins = None  # [B, seq_len]: where a document begins
        if config.separator >= 0 or padding.any():
            self.begins = torch.arange(self.room, device=padding.device) == padding[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's `[B, T, KV, D]` after those of the tokens so far: views `[B, S, KV, D]` of all."""
        if layer not in self.layers:
            self.layers[layer] = k.new_empty(2, len(k), self.room, *k.shape[2:])
        both = self.layers[layer][:, :, : self.length + k.shape[1]]
        both[0, :, self.length :], both[1, :, self.length :] = k, v
        return both[0], both[1]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.layers = {layer: both[:, rows] for layer, both in self.layers.items()}
        self.begins = None if self.begins is None else self.begins[rows]


class Context(NamedTuple):
    """What every layer of a call shares: the rotary tables, and where its tokens stand in them and among the others."""

    cos: Tensor  # [at least T, D / 2], as sin is
    sin: Tensor
    positions: Tensor | None  # [B, T], rows of the tables; None for the first T
    documents: Tensor | None  # [2, B, S] of `document_ranges`; None for one document
    cache: Cache | None


class Linear(nn.Linear):
    """`nn.Linear`, which multiplies by `copy`, its weight in half precision, where there is one (`GPT.keep_copies`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("copy", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.copy is None:
            return super().forward(x)
        return _CopiedLinear.apply(x, self.weight, self.bias, self.copy)


class _CopiedLinear(torch.autograd.Function):
    """x @ copy.T + bias. The gradient of `weight` is a product in the precision of `copy`, summed and kept in that of
    the weight."""

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
        rows = dy.flatten(0, -2)
        dw = product(rows.t(), x.flatten(0, -2), weight_dtype)
        db = None if bias_dtype is None else rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return (dy @ copy).to(x_dtype), dw, db, None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, which a GPU sums it in: nothing is rounded on the way."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a @ b).to(dtype)


class Attention(nn.Module):
    """Self-attention over a packed projection `[C, (H + 2 KV) D]`."""

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
        slopes = alibi_slopes(config.n_head, self.qkv.weight.device) if config.position == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`."""
        c, (cos, sin, positions, documents, cache) = self.config, context
        gains = self.q_gain, self.k_gain
        q, k, v = self.kernels.rope(
            self.qkv(x), cos, sin, c.n_head, c.n_kv_head, *gains, c.norm_eps, positions, self.interleaved
        )
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        dropout = c.dropout if self.training else 0.0
        o = self.kernels.attention(
            q, k, v, window=self.window, documents=documents, dropout=dropout, slopes=self.slopes
        )
        return self.out(o.flatten(2))


def alibi_slopes(n_head: int, device: torch.device) -> Tensor:
    """What each head's scores lose for every place between query and key (Press et al., "Train Short, Test Long",
    2022): `[H]`, float32, 2^(-8/H), 2^(-16/H), ... 2^-8."""
    return torch.exp2(-8 / n_head * torch.arange(1, n_head + 1, device=device))


class FeedForward(nn.Module):
    """SwiGLU over a packed gate and up projection `[C, 2 F]`, or an activation over `[C, F]`."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kernels, gated = kernels, config.activation == "swiglu"
        self.activation = ("silu" if gated else config.activation), gated
        self.gate_up = Linear(config.d_model, (1 + gated) * config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.swiglu(self.gate_up(x), *self.activation))


class RMSNorm(nn.Module):
    """RMSNorm of `x + residual`; returns the normalised value and the new residual stream."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.eps, self.kernels = config.norm_eps, kernels
        self.gain = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.kernels.rmsnorm(x, self.gain, residual, self.eps)


class LayerNorm(nn.Module):
    """The same with the mean taken off, and a bias."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.eps = config.norm_eps
        self.gain = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = x if residual is None else residual + x
        return F.layer_norm(stream, self.gain.shape, self.gain, self.bias, self.eps).to(x.dtype), stream


class NoNorm(nn.Module):
    """The same without a norm: the sum, twice."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = x if residual is None else residual + x
        return stream, stream


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "none": NoNorm}


class Block(nn.Module):
    """One layer. Takes and returns a pair, what the last sub-layer said and the stream it has not yet been added to,
    so that each addition happens inside the norm that follows it."""

    def __init__(self, config: ModelConfig, kernels: Kernels, layer: int):
        super().__init__()
        self.attention_norm = NORMS[config.norm](config, kernels)
        self.attention = Attention(config, kernels, layer)
        self.feed_forward_norm = NORMS[config.norm](config, kernels)
        self.feed_forward = FeedForward(config, kernels)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        h, residual = self.attention_norm(x, residual)
        h, residual = self.feed_forward_norm(self.dropout(self.attention(h, context)), residual)
        return self.dropout(self.feed_forward(h)), residual


class PostNormBlock(Block):
    """norm(x + f(x)): what is normalised is the stream, kept as wide as it came, and nothing waits to be added."""

    def forward(self, x: Tensor, residual: None, context: Context) -> tuple[Tensor, None]:
        x, _ = self.attention_norm(self.dropout(self.attention(x, context)).to(x.dtype), x)
        x, _ = self.feed_forward_norm(self.dropout(self.feed_forward(x)).to(x.dtype), x)
        return x, None


class ResPostNormBlock(Block):
    """x + norm(f(x)), the res-post-norm of Swin Transformer V2 (Liu et al., 2022)."""

    def forward(self, x: Tensor, residual: None, context: Context) -> tuple[Tensor, None]:
        x = x + self.dropout(self.attention_norm(self.attention(x, context), None)[0])
        x = x + self.dropout(self.feed_forward_norm(self.feed_forward(x), None)[0])
        return x, None


BLOCKS = {"pre": Block, "post": PostNormBlock, "res-post": ResPostNormBlock}


def position_table(config: ModelConfig, std: float, device: torch.device) -> nn.Parameter | nn.Buffer | None:
    """`[seq_len, C]`, what is added to an embedding of standard deviation `std`; None for positions of another kind.

    Sines and cosines, in turn, are those of Vaswani et al., 2017, section 3.5, and in the same proportion to the
    embedding: they scale it up instead."""
    if config.position == "learned":
        return nn.Parameter(torch.empty(config.seq_len, config.d_model))  # _initialise fills it
    if config.position == "sinusoidal":
        cos, sin = rope_tables(config.seq_len, config.d_model + config.d_model % 2, device=device)
        table = torch.stack((sin, cos), -1).flatten(1)[:, : config.d_model]
        return nn.Buffer(std * table, persistent=False)
    return None


def fan_in(name: str, weight: Tensor, config: ModelConfig) -> None:
    """Variance-preserving; the two that write to the stream are scaled by 1/sqrt(2L), so that its variance does not
    grow with depth (GPT-2). The head is small, so that the first loss is ln V: with the norm before it a row of
    standard deviation s/sqrt(C) gives logits of standard deviation s, which adds s^2/2 nats."""
    std = weight.shape[1] ** -0.5
    if name.endswith(("out.weight", "down.weight")):
        std *= (2 * config.n_layer) ** -0.5
    nn.init.normal_(weight, std=0.25 * std if name == "head.weight" else std)


def xavier(name: str, weight: Tensor, config: ModelConfig) -> None:
    """Standard deviation sqrt(2 / (in + out)), cut off at three (Glorot and Bengio, 2010; Stanford's CS336). What is
    packed for speed are several matrices."""
    packed = {
        "qkv.weight": [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)],
        "gate_up.weight": config.d_ff,
    }
    for part in weight.split(next((rows for key, rows in packed.items() if name.endswith(key)), len(weight))):
        std = (2 / sum(part.shape)) ** 0.5
        nn.init.trunc_normal_(part, std=std, a=-3 * std, b=3 * std)


INITS = {"fan-in": fan_in, "xavier": xavier, "look-back": fan_in}


def look_back(model: "GPT", std: float) -> None:
    """Make the heads of the first layer attend to the token before. Copying from the context ("induction heads": Olsson
    et al., 2022) takes such a head and one above it, of which neither helps without the other, so that plain weights
    find the pair late.

    A vector three times as wide as the embedding's `std` is added to all its rows, which the softmax of a tied head
    does not see. It is all that q and k of the layer read. Both lie in the fastest quarter of the rotated pairs, k as
    if rotated by one place more, so that they meet one place apart; q's gain makes that more than nine tenths of the
    weight. Training is free to undo it.
    """
    config, attention = model.config, model.blocks[0].attention
    shared = torch.randn(config.d_model, device=model.embedding.weight.device).sign()
    model.embedding.weight.add_(3 * std * shared)
    heads = attention.qkv.weight.unflatten(0, (-1, config.head_dim))
    q, k, _ = heads.split((config.n_head, config.n_kv_head, config.n_kv_head))
    read, half, fast = shared * config.d_model**-0.5, config.head_dim // 2, math.ceil(config.head_dim / 8)
    cos, sin = (table[1, :fast, None] for table in rope_tables(2, config.head_dim, config.rope_theta, q.device))
    nn.init.zeros_(q)
    nn.init.zeros_(k)
    q[:, :fast] = read
    k[:, :fast], k[:, half : half + fast] = cos * read, sin * read
    nn.init.constant_(attention.q_gain, 3.0)


class GPT(nn.Module):
    """The model: token ids to the loss of the tokens that follow, or to logits."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        """`config` must be resolved. Parameters are float32 on the current default device. The residual stream is in
        the embedding's dtype, or in `residual`, which may be set to another. Raises `KernelError` for a dropout that
        the bound attention does not have."""
        super().__init__()
        self.residual: torch.dtype | None = None
        if config.dropout:
            kernels.require("attention", "dropout")
        self.config, self.kernels = config, kernels
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        block = BLOCKS[config.norm_place]
        self.blocks = nn.ModuleList(block(config, kernels, layer) for layer in range(config.n_layer))
        self.norm = NORMS[config.norm](config, kernels)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        device, std = self.embedding.weight.device, config.embedding_std or 0.25 * config.d_model**-0.5
        cos, sin = rope_tables(config.seq_len, config.head_dim, config.rope_theta, device)
        if not config.position.startswith("rope"):
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # a rotation that changes nothing
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.position = position_table(config, std, device)
        self._initialise(std)

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        """Matrices as `init` says, biases 0, and what makes the first stream at the standard deviation `std`."""
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "position"):
                nn.init.normal_(parameter, std=std)
            elif parameter.ndim == 2:
                INITS[self.config.init](name, parameter, self.config)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if self.config.init == "look-back":
            look_back(self, std)

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """`[B, T]` ids to the normalised last hidden states `[B, T, C]`; with a cache, of ids that follow those in it.

        Raises `ValueError` when that makes more than `config.seq_len` tokens."""
        context = self._context(ids, cache)
        x, residual = self.embedding(ids), None
        if self.residual is not None:
            x = x.to(self.residual)
        if self.position is not None:
            start = 0 if cache is None else cache.length
            at = slice(start, start + ids.shape[1]) if context.positions is None else context.positions
            x = x + self.position[at].to(x.dtype)
        x, recomputed = self.dropout(x), round(self.config.recompute * len(self.blocks))
        for layer, block in enumerate(self.blocks):
            if layer < recomputed:
                # The random state is kept for dropout alone: reading it is an error while a CUDA graph is captured.
                options = {"use_reentrant": False, "preserve_rng_state": bool(self.config.dropout)}
                x, residual = checkpoint(block, x, residual, context, **options)
            else:
                x, residual = block(x, residual, context)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x, residual)[0]

    def _context(self, ids: Tensor, cache: Cache | None) -> Context:
        separator, start = self.config.separator, 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.config.seq_len:
            raise ValueError(f"{end} tokens are more than the model's seq_len {self.config.seq_len}")
        begins = None
        if cache is None and separator >= 0:
            begins = ids == separator
        elif cache is not None and cache.begins is not None:
            begins = cache.begins[:, :end]
            begins[:, start:] |= ids == separator
        if begins is None:
            return Context(self.cos[start:end], self.sin[start:end], None, None, cache)
        documents = document_ranges(begins.cumsum(1))
        positions = torch.arange(start, end, device=ids.device) - documents[0, :, start:]
        return Context(self.cos, self.sin, positions, documents, cache)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean", scale: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of `targets` `[B, T]` (`IGNORE` where none is meant) given `ids` `[B, T]`, times
        `scale`, a tensor without dimensions."""
        loss, head = self.kernels.linear_cross_entropy, self.head
        return loss(self.hidden(ids), head.weight, targets, reduction, scale=scale, head_cast=head.copy)

    def logits(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the token after the last of each row, `[B, T]` to `[B, V]`, float32; `cache` as in `hidden`."""
        return self.head(self.hidden(ids, cache)[:, -1])[..., : self.config.vocab_size].float()

    def keep_copies(self, dtype: torch.dtype) -> None:
        """Keep a copy of every matrix that tokens are multiplied by, in `dtype`, so that no step casts one. Optimizers
        write it with the weight; loading does too. The head's has rows of 0 up to a multiple of 64, for which matrix
        units have a fast path."""
        for module in self.modules():
            if isinstance(module, Linear):
                rows = 64 * math.ceil(len(module.weight) / 64) if module is self.head else len(module.weight)
                module.copy = module.weight.new_zeros(rows, module.in_features, dtype=dtype)
        self.refresh_copies()

    def copies(self) -> dict[Tensor, Tensor]:
        """The copies by parameter, without the rows that the head's was padded by."""
        linears = [module for module in self.modules() if isinstance(module, Linear) and module.copy is not None]
        return {module.weight: module.copy[: len(module.weight)] for module in linears}

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Make the copies what the weights are now."""
        for weight, copy in self.copies().items():
            copy.copy_(weight)

    def load_state_dict(self, *args, **options):
        """As of `nn.Module`; copies follow."""
        result = super().load_state_dict(*args, **options)
        self.refresh_copies()
        return result

    def attention_choice(self, half: bool) -> str:
        """What attention's `auto` takes on a GPU to train in half precision or in float32, and why."""
        c = self.config
        asked = {"documents": c.separator >= 0 or None, "dropout": c.dropout, "slopes": c.position == "alibi" or None}
        sizes = c.seq_len, c.seq_len, c.head_dim
        chosen = (choice(*sizes, True, half, window=window, **asked) for window in c.windows)
        return ", ".join(f"{name} for {why}" for name, why in dict.fromkeys(chosen))

    def n_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """FLOPs that training takes a token: 6 for every weight it is multiplied by (head included, embedding not), and
        12 H D a layer for every key that it sees (forward, two products), on average T/2 of them, or W - W^2 / 2T in a
        window of W. Documents, which hide more, do not count."""
        c = self.config
        matrices = sum(p.numel() for b in self.blocks for p in b.parameters() if p.ndim == 2)
        seen = sum(w * (2 * c.seq_len - w) for w in (window or c.seq_len for window in c.windows))  # keys, times 2 T
        return 6 * (matrices + self.head.weight.numel()) + 6 * c.n_head * c.head_dim * seen // c.seq_len
