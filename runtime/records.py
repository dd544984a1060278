"""The records of a run, metrics.jsonl and samples.txt, as resuming reads them: even if they are damaged."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.files import write_atomically

# The version of what options mean, raised when the same options come to train differently. In 1, the first step of a
# warm-up had a rate of 0.
RECIPE = 2
READ_BACK = ("loss", "val_loss", "tok_s")  # columns that a resumed run uses: numbers, or null


def to_json(value: Any, **options: Any) -> str:
    """Like `json.dumps`, with null for the numbers that JSON does not have: NaN and the infinities."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reopen_rows(path: Path, at_step: int) -> tuple[list[dict[str, Any]], str]:
    """Drop the rows of metrics.jsonl after `at_step`. Returns the others, and a note if lines were damaged.

    A damaged file is kept under another name."""
    (rows, n_damaged), note = read_rows(path), ""
    if n_damaged:
        kept = _keep(path)
        note = f"{path.name} has {n_damaged} damaged lines, which are left out; {kept.name} has the file as it was"
    rows = [row for row in rows if row["step"] <= at_step]
    write_atomically(path, "".join(to_json(row) + "\n" for row in rows))
    return rows, note


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and the number of damaged lines, which are left out."""
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [row for line in lines if (row := _row(line)) is not None]
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl, or None if it is damaged."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)  # earlier versions wrote NaN
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(type(row.get(key)) in (int, float, type(None)) for key in READ_BACK) else None


def reopen_samples(path: Path, at_step: int) -> tuple[int, str]:
    """Drop the samples of samples.txt after `at_step`, and one of `at_step` that is incomplete.

    Returns the step of the last sample, -1 if there is none, and a note if the file was damaged. Text before the first
    sample is kept; bytes that are not UTF-8 are replaced. A damaged file is kept under another name."""
    content = path.read_bytes()
    text = content.decode("utf-8", "replace")
    preface, *samples = re.split(r"(?m)^(?=--- step \d{1,18} ---$)", text)
    kept = [(step, sample) for sample in samples if (step := int(sample.split()[2])) <= at_step]
    incomplete = bool(kept) and kept[-1][0] == at_step and not kept[-1][1].endswith("\n\n")
    if incomplete:
        kept.pop()
    note = ""
    if incomplete or text.encode() != content:
        note = f"{path.name} is damaged; {_keep(path).name} has the file as it was"
    write_atomically(path, preface + "".join(sample for _, sample in kept))
    return max((step for step, _ in kept), default=-1), note


def _keep(path: Path) -> Path:
    """Copy a damaged file to a name that is free, and return it."""
    copy = free_name(path.with_name(f"{path.name}.damaged"))
    shutil.copyfile(path, copy)
    return copy


def free_name(path: Path) -> Path:
    """`path`, or if it exists the first that does not with a number: name-2.suffix, name-3.suffix."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
