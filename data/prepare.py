"""Prepare a corpus: tokenize it once into two arrays of token ids on disk.

A prepared corpus is a folder in the cache, named by a hash of everything that its tokens depend on:

    tokenizer.json            the vocabulary
    train.bin, val.bin        token ids, uint16 or uint32; each document ends with the end-of-text token
    manifest.json             corpus, tokenizer, statistics, sizes and checksums

It is built in a folder with the suffix `.partial`, which is renamed when complete. A folder with the final name is
therefore always complete, even if the process is killed. `progress.json` in the partial folder records the finished
shards and how many bytes of each file they take; a later run truncates the files there and continues.
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
from typing import Annotated, BinaryIO, Literal

import numpy as np

from data.corpora import open_corpus
from data.formats import Corpus, DataError, Shard
from data.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe
from runtime.files import write_atomically
from runtime.progress import progress_bar

FORMAT = 1  # version of the prepared folder, part of the hash in its name
SPLITS = ("train", "val")
SAMPLE_CHARS = 32 * 2**20  # characters to train a BPE vocabulary on; more would change few merges
CHUNK = 2**24  # tokens counted at a time
BATCH_CHARS = 8 * 2**20  # characters of text in memory at a time, unless a document is longer
VERIFY_BYTES = 64 * 2**20  # files up to this size are checksummed each time they are opened, in well under 0.1 s
DIGEST_BYTES = 16  # bytes of a document's hash; 128 bits make collisions negligible
REPORT_S = 30.0  # seconds between progress lines when there is no progress bar


@dataclass(frozen=True)
class DataConfig:
    """The corpus, the tokenizer, and how documents become training windows."""

    corpus: Annotated[
        str, "corpus name (docstrings, stdlib, tinystories, ...) or path of a text, JSONL or Parquet file or a folder"
    ] = "docstrings"
    tokenizer: Annotated[Literal["bytes", "bpe", "gpt2"], "raw bytes, BPE trained on the corpus, or GPT-2's BPE"] = (
        "bpe"
    )
    vocab_size: Annotated[int, "[257, inf)", "vocabulary size of trained BPE"] = 2048
    val_fraction: Annotated[
        float, "(0, 1)", "fraction of documents to hold out, if the corpus has no validation split"
    ] = 0.01
    max_tokens: Annotated[int, "[0, inf)", "maximum number of training tokens to prepare (0: all)"] = 0
    packing: Annotated[
        Literal["stream", "documents"], "stream: attend across documents; documents: mask attention to each document"
    ] = "stream"
    shift: Annotated[int, "[0, 1]", "offset of targets from inputs in tokens; 0 reproduces a published mistake"] = 1
    cache: Annotated[str, "folder for prepared corpora"] = "data/cache"

    @property
    def expected_vocab_size(self) -> int:
        """Vocabulary size of the tokenizer, known before preparation."""
        return {"bytes": 257, "bpe": self.vocab_size, "gpt2": 50257}[self.tokenizer]

    @property
    def separator(self) -> int:
        """Id that separates masked documents: end-of-text, the last id of every vocabulary; -1 for packing stream."""
        return self.expected_vocab_size - 1 if self.packing == "documents" else -1


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. `train` and `val` are read-only memory-mapped token arrays: 1-D, uint16 or uint32.

    `summary` is the manifest: `corpus`, `fingerprint` and `tokenizer`; for each of `train` and `val` the numbers of
    `documents`, `bytes` of text and `tokens`; and the size and SHA-256 of each of `files`.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    path: Path
    summary: dict


def prepare(config: DataConfig, say: Callable[[str], None] = print) -> Dataset:
    """Open the prepared corpus, after preparing it if necessary. `say` gets a line for each stage.

    If a corpus has no validation split, a hash of each document assigns it, so identical documents are always in the
    same split. If this holds out nothing, as with a single text file, the last `val_fraction` of the tokens is held
    out, from the start of a line if possible.

    If several processes prepare the same corpus, one does the work and the others wait. Raises `DataError` for an
    invalid corpus or tokenizer, a corpus too small to split, and a damaged prepared folder.
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
    """A context that holds a file lock on `path`. The system releases it if the process is killed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {path.parent}: {error.strerror}; choose another folder with --data.cache"
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
    """Contents of progress.json: the finished shards, and the bytes that they take in each file."""

    shards: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=lambda: {"train.bin": 0, "val.bin": 0, "seen.bin": 0})


class _Preparation:
    """Builds one prepared folder."""

    def __init__(self, corpus: Corpus, config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.corpus = corpus
        self.config = config
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self.say = say
        self.cached_shards: dict[str, list[str]] = {}  # documents of shards that BPE training read to the end

    def run(self) -> None:
        """Prepare the folder, from the beginning or from the last finished shard. Raises `DataError`."""
        started = time.monotonic()
        self.partial.mkdir(exist_ok=True)
        # Validation shards come first, so that their documents can be dropped from training shards.
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
            sum(summary[split][key] for split in SPLITS) for key in ("documents", "bytes", "tokens")
        )
        self.say(
            f"prepared {self.corpus.name} in {time.monotonic() - started:.0f} s: {documents:,} documents, "
            f"{size / 1e6:,.1f} MB, {tokens / 1e6:,.1f} M tokens, {summary['val']['tokens']:,} of them for validation"
        )

    def _make_tokenizer(self, shards: list[Shard]) -> Tokenizer:
        """Load or train the tokenizer.

        BPE is trained on training documents only, unless the validation split is cut from a single text later. It uses
        the beginning of a large corpus, because a sample of all of it would need all of it downloaded."""
        if self.config.tokenizer != "bpe":
            return {"bytes": byte_tokenizer, "gpt2": gpt2_tokenizer}[self.config.tokenizer]()
        started = time.monotonic()
        splitter = _Splitter(self.corpus.deduplicate, self.config.val_fraction)
        sample: list[str] = []
        remaining = SAMPLE_CHARS
        for shard in shards:
            if shard.split == "val" or not remaining:
                continue
            documents = []
            for text in shard.read():
                documents.append(text)
                if splitter.split(shard, text) == "train":
                    sample.append(text[:remaining])
                    remaining -= len(sample[-1])
                if not remaining:
                    break
            else:
                self.cached_shards[shard.name] = documents
        tokenizer = train_bpe(sample, self.config.vocab_size)
        self.say(
            f"read {(SAMPLE_CHARS - remaining) / 1e6:.1f} M characters of {self.corpus.name} and trained a BPE "
            f"vocabulary of {tokenizer.vocab_size:,} on them in {time.monotonic() - started:.0f} s"
        )
        return tokenizer

    def _tokenize(self, shards: list[Shard], tokenizer: Tokenizer, progress: _Progress) -> None:
        """Append the tokens of each unfinished shard, and then save `progress`: a kill loses at most one shard."""
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
                for texts in _batched(self.cached_shards.pop(shard.name, None) or shard.read()):
                    by_split: dict[str | None, list[str]] = {"train": [], "val": [], None: []}
                    for text in texts:
                        by_split[splitter.split(shard, text)].append(text)
                    train.write(tokenizer.encode_documents(by_split["train"]))
                    val.write(tokenizer.encode_documents(by_split["val"]))
                    if bar is not None:
                        bar.update(sum(map(len, texts)))
                    elif time.monotonic() - reported > REPORT_S:
                        reported = time.monotonic()
                        tokens = train.tell() / tokenizer.dtype.itemsize
                        self.say(f"tokenizing {name}: {tokens / 1e6:,.1f} M tokens so far, in shard {shard.name}")
                    if train.tell() >= limit:
                        break
                seen.write(splitter.new_digests)
                splitter.new_digests.clear()
                progress.shards.append(shard.name)
                save()
            if not train.tell():
                raise DataError(f"{name} has no documents to train on")
            if not val.tell():
                train.flush()
                tokens = np.memmap(train.name, tokenizer.dtype, "r")
                val_start = _validation_start(tokens, tokenizer, config.val_fraction, name)
                val.write(tokens[val_start:])
                train.seek(val_start * tokenizer.dtype.itemsize)
            train.seek(min(train.tell(), limit))  # the position is the file's size; `_finish` truncates it there
            save()


class _Splitter:
    """Assigns each document, by its content, to training or validation, or marks it as a duplicate."""

    def __init__(self, deduplicate: bool, val_fraction: float, seen: bytes = b"") -> None:
        self.deduplicate = deduplicate
        self.val_fraction = val_fraction
        # Digests of all documents if duplicates are dropped, otherwise of those in validation shards.
        self.seen = {seen[start : start + DIGEST_BYTES] for start in range(0, len(seen), DIGEST_BYTES)}
        self.new_digests = bytearray()  # digests added to `seen` since the last shard

    def split(self, shard: Shard, text: str) -> str | None:
        """Return "train", "val" or, for a duplicate, None."""
        digest = hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
        if digest in self.seen:
            return None
        if self.deduplicate or shard.split == "val":
            self.seen.add(digest)
            self.new_digests += digest
        if shard.split is not None:
            return shard.split
        if self.deduplicate and len(self.seen) == 1:
            return "train"  # the first document, since it may be the only one
        return "val" if int.from_bytes(digest[:8], "big") < self.val_fraction * 2**64 else "train"


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists of at least `BATCH_CHARS` characters, except the last."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def _open_end(path: Path, size: int) -> BinaryIO:
    """Truncate a file to `size` bytes, which removes an interrupted shard, and open it for appending."""
    path.touch()
    if path.stat().st_size < size:
        raise DataError(f"{path} has lost some of its {size:,} bytes: delete {path.parent} to prepare it again")
    os.truncate(path, size)
    file = path.open("r+b")
    file.seek(size)
    return file


def _validation_start(tokens: np.ndarray, tokenizer: Tokenizer, fraction: float, name: str) -> int:
    """Index at which the last `fraction` of `tokens` starts; moved back to a line's start if one is close enough."""
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
    """Truncate a file of tokens to `size` bytes. Returns its numbers of documents, bytes of text and tokens."""
    _open_end(path, size).close()
    tokens = np.memmap(path, tokenizer.dtype, "r+")
    tokens[-1] = tokenizer.eot  # it differs only if the file was truncated within a document
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
    """Open a prepared folder. Raises `DataError` if it is damaged.

    Sizes are always checked, and checksums for files up to `VERIFY_BYTES`: for billions of tokens, checksums would
    delay every start by a minute."""
    try:
        summary = json.loads((folder / "manifest.json").read_text())
        for name, expected in summary["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise DataError(f"{name} has {size:,} bytes, not {expected['size']:,}")
            if size <= VERIFY_BYTES and _sha256(folder / name) != expected["sha256"]:
                raise DataError(f"{name} does not have its checksum")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        train, val = (np.memmap(folder / f"{split}.bin", tokenizer.dtype, "r") for split in SPLITS)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DataError(f"{folder} is damaged: {error}. Delete it to prepare it again") from error
    return Dataset(tokenizer, train, val, folder, summary)
