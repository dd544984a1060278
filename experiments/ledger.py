"""The ledger: how every trial ended. One JSONL file for each suite and scale, one line for each outcome.

Lines are only appended. The latest line of a key counts, so a rerun supersedes earlier outcomes, which stay in the
file. A line is on disk before its trial counts as done. If a process is killed while it writes one, `read` ignores the
incomplete line, and the next `append` removes it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from experiments.spec import Outcome, Scale
from runtime import files
from runtime.errors import UserError
from runtime.records import read_rows, to_json

ROWS = 20  # evaluations, and steps with diagnostics, that an outcome keeps; metrics.jsonl has all of them
_PEAKS = ("memory", "memory_reserved", "memory_retries", "mfu")  # of the last row of training
_TEXT = ("status", "time", "error")  # in status.json; its other values are numbers
_OPTIONAL = ("error", "final", "steps", "evals", "diag", "digest")  # left out of a line where they are empty
_KINDS = {
    **dict.fromkeys(("key", "suite", "status", "started", "commit", "machine", "error", "digest"), str),
    **dict.fromkeys(("labels", "knobs", "final", "diag"), dict),
    **dict.fromkeys(("steps", "evals"), (list, tuple)),
    **dict.fromkeys(("seconds", "recipe"), (int, float)),
}


class LedgerError(UserError):
    """A ledger that is damaged, or in use by another sweep."""


def place(results: Path, scale: Scale, suite: str) -> Path:
    """The ledger of a suite at a scale."""
    return results / scale / f"{suite}.jsonl"


def read(path: Path) -> list[Outcome]:
    """All outcomes of a ledger, oldest first; [] if there is no ledger. Raises `LedgerError` for a damaged line, and
    `OSError` if the path is no file."""
    outcomes = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last newline is torn
    for number, line in enumerate(lines, 1):
        try:
            outcomes.append(Outcome(**json.loads(line)))
            _check(outcomes[-1])
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{path}, line {number}, is no outcome ({error}): mend or remove that line") from error
    return outcomes


def _check(outcome: Outcome) -> None:
    """Raise `TypeError` if a field is of another type than readers expect."""
    for name, kind in _KINDS.items():
        if not isinstance(value := getattr(outcome, name), kind):
            raise TypeError(f"{name} is {value!r}")
    for values in (outcome.final, *outcome.steps, *outcome.evals, {"seed": outcome.labels.get("seed", 0)}):
        if not isinstance(values, dict):
            raise TypeError(f"a row is {values!r}")
        for name, value in values.items():
            if name not in _TEXT and not isinstance(value, int | float | None):
                raise TypeError(f"{name} is {value!r}")


def append(path: Path, outcome: Outcome) -> None:
    """Append an outcome; it is on disk when this returns. Raises `OSError`."""
    fields = {name: value for name, value in asdict(outcome).items() if value or name not in _OPTIONAL}
    line = to_json(fields, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context that holds the lock of a ledger, or of a folder of runs.

    Raises `LedgerError` if another sweep holds it, and `OSError`."""

    def refuse(pid: int) -> NoReturn:
        raise LedgerError(f"another sweep holds {path}: wait for it, or give other --results and --out")

    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path.with_suffix(".lock"), busy=refuse):
        yield


def condense(folder: Path) -> dict[str, Any]:
    """The fields of an outcome that come from a run's folder: `final`, `steps`, `evals`, and `diag` if there are any
    diagnostics. The files may be missing or incomplete."""
    from runtime.run import read_status

    final, metrics = read_status(folder), folder / "metrics.jsonl"
    rows, _ = read_rows(metrics) if metrics.exists() else ([], 0)
    training = [row for row in rows if "loss" in row]
    diagnosed = [row | row["diag"] for row in rows if "diag" in row]
    peaks = {key: training[-1][key] for key in _PEAKS if training and training[-1].get(key) is not None}
    exact = {key: final[key] for key in ("val_loss", "val_bpb") if key in final}
    kept = {
        "final": _pick(peaks | final, *peaks, *final) | exact,
        "steps": [_pick(row, "step", "seconds", "loss") for row in thinned(training, 2)],
        "evals": [_pick(row, "step", "seconds", "val_loss") for row in thinned([r for r in rows if "val_loss" in r])],
    }
    if diagnosed:
        series = [_pick(row, "step", "noise_scale", "coherence") for row in thinned(diagnosed)]
        gradient = diagnosed[-1].get("gradient", {})
        kept["diag"] = {"gradient": _pick(gradient, *gradient), "series": series}
    return kept


def thinned(rows: list, most: int = ROWS) -> list:
    """At most `most` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]


def _pick(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The numbers of a row under these keys, to six digits."""
    found = {key: row[key] for key in keys if isinstance(row.get(key, ""), int | float | None)}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in found.items()}
