"""From a corpus to two arrays of token ids on disk, once.

A prepared corpus is a folder of the cache, named by a hash of everything that its tokens depend on:

    tokenizer.json            the vocabulary
    train.bin, val.bin        token ids, uint16 or uint32, each document followed by its end
    manifest.json             what was prepared, the size and checksum of both

It is built beside its place, under a name ending in `.partial`, and renamed when complete: what bears the final name is
whole, whenever the process was killed. `progress.json` in the partial folder says up to where its files hold finished
shards; a later run cuts off whatever follows and goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import numpy as np

from data.corpora import open_corpus
from data.formats import Corpus, DataError, Shard
from data.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe
from runtime.files import write_atomically
from runtime.progress import progress_bar

if TYPE_CHECKING:
    pass

FORMAT = 1  # of the prepared folder: part of its name's hash
SPLITS = ("train", "val")
SAMPLE_CHARS = 32 * 2**20  # of text to train a BPE vocabulary on: more changes few of its merges
CHUNK = 2**24  # tokens counted at a time
BATCH_CHARS = 8 * 2**20  # of text in memory at a time, unless a document is longer
VERIFY_BYTES = 64 * 2**20  # files up to this are checked in full each time they are opened, in well under 0.1 s
DIGEST_BYTES = 16  # of a document's hash: too many for two documents ever to share one
REPORT_S = 30.0  # between lines about progress where there is no terminal for a progress bar


@dataclass(frozen=True)
class DataConfig:
    """What text to train on, and as which tokens."""

    corpus: Annotated[
        str, "corpus name (docstrings, stdlib, tinystories, ...) or path to text, JSONL, Parquet or a folder"
    ] = "docstrings"
    tokenizer: Annotated[
        Literal["bytes", "bpe", "gpt2"], "raw bytes, BPE trained on the corpus, or GPT-2's vocabulary"
    ] = "bpe"
    vocab_size: Annotated[int, "[257, inf)", "size of a trained BPE vocabulary"] = 2048
    val_fraction: Annotated[float, "(0, 1)", "share of documents held out, without a validation split"] = 0.01
    max_tokens: Annotated[int, "[0, inf)", "stop preparing after this many training tokens (0: all)"] = 0
    packing: Annotated[
        Literal["stream", "documents"], "stream: a token sees all before it; documents: what its own document has"
    ] = "stream"
    shift: Annotated[
        int, "[0, 1]", "tokens by which targets are ahead; 0, the input itself, is a mistake to reproduce"
    ] = 1
    cache: Annotated[str, "folder of prepared corpora"] = "data/cache"

    @property
    def expected_vocab_size(self) -> int:
        """The size of the vocabulary that preparing will give, known before it begins."""
        return {"bytes": 257, "bpe": self.vocab_size, "gpt2": 50257}[self.tokenizer]

    @property
    def separator(self) -> int:
        """The id that parts documents packed apart, the end of text, which every vocabulary has last; else -1."""
        return self.expected_vocab_size - 1 if self.packing == "documents" else -1


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. `train` and `val` are read-only maps of files: 1-D, uint16 or uint32.

    `summary` is the manifest: `corpus`, `fingerprint`, `tokenizer`, for `train` and for `val` its `documents`, `bytes`
    of text and `tokens`, and the size and SHA-256 of each of `files`.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    path: Path
    summary: dict


def prepare(config: DataConfig, say: Callable[[str], None] = print) -> Dataset:
    """The corpus as tokens, prepared now or before; `say` gets a line for each stage.

    Where a corpus comes without a validation split, a hash of each document decides, so that identical texts fall on
    one side, whatever their order. Should that hold out nothing, as with a single text file, the last `val_fraction`
    of the tokens is held out, from a line's beginning where there is one.

    Of processes preparing the same at once, the first does and the others open what it made. DataError as the corpus
    and the tokenizers raise it, for a corpus too small to split, and for a prepared folder that is damaged.
    """
    corpus = open_corpus(config.corpus)
    vocab_size = config.vocab_size if config.tokenizer == "bpe" else None
    parts = (FORMAT, corpus.name, corpus.fingerprint, config.tokenizer, vocab_size)
    key = hashlib.sha256(repr((*parts, config.val_fraction, config.max_tokens)).encode()).hexdigest()[:12]
    folder = Path(config.cache) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', corpus.name)}-{config.tokenizer}-{key}"
    if not folder.exists():
        with _locked(folder.with_name(folder.name + ".lock"), say):
            if not folder.exists():
                _Preparation(corpus, config, folder, say).run()
    return _open(folder)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on `path`, which the system releases should the process be killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {path.parent}: {error.strerror}; --data.cache names another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is preparing {path.stem}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class _Progress:
    """How far a partial folder has got: the shards that it holds, and how many bytes of each file they take."""

    shards: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=lambda: {"train.bin": 0, "val.bin": 0, "seen.bin": 0})


class _Preparation:
    """The making of one prepared folder."""

    def __init__(self, corpus: Corpus, config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.corpus = corpus
        self.config = config
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self.say = say
        self.samples: dict[str, list[str]] = {}  # documents of the shards that training a vocabulary has read in full

    def run(self) -> None:
        started = time.monotonic()
        self.partial.mkdir(exist_ok=True)
        # Those of validation first, so that their documents are known when those of training are read.
        shards = sorted(self.corpus.shards(), key=lambda shard: shard.split != "val")
        vocabulary, state = self.partial / "tokenizer.json", self.partial / "progress.json"
        if not vocabulary.exists():
            self._make_tokenizer(shards).save(vocabulary)
        tokenizer = Tokenizer.load(vocabulary)
        progress = _Progress(**json.loads(state.read_text())) if state.exists() else _Progress()
        self._tokenize(shards, tokenizer, progress)
        summary = {"corpus": self.corpus.name, "fingerprint": self.corpus.fingerprint, "tokenizer": tokenizer.name}
        for split in SPLITS:
            summary[split] = _finish(self.partial / f"{split}.bin", progress.sizes[f"{split}.bin"], tokenizer)
        files = [vocabulary, *(self.partial / f"{split}.bin" for split in SPLITS)]
        summary["files"] = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
        write_atomically(self.partial / "manifest.json", json.dumps(summary, indent=2))
        self.partial.rename(self.folder)
        for name in ("progress.json", "seen.bin"):
            (self.folder / name).unlink()
        documents, size, tokens = (
            sum(summary[split][of] for split in SPLITS) for of in ("documents", "bytes", "tokens")
        )
        self.say(
            f"prepared {self.corpus.name} in {time.monotonic() - started:.0f} s: {documents:,} documents, "
            f"{size / 1e6:,.1f} MB, {tokens / 1e6:,.1f} M tokens, {summary['val']['tokens']:,} of them for validation"
        )

    def _make_tokenizer(self, shards: list[Shard]) -> Tokenizer:
        """The tokenizer chosen. BPE trains on what the model will: not on validation text, unless that has yet to be
        carved from the training text. Of a large corpus its beginning must do: to sample all would be to download all.
        """
        if self.config.tokenizer != "bpe":
            return {"bytes": byte_tokenizer, "gpt2": gpt2_tokenizer}[self.config.tokenizer]()
        started = time.monotonic()
        splitter = _Splitter(self.corpus.deduplicate, self.config.val_fraction)
        sample: list[str] = []
        room = SAMPLE_CHARS
        for shard in shards:
            if shard.split == "val" or not room:
                continue
            documents = []
            for text in shard.read():
                documents.append(text)
                if splitter.split(shard, text) == "train":
                    sample.append(text[:room])
                    room -= len(sample[-1])
                if not room:
                    break
            else:
                self.samples[shard.name] = documents
        tokenizer = train_bpe(sample, self.config.vocab_size)
        self.say(
            f"read {(SAMPLE_CHARS - room) / 1e6:.1f} M characters of {self.corpus.name} and trained a BPE vocabulary "
            f"of {tokenizer.vocab_size:,} on them in {time.monotonic() - started:.0f} s"
        )
        return tokenizer

    def _tokenize(self, shards: list[Shard], tokenizer: Tokenizer, progress: _Progress) -> None:
        """Append the tokens of every shard that `progress` lacks, and save it after each: a kill costs one shard."""
        name, config = self.corpus.name, self.config
        if progress.shards:
            self.say(f"resuming {name} after {len(progress.shards)} of {len(shards)} shards")
        limit = config.max_tokens * tokenizer.dtype.itemsize or sys.maxsize
        with ExitStack() as stack:
            train, val, seen = files = [
                stack.enter_context(_open_end(self.partial / file, size)) for file, size in progress.sizes.items()
            ]

            def save() -> None:
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
                progress.sizes = dict(zip(progress.sizes, (file.tell() for file in files), strict=True))
                write_atomically(self.partial / "progress.json", json.dumps(asdict(progress)))

            splitter = _Splitter(self.corpus.deduplicate, config.val_fraction, Path(seen.name).read_bytes())
            bar = progress_bar(self.say, desc=f"tokenizing {name}", unit="char", unit_scale=True)
            if bar is not None:
                stack.enter_context(bar)
            reported = time.monotonic()
            for shard in shards:
                if shard.name in progress.shards or train.tell() >= limit:
                    continue
                for texts in _batched(self.samples.pop(shard.name, None) or shard.read()):
                    sides: dict[str | None, list[str]] = {"train": [], "val": [], None: []}
                    for text in texts:
                        sides[splitter.split(shard, text)].append(text)
                    train.write(tokenizer.encode_documents(sides["train"]))
                    val.write(tokenizer.encode_documents(sides["val"]))
                    if bar is not None:
                        bar.update(sum(map(len, texts)))
                    elif time.monotonic() - reported > REPORT_S:
                        reported = time.monotonic()
                        tokens = train.tell() / tokenizer.dtype.itemsize
                        self.say(f"tokenizing {name}: {tokens / 1e6:,.1f} M tokens so far, in shard {shard.name}")
                    if train.tell() >= limit:
                        break
                seen.write(splitter.fresh)
                splitter.fresh.clear()
                progress.shards.append(shard.name)
                save()
            if not train.tell():
                raise DataError(f"{name} has no documents to train on")
            if not val.tell():
                train.flush()
                tokens = np.memmap(train.name, tokenizer.dtype, "r")
                tail = _tail(tokens, tokenizer, config.val_fraction, name)
                val.write(tokens[tail:])
                train.seek(tail * tokenizer.dtype.itemsize)
            train.seek(min(train.tell(), limit))  # where it ends: `_finish` cuts off what follows
            save()


class _Splitter:
    """Decides for each document, from its content, whether it is for training, for validation or a repeat."""

    def __init__(self, deduplicate: bool, val_fraction: float, seen: bytes = b"") -> None:
        self.deduplicate = deduplicate
        self.val_fraction = val_fraction
        # Digests: of every document if repeats are to go, else of those in validation shards.
        self.seen = {seen[start : start + DIGEST_BYTES] for start in range(0, len(seen), DIGEST_BYTES)}
        self.fresh = bytearray()  # those of `seen` added since

    def split(self, shard: Shard, text: str) -> str | None:
        """The name of a split, or None for a repeat."""
        digest = hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
        if digest in self.seen:
            return None
        if self.deduplicate or shard.split == "val":
            self.seen.add(digest)
            self.fresh += digest
        if shard.split is not None:
            return shard.split
        if self.deduplicate and len(self.seen) == 1:
            return "train"  # the first document: there may be no other
        return "val" if int.from_bytes(digest[:8], "big") < self.val_fraction * 2**64 else "train"


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _open_end(path: Path, size: int) -> BinaryIO:
    """Open a file to append to its first `size` bytes; what follows them, an interrupted shard's, goes."""
    path.touch()
    if path.stat().st_size < size:
        raise DataError(
            f"{path} has lost some of its {size:,} bytes: delete {path.parent} to prepare from the beginning"
        )
    os.truncate(path, size)
    file = path.open("r+b")
    file.seek(size)
    return file


def _tail(tokens: np.ndarray, tokenizer: Tokenizer, fraction: float, name: str) -> int:
    """Where the last `fraction` of `tokens` begins: after a line's end, should one come within that distance before."""
    if len(tokens) < 4:
        raise DataError(f"{name} is {len(tokens)} tokens long: too short to hold any out for validation")
    held_out = min(max(2, round(fraction * len(tokens))), len(tokens) - 2)
    cut = len(tokens) - held_out
    ends_line = np.zeros(tokenizer.vocab_size, bool)
    ends_line[[tokenizer.eot, *(id for token, id in tokenizer.ranks.items() if token.endswith(b"\n"))]] = True
    first = max(1, cut - held_out)
    ends = np.flatnonzero(ends_line[tokens[first:cut]])
    return first + int(ends[-1]) + 1 if len(ends) else cut


def _finish(path: Path, size: int, tokenizer: Tokenizer) -> dict[str, int]:
    """Cut a file of tokens to `size` bytes and count what it holds."""
    _open_end(path, size).close()
    tokens = np.memmap(path, tokenizer.dtype, "r+")
    tokens[-1] = tokenizer.eot  # as is the case already unless the file was cut within a document
    tokens.flush()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(tokens), CHUNK):
        counts += np.bincount(tokens[start : start + CHUNK], minlength=tokenizer.vocab_size)
    return {
        "documents": int(counts[tokenizer.eot]),
        "bytes": int(counts @ tokenizer.byte_lengths()),
        "tokens": len(tokens),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: Path) -> Dataset:
    """A prepared folder. Sizes are always checked, and the content of files up to VERIFY_BYTES: in full a corpus of
    billions of tokens would hold up every start by a minute, and was checksummed from disk when it was prepared."""
    try:
        summary = json.loads((folder / "manifest.json").read_text())
        for name, expected in summary["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise DataError(f"{name} has {size:,} bytes, not {expected['size']:,}")
            if size <= VERIFY_BYTES and _sha256(folder / name) != expected["sha256"]:
                raise DataError(f"{name} differs from what was written")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        train, val = (np.memmap(folder / f"{split}.bin", tokenizer.dtype, "r") for split in SPLITS)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DataError(f"{folder} is damaged: {error}. Delete it to prepare it again") from error
    return Dataset(tokenizer, train, val, folder, summary)
