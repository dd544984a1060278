"""Checkpoints: one file each, written atomically, and verified when loaded.

`last.pt` is the newest, `previous.pt` the one before it, `best.pt` the one with the lowest validation loss.
"""

import os
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.gpt import ModelConfig
from runtime.errors import UserError

FORMAT = "nanofuse-1"


class CheckpointError(UserError):
    """A file that is damaged, not a checkpoint, or does not match the run."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types) as `folder/last.pt`.

    A partial file is written and synced, then renamed. Whenever the process dies, `last.pt` is either the old
    checkpoint or the new one. Raises `OSError` if writing fails, for example on a full disk.
    """
    last, partial = folder / "last.pt", folder / "last.pt.partial"
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if last.exists():
        _link(last, folder / "previous.pt")
    os.replace(partial, last)
    _sync(folder)


def mark_best(folder: Path) -> None:
    """Keep `last.pt` as `best.pt` too."""
    _link(folder / "last.pt", folder / "best.pt")


def _link(source: Path, target: Path) -> None:
    """Atomically make `target` a hard link to `source`, or a copy on a file system without hard links."""
    temporary = target.with_suffix(".spare")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _sync(folder: Path) -> None:
    """Sync a directory, so that renames in it survive a power cut. Windows cannot, and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint after verifying its checksums; only tensors and plain types are unpickled.

    Raises `CheckpointError`, which names another valid checkpoint in the folder if there is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"its record {damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError("another program wrote it")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except Exception as error:
        reason = "it is truncated or no checkpoint at all" if isinstance(error, zipfile.BadZipFile) else error
        raise CheckpointError(f"{path} cannot be used: {reason}{_alternative(path)}") from error
    return state


def check_fits(state: dict[str, Any], config: ModelConfig, optimizer: str) -> None:
    """Raise `CheckpointError` if the model or optimizer of a resumed run differs from the checkpoint's.

    Keys that the checkpoint lacks count as their defaults. Dropout and recomputation may change."""
    saved = asdict(ModelConfig(**state["model_config"])) | {"optimizer": state["config"]["optimizer"]}
    current = asdict(config) | {"optimizer": optimizer} | {key: saved[key] for key in ("dropout", "recompute")}
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


def _alternative(path: Path) -> str:
    """Advice that names the newest other checkpoint in the folder, if there is a valid one."""
    for name in ("previous.pt", "best.pt"):
        other = path.with_name(name)
        if other != path and other.exists() and zipfile.is_zipfile(other):
            return f"; {other} is an earlier checkpoint: copy it to {path} to resume from it"
    return ""
