"""The corpora by name, and local files and folders. `open_corpus` is the entry point.

Opening a corpus is fast: text is read, and downloaded, only when a shard is read.
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
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain
from pathlib import Path

from data.formats import (
    READERS,
    READERS_VERSION,
    TEXT_SUFFIXES,
    Corpus,
    DataError,
    digest,
    read_text,
    reader,
    shard,
    utf8_safe,
)
from data.hub import hub_corpus

# Corpora from the Python installation, which need no download

_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_ROOT = Path(__file__).parents[1]
# Besides tests: numpy/distutils, which only its wheels for Python 3.11 have.
_NOT_SOURCES = {"test", "tests", "idle_test", "distutils", "site-packages", "dist-packages", "__pycache__", ".."}

# `Dataset.digest` of docstrings at the versions of constraints.txt, equal on every platform and Python.
DOCSTRINGS_DIGEST = "981746fd217638e0c9d646a853496345916e41e159c1302d49a0c43b25a8e534"


def _is_source(path: os.PathLike[str]) -> bool:
    """Whether a path, relative to the packages' folder, is Python source and not a test."""
    parts = Path(path).parts
    return parts[-1].endswith(".py") and _NOT_SOURCES.isdisjoint(parts)


def _read_sources() -> Iterator[str]:
    paths = (path.relative_to(_STANDARD_LIBRARY) for path in _STANDARD_LIBRARY.rglob("*.py"))
    for path in sorted(filter(_is_source, paths)):
        with tokenize.open(_STANDARD_LIBRARY / path) as file:  # honours the file's encoding declaration
            yield file.read()


def _open_standard_library(name: str) -> Corpus:
    shards = [shard(name, None, _read_sources)]
    return Corpus(name, digest(sys.platform, platform.python_version()), True, lambda: shards)


def _fixed_versions() -> dict[str, str]:
    """Versions that constraints.txt gives the direct dependencies that every platform has, sorted by name."""
    from packaging.requirements import Requirement

    project = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = {requirement.name for requirement in map(Requirement, project["dependencies"]) if not requirement.marker}
    pins = (line.partition("==") for line in (_ROOT / "constraints.txt").read_text("utf-8").splitlines())
    return {name: version for name, _, version in sorted(pins) if name in required}


def _open_docstrings(name: str) -> Corpus:
    """The docstrings of the direct dependencies. `Corpus.remark` says whether they are those of the fixed versions."""
    from packaging.version import Version

    fixed, packages = _fixed_versions(), {}
    for package in fixed:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.distribution(package)
    versions = {package: Version(found.version).public for package, found in packages.items()}  # no +cpu, +cu130

    def remark(text_digest: str) -> str:
        if text_digest == DOCSTRINGS_DIGEST:
            return "the fixed text of constraints.txt"
        others = [
            f"{package} is {versions.get(package, 'missing')}, not {version}"
            for package, version in fixed.items()
            if versions.get(package) != version
        ]
        return f"not the fixed text of constraints.txt: {', '.join(others) or 'its packages have other files here'}"

    files = [
        Path(found.locate_file(path))
        for found in packages.values()
        for path in sorted(found.files or [], key=lambda path: path.parts)
        if _is_source(path)
    ]
    shards = [shard(name, None, partial(_read_docstrings, files))]
    return Corpus(name, digest(name, versions), True, lambda: shards, remark=remark)


def _read_docstrings(files: list[Path]) -> Iterator[str]:
    """Yield one document per module: its docstrings, except those that already occurred."""
    command = [sys.executable, "-I", "-X", "utf8", "-W", "ignore", str(Path(__file__).with_name("docstrings.py"))]
    # A process group of their own: Ctrl-C on a terminal is for this process alone, which then ends them.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8", "process_group": 0}
    seen: set[str] = set()
    with ExitStack() as stack:
        workers = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(os.cpu_count() or 1)]
        for i, worker in enumerate(workers):
            stack.callback(worker.kill)
            with worker.stdin as paths:
                paths.writelines(f"{path}\n" for path in files[i :: len(workers)])
        for i, path in enumerate(files):  # a full pipe blocks a worker that is too far ahead
            line = workers[i % len(workers)].stdout.readline()
            if not line:
                raise DataError(f"the process reading docstrings stopped at or before {path}")
            new = [text for text in dict.fromkeys(json.loads(line)) if text not in seen]
            seen.update(new)
            yield utf8_safe("\n\n".join(new))


# Local files and folders


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, except those of runs. Symbolic links are followed, and each folder is visited once."""
    seen = {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        if {"config.json", "status.json"} <= {*names} and Path(root) != folder:
            folders.clear()
            continue
        yield from (Path(root, name) for name in names)
        targets = {name: Path(root, name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, target in targets.items() if target not in seen and not seen.add(target)]


def _open_path(path: Path) -> Corpus:
    """A corpus of one file, or of the files of known types in a folder, except hidden ones and those of our runs.

    All text files of a folder form one shard, since they may be many and small; every other file is a shard of its own.
    The fingerprint covers path, names, sizes and modification times, so opening 100 GB is as fast as opening 1 MB.
    Raises `DataError` if there is no text.
    """
    files = {path.name: path}
    if path.is_dir():
        found = {file.relative_to(path): file for file in sorted(_files(path)) if file.is_file()}
        files = {
            name.as_posix(): file
            for name, file in found.items()
            if not any(part.startswith(".") for part in name.parts)
            and (file.suffix.lower() in TEXT_SUFFIXES.split() or reader(file.name) is not read_text)
        }
    status = {name: file.stat() for name, file in files.items()}
    if not any(stat.st_size for stat in status.values()):
        suffixes = " ".join(READERS)
        raise DataError(f"{path} holds no text: it is empty, or a folder without {TEXT_SUFFIXES} {suffixes}")
    readers = {name: reader(name, by_path=path.is_file()) for name in files}
    texts = [file for name, file in files.items() if readers[name] is read_text]
    shards = [
        shard(name, None, partial(readers[name], file))
        for name, file in files.items()
        if readers[name] is not read_text
    ]
    if texts:
        shards.append(shard("text", None, lambda: chain.from_iterable(map(read_text, texts))))
    times = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in status.items()]
    compressed = any(name.lower().endswith((".gz", ".zst", ".parquet")) for name in files)
    return Corpus(
        path.resolve().name, digest(str(path.resolve()), times, READERS_VERSION), True, lambda: shards,
        size=0 if compressed else sum(stat.st_size for stat in status.values()),
    )  # fmt: skip


# Datasets of the Hugging Face Hub


def _on_hub(
    repository: str, train: str, val: str | None = None, documents: Callable[[Iterator[str]], Iterator[str]] = iter
) -> Callable[[str], Corpus]:
    """A function that opens a dataset, given globs of its files; `documents` converts rows to documents."""

    def open_(name: str) -> Corpus:
        return hub_corpus(name, repository, {"train": train, "val": val}, documents)

    return open_


def wikitext_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join the rows of WikiText, which are lines, into articles. An article starts at a heading " = Title = "."""
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
    "docstrings": ("docstrings of the required packages, the same text at the same versions", _open_docstrings),
    "stdlib": ("sources of Python's standard library", _open_standard_library),
    "tinystories": (
        "2 GB of synthetic short stories with a small child's vocabulary",
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
    # From its branch main: the Hub's automatic conversion, refs/convert/parquet, has only the first 5 GB of a dataset.
    "openwebtext": (
        "40 GB of web pages linked from Reddit, like GPT-2's training data",
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
        "800 GB: the Pile without its copyrighted parts",
        _on_hub("monology/pile-uncopyrighted", "train/*.jsonl.zst", "val.jsonl.zst"),
    ),
}


def open_corpus(name: str) -> Corpus:
    """Open a corpus by name, or a file or folder by path (write `./docstrings` for a file named like a corpus).

    Raises `DataError` for an unknown name, and for a file or folder without text.
    """
    if name in CORPORA:
        return CORPORA[name][1](name)
    path = Path(name).expanduser()
    if path.exists():
        return _open_path(path)
    matches = difflib.get_close_matches(name, CORPORA, n=1)
    raise DataError(
        f"{name!r} is no file or folder, and no corpus{f' (did you mean {matches[0]}?)' if matches else ''}: "
        + ", ".join(CORPORA)
    )
