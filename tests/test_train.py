"""train.py end to end: the files that runs write, resuming, statuses, and invalid configurations."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import data.prepare
import train
from model import checkpoint
from model.load import load_run
from model.saver import Saver
from runtime.files import WriteError
from runtime.run import Run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_its_record(run, drawn, capsys):
    code, folder = run(sample_every=6, sample_prompt="The old ")
    lines = capsys.readouterr().out.splitlines()
    (step,) = (line for line in lines if line.startswith("step      8   58%"))
    assert re.search(r" tok/s  0:00:\d\d elapsed, 0:00:\d\d left$", step)
    assert re.fullmatch(r"result   \d\.\d{4} bits per byte, [\d,]+ tok/s", lines[-5])
    assert lines[-4].startswith("made     best.pt (the model of the lowest validation loss), last.pt")
    assert lines[-4].endswith(f"in {folder}")
    assert [line.partition(" -m ")[2] or line.partition("train.py")[2] for line in lines[-3:]] == [
        f"model.generate --run {folder}",
        f"model.export --run {folder} --to {folder}-hf",
        f" --run small --out {folder.parent} --resume --steps=24",
    ]
    assert code == 0 and status(folder)["status"] == "finished" and status(folder)["step"] == 12
    written = {path.name for path in folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "samples.txt", "loss.png", "status.json", "tokenizer.json"}
    assert written == files | {"last.pt", "previous.pt", "best.pt"}
    training = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in training] == [1, 4, 8, 12]
    assert all(row["tokens"] == row["step"] * 4 * 32 and row["tok_s"] > 0 for row in training)
    assert training[-1]["loss"] < training[0]["loss"] - 1
    assert [row["step"] for row in rows(folder) if "val_loss" in row] == [6, 12]
    assert (folder / "samples.txt").read_text().count("---\nThe old ") == 2
    assert json.loads((folder / "config.json").read_text())["model"]["d_model"] == 32


@pytest.mark.parametrize("tokenizer, size", [("bytes", 257), ("bpe", 300)])
def test_documents_are_separated_by_the_tokenizers_end_of_text(run, tokenizer, size):
    knobs = {**VARIED, "model.dropout": 0, "data.tokenizer": tokenizer, "data.vocab_size": size}
    _, folder = run(**knobs, steps=2)
    model, tokenizer = load_run(folder, torch.device("cpu"))
    assert model.config.separator == tokenizer.eot == size - 1
    ids = torch.tensor([[1, 2, tokenizer.eot, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids)[:, 2:], model.hidden(ids[:, 2:]))


def test_packing_leaves_the_prepared_corpus_alone(run, tmp_path):
    cache = tmp_path / "cache"
    for packing in ("stream", "documents"):
        run(run=packing, steps=1, **{"data.packing": packing, "data.cache": cache})
    assert len(list(cache.glob("*/manifest.json"))) == 1


def test_overfits_one_small_batch(run, tmp_path):
    (tmp_path / "one.txt").write_text("".join(chr(97 + i * i % 26) + chr(65 + i * 7 % 26) for i in range(80)))
    quiet = {"eval_every": 999, "save_every": 999, "log_every": 50}
    data = {"data.corpus": tmp_path / "one.txt", "data.val_fraction": 0.3}
    code, folder = run(**data, **quiet, batch_size=2, steps=300)
    assert code == 0 and rows(folder)[-2]["loss"] < 0.1


VARIED = {"data.packing": "documents", "model.window": "SL:8", "model.n_kv_head": 1, "model.dropout": 0.1}


@pytest.mark.parametrize(
    "knobs", [{"optimizer": "adamw"}, {"optimizer": "muon"}, VARIED], ids=["adamw", "muon", "varied"]
)
def test_resuming_is_exact(run, monkeypatch, knobs):
    """A run that is interrupted between two checkpoints and resumed has bitwise equal weights and equal metrics."""
    _, whole = run(run="whole", **knobs)
    take = train.Trainer.train_step

    def interrupted(self, *args):
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *args)

    monkeypatch.setattr(train.Trainer, "train_step", interrupted)
    code, parts = run(run="parts", **knobs)
    assert code == 1 and status(parts)["status"] == "interrupted" and status(parts)["step"] == 8
    monkeypatch.undo()
    assert run("--resume", run="parts")[0] == 0  # with the run's own configuration, not that of the flags
    assert same(weights(whole), weights(parts))
    speeds = [row["tok_s"] for row in rows(parts) if "tok_s" in row]
    assert max(speeds) < 50 * min(speeds)  # the speed after resuming does not count earlier steps
    columns = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "val_bpb")
    assert [[row.get(c) for c in columns] for row in rows(whole)] == [
        [row.get(c) for c in columns] for row in rows(parts)
    ]


def test_a_crash_loses_only_what_came_after_the_checkpoint(run, monkeypatch, capsys):
    _, whole = run(run="whole")
    monkeypatch.setattr(train.Trainer, "sample", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(run="parts", sample_every=7)
    parts = whole.parent / "parts"
    assert status(parts)["status"] == "crashed" and "ZeroDivisionError" in status(parts)["error"]
    monkeypatch.undo()
    assert run("--resume", run="parts", sample_every=0)[0] == 0
    assert same(weights(whole), weights(parts))


@pytest.mark.parametrize("ends", ["finished", "interrupted", "crashed"])
def test_the_end_of_a_run_waits_for_its_last_checkpoint(run, tmp_path, monkeypatch, ends):
    """Its write begins when nothing else is left to do."""
    steps, write, last = [], checkpoint.save, tmp_path / "out" / "small" / "last.pt"
    last_step, rest_done = 12 if ends == "finished" else 6, threading.Event()

    def late(folder, state):
        if state["step"] == last_step:
            rest_done.wait()
            time.sleep(0.1)
        write(folder, state)

    def end():
        rest_done.set()
        if ends == "interrupted":
            kill("SIGTERM", times=2)()
        elif ends == "crashed":
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(*((Run, "plot") if ends == "finished" else (train, "evaluate")), lambda *_: end())
    monkeypatch.setattr(Run, "close", lambda self, *_, **__: steps.append(checkpoint.load(last)["step"]))
    with pytest.raises(ZeroDivisionError) if ends == "crashed" else nullcontext():
        run(eval_every=99 if ends == "finished" else 6)
    assert steps == [last_step]


def test_a_checkpoint_lost_at_an_interruption_is_said(run, monkeypatch, capsys):
    def full(*args):
        raise WriteError(28, "No space left on device", "a/last.pt")

    monkeypatch.setattr(checkpoint, "save", full)
    during(monkeypatch, train, "evaluate", kill("SIGTERM", times=2))
    assert run(save_every=99)[0] == 1
    lost = "SIGTERM ended it at once; cannot write a/last.pt: No space left on device"
    assert capsys.readouterr().err == f"error: interrupted at step 6: {lost}\n"


def test_a_checkpoint_is_copied_before_the_next_update(run, monkeypatch):
    """Which a GPU may otherwise run first."""
    calls = []
    for owner, name in ((Saver, "save"), (Saver, "before_update"), (train.Trainer, "update")):
        during(monkeypatch, owner, name, lambda name=name: calls.append(name))
    run(steps=2, save_every=1)
    assert calls == 2 * ["before_update", "update", "save"]


def during(monkeypatch, owner, name, act, at_step=None):
    """Have `act` called at each call of `owner.name`, or at the one at the run's step `at_step`."""
    original = getattr(owner, name)

    def acting(*args, **options):
        if at_step in (None, getattr(args[0], "step", None)):
            act()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, acting)


def kill(name, times=1):
    def act():
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))

    return act


def test_a_live_run_is_neither_resumed_nor_overwritten(run, monkeypatch, capsys):
    codes = []

    def intrude():
        codes.append([run(flag, run="mine")[0] for flag in ("--resume", "--overwrite")])

    during(monkeypatch, train.Trainer, "train_step", intrude, at_step=7)
    code, folder = run(run="mine")
    assert (codes, code) == ([[2, 2]], 0) and status(folder)["status"] == "finished"
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 4, 8, 12]
    assert f"process {os.getpid()} is training in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_training_ends_in_a_sentence(run, tmp_path, monkeypatch, capsys, name):
    with monkeypatch.context() as patch:
        during(patch, data.prepare, "prepare", kill(name))
        assert run(run="mine")[0] == 1 and not (tmp_path / "out").exists()
    during(monkeypatch, Run, "start_trackers", kill(name))  # the folder exists by now
    code, folder = run(run="mine")
    assert code == 1 and status(folder)["status"] == "interrupted"
    assert capsys.readouterr().err == 2 * f"error: interrupted at step 0: {name} ended it at once\n"


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_a_signal_in_the_last_evaluation_or_sample_leaves_the_rest_to_resuming(run, monkeypatch, name):
    _, whole = run(run="whole", eval_every=99)
    with monkeypatch.context() as patch:
        during(patch, train, "evaluate" if name == "evaluate" else "continued", kill("SIGTERM"))
        code, folder = run(run="mine", eval_every=99)
    done = {"evaluate": ("interrupted", 1), "sample": ("finished", 0)}[name]  # nothing is left to do after the sample
    assert (status(folder)["status"], code) == done and [row["step"] for row in rows(folder)] == [1, 4, 8, 12, 12]
    assert run("--resume", run="mine")[0] == 0 and status(folder)["status"] == "finished"
    assert (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text()


def test_a_second_signal_ends_at_once(run, monkeypatch, capsys):
    during(monkeypatch, train, "evaluate", kill("SIGTERM", times=2))
    code, folder = run(run="mine")
    assert code == 1 and status(folder)["status"] == "interrupted" and status(folder)["step"] == 6
    error = capsys.readouterr().err
    assert error == (
        f"error: interrupted at step 6: SIGTERM ended it at once; --resume continues from {folder / 'last.pt'}\n"
    )


def test_sigusr1_saves_and_goes_on(run, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, state: (saved.append(state["step"]), save(folder, state)))
    during(monkeypatch, train.Trainer, "train_step", kill("SIGUSR1"), at_step=6)
    assert run(save_every=99, eval_every=99)[0] == 0 and saved == [8, 12]


@pytest.mark.parametrize("owner, name", [(Run, "start_trackers"), (train.Trainer, "evaluate")])
def test_an_error_once_the_folder_exists_is_its_status(run, monkeypatch, capsys, owner, name):
    """In set-up, and in the end of a run."""

    def full(self, *args):
        raise WriteError(28, "No space left on device", "a/file")

    monkeypatch.setattr(owner, name, full)
    code, folder = run(eval_every=99)
    assert code == 1 and status(folder)["status"] == "crashed" and not (folder / "run.lock").exists()
    assert status(folder)["error"] == "WriteError: cannot write a/file: No space left on device"
    assert "cannot write a/file: No space left on device" in capsys.readouterr().err


def test_a_reader_that_leaves_does_not_end_the_run(tiny, tmp_path):
    """As `train.py | head -1` does; also at the interpreter's exit."""
    command = [sys.executable, train.__file__, *tiny(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("config ")
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, "")
    assert status(tmp_path / "small")["status"] == "finished"


class BrokenTracker:
    """A W&B run whose service died."""

    title = "W&B"

    def __init__(self, fails):
        self.fails, self.called = fails, []

    def log(self, row):
        self._call("log")

    def finish(self, succeeded):
        self._call("finish")

    def _call(self, name):
        self.called.append(name)
        if name == self.fails:
            raise BrokenPipeError("the service is gone")


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_what_is_beside_a_run_never_ends_it(run, drawn, monkeypatch, capsys, fails):
    broken, start = BrokenTracker(fails), Run.start

    def start_badly(self, at_step):
        start(self, at_step)
        self.trackers.append(broken)
        (self.folder / "samples.txt").mkdir()

    monkeypatch.setattr(Run, "start", start_badly)
    if fails == "finish":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: 1 / 0)
    code, folder = run(run="$A_$B", sample_every=4)  # half a formula
    said = capsys.readouterr().out
    assert code == 0 and status(folder)["status"] == "finished"
    assert said.count("the service is gone") == 1 and broken.called.count(fails) == 1
    assert said.count("samples are lost: cannot write") == 1
    assert (folder / "loss.png").exists() == (fails == "log") == ("no loss.png: division by zero" not in said)
    assert not list(folder.glob("*.partial"))


def test_accumulating_is_the_large_batch(run):
    """In float64 the two differ by rounding only, so a wrong number of tokens would show."""
    torch.set_default_dtype(torch.float64)
    try:
        large, small = (run(run=name, micro_batch=n, steps=3)[1] for name, n in (("large", 4), ("small", 1)))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(weights(large).values(), weights(small).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_follow_float32(run, precision):
    _, exact = run(run="fp32", steps=6)
    _, half = run(run="half", precision=precision, steps=6)
    ours, truth = (rows(f)[-1]["val_loss"] for f in (half, exact))
    assert ours == pytest.approx(truth, abs=0.02) and ours != truth
    assert all(w.dtype == torch.float32 for w in weights(half).values())


@pytest.mark.parametrize("clip", [0, 1])
def test_an_overflow_in_one_gradient_stops_every_optimizer(run, monkeypatch, clip):
    """Here the embedding's gradient (on AdamW) overflows while Muon's gradients are finite."""
    trainers, take = [], train.Trainer.train_step

    def overflowing(self, *args):
        trainers.append(self)
        if self.step == 2:  # the overflowed gradients were cleared
            loss, norm = take(self, *args)
            assert norm.isfinite() and norm > 0
            return loss, norm
        hook = self.model.embedding.weight.register_hook(lambda grad: grad * math.inf)
        before = {name: p.clone() for name, p in self.model.named_parameters()}
        loss, norm = take(self, *args)
        hook.remove()
        assert norm == 0 and same(before, dict(self.model.named_parameters()))
        return loss, norm

    monkeypatch.setattr(train.Trainer, "train_step", overflowing)
    assert run(precision="fp16", optimizer="muon", clip=clip, steps=3)[0] == 0
    assert len(trainers) == 3 and trainers[0].scaler.get_scale() == 2.0**14  # 2^16 halved twice


def test_compiled_follows_eager(run, eager_losses):
    """In evaluation too, which the step's compiled forward is for: there is nothing more to compile, nor to profile."""
    _, eager = run(run="eager", steps=4, **{"model.n_layer": 1})
    del eager_losses[:]
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    _, compiled = run(run="compiled", steps=4, eval_every=2, compile="on", profile="3:1", **{"model.n_layer": 1})
    assert rows(compiled)[-1]["val_loss"] == pytest.approx(rows(eager)[-1]["val_loss"], abs=1e-3)
    assert counts["unique_graphs"] == before + 1
    assert [found for found, _ in eager_losses] == pytest.approx([eager for _, eager in eager_losses], rel=1e-5)
    assert len(eager_losses) == 2 and "torch.compile" in (compiled / "profile" / "step-3.txt").read_text()


@pytest.mark.parametrize("knob", ["dropout", "label_smoothing", "z_loss"])
def test_evaluation_is_of_the_plain_loss(run, monkeypatch, eager_losses, knob):
    """The step's compiled forward has the training loss."""
    monkeypatch.setattr("torch.compile", lambda model: model)
    assert run(steps=2, eval_every=2, compile="on", **{f"model.{knob}": 0.5})[0] == 0
    assert [found for found, _ in eager_losses] == [eager for _, eager in eager_losses] != []


def test_a_seed_determines_a_run(run):
    folders = [run(run=name, seed=seed, deterministic="true")[1] for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    a, b, c = map(weights, folders)
    assert same(a, b) and not same(a, c) and torch.are_deterministic_algorithms_enabled()


def test_diagnostics_change_nothing(run):
    _, plain = run(run="plain", micro_batch=2, **{"model.dropout": 0.1})
    _, watched = run(run="watched", micro_batch=2, diag=5, **{"model.dropout": 0.1})
    assert same(weights(plain), weights(watched))
    columns = ("step", "loss", "grad_norm", "val_loss")
    kept = [row for row in rows(watched) if "diag" not in row]
    assert [[row.get(c) for c in columns] for row in rows(plain)] == [[row.get(c) for c in columns] for row in kept]
    found = [row for row in rows(watched) if "diag" in row]
    assert [row["step"] for row in found] == [5, 10] and [row["tokens"] for row in found] == [640, 1280]
    assert found[0]["diag"]["gradient"].keys() >= {"embedding", "blocks.1.attention", "norms"}


def test_a_warm_up_in_steps_and_one_that_never_ends(run, capsys):
    _, folder = run(run="steps", steps=4, warmup=2, log_every=1, lr=1e-2, schedule="constant", eval_every=99)
    assert [row["lr"] for row in rows(folder) if "lr" in row] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    assert "warm-up" not in capsys.readouterr().out
    _, folder = run(run="long", steps=4, warmup=8, log_every=1, lr=1e-2, eval_every=99)
    assert [row["lr"] for row in rows(folder) if "lr" in row] == pytest.approx([1.25e-3, 2.5e-3, 3.75e-3, 5e-3])
    assert "warm-up  8 steps of 4: the rate rises to the end" in capsys.readouterr().out


def test_targets_equal_to_inputs_are_learnt_at_once(run):
    """A loss with `data.shift` 0 says nothing about the model."""
    losses = [
        status(run(run=f"by{shift}", steps=60, eval_every=99, save_every=99, **{"data.shift": shift})[1])["val_loss"]
        for shift in (0, 1)
    ]
    assert losses[0] < 0.7 * losses[1]


def test_budgets_by_tokens_and_by_the_clock(run):
    _, folder = run(run="tokens", steps=0, tokens=1000)
    assert status(folder)["step"] == 8  # of 128 tokens
    code, folder = run(run="clock", steps=0, seconds=1.0, eval_every=10**6)
    assert code == 0 and status(folder)["status"] == "finished" and status(folder)["step"] > 3
    assert rows(folder)[-1]["seconds"] == pytest.approx(1.0, abs=0.9)


def test_a_time_limit_ends_a_run_that_can_be_resumed(run):
    code, folder = run(run="limited", steps=10**6, time_limit=0.5)
    assert code == 0 and status(folder)["status"] == "time_limit"
    step = status(folder)["step"]
    assert run("--resume", run="limited", steps=step + 2, time_limit=30)[0] == 0
    assert status(folder)["step"] == step + 2 and status(folder)["status"] == "finished"


def test_a_run_that_diverges_says_so_and_keeps_no_bad_checkpoint(run):
    wild = {"optimizer": "adamw", "lr": 3.0, "clip": 0, "warmup": 0, "weight_decay": 0, "model.tied": "false"}
    code, folder = run(**wild, steps=100, save_every=10**6, eval_every=10**6)
    assert code == 1 and status(folder)["status"] == "diverged" and not list(folder.glob("*.pt"))


def test_nan_is_reported_at_once(run, monkeypatch):
    take = train.Trainer.train_step

    def poisoned(self, *args):
        if self.step == 5:
            next(self.model.parameters()).data.fill_(float("nan"))
        return take(self, *args)

    monkeypatch.setattr(train.Trainer, "train_step", poisoned)
    code, folder = run()
    assert code == 1 and status(folder)["status"] == "nan" and status(folder)["step"] == 6
    assert checkpoint.load(folder / "last.pt")["step"] == 3


@pytest.mark.parametrize("sample_every", [0, 1])
def test_weights_that_are_not_finite_are_not_saved_or_sampled(run, sample_every):
    wild = {"optimizer": "adamw", "lr": 1e30, "warmup": 0, "log_every": 99, "save_every": 99, "eval_every": 99}
    code, folder = run(**wild, steps=5, sample_every=sample_every)
    assert code == 1 and status(folder)["status"] == "nan" and not list(folder.glob("*.pt"))


def exhausted(*args):
    raise torch.OutOfMemoryError("tried to allocate 80 GB")


def test_out_of_memory_is_a_status(run, monkeypatch, capsys):
    monkeypatch.setattr(train.Trainer, "accumulate", exhausted)
    code, folder = run(micro_batch=0)
    assert code == 1 and status(folder)["status"] == "oom"
    error = "error: oom at step 0: tried to allocate 80 GB; --micro_batch=2 needs less memory\n"
    assert capsys.readouterr().err == error


def test_out_of_memory_in_set_up_is_a_status_too(run, monkeypatch):
    _, done = run(run="done")
    _, kept = run(run="kept")
    before = {path: path.read_bytes() for path in [*done.iterdir(), *kept.iterdir()]}
    monkeypatch.setattr(train, "build_optimizers", exhausted)
    code, folder = run(run="new")
    assert code == 1 and status(folder)["status"] == "oom" and "80 GB" in status(folder)["error"]
    assert run("--overwrite", run="kept")[0] == run("--resume", run="done", steps=14)[0] == 1
    assert status(done)["status"] == "oom"
    changed = {path for path in before if not path.exists() or path.read_bytes() != before[path]}
    assert changed == {done / "status.json", done / "config.json"}


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(run, monkeypatch, capsys):
    """From step 6 on no file may exceed 20 kB, which fails as a full disk does."""
    old, save = resource.getrlimit(resource.RLIMIT_FSIZE), train.Trainer.save

    def save_on_a_full_disk(self):
        self.saver.wait()
        if self.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "save", save_on_a_full_disk)
        try:
            code, folder = run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    sentence = f"cannot write {folder / 'last.pt'}: File too large"
    assert code == 1 and status(folder)["status"] == "crashed" and sentence in status(folder)["error"]
    resumes = f"; --resume continues from {folder / 'last.pt'}\n"
    assert re.fullmatch(rf"error: crashed at step [6-9]: {re.escape(sentence + resumes)}", capsys.readouterr().err)
    assert checkpoint.load(folder / "last.pt")["step"] == 3 and not list(folder.glob("*.partial"))
    assert run("--resume", run="small")[0] == 0


@pytest.mark.parametrize("option", [{"wandb": "offline"}, {"log": "wandb-offline"}], ids=["wandb", "log"])
def test_wandb_offline_mirrors_the_rows(run, option):
    pytest.importorskip("wandb")
    code, folder = run(**option)
    assert code == 0 and list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert run("--resume", run="small", steps=14)[0] == 0
    ids = [path.name.split("-")[3] for path in folder.glob("wandb/offline-run-*")]
    assert ids[0] and len(set(ids)) == 1


def test_wandb_without_a_key_is_no_reason_to_fail(run, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    code, _ = run(log="wandb")
    assert code == 0 and re.search("W&B is off for this run: .*API.key", capsys.readouterr().out, re.I)


class Writer:
    """Stands in for TensorBoard's `SummaryWriter`, whose package need not be here."""

    made: ClassVar = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_text(self, key, text, step):
        self.text = text

    def add_scalar(self, key, value, step):
        self.scalars.append((key, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_rows_as_scalars(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(Writer, "made", [])
    _, folder = run(log="tensorboard", diag=4)
    (writer,) = Writer.made
    assert writer.folder == folder / "tensorboard" and writer.purge_step is None and writer.closed
    assert "    model/n_layer = 2\n" in writer.text
    loss = [(row["step"], row["loss"]) for row in rows(folder) if "loss" in row]
    assert [(step, value) for key, value, step in writer.scalars if key == "loss"] == loss
    assert {"val_bpb", "diag/gradient/norms", "tok_s"} <= {key for key, _, _ in writer.scalars}
    assert run("--resume", run="small", steps=14)[0] == 0
    assert Writer.made[1].purge_step == 13


def test_tensorboard_writes_its_files(run):
    pytest.importorskip("tensorboard")
    _, folder = run(log="tensorboard", steps=2)
    assert list(folder.glob("tensorboard/events*"))


def test_a_tracker_without_its_package_is_no_reason_to_fail(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(log="tensorboard", steps=1)[0] == 0
    said = capsys.readouterr().out
    assert "TensorBoard is off for this run" in said


def test_runs_are_named_after_their_config(run, tmp_path):
    names = [run(steps=1)[1].parent for _ in range(3)]
    assert sorted(p.name for p in names[0].iterdir()) == ["small", "small-2", "small-3"]
    code, _ = run("--resume", steps=2)
    assert code == 0
    assert [status(tmp_path / "out" / name)["step"] for name in ("small", "small-2", "small-3")] == [1, 1, 2]


def test_overwriting_discards_the_run(run):
    _, folder = run(run="mine")
    (folder / "samples-of-mine.txt").touch()
    code, folder = run("--overwrite", run="mine", steps=3, eval_every=10)
    assert code == 0 and rows(folder)[-1]["step"] == 3 and not (folder / "samples-of-mine.txt").exists()


def test_only_a_run_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    assert run("--overwrite", run="mine", steps=1)[0] == 0  # an empty folder may be overwritten
    thesis = tmp_path / "out" / "notes" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.touch()
    for name, message in (("notes", "notes is not a run (no config.json and status.json"), ("..", "not the path '..'")):
        assert run("--overwrite", run=name, steps=1)[0] == 2
        assert message in capsys.readouterr().err and thesis.exists()


def test_one_of_two_runs_that_start_at_once_is_refused(run, tmp_path, capsys, monkeypatch):
    name = tmp_path / "out" / "small"
    monkeypatch.setattr(
        "runtime.run.choose_folder", lambda *args: name
    )  # both processes chose it before either created it
    assert run(steps=3)[0] == 0
    before = {path: path.read_bytes() for path in name.iterdir()}
    assert run(steps=5)[0] == 2 and "another run has just started in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in name.iterdir()} == before


def test_the_best_is_kept_and_used(run, monkeypatch):
    """An evaluation saves a checkpoint, even if none is due."""
    losses = iter((3.0, 2.0, 2.5))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses), "val_bpb": 1.0})
    _, folder = run(eval_every=4, save_every=99)
    best = checkpoint.load(folder / "best.pt")
    assert best["step"] == 8
    model, _ = load_run(folder, torch.device("cpu"))
    assert same(model.state_dict(), best["model"])
    model, _ = load_run(folder, torch.device("cpu"), which="last")
    assert same(model.state_dict(), weights(folder))


def test_resuming_runs_an_evaluation_that_a_crash_lost(run, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(run="mine")
    monkeypatch.undo()
    code, folder = run("--resume", run="mine")
    assert code == 0 and [row["step"] for row in rows(folder) if "val_loss" in row] == [6, 12]


def test_a_rows_speed_is_since_the_last_row(tiny, tmp_path):
    trainer = train.Trainer(*train.configure(tiny(tmp_path / "out")))
    trainer.meter.peak = 1e9
    for step, busy in ((4, 2.0), (12, 1.0)):
        trainer.step, trainer.meter.seconds = step, trainer.meter.seconds + busy
        trainer.log({"loss": 1.0, "grad_norm": 1.0}, 0.5)
    speeds = [row["tok_s"] for row in trainer.run.rows]
    assert speeds == [4 * 128 / 2, 8 * 128 / 1]
    assert trainer.run.rows[-1]["mfu"] == speeds[-1] * trainer.flops / 1e9


def test_optimizer_options_reach_the_optimizers(tiny, tmp_path):
    knobs = {"optimizer": "muon", "lr": 0.01, "muon_lr": 0.03, "beta1": 0.7, "beta2": 0.8, "eps": 1e-3}
    schedule = {"schedule": "wsd", "decay": 0.5, "final_lr": 0.2, "warmup": 0}
    trainer = train.Trainer(*train.configure(tiny(tmp_path / "out", **knobs, **schedule)))
    trainer.train_step(*trainer.data.batches.get(0, 4), progress=1.0)
    adamw, muon = (optimizer.param_groups[0] for optimizer in trainer.optimizers)
    assert (adamw["lr"], muon["lr"]) == pytest.approx((0.01 * 0.2, 0.03 * 0.2))
    assert (adamw["betas"], adamw["eps"]) == ((0.7, 0.8), 1e-3)
    trainer.train_step(*trainer.data.batches.get(4, 4), progress=0.4)
    assert adamw["lr"] == 0.01


def test_a_step_is_sampled_and_saved_once(run):
    _, folder = run(sample_every=6)
    assert run("--resume", run="small")[0] == 0  # the run is already finished
    assert (folder / "samples.txt").read_text().count("--- step 12 ---") == 1
    assert checkpoint.load(folder / "previous.pt")["step"] == 9


def test_a_padded_vocabulary_samples_only_the_tokenizers_ids(run):
    code, folder = run(steps=1, sample_every=1, **{"model.vocab_size": 4096})
    assert code == 0 and (folder / "samples.txt").stat().st_size > 100


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


REFUSED = {
    "unknown flag": ({"learning_rate": 1}, "no flag called --learning_rate"),
    "unknown key": ({"model.n_layers": 1}, "did you mean --model.n_layer?"),
    "wrong type": ({"batch_size": "many"}, "batch_size must be a whole number, not 'many'"),
    "negative size": ({"model.d_model": -8}, "model.d_model must be at least 1, not -8"),
    "zero size": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "heads that do not divide": ({"model.n_head": 3}, "model.d_model 32 must be a multiple of n_head 3"),
    "micro-batch that does not divide": ({"micro_batch": 3}, "batch_size 4 must be a multiple of micro_batch 3"),
    "two lengths": ({"tokens": 5}, "exactly one of steps, tokens and seconds"),
    "unknown corpus": ({"data.corpus": "tinystorys"}, "tinystories"),
    "missing file": ({"data.corpus": "no/such.txt"}, "no/such.txt"),
    "unknown device": ({"device": "cuda:9"}, "device 'cuda:9' is not on this machine, which has cpu"),
    "unknown kernel": ({"kernels.attention": "flsh"}, "attention has no 'flsh' kernel; it has torch, triton, sdpa"),
    "triton without a GPU": ({"kernels": "triton"}, "needs a GPU and this run is on cpu: use --kernels=torch"),
    "dropout of 1": ({"model.dropout": 1}, "model.dropout must be less than 1, not 1"),
    "an empty window": ({"model.window": 0}, "model.window must be a number of keys, such as 256, or S and L"),
    "unknown packing": ({"data.packing": "document"}, "did you mean documents?"),
    "unknown config": ({"config": "huge.py"}, "no config file 'huge.py'"),
    "vocabulary beyond the corpus": ({"data.tokenizer": "bpe", "data.vocab_size": 60000}, "supports only"),
    "sequence beyond the corpus": ({"model.seq_len": 10**6}, "a window of seq_len = 1,000,000 needs 1,000,001"),
    "a warm-up of steps by the clock": (
        {"steps": 0, "seconds": 9, "warmup": 5},
        "warmup 5 is in steps, and a run of 9 seconds",
    ),
    "a shift of two": ({"data.shift": 2}, "data.shift must be at most 1, not 2"),
    "a norm place without a norm": (
        {"model.norm": "none", "model.norm_place": "post"},
        "norm must be rms or layer, not none",
    ),
    "a path for a name": ({"run": "out/mine"}, "run must be a name, not the path 'out/mine'"),
    "a seed beyond 64 bits": ({"seed": 2**64}, "seed must be a whole number that 64 bits hold"),
    "a cache that is a file": ({"data.cache": train.__file__}, "choose another folder with --data.cache"),
    "a width that no machine holds": ({"model.d_model": 10**9}, "lower model.n_layer, model.d_model"),
    "more layers than any machine holds": ({"model.n_layer": 10**12}, "model.n_layer must be at most 10000"),
    "a batch that no machine holds": ({"batch_size": 10**12}, "a batch of 1,000,000,000,000 sequences takes"),
    "no run to resume": ({"run": "gone", "resume": "true"}, "no run to resume"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_triton_kernels_in_the_interpreter(run):
    """Training, evaluation and sampling with all Triton kernels give the losses of the torch kernels."""
    losses = {}
    for kernels in ("torch", "triton"):
        code, folder = run(kernels=kernels, run=kernels, steps=3, log_every=1, eval_every=3, eval_tokens=64)
        assert code == 0 and json.loads((folder / "status.json").read_text())["status"] == "finished"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[kernels] = [row.get("loss") or row["val_loss"] for row in rows]
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_dropout_that_attention_lacks_is_refused_before_any_work(run, tmp_path, capsys):
    changes = {"kernels.attention": "triton", "model.dropout": 0.1, "data.corpus": "no/such.txt"}
    assert run(**changes)[0] == 2 and not (tmp_path / "out").exists()
    assert "attention has no dropout: use --kernels.attention=sdpa (or torch)" in capsys.readouterr().err


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_refusals(run, tmp_path, capsys, monkeypatch, changes, message):
    """One line that names the error; no files are written."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _ = run(**changes)
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


FILES = {
    "empty": ("a.txt", "", "empty"),
    "binary": ("a.txt", b"ab\x00cd" * 99, "binary"),
    "not UTF-8": ("a.txt", b"caf\xe9 " * 99, "UTF-8"),
    "bad line": ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2"),
    "no text field": ("a.jsonl", '{"content": "x", "title": "y"}\n', "title (str)"),
    "corrupt parquet": ("a.parquet", b"PAR1 but not really", "a.parquet"),
}


@pytest.mark.parametrize("name, content, message", FILES.values(), ids=FILES)
def test_bad_files(run, tmp_path, capsys, name, content, message):
    code, _ = run(**{"data.corpus": text(tmp_path / name, content)})
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_that_exists_is_left_alone(run, capsys):
    _, folder = run(run="mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _ = run(run="mine")
    assert code == 2 and "--resume continues it, --overwrite deletes it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"model.n_layer": 3},
        {"optimizer": "adamw"},
        {"data.tokenizer": "bpe", "data.vocab_size": 300},
        {"data.packing": "documents"},
        {"model.window": "SL"},
    ],
)
def test_resuming_refuses_another_model_or_optimizer(run, capsys, change):
    _, folder = run(run="mine")
    before = (folder / "last.pt").read_bytes()
    code, _ = run("--resume", run="mine", **change)
    assert code == 2 and "cannot resume from a checkpoint with" in capsys.readouterr().err
    assert (folder / "last.pt").read_bytes() == before and status(folder)["status"] == "finished"


def test_a_run_resumes_on_its_own_tokens_or_refuses_others(run, tmp_path, capsys):
    corpus = text(tmp_path / "corpus.txt", "one two three four five six seven\n" * 200)
    data = {"data.corpus": corpus, "data.tokenizer": "bpe", "data.vocab_size": 262}
    run(run="mine", steps=2, **data)
    text(corpus, "eight nine ten eleven twelve thirteen\n" * 200)
    assert run("--resume", run="mine", steps=4, **data)[0] == 0
    assert "as the run was trained on it" in capsys.readouterr().out
    assert run("--resume", run="mine", steps=6, **data | {"data.cache": tmp_path / "empty"})[0] == 2
    assert "corpus.txt has other tokens now than when" in capsys.readouterr().err


def test_kernels_dropout_and_recomputing_may_change_on_resuming(run):
    run(run="mine", **{"kernels.attention": "sdpa"})
    changes = {"kernels.attention": "torch", "model.dropout": 0.1, "model.recompute": 1}
    assert run("--resume", run="mine", steps=14, **changes)[0] == 0


def test_keys_that_a_checkpoint_lacks_have_their_defaults(run, capsys):
    _, folder = run(run="mine")
    state = checkpoint.load(folder / "last.pt")
    del state["model_config"]["window"]
    checkpoint.save(folder, state)
    assert run("--resume", run="mine", steps=14, **{"model.window": 8})[0] == 2
    assert "window  where this run has 8" in capsys.readouterr().err
    assert run("--resume", run="mine", steps=14)[0] == 0


def test_a_resumed_run_takes_its_own_configuration_and_the_flags(run, tmp_path):
    """A micro-batch of 3 divides the run's batch of 6, but not the batch of 4 in small.py."""
    _, folder = run(run="mine", batch_size=6)
    assert train.main(["--resume", "--run=mine", f"--out={tmp_path / 'out'}", "--micro_batch=3", "--steps=13"]) == 0
    assert json.loads((folder / "config.json").read_text())["micro_batch"] == 3 and status(folder)["step"] == 13


def test_resuming_with_another_batch_size_keeps_the_token_count(run):
    _, folder = run(steps=0, tokens=1280)  # ten steps of 128
    assert run("--resume", run="small", steps=0, tokens=3328, batch_size=8)[0] == 0  # and eight of 256
    assert [status(folder)[key] for key in ("step", "tokens")] == [18, 3328]


def test_a_run_by_the_clock_is_prolonged(run):
    _, folder = run(steps=0, seconds=0.5, eval_every=10**6)
    step = status(folder)["step"]
    assert run("--resume", run="small", steps=0, seconds=30.0, time_limit=0.5, eval_every=10**6)[0] == 0
    assert status(folder)["status"] == "time_limit" and status(folder)["step"] > step


def test_fp16_may_follow_another_precision(run):
    run(run="mine")
    assert run("--resume", run="mine", steps=14, precision="fp16")[0] == 0


def test_a_truncated_checkpoint_is_refused(run, capsys):
    _, folder = run(run="mine")
    last = folder / "last.pt"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[: len(content) // 2])
    code, _ = run("--resume", run="mine")
    error = capsys.readouterr().err
    assert code == 2 and "truncated" in error and "previous.pt is a good checkpoint, of step" in error


def test_a_folder_that_cannot_be_written(run, tmp_path, capsys):
    text(tmp_path / "out", "a file where the folder should be")
    code, _ = run()
    assert code == 2 and "cannot write to" in capsys.readouterr().err


def test_a_disk_too_full_to_begin(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    code, _ = run()
    assert code == 2 and "MB free and this run's checkpoints take" in capsys.readouterr().err


def test_bf16_on_a_card_without_it(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    code, _ = run(config="small.py", device="cuda", precision="bf16")
    assert code == 2 and "Tesla V100 does not compute in bf16: use --precision=fp16" in capsys.readouterr().err
