"""The choice of PyTorch's wheels, on machines that are made up, and the commands that install them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from runtime import doctor, errors, install
from runtime.install import ROOT, InstallError, commands, oldest, wheel_index

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ROCMINFO = "Agent 2\n  Name:                    gfx942\n  Marketing Name:          AMD Instinct MI300X\n"


def machine(smi="", rocminfo=""):
    return lambda program, *flags: {"nvidia-smi": smi, "rocminfo": rocminfo}[program]


@pytest.mark.parametrize("smi, rocminfo, index", [
    ("", "", ""),
    ("580.65.06, 9.0\n", "", "cu130"),
    ("595.45.04, 12.0\n595.45.04, 12.0\n", "", "cu130"),
    ("570.86.15, 10.0\n", "", "cu128"),
    ("535.104.05, 8.0\n", "", "cu126"),
    ("580.65.06, 7.0\n", "", "cu126"),
    ("", ROCMINFO, "rocm6.4"),
    ("", "Agent 1\n  Name:  AMD EPYC 9654\n", ""),
    ("NVIDIA-SMI has failed\n", "", ""),
], ids=["CPU", "H100", "5090s", "B200", "A100 of an old driver", "V100", "MI300X", "ROCm without a GPU",
        "broken"])  # fmt: skip
def test_the_driver_decides_the_index(smi, rocminfo, index):
    assert wheel_index({}, machine(smi, rocminfo)) == index
    assert wheel_index({"TORCH": "default"}, machine(smi, rocminfo)) == ""
    assert wheel_index({"TORCH": "cpu"}, machine(smi, rocminfo)) == "cpu"


def test_what_cannot_be_installed_is_refused():
    with pytest.raises(InstallError, match=r"driver 470 is too old .* TORCH=cpu"):
        wheel_index({}, machine("470.82.01, 8.6\n"))
    with pytest.raises(InstallError, match=r"TORCH is 'gpu': it must be one of cu130, .*, cpu or default"):
        wheel_index({"TORCH": "gpu"}, machine())


def test_without_a_gpu_pip_installs_from_its_own_index():
    assert commands("python", "", ["test"], "pins", None) == [
        [["python", "-m", "pip", "install", "--quiet", "-c", "pins", ".[test]"]]
    ]


def test_torch_comes_from_the_index_of_the_gpu():
    pip = ["python", "-m", "pip", "install", "--quiet", "-c", "pins"]
    torch, rest = [*pip, "--index-url", "https://download.pytorch.org/whl/cu128", "torch"], [*pip, ".[parquet]"]
    assert commands("python", "cu128", [], "pins", None) == [[torch, rest]]
    uv, fallback = commands("python", "cu128", [], "pins", "/bin/uv")
    assert fallback == [torch, rest] and uv == [
        ["/bin/uv", "pip", "install", "--python", "python", "--quiet", "-c", "pins", "--torch-backend", "cu128",
         ".[parquet]"]
    ]  # fmt: skip


def test_rocm_has_a_triton_of_its_own():
    ((*_, (*_, project)),) = commands("python", "rocm6.4", ["test", "kernels"], "pins", None)
    assert project == ".[parquet,test]"


def test_every_lower_bound_is_pinned():
    pins = oldest(PROJECT)
    assert {"torch==2.11", "triton==3.6", "numpy==1.26", "pyarrow==15"} <= set(pins)
    assert len(pins) == sum(map(len, [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]))
    bounds = dict(pin.split("==") for pin in pins)
    assert (bounds["torch"], bounds["triton"]) == (doctor.OLDEST_TORCH, doctor.OLDEST_TRITON)


def test_an_error_names_the_extra_that_has_the_package():
    extras = {
        re.match(r"[\w-]+", requirement)[0]: extra
        for extra, requirements in PROJECT["optional-dependencies"].items() for requirement in requirements
    }  # fmt: skip
    assert all(extras[package.replace("_", "-")] == extra for package, extra in errors.EXTRAS.items())
    missing = ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow.parquet")
    assert errors.error_message(missing).endswith("pyarrow, which is not installed: pip install '.[parquet]'")


def test_the_program_runs_alone_and_uses_pip_where_uv_fails(tmp_path):
    """Without this environment's packages; with a uv that fails and an environment whose pip only records."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    for path, script in ((tmp_path / "uv", "exit 3"), (folder / "python", f'echo "$@" >> {tmp_path}/said')):
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    command = [sys.executable, "-IS", str(Path(install.__file__)), str(tmp_path / "env"), "test"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/bin", "TORCH": "default"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "uv failed\n")
    said = (tmp_path / "said").read_text()
    assert said.startswith("-m pip install --quiet -c") and said.endswith(".[test]\n")
    assert subprocess.run(command[:-2], capture_output=True).returncode == 2
    assert subprocess.run(command, env={"TORCH": "gpu"}, capture_output=True).returncode == 2
