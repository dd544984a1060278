"""Atomic file writes."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. After a crash it holds either the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
