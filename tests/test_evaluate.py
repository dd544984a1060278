"""python -m model.evaluate: the run's own loss again, and any text by a sliding window."""

import json
import math
import re

import numpy as np
import pytest
import torch

from data.formats import Corpus, shard
from model import evaluate, export
from model.evaluate import Windows
from model.load import load_run


def said(text):
    """Numbers that the program printed, by name."""
    number = r"([\d.,e+]+)"
    pattern = (
        rf"{number} tokens, {number} bytes, {number} words\n.*\nloss +{number} nats per token, {number} bits per byte\n"
        rf"perplexity {number} by token, {number} by word\n"
    )
    values = (float(value.replace(",", "")) for value in re.search(pattern, text).groups())
    return dict(zip(("tokens", "bytes", "words", "nats", "bits", "by_token", "by_word"), values, strict=True))


@pytest.fixture
def small(run, monkeypatch, tmp_path):
    _, folder = run()
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_runs_own_loss(small, capsys):
    """Of as many tokens as training evaluated."""
    rows = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    val_loss, val_bpb = rows[-1]["val_loss"], rows[-1]["val_bpb"]
    capsys.readouterr()
    assert evaluate.main([f"--run={small}", "--checkpoint=last", "--tokens=256"]) == 0
    out = capsys.readouterr().out
    found = said(out)
    assert "its validation split: 256 tokens" in out and "windows  of 32 tokens, every 32\n" in out
    assert (found["nats"], found["bits"]) == pytest.approx((val_loss, val_bpb), abs=1e-4)
    assert found["by_token"] == pytest.approx(math.exp(val_loss), rel=1e-3)
    assert found["by_word"] == pytest.approx(math.exp(val_loss * 256 / found["words"]), rel=1e-3)


@pytest.mark.parametrize("n, context, stride", [(40, 8, 8), (40, 8, 3), (41, 8, 1), (5, 8, 8), (9, 8, 2), (2, 8, 5)])
def test_every_token_is_a_target_once_with_the_context_of_its_window(n, context, stride):
    tokens = np.arange(100, 100 + n, dtype=np.uint16)
    targets = []
    for ids, batch in Windows(tokens, context, stride, 3):
        assert ids.shape == batch.shape and ids.shape[1] == context and len(ids) <= 3
        for inputs, wanted in zip(ids, batch, strict=True):
            for place in torch.nonzero(wanted >= 0).flatten():
                target = wanted[place].item()
                n_before = min(target - 100, place.item() + 1)
                assert inputs[: place + 1].tolist()[-n_before:] == list(range(target - n_before, target))
                assert n_before >= min(target - 100, context - stride + 1)
                targets.append(target)
    assert targets == list(range(101, 100 + n))


def test_a_text_by_a_sliding_window(small, tmp_path, capsys):
    text = "The quick fox jumps over\nthe lazy  dog, and sees the Ünïcode moon."
    (tmp_path / "text.txt").write_text(text)
    capsys.readouterr()
    assert evaluate.main([f"--run={small}", "--data=text.txt", "--stride=1", "--batch-size=16", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    found = said(out)
    assert "text.txt, all of it" in out or "text, all of it" in out
    model, tokenizer = load_run(small, torch.device("cpu"))
    ids = [*tokenizer.encode(text), tokenizer.eot]
    with torch.no_grad():
        rows = [model.logits(torch.tensor([ids[max(0, i - 32) : i]])).log_softmax(-1)[0] for i in range(1, len(ids))]
    nats = -sum(row[id].item() for row, id in zip(rows, ids[1:], strict=True))
    n_bytes = len(text.encode()) - 1  # the first has no context
    assert (found["tokens"], found["bytes"], found["words"]) == (len(ids) - 1, n_bytes, 13)
    assert found["nats"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert found["bits"] == pytest.approx(nats / n_bytes / math.log(2), abs=1e-4)


def test_of_a_corpus_with_a_validation_split_that_alone_is_read(small, capsys, monkeypatch):
    def unread():
        raise AssertionError

    shards = [shard("a", "train", unread), shard("b", "val", lambda: iter(["One two three.", "Four five six."] * 9))]
    corpus = Corpus("split", "0", False, lambda: shards)
    monkeypatch.setattr(evaluate, "open_corpus", lambda name: corpus)
    capsys.readouterr()
    assert evaluate.main([f"--run={small}", "--data=split", "--tokens=29"]) == 0
    out = capsys.readouterr().out
    assert (
        "split, its validation split: 29 tokens, 27 bytes, 6 words" in out
    )  # "ne two three.", end, "Four five six.", end


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stride=33"], "--stride 33 leaves out tokens: it must be at most the run's seq_len, 32"),
        (["--data=empty"], "empty"),
    ],
    ids=["stride", "empty"],
)
def test_what_cannot_be_evaluated_is_refused(small, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    assert evaluate.main([f"--run={small}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_imported_weights_have_no_text_of_their_own(small, capsys):
    assert export.main([f"--run={small}", "--to=hf"]) == export.main(["--run=again", "--from=hf"]) == 0
    assert evaluate.main(["--run=again"]) == 2
    assert "holds imported weights, which have no validation split: give a text with --data" in capsys.readouterr().err
