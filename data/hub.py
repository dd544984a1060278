"""Corpora that are datasets of the Hugging Face hub, downloaded to its cache shard by shard as they are read.

`huggingface_hub` does the downloading: its HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold here, other
programs share its cache, and it takes a broken connection up again where it broke. It retries for minutes
where nothing answers, though, so each wait for a first answer has a deadline here (`_answer`).
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
    """The corpus of a dataset's files.

    `patterns` gives the files of the splits "train" and "val", as globs of one folder each. Without a pattern
    for "val" the shards have no split. `documents` turns the rows of a file into documents.

    The fingerprint is of the repository and the patterns alone. What they stand for is settled when a machine
    first asks: see `_listing`.
    """
    fingerprint = digest(repository, _REVISION, patterns)
    shards = partial(_shards, repository, patterns, documents, fingerprint)
    return Corpus(name, fingerprint, deduplicate=False, shards=shards)


def _shards(
    repository: str,
    patterns: dict[str, str | None],
    documents: Callable[[Iterator[str]], Iterator[str]],
    fingerprint: str,
) -> list[Shard]:
    from huggingface_hub import cached_assets_path

    notes = cached_assets_path("nanofuse", repository, fingerprint[:16])
    listing = _listing(repository, [pattern for pattern in patterns.values() if pattern], notes / "listing.json")

    def read(path: str, sha256: str) -> Iterator[str]:
        file = _download(repository, listing["commit"], path)
        _verify(file, sha256, notes / f"{sha256}.verified")
        yield from documents(reader(path)(file))

    return [
        shard(path, split if patterns["val"] else None, partial(read, path, sha256))
        for split, pattern in patterns.items()
        for path, sha256 in listing["files"].items()
        if pattern and fnmatch(path, pattern)
    ]


def _listing(repository: str, patterns: list[str], note: Path) -> dict[str, Any]:
    """The dataset's commit, and the SHA-256 of each file of that commit that fits a pattern.

    It is asked for once and noted: the text of a corpus then stays the same, whatever becomes of the dataset,
    and needs no network once its files are in the cache. Deleting the note brings the corpus up to date.
    """
    if note.exists():
        return json.loads(note.read_text("utf-8"))

    def ask() -> dict[str, Any]:
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

    listing = _answer(repository, ask)
    for pattern in patterns:
        if not any(fnmatch(path, pattern) for path in listing["files"]):
            raise DataError(f"dataset {repository} has no file {pattern} at its commit {listing['commit']}")
    unfinished = note.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(listing, indent=1), "utf-8")
    unfinished.replace(note)
    return listing


def _download(repository: str, commit: str, path: str) -> Path:
    """The file in the hub's cache, downloaded if it is not there."""
    import huggingface_hub as hub

    file = {"repo_id": repository, "filename": path, "revision": commit, "repo_type": "dataset"}
    cached = hub.try_to_load_from_cache(**file)
    if isinstance(cached, str):
        return Path(cached)
    _answer(repository, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(**file)))
    with _explained(repository):
        return Path(hub.hf_hub_download(**file))


def _verify(file: Path, sha256: str, note: Path) -> None:
    """Check a file's content, unless the note says that the file as it now is has passed."""
    status = file.stat()
    state = f"{status.st_size} {status.st_mtime_ns}"
    if note.exists() and note.read_text() == state:
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise DataError(
            f"{file} is damaged: its SHA-256 is {found} and should be {sha256}. "
            f"Delete {file.resolve()} to have it downloaded again."
        )
    note.write_text(state)


def _answer(repository: str, ask: Callable[[], _T]) -> _T:
    """What `ask` returns, if within HF_HUB_ETAG_TIMEOUT (10 s by default).

    The library's own time-outs are for one address and one attempt, and some of its calls have none: only a
    thread that can be left behind bounds them all, look-ups of names included.
    """
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as PATIENCE

    answer: Future[_T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    with _explained(repository):
        try:
            return answer.result(PATIENCE)
        except TimeoutError:
            raise TimeoutError(f"no answer in {PATIENCE} s") from None


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what is raised within into a `DataError` that names the host, the dataset and the ways out."""
    from huggingface_hub.constants import ENDPOINT

    try:
        yield
    except Exception as error:  # its versions 0, 1 and 2 raise the errors of three network libraries
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise DataError(
            f"{ENDPOINT} did not give the dataset {repository} ({reason}). HF_ENDPOINT may name a mirror and "
            "HF_TOKEN a user with access; files downloaded elsewhere are read by giving their folder as the "
            "corpus, rows as documents, of which a part is then held out anew; the corpora docstrings and "
            "stdlib need no network."
        ) from error
