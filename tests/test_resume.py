"""Resuming: damaged records and checkpoints, finished runs, and runs whose data has changed."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model import checkpoint, export, generate
from model.load import load_run
from model.resume import data_changes
from runtime.budget import Budget, Length
from runtime.config import as_dict
from runtime.errors import UserError
from runtime.records import to_json
from runtime.run import Run
from runtime.signals import Interrupt


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """A finished run of 12 steps, with checkpoints of 9 and 12, evaluations of 6 and 12, and samples of 6 and 12."""
    out = tmp_path_factory.mktemp("trained")
    assert train.main(tiny(out, run="mine", sample_every=6, lr=1e-3)) == 0
    return out / "mine"


@pytest.fixture
def mine(trained, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "out" / "mine"))


def resume(folder: Path, **flags) -> int:
    return train.main(
        ["--resume", f"--run={folder.name}", f"--out={folder.parent}", *(f"--{k}={v}" for k, v in flags.items())]
    )


def rows(folder: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def falls_back(folder: Path) -> None:
    """Make the checkpoint of step 9 the last, as if the run had been killed after it."""
    (folder / "previous.pt").replace(folder / "last.pt")
    (folder / "status.json").write_text('{"status": "running"}')


DAMAGED_LINES = {
    "cut": b'{"step": 4, "lo',
    "not JSON": b"loss went up here",
    "not UTF-8": b'{"step": 5, "note": "\xff"}',
    "no step": b'{"loss": 1.0}',
    "no row": b"[1, 2]",
    "step is text": b'{"step": "5"}',
    "loss is text": b'{"step": 5, "loss": "low"}',
    "nested too deeply": b"[" * 100_000,
}


def test_damaged_rows_are_left_out_and_kept_aside(mine, capsys):
    """Those after them are kept."""
    falls_back(mine)
    good = (mine / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [row for row in rows(mine) if row["step"] <= 9]
    damaged = b"\n".join([*DAMAGED_LINES.values(), b""])
    (mine / "metrics.jsonl").write_bytes(good[0] + damaged + b"".join(good[1:]))
    before = (mine / "metrics.jsonl").read_bytes()
    assert resume(mine) == 0
    line = f"metrics.jsonl has {len(DAMAGED_LINES)} damaged lines, which are left out; metrics.jsonl.damaged has"
    assert line in capsys.readouterr().out
    assert rows(mine)[: len(kept)] == kept and rows(mine)[-1]["step"] == 12
    assert (mine / "metrics.jsonl.damaged").read_bytes() == before


def reopened(folder: Path, at_step: int | None = None) -> Run:
    """A run that is started, or resumed at a step, and let go."""
    run = Run(folder, resume=at_step is not None)
    run.start(at_step)
    run.release()
    return run


def test_rows_of_earlier_versions_may_have_nan(tmp_path):
    folder = tmp_path / "mine"
    reopened(folder)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "loss": NaN, "tok_s": Infinity}\n{"step": 2, "val_loss": NaN}\n')
    run = reopened(folder, at_step=2)
    assert not list(folder.glob("*.damaged")) and run.best() == float("inf")
    assert rows(folder) == [{"step": 1, "loss": None, "tok_s": None}, {"step": 2, "val_loss": None}]
    run = reopened(folder, at_step=2)  # and what they are written as now is read
    assert run.failure(1.0, 1.0, 100) is None and run.best() == float("inf")


def test_json_has_no_nan():
    value = {"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}, 1.5], "d": (2, None, True, "NaN")}
    assert to_json(value) == '{"a": null, "b": [null, {"c": null}, 1.5], "d": [2, null, true, "NaN"]}'


def test_damaged_samples_are_kept(mine, capsys):
    falls_back(mine)
    (mine / "samples.txt").write_bytes(
        b"My notes\n\n--- step 6 ---\nSixth \xff and \xe2\x82\n\n--- step 12 ---\nLast\n\n"
    )
    before = (mine / "samples.txt").read_bytes()
    assert resume(mine) == 0 and "samples.txt is damaged; samples.txt.damaged has" in capsys.readouterr().out
    text = (mine / "samples.txt").read_text(encoding="utf-8")
    assert text.startswith("My notes\n\n--- step 6 ---\nSixth \ufffd and \ufffd\n\n--- step 12 ---\n")
    assert "Last" not in text and (mine / "samples.txt.damaged").read_bytes() == before


@pytest.mark.parametrize("cut", [0, 30], ids=["missing", "cut"])
def test_a_sample_that_a_kill_lost_is_written(mine, cut):
    """The checkpoint of step 12 was saved, and the process killed before the sample of step 12 was complete."""
    (mine / "status.json").write_text('{"status": "running"}')
    whole = (mine / "samples.txt").read_bytes()
    start = whole.index(b"--- step 12")
    (mine / "samples.txt").write_bytes(whole[: start + cut])
    assert resume(mine, steps=14) == 0
    assert (mine / "samples.txt").read_bytes().startswith(whole)


def test_nothing_is_left_of_a_finished_run(mine, capsys):
    before = contents(mine)
    for flags in ({}, {"steps": 12}, {"lr": 1.0}):
        assert resume(mine, **flags) == 0
        assert "mine is finished, at step 12: nothing is left to do" in capsys.readouterr().out
    assert contents(mine) == before
    (mine / "status.json").write_text('{"status": ')  # no longer known to be finished
    assert resume(mine) == 0 and json.loads((mine / "status.json").read_text())["status"] == "finished"


def test_a_finished_run_in_seconds_has_reached_its_length():
    """Its last checkpoint was saved just before the end."""
    state = {"step": 5, "budget": {"tokens": 640, "seconds": 0.99}, "config": asdict(Length(seconds=1.0))}
    assert Length(seconds=1.0).reached(state) and Length(steps=5).reached(state) and Length(tokens=1).reached(state)
    assert not any(length.reached(state) for length in (Length(seconds=1.01), Length(steps=6), Length(tokens=641)))


@pytest.mark.parametrize(
    "length, message",
    [
        ({"steps": 11}, "steps 11 is less than the 12 that the run has done"),
        ({"tokens": 1000}, "tokens 1,000 is less than the 1,536 that the run has done"),
        ({"seconds": 1e-3}, "seconds 0.001 is less than the"),
    ],
    ids=["steps", "tokens", "seconds"],
)
def test_a_length_below_what_is_done_is_refused(mine, capsys, length, message):
    before = contents(mine)
    assert resume(mine, **length) == 2 and message in capsys.readouterr().err and contents(mine) == before


def test_the_way_on_without_a_last_checkpoint(mine, capsys):
    (mine / "best.pt").unlink()
    (mine / "last.pt").unlink()
    assert resume(mine) == 2
    error = capsys.readouterr().err
    assert "previous.pt is a good checkpoint, of step 9" in error
    (mine / "previous.pt").rename(mine / "aside")
    assert resume(mine) == 2
    assert "the run ended before its first: --overwrite starts it again" in capsys.readouterr().err


@pytest.mark.parametrize("fingerprints", [True, False], ids=["this version", "earlier version"])
@pytest.mark.parametrize("val_fraction", [0.05, 0.3])
def test_another_split_of_the_corpus_is_refused(mine, capsys, val_fraction, fingerprints):
    if not fingerprints:
        forget_fingerprints(mine)
    before = contents(mine)
    assert resume(mine, steps=14, **{"data.val_fraction": val_fraction}) == 2
    error = capsys.readouterr().err
    assert f"data.val_fraction is {val_fraction} where the run had 0.1" in error and "only a new run" in error
    assert contents(mine) == before


def forget_fingerprints(folder: Path) -> None:
    state = checkpoint.load(folder / "last.pt")
    del state["data"], state["best_after"]
    checkpoint.save(folder, state)


@pytest.mark.parametrize("fingerprints", [True, False], ids=["this version", "earlier version"])
def test_the_best_belongs_to_one_evaluation_set(mine, corpus, tmp_path, capsys, monkeypatch, fingerprints):
    if not fingerprints:
        forget_fingerprints(mine)
    best = (mine / "best.pt").read_bytes()
    # The losses of the new set are greater than all of the old one; of its own the second is the best.
    losses = iter((9.0, 8.0, 8.5))
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(losses), "val_bpb": 1.0})
    (tmp_path / "other").mkdir()
    for path in sorted(corpus.iterdir())[20:]:
        shutil.copy(path, tmp_path / "other")
    flags = {"data.corpus": tmp_path / "other", "eval_every": 2}
    assert resume(mine, steps=14, **flags) == 0
    lines = capsys.readouterr().out
    assert "changed  the evaluation set is another: the best checkpoint is sought anew" in lines
    assert "changed  the validation text is another, and the run may have been trained on some of it" in lines
    assert (mine / "best-to-step-12.pt").read_bytes() == best
    assert checkpoint.load(mine / "best.pt")["step"] == 14
    assert resume(mine, steps=18) == 0 and "changed" not in capsys.readouterr().out
    assert checkpoint.load(mine / "best.pt")["step"] == 16 and len(list(mine.glob("best*"))) == 2


def test_the_best_is_kept_on_the_same_evaluation_set(mine, monkeypatch, capsys):
    """It was taken with other batches, and its corpus touched since."""
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": 9.0, "val_bpb": 1.0})
    assert resume(mine, steps=14, micro_batch=1) == 0
    assert checkpoint.load(mine / "best.pt")["step"] == 12 and "changed" not in capsys.readouterr().out


def test_a_best_that_a_kill_kept_from_being_marked_is_marked(mine, monkeypatch):
    """It came after the checkpoint was written and its evaluation logged."""
    (mine / "best.pt").unlink()
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": 9.0, "val_bpb": 1.0})
    assert resume(mine, steps=13) == 0 and checkpoint.load(mine / "best.pt")["step"] == 12


def test_another_order_and_other_targets_are_said(mine, capsys):
    assert resume(mine, steps=13, seed=5, **{"data.shift": 0}) == 0
    lines = capsys.readouterr().out
    assert "changed  seed is 5 where the run had 0" in lines
    assert "changed  data.shift is 0 where the run had 1" in lines
    assert "changed  the evaluation set is another" in lines and "validation text" not in lines


def parts_of(value: Any, keys: tuple = ()) -> Iterator[tuple]:
    """The keys of every value in nested dicts and lists."""
    if keys:
        yield keys
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from parts_of(value[key], (*keys, key))


def changed(state: dict, keys: tuple, value: Any = KeyError) -> dict:
    """A copy of `state` whose part at `keys` is `value`, or that lacks it."""
    *outer, last = keys
    copy = inner = dict(state)
    for key in outer:
        inner[key] = inner[key].copy()
        inner = inner[key]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return copy


GARBAGE = (None, "text", -3, [], {}, torch.zeros(2), {"a": torch.ones(1, dtype=torch.int8)})


def test_a_malformed_checkpoint_is_refused_in_one_sentence(mine, monkeypatch):
    """Each part in turn is missing or garbage: resuming and generating either work or say what is wrong."""
    flags = [*RESUME, f"--out={mine.parent}"]
    monkeypatch.setattr(Run, "_lock", lambda self: None)  # configuring takes it each time
    trainer = train.Trainer(*train.configure(flags), Interrupt())

    def resumed():
        config, run, state = train.configure(flags)
        Budget(config, 128, state.get("budget", {}))
        data_changes(state, as_dict(config), trainer.data.fingerprints)
        trainer.restore(state, run.folder / "last.pt")

    generated = partial(load_run, mine, torch.device("cpu"), which="last")
    state = torch.load(mine / "last.pt", weights_only=True)
    # Hyperparameters and metrics are not loaded. Of parts that are much alike, some are enough.
    paths = [keys for keys in parts_of(state) if not {"param_groups", "metrics"} & set(keys[:-1])]
    paths = [keys for i, keys in enumerate(paths) if len(keys) == 1 or i % 4 == 0]
    whole = (KeyError, *GARBAGE, torch.zeros_like(state["rng"]))
    refused, failed = set(), []
    for i, keys in enumerate(paths):
        for garbage in whole if len(keys) == 1 else (KeyError, GARBAGE[i % len(GARBAGE)]):
            malformed = changed(state, keys, garbage)
            monkeypatch.setattr(torch, "load", lambda *_, malformed=malformed, **__: dict(malformed))
            for use in (resumed, generated) if keys[0] in checkpoint.PARTS else (resumed,):
                try:
                    use()
                except UserError as error:
                    refused.add(keys[0])
                    if not REFUSAL.search(str(error)):
                        failed.append((keys, garbage, error))
                except Exception as error:
                    failed.append((keys, garbage, error))
    assert not failed
    assert refused >= {"format", "config", "model_config", "model", "optimizers", "rng", "step", "sequences"}


RESUME = ["--resume", "--run=mine", "--steps=14"]
REFUSAL = re.compile(
    "last.pt cannot be used: (it|another program)|cannot resume|holds imported weights|is no tokenizer"
)


def test_a_damaged_best_names_the_last(mine, tmp_path, capsys):
    (mine / "best.pt").unlink()
    (mine / "best.pt").write_bytes(b"torn")
    for program, flags in ((generate, ["--tokens=1"]), (export, [f"--to={tmp_path / 'exported'}"])):
        assert program.main([f"--run={mine}", *flags]) == 2
        error = capsys.readouterr().err
        assert "best.pt cannot be used: it is truncated" in error and "last.pt is a good checkpoint" in error
    assert not (tmp_path / "exported").exists()


def test_the_advice_for_a_damaged_checkpoint_changes_no_other(mine, capsys):
    """best.pt and last.pt are one file; writing over one would damage the other."""
    checkpoint.mark_best(mine)
    (mine / "last.pt").write_bytes(b"torn")
    assert resume(mine, steps=14) == 2
    command = capsys.readouterr().err.partition("to use that: ")[2].strip()
    good = (mine / "previous.pt").read_bytes()
    subprocess.run(command, shell=True, check=True)
    assert (mine / "last.pt").read_bytes() == (mine / "previous.pt").read_bytes() == good
    assert (mine / "best.pt").read_bytes() == b"torn"
    assert resume(mine, steps=14) == 0
