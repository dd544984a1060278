"""Prepare a corpus: tokenize it once into two arrays of token ids on disk.

A prepared corpus is a folder in the cache, named by a hash of everything that its tokens depend on:

    tokenizer.json            the vocabulary
    train.bin, val.bin        token ids, uint16 or uint32; each document ends with the end-of-text token
    manifest.json             corpus, digest of its text, tokenizer, statistics, sizes and checksums

It is built in a folder with the suffix `.partial`, which is renamed when complete. A folder with the final name is
therefore always complete, even if the process is killed. `progress.json` in the partial folder records the finished
shards and how many bytes of each file they take; a later run truncates the files there and continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np

from data.corpora import open_corpus
from data.formats import Corpus, DataError, Document, Shard, digest, pieces
from data.tokenizer import SPLIT_PATTERN, Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe
from runtime.files import locked, write_atomically
from runtime.progress import progress_bar

FORMAT = 1  # version of the prepared folder, part of the hash in its name
SPLITS = ("train", "val")
DEFAULT_VOCAB_SIZE = 4096
SAMPLE_CHARS = 32 * 2**20  # characters to train a BPE vocabulary on; more would change few merges
CHUNK = 2**21  # tokens counted or searched at a time
BATCH_CHARS = 8 * 2**20  # characters of text per batch, of which two are in memory at a time
GROUP_CHARS = 2**18  # characters that a thread encodes at a time
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
    vocab_size: Annotated[
        int, "[0, inf)", "vocabulary size of trained BPE (0: 4096, fewer tokens for a short text)"
    ] = 0
    val_fraction: Annotated[
        float, "(0, 1)", "fraction of documents to hold out, if the corpus has no validation split"
    ] = 0.01
    max_tokens: Annotated[int, "[0, inf)", "maximum number of training tokens to prepare (0: all)"] = 0
    packing: Annotated[
        Literal["stream", "documents"], "stream: attend across documents; documents: mask attention to each document"
    ] = "stream"
    shift: Annotated[int, "[0, 1]", "offset of targets from inputs in tokens; 0 reproduces a published mistake"] = 1
    cache: Annotated[str, "folder for prepared corpora"] = "data/cache"

    def __post_init__(self):
        if 0 < self.vocab_size < 257:
            raise ValueError(
                f"vocab_size must be 0 or at least 257 (all bytes and the end of a text), not {self.vocab_size}"
            )
        for name in ("corpus", "cache"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is empty: it must be {'a corpus or a path' if name == 'corpus' else 'a folder'}"
                )

    @property
    def expected_vocab_size(self) -> int:
        """Vocabulary size of the tokenizer, known before preparation."""
        return {"bytes": 257, "bpe": self.vocab_size or DEFAULT_VOCAB_SIZE, "gpt2": 50257}[self.tokenizer]

    @property
    def separator(self) -> int:
        """Id that separates masked documents: end-of-text, the last id of every vocabulary; -1 for packing stream."""
        return self.expected_vocab_size - 1 if self.packing == "documents" else -1


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. `train` and `val` are read-only memory-mapped token arrays: 1-D, uint16 or uint32.

    `summary` is the manifest: `corpus`, `fingerprint`, `digest` and `tokenizer`; the number of `duplicates` that were
    dropped; for each of `train` and `val` the numbers of `documents`, `bytes` of text and `tokens`; and the size and
    SHA-256 of each of `files`.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    path: Path
    summary: dict
    remark: str = ""  # what `digest` says about the text, in words

    @property
    def digest(self) -> str:
        """SHA-256 of the text that was read. Losses on texts of different digests are not comparable.

        Empty for a folder that a version without digests prepared.
        """
        return self.summary.get("digest", "")

    def __str__(self) -> str:
        """The corpus in words: its name, the digest's beginning, and whether it is a fixed text."""
        details = [f"digest {self.digest[:12]}"] if self.digest else []
        details += [self.remark] if self.remark else []
        return self.summary["corpus"] + (f" ({', '.join(details)})" if details else "")


def prepare(config: DataConfig, say: Callable[[str], None] = print) -> Dataset:
    """Open the prepared corpus, after preparing it if necessary. `say` gets a line for each stage.

    If a corpus has no validation split, a hash of each document assigns it, so identical documents are always in the
    same split. If this holds out nothing, as with a single text file, the last `val_fraction` of the tokens is held
    out, from the start of a line if possible.

    If several processes prepare the same corpus, one does the work and the others wait. Raises `DataError` for an
    invalid corpus or tokenizer, a corpus too small to split, and a damaged prepared folder.
    """
    corpus = open_corpus(config.corpus)
    folder = _folder(config, corpus.name, corpus.fingerprint, SPLIT_PATTERN)
    if not folder.exists():
        with _locked(folder.with_name(folder.name + ".lock"), say):
            if not folder.exists():
                _Preparation(corpus, config, folder, say).run()
    dataset = _open(folder)
    cut = f"its first {config.max_tokens:,} tokens" if config.max_tokens else ""
    return replace(dataset, remark=cut or corpus.remark(dataset.digest))


def reopen(config: DataConfig, tokenizer: Tokenizer, digest: str) -> Dataset | None:
    """Open the tokens that a run was trained on, if the cache has them, even if its corpus would differ now.

    A corpus changes with a user's files, with installed packages, and with this program's version. `tokenizer` and
    `digest` ("" for a run of a version without digests) are the run's. Raises `DataError` if the folder is damaged.
    """
    name = open_corpus(config.corpus).name
    for manifest in sorted(Path(config.cache).glob("*/manifest.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            summary = json.loads(manifest.read_text())
            if summary["corpus"] != name or summary.get("digest", "") != digest:
                continue
            folders = [_folder(config, name, summary["fingerprint"], pattern) for pattern in (tokenizer.pattern, None)]
            if manifest.parent in folders and (dataset := _open(manifest.parent)).tokenizer == tokenizer:
                return replace(dataset, remark=f"as the run was trained on it, in {manifest.parent}")
    return None


def _folder(config: DataConfig, name: str, fingerprint: str, pattern: str | None) -> Path:
    """The prepared folder of a corpus. Versions before the present split pattern left it out: `pattern` is None."""
    trained = (config.vocab_size, pattern) if pattern else config.vocab_size
    parts = (FORMAT, name, fingerprint, config.tokenizer, trained if config.tokenizer == "bpe" else None)
    key = hashlib.sha256(repr((*parts, config.val_fraction, config.max_tokens)).encode()).hexdigest()[:12]
    return Path(config.cache) / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{config.tokenizer}-{key}"


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """A context that holds the lock `path`, after waiting for another process that does."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"waiting for another process that is preparing {path.stem}"
            held.enter_context(locked(path, busy=lambda pid: say(waiting)))
        except OSError as error:
            raise DataError(
                f"cannot write to {path.parent}: {error.strerror}; choose another folder with --data.cache"
            ) from error
        yield


@dataclass
class _Progress:
    """Contents of progress.json: the finished shards, digests of their text, the documents of them that were dropped
    because they occurred before, and the bytes that they take in each file."""

    shards: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    duplicates: int = 0
    sizes: dict[str, int] = field(default_factory=lambda: {"train.bin": 0, "val.bin": 0, "seen.bin": 0})


class _Preparation:
    """Builds one prepared folder."""

    def __init__(self, corpus: Corpus, config: DataConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.corpus = corpus
        self.config = config
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self.say = say
        self.cached_shards: dict[str, list[Document]] = {}  # documents of shards that BPE training read to the end

    def run(self) -> None:
        """Prepare the folder, from the beginning or from the last finished shard. Raises `DataError`.

        After an error in local files nothing is kept, since mended files are a new corpus; if the disk is full, the
        finished shards are."""
        try:
            self._run()
        except DataError:
            if not self.corpus.remote:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        except OSError as error:
            if not (self.partial / "progress.json").exists():
                shutil.rmtree(self.partial, ignore_errors=True)
            raise DataError(
                f"cannot prepare {self.corpus.name} in {self.partial}: {error.strerror or error}; free some space, or "
                "choose another folder with --data.cache"
            ) from error

    def _run(self) -> None:
        started = time.monotonic()
        self.partial.mkdir(exist_ok=True)
        vocabulary, state = self.partial / "tokenizer.json", self.partial / "progress.json"
        progress = _Progress(**json.loads(state.read_text())) if state.exists() else _Progress()
        # Validation shards come first, so that their documents can be dropped from training shards.
        shards = sorted(self.corpus.shards(), key=lambda shard: shard.split != "val")
        if not vocabulary.exists():
            self._make_tokenizer(shards).save(vocabulary)
        tokenizer = Tokenizer.load(vocabulary)
        self._tokenize(shards, tokenizer, progress)
        summary = {
            "corpus": self.corpus.name,
            "fingerprint": self.corpus.fingerprint,
            # An earlier version may have prepared the first shards, without digests.
            "digest": digest(progress.digests) if len(progress.digests) == len(progress.shards) else "",
            "tokenizer": tokenizer.name,
            "duplicates": progress.duplicates,
        }
        splits = {split: self.partial / f"{split}.bin" for split in SPLITS}
        for path in splits.values():
            _finish(path, progress.sizes[path.name], tokenizer)
        with ThreadPoolExecutor() as pool:
            checksums = {path: pool.submit(_sha256, path) for path in (vocabulary, *splits.values())}
            summary |= {split: _count(path, tokenizer) for split, path in splits.items()}
        summary["files"] = {
            path.name: {"size": path.stat().st_size, "sha256": checksum.result()}
            for path, checksum in checksums.items()
        }
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
            + (f"; {progress.duplicates:,} duplicates were dropped" if progress.duplicates else "")
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
            for document in shard.read():
                documents.append(document)
                for piece in pieces(document) if splitter.split(shard, document)[0] == "train" else ():
                    sample.append(piece[:remaining])
                    remaining -= len(sample[-1])
                    if not remaining:
                        break
                if not remaining:
                    break
            else:
                self.cached_shards[shard.name] = documents
        size = self.config.expected_vocab_size
        tokenizer = train_bpe(sample, size, not self.config.vocab_size)
        self.say(
            f"read {(SAMPLE_CHARS - remaining) / 1e6:.1f} M characters of {self.corpus.name} and trained a BPE "
            f"vocabulary of {len(tokenizer.ids):,} on them in {time.monotonic() - started:.0f} s"
            + (f"; they support no more of the {size:,} ids" if len(tokenizer.ids) < size else "")
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
            total = self.corpus.size or None
            bar = progress_bar(self.say, desc=f"tokenizing {name}", total=total, unit="char", unit_scale=True)
            if bar is not None:
                stack.enter_context(bar)
            reported = time.monotonic()
            pool = ThreadPoolExecutor(os.cpu_count())
            stack.callback(pool.shutdown, cancel_futures=True)
            for shard in shards:
                if shard.name in progress.shards or train.tell() >= limit:
                    continue
                text = hashlib.sha256()
                documents = self.cached_shards.pop(shard.name, None) or shard.read()
                # One batch is read while the one before it is encoded. What is read too far is not recorded.
                for batch in _one_ahead(
                    _batches(shard, documents, splitter, partial(pool.submit, tokenizer.encode_documents))
                ):
                    for split, file in (("train", train), ("val", val)):
                        for tokens in batch.tokens[split]:
                            file.write(tokens.result())
                    text.update(batch.digests)
                    progress.duplicates += batch.duplicates
                    tokens_so_far = f"{train.tell() / tokenizer.dtype.itemsize / 1e6:,.1f} M tokens"
                    if bar is not None:
                        bar.set_postfix_str(tokens_so_far, refresh=False)
                        bar.update(batch.chars)
                    elif time.monotonic() - reported > REPORT_S:
                        reported = time.monotonic()
                        self.say(f"tokenizing {name}: {tokens_so_far} so far, in shard {shard.name}")
                    if train.tell() >= limit:
                        break
                seen.write(splitter.new_digests)
                splitter.new_digests.clear()
                progress.shards.append(shard.name)
                progress.digests.append(text.hexdigest())
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

    def split(self, shard: Shard, document: Document) -> tuple[str | None, bytes]:
        """Return "train", "val" or, for a duplicate, None; and the document's digest."""
        content = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for piece in pieces(document):
            content.update(piece.encode())
        digest = content.digest()
        return self._split(shard, digest), digest

    def _split(self, shard: Shard, digest: bytes) -> str | None:
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


class _Batch:
    """About `BATCH_CHARS` characters of documents, which other threads encode in groups of `GROUP_CHARS`."""

    def __init__(self, encode: Callable[[list[str | None]], Future[np.ndarray]]) -> None:
        self.encode = encode
        self.tokens: dict[str, list[Future[np.ndarray]]] = {split: [] for split in SPLITS}  # in order
        self.groups: dict[str, list[str | None]] = {split: [] for split in SPLITS}  # those to encode next
        self.group_chars = dict.fromkeys(SPLITS, 0)
        self.chars = 0
        self.duplicates = 0
        self.digests = bytearray()  # of the documents that begin in the batch

    def add(self, split: str, piece: str | None) -> None:
        """Add a piece of a document, or its end (None)."""
        self.groups[split].append(piece)
        if piece is not None:
            self.chars += len(piece)
            self.group_chars[split] += len(piece)
            if self.group_chars[split] >= GROUP_CHARS:
                self._encode(split)

    def finished(self) -> _Batch:
        """The batch, all of which is being encoded."""
        for split in SPLITS:
            self._encode(split)
        return self

    def _encode(self, split: str) -> None:
        self.tokens[split].append(self.encode(self.groups[split]))
        self.groups[split], self.group_chars[split] = [], 0


def _batches(
    shard: Shard,
    documents: Iterable[Document],
    splitter: _Splitter,
    encode: Callable[[list[str | None]], Future[np.ndarray]],
) -> Iterator[_Batch]:
    """Batches of a shard's documents."""
    batch = _Batch(encode)
    for document in documents:
        split, digest = splitter.split(shard, document)
        batch.digests += digest
        if split is None:
            batch.duplicates += 1
            continue
        for piece in pieces(document):
            batch.add(split, piece)
            if batch.chars >= BATCH_CHARS:
                yield batch.finished()
                batch = _Batch(encode)
        batch.add(split, None)
    yield batch.finished()


def _one_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same, each when the next has been read."""
    previous = None
    for batch in batches:
        if previous is not None:
            yield previous
        previous = batch
    if previous is not None:
        yield previous


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
    """Index at which the last `fraction` of `tokens` starts; moved back to a line's start if one is close enough.

    At least three are held out: a first one, and as targets one of text and the end-of-text token."""
    if len(tokens) < 5:
        raise DataError(f"{name} is {len(tokens)} tokens long: too short to hold any out for validation")
    held_out = min(max(3, round(fraction * len(tokens))), len(tokens) - 2)
    cut = len(tokens) - held_out
    ends_line = np.zeros(tokenizer.vocab_size, bool)
    ends_line[[tokenizer.eot, *(id for token, id in tokenizer.ranks.items() if token.endswith(b"\n"))]] = True
    first = max(1, cut - held_out)
    for end in range(cut, first, -CHUNK):
        start = max(first, end - CHUNK)
        ends = np.flatnonzero(ends_line[tokens[start:end]])
        if len(ends):
            return start + int(ends[-1]) + 1
    return cut


def _finish(path: Path, size: int, tokenizer: Tokenizer) -> None:
    """Truncate a file of tokens to `size` bytes."""
    _open_end(path, size).close()
    tokens = np.memmap(path, tokenizer.dtype, "r+")
    tokens[-1] = tokenizer.eot  # it differs only if the file was truncated within a document
    tokens.flush()


def _count(path: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Numbers of documents, bytes of text and tokens of a file."""
    tokens = np.memmap(path, tokenizer.dtype, "r")
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
