"""What each kernel brings to a run: whole training steps in its shapes, with one op at a time taken from elsewhere.

    python -m bench.compare --run small --seconds 60

Steps of the run's model, batch and options on random tokens. In turn, each op's kernel is replaced by another of its
implementations, and then all are by torch's. Steps with and without alternate; the ratio is the median over the turns.
The rows go to compare.json in the run's folder. `train.py --compare=SECONDS` runs this after training.
"""

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from bench import records
from bench.steps import SAMPLE_S, WARM_UP, random_step, seconds_of, trainer_of
from kernels import OPS, KernelError, Kernels, bind
from model.gpt import check_kernels
from runtime.budget import LENGTHS
from runtime.config import Parser, as_dict, build, flatten, number
from runtime.hardware import out_of_memory
from runtime.program import program
from runtime.records import to_json
from runtime.run import find, read_status
from train import Config, Trainer

Variant = tuple[str, str, Kernels]  # the op (or "all"), the implementation that it has instead, and the kernels
# Sections and options that are of the whole run.
LEFT_OUT = {"data", "config", "run", "out", "log", "wandb", "compare", "diag", "profile", "time_limit", *LENGTHS}


def knobs_of(folder: Path) -> dict[str, object]:
    """The options of a run that its steps depend on, with the vocabulary and the micro-batch that it found."""
    config = build(Config, flatten(Config, json.loads((folder / "config.json").read_text("utf-8"))))
    shape = {"model.vocab_size": config.shape.vocab_size, "data.packing": config.data.packing}
    found = read_status(folder).get("micro_batch", config.micro_batch)
    flat = flatten(Config, as_dict(config)) | shape | {"micro_batch": found}
    return {key: value for key, value in flat.items() if key in shape or key.partition(".")[0] not in LEFT_OUT}


def called(trainer: Trainer) -> set[str]:
    """The ops that the trainer's steps call."""
    own, ops = trainer.model.kernels, {"adamw"}

    def noting(op: str) -> Callable:
        def call(*args: object, **options: object) -> object:
            ops.add(op)
            return getattr(own, op)(*args, **options)

        return call

    use(trainer, replace(own, **{op: noting(op) for op in own.names}))
    with torch.no_grad(), trainer.autocast():
        trainer.model(trainer.ids[:1], trainer.targets[:1])
    use(trainer, own)
    return ops


def variants(trainer: Trainer, ops: set[str]) -> Iterator[Variant]:
    """The trainer's kernels with that of one of the `ops` replaced, and with all of them."""
    own, others = trainer.model.kernels, {}
    candidates = ("torch", "sdpa", "triton") if trainer.device.type == "cuda" else ("torch", "sdpa")
    for op, name in own.names.items():
        for other in candidates if op in ops else ():
            slow = other == "torch" and "sdpa" in OPS[op].implementations  # what torch users would not call
            if other == name or slow or other not in OPS[op].implementations:
                continue
            try:
                kernels = bind(replace(trainer.config.kernels, **{op: other}), trainer.device)
                check_kernels(trainer.model.config, kernels)
            except KernelError:  # cannot run here
                continue
            if other != "triton":
                others[op] = other
            yield op, other, kernels
    if len(others) > 1:
        yield "all", "torch", bind(replace(trainer.config.kernels, **others), trainer.device)


def use(trainer: Trainer, kernels: Kernels) -> None:
    """Make the trainer's steps call other kernels; CUDA graphs are captured anew."""
    for module in trainer.model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "kernel"):
            optimizer.kernel = kernels.adamw
    trainer.allocate()


def compare(trainer: Trainer, seconds: float) -> list[dict]:
    """Time the variants for `seconds`, or as long as the first takes. Returns a row for each: `ms` with it, `own_ms` of
    the run's kernels beside it, their `ratio`, and the number of `turns`; or `failed`, the reason."""
    own, step, until = trainer.model.kernels, random_step(trainer), time.monotonic() + seconds
    others = list(variants(trainer, called(trainer)))
    rows = {
        (op, other): {"op": op, "own": own.names.get(op, "all"), "other": other, "times": []} for op, other, _ in others
    }
    n = 0

    def timed(kernels: Kernels) -> float:
        nonlocal n
        use(trainer, kernels)
        seconds_of(step, WARM_UP)
        n = n or math.ceil(SAMPLE_S / seconds_of(step, 2))
        return seconds_of(step, n)

    turn = 0.0  # seconds that the longest turn took
    while time.monotonic() + turn < until:
        for op, other, kernels in others:
            row, begin = rows[op, other], time.monotonic()
            if "failed" in row or begin + turn > until:
                continue
            try:
                row["times"].append((timed(own), timed(kernels)))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                row["failed"] = "out of memory"
            turn = max(turn, time.monotonic() - begin)
        if all("failed" in row for row in rows.values()):
            break
    return [_summary(row) for row in rows.values()]


def _summary(row: dict) -> dict:
    times = row.pop("times")
    if not times:
        return {"failed": "the time was up"} | row
    own, other = (1e3 * median(column) for column in zip(*times, strict=True))
    return row | {"own_ms": own, "ms": other, "ratio": median(b / a for a, b in times), "turns": len(times)}


def table(rows: list[dict]) -> str:
    lines = [f"{'op':22s} {'this run':10s} {'instead':10s} {'ms':>9s} {'instead':>9s}  faster by"]
    for row in rows:
        start = f"{row['op']:22s} {row['own']:10s} {row['other']:10s} "
        figures = "" if "failed" in row else f"{row['own_ms']:9.2f} {row['ms']:9.2f}  {row['ratio']:.2f} x"
        lines.append(start + (figures or row["failed"]))
    return "\n".join(lines)


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="the run: its name in out/, or a path")
    parser.add_argument("--seconds", type=number(float, "(0, inf)"), default=60, help="time for all of it (60)")
    args = parser.parse_args(argv)
    run = find(args.run)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()):
            trainer = trainer_of(knobs_of(run), Path(folder))
        rows = compare(trainer, args.seconds)
    if not rows:
        print("compare  the ops have no other implementation that runs here")
        return 0
    (run / "compare.json").write_text(to_json({**records.machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
