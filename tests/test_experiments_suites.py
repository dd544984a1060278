"""The suites are complete, can be run at every scale, and are what was published; their judges judge."""

import math
from contextlib import suppress
from dataclasses import replace

import pytest

from experiments import analysis, judges
from experiments.run import configuration, meta_model, trials
from experiments.spec import Outcome, Results, Suite
from experiments.suites import LEADERBOARD, M0, M1, M1_OWT, M2, M3, M4, M4_SHAPE, M4_SIZES, RATES, SUITES, by_rule
from runtime.config import ConfigError

SCALES = ("tiny", "low", "full")
ABSENT = {"fp8", "nvfp4"}  # precisions that the trainer refuses, which is what their trials record


def parameters(knobs) -> int:
    return meta_model(configuration(knobs)).n_parameters()


# What is declared


def test_every_row_is_claimed():
    claimed = {claim.row for suite in SUITES.values() for claim in suite.claims}
    assert claimed == set(range(1, 35))
    for suite in SUITES.values():
        assert {claim.row for claim in suite.claims} == set(suite.rows), suite.name
        assert set(suite.base) == set(SCALES), suite.name


@pytest.mark.parametrize("scale", SCALES)
def test_every_trial_is_accepted_by_the_trainer(scale):
    seen = set()
    for suite in SUITES.values():
        found = trials(suite, scale)
        assert len({trial.key for trial in found}) == len(found), f"{suite.name} runs the same twice"
        for trial in found:
            knobs = {key: value for key, value in trial.knobs.items() if key not in ("seed", "lr")}
            if (shown := repr(sorted(knobs.items()))) in seen:
                continue
            seen.add(shown)
            if knobs.get("precision") in ABSENT:
                with pytest.raises(ConfigError, match="precision must be"):
                    configuration(knobs)
                continue
            config = configuration(knobs)
            config.model.resolved(config.data.expected_vocab_size, config.data.separator)
            if scale == "tiny":
                assert config.data.corpus in ("docstrings", "stdlib"), "no download"


def test_all_tiny_suites_are_small():
    counts = {name: len(trials(suite, "tiny")) for name, suite in SUITES.items()}
    assert sum(counts.values()) <= 250
    assert counts["lr"] == 9 and counts["position"] == 14 and counts["depth"] == 8


def test_joined_knobs_change_together():
    suite = Suite("s", "", (), {}, (), grid={"a,b": ((1, 2), (3, 4)), "c": (5, 6)})
    assert suite.points("tiny") == [
        {"a": 1, "b": 2, "c": 5}, {"a": 1, "b": 2, "c": 6}, {"a": 3, "b": 4, "c": 5}, {"a": 3, "b": 4, "c": 6}
    ]  # fmt: skip


# What was published


@pytest.mark.parametrize(
    "preset, published",
    [
        (M0, {"n_layer": 4, "n_head": 16, "d_model": 512, "d_ff": 1344, "seq_len": 256, "rope_theta": 1e4,
              "tied": False, "bias": False, "init": "xavier", "embedding_std": 1.0, "vocab_size": 10_000, "beta1": 0.9,
              "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "clip": 1.0, "optimizer": "adamw",
              "batch_size": 32, "steps": 5000}),
        (M1, {"n_layer": 8, "n_head": 8, "d_model": 512, "d_ff": 1408, "seq_len": 256, "weight_decay": 0.01,
              "warmup": 200, "schedule": "cosine", "final_lr": 0.1, "batch_size": 128, "steps": 5000, "lr": 2e-3}),
        (M1_OWT, {"corpus": "openwebtext", "vocab_size": 32_000}),
        (M2, {"n_layer": 12, "n_head": 8, "d_model": 768, "d_ff": 3072, "seq_len": 1024, "vocab_size": 33_283,
              "precision": "bf16"}),
        (M3, {"n_layer": 12, "n_head": 12, "d_model": 768, "seq_len": 512, "batch_size": 16, "lr": 5e-6, "beta1": 0.9,
              "beta2": 0.95, "weight_decay": 0.1, "corpus": "pile", "tokenizer": "gpt2"}),
        (M4, {"n_layer": 12, "n_head": 12, "n_kv_head": 3, "d_model": 768, "d_ff": 2048, "seq_len": 128, "tied": True,
              "batch_size": 64 * 16, "micro_batch": 64, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "lr": 1e-4,
              "final_lr": 0.5, "warmup": 1000, "steps": 1000, "tokenizer": "gpt2", "precision": "bf16"}),
    ],
    ids=["M0", "M1", "M1 on OpenWebText", "M2", "M3", "M4"],
)  # fmt: skip
def test_presets_are_as_published(preset, published):
    config = configuration(preset["full"])
    for key, value in published.items():
        text = key in ("vocab_size", "corpus", "tokenizer")
        of = config.data if text else config.model if hasattr(config.model, key) else config
        assert getattr(of, key) == value, key


@pytest.mark.parametrize(
    "knobs, millions",
    [
        (M1["full"], 36),
        (M1_OWT["full"] | {"model.tied": True}, 42),
        (M3["full"], 124),
        (M4["full"], 113),
        *(
            (M4["full"] | dict(zip(M4_SHAPE.split(","), shape, strict=True)), size)
            for shape, size in zip(M4_SIZES["full"], (50, 113, 200, 350), strict=True)
        ),
    ],
)
def test_sizes_are_as_published(knobs, millions):
    assert parameters(knobs) == pytest.approx(millions * 1e6, rel=0.04)


@pytest.mark.parametrize("scale", SCALES)
def test_activations_are_compared_at_equal_parameters(scale):
    for name, base in (("activation", "swiglu"), ("leak", "base")):
        sizes = {
            trial.labels["variant"]: parameters(trial.knobs)
            for trial in trials(SUITES[name], scale, seeds=1)
            if name == "activation" or trial.labels["variant"] in (base, "swiglu")
        }
        for variant, size in sizes.items():
            assert abs(size / sizes[base] - 1) < 0.03, (name, variant)


def test_rates_by_rule():
    assert set(by_rule(16, 0.1, (4, 16))) == {(4, 0.1), (16, 0.1), (4, 0.05), (4, 0.025)}


def test_leaderboard_has_the_published_speeds_sizes():
    shapes = {(d_model, n_layer) for n_layer, _, d_model, _, _ in LEADERBOARD}
    assert len(LEADERBOARD) == 7 and {(512, 8), (640, 10), (768, 12), (1024, 16)} <= shapes


@pytest.mark.parametrize(
    "rates, losses, edge",
    [
        (RATES, (2.235, 1.841, 1.648, 1.615, 1.8, 2.125, 3.302, 3.398, 4.405), 3e-2),
        ((3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2), (1.529, 1.455, 1.377, 1.349, 1.350, 2.290, 2.529), 5e-3),
    ],
)
def test_published_edges_of_stability(rates, losses, edge):
    assert analysis.edge(list(zip(rates, losses, strict=True))) == edge


# What judges say of results that are made up


def outcome(
    val_loss=None,
    status="finished",
    scale="tiny",
    seed=0,
    rows=(),
    evals=(),
    diag=None,
    knobs=None,
    final=None,
    **labels,
) -> Outcome:
    ends = {} if val_loss is None else {"val_loss": val_loss}
    return Outcome(
        key="k", suite="s", scale=scale, labels={"variant": "base", "seed": seed} | labels, knobs=knobs or {},
        status=status, seconds=1.0, started="2026-01-01T00:00:00", commit="c" * 40, machine="a card",
        final=ends | (final or {}), steps=rows, evals=evals, diag=diag or {},
    )  # fmt: skip


def at(scale="tiny", **losses):
    """Two seeds of each variant, .01 apart."""
    return [
        outcome(loss + 0.01 * seed, scale=scale, variant=name.replace("_", "-"), seed=seed)
        for name, loss in losses.items() for seed in (0, 1)
    ]  # fmt: skip


def rates(variant="base", scale="tiny", **kwargs) -> list[Outcome]:
    return [outcome(y, "finished" if y else "nan", scale, variant=variant, lr=x) for x, y in kwargs["points"].items()]


def shifted(honest, leaky, **labels):
    return [outcome(honest, **{"data.shift": 1}, **labels), outcome(leaky, **{"data.shift": 0}, **labels)]


def batches(fixed, own):
    return [
        *(outcome(y, batch_size=b, eval_tokens=4096) for b, y in fixed.items()),
        *(outcome(y, batch_size=b, eval_tokens=64 * b) for b, y in own.items()),
    ]


def spread(post, pre):
    def one(place, small, **labels):
        diag = {"gradient": {"blocks.0.attention": 1.0, "blocks.1.attention": small}}
        return outcome(3.0, diag=diag, warmup=0.0, **{"model.norm_place": place, "model.n_layer": 12}, **labels)

    return [one("post", 1 / post), one("pre", 1 / pre)]


V_SHAPE = {1e-3: 3.0, 1e-2: 2.0, 1e-1: None}
LN_V = math.log(257)
BYTES = {"data.tokenizer": "bytes", "steps": 10, "lr": 0.1, "warmup": 0.2, "schedule": "linear"}
RATE = [{"step": 1, "loss": LN_V, "lr": 0.0}, {"step": 10, "loss": 0.05, "lr": 0.1 / 8}]

CASES = [
    (judges.bar(1.5), [outcome(1.4, scale="full")], "reproduced", [outcome(1.6, scale="full")], "refuted"),
    (judges.bar(1.5), [outcome(1.4)], "not comparable at this scale", [], None),
    (judges.throughput(100), [outcome(1.0, scale="full", final={"tok_s_steady": 150})], "reproduced",
     [outcome(1.0, scale="full", final={"tok_s_steady": 50})], "refuted"),
    (judges.throughput(100), [outcome(status="unsupported")], "not run",
     [outcome(status="oom")], None),
    (judges.within(2.0, 60), [outcome(1.9, scale="full", evals=[{"step": 1, "seconds": 50, "val_loss": 1.9}])],
     "reproduced",
     [outcome(1.9, scale="full", evals=[{"step": 1, "seconds": 70, "val_loss": 1.9}])], "refuted"),
    (judges.learning_rates(1.6, 3), rates(points=V_SHAPE), "reproduced",
     rates(points={1e-3: 2.0, 1e-2: 2.1, 1e-1: 2.2}), "refuted"),
    (judges.learning_rates(1.6, 4), rates(points=V_SHAPE), None, [], None),
    (judges.equal_tokens(0.1), batches({2: 2.0, 4: 2.01, 8: 2.3}, {}), "reproduced",
     batches({2: 2.0, 4: 2.01, 8: 1.9}, {}), "refuted"),
    (judges.evaluation_artefact, batches({2: 2.0, 4: 2.01, 8: 2.3}, {2: 1.8, 4: 2.0}), "artefact",
     batches({2: 2.0, 4: 2.1, 8: 2.3}, {2: 2.01, 4: 2.1}), "reproduced"),
    (judges.evaluation_artefact, batches({2: 2.1, 4: 2.0, 8: 2.3}, {2: 2.11, 4: 2.0}), "refuted", [], None),
    (judges.equal_steps, [outcome(3.0 / b, batch_size=b, lr=lr) for b, lr in by_rule(2, 1.0, (1, 2, 4))],
     "reproduced",
     [outcome(3.0, batch_size=b, lr=lr) for b, lr in by_rule(2, 1.0, (1, 2, 4))], "refuted"),
    (judges.rule_helps(0.5), [outcome(3.0 - (lr < 1), batch_size=b, lr=lr) for b, lr in by_rule(2, 1.0, (1, 2))],
     "reproduced",
     [outcome(3.0 + (lr < 1), batch_size=b, lr=lr) for b, lr in by_rule(2, 1.0, (1, 2))], "refuted"),
    (judges.fits(8), [outcome(status="oom", scale="full", batch_size=8)], "reproduced",
     [outcome(1.0, scale="full", batch_size=8)], "refuted"),
    (judges.co_scaling, [outcome(abs(lr - b), batch_size=b, lr=lr) for b in (1, 2) for lr in (1, 2)], "reproduced",
     [outcome(lr, batch_size=b, lr=lr) for b in (1, 2) for lr in (1, 2)], "refuted"),
    (judges.coherence(0.9), [outcome(1.0, diag={"series": [{"step": 1, "coherence": 1.0}, {"step": 2,
     "coherence": 0.95}]})], "reproduced",
     [outcome(1.0, diag={"series": [{"step": 1, "coherence": 1.0}, {"step": 2, "coherence": 0.2}]})], "artefact"),
    (judges.worse("a", "b"), at(a=2.0, b=1.0), "reproduced", at(a=1.0, b=2.0), "refuted"),
    (judges.worse("a", "b"), [*at(a=1.0), outcome(1.1, variant="b"), outcome(0.9, variant="b", seed=1)],
     "not comparable at this scale", at(a=1.0), None),
    (judges.alike("a", "b", 0.02), at(a=1.0, b=1.01), "reproduced", at(a=1.0, b=1.05), "refuted"),
    (judges.costs_at_most(0.1, "a", "b"), at(scale="full", a=1.0, b=1.0), "reproduced",
     at(scale="full", a=1.2, b=1.0), "refuted"),
    (judges.fails_earlier("a", "b"), rates("a", points={1: None}) + rates("b", points={1: 2.0}), "reproduced",
     rates("a", points={1: 2.0}) + rates("b", points={1: 2.0}), "refuted"),
    (judges.fails_earlier("a", "b"), rates("a", points={1: None, 2: None}) + rates("b", points={1: 2.0, 2: None}),
     "reproduced", rates("a", points={1: None, 2: 2.0}) + rates("b", points={1: 2.0, 2: None}), "refuted"),
    (judges.fails_earlier("a", "b"), rates("a", points={1: None}) + rates("b", points={2: 2.0}), "refuted",
     [*rates("a", points={1: None}), outcome(status="crashed", variant="b", lr=1)], None),
    (judges.higher_at_best("a", "b", 1.4), rates("a", "full", points={1: 2.0}) + rates("b", "full", points={1: 1.5}),
     "reproduced", rates("a", "full", points={1: 1.5}) + rates("b", "full", points={1: 2.0}), "refuted"),
    (judges.lower_edge("a", "b"), rates("a", points={1: 2.0, 2: None}) + rates("b", points={1: 2.0, 2: 2.1}),
     "reproduced", rates("a", points={1: 2.0, 2: 2.1}) + rates("b", points={1: 2.0, 2: 2.1}), "refuted"),
    (judges.bears_high_rates("a", "b"),
     rates("a", points={1: 2.0, 2: 2.0}) + rates("b", points={1: 1.5, 2: None}), "reproduced",
     rates("a", points={1: 2.0, 2: None}) + rates("b", points={1: 1.5, 2: None}), "refuted"),
    (judges.bears_high_rates("a", "b"), rates("a", points={1: 2.0}) + rates("b", points={1: 1.5, 2: None}), "refuted",
     [], None),
    (judges.gradient_spread(1e3), spread(1e5, 2), "reproduced", spread(1e3, 2), "refuted"),
    (judges.starts_high("base", 35), [outcome(3.0, knobs=BYTES, rows=[{"step": 1, "loss": 33.0}])], "reproduced",
     [outcome(3.0, knobs=BYTES, rows=[{"step": 1, "loss": LN_V}])], "refuted"),
    (judges.starts_at_chance("base"), [outcome(3.0, knobs=BYTES, rows=RATE)], "reproduced",
     [outcome(3.0, knobs=BYTES, rows=[{"step": 1, "loss": 33.0}])], "refuted"),
    (judges.starts_at_chance("base"), [outcome(status="crashed")], None, [], None),
    (judges.overfits(0.1), [outcome(3.0, rows=RATE)], "reproduced", [outcome(3.0, rows=RATE[:1])], "refuted"),
    (judges.samples, [outcome(3.0, knobs=BYTES | {"sample_every": 5}, final={"step": 10})], "reproduced",
     [outcome(status="nan")], "refuted"),
    (judges.on_time(0.1), [outcome(3.0, knobs={"seconds": 10}, rows=[{"seconds": 10.5}])], "reproduced",
     [outcome(3.0, knobs={"seconds": 10}, rows=[{"seconds": 12}])], "refuted"),
    (judges.longer_is_better, [outcome(3.0 - n, steps=n) for n in (1, 2)], "reproduced",
     [outcome(3.0 + n, steps=n) for n in (1, 2)], "refuted"),
    (judges.traced, [outcome(3.0, knobs=BYTES)], "reproduced", [outcome(3.0)], "refuted"),
    (judges.adam_is_adamw, [outcome(3.0, variant=v, weight_decay=0.0) for v in ("adam", "adamw")], "reproduced",
     [outcome(len(v), variant=v, weight_decay=0.0) for v in ("adam", "adamw")], "refuted"),
    (judges.best_decay, [outcome(3 + d, variant="adamw", weight_decay=d) for d in (0.0, 0.1)], "reproduced",
     [outcome(3 - d, variant="adamw", weight_decay=d) for d in (0.0, 0.1)], "refuted"),
    (judges.endpoints, [outcome(3.0, knobs=BYTES, rows=RATE, final={"step": 10})], "reproduced",
     [outcome(3.0, knobs=BYTES | {"schedule": "cosine"}, rows=RATE, final={"step": 10})], "refuted"),
    (judges.warmup_too_long("a"),
     [outcome(y, scale="full", variant=v, lr=1) for v, y in (("a", 3.0), ("b", 2.0))], "reproduced",
     [outcome(y, scale="full", variant=v, lr=1) for v, y in (("a", 2.0), ("b", 3.0))], "refuted"),
    (judges.larger_is_better, [outcome(3 - n, final={"flops_per_token": n}) for n in (1, 2)], "reproduced",
     [outcome(3 + n, final={"flops_per_token": n}) for n in (1, 2)], "refuted"),
    (judges.leak, shifted(3.0, 0.1), "artefact", shifted(3.0, 2.9), "refuted"),
    (judges.honest("a", "b"), [outcome(1.0, scale="full", variant="a", **{"data.shift": 1}), outcome(2.0,
     scale="full", variant="b", **{"data.shift": 1})],
     "reproduced", [], None),
    (judges.nested, shifted(3.0, 0.3, **{"model.d_ff": 1}) + shifted(2.9, 0.1, **{"model.d_ff": 12}), "artefact",
     shifted(3.0, 2.9, **{"model.d_ff": 1}) + shifted(2.9, 2.8, **{"model.d_ff": 12}), "refuted"),
    (judges.watched, [outcome(3.0, diag={kind: {"0": 1.0} for kind in judges.KINDS})], "reproduced",
     [outcome(3.0, diag={"snr": {}})], "refuted"),
    (judges.watched, [outcome(3.0, diag={kind: {"0": math.nan} for kind in judges.KINDS})], "refuted", [], None),
    (judges.free("a", "b"), [outcome(3.0, variant=v, scale="full", final={"tok_s_wall": 100}) for v in "ab"],
     "reproduced",
     [outcome(ord(v), variant=v, final={"tok_s_wall": 100}) for v in "ab"], "refuted"),
]  # fmt: skip


@pytest.mark.parametrize("judge, outcomes, verdict, others, other_verdict", CASES)
def test_judges(judge, outcomes, verdict, others, other_verdict):
    """Each of two sets of results gets its verdict; None stands for a claim that is not run."""
    for found, expected in ((outcomes, verdict), (others, other_verdict)):
        if expected is None:
            with pytest.raises(LookupError):
                judge(Results(found))
        else:
            assert judge(Results(found)).verdict == expected


@pytest.mark.parametrize("judge, outcomes, verdict, others, other_verdict", CASES)
def test_a_run_that_crashed_decides_nothing(judge, outcomes, verdict, others, other_verdict):
    """Whichever of the runs it is, the verdict stays or there is none."""
    for found, expected in ((outcomes, verdict), (others, other_verdict)):
        for i in range(len(found)):
            crashed = replace(found[i], status="crashed", final={})
            with suppress(LookupError):
                now = judge(Results([*found[:i], crashed, *found[i + 1 :]])).verdict
                assert now in (expected, "not comparable at this scale")


def test_every_claim_without_trials_is_not_run():
    for suite in SUITES.values():
        for claim in suite.claims:
            with pytest.raises(LookupError):
                claim.judge(Results([]))
