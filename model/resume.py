"""What must fit when a run resumes: the checkpoint's model, optimizer and data."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import CheckpointError
from model.gpt import ModelConfig

MAY_CHANGE = ("dropout", "recompute", "label_smoothing", "z_loss")  # options of the model, when a run is resumed
_SPLIT = ("data.corpus", "data.val_fraction", "data.max_tokens")
DATA_KNOBS = {  # what each part of the data depends on
    "corpus": ("data.corpus",),
    "train": _SPLIT,
    "val": _SPLIT,
    "eval_set": (*_SPLIT, "data.shift", "eval_tokens"),
}


def check_fits(state: dict[str, Any], config: ModelConfig, optimizer: str) -> None:
    """Raise `CheckpointError` if the model or optimizer of a resumed run differs from the checkpoint's.

    `MAY_CHANGE` has the exceptions."""
    saved = state["model_config"] | {"optimizer": state["config"]["optimizer"]}
    current = asdict(config) | {"optimizer": optimizer} | {key: saved[key] for key in MAY_CHANGE}
    labels = {"separator": "the separator that data.packing sets"}
    changed = [
        f"{labels.get(key, key)} {saved[key]} where this run has {current[key]}"
        for key in current
        if current[key] != saved[key]
    ]
    if changed:
        raise CheckpointError(
            f"cannot resume from a checkpoint with {', '.join(changed)}; only a new run can change that"
        )


def fingerprints(summary: dict[str, Any], eval_set: Iterable[tuple[Tensor, Tensor]]) -> dict[str, str]:
    """Hashes of a run's data, from the `summary` of its prepared corpus: the corpus, its text ("" if an earlier version
    prepared it), the tokens of both splits, and the evaluation set of ids and targets `[B, T]`, whose hash does not
    depend on how it is cut into batches."""
    digest = hashlib.sha256()
    for ids, targets in eval_set:
        counted = targets >= 0
        digest.update(torch.stack((ids[counted], targets[counted]), dim=1).numpy().tobytes())
    splits = {name: summary["files"][f"{name}.bin"]["sha256"] for name in ("train", "val")}
    hashes = {"corpus": summary["fingerprint"], "text": summary.get("digest", "")}
    return hashes | splits | {"eval_set": digest.hexdigest()}


def data_changes(state: dict[str, Any], config: dict[str, Any], current: dict[str, str]) -> dict[str, str]:
    """Compare the data of a resumed run with the checkpoint's. Returns a sentence for each thing that has changed.

    `config` is the run's whole configuration, and `current` has the `fingerprints` of its data. Raises
    `CheckpointError` if the run would be validated on text that it was trained on."""
    knobs = {}  # those that have changed, in words
    for key in (*DATA_KNOBS["eval_set"], "seed"):
        before, now = _value(state["config"], key), _value(config, key)
        if before != now:
            knobs[key] = f"{key} is {now} where the run had {before}"
    # Earlier versions wrote no fingerprints: then the data has changed if one of its knobs has.
    same = {name: current[name] for name in DATA_KNOBS if not knobs.keys() & set(DATA_KNOBS[name])}
    saved = state.get("data", same)
    changed = [name for name in DATA_KNOBS if saved.get(name) != current[name]]
    if "val" in changed and "corpus" not in changed:
        raise CheckpointError(
            f"cannot resume: {', '.join(knobs.values()) or 'the corpus is split in another way'}, so that the run has "
            "been trained on some of the text that is held out for validation now; only a new run can change that"
        )
    sentences = {
        "train": "the training text is another: batches come in another order, and some text may come again",
        "val": "the validation text is another, and the run may have been trained on some of it",
        "eval_set": "the evaluation set is another: the best checkpoint is sought anew",
    }
    changes = {name: sentences[name] for name in changed if name in sentences}
    return changes | {key: knobs[key] for key in ("seed", "data.shift") if key in knobs}


def _value(config: Any, key: str) -> Any:
    """The value of a dotted key in nested dicts."""
    for name in key.split("."):
        config = config[name]
    return config
