"""What a run says of itself before it trains."""

from collections.abc import Iterable
from typing import Any

from model.choices import Choices
from runtime import hardware
from runtime.doctor import warnings


def introduction(trainer: Any, chosen: Choices, resumed: bool) -> dict[str, str | Iterable[str]]:
    """The facts of a run, a line or several for each label: its data, its model, and what was `chosen` for it.

    `trainer` is train.py's, which is ready to train; `resumed` says whether it goes on from a checkpoint."""
    config, model = trainer.config, trainer.model
    return {
        "run": f"{trainer.run.folder}" + (f", from step {trainer.step}" if resumed else ""),
        "data": f"{trainer.data}",
        "changed": trainer.data.changes.values(),
        "model": f"{config.shape.n_parameters():,} parameters, {trainer.flops:,} training FLOPs per token",
        "weights": [f"began as those of {config.init_from}"] * bool(config.init_from),
        "batch": f"{trainer.micro_batch}",
        "machine": hardware.describe(chosen.device, chosen.precision),
        "doctor": warnings(chosen.device, config.device),
        "format": trainer.low.lines(),
        "kernels": [f"{chosen.kernels}", *model.attention_notes(chosen.precision != "fp32")],
        **chosen.notes,
        "warm-up": trainer.budget.warmup_notes(config.warmup),
    }
