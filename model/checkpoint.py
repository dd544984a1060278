"""Checkpoints: one file each, written whole or not at all, and never trusted on the way in.

`last.pt` is the newest, `previous.pt` the one before it, `best.pt` the one with the lowest evaluation loss.
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
    """A file that is not a whole checkpoint of ours."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types) as `folder/last.pt`.

    The file is complete on disk before it takes its name, and the name moves in one step: whenever the process dies,
    `last.pt` is either the old checkpoint or the new one. Raises `OSError` when the disk does.
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
    """Keep the last checkpoint as `best.pt` too."""
    _link(folder / "last.pt", folder / "best.pt")


def _link(source: Path, target: Path) -> None:
    """Make `target` name the same file as `source`, in one step and without copying where the disk allows."""
    spare = target.with_suffix(".spare")
    spare.unlink(missing_ok=True)
    try:
        os.link(source, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, spare)
    os.replace(spare, target)


def _sync(folder: Path) -> None:
    """Make renames in `folder` survive a power cut; directories cannot be opened on Windows, where this is moot."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. Raises `CheckpointError`, naming the good one beside it if there is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"its part {damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError("another program wrote it")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except Exception as error:
        why = "it is truncated or no checkpoint at all" if isinstance(error, zipfile.BadZipFile) else error
        raise CheckpointError(f"{path} cannot be used: {why}{_way_out(path)}") from error
    return state


def check_fits(state: dict[str, Any], config: ModelConfig, optimizer: str) -> None:
    """Raise `CheckpointError` when the model or optimizer to resume with is another than the state is of.

    What a checkpoint does not name has its default; dropout and what is computed again may change."""
    then = asdict(ModelConfig(**state["model_config"])) | {"optimizer": state["config"]["optimizer"]}
    now = asdict(config) | {"optimizer": optimizer} | {key: then[key] for key in ("dropout", "recompute")}
    known_as = {"separator": "the separator that data.packing sets"}
    changed = [f"{known_as.get(k, k)} {then[k]} where this run has {now[k]}" for k in now if now[k] != then[k]]
    if changed:
        raise CheckpointError(
            f"cannot resume from a checkpoint with {', '.join(changed)}; only a new run can change that"
        )


def _way_out(path: Path) -> str:
    """What to do instead, naming the newest other checkpoint in the folder that reads."""
    for name in ("previous.pt", "best.pt"):
        other = path.with_name(name)
        if other != path and other.exists() and zipfile.is_zipfile(other):
            return f"; {other} is there from before: copy it to {path} to go on from it"
    return ""
