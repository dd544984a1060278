"""Export to GGUF: llama.cpp generates our greedy tokens, of equal probability, after equal ids."""

import re
from dataclasses import replace

import pytest
import torch

from data.tokenizer import GPT2_PATTERN, byte_tokenizer, train_bpe
from kernels import KernelChoice, bind
from model import export
from model.gguf import LLAMA3_PATTERN, export_gguf
from model.gpt import GPT, ModelConfig
from model.huggingface import ARCHITECTURES, ExportError

gguf = pytest.importorskip("gguf")

KNOBS = {name: architecture.knobs for name, architecture in ARCHITECTURES.items()}
FAMILIES = {
    "llama": KNOBS["llama"],
    "llama with grouped queries": KNOBS["llama"] | {"n_kv_head": 1, "head_dim": 24, "tied": False, "norm_eps": 0.1},
    "qwen3": KNOBS["qwen3"] | {"n_kv_head": 1, "rope_theta": 500.0},
    "gpt2": KNOBS["gpt2"],
}
TEXT = "The quick fox  jumps over\n\n\tthe moon, 12345 times: Ünïcode, don't, 月が綺麗ですね and 🙂!\n"
BPE = train_bpe([TEXT * 3] * 2, 300)


def exported(path, tokenizer, **knobs):
    """A random model that prefers letters, decidedly, and is exported to `path`."""
    torch.manual_seed(0)
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 256} | knobs)
    config = config.resolved(tokenizer.vocab_size + 3)
    model = GPT(config, bind(KernelChoice())).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("embedding.weight", "head.weight"):
                letters = sorted(id for token, id in tokenizer.ranks.items() if token.isalpha())
                parameter[letters] += torch.randn(len(letters), config.d_model)
            else:
                parameter.add_(0.5 * torch.randn_like(parameter))
    export_gguf(path, config, model.state_dict(), tokenizer)
    return model


def complete(path, text, n_tokens):
    """What llama.cpp continues the text with: its greedy ids, each with the log-probability."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(path), 256, 1, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params = False, False
    request = {"prompt": text, "n_predict": n_tokens, "temperature": 0, "n_probs": 1, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions(request)
    found = answer["choices"][0]["logprobs"]["content"]
    return [token["id"] for token in found], [token["logprob"] for token in found]


@torch.no_grad()
def greedy(model, ids, tokenizer, n_tokens):
    """The same of our model, after the end-of-text token and `ids`, and by how much each is the likeliest."""
    ids, found, probabilities, margins = [tokenizer.eot, *ids], [], [], []
    for _ in range(n_tokens):
        logits = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        (best, second), (token, _) = logits.topk(2)
        ids, found = [*ids, token.item()], [*found, token.item()]
        probabilities.append(best.item())
        margins.append((best - second).item())
    return found, probabilities, min(margins)


def same(path, model, tokenizer):
    """Whether llama.cpp generates our greedy tokens, with our probabilities."""
    ids, probabilities, margin = greedy(model, tokenizer.encode(TEXT), tokenizer, 8)
    assert margin > 0.01  # a tie would be decided by rounding
    found, theirs = complete(path, TEXT, 8)
    return found == ids and theirs == pytest.approx(probabilities, abs=5e-3)  # its GELU is a table in half precision


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_generates_our_greedy_tokens(tmp_path, family):
    path = tmp_path / "model.gguf"
    assert same(path, exported(path, BPE, **FAMILIES[family]), BPE)


@pytest.mark.parametrize(
    "tokenizer",
    [
        replace(BPE, pattern=GPT2_PATTERN),
        replace(BPE, pattern=LLAMA3_PATTERN, ranks=BPE.ranks | {b"12": 300, b"123": 301}),
        byte_tokenizer(),
    ],
    ids=["gpt-2", "llama-bpe", "bytes"],
)
def test_llama_cpp_reads_the_text_of_other_tokenizers_as_we_do(tmp_path, tokenizer):
    path = tmp_path / "model.gguf"
    assert same(path, exported(path, tokenizer, **FAMILIES["qwen3"]), tokenizer)


def test_the_file_names_pre_tokenizer_and_special_tokens(tmp_path):
    exported(tmp_path / "model.gguf", BPE, **FAMILIES["llama"])
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    value = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (value["pre"], value["bos_token_id"], value["eos_token_id"]) == ("qwen2", BPE.eot, BPE.eot)
    assert value["tokens"][BPE.eot :] == ["<|endoftext|>", "[PAD300]", "[PAD301]", "[PAD302]"]
    assert value["token_type"][BPE.eot :] == [gguf.TokenType.CONTROL, *[gguf.TokenType.UNUSED] * 3]
    assert value["general.architecture"] == "llama" and value["llama.attention.head_count_kv"] == 2


@pytest.mark.parametrize(
    "tokenizer, knobs, message",
    [
        (BPE, KNOBS["qwen3"] | {"window": "SL:8"}, "llama.cpp's Qwen3 has no sliding windows, and the model has the"),
        (replace(BPE, pattern=r"\w+|\W+"), KNOBS["qwen3"], r"split pattern '\\w+|\\W+'"),
        (BPE, KNOBS["llama"] | {"norm": "none"}, "norm none is not a Llama, which has norm rms"),
    ],
    ids=["window", "pattern", "norm"],
)
def test_what_llama_cpp_does_not_have_is_refused(tmp_path, tokenizer, knobs, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        exported(tmp_path / "model.gguf", tokenizer, **knobs)
    assert not any(tmp_path.iterdir())


def test_a_run_is_exported_to_a_file_once(run, tmp_path, capsys):
    _, folder = run(steps=1)
    assert export.main([f"--run={folder}", "--to=gguf"]) == 0
    assert gguf.GGUFReader(f"{folder}.gguf").fields["general.name"].contents() == "small"
    for target, message in ((f"{folder}.gguf", "exists: choose a new file"), ("nowhere/a.gguf", "nowhere/a.gguf")):
        assert export.main([f"--run={folder}", f"--to={target}"]) == 2
        assert message in capsys.readouterr().err
