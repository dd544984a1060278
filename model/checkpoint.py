"""Checkpoints: one file each, written atomically, and verified when loaded.

`last.pt` is the newest, `previous.pt` the one before it, `best.pt` the one with the lowest validation loss.
"""

import hashlib
import os
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import ModelConfig
from runtime.config import ConfigError, build
from runtime.errors import UserError
from runtime.files import replacing
from runtime.records import free_name

FORMAT = "nanofuse-1"
PARTS = {"model_config": dict, "model": dict, "step": int}  # of every checkpoint
RESUMABLE = {"config": dict, "optimizers": list, "scaler": dict, "rng": Tensor, "sequences": int}  # not of an import
_SPLIT = ("data.corpus", "data.val_fraction", "data.max_tokens")
DATA_KNOBS = {  # what each part of the data depends on
    "corpus": ("data.corpus",),
    "train": _SPLIT,
    "val": _SPLIT,
    "eval_set": (*_SPLIT, "data.shift", "eval_tokens"),
}
KINDS = {dict: "a dict", list: "a list", int: "a count", str: "text", Tensor: "a tensor", int | float: "a number"}
OPTIONAL = {"budget": dict, "recipe": int, "data": dict, "best_after": int}  # earlier versions did not write them


class CheckpointError(UserError):
    """A file that is damaged, not a checkpoint, or does not match the run."""


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types) as `folder/last.pt`.

    A partial file is written and synced, then renamed. Whenever the process dies, `last.pt` is either the old
    checkpoint or the new one. Raises `WriteError` if writing fails, for example on a full disk.
    """
    last = folder / "last.pt"
    with replacing(last) as partial:
        with partial.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:  # torch's zip writer hides the error of the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            _link(last, folder / "previous.pt")
    _sync(folder)


def mark_best(folder: Path) -> None:
    """Keep `last.pt` as `best.pt` too."""
    _link(folder / "last.pt", folder / "best.pt")


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, while training goes on.

    The thread writes a copy of the state, which is kept in host memory and written over by the next save. For a GPU it
    is pinned, which torch rounds up to powers of two, and copied on a stream of its own. As a context, a saver waits
    for its thread at the end."""

    def __init__(self, folder: Path, device: torch.device):
        """A saver of `folder/last.pt`, for a state on `device` or the CPU."""
        self.folder = folder
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[tuple, Tensor] = {}
        self.thread = ThreadPoolExecutor(1)
        self.newest: Future = Future()  # of the thread's tasks
        self.newest.set_result(None)

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and begin to write it as `save` does, after waiting for the save before. Raises its error.

        On a GPU only copying begins: `before_update` is to be called before any tensor of `state` changes."""
        self.wait()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            copy = self._copy(state, (), {})
        self._then(self._write, copy)

    def before_update(self) -> None:
        """Make the GPU finish copying before it runs what is launched from here on. Does nothing on a CPU."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def mark_best(self) -> None:
        """Keep the newest checkpoint as `best.pt` too, once it is written."""
        self._then(mark_best, self.folder)

    def check(self) -> None:
        """Raise the error of the thread if it has failed."""
        if self.newest.done():
            self.newest.result()

    def wait(self) -> None:
        """Wait until all is written. Raises the error of the thread: `WriteError`, as in `save`."""
        self.newest.result()

    def _then(self, task: Callable[..., None], *args: Any) -> None:
        """Give the thread a task, which fails if the one before it has failed."""

        def run(before: Future = self.newest) -> None:
            before.result()
            task(*args)

        self.newest = self.thread.submit(run)

    def _copy(self, value: Any, key: tuple, copies: dict[tuple, Tensor]) -> Any:
        """Copy nested dicts and lists. Tensors at one address, such as tied weights, are copied once into `copies`."""
        if isinstance(value, dict):
            return {name: self._copy(inner, (*key, name), copies) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._copy(inner, (*key, i), copies) for i, inner in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        source = value.data_ptr(), value.shape, value.stride(), value.dtype
        if source not in copies:
            key = *key, value.shape, value.dtype
            if key not in self.buffers:
                pin = self.stream is not None
                self.buffers[key] = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pin)
            copies[source] = self.buffers[key].copy_(value, non_blocking=True)
        return copies[source]

    def _write(self, state: dict[str, Any]) -> None:
        if self.stream:
            self.stream.synchronize()
        save(self.folder, state)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Wait for the thread. Its error is raised, or noted on another `error` that ended the run."""
        self.thread.shutdown()
        failure = self.newest.exception()
        if failure and error is None:
            raise failure
        if failure and failure is not error:
            error.add_note(str(failure))


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


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint after verifying its checksums; only tensors and plain types are unpickled.

    Keys that its `model_config` lacks are added, with their defaults. Raises `CheckpointError`, which names another
    valid checkpoint in the folder if there is one."""
    try:
        return _read(path, device)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}{_alternative(path)}") from None
    except CheckpointError as error:
        raise _refusal(path, str(error)) from error


def load_to_resume(path: Path) -> dict[str, Any]:
    """Like `load`, for a checkpoint that training can continue from. Raises `CheckpointError`."""
    if not path.exists() and not _alternative(path):
        raise CheckpointError(
            f"{path.parent} has no checkpoint, because the run ended before its first: --overwrite starts it again"
        )
    state = load(path)
    if not RESUMABLE.keys() & state.keys():
        raise CheckpointError(f"{path.parent} holds imported weights, without the optimizer state that resuming needs")
    try:
        _check_kinds(state, RESUMABLE)
        _check_kinds(state, {name: kind for name, kind in OPTIONAL.items() if name in state})
        for name, kind in (("budget", int | float), ("scaler", int | float), ("data", str)):
            _check_kinds(state.get(name, {}), dict.fromkeys(state.get(name, {}), kind))
        torch.Generator().set_state(state["rng"])
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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError("another program wrote it")
    _check_kinds(state, PARTS)
    _check_kinds(state["model"], dict.fromkeys(state["model"], Tensor))
    try:
        config = build(ModelConfig, state["model_config"])
        state["model_config"] = asdict(config.resolved(config.vocab_size))
    except ConfigError as error:
        raise CheckpointError(f"its model_config: {error}") from error
    return state


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
    found, tensors = dict(_tensors({name: state.get(name) for name in expected})), dict(_tensors(expected))
    for name, tensor in tensors.items():
        if name not in found:
            raise _refusal(path, f"it lacks the tensor {name}")
        if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise _refusal(path, f"its {name} is {_describe(found[name])}, not {_describe(tensor)}")
    if unknown := sorted(found.keys() - tensors.keys()):
        raise _refusal(path, f"it has a tensor {unknown[0]}, which this model or optimizer does not have")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, each with its keys joined by dots."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def check_fits(state: dict[str, Any], config: ModelConfig, optimizer: str) -> None:
    """Raise `CheckpointError` if the model or optimizer of a resumed run differs from the checkpoint's.

    Dropout and recomputation may change."""
    saved = state["model_config"] | {"optimizer": state["config"]["optimizer"]}
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
