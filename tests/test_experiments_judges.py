"""What judges say of results that are made up, and the statistics of a verdict."""

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from scipy import stats

from experiments import analysis
from experiments.judges import (
    DIFFERENT,
    HIGHER,
    LOWER,
    Difference,
    Noise,
    artefact,
    at_least,
    at_most,
    best,
    edge,
    equal,
    holm,
    monotone,
    paired,
    same,
    saturates,
    spread,
    statuses,
    threshold,
    verdict,
    verdicts,
    versus,
)
from experiments.spec import LAST, Finding, Outcome, Results
from experiments.suites import by_rule

NOISE = Noise(0.01, 20)
ELSEWHERE, DOUBT = "not comparable at this scale", "within noise"


def outcome(
    val_loss=None, status="finished", scale="tiny", seed=0, rows=(), evals=(), diag=None, knobs=None, final=None,
    **labels
) -> Outcome:  # fmt: skip
    ends = {} if val_loss is None else {"val_loss": val_loss}
    return Outcome(
        key="k", suite="s", scale=scale, labels={"variant": "base", "seed": seed} | labels, knobs=knobs or {},
        status=status, seconds=1.0, started="2026-01-01T00:00:00", commit="c" * 40, machine="a card",
        final=ends | (final or {}), steps=rows, evals=evals, diag=diag or {},
    )  # fmt: skip


def at(scale="tiny", seeds=3, **losses):
    """Seeds of each variant, whose differences from another's are .001 apart."""
    return [
        outcome(loss + (0.1 + 0.001 * i) * seed, scale=scale, variant=name.replace("_", "-"), seed=seed)
        for i, (name, loss) in enumerate(losses.items()) for seed in range(seeds)
    ]  # fmt: skip


def rates(variant="base", scale="tiny", seeds=2, **kwargs) -> list[Outcome]:
    return [
        outcome(y, "finished" if y else "nan", scale, seed, variant=variant, lr=x)
        for x, y in kwargs["points"].items() for seed in range(seeds)
    ]  # fmt: skip


def shifted(honest, leaky, **labels):
    return [outcome(honest, **{"data.shift": 1}, **labels), outcome(leaky, **{"data.shift": 0}, **labels)]


def batches(fixed, own=()):
    sets = {"fixed": fixed, "own": dict(own)}
    return [outcome(y, batch_size=b, set=of, seed=s) for of in sets for b, y in sets[of].items() for s in (0, 1)]


def deep(post, pre):
    def one(place, small, seed):
        diag = {"gradient": {"blocks.0.attention": 1.0, "blocks.1.attention": small}}
        return outcome(3.0, diag=diag, variant=place, seed=seed)

    return [one(place, 1 / of, seed) for place, of in (("post", post), ("pre", pre)) for seed in (0, 1)]


def ruled(loss):
    """Runs of `batch-rules` at tiny scale: the batch and the rate of each, to its loss."""
    return [
        outcome(loss(b, lr), rule=rule, batch_size=b, lr=lr, seed=s)
        for rule, b, lr in by_rule(16, 3e-2, (1, 4, 16)) for s in (0, 1)
    ]  # fmt: skip


def sizes(measure):
    return [outcome(measure(n), final={"flops_per_token": n}, seed=s) for n in (1, 2, 3) for s in (0, 1)]


V_SHAPE = {1e-3: 3.0, 1e-2: 2.0, 1e-1: None}
SMALL = best("batch_size", "first", where={"set": "fixed"}, rival={"set": "own"})
FLAT = saturates("batch_size", where={"set": "fixed"})
LEAK = artefact((analysis.loss, {"data.shift": 0}), (analysis.loss, {"data.shift": 1}))
COHERENT = artefact((partial(analysis.coherence, 0), {}), (partial(analysis.coherence, -1), {}), otherwise=True)
FASTER = versus("a", "b", at_least(1.5), measure=analysis.speed, ratio=True)


def agreement(last):
    series = [{"step": 1, "coherence": 1.0}, {"step": 2, "coherence": last}]
    return [outcome(1.0, diag={"series": series}, seed=s) for s in (0, 1)]


def fast(scale="full", **speeds):
    return [
        outcome(1.0, variant=v, scale=scale, seed=s, final={"tok_s_steady": y})
        for v, y in speeds.items()
        for s in (0, 1)
    ]


def two(**kwargs):
    return [outcome(seed=seed, **kwargs) for seed in (0, 1)]


CASES = [
    (threshold(analysis.loss, at_most(1.5)), two(val_loss=1.4, scale="full"), "reproduced",
     two(val_loss=1.6, scale="full"), "refuted"),
    (threshold(analysis.speed, at_least(100)), fast(a=150), "reproduced", fast(a=50), "refuted"),
    (threshold(analysis.speed, at_least(100)), [outcome(status="unsupported")], "not run",
     [outcome(status="oom")], None),
    (threshold(partial(analysis.seconds_to, 2.0), at_most(60), over=min),
     two(val_loss=1.9, evals=[{"seconds": 50, "val_loss": 1.9}]), "reproduced",
     two(val_loss=1.9, evals=[{"seconds": 70, "val_loss": 1.9}]), "refuted"),
    (threshold(analysis.batch_that_fits, at_most(0)), two(status="oom", batch_size=9), "reproduced",
     two(val_loss=1.0, batch_size=9), "refuted"),
    (threshold(analysis.time_used, at_most(1.1)), two(val_loss=3.0, knobs={"seconds": 10}, rows=[{"seconds": 10.5}]),
     "reproduced", two(val_loss=3.0, knobs={"seconds": 10}, rows=[{"seconds": 12}]), "refuted"),
    (threshold(analysis.speed, at_most(0.02), over=spread, by="variant"), fast(a=100), "reproduced",
     [*fast(a=100), outcome(1.0, final={"tok_s_steady": 90}, variant="a")], "refuted"),
    (edge(theirs=1.6), rates(points=V_SHAPE), "reproduced", rates(points={1e-3: 2.0, 1e-2: 2.1, 1e-1: 2.2}), "refuted"),
    (edge(), rates(points=V_SHAPE, seeds=1), "seen once", rates(points={1e-3: 2.0, 1e-2: 2.1}, seeds=1), "not seen"),
    (edge(variant="a", below="b"), rates("a", points={1: 2.0, 2: None}) + rates("b", points={1: 2.0, 2: 2.1}),
     "reproduced", rates("a", points={1: 2.0, 2: 2.1}) + rates("b", points={1: 2.0, 2: 2.1}), "refuted"),
    (FLAT, batches({2: 2.0, 4: 2.01, 8: 2.3}), "reproduced", batches({2: 2.0, 4: 2.3, 8: 1.9}), DOUBT),
    (SMALL, batches({2: 2.0, 4: 2.05, 8: 2.3}, {2: 1.8, 4: 2.0}), "artefact",
     batches({2: 2.0, 4: 2.1, 8: 2.3}, {2: 2.01, 4: 2.1}), "reproduced"),
    (SMALL, batches({2: 2.1, 4: 2.0, 8: 2.3}, {2: 2.11, 4: 2.0}), "refuted",
     batches({2: 2.0, 4: 2.01, 8: 2.3}, {2: 2.0, 4: 2.01}), DOUBT),
    (monotone("batch_size", where={"rule": "fixed"}), ruled(lambda b, lr: 3.0 / b), "reproduced",
     ruled(lambda b, lr: b), "refuted"),
    (monotone("batch_size", where={"rule": "fixed"}), ruled(lambda b, lr: 3.0 - b / 1e4), DOUBT, [], None),
    (monotone(analysis.cost), sizes(lambda n: 3 - n), "reproduced", sizes(lambda n: 3 + n), "refuted"),
    (monotone(analysis.cost), sizes(lambda n: 3 - n % 2), "refuted",
     [outcome(1.0, final={"flops_per_token": 1})], None),
    (monotone("model.recompute", measure=analysis.memory),
     [outcome(1.0, seed=s, final={"memory": 9 - n}, **{"model.recompute": n}) for n in (0.5, 1.0) for s in (0, 1)],
     "reproduced",
     [outcome(1.0, seed=s, final={"memory": 9 + n}, **{"model.recompute": n}) for n in (0.5, 1.0) for s in (0, 1)],
     "refuted"),
    (versus({"rule": "sqrt"}, {"rule": "fixed"}, LOWER, where={"batch_size": 1}),
     ruled(lambda b, lr: 3.0 - (lr < 0.02)), "reproduced", ruled(lambda b, lr: 3.0 + (lr < 0.02)), "refuted"),
    (best("lr", "grows", over="batch_size"),
     [outcome(abs(lr - b), batch_size=b, lr=lr, seed=s) for b in (1, 2) for lr in (1, 2) for s in (0, 1)], "reproduced",
     [outcome(lr, batch_size=b, lr=lr, seed=s) for b in (1, 2) for lr in (1, 2) for s in (0, 1)], "refuted"),
    (COHERENT, agreement(0.95), "reproduced", agreement(0.2), "artefact"),
    (versus("a", "b", HIGHER), at(a=2.0, b=1.0), "reproduced", at(a=1.0, b=2.0), "refuted"),
    (versus("a", "b", HIGHER), [*at(a=1.0, seeds=2), outcome(1.1, variant="b"), outcome(0.9, variant="b", seed=1)],
     DOUBT, at(a=1.0), None),
    (versus("a", "b", HIGHER), at(seeds=1, a=2.0, b=1.0), "seen once", at(seeds=1, a=1.0, b=2.0), "not seen"),
    (versus("a", "b", HIGHER), at(seeds=1, a=1.01, b=1.0), DOUBT, [*at(a=1.0), *at(a=1.0)], None),
    (versus("a", "b", DIFFERENT), at(a=2.0, b=1.0), "reproduced", at(a=1.0, b=1.0), DOUBT),
    (versus("a", "b", same(0.02)), at(a=1.0, b=1.01), "reproduced", at(a=1.0, b=1.05), "refuted"),
    (versus("a", "b", at_most(0.1)), at(scale="full", a=1.0, b=1.0), "reproduced",
     at(scale="full", a=1.2, b=1.0), "refuted"),
    (versus("a", "b", HIGHER, measure=analysis.late_change),
     [outcome(3.0, variant=v, seed=s, evals=[{"step": 5, "val_loss": 4.0}, {"step": 10, "val_loss": y + s / 1e3}])
      for v, y in (("a", 3.0), ("b", 2.0)) for s in (0, 1)], "reproduced",
     [outcome(3.0, variant=v, seed=s, evals=[{"step": 5, "val_loss": 4.0}, {"step": 10, "val_loss": y}])
      for v, y in (("a", 2.0), ("b", 3.0)) for s in (0, 1)], "refuted"),
    (versus("a", "b", HIGHER, best_over="lr"),
     rates("a", points={1: 2.0, 2: 3.0}) + rates("b", points={1: 4.0, 2: 1.5}), "reproduced",
     rates("a", points={1: 2.0, 2: 1.0}) + rates("b", points={1: 1.5, 2: 2.0}), "refuted"),
    (versus("a", "b", LOWER, where={"lr": LAST}),
     rates("a", points={1: 2.0, 2: 2.0}) + rates("b", points={1: 1.5, 2: None}), "reproduced",
     rates("a", points={1: 2.0, 2: None}) + rates("b", points={1: 1.5, 2: 2.0}), "refuted"),
    (FASTER, fast(a=200, b=100), "reproduced", fast(a=120, b=100), "refuted"),
    (FASTER, fast(a=150, b=100), "refuted", [outcome(variant="a"), outcome(variant="b")], None),
    (statuses("a", "b"), rates("a", points={1: None}) + rates("b", points={1: 2.0}), "reproduced",
     rates("a", points={1: 2.0}) + rates("b", points={1: 2.0}), "refuted"),
    (statuses("a", "b"), rates("a", points={1: None, 2: None}) + rates("b", points={1: 2.0, 2: None}),
     "reproduced", rates("a", points={1: None, 2: 2.0}) + rates("b", points={1: 2.0, 2: None}), "refuted"),
    (statuses("a", "b"), rates("a", points={1: None}) + rates("b", points={2: 2.0}), "refuted",
     [*rates("a", points={1: None}), outcome(status="crashed", variant="b", lr=1)], None),
    (versus("post", "pre", at_least(1e3), measure=analysis.gradient_spread, ratio=True), deep(1e5, 2), "reproduced",
     deep(1e3, 2), "refuted"),
    (equal("adam", "adamw"), two(val_loss=3.0, variant="adam") + two(val_loss=3.0, variant="adamw"), "reproduced",
     two(val_loss=3.0, variant="adam") + two(val_loss=3.0 + 1e-12, variant="adamw"), "refuted"),
    (best("weight_decay", 0.0),
     [outcome(3 + d, weight_decay=d, seed=s) for d in (0.0, 0.1) for s in (0, 1)], "reproduced",
     [outcome(3 - d, weight_decay=d, seed=s) for d in (0.0, 0.1) for s in (0, 1)], "refuted"),
    (best(analysis.cost, "inside"), sizes(lambda n: (n - 2) ** 2), "reproduced", sizes(lambda n: n), "refuted"),
    (LEAK, shifted(3.0, 0.1), "artefact", shifted(3.0, 2.9), "not seen"),
    (artefact(*LEAK.args, by="model.d_ff"),
     shifted(3.0, 0.3, **{"model.d_ff": 1}) + shifted(2.9, 0.1, **{"model.d_ff": 12}),
     "artefact", shifted(3.0, 2.9, **{"model.d_ff": 1}) + shifted(2.9, 2.8, **{"model.d_ff": 12}), "not seen"),
]  # fmt: skip


def judged(judge, outcomes):
    (found,) = verdicts([judge(Results(outcomes), NOISE)], [False])
    return found


@pytest.mark.parametrize("judge, outcomes, expected, others, other_expected", CASES)
def test_judges(judge, outcomes, expected, others, other_expected):
    """Each of two sets of results gets its verdict; None stands for a claim that is not run."""
    for found, wanted in ((outcomes, expected), (others, other_expected)):
        if wanted is None:
            with pytest.raises(LookupError):
                judge(Results(found), NOISE)
        else:
            assert judged(judge, found) == wanted


@pytest.mark.parametrize("judge, outcomes, expected, others, other_expected", CASES)
def test_a_run_that_crashed_decides_nothing(judge, outcomes, expected, others, other_expected):
    """Whichever of the runs it is, the verdict stays or there is none."""
    for found, wanted in ((outcomes, expected), (others, other_expected)):
        for i in range(len(found)):
            crashed = replace(found[i], status="crashed", final={}, steps=(), evals=(), diag={})
            with suppress(LookupError):
                assert judged(judge, [*found[:i], crashed, *found[i + 1 :]]) == wanted


def test_a_label_may_be_a_word():
    runs = [outcome(y, variant=v, activation=a) for v, y in (("a", 1.0), ("b", 2.0)) for a in ("relu", "silu")]
    assert (
        versus("a", "b", DIFFERENT, best_over="activation")(Results(runs), NOISE).ours
        == "1.000 at relu for 2.000 at relu"
    )
    runs = [outcome(y, activation=a) for a, y in (("relu", 2.0), ("silu", 1.0))]
    assert best("activation", "silu")(Results(runs), NOISE).ours == "1.000 at silu, by 1.000"


# Statistics


def test_a_paired_difference_is_scipys_t_test():
    a, b = (2.0, 3.0, 4.1), (1.8, 2.7, 3.9)
    found = paired(dict(enumerate(a)), {2: 3.9, 0: 1.8, 1: 2.7, 3: 0.0}, None)
    theirs = stats.ttest_rel(a, b)
    assert (found.mean, found.n) == (pytest.approx(0.7 / 3), 3)
    assert found.p(HIGHER) == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.95)
    assert found.interval == pytest.approx((high - low) / 2)


def test_one_seed_is_compared_with_the_noise_of_two_runs():
    found = paired({0: 2.0}, {0: 1.98, 1: 5.0}, NOISE)
    assert found.interval == pytest.approx(stats.t.ppf(0.975, 20) * 0.01 * 2**0.5)
    assert found.p(HIGHER) == pytest.approx(2 * stats.t.sf(0.02 / (0.01 * 2**0.5), 20))
    assert paired({0: 2.0}, {0: 1.0}, None).p(HIGHER) is None  # nothing was repeated


def test_differences_with_runs_that_failed():
    good, bad = {0: 2.0}, {0: math.inf}
    assert (paired(bad, good, NOISE).mean, paired(bad, good, NOISE).p(HIGHER)) == (math.inf, 0.0)
    assert paired(good, bad, NOISE).mean == -math.inf and paired(good, bad, NOISE).interval is None
    with pytest.raises(LookupError, match="both"):
        paired(bad, bad, NOISE)
    with pytest.raises(LookupError, match="no seed"):
        paired(good, {1: 2.0}, NOISE)
    with pytest.raises(LookupError, match="2 runs with 1 seeds"):
        versus("a", "a", HIGHER)(Results(2 * [outcome(2.0, variant="a")]), NOISE)


@pytest.mark.parametrize(
    "mean, all_on_one_side", [(0.0, True), (0.008, True), (0.012, False), (0.045, True), (0.025, False)]
)
def test_equivalence_is_an_interval_within_the_bounds(mean, all_on_one_side):
    found = Difference(mean, 2, 0.005, 20)  # ± 0.0104
    low, high = mean - found.interval, mean + found.interval
    assert all_on_one_side == ((low > -0.02 and high < 0.02) or low > 0.02)
    assert (found.p(same(0.02)) < 0.05) == all_on_one_side


def test_noise_is_pooled_over_repeated_runs():
    groups = [[outcome(1.0), outcome(1.2)], [outcome(5.0), outcome(5.1), outcome(5.2)], [outcome(9.0)], []]
    noise = Noise.of([*groups, [outcome(1.0), outcome(None, "nan")]])
    assert noise.dof == 3 and noise.sd == pytest.approx(((0.02 + 2 * 0.01) / 3) ** 0.5)
    assert Noise.of([[outcome(1.0)]]) is None


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_p_values_are_corrected_over_the_claims_that_are_judged_here():
    claims, here = [Finding("x", True, p=0.02, seeds=3), Finding("x", True, p=0.04, seeds=3)], [False] * 2
    assert verdicts(claims[:1], here) == ["reproduced"]
    assert verdicts(claims, here) == ["reproduced", "reproduced"]
    assert verdicts([*claims, Finding("x", True, p=0.3, seeds=3)], [*here, False]) == [DOUBT] * 3
    elsewhere = replace(claims[0], p=0.5)
    assert verdicts([*claims, elsewhere], [*here, True]) == ["reproduced", "reproduced", ELSEWHERE]


@pytest.mark.parametrize(
    "finding, elsewhere, expected",
    [
        (Finding("x", True, seeds=1), False, "seen once"),
        (Finding("x", False, seeds=1), False, "not seen"),
        (Finding("x", True, seeds=2), False, "reproduced"),
        (Finding("x", None), True, "not run"),
        (Finding("none of this size", False), True, ELSEWHERE),
        (Finding("x", True, seeds=1, artefact=True), False, "artefact"),
    ],
)
def test_one_seed_reproduces_nothing(finding, elsewhere, expected):
    assert verdict(finding, elsewhere, None) == expected
