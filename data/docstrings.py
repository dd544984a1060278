"""Extract the docstrings of Python source files by parsing; no code is imported or run.

As a script, this reads one path per line from standard input and writes one line of JSON for each: the list of the
file's docstrings. Parsing dominates the work of the `docstrings` corpus and holds the GIL, so `data.corpora` runs
several of these processes. It does not use multiprocessing, which would fork a process that may run torch's threads, or
import its main module again.
"""

import ast
import gc
import json
import sys
from collections.abc import Iterator

_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstrings(source: bytes) -> list[str]:
    """Docstrings of a module and its classes and functions, in source order, without indentation.

    Returns [] for source that Python 3.11 cannot parse (templates, code for another version), so that every Python
    finds the same.
    """
    if b'"""' not in source and b"'''" not in source:  # this check is much cheaper than parsing
        return []
    try:
        tree = ast.parse(source, feature_version=(3, 11))
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = (ast.get_docstring(node) for node in (tree, *_definitions(tree)))
    return [text for text in found if text]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """All functions and classes below a node. Only statements are visited, since expressions contain no definitions."""
    for block in ("body", "cases", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            if isinstance(statement, _DOCUMENTED):
                yield statement
            yield from _definitions(statement)


def main() -> None:
    gc.disable()  # syntax trees have no cycles, and their many nodes would trigger the collector often
    for path in sys.stdin.read().splitlines():
        with open(path, "rb") as file:
            print(json.dumps(docstrings(file.read())))


if __name__ == "__main__":
    main()
