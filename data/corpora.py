"""The corpora by name, local files and folders, datasets of the Hub, and mixtures. `open_corpus` is the entry point.

Opening a corpus is fast: text is read, and downloaded, only when a shard is read.
"""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    Mixture,
    TokenFiles,
    digest,
    read_text,
    reader,
    shard,
    utf8_safe,
)
from data.hub import hub_corpus, hub_dataset

# Corpora from the Python installation, which need no download

_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_ROOT = Path(__file__).parents[1]
# Besides tests: numpy/distutils, which only its wheels for Python 3.11 have.
_NOT_SOURCES = {"test", "tests", "idle_test", "distutils", "site-packages", "dist-packages", "__pycache__", ".."}

# `Dataset.digest` of docstrings at the versions of constraints.txt, equal on every platform and Python.
DOCSTRINGS_DIGEST = "b2d1a31240fa39d3a5933ed86b0aadfb16d9bc5fc9def300ea4945aaba9e1e92"


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

_RUN = {"config.json", "status.json"}  # files that only the folder of a run has


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, except those of runs. Symbolic links are followed, and each folder is visited once."""
    seen = {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        if _RUN.issubset(names) and Path(root) != folder:
            folders.clear()
            continue
        yield from (Path(root, name) for name in names)
        targets = {name: Path(root, name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, target in targets.items() if target not in seen and not seen.add(target)]


def _open_path(path: Path, column: str = "") -> Corpus | TokenFiles:
    """A corpus of one file, or of the files of known types in a folder, except hidden ones and those of our runs.

    A folder with `*train*.bin` in it is one of tokens. `column` is as for `_open_files`. Raises `DataError` if there is
    no text."""
    name = path.resolve().name + (f"#{column}" if column else "")
    if not path.is_dir():
        return _open_files(name, str(path.resolve()), {path.name: path}, True, column)
    if tokens := _token_files(path):
        if column:
            raise DataError(f"{path} holds tokens, which have no column {column!r}: give the folder alone")
        versions = _versions({file.name: file for file in chain.from_iterable(tokens.values())})
        return TokenFiles(name, digest(str(path.resolve()), versions), tokens)
    found = {file.relative_to(path): file for file in sorted(_files(path)) if file.is_file()}
    files = {
        name.as_posix(): file
        for name, file in found.items()
        if not any(part.startswith(".") for part in name.parts)
        and (file.suffix.lower() in TEXT_SUFFIXES.split() or reader(file.name) is not read_text)
    }
    return _open_files(name, str(path.resolve()), files, False, column)


def _open_glob(pattern: str, column: str) -> Corpus:
    """A corpus of the files, except those of our runs, that a pattern with `*`, `?` or `[` matches; `**` is any number
    of folders."""
    matches = map(Path, sorted(glob.glob(os.path.expanduser(pattern), recursive=True)))
    found = [path for path in matches if path.is_file() and not all((path.parent / name).exists() for name in _RUN)]
    if not found:
        raise DataError(f"no file matches {pattern!r}: quote it for the shell, and write ** for any number of folders")
    name = pattern + (f"#{column}" if column else "")
    return _open_files(name, os.path.abspath(pattern), {str(path): path for path in found}, True, column)


def _open_files(name: str, place: str, files: dict[str, Path], by_path: bool, column: str) -> Corpus:
    """A corpus of files, by a name for each, that are all at `place`.

    All text files form one shard, since they may be many and small; every other file is a shard of its own. `column`
    is the one to read of tables ("": the obvious one); text files are then left out. The fingerprint covers place,
    names, sizes and modification times, so opening 100 GB is as fast as opening 1 MB. Raises `DataError` if there is no
    text."""
    readers = {name: reader(name, by_path, column) for name in files}
    texts = [file for name, file in files.items() if readers[name] is read_text and not column]
    tables = {name: file for name, file in files.items() if readers[name] is not read_text}
    if column and not tables:
        raise DataError(f"{name} has no column {column!r}: only JSONL and Parquet files have columns")
    versions = _versions(files)
    if not any(size for _, size, *_ in versions):
        suffixes = " ".join(READERS)
        raise DataError(
            f"{place} holds no text: it is empty, or a folder without {TEXT_SUFFIXES} {suffixes}, and without tokens "
            "in *train*.bin"
        )
    shards = [shard(name, None, partial(readers[name], file)) for name, file in tables.items()]
    if texts:
        shards.append(shard("text", None, lambda: chain.from_iterable(map(read_text, texts))))
    compressed = any(name.lower().endswith((".gz", ".zst", ".parquet")) for name in files)
    return Corpus(
        name, digest(place, versions, READERS_VERSION, *([column] if column else [])), True, lambda: shards,
        size=0 if compressed else sum(size for _, size, *_ in versions),
    )  # fmt: skip


def _versions(files: Mapping[str, Path]) -> list[tuple[str, int, int, int]]:
    """Name, size and times of files, which change when a file does."""
    status = {name: file.stat() for name, file in files.items()}
    return [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in status.items()]


def _token_files(folder: Path) -> dict[str, list[Path]]:
    """The files of tokens in a folder by split, such as nanoGPT, modded-nanogpt and llm.c write; {} if there are none.

    The word "train" or "val" in a name tells the split: fineweb_val_000000.bin, but not training_args.bin. Raises
    `DataError` if there are files to train on but none to validate on, or a meta.pkl, which nanoGPT writes beside the
    tokens of a vocabulary of characters."""
    words = {split: re.compile(rf"(?<![A-Za-z]){split}(?![A-Za-z])") for split in ("train", "val")}
    paths = sorted(folder.glob("*.bin"))
    files = {split: [path for path in paths if word.search(path.name)] for split, word in words.items()}
    if not files["train"]:
        return {}
    if not files["val"]:
        raise DataError(f"{folder} has tokens to train on in *train*.bin, but none to validate on in *val*.bin")
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{folder} has a meta.pkl, so its tokens are of a vocabulary of its own, which is not read: a pickle can "
            "run any code. Give the text that the tokens were made of, such as its input.txt"
        )
    return files


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


# A mixture is names with a weight each. Neither a colon nor a comma elsewhere in a name ends it.
_WEIGHTED = re.compile(r"(.+?):(\d+\.?\d*|\.\d+)(?:,|$)")


def _parts(name: str) -> list[tuple[str, float]]:
    """The names and weights of a mixture `a:0.7,b:0.3`; [] for anything else."""
    found = [*_WEIGHTED.finditer(name)]
    whole = "".join(match[0] for match in found) == name
    return [(match[1], float(match[2])) for match in found] if whole and len(found) > 1 else []


def _open_mixture(name: str, parts: list[tuple[str, float]]) -> Mixture:
    if bad := [part for part, weight in parts if not weight]:
        raise DataError(f"{bad[0]!r} has the weight 0 in the mixture {name!r}: give it more, or leave it out")
    if len({part for part, _ in parts}) < len(parts):
        raise DataError(f"the mixture {name!r} has a corpus twice: give it the sum of its weights")
    total = sum(weight for _, weight in parts)
    opened = [(open_corpus(part), weight / total) for part, weight in parts]
    return Mixture(name, digest([(part.name, part.fingerprint, share) for part, share in opened]), opened)


def _path(name: str) -> Path | None:
    path = os.path.expanduser(name)
    return Path(path) if os.path.exists(path) else None


def holds_tokens(name: str) -> bool:
    """Whether a corpus, or any part of a mixture, is tokens already: a folder of `.bin` files."""
    if name in CORPORA:
        return False
    if path := _path(name):
        return path.is_dir() and bool(_token_files(path))
    return any(holds_tokens(part) for part, _ in _parts(name))


def open_corpus(name: str) -> Corpus | TokenFiles | Mixture:
    """Open a corpus. The first that `name` fits decides:

    1. a name of `CORPORA` (write `./docstrings` for a file named like one);
    2. an existing file or folder, whatever characters are in its name;
    3. a mixture `a:0.7,b:0.3` of two or more corpora, with the weight of each in tokens;
    4. `hub:org/name`, `hub:org/name:config`: a dataset of the Hugging Face Hub, and a configuration of it;
    5. a pattern of file names, such as `notes/**/*.md`.

    After 2, 4 and 5, `#column` names the column of JSONL and Parquet files to read. Raises `DataError` for any other
    name, and for files without text.
    """
    if name in CORPORA:
        return CORPORA[name][1](name)
    if path := _path(name):
        return _open_path(path)
    if parts := _parts(name):
        return _open_mixture(name, parts)
    rest, _, column = name.rpartition("#") if "#" in name else (name, "", "")
    if name.startswith("hub:"):
        return hub_dataset(name)
    if path := _path(rest):
        return _open_path(path, column)
    if glob.has_magic(rest):
        return _open_glob(rest, column)
    matches = difflib.get_close_matches(name, CORPORA, n=1)
    hint = " (did you mean {}?)".format(*matches) if matches else ""
    if "," in name:
        hint = "; and no mixture, which has a weight after each part, as in a:0.7,b:0.3"
    raise DataError(
        f"{name!r} is no file or folder, and no corpus{hint}: "
        + ", ".join(CORPORA)
        + ", or hub:org/name for a dataset of the Hugging Face Hub"
    )
