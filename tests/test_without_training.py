"""--print_config and --eval_only: what they print, and that they leave everything on disk as it was."""

import json
import re

import pytest

import train
from runtime.config import build, flatten, read_file
from runtime.files import locked
from runtime.run import LOCK


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """A function that returns what train.py prints, beside training, and checks that it exits with 0."""

    def run(*argv):
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as exit:
            train.main(list(argv))
        assert exit.value.code == 0 and snapshot(tmp_path) == before
        return capsys.readouterr().out

    return run


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def sources(text):
    """The comment of each line, by key; of a key that two sections have, the last."""
    return dict(re.findall(r"^ *(\w+) ?=.*?  # (.*)$", text, re.M))


def test_the_printed_config_is_a_config_file_with_the_source_of_each_value(printed, tmp_path):
    (tmp_path / "mine.py").write_text("lr = 0.5\nsteps = 9\nmodel = dict(n_layer=3)\nkernels = dict(swiglu='torch')\n")
    text = printed(
        "--config=mine.py", "--print_config", "--tokens=99", "--device=cpu", "--precision=fp32", "--compile=off"
    )
    comments = sources(text)
    assert comments["lr"] == comments["n_layer"] == "mine.py" and comments["clip"] == comments["steps"] == "default"
    assert (
        comments["tokens"] == "flag"
        and comments["precision"] == "flag: fp32"
        and comments["residual"] == "default: fp32"
    )
    assert comments["n_kv_head"] == "default: 12" and comments["vocab_size"] == "default"
    assert comments["capture"] == "default: no: cpu has no CUDA graphs" and comments["compile"] == "flag: no"
    assert comments["swiglu"] == "mine.py: torch" and comments["rmsnorm"] == "default: torch"
    (tmp_path / "printed.py").write_text(text)
    config = build(train.Config, flatten(train.Config, read_file("printed.py", tmp_path)))
    assert (config.tokens, config.steps, config.lr, config.model.n_layer) == (99, 0, 0.5, 3)
    assert printed("--config=printed.py", "--print_config").count("# printed.py") == text.count("  # ")


def test_a_bad_value_is_refused(capsys):
    assert train.main(["--config=small.py", "--print_config", "--device=cuda:99"]) == 2
    assert "device 'cuda:99' is not on this machine" in capsys.readouterr().err


def test_the_config_and_the_loss_of_a_run(run, printed, capsys):
    """While it trains, too."""
    code, folder = run(eval_every=12, **{"model.label_smoothing": 0.2, "model.z_loss": 0.01, "model.logit_softcap": 5})
    assert code == 0
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    out = f"--out={folder.parent}"
    with locked(folder / LOCK, busy=print):
        text = printed("--run=small", out, "--resume", "--print_config", "--lr=0.5")
        assert (
            sources(text)["batch_size"] == str(folder)
            and sources(text)["lr"] == "flag"
            and text.startswith("steps = 12 ")
        )
        said = printed("--run=small", out, "--eval_only")
    assert f"loss     {row['val_loss']:.4f} nats per token, {row['val_bpb']:.4f} bits per byte" in said
    few = printed("--run=small", out, "--eval_only", "--eval_tokens=32")
    assert "32 tokens" in few and f"loss     {row['val_loss']:.4f}" not in few
