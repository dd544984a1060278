"""Rows of the published experiments that a unit test decides: no scale and no noise changes them."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import suites
from experiments.run import configuration
from experiments.spec import Claim
from kernels import bind
from model.gpt import GPT

ROOT = Path(__file__).parents[1]
KINDS = ("gradient", "parameter", "update", "ratio", "snr", "activation", "entropy")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("init, std, low, high", [("fan-in", 0.0, 0.98, 1.02), ("xavier", 1.0, 2.0, math.inf)])
def test_the_first_loss(init, std, low, high):
    """Rows 14 and 26: ln V, but far above it where a tied head has the embedding's standard deviation of 1."""
    start = {"model.tied": True, "model.init": init, "model.embedding_std": std}
    config = configuration(suites.M1_OWT["tiny"] | start)
    torch.manual_seed(0)
    model = GPT(config.model.resolved(config.data.expected_vocab_size), bind(config.kernels, torch.device("cpu")))
    ids = torch.randint(257, (8, config.model.seq_len + 1))
    with torch.no_grad():
        first = model(ids[:, :-1], ids[:, 1:]).item()
    assert low < first / math.log(257) < high


def test_a_run_writes_during_training_and_after_it(run):
    """Row 9."""
    _, folder = run(sample_every=5)
    text = (folder / "samples.txt").read_text()
    assert [f"--- step {step} ---" in text for step in (5, 10, 12)] == [True] * 3


def test_every_kind_of_diagnostics_is_recorded(run):
    """Row 23: a finite number for each group of parameters or layer."""
    _, folder = run(diag=6, optimizer="adamw", micro_batch=2)
    found = [row["diag"] for row in rows(folder) if "diag" in row]
    assert len(found) == 2
    for diag in found:
        for kind in KINDS:
            assert diag[kind] and all(math.isfinite(value) for value in diag[kind].values()), kind
        assert len(diag["activation"]) == len(diag["entropy"]) == 2  # layers


def rate_at(step: int, schedule: str, warmup: float) -> float:
    """Fraction of the peak rate in the step after `step` of 12: a linear rise, then the schedule down to a tenth."""
    start = warmup if warmup >= 1 else 12 * warmup
    if step < start:
        return (step + 1) / start
    left = (12 - step) / (12 - start)
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[schedule]
    return 1.0 if schedule == "constant" else 0.1 + 0.9 * shape


@pytest.mark.parametrize("schedule, warmup", [("linear", 0.0), ("constant", 0.25), ("cosine", 0.25), ("cosine", 12.0)])
def test_recorded_rates_are_those_of_the_schedule(run, schedule, warmup):
    """Row 32, whatever the warm-up: none, a part of the run, or all of it."""
    _, folder = run(
        schedule=schedule, warmup=warmup, final_lr=0.1, optimizer="adamw", lr=0.01, eval_every=99, log_every=1
    )
    found = {row["step"]: row["lr"] for row in rows(folder) if "lr" in row}
    assert len(found) == 12
    for step, rate in found.items():
        assert rate == pytest.approx(0.01 * rate_at(step - 1, schedule, warmup), rel=1e-9, abs=1e-15)


POINTERS = sorted({claim.test for suite in suites.DECLARED for claim in suite.claims if claim.test})


@pytest.mark.parametrize("pointer", POINTERS)
def test_a_row_points_at_a_test_that_is_there(pointer):
    path, _, name = pointer.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text()


def test_a_claim_has_a_judge_or_a_test():
    claims: list[Claim] = [claim for suite in suites.DECLARED for claim in suite.claims]
    assert all(claim.judge or claim.test for claim in claims)
