"""Tiny random models of transformers, of the architectures that can be imported."""

import pytest
import torch

from data.tokenizer import byte_tokenizer

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
THEIRS = {  # configs of tiny random models of transformers
    "llama": transformers.LlamaConfig(**LLAMA, rms_norm_eps=1e-5, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA, tie_word_embeddings=False),
    "windowed qwen3": transformers.Qwen3Config(**LLAMA, **WINDOW, tie_word_embeddings=False),
    "gpt2": transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256
    ),
    "untied gpt2": transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40, tie_word_embeddings=False,
        activation_function="gelu_pytorch_tanh",
    ),
}  # fmt: skip


def save_tiny(name, folder, **options):
    """Save a random model of `THEIRS` in bfloat16, with a tokenizer of bytes. Returns it as loaded in float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(THEIRS[name]).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin at 0, and gains at 1
    model.save_pretrained(folder, **options)
    byte_tokenizer().to_huggingface().save(str(folder / "tokenizer.json"))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
