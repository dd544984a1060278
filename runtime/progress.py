"""Progress bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(say: Callable[[str], None], **options: Any) -> tqdm | None:
    """Return a tqdm bar with these `options`, or None if stderr is not a terminal or tqdm is not installed.

    `say` is told about a missing tqdm. Callers print lines if there is no bar."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        say("no progress bar: the package tqdm is not installed")
        return None
    return tqdm(**options)
