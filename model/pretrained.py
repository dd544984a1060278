"""Weights to start from: a run's, a folder's in Hugging Face's format, or a model's of its hub."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.formats import DataError
from data.hub import hub_file
from model import checkpoint
from model.gpt import GPT, ModelConfig
from model.huggingface import INDEX, ExportError, config_of, from_huggingface, read_json, read_tensors, shards
from model.load import load_run
from runtime.config import ConfigError
from runtime.distributed import ALONE, World
from runtime.run import run_folder

HUB = "hub:"
# Knobs of a model that its weights leave open.
FREE = {"seq_len", "dropout", "recompute", "separator", "label_smoothing", "z_loss"}


@dataclass(frozen=True)
class Pretrained:
    """A folder of weights, and perhaps of a tokenizer. A hub model's, in the hub's cache, is filled when it is read."""

    name: str  # as the user gave it
    folder: Path
    is_run: bool  # rather than in Hugging Face's format

    def config(self) -> ModelConfig:
        """The model's resolved configuration. Raises `UserError`."""
        if self.is_run:
            return load_run(self.folder, torch.device("cpu"))[0].config
        with self._named():
            return config_of(read_json(self.folder, "config.json"))

    def weights(self) -> tuple[ModelConfig, dict[str, Tensor]]:
        """The model's resolved configuration, and its weights on the CPU in float32. Raises `UserError`."""
        if self.is_run:
            model, _ = load_run(self.folder, torch.device("cpu"))
            return model.config, model.state_dict()
        self.config()  # refuses a model before its weights are downloaded
        with self._named():
            if self.name.startswith(HUB):
                self._fetch_weights()
            return from_huggingface(read_json(self.folder, "config.json"), read_tensors(self.folder))

    def tokenizer(self) -> str:
        """The tokenizer, as `data.tokenizer` names it; empty if there is none. Raises `DataError`."""
        if self.name.startswith(HUB):
            return self.name if self._fetch("tokenizer.json") else ""
        return str(self.folder) if (self.folder / "tokenizer.json").exists() else ""

    def _fetch_weights(self) -> None:
        """Download the weights of the hub's model: one file, or those of an index. Raises `UserError`."""
        if not (self.folder / INDEX).exists() and self._fetch("model.safetensors"):
            return
        if self._fetch(INDEX):
            for name in shards(read_json(self.folder, INDEX)):
                self._fetch(name)

    def _fetch(self, name: str) -> bool:
        """Download a file of the hub's model, if it has that and the cache does not. Raises `DataError`."""
        from huggingface_hub.errors import EntryNotFoundError

        if (self.folder / name).exists():
            return True
        try:
            hub_file(self.name.removeprefix(HUB), name, self.folder.name, "model")
        except DataError as error:
            if isinstance(error.__cause__, EntryNotFoundError):
                return False
            raise
        return True

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the weights in an `ExportError`."""
        try:
            yield
        except ExportError as error:
            raise ExportError(f"{self.name} cannot be imported: {error}") from error


def open_pretrained(name: str) -> Pretrained:
    """Find weights by a run's folder or its name in out/, a folder in Hugging Face's format, or `hub:org/name`.

    Raises `UserError`."""
    if name.startswith(HUB):
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]*\w", name.removeprefix(HUB)):
            raise ExportError(f"{name!r} is no model of the Hugging Face Hub: it is to be hub:org/name")
        config = hub_file(name.removeprefix(HUB), "config.json", "main", "model")
        return Pretrained(name, config.parent, is_run=False)  # a folder of the hub's cache has its commit's name
    for folder in (run_folder(name), Path(name)):
        if any((folder / file).is_file() for file in ("best.pt", "last.pt")):
            return Pretrained(name, folder, is_run=True)
    if not Path(name).is_dir():
        raise ExportError(f"{name} is neither a run, nor a folder in Hugging Face's format, nor a hub:org/name")
    return Pretrained(name, Path(name), is_run=False)


def decided_by(name: str, file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the knobs, by dotted key, that starting from the weights `name` decides: the model and its tokenizer.

    They take the place of the configuration `file`'s. Its context length stays, if the weights have as long a one.
    Raises `ConfigError` for one of the `flags` that contradicts the weights."""
    pretrained = open_pretrained(name)
    config = pretrained.config()
    if set(config.window) <= {"S", "L"} and "S" in config.window:  # of half the context, which may change
        config = replace(config, window=f"{config.window}:{config.seq_len // 2}")
    decided = {f"model.{knob}": value for knob, value in asdict(config).items() if knob not in FREE}
    if tokenizer := pretrained.tokenizer():
        decided |= {"data.tokenizer": tokenizer, "data.vocab_size": 0}
    for key in sorted(decided.keys() & flags.keys()):
        if flags[key] != decided[key]:
            raise ConfigError(f"{key} is {flags[key]}, and the weights of {name} have {decided[key]}: leave it out")
    if config.position == "learned" and flags.get("model.seq_len", 0) > config.seq_len:
        raise ConfigError(f"model.seq_len is {flags['model.seq_len']}, and {name} has {config.seq_len} positions")
    return decided | {"model.seq_len": min(file.get("model.seq_len", config.seq_len), config.seq_len)}


def load_pretrained(model: GPT, name: str, world: World = ALONE) -> None:
    """Load the weights `name`, which rank 0 reads, into `model`, which `decided_by` has configured. Raises
    `UserError`."""
    weights, folder = {}, Path(name)
    if world.is_main:
        pretrained = open_pretrained(name)
        config, weights = pretrained.weights()
        folder = pretrained.folder
        if config.position == "learned":
            weights["position"] = weights["position"][: model.config.seq_len]
    checkpoint.restore({"model": model.state_dict()}, {"model": weights}, folder, world)
    model.refresh_copies()
