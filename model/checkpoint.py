"""Checkpoints: one file each, written atomically, and verified when loaded.

`last.pt` is the newest, `previous.pt` the one before it, `best.pt` the one with the lowest validation loss.

The file of a sharded model has meta tensors in place of the model's and the optimizers', and names the folder beside it
that has their values (`model/shards.py`). That folder is complete before the file is written, and is deleted when no
file names it any more. Any number of ranks, sharded or not, reads what any other wrote.
"""

import os
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.gpt import ModelConfig
from model.tensors import assign, is_sharded
from runtime.config import ConfigError, build, flatten
from runtime.distributed import ALONE, World
from runtime.errors import UserError
from runtime.files import replacing
from runtime.records import free_name

if TYPE_CHECKING:
    pass

FORMAT, SHARDED_FORMAT = "nanofuse-1", "nanofuse-1-sharded"
SHARDED = ("model", "optimizers")  # parts whose tensors ranks may share
PARTS = {"model_config": dict, "model": dict, "step": int}  # of every checkpoint
RESUMABLE = {"config": dict, "optimizers": list, "scaler": dict, "rng": Tensor, "sequences": int}  # not of an import
KINDS = {dict: "a dict", list: "a list", int: "a count", str: "text", Tensor: "a tensor", int | float: "a number"}
# Earlier versions did not write these.
OPTIONAL = {"budget": dict, "recipe": int, "data": dict, "best_after": int, "micro_batch": int, "scales": dict}


class CheckpointError(UserError):
    """A file that is damaged, not a checkpoint, or does not match the run."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types) as `folder/last.pt`.

    A partial file is written and synced, then renamed. Whenever the process dies, `last.pt` is either the old
    checkpoint or the new one. Raises `WriteError` if writing fails, for example on a full disk.
    """
    last = folder / "last.pt"
    with replacing(last) as partial:
        _write(partial, state)
        if last.exists():
            _link(last, folder / "previous.pt")
    _sync(folder)


def save_whole(source: Path, target: Path) -> None:
    """Write the checkpoint `source`, which may be sharded, to `target` as one file that resumes as `source` does.

    Takes memory for the whole model and its optimizers. Raises `CheckpointError`, or `WriteError` as `save` does."""
    state = load(source, parts=SHARDED)
    with replacing(target) as partial:
        _write(partial, {name: value for name, value in state.items() if name not in ("format", "shards")})
    _sync(target.parent)


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with its format, and sync the file."""
    with path.open("wb") as file:
        try:
            torch.save({"format": SHARDED_FORMAT if "shards" in state else FORMAT, **state}, file)
        except RuntimeError as error:  # torch's zip writer hides the error of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def mark_best(folder: Path) -> None:
    """Keep `last.pt` as `best.pt` too."""
    _link(folder / "last.pt", folder / "best.pt")


def reopen_best(folder: Path, step: int, anew: bool, is_best: bool) -> None:
    """Make `best.pt` right for a run that goes on from `step`, which it does not have if the search begins `anew`."""
    if anew:
        set_best_aside(folder, step)
    elif is_best:
        mark_best(folder)  # a kill may have come between the checkpoint and this


def set_best_aside(folder: Path, step: int) -> None:
    """Rename `best.pt`, the best of the evaluations up to `step`, so that the evaluations after it find their own."""
    best = folder / "best.pt"
    if best.exists():
        best.rename(free_name(folder / f"best-to-step-{step}.pt"))


def _link(source: Path, target: Path) -> None:
    """Atomically make `target` a hard link to `source`, or a copy on a file system without hard links."""
    with replacing(target) as partial:
        partial.unlink(missing_ok=True)  # it may be a link to another checkpoint, left by a kill
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def _sync(folder: Path) -> None:
    """Sync a directory, so that renames in it survive a power cut. Windows cannot, and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def load(path: Path, device: torch.device | str = "cpu", parts: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    """Load a checkpoint after verifying its checksums; only tensors and plain types are unpickled.

    Of a sharded one only `parts` are read; the tensors of others stay on the meta device. Keys that its `model_config`
    lacks are added, with their defaults. Raises `CheckpointError`, which names another valid checkpoint in the folder
    if there is one."""
    state = _verified(path, device)
    if "shards" in state:
        empty = partial(torch.empty, device=device)
        whole = {
            part: map_tensors(lambda name, x: empty(x.shape, dtype=x.dtype), state[part])
            for part in parts if part in state
        }  # fmt: skip
        _read_shards(state, whole, path)
        if state["model_config"]["tied"]:
            whole["model"]["head.weight"] = whole["model"]["embedding.weight"]
        state |= whole
    return state


def restore(current: dict[str, Any], state: dict[str, Any], path: Path, world: World = ALONE) -> None:
    """Copy the tensors of the checkpoint `state` to those of `current`, nested dicts and lists.

    Rank 0 has loaded `state` from `path` with `load_to_resume`. Of a tensor in `current` each rank may have the whole
    or a part, or it is on the meta device where another rank has it. Raises `CheckpointError`."""
    if world.is_main:
        check_tensors(state, current, path)
    if "shards" in state:
        _read_shards(state, current, path)
        return
    found = dict(named_tensors({part: state[part] for part in current})) if world.is_main else {}
    tensors = dict(named_tensors(current))
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        whole = tensor
        if is_sharded(tensor) or tensor.is_meta:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if world.is_main:
            whole.copy_(found[name])
        world.replicate([whole])
        if whole is not tensor and not tensor.is_meta:
            assign(tensor, whole)


def _read_shards(state: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
    """Read the shards of the checkpoint `state`, from `path`, to nested `tensors`."""
    from model import shards

    try:
        shards.read(path.parent / state["shards"]["folder"], stored_tensors(tensors, state["model_config"]))
    except shards.ShardsError as error:
        raise _refusal(path, str(error)) from error


def stored_tensors(parts: dict[str, Any], model_config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of nested `parts` that are stored as shards, by name: of those that are here, all but a tied head."""
    tied = {"model.head.weight"} if model_config["tied"] else set()
    return {name: x for name, x in named_tensors(parts) if not x.is_meta and name not in tied}


def shards_folder(path: Path) -> str:
    """The name of the folder that a checkpoint has its shards in; "" if it has none."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("shards", {}).get("folder", "")


def _verified(path: Path, device: torch.device | str) -> dict[str, Any]:
    """`load`, without reading shards."""
    try:
        return _read(path, device)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}{_alternative(path)}") from None
    except CheckpointError as error:
        raise _refusal(path, str(error)) from error


def load_to_resume(path: Path, options: type) -> dict[str, Any]:
    """Like `load`, for a checkpoint that training can continue from; shards are left to `restore`.

    Its configuration, of the class `options`, gets the keys that it lacks. Raises `CheckpointError`."""
    if not path.exists() and not _alternative(path):
        raise CheckpointError(
            f"{path.parent} has no checkpoint, because the run ended before its first: --overwrite starts it again"
        )
    state = _verified(path, "cpu")
    if not RESUMABLE.keys() & state.keys():
        raise CheckpointError(f"{path.parent} holds imported weights, without the optimizer state that resuming needs")
    try:
        _check_kinds(state, RESUMABLE)
        _check_kinds(state, {name: kind for name, kind in OPTIONAL.items() if name in state})
        for name, kind in (("budget", int | float), ("scaler", int | float), ("data", str)):
            _check_kinds(state.get(name, {}), dict.fromkeys(state.get(name, {}), kind))
        torch.Generator().set_state(state["rng"])
        state["config"] = asdict(build(options, flatten(options, state["config"])))
    except ConfigError as error:
        raise _refusal(path, f"its config: {error}") from error
    except CheckpointError as error:
        raise _refusal(path, str(error)) from error
    except (RuntimeError, TypeError) as error:
        raise _refusal(path, "its rng is no state of a random generator") from error
    return state


def _read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """`load`, whose `CheckpointError` is a reason without the path."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"its record {damaged} is damaged")
        state = torch.load(path, map_location=device, weights_only=True)
    except (CheckpointError, FileNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except zipfile.BadZipFile:
        raise CheckpointError("it is truncated or no checkpoint at all") from None
    except OSError as error:
        raise CheckpointError(error.strerror or str(error)) from error
    except Exception as error:  # torch and pickle raise all kinds, some of which advise to load the file unsafely
        raise CheckpointError("it has more than tensors and plain values: another program wrote it") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError("another program wrote it")
    _check_kinds(state, PARTS)
    if state["format"] == SHARDED_FORMAT:
        _check_shards(state, path)
    _check_kinds(state["model"], dict.fromkeys(state["model"], Tensor))
    try:
        config = build(ModelConfig, state["model_config"])
        state["model_config"] = asdict(config.resolved(config.vocab_size))
    except ConfigError as error:
        raise CheckpointError(f"its model_config: {error}") from error
    return state


def _check_shards(state: dict[str, Any], path: Path) -> None:
    """Raise `CheckpointError` unless the files that the sharded checkpoint `state`, of `path`, names are good."""
    from model import shards

    _check_kinds(state, {"shards": dict})
    _check_kinds(state["shards"], {"folder": str, "files": dict})
    folder, files = state["shards"]["folder"], state["shards"]["files"]
    _check_kinds(files, dict.fromkeys(files, int))
    if any(Path(name).name != name for name in (folder, *files)):
        raise CheckpointError("its shards are named by paths: another program wrote it")
    try:
        shards.verify(path.parent / folder, files)
    except shards.ShardsError as error:
        raise CheckpointError(str(error)) from error


def _check_kinds(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless `values` has a value of the right type for every name in `kinds`."""
    for name, kind in kinds.items():
        if name not in values:
            raise CheckpointError(f"it lacks {name}")
        value = values[name]
        if not isinstance(value, kind) or (kind is int and value < 0):
            raise CheckpointError(f"its {name} is {_describe(value)}, not {KINDS[kind]}")


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load the weights of the checkpoint `state`, from `path`, into `model`. Raises `CheckpointError`."""
    check_tensors(state, {"model": model.state_dict()}, path)
    model.load_state_dict(state["model"])


def check_tensors(state: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise `CheckpointError` unless the parts of `expected` have the same tensors in `state`, which is from `path`:
    under the same keys, with the same shapes and dtypes."""
    found, tensors = dict(named_tensors({name: state.get(name) for name in expected})), dict(named_tensors(expected))
    for name, tensor in tensors.items():
        if name not in found:
            raise _refusal(path, f"it lacks the tensor {name}")
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise _refusal(path, f"its {name} is {_describe(found[name])}, not {_describe(tensor)}")
    if unknown := sorted(found.keys() - tensors.keys()):
        raise _refusal(path, f"it has a tensor {unknown[0]}, which this model or optimizer does not have")


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, each with its keys joined by dots."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))


def map_tensors(function: Callable[[str, Tensor], Any], value: Any, name: str = "") -> Any:
    """A copy of nested dicts and lists with `function(name, tensor)` for every tensor, named as in `named_tensors`."""
    if isinstance(value, Tensor):
        return function(name, value)
    prefix = f"{name}." if name else ""
    if isinstance(value, dict):
        return {key: map_tensors(function, inner, f"{prefix}{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [map_tensors(function, inner, f"{prefix}{i}") for i, inner in enumerate(value)]
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be used: {reason}{_alternative(path)}")


def _alternative(path: Path) -> str:
    """Advice that names the newest other checkpoint in the folder that can be used, if there is one.

    Checkpoints may be hard links to each other, so the advice never writes over one."""
    for name in ("last.pt", "previous.pt", "best.pt"):
        other = path.with_name(name)
        if other == path:
            continue
        try:
            step = _read(other)["step"]
        except (CheckpointError, FileNotFoundError):
            continue
        command = f"rm -f {shlex.quote(str(path))} && cp {shlex.quote(str(other))} {shlex.quote(str(path))}"
        return f"; {other} is a good checkpoint, of step {step}; to use that: {command}"
    return ""
