"""The tensors of a sharded model's checkpoint: a folder to which every rank writes its parts, by torch's distributed
checkpoint (DCP).

DCP's own metadata are a pickle, which could run code when it is read. So the files are safetensors, which DCP also
writes and reads. All ranks have to see the same file system.
"""

import shutil
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from runtime.files import WriteError
from runtime.records import free_name

PREFIX = "shards-"  # of a folder's name
CHUNK = 2**24  # bytes of a file in memory at a time


def write(folder: Path, step: int, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Any]:
    """Write named tensors to a new folder inside `folder`. All ranks of `group` call this, each with its parts of the
    sharded tensors and with those that it alone has.

    Returns the name of the new `folder` and the CRC-32 of its `files`, for `read`. Raises `WriteError` on all ranks if
    one of them fails."""
    rank, box = group.rank(), [free_name(folder / f"{PREFIX}{step}")]
    dist.broadcast_object_list(box, group_src=0, group=group)
    target = box[0]
    tensors = {name: x if x.ndim else x.clone() for name, x in tensors.items()}  # a shared step count
    try:
        writer = dcp.HuggingFaceStorageWriter(str(target), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise (WriteError.of(reason, target) if isinstance(reason, OSError) else reason) from error
    checksums: list[dict[str, int]] = [{}] * group.size()
    written = target.glob(f"shard-{rank + 1:05d}-*")
    dist.all_gather_object(checksums, {path.name: _checksum(path) for path in written}, group=group)
    return {"folder": target.name, "files": {name: crc for files in checksums for name, crc in files.items()}}


def verify(folder: Path, files: dict[str, int]) -> None:
    """Raise `ShardsError` if one of `files` is missing from `folder` or has another CRC-32."""
    for name, checksum in files.items():
        try:
            found = _checksum(folder / name)
        except FileNotFoundError:
            raise ShardsError(f"its file {folder / name} is missing") from None
        except OSError as error:
            raise ShardsError(f"its file {folder / name} cannot be read: {error.strerror}") from error
        if found != checksum:
            raise ShardsError(f"its file {folder / name} is damaged")


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read the files of `folder` into named tensors, whatever their sharding. Nothing is communicated. Raises
    `ShardsError`."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this is a single process
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, Exception) as error:  # DCP and safetensors raise all kinds
        raise ShardsError(f"the files in {folder} do not have its tensors") from error


def clean(folder: Path, used: Iterable[str]) -> None:
    """Delete the folders inside `folder` that `write` has made, or has begun to, except those in use."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


class ShardsError(ValueError):
    """Files that are missing, damaged or of another checkpoint. Its text is a reason."""
