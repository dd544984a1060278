"""Text that programs read and print. It is UTF-8, whatever the locale."""

import io
import os
import sys
from datetime import timedelta
from typing import Literal


def use_utf8() -> None:
    """Make stdout and stderr write UTF-8. What UTF-8 lacks, as in a path that is not UTF-8, is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook may have put another kind of stream there
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def typed(argument: str) -> str:
    """Text that was typed on the command line, which Python has decoded by the locale.

    Bytes that are not UTF-8 become U+FFFD. This is for text alone: a changed path would name another file."""
    return os.fsencode(argument).decode("utf-8", "replace")


def say(line: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print a line. If it cannot be written, because a pipe or terminal was closed or a disk is full, it is dropped
    with all that follows it: a run does not end because nobody reads its output."""
    try:
        print(line, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


def duration(seconds: float) -> str:
    """Seconds as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def shortened(text: str, length: int = 100) -> str:
    """The beginning of a text in one line, with … where it is cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
