"""Typed configuration from frozen dataclasses: defaults < file < flags.

A knob is a dataclass field; its help, and the interval it must lie in, stand in its annotation:

    lr: Annotated[float, "(0, inf)", "peak learning rate"] = 3e-3

A field whose type is a dataclass is a section: `--model.n_layer=4` sets a knob in it and `--kernels=torch` its first
knob. A config file holds bare assignments (`lr = 1e-3`, `model = dict(n_layer=6)`). Between those sources a
configuration is a flat dict from dotted key to value, so that precedence is a dict union.
"""

import argparse
import dataclasses
import difflib
import operator
import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from runtime.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A knob that does not exist, or a value that it cannot take."""


@dataclasses.dataclass(frozen=True)
class Knob:
    """A leaf of the configuration. `choices` and `interval`, such as `[0, 1)`, limit what it takes."""

    key: str
    type: type
    help: str
    default: Any
    choices: tuple[str, ...]
    interval: str

    def read(self, value: Any) -> Any:
        """The value in the knob's type: text is parsed, an int passes for a float or text. Raises `ConfigError`."""
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.key} must be {_either(self.choices)}, not {value!r}{_nearest(value, self.choices)}"
            )
        try:
            value = _convert(value, self.type)
        except (ValueError, KeyError):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
            raise ConfigError(f"{self.key} must be {kind}, not {value!r}") from None
        for holds, words, limit in _bounds(self.interval):
            if not holds(value, float(limit)):
                raise ConfigError(f"{self.key} must be {words} {limit}, not {value}")
        return value

    def __post_init__(self):
        _bounds(self.interval)  # a slip of the pen shows at once


_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def _bounds(interval: str) -> list[tuple[Callable[[Any, float], bool], str, str]]:
    """Both ends of an interval in the mathematician's notation: test, its words, limit. `ValueError` if it is none."""
    if not interval:
        return []
    match = _INTERVAL.fullmatch(interval)
    if match is None or not float(match[2]) < float(match[3]):
        raise ValueError(f"{interval!r} is no interval, such as '[0, 1)' or '(0, inf)'")
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


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _nearest(name: Any, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def knobs(cls: type, prefix: str = "") -> dict[str, Knob]:
    """Every knob of a configuration class and its sections, by dotted key, in the order they are declared."""
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
    """Nested values to dotted keys; a section given one bare value takes it for its first knob."""
    flat = {}
    for name, value in values.items():
        section = _sections(cls).get(name)
        if section and isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(section, value).items()}
        else:
            flat[f"{name}.{dataclasses.fields(section)[0].name}" if section else name] = value
    return flat


def merge(layers: Iterable[Mapping[str, Any]], rivals: set[str]) -> dict[str, Any]:
    """Later layers win. Of `rivals` only one can hold, so a layer that gives one displaces those below it."""
    merged = {}
    for layer in layers:
        if rivals & layer.keys():
            merged = {key: value for key, value in merged.items() if key not in rivals}
        merged |= layer
    return merged


def build(cls: type[T], flat: Mapping[str, Any], prefix: str = "") -> T:
    """The configuration with these values and the defaults elsewhere. Raises `ConfigError`."""
    known = knobs(cls, prefix)
    for key in flat:
        if key.startswith(prefix) and key not in known:
            raise ConfigError(f"no knob called {key}{_nearest(key, known)}")
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
    """A configuration as nested plain values, which `flatten` and `build` turn back into an equal one."""
    return dataclasses.asdict(config)


def read(cls: type, flat: Mapping[str, Any], *keys: str) -> list[Any]:
    """The values of some knobs, whatever the others are. Raises `ConfigError`."""
    known = knobs(cls)
    return [known[key].read(flat.get(key, known[key].default)) for key in keys]


def read_file(name: str, folder: Path) -> dict[str, Any]:
    """The assignments of a config file, looked for as given and then in `folder`. Raises `ConfigError`."""
    path = next((p for p in (Path(name), folder / name) if p.is_file()), None)
    if path is None:
        there = ", ".join(sorted(p.name for p in folder.glob("*.py")))
        raise ConfigError(f"no config file {name!r}, neither here nor in {folder.name}/, which has {there}")
    try:
        namespace = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"config file {path} does not run: {type(error).__name__}: {error}") from error
    return {key: value for key, value in namespace.items() if not key.startswith("__")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def read_flags(cls: type, argv: list[str], description: str) -> dict[str, Any]:
    """The values of the flags given, by dotted key. `-h` prints every knob and exits. Raises `ConfigError`."""
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key, knob in knobs(cls).items():
        bare = "true" if knob.type is bool else "on" if "on" in knob.choices else None  # what the flag alone means
        shown = "" if knob.default in ("", None) else f" (default {knob.default})"
        parser.add_argument(
            f"--{key}",
            metavar="|".join(knob.choices) if knob.choices else knob.type.__name__,
            help=f"{knob.help}{shown}".replace("%", "%%"),
            **({"nargs": "?", "const": bare} if bare else {}),
        )
    for name in _sections(cls):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{key}" for key in (*knobs(cls), *_sections(cls))]
        name = unknown[0].split("=")[0]
        what = "no flag called" if name.startswith("-") else "unexpected argument"
        raise ConfigError(f"{what} {name}{_nearest(name, flags)}; -h lists every flag")
    flat = flatten(cls, vars(given))
    return dict(zip(flat, read(cls, flat, *flat), strict=True))
