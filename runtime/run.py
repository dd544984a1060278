"""The folder of a run and the files in it.

    config.json     the configuration                      samples.txt   generated samples, by step
    metrics.jsonl   one row of metrics per logged step     loss.png      the loss curves
    status.json     the run's current or final status      *.pt          checkpoints
    tokenizer.json  the tokenizer, which generation needs

Rows can also be sent to Weights & Biases.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

from runtime.errors import UserError
from runtime.files import write_atomically
from runtime.hardware import out_of_memory
from runtime.progress import progress_bar

Status = Literal["running", "finished", "diverged", "nan", "oom", "crashed", "interrupted", "time_limit", "unsupported"]


class RunError(UserError):
    """A run that cannot be created or found."""


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
    if overwrite and folder.exists() and not (_is_run(folder) or _is_empty(folder)):
        raise RunError(
            f"{folder} is not a run (no config.json), so --overwrite does not delete it: choose another name"
        )
    if folder.exists() and not overwrite:
        if name:
            raise RunError(f"run {folder} exists: --resume continues it, --overwrite deletes it")
        folder = out / f"{config_name}-{_number(max(_numbered(out, config_name), key=_number)) + 1}"
    return folder


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


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


def find(path: str) -> Path:
    """Return the folder of an existing run, to read it. Raises `RunError`."""
    folder = Path(path)
    if not _is_run(folder):
        raise RunError(f"{folder} is not a run (no config.json){_runs_in(folder.parent)}")
    return folder


class Run:
    """Writes the files of a run, and its lines and progress bar on the terminal."""

    def __init__(self, folder: Path, config: dict[str, Any], at_step: int | None = None):
        """Create `folder`, or open it to resume at the checkpoint of `at_step`.

        Rows and samples after `at_step` are dropped, because training will write them again. Raises `RunError` if
        another process has created the folder since `choose_folder`."""
        try:
            folder.mkdir(parents=True, exist_ok=at_step is not None)
        except FileExistsError:
            raise RunError(f"another run has just started in {folder}: start again, or give --run a name") from None
        self.folder, self.rows, self.bar, self.wandb = folder, [], None, None
        self.sampled_step = -1  # step of the last sample
        self._bar_opened = False
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.txt"
        if self._metrics.exists():
            self.rows = [row for row in _read_rows(self._metrics) if row["step"] <= at_step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._samples.exists():
            samples = re.split(r"(?m)^(?=--- step \d+ ---$)", self._samples.read_text())
            kept = {int(s.split()[2]): s for s in samples if s and int(s.split()[2]) <= at_step}
            write_atomically(self._samples, "".join(kept.values()))
            self.sampled_step = max(kept, default=-1)
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.set_status("running")

    def set_status(self, status: Status, **facts: Any) -> None:
        """Write status.json."""
        facts = {"status": status, "time": time.strftime("%FT%T%z"), **facts}
        write_atomically(self.folder / "status.json", json.dumps(facts, indent=2) + "\n")

    def log(self, row: dict[str, Any], line: str = "") -> None:
        """Append a row to metrics.jsonl, and print `line` if there is one."""
        self.rows.append(row)
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if line:
            self.say(line)

    def failure(self, loss: float, grad_norm: float, vocab_size: int) -> Status | None:
        """Return "nan" or "diverged" if the run has failed, else None.

        A run has diverged if its last five logged losses exceed 1.5 times both the first one and ln(vocab_size), the
        loss of a uniform guess. A run may recover from fewer, which are a spike."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "nan"
        losses = [row["loss"] for row in self.rows if "loss" in row]
        bound = 1.5 * max(math.log(vocab_size), losses[0] if losses else 0.0)
        return "diverged" if len(losses) > 5 and min(losses[-5:]) > bound else None

    def best(self) -> float:
        """Lowest validation loss so far; inf before the first evaluation."""
        return min((row["val_loss"] for row in self.rows if "val_loss" in row), default=math.inf)

    def summary(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Add to the final `facts` of a run: tokens per second of wall-clock time (`tok_s_wall`), the median over rows
        without the first, which compiles (`tok_s_steady`), and the validation metrics of the last row, if any."""
        facts = facts | {"tok_s_wall": facts["tokens"] / facts["seconds"]}
        if speeds := [row["tok_s"] for row in self.rows if "tok_s" in row]:
            facts["tok_s_steady"] = median(speeds[1:] or speeds)
        return facts | {k: v for row in self.rows[-1:] for k, v in row.items() if k.startswith("val_")}

    def add_sample(self, step: int, text: str) -> None:
        """Append a sample to samples.txt."""
        self.sampled_step = step
        with self._samples.open("a") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self.bar.write(line) if self.bar is not None else print(line, flush=True)

    def show_progress(self, progress: float, note: str) -> None:
        """Set the progress bar, if stderr is a terminal, to `progress` (0 to 1) and show `note` in it."""
        if not self._bar_opened:
            layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self.bar = progress_bar(self.say, total=1.0, initial=progress, bar_format=layout, leave=False)
            self._bar_opened = True
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(progress - self.bar.n)

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
        """Plot the losses to loss.png, if matplotlib is installed."""
        try:
            import matplotlib
        except ModuleNotFoundError:
            self.say("no loss.png: the package matplotlib is not installed")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for key, style in (("loss", {"alpha": 0.5}), ("val_loss", {"marker": "o"})):
            points = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, **style)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=self.folder.name)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=110)
        plt.close(figure)

    def close(self, status: Status, **facts: Any) -> None:
        """Write and print the final status, and close the progress bar and W&B."""
        self.set_status(status, **facts)
        texts = (
            f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        self.say(f"{status}: {', '.join(texts)}")
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb:
            self.wandb.finish(exit_code=0 if status == "finished" else 1)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, without the last line if a killed process left it incomplete."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def status_of(error: BaseException) -> Status:
    """The status of a run that ended with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "oom" if out_of_memory(error) else "crashed"


def error_message(error: Exception) -> str:
    """The message to print for an error that the user can fix."""
    if isinstance(error, ModuleNotFoundError):
        return f"this configuration needs the package {error.name}, which is not installed"
    return str(error)


def commit() -> str:
    """Abbreviated hash of the checked-out commit, with a + if there are uncommitted changes; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Interrupt:
    """A context that turns the first SIGINT or SIGTERM into a flag, so that the current step can end and be saved.

    `signal` is the signal's number, or 0. A second signal has its usual effect.
    """

    def __enter__(self):
        self.signal = 0
        self._previous_handlers = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
