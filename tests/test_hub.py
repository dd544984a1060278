"""Hub corpora, end to end: a process with the user's environment variables, against a hub on loopback."""

import io
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import pyarrow
import pyarrow.parquet
from hub_server import HubServer

from data.corpora import open_corpus

READ = """
import json, sys
from data.corpora import open_corpus
from data.formats import DataError
try:
    read = [(shard.name, shard.split, list(shard.read())) for shard in open_corpus(sys.argv[1]).shards()]
    print(json.dumps({"shards": read}))
except DataError as error:
    print(json.dumps({"error": str(error)}))
"""
TRAIN = "data/train-00000-of-00001.parquet"
VAL = "data/validation-00000-of-00001.parquet"
STORIES = [[TRAIN, "train", ["Once upon a time", "there was"]], [VAL, "val", ["The end."]]]


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), sink)
    return sink.getvalue()


def read_corpus(home: Path, endpoint: str, name: str = "tinystories", **environment: str) -> dict:
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_ETAG_TIMEOUT": "30",  # a busy machine takes seconds to answer
        **environment,
    }
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", READ, name], env=environment, cwd=root, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def server():
    files = {
        TRAIN: parquet(["Once upon a time", "", "there was"]),
        VAL: parquet(["The end."]),
        "data/README.md": b"not a shard",
    }
    with HubServer("roneneldan/TinyStories", files) as server:
        yield server


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_reads_a_dataset_then_needs_no_network(server, tmp_path):
    assert read_corpus(tmp_path, server.url) == {"shards": STORIES}
    assert read_corpus(tmp_path, closed_port()) == {"shards": STORIES}
    assert read_corpus(tmp_path, server.url, HF_HUB_OFFLINE="1") == {"shards": STORIES}


def test_broken_download_resumes(tmp_path):
    part = 10 * 2**20  # what huggingface_hub receives at a time
    text = random.Random(0).randbytes(part * 3 // 4).hex()
    with HubServer("roneneldan/TinyStories", {TRAIN: parquet([text]), VAL: parquet(["."])}) as server:
        server.break_at = part + 1000
        assert read_corpus(tmp_path, server.url) == {"shards": [[TRAIN, "train", [text]], [VAL, "val", ["."]]]}
    asked = [bytes_ for method, path, bytes_ in server.requests if method == "GET" and path.endswith(TRAIN)]
    assert asked == [None, f"bytes={part}-"]


def test_damaged_shard_names_the_file_to_delete(server, tmp_path):
    good = server.files[TRAIN]
    server.files[TRAIN] = good[:-1] + b"?"
    error = read_corpus(tmp_path, server.url)["error"]
    blob = next((tmp_path / "hub").rglob(f"blobs/{server.digests[TRAIN]}"))
    assert f"should be {server.digests[TRAIN]}" in error and f"Delete {blob}" in error
    assert read_corpus(tmp_path, server.url)["error"] == error
    server.files[TRAIN] = good
    blob.unlink()
    assert read_corpus(tmp_path, server.url) == {"shards": STORIES}


def test_shard_damaged_after_it_was_verified(server, tmp_path):
    assert read_corpus(tmp_path, server.url) == {"shards": STORIES}
    blob = next((tmp_path / "hub").rglob(f"blobs/{server.digests[VAL]}"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    assert f"Delete {blob}" in read_corpus(tmp_path, server.url)["error"]


@pytest.mark.parametrize("listed", [False, True])
def test_silent_server(server, tmp_path, listed):
    if listed:  # and then one file is gone from the cache, so that the silence is met in its download
        assert read_corpus(tmp_path, server.url) == {"shards": STORIES}
        next((tmp_path / "hub").rglob(f"blobs/{server.digests[TRAIN]}")).unlink()
    server.silent = True
    error = read_corpus(tmp_path, server.url, HF_HUB_ETAG_TIMEOUT="1")["error"]
    assert "TimeoutError: no answer in 1 s" in error
    assert server.url in error and "roneneldan/TinyStories" in error and "docstrings" in error


def test_unreachable_server(tmp_path):
    endpoint = closed_port()
    error = read_corpus(tmp_path, endpoint)["error"]
    assert endpoint in error and "roneneldan/TinyStories" in error and "Connection refused" in error


def test_offline_mode(tmp_path):
    assert "OfflineModeIsEnabled" in read_corpus(tmp_path, closed_port(), HF_HUB_OFFLINE="1")["error"]


def test_dataset_that_is_gone(server, tmp_path):
    assert "RepositoryNotFoundError" in read_corpus(tmp_path, server.url, "fineweb")["error"]


def test_dataset_without_the_expected_files(server, tmp_path):
    del server.files[VAL]
    assert "has no file data/validation-*.parquet" in read_corpus(tmp_path, server.url)["error"]


def test_fingerprints_are_of_the_files_meant():
    names = ("tinystories", "wikitext-2", "wikitext-103", "openwebtext", "fineweb", "fineweb-edu", "pile")
    prints = {open_corpus(name).fingerprint for name in names}
    assert len(prints) == len(names)
    assert open_corpus("pile").fingerprint in prints
