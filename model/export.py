"""To and from Hugging Face's format: `python -m model.export --run out/small --to DIR`, and `--from DIR --run out/new`.

Without QK-norm our model is Llama, with it Qwen3, which may have windows: the same mathematics under other names.
Packed projections are cut into theirs (q, k, v; gate, up), and their `tokenizer.json` gives our ids.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import EOT, Tokenizer
from model import checkpoint
from model.generate import load_run
from model.gpt import ModelConfig
from runtime.errors import UserError
from runtime.run import RunError, find

ARCHITECTURES = {False: ("LlamaForCausalLM", "llama"), True: ("Qwen3ForCausalLM", "qwen3")}  # by QK-norm
FIXED = {"norm": "rms", "norm_place": "pre", "position": "rope", "activation": "swiglu", "bias": False}
LAYERS = {"S": "sliding_attention", "L": "full_attention"}  # by our window's letter
SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim", "d_model": "hidden_size", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip


class ExportError(UserError):
    """A folder that cannot be written, or a model that is not one of ours under another name."""


def names_of(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Our parameter's name to theirs, in the order they are packed in, with the rows that each one has."""
    heads, kv_heads = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    names = {"embedding.weight": [("model.embed_tokens.weight", config.vocab_size)]}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        projections = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        names[f"{ours}.attention.qkv.weight"] = [(f"{theirs}.self_attn.{k}.weight", n) for k, n in projections.items()]
        names[f"{ours}.attention.out.weight"] = [(f"{theirs}.self_attn.o_proj.weight", config.d_model)]
        if config.qk_norm:
            for head in "qk":
                names[f"{ours}.attention.{head}_gain"] = [(f"{theirs}.self_attn.{head}_norm.weight", config.head_dim)]
        names[f"{ours}.feed_forward.gate_up.weight"] = [
            (f"{theirs}.mlp.{half}_proj.weight", config.d_ff) for half in ("gate", "up")
        ]
        names[f"{ours}.feed_forward.down.weight"] = [(f"{theirs}.mlp.down_proj.weight", config.d_model)]
        names[f"{ours}.attention_norm.gain"] = [(f"{theirs}.input_layernorm.weight", config.d_model)]
        names[f"{ours}.feed_forward_norm.gain"] = [(f"{theirs}.post_attention_layernorm.weight", config.d_model)]
    names["norm.gain"] = [("model.norm.weight", config.d_model)]
    if not config.tied:
        names["head.weight"] = [("lm_head.weight", config.vocab_size)]
    return names


def to_huggingface(
    config: ModelConfig, weights: dict[str, Tensor], eot: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Their config and state dict of our resolved config and weights. Raises `ExportError` for a windowed Llama,
    and for what neither is."""
    other = [f"{knob} {getattr(config, knob)}" for knob, value in FIXED.items() if getattr(config, knob) != value]
    if other:
        need = ", ".join(f"{knob} {value}" for knob, value in FIXED.items())
        raise ExportError(f"a model with {', '.join(other)} is neither Llama nor Qwen3, which have {need}")
    architecture, model_type = ARCHITECTURES[config.qk_norm]
    theirs = {
        "architectures": [architecture],
        "model_type": model_type,
        **{name: getattr(config, ours) for ours, name in SIZES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
    }
    if size := max(config.windows):
        if not config.qk_norm:
            raise ExportError(
                f"a window ({config.window}) takes QK-norm: with it the model is Qwen3, and Llama has none"
            )
        layers = [LAYERS["S" if window else "L"] for window in config.windows]
        theirs |= {"use_sliding_window": True, "sliding_window": size, "layer_types": layers}
    tensors = {}
    for ours, parts in names_of(config).items():
        pieces = weights[ours].float().split([rows for _, rows in parts])
        tensors |= {name: piece.contiguous().clone() for (name, _), piece in zip(parts, pieces, strict=True)}
    return theirs, tensors


def window_of(theirs: dict[str, Any]) -> str:
    """Our `window` of a Qwen3's layers."""
    if not theirs.get("use_sliding_window") or not theirs.get("sliding_window"):
        return ""
    letters = {kind: letter for letter, kind in LAYERS.items()}
    first = theirs.get("max_window_layers", 28)  # of those with a window, where layers have no list; Qwen3's default
    layers = theirs.get("layer_types") or [LAYERS["LS"[i >= first]] for i in range(theirs["num_hidden_layers"])]
    if unknown := set(layers) - letters.keys():
        raise ExportError(f"its layer_types have {unknown.pop()!r}; only {' and '.join(letters)} are ours")
    return f"{''.join(letters[layer] for layer in layers)}:{theirs['sliding_window']}"


def from_huggingface(theirs: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our config and weights of theirs. Raises `ExportError` for a model that differs in more than names."""
    families = {model_type: qk_norm for qk_norm, (_, model_type) in ARCHITECTURES.items()}
    if theirs.get("model_type") not in families:
        raise ExportError(f"its model_type is {theirs.get('model_type')!r}; only {' and '.join(families)} are ours")
    qk_norm = families[theirs["model_type"]]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    for what, value, wanted in (
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("attention_bias", theirs.get("attention_bias", False), False),
        ("mlp_bias", theirs.get("mlp_bias", False), False),
        ("use_sliding_window", not qk_norm and theirs.get("use_sliding_window", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != wanted:
            raise ExportError(f"its {what} is {value!r}, which our model does not have: it must be {wanted!r}")
    sizes = {ours: theirs[name] for ours, name in SIZES.items() if theirs.get(name) is not None}
    config = ModelConfig(
        **{"tied": False, **sizes},
        qk_norm=qk_norm,
        window=window_of(theirs),
        rope_theta=float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0))),
    ).resolved(theirs["vocab_size"])
    weights = {}
    for ours, parts in names_of(config).items():
        missing = [name for name, _ in parts if name not in tensors]
        if missing:
            raise ExportError(f"its weights lack {missing[0]}")
        weights[ours] = torch.cat([tensors[name].float() for name, _ in parts])
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    return config, weights


def export_run(run: Path, folder: Path) -> None:
    """Write a run's best model and its tokenizer as `folder`, which must be new or empty."""
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not an empty folder: choose a new one")
    model, tokenizer = load_run(run, torch.device("cpu"))
    config, tensors = to_huggingface(model.config, model.state_dict(), tokenizer.eot)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.to_huggingface().save(str(folder / "tokenizer.json"))
    special = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.seq_len, **special}
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", ids)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def import_run(folder: Path, run: Path) -> None:
    """Make the run folder `run`, to generate from, of a model in Hugging Face's format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if run.exists():
        raise RunError(f"{run} exists: choose a new name")
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no {'model.safetensors' if not files else 'config.json'}")
    tokenizer = Tokenizer.from_huggingface(folder / "tokenizer.json")
    try:
        theirs = json.loads((folder / "config.json").read_text())
        tensors = {k: v for file in files for k, v in load_file(file).items()}
    except (ValueError, SafetensorError) as error:
        raise ExportError(f"{folder} cannot be read: {error}") from error
    config, weights = from_huggingface(theirs, tensors)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{folder} has {tokenizer.vocab_size} tokens in tokenizer.json, {config.vocab_size} in its weights"
        )
    run.mkdir(parents=True)
    tokenizer.save(run / "tokenizer.json")
    checkpoint.save(run, {"model_config": asdict(config), "model": weights, "step": 0})
    (run / "config.json").write_text(json.dumps({"imported": str(folder), "model": asdict(config)}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.export", description="To and from Hugging Face's format.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, such as out/small")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--to", type=Path, metavar="DIR", help="write the run's best model there")
    way.add_argument("--from", type=Path, metavar="DIR", dest="source", help="make the run of the model there")
    args = parser.parse_args(argv)
    try:
        if args.to:
            export_run(find(str(args.run)), args.to)
        else:
            import_run(args.source, args.run)
    except (UserError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.to or args.run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
