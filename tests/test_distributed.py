"""Several ranks: the same training as by one, and an end as one. Ranks are forked, and meet over gloo."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import Launcher, brief, code_of, forks, kill_launcher  # noqa: F401
from recording import Eager, Recorded, emulate_graphs

import model.run_data
import runtime.capture
import train
from model import checkpoint
from runtime import hardware
from runtime.capture import WARM_UP
from runtime.distributed import ALONE, Ranks, joined
from runtime.errors import UserError
from runtime.failure import Failure
from runtime.files import WriteError
from runtime.hardware import HardwareError
from runtime.launcher import Launch, LaunchError
from runtime.run import read_status

pytestmark = forks

QUIET = {"batch_size": 8, "log_every": 1, "eval_every": 10, "save_every": 99, "eval_tokens": 1000}


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path / "said")


class Job:
    """Runs of train.py on forked ranks."""

    def __init__(self, tiny, out, launcher):
        self.tiny, self.out, self.launcher = tiny, out, launcher

    def flags(self, **changes):
        return self.tiny(self.out, **QUIET | {"run": "mine"} | changes)

    def folder(self, run="mine"):
        return self.out / run

    def __call__(self, size, *extra, **changes):
        """Train on `size` ranks. Returns the exit codes and the run's folder."""
        flags = [*self.flags(**changes), *extra]
        return self.launcher.run(size, lambda rank: train.main(flags)), self.folder(changes.get("run", "mine"))


@pytest.fixture
def job(tiny, tmp_path, launcher):
    return Job(tiny, tmp_path / "out", launcher)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    columns = ("step", "loss", "grad_norm", "val_loss")
    return [{column: row[column] for column in columns if column in row} for row in rows(folder) if "event" not in row]


def assert_same_training(folder, expected):
    """In float64, where the order of a sum changes so little that any wrong factor shows."""
    for row, other in zip(losses(folder), losses(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    ours, theirs = (checkpoint.load(f / "last.pt") for f in (folder, expected))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=1e-7, atol=1e-9)
    for a, b in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=1e-7, atol=1e-9)


KINDS = {
    "adamw": {"optimizer": "adamw"},
    "muon on documents": {"optimizer": "muon", "data.packing": "documents", "model.window": "SL:8"},
}


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The folders of runs on one process, in float64."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_default_dtype(torch.float64)
    try:
        for name, knobs in KINDS.items():
            assert train.main(tiny(out, run=name, **QUIET, **knobs, steps=20)) == 0
    finally:
        torch.set_default_dtype(torch.float32)
    return out


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind, size, micro_batch", [
    ("adamw", 2, 0), ("adamw", 4, 1), ("muon on documents", 2, 2), ("muon on documents", 4, 0),
])  # fmt: skip
def test_ranks_train_as_one_process_does(job, alone, float64, kind, size, micro_batch):
    codes, folder = job(size, run=kind, micro_batch=micro_batch, steps=20, **KINDS[kind])
    assert codes == [0] * size
    assert_same_training(folder, alone / kind)


def test_diagnostics_are_of_the_whole_batch(job, float64):
    """Four micro-batches on one rank are the same as two on each of two."""
    knobs = {"micro_batch": 2, "diag": 3, "steps": 6, "eval_every": 99}
    for name, size in (("one", 1), ("two", 2)):
        assert job(size, run=name, **knobs)[0] == [0] * size
    one, two = ([row for row in rows(job.folder(name)) if "diag" in row] for name in ("one", "two"))
    assert [row["step"] for row in two] == [3, 6] and losses(job.folder("one"))[5]["loss"] is not None
    for row, other in zip(two, one, strict=True):
        for measure, value in other["diag"].items():
            assert row["diag"][measure] == pytest.approx(value, rel=1e-6), measure
    assert [row["tok_s_rank"] for row in rows(job.folder("two")) if "tok_s" in row]


def test_replayed_steps_equal_eager_ones(job, launcher, monkeypatch):
    """Graphs of forward, backward and update are emulated; none may contain an operation between ranks. Between them
    gradients are summed, as DDP sums them, and Muon's updates gathered."""
    knobs = {"steps": WARM_UP + 5, "micro_batch": 2, "eval_every": 99, "optimizer": "muon"}
    emulate_graphs(monkeypatch)
    eager, replayed = job.flags(run="eager", **knobs), job.flags(run="replayed", **knobs)

    def replay(rank):
        code = train.main(replayed)
        # Four steps replay both passes, and three the update's two graphs; the rest are of the last evaluation.
        assert Recorded.replays == 4 * 2 + 3 * 2 + 3
        return code

    assert launcher.run(2, replay) == [0, 0], launcher.said()
    monkeypatch.setattr(runtime.capture, "Captured", Eager)
    assert launcher.run(2, lambda rank: train.main(eager)) == [0, 0]
    ours, theirs = (checkpoint.load(job.folder(name) / "last.pt") for name in ("replayed", "eager"))
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    for a, b in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert losses(job.folder("replayed")) == losses(job.folder("eager"))
    monkeypatch.undo()
    assert job(2, run="ddp", **knobs)[0] == [0, 0]
    for row, other in zip(losses(job.folder("ddp")), losses(job.folder("eager")), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a"}
TORCHRUN |= {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
TORCHRUN |= {"TORCHELASTIC_RUN_ID": "none"}
SCRIPT = {key: TORCHRUN[key] for key in TORCHRUN if not key.startswith("TORCHELASTIC")}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "12345"}


def test_launchers_say_which_rank_a_process_is():
    launch = Launch(5, 8, 1, 4, "a", 29500, supervised=True, agent=True, restarts=2)
    assert Launch.read(TORCHRUN) == Launch.read(TORCHRUN | SLURM) == launch
    assert Launch.read(SCRIPT) == replace(launch, supervised=False, agent=False, restarts=0)
    assert Launch.read(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}) == replace(launch, job="x")
    launch = Launch(5, 8, 1, 4, "gpu07", 22345, supervised=True, job="slurm-12345")
    assert Launch.read(SLURM) == launch
    chosen = {"MASTER_ADDR": "b", "MASTER_PORT": "1", "SLURM_RESTART_COUNT": "3"}
    assert Launch.read(SLURM | chosen) == replace(launch, address="b", port=1, restarts=3)


@pytest.mark.parametrize("nodes, first", [("a", "a"), ("a1,b[2-3]", "a1"), ("a[1,5],b", "a1"), ("a[09-12,20]", "a09")])
def test_the_first_node_of_slurms_list_keeps_the_store(nodes, first):
    assert Launch.read(SLURM | {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "5,4(x3)"}).address == first


@pytest.mark.parametrize("env", [{}, {"WORLD_SIZE": "2"}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8"}])
def test_a_process_without_a_launcher_is_alone(env, monkeypatch):
    assert Launch.read(env) is None
    monkeypatch.delenv("RANK", raising=False)
    with joined(print) as world:
        assert world is ALONE and not torch.distributed.is_initialized()
    assert (world.broadcast(7), world.gather(7), world.sum(7), world.max(7, 8)) == (7, [7], [7], [7, 8])


@pytest.mark.parametrize("env", [
    {"RANK": "0", "WORLD_SIZE": "2"}, TORCHRUN | {"RANK": "x"}, SLURM | {"SLURM_NODEID": "9"},
])  # fmt: skip
def test_half_a_launcher_is_refused(env):
    with pytest.raises(LaunchError, match=r"the launcher's variables name no rank: .*; start the job with torchrun"):
        Launch.read(env)


def test_each_rank_has_its_own_card(monkeypatch):
    ranks = Ranks(5, 8, 1, 4)
    assert ranks.device("auto") == ranks.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks.device("auto") == ranks.device("cuda") == "cuda:1" and ranks.device("cpu") == "cpu"
    assert replace(ranks, job="slurm-1").device("auto") == "cuda:0"  # each task sees its own card alone
    with pytest.raises(LaunchError, match="device cuda:1 is one, and 8 ranks take one each: use --device=cuda or cpu"):
        ranks.device("cuda:1")
    assert replace(ranks, size=1).device("cuda:1") == ALONE.device("cuda:1") == "cuda:1"


def test_only_rank_0_speaks(job, launcher):
    codes, _ = job(2, steps=2)
    assert codes == [0, 0] and launcher.said(1, "out") == launcher.said(1) == launcher.said(0) == ""
    assert "finished: step 2" in launcher.said(0, "out")


def at_step(number, act, rank=1):
    """Have one rank `act(trainer)` when it is to take the step after `number`. To be called in all ranks."""
    take = train.Trainer.accumulate

    def acting(self, *args):
        if self.world.rank == rank and self.step == number:
            act(self)
        return take(self, *args)

    train.Trainer.accumulate = acting


def poison(trainer):
    next(trainer.model.parameters()).data.fill_(math.nan)


def run_out_of_memory(trainer):
    raise torch.OutOfMemoryError("tried to allocate 80 GB")


def fill_the_disk(trainer):
    raise WriteError(28, "No space left on device", "a/file")


def fail_in_an_operator(trainer):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def fail_as_nccl_does(trainer):
    raise torch.distributed.DistBackendError("ncclRemoteError: remote process exited or there was a network error")


def send(name):
    return lambda trainer: os.kill(os.getpid(), getattr(signal, name))


ENDS = {
    "nan": (poison, "nan", 1, ""),
    "signal": (send("SIGTERM"), "interrupted", 1, ""),
    "time limit": (lambda trainer: time.sleep(1.1), "time_limit", 0, ""),
    "out of memory": (run_out_of_memory, "oom", 1, "rank 1 .*: tried to allocate 80 GB; --micro_batch=.* needs less"),
    "full disk": (fill_the_disk, "crashed", 1, "rank 1 .*: cannot write a/file: No space left on device"),
    "bug": (fail_in_an_operator, "crashed", 1, "rank 1 .*: RuntimeError: mat1 and mat2 shapes .*"),
    "kill": (send("SIGKILL"), "crashed", 1, r"rank 1 \(process \d+ on .*\) died"),
}


@pytest.mark.parametrize("act, status, code, message", ENDS.values(), ids=ENDS)
def test_what_happens_to_one_rank_ends_all(job, launcher, monkeypatch, act, status, code, message):
    if act is ENDS["bug"][0]:
        monkeypatch.setattr("runtime.distributed.LOST_S", 0.1)
    flags = job.flags(log_every=5, save_every=3, time_limit=int(status == "time_limit"))
    codes = launcher.run(2, lambda rank: at_step(4, act) or train.main(flags))
    assert codes == [code, -signal.SIGKILL if act is ENDS["kill"][0] else code]
    recorded, folder = read_status(job.folder()), job.folder()
    assert (recorded["status"], recorded["step"]) == (status, 4 if message else 5)
    sentence = f"error: {status} at step 4: {message}.*; --resume continues from .*/last.pt\n" if message else ""
    assert re.fullmatch(sentence, launcher.said(0))
    assert ("Traceback" in launcher.said(1)) == (act is ENDS["bug"][0])
    assert not (folder / "run.lock").exists()
    assert checkpoint.load(folder / "last.pt")["step"] == (5 if status in ("interrupted", "time_limit") else 3)


def test_a_failed_operation_is_the_fault_of_the_rank_that_died(job, launcher):
    flags = job.flags(save_every=3)

    def run(rank):
        at_step(4, fail_as_nccl_does, rank=0)
        at_step(4, send("SIGKILL"))
        return train.main(flags)

    assert launcher.run(2, run) == [1, -signal.SIGKILL]
    assert re.fullmatch(r"error: crashed at step 4: rank 1 \(process \d+ on .*\) died; .*\n", launcher.said(0))


@pytest.mark.parametrize("error, may_be_lost", [
    (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:6053"), True),
    (torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:127, unhandled system error"), True),
    (torch.distributed.DistNetworkError("The client socket has timed out after 4000ms"), True),
    (torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /a"), True),
    (torch.OutOfMemoryError("CUDA out of memory"), False), (ZeroDivisionError("division by zero"), False),
    (HardwareError("no GPU"), False), (KeyboardInterrupt(), False),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None)  # fmt: skip
def test_an_error_that_may_be_the_sign_of_another_ranks_death(error, may_be_lost):
    assert Failure.of(error, (UserError,)).may_be_lost == may_be_lost


def refused(rank, flags, at):
    """Train, and have rank `at` find no GPU."""
    if rank == at:
        hardware.pick_device = raising(HardwareError("device 'cuda:1' is not on this machine"))
    return train.main(flags)


def raising(error):
    def raises(*args):
        raise error

    return raises


@pytest.mark.parametrize("at", [0, 1])
def test_a_refusal_of_one_rank_is_all_ranks(job, launcher, at):
    flags = job.flags(batch_size=6)
    assert launcher.run(3, lambda rank: refused(rank, flags, at)) == [2, 2, 2]
    who = r"rank 1 \(process \d+ on .*\): " if at else ""
    assert re.fullmatch(f"error: {who}device 'cuda:1' is not on this machine\n", launcher.said(0))
    assert launcher.said(1) == launcher.said(2) == "" and not job.folder().exists()


@pytest.mark.parametrize("flags, message", [
    ("--lr=fast", "lr must be a number, not 'fast'"),
    ("--batch_size=7", r"batch_size 7 must be a multiple of 2 \(2 ranks\), such as 6 or 8"),
    ("--micro_batch=8", r"batch_size 8 must be a multiple of 16 \(2 ranks x micro_batch 8\), such as 16"),
    ("--data.corpus=/nowhere", ".*/nowhere.*"), ("--eval_only", "no run to resume at .*"),
    ("--print_config --device=cuda:99", "device 'cuda:99' is not .*"), ("-h nothing", "-h nothing: it must be .*"),
], ids=lambda flags: flags)  # fmt: skip
def test_bad_input_is_refused_once(job, launcher, flags, message):
    codes, folder = job(2, *flags.split())
    assert codes == [2, 2] and re.fullmatch(f"error: {message}\n", launcher.said(0)) and launcher.said(1) == ""
    assert not folder.exists()


def test_other_data_on_one_rank_is_refused(job, launcher):
    def run(rank):
        if rank:
            model.run_data.fingerprints = lambda *args: {"text": "another"}
        return train.main(flags)

    flags = job.flags()
    assert launcher.run(2, run) == [2, 2]
    assert re.fullmatch("error: the prepared text of .* is another on rank 1 than on rank 0\n", launcher.said(0))


@pytest.mark.parametrize("flag, said", [
    ("-h", "--micro_batch"), ("--print_config", "# flag: full, over 2 ranks"), ("--eval_only", "perplexity"),
])  # fmt: skip
def test_what_is_done_in_place_of_training_is_done_once(job, alone, float64, launcher, flag, said):
    flags = job.tiny(alone, run="adamw", **QUIET, shard="full")
    assert launcher.run(2, lambda rank: train.main([*flags, flag])) == [0, 0]
    assert launcher.said(0, "out").count(said) == 1
    assert launcher.said(0) == launcher.said(1) == launcher.said(1, "out") == ""


def test_rank_0_may_die_too(job, launcher):
    flags = job.flags(batch_size=6, save_every=3)
    codes = launcher.run(3, lambda rank: at_step(4, send("SIGKILL"), rank=0) or train.main(flags))
    assert codes == [-signal.SIGKILL, 1, 1] and read_status(job.folder())["status"] == "killed"
    assert re.search(r"error: crashed at step 4: rank 0 \(process \d+ on .*\) died", launcher.said(1))
    assert "error:" not in launcher.said(2)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_ends_the_others(job, launcher, monkeypatch, stopped):
    """As one on a machine that is gone. With rank 0 the store is, where others ask how the job is."""
    monkeypatch.setattr("runtime.distributed.DEAD_S", 3.0)
    monkeypatch.setattr("runtime.distributed.LINGER_S", 0.0)
    flags = job.flags(save_every=3)
    pids = launcher.start(2, lambda rank: at_step(4, send("SIGSTOP"), stopped) or train.main(flags))
    code = code_of(pids[1 - stopped])
    os.kill(pids[stopped], signal.SIGKILL)
    assert (code, code_of(pids[stopped])) == (1, -signal.SIGKILL)
    sentence = rf"error: crashed at step \d: rank {stopped} .* has not been heard of for 3 s; --resume"
    assert re.search(sentence, launcher.said(1 - stopped))


def test_ranks_end_with_a_launcher_that_is_killed_before_they_have_met(launcher):
    """One of them waits for the other, which does something else."""
    launcher.die_in(2, lambda rank: kill_launcher() if rank else train.main(["-h"]))
    assert launcher.said(0) == "error: the launcher was killed before its ranks had met\n" and not launcher.said(1)


def test_a_launcher_is_watched_before_torch_is_imported():
    script = "import runtime, sys, time; print('torch' in sys.modules, flush=True); time.sleep(60); print('still here')"
    command = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, script]
    options = {"env": os.environ | TORCHRUN, "cwd": Path(train.__file__).parent, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **options) as shell:
        assert shell.stdout.readline() == b"False\n"
        shell.kill()
        assert shell.stdout.read() == b""


def test_a_script_that_starts_ranks_may_end_before_them(monkeypatch):
    monkeypatch.setattr("runtime.launcher.PARENT", -1)
    assert [Launch.read(env).was_killed() for env in (TORCHRUN, SLURM, SCRIPT)] == [True, True, False]


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """The folder of a run that one of two ranks has interrupted after 10 steps of 20, in float64."""
    out = tmp_path_factory.mktemp("interrupted")
    flags = tiny(out, run="mine", **QUIET, **KINDS["muon on documents"], steps=20)
    torch.set_default_dtype(torch.float64)
    try:
        codes = Launcher(out / "said").run(2, lambda rank: at_step(9, send("SIGTERM")) or train.main(flags))
    finally:
        torch.set_default_dtype(torch.float32)
    assert codes == [1, 1] and checkpoint.load(out / "mine" / "last.pt")["step"] == 10
    return out / "mine"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_of_two_ranks_goes_on_with_any_number(job, interrupted, alone, float64, size):
    shutil.copytree(interrupted, job.folder())
    assert job(size, "--resume", **KINDS["muon on documents"], steps=20)[0] == [0] * size
    assert_same_training(job.folder(), alone / "muon on documents")


DROPOUT = {"model.dropout": 0.2, "steps": 8, "save_every": 4, "eval_every": 8}


def test_a_run_whose_launcher_was_killed_goes_on_under_torchrun(job, launcher):
    """It ends as an undisturbed one, bit by bit, with the dropout of each rank."""
    assert job(2, run="whole", **DROPOUT)[0] == [0, 0]
    flags = job.flags(**DROPOUT)
    launcher.die_in(2, lambda rank: at_step(5, lambda trainer: kill_launcher()) or train.main(flags))
    assert re.search("error: crashed at step 5: the launcher of rank [01] .* was killed; --resume", launcher.said())
    shutil.copytree(job.folder(), job.folder("other"))
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--", train.__file__]
    done = subprocess.run([*torchrun, *flags, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0 and "finished: step 8" in done.stdout and "error" not in done.stderr
    ours, theirs = (checkpoint.load(job.folder(run) / "last.pt") for run in ("mine", "whole"))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert losses(job.folder()) == losses(job.folder("whole"))
    assert not torch.equal(ours["rng"], ours["rank_rng"][0]["rng"])
    assert job(1, "--resume", run="other", **DROPOUT)[0] == [0]  # whose masks are others, derived anew
    assert losses(job.folder("other"))[:4] == losses(job.folder("whole"))[:4]
    assert "rank_rng" not in checkpoint.load(job.folder("other") / "last.pt")


@pytest.mark.parametrize("name", ["named", ""])
def test_a_restarted_run_resumes_by_itself_with_the_ranks_there_are(job, launcher, alone, float64, name):
    """Even if it is killed before its first checkpoint, and whatever runs of its name there were before."""
    knobs = {"run": name, "save_every": 6, "steps": 20} | KINDS["adamw"]
    (job.folder("small") / "x").mkdir(parents=True)  # so that the run without a name is small-2
    flags, folder = job.flags(**knobs), job.folder(name or "small-2")
    for size, step in ((2, 3), (2, 8), (4, 14)):
        codes = launcher.run(size, lambda rank, step=step: at_step(step, send("SIGKILL")) or train.main(flags))
        assert codes == [1, -signal.SIGKILL, 1, 1][:size]
    assert launcher.run(1, lambda rank: train.main(flags)) == [0]
    events = [(row["step"], row["event"]) for row in rows(folder) if "event" in row]
    assert [step for step, _ in events] == [0, 6, 12]
    assert re.fullmatch(r"restarted on 1 rank, after crashed: rank 1 \(process \d+ on .*\) died", events[2][1])
    assert_same_training(folder, alone / "adamw")
    assert sorted(path.name for path in job.out.iterdir()) == sorted({"small", folder.name})
