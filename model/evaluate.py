"""Validation loss on a fixed set of tokens.

python -m model.evaluate --run out/small                        # on the run's own validation split
python -m model.evaluate --run out/small --data wikitext-103    # on a corpus's, or on all of a text
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.corpora import open_corpus
from data.formats import Corpus, DataError, pieces
from data.prepare import DataConfig, prepare, reopen
from data.tokenizer import Tokenizer
from model import checkpoint
from model.gpt import GPT
from model.load import add_flags, load
from runtime.capture import Step
from runtime.config import ConfigError, Parser, build, flatten, number
from runtime.distributed import ALONE, World
from runtime.phase import phase
from runtime.program import leave, program


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context that puts the model in evaluation mode, and back in the mode it was in."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)
        if hasattr(model, "reshard"):  # FSDP2 may leave embedding and head gathered, and their parameters replaced
            model.reshard()


@phase("evaluation")
@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Sequence[tuple[Tensor, Tensor]],
    byte_lengths: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """Mean cross-entropy over `batches` of ids and targets `[B, T]`, shared out over the ranks, without label smoothing
    and z-loss; targets below 0 do not count.

    Returns `val_loss` in nats per token and `val_bpb` in bits per byte of text, which is comparable between tokenizers.
    `byte_lengths` `[V]` is the number of bytes of each id. `loss` gives the summed loss of a batch in place of the
    model.
    """
    device = model.embedding.weight.device
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with evaluating(model):
        for i in range(world.rank, len(batches) + world.rank, world.size):
            # A sharded model communicates in its forward pass, so each rank takes as many: some of nothing.
            ids, targets = batches[i] if i < len(batches) else (batches[0][0], torch.full_like(batches[0][1], -1))
            batch = ids.to(device), targets.to(device)
            nats += (loss(*batch) if loss else model(*batch, "sum")).item()
            counted = targets[targets >= 0]
            n_tokens += len(counted)
            n_bytes += int(byte_lengths[counted].sum())
    nats, n_tokens, n_bytes = world.sum(nats, n_tokens, n_bytes)
    return {"val_loss": nats / n_tokens, "val_bpb": nats / n_bytes / math.log(2)}


def eval_loss(
    model: GPT, forward: nn.Module, captured: bool, ids: Tensor, targets: Tensor, loss: Tensor
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The fastest way to the summed loss of a batch `[B, T]` beside a training step, for `evaluate`; None is the model.

    `forward` is the model or its compiled form, as the step uses it. If the step is `captured` as CUDA graphs, its
    tensors are used: `ids` and `targets`, where batches are copied to, and `loss`, a scalar."""
    if forward is not model:
        # This takes 0.8 of the eager one's time. A compiled forward without gradients takes 0.67, but 4 to 13 s to
        # compile. With dropout, label smoothing or z-loss the step has another loss.
        return partial(_compiled_loss, model, forward) if model.config.trains_on_validation_loss else None
    return _CapturedLoss(model, ids, targets, loss) if captured else None


def _compiled_loss(model: GPT, compiled: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss by the step's compiled forward pass. Called as in the step, it is not compiled again."""
    model.train()
    with torch.enable_grad():
        return compiled(ids, targets, "sum", torch.ones((), device=ids.device))


class _CapturedLoss:
    """The loss by a forward pass that is replayed as a CUDA graph."""

    def __init__(self, model: GPT, ids: Tensor, targets: Tensor, loss: Tensor):
        self.model, self.ids, self.targets, self.loss = model, ids, targets, loss
        self.parts = Step([self._forward], True, False, lambda line: None)

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        self.ids.copy_(ids)
        self.targets.copy_(targets)
        with self.parts() as (forward,):
            forward()
        return self.loss

    def _forward(self) -> None:
        self.loss.copy_(self.model(self.ids, self.targets, "sum"))


class Windows(Sequence):
    """Batches for `evaluate` of windows that move by `stride` tokens: ids and targets, int64 `[rows, context]`.

    Every token but the first is a target once, in the first window that has it. A smaller stride gives the targets more
    context and takes more windows. Other targets, and padding, are -1."""

    def __init__(self, tokens: np.ndarray, context: int, stride: int, rows: int):
        self.tokens, self.context, self.stride, self.rows = tokens, context, stride, rows
        self.starts = range(0, max(len(tokens) - 1 - context, 0) + stride, stride)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        first = range(0, len(self.starts), self.rows)[i]  # raises IndexError
        starts = self.starts[first : first + self.rows]
        ids = torch.zeros(len(starts), self.context, dtype=torch.int64)
        targets = torch.full_like(ids, -1)
        for row, start in enumerate(starts):
            window = torch.from_numpy(self.tokens[start : start + self.context + 1].astype(np.int64))
            seen = self.context - self.stride if start else 0
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, seen : len(window) - 1] = window[seen + 1 :]
        return ids, targets


def own_validation(folder: Path, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Tokens of the validation split that a run was evaluated on, and its corpus in words. Raises `UserError`."""
    state = checkpoint.load(folder / "last.pt")
    if "config" not in state:
        raise ConfigError(f"{folder} holds imported weights, which have no validation split: give a text with --data")
    config = build(DataConfig, flatten(DataConfig, state["config"]["data"]))
    data = reopen(config, tokenizer, state.get("data", {}).get("text", "")) or prepare(config)
    if data.tokenizer != tokenizer:
        raise DataError(f"{config.corpus} has other tokens now than when {folder} was trained on it")
    return data.val, f"{data}, its validation split"


def validation_text(corpus_name: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[np.ndarray, str]:
    """Tokens of a corpus's validation split, or of all its text if it has none, and which of them it is, in words.

    Reads no more than `max_tokens` and the document that they end in. Raises `DataError`."""
    corpus = open_corpus(corpus_name)
    if not isinstance(corpus, Corpus):
        raise DataError(f"{corpus_name} is a mixture, or tokens already: evaluate on one text at a time")
    shards = corpus.shards()
    val = [shard for shard in shards if shard.split == "val"]
    found: list[np.ndarray] = []
    for document in (document for shard in val or shards for document in shard.read()):
        found.append(tokenizer.encode_documents([*pieces(document), None]))
        max_tokens -= len(found[-1])
        if max_tokens < 0:
            break
    if not any((tokens != tokenizer.eot).any() for tokens in found):
        raise DataError(f"{corpus_name} has no text to evaluate on")
    return np.concatenate(found), f"{corpus.name}, {'its validation split' if val else 'all of it'}"


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.evaluate", description="Evaluate a run on held-out text.")
    add_flags(parser)
    add = parser.add_argument
    add("--data", help="corpus or path to evaluate on, as for train.py (default: the run's own validation split)")
    add("--tokens", type=number(int, "[1, inf)"), default=2**62, help="targets to evaluate (default: all)")
    add(
        "--stride", type=number(int, "[1, inf)"),
        help="tokens between windows; fewer than seq_len give targets more context (default: the run's seq_len)",
    )  # fmt: skip
    add("--batch-size", type=number(int, "[1, inf)"), default=8, help="windows of a forward pass (default 8)")
    args = parser.parse_args(argv)
    folder, model, tokenizer, autocast = load(args)
    context = model.config.seq_len
    stride = args.stride or context
    if stride > context:
        raise ConfigError(f"--stride {stride} leaves out tokens: it must be at most the run's seq_len, {context}")
    if args.data is None:
        tokens, text = own_validation(folder, tokenizer)
    else:
        tokens, text = validation_text(args.data, tokenizer, args.tokens)
    tokens = tokens[: args.tokens + 1]
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths())
    with autocast():
        metrics = evaluate(model, Windows(tokens, context, stride, args.batch_size), byte_lengths)
    targets = tokens[1:]
    n_bytes = int(byte_lengths[targets.astype(np.int64)].sum())
    text_ids = np.where(targets == tokenizer.eot, tokenizer.ranks[b"\n"], targets)
    n_words = len(tokenizer.decode_bytes(text_ids).split())
    by_word = np.exp(np.float64(metrics["val_loss"] * len(targets) / n_words))
    print(f"data     {text}: {len(targets):,} tokens, {n_bytes:,} bytes, {n_words:,} words")
    print(f"windows  of {context} tokens, every {stride}")
    print(f"loss     {metrics['val_loss']:.4f} nats per token, {metrics['val_bpb']:.4f} bits per byte")
    print(f"perplexity {math.exp(metrics['val_loss']):,.6g} by token, {by_word:,.6g} by word")
    return 0


if __name__ == "__main__":
    leave(main())
