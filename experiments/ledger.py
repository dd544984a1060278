"""The ledger: what came of every trial, a file for each suite and scale, a line for each outcome, never rewritten.

A trial has a place in the report, by its labels, and a run, by its knobs. The latest line of a place holds, so a rerun
supersedes what was there; old lines stay for those who ask how a number came about. A run is known by its key, and
places whose knobs are equal share one.

A line is on the disk whole before its trial counts as done. What a killed process left half-written is passed over when
read, and cut off before the next line.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.spec import Outcome, Scale
from runtime.errors import UserError

STEPS = 8  # rows of training kept of a run, whose metrics.jsonl has all
_POSITION = ("step", "tokens", "seconds")
_LAST = ("memory", "memory_reserved", "memory_retries", "mfu")  # of the last row of training, which has the peaks


class LedgerError(UserError):
    """A ledger that is damaged, or in use by another sweep."""


def place(results: Path, scale: Scale, suite: str) -> Path:
    """The ledger of a suite at a scale."""
    return results / scale / f"{suite}.jsonl"


def history(path: Path) -> list[Outcome]:
    """Every line, oldest first; none where there is no ledger. Raises `LedgerError`."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last newline is torn
    outcomes = []
    for number, line in enumerate(lines, 1):
        try:
            outcomes.append(Outcome(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{path}, line {number}, is no outcome ({error}): mend or remove that line") from error
    return outcomes


def read(path: Path) -> list[Outcome]:
    """The latest outcome of every place, in the order in which the runs began. Raises `LedgerError`."""
    latest = {name(outcome.labels): outcome for outcome in history(path)}
    return sorted(latest.values(), key=lambda outcome: outcome.started)


def name(labels: Mapping[str, Any]) -> str:
    """Labels in a form that compares and hashes, whatever their order."""
    return json.dumps(dict(labels), sort_keys=True)


def append(path: Path, outcome: Outcome) -> None:
    """Add a line, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.truncate(_whole(file))
        file.write(json.dumps(asdict(outcome), separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole(file) -> int:
    """Bytes up to the end of the last whole line."""
    file.seek(0)
    return file.read().rfind(b"\n") + 1


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other sweeps from a ledger, or from the runs' folders, by a file; the system lets go should this process be
    killed. Raises `LedgerError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(f"another sweep holds {path}: wait for it, or give other --results and --out") from None
        yield


def condense(folder: Path) -> dict[str, Any]:
    """What an outcome keeps of a run's folder: `final`, `steps`, `evals` and `diag`, as far as they were written."""
    final, rows = _json(folder / "status.json"), _rows(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    diags = [row for row in rows if "diag" in row]
    if training:
        final = {key: training[-1][key] for key in _LAST if training[-1].get(key) is not None} | final
    kept = {
        "final": final,
        "steps": [_pick(row, *_POSITION, "loss", "lr", "grad_norm") for row in thinned(training, STEPS)],
        "evals": [_pick(row, *_POSITION, "val_loss", "val_bpb") for row in rows if "val_loss" in row],
    }
    if diags:
        series = [_pick(row | row["diag"], *_POSITION, "noise_scale", "coherence") for row in thinned(diags, STEPS)]
        kept["diag"] = diags[-1]["diag"] | {"series": series}
    return kept


def thinned(rows: list, most: int) -> list:
    """At most so many of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]


def _pick(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Some values of a row, numbers to six digits: rows are for figures, and `final` has the exact end."""
    found = {key: row[key] for key in keys if key in row}
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in found.items()}


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's record, without one that it was killed in the middle of."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
