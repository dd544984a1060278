"""The doctor's checks, each on facts that are made up; and what a run says of them."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import KernelChoice, bind
from runtime import doctor
from runtime.doctor import GB, Driver

CARD = Driver(("NVIDIA H100 80GB HBM3",), "535.104", "12.2")


@pytest.mark.parametrize("finding, mend, fact", [
    (doctor.check_python("3.11.2"), "", "3.11.2"),
    (doctor.check_python("3.9.1"), "PYTHON=python3.11", "older than 3.11"),
    (doctor.check_torch("2.13.0+cpu"), "", "2.13.0+cpu"),
    (doctor.check_torch("2.4.1"), "--upgrade 'torch>=2.11'", "older than 2.11"),
    (doctor.check_gpu(None, (), "2.13.0+cpu", None, None), "", "on the CPU"),
    (doctor.check_gpu(CARD, ("NVIDIA H100",), "2.13.0", "13.0", None), "", "NVIDIA H100"),
    (doctor.check_gpu(CARD, (), "2.13.0+cpu", None, None), "--torch-backend=auto", "built without CUDA"),
    (doctor.check_gpu(CARD, (), "2.13.0", "13.0", None), "--torch-backend=auto",
     "driver 535.104 runs CUDA up to 12.2, and this torch is built for 13.0"),
    (doctor.check_gpu(CARD, (), "2.13.0", "12.8", ""), "unset CUDA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES is ''"),
    (doctor.check_gpu(CARD, (), "2.13.0", "12.8", None), "torch.cuda.init()", "does not see NVIDIA H100"),
    (doctor.check_gpu(Driver(error="no devices"), (), "2.13.0", "12.8", None), "modprobe nvidia", "no devices"),
    (doctor.check_gpu(Driver(), (), "2.13.0", "12.8", None), "", "on the CPU"),
    (doctor.check_triton("3.7.1", "Linux", True), "", "3.7.1"),
    (doctor.check_triton("3.2.0", "Linux", False), "--upgrade 'triton>=3.6'", "older than 3.6"),
    (doctor.check_triton(None, "Linux", False), "", "on a CPU kernels are torch's"),
    (doctor.check_triton(None, "Linux", True), "install 'triton>=3.6'", "not installed"),
    (doctor.check_triton(None, "Darwin", False), "", "published for Linux"),
    (doctor.check_compiler("/usr/bin/gcc", True, True), "", "gcc"),
    (doctor.check_compiler(None, True, True), "install -y g++", "`auto` takes torch's"),
    (doctor.check_compiler(None, True, False), "install -y g++", "torch.compile is off"),
    (doctor.check_compiler("/usr/bin/gcc", False, True), "install -y python3-dev", "headers"),
    (doctor.check_gpu_memory(70 * GB, 80 * GB), "", "70.0 of 80.0 GB"),
    (doctor.check_gpu_memory(9 * GB, 80 * GB), "nvidia-smi", "other processes"),
    (doctor.check_memory(16 * GB), "", "16.0 GB"),
    (doctor.check_memory(GB), "ps aux", "1.0 GB free"),
    (doctor.check_disk(Path("here"), 50 * GB), "", "here"),
    (doctor.check_disk(Path("here"), GB), "du -sh", "may fill it"),
    (doctor.check_hub("https://hub", "", {}), "", "https://hub"),
    (doctor.check_hub("https://hub", "timed out", {}), "export HTTPS_PROXY", "timed out"),
    (doctor.check_hub("https://hub", "503", {"https_proxy": "http://p"}), "export HF_ENDPOINT", "https_proxy=http://p"),
    (doctor.check_hub("https://hub", "", {"HF_HUB_OFFLINE": "1"}), "unset HF_HUB_OFFLINE", "in its cache"),
    (doctor.check_wandb(True, True), "", "logged in"),
    (doctor.check_wandb(True, False), "wandb login", "not logged in"),
    (doctor.check_wandb(False, False), "install wandb", "not installed"),
], ids=lambda value: value.name if isinstance(value, doctor.Finding) else "")  # fmt: skip
def test_each_trouble_has_the_command_that_mends_it(finding, mend, fact):
    assert fact in finding.fact and mend in finding.mend and bool(mend) == bool(finding.mend), finding
    assert str(finding).startswith("MEND" if mend else "ok") and "\n" not in finding.mend


SMI = "| NVIDIA-SMI 535.104   Driver Version: 535.104   CUDA Version: 12.2 |"


@pytest.mark.parametrize("answers, driver", [
    ({"-L": (0, "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"), "": (0, SMI)}, CARD),
    ({"-L": (9, "couldn't communicate\n with the driver"), "": (9, "")},
     Driver(error="couldn't communicate with the driver")),
    ({}, Driver(error="no such program")),
], ids=["card", "driver without answer", "not executable"])  # fmt: skip
def test_what_nvidia_smi_answers_is_read(answers, driver, monkeypatch):
    def run(command, **options):
        if not answers:
            raise OSError("no such program")
        code, text = answers["".join(command[1:])]
        return SimpleNamespace(returncode=code, stdout=text, stderr="")

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    assert doctor.ask_driver() == driver
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.ask_driver() is None


def test_the_hub_is_asked_for_an_answer():
    assert "unknown url type" in doctor.ask_hub("nowhere")
    assert doctor.ask_hub("http://127.0.0.1:1")


def test_only_what_training_needs_sets_the_exit_code(monkeypatch, capsys):
    fine, optional = doctor.check_torch("2.13.0"), doctor.check_wandb(True, False)
    monkeypatch.setattr(doctor, "examine", lambda: [fine, optional])
    assert doctor.main([]) == 0 and "$ " in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [fine, doctor.check_torch("2.4.0")])
    assert doctor.main([]) == 1


def test_every_check_runs_on_this_machine(monkeypatch):
    monkeypatch.setattr(doctor, "ask_hub", lambda endpoint: "")
    assert [finding.name for finding in doctor.examine() if finding.name != "memory"] == [
        "Python", "torch", "GPU", "Triton", "compiler", "disk", "hub", "W&B"
    ]  # fmt: skip


def test_a_run_says_in_a_line_that_torch_does_not_see_the_gpu(run, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine_gpu", lambda: doctor.check_gpu(CARD, (), "2.13.0+cpu", None, None))
    assert run(device="cpu", steps=1)[0] == 0 and "built without CUDA" not in capsys.readouterr().out
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert run("--overwrite", device="auto", steps=1)[0] == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "built without CUDA" in line]
        assert line.startswith("doctor   torch 2.13.0+cpu does not see NVIDIA H100") and "uv pip install" in line


def test_without_a_c_compiler_auto_takes_torch(monkeypatch):
    monkeypatch.setattr(kernels, "c_compiler", lambda: None)
    names = bind(KernelChoice(), "cuda").names
    assert names["swiglu"] == names["rope"] == "torch" and names["attention"] == "sdpa"
    monkeypatch.setattr(doctor, "examine_compiler", lambda: doctor.check_compiler(None, True, True))
    assert "`auto` takes torch's" in doctor.warnings(torch.device("cuda"), "auto")[0]
