"""Time whole training steps of train.py's Trainer on random tokens: `python -m bench.steps`.

    python -m bench.steps --shape 124M --variant captured    one of them

Four models, each with the Triton kernels, captured in CUDA graphs and eager, and with the references and SDPA under
torch.compile; two of them captured in low precision too, on a card that has it: time and tokens per second, MFU,
memory, the host's time to launch a step, and device time by kernel. Each is a process of its own. Some run side by
side, the largest first: they build and compile together, and each is alone on the card while it is timed.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from bench import processes, records
from bench.processes import card_held
from bench.timing import synchronize
from kernels import OPS, has_card
from runtime.config import Parser, number
from runtime.hardware import has_fp8
from runtime.program import program
from train import Trainer, configure

Knobs = dict[str, object]
SHAPES: dict[str, Knobs] = {
    "124M": {
        "model.n_layer": 12, "model.n_head": 12, "model.d_model": 768, "model.seq_len": 1024,
        "model.vocab_size": 50304, "batch_size": 32,
    },
    "42M": {
        "model.n_layer": 8, "model.n_head": 8, "model.d_model": 512, "model.d_ff": 1408, "model.seq_len": 256,
        "model.vocab_size": 32000, "model.qk_norm": False, "batch_size": 128,
    },
    "M4": {
        "model.n_layer": 12, "model.n_head": 12, "model.n_kv_head": 3, "model.d_model": 768, "model.d_ff": 2048,
        "model.seq_len": 128, "model.vocab_size": 50257, "model.qk_norm": False, "batch_size": 64,
    },
    "M0": {
        "model.n_layer": 4, "model.n_head": 16, "model.d_model": 512, "model.d_ff": 1344, "model.seq_len": 256,
        "model.vocab_size": 10000, "model.tied": False, "model.qk_norm": False, "batch_size": 32,
    },
}  # fmt: skip
VARIANTS: dict[str, Knobs] = {
    "captured": {"capture": "on", "compile": "off"},
    "eager": {"capture": "off", "compile": "off"},
    "torch.compile": {"capture": "off", "compile": "on", "kernels": "torch", "kernels.attention": "sdpa"},
}
LOW: dict[str, Knobs] = {
    "fp8": VARIANTS["captured"] | {"precision": "fp8"},
    "fp8, head": VARIANTS["captured"] | {"precision": "fp8", "head_precision": "fp8"},
    "fp8, triton": VARIANTS["captured"] | {"precision": "fp8", "kernels.fp8_linear": "triton"},
    "mxfp8": VARIANTS["captured"] | {"precision": "mxfp8"},
    "nvfp4": VARIANTS["captured"] | {"precision": "nvfp4"},
}
LOW_SHAPES = ("124M", "M4")
WARM_UP = 6  # steps: they compile, and capture
SAMPLES, SAMPLE_S, PROFILED = 5, 0.3, 3
SIDE_BY_SIDE = 6  # processes: the memory of the six largest together is within 80 GB


def trainer_of(knobs: Knobs, folder: Path) -> Trainer:
    """A trainer with these knobs and otherwise the defaults of train.py; its run and corpus are in `folder`."""
    (folder / "defaults.py").touch()
    text = folder / "text.txt"
    text.write_text("Steps are timed on random tokens; a trainer has a corpus all the same.\n" * 2000)
    always = {
        "config": folder / "defaults.py", "out": folder / "out", "data.corpus": text, "data.cache": folder / "cache",
        "data.tokenizer": "bytes", "optimizer": "adamw", "steps": 1000, "eval_tokens": 4096,
        "micro_batch": 0,
    }  # fmt: skip
    return Trainer(*configure([f"--{key}={value}" for key, value in (always | knobs).items()]))


def random_step(trainer: Trainer) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A training step on a batch of random tokens."""
    shape, batch = trainer.model.config, trainer.config.batch_size
    tokens = torch.randint(shape.vocab_size, (2, batch, shape.seq_len))
    inputs, targets = tokens.pin_memory() if trainer.device.type == "cuda" else tokens
    return partial(trainer.train_step, inputs, targets, 0.5)


def seconds_of(step: Callable[[], object], n: int) -> float:
    """Seconds that a step takes, the mean of `n` of them."""
    begin = time.perf_counter()
    for _ in range(n):
        step()
    synchronize()
    return (time.perf_counter() - begin) / n


def measure(trainer: Trainer, lock: Path) -> dict:
    """Time the trainer's steps; `ms` is the median of samples of several steps each."""
    shape, batch, gpu = trainer.model.config, trainer.config.batch_size, trainer.device.type == "cuda"
    step = random_step(trainer)
    seconds = partial(seconds_of, step)
    with card_held(lock, alone=False):
        begin = time.perf_counter()
        first_loss = step()[0].item()
        first = time.perf_counter() - begin
        seconds(WARM_UP)
    with card_held(lock):
        n = math.ceil(SAMPLE_S / seconds(2))
        taken = median(seconds(n) for _ in range(SAMPLES))
        begin = time.perf_counter()
        loss, _ = step()
        host = time.perf_counter() - begin
        kernels = by_kernel(step) if gpu else []
    speed = batch * shape.seq_len / taken
    return {
        "batch": batch, "seq_len": shape.seq_len, "optimizer": trainer.config.optimizer,
        "precision": trainer.config.precision, "first_s": first, "ms": 1e3 * taken, "tok_s": speed,
        "mfu": speed * trainer.flops / trainer.meter.peak if trainer.meter.peak else None, "host_ms": 1e3 * host,
        "memory": torch.cuda.max_memory_allocated() if gpu else None, "flops_per_token": trainer.flops,
        "first_loss": first_loss, "loss": loss.item(), "kernels": kernels[:40],
    }  # fmt: skip


def by_kernel(step) -> list[tuple[float, float, str]]:
    """Milliseconds and launches a step of each kernel, and its name; those that take longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            step()
        synchronize()
    found = [
        (event.self_device_time_total / 1e3 / PROFILED, event.count / PROFILED, event.key[:120])
        for event in profiled.key_averages() if event.self_device_time_total > 0
    ]  # fmt: skip
    return sorted(found, reverse=True)


def is_due(shape: str, variant: str) -> bool:
    """Whether a variant is timed unless it is asked for: low precision on a card that has it."""
    if variant in VARIANTS:
        return True
    card = torch.device("cuda")
    if variant not in LOW or shape not in LOW_SHAPES or not torch.cuda.is_available():
        return False
    return has_fp8(card) if LOW[variant]["precision"] == "fp8" else has_card(OPS["block_scaled_linear"], card)


def run(shape: str, variant: str, lock: Path, deadline: float) -> dict:
    """The row of a shape and variant, measured in a process of its own; it holds `failed`, the reason, if there are no
    figures."""
    row = {"bench": "steps", "shape": shape, "variant": variant}
    if (left := deadline - time.monotonic()) <= 0:
        return row | {"failed": "not begun: the time was up"}
    command = [sys.executable, "-m", "bench.steps", f"--shape={shape}", f"--variant={variant}", f"--lock={lock}"]
    ended = processes.run(command, left)
    return row | ({"failed": ended.failure} if ended.failure else ended.said)


def line(row: dict) -> str:
    start = f"{row['shape']:5s} {row['variant']:14s}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    text = f"{start} {row['ms']:7.1f} ms {row['tok_s']:11,.0f} tok/s {row['mfu'] or 0:6.1%} MFU "
    text += f"{(row['memory'] or 0) / 2**30:5.1f} GiB, host {row['host_ms']:6.1f} ms, first {row['first_s']:.1f} s"
    return "\n".join([text, *(f"      {ms:7.3f} ms {count:5.0f} {name}" for ms, count, name in row["kernels"][:12])])


@program
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 where a shape and variant has no figures."""
    parser = Parser(prog="python -m bench.steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--variant", choices=VARIANTS | LOW, help="only this one")
    parser.add_argument("--seconds", type=number(float, "(0, inf)"), default=300, help="stop after so long (300)")
    parser.add_argument("--results", **records.OPTION)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)  # of the process of one shape and variant
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.lock:
            trainer = trainer_of(SHAPES[args.shape] | (VARIANTS | LOW)[args.variant], Path(folder))
            print("\n" + json.dumps(measure(trainer, args.lock)), flush=True)
            return 0
        pairs = [
            (shape, variant)
            for shape, variant in product(SHAPES, VARIANTS | LOW)
            if args.shape in (None, shape)
            and (variant == args.variant or (not args.variant and is_due(shape, variant)))
        ]
        one = partial(run, lock=Path(folder, "lock"), deadline=time.monotonic() + args.seconds)
        failed = False
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for row in pool.map(lambda each: one(*each), pairs):
                records.append(args.results, "steps", row)
                print(line(row), flush=True)
                failed |= "failed" in row
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
