"""Checkpoints: atomic writes, and refusal of damaged and foreign files."""

import os
import zipfile

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError


def state(step):
    return {"step": step, "model": {"w": torch.arange(3000.0) + step}, "nested": {"list": [1, 2.5, "x", None, True]}}


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, state(1))
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert loaded["nested"] == state(1)["nested"] and torch.equal(loaded["model"]["w"], state(1)["model"]["w"])


def test_the_previous_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
        if step == 1:
            checkpoint.mark_best(tmp_path)
    steps = {path.name: checkpoint.load(path)["step"] for path in tmp_path.iterdir()}
    assert steps == {"last.pt": 3, "previous.pt": 2, "best.pt": 1}


def test_without_hard_links_they_are_kept_too(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    test_the_previous_and_the_best_are_kept(tmp_path)


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: done.append(name) or call(*args))
    checkpoint.save(tmp_path, state(1))
    assert done == ["fsync", "replace", "fsync"]


def test_the_suggested_checkpoint_is_a_valid_one(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    checkpoint.mark_best(tmp_path)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be used.*best\.pt is an earlier checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_full_disk_keeps_the_last_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and checkpoint.load(tmp_path / "last.pt")["step"] == 1


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_a_truncated_file_is_refused_and_the_good_one_named(tmp_path, keep):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    last.unlink()  # do not write through a hard link to previous.pt
    last.write_bytes(whole[:keep])
    with pytest.raises(
        CheckpointError, match=rf"truncated or no checkpoint at all; {tmp_path}/previous.pt is an earlier"
    ):
        checkpoint.load(last)
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 1


def test_a_flipped_bit_is_noticed(tmp_path):
    checkpoint.save(tmp_path, state(1))
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(3000.0).add(1).numpy().tobytes()[:64]) + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)


def test_foreign_files_are_refused(tmp_path):
    torch.save({"step": 1}, tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("hello", "there")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name, why in (("torch", "another program wrote it"), ("zip", ""), ("text", "no checkpoint at all")):
        with pytest.raises(CheckpointError, match=f"{name}.pt cannot be used: .*{why}"):
            checkpoint.load(tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": checkpoint.FORMAT, "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
