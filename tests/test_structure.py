"""What may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package may import itself and what is listed here.
ALLOWED = {
    "kernels": set(),
    "runtime": set(),
    "data": {"runtime"},
    "model": {"kernels", "data", "runtime"},
    "train": {"kernels", "data", "model", "runtime"},
    "bench": {"kernels", "data", "model", "runtime", "train"},
    "experiments": {"kernels", "data", "model", "runtime", "train"},
}
FILES = [path for name in ALLOWED for path in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {name for name in imports(path) if name.partition(".")[0] in ALLOWED}
    assert {name.partition(".")[0] for name in ours} <= ALLOWED[here] | {here}
    if here == "kernels" and path.stem != "__init__":  # ops never import each other, but for the loss in the head
        shared = {"spec", "launch", "common", "formats"}
        shared |= {"cross_entropy"} if path.stem == "linear_cross_entropy" else set()
        assert {name.removeprefix("kernels.").split(".")[0] for name in ours} <= shared


def test_another_package_called_kernels_is_not_needed_by_transformers():
    code = "import sys; sys.path.insert(0, '.'); import kernels, transformers; assert kernels.OPS"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
