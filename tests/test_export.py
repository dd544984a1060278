"""Export to and import from Hugging Face's format: equal logits and equal ids."""

import json
import re

import pytest
import torch
from tiny_models import THEIRS, save_tiny

import train
from data.formats import DataError
from data.tokenizer import Tokenizer, train_bpe
from kernels import KernelChoice, bind
from model import generate
from model.export import main
from model.gpt import GPT, ModelConfig
from model.huggingface import (
    ARCHITECTURES,
    ExportError,
    architecture_of,
    from_huggingface,
    read_tensors,
    to_huggingface,
    window_of,
)
from model.load import load_run

safetensors = pytest.importorskip("safetensors.torch") and pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

FAMILIES = {
    "llama": {"model.qk_norm": "false", "model.tied": "true", "model.rope_theta": 500.0},
    "qwen3": {"model.qk_norm": "true", "model.tied": "false", "model.n_kv_head": 1, "model.head_dim": 24},
    "windowed qwen3": {"model.qk_norm": "true", "model.window": "SL:5", "model.dropout": 0.1},
    "gpt2": {
        "model.qk_norm": "false", "model.norm": "layer", "model.position": "learned", "model.activation": "gelu",
        "model.bias": "true",
    },
}  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}  # of the others: Qwen3ForCausalLM
TEXT = "The quick fox jumps over the moon.\n\n  Ünïcode, tabs\t, 12345 and <|endoftext|> too 🙂"


def small_model():
    """Config and weights, in their format, of a Qwen3 of two layers."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=16).resolved(30)
    return to_huggingface(config, GPT(config, bind(KernelChoice())).state_dict(), 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_our_logits_and_ids(run, tmp_path, capsys, family):
    tokenizer = {"data.tokenizer": "bpe", "data.vocab_size": 300}
    _, folder = run(**FAMILIES[family], **tokenizer, steps=6, **{"model.norm_eps": 0.1})
    assert main(["--run", str(folder), "--to", str(tmp_path / "hf")]) == 0
    model, tokenizer = load_run(folder, torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == CLASSES.get(family, "Qwen3ForCausalLM")

    plain = TEXT.replace("<|endoftext|>", "")
    assert their_tokenizer(plain)["input_ids"] == tokenizer.encode(plain)
    assert their_tokenizer.decode(tokenizer.encode(plain)) == plain
    assert their_tokenizer.eos_token_id == tokenizer.eot

    ids = torch.randint(tokenizer.vocab_size, (2, 32))
    with torch.no_grad():
        ours = model.head(model.hidden(ids))
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-5)

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


@pytest.fixture(params=THEIRS)
def theirs(request, tmp_path):
    """A random model of transformers, saved to `hf` in several shards."""
    return save_tiny(request.param, tmp_path / "hf", max_shard_size="20KB")


def test_a_transformers_model_is_imported(theirs, tmp_path):
    """And its tensors come back."""
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert main(["--run", str(tmp_path / "run"), "--from", str(tmp_path / "hf")]) == 0
    model, tokenizer = load_run(tmp_path / "run", torch.device("cpu"))
    if theirs.config.model_type == "qwen3":
        assert model.config.windows == ((0, 9) if theirs.config.use_sliding_window else (0, 0))
    ids = torch.randint(257, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model.head(model.hidden(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    config, tensors = to_huggingface(model.config, model.state_dict(), tokenizer.eot)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in tensors.items())
    assert set(expected) <= ({"lm_head.weight"} if theirs.config.tie_word_embeddings else set())
    again = type(theirs)(type(theirs.config).from_dict(config)).eval()
    again.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_files_of_gpt2_without_its_head_have_no_prefix():
    """So the first GPT-2 was published, with buffers of its attention's mask."""
    model = transformers.GPT2LMHeadModel(THEIRS["gpt2"])
    tensors = dict(model.transformer.state_dict())
    mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    _, weights = from_huggingface(model.config.to_dict(), tensors | mask)
    assert torch.equal(weights["embedding.weight"], model.transformer.wte.weight)
    assert weights["blocks.0.attention.qkv.weight"].shape == (96, 32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "gelu"}, "its activation_function is 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
        ({"n_head": 5}, "n_embd 32 must be a multiple of n_head 5"),
        ({"n_layer": 3}, "its n_layer is 3, and its weights have 2 layers"),
        ({"n_inner": 64}, "transformer.h.0.mlp.c_fc.weight has the shape [32, 128], and by its config.json [32, 64]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_gpt2_of_ours_has_is_refused(change, message):
    model = transformers.GPT2LMHeadModel(THEIRS["gpt2"])
    with pytest.raises(ExportError, match=re.escape(message)):
        from_huggingface(model.config.to_dict() | change, dict(model.state_dict()))


@pytest.mark.parametrize(
    "change, message",
    [({"n_kv_head": 1}, "n_kv_head 1 is not a GPT-2, which has n_kv_head 2"), ({"head_dim": 4}, "head_dim 4 is not")],
    ids=["n_kv_head", "head_dim"],
)
def test_a_gpt2_has_as_many_kv_heads_as_heads(change, message):
    ours = ARCHITECTURES["gpt2"].knobs | change
    with pytest.raises(ExportError, match=message):
        architecture_of(ModelConfig(n_layer=1, n_head=2, d_model=16, **ours).resolved(30))


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "b.safetensors"}}, "it lacks b.safetensors, which its model.safetensors.index.json"),
        ({"weight_map": {"a": "../b.safetensors"}}, "names '../b.safetensors': it must name files beside it"),
        ({"weight_map": 3}, "names None"),
        (None, "it has no model.safetensors: pytorch_model.bin is a pickle, which can run any code"),
    ],
    ids=["missing", "elsewhere", "malformed", "pickle"],
)
def test_weights_that_are_not_there_are_refused(tmp_path, index, message):
    (tmp_path / "pytorch_model.bin").touch()
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=re.escape(message)):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "its model_type is 'mamba'; only llama, qwen3, gpt2 are supported"),
        ({"model_type": "qwen2"}, "its model_type is 'qwen2', which has biases on q, k and v alone; only llama"),
        ({"model_type": ["llama"]}, "its model_type is ['llama']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": None}, "rope_type is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
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
    said = capsys.readouterr().err
    assert "a model with window 8 is not a Llama, which has no window" in said and not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "layer"},
        {"norm_place": "post"},
        {"position": "alibi"},
        {"activation": "gelu"},
        {"bias": True},
        {"logit_softcap": 30.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_features_of_neither_architecture_are_refused(change):
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, **change).resolved(30)
    weights = GPT(config, bind(KernelChoice())).state_dict()
    ((knob, value),) = change.items()
    with pytest.raises(
        ExportError,
        match=rf"a model with {knob} {value} is not a Qwen3, which has {knob} (rms|pre|rope|swiglu|False|0.0)",
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
        (["--run", str(tmp_path / "new"), "--from", str(tmp_path / "full")], "it has no config.json"),
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
        ("tokenizer.json", None, "hf has no tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json is not the tokenizer.json of a byte-level BPE tokenizer: "),
        ("config.json", b"{", "its config.json cannot be read: Expecting property name"),
        ("model.safetensors", b"cut", "its weights cannot be read: Error while deserializing header"),
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
        (("added_tokens", 0, "id"), "256", 'string "256", expected u32'),
        (("model", "vocab", "A"), -1, "integer `-1`, expected u32"),
        (("model", "vocab", "A"), 1.5, "floating point `1.5`, expected u32"),
        (("model", "type"), "Unigram", "its model is 'Unigram'"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), 5, "its pre-tokenizer is"),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "(", "unmatched parenthesis"),
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
