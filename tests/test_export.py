"""Export to and import from Hugging Face's format: equal logits and equal ids."""

import json
import re

import pytest
import torch

import train
from data.formats import DataError
from data.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from kernels import KernelChoice, bind
from model import generate
from model.export import ExportError, from_huggingface, main, to_huggingface, window_of
from model.generate import load_run
from model.gpt import GPT, ModelConfig

safetensors = pytest.importorskip("safetensors.torch") and pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

FAMILIES = {
    "llama": {"model.qk_norm": "false", "model.tied": "true"},
    "qwen3": {"model.qk_norm": "true", "model.tied": "false", "model.n_kv_head": 1, "model.head_dim": 24},
    "windowed qwen3": {"model.qk_norm": "true", "model.window": "SL:5", "model.dropout": 0.1},
}
TEXT = "The quick fox jumps over the moon.\n\n  Ünïcode, tabs\t, 12345 and <|endoftext|> too 🙂"


def small_model():
    """Config and weights, in their format, of a Qwen3 of two layers."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=16).resolved(30)
    return to_huggingface(config, GPT(config, bind(KernelChoice())).state_dict(), 0)


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
        ({"model_type": ["llama"]}, "its model_type is ['llama']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_parameters": 3}, "rope_parameters are 3: they must be an object"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be a number, and is 'big'"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear"] * 2}, "layer_types have 'linear'"),
        ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]}, "num_hidden_layers, 2,"),
        ({"use_sliding_window": True, "sliding_window": "4"}, "sliding_window is '4': it must be a whole number"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a whole number, and is None"),
        ({"hidden_size": "16"}, "hidden_size must be a whole number, and is '16'"),
        ({"vocab_size": 30.5}, "vocab_size must be a whole number, not 30.5"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1, not 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be more than 0, not nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
        ({"num_attention_heads": 3, "head_dim": None}, "hidden_size 16 must be a multiple of num_attention_heads 3"),
        # What contradicts the weights.
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, and its weights have 2 layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10000, not 1000000000"),
        ({"model_type": "llama"}, "have model.layers.0.self_attn.k_norm.weight, which a llama with"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight, which a qwen3 with tie_word_embeddings False has"),
        ({"hidden_size": 32}, "its model.embed_tokens.weight has the shape [30, 16], and by its config.json [30, 32]"),
        ({"num_key_value_heads": 1}, "self_attn.k_proj.weight has the shape [16, 16], and by its config.json [8, 16]"),
        ({"vocab_size": 31}, "model.embed_tokens.weight has the shape [30, 16]"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_unsupported_and_contradictory_configs_are_refused(change, message):
    theirs, tensors = small_model()
    with pytest.raises(ExportError, match=re.escape(message)):
        from_huggingface(theirs | change, tensors)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.layers.1.self_attn.q_norm.weight", None, "its weights lack model.layers.1.self_attn.q_norm.weight"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(16),
            "its weights have model.layers.0.self_attn.q_proj.bias",
        ),
        ("lm_head.weight", torch.ones(30, 16), "its weights have lm_head.weight, which a qwen3"),
        ("model.norm.weight", torch.ones(16, dtype=torch.int8), "floating point, not torch.int8"),
        ("model.norm.weight", torch.full((16,), torch.nan), "must be finite"),
    ],
    ids=["lacks", "has", "untied", "integers", "nan"],
)
def test_weights_that_are_not_the_models_are_refused(name, tensor, message):
    theirs, tensors = small_model()
    changed = {key: value for key, value in (tensors | {name: tensor}).items() if value is not None}
    with pytest.raises(ExportError, match=re.escape(message)):
        from_huggingface(theirs, changed)


def test_a_head_saved_beside_the_embedding_it_is_tied_to():
    theirs, tensors = small_model()
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # a buffer that old Llamas have
    again = tensors | inverse | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    config, weights = from_huggingface(theirs, again)
    assert config.tied and weights.keys() == from_huggingface(theirs, tensors)[1].keys()


def test_a_llama_has_no_window(run, tmp_path, capsys):
    _, folder = run(steps=1, **{"model.qk_norm": "false", "model.window": "8"})
    assert main(["--run", str(folder), "--to", str(tmp_path / "hf")]) == 2
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
        assert main(flags) == 2
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
    assert main(["--run", str(tmp_path / "in"), "--from", str(folder)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "in").exists()


def test_an_import_that_contradicts_its_weights_writes_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(steps=1)[0] == main(["--run=small", "--to=hf"]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert main(["--run=new", "--from=hf"]) == 2
    assert "hf cannot be imported: its num_hidden_layers is 1" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["small"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert main(["--run=new", "--from=hf"]) == 0 and (tmp_path / "out" / "new" / "last.pt").exists()


@pytest.mark.parametrize("error", [OSError("disk full"), safetensors.SafetensorError("disk full")], ids=["os", "rust"])
def test_a_failed_export_leaves_nothing(run, tmp_path, capsys, monkeypatch, error):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    _, folder = run(steps=1)
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        for target in ("empty", "deep/new"):
            assert main([f"--run={folder}", f"--to={tmp_path / target}"]) == 2
            assert "disk full" in capsys.readouterr().err
    assert not any((tmp_path / "empty").iterdir()) and not (tmp_path / "deep").exists()
    for target in ("empty", "deep/new"):
        assert main([f"--run={folder}", f"--to={tmp_path / target}"]) == 0
        assert len(list((tmp_path / target).iterdir())) == 5


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("added_tokens", 0, "id"), "256", "has the id '256': ids must be whole numbers from 0"),
        (("model", "vocab", "A"), -1, "has the id -1"),
        (("model", "vocab", "A"), 1.5, "has the id 1.5"),
        (("model", "type"), "Unigram", "its model is 'Unigram'"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), 5, "its pre-tokenizer is"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(", "which tiktoken cannot use"),
    ],
    ids=["end", "negative", "fraction", "model", "number", "parenthesis"],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, path, value, message):
    file = tmp_path / "tokenizer.json"
    train_bpe(["one two one two"] * 9, 260).to_huggingface().save(str(file))
    fields = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=re.escape(message)):
        Tokenizer.from_huggingface(file)


def test_more_tokens_than_weights(run, tmp_path, capsys):
    folder = tmp_path / "hf"
    assert main(["--run", str(run(steps=1)[1]), "--to", str(folder)]) == 0
    train_bpe(["one two one two"] * 9, 260).to_huggingface().save(str(folder / "tokenizer.json"))
    assert main(["--run", str(tmp_path / "in"), "--from", str(folder)]) == 2
    assert "has 260 tokens in tokenizer.json, 257 in its weights" in capsys.readouterr().err


def test_an_invalid_output_folder_is_refused(run, tmp_path, capsys):
    assert main(["--run", str(run(steps=1)[1]), "--to", f"{train.__file__}/hf"]) == 2
    assert "Not a directory" in capsys.readouterr().err
