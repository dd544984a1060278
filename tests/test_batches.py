"""Batches: each epoch covers every window once, resuming works anywhere, evaluation ignores the batch size."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from data.batches import Batches, eval_batches
from data.formats import DataError


@given(seq_len=st.integers(1, 9), extra=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_window_once(seq_len, extra, seed, epoch):
    tokens = np.arange(seq_len + extra, dtype=np.uint16)
    batches = Batches(tokens, seq_len, seed)
    count = batches.windows_per_epoch
    assert count == len(tokens) // seq_len
    inputs, targets = batches.get(epoch * count, count)
    assert inputs.shape == targets.shape == (count, seq_len)
    assert inputs.unique().numel() == inputs.numel()  # each token equals its position
    assert torch.equal((inputs + 1) % len(tokens), targets)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@given(first=st.integers(0, 40), count=st.integers(1, 40), cut=st.integers(1, 40))
def test_windows_depend_on_seed_and_index_only(first, count, cut):
    tokens = np.random.default_rng(0).integers(2**16, size=101, dtype=np.uint16)
    batches = Batches(tokens, 7, seed=3)
    whole = batches.get(0, 81)
    for of in (batches, Batches(tokens, 7, seed=3)):
        for some, every in zip(of.get(first, count), whole, strict=True):
            assert some.dtype == torch.int64 and some.is_contiguous()
            assert torch.equal(some, every[first : first + count])


def test_without_a_shift_the_targets_are_the_inputs():
    tokens = np.random.default_rng(0).integers(2**16, size=50, dtype=np.uint16)
    inputs, targets = Batches(tokens, 7, seed=3, shift=0).get(0, 9)
    assert torch.equal(inputs, targets) and torch.equal(inputs, Batches(tokens, 7, seed=3).get(0, 9)[0])
    for inputs, targets in eval_batches(tokens, 7, 2, 40, shift=0):
        assert torch.equal(inputs[targets >= 0], targets[targets >= 0])


def test_every_epoch_and_every_seed_has_its_own_order_and_offset():
    tokens = np.arange(1000)
    count = 100
    runs = [Batches(tokens, 10, seed).get(epoch * count, count)[0] for seed in (0, 1) for epoch in (0, 1)]
    steps = [tuple((run[:, 0].diff() % len(tokens)).tolist()) for run in runs]
    assert len({*steps, (10,) * (count - 1)}) == 5
    assert len({int(run[0, 0]) % 10 for run in runs}) > 1


def test_too_little_text_is_an_error_with_the_numbers():
    assert Batches(np.arange(9), 8, 0).get(0, 2)[0].shape == (2, 8)
    with pytest.raises(DataError, match=r"8 tokens long.*seq_len = 8 needs 9"):
        Batches(np.arange(8), 8, 0)
    with pytest.raises(DataError, match=r"no text to predict.* 1 tokens long, and 0 of them"):
        eval_batches(np.arange(1), 4, 2, 10)


def test_targets_without_text_are_an_error():
    for tokens, max_tokens in (([7, 9], 10), ([7, 9, 8, 9], 1)):
        with pytest.raises(DataError, match=r"raise eval_tokens or data\.val_fraction"):
            eval_batches(np.array(tokens), 4, 2, max_tokens)
    assert eval_batches(np.array([7, 9, 8, 9]), 4, 2, 2)


@given(
    length=st.integers(3, 80), seq_len=st.integers(1, 9), batch_size=st.integers(1, 9), max_tokens=st.integers(1, 90)
)
def test_evaluation_takes_the_same_targets_for_every_batch_size(length, seq_len, batch_size, max_tokens):
    tokens = np.arange(length, dtype=np.uint16)
    inputs, targets = map(torch.cat, zip(*eval_batches(tokens, seq_len, batch_size, max_tokens), strict=True))
    assert inputs.shape == targets.shape and inputs.shape[1] == seq_len and len(inputs) % batch_size == 0
    assert len(inputs) - batch_size < -(-min(max_tokens, length - 1) // seq_len) <= len(inputs)
    counted = targets != -1
    assert targets[counted].tolist() == list(range(1, min(max_tokens, length - 1) + 1))
    assert torch.equal(inputs[counted] + 1, targets[counted])
    alone = torch.cat([inputs for inputs, _ in eval_batches(tokens, seq_len, 1, max_tokens)])
    assert torch.equal(inputs[: len(alone)], alone)
