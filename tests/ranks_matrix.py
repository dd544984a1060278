"""Train on 1, 2 and 4 ranks in every way, and compare losses and weights with those of one process.

    python tests/ranks_matrix.py             # all 48 combinations, in float32
    python tests/ranks_matrix.py --float64   # where rounding is so small that any wrong factor shows

Ranks are forked, and meet over gloo. The test suite runs a few of these combinations.
"""

import argparse
import io
import itertools
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ranks import Launcher

import train
from model import checkpoint

STEPS = 20
WORDS = ["the", "quick", "lazy", "old", "red", "fox", "dog", "wizard", "jumps", "over", "sees", "moon", "river", "gate"]
ALWAYS = {
    "data.tokenizer": "bytes", "data.val_fraction": 0.1, "model.n_layer": 2, "model.n_head": 2, "model.d_model": 32,
    "model.seq_len": 32, "batch_size": 8, "steps": STEPS, "log_every": 1, "eval_every": 10, "save_every": 99,
    "eval_tokens": 1000, "sample_every": 0, "precision": "fp32", "compile": "off", "device": "cpu", "lr": 1e-2,
}  # fmt: skip
# Largest differences from one process: of a loss, and of a matrix of weights, both relative. Muon orthogonalizes in
# bf16, where the last bit of a float32 sum decides roundings: accumulation in one process makes as large a difference.
TOLERANCE = {
    ("float32", "adamw"): (1e-5, 1e-4), ("float32", "muon"): (1e-3, 5e-2),
    ("float64", "adamw"): (1e-9, 1e-7), ("float64", "muon"): (1e-9, 1e-7),
}  # fmt: skip


RANKS = (1, 2, 4)


class Case(NamedTuple):
    ranks: int
    shard: str
    optimizer: str
    accumulation: bool
    documents: bool

    @property
    def flags(self) -> list[str]:
        """Flags of train.py, but for the sharding."""
        packing = "documents" if self.documents else "stream"
        return [f"--optimizer={self.optimizer}", f"--data.packing={packing}", f"--micro_batch={int(self.accumulation)}"]


CASES = [Case(*case) for case in itertools.product(RANKS, ("off", "full"), ("adamw", "muon"), *[(False, True)] * 2)]


def results(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of the steps of a run, and its last weights."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row], checkpoint.load(folder / "last.pt")["model"]


def differences(folder: Path, expected: Path) -> tuple[float, float]:
    """The largest relative differences of two runs: of the losses, and of the weights, in the norm of each tensor."""
    (losses, weights), (others, theirs) = results(folder), results(expected)
    assert len(losses) == len(others) == STEPS and weights.keys() == theirs.keys()
    loss = max(abs(a - b) / b for a, b in zip(losses, others, strict=True))
    return loss, max(float((weights[name] - x).norm() / x.norm()) for name, x in theirs.items())


def make_corpus(folder: Path) -> None:
    folder.mkdir()
    for i in range(40):
        words = [WORDS[(7 * i + j * j) % len(WORDS)] for j in range(150)]
        (folder / f"{i:02d}.txt").write_text(" ".join(words))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="only with these numbers of ranks")
    args = parser.parse_args()
    cases = [case for case in CASES if case.ranks in args.ranks]
    dtype = "float64" if args.float64 else "float32"
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder / "text")
        always = ALWAYS | {"data.corpus": folder / "text", "data.cache": folder / "cache", "out": folder / "out"}
        always = [f"--{key}={value}" for key, value in always.items()]

        def fork(case: Case, *flags: str, size: int) -> None:
            launcher = Launcher(folder / "said")
            codes = launcher.run(size, lambda rank: train.main([*always, *case.flags, *flags]))
            assert codes == [0] * size, launcher.said()

        print(f"{dtype}: largest differences from one process, of the losses of {STEPS} steps and of the last weights")
        print("ranks  shard  optimizer  accumulation  documents     losses    weights", flush=True)
        for number, case in enumerate(cases):
            alone = f"alone-{case.optimizer}-{case.documents}"
            if not (folder / "out" / alone).exists():
                with redirect_stdout(io.StringIO()):
                    reference = case._replace(accumulation=False)
                    assert train.main([*always, *reference.flags, f"--run={alone}"]) == 0
            fork(case, f"--run={number}", f"--shard={case.shard}", size=case.ranks)
            found = differences(folder / "out" / str(number), folder / "out" / alone)
            fits = all(d <= limit for d, limit in zip(found, TOLERANCE[dtype, case.optimizer], strict=True))
            bad += not fits
            columns = f"{case.ranks:5}  {case.shard:>5}  {case.optimizer:>9}  {case.accumulation!s:>12}  "
            columns += f"{case.documents!s:>9}  {found[0]:9.1e}  {found[1]:9.1e}"
            print(columns + ("" if fits else "  TOO LARGE"), flush=True)
    print(f"{len(cases)} combinations, {bad} that differ too much")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
