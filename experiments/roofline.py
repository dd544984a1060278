"""What low precision can gain at most, from counts of FLOPs and bytes.

A training step multiplies each weight three times: y = x W^T, dx = dy W, dW = dy^T x. A product takes the time of its
FLOPs at the card's rate for its format, or that of its bytes, read and written once, whichever is longer. The bound on
a speed-up is the sum of these times in bf16 over that in low precision. Attention, norms, the optimizer and quantising
take no time in it, so no implementation reaches it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the list of suites does not wait for torch
    from model.gpt import ModelConfig


@dataclass(frozen=True)
class Card:
    """Dense FLOP/s by format, with sums in float32, and bytes a second of memory, from NVIDIA's data sheets."""

    name: str
    flops: dict[str, float]
    bandwidth: float


RTX_5090 = Card("an RTX 5090", {"bf16": 209.5e12, "fp8": 838e12, "nvfp4": 1676e12}, 1792e9)
BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}  # of a value, with its share of a block's scale
LOW = {"fp8": ("y", "dx"), "nvfp4": ("y", "dx", "dW")}  # products in low precision: model/fp8.py, block_scaled.py


def product_seconds(m: int, n: int, k: int, precision: str, card: Card) -> float:
    """The least time of a product `[m, k]` by `[k, n]` that is written in bf16."""
    moved = (m + n) * k * BYTES[precision] + 2 * m * n
    return max(2 * m * n * k / card.flops[precision], moved / card.bandwidth)


def step_seconds(shape: ModelConfig, tokens: int, precision: str, card: Card, head: str = "bf16") -> float:
    """The least time of all products with weights in a step on `tokens`; those of the `head` are in bf16 or fp8."""
    heads = shape.n_head * shape.head_dim
    gates = 1 + (shape.activation == "swiglu")
    layer = (
        (shape.d_model, heads + 2 * shape.n_kv_head * shape.head_dim), (heads, shape.d_model),
        (shape.d_model, gates * shape.d_ff), (shape.d_ff, shape.d_model),
    )  # fmt: skip
    n_low = shape.n_layer - (math.ceil(shape.n_layer / 6) if precision == "nvfp4" else 0)

    def seconds(n_in: int, n_out: int, format: str) -> float:
        sizes = {"y": (tokens, n_out, n_in), "dx": (tokens, n_in, n_out), "dW": (n_out, n_in, tokens)}
        low = LOW.get(format, ())
        return sum(product_seconds(*sizes[name], format if name in low else "bf16", card) for name in sizes)

    low, plain = (sum(seconds(*size, format) for size in layer) for format in (precision, "bf16"))
    of_head = seconds(shape.d_model, shape.vocab_size, head)
    return n_low * low + (shape.n_layer - n_low) * plain + of_head


def speed_up(shape: ModelConfig, tokens: int, precision: str, card: Card = RTX_5090, head: str = "bf16") -> float:
    """The bound on the speed of a step in low precision over one in bf16. `shape` is resolved."""
    return step_seconds(shape, tokens, "bf16", card) / step_seconds(shape, tokens, precision, card, head)
