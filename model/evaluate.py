"""Validation loss on a fixed set of tokens."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model.gpt import GPT


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context that puts the model in evaluation mode, and back in the mode it was in."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Mean loss over `batches` of ids and targets `[B, T]`; targets below 0 do not count.

    Returns `val_loss` in nats per token and `val_bpb` in bits per byte of text, which is comparable between tokenizers.
    `byte_lengths` `[V]` is the number of bytes of each id. `loss` gives the summed loss of a batch in place of the
    model.
    """
    device = model.embedding.weight.device
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with evaluating(model):
        for ids, targets in batches:
            batch = ids.to(device), targets.to(device)
            nats += (loss(*batch) if loss else model(*batch, "sum")).item()
            counted = targets[targets >= 0]
            n_tokens += len(counted)
            n_bytes += int(byte_lengths[counted].sum())
    return {"val_loss": nats / n_tokens, "val_bpb": nats / n_bytes / math.log(2)}
