"""A decoder-only transformer in the manner of Llama and Qwen3, built on bound kernels.

Pre-norm RMSNorm, rotary positions, optional QK-norm, grouped-query attention, SwiGLU, tied or untied head, no biases.
Shapes: B batch, T sequence, H query heads, KV key/value heads, D head dim, C = d_model, V vocabulary.

The kernels never show in the parameters: their names, shapes and layouts are the same whatever is bound, so that a
checkpoint trained with one choice loads under any other.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from kernels import Kernels
from kernels.rope import rope_tables
from model.config import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. A 0 stands for a value derived from others; `resolved` fills it in."""

    n_layer: Annotated[int, "[1, inf)", "layers"] = 12
    n_head: Annotated[int, "[1, inf)", "query heads"] = 12
    n_kv_head: Annotated[int, "[0, inf)", "key and value heads (0: as many as query heads)"] = 0
    head_dim: Annotated[int, "[0, inf)", "width of a head, even (0: d_model / n_head)"] = 0
    d_model: Annotated[int, "[1, inf)", "width of the residual stream"] = 768
    d_ff: Annotated[int, "[0, inf)", "width of the feed-forward layer (0: 8/3 of d_model, rounded up to 64)"] = 0
    seq_len: Annotated[int, "[1, inf)", "tokens in a sequence"] = 1024
    vocab_size: Annotated[int, "[0, inf)", "rows of the embedding (0: the tokenizer's vocabulary)"] = 0
    tied: Annotated[bool, "the head is the embedding"] = True
    qk_norm: Annotated[bool, "normalise each head of q and k"] = True
    rope_theta: Annotated[float, "(0, inf)", "base of the rotary frequencies"] = 10000.0
    norm_eps: Annotated[float, "(0, inf)", "added to the mean square in every norm"] = 1e-6

    def __post_init__(self):
        if not self.head_dim and self.d_model % self.n_head:
            raise ConfigError(
                f"d_model {self.d_model} must be a multiple of n_head {self.n_head}, or head_dim be given"
            )
        if (self.head_dim or self.d_model // self.n_head) % 2:
            raise ConfigError(f"head_dim {self.head_dim or self.d_model // self.n_head} must be even, for RoPE")
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    def resolved(self, vocab_size: int) -> "ModelConfig":
        """The same with every 0 replaced; `vocab_size` is the tokenizer's. Raises `ConfigError` when that is larger."""
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size {self.vocab_size} is less than the tokenizer's {vocab_size}")
        derived = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_dim": self.head_dim or self.d_model // self.n_head,
            "d_ff": self.d_ff or 64 * math.ceil(self.d_model * 8 / 3 / 64),
            "vocab_size": self.vocab_size or vocab_size,
        }
        return replace(self, **derived)


class Attention(nn.Module):
    """Self-attention over a packed projection `[C, (H + 2 KV) D]`."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.config, self.kernels = config, kernels
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.d_model, heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=False)
        self.q_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None
        self.k_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, T, C]` to `[B, T, C]`; `cos`, `sin` `[T, D / 2]`."""
        c = self.config
        q, k, v = self.kernels.rope(self.qkv(x), cos, sin, c.n_head, c.n_kv_head, self.q_gain, self.k_gain, c.norm_eps)
        return self.out(self.kernels.attention(q, k, v).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU over a packed gate and up projection `[C, 2 F]`."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.kernels = kernels
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.swiglu(self.gate_up(x)))


class Norm(nn.Module):
    """RMSNorm of `x + residual`; returns the normalised value and the new residual stream."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.eps, self.kernels = config.norm_eps, kernels
        self.gain = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.kernels.rmsnorm(x, self.gain, residual, self.eps)


class Block(nn.Module):
    """One layer. Takes and returns a pair, what the last sub-layer said and the stream it has not yet been added to,
    so that each addition happens inside the norm that follows it."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        super().__init__()
        self.attention_norm = Norm(config, kernels)
        self.attention = Attention(config, kernels)
        self.feed_forward_norm = Norm(config, kernels)
        self.feed_forward = FeedForward(config, kernels)

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        h, residual = self.attention_norm(x, residual)
        h, residual = self.feed_forward_norm(self.attention(h, cos, sin), residual)
        return self.feed_forward(h), residual


class GPT(nn.Module):
    """The model: token ids to the loss of the tokens that follow, or to logits."""

    def __init__(self, config: ModelConfig, kernels: Kernels):
        """`config` must be resolved. Parameters are float32 on the current default device."""
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.norm = Norm(config, kernels)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(config.seq_len, config.head_dim, config.rope_theta, self.embedding.weight.device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Variance-preserving projections; the two that write to the stream are scaled by 1/sqrt(2L), so that its
        variance does not grow with depth (GPT-2). The head is small, so that the first loss is ln V: with the norm
        before it a row of standard deviation s/sqrt(C) gives logits of standard deviation s, which adds s^2/2 nats."""
        width, depth = self.config.d_model, self.config.n_layer
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = parameter.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std *= (2 * depth) ** -0.5
                nn.init.normal_(parameter, std=std)
        nn.init.normal_(self.embedding.weight, std=0.25 * width**-0.5)
        nn.init.normal_(self.head.weight, std=0.25 * width**-0.5)

    def hidden(self, ids: Tensor) -> Tensor:
        """`[B, T]` ids to the normalised last hidden states `[B, T, C]`, T at most `config.seq_len`."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x, residual = self.embedding(ids), None
        for block in self.blocks:
            x, residual = block(x, residual, cos, sin)
        return self.norm(x, residual)[0]

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of `targets` `[B, T]` (`IGNORE` where none is meant) given `ids` `[B, T]`."""
        return self.kernels.linear_cross_entropy(self.hidden(ids), self.head.weight, targets, reduction)

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of the token after `ids[i, positions[i]]`: `[B, T]` and `[B]` to `[B, V]`, float32.

        Only tokens up to that position count, so shorter sequences may be padded on the right with anything."""
        rows = torch.arange(len(ids), device=ids.device)
        return self.head(self.hidden(ids)[rows, positions]).float()

    def n_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """FLOPs that training takes a token: 6 for every weight it is multiplied by (head included, embedding not), and
        6 T H D a layer for causal attention (forward, two products over T/2 visible keys on average)."""
        c = self.config
        matrices = sum(p.numel() for b in self.blocks for p in b.parameters() if p.ndim == 2)
        return 6 * (matrices + self.head.weight.numel()) + 6 * c.n_layer * c.seq_len * c.n_head * c.head_dim
