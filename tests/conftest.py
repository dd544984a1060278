"""Shared fixtures: a small corpus, and training runs of about a second on it."""

import os
from pathlib import Path

import pytest

# Workers of pytest -n share the cores with each other and with the tests' subprocesses. torch reads this on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_sessionstart(session):
    if session.config.getoption("dist", "no") != "no":
        return  # the process that starts the workers, which wait for it, runs no tests
    import torch

    # Triton kernels run compiled on a GPU and interpreted elsewhere. triton reads this when a test imports it.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # More threads make operators on such small tensors slower.
    torch.set_num_threads(min(2, torch.get_num_threads()))


SENTENCES = [
    f"The {adjective} {noun} {verb} the {other}." for adjective in ("quick", "lazy", "old", "red", "small")
    for noun in ("fox", "dog", "wizard", "boxer") for verb in ("jumps over", "sees", "follows", "forgets")
    for other in ("moon", "river", "gate")
]  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of forty short documents."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("\n".join(SENTENCES[(7 * i + j) % len(SENTENCES)] for j in range(30)))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
    """A function that returns the flags of a one-second run: two narrow layers on bytes, in fp32, eager."""
    cache = tmp_path_factory.mktemp("cache")

    def flags(out: Path, **changes) -> list[str]:
        values = {
            "data.corpus": corpus, "data.tokenizer": "bytes", "data.val_fraction": 0.1, "data.cache": cache, "out": out,
            "model.n_layer": 2, "model.n_head": 2, "model.d_model": 32, "model.d_ff": 0, "model.seq_len": 32,
            "model.init": "fan-in", "batch_size": 4,
            "steps": 12, "log_every": 4, "eval_every": 6, "save_every": 3, "eval_tokens": 256, "sample_every": 0,
            "precision": "fp32", "compile": "off", "device": "cpu", "lr": 1e-2,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in (values | changes).items()]

    return flags


@pytest.fixture
def drawn():
    """For tests whose runs plot their losses."""


@pytest.fixture(autouse=True)
def not_drawn(request, monkeypatch):
    """Runs in this process do not plot their losses, which is a third of the time of a tiny one."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("runtime.run.Run.plot", lambda self: None)


@pytest.fixture
def run(tiny, tmp_path):
    """A function that trains with some options changed. Returns the exit code and the run's folder."""
    import train

    def start(*extra: str, **changes) -> tuple[int, Path]:
        name = str(changes.get("run", "small"))
        return train.main([*tiny(tmp_path / "out", **changes), *extra]), tmp_path / "out" / name

    return start


@pytest.fixture
def eager_losses(monkeypatch):
    """A list of the validation losses of the runs to come, each with the eager one."""
    import train

    evaluate, losses = train.evaluate, []

    def both(model, batches, byte_lengths, loss, world):
        found = evaluate(model, batches, byte_lengths, loss, world)
        losses.append((found["val_loss"], evaluate(model, batches, byte_lengths)["val_loss"]))
        return found

    monkeypatch.setattr("train.evaluate", both)
    return losses
