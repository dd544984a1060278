"""Datasets and files of the Hugging Face Hub, downloaded to its cache; a dataset shard by shard as it is read.

`huggingface_hub` does the downloading. It honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, shares its cache
with other programs, and resumes interrupted downloads. But it retries for minutes if a server does not answer, so the
first request of each operation has a timeout here (`_with_timeout`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from glob import has_magic
from itertools import chain, takewhile
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from data.formats import READERS, Corpus, DataError, Shard, digest, reader, shard

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo

_REVISION = "main"
_CONVERTED = "refs/convert/parquet"  # the branch to which the Hub converts a dataset, or its first 5 GB
_SPLITS = {"train": ("train",), "val": ("dev", "valid", "val", "validation")}  # our splits' names on the Hub
_T = TypeVar("_T")


def hub_corpus(
    name: str,
    repository: str,
    patterns: dict[str, str | None],
    documents: Callable[[Iterator[str]], Iterator[str]],
) -> Corpus:
    """A corpus of files of a Hub dataset.

    `patterns` has a glob within one folder for each of the splits "train" and "val". If there is none for "val", the
    shards have no split. `documents` converts the rows of a file to documents.

    The fingerprint covers only the repository and the patterns. `_listing` pins the commit and the files on first use,
    so that they do not change later on this machine.
    """
    fingerprint = digest(repository, _REVISION, patterns)
    globs = {split: [pattern] for split, pattern in patterns.items() if pattern}
    shards = partial(_shards, repository, fingerprint, partial(_find, repository, globs), documents, globs=globs)
    return Corpus(name, fingerprint, deduplicate=False, shards=shards, remote=True)


_NAME = re.compile(r"hub:((?:[\w.-]+/)?[\w.-]*\w)(?::([^:#]+))?(?:#(.+))?")  # of a repository, config and column


def hub_dataset(name: str) -> Corpus:
    """The corpus of a dataset by its name, `hub:org/name[:config][#column]`.

    `config` is needed if there are several and none is the default, and `column` if `data.formats.text_column` does
    not find the text. The files are those that the dataset's card assigns to the configuration; if it assigns none, or
    some that are not Parquet or JSONL, those of the Hub's conversion to Parquet. The split "train" is read, and a split
    "validation" if there is one. Raises `DataError` for another name.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise DataError(f"{name!r} is no dataset of the Hugging Face Hub: it is to be hub:org/name[:config][#column]")
    repository, config, column = match.groups("")
    fingerprint = digest("hub", repository, _REVISION, config, column)
    shards = partial(_shards, repository, fingerprint, partial(_resolve, repository, config), iter, column)
    remark = partial(_remark, repository, fingerprint)
    return Corpus(name, fingerprint, deduplicate=False, shards=shards, remote=True, remark=remark)


def _assets(repository: str, fingerprint: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("nanofuse", repository, fingerprint[:16])


def _shards(
    repository: str,
    fingerprint: str,
    request: Callable[[], dict[str, Any]],
    documents: Callable[[Iterator[str]], Iterator[str]],
    column: str = "",
    globs: dict[str, list[str]] | None = None,
) -> list[Shard]:
    """The shards of the files that `request` lists; `globs` are those of a listing without patterns."""
    assets = _assets(repository, fingerprint)
    listing = _listing(request, assets / "listing.json")
    globs = listing.get("patterns") or globs

    def read(path: str, checksum: str) -> Iterator[str]:
        file = hub_file(repository, path, listing["commit"], "dataset")
        _verify(file, checksum, assets / f"{checksum}.verified")
        yield from documents(reader(path, by_path=True, column=column)(file))

    return [
        shard(path, split if "val" in globs else None, partial(read, path, checksum))
        for split, patterns in globs.items()
        for path, checksum in listing["files"].items()
        if any(_matches(path, pattern) for pattern in patterns)
    ]


def _listing(request: Callable[[], dict[str, Any]], path: Path) -> dict[str, Any]:
    """The dataset's `commit`, checksums by path of the `files` of that commit to read, and the `patterns` of each split
    (an earlier version wrote none).

    It is requested once and stored at `path`. The corpus then stays the same even if the dataset changes, and needs no
    network once its files are cached. Delete `path` to update to the newest commit.
    """
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    listing = request()
    partial_file = path.with_suffix(f".{os.getpid()}")
    partial_file.write_text(json.dumps(listing, indent=1), "utf-8")
    partial_file.replace(path)
    return listing


def _remark(repository: str, fingerprint: str, text_digest: str) -> str:
    listing = _assets(repository, fingerprint) / "listing.json"
    converted = listing.exists() and "/partial-" in listing.read_text("utf-8")
    return "its first 5 GB, since the Hub converts no more to Parquet" if converted else ""


def _matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern in which `*` is within one name, and `**` is any number of folders."""
    return _match(path.split("/"), pattern.split("/"))


def _match(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_match(names[start:], patterns[1:]) for start in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _match(names[1:], patterns[1:])


def _find(repository: str, globs: dict[str, list[str]]) -> dict[str, Any]:
    """The listing of the files that match, at the newest commit. Raises `DataError`."""
    return _list(repository, _info(repository, _REVISION, "sha").sha, globs)


def _list(repository: str, commit: str, globs: dict[str, list[str]]) -> dict[str, Any]:
    """The listing of the files that match the patterns of each split. Raises `DataError` if a pattern matches none."""
    files = {}
    for pattern in chain.from_iterable(globs.values()):
        found = _files(repository, commit, pattern)
        if not found:
            raise DataError(f"dataset {repository} has no file {pattern} at its commit {commit}")
        files |= found
    return {"commit": commit, "files": files, "patterns": globs}


def _resolve(repository: str, config: str) -> dict[str, Any]:
    """The listing of a configuration: of the files that its card names, or of the Hub's conversion of it."""
    info = _info(repository, _REVISION, "sha", "cardData")
    card = info.card_data.to_dict().get("configs") if info.card_data else None
    entries = [entry for entry in card or [] if isinstance(entry, dict) and entry.get("data_files")]
    configs = {str(entry.get("config_name", "default")): entry for entry in entries}
    if configs:
        config = _choose(repository, config, [*configs], [name for name in configs if configs[name].get("default")])
        patterns = _card_patterns(configs[config]["data_files"], str(configs[config].get("data_dir", "")))
        listing = _list(repository, info.sha, _ours(repository, patterns))
        if all(path.lower().endswith((".json", *READERS)) for path in listing["files"]):
            return listing
    commit = _info(repository, _CONVERTED, "sha").sha
    folders = {path.rpartition("/")[0] for path in _files(repository, commit, "*/*/*.parquet")}
    config = _choose(repository, config, sorted({folder.partition("/")[0] for folder in folders}), [])
    patterns = {
        folder.partition("/")[2].removeprefix("partial-"): [f"{folder}/*.parquet"]
        for folder in sorted(folders)
        if folder.startswith(f"{config}/")
    }
    return _list(repository, commit, _ours(repository, patterns))


def _ours(repository: str, patterns: dict[str, list[str]]) -> dict[str, list[str]]:
    """The patterns of the splits to train and to validate on, of those of all splits. Raises `DataError`."""
    found = {ours: patterns[name] for ours, names in _SPLITS.items() for name in names if name in patterns}
    if "train" not in found:
        raise DataError(
            f"dataset {repository} has no split 'train' to read, but {', '.join(patterns) or 'none at all'}"
        )
    return found


def _choose(repository: str, config: str, configs: list[str], default: list[str]) -> str:
    """The configuration to read: the one asked for, the default, or the only one. Raises `DataError`."""
    default = default or [name for name in configs if name == "default"] or configs
    if config in configs or (not config and len(default) == 1):
        return config or default[0]
    problem = f"has no configuration {config!r}" if config else "has several configurations"
    raise DataError(f"dataset {repository} {problem}: write hub:{repository}:name with one of {', '.join(configs)}")


def _card_patterns(data_files: Any, folder: str) -> dict[str, list[str]]:
    """Patterns by split of a card's `data_files`: one path, a list of paths, or a list of `split` and `path`."""
    patterns: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        entry = entry if isinstance(entry, dict) else {"path": entry}
        paths = entry.get("path", [])
        for path in paths if isinstance(paths, list) else [paths]:
            patterns.setdefault(str(entry.get("split", "train")), []).append(f"{folder}/{path}".lstrip("/"))
    return patterns


def _info(repository: str, revision: str, *fields: str) -> DatasetInfo:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    what = f"the dataset {repository}"
    try:
        return _with_timeout(what, partial(HfApi().dataset_info, repository, revision=revision, expand=list(fields)))
    except DataError as error:
        if revision == _CONVERTED and isinstance(error.__cause__, RevisionNotFoundError):
            raise DataError(
                f"dataset {repository} has no Parquet or JSONL in the data_files of its card, and the Hub has not "
                "converted it to Parquet: download its files, and give a folder of text, JSONL or Parquet as the corpus"
            ) from None
        raise


def _files(repository: str, commit: str, pattern: str) -> dict[str, str]:
    """Checksums of the files that match: SHA-256, or for a small file, which Git itself holds, the SHA-1 of its blob.

    Only the folder that the pattern begins with is listed, since a dataset may have 100,000 files."""
    from huggingface_hub import HfApi

    parts = pattern.split("/")
    fixed = list(takewhile(lambda part: not has_magic(part), parts[:-1]))
    with _hub_errors(f"the dataset {repository}"):
        tree = HfApi().list_repo_tree(
            repository, "/".join(fixed) or None, recursive=len(parts) > len(fixed) + 1, revision=commit,
            repo_type="dataset",
        )  # fmt: skip
        found = [entry for entry in tree if hasattr(entry, "blob_id") and _matches(entry.path, pattern)]
    return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found}


def hub_tokenizer(name: str) -> tuple[str, Path]:
    """The repository and the tokenizer.json of `hub:org/name`. Raises `DataError`.

    A file in the Hub's cache is taken as it is, so that a tokenizer does not change from one run to the next."""
    match = _NAME.fullmatch(name)
    if not match or match[2] or match[3]:
        raise DataError(f"{name!r} is no tokenizer of the Hugging Face Hub: it is to be hub:org/name")
    return match[1], hub_file(match[1], "tokenizer.json", _REVISION, "model")


def hub_file(repository: str, path: str, revision: str, repo_type: Literal["dataset", "model"]) -> Path:
    """Path of a repository's file in the Hub's cache; it is downloaded if missing. Raises `DataError`."""
    import huggingface_hub as hub

    what = f"the {repo_type} {repository}"
    file = {"repo_id": repository, "filename": path, "revision": revision, "repo_type": repo_type}
    cached = hub.try_to_load_from_cache(**file)
    if isinstance(cached, str):
        return Path(cached)
    _with_timeout(what, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(**file)))
    with _hub_errors(what):
        return Path(hub.hf_hub_download(**file))


def _verify(file: Path, checksum: str, marker: Path) -> None:
    """Check a file's checksum, unless `marker` records that it passed with its current size and modification time.

    Raises `DataError`."""
    status = file.stat()
    state = f"{status.st_size} {status.st_mtime_ns}"
    if marker.exists() and marker.read_text() == state:
        return
    with file.open("rb") as content:
        if len(checksum) == 64:
            kind, actual = "SHA-256", hashlib.file_digest(content, "sha256").hexdigest()
        else:  # of a file in Git
            kind, actual = "SHA-1", hashlib.sha1(b"blob %d\0" % status.st_size + content.read()).hexdigest()
    if actual != checksum:
        raise DataError(
            f"{file} is damaged: its {kind} is {actual} and should be {checksum}. "
            f"Delete {file.resolve()} to download it again."
        )
    marker.write_text(state)


def _with_timeout(what: str, request: Callable[[], _T]) -> _T:
    """Return the result of `request`, or raise `DataError` after HF_HUB_ETAG_TIMEOUT (10 s by default).

    `what` is asked for, in words. The library's own timeouts cover one address and one attempt, and some calls have
    none."""
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as TIMEOUT_S

    with _hub_errors(what):
        return within(TIMEOUT_S, request)


def within(seconds: float, request: Callable[[], _T]) -> _T:
    """Return the result of `request`, or raise its exception, or `TimeoutError` after some seconds.

    It runs in a daemon thread, which is abandoned on timeout. This bounds all of it, DNS lookups included."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(request())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    wait([future], seconds)
    if not future.done():
        raise TimeoutError(f"no answer in {seconds:g} s")
    return future.result()


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """A context that converts exceptions to a `DataError` with the host, what it was asked for, and remedies."""
    from huggingface_hub.constants import ENDPOINT

    try:
        yield
    except Exception as error:  # the exception types depend on huggingface_hub's version
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        remedies = (
            "download the files elsewhere and give their folder as the corpus (each row is then a document, and a new "
            "validation split is made); or use the corpora docstrings or stdlib, which need no network"
            if what.startswith("the dataset")
            else "download its tokenizer.json elsewhere and give its path"
        )
        raise DataError(
            f"{ENDPOINT} did not give {what} ({reason}). Set HF_ENDPOINT to a mirror, or HF_TOKEN for one that needs "
            f"access; or {remedies}."
        ) from error
