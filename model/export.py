"""Export to and import from Hugging Face's format.

    python -m model.export --run out/small --to DIR
    python -m model.export --from DIR --run out/new

A model without QK-norm is a Llama. With QK-norm it is a Qwen3, which may have sliding windows. Only names differ, and
our packed projections are split into separate ones (q, k, v; gate, up). The exported `tokenizer.json` gives equal ids.
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import EOT, Tokenizer
from kernels import KernelChoice, bind
from model import checkpoint
from model.generate import load_run
from model.gpt import GPT, ModelConfig
from runtime.config import ConfigError, Parser, knobs
from runtime.errors import UserError
from runtime.files import new_folder
from runtime.program import leave, program
from runtime.run import RunError, find, run_folder

ARCHITECTURES = {False: ("LlamaForCausalLM", "llama"), True: ("Qwen3ForCausalLM", "qwen3")}  # key: qk_norm
FIXED = {"norm": "rms", "norm_place": "pre", "position": "rope", "activation": "swiglu", "bias": False}
LAYERS = {"S": "sliding_attention", "L": "full_attention"}  # key: letter of a window pattern
SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim", "d_model": "hidden_size", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
OPTIONAL = {"n_kv_head", "head_dim", "norm_eps", "tied"}  # the other sizes have no default
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


class ExportError(UserError):
    """A folder that cannot be written or read, or a model that the other format cannot express."""


def parameter_map(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Map our parameter names to theirs, each with its number of rows. A packed parameter has several, in order."""
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
    """Convert our resolved config and weights to their config and state dict.

    Raises `ExportError` for a model that is neither Llama nor Qwen3, such as a Llama with windows."""
    unsupported = [f"{knob} {getattr(config, knob)}" for knob, value in FIXED.items() if getattr(config, knob) != value]
    if unsupported:
        required = ", ".join(f"{knob} {value}" for knob, value in FIXED.items())
        raise ExportError(f"a model with {', '.join(unsupported)} is neither Llama nor Qwen3, which have {required}")
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
                f"a window ({config.window}) needs QK-norm: only then the model is Qwen3, and Llama has no windows"
            )
        layers = [LAYERS["S" if window else "L"] for window in config.windows]
        theirs |= {"use_sliding_window": True, "sliding_window": size, "layer_types": layers}
    tensors = {}
    for ours, parts in parameter_map(config).items():
        pieces = weights[ours].float().split([rows for _, rows in parts])
        tensors |= {name: piece.contiguous().clone() for (name, _), piece in zip(parts, pieces, strict=True)}
    return theirs, tensors


def window_of(theirs: dict[str, Any]) -> str:
    """Convert the layer types of a Qwen3 config to our `window` pattern. Raises `ExportError` for other layer types."""
    if not theirs.get("use_sliding_window") or not theirs.get("sliding_window"):
        return ""
    letters = {kind: letter for letter, kind in LAYERS.items()}
    size, n_layer = theirs["sliding_window"], theirs["num_hidden_layers"]
    first = theirs.get("max_window_layers", 28)  # without layer_types, windows start at this layer (Qwen3's default)
    for key, value in (("sliding_window", size), ("max_window_layers", first)):
        if type(value) is not int or value < 0:
            raise ExportError(f"its {key} is {value!r}: it must be a whole number")
    layers = theirs.get("layer_types") or [LAYERS["LS"[i >= first]] for i in range(n_layer)]
    if not isinstance(layers, list) or len(layers) != n_layer:
        raise ExportError(f"its layer_types are {layers!r}: they must be a list of num_hidden_layers, {n_layer}, names")
    if unknown := [layer for layer in layers if layer not in LAYERS.values()]:
        raise ExportError(f"its layer_types have {unknown[0]!r}; only {' and '.join(letters)} are supported")
    return f"{''.join(letters[layer] for layer in layers)}:{size}"


def config_of(theirs: Any) -> ModelConfig:
    """Convert their config to our resolved one.

    Raises `ExportError`, which names the key, for a model that ours cannot express, and for a size that is missing or
    no number."""
    if not isinstance(theirs, dict):
        raise ExportError(f"its config.json is {theirs!r:.40}, not an object with a model_type")
    families = {model_type: qk_norm for qk_norm, (_, model_type) in ARCHITECTURES.items()}
    if (family := theirs.get("model_type")) not in list(families):
        raise ExportError(f"its model_type is {family!r}; only {' and '.join(families)} are supported")
    qk_norm = families[family]
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ExportError(f"its rope_parameters are {rope!r}: they must be an object with a rope_theta")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    for key, value, required in (
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("attention_bias", theirs.get("attention_bias", False), False),
        ("mlp_bias", theirs.get("mlp_bias", False), False),
        ("use_sliding_window", not qk_norm and theirs.get("use_sliding_window", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("quantization_config", theirs.get("quantization_config"), None),
    ):
        if value != required:
            raise ExportError(f"its {key} is {value!r}, which our model does not have: it must be {required!r}")
    known, sizes = knobs(ModelConfig), {}
    for ours, name in (*SIZES.items(), ("rope_theta", "rope_theta")):
        value = theta if name == "rope_theta" else theirs.get(name)
        if value is None and ours in OPTIONAL:
            continue
        # Ours may be 0, for a default.
        knob = replace(known[ours], key=name, interval=known[ours].interval.replace("[0,", "[1,"))
        try:
            if value is None or isinstance(value, str):  # a knob reads numbers from text
                raise ConfigError(f"{name} must be {KINDS[knob.type]}, and is {value!r}")
            sizes[ours] = knob.read(value)
        except ConfigError as error:
            raise ExportError(f"its {error}") from error
    try:
        return ModelConfig(**{"tied": False, **sizes}, qk_norm=qk_norm, window=window_of(theirs)).resolved(
            sizes["vocab_size"]
        )
    except ConfigError as error:
        text = re.sub(r"\w+", lambda word: SIZES.get(word[0], word[0]), str(error))
        raise ExportError(f"its config.json is of no model: {text}") from error


def from_huggingface(theirs: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert their config and state dict to our resolved config and weights.

    Raises `ExportError` for a model that ours cannot express, and for a config that contradicts the weights."""
    config = config_of(theirs)
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if tensors and layers != set(range(config.n_layer)):
        raise ExportError(f"its num_hidden_layers is {config.n_layer}, and its weights have {len(layers)} layers")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    names = parameter_map(config)
    expected = {name for parts in names.values() for name, _ in parts}
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tied and head is not None and embedding is not None and head.equal(embedding):
        del tensors["lm_head.weight"]
    kind = f"a {theirs['model_type']} with tie_word_embeddings {config.tied}"
    if missing := sorted(expected - tensors.keys()):
        raise ExportError(f"its weights lack {missing[0]}, which {kind} has")
    if extra := sorted(tensors.keys() - expected):
        raise ExportError(f"its weights have {extra[0]}, which {kind} does not have")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config, bind(KernelChoice())).state_dict().items()}
    weights = {}
    for ours, parts in names.items():
        for name, rows in parts:
            tensor, shape = tensors[name], [rows, *shapes[ours][1:]]
            if list(tensor.shape) != shape:
                raise ExportError(f"its {name} has the shape {list(tensor.shape)}, and by its config.json {shape}")
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ExportError(f"its {name} must be finite numbers in floating point, not {tensor.dtype}")
        weights[ours] = torch.cat([tensors[name].float() for name, _ in parts])
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    return config, weights


def export_run(run: Path, folder: Path) -> None:
    """Export a run's best model and its tokenizer to `folder`, which must be new or empty. Raises `ExportError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not an empty folder: choose a new one")
    model, tokenizer = load_run(run, torch.device("cpu"))
    config, tensors = to_huggingface(model.config, model.state_dict(), tokenizer.eot)
    special = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.seq_len, **special}
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    try:
        with new_folder(folder) as partial:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            tokenizer.to_huggingface().save(str(partial / "tokenizer.json"))
            for name, value in (("config", config), ("tokenizer_config", tokens), ("generation_config", ids)):
                (partial / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    except SafetensorError as error:
        raise ExportError(f"{folder} cannot be written: {error}") from error


def import_run(folder: Path, run: Path) -> None:
    """Import a model in Hugging Face's format as the new run folder `run`, to generate from.

    Raises `ExportError` or `RunError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if run.exists():
        raise RunError(f"{run} exists: choose a new name")
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ExportError(f"{folder} has no {'model.safetensors' if not files else 'config.json'}")
    tokenizer = Tokenizer.from_huggingface(folder / "tokenizer.json")
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = {k: v for file in files for k, v in load_file(file).items()}
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ExportError(f"{folder} cannot be read: {error}") from error
    try:
        config, weights = from_huggingface(theirs, tensors)
    except ExportError as error:
        raise ExportError(f"{folder} cannot be imported: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{folder} has {tokenizer.vocab_size} tokens in tokenizer.json, {config.vocab_size} in its weights"
        )
    with new_folder(run) as partial:
        tokenizer.save(partial / "tokenizer.json")
        checkpoint.save(partial, {"model_config": asdict(config), "model": weights, "step": 0})
        text = json.dumps({"imported": str(folder), "model": asdict(config)}, indent=2)
        (partial / "config.json").write_text(text + "\n")


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.export", description="Export to and import from Hugging Face's format.")
    parser.add_argument("--run", required=True, help="the run's folder, such as out/small, or its name in out/")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", type=Path, metavar="DIR", help="export the run's best model to this folder")
    direction.add_argument(
        "--from", type=Path, metavar="DIR", dest="source", help="import the model in this folder as the run"
    )
    args = parser.parse_args(argv)
    if args.to:
        export_run(find(args.run), args.to)
    else:
        import_run(args.source, run_folder(args.run))
    print(f"wrote {args.to or run_folder(args.run)}")
    return 0


if __name__ == "__main__":
    leave(main())
