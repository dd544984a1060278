"""Export to and import from Hugging Face's format: equal logits and equal ids."""

import pytest
import torch

import train
from data.tokenizer import byte_tokenizer, train_bpe
from kernels import KernelChoice, bind
from model import generate
from model.export import ExportError, from_huggingface, main, to_huggingface, window_of
from model.generate import load_run
from model.gpt import GPT, ModelConfig

transformers = pytest.importorskip("transformers")

FAMILIES = {
    "llama": {"model.qk_norm": "false", "model.tied": "true"},
    "qwen3": {"model.qk_norm": "true", "model.tied": "false", "model.n_kv_head": 1, "model.head_dim": 24},
    "windowed qwen3": {"model.qk_norm": "true", "model.window": "SL:5", "model.dropout": 0.1},
}
TEXT = "The quick fox jumps over the moon.\n\n  Ünïcode, tabs\t, 12345 and <|endoftext|> too 🙂"


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_transformers_gives_our_logits_and_ids(run, tmp_path, capsys, changes):
    tokenizer = {"data.tokenizer": "bpe", "data.vocab_size": 300}
    _, folder = run(**changes, **tokenizer, steps=6, **{"model.rope_theta": 500.0, "model.norm_eps": 0.1})
    assert main(["--run", str(folder), "--to", str(tmp_path / "hf")]) == 0
    model, tokenizer = load_run(folder, torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if changes["model.qk_norm"] == "true" else "LlamaForCausalLM")

    plain = TEXT.replace("<|endoftext|>", "")
    assert their_tokenizer(plain)["input_ids"] == tokenizer.encode(plain)
    assert their_tokenizer.decode(tokenizer.encode(plain)) == plain
    assert their_tokenizer.eos_token_id == tokenizer.eot

    ids = torch.randint(tokenizer.vocab_size, (2, 32))
    with torch.no_grad():
        ours = model.head(model.hidden(ids))
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)

    assert main(["--run", str(tmp_path / "again"), "--from", str(tmp_path / "hf")]) == 0
    back, back_tokenizer = load_run(tmp_path / "again", torch.device("cpu"))
    assert (
        back.config == model.config
        and back.config.windows == model.config.windows
        and back_tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    )
    with torch.no_grad():
        assert torch.equal(back.head(back.hidden(ids)), ours)
    assert train.main([f"--out={tmp_path}", "--run=again", "--resume"]) == 2
    assert "holds imported weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, windows",
    [
        ({}, (0, 0)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (0, 9)),
    ],
    ids=["full", "windowed"],
)
def test_a_transformers_model_is_imported(tmp_path, kind, windows):
    """The model has transformers' own initialization, sharded files and bfloat16 weights."""
    config = transformers.Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False, **kind,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    byte_tokenizer().to_huggingface().save(str(tmp_path / "hf" / "tokenizer.json"))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert main(["--run", str(tmp_path / "run"), "--from", str(tmp_path / "hf")]) == 0
    model, _ = load_run(tmp_path / "run", torch.device("cpu"))
    assert model.config.windows == windows
    ids = torch.randint(257, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.hidden(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "its model_type is 'mamba'; only llama and qwen3 are supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear"]}, "layer_types have 'linear'"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_unsupported_models_are_refused(change, message):
    config = ModelConfig(n_layer=1, n_head=2, d_model=16).resolved(30)
    weights = GPT(config, bind(KernelChoice())).state_dict()
    with pytest.raises(ValueError, match=message):
        from_huggingface(to_huggingface(config, weights, 0)[0] | change, {})


def test_a_llama_has_no_window(run, tmp_path, capsys):
    _, folder = run(steps=1, **{"model.qk_norm": "false", "model.window": "8"})
    with pytest.raises(SystemExit):
        main(["--run", str(folder), "--to", str(tmp_path / "hf")])
    assert "a window (8) needs QK-norm" in capsys.readouterr().err and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "change",
    [{"norm": "layer"}, {"norm_place": "post"}, {"position": "alibi"}, {"activation": "gelu"}, {"bias": True}],
    ids=lambda change: next(iter(change)),
)
def test_features_of_neither_architecture_are_refused(change):
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, **change).resolved(30)
    weights = GPT(config, bind(KernelChoice())).state_dict()
    ((knob, value),) = change.items()
    with pytest.raises(
        ExportError, match=rf"a model with {knob} {value} is neither Llama nor Qwen3, which have norm rms"
    ):
        to_huggingface(config, weights, 0)


def test_without_layer_types_windows_start_at_max_window_layers():
    theirs = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    assert window_of(theirs) == "LSSS:9" and window_of(theirs | {"use_sliding_window": False}) == ""


def test_nothing_is_overwritten(run, tmp_path, capsys):
    _, folder = run(steps=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for flags, message in (
        (["--run", str(folder), "--to", str(tmp_path / "full")], "exists and is not an empty folder"),
        (["--run", str(folder), "--from", str(tmp_path / "full")], "exists: choose a new name"),
        (["--run", str(tmp_path / "new"), "--from", str(tmp_path / "full")], "has no model.safetensors"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_ids_without_a_token_are_not_generated(run, tmp_path, capsys):
    """Published models have ids and embedding rows for special tokens."""
    _, folder = run(steps=1, **{"model.vocab_size": 4096})
    assert main(["--run", str(folder), "--to", str(tmp_path / "hf")]) == 0
    assert main(["--run", str(tmp_path / "in"), "--from", str(tmp_path / "hf")]) == 0
    assert generate.main(["--run", str(tmp_path / "in"), "--tokens=60", "--temperature=3"]) == 0


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", None, "tokenizer.json is not the tokenizer.json of a byte-level BPE tokenizer: "),
        ("config.json", b"{", "cannot be read: Expecting property name"),
        ("model.safetensors", b"cut", "cannot be read: Error while deserializing header"),
    ],
)
def test_an_incomplete_folder_is_refused(run, tmp_path, capsys, name, content, message):
    folder = tmp_path / "hf"
    assert main(["--run", str(run(steps=1)[1]), "--to", str(folder)]) == 0
    (folder / name).write_bytes(content) if content else (folder / name).unlink()
    with pytest.raises(SystemExit):
        main(["--run", str(tmp_path / "in"), "--from", str(folder)])
    assert message in capsys.readouterr().err and not (tmp_path / "in").exists()


def test_more_tokens_than_weights(run, tmp_path, capsys):
    folder = tmp_path / "hf"
    assert main(["--run", str(run(steps=1)[1]), "--to", str(folder)]) == 0
    train_bpe(["one two one two"] * 9, 260).to_huggingface().save(str(folder / "tokenizer.json"))
    with pytest.raises(SystemExit):
        main(["--run", str(tmp_path / "in"), "--from", str(folder)])
    assert "has 260 tokens in tokenizer.json, 257 in its weights" in capsys.readouterr().err


def test_an_invalid_output_folder_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--run", str(run(steps=1)[1]), "--to", f"{train.__file__}/hf"])
    assert "Not a directory" in capsys.readouterr().err
