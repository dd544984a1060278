"""--init_from: training from a run's weights, a folder's in Hugging Face's format, and a hub model's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hub_server import HubServer, Repository
from ranks import Launcher, forks
from tiny_models import THEIRS, save_tiny

import train
from model import checkpoint
from model.huggingface import to_huggingface
from model.load import load_run
from model.pretrained import open_pretrained

FIRST = {"steps": 1, "eval_every": 1, "lr": 1e-2, "warmup": 0, "schedule": "constant", "optimizer": "adamw"}
MODEL = ("n_layer", "n_head", "d_model", "d_ff", "seq_len", "init")  # knobs of the fixture `tiny`


@pytest.fixture
def start(tiny, tmp_path, monkeypatch):
    """A function that trains from weights, without flags of the model or tokenizer but those given. Returns the exit
    code. Runs are in out/ of the working folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags, **changes):
        given = [f"--model.{knob}" for knob in MODEL] + ["--data.tokenizer"]
        kept = [flag for flag in tiny(Path("out"), **changes) if flag.partition("=")[0] not in given]
        return train.main(["--config=small.py", *kept, f"--init_from={name}", *flags])

    return run


def state(run):
    return checkpoint.load(Path("out", run, "last.pt"))


@pytest.mark.parametrize("name", THEIRS)
def test_a_step_of_adamw_is_transformers_own(start, tmp_path, name, monkeypatch):
    theirs, batches = save_tiny(name, tmp_path / "hf").train(), []
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    step = train.Trainer.train_step
    monkeypatch.setattr(train.Trainer, "train_step", lambda self, *args: [batches.append(args), step(self, *args)][1])
    # With a large epsilon the update is in proportion to the gradient: some are 0 but for rounding.
    options = {"eps": 1e-3, "weight_decay": 0.1, "clip": 0.5, "beta1": 0.8, "beta2": 0.9}
    assert start("hf", run="tuned", **FIRST, **options) == 0

    ((inputs, targets, _),) = batches
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()

    model, tokenizer = load_run(Path("out/tuned"), torch.device("cpu"), which="last")
    _, tensors = to_huggingface(model.config, model.state_dict(), tokenizer.eot)
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, theirs.state_dict()[key], atol=1e-5, rtol=1e-5)
        assert not torch.equal(tensor, before[key])


def test_a_run_begins_with_the_weights_and_resumes_from_its_own(start, tmp_path, capsys):
    save_tiny("gpt2", tmp_path / "hf")
    assert start("hf", run="tuned", **FIRST | {"lr": 1e-30}) == 0
    assert "weights  began as those of hf" in capsys.readouterr().out
    first = state("tuned")
    assert (
        first["step"] == 1 and first["model_config"]["position"] == "learned" and len(first["model"]["position"]) == 64
    )
    assert start("out/tuned", run="again", **FIRST | {"lr": 1e-30}) == 0
    for key, tensor in state("again")["model"].items():
        torch.testing.assert_close(first["model"][key], tensor, atol=1e-20, rtol=0)

    assert train.main(["--run=again", "--resume", "--init_from=hf", "--steps=2"]) == 2
    assert "again goes on from its own weights: init_from is for a new run" in capsys.readouterr().err
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert train.main(["--run=tuned", "--resume", "--init_from=hf", "--steps=2"]) == 0
    assert state("tuned")["step"] == 2


def test_the_context_may_be_shorter_and_without_learned_positions_longer(start, tmp_path, capsys):
    """A window of half the context stays as wide."""
    save_tiny("gpt2", tmp_path / "hf")
    assert start("hf", "--model.seq_len=65", run="tuned", **FIRST) == 2
    assert "model.seq_len is 65, and hf has 64 positions" in capsys.readouterr().err
    assert start("hf", "--model.seq_len=16", "--model.dropout=0.1", run="tuned", **FIRST | {"lr": 1e-30}) == 0
    full = load_run(Path("out/tuned"), torch.device("cpu"))[0]
    assert full.position.shape == (16, 32) and state("tuned")["model_config"]["dropout"] == 0.1

    flags = ["--config=small.py", f"--data.corpus={tmp_path / 'hf'}", "--data.tokenizer=bytes", "--device=cpu"]
    window = ["--model.window=SL", "--model.seq_len=24", "--model.n_head=2", "--model.d_model=32", "--compile=off"]
    rest = ["--data.cache=cache", "--steps=1", "--batch_size=1", "--eval_tokens=64", "--sample_every=0"]
    (tmp_path / "hf" / "text.txt").write_text("The quick fox jumps over the moon. " * 99)
    assert train.main([*flags, *window, *rest, "--run=windowed"]) == 0
    assert start("windowed", "--model.seq_len=48", run="longer", **FIRST) == 0
    assert load_run(Path("out/longer"), torch.device("cpu"))[0].config.windows == (12, 0)


@forks
@pytest.mark.parametrize("shard", ["off", "full"])
def test_ranks_begin_with_the_weights(start, tmp_path, shard):
    """Rank 0 reads them, and each takes its part."""
    save_tiny("qwen3", tmp_path / "hf")
    options = {"run": "ranks", "shard": shard} | FIRST | {"lr": 1e-30}
    assert Launcher(tmp_path / "ranks").run(2, lambda rank: start("hf", **options)) == [0, 0]
    _, weights = open_pretrained("hf").weights()
    for key, tensor in state("ranks")["model"].items():
        torch.testing.assert_close(weights[key], tensor, atol=1e-20, rtol=0)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--model.n_layer=3", "model.n_layer is 3, and the weights of hf have 2: leave it out"),
        ("--model.tied=true", "model.tied is True, and the weights of hf have False"),
        ("--model.init=xavier", "model.init is xavier, and the weights of hf have fan-in"),
        ("--data.tokenizer=gpt2", "data.tokenizer is gpt2, and the weights of hf have hf"),
        ("--init_from=nowhere", "nowhere is neither a run, nor a folder in Hugging Face's format, nor a hub:org/name"),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_refused(start, tmp_path, capsys, flag, message):
    save_tiny("qwen3", tmp_path / "hf")
    assert start("hf", flag, run="tuned", **FIRST) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()
    if flag == "--model.n_layer=3":
        assert start("hf", "--model.n_layer=2", run="tuned", **FIRST) == 0


def test_without_a_tokenizer_the_flags_decide_it(start, tmp_path, capsys):
    save_tiny("llama", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert start("hf", "--data.tokenizer=bpe", "--data.vocab_size=258", run="tuned", **FIRST) == 2
    assert "model.vocab_size 257 is less than the tokenizer's 258" in capsys.readouterr().err
    assert start("hf", "--data.tokenizer=bytes", run="tuned", **FIRST) == 0


HUB = """
import json, sys
from model.pretrained import open_pretrained
from runtime.errors import UserError
for name in sys.argv[1:]:
    try:
        pretrained = open_pretrained(name)
        config, weights = pretrained.weights()
        print(json.dumps([config.n_layer, weights["embedding.weight"].sum().item(), pretrained.tokenizer()]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_model_of_the_hub(tmp_path):
    """In shards or in one file, with a tokenizer or without, and from the cache again."""
    sums = []
    for name, size in (("qwen3", "20KB"), ("gpt2", "1GB")):
        model = save_tiny(name, tmp_path / name, max_shard_size=size)
        sums.append(model.get_input_embeddings().weight.sum().item())
    (tmp_path / "gpt2" / "tokenizer.json").unlink()
    names = ["hub:o/qwen3", "hub:o/gpt2", "hub:o/other", "hub:o/nowhere", "hub:o/a/b"]

    def read(*names):
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_ETAG_TIMEOUT": "30"}
        done = subprocess.run(
            [sys.executable, "-c", HUB, *names], env=os.environ | environment, cwd=Path(train.__file__).parent,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with HubServer("o/none", {}) as server:
        for name in ("qwen3", "gpt2"):
            files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            server.repositories[f"o/{name}"] = Repository(files, kind="models")
        server.repositories["o/other"] = Repository({"config.json": b'{"model_type": "qwen2"}'}, kind="models")
        qwen3, gpt2, other, nowhere, bad = read(*names)
        assert qwen3 == [2, pytest.approx(sums[0], rel=1e-4), "hub:o/qwen3"]
        assert gpt2 == [2, pytest.approx(sums[1], rel=1e-4), ""]
        assert (
            "hub:o/other cannot be imported: its model_type is 'qwen2', which has biases" in other
            or "no model" in other
        )
        assert "did not give the model o/nowhere" in nowhere
        assert "'hub:o/a/b' is no model of the Hugging Face Hub: it is to be hub:org/name" in bad
    assert read("hub:o/qwen3") == [qwen3]  # without the server, from the cache
