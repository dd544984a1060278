"""Documents in files: a corpus is a list of shards of documents, and a reader turns a file of a kind into documents.

A document is a non-empty `str` that can be written as UTF-8. A shard is streamed: no more than a document, or a batch
of rows, is in memory at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from runtime.errors import UserError


class DataError(UserError):
    """Something is wrong with the user's data or with the way to it; the message says what would be right."""


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that is prepared as a whole: preparing is resumed between shards."""

    name: str  # stable, and unique in its corpus
    split: Literal["train", "val"] | None  # None: the corpus leaves the split to its user
    read: Callable[[], Iterator[str]]  # the documents; raises DataError


@dataclass(frozen=True)
class Corpus:
    """A body of text. `fingerprint` needs no network, and changes whenever the documents would."""

    name: str
    fingerprint: str  # hexadecimal
    deduplicate: bool  # whether exact repeats are to be dropped
    shards: Callable[[], list[Shard]]  # may need the network; raises DataError


def shard(name: str, split: Literal["train", "val"] | None, read: Callable[[], Iterable[str]]) -> Shard:
    """A shard of the non-empty documents of `read`: an empty one has nothing to learn from."""
    return Shard(name, split, lambda: filter(None, read()))


def digest(*parts: object) -> str:
    """A fingerprint of values that JSON can spell."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Readers of the kinds of file

TEXT_SUFFIXES = (
    ".txt .md .rst .tex .org .html .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .js .ts .java .kt .scala .swift "
    ".rb .php .lua .jl .hs .ml .r .sh .sql"
)


def read_text(path: Path) -> Iterator[str]:
    """A text file, as one document."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if b"\0" in content:
        raise DataError(f"{path} is not text: byte {content.index(0)} of it is NUL")
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it first") from None


def read_jsonl(path: Path) -> Iterator[str]:
    """The `text` of each line of a JSONL file, which may be compressed (.gz, .zst). Blank lines are skipped."""
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _text_field(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open_lines(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


def _text_field(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object with a field 'text' but {type(row).__name__}")
    if not isinstance(row.get("text"), str):
        fields = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
        raise DataError(f"{where}: no field 'text' holding a string; its fields: {fields}")
    return writable(row["text"])


def read_parquet(path: Path) -> Iterator[str]:
    """The rows of a Parquet file's column `text`; a null is an empty document."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {field.name: str(field.type) for field in file.schema_arrow}
            if columns.get("text") not in ("string", "large_string", "string_view"):
                found = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
                raise DataError(f"{path} has no column 'text' of strings; its columns: {found}")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


READERS = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
}


def reader(name: str) -> Callable[[Path], Iterator[str]]:
    """What reads a file of this name: by its suffix, and as text if that says nothing."""
    return next((read for suffix, read in READERS.items() if name.lower().endswith(suffix)), read_text)


def writable(text: str) -> str:
    """The text with unpaired surrogates, which JSON and Python can spell and UTF-8 cannot, replaced."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
