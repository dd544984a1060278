"""Corpora from datasets on the Hugging Face Hub, downloaded to its cache shard by shard as they are read.

`huggingface_hub` does the downloading. It honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, shares its cache
with other programs, and resumes interrupted downloads. But it retries for minutes if a server does not answer, so the
first request of each operation has a timeout here (`_with_timeout`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from data.formats import Corpus, DataError, Shard, digest, reader, shard

_REVISION = "main"
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

    The fingerprint covers only the repository and the patterns. `_file_list` pins the commit and the files on first
    use, so that they do not change later on this machine.
    """
    fingerprint = digest(repository, _REVISION, patterns)
    shards = partial(_shards, repository, patterns, documents, fingerprint)
    return Corpus(name, fingerprint, deduplicate=False, shards=shards, remote=True)


def _shards(
    repository: str,
    patterns: dict[str, str | None],
    documents: Callable[[Iterator[str]], Iterator[str]],
    fingerprint: str,
) -> list[Shard]:
    from huggingface_hub import cached_assets_path

    assets = cached_assets_path("nanofuse", repository, fingerprint[:16])
    listing = _file_list(repository, [pattern for pattern in patterns.values() if pattern], assets / "listing.json")

    def read(path: str, sha256: str) -> Iterator[str]:
        file = _download(repository, listing["commit"], path)
        _verify(file, sha256, assets / f"{sha256}.verified")
        yield from documents(reader(path)(file))

    return [
        shard(path, split if patterns["val"] else None, partial(read, path, sha256))
        for split, pattern in patterns.items()
        for path, sha256 in listing["files"].items()
        if pattern and fnmatch(path, pattern)
    ]


def _file_list(repository: str, patterns: list[str], path: Path) -> dict[str, Any]:
    """The dataset's `commit`, and the SHA-256 by path of the `files` of that commit that match a pattern.

    It is requested once and stored at `path`. The corpus then stays the same even if the dataset changes, and needs no
    network once its files are cached. Delete `path` to update to the newest commit.
    """
    if path.exists():
        return json.loads(path.read_text("utf-8"))

    def request() -> dict[str, Any]:
        from huggingface_hub import HfApi

        api = HfApi()
        commit = api.dataset_info(repository, revision=_REVISION, expand=["sha"]).sha
        files = {}
        for pattern in patterns:
            folder = os.path.dirname(pattern) or None
            for entry in api.list_repo_tree(repository, folder, revision=commit, repo_type="dataset"):
                if fnmatch(entry.path, pattern):
                    files[entry.path] = entry.lfs.sha256
        return {"commit": commit, "files": files}

    listing = _with_timeout(repository, request)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in listing["files"]):
            raise DataError(f"dataset {repository} has no file {pattern} at its commit {listing['commit']}")
    partial_file = path.with_suffix(f".{os.getpid()}")
    partial_file.write_text(json.dumps(listing, indent=1), "utf-8")
    partial_file.replace(path)
    return listing


def _download(repository: str, commit: str, path: str) -> Path:
    """Path of a dataset's file in the Hub's cache; it is downloaded if missing. Raises `DataError`."""
    import huggingface_hub as hub

    file = {"repo_id": repository, "filename": path, "revision": commit, "repo_type": "dataset"}
    cached = hub.try_to_load_from_cache(**file)
    if isinstance(cached, str):
        return Path(cached)
    _with_timeout(repository, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(**file)))
    with _hub_errors(repository):
        return Path(hub.hf_hub_download(**file))


def _verify(file: Path, sha256: str, marker: Path) -> None:
    """Check a file's SHA-256, unless `marker` records that it passed with its current size and modification time.

    Raises `DataError`."""
    status = file.stat()
    state = f"{status.st_size} {status.st_mtime_ns}"
    if marker.exists() and marker.read_text() == state:
        return
    with file.open("rb") as content:
        actual = hashlib.file_digest(content, "sha256").hexdigest()
    if actual != sha256:
        raise DataError(
            f"{file} is damaged: its SHA-256 is {actual} and should be {sha256}. "
            f"Delete {file.resolve()} to download it again."
        )
    marker.write_text(state)


def _with_timeout(repository: str, request: Callable[[], _T]) -> _T:
    """Return the result of `request`, or raise `DataError` after HF_HUB_ETAG_TIMEOUT (10 s by default).

    The library's own timeouts cover one address and one attempt, and some calls have none. A daemon thread, which is
    abandoned on timeout, bounds all of it, DNS lookups included.
    """
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as TIMEOUT_S

    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(request())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    with _hub_errors(repository):
        try:
            return future.result(TIMEOUT_S)
        except TimeoutError:
            raise TimeoutError(f"no answer in {TIMEOUT_S} s") from None


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """A context that converts exceptions to a `DataError` with the host, the dataset and possible remedies."""
    from huggingface_hub.constants import ENDPOINT

    try:
        yield
    except Exception as error:  # the exception types depend on huggingface_hub's version
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise DataError(
            f"{ENDPOINT} did not give the dataset {repository} ({reason}). Set HF_ENDPOINT to a mirror, or HF_TOKEN "
            "for a dataset that needs access; or download the files elsewhere and give their folder as the corpus "
            "(each row is then a document, and a new validation split is made); or use the corpora docstrings or "
            "stdlib, which need no network."
        ) from error
