"""A run's folder and its record."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch

from runtime.hardware import HardwareError, pick_compile, rated_flops, set_up
from runtime.run import Interrupt, Run, RunError, choose_folder, find
from train import ROOT


def choose(out, name="", config="small", resume=False, overwrite=False):
    return choose_folder(out, name, config, resume, overwrite).name


def test_names(tmp_path):
    assert choose(tmp_path) == "small"
    for taken, following in (
        ("small", "small-2"),
        ("small-2", "small-3"),
        ("small-9", "small-10"),
        ("smaller", "small-10"),
    ):
        (tmp_path / taken).mkdir()
        assert choose(tmp_path) == following
    assert choose(tmp_path, resume=True) == "small-9"
    assert choose(tmp_path, "small-2", resume=True) == "small-2"
    assert choose(tmp_path, "small-2", overwrite=True) == "small-2"
    assert choose(tmp_path, overwrite=True) == "small"
    assert choose(tmp_path, "other") == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small", "small-2", "small-9", "smaller"]


def test_names_that_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="mine exists: --resume goes on with it, --overwrite discards it"):
        choose(tmp_path, "mine")
    with pytest.raises(RunError, match="give one of them"):
        choose(tmp_path, "mine", resume=True, overwrite=True)
    with pytest.raises(RunError, match=r"no run to resume at .*gone"):
        choose(tmp_path, "gone", resume=True)
    with pytest.raises(RunError, match="is not a run"):
        find(str(tmp_path / "mine"))


def test_reopening_drops_what_came_after_the_checkpoint(tmp_path):
    folder = tmp_path / "mine"
    run = Run(folder, {})
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0}, "")
        run.add_sample(step, f"--- not a heading\ntext {step}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a row
    again = Run(folder, {}, at_step=2)
    assert [row["step"] for row in again.rows] == [1, 2]
    again.log({"step": 3}, "")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    samples = (folder / "samples.txt").read_text()
    assert "text 2" in samples and "text 3" not in samples and again.sampled == 2


def test_the_summary(tmp_path):
    run = Run(tmp_path / "mine", {})
    for row in ({"tok_s": 1.0}, {"val_loss": 9.0}, {"tok_s": 30.0}, {"tok_s": 50.0}):
        run.log({"step": 1, **row}, "")
    facts = {"step": 4, "tokens": 400, "seconds": 20.0}
    assert run.summary(facts) == facts | {"tok_s_wall": 20.0, "tok_s_steady": 40.0}  # the first row compiled
    run.log({"step": 4, "val_loss": 2.0, "val_bpb": 1.0}, "")
    assert run.summary(facts)["val_loss"] == 2 == run.best()


def test_trouble(tmp_path):
    run = Run(tmp_path / "mine", {})
    run.log({"step": 1, "loss": 3.0}, "")
    assert run.trouble(2.0, 1.0, 100) is None
    assert run.trouble(float("nan"), 1.0, 100) == run.trouble(2.0, float("inf"), 100) == "nan"
    for step in range(2, 7):  # the bound is 1.5 ln 100 = 6.91
        assert run.trouble(7.0, 1.0, 100) is None
        run.log({"step": step, "loss": 7.0}, "")
    assert run.trouble(7.0, 1.0, 100) == "diverged"
    run.log({"step": 7, "loss": 6.8}, "")
    assert run.trouble(6.8, 1.0, 100) is None


def test_the_first_interrupt_is_a_flag_and_the_second_acts():
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "card, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA GeForce RTX 4070 Ti", 80.2), ("NVIDIA GeForce RTX 4070", 58.3),
        ("NVIDIA GeForce RTX 4080 SUPER", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA X1000", None),
        ("AMD Instinct MI300X", 1307), ("Tesla T4", 65), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ],
)  # fmt: skip
def test_rated_speed_is_the_cards_own_or_unknown(card, tflops):
    assert rated_flops(card) == (tflops and tflops * 1e12)


def test_compiling_without_a_compiler_is_said_or_refused(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert pick_compile("auto", cpu) == (False, "no: there is no C++ compiler (g++ or clang++)")
    with pytest.raises(HardwareError, match=r"cannot compile on this machine: there is no C\+\+ compiler"):
        pick_compile("on", cpu)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert pick_compile("auto", cpu) == (False, "no: Python's C headers are missing (python3-dev)")
    assert pick_compile("off", cpu)[0] is False


def test_a_gpu_is_compiled_for_only_when_asked():
    gpu = torch.device("cuda")
    assert pick_compile("auto", gpu) == (False, "no") and pick_compile("on", gpu)[0]


def test_the_gpu_asked_for_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        set_up(torch.device(name), deterministic=False)
    assert current == [torch.device("cuda:1")]


ALLOCATING = """
import resource, torch
from runtime.hardware import set_up
set_up(torch.device("cpu"), deterministic=False)
for _ in range(10):  # the first few grow the heap past what else is in it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")
def test_memory_that_is_freed_is_kept():
    """Allocating it again takes no page from the system, where glibc gives back all of more than 32 MB at once. In a
    process of its own: the settings are for life, and of its main thread's memory."""
    done = subprocess.run([sys.executable, "-c", ALLOCATING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
