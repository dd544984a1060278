"""Rows 27 and 28: bounds on what low precision gains, and what simulated runs are not asked."""

from dataclasses import replace

import pytest
from test_experiments_judges import outcome

from experiments import analysis, judges, roofline
from experiments.judges import at_least, verdict
from experiments.report import provenance
from experiments.roofline import Card, product_seconds, speed_up, step_seconds
from experiments.spec import Results
from experiments.suites import SUITES
from model.gpt import ModelConfig

CARD = Card("a card", {"bf16": 1e12, "fp8": 2e12, "nvfp4": 4e12}, 1e15)  # no bound by memory
SHAPE = ModelConfig(n_layer=6, n_head=4, n_kv_head=2, d_model=64, d_ff=192).resolved(1000)
LAYER = 64 * (128 + 64 + 384) + 192 * 64  # weights: qkv, out, gate and up, down


def test_a_product_takes_its_flops_or_its_bytes():
    slow = replace(CARD, bandwidth=1e6)
    assert product_seconds(10, 20, 30, "fp8", CARD) == 2 * 10 * 20 * 30 / 2e12
    assert product_seconds(10, 20, 30, "bf16", slow) == (30 * 30 * 2 + 200 * 2) / 1e6
    assert product_seconds(10, 20, 30, "nvfp4", slow) == (30 * 30 * 0.5625 + 200 * 2) / 1e6


def test_a_step_is_the_layers_and_the_head():
    tokens, head = 100, 64 * 1000
    bf16 = 6 * tokens * (6 * LAYER + head) / 1e12
    assert step_seconds(SHAPE, tokens, "bf16", CARD) == pytest.approx(bf16)
    fp8 = tokens * (6 * LAYER * (4 / 2 + 2) + 6 * head) / 1e12  # dW is in bf16
    assert speed_up(SHAPE, tokens, "fp8", CARD) == pytest.approx(bf16 / fp8)
    nvfp4 = tokens * (5 * LAYER * 6 / 4 + LAYER * 6 + 6 * head) / 1e12  # and so is the last layer
    assert speed_up(SHAPE, tokens, "nvfp4", CARD) == pytest.approx(bf16 / nvfp4)
    fp8_too = fp8 - 4 * tokens * head * (1 / 1e12 - 1 / 2e12)
    assert speed_up(SHAPE, tokens, "fp8", CARD, head="fp8") == pytest.approx(bf16 / fp8_too)


def test_what_follows_from_counts_takes_no_runs():
    results = Results([outcome(2.0)])
    holds, fails = (judges.counted(lambda: 1.5, at_least(x), "at most {:.1f} times")(results, None) for x in (1.2, 2.0))
    assert holds.ours == "at most 1.5 times"
    assert [verdict(finding, False, None) for finding in (holds, fails)] == ["reproduced", "refuted"]


@pytest.mark.parametrize("claimed, most", [("2x", 2.00), ("4x", 2.78)])
def test_the_gains_that_were_planned_exceed_what_m4_allows(claimed, most):
    (claim,) = (claim for claim in SUITES["low-precision"].claims if claim.theirs == claimed)
    finding = claim.judge(Results([outcome(2.0)]), None)
    assert not finding.holds and f"at most {most:.2f} times on {roofline.RTX_5090.name}" in finding.ours


def test_a_simulated_run_has_no_speed_and_the_report_says_so():
    native = outcome(2.0, variant="fp8", final={"tok_s_steady": 5.0})
    simulated = outcome(2.0, variant="nvfp4", final={"tok_s_steady": 5.0, "simulated": True})
    assert analysis.speed(native) == 5
    with pytest.raises(LookupError, match="nvfp4 is simulated here"):
        analysis.speed(simulated)
    assert "1 SIMULATED" in provenance([native, simulated]) and "SIMULATED" not in provenance([native])
