"""Windows of a token array, to train on in random order and to evaluate on in order.

The target of each token is the one that follows it, or with `shift` 0 itself: a mistake that has been published, and
whose low loss takes no model to reach.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.formats import DataError


class Batches:
    """An endless sequence of training windows, a pure function of `tokens`, `seq_len` and `seed`.

    So resuming takes only the count of windows used, and the ranks of a distributed run agree on their shares without
    a word. Each epoch takes the array as a ring, cuts it into windows from a random place on and visits them in random
    order: every token is an input once, but for the fewer than `seq_len` left over.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, shift: int = 1) -> None:
        """DataError if `tokens`, 1-D, does not hold a single window of `seq_len` inputs and as many targets."""
        if len(tokens) < seq_len + 1:
            raise DataError(
                f"the training text is {len(tokens):,} tokens long, and a window of seq_len = {seq_len:,} takes "
                f"{seq_len + 1:,}: lower seq_len or use a larger corpus"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        self.shift = shift
        self.windows_per_epoch = len(tokens) // seq_len
        self._epoch = (-1, np.empty(0, np.int64))

    def get(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [count, seq_len], of the windows `first` to `first + count - 1`."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        starts = np.concatenate([self._starts(epoch)[positions[epochs == epoch]] for epoch in np.unique(epochs)])
        windows = self.tokens[(starts[:, None] + np.arange(self.seq_len + 1)) % len(self.tokens)]
        windows = torch.from_numpy(windows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, self.shift :][:, : self.seq_len].contiguous()

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch begin, in their order; the last epoch's are kept."""
        if self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(len(self.tokens))
            self._epoch = (epoch, offset + self.seq_len * random.permutation(self.windows_per_epoch))
        return self._epoch[1]


class Prefetcher:
    """Batches of `size` windows in order, each read in a thread while the one before it is trained on.

    With `pin` they are in pinned memory, from which a GPU copies without making the host wait.
    """

    def __init__(self, batches: Batches, first: int, size: int, pin: bool = False):
        """`first`: the window that the first batch begins with."""
        self.batches, self.first, self.size, self.pin = batches, first, size, pin

    def __enter__(self) -> Prefetcher:
        self.pool = ThreadPoolExecutor(1)
        self.ahead = self.pool.submit(self._read, self.first)
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown()

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch, as of `Batches.get`."""
        batch = self.ahead.result()
        self.first += self.size
        self.ahead = self.pool.submit(self._read, self.first)
        return batch

    def _read(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batches.get(first, self.size)
        return (inputs.pin_memory(), targets.pin_memory()) if self.pin else (inputs, targets)


def eval_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_tokens: int, shift: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, int64 [batch_size, seq_len], of consecutive windows over the first `max_tokens` targets.

    The last batch is padded, its targets with -1, which the loss ignores. DataError if `tokens` has no target at all.
    """
    targets_left = min(max_tokens, len(tokens) - 1)
    if targets_left < 1:
        raise DataError(f"the validation text is {len(tokens)} tokens long: evaluating takes at least 2")
    size, batches = batch_size * seq_len, []
    for start in range(0, targets_left, size):
        end = min(start + size, targets_left)
        inputs = torch.zeros(size, dtype=torch.int64)
        targets = torch.full((size,), -1)
        inputs[: end - start] = torch.from_numpy(tokens[start:end].astype(np.int64))
        targets[: end - start] = torch.from_numpy(tokens[start + shift : end + shift].astype(np.int64))
        batches.append((inputs.view(batch_size, seq_len), targets.view(batch_size, seq_len)))
    return batches
