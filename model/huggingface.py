"""Models in Hugging Face's format: GPT-2, Llama and Qwen3.

A model without QK-norm is a Llama. With QK-norm it is a Qwen3, which may have sliding windows. With learned positions,
LayerNorm, GELU and biases it is a GPT-2. Only names and layouts differ: our packed projections are several tensors in
Llama and Qwen3 (q, k, v; gate, up), and GPT-2's matrices are `[in, out]`.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import KernelChoice, bind
from model.gpt import GPT, ModelConfig
from runtime.config import ConfigError, knobs
from runtime.errors import UserError

Names = dict[str, str | tuple[str, ...]]  # theirs by ours; {} is the layer, and a packed parameter has several


class ExportError(UserError):
    """A folder that cannot be written or read, or a model that the other format cannot express."""


@dataclass(frozen=True)
class Architecture:
    """An architecture of transformers, and what makes our model one."""

    title: str
    class_name: str
    knobs: dict[str, Any]  # our knobs that it fixes
    sizes: dict[str, str]  # their keys, by our knobs
    names: Names
    values: dict[str, tuple]  # what their other keys may be; the first is their default, and what an export has
    defaults: dict[str, Any] = field(default_factory=dict)  # of our knobs, where their key is missing or null
    prefix: str = "model."  # of all names but the head's; files of the model without its head lack it
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)  # ends of names that old files have and that are no weights
    transposed: bool = False  # whether the matrices of layers are [in, out]


_LLAMA_SIZES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim", "d_model": "hidden_size", "d_ff": "intermediate_size", "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip
_LLAMA_KNOBS = {
    "norm": "rms", "norm_place": "pre", "position": "rope", "activation": "swiglu", "bias": False, "logit_softcap": 0.0,
}  # fmt: skip
_LLAMA_DEFAULTS = {"n_kv_head": 0, "head_dim": 0, "norm_eps": 1e-6, "tied": False}
_LLAMA_NAMES: Names = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{}.attention_norm.gain": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.qkv.weight": tuple(f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"),
    "blocks.{}.attention.q_gain": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.k_gain": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.attention.out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.feed_forward_norm.gain": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.feed_forward.gate_up.weight": tuple(
        f"model.layers.{{}}.mlp.{part}_proj.weight" for part in ("gate", "up")
    ),
    "blocks.{}.feed_forward.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_GPT2_NAMES: Names = {
    "embedding.weight": "transformer.wte.weight",
    "position": "transformer.wpe.weight",
    **{
        f"{ours}.{'gain' if 'norm' in ours and kind == 'weight' else kind}": f"transformer.{theirs}.{kind}"
        for ours, theirs in {
            "blocks.{}.attention_norm": "h.{}.ln_1",
            "blocks.{}.attention.qkv": "h.{}.attn.c_attn",
            "blocks.{}.attention.out": "h.{}.attn.c_proj",
            "blocks.{}.feed_forward_norm": "h.{}.ln_2",
            "blocks.{}.feed_forward.gate_up": "h.{}.mlp.c_fc",
            "blocks.{}.feed_forward.down": "h.{}.mlp.c_proj",
            "norm": "ln_f",
        }.items()
        for kind in ("weight", "bias")
    },
    "head.weight": "lm_head.weight",
}
ARCHITECTURES = {  # key: model_type
    "llama": Architecture(
        title="Llama",
        class_name="LlamaForCausalLM",
        knobs=_LLAMA_KNOBS | {"qk_norm": False, "window": ""},
        sizes=_LLAMA_SIZES,
        names=_LLAMA_NAMES,
        values={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
        defaults=_LLAMA_DEFAULTS,
    ),
    "qwen3": Architecture(
        title="Qwen3",
        class_name="Qwen3ForCausalLM",
        knobs=_LLAMA_KNOBS | {"qk_norm": True},
        sizes=_LLAMA_SIZES,
        names=_LLAMA_NAMES,
        values={"hidden_act": ("silu",), "attention_bias": (False,)},
        defaults=_LLAMA_DEFAULTS,
    ),
    "gpt2": Architecture(
        title="GPT-2",
        class_name="GPT2LMHeadModel",
        knobs={
            "norm": "layer", "norm_place": "pre", "position": "learned", "activation": "gelu", "bias": True,
            "qk_norm": False, "window": "", "logit_softcap": 0.0,
        },
        sizes={
            "n_layer": "n_layer", "n_head": "n_head", "d_model": "n_embd", "d_ff": "n_inner",
            "vocab_size": "vocab_size", "seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
        },
        names=_GPT2_NAMES,
        values={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
        },
        defaults={"d_ff": 0, "norm_eps": 1e-5, "tied": True},
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
        transposed=True,
    ),
}  # fmt: skip
OTHERS = {  # model types that lack little, and what our model does not have
    "qwen2": "biases on q, k and v alone", "mixtral": "experts", "qwen2_moe": "experts", "qwen3_moe": "experts",
}  # fmt: skip
LAYERS = {"S": "sliding_attention", "L": "full_attention"}  # key: letter of a window pattern
INDEX = "model.safetensors.index.json"
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def parameter_names(config: ModelConfig, names: Names) -> dict[str, list[str]]:
    """Map the names of our model's parameters to theirs, one or more each. A tied head is left out.

    Raises `KeyError` for a parameter that `names` lacks."""
    found = {}
    for ours in shapes_of(config):
        layer = re.search(r"\d+", ours)
        theirs = names[re.sub(r"\d+", "{}", ours)]
        parts = [theirs] if isinstance(theirs, str) else theirs
        found[ours] = [name.format(layer and layer[0]) for name in parts]
    return found


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of our model's parameters, by name. A tied head is left out."""
    with torch.device("meta"):
        state = GPT(config, bind(KernelChoice())).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if not (config.tied and name == "head.weight")}


def unpack(config: ModelConfig, name: str, weight: Tensor, n_parts: int) -> list[Tensor]:
    """Split a parameter of ours in the `n_parts` that it packs: q, k and v; or gate and up."""
    if n_parts == 1:
        return [weight]
    kv = config.n_kv_head * config.head_dim
    return list(weight.split([config.n_head * config.head_dim, kv, kv] if ".qkv." in name else config.d_ff))


def _transposed(architecture: Architecture, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the other's layout; this is its own inverse. `name` is that of our parameter."""
    return tensor.t() if architecture.transposed and name.startswith("blocks.") and tensor.ndim == 2 else tensor


def architecture_of(config: ModelConfig) -> str:
    """The model type that our model is. Raises `ExportError` if it is none, which names the nearest one."""

    def differing(architecture: Architecture) -> dict[str, Any]:
        return {knob: value for knob, value in architecture.knobs.items() if getattr(config, knob) != value}

    model_type, nearest = min(ARCHITECTURES.items(), key=lambda item: len(differing(item[1])))
    needed = differing(nearest)
    if "n_kv_head" not in nearest.sizes:
        derived = {"n_kv_head": config.n_head, "head_dim": config.d_model // config.n_head}
        needed |= {knob: value for knob, value in derived.items() if getattr(config, knob) != value}
    if needed:
        has, needs = (
            ", ".join(f"no {knob}" if value == "" else f"{knob} {value}" for knob, value in values.items())
            for values in ({knob: getattr(config, knob) for knob in needed}, needed)
        )
        raise ExportError(f"a model with {has} is not a {nearest.title}, which has {needs}")
    return model_type


def to_huggingface(
    config: ModelConfig, weights: dict[str, Tensor], eot: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert our resolved config and weights to their config and state dict.

    Raises `ExportError` for a model of no architecture here, such as a Llama with windows."""
    model_type = architecture_of(config)
    architecture = ARCHITECTURES[model_type]
    theirs = {
        "architectures": [architecture.class_name],
        "model_type": model_type,
        **{key: getattr(config, knob) for knob, key in architecture.sizes.items()},
        **{key: values[0] for key, values in architecture.values.items()},
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
    }
    if config.position == "rope":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        theirs |= {"rope_theta": config.rope_theta, "rope_parameters": rope}
    else:
        theirs |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    if size := max(config.windows):
        layers = [LAYERS["S" if window else "L"] for window in config.windows]
        theirs |= {"use_sliding_window": True, "sliding_window": size, "layer_types": layers}
    tensors = {}
    for ours, names in parameter_names(config, architecture.names).items():
        for name, part in zip(names, unpack(config, ours, weights[ours].float(), len(names)), strict=True):
            tensors[name] = _transposed(architecture, ours, part).contiguous().clone()
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


def _architecture_named(theirs: Any) -> Architecture:
    """The architecture of their config. Raises `ExportError`."""
    if not isinstance(theirs, dict):
        raise ExportError(f"its config.json is {theirs!r:.40}, not an object with a model_type")
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        lack = f", which has {OTHERS[family]}" if isinstance(family, str) and family in OTHERS else ""
        raise ExportError(f"its model_type is {family!r}{lack}; only {', '.join(ARCHITECTURES)} are supported")
    return ARCHITECTURES[family]


def config_of(theirs: Any) -> ModelConfig:
    """Convert their config to our resolved one.

    Raises `ExportError`, which names the key, for a model that ours cannot express, and for a size that is missing or
    no number."""
    architecture = _architecture_named(theirs)
    values = {key: (theirs.get(key, allowed[0]), allowed) for key, allowed in architecture.values.items()}
    values["quantization_config"] = theirs.get("quantization_config"), (None,)
    sizes, fixed = dict(architecture.sizes), dict(architecture.knobs)
    if architecture.knobs["position"] == "rope":
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ExportError(f"its rope_parameters are {rope!r}: they must be an object with a rope_theta")
        theirs = theirs | {"rope_theta": rope.get("rope_theta", theirs.get("rope_theta"))}
        sizes["rope_theta"] = "rope_theta"
        values["rope_type"] = rope.get("rope_type", rope.get("type", "default")), ("default",)
        partial = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
        values["partial_rotary_factor"] = partial, (1.0,)
    if "window" in fixed:
        values["use_sliding_window"] = theirs.get("use_sliding_window", False), (False,)
    for key, (value, allowed) in values.items():
        if value not in allowed:
            raise ExportError(f"its {key} is {value!r}, which our model does not have: it must be {allowed[0]!r}")
    known, read = knobs(ModelConfig), {}
    for ours, key in sizes.items():
        value = theirs.get(key)
        if value is None and ours in architecture.defaults | {"rope_theta": 0}:
            continue
        # Ours may be 0, for a default.
        knob = replace(known[ours], key=key, interval=known[ours].interval.replace("[0,", "[1,"))
        try:
            if value is None or isinstance(value, str):  # a knob reads numbers from text
                raise ConfigError(f"{key} must be {KINDS[knob.type]}, and is {value!r}")
            read[ours] = knob.read(value)
        except ConfigError as error:
            raise ExportError(f"its {error}") from error
    read = architecture.defaults | read
    if not read["d_ff"]:
        read["d_ff"] = 4 * read["d_model"]  # GPT-2's
    if "window" not in fixed:
        fixed["window"] = window_of(theirs)
    try:
        return ModelConfig(**fixed, **read).resolved(read["vocab_size"])
    except ConfigError as error:
        text = re.sub(r"\w+", lambda word: sizes.get(word[0], word[0]), str(error))
        raise ExportError(f"its config.json is of no model: {text}") from error


def from_huggingface(theirs: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert their config and state dict to our resolved config and weights.

    Raises `ExportError` for a model that ours cannot express, and for a config that contradicts the weights."""
    config, architecture = config_of(theirs), _architecture_named(theirs)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(architecture.buffers)}
    if not any(name.startswith(architecture.prefix) for name in tensors):  # saved without the head
        tensors = {name if name == "lm_head.weight" else architecture.prefix + name: tensors[name] for name in tensors}
    one_per_layer = re.escape(architecture.names["blocks.{}.attention.out.weight"]).replace(r"\{\}", r"(\d+)")
    layers = {int(match[1]) for name in tensors if (match := re.fullmatch(one_per_layer, name))}
    if tensors and layers != set(range(config.n_layer)):
        key = architecture.sizes["n_layer"]
        raise ExportError(f"its {key} is {config.n_layer}, and its weights have {len(layers)} layers")
    names, shapes = parameter_names(config, architecture.names), shapes_of(config)
    expected = {name for parts in names.values() for name in parts}
    head, embedding = (tensors.get(architecture.names[name]) for name in ("head.weight", "embedding.weight"))
    if config.tied and head is not None and embedding is not None and head.equal(embedding):
        del tensors["lm_head.weight"]
    kind = f"a {theirs['model_type']} with tie_word_embeddings {config.tied}"
    if missing := sorted(expected - tensors.keys()):
        raise ExportError(f"its weights lack {missing[0]}, which {kind} has")
    if extra := sorted(tensors.keys() - expected):
        raise ExportError(f"its weights have {extra[0]}, which {kind} does not have")
    weights = {}
    for ours, parts in names.items():
        pieces = unpack(config, ours, torch.empty(shapes[ours], device="meta"), len(parts))
        for name, piece in zip(parts, pieces, strict=True):
            tensor, shape = tensors[name], list(_transposed(architecture, ours, piece).shape)
            if list(tensor.shape) != shape:
                raise ExportError(f"its {name} has the shape {list(tensor.shape)}, and by its config.json {shape}")
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ExportError(f"its {name} must be finite numbers in floating point, not {tensor.dtype}")
        weights[ours] = torch.cat([_transposed(architecture, ours, tensors[name]).float() for name in parts])
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    return config, weights


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder`, of one safetensors file or of the shards that its index names. Raises `ExportError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor for file in weight_files(folder) for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError) as error:
        raise ExportError(f"its weights cannot be read: {error}") from error


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in `folder`. Raises `ExportError` if there are none, or a shard is missing."""
    if (folder / INDEX).is_file():
        names = shards(read_json(folder, INDEX))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ExportError(f"it lacks {missing[0]}, which its {INDEX} names")
        return names
    names = ["model.safetensors"] if (folder / "model.safetensors").is_file() else []
    names = names or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        reason = f": {pickles[0]} is a pickle, which can run any code" if pickles else ""
        raise ExportError(f"it has no model.safetensors{reason}")
    return names


def shards(index: Any) -> list[str]:
    """Names of the files in a shards' index. Raises `ExportError` if it is malformed or names a file elsewhere."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    names = set(names.values()) if isinstance(names, dict) else {None}
    if wrong := [name for name in names if not isinstance(name, str) or name != Path(name).name]:
        raise ExportError(f"its {INDEX} names {wrong[0]!r}: it must name files beside it")
    return sorted(names)


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file in `folder`. Raises `ExportError`."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"it has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"its {name} cannot be read: {error}") from error
