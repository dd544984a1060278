"""A run's folder: what is recorded there, and who may write to it.

    config.json     the resolved configuration        samples.txt   what the model wrote, by step
    metrics.jsonl   one row a logged step: the record  loss.png      the curves
    status.json     how the run stands or ended        *.pt          checkpoints
    tokenizer.json  all that generation needs besides

W&B mirrors the rows when asked to; the files are the record.
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
    """A run that cannot be made, or cannot be found."""


def choose_folder(out: Path, name: str, config_name: str, resume: bool, overwrite: bool) -> Path:
    """The folder of the run to start or resume; nothing is made yet. Raises `RunError`.

    A run without a name is called after its config, with a number when that is taken: small, small-2, small-3.
    """
    if name and (name != Path(name).name or name == ".."):
        raise RunError(f"run must be a name, not the path {name!r}: --out names the folder that runs are in")
    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite discards it: give one of them")
    folder = out / (name or config_name)
    if resume:
        found = folder if name else max(_numbered(out, config_name), key=_number, default=folder)
        if not found.is_dir():
            raise RunError(f"no run to resume at {found}{_runs_in(out)}")
        return found
    if overwrite and folder.exists() and not (_is_run(folder) or _is_empty(folder)):
        raise RunError(f"{folder} is not a run (no config.json), so --overwrite leaves it alone: take another name")
    if folder.exists() and not overwrite:
        if name:
            raise RunError(f"run {folder} exists: --resume goes on with it, --overwrite discards it")
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
    """Raise `RunError` unless `folder` can be made and hold `size` bytes. Leaves nothing behind."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise RunError(f"cannot write to {there}: {error.strerror}; --out names another folder") from error
    if free < size:
        raise RunError(
            f"{there} has {free / 1e6:,.0f} MB free and this run's checkpoints take {size / 1e6:,.0f} MB; "
            "--out names another folder"
        )


def find(path: str) -> Path:
    """The folder of a finished or running run, for those who read it. Raises `RunError`."""
    folder = Path(path)
    if not _is_run(folder):
        raise RunError(f"{folder} is not a run (no config.json){_runs_in(folder.parent)}")
    return folder


class Run:
    """The record of one run: rows, samples, status, and the lines or the bar a person sees."""

    def __init__(self, folder: Path, config: dict[str, Any], at_step: int | None = None):
        """Make `folder`, or open it to resume at `at_step`: rows and samples that a lost stretch of training had
        written after that step are dropped, since they are about to be written again. Raises `RunError` when another
        process has made the folder since it was chosen."""
        try:
            folder.mkdir(parents=True, exist_ok=at_step is not None)
        except FileExistsError:
            raise RunError(f"another run has just begun in {folder}: start again, or give this one a --run") from None
        self.folder, self.rows, self.bar, self.mirror = folder, [], None, None
        self.sampled = -1  # the step of the last sample
        self._bar_opened = False
        self._metrics, self._samples = folder / "metrics.jsonl", folder / "samples.txt"
        if self._metrics.exists():
            self.rows = [row for row in _read_rows(self._metrics) if row["step"] <= at_step]
            write_atomically(self._metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        if self._samples.exists():
            samples = re.split(r"(?m)^(?=--- step \d+ ---$)", self._samples.read_text())
            kept = {int(s.split()[2]): s for s in samples if s and int(s.split()[2]) <= at_step}
            write_atomically(self._samples, "".join(kept.values()))
            self.sampled = max(kept, default=-1)
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        self.set_status("running")

    def set_status(self, status: Status, **facts: Any) -> None:
        facts = {"status": status, "time": time.strftime("%FT%T%z"), **facts}
        write_atomically(self.folder / "status.json", json.dumps(facts, indent=2) + "\n")

    def log(self, row: dict[str, Any], line: str = "") -> None:
        """Record a row, and show its line if it has one."""
        self.rows.append(row)
        with self._metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.mirror:
            self.mirror.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if line:
            self.say(line)

    def trouble(self, loss: float, norm: float, vocab_size: int) -> Status | None:
        """What ends a run before its time: a loss or gradient norm that is not finite, or five rows of losses half as
        bad again as both a uniform guess and the first (one is a spike, from which a run may recover)."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "nan"
        losses = [row["loss"] for row in self.rows if "loss" in row]
        bound = 1.5 * max(math.log(vocab_size), losses[0] if losses else 0.0)
        return "diverged" if len(losses) > 5 and min(losses[-5:]) > bound else None

    def best(self) -> float:
        """The lowest evaluation loss so far."""
        return min((row["val_loss"] for row in self.rows if "val_loss" in row), default=math.inf)

    def summary(self, facts: dict[str, Any]) -> dict[str, Any]:
        """`facts` and, for the status at the end, the speed by the clock and in steady steps (the first one compiles),
        and the evaluation if it is the last that was recorded."""
        facts = facts | {"tok_s_wall": facts["tokens"] / facts["seconds"]}
        if speeds := [row["tok_s"] for row in self.rows if "tok_s" in row]:
            facts["tok_s_steady"] = median(speeds[1:] or speeds)
        return facts | {k: v for row in self.rows[-1:] for k, v in row.items() if k.startswith("val_")}

    def add_sample(self, step: int, text: str) -> None:
        self.sampled = step
        with self._samples.open("a") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self.bar.write(line) if self.bar is not None else print(line, flush=True)

    def show_progress(self, progress: float, note: str) -> None:
        """Move the bar to a share of the run; off a terminal the lines are the progress."""
        if not self._bar_opened:
            layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            self.bar = progress_bar(self.say, total=1.0, initial=progress, bar_format=layout, leave=False)
            self._bar_opened = True
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(progress - self.bar.n)

    def start_mirror(self, mode: Literal["off", "offline", "online"], config: dict[str, Any]) -> None:
        """Mirror rows to W&B, a resumed run's to the run that they began in. Never asks anything and never fails a run:
        what keeps it from starting is said."""
        if mode == "off":
            return
        try:
            import wandb

            if mode == "online":
                wandb.Api()  # raises where there is no key, for which `init` would ask
            earlier = sorted(self.folder.glob("wandb/*run-*-*"))  # by date; each name ends in the run's id
            self.mirror = wandb.init(
                project="nanofuse", name=self.folder.name, dir=self.folder, config=config, mode=mode,
                id=earlier[-1].name.rpartition("-")[2] if earlier else None, resume="allow",
                settings=wandb.Settings(silent=True, init_timeout=30),
            )  # fmt: skip
        except Exception as error:
            self.say(f"W&B is off for this run: {error}")

    def plot(self) -> None:
        """Draw loss.png from the rows, where matplotlib is installed."""
        try:
            import matplotlib
        except ModuleNotFoundError:
            self.say("loss.png is left out: the package matplotlib is not installed")
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
        """Record and say how the run ended, and let go of bar and mirror."""
        self.set_status(status, **facts)
        shown = (
            f"{key} {value:,.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        self.say(f"{status}: {', '.join(shown)}")
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.mirror:
            self.mirror.finish(exit_code=0 if status == "finished" else 1)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a record; a last line that a killed process left half-written is dropped."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def status_of(error: BaseException) -> Status:
    """How a run ends that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "oom" if out_of_memory(error) else "crashed"


def explained(error: Exception) -> str:
    """What to tell the user of an error that refuses a run."""
    if isinstance(error, ModuleNotFoundError):
        return f"what was asked for takes the package {error.name}, which is not installed"
    return str(error)


def commit() -> str:
    """The commit that this tree is at, with a + when it has changes; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step under way can end and be saved.

    `signal` is its number, 0 before. A second one acts as it would have without this.
    """

    def __enter__(self):
        self.signal = 0
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
