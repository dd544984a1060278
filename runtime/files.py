"""Files that are there whole, or as they were."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole or, after a crash, as it was before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
