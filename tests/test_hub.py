"""Hub corpora end to end: subprocesses with the Hub's environment variables, and a fake Hub server on localhost."""

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
from hub_server import HubServer, Repository

from data.corpora import open_corpus
from data.tokenizer import train_bpe

READ = """
import json, sys
from data.corpora import open_corpus
from data.formats import DataError
for name in sys.argv[1:]:
    try:
        corpus = open_corpus(name)
        read = [(shard.name, shard.split, list(shard.read())) for shard in corpus.shards()]
        remark = corpus.remark("")
        print(json.dumps({"shards": read, "remark": remark} if remark else {"shards": read}))
    except DataError as error:
        print(json.dumps({"error": str(error)}))
"""
TRAIN = "data/train-00000-of-00001.parquet"
VAL = "data/validation-00000-of-00001.parquet"
STORIES = [[TRAIN, "train", ["Once upon a time", "there was"]], [VAL, "val", ["The end."]]]


def parquet(texts: list[str], column: str = "text", **others: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts, **others}), sink)
    return sink.getvalue()


def read_corpus(home: Path, endpoint: str, name: str = "tinystories", **environment: str) -> dict:
    (read,) = run(READ, home, endpoint, name, **environment)
    return read


def run(program: str, home: Path, endpoint: str, *arguments: str, **environment: str) -> list:
    """What a program prints in a process of its own, a line of JSON each."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_ETAG_TIMEOUT": "30",  # a busy machine takes seconds to answer
        **environment,
    }
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


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
    (listing,) = tmp_path.rglob("listing.json")  # as an earlier version wrote it
    listing.write_text(json.dumps({k: v for k, v in json.loads(listing.read_text()).items() if k != "patterns"}))
    assert read_corpus(tmp_path, server.url, HF_HUB_OFFLINE="1") == {"shards": STORIES}


def test_broken_download_resumes(tmp_path):
    part = 10 * 2**20  # the chunk size of huggingface_hub
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
    if listed:  # remove one file from the cache, so that its download is what times out
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


def configs(*entries: dict) -> dict:
    return {"configs": list(entries)}


def test_datasets_by_name(server, tmp_path):
    """Each is a way in which a dataset says what its files are."""
    rows = b'{"title": "t", "text": "one"}\n{"title": "u", "text": "two"}\n'
    plain = {"train.jsonl": rows, "more/train/a.jsonl": rows, "more/a.jsonl": b"?"}
    splits = [
        {"split": "train", "path": ["one/train-*", "two/**/*.parquet"]},
        {"split": "validation", "path": "one/val.parquet"},
        {"split": "test", "path": "one/test.parquet"},
    ]
    parts = {
        "one/train-0.parquet": parquet(["a"]), "one/train-1.parquet": parquet(["b"]), "two/x/y.parquet": parquet(["c"]),
        "one/val.parquet": parquet(["v"]), "one/test.parquet": parquet(["t"]), "one/sub/train-2.parquet": b"?",
    }  # fmt: skip
    converted = {
        "en/partial-train/0000.parquet": parquet(["en"]),
        "fr/train/0000.parquet": parquet(["fr"], "content"),
        "fr/validation/0000.parquet": parquet(["val"], "content"),
    }
    two = configs(
        {"config_name": "a", "data_files": "train.jsonl"}, {"config_name": "b", "data_files": ["more/*/a.jsonl"]}
    )
    default = configs(*two["configs"], {"config_name": "c", "data_files": "train.jsonl", "default": True})
    server.repositories |= {
        "o/card": Repository(parts, configs({"config_name": "default", "data_files": splits})),
        "o/jsonl": Repository(plain, two, in_git=("train.jsonl",)),
        "o/default": Repository(plain, default),
        "o/csv": Repository({"a.csv": b"a"}, configs({"config_name": "fr", "data_files": "a.csv"}), converted),
        "o/converted": Repository({}, converted=converted),
        "o/nothing": Repository({"a.zip": b"a"}),
        "o/test": Repository(plain, configs({"config_name": "x", "data_files": [{"split": "test", "path": "*"}]})),
        "o/columns": Repository({}, converted={"default/train/0000.parquet": parquet(["q"], "question", answer=["a"])}),
    }
    expected = {
        "hub:o/card": [[path, split, [text]] for path, split, text in (
            ("one/train-0.parquet", "train", "a"), ("one/train-1.parquet", "train", "b"),
            ("two/x/y.parquet", "train", "c"), ("one/val.parquet", "val", "v"),
        )],
        "hub:o/jsonl:a": [["train.jsonl", None, ["one", "two"]]],
        "hub:o/jsonl:b#title": [["more/train/a.jsonl", None, ["t", "u"]]],
        "hub:o/jsonl": "several configurations: write hub:o/jsonl:name with one of a, b",
        "hub:o/jsonl:z": "no configuration 'z': write hub:o/jsonl:name with one of a, b",
        "hub:o/default": [["train.jsonl", None, ["one", "two"]]],
        "hub:o/csv": [["fr/train/0000.parquet", "train", ["fr"]], ["fr/validation/0000.parquet", "val", ["val"]]],
        "hub:o/converted:en": [["en/partial-train/0000.parquet", None, ["en"]]],
        "hub:o/converted": "several configurations: write hub:o/converted:name with one of en, fr",
        "hub:o/nothing": "no Parquet or JSONL in the data_files of its card, and the Hub has not converted it",
        "hub:o/test": "no split 'train' to read, but test",
        "hub:o/columns": "no column 'text' of strings; its columns: id (int64), question (string), answer (string);",
        "hub:o/columns#answer": [["default/train/0000.parquet", None, ["a"]]],
        "hub:o/gone": "did not give the dataset o/gone (RepositoryNotFoundError",
        "hub:o/name/more": "it is to be hub:org/name[:config][#column]",
    }  # fmt: skip
    for name, found in zip(expected, run(READ, tmp_path, server.url, *expected), strict=True):
        if isinstance(expected[name], str):
            assert expected[name] in found.get("error", ""), name
        else:
            assert found.get("shards") == expected[name], (name, found)
            assert ("first 5 GB" in found.get("remark", "")) == (name == "hub:o/converted:en")


TOKENIZER = """
import json, sys
from data.formats import DataError
from data.prepare import DataConfig
for name in sys.argv[1:]:
    try:
        config = DataConfig(tokenizer=name, packing="documents")
        print(json.dumps([config.published.name, config.expected_vocab_size, config.separator]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_a_published_tokenizer_by_name(server, tmp_path):
    file = train_bpe(["one two one two"] * 9, 260).to_huggingface().to_str().encode()
    server.repositories |= {
        "o/model": Repository({"tokenizer.json": file}, kind="models"),
        "o/other": Repository({"tokenizer.model": b""}, kind="models"),
    }
    names = ["hub:o/model", "hub:o/other", "hub:o/model:x"]
    found, missing, bad = run(TOKENIZER, tmp_path, server.url, *names)
    assert found == ["o/model", 260, 259]
    assert "did not give the model o/other (" in missing and "tokenizer.json elsewhere and give its path" in missing
    assert "it is to be hub:org/name" in bad
    assert run(TOKENIZER, tmp_path, closed_port(), "hub:o/model") == [found]  # it is taken from the cache


def test_fingerprints_depend_on_repository_and_patterns():
    names = ("tinystories", "wikitext-2", "wikitext-103", "openwebtext", "fineweb", "fineweb-edu", "pile")
    prints = {open_corpus(name).fingerprint for name in names}
    assert len(prints) == len(names)
    assert open_corpus("pile").fingerprint in prints
