"""The suites are complete, can be run at every scale, and are what was published."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import analysis, ledger
from experiments.run import configuration, digest_of, is_done, meta_model, trials
from experiments.spec import Results, Suite
from experiments.suites import LEADERBOARD, M0, M1, M1_OWT, M2, M3, M4, M4_SHAPE, M4_SIZES, RATES, SUITES, by_rule
from runtime.records import RECIPE

SCALES = ("tiny", "low", "full")
RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def parameters(knobs) -> int:
    return meta_model(configuration(knobs)).n_parameters()


# What is declared


def test_every_row_is_claimed():
    claimed = {claim.row for suite in SUITES.values() for claim in suite.claims}
    assert claimed == set(range(1, 35))
    for name, suite in SUITES.items():
        assert set(suite.base) == (set(SCALES) if name != "tested" else set()), name


@pytest.mark.parametrize("scale", SCALES)
def test_every_trial_is_accepted_by_the_trainer(scale):
    seen = set()
    for suite in SUITES.values():
        found = trials(suite, scale) if suite.base else []
        assert len({json.dumps(trial.labels) for trial in found}) == len(found), suite.name
        assert len(found) == (suite.size(scale) if suite.base else 0)
        for trial in found:
            knobs = {key: value for key, value in trial.knobs.items() if key not in ("seed", "lr")}
            if (shown := repr(sorted(knobs.items()))) in seen:
                continue
            seen.add(shown)
            config = configuration(knobs)
            config.model.resolved(config.data.expected_vocab_size, config.data.separator)
            if scale == "tiny":
                assert config.data.corpus in ("docstrings", "stdlib"), "no download"


def test_all_tiny_suites_are_small():
    counts = {name: suite.size("tiny") for name, suite in SUITES.items() if suite.base}
    assert sum(counts.values()) <= 250
    assert counts["lr"] == 9 and counts["position"] == 14 and counts["depth"] == 8


def test_joined_knobs_change_together():
    suite = Suite("s", "", {}, (), grid={"a,b": ((1, 2), (3, 4)), "c": (5, 6)})
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
    assert by_rule(16, 0.1, (4, 16)) == [
        ("fixed", 4, 0.1), ("fixed", 16, 0.1), ("sqrt", 4, 0.05), ("sqrt", 16, 0.1), ("linear", 4, 0.025),
        ("linear", 16, 0.1),
    ]  # fmt: skip


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


def test_every_claim_without_trials_is_not_run():
    for suite in SUITES.values():
        for claim in suite.claims:
            if claim.judge:
                with pytest.raises(LookupError):
                    claim.judge(Results([]), None)


# Ledgers


def test_ledgers_of_before_are_read_and_their_trials_run_again(monkeypatch):
    """A line as commit a08ca20 wrote it, which kept more rows of its steps and said nothing of recipe and text."""
    monkeypatch.setattr("experiments.run._digest", lambda data: f"digest of {data.corpus}")  # preparing it takes 10 s
    (outcome,) = ledger.read(Path(__file__).with_name("ledger_a08ca20.jsonl"))
    assert outcome.key == "1cb49358e674" and outcome.labels == {"variant": "base", "lr": 1e-4, "seed": 0}
    assert (outcome.status, outcome.val_loss, len(outcome.steps)) == ("finished", 4.715704470872879, 31)
    trial = trials(SUITES["lr"], "tiny")[0]
    assert trial.key == outcome.key and not is_done(trial, outcome)
    now = replace(outcome, recipe=RECIPE, digest=digest_of(trial))
    assert is_done(trial, now) and not is_done(trial, replace(now, digest="another text"))


@pytest.mark.parametrize("suite", SUITES.values(), ids=list(SUITES))
def test_committed_ledgers_hold_what_is_declared(suite):
    if found := ledger.read(ledger.place(RESULTS, "tiny", suite.name)):
        assert {trial.key for trial in trials(suite, "tiny")} <= {outcome.key for outcome in found}
