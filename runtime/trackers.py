"""Where the rows of a run go besides metrics.jsonl: Weights & Biases and TensorBoard (`--log`)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

WANDB_MODES = {"wandb": "online", "wandb-offline": "offline"}
NAMES = (*WANDB_MODES, "tensorboard")


def tracker_names(log: str, wandb: str) -> list[str]:
    """The trackers that `log` names, separated by commas, and the one that the mode `wandb` means. Raises
    `ValueError`."""
    names = [name for name in log.split(",") if name != "off"]
    for name in names:
        if name not in NAMES:
            raise ValueError(f"log must be off, or one or more of {', '.join(NAMES)} with commas, not {log!r}")
    names += [name for name, mode in WANDB_MODES.items() if mode == wandb]
    return list(dict.fromkeys(names))


class Tracker(Protocol):
    """Receives a run's rows. Whatever it raises, the run goes on without it."""

    title: str

    def log(self, row: Mapping[str, Any]) -> None: ...

    def finish(self, succeeded: bool) -> None: ...


class WandB:
    """A run of Weights & Biases, with its files in the run's folder. A resumed run continues its own."""

    title = "W&B"

    def __init__(self, mode: str, folder: Path, config: dict[str, Any]):
        """This never prompts: without an API key it raises."""
        import wandb

        if mode == "online":
            wandb.Api()  # raises if there is no API key; `init` would prompt for it
        earlier = sorted(folder.glob("wandb/*run-*-*"))  # sorted by date: run-DATE-ID, with a suffix if in one second
        self.run = wandb.init(
            project="nanofuse", name=folder.name, dir=folder, config=config, mode=mode,
            id=earlier[-1].name.removeprefix("offline-").split("-")[2] if earlier else None, resume="allow",
            settings=wandb.Settings(silent=True, init_timeout=30),
        )  # fmt: skip

    def log(self, row: Mapping[str, Any]) -> None:
        self.run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])

    def finish(self, succeeded: bool) -> None:
        self.run.finish(exit_code=0 if succeeded else 1)


class TensorBoard:
    """Scalars in the folder `tensorboard` of the run's folder. A resumed run writes over those after its checkpoint."""

    title = "TensorBoard"

    def __init__(self, folder: Path, config: dict[str, Any], at_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=at_step + 1 if at_step else None)
        self.writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in scalars(config)), at_step)

    def log(self, row: Mapping[str, Any]) -> None:
        for key, value in scalars(row):
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, row["step"])

    def finish(self, succeeded: bool) -> None:
        self.writer.close()


def scalars(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts, by keys joined with slashes."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def start(name: str, folder: Path, config: dict[str, Any], at_step: int) -> Tracker:
    """The tracker of this name, for a run that goes on from a step. Raises whatever its library does."""
    if name in WANDB_MODES:
        return WandB(WANDB_MODES[name], folder, config)
    return TensorBoard(folder, config, at_step)
