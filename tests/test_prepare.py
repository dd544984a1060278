"""Preparing: exact contents, disjoint splits, nothing half-done opens, and every interruption resumes to the same."""

import itertools
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.formats import Corpus, DataError, Shard
from data.prepare import DataConfig, prepare

STORIES = [f"Story {n}.\n" + f"Once upon a time {n} cats sat.\n" * (n % 5 + 1) for n in range(60)]


class FakeCorpus:
    """A corpus of shards given as `name=(split, documents)`; a document that is an exception is raised."""

    def __init__(self, deduplicate=True, name="fake", **shards):
        self.reads = []
        self.corpus = Corpus(name, json.dumps(shards, default=repr), deduplicate, lambda: made)
        made = [
            Shard(name, split, lambda name=name, documents=documents: self.read(name, documents))
            for name, (split, documents) in shards.items()
        ]

    def read(self, name, documents):
        self.reads.append(name)
        for document in documents:
            if isinstance(document, BaseException):
                raise document
            yield document


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Prepare a FakeCorpus, as bytes unless told otherwise; `run.lines` are those that it said."""

    def run(fake: FakeCorpus, cache="cache", **config):
        monkeypatch.setattr(module, "open_corpus", lambda name: fake.corpus)
        config = {"tokenizer": "bytes", "val_fraction": 0.2, "cache": str(tmp_path / cache)} | config
        return prepare(DataConfig(corpus="fake", **config), run.lines.append)

    run.lines = []
    return run


def documents(dataset, split) -> list[str]:
    ids = getattr(dataset, split)
    texts = dataset.tokenizer.decode(ids).split("<|endoftext|>")
    assert texts.pop() == ""  # each document is followed by its end
    return texts


def contents(dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.path.iterdir()}


def test_both_splits_hold_the_documents_and_the_summary_counts_them(run):
    dataset = run(FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:])))
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert [text for text in STORIES if text in train] == train  # in their order
    assert 4 <= len(val) <= 20
    for split, texts in (("train", train), ("val", val)):
        size = sum(map(len, texts))
        assert dataset.summary[split] == {"documents": len(texts), "bytes": size, "tokens": size + len(texts)}
    assert dataset.train.dtype == dataset.val.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        dataset.train[0] = 1


def test_the_second_time_nothing_is_read_or_written(run):
    fake = FakeCorpus(a=(None, STORIES))
    first = run(fake)
    for lock in first.path.parent.glob("*.lock"):
        lock.unlink()
    written = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    second = run(fake)
    assert fake.reads == ["a"]
    assert {path: path.stat().st_mtime_ns for path in second.path.iterdir()} == written
    assert second.summary == first.summary and np.array_equal(second.train, first.train)
    assert list(first.path.parent.iterdir()) == [first.path]
    assert sorted(path.name for path in written) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_whatever_changes_the_tokens_changes_the_folder(run):
    fake = FakeCorpus(a=(None, STORIES))
    variants = [{}, {"val_fraction": 0.3}, {"max_tokens": 99}, {"tokenizer": "bpe", "vocab_size": 270}]
    variants.append({"tokenizer": "bpe", "vocab_size": 280})
    folders = {run(fake, **variant).path for variant in variants}
    folders.add(run(FakeCorpus(a=(None, STORIES[1:]))).path)
    assert len(folders) == 6
    assert run(fake, vocab_size=999).path in folders  # of no consequence to bytes


def test_a_text_falls_on_the_same_side_wherever_it_stands(run):
    forward = run(FakeCorpus(deduplicate=False, a=(None, STORIES * 2)))
    backward = run(FakeCorpus(deduplicate=False, a=(None, STORIES[::-1])))
    assert sorted(documents(forward, "val")) == sorted(documents(backward, "val") * 2)
    assert not set(documents(forward, "val")) & set(documents(forward, "train"))


def test_repeats_are_dropped_where_the_corpus_asks_for_it(run):
    dataset = run(FakeCorpus(a=(None, STORIES + STORIES[:9]), b=(None, STORIES)))
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(STORIES)


def test_the_split_of_the_corpus_itself_is_kept_and_validation_text_is_never_trained_on(run):
    shards = {"a": ("train", STORIES[:40] + STORIES[:2]), "b": ("val", STORIES[38:50])}
    dataset = run(FakeCorpus(deduplicate=False, **shards))
    assert documents(dataset, "train") == STORIES[:38] + STORIES[:2]
    assert documents(dataset, "val") == STORIES[38:50]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_lone_document_is_cut_at_the_end_of_a_line(run, fraction, tokenizer):
    text = "".join(f"line {n} of a story\n" for n in range(300))
    dataset = run(FakeCorpus(a=(None, [text])), val_fraction=fraction, tokenizer=tokenizer, vocab_size=270)
    val = documents(dataset, "val")[0]
    (train,) = documents(dataset, "train")
    assert text.startswith(train) and text.endswith(val) and val.startswith("line")
    assert len(train) + len(val) < len(text)  # what ended train gave its place to the end of the document
    assert len(train) + len(val) > len(text) - 20
    assert len(val) / len(text) == pytest.approx(fraction, rel=0.1, abs=0.02)


def test_a_lone_line_is_cut_anywhere_and_too_little_text_is_an_error(run):
    dataset = run(FakeCorpus(a=(None, ["0123456789" * 10])), val_fraction=0.1)
    assert len(dataset.val) == 10 and len(dataset.train) == 91
    with pytest.raises(DataError, match="fake is 3 tokens long: too short"):
        run(FakeCorpus(a=(None, ["ab"])))
    with pytest.raises(DataError, match="fake has no documents to train on"):
        run(FakeCorpus(a=("val", ["abc"]), b=("train", [])))


def test_max_tokens_are_exact_and_later_shards_are_not_read(run, monkeypatch):
    fake = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:]), deduplicate=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "BATCH_CHARS", 50)
        dataset = run(fake, max_tokens=500)
    assert len(dataset.train) == 500 and dataset.train[-1] == dataset.tokenizer.eot
    assert fake.reads == ["a"]
    assert np.array_equal(dataset.train[:-1], run(fake).train[:499])


def test_bpe_trains_on_training_text_alone_and_reads_the_corpus_once(run, monkeypatch):
    trained_on = []
    train_bpe = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, size: trained_on.extend(texts) or train_bpe(texts, size))
    fake = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:]))
    dataset = run(fake, tokenizer="bpe", vocab_size=300)
    assert trained_on == documents(dataset, "train")
    assert fake.reads == ["a", "b"]
    assert dataset.tokenizer.vocab_size == 300 and len(dataset.train) < dataset.summary["train"]["bytes"] / 2


def test_bpe_trains_on_the_beginning_of_a_large_corpus(run, monkeypatch):
    trained_on = []
    train_bpe = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, size: trained_on.extend(texts) or train_bpe(texts, size))
    monkeypatch.setattr(module, "SAMPLE_CHARS", 1001)
    fake = FakeCorpus(v=("val", STORIES[50:]), a=("train", STORIES[:30]), b=("train", STORIES[30:50]))
    dataset = run(fake, tokenizer="bpe", vocab_size=270)
    assert "".join(trained_on) == "".join(STORIES)[:1001]
    assert fake.reads == ["a", "v", "a", "b"]
    assert documents(dataset, "train") == STORIES[:50]


def test_an_error_in_a_shard_keeps_those_before_it(run, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 100)
    monkeypatch.setattr(module, "SAMPLE_CHARS", 500)  # all of it in the first shard
    bpe = {"tokenizer": "bpe", "vocab_size": 265}
    whole = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[20:50]), c=(None, STORIES[40:]))
    expected = run(whole, cache="other", **bpe)
    failing = FakeCorpus(a=(None, STORIES[:30]), b=(None, [*STORIES[20:40], DataError("line 7 is bad")]))
    failing.corpus = Corpus("fake", whole.corpus.fingerprint, True, failing.corpus.shards)
    with pytest.raises(DataError, match="line 7 is bad"):
        run(failing, **bpe)
    whole.reads.clear()
    dataset = run(whole, **bpe)
    assert whole.reads == ["b", "c"]
    assert any("resuming fake after 1 of 3 shards" in line for line in run.lines)
    assert contents(dataset) == contents(expected)


@pytest.mark.parametrize(
    "fake",
    [
        FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[20:])),
        FakeCorpus(a=("train", STORIES[:30]), b=("val", STORIES[20:]), deduplicate=False),
        FakeCorpus(a=(None, ["".join(STORIES)])),
    ],
    ids=["hashed", "official", "lone"],
)
def test_a_kill_at_any_moment_resumes_to_the_same(run, monkeypatch, tmp_path, fake):
    """Killed before each call that makes something durable, then run again."""
    expected = contents(run(fake, cache="whole", max_tokens=2000))
    for calls in itertools.count():
        cache = f"killed-{calls}"
        with monkeypatch.context() as patch:
            die_after(calls, patch)
            try:
                run(fake, cache=cache, max_tokens=2000)
                break
            except KeyboardInterrupt:
                assert {path.suffix for path in (tmp_path / cache).iterdir()} <= {".partial", ".lock"}
        assert contents(run(fake, cache=cache, max_tokens=2000)) == expected
    assert calls > 10


def die_after(calls, patch):
    left = itertools.count(calls, -1)

    def dying(original):
        def call(*args):
            if next(left) == 0:
                raise KeyboardInterrupt
            return original(*args)

        return call

    for owner, name in ((os, "fsync"), (os, "truncate"), (Path, "rename"), (Path, "replace")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [damage_byte, lambda path: os.truncate(path, 40), lambda path: path.unlink()],
    ids=["byte", "short", "gone"],
)
def test_a_damaged_folder_is_an_error_that_says_what_to_delete(run, name, damage):
    fake = FakeCorpus(a=(None, STORIES))
    folder = run(fake).path
    damage(folder / name)
    left = sorted(folder.iterdir())
    with pytest.raises(DataError, match=f"{re.escape(str(folder))} is damaged.*Delete it"):
        run(fake)
    assert sorted(folder.iterdir()) == left


def test_of_files_too_large_to_checksum_each_time_the_size_is_checked(run, monkeypatch):
    monkeypatch.setattr(module, "VERIFY_BYTES", 100)
    fake = FakeCorpus(a=(None, STORIES))
    folder = run(fake).path
    damage_byte(folder / "train.bin")
    run(fake)
    os.truncate(folder / "train.bin", 400)
    with pytest.raises(DataError, match=r"train.bin has 400 bytes, not [\d,]+\. Delete it"):
        run(fake)


def test_partial_files_that_lost_what_was_finished_are_an_error(run, tmp_path):
    fake = FakeCorpus(a=(None, STORIES), b=(None, [DataError("line 7 is bad")]))
    with pytest.raises(DataError, match="line 7"):
        run(fake)
    (lost,) = tmp_path.glob("cache/*.partial/train.bin")
    os.truncate(lost, 100)
    with pytest.raises(DataError, match=f"{re.escape(str(lost))} has lost.*delete {re.escape(str(lost.parent))}"):
        run(fake)
    assert lost.stat().st_size == 100


def test_of_two_at_once_one_prepares_and_the_other_waits_for_it(run, monkeypatch, tmp_path):
    reading, waiting = threading.Event(), threading.Event()

    class SlowCorpus(FakeCorpus):
        def read(self, name, documents):
            reading.set()
            assert waiting.wait(20)
            yield from super().read(name, documents)

    fake = SlowCorpus(a=(None, STORIES))
    first = threading.Thread(target=run, args=(fake,))
    first.start()
    assert reading.wait(20)
    config = DataConfig(tokenizer="bytes", val_fraction=0.2, cache=str(tmp_path / "cache"))
    second = prepare(config, lambda line: waiting.set() if "waiting for another process" in line else None)
    first.join()
    assert fake.reads == ["a"]
    assert contents(second) == contents(run(fake))


def test_each_stage_is_a_line_and_long_ones_report(run, monkeypatch):
    run(FakeCorpus(a=(None, STORIES)), tokenizer="bpe", vocab_size=300)
    assert [re.sub(r"[\d,.]+", "N", line) for line in run.lines] == [
        "read N M characters of fake and trained a BPE vocabulary of N on them in N s",
        "prepared fake in N s: N documentsN N MBN N M tokensN N of them for validation",
    ]
    monkeypatch.setattr(module, "REPORT_S", -1)
    run(FakeCorpus(a=(None, STORIES)))
    assert any(re.fullmatch(r"tokenizing fake: [\d.]+ M tokens so far, in shard a", line) for line in run.lines)


def test_a_file_of_the_users_is_a_corpus(tmp_path):
    (tmp_path / "tale, of two.txt").write_text("It was the best of times.\n" * 50)
    config = {"corpus": str(tmp_path / "tale, of two.txt"), "tokenizer": "bytes", "val_fraction": 0.02}
    dataset = prepare(DataConfig(**config, cache=str(tmp_path / "cache")), lambda line: None)
    assert dataset.path.name.startswith("tale-of-two.txt-bytes-")
    assert documents(dataset, "val") == ["It was the best of times.\n"]
