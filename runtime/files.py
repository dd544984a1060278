"""Files: writes that succeed or leave nothing, and locks between processes."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


class WriteError(OSError):
    """A file that cannot be written, for example on a full disk. `filename` is its path."""

    def __str__(self):
        return f"cannot write {self.filename}: {self.strerror}"

    @classmethod
    def of(cls, error: OSError, path: Path) -> "WriteError":
        return cls(error.errno, error.strerror or str(error), str(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that yields the path of a partial file to write, and then renames it to `path`.

    After an error or a crash `path` holds its old content. An error also removes the partial file; an `OSError` becomes
    a `WriteError` that names `path`."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError.of(error, path) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. After a crash it holds either the old content or the new, never a part. Raises
    `WriteError`."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `folder`, which must be new or empty, at the end.

    After an error or a crash `folder` is as it was."""
    empty = folder.is_dir()  # it may be a mount point, onto which no folder can be renamed
    partial = folder / ".partial" if empty else folder.with_name(f".{folder.name}.partial")
    created = [parent for parent in partial.parents if not parent.exists()]
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        if empty:
            for file in partial.iterdir():
                file.rename(folder / file.name)
            partial.rmdir()
        else:
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


def append(path: Path, text: str) -> None:
    """Append to a text file. If that fails, the file keeps its old content and `WriteError` is raised."""
    size = None
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
    except OSError as error:
        if size is not None:
            os.truncate(path, size)
        raise WriteError.of(error, path) from error


@contextmanager
def locked(path: Path, busy: Callable[[int], None]) -> Iterator[None]:
    """A context that holds an exclusive lock on `path`, a file that exists only as long as the lock is held.

    While another process holds it, `busy` is called with the id of that process (0 if unknown) and may raise; if it
    returns, this waits. The system releases the lock of a process that is killed, whose file remains. Raises `OSError`
    if the file cannot be created."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                pid = file.read()
                busy(int(pid) if pid.isdecimal() else 0)
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file):  # the process that held the lock has removed its file: lock a new one
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on `path`."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
