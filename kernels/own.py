"""An implementation of a user's own: the function `swiglu` of `mine.py` is chosen as `mine.py:swiglu`."""

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from kernels.launch import AVAILABLE, triton
from kernels.spec import KernelError, Op


def is_own(name: str) -> bool:
    """Whether the name of an implementation means a function in a file."""
    return ".py:" in name or name.endswith(".py")


def load(name: str, op: Op) -> Callable:
    """Return the function that `path.py:function` names, as an implementation of `op`.

    The path is relative to the current folder. Raises `KernelError` if the file or the function is missing, if the file
    cannot be imported, or if the function cannot be called as the op's reference is.
    """
    path, _, wanted = name.rpartition(":")
    if not path.endswith(".py") or not wanted:
        raise KernelError(f"{name} names no function: write it as {name.partition(':')[0]}:{op.name}")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise KernelError(f"there is no file {file}, which {name} should be in: give --kernels.{op.name} another path")
    try:
        module = _import(file)
    except (Exception, SystemExit) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise KernelError(f"{name} cannot be imported: line {_line(error, file)}: {what}") from error
    function = getattr(module, wanted, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(wanted, found, 1)
        hint = f"did you mean {near[0]}?" if near else f"its functions are {', '.join(found) or 'none'}"
        raise KernelError(f"{name}: the file has no function {wanted!r} ({hint})")
    _check_signature(name, function, op)
    return function


def has_triton_kernels(name: str) -> bool:
    """Whether the file of a loaded implementation defines or imports kernels of Triton."""
    module = _import(Path(name.rpartition(":")[0]).expanduser().resolve())
    return AVAILABLE and any(isinstance(value, triton.KernelInterface) for value in vars(module).values())


@cache
def _import(file: Path) -> ModuleType:
    """The module in a file, which runs once however many functions of it are chosen."""
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}_{abs(hash(file)):x}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _line(error: BaseException, file: Path) -> int:
    """The last line of the file that an error of its import went through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return getattr(error, "lineno", None) or (lines or [1])[-1]


def _check_signature(name: str, function: Callable, op: Op) -> None:
    """Raise `KernelError` unless whatever calls the op's reference can call `function`, by position or by name."""
    reference = inspect.signature(op.implementations["torch"])
    names = {key: key for key in reference.parameters}
    required = [key for key, parameter in reference.parameters.items() if parameter.default is parameter.empty]
    own = None
    try:
        own = inspect.signature(function)
        own.bind(*required), own.bind(**names)
        positional = own.bind(*names).arguments
        fits = all(positional.get(key, key) == key for key in names)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        has = f"its parameters are {_written(own)}" if own else "they cannot be read"
        raise KernelError(f"{name} cannot stand in for {op.name}, whose parameters are {_written(reference)}: {has}")


def _written(signature: inspect.Signature) -> str:
    """Parameters without their annotations: `(x, gated=True)`."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))
