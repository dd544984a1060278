"""Typed configuration from frozen dataclasses. Precedence: defaults < config file < flags.

An option, or knob, is a dataclass field. Its annotation has its help text and the interval of valid values:

    lr: Annotated[float, "(0, inf)", "peak learning rate"] = 3e-3

A field whose type is a dataclass is a section. `--model.n_layer=4` sets a knob of a section, and `--kernels=torch` sets
the first knob of one. A config file has plain assignments (`lr = 1e-3`, `model = dict(n_layer=6)`). Each source is read
into a flat dict from dotted key to value, so precedence is a dict union.
"""

import argparse
import ast
import dataclasses
import difflib
import operator
import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from runtime.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """An unknown knob, or an invalid value."""


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option. Valid values are in `choices`, if there are any, and in `interval`, such as `[0, 1)`."""

    key: str
    type: type
    help: str
    default: Any
    choices: tuple[str, ...]
    interval: str

    def read(self, value: Any) -> Any:
        """Convert `value` to the knob's type: parse a string, and accept an int as a float or a string. Raises
        `ConfigError` for an invalid value."""
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.key} must be {_join_or(self.choices)}, not {value!r}{_suggestion(value, self.choices)}"
            )
        try:
            value = _convert(value, self.type)
        except (ValueError, KeyError, OverflowError):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
            raise ConfigError(f"{self.key} must be {kind}, not {value!r}") from None
        if self.type is int and not -(2**63) <= value < 2**64:
            raise ConfigError(f"{self.key} must be a whole number that 64 bits hold, not {value}")
        for compare, words, limit in _bounds(self.interval):
            if not compare(value, float(limit)):
                raise ConfigError(f"{self.key} must be {words} {limit}, not {value}")
        return value

    def __post_init__(self):
        _bounds(self.interval)  # fails early on a malformed interval


_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def _bounds(interval: str) -> list[tuple[Callable[[Any, float], bool], str, str]]:
    """Parse an interval such as `[0, 1)` into (comparison, its words, limit) for each end. Raises `ValueError`."""
    if not interval:
        return []
    match = _INTERVAL.fullmatch(interval)
    if match is None or not float(match[2]) < float(match[3]):
        raise ValueError(f"{interval!r} is not an interval such as '[0, 1)' or '(0, inf)'")
    left, low, high, right = match.groups()
    lower = (operator.ge, "at least", low) if left == "[" else (operator.gt, "more than", low)
    upper = (operator.le, "at most", high) if right == "]" else (operator.lt, "less than", high)
    return [lower, upper]


def _convert(value: Any, kind: type) -> Any:
    if isinstance(value, str) and kind is not str:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    if type(value) is kind or (type(value) is int and kind in (float, str)):
        return kind(value)
    raise ValueError


def _join_or(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _suggestion(name: Any, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), names, 1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def knobs(cls: type, prefix: str = "") -> dict[str, Knob]:
    """All knobs of a configuration class and its sections, by dotted key, in declaration order."""
    found = {}
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(annotation):
            found |= knobs(annotation, f"{prefix}{name}.")
            continue
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        interval, text = ("", "", *extras)[-2:]
        default = cls.__dataclass_fields__[name].default
        found[prefix + name] = Knob(prefix + name, str if choices else kind, text, default, choices, interval)
    return found


def _sections(cls: type) -> dict[str, type]:
    return {name: kind for name, kind in get_type_hints(cls).items() if dataclasses.is_dataclass(kind)}


def flatten(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert nested values to dotted keys. A section that is given a single value sets its first knob to it."""
    flat = {}
    for name, value in values.items():
        section = _sections(cls).get(name)
        if section and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(section, value).items()}
        else:
            flat[f"{name}.{dataclasses.fields(section)[0].name}" if section else name] = value
    return flat


def merge(layers: Iterable[Mapping[str, Any]], exclusive: set[str]) -> dict[str, Any]:
    """Merge flat configurations; later layers win. The keys of `exclusive` exclude each other, so a layer that has one
    removes those of earlier layers."""
    merged = {}
    for layer in layers:
        if exclusive & layer.keys():
            merged = {key: value for key, value in merged.items() if key not in exclusive}
        merged |= layer
    return merged


def build(cls: type[T], flat: Mapping[str, Any], prefix: str = "") -> T:
    """Build a configuration from dotted keys; other knobs have their defaults. Raises `ConfigError`."""
    known = knobs(cls, prefix)
    for key in flat:
        if key.startswith(prefix) and key not in known:
            raise ConfigError(f"no knob called {key}{_suggestion(key, known)}")
    values = {name: build(kind, flat, f"{prefix}{name}.") for name, kind in _sections(cls).items()}
    for key, knob in known.items():
        name = key.removeprefix(prefix)
        if "." not in name and key in flat:
            values[name] = knob.read(flat[key])
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(prefix + str(error)) from error


def as_dict(config: Any) -> dict[str, Any]:
    """Convert a configuration to nested dicts; `flatten` and `build` invert this."""
    return dataclasses.asdict(config)


def read(cls: type, flat: Mapping[str, Any], *keys: str) -> list[Any]:
    """Read only these knobs, without validating the others. Raises `ConfigError`."""
    known = knobs(cls)
    return [known[key].read(flat.get(key, known[key].default)) for key in keys]


_PYTHON = "; a config file is Python, with assignments such as lr = 1e-3 and model = dict(n_layer=6)"


def read_file(name: str, folder: Path) -> dict[str, Any]:
    """Run a config file and return its assignments. `name` is a path, or a file of `folder`. Raises `ConfigError`.

    Modules, functions and names that start with an underscore are the file's own helpers, not assignments of knobs."""
    path = next((p for p in (Path(name), folder / name) if p.is_file()), None)
    if path is None:
        available = ", ".join(sorted(p.name for p in folder.glob("*.py")))
        raise ConfigError(f"no config file {name!r}, neither here nor in {folder.name}/, which has {available}")
    try:
        statements = ast.parse(path.read_bytes(), str(path)).body
        namespace = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"config file {path} does not run: {type(error).__name__}: {text}{_PYTHON}") from error
    if idle := next(filter(_is_idle, statements), None):
        line = ast.unparse(idle).partition("\n")[0]
        raise ConfigError(f"config file {path} has {line!r} in line {idle.lineno}, which sets no knob{_PYTHON}")
    return {key: value for key, value in namespace.items() if not _is_helper(key, value)}


def _is_idle(statement: ast.stmt) -> bool:
    """Whether a statement does nothing, as the lines of a YAML or JSON file do that are valid Python."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None
    return isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant | ast.Call)


def _is_helper(name: str, value: Any) -> bool:
    """Whether a config file's variable is no knob: a module, a function or class, or a name with an underscore."""
    return (
        name.startswith("_")
        or isinstance(value, ModuleType)
        or (callable(value) and getattr(value, "__name__", "") == name)
    )


class Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError`, one sentence, where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def number(kind: type, interval: str = "") -> Callable[[str], Any]:
    """The `type` of an argument of a parser: a number of this kind, in an interval such as `[0, 1)` if one is given."""
    knob = Knob("it", kind, "", 0, (), interval)

    def read(text: str) -> Any:
        try:
            return knob.read(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def read_flags(cls: type, argv: list[str], description: str) -> dict[str, Any]:
    """Parse flags into values by dotted key. `-h` prints every knob and exits. Raises `ConfigError`."""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, knob in knobs(cls).items():
        bare = "true" if knob.type is bool else "on" if "on" in knob.choices else None  # value of the flag without one
        default = "" if knob.default in ("", None) else f" (default {knob.default})"
        parser.add_argument(
            f"--{key}",
            metavar="|".join(knob.choices) if knob.choices else knob.type.__name__,
            help=f"{knob.help}{default}".replace("%", "%%"),
            **({"nargs": "?", "const": bare} if bare else {}),
        )
    for name in _sections(cls):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{key}" for key in (*knobs(cls), *_sections(cls))]
        name = unknown[0].split("=")[0]
        problem = "no flag called" if name.startswith("-") else "unexpected argument"
        raise ConfigError(f"{problem} {name}{_suggestion(name, flags)}; -h lists every flag")
    flat = flatten(cls, vars(given))
    return dict(zip(flat, read(cls, flat, *flat), strict=True))
