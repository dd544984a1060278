"""Prepare a corpus: tokenize it once into two arrays of token ids on disk.

A prepared corpus is a folder in the cache, named by a hash of everything that its tokens depend on:

    tokenizer.json            the vocabulary
    train.bin, val.bin        token ids, uint16 or uint32; each document ends with the end-of-text token
    manifest.json             corpus, digest of its text, tokenizer, statistics, sizes and checksums

For a corpus that is tokens already, the manifest has the paths of its files in place of train.bin and val.bin. For a
mixture it has the folders of the parts in place of train.bin, and how many tokens to take of each.

It is built in a folder with the suffix `.partial`, which is renamed when complete. A folder with the final name is
therefore always complete, even if the process is killed. `progress.json` in the partial folder records the finished
shards and how many bytes of each file they take; a later run truncates the files there and continues.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from data.corpora import holds_tokens, open_corpus
from data.encode import (
    SPLITS,
    Preparation,
    count_tokens,
    disk_errors,
    file_entry,
    finish,
    fixed_tokenizer,
    sample_text,
    sha256,
    train_vocabulary,
)
from data.formats import Corpus, DataError, Mixture, TokenFiles, digest
from data.tokenizer import SPLIT_PATTERN, Tokenizer, published_tokenizer
from data.tokens import Tokens, interleave, map_tokens, mixed_lengths
from runtime.files import locked, new_folder, write_atomically

FORMAT = 1  # version of the prepared folder, part of the hash in its name
DEFAULT_VOCAB_SIZE = 4096
VERIFY_BYTES = 64 * 2**20  # files up to this size are checksummed each time they are opened, in well under 0.1 s


@dataclass(frozen=True)
class DataConfig:
    """The corpus, the tokenizer, and how documents become training windows."""

    corpus: Annotated[
        str,
        "name (docstrings, stdlib, tinystories, ...); file, folder or pattern such as 'notes/**/*.md' (text, JSONL, "
        "Parquet, .bin tokens); hub:org/name[:config]; any of these with #column; or a mixture a:0.7,b:0.3 by tokens",
    ] = "docstrings"
    tokenizer: Annotated[
        str,
        "bytes, bpe (trained on the corpus; for .bin tokens gpt2), gpt2, or a published one: hub:org/name, or the path "
        "of a tokenizer.json",
    ] = "bpe"
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
        for name, kind in {"corpus": "a corpus or a path", "tokenizer": "a tokenizer", "cache": "a folder"}.items():
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: it must be {kind}")

    @cached_property
    def own_tokenizer(self) -> str:
        """`tokenizer`; but "gpt2" instead of "bpe" for a corpus that is tokens already, which cannot train one."""
        return "gpt2" if self.tokenizer == "bpe" and holds_tokens(self.corpus) else self.tokenizer

    @cached_property
    def published(self) -> Tokenizer | None:
        """The tokenizer, if it is a published one; it may be downloaded. Raises `DataError`."""
        return None if self.tokenizer in ("bytes", "bpe", "gpt2") else published_tokenizer(self.tokenizer)

    @property
    def expected_vocab_size(self) -> int:
        """Vocabulary size of the tokenizer, known before preparation. Raises `DataError` as `published` does."""
        if self.published:
            return self.published.vocab_size
        return {"bytes": 257, "bpe": self.vocab_size or DEFAULT_VOCAB_SIZE, "gpt2": 50257}[self.own_tokenizer]

    @property
    def separator(self) -> int:
        """Id that separates masked documents: end-of-text, the last id of a vocabulary that is not published; -1 for
        packing stream."""
        if self.packing != "documents":
            return -1
        return self.published.eot if self.published else self.expected_vocab_size - 1


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. `train` and `val` are read-only memory-mapped token arrays: 1-D, uint16 or uint32.

    `summary` is the manifest: `corpus`, `fingerprint`, `digest` and `tokenizer`; the number of `duplicates` that were
    dropped; for each of `train` and `val` the numbers of `documents`, `bytes` of text and `tokens` (of `train` of a
    mixture only the tokens); and the size and SHA-256 of each of `files`. An array without a size is in the paths of
    `token_files`, or, for `train` of a mixture, in the folders of its `parts`.
    """

    tokenizer: Tokenizer
    train: np.ndarray | Tokens
    val: np.ndarray | Tokens
    path: Path
    summary: dict
    remark: str = ""  # in words: whether it is a fixed text, how much of it, the parts of a mixture

    @property
    def digest(self) -> str:
        """SHA-256 of the text that was read. Losses on texts of different digests are not comparable.

        Empty for a folder that a version without digests prepared.
        """
        return self.summary.get("digest", "")

    def __str__(self) -> str:
        """The corpus in words: its name, the first digits of its digest, and the remark."""
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
    dataset = _prepare(open_corpus(config.corpus), config, config.published, say)
    cut = f"its first {config.max_tokens:,} tokens" if config.max_tokens else ""
    return replace(dataset, remark=", ".join(filter(None, (cut, dataset.remark))))


def open_data(config: DataConfig, say: Callable[[str], None], own: Tokenizer | None, digest: str) -> Dataset:
    """Open the data of a run.

    A run that is resumed has its `own` tokenizer, and the `digest` of its text. It gets the tokens that it had, if they
    are still cached. Raises `DataError` as `prepare` does, and for other tokens than it had."""
    dataset = (own and reopen(config, own, digest)) or prepare(config, say)
    if own and dataset.tokenizer != own:
        raise DataError(f"{config.corpus} has other tokens now than when the run was trained on it")
    return dataset


def _prepare(
    corpus: Corpus | TokenFiles | Mixture, config: DataConfig, given: Tokenizer | None, say: Callable[[str], None]
) -> Dataset:
    """Open the prepared folder of `corpus`, or of a part of it, after making it if necessary. `given` is a published
    tokenizer, or that of a mixture; without it, the configuration says which."""
    folder = _folder(config, corpus.name, corpus.fingerprint, SPLIT_PATTERN, given)
    if not folder.exists():
        with _locked(folder.with_name(folder.name + ".lock"), say):
            if not folder.exists():
                if isinstance(corpus, Corpus):
                    Preparation(corpus, config, given, folder, say).run()
                else:
                    _prepare_index(corpus, config, given, folder, say)
    dataset = _open(folder)
    if isinstance(corpus, Corpus) and not config.max_tokens:
        return replace(dataset, remark=corpus.remark(dataset.digest))
    return dataset


def is_prepared(config: DataConfig) -> bool:
    """Whether the cache has the tokens of the corpus."""
    corpus = open_corpus(config.corpus)
    return _folder(config, corpus.name, corpus.fingerprint, SPLIT_PATTERN, config.published).exists()


def reopen(config: DataConfig, tokenizer: Tokenizer, digest: str) -> Dataset | None:
    """Open the tokens that a run was trained on, if the cache has them undamaged, even if its corpus would differ now.

    A corpus changes with a user's files, with installed packages, and with this program's version. `tokenizer` and
    `digest` ("" for a run of a version without digests) are the run's. Raises `DataError` for an invalid corpus.
    """
    name = open_corpus(config.corpus).name
    given = tokenizer if config.published else None
    for manifest in sorted(Path(config.cache).glob("*/manifest.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            summary = json.loads(manifest.read_text())
            if summary["corpus"] != name or summary.get("digest", "") != digest:
                continue
            folders = [
                _folder(config, name, summary["fingerprint"], pattern, given) for pattern in (tokenizer.pattern, None)
            ]
            if manifest.parent in folders and (dataset := _open(manifest.parent)).tokenizer == tokenizer:
                words = (dataset.remark, f"as the run was trained on it, in {manifest.parent}")
                return replace(dataset, remark=", ".join(filter(None, words)))
    return None


def _folder(
    config: DataConfig, name: str, fingerprint: str, pattern: str | None, given: Tokenizer | None = None
) -> Path:
    """The path of a corpus's prepared folder. `given` is as for `_prepare`.

    `pattern` is the split pattern of trained tokenizers; None gives the path of versions that left it out of the hash.
    """
    kind, trained = (given.name, given.digest) if given else (config.own_tokenizer, None)
    if kind == "bpe" and not given:
        trained = (config.vocab_size, pattern) if pattern else config.vocab_size
    parts = (FORMAT, name, fingerprint, kind, trained, config.val_fraction, config.max_tokens)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name[:200]}-{kind[:30]}")  # a file's name has at most 255 characters
    return Path(config.cache) / f"{label}-{key}"


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


def _prepare_index(
    corpus: TokenFiles | Mixture, config: DataConfig, given: Tokenizer | None, folder: Path, say: Callable[[str], None]
) -> None:
    """Make the prepared folder of a corpus whose tokens are elsewhere: in its own files, or those of a mixture's parts.

    Raises `DataError`."""
    make = _index_files if isinstance(corpus, TokenFiles) else _index_parts
    with disk_errors(corpus.name, folder), new_folder(folder) as partial:
        tokenizer, summary = make(corpus, config, given or fixed_tokenizer(config), partial, say)
        tokenizer.save(partial / "tokenizer.json")
        summary |= {"corpus": corpus.name, "fingerprint": corpus.fingerprint, "tokenizer": tokenizer.name}
        summary["files"]["tokenizer.json"] = file_entry(partial / "tokenizer.json")
        write_atomically(partial / "manifest.json", json.dumps(summary, indent=2))


def _index_files(
    corpus: TokenFiles, config: DataConfig, tokenizer: Tokenizer, folder: Path, say: Callable[[str], None]
) -> tuple[Tokenizer, dict]:
    """Check every id in files of tokens. Returns the tokenizer and the manifest."""
    limits = {"train": config.max_tokens or sys.maxsize, "val": sys.maxsize}
    files: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    for split, paths in corpus.files.items():
        for path in paths:
            count = min(len(map_tokens(path)), limits[split])
            limits[split] -= count
            files[split] += [(str(path.resolve()), count)] if count else []
    total = sum(count for found in files.values() for _, count in found)
    say(f"checking {total / 1e6:,.1f} M tokens of {corpus.name}, as ids of the tokenizer {tokenizer.name}")
    summary: dict[str, Any] = {"token_files": files, "duplicates": 0, "files": {}}
    with ThreadPoolExecutor() as pool:
        checksums = {split: pool.map(sha256, [Path(path) for path, _ in found]) for split, found in files.items()}
        for split, found in files.items():
            summary[split] = count_tokens([map_tokens(Path(path))[:count] for path, count in found], tokenizer)
            summary["files"][f"{split}.bin"] = {"sha256": digest(*checksums[split], summary[split]["tokens"])}
    return tokenizer, summary | {"digest": digest(summary["files"])}


def _index_parts(
    mixture: Mixture, config: DataConfig, tokenizer: Tokenizer | None, folder: Path, say: Callable[[str], None]
) -> tuple[Tokenizer, dict]:
    """Prepare the parts of a mixture with one tokenizer, which is trained on all of them unless it is given, and write
    its val.bin to `folder`. Returns the tokenizer and the manifest."""
    if tokenizer is None:
        started = time.monotonic()
        samples = [
            sample_text(corpus, corpus.shards(), config.val_fraction, share)[0] for corpus, share in mixture.parts
        ]
        tokenizer = train_vocabulary([*chain.from_iterable(samples)], mixture.name, config, started, say)
    given = None if config.own_tokenizer in ("bytes", "gpt2") else tokenizer
    parts = []
    for corpus, share in mixture.parts:
        limited = replace(config, max_tokens=math.ceil(share * config.max_tokens))
        parts.append(_prepare(corpus, limited, given, say))
    shares = [share for _, share in mixture.parts]
    lengths = mixed_lengths([len(part.train) for part in parts], shares, config.max_tokens)
    val = folder / "val.bin"
    with val.open("wb") as file:
        for tokens in interleave([part.val[:] for part in parts], shares, tokenizer.eot):
            file.write(tokens.astype(tokenizer.dtype))
    finish(val, val.stat().st_size, tokenizer)
    train = [part.summary["files"]["train.bin"]["sha256"] for part in parts]
    return tokenizer, {
        "digest": digest([part.digest for part in parts], shares),
        "duplicates": sum(part.summary["duplicates"] for part in parts),
        "parts": [
            {"folder": part.path.name, "corpus": part.summary["corpus"], "share": share, "tokens": length}
            for part, share, length in zip(parts, shares, lengths, strict=True)
        ],
        "train": {"tokens": sum(lengths)},
        "val": count_tokens([np.memmap(val, tokenizer.dtype, "r")], tokenizer),
        "files": {"train.bin": {"sha256": digest(train, lengths)}, "val.bin": file_entry(val)},
    }


def _open(folder: Path) -> Dataset:
    """Open a prepared folder. Raises `DataError` if it is damaged.

    Sizes are always checked, and checksums for files up to `VERIFY_BYTES`: for billions of tokens, checksums would
    delay every start by a minute."""
    try:
        summary = json.loads((folder / "manifest.json").read_text())
        for name, expected in summary["files"].items():
            if "size" not in expected:  # its tokens are elsewhere
                continue
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                raise DataError(f"{name} has {size:,} bytes, not {expected['size']:,}")
            if size <= VERIFY_BYTES and sha256(folder / name) != expected["sha256"]:
                raise DataError(f"{name} does not have its checksum")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        parts = [_open(folder.with_name(part["folder"])) for part in summary.get("parts", [])]
        train, val = (_open_split(folder, split, summary, parts, tokenizer) for split in SPLITS)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise DataError(f"{folder} is damaged: {error}. Delete it to prepare it again") from error
    return Dataset(tokenizer, train, val, folder, summary, _mixed(summary.get("parts", []), parts))


def _mixed(entries: list[dict], parts: list[Dataset]) -> str:
    """The parts of a mixture in words: its share, and how often it is read in an epoch of the mixture."""
    words = []
    for entry, part in zip(entries, parts, strict=True):
        epochs = f"{entry['tokens'] / len(part.train):.3g}"
        words.append(f"{entry['share']:.1%} {entry['corpus']}" + (f" {epochs} times" if epochs != "1" else ""))
    return ", ".join(words)


def _open_split(
    folder: Path, split: str, summary: dict, parts: list[Dataset], tokenizer: Tokenizer
) -> np.ndarray | Tokens:
    if split == "train" and parts:
        return Tokens([part.train for part in parts], [part["tokens"] for part in summary["parts"]])
    if files := summary.get("token_files", {}).get(split):
        arrays, counts = [map_tokens(Path(path))[:count] for path, count in files], [count for _, count in files]
        if [*map(len, arrays)] != counts:
            raise DataError(f"the files of its {split} split have fewer tokens than when they were checked")
        return Tokens(arrays, counts)
    return np.memmap(folder / f"{split}.bin", tokenizer.dtype, "r")
