"""The data of a run: what it trains on and what it is evaluated on."""

from pathlib import Path
from typing import Any

import torch

from data.batches import Batches, eval_batches
from data.prepare import open_data
from data.tokenizer import Tokenizer
from model.resume import data_changes, fingerprints
from runtime.config import as_dict
from runtime.distributed import World
from runtime.text import say


class RunData:
    """The data of a run.

    tokenizer: that of the corpus; `byte_lengths` int64 `[V]` has the number of bytes of each of its ids.
    batches: the training windows, in their random order.
    eval_set: ids and targets, int64 `[micro_batch, T]`, on which the run is evaluated.
    fingerprints: hashes of all this, for a checkpoint.
    changes: a sentence for each part that has changed since the checkpoint that the run resumes from.
    """

    def __init__(self, config: Any, folder: Path, state: dict[str, Any], micro_batch: int, world: World):
        """Open the corpus of the options `config` of train.py, and prepare it first if need be, on one rank of each
        machine. `folder` is the run's.

        A run that resumes from the checkpoint `state` gets its own tokens if they are still cached, since its corpus
        may have changed. Raises `DataError`, `LaunchError` if the ranks have read different text, and
        `CheckpointError`."""
        own = world.broadcast(Tokenizer.load(folder / "tokenizer.json") if state and world.is_main else None)
        with world.local_main_first():
            corpus = open_data(config.data, say, own, state.get("data", {}).get("text", ""))
        seq_len, shift = config.shape.seq_len, config.data.shift
        self.tokenizer = corpus.tokenizer
        self.byte_lengths = torch.from_numpy(self.tokenizer.byte_lengths())
        self.batches = Batches(corpus.train, seq_len, config.seed, shift)
        self.eval_set = eval_batches(corpus.val, seq_len, micro_batch, config.eval_tokens, shift)
        self.fingerprints = fingerprints(corpus.summary, self.eval_set)
        world.check_same(f"the prepared text of {config.data.corpus}", self.fingerprints)
        self.changes = data_changes(state, as_dict(config), self.fingerprints) if state else {}
        self._words = f"{corpus}: {len(corpus.train):,} tokens, vocabulary {config.shape.vocab_size:,}"

    def __str__(self) -> str:
        return self._words
