"""Typed configuration from frozen dataclasses. Precedence: defaults < config file < flags.

An option, or knob, is a dataclass field. Its annotation has its help text and the interval of valid values:

    lr: Annotated[float, "(0, inf)", "peak learning rate"] = 3e-3

A name annotated as a `Heading` begins a group of options. A field whose type is a dataclass is a section:
`--model.n_layer=4` sets a knob of it, and `--kernels=torch` its first knob. A config file has plain assignments
(`lr = 1e-3`, `model = dict(n_layer=6)`). Each source is read into a flat dict from dotted key to value, so precedence
is a dict union.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import operator
import re
import runpy
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.errors import UserError

T = TypeVar("T")
Heading = ClassVar[None]  # annotation of a name in a configuration class that begins a group of knobs in `-h`
HELP_COLUMN = 28  # of the text in `-h`


class ConfigError(UserError):
    """An unknown knob, or an invalid value."""


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option. Valid values are in `choices`, if there are any, and in `interval`, such as `[0, 1)`.

    A number may also be one of `words`: the type of its field is then like `Literal["auto"] | int`."""

    key: str
    type: type
    help: str
    default: Any
    choices: tuple[str, ...]
    interval: str
    words: tuple[str, ...] = ()

    def read(self, value: Any) -> Any:
        """Convert `value` to the knob's type: parse a string, and accept an int as a float or a string. Raises
        `ConfigError` for an invalid value."""
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.key} must be {_join_or(self.choices)}, not {value!r}{_suggestion(value, self.choices)}"
            )
        if value in self.words:
            return value
        try:
            value = _convert(value, self.type)
        except (ValueError, KeyError, OverflowError):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
            raise ConfigError(f"{self.key} must be {_join_or((*self.words, kind))}, not {value!r}") from None
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
        if annotation == Heading:
            continue
        if dataclasses.is_dataclass(annotation):
            found |= knobs(annotation, f"{prefix}{name}.")
            continue
        kind, *extras = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        words: tuple[str, ...] = ()
        if get_origin(kind) in (Union, UnionType):
            literal, kind = get_args(kind)
            words = get_args(literal)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        interval, text = ("", "", *extras)[-2:]
        default = cls.__dataclass_fields__[name].default
        found[prefix + name] = Knob(prefix + name, str if choices else kind, text, default, choices, interval, words)
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


def read_flags(cls: type, argv: list[str], doc: str, configs: Path | None = None) -> dict[str, Any]:
    """Parse flags into values by dotted key. Raises `ConfigError`.

    `-h` prints `doc` and the knobs by group, and exits; `-h SECTION` prints those of a section, and `-h all` every one.
    The values shown are those that the other flags give, or the config file, a path or a file of the folder `configs`.
    """
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", nargs="?", const="")
    for key, knob in knobs(cls).items():
        bare = "true" if knob.type is bool else "on" if "on" in knob.choices else None  # value of the flag without one
        parser.add_argument(f"--{key}", **({"nargs": "?", "const": bare} if bare else {}))
    for name in _sections(cls):
        parser.add_argument(f"--{name}")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{key}" for key in (*knobs(cls), *_sections(cls))]
        name = unknown[0].split("=")[0]
        problem = "no flag called" if name.startswith("-") else "unexpected argument"
        raise ConfigError(f"{problem} {name}{_suggestion(name, flags)}; -h lists the flags, and -h all every one")
    section = vars(given).pop("help", None)
    flat = flatten(cls, vars(given))
    flat = dict(zip(flat, read(cls, flat, *flat), strict=True))
    if section is not None:
        file = flatten(cls, read_file(flat["config"], configs)) if configs and "config" in flat else {}
        print(help_text(cls, doc, file | flat, section))
        raise SystemExit(0)
    return flat


def help_text(cls: type, doc: str, values: Mapping[str, Any], section: str = "") -> str:
    """The knobs by group, one a line, with the values of `values` or else their defaults.

    Without a `section` the knobs of all sections are left out, and `doc` comes first; with "all" nothing is left out.
    Raises `ConfigError` for a section that does not exist."""
    sections = _sections(cls)
    if section not in ("", "all", *sections):
        raise ConfigError(f"-h {section}: it must be {_join_or((*sections, 'all'))}{_suggestion(section, sections)}")
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [doc.strip()] if not section and doc else []
    shown: str | None = None
    for key, (knob, group) in _grouped(cls).items():
        name = key.partition(".")[0] if "." in key else ""
        if section != "all" and name != section:
            continue
        if group != shown:
            lines += ["", group]
            shown = group
        kind = "|".join(knob.choices or (*knob.words, knob.type.__name__))
        if knob.type is bool:
            kind = "true|false" if knob.default else ""
        value = values.get(key, knob.default)
        value = f"{value:g}" if isinstance(value, float) else str(value)
        value = {"True": "true", "False": ""}.get(value, value)
        lines += _entry(f"--{key}" + (f"={kind}" if kind else ""), knob.help + (f" [{value}]" if value else ""), width)
    if not section:
        lines += ["", "sections"]
        for name, kind in sections.items():
            summary = inspect.getdoc(kind).partition(".")[0]
            first = dataclasses.fields(kind)[0].name
            lines += _entry(f"-h {name}", f"{summary} (--{name}=... sets {name}.{first})", width)
    return "\n".join(lines)


def _entry(name: str, text: str, width: int) -> list[str]:
    """Lines of `-h` in two columns."""
    lines = textwrap.wrap(text, max(width - HELP_COLUMN, 40), break_on_hyphens=False)
    start = f"  {name}"
    if len(start) < HELP_COLUMN - 1:
        start = start.ljust(HELP_COLUMN) + lines.pop(0)
    return [start, *(" " * HELP_COLUMN + line for line in lines)]


def _grouped(cls: type, prefix: str = "", title: str = "options") -> dict[str, tuple[Knob, str]]:
    """All knobs by dotted key, those of sections last, each with the title of its group."""
    known, hints = knobs(cls, prefix), get_type_hints(cls, include_extras=True)
    found: dict[str, tuple[Knob, str]] = {}
    for name, annotation in hints.items():
        if annotation == Heading:
            title = name.replace("_", " ")
        elif prefix + name in known:
            found[prefix + name] = known[prefix + name], title
    for name, kind in _sections(cls).items():
        found |= _grouped(kind, f"{prefix}{name}.", name)
    return found
