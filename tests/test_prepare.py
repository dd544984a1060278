"""Preparing corpora: contents, disjoint splits, incomplete folders, and resuming after any interruption."""

import errno
import itertools
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import encode, formats
from data import prepare as module
from data.batches import eval_batches
from data.formats import Corpus, DataError, Shard
from data.prepare import DataConfig, prepare, reopen

STORIES = [f"Story {n}.\n" + f"Once upon a time {n} cats sat.\n" * (n % 5 + 1) for n in range(60)]


class FakeCorpus:
    """A corpus with shards `name=(split, documents)`. An exception among the documents is raised when read."""

    def __init__(self, deduplicate=True, name="fake", remote=False, **shards):
        self.reads = []
        self.corpus = Corpus(name, json.dumps(shards, default=repr), deduplicate, lambda: made, remote)
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
    """A function that prepares a FakeCorpus, with the bytes tokenizer by default; `run.lines` are the printed lines."""

    def run(fake: FakeCorpus, cache="cache", **config):
        monkeypatch.setattr(module, "open_corpus", lambda name: fake.corpus)
        config = {"tokenizer": "bytes", "val_fraction": 0.2, "cache": str(tmp_path / cache)} | config
        return prepare(DataConfig(corpus="fake", **config), run.lines.append)

    run.lines = []
    return run


def documents(dataset, split) -> list[str]:
    ids = getattr(dataset, split)
    texts = dataset.tokenizer.decode(ids).split("<|endoftext|>")
    assert texts.pop() == ""  # each document ends with end-of-text
    return texts


def contents(dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.path.iterdir()}


def test_both_splits_hold_the_documents_and_the_summary_counts_them(run):
    dataset = run(FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:])))
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(STORIES)
    assert [text for text in STORIES if text in train] == train  # in the same order
    assert 4 <= len(val) <= 20
    for split, texts in (("train", train), ("val", val)):
        size = sum(map(len, texts))
        assert dataset.summary[split] == {"documents": len(texts), "bytes": size, "tokens": size + len(texts)}
    assert dataset.train.dtype == dataset.val.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        dataset.train[0] = 1


def test_the_digest_is_that_of_the_text_whatever_the_tokenizer(run):
    whole = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:]))
    first, others = run(whole), [run(FakeCorpus(a=(None, STORIES[:30]), b=(None, [*STORIES[30:-1], "Other."])))]
    assert run(whole, val_fraction=0.3, tokenizer="bpe", vocab_size=270).digest == first.digest
    others.append(run(FakeCorpus(a=(None, STORIES[30:]), b=(None, STORIES[:30]))))
    others.append(run(whole, max_tokens=99))
    assert len({first.digest, *(other.digest for other in others)}) == 4
    assert str(first) == f"fake (digest {first.digest[:12]})" and "its first 99 tokens" in str(others[-1])


def test_a_folder_without_a_digest_is_that_of_an_earlier_version(run):
    fake = FakeCorpus(a=(None, STORIES))
    manifest = run(fake).path / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "digest"}))
    assert run(fake).digest == "" and str(run(fake)) == "fake"


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_run_gets_its_own_tokens_after_its_corpus_changed(run, tmp_path, tokenizer):
    """Also those of a version that knew neither digests nor the present split pattern."""
    config = {"tokenizer": tokenizer, "vocab_size": 270, "val_fraction": 0.2}
    own = run(FakeCorpus(a=(None, STORIES)), **config)
    other = run(FakeCorpus(a=(None, STORIES[9:])), **config)

    def tokens_of(dataset, **changes):
        changed = DataConfig(**config | {"cache": str(tmp_path / "cache")} | changes)
        found = reopen(changed, dataset.tokenizer, dataset.digest)
        return found and found.path

    assert [tokens_of(own), tokens_of(other)] == [own.path, other.path]
    assert tokens_of(own, val_fraction=0.3) is tokens_of(own, cache="elsewhere") is None
    assert tokens_of(replace(own, tokenizer=replace(own.tokenizer, name="another"))) is None

    summary = {key: value for key, value in own.summary.items() if key != "digest"}
    (own.path / "manifest.json").write_text(json.dumps(summary))
    earlier = module._folder(
        DataConfig(**config, cache=str(tmp_path / "cache")), "fake", summary["fingerprint"], pattern=None
    )
    own.path.rename(earlier)
    assert tokens_of(own) is None
    assert tokens_of(replace(own, summary=summary)) == earlier
    (other.path / "manifest.json").write_text("[")
    assert tokens_of(replace(own, summary=summary)) == earlier


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_pieces_groups_and_batches_of_any_size_give_the_same_folder(tmp_path, monkeypatch, tokenizer):
    """A text file of several pieces, JSONL, and a limit within a document."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("\n".join(STORIES) + " " * 300 + "é" * 500, "utf-8-sig")
    (texts / "rows.jsonl").write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in STORIES))
    for limit in (0, 900):
        found = []
        for n, sizes in enumerate(((2**20, 2**18, 2**23), (128, 100, 2000), (64, 1000, 2000))):
            for owner, name, size in zip(
                (formats, encode, encode), ("PIECE_CHARS", "GROUP_CHARS", "BATCH_CHARS"), sizes, strict=True
            ):
                monkeypatch.setattr(owner, name, size)
            monkeypatch.setattr(encode.os, "cpu_count", lambda n=n: 1 + n)
            config = {"corpus": str(texts), "tokenizer": tokenizer, "vocab_size": 300, "val_fraction": 0.2}
            cache = str(tmp_path / f"{limit}-{n}")
            found.append(contents(prepare(DataConfig(**config, max_tokens=limit, cache=cache), lambda line: None)))
        assert found[1] == found[2] and (limit or found[0] == found[1])


def test_the_second_time_nothing_is_read_or_written(run):
    fake = FakeCorpus(a=(None, STORIES))
    first = run(fake)
    written = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    second = run(fake)
    assert fake.reads == ["a"]
    assert {path: path.stat().st_mtime_ns for path in second.path.iterdir()} == written
    assert second.summary == first.summary and np.array_equal(second.train, first.train)
    assert list(first.path.parent.iterdir()) == [first.path]
    assert sorted(path.name for path in written) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_whatever_changes_the_tokens_changes_the_folder(run, monkeypatch):
    fake = FakeCorpus(a=(None, STORIES))
    variants = [{}, {"val_fraction": 0.3}, {"max_tokens": 99}, {"tokenizer": "bpe", "vocab_size": 270}]
    variants.append({"tokenizer": "bpe", "vocab_size": 280})
    folders = {run(fake, **variant).path for variant in variants}
    folders.add(run(FakeCorpus(a=(None, STORIES[1:]))).path)
    monkeypatch.setattr(module, "SPLIT_PATTERN", "another")
    folders.add(run(fake, **variants[-1]).path)
    assert len(folders) == 7
    assert run(fake, vocab_size=999).path in folders  # bytes depend on neither


def test_a_documents_split_does_not_depend_on_its_position(run):
    forward = run(FakeCorpus(deduplicate=False, a=(None, STORIES * 2)))
    backward = run(FakeCorpus(deduplicate=False, a=(None, STORIES[::-1])))
    assert sorted(documents(forward, "val")) == sorted(documents(backward, "val") * 2)
    assert not set(documents(forward, "val")) & set(documents(forward, "train"))


def test_duplicates_are_dropped_if_the_corpus_says_so(run):
    dataset = run(FakeCorpus(a=(None, STORIES + STORIES[:9]), b=(None, STORIES)))
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(STORIES)


def test_the_split_of_the_corpus_itself_is_kept_and_validation_text_is_never_trained_on(run):
    shards = {"a": ("train", STORIES[:40] + STORIES[:2]), "b": ("val", STORIES[38:50])}
    dataset = run(FakeCorpus(deduplicate=False, **shards))
    assert documents(dataset, "train") == STORIES[:38] + STORIES[:2]
    assert documents(dataset, "val") == STORIES[38:50]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_lone_document_is_cut_at_the_end_of_a_line(run, monkeypatch, fraction, tokenizer):
    monkeypatch.setattr(encode, "CHUNK", 7)
    text = "".join(f"line {n} of a story\n" for n in range(300))
    dataset = run(FakeCorpus(a=(None, [text])), val_fraction=fraction, tokenizer=tokenizer, vocab_size=265)
    val = documents(dataset, "val")[0]
    (train,) = documents(dataset, "train")
    assert text.startswith(train) and text.endswith(val) and val.startswith("line")
    assert len(train) + len(val) < len(text)  # the end-of-text token replaced the last token
    assert len(train) + len(val) > len(text) - 20
    assert len(val) / len(text) == pytest.approx(fraction, rel=0.1, abs=0.02)


def test_a_lone_line_is_cut_anywhere_and_too_little_text_is_an_error(run):
    dataset = run(FakeCorpus(a=(None, ["0123456789" * 10])), val_fraction=0.1)
    assert len(dataset.val) == 10 and len(dataset.train) == 91
    with pytest.raises(DataError, match="fake is 4 tokens long: too short"):
        run(FakeCorpus(a=(None, ["abc"])))
    with pytest.raises(DataError, match="fake has no documents to train on"):
        run(FakeCorpus(a=("val", ["abc"]), b=("train", [])))


@pytest.mark.parametrize(
    "texts", [["abcd"], ["0123456789" * 10], ["equal rows"] * 99, ["a", "b", "c"]], ids=["4", "100", "equal", "short"]
)
def test_the_validation_split_of_little_text_has_text_to_predict(run, texts):
    dataset = run(FakeCorpus(a=(None, texts)), val_fraction=0.01)
    (batch,) = eval_batches(dataset.val, 4, 32, 1000)
    assert ((batch[1] >= 0) & (batch[1] != dataset.tokenizer.eot)).any()
    assert len(dataset.train) >= 2


def test_max_tokens_are_exact_and_later_shards_are_not_read(run, monkeypatch):
    fake = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:]), deduplicate=False)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARS", 50)
        dataset = run(fake, max_tokens=500)
    assert len(dataset.train) == 500 and dataset.train[-1] == dataset.tokenizer.eot
    assert fake.reads == ["a"]
    assert np.array_equal(dataset.train[:-1], run(fake).train[:499])


def test_bpe_trains_on_training_text_alone_and_reads_the_corpus_once(run, monkeypatch):
    trained_on = []
    train_bpe = encode.train_bpe
    monkeypatch.setattr(encode, "train_bpe", lambda texts, *size: trained_on.extend(texts) or train_bpe(texts, *size))
    fake = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[30:]))
    dataset = run(fake, tokenizer="bpe", vocab_size=275)
    assert trained_on == documents(dataset, "train")
    assert fake.reads == ["a", "b"]
    assert dataset.tokenizer.vocab_size == 275 and len(dataset.train) < dataset.summary["train"]["bytes"] / 2


def test_the_default_vocabulary_adapts_to_a_short_text_and_says_so(run):
    fake = FakeCorpus(a=(None, STORIES))
    dataset = run(fake, tokenizer="bpe")
    assert dataset.tokenizer.vocab_size == DataConfig(tokenizer="bpe").expected_vocab_size == 4096
    (line,) = (line for line in run.lines if "trained a BPE vocabulary" in line)
    assert f"vocabulary of {len(dataset.tokenizer.ids)} on them" in line and "no more of the 4,096 ids" in line
    assert documents(dataset, "train")[0] == STORIES[0]
    with pytest.raises(DataError, match="vocab_size is 4096, and the text to train it on supports only"):
        run(fake, tokenizer="bpe", vocab_size=4096)


def test_bpe_trains_on_the_beginning_of_a_large_corpus(run, monkeypatch):
    trained_on = []
    train_bpe = encode.train_bpe
    monkeypatch.setattr(encode, "train_bpe", lambda texts, *size: trained_on.extend(texts) or train_bpe(texts, *size))
    monkeypatch.setattr(encode, "SAMPLE_CHARS", 1001)
    fake = FakeCorpus(v=("val", STORIES[50:]), a=("train", STORIES[:30]), b=("train", STORIES[30:50]))
    dataset = run(fake, tokenizer="bpe", vocab_size=270)
    assert "".join(trained_on) == "".join(STORIES)[:1001]
    assert fake.reads == ["a", "v", "a", "b"]
    assert documents(dataset, "train") == STORIES[:50]


def test_an_error_in_a_shard_on_the_hub_keeps_those_before_it(run, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARS", 100)
    monkeypatch.setattr(encode, "SAMPLE_CHARS", 500)  # all of it in the first shard
    bpe = {"tokenizer": "bpe", "vocab_size": 265}
    whole = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[20:50]), c=(None, STORIES[40:]))
    expected = run(whole, cache="other", **bpe)
    failing = FakeCorpus(a=(None, STORIES[:30]), b=(None, [*STORIES[20:40], DataError("no answer")]))
    failing.corpus = replace(whole.corpus, shards=failing.corpus.shards, remote=True)
    with pytest.raises(DataError, match="no answer"):
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
    """Kill the process before each call that writes to disk, then run it again."""
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


def test_a_full_disk_is_one_sentence_and_loses_no_finished_shard(run, monkeypatch, tmp_path):
    """Each call that writes to disk fails, and all after it; then there is space again."""
    fake = FakeCorpus(a=(None, STORIES[:30]), b=(None, STORIES[20:]))
    expected, kept = contents(run(fake, cache="whole")), set()
    for calls in itertools.count():
        cache = tmp_path / f"full-{calls}"
        with monkeypatch.context() as patch:
            die_after(calls, patch, OSError(errno.ENOSPC, "No space left on device"), forever=True)
            try:
                run(fake, cache=cache.name)
                break
            except DataError as error:
                message = str(error)
        assert message.startswith(f"cannot prepare fake in {cache}/fake-") and "No space left on device" in message
        kept.update(len(json.loads(path.read_text())["shards"]) for path in cache.glob("*.partial/progress.json"))
        assert len(list(cache.iterdir())) == len(list(cache.glob("*.partial/progress.json")))  # nothing else
        assert contents(run(fake, cache=cache.name)) == expected
    assert kept == {1, 2}


def test_nothing_is_left_of_a_refused_corpus(run, tmp_path):
    for corpus, config in (
        (FakeCorpus(a=(None, STORIES), b=(None, [DataError("line 7 is bad")])), {}),
        (FakeCorpus(a=(None, STORIES)), {"tokenizer": "bpe", "vocab_size": 9999}),
        (FakeCorpus(a=(None, ["ab"])), {}),
    ):
        with pytest.raises(DataError):
            run(corpus, **config)
        assert list((tmp_path / "cache").iterdir()) == []


def test_duplicates_are_counted_in_the_last_line(run):
    dataset = run(FakeCorpus(a=(None, STORIES + STORIES[:9]), b=(None, STORIES)))
    assert run.lines[-1].endswith("; 69 duplicates were dropped") and dataset.summary["duplicates"] == 69
    run(FakeCorpus(a=(None, STORIES)))
    assert "duplicates" not in run.lines[-1]


def die_after(calls, patch, error=KeyboardInterrupt, forever=False):
    left = itertools.count(calls, -1)

    def dying(original):
        def call(*args):
            n = next(left)
            if n == 0 or (forever and n < 0):
                raise error
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


def test_only_the_size_of_large_files_is_checked(run, monkeypatch):
    monkeypatch.setattr(module, "VERIFY_BYTES", 100)
    fake = FakeCorpus(a=(None, STORIES))
    folder = run(fake).path
    damage_byte(folder / "train.bin")
    run(fake)
    os.truncate(folder / "train.bin", 400)
    with pytest.raises(DataError, match=r"train.bin has 400 bytes, not [\d,]+\. Delete it"):
        run(fake)


def test_partial_files_that_lost_bytes_are_an_error(run, tmp_path):
    fake = FakeCorpus(a=(None, STORIES), b=(None, [DataError("no answer")]), remote=True)
    with pytest.raises(DataError, match="no answer"):
        run(fake)
    (lost,) = tmp_path.glob("cache/*.partial/train.bin")
    os.truncate(lost, 100)
    with pytest.raises(DataError, match=f"{re.escape(str(lost))} has lost.*delete {re.escape(str(lost.parent))}"):
        run(fake)
    assert lost.stat().st_size == 100


def test_one_of_two_processes_prepares_and_the_other_waits(run, monkeypatch, tmp_path):
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
    run(FakeCorpus(a=(None, STORIES)), tokenizer="bpe", vocab_size=275)
    assert [re.sub(r"[\d,.]+", "N", line) for line in run.lines] == [
        "read N M characters of fake and trained a BPE vocabulary of N on them in N s",
        "prepared fake in N s: N documentsN N MBN N M tokensN N of them for validation",
    ]
    monkeypatch.setattr(encode, "REPORT_S", -1)
    run(FakeCorpus(a=(None, STORIES)))
    assert any(re.fullmatch(r"tokenizing fake: [\d.]+ M tokens so far, in shard a", line) for line in run.lines)


@pytest.mark.parametrize(("key", "value"), [("corpus", ""), ("cache", ""), ("vocab_size", 256)])
def test_an_invalid_setting_is_refused_with_its_name(key, value):
    with pytest.raises(ValueError, match=f"^{key} (is empty: it must|must)"):
        DataConfig(**{key: value})


def test_a_users_file_is_a_corpus(tmp_path):
    (tmp_path / "tale, of two.txt").write_text("It was the best of times.\n" * 50)
    config = {"corpus": str(tmp_path / "tale, of two.txt"), "tokenizer": "bytes", "val_fraction": 0.02}
    dataset = prepare(DataConfig(**config, cache=str(tmp_path / "cache")), lambda line: None)
    assert dataset.path.name.startswith("tale-of-two.txt-bytes-")
    assert documents(dataset, "val") == ["It was the best of times.\n"]
