"""Where text comes from: `open_corpus` turns a name or a path into a `Corpus`, a list of shards of documents.

Nothing is read before a shard is, so opening is fast.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from data.formats import (
    READERS,
    TEXT_SUFFIXES,
    Corpus,
    DataError,
    digest,
    read_text,
    reader,
    shard,
    writable,
)
from data.hub import hub_corpus

# Embedded corpora: text that every machine able to run this project has

_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", ".."}


def _is_source(path: os.PathLike[str]) -> bool:
    """Whether a path, relative to where packages are installed, is Python source other than tests."""
    parts = Path(path).parts
    return parts[-1].endswith(".py") and _NOT_SOURCES.isdisjoint(parts)


def _standard_library() -> list[Path]:
    paths = (path.relative_to(_STANDARD_LIBRARY) for path in _STANDARD_LIBRARY.rglob("*.py"))
    return [_STANDARD_LIBRARY / path for path in sorted(paths) if _is_source(path)]


def _required_packages() -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that this project requires, directly or not, by name and in its order."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pending = tomllib.loads(_PYPROJECT.read_text("utf-8"))["project"]["dependencies"]
    found: dict[str, importlib.metadata.Distribution] = {}
    while pending:
        requirement = Requirement(pending.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        pending += found[name].requires or []
    return dict(sorted(found.items()))


def _read_sources() -> Iterator[str]:
    for path in _standard_library():
        with tokenize.open(path) as file:  # honours the file's own declaration of its encoding
            yield file.read()


def _read_docstrings() -> Iterator[str]:
    """One document for each module: its docstrings, less those that an earlier one has."""
    files = _standard_library()
    for package in _required_packages().values():
        files += [Path(package.locate_file(path)) for path in sorted(package.files or []) if _is_source(path)]
    command = [sys.executable, "-I", "-X", "utf8", "-W", "ignore", str(Path(__file__).with_name("docstrings.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    seen: set[str] = set()
    with ExitStack() as stack:
        workers = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(os.cpu_count() or 1)]
        for first, worker in enumerate(workers):
            stack.callback(worker.kill)
            with worker.stdin as paths:
                paths.writelines(f"{path}\n" for path in files[first :: len(workers)])
        for index, path in enumerate(files):  # a worker that is ahead waits at its full pipe
            answer = workers[index % len(workers)].stdout.readline()
            if not answer:
                raise DataError(f"the process reading docstrings stopped at or before {path}")
            fresh = [text for text in dict.fromkeys(json.loads(answer)) if text not in seen]
            seen.update(fresh)
            yield writable("\n\n".join(fresh))


def _open_standard_library(name: str) -> Corpus:
    shards = [shard(name, None, _read_sources)]
    return Corpus(name, digest(sys.platform, platform.python_version()), True, lambda: shards)


def _open_docstrings(name: str) -> Corpus:
    versions = {package: found.version for package, found in _required_packages().items()}
    shards = [shard(name, None, _read_docstrings)]
    return Corpus(name, digest(sys.platform, platform.python_version(), versions), True, lambda: shards)


# Local corpora: files of the kinds below, and folders of them


def _files(folder: Path) -> Iterator[Path]:
    """All below a folder, behind links too, each folder once."""
    seen = {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        yield from (Path(root, name) for name in names)
        real = {name: Path(root, name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, to in real.items() if to not in seen and not seen.add(to)]


def _open_path(path: Path) -> Corpus:
    """A file; or a folder's files of known kinds, hidden ones left out.

    The text files of a folder are one shard, since they may be many and small; every other file is its own.
    The fingerprint is of place, names, sizes and times of change, so that opening 100 GB takes no longer than 1 MB.
    """
    files = {path.name: path}
    if path.is_dir():
        inside = {file.relative_to(path): file for file in sorted(_files(path)) if file.is_file()}
        files = {
            name.as_posix(): file
            for name, file in inside.items()
            if not any(part.startswith(".") for part in name.parts)
            and (file.suffix.lower() in TEXT_SUFFIXES.split() or reader(file.name) is not read_text)
        }
    status = {name: file.stat() for name, file in files.items()}
    if not any(each.st_size for each in status.values()):
        kinds = " ".join(READERS)
        raise DataError(f"{path} holds no text: it is empty, or a folder without {TEXT_SUFFIXES} {kinds}")
    texts = [file for file in files.values() if reader(file.name) is read_text]
    tables = [(name, file) for name, file in files.items() if reader(file.name) is not read_text]
    shards = [shard(name, None, partial(reader(file.name), file)) for name, file in tables]
    if texts:
        shards.append(shard("text", None, lambda: chain.from_iterable(map(read_text, texts))))
    times = [(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in status.items()]
    return Corpus(path.resolve().name, digest(str(path.resolve()), times), True, lambda: shards)


# Corpora of the Hugging Face hub


def _on_hub(
    repository: str, train: str, val: str | None = None, documents: Callable[[Iterator[str]], Iterator[str]] = iter
) -> Callable[[str], Corpus]:
    """What opens a dataset by the patterns of its files; `documents` turns the rows of a file into documents."""

    def open_(name: str) -> Corpus:
        return hub_corpus(name, repository, {"train": train, "val": val}, documents)

    return open_


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText, whose rows are lines: each begins at a heading " = Title = " of level 1."""
    article: list[str] = []
    for row in rows:
        heading = row.startswith(" = ") and row.endswith(" = \n")
        if heading and not row.startswith(" = = "):
            yield "".join(article)
            article = []
        if row or article:
            article.append(row or "\n")
    yield "".join(article)


# The corpora by name

CORPORA: dict[str, tuple[str, Callable[[str], Corpus]]] = {
    "docstrings": ("docstrings of Python's standard library and of the required packages", _open_docstrings),
    "stdlib": ("sources of Python's standard library", _open_standard_library),
    "tinystories": (
        "2 GB of short stories in the words of small children",
        _on_hub("roneneldan/TinyStories", "data/train-*.parquet", "data/validation-*.parquet"),
    ),
    "wikitext-2": (
        "10 MB of Wikipedia's good articles",
        _on_hub(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1/train-*.parquet",
            "wikitext-2-raw-v1/validation-*.parquet",
            wikitext_articles,
        ),
    ),
    "wikitext-103": (
        "0.5 GB of Wikipedia's good articles",
        _on_hub(
            "Salesforce/wikitext",
            "wikitext-103-raw-v1/train-*.parquet",
            "wikitext-103-raw-v1/validation-*.parquet",
            wikitext_articles,
        ),
    ),
    # Of its branch main: the hub's own conversion, refs/convert/parquet, stops at the first 5 GB of a dataset.
    "openwebtext": (
        "40 GB of web pages that Reddit linked to, GPT-2's kind of text",
        _on_hub("Skylion007/openwebtext", "plain_text/train-*.parquet"),
    ),
    "fineweb": (
        "10 billion tokens sampled from FineWeb",
        _on_hub("HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
    ),
    "fineweb-edu": (
        "10 billion tokens sampled from FineWeb-Edu, its educational pages",
        _on_hub("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    ),
    "pile": (
        "800 GB of the Pile, less its copyrighted parts",
        _on_hub("monology/pile-uncopyrighted", "train/*.jsonl.zst", "val.jsonl.zst"),
    ),
}


def open_corpus(name: str) -> Corpus:
    """The corpus of this name, or of the file or folder at this path (`./docstrings` if its name is a corpus's).

    A name that is neither, and a file or folder without text, is a `DataError`.
    """
    if name in CORPORA:
        return CORPORA[name][1](name)
    path = Path(name).expanduser()
    if path.exists():
        return _open_path(path)
    near = difflib.get_close_matches(name, CORPORA, n=1)
    raise DataError(
        f"{name!r} is no file or folder, and no corpus{f' (did you mean {near[0]}?)' if near else ''}: "
        + ", ".join(CORPORA)
    )
