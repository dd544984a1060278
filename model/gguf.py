"""Export to GGUF, the format of llama.cpp: one file with the weights in float32 and the tokenizer."""

import json
from pathlib import Path

from torch import Tensor

from data.tokenizer import GPT2_PATTERN, SPLIT_PATTERN, Tokenizer
from model.gpt import ModelConfig
from model.huggingface import ExportError, architecture_of, to_huggingface
from runtime.files import replacing

LLAMA3_PATTERN = SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's names of split patterns.
PRE_TOKENIZERS = {SPLIT_PATTERN: "qwen2", GPT2_PATTERN: "gpt-2", LLAMA3_PATTERN: "llama-bpe"}


def export_gguf(path: Path, config: ModelConfig, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a model, of our resolved config and weights, and its tokenizer to the new file `path`.

    Raises `ExportError` for a model or a split pattern that llama.cpp does not have."""
    import gguf

    architecture, (_, tensors) = architecture_of(config), to_huggingface(config, weights, tokenizer.eot)
    if any(config.windows):
        raise ExportError(f"llama.cpp's Qwen3 has no sliding windows, and the model has the window {config.window}")
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        writer.add_name(path.stem)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_context_length(config.seq_len)
        writer.add_embedding_length(config.d_model)
        writer.add_block_count(config.n_layer)
        writer.add_feed_forward_length(config.d_ff)
        writer.add_head_count(config.n_head)
        writer.add_head_count_kv(config.n_kv_head)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        if config.norm == "rms":
            writer.add_layer_norm_rms_eps(config.norm_eps)
        else:
            writer.add_layer_norm_eps(config.norm_eps)
        if config.position == "rope":
            writer.add_rope_dimension_count(config.head_dim)
            writer.add_rope_freq_base(config.rope_theta)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.n_layer)
        for name, tensor in tensors.items():
            tensor = _layout(architecture, config, name, tensor)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _layout(architecture: str, config: ModelConfig, name: str, tensor: Tensor) -> Tensor:
    """A tensor of Hugging Face's format in llama.cpp's layout.

    Matrices are `[out, in]`. llama.cpp rotates neighbouring pairs in Llama, where ours are half of a head apart, so the
    rows of q and k are permuted; in Qwen3 it rotates halves."""
    if architecture == "gpt2" and ".c_" in name and tensor.ndim == 2:
        return tensor.t()
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _add_tokenizer(writer, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the tokenizer. A text is read as ours does: after the end-of-text token, which starts a document."""
    from gguf import TokenType

    model = json.loads(tokenizer.to_huggingface().to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    if not merges:  # single bytes: llama.cpp needs a merge, and two bytes 255 are in no UTF-8 text
        merges, pre = ["ÿ ÿ"], "gpt-2"
    elif (pre := PRE_TOKENIZERS.get(tokenizer.pattern)) is None:
        raise ExportError(f"llama.cpp has no pre-tokenizer here for the split pattern {tokenizer.pattern!r}")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for text, id in model["vocab"].items():
        tokens[id], types[id] = text, TokenType.CONTROL if id == tokenizer.eot else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(True)
