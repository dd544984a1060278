"""Checkpoints: atomic writes, in a thread too, and refusal of damaged and foreign files."""

import os
import time
import zipfile
from concurrent import futures
from contextlib import nullcontext

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from model.saver import Saver
from runtime.files import WriteError

CONFIG = {"n_layer": 1, "n_head": 1, "d_model": 2, "vocab_size": 4}


def state(step):
    return {
        "step": step,
        "model_config": CONFIG,
        "model": {"w": torch.arange(3000.0) + step},
        "nested": {"list": [1, 2.5, "x", None, True]},
    }


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
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be used.*best\.pt is a good checkpoint, of step 2"):
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


@pytest.fixture
def slowly(monkeypatch):
    """Makes each write begin late: what could go wrong meanwhile does."""
    write = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: (time.sleep(0.1), write(*args)))


def full(*args):
    raise WriteError(28, "No space left on device", "run/last.pt")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_the_file_has_the_state_of_the_call(tmp_path, slowly, device):
    """Tensors, lists and dicts change while it is written; the next save waits, and uses the same memory."""
    weight = torch.arange(3000.0, device=device)
    state = {"step": 1, "model_config": CONFIG, "model": {"w": weight, "tied": weight}, "list": [{"lr": 1.0}]}
    with Saver(tmp_path, torch.device(device)) as saver:
        for step in (1, 2):
            state["step"] = step
            saver.save(state)
            if step == 1:
                saver.mark_best()
                addresses = {buffer.data_ptr() for buffer in saver.buffers.values()}
            saver.before_update()
            weight += 1
            state["list"][0]["lr"] += 1
            state["model"]["new"] = weight
            del state["model"]["new"]
        assert {buffer.data_ptr() for buffer in saver.buffers.values()} == addresses and len(addresses) == 1
    for name, step in (("best", 1), ("previous", 1), ("last", 2)):
        loaded = checkpoint.load(tmp_path / f"{name}.pt")
        model = loaded["model"]
        assert torch.equal(model["w"], torch.arange(3000.0) + step - 1) and model.keys() == {"w", "tied"}
        assert model["w"].data_ptr() == model["tied"].data_ptr()
        assert loaded["step"] == step and loaded["list"] == [{"lr": float(step)}]


def test_a_failed_write_is_raised_and_no_older_checkpoint_becomes_the_best(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    saver = Saver(tmp_path, torch.device("cpu"))
    monkeypatch.setattr(checkpoint, "save", full)
    saver.save(state(2))
    saver.mark_best()
    futures.wait([saver.newest])
    for use in (saver.check, saver.wait, lambda: saver.save(state(3)), lambda: saver.__exit__(None, None, None)):
        with pytest.raises(WriteError, match=r"cannot write run/last\.pt: No space left"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_write_is_a_note_on_another_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(KeyboardInterrupt) as error, Saver(tmp_path, torch.device("cpu")) as saver:
        saver.save(state(1))
        raise KeyboardInterrupt
    assert error.value.__notes__ == ["cannot write run/last.pt: No space left on device"]


def test_on_a_gpu_copies_and_updates_wait_for_each_other(tmp_path, monkeypatch):
    """The order of calls, with streams that only record them."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name, self.device = name, torch.device("cuda")

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

        def synchronize(self):
            calls.append(f"the host waits for {self.name}")

    empty, write = torch.empty, checkpoint.save
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: calls.append(f"on {stream.name}") or nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **options: empty(*args, **options))
    monkeypatch.setattr(checkpoint, "save", lambda *args: (calls.append("write"), write(*args)))
    with Saver(tmp_path, torch.device("cuda")) as saver:
        saver.save(state(1))
        saver.wait()
        saver.before_update()
    before, after = ["copying waits for training", "on copying"], ["training waits for copying"]
    assert calls == [*before, "the host waits for copying", "write", *after]


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_a_truncated_file_is_refused_and_the_good_one_named(tmp_path, keep):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    last.unlink()  # do not write through a hard link to previous.pt
    last.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=rf"truncated or no checkpoint at all; {tmp_path}/previous.pt is a good"):
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
    with pytest.raises(CheckpointError, match="more than tensors and plain values") as error:
        checkpoint.load(tmp_path / "trap.pt")
    assert "weights_only" not in str(error.value)  # torch advises to load it anyway
    assert not (tmp_path / "sprung").exists()
