"""Install what nanofuse needs, with the PyTorch that sees this machine's GPU: `make train` and `make test` run this.

    python runtime/install.py .venv test experiments      # the environment, and extras of pyproject.toml
    TORCH=cu126 python runtime/install.py .venv           # another of PyTorch's wheel indexes; "default": none
    python runtime/install.py --oldest .venv-oldest test  # the oldest versions that pyproject.toml allows

It runs before anything is installed, so it needs only the standard library. The wheel index is chosen on a machine with
a GPU; without one, torch comes from the package index that pip is set up with. uv installs where there is one, and pip
where there is none or uv fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = "https://download.pytorch.org/whl/"
# The oldest driver of each CUDA's builds, newest first (NVIDIA's CUDA Compatibility; a minor version's needs only that
# of its major version, but 12.8's are those that know the cards of their time).
DRIVERS = {"cu130": 580, "cu128": 570, "cu126": 525}
BEFORE_TURING = "cu126"  # the last builds for cards of compute capability below 7.5
ROCM = "rocm6.4"
INDEXES = (*DRIVERS, ROCM, "cpu")
Ask = Callable[..., str]  # what a command prints, "" if there is none or it fails


class InstallError(Exception):
    """This machine cannot be set up as it is. The message says what would help."""


def ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def wheel_index(env: Mapping[str, str], ask: Ask) -> str:
    """The name of PyTorch's wheel index for this machine, "" for the package index alone.

    The variable TORCH names one in its place. Raises `InstallError` for another name, and for a driver too old."""
    if wanted := env.get("TORCH", ""):
        if wanted not in (*INDEXES, "default") and not re.fullmatch(r"cu\d{3}|rocm\d+\.\d+", wanted):
            raise InstallError(f"TORCH is {wanted!r}: it must be one of {', '.join(INDEXES)} or default")
        return "" if wanted == "default" else wanted
    cards = ask("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")
    if match := re.search(r"^(\d+)\.[\d.]+, *(\d+)\.(\d+)", cards, re.MULTILINE):
        driver, *capability = map(int, match.groups())
        fitting = [name for name, oldest in DRIVERS.items() if driver >= oldest]
        if not fitting:
            raise InstallError(
                f"NVIDIA's driver {driver} is too old for any build of this torch: update it to {DRIVERS['cu126']} or "
                "later, or set TORCH=cpu to train on the CPU"
            )
        return BEFORE_TURING if capability < [7, 5] else fitting[0]
    return ROCM if re.search(r"\bgfx\d", ask("rocminfo")) else ""


def commands(python: str, index: str, extras: list[str], constraints: str, uv: str | None) -> list[list[list[str]]]:
    """Ways to install, best first; each is a list of commands to the `python` of an environment."""
    gpu = index not in ("", "cpu")
    wanted = {*extras, *(["parquet"] if gpu else [])}  # the default text on a GPU is in Parquet files
    if index.startswith("rocm"):
        wanted.discard("kernels")  # torch brings its own Triton
    project = f".[{','.join(sorted(wanted))}]" if wanted else "."
    fixed = ["--quiet", "-c", constraints]
    pip = [python, "-m", "pip", "install", *fixed]
    ways = [[*([[*pip, "--index-url", WHEELS + index, "torch"]] if index else []), [*pip, project]]]
    if uv:
        backend = ["--torch-backend", index] if index else []
        ways.insert(0, [[uv, "pip", "install", "--python", python, *fixed, *backend, project]])
    return ways


def oldest(project: Mapping) -> list[str]:
    """Constraints that pin every dependency to its lower bound."""
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    bounds = (re.match(r"([\w-]+)>=([\w.]+)", requirement) for requirements in lists for requirement in requirements)
    return sorted({f"{match[1]}=={match[2]}" for match in bounds if match})


def main(argv: list[str]) -> int:
    flags = [argument for argument in argv if argument.startswith("-")]
    if set(flags) - {"--oldest"} or len(argv) == len(flags):
        print("usage: python runtime/install.py [--oldest] FOLDER [EXTRA ...]", file=sys.stderr)
        return 2
    folder, *extras = (argument for argument in argv if argument not in flags)
    try:
        index = wheel_index(os.environ, ask)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not Path(folder, "bin").is_dir():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraints = ROOT / "constraints.txt"
    if flags:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        constraints = Path(folder).resolve() / "oldest.txt"
        constraints.write_text("\n".join(oldest(project)) + "\n")
    if index:
        print(f"torch comes from {WHEELS}{index}", flush=True)
    python = str(Path(folder).resolve() / "bin" / "python")
    code = 1
    for way in commands(python, index, extras, str(constraints), shutil.which("uv")):
        code = next(filter(None, (subprocess.run(command, cwd=ROOT).returncode for command in way)), 0)
        if not code:
            return 0
        print(f"{Path(way[0][0]).name} failed", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
