"""Batches of token windows: in random order for training, in order for evaluation.

The target of each token is the next token. With `shift` 0 it is the token itself: a published mistake, whose low loss
says nothing about the model.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from data.formats import DataError
from runtime.phase import phase


class Batches:
    """An endless sequence of training windows, a pure function of `tokens`, `seq_len` and `seed`.

    To resume, it is enough to know how many windows were used. Each epoch starts at a random offset, treats the array
    as circular, cuts it into windows of `seq_len` and visits them in random order. Every token is an input once per
    epoch, except fewer than `seq_len` at the end. All targets count: none is below 0.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, shift: int = 1) -> None:
        """`tokens` is 1-D. Raises `DataError` if it has fewer than the seq_len + 1 tokens of one window."""
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"the training text is {len(tokens):,} tokens long, and a window of seq_len = {seq_len:,} needs "
                f"{seq_len + 1:,}: lower seq_len or use a larger corpus"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.shift = shift
        self.windows_per_epoch = len(tokens) // seq_len
        self._epoch = (-1, np.empty(0, np.int64))

    def get(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 `[count, seq_len]`, of windows `first` to `first + count - 1`."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate([self._starts(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)])
        windows = self.tokens[(starts[:, None] + np.arange(self.seq_len + 1)) % len(self.tokens)]
        windows = torch.from_numpy(windows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, self.shift :][:, : self.seq_len].contiguous()

    def _starts(self, epoch: int) -> np.ndarray:
        """Start positions of an epoch's windows, in order of use. The last epoch's are cached."""
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            offset = rng.integers(len(self.tokens))
            self._epoch = (epoch, offset + self.seq_len * rng.permutation(self.windows_per_epoch))
        return self._epoch[1]


class Prefetcher:
    """Batches of `size` windows in order, or one rank's rows of each; a thread reads the next while one is used.

    With `pin` they are in pinned memory, so that copies to a GPU are asynchronous.
    """

    def __init__(self, batches: Batches, first: int, size: int, pin: bool = False, rank: int = 0, ranks: int = 1):
        """`first` is the first window of the first batch. Of `ranks` ranks, which divide `size`, each has as many rows,
        and those of `rank` are read."""
        self.batches, self.first, self.size, self.pin = batches, first, size, pin
        self.rows = size // ranks
        self.offset = rank * self.rows

    def __enter__(self) -> Prefetcher:
        self.pool = ThreadPoolExecutor(1)
        self.pending = self.pool.submit(self._read, self.first)
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()

    @phase("data")
    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch, as `Batches.get` does."""
        batch = self.pending.result()
        self.first += self.size
        self.pending = self.pool.submit(self._read, self.first)
        return batch

    def _read(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches.get(first + self.offset, self.rows)
        return (inputs.pin_memory(), targets.pin_memory()) if self.pin else (inputs, targets)


def micro_batch_size(batch_size: int, micro_batch: int | Literal["auto"], ranks: int) -> int:
    """Sequences of a forward and backward pass on each of `ranks` ranks: all that a rank has of the batch if
    `micro_batch` is 0 or auto.

    Raises `DataError` for a batch that cannot be shared out."""
    size = 0 if micro_batch == "auto" else micro_batch
    step = ranks * (size or 1)
    if batch_size % step:
        below, above = batch_size // step * step, (batch_size // step + 1) * step
        each = f" x micro_batch {size}" if size else ""
        what = f"{step} ({ranks} ranks{each})" if ranks > 1 else f"micro_batch {size}"
        right = f"{below} or {above}" if below else f"{above}"
        raise DataError(f"batch_size {batch_size} must be a multiple of {what}, such as {right}")
    return size or batch_size // ranks


def eval_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_tokens: int, shift: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, int64 `[batch_size, seq_len]`, of consecutive windows with the first `max_tokens` targets.

    The last batch is padded; its padding targets are -1, which the loss ignores. The last of `tokens` is the
    end-of-text token. Raises `DataError` if there is no other target, since the loss per byte needs a byte of text.
    """
    n_targets = min(max_tokens, len(tokens) - 1)
    if (tokens[shift : n_targets + shift] == tokens[-1]).all():
        raise DataError(
            f"evaluation has no text to predict: the validation split is {len(tokens)} tokens long, and {n_targets} of "
            "them are targets; raise eval_tokens or data.val_fraction, or use a larger corpus"
        )
    size, batches = batch_size * seq_len, []
    for start in range(0, n_targets, size):
        end = min(start + size, n_targets)
        inputs = torch.zeros(size, dtype=torch.int64)
        targets = torch.full((size,), -1)
        inputs[: end - start] = torch.from_numpy(tokens[start:end].astype(np.int64))
        targets[: end - start] = torch.from_numpy(tokens[start + shift : end + shift].astype(np.int64))
        batches.append((inputs.view(batch_size, seq_len), targets.view(batch_size, seq_len)))
    return batches
