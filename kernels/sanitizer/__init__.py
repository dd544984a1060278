"""Triton kernels run and checked on a CPU: README.md here shows how.

`interpreter` makes Triton's interpreter compute what a GPU does; `checks` is a sanitizer built on it. The package
imports nothing of this repository, so that a copy of the folder works on anyone's kernels.
"""

from .checks import Counts, Record, SanitizerError, sanitize
from .interpreter import Observer, install, observe

__all__ = ["Counts", "Observer", "Record", "SanitizerError", "install", "observe", "sanitize"]
