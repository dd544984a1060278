"""The folder of a run and the files in it.

    config.json     the configuration                      samples.txt   generated samples, by step
    metrics.jsonl   one row of metrics per logged step     loss.png      the loss curves
    status.json     the run's current or final status      *.pt          checkpoints
    tokenizer.json  the tokenizer, which generation needs     run.lock      held by the process that trains

Rows can also be sent to Weights & Biases.
"""

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
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from statistics import median
from typing import Any, Literal

from runtime.errors import UserError, error_message
from runtime.files import append, is_locked, locked, replacing, write_atomically
from runtime.hardware import largest_micro_batch, out_of_memory
from runtime.progress import progress_bar
from runtime.records import reopen_rows, reopen_samples, to_json
from runtime.text import say, typed

Status = Literal[
    "running", "finished", "diverged", "nan", "oom", "crashed", "interrupted", "killed", "time_limit", "unsupported"
]  # "killed" is never written: a run that says "running" and whose lock is free was killed
LOCK = "run.lock"


class RunError(UserError):
    """A run that cannot be created, found or written to."""


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
        found = folder if name else max(_numbered(out, config_name), key=_number, default=folder)
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
        folder = out / f"{config_name}-{_number(max(_numbered(out, config_name), key=_number)) + 1}"
    return folder


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


def _numbered(out: Path, name: str) -> list[Path]:
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

    def __init__(self, folder: Path, resume: bool = False, overwrite: bool = False):
        """A run in `folder`, which is not written to before `start`. Raises `RunError` if another process trains in the
        folder to resume or overwrite."""
        self.folder, self.rows, self.bar, self.wandb = folder, [], None, None
        self.config: dict[str, Any] = {}  # what `start` writes to config.json
        self.sampled_step = -1  # step of the last sample
        self.status: Status | None = None  # as written to status.json; None before `start`
        self._existing = (resume or overwrite) and folder.exists()
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
        facts = {"status": status, "time": time.strftime("%FT%T%z"), **facts}
        write_atomically(self.folder / "status.json", to_json(facts, indent=2) + "\n")

    def log(self, row: dict[str, Any], line: str = "") -> None:
        """Append a row to metrics.jsonl, and print `line` if there is one."""
        self.rows.append(row)
        append(self._metrics, to_json(row) + "\n")
        if self.wandb:
            try:
                self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
            except Exception as error:
                self.wandb = None
                self.say(f"W&B is off from here: {error}")
        if line:
            self.say(line)

    def failure(self, loss: float, grad_norm: float, vocab_size: int) -> Status | None:
        """Return "nan" or "diverged" if the run has failed, else None.

        A run has diverged if its last five logged losses exceed 1.5 times both the first one and ln(vocab_size), the
        loss of a uniform guess. A run may recover from fewer, which are a spike."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nan"
        losses = [row["loss"] for row in self.rows if row.get("loss") is not None]
        bound = 1.5 * max(math.log(vocab_size), losses[0] if losses else 0.0)
        return "diverged" if len(losses) > 5 and min(losses[-5:]) > bound else None

    def best(self, after: int = 0) -> float:
        """Lowest validation loss of the evaluations after the step `after`; inf if there is none."""
        losses = [row["val_loss"] for row in self.rows if row["step"] > after and row.get("val_loss") is not None]
        return min(losses, default=math.inf)

    def is_best(self, step: int, after: int = 0) -> bool:
        """Whether the evaluation of `step` has the lowest validation loss of those after the step `after`."""
        return any(row["step"] == step and row.get("val_loss") == self.best(after) for row in self.rows)

    def summary(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Add to the final `facts` of a run: tokens per second of wall-clock time (`tok_s_wall`), the median over rows
        without the first, which compiles (`tok_s_steady`), and the validation metrics of the last row, if any."""
        facts = facts | {"tok_s_wall": facts["tokens"] / facts["seconds"]}
        if speeds := [row["tok_s"] for row in self.rows if row.get("tok_s") is not None]:
            facts["tok_s_steady"] = median(speeds[1:] or speeds)
        return facts | {k: v for row in self.rows[-1:] for k, v in row.items() if k.startswith("val_")}

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt. If that fails, this says so once: a run goes on without."""
        self.sampled_step = step
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

    def start_wandb(self, mode: Literal["off", "offline", "online"], config: dict[str, Any]) -> None:
        """Send rows to Weights & Biases; a resumed run continues its W&B run.

        This never prompts and never fails: if W&B cannot start, the reason is printed."""
        if mode == "off":
            return
        try:
            import wandb

            if mode == "online":
                wandb.Api()  # raises if there is no API key; `init` would prompt for it
            earlier = sorted(self.folder.glob("wandb/*run-*-*"))  # sorted by date; each name ends in the W&B run's id
            self.wandb = wandb.init(
                project="nanofuse", name=self.folder.name, dir=self.folder, config=config, mode=mode,
                id=earlier[-1].name.rpartition("-")[2] if earlier else None, resume="allow",
                settings=wandb.Settings(silent=True, init_timeout=30),
            )  # fmt: skip
        except Exception as error:
            self.say(f"W&B is off for this run: {error}")

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
        """Write and print the final status, and close the progress bar and W&B."""
        self.set_status(status, **facts)
        texts = (
            f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        self.say(f"{status}: {', '.join(texts)}")
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
            self.bar = None
        if self.wandb:
            try:
                self.wandb.finish(exit_code=0 if status == "finished" else 1)
            except Exception as error:
                self.say(f"W&B could not finish: {error}")

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


def end_early(error: BaseException, run: Run | None, step: int, refusals: tuple[type[Exception], ...]) -> int | None:
    """Record how a run ended with `error`, and say it in a sentence. Returns the exit code; None for a bug, an error
    that is neither of the user's making, `refusals`, nor a signal or a lack of memory.

    `run` is None if there is none yet. Before it has started only a lack of memory is recorded, where that leaves an
    earlier run alone."""
    status, began, message = status_of(error), run and run.status, error_message(error)
    if run and (began == "running" or (status == "oom" and not run.overwrites)):
        with suppress(OSError, UserError):  # the disk may be full; `error` is the one to show
            if not began:
                run.start(at_step=math.inf)
            run.close(status, step=step, error=f"{type(error).__name__}: {error}")
    if status == "crashed" and not isinstance(error, refusals):
        return None
    if status == "crashed" and not began:
        say(f"error: {message}", "stderr")
        return 2
    if began and status == "oom":
        batch_size, micro_batch = run.config["batch_size"], run.config["micro_batch"]
        if smaller := largest_micro_batch(batch_size, (micro_batch or batch_size) // 2):
            message += f"; --micro_batch={smaller} needs less memory"
    if began and (run.folder / "last.pt").exists():
        message += f"; --resume continues from {run.folder / 'last.pt'}"
    say(f"error: {status} at step {step}: {message}", "stderr")
    return 1


def status_of(error: BaseException) -> Status:
    """The status of a run that ended with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "oom" if out_of_memory(error) else "crashed"


def commit() -> str:
    """Abbreviated hash of the checked-out commit, with a + if there are uncommitted changes; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
