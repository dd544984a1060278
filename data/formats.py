"""Corpora, shards and documents, and readers of text, JSONL and Parquet files.

A corpus is a list of shards. A shard is a stream of documents; only one document, or one batch of rows, is in memory at
a time. A document is a non-empty `str` that UTF-8 can encode, or a `LongText`. `pieces` cuts both.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

from runtime.errors import UserError


class DataError(UserError):
    """The data is invalid or cannot be reached. The message says what would be right."""


@dataclass(frozen=True)
class LongText:
    """A document that is not held in memory: `read` yields its text, in parts cut anywhere, and does so repeatedly."""

    read: Callable[[], Iterator[str]]


Document = str | LongText

PIECE_CHARS = 2**17  # glibc's heap grows with the text if blocks of megabytes come and go
# Where a document may be cut: before a space that follows another character, and after a line's end between two
# characters that are not white space. No word of the split patterns of Qwen2 and GPT-2 reaches across: a space only
# starts a word or is in white space, and a word of punctuation ends with its line ends. Nor does either side depend on
# the other: the patterns look ahead in white space alone, and never back. (Around several line ends GPT-2's would.)
_CUT = re.compile(r"\S(?= )|\S\n(?=\S)")


def pieces(document: Document) -> Iterator[str]:
    """Cut a document in pieces of about `PIECE_CHARS`. Their tokens, one after another, are those of the whole."""
    if isinstance(document, str) and len(document) <= PIECE_CHARS:
        yield document
        return
    if isinstance(document, str):
        parts = (document[start : start + PIECE_CHARS] for start in range(0, len(document), PIECE_CHARS))
    else:
        parts = document.read()
    pending: list[str] = []
    for part in parts:
        cut = _last_cut(part) if len(part) >= PIECE_CHARS // 2 else 0
        if cut:
            yield "".join([*pending, part[:cut]])
            pending.clear()
        pending.append(part[cut:])
    yield "".join(pending)


def _last_cut(text: str) -> int:
    """The last position at which `text` may be cut; 0 if there is none."""
    for start in (max(0, len(text) - 4096), 0):
        if cuts := [match.end() for match in _CUT.finditer(text, start)]:
            return cuts[-1]
    return 0


@dataclass(frozen=True)
class Shard:
    """A part of a corpus. Preparation can be resumed after any shard."""

    name: str  # stable and unique within the corpus
    split: Literal["train", "val"] | None  # None: the corpus has no splits of its own
    read: Callable[[], Iterator[Document]]  # raises DataError


@dataclass(frozen=True)
class Corpus:
    """A text corpus. Its `fingerprint` changes whenever its documents do, and is computed without network access."""

    name: str
    fingerprint: str  # hexadecimal
    deduplicate: bool  # whether to drop exact duplicates
    shards: Callable[[], list[Shard]]  # may access the network; raises DataError
    remote: bool = False  # whether an error may pass by itself, so that preparation keeps what it has
    remark: Callable[[str], str] = lambda digest: ""  # what the digest of the whole text says about it, in words
    size: int = 0  # bytes of text, about, for the time left; 0 if unknown, as of compressed files


def shard(name: str, split: Literal["train", "val"] | None, read: Callable[[], Iterable[Document]]) -> Shard:
    """A shard of the documents that `read` yields, without empty ones."""
    return Shard(name, split, lambda: filter(None, read()))


def digest(*parts: object) -> str:
    """SHA-256 of JSON-serializable values, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Readers by file type

READERS_VERSION = (
    2  # part of the fingerprint of local files: it changes with the documents that a reader makes of a file
)

TEXT_SUFFIXES = (
    ".txt .md .rst .tex .org .html .py .pyi .c .h .cc .cpp .hpp .cu .cuh .rs .go .js .ts .java .kt .scala .swift "
    ".rb .php .lua .jl .hs .ml .r .sh .sql"
)


def read_text(path: Path) -> Iterator[Document]:
    """Read a text file as one document, without a byte order mark. Raises `DataError`."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    read = partial(_decode, path)
    yield LongText(read) if size > PIECE_CHARS else "".join(read())


def _decode(path: Path) -> Iterator[str]:
    """Decode a text file in parts of `PIECE_CHARS` bytes. Raises `DataError`."""
    position, rest = 0, b""  # of the bytes that are not decoded yet
    try:
        with path.open("rb") as file:
            while content := file.read(PIECE_CHARS):
                content = rest + content
                if position == 0:
                    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise DataError(f"{path} is UTF-16: convert it to UTF-8, such as with iconv -f UTF-16 -t UTF-8")
                    position = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
                    content = content[position:]
                if b"\0" in content:
                    raise DataError(f"{path} is not text: byte {position + content.index(0)} of it is NUL")
                text, used = codecs.utf_8_decode(content, "strict", False)
                yield text
                position, rest = position + used, content[used:]
        codecs.utf_8_decode(rest, "strict", True)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {position + error.start}"
        raise DataError(f"{path} is not UTF-8: {where}; convert it first") from None


def read_jsonl(path: Path) -> Iterator[str]:
    """Read the field `text` of each line of a JSONL file, which may be compressed (.gz, .zst). Skips blank lines.

    A null is an empty document. Raises `DataError`."""
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _text_field(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        # zstd's own limit, which pyarrow cannot raise
        advice = ": decompress it first, with zstd -d --long=31" if "too much memory for decoding" in str(error) else ""
        raise DataError(f"{path} cannot be read: {error}{advice}") from error


def _open_lines(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


_EACH_LINE = "each line is to be an object, which jq -c '.[]' makes of an array"


def _text_field(line: bytes, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}); {_EACH_LINE}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object with a field 'text' but {type(row).__name__}; {_EACH_LINE}")
    if row.get("text", 0) is None:
        return ""
    if not isinstance(row.get("text"), str):
        fields = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "none"
        raise DataError(f"{where}: no field 'text' holding a string; its fields: {fields}")
    return utf8_safe(row["text"])


def read_parquet(path: Path) -> Iterator[str]:
    """Read the column `text`, which may be dictionary-encoded, of a Parquet file. A null is an empty document.

    Raises `DataError`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            types = {field.name: field.type for field in file.schema_arrow}
            text = types.get("text")
            text = text.value_type if pyarrow.types.is_dictionary(text) else text
            if str(text) not in ("string", "large_string", "string_view"):
                found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
                raise DataError(f"{path} has no column 'text' of strings; its columns: {found}")
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                yield from (text.as_py() or "" for text in batch.column(0))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _refuse_table(path: Path) -> Iterator[str]:
    raise DataError(f"{path} is a table: convert it to JSONL or Parquet with a column 'text'")


_JSONL = {
    f"{suffix}{compression}": read_jsonl for suffix in (".jsonl", ".ndjson") for compression in ("", ".gz", ".zst")
}
READERS = {".parquet": read_parquet, **_JSONL}  # of the files of a folder that are not text
_READERS_BY_PATH = READERS | {".json": read_jsonl, ".csv": _refuse_table, ".tsv": _refuse_table}


def reader(name: str, by_path: bool = False) -> Callable[[Path], Iterator[Document]]:
    """The reader for a file name, by its suffix; `read_text` for an unknown one.

    `by_path` is for a file that the user names. In a folder, .json, .csv and .tsv are seldom the corpus."""
    readers = _READERS_BY_PATH if by_path else READERS
    return next((read for suffix, read in readers.items() if name.lower().endswith(suffix)), read_text)


def utf8_safe(text: str) -> str:
    """Replace unpaired surrogates, which JSON and Python strings may contain but UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
