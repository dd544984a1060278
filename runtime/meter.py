"""Speed and memory of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime.distributed import World
from runtime.hardware import Precision, memory, peak_flops
from runtime.text import duration


class Meter:
    """Measures speed and memory between rows of metrics. Evaluation, saving and sampling do not count."""

    def __init__(
        self, step: int, tokens_per_step: int, flops: int, device: torch.device, precision: Precision, world: World
    ):
        """The first row is about the steps after `step`. `flops` is per token."""
        self.step, self.tokens_per_step, self.flops = step, tokens_per_step, flops
        self.device, self.world, self.peak = device, world, peak_flops(device, precision)  # of one card
        self.seconds, self.waited = 0.0, 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context for a training step, with all that it waits for."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context for a wait for data, in a training step."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def row(self, step: int, graphs: bool) -> dict[str, Any]:
        """Columns of a row of metrics after `step`, and a fresh start. `graphs`: whether CUDA graphs are replayed.

        `tok_s` is of the job, `mfu` of all its cards, memory of the rank with the most. Several ranks have `tok_s_rank`
        and `memory_job` too, the memory of all."""
        tok_s = (step - self.step) * self.tokens_per_step / self.seconds
        row = {"tok_s": tok_s, "mfu": tok_s * self.flops / (self.peak * self.world.size) if self.peak else None}
        row |= {"data_wait": self.waited} | memory(self.device, graphs)
        if self.world.size > 1:
            used = [name for name in ("memory", "memory_reserved", "memory_retries") if row[name] is not None]
            total = self.world.sum(row["memory"])
            row |= dict(zip(used, map(int, self.world.max(*(row[name] for name in used))), strict=True))
            row |= {"memory_job": int(total[0]), "tok_s_rank": tok_s / self.world.size}
        self.step, self.seconds, self.waited = step, 0.0, 0.0
        return row


def describe(row: dict[str, Any], progress: float, left: float | None) -> str:
    """A row of metrics in a line, with the `progress` of the run (0 to 1) and the seconds that are `left`, if known."""
    line = f"step {row['step']:6d}  {progress:4.0%}  loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}"
    line += f"  {row['tok_s']:,.0f} tok/s" + (f", {row['tok_s_rank']:,.0f} a rank" if "tok_s_rank" in row else "")
    line += f", {row['mfu']:.1%} of peak" if row["mfu"] else ""
    return f"{line}  {duration(row['seconds'])} elapsed" + ("" if left is None else f", {duration(left)} left")
