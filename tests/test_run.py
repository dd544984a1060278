"""Run folders, their files, and hardware checks."""

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from model import checkpoint
from runtime.budget import Budget, Length
from runtime.distributed import ALONE
from runtime.files import WriteError, append, is_locked, locked, write_atomically
from runtime.hardware import HardwareError, check_memory, pick_compile, rated_flops, set_up
from runtime.run import ROOT, Run, RunError, choose_folder, find, read_status
from runtime.signals import Interrupt, Interrupted
from runtime.text import say


def choose(out, name="", config="small", resume=False, overwrite=False):
    return choose_folder(out, name, config, resume, overwrite).name


def started(folder, at_step=None):
    run = Run(folder, resume=at_step is not None)
    run.start(at_step)
    return run


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
    with pytest.raises(RunError, match="mine exists: --resume continues it, --overwrite deletes it"):
        choose(tmp_path, "mine")
    with pytest.raises(RunError, match="give one of them"):
        choose(tmp_path, "mine", resume=True, overwrite=True)
    with pytest.raises(RunError, match=r"no run to resume at .*gone"):
        choose(tmp_path, "gone", resume=True)
    with pytest.raises(RunError, match="is not a run"):
        find(str(tmp_path / "mine"))


def test_reopening_drops_what_came_after_the_checkpoint(tmp_path):
    folder = tmp_path / "mine"
    run = started(folder)
    for step in (1, 2, 3):
        run.log({"step": step, "loss": 1.0}, "")
        run.add_sample(step, f"--- not a heading\ntext {step}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as if killed while writing a row
    run.release()
    again = started(folder, at_step=2)
    assert [row["step"] for row in again.rows] == [1, 2]
    again.log({"step": 3}, "")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    samples = (folder / "samples.txt").read_text()
    assert "text 2" in samples and "text 3" not in samples and again.sampled_step == 2


def test_the_summary(tmp_path):
    run = started(tmp_path / "mine")
    for row in ({"tok_s": 1.0}, {"val_loss": 9.0}, {"tok_s": 30.0}, {"tok_s": 50.0}):
        run.log({"step": 1, **row}, "")
    facts = {"step": 4, "tokens": 400, "seconds": 20.0}
    # The steady speed leaves out the first row, which includes compilation.
    assert run.summary(facts) == facts | {"tok_s_wall": 20.0, "tok_s_steady": 40.0}
    run.log({"step": 4, "val_loss": 2.0, "val_bpb": 1.0}, "")
    assert run.summary(facts)["val_loss"] == 2 == run.best()


def test_failure(tmp_path):
    run = started(tmp_path / "mine")
    run.log({"step": 1, "loss": 3.0}, "")
    assert run.failure(2.0, 1.0, 100) is None
    assert run.failure(float("nan"), 1.0, 100) == run.failure(2.0, float("inf"), 100) == "nan"
    for step in range(2, 7):  # the bound is 1.5 ln 100 = 6.91
        assert run.failure(7.0, 1.0, 100) is None
        run.log({"step": step, "loss": 7.0}, "")
    assert run.failure(7.0, 1.0, 100) == "diverged"
    run.log({"step": 7, "loss": 6.8}, "")
    assert run.failure(6.8, 1.0, 100) is None


def test_a_folder_is_held_until_it_is_released(tmp_path):
    """A flock keeps out a second opening of the file in the same process too."""
    run = started(tmp_path / "mine")
    before = contents(run.folder)
    for changes in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(RunError, match=f"process {os.getpid()} is training in .*mine: wait for it to end"):
            Run(run.folder, **changes)
    assert contents(run.folder) == before and read_status(run.folder)["status"] == "running"
    run.release()
    assert read_status(run.folder)["status"] == "killed" and "run.lock" not in contents(run.folder)
    again = Run(run.folder, overwrite=True)  # refused for another reason: nothing is deleted
    again.release()
    assert contents(run.folder).keys() == {"config.json", "status.json"}
    assert read_status(tmp_path) == {}


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    run = started(tmp_path / "mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.lock").write_text("1")  # as a killed process leaves it
    Run(tmp_path / "theirs", resume=True).release()
    waits = []

    def busy(pid):
        waits.append(pid)
        run.release()  # which removes the file: the waiting one must not hold a file that is gone

    with locked(run.folder / "run.lock", busy):
        assert is_locked(run.folder / "run.lock")
    assert waits == [os.getpid()] and not is_locked(run.folder / "run.lock")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


OURS, THEIRS = {"model": {"n_layer": 1}, "data": {"corpus": "x"}}, {"model_type": "llama", "num_hidden_layers": 1}


@pytest.mark.parametrize(
    "files, deletes",
    [
        ({"config.json": OURS, "status.json": {}, "notes.txt": ""}, True),
        ({"config.json": {"model": {"n_layer": 1}, "imported": "x"}, "last.pt": ""}, True),
        ({"config.json": OURS, "run.lock": "7"}, True),  # killed as it began
        ({"run.lock": "7"}, True),
        ({"config.json": OURS, "thesis.tex": ""}, False),
        ({"config.json": THEIRS, "status.json": {}}, False),
        ({"config.json": [OURS], "status.json": {}}, False),
        ({"config.json": OURS | {"model": "llama"}, "status.json": {}}, False),
        ({"thesis.tex": "", "status.json": {}}, False),
    ],
)
def test_only_what_is_surely_a_run_may_be_overwritten(tmp_path, files, deletes):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) if name.endswith(".json") else content)
    before = contents(folder)
    if not deletes:
        with pytest.raises(RunError, match="is not a run"):
            choose(tmp_path, "mine", overwrite=True)
        assert contents(folder) == before
        return
    assert choose(tmp_path, "mine", overwrite=True) == "mine"
    run = Run(folder, overwrite=True)
    assert before.items() - {("run.lock", b"7")} <= contents(folder).items()
    run.start()
    assert contents(folder).keys() == {"config.json", "status.json", "run.lock"}


def test_a_run_of_an_earlier_version_may_be_overwritten(tmp_path):
    for old in (ROOT / "tests/files/a08ca20/adamw", ROOT / "tests/files/a08ca20/muon"):
        shutil.copytree(old, tmp_path / old.name)
        assert choose(tmp_path, old.name, overwrite=True) == old.name


def test_links_are_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    for name, target in (("linked", "run"), ("broken", "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(RunError, match=f"{name} is a link"):
            choose(tmp_path, name, overwrite=True)
        with pytest.raises(RunError, match=f"{name} exists"):
            choose(tmp_path, name)
    run = started(tmp_path / "mine")
    (run.folder / "folder").mkdir()
    (run.folder / "folder" / "link").symlink_to(tmp_path / "run")
    (run.folder / "link").symlink_to(tmp_path / "run")
    run.release()
    Run(run.folder, overwrite=True).start()
    assert (tmp_path / "run").is_dir() and {"link", "folder"}.isdisjoint(contents(run.folder))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_is_a_flag_and_the_second_ends_at_once(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), number)
            assert interrupt.signal == number and interrupt.agree(ALONE, 0.5, True) == (0.5, "interrupted", False)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert [interrupt.agree(ALONE, 0.5, False)[2] for _ in range(2)] == [True, False]
            with pytest.raises(Interrupted, match=f"{name} ended it at once"):
                os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # ignored: the end is being recorded
        with pytest.raises(Interrupted), Interrupt(at_once=True):
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)
        with Interrupt() as interrupt:  # as under nohup
            os.kill(os.getpid(), number)
        assert not interrupt.signal and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_output_that_nobody_reads_is_dropped(monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.stdout", os.fdopen(writing, "w"))
    os.close(reading)
    for _ in range(2):
        say("a line")


class LostTerminal:
    """A progress bar whose terminal was closed."""

    def __getattr__(self, name):
        raise OSError(5, "Input/output error")


def test_a_terminal_that_was_closed_does_not_end_the_run(tmp_path, capsys):
    run = Run(tmp_path / "mine")
    run.start()
    for act in (lambda: run.say("a line"), lambda: run.show_progress(0.5, "note"), lambda: run.close("finished")):
        run.bar, run._bar_opened = LostTerminal(), True
        act()
        assert run.bar is None
    assert capsys.readouterr().out == "a line\nfinished: \n"


def test_the_time_that_is_left(monkeypatch):
    clock = iter((0.0, 30.0, 34.0, 40.0)).__next__
    monkeypatch.setattr("time.perf_counter", clock)
    budget = Budget(Length(steps=12), 100, {"step": 5, "tokens": 500, "seconds": 7.0})  # starts at 0 s
    assert budget.remaining(6) is None  # the first step of this process compiles, until 30 s
    budget.step_ended()
    assert budget.remaining(6) is None and budget.remaining(8) == 4.0 / 2 * 4
    monkeypatch.setattr("time.perf_counter", iter((0.0, 40.0, 99.0)).__next__)
    budget = Budget(Length(seconds=60.0), 100)
    assert (budget.remaining(3), budget.remaining(9)) == (20.0, 0.0)


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path):
    """Files are limited to 20 kB here, which fails as a full disk does."""
    old, size = resource.getrlimit(resource.RLIMIT_FSIZE), 20_000
    folder, path = tmp_path, tmp_path / "text.txt"
    write_atomically(path, "old\n")
    checkpoint.save(folder, {"step": 1})
    before = contents(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        for name, write in (
            ("text.txt", lambda: write_atomically(path, "x" * 2 * size)),
            ("text.txt", lambda: append(path, "x" * 2 * size)),
            ("last.pt", lambda: checkpoint.save(folder, {"step": 2, "model": torch.zeros(size)})),
        ):
            with pytest.raises(WriteError, match=f"cannot write .*{name}: File too large"):
                write()
            assert contents(folder) == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, None),
        ({"n_parameters": 68 * 10**8}, None),
        ({"n_parameters": 69 * 10**8}, "takes at least 138 GB to train and this machine's cpu has 137 GB"),
        ({"n_parameters": 10**30}, "a model of 1,000,000,.* lower model.n_layer, model.d_model"),
        ({"seq_len": 10**12}, "and seq_len 1,000,000,000,000 takes at least .* lower"),
        ({"batch_size": 10**12, "micro_batch": 4}, "a batch of 1,000,000,000,000 sequences takes .* lower batch_size"),
        ({"activations": 10**7, "batch_size": 60, "micro_batch": 60}, "set micro_batch to [1-6] or less"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(monkeypatch, changes, message):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**24, "SC_PAGE_SIZE": 2**13}[name])  # 137 GB
    sizes = {"n_parameters": 10**8, "activations": 10**4, "seq_len": 1000, "batch_size": 32, "micro_batch": 32}
    with pytest.raises(HardwareError, match=message) if message else nullcontext():
        check_memory(torch.device("cpu"), **(sizes | changes))


def test_the_copy_that_a_gpus_checkpoint_is_written_from_must_fit_in_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**13}[name])  # 8.6 GB
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**12))
    sizes = {"activations": 10**4, "seq_len": 1000, "batch_size": 32, "micro_batch": 32}
    check_memory(torch.device("cuda"), n_parameters=10**9, **sizes)
    with pytest.raises(HardwareError, match="at least 16 GB of the host's memory to save and this machine has 8 GB"):
        check_memory(torch.device("cuda"), n_parameters=2 * 10**9, **sizes)


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
for _ in range(10):  # the first few allocations grow the heap
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_that_is_freed_is_kept():
    """Allocating again must cause no page faults; by default glibc returns blocks over 32 MB to the system.

    This runs in a subprocess, because the settings last for the life of a process."""
    done = subprocess.run([sys.executable, "-c", ALLOCATING], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
