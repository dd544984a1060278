"""Docstrings of Python source files, found by parsing: nothing is imported or run.

Run as a script, it reads one path per line on standard input and answers each with one line of JSON, the
list of that file's docstrings. Parsing is most of the work of the `docstrings` corpus and holds Python's
lock, so `data.corpora` shares it out among such processes. They are plain subprocesses because
multiprocessing would fork a parent that may be running torch's threads, or import its main module again.
"""

import ast
import gc
import json
import sys
from collections.abc import Iterator

_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a module and of all it defines, in source order and with indentation removed.

    Source that this Python cannot parse (templates, code for another version) has none.
    """
    if b'"""' not in source and b"'''" not in source:  # seen in no time; parsing is not
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = (ast.get_docstring(node) for node in (tree, *_definitions(tree)))
    return [text for text in found if text]


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """Functions and classes below a node. Only statements are visited: expressions, which are most of a
    tree, hold no definition."""
    for block in ("body", "cases", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            if isinstance(statement, _DOCUMENTED):
                yield statement
            yield from _definitions(statement)


def main() -> None:
    gc.disable()  # a tree has no cycles, and its nodes are many enough to keep the collector busy
    for path in sys.stdin.read().splitlines():
        with open(path, "rb") as file:
            print(json.dumps(docstrings(file.read())))


if __name__ == "__main__":
    main()
