"""Training: our small.py and nanoGPT's CPU recipe for the same wall-clock on the same text, one after the other.

    pytest bench/bench_train.py --seconds 180

Ours counts compiling and evaluating in its time, the baseline neither. It trains twice: as on a machine that is new to
it, and as ever after, when it finds its code compiled. Rows go to bench/results/train.jsonl.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from bench import nanogpt

ROOT = Path(__file__).parents[1]
MARKS = (3.0, 2.5, 2.25, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5)  # bits a byte, to report when each was reached


def lines_of(*command: str, **environment: str) -> list[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def ours(folder: Path, cache: Path, *flags: str) -> dict:
    """Train with `flags` in a process of its own, which compiles into `cache`; its record, summed up."""
    place = f"--out={folder.parent}", f"--run={folder.name}"
    lines_of("train.py", *place, *flags, TORCHINDUCTOR_CACHE_DIR=str(cache))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((folder / "status.json").read_text())
    evaluations = [row for row in rows if "val_bpb" in row]
    return {
        "seconds": evaluations[-1]["seconds"],
        "first_step": rows[0]["seconds"],
        "steps": status["step"],
        "tok_s": status["tok_s_steady"],
        "tok_s_wall": status["tok_s_wall"],
        "flops_per_token": status["flops_per_token"],
        "memory": max(row["memory"] for row in rows if "memory" in row),
        "val_bpb": evaluations[-1]["val_bpb"],
        "reached": reached(evaluations),
    }


def baseline(seconds: float) -> dict:
    rows = [json.loads(line) for line in lines_of("-m", "bench.nanogpt", "--seconds", str(seconds))]
    last = rows[-1]
    summary = {key: last[key] for key in ("seconds", "tok_s", "flops_per_token", "memory", "val_bpb")}
    return summary | {"steps": last["step"], "tok_s_wall": last["tok_s"], "reached": reached(rows)}


def reached(evaluations: list[dict]) -> dict[str, float]:
    """Seconds at the first evaluation that was at or under each mark."""
    first = {mark: next((row["seconds"] for row in evaluations if row["val_bpb"] <= mark), None) for mark in MARKS}
    return {str(mark): seconds for mark, seconds in first.items() if seconds is not None}


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of this machine's matrix product, the best of several."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def show(capsys, name: str, row: dict, rate: float) -> None:
    marks = ", ".join(f"{mark} at {seconds:.0f} s" for mark, seconds in row["reached"].items())
    with capsys.disabled():
        print(
            f"\n{name:12s} {row['val_bpb']:.4f} bits a byte after {row['seconds']:.0f} s and {row['steps']:,} steps; "
            f"{row['tok_s']:,.0f} tok/s steady, {row['tok_s_wall']:,.0f} by the wall, "
            f"{row['tok_s'] * row['flops_per_token'] / rate:.0%} of the matmul rate; "
            f"{row['memory'] / 2**20:,.0f} MiB; reached {marks}"
        )


@pytest.fixture(scope="module")
def rates():
    return {"bf16": matmul_rate(torch.bfloat16), "fp32": matmul_rate(torch.float32)}


def test_equal_wall_clock(pytestconfig, tmp_path, record, rates, capsys):
    """The default configuration against the baseline, for the same seconds."""
    seconds = pytestconfig.getoption("seconds")
    if not seconds:
        pytest.skip("--seconds 180 compares them for three minutes each")
    flags = tmp_path / "compiled", "--config=small.py", f"--seconds={seconds}"
    new, again = ours(tmp_path / "new", *flags), ours(tmp_path / "again", *flags)
    theirs = baseline(seconds)
    show(capsys, "nanofuse", new, rates["bf16"])
    show(capsys, "compiled", again, rates["bf16"])
    show(capsys, "nanoGPT", theirs, rates["fp32"])
    row = {"bench": "equal wall-clock", "nanofuse": new, "nanofuse, compiled before": again, "nanogpt": theirs}
    record("train", row | {"matmul": rates})
    assert max(new["val_bpb"], again["val_bpb"]) < theirs["val_bpb"]


def test_equal_shape(tmp_path, record, rates, capsys):
    """The baseline's shape, batch, bytes and optimizer in our trainer: what precision and compiler bring. The two take
    turns in one process, so that a machine that slows down slows both."""
    layers, heads, width, block, batch = nanogpt.LAYERS, nanogpt.HEADS, nanogpt.WIDTH, nanogpt.BLOCK, nanogpt.BATCH
    shape = f"--model.n_layer={layers} --model.n_head={heads} --model.d_model={width} --model.d_ff=344"
    data = f"--data.tokenizer=bytes --model.seq_len={block} --batch_size={batch}"
    flags = f"--out={tmp_path} --steps=1 --optimizer=adamw --model.qk_norm=false --model.init=fan-in {shape} {data}"
    trainer = train.Trainer(*train.configure(flags.split()))
    model = nanogpt.NanoGPT(trainer.tokenizer.vocab_size)
    optimizer = nanogpt.build_optimizer(model)
    steps = {
        "nanofuse": lambda ids, targets: trainer.train_step(ids, targets, 0.5),
        "nanogpt": lambda ids, targets: nanogpt.train_step(model, optimizer, ids, targets),
    }
    seconds = {name: [] for name in steps}
    for turn in range(13):
        for name, step in steps.items():
            begin = time.perf_counter()
            for i in range(20):
                step(*trainer.batches.get((20 * turn + i) * batch, batch))
            seconds[name].append((time.perf_counter() - begin) / 20)
    flops = {"nanofuse": trainer.flops, "nanogpt": model.flops_per_token()}
    # The first turn compiles.
    speeds = {name: batch * block / statistics.median(spent[1:]) for name, spent in seconds.items()}
    rows = {name: {"tok_s": speed, "flops_per_token": flops[name]} for name, speed in speeds.items()}
    with capsys.disabled():
        print("\nequal shape ", ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in speeds.items()))
    record("train", {"bench": "equal shape", **rows, "matmul": rates})
