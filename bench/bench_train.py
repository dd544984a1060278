"""Training: our small.py and nanoGPT's CPU recipe for the same wall-clock on the same text, one after the other.

    pytest bench/bench_train.py --seconds 180

Our time includes compiling and evaluating, the baseline's neither. Ours trains twice: first with nothing compiled
before, then with the first run's compiled code.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from bench import nanogpt, processes
from bench.harness import DEVICE
from bench.timing import stopwatch
from data.prepare import prepare


def process(*command: object, **env: str) -> processes.Ended:
    ended = processes.run([sys.executable, *command], **{"TRITON_INTERPRET": "0"} | env)  # bench/conftest.py sets 1
    assert not ended.failure, "\n".join(ended.lines + ended.errors)
    return ended


def ours(folder: Path, cache: Path, *flags: str) -> dict:
    """Train with `flags` in a process of its own, which compiles into `cache`, and summarise its record."""
    process("train.py", f"--out={folder.parent}", f"--run={folder.name}", *flags, TORCHINDUCTOR_CACHE_DIR=str(cache))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((folder / "status.json").read_text())
    last = [row for row in rows if "val_bpb" in row][-1]
    return {
        "seconds": last["seconds"], "first_step": rows[0]["seconds"], "steps": status["step"],
        "tok_s": status["tok_s_steady"], "tok_s_wall": status["tok_s_wall"],
        "flops_per_token": status["flops_per_token"], "val_bpb": last["val_bpb"],
        "memory": max(row["memory"] for row in rows if "memory" in row),
    }  # fmt: skip


@pytest.fixture(scope="module")
def rates():
    """FLOP/s of this machine's matrix product, the best of several."""

    def rate(dtype: torch.dtype, size: int = 1024) -> float:
        a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
        return 2 * size**3 / min(stopwatch(lambda: a @ b) for _ in range(8))

    return {"bf16": rate(torch.bfloat16), "fp32": rate(torch.float32)}


def test_equal_wall_clock(pytestconfig, tmp_path, record, rates, show):
    """The default configuration against the baseline, for the same seconds."""
    seconds = pytestconfig.getoption("seconds")
    if not seconds:
        pytest.skip("--seconds 180 compares them for three minutes each")
    flags = tmp_path / "compiled", "--config=small.py", f"--seconds={seconds}"
    rows = {name: ours(tmp_path / name[-6:], *flags) for name in ("nanofuse", "nanofuse, compiled before")}
    theirs = process("-m", "bench.nanogpt", "--seconds", seconds).said
    rows["nanogpt"] = theirs | {"tok_s_wall": theirs["tok_s"]}
    config, *_ = train.configure(["--config=small.py"])
    digest = prepare(config.data).summary.get("digest")
    assert digest == theirs["digest"], "the two were trained on different texts"
    record("train", {"bench": "equal wall-clock", "digest": digest, **rows, "matmul": rates})
    for name, row in rows.items():
        rate = rates["fp32" if name == "nanogpt" else "bf16"]
        show(
            f"{name:26s} {row['val_bpb']:.4f} bits per byte after {row['seconds']:.0f} s and {row['steps']:,} steps; "
            f"{row['tok_s']:,.0f} tok/s steady, {row['tok_s_wall']:,.0f} overall, "
            f"{row['tok_s'] * row['flops_per_token'] / rate:.0%} of the matmul rate; {row['memory'] / 2**20:,.0f} MiB"
        )
    assert all(row["val_bpb"] < theirs["val_bpb"] for name, row in rows.items() if name != "nanogpt")


def test_equal_shape(tmp_path, record, rates, show):
    """The baseline's shape, batch, bytes and optimizer in our trainer: the gain by precision and compiler. The two take
    turns in one process, so that a machine that slows down slows both."""
    batch, block = nanogpt.BATCH, nanogpt.BLOCK
    shape = f"--model.n_layer={nanogpt.LAYERS} --model.n_head={nanogpt.HEADS} --model.d_model={nanogpt.WIDTH}"
    data = f"--model.d_ff=344 --data.tokenizer=bytes --model.seq_len={block} --batch_size={batch}"
    flags = f"--out={tmp_path} --steps=1 --optimizer=adamw --model.qk_norm=false --model.init=fan-in {shape} {data}"
    trainer = train.Trainer(*train.configure(flags.split()))
    model = nanogpt.NanoGPT(trainer.data.tokenizer.vocab_size)
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
                step(*trainer.data.batches.get((20 * turn + i) * batch, batch))
            seconds[name].append((time.perf_counter() - begin) / 20)
    flops = {"nanofuse": trainer.flops, "nanogpt": model.flops_per_token()}
    # The first turn compiles.
    speeds = {name: batch * block / statistics.median(spent[1:]) for name, spent in seconds.items()}
    rows = {name: {"tok_s": speed, "flops_per_token": flops[name]} for name, speed in speeds.items()}
    show("equal shape " + ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in speeds.items()))
    record("train", {"bench": "equal shape", **rows, "matmul": rates})
