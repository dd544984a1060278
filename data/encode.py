"""Tokenize the text of a corpus into a folder: `train.bin`, `val.bin` and the rest of what `data.prepare` describes.

Documents are read in batches of a few megabytes. While one batch is read, threads encode the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data.formats import Corpus, DataError, Document, Shard, digest, pieces
from data.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, train_bpe
from runtime.files import write_atomically
from runtime.progress import progress_bar

if TYPE_CHECKING:
    from data.prepare import DataConfig

SPLITS = ("train", "val")
SAMPLE_CHARS = 32 * 2**20  # characters to train a BPE vocabulary on; more would change few merges
CHUNK = 2**21  # tokens counted or searched at a time
BATCH_CHARS = 8 * 2**20  # characters of text per batch, of which two are in memory at a time
GROUP_CHARS = 2**18  # characters that a thread encodes at a time
DIGEST_BYTES = 16  # bytes of a document's hash; 128 bits make collisions negligible
REPORT_S = 30.0  # seconds between progress lines when there is no progress bar


@dataclass
class _Progress:
    """Contents of progress.json: the finished shards, digests of their text, the documents of them that were dropped
    because they occurred before, and the bytes that they take in each file."""

    shards: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    duplicates: int = 0
    sizes: dict[str, int] = field(default_factory=lambda: {"train.bin": 0, "val.bin": 0, "seen.bin": 0})


class Preparation:
    """Builds one prepared folder, with the tokenizer that is `given` or else the configuration's."""

    def __init__(
        self, corpus: Corpus, config: DataConfig, given: Tokenizer | None, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.corpus = corpus
        self.config = config
        self.given = given
        self.folder = folder
        self.partial = folder.with_name(folder.name + ".partial")
        self.say = say
        self.cached_shards: dict[str, list[Document]] = {}  # documents of shards that BPE training read to the end

    def run(self) -> None:
        """Prepare the folder, from the beginning or from the last finished shard. Raises `DataError`.

        After an error in local files nothing is kept, since mended files are a new corpus; if the disk is full, the
        finished shards are."""
        with disk_errors(self.corpus.name, self.partial):
            try:
                self._run()
            except DataError:
                if not self.corpus.remote:
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise
            except OSError:
                if not (self.partial / "progress.json").exists():
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise

    def _run(self) -> None:
        started = time.monotonic()
        self.partial.mkdir(exist_ok=True)
        vocabulary, state = self.partial / "tokenizer.json", self.partial / "progress.json"
        progress = _Progress(**json.loads(state.read_text())) if state.exists() else _Progress()
        # Validation shards come first, so that their documents can be dropped from training shards.
        shards = sorted(self.corpus.shards(), key=lambda shard: shard.split != "val")
        if not vocabulary.exists():
            (self.given or fixed_tokenizer(self.config) or self._train_tokenizer(shards)).save(vocabulary)
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
            finish(path, progress.sizes[path.name], tokenizer)
        with ThreadPoolExecutor() as pool:
            files = {path: pool.submit(file_entry, path) for path in (vocabulary, *splits.values())}
            for split, path in splits.items():
                summary[split] = count_tokens([np.memmap(path, tokenizer.dtype, "r")], tokenizer)
        summary["files"] = {path.name: entry.result() for path, entry in files.items()}
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

    def _train_tokenizer(self, shards: list[Shard]) -> Tokenizer:
        """Train a BPE tokenizer on the beginning of the corpus."""
        started = time.monotonic()
        sample, self.cached_shards = sample_text(self.corpus, shards, self.config.val_fraction)
        return train_vocabulary(sample, self.corpus.name, self.config, started, self.say)

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
            train.seek(min(train.tell(), limit))  # the position is the file's size; `finish` truncates it there
            save()


def fixed_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of a configuration, unless it is published or trained on the corpus. Raises `DataError`."""
    make = {"bytes": byte_tokenizer, "gpt2": gpt2_tokenizer}.get(config.own_tokenizer)
    return make() if make else None


def sample_text(
    corpus: Corpus, shards: list[Shard], val_fraction: float, share: float = 1.0
) -> tuple[list[str], dict[str, list[Document]]]:
    """Text to train a vocabulary on, a `share` of `SAMPLE_CHARS`, and the documents of the shards that were read whole.

    It is the beginning of the corpus, because a sample of all of a large one would need all of it downloaded; and of
    training documents only, unless the validation split is cut from a single text later."""
    chars = round(share * SAMPLE_CHARS)
    splitter = _Splitter(corpus.deduplicate, val_fraction)
    sample: list[str] = []
    whole: dict[str, list[Document]] = {}
    for shard in shards:
        if shard.split == "val" or not chars:
            continue
        documents = []
        for document in shard.read():
            documents.append(document)
            for piece in pieces(document) if splitter.split(shard, document)[0] == "train" else ():
                sample.append(piece[:chars])
                chars -= len(sample[-1])
                if not chars:
                    break
            if not chars:
                break
        else:
            whole[shard.name] = documents
    return sample, whole


def train_vocabulary(
    sample: list[str], name: str, config: DataConfig, started: float, say: Callable[[str], None]
) -> Tokenizer:
    """Train a BPE tokenizer on a sample of the corpus `name`, and say so. Raises `DataError`."""
    size, chars = config.expected_vocab_size, sum(map(len, sample))
    tokenizer = train_bpe(sample, size, not config.vocab_size)
    say(
        f"read {chars / 1e6:.1f} M characters of {name} and trained a BPE vocabulary of {len(tokenizer.ids):,} on them "
        f"in {time.monotonic() - started:.0f} s"
        + (f"; they support no more of the {size:,} ids" if len(tokenizer.ids) < size else "")
    )
    return tokenizer


@contextmanager
def disk_errors(name: str, folder: Path) -> Iterator[None]:
    """A context that converts an `OSError` while a corpus is prepared in a folder to a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot prepare {name} in {folder}: {error.strerror or error}; free some space, or choose another folder "
            "with --data.cache"
        ) from error


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


def finish(path: Path, size: int, tokenizer: Tokenizer) -> None:
    """Truncate a file of tokens to `size` bytes."""
    _open_end(path, size).close()
    tokens = np.memmap(path, tokenizer.dtype, "r+")
    tokens[-1] = tokenizer.eot  # it differs only if the file was truncated within a document
    tokens.flush()


def count_tokens(arrays: list[np.ndarray], tokenizer: Tokenizer) -> dict[str, int]:
    """Numbers of documents, bytes of text and tokens of arrays. Raises `DataError` for an id beyond the vocabulary."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for tokens in arrays:
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            if (highest := int(chunk.max())) >= len(counts):
                raise DataError(
                    f"{tokens.filename} has the id {highest}, and the ids of the tokenizer {tokenizer.name} end at "
                    f"{len(counts) - 1}: name the one that made the tokens with --data.tokenizer"
                )
            counts += np.bincount(chunk, minlength=len(counts))
    return {
        "documents": int(counts[tokenizer.eot]),
        "bytes": int(counts @ tokenizer.byte_lengths()),
        "tokens": int(counts.sum()),
    }


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file in a manifest's `files`."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
