"""The folder of a run and the files in it.

    config.json     the configuration                      samples.txt   generated samples, by step
    metrics.jsonl   one row of metrics per logged step     loss.png      the loss curves
    status.json     the run's current or final status      *.pt          checkpoints
    tokenizer.json  the tokenizer, which generation needs     run.lock      held by the process that trains

Rows can also be sent to Weights & Biases and TensorBoard: runtime/trackers.py.
"""

import gc
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any

from runtime import trackers
from runtime.distributed import World
from runtime.errors import UserError, error_message
from runtime.failure import Failure, Status
from runtime.files import append, is_locked, locked, replacing, write_atomically
from runtime.phase import phase
from runtime.progress import progress_bar
from runtime.records import reopen_rows, reopen_samples, to_json
from runtime.text import say, shortened, typed
from runtime.trackers import Tracker

LOCK = "run.lock"
ROOT = Path(__file__).parents[1]


class RunError(UserError):
    """A run that cannot be created, found or written to."""


def open_run(out: Path, name: str, config_name: str, resume: bool, overwrite: bool, world: World) -> "Run":
    """Open the run that the options ask for, as `choose_folder` does; `Run.resumes` says whether it has a checkpoint.

    A job that its launcher has restarted goes on with the run that it has begun, from the last checkpoint, or from
    nothing if there is none yet. Raises `RunError`."""
    begun = _of_job(out, name, config_name, world.job) if world.restarted else None
    if begun:
        resume = (begun / "last.pt").exists()
        overwrite = not resume
    return Run(begun or choose_folder(out, name, config_name, resume, overwrite), resume, overwrite, world.job)


def choose_folder(out: Path, name: str, config_name: str, resume: bool, overwrite: bool) -> Path:
    """Choose the folder of a run to start or resume, without creating it. Raises `RunError`.

    A run without a name gets that of its config, with a number if it exists: small, small-2, small-3. Resuming without
    a name takes the one with the highest number.
    """
    if name and (name != Path(name).name or name == ".."):
        raise RunError(f"run must be a name, not the path {name!r}: --out sets the folder of all runs")
    if resume and overwrite:
        raise RunError("--resume continues a run and --overwrite deletes it: give one of them")
    folder = out / (name or config_name)
    if resume:
        found = folder if name else max(numbered(out, config_name), key=_number, default=folder)
        if not found.is_dir():
            raise RunError(f"no run to resume at {found}{_runs_in(out)}")
        return found
    exists = os.path.lexists(folder)  # a link that leads nowhere exists too
    if overwrite and folder.is_symlink():
        raise RunError(f"{folder} is a link, so --overwrite does not delete it: choose another name")
    if overwrite and exists and not _may_be_deleted(folder):
        raise RunError(
            f"{folder} is not a run (no config.json and status.json of one), so --overwrite does not delete it: "
            "choose another name"
        )
    if exists and not overwrite:
        if name:
            raise RunError(f"run {folder} exists: --resume continues it, --overwrite deletes it")
        folder = out / f"{config_name}-{_number(max(numbered(out, config_name), key=_number)) + 1}"
    return folder


def _of_job(out: Path, name: str, config_name: str, job: str) -> Path | None:
    """The folder of the run that the launcher's `job` has begun, if any."""
    folders = [out / name] if name else numbered(out, config_name)
    return next((folder for folder in folders if job and read_status(folder).get("job") == job), None)


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _may_be_deleted(folder: Path) -> bool:
    """Whether `folder` is an empty folder, or one that train.py or model.export has written as a run.

    Other programs write a config.json too; only ours describes a model in a section of its own."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if names <= {LOCK}:
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = "n_layer" in config["model"] and ("imported" in config or "corpus" in config["data"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return ours and ("imported" in config or "status.json" in names or names <= {LOCK, "config.json"})


def read_status(folder: Path) -> dict[str, Any]:
    """Read a run's status.json: its `status` with the facts that were recorded with it; {} if it cannot be read.

    A run that was killed could not record it. It reads as "killed": its status is "running", and no process holds its
    lock."""
    try:
        recorded = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(recorded, dict):
        return {}
    if recorded.get("status") == "running" and not is_locked(folder / LOCK):
        recorded["status"] = "killed"
    return recorded


def numbered(out: Path, name: str) -> list[Path]:
    """The folders in `out` of runs that are called `name`, or that with a number: small, small-2."""
    return [p for p in out.glob(f"{name}*") if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)]


def _number(folder: Path) -> int:
    match = re.search(r"-(\d+)$", folder.name)
    return int(match[1]) if match else 1


def _runs_in(out: Path) -> str:
    names = sorted(p.parent.name for p in out.glob("*/config.json"))
    return f"; {out} has {', '.join(names)}" if names else f"; {out} has no runs"


def check_writable(folder: Path, size: int) -> None:
    """Raise `RunError` unless `folder` can be created and its disk has `size` bytes free. Creates nothing."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        raise RunError(f"cannot write to {parent}: {error.strerror}; choose another folder with --out") from error
    if free < size:
        raise RunError(
            f"{parent} has {free / 1e6:,.0f} MB free and this run's checkpoints take {size / 1e6:,.0f} MB; "
            "choose another folder with --out"
        )


def run_folder(path: str) -> Path:
    """The folder of a run given as a path or, without a slash, by its name in out/. It may not exist."""
    return Path("out", path) if path == Path(path).name else Path(path)


def find(path: str) -> Path:
    """Return the folder of an existing run, to read it; `path` is as in `run_folder`, or a folder here.

    Raises `RunError`."""
    folder = run_folder(path)
    found = next((f for f in (folder, Path(path)) if _is_run(f)), None)
    if found is None:
        raise RunError(f"{folder} is not a run (no config.json){_runs_in(folder.parent)}")
    return found


class Run:
    """Writes the files of a run, and its lines and progress bar on the terminal.

    A lock in the folder keeps other processes out, from here for an existing folder and from `start` for a new one,
    until `release`."""

    def __init__(self, folder: Path, resume: bool = False, overwrite: bool = False, job: str = ""):
        """A run in `folder`, which is not written to before `start`. `job` is the id of the launcher's job, by which a
        restarted one finds its run. Raises `RunError` if another process trains in the folder to resume or overwrite.
        """
        self.folder, self.rows, self.bar = folder, [], None
        self.trackers: list[Tracker] = []
        self.config: dict[str, Any] = {}  # what `start` writes to config.json
        self.resumes, self.job = resume, job
        self.opening: list[str] = []  # lines for `start` to print
        self.sampled_step = -1  # step of the last sample
        self.best_after = 0  # the evaluations after this step are all on one set, and so comparable
        self.status: Status | None = None  # as written to status.json; None before `start`
        self._existing = (resume or overwrite) and folder.exists()
        self._before = read_status(folder) if self._existing else {}
        self.overwrites, self._held = overwrite and self._existing, ExitStack()
        self._bar_opened, self._sample_failed = False, False
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.txt"
        if self._existing:
            self._lock()

    def _lock(self) -> None:
        def refuse(pid: int) -> None:
            process = f"process {pid}" if pid else "another process"
            raise RunError(f"{process} is training in {self.folder}: wait for it to end, or give --run another name")

        try:
            self._held.enter_context(locked(self.folder / LOCK, busy=refuse))
        except OSError as error:
            raise RunError(f"cannot write to {self.folder}: {error.strerror}") from error

    def start(self, at_step: float | None = None) -> None:
        """Create the folder, empty it to overwrite it, or open it to resume at the checkpoint of `at_step`.

        Rows and samples after `at_step` are dropped, because training will write them again. Of damaged files what is
        good is kept. Raises `RunError` if another process has created the folder since `choose_folder`."""
        folder, notes = self.folder, []
        if not self._existing:
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                raise RunError(f"another run has just started in {folder}: start again, or give --run a name") from None
            self._lock()
        elif self.overwrites:
            _empty(folder)
        self.status = "running"  # from here on an error is recorded
        if self._metrics.exists():
            self.rows, note = reopen_rows(self._metrics, at_step)
            notes.append(note)
        if self._samples.exists():
            self.sampled_step, note = reopen_samples(self._samples, at_step)
            notes.append(note)
        for line in self.opening:
            self.say(line)
        for note in filter(None, notes):
            self.say(f"damaged  {note}")
        write_atomically(folder / "config.json", to_json(self.config, indent=2) + "\n")
        self.set_status("running")

    def is_finished(self) -> bool:
        """Whether the run's folder says that the run is finished."""
        return read_status(self.folder).get("status") == "finished"

    def release(self) -> None:
        """Let other processes use the folder."""
        self._held.close()

    def set_status(self, status: Status, **facts: Any) -> None:
        """Write status.json."""
        self.status = status
        job = {"job": self.job} if self.job else {}
        facts = {"status": status, "time": time.strftime("%FT%T%z"), **job, **facts}
        write_atomically(self.folder / "status.json", to_json(facts, indent=2) + "\n")

    @phase("logging")
    def log(self, row: dict[str, Any], line: str = "") -> None:
        """Append a row to metrics.jsonl, and print `line` if there is one."""
        self.rows.append(row)
        append(self._metrics, to_json(row) + "\n")
        for tracker in list(self.trackers):
            try:
                tracker.log(row)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(f"{tracker.title} is off from here: {error}")
        if line:
            self.say(line)

    def log_restart(self, row: dict[str, Any], ranks: int) -> None:
        """Log, with the columns of `row`, that the launcher has restarted the run, and how it had ended before."""
        ended = ": ".join(self._before[key] for key in ("status", "error") if key in self._before)
        event = f"restarted on {ranks} rank{'s' * (ranks > 1)}" + (f", after {ended}" if ended else "")
        self.log(row | {"event": event}, f"restart  {event}")

    def failure(self, loss: float, grad_norm: float, vocab_size: int) -> Status | None:
        """Return "nan" or "diverged" if the run has failed, else None.

        A run has diverged if its last five logged losses exceed 1.5 times both the first one and ln(vocab_size), the
        loss of a uniform guess. A run may recover from fewer, which are a spike."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nan"
        losses = [row["loss"] for row in self.rows if row.get("loss") is not None]
        bound = 1.5 * max(math.log(vocab_size), losses[0] if losses else 0.0)
        return "diverged" if len(losses) > 5 and min(losses[-5:]) > bound else None

    def best(self) -> float:
        """Lowest validation loss of the evaluations after the step `best_after`; inf if there is none."""
        rows = [row for row in self.rows if row["step"] > self.best_after]
        return min((row["val_loss"] for row in rows if row.get("val_loss") is not None), default=math.inf)

    def is_best(self, step: int) -> bool:
        """Whether the evaluation of `step` has the lowest validation loss, so that its checkpoint is best.pt."""
        return any(row["step"] == step and row.get("val_loss") == self.best() for row in self.rows)

    def summary(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Add to the final `facts` of a run: tokens per second of wall-clock time (`tok_s_wall`), the median over rows
        without the first, which compiles (`tok_s_steady`), likewise `mfu`, and the validation metrics of the last row,
        if any."""
        facts = facts | {"tok_s_wall": facts["tokens"] / facts["seconds"]}
        if speeds := [row["tok_s"] for row in self.rows if row.get("tok_s") is not None]:
            facts["tok_s_steady"] = median(speeds[1:] or speeds)
        if shares := [row["mfu"] for row in self.rows if row.get("mfu") is not None]:
            facts["mfu"] = median(shares[1:] or shares)
        return facts | {k: v for row in self.rows[-1:] for k, v in row.items() if k.startswith("val_")}

    def add_sample(self, step: int, text: str) -> None:
        """Print the beginning of a sample, and append it to samples.txt. If that fails, this says so once: a run goes
        on without."""
        self.sampled_step = step
        self.say(f"sample   {shortened(text)}")
        try:
            append(self._samples, f"--- step {step} ---\n{text}\n\n")
        except OSError as error:
            if not self._sample_failed:
                self.say(f"samples are lost: {error}")
            self._sample_failed = True

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        try:
            with nullcontext() if self.bar is None else self.bar.external_write_mode():
                say(line)
        except OSError:  # the bar's terminal was closed
            self.bar = None
            say(line)

    def introduce(self, facts: Mapping[str, str | Iterable[str]]) -> None:
        """Say what the run is: a line for each fact, or one for each of several."""
        for label, fact in facts.items():
            for line in [fact] if isinstance(fact, str) else fact:
                self.say(f"{label:8s} {line}")

    def show_progress(self, progress: float, note: str) -> None:
        """Set the progress bar, if stderr is a terminal, to `progress` (0 to 1) and show `note` in it."""
        if not self._bar_opened:
            layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self.bar = progress_bar(self.say, total=1.0, initial=progress, bar_format=layout, leave=False)
            self._bar_opened = True
        if self.bar is not None:
            try:
                self.bar.set_postfix_str(note, refresh=False)
                self.bar.update(progress - self.bar.n)
            except OSError:
                self.bar = None

    def start_trackers(self, names: list[str], config: dict[str, Any], at_step: int = 0) -> None:
        """Send rows to other places too. If one cannot start, the reason is printed: a run goes on without."""
        for name in names:
            try:
                self.trackers.append(trackers.start(name, self.folder, config, at_step))
            except Exception as error:
                title = "W&B" if name in trackers.WANDB_MODES else "TensorBoard"
                self.say(f"{title} is off for this run: {error_message(error)}")

    def plot(self) -> None:
        """Plot the losses to loss.png. If matplotlib is missing or fails, this says so: a run ends well without."""
        try:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(8, 5), layout="constrained")
            axes = figure.subplots()
            for key, style in (("loss", {"alpha": 0.5}), ("val_loss", {"marker": "o"})):
                points = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), label=key, **style)
            axes.set(xlabel="step", ylabel="loss (nats per token)")
            axes.set_title(typed(self.folder.name), parse_math=False)  # a name with two $ is not a formula
            axes.legend()
            with replacing(self.folder / "loss.png") as partial:
                figure.savefig(partial, dpi=110, format="png")
        except ModuleNotFoundError as error:
            self.say(f"no loss.png: the package {error.name} is not installed")
        except Exception as error:
            self.say(f"no loss.png: {error}")

    def close(self, status: Status, **facts: Any) -> None:
        """Write and print the final status, and close the progress bar and the trackers."""
        self.set_status(status, **facts)
        texts = (
            f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        self.say(f"{status}: {', '.join(texts)}")
        results = {"val_bpb": "{:.4f} bits per byte", "tok_s_steady": "{:,.0f} tok/s", "mfu": "{:.1%} MFU"}
        if found := [words.format(facts[key]) for key, words in results.items() if facts.get(key) is not None]:
            self.say(f"result   {', '.join(found)}")
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
            self.bar = None
        for tracker in self.trackers:
            try:
                tracker.finish(status == "finished")
            except Exception as error:
                self.say(f"{tracker.title} could not finish: {error}")

    def compare(self, seconds: float) -> None:
        """Measure what each kernel brings to a run that has ended, by bench/compare.py in a process of its own."""
        import torch  # here, as programs that only read runs need not wait for it

        gc.collect()
        torch.cuda.empty_cache()  # that process needs the GPU's memory
        command = [sys.executable, "-m", "bench.compare", "--run", str(self.folder), f"--seconds={seconds:g}"]
        paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False)

    def say_what_next(self, flag: str) -> None:
        """Say what the run has made, and the commands that use it; `flag` is what resuming it needs, if anything."""
        made = {
            "best.pt": "the model of the lowest validation loss", "last.pt": "the newest checkpoint",
            "samples.txt": "samples", "loss.png": "the loss curves", "metrics.jsonl": "every logged row",
        }  # fmt: skip
        found = [f"{name} ({what})" for name, what in made.items() if (self.folder / name).exists()]
        self.say(f"made     {', '.join(found)} in {self.folder}")
        if not (self.folder / "last.pt").exists():
            return
        python, folder = _interpreter(), str(self.folder)
        out = [] if self.folder.parent == Path("out") else ["--out", str(self.folder.parent)]
        for what, command in (
            ("generate", [python, "-m", "model.generate", "--run", folder]),
            ("export", [python, "-m", "model.export", "--run", folder, "--to", f"{folder}-hf"]),
            ("train on", [python, "train.py", "--run", self.folder.name, *out, "--resume", *([flag] if flag else [])]),
        ):
            self.say(f"{what:8s} {shlex.join(command)}")


class SilentRun(Run):
    """A run on a rank other than 0: it has the same rows, for the same decisions, but writes and prints nothing."""

    def __init__(self, folder: Path):
        super().__init__(folder)

    def start(self, at_step: float | None = None) -> None:
        self.status = "running"

    def set_status(self, status: Status, **facts: Any) -> None:
        self.status = status

    def log(self, row: dict[str, Any], line: str = "") -> None:
        self.rows.append(row)

    def add_sample(self, step: int, text: str) -> None:
        self.sampled_step = step

    def say(self, line: str) -> None:
        pass

    def show_progress(self, progress: float, note: str) -> None:
        pass

    def start_trackers(self, names: list[str], config: dict[str, Any], at_step: int = 0) -> None:
        pass

    def plot(self) -> None:
        pass


def _empty(folder: Path) -> None:
    """Delete all that a run's folder has but its lock, and last the files by which it is known as a run."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name in ("config.json", "status.json")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _interpreter() -> str:
    """How to name the running Python in a command: `python` if that finds it, or else its path."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def end_early(failure: Failure, run: Run | None, step: int) -> int:
    """Record how a run ended early, and say it in a sentence. Returns the exit code.

    `run` is None if there is none yet. Before it has started only a lack of memory is recorded, where that leaves an
    earlier run alone. Nothing is said of a bug of this process, which has a traceback."""
    status, began, where = failure.status, run and run.status, f"{failure.rank}: " if failure.rank else ""
    message = where + failure.message
    if run and (began == "running" or (status == "oom" and not run.overwrites)):
        with suppress(OSError, UserError):  # the disk may be full; `failure` is the one to show
            if not began:
                run.start(at_step=math.inf)
            run.close(status, step=step, error=where + (failure.error or failure.message))
    if failure.is_bug and not failure.rank:
        return 1
    if status == "crashed" and not began and not failure.is_bug:
        say(f"error: {message}", "stderr")
        return 2
    if began and (run.folder / "last.pt").exists():
        message += f"; --resume continues from {run.folder / 'last.pt'}"
    say(f"error: {status} at step {step}: {message}", "stderr")
    return 1


@phase("checkpoint")
def commit() -> str:
    """Abbreviated hash of the checked-out commit, with a + if there are uncommitted changes; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
