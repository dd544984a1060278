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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow


class DataError(UserError):
    """The data is invalid or cannot be reached. The message says what would be right."""


@dataclass(frozen=True)
class LongText:
    """A document that is not held in memory: `read` yields its text, in parts cut anywhere, and does so repeatedly."""

    read: Callable[[], Iterator[str]]


Document = str | LongText

PIECE_CHARS = 2**17  # glibc's heap grows with the text if blocks of megabytes come and go
# Where a document may be cut: before a space that follows another character, and after a line's end between two
# characters that are not white space. No word of the split patterns of Qwen2, Llama 3 and GPT-2 reaches across: a space
# only starts a word or is in white space, and a word of punctuation ends with its line ends (and slashes, in those of
# GPT-4o). Nor does either side depend on the other: the patterns look ahead in white space alone, and never back.
# (Around several line ends GPT-2's would.)
_CUT = re.compile(r"\S(?= )|\S\n(?=[^\s/])")


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
    remote: bool = False  # whether it is downloaded: after an error, preparation keeps the finished shards
    remark: Callable[[str], str] = lambda digest: ""  # a remark in words on the text that has this digest
    size: int = 0  # about how many bytes of text; 0 if unknown, as of compressed files


@dataclass(frozen=True)
class TokenFiles:
    """A corpus that is tokenized already, by a tokenizer that the files do not name: `.bin` files of each split."""

    name: str
    fingerprint: str
    files: dict[str, list[Path]]  # by split
    remote: bool = False

    @property
    def size(self) -> int:
        """About how many bytes of text: a token is two bytes on disk, and about four of text."""
        return 2 * sum(file.stat().st_size for files in self.files.values() for file in files)


@dataclass(frozen=True)
class Mixture:
    """Several corpora, each with its share of the tokens. The shares sum to 1.

    Each part is split into training and validation text on its own, so the parts should have no text in common."""

    name: str
    fingerprint: str
    parts: list[tuple[Corpus | TokenFiles, float]]

    @property
    def remote(self) -> bool:
        return any(corpus.remote for corpus, _ in self.parts)

    @property
    def size(self) -> int:
        """About how many bytes of text; 0 if that of a part is unknown."""
        sizes = [corpus.size for corpus, _ in self.parts]
        return sum(sizes) if all(sizes) else 0


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


def read_jsonl(path: Path, column: str = "") -> Iterator[str]:
    """Read the field `column` of each line of a JSONL file, which may be compressed (.gz, .zst). Skips blank lines.

    Without `column` the first line decides, by `text_column`. A null is an empty document. Raises `DataError`."""
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    row = _row(line, f"{path}:{number}")
                    column = column or text_column([key for key, value in row.items() if isinstance(value, str)], row)
                    yield _field(row, column, path, number)
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


def text_column(strings: Sequence[str], columns: Iterable[str]) -> str:
    """The column of a table that holds its text, among all its `columns`, of which `strings` hold strings.

    It is the one called "text", or else the only one that holds strings. If neither exists, this returns "text", which
    the table then turns out to lack."""
    return strings[0] if len(strings) == 1 and "text" not in columns else "text"


_EACH_LINE = "each line is to be an object, which jq -c '.[]' makes of an array"


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON ({error}); {_EACH_LINE}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object with a field 'text' but {type(row).__name__}; {_EACH_LINE}")
    return row


def _field(row: dict[str, Any], column: str, path: Path, number: int) -> str:
    text = row.get(column, 0)
    if text is None:
        return ""
    if not isinstance(text, str):
        fields = {key: type(value).__name__ for key, value in row.items()}
        raise DataError(f"{path}:{number}: no field {column!r} holding a string; its fields: {_named(fields)}")
    return utf8_safe(text)


def _named(columns: Mapping[str, object]) -> str:
    """Columns with their types, and how to choose one."""
    found = ", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none"
    return f"{found}; choose one by its name after the corpus, as in --data=path#column"


def read_parquet(path: Path, column: str = "") -> Iterator[str]:
    """Read the column `column`, which may be dictionary-encoded, of a Parquet file. A null is an empty document.

    Without `column` it is found by `text_column`. Raises `DataError`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            types = {field.name: field.type for field in file.schema_arrow}
            strings = [name for name, kind in types.items() if _is_string(kind)]
            column = column or text_column(strings, types)
            if column not in strings:
                raise DataError(f"{path} has no column {column!r} of strings; its columns: {_named(types)}")
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                yield from (text.as_py() or "" for text in batch.column(0))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _is_string(kind: pyarrow.DataType) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def _refuse_table(path: Path, column: str = "") -> Iterator[str]:
    raise DataError(f"{path} is a table: convert it to JSONL or Parquet, with its text in a column 'text'")


def _refuse_tokens(path: Path, column: str = "") -> Iterator[str]:
    raise DataError(f"{path} is no text: for tokens, give the folder that has *train*.bin and *val*.bin")


_JSONL = {
    f"{suffix}{compression}": read_jsonl for suffix in (".jsonl", ".ndjson") for compression in ("", ".gz", ".zst")
}
READERS = {".parquet": read_parquet, **_JSONL}  # of the files of a folder that are not text
_READERS_BY_PATH = READERS | {
    ".json": read_jsonl, ".csv": _refuse_table, ".tsv": _refuse_table, ".bin": _refuse_tokens
}  # fmt: skip


def reader(name: str, by_path: bool = False, column: str = "") -> Callable[[Path], Iterator[Document]]:
    """The reader for a file name, by its suffix; `read_text` for an unknown one. `column` is the column of a table.

    `by_path` is for a file that the user names. In a folder, .json, .csv and .tsv are seldom the corpus."""
    readers = _READERS_BY_PATH if by_path else READERS
    read = next((read for suffix, read in readers.items() if name.lower().endswith(suffix)), read_text)
    return partial(read, column=column) if column and read is not read_text else read


def utf8_safe(text: str) -> str:
    """Replace unpaired surrogates, which JSON and Python strings may contain but UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
