"""How far something is, to whoever looks at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(say: Callable[[str], None], **options: Any) -> tqdm | None:
    """A bar, or None off a terminal and, which `say` is told, without tqdm: lines are the progress then."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        say("no progress bar: the package tqdm is not installed")
        return None
    return tqdm(**options)
