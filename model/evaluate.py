"""The loss on a fixed set of tokens."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.gpt import GPT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout, inside; what it was before, after."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], byte_lengths: Tensor) -> dict[str, float]:
    """Mean loss over `batches` of ids and targets `[B, T]` (targets below 0 do not count).

    `val_loss` is in nats a token, `val_bpb` in bits a byte of the text that the targets spell, by which different
    tokenizers compare; `byte_lengths` `[V]` are the bytes that each id stands for.
    """
    device = model.embedding.weight.device
    nats, tokens, size = 0.0, 0, 0
    with evaluating(model):
        for ids, targets in batches:
            nats += model(ids.to(device), targets.to(device), "sum").item()
            known = targets[targets >= 0]
            tokens, size = tokens + len(known), size + int(byte_lengths[known].sum())
    return {"val_loss": nats / tokens, "val_bpb": nats / size / math.log(2)}
