"""The experiments of five public logs, each a sweep that can be repeated at three scales.

`full` is a recipe as published; `low` takes a tenth of its steps, and leaves out the grid's most expensive points;
`tiny` is the recipe on a model, a text and a budget that a CPU core trains in seconds. What a log does not say is ours
to choose, and is marked so. A tiny grid has its own learning rates, since the best one changes most with size.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from experiments import analysis, judges, roofline
from experiments.judges import HIGHER, LOWER, at_least, at_most, same, spread
from experiments.spec import LAST, Claim, Finding, Knobs, Scale, Suite

# Presets

RECORD = {"sample_every": 0, "log_every": 10, "eval_every": 250, "eval_tokens": 524_288, "save_every": 1_000_000}

# On bytes, so that every machine has the text and a trial begins at once.
SMALL = {
    "data.corpus": "docstrings", "data.tokenizer": "bytes", "model.n_layer": 2, "model.n_head": 4, "model.n_kv_head": 0,
    "model.d_model": 48, "model.d_ff": 0, "model.seq_len": 64, "batch_size": 16, "micro_batch": 0, "steps": 150,
    "warmup": 0.04, "log_every": 5, "eval_every": 25, "eval_tokens": 16_384,
    "device": "cpu", "precision": "fp32", "compile": "off",
}  # fmt: skip


def preset(published: Knobs, low: Knobs | None = None, tiny: Knobs | None = None) -> dict[Scale, dict[str, Any]]:
    """A recipe at every scale; `low` and `tiny` are what else differs there."""
    tenth = {key: max(1, published[key] // 10) for key in ("steps", "warmup") if published.get(key, 0) >= 1}
    full = RECORD | dict(published)
    return {"tiny": full | SMALL | (tiny or {}), "low": full | {"eval_every": 50} | tenth | (low or {}), "full": full}


def adapt(base: Mapping[Scale, Knobs], every: Knobs | None = None, **at: Knobs) -> dict[Scale, dict[str, Any]]:
    """A preset with `every` changed at all scales, and others at some."""
    return {scale: {**knobs, **(every or {}), **at.get(scale, {})} for scale, knobs in base.items()}


# Stanford's CS336. Its rates of Adam's moments are M1's too; the cosine and the warm-up of M1 are M0's too.
CS336 = {
    "data.tokenizer": "bpe", "model.seq_len": 256, "model.tied": False, "model.qk_norm": False, "model.init": "xavier",
    "model.embedding_std": 1.0, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 1.0,
    "schedule": "cosine", "final_lr": 0.1, "warmup": 200, "steps": 5000,
}  # fmt: skip
M0 = preset(
    CS336 | {
        "data.corpus": "tinystories", "data.vocab_size": 10_000, "model.n_layer": 4, "model.n_head": 16,
        "model.d_model": 512, "model.d_ff": 1344, "batch_size": 32, "lr": 3e-3, "weight_decay": 0.1,
    },
    tiny={"lr": 1e-2},
)  # fmt: skip
M1 = preset(
    CS336 | {
        "data.corpus": "tinystories", "data.vocab_size": 10_000, "model.n_layer": 8, "model.n_head": 8,
        "model.d_model": 512, "model.d_ff": 1408, "batch_size": 128, "lr": 2e-3, "weight_decay": 0.01,
    },
    tiny={"lr": 1e-2},
)  # fmt: skip
OPENWEBTEXT = {"data.corpus": "openwebtext", "data.vocab_size": 32_000}
M1_OWT = {scale: knobs if scale == "tiny" else knobs | OPENWEBTEXT for scale, knobs in M1.items()}
# Corpus, budget and rate are ours; a feed-forward layer of four times the width is taken to have no gate.
M2 = preset(
    {
        "data.corpus": "wikitext-103", "data.tokenizer": "bpe", "data.vocab_size": 33_283, "model.n_layer": 12,
        "model.n_head": 8, "model.d_model": 768, "model.d_ff": 3072, "model.seq_len": 1024, "model.activation": "gelu",
        "model.qk_norm": False, "precision": "bf16", "optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.1,
        "schedule": "cosine", "final_lr": 0.1, "warmup": 200, "batch_size": 32, "micro_batch": 16, "steps": 5000,
    },
    low={"batch_size": 32, "micro_batch": 4},
    tiny={"lr": 1e-2},
)  # fmt: skip
# The budget is ours.
M3 = preset(
    {
        "data.corpus": "pile", "data.tokenizer": "gpt2", "data.max_tokens": 200_000_000, "model.n_layer": 12,
        "model.n_head": 12, "model.d_model": 768, "model.d_ff": 0, "model.seq_len": 512, "model.activation": "gelu",
        "model.norm": "layer", "model.position": "learned", "model.bias": True, "model.tied": True,
        "model.qk_norm": False, "batch_size": 16, "lr": 5e-6, "optimizer": "adamw", "beta1": 0.9, "beta2": 0.95,
        "weight_decay": 0.1, "schedule": "constant", "warmup": 0.0, "steps": 10_000,
    },
    tiny={"data.max_tokens": 0, "lr": 1e-2},
)  # fmt: skip
M4 = preset(
    {
        "data.corpus": "tinystories", "data.tokenizer": "gpt2", "model.n_layer": 12, "model.n_head": 12,
        "model.n_kv_head": 3, "model.d_model": 768, "model.d_ff": 2048, "model.seq_len": 128, "model.tied": True,
        "model.qk_norm": False, "precision": "bf16", "batch_size": 1024, "micro_batch": 64, "optimizer": "adamw",
        "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "lr": 1e-4, "final_lr": 0.5, "schedule": "cosine",
        "warmup": 1000, "steps": 1000,
    },
    low={"micro_batch": 32},
    tiny={"model.n_kv_head": 1, "lr": 1e-2, "final_lr": 0.1},
)  # fmt: skip

# Widths that are multiples of 16, and three layers, of which NVFP4 leaves the last in bf16. At higher rates, such as
# the 1e-2 of M4 at this scale, rounding decides when a run leaves its first plateau: two runs of a seed differ by .03.
LOW_PRECISION = adapt(M4, tiny={"model.n_layer": 3, "model.d_model": 64, "model.d_ff": 192, "lr": 1e-3, "steps": 300})

# Shapes of the leaderboard, and of M4's sizes; the first of each is the base's.

SHAPE = "model.n_layer,model.n_head,model.d_model,model.d_ff,model.tied"
LEADERBOARD = (
    (8, 8, 512, 1408, True), (8, 8, 512, 1408, False), (4, 4, 256, 704, False), (6, 6, 384, 1024, False),
    (10, 10, 640, 1728, False), (12, 12, 768, 2048, False), (16, 16, 1024, 2752, False),
)  # fmt: skip
SMALL_SHAPES = (
    (2, 4, 48, 128, True), (2, 4, 48, 128, False), (1, 2, 24, 64, False), (1, 4, 48, 128, False),
    (3, 4, 48, 128, False), (2, 4, 64, 192, False), (3, 4, 96, 256, False),
)  # fmt: skip
M4_SHAPE = "model.n_layer,model.n_head,model.n_kv_head,model.d_model,model.d_ff"
M4_SIZES = {  # parameters: 48M, 113M, 206M, 342M
    "full": ((8, 8, 2, 512, 1408), (12, 12, 3, 768, 2048), (14, 16, 4, 1024, 2752), (16, 20, 5, 1280, 3456)),
    "low": ((8, 8, 2, 512, 1408), (12, 12, 3, 768, 2048), (14, 16, 4, 1024, 2752)),
    "tiny": ((1, 2, 1, 24, 64), (2, 4, 1, 48, 128), (2, 4, 1, 64, 192), (3, 4, 1, 96, 256)),
}

CHANGES = {  # the ablations of row 24
    "rmsnorm": {"model.norm": "rms"}, "rope": {"model.position": "rope"}, "swiglu": {"model.activation": "swiglu"},
    "gqa": {"model.n_kv_head": 2}, "no bias": {"model.bias": False},
}  # fmt: skip

leak = partial(judges.artefact, (analysis.loss, {"data.shift": 0}), (analysis.loss, {"data.shift": 1}))

# Memory: M2 for as many steps as show the peak, on text that every machine has. The shares of recomputed layers are
# what activation budgets of .75, .38, .12 and 0 leave.
MEMORY = adapt(
    M2,
    {
        "data.corpus": "docstrings", "data.tokenizer": "bytes", "eval_tokens": 256, "steps": 2, "warmup": 0.0,
        "log_every": 1, "micro_batch": 0, "model.vocab_size": 33_283,
    },
    tiny={"model.n_layer": 4, "model.d_model": 128, "model.seq_len": 256, "model.vocab_size": 0},
)  # fmt: skip
KERNELS = "kernels,kernels.attention,model.recompute"
TORCH, SDPA, TRITON = ("torch", "torch", 0.0), ("torch", "sdpa", 0.0), ("triton", "triton", 0.0)
RECOMPUTING = tuple(("torch", "sdpa", share) for share in (0.25, 0.62, 0.88, 1.0))

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = {"tiny": 2, "low": 3, "full": 3}


def by_rule(base: int, lr: float, batches: tuple[int, ...]) -> list[tuple[str, int, float]]:
    """Rules, batches and rates where `lr` is `base`'s: unchanged, by the square root of the batch, in proportion."""
    powers = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}
    return [(rule, batch, lr * (batch / base) ** power) for rule, power in powers.items() for batch in batches]


def evaluated(batches: tuple[int, ...], tokens: int, window: int, count: int) -> list[tuple[str, int, int]]:
    """Batches, each with an evaluation set of `tokens`, and with one of `count` batches of its own size."""
    sizes = {"fixed": lambda batch: tokens, "own": lambda batch: count * batch * window}
    return [(name, batch, size(batch)) for batch in batches for name, size in sizes.items()]


def speed(row: int, name: str, theirs: int, **where: Any) -> Claim:
    """A claim of at least as many tokens per second as the original."""
    judge = judges.threshold(analysis.speed, at_least(theirs), where=where, show="{} on {}")
    return Claim(row, f"{name} trains at {theirs:,} tokens a second", f"{theirs:,} tok/s", judge, published=True)


def may_gain(precision: str, times: float, head: str = "bf16") -> Callable[..., Finding]:
    """Whether M4 can be so many times as fast as in bf16, by FLOPs and bytes."""

    def count() -> float:
        knobs = M4["full"]
        shape = {key.removeprefix("model."): value for key, value in knobs.items() if key.startswith("model.")}
        tokens = knobs["micro_batch"] * knobs["model.seq_len"]
        from model.gpt import ModelConfig  # imports torch, which the list of suites does not need

        return roofline.speed_up(ModelConfig(**shape).resolved(50_257), tokens, precision, head=head)

    return judges.counted(
        count, at_least(times), f"at most {{:.2f}} times on {roofline.RTX_5090.name}, by FLOPs and bytes"
    )


def suite(name: str, title: str, base: Mapping[Scale, Knobs], *claims: Claim, **fields: Any) -> Suite:
    return Suite(name, title, base, claims, **fields)


# fmt: off
DECLARED = (
    suite(
        "lr", "Learning rates of M0, up to divergence", M0,
        Claim(1, "a best rate, and an edge of stability above it", "1.615 at 3e-3; 3e-2", judges.edge(theirs=1.615)),
        speed(1, "M0", 23_600, lr=3e-3),
        grid={"lr": RATES}, preset="M0", plots=("lr",),
    ),
    suite(
        "lr-36m", "Learning rates of M1", M1,
        Claim(10, "a best rate, and an edge of stability above it", "1.349 at 2e-3; 5e-3", judges.edge(theirs=1.349)),
        speed(10, "M1", 461_000, lr=2e-3),
        grid={"lr": (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)},
        grids={"tiny": {"lr": (2e-3, 5e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)}}, preset="M1", plots=("lr",),
    ),
    suite(
        "batch", "Batches of M0 at equal tokens, evaluated on the same set and on one that grows with the batch", M0,
        Claim(2, "at equal tokens the loss saturates", "1.59 to 1.74; at 4",
              judges.saturates("batch_size", where={"set": "fixed"})),
        Claim(2, "small batches end lower", "lowest at 4",
              judges.best("batch_size", "first", where={"set": "fixed"}, rival={"set": "own"})),
        grid={"@set,batch_size,eval_tokens": evaluated((1, 2, 4, 8, 16, 32, 64), 524_288, 256, 100)},
        grids={"tiny": {"@set,batch_size,eval_tokens": evaluated((4, 8, 16, 32, 64), 16_384, 64, 3)}},
        axis="tokens", preset="M0", plots=("batch_size by set",),
    ),
    suite(
        "batch-rules", "Batches of M1 at equal steps, with rates that stay or follow the batch", M1,
        Claim(11, "at equal steps a larger batch ends lower", "3.597 at 1 to 1.228 at 512",
              judges.monotone("batch_size", where={"rule": "fixed"})),
        Claim(11, "1024 do not fit", "out of memory",
              judges.threshold(analysis.batch_that_fits, at_most(0), where={"batch_size": 1024}), published=True),
        Claim(12, "small batches end lower with the square-root rule", "2.638 for 3.597 at batch 1",
              judges.versus({"rule": "sqrt"}, {"rule": "fixed"}, LOWER, where={"batch_size": 1})),
        Claim(18, "and with the linear rule", "scale them together",
              judges.versus({"rule": "linear"}, {"rule": "fixed"}, LOWER, where={"batch_size": 1})),
        grid={"@rule,batch_size,lr": by_rule(128, 2e-3, (1, 4, 16, 64, 128, 256, 512, 768, 1024))},
        grids={
            "low": {"@rule,batch_size,lr": by_rule(128, 2e-3, (1, 4, 16, 64, 128, 256))},
            "tiny": {"@rule,batch_size,lr": by_rule(16, 3e-2, (1, 4, 16, 64))},
        },
        preset="M1", plots=("batch_size by rule",),
    ),
    suite(
        "lr-batch", "Learning rates of M2 by batch",
        adapt(M2, full={"steps": 2000, "warmup": 80}, low={"steps": 200, "warmup": 8}),
        Claim(18, "the best rate grows with the batch", "scale them together",
              judges.best("lr", "grows", over="batch_size")),
        grid={"batch_size": (8, 32, 128), "micro_batch": (8,), "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
        grids={
            "low": {"batch_size": (8, 32), "micro_batch": (4,)},
            "tiny": {"batch_size": (4, 16, 64), "micro_batch": (0,), "lr": (3e-3, 1e-2, 3e-2, 1e-1)},
        },
        preset="M2", plots=("lr by batch_size",),
    ),
    suite(
        "choose-batch", "Choosing a batch: the machine's limit, saturation, the critical batch",
        adapt(
            M2, {"diag": 50}, full={"batch_size": 32, "steps": 2000, "warmup": 80}, low={"steps": 200, "warmup": 8},
            tiny={"batch_size": 32, "diag": 10},
        ),
        Claim(3, "the machine's limit, saturation and the critical batch", "in prose",
              judges.saturates("batch_size", speed_axis="micro_batch")),
        Claim(19, "gradients of micro-batches agree", "over .999, near the start",
              judges.artefact((partial(analysis.coherence, 0), {"micro_batch": 1}),
                       (partial(analysis.coherence, -1), {"micro_batch": 1}), otherwise=True),
              "tests/test_diagnostics.py::test_agreement_of_micro_batches"),
        grid={"batch_size,micro_batch": ((32, 1), (32, 2), (32, 4), (32, 8), (32, 16), (8, 4), (128, 16))},
        grids={"tiny": {"batch_size,micro_batch": ((32, 1), (32, 4), (32, 8), (32, 16), (8, 4), (128, 16))}},
        axis="tokens", preset="M2", plots=("batch_size", "coherence by micro_batch"), alone=True,
    ),
    suite(
        "norms", "No norm, post-norm of both kinds and LayerNorm, by learning rate",
        adapt(M1, {"warmup": 0.0}, tiny={"model.n_layer": 4, "steps": 100}),
        Claim(4, "without norms training fails where it works with them", "diverges, NaN from 1e-4 on",
              judges.statuses("none", "pre")),
        Claim(5, "norm(x + f(x)) ends higher", "1.972, 46% more",
              judges.versus("post", "pre", HIGHER, best_over="lr"), published=True),
        Claim(5, "norm(x + f(x)) takes lower rates", "a lower best rate", judges.edge(variant="post", below="pre")),
        Claim(5, "x + norm(f(x)) bears the highest rate", "post-norm too",
              judges.versus("res-post", "post", LOWER, where={"lr": LAST})),
        variants={
            **{place: {"model.norm": "rms", "model.norm_place": place} for place in ("pre", "post", "res-post")},
            **{norm: {"model.norm": norm, "model.norm_place": "pre"} for norm in ("layer", "none")},
        },
        grid={"lr": (1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)},
        grids={"low": {"lr": (1e-4, 1e-3, 5e-3, 1e-2)}, "tiny": {"lr": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}},
        preset="M1", plots=("lr by variant",),
    ),
    suite(
        "depth", "Gradients by layer: pre- and post-norm, with and without warm-up, 4 and 12 layers",
        adapt(
            M2, {"model.norm": "layer", "diag": 25}, full={"lr": 1e-3, "steps": 500}, low={"lr": 1e-3, "steps": 100},
            tiny={"lr": 1e-2, "steps": 60, "eval_every": 20, "diag": 10},
        ),
        Claim(16, "in post-norm gradients differ by orders of magnitude across 12 layers", "1e10 across layers",
              judges.versus({"model.norm_place": "post"}, {"model.norm_place": "pre"}, at_least(1e3),
                     measure=analysis.gradient_spread, ratio=True, where={"warmup": 0.0, "model.n_layer": 12})),
        grid={"model.norm_place": ("pre", "post"), "warmup": (0.0, 0.1), "model.n_layer": (4, 12)},
        preset="M2", plots=("layers by model.norm_place",),
    ),
    suite(
        "position", "Positions, and fewer heads of keys and values", adapt(M1, tiny={"steps": 200}),
        Claim(6, "without positions the loss is higher", "1.390, 3% more", judges.versus("none", "rope", HIGHER)),
        Claim(6, "the gap to rotary positions grows over training", "grows",
              judges.versus("none", "rope", HIGHER, measure=analysis.late_change)),
        Claim(34, "ALiBi in place of RoPE", "planned", judges.versus("alibi", "rope", at_most(0.02)), published=True),
        Claim(34, "two heads of keys and values", "planned",
              judges.versus("gqa", "rope", at_most(0.02)), published=True),
        Claim(34, "RoPE of neighbours is RoPE of halves", "planned",
              judges.versus("rope-interleaved", "rope", same(0.02))),
        variants={
            "rope": {},
            **{of: {"model.position": of} for of in ("none", "alibi", "rope-interleaved", "learned", "sinusoidal")},
            "gqa": {"model.n_kv_head": 2},
        },
        seeds=SEEDS, preset="M1", plots=("gap by variant",),
    ),
    suite(
        "activation", "Activations of the feed-forward layer at equal parameters",
        adapt(M1, {"model.d_ff": 0}, tiny={"steps": 200}),
        Claim(7, "SiLU without a gate is worse than SwiGLU", "1.359, .7% more",
              judges.versus("silu", "swiglu", HIGHER)),
        variants={name: {"model.activation": name} for name in ("swiglu", "silu", "gelu", "relu", "relu2")},
        seeds=SEEDS, preset="M1", plots=("gap by variant",),
    ),
    suite(
        "corpus", "Another text, by one flag", M1,
        Claim(8, "the same model on OpenWebText", "3.799 nats a token",
              judges.threshold(analysis.loss, at_most(3.799), where={"data.corpus": LAST}), published=True),
        Claim(8, "both texts by the byte, which compares across tokenizers", "not given",
              judges.threshold(analysis.bits_a_byte, at_most(math.inf), by="data.corpus", show="{} bits a byte"),
              published=True),
        grid={"data.corpus,data.vocab_size": (("tinystories", 10_000), ("openwebtext", 32_000))},
        grids={"tiny": {"data.corpus,data.vocab_size": (("docstrings", 10_000), ("stdlib", 10_000))}}, preset="M1",
    ),
    suite(
        "precision", "float32 against bf16, at equal steps", M1_OWT,
        Claim(13, "bf16 ends where float32 does", "3.799 and 3.795", judges.versus("bf16", "fp32", same(0.02))),
        Claim(13, "bf16 is faster", "10.7 for 16.1 minutes",
              judges.versus("bf16", "fp32", at_least(16.1 / 10.7), measure=analysis.speed, ratio=True), published=True),
        speed(13, "M1 on OpenWebText in bf16", 491_000, variant="bf16"),
        variants={"fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}},
        seeds=SEEDS, preset="M1", plots=("gap by variant",),
    ),
    suite(
        "low-precision", "M4 in FP8 and FP4, as planned for an RTX 5090", LOW_PRECISION,
        speed(27, "M4 in FP8 with an FP8 head", 230_000, variant="fp8 with head"),
        Claim(27, "FP8 ends where bf16 does", "planned", judges.versus("fp8", "bf16", at_most(0.005)),
              "tests/test_precision.py::test_fp8_multiplies_codes_and_the_weights_gradient_is_of_bf16"),
        Claim(27, "FP8 with an FP8 head ends where bf16 does", "planned",
              judges.versus("fp8 with head", "bf16", at_most(0.005)),
              "tests/test_fp8_head.py::test_products_are_of_codes_and_the_weights_gradient_is_of_bf16"),
        Claim(27, "FP8 is faster than bf16", "planned",
              judges.versus("fp8", "bf16", at_least(1.0), measure=analysis.speed, ratio=True), published=True),
        Claim(27, "FP8 doubles the speed of bf16", "2x", may_gain("fp8", 2.0, head="fp8")),
        speed(28, "M4 in FP4", 450_000, variant="nvfp4"),
        Claim(28, "NVFP4 ends .06 above bf16 at most", "planned", judges.versus("nvfp4", "bf16", at_most(0.06))),
        Claim(28, "MXFP8 ends where bf16 does", "planned", judges.versus("mxfp8", "bf16", at_most(0.005))),
        Claim(28, "FP4 is four times as fast as bf16", "4x", may_gain("nvfp4", 4.0, head="fp8")),
        variants={
            **{precision: {"precision": precision} for precision in ("bf16", "fp8", "mxfp8", "nvfp4")},
            "fp8 with head": {"precision": "fp8", "head_precision": "fp8"},
        },
        seeds={"tiny": 6, "low": 3, "full": 3}, preset="M4",
    ),
    suite(
        "leaderboard", "Seven sizes of M1 on OpenWebText, at equal FLOPs (at equal time: --set seconds=600)",
        adapt(M1_OWT, {"model.tied": True}, full={"steps": 40_000}, low={"steps": 4000, "warmup": 20}),
        Claim(14, "3.738 within 39 minutes", "3.738: 42M, tied, 40,000 steps",
              judges.threshold(partial(analysis.seconds_to, 3.738), at_most(39 * 60), over=min,
                               show="below it after {} s"), published=True),
        Claim(14, "a size is best at a budget", "42M of 7 sizes", judges.best(analysis.cost, "inside"), published=True),
        speed(14, "M1, tied,", 556_000, **{"model.tied": True}),
        *(
            speed(14, f"A model {width} wide with {layers} layers", theirs,
                  **{"model.d_model": width, "model.n_layer": layers})
            for width, layers, theirs in ((640, 10, 417_000), (768, 12, 326_000), (1024, 16, 187_000))
        ),
        grid={SHAPE: LEADERBOARD},
        grids={"low": {SHAPE: (LEADERBOARD[0], LEADERBOARD[2], LEADERBOARD[5])}, "tiny": {SHAPE: SMALL_SHAPES}},
        axis="flops", preset="M1", plots=("pareto by model.d_model",),
    ),
    suite(
        "bars", "CS336's bar on TinyStories", adapt(M1, full={"steps": 10_000}, low={"steps": 1000}),
        Claim(15, "TinyStories at 327.68M tokens", "at most 1.45",
              judges.threshold(analysis.loss, at_most(1.45)), published=True),
        preset="M1",
    ),
    suite(
        "optimizer", "Adam and AdamW by weight decay", adapt(M2, full={"steps": 2000, "warmup": 80}),
        Claim(17, "without weight decay Adam is AdamW", "the same",
              judges.equal("adam", "adamw", where={"weight_decay": 0.0}),
              "tests/test_optim.py::test_adam_and_adamw_differ_in_weight_decay_only"),
        Claim(17, "AdamW without weight decay is best", "AdamW, 0",
              judges.best("weight_decay", 0.0, where={"variant": "adamw"})),
        variants={"adamw": {"optimizer": "adamw"}, "adam": {"optimizer": "adam"}},
        grid={"weight_decay": (0.0, 0.01, 0.1)}, grids={"low": {"weight_decay": (0.0, 0.1)}}, preset="M2",
    ),
    suite(
        "memory", "The largest micro-batch of M2 that fits, and what recomputing saves", MEMORY,
        Claim(20, "micro-batches up to 28 fit 40 GB, 32 do not", "22.5 GiB at 16, 38.1 at 28",
              judges.threshold(analysis.batch_that_fits, at_least(28), where={"kernels.attention": "sdpa"}, over=max,
                        by="model.recompute"), published=True),
        Claim(21, "the smaller the activation budget, the less memory", "25.7, 30.2, 34.2 GiB",
              judges.monotone("model.recompute", measure=analysis.memory,
                              where={"kernels.attention": "sdpa", "batch_size": 8})),
        grid={KERNELS: (TORCH, SDPA, TRITON, *RECOMPUTING)},
        grids={
            "full": {"batch_size": (8, 16, 28, 32, 48, 64, 96, 128, 192)},
            "low": {"batch_size": (8, 16, 32, 64, 128)},
            "tiny": {KERNELS: (TORCH, SDPA, RECOMPUTING[-1]), "batch_size": (4, 8, 12, 16, 20, 24)},
        },
        alone=True, cap={"tiny": 600 * 10**6},
    ),
    suite(
        "timing", "The speed of M2 at a micro-batch that fits, twice",
        adapt(
            MEMORY, {"steps": 200, "log_every": 10, "batch_size": 16},
            tiny={"steps": 10, "log_every": 1, "batch_size": 4},
        ),
        Claim(22, "the speed at the chosen point repeats", "fastest at .75",
              judges.threshold(analysis.speed, at_most(0.02), over=spread, by="model.recompute"), published=True),
        grid={KERNELS: (SDPA, *RECOMPUTING)}, grids={"tiny": {KERNELS: (SDPA, RECOMPUTING[-1])}},
        seeds={"tiny": 2, "low": 2, "full": 2}, alone=True,
    ),
    suite(
        "diagnostics",
        "Norms of gradients, weights and updates, Adam's signal, attention's entropy, and what watching costs",
        adapt(M1, full={"steps": 1000, "warmup": 40}, tiny={"batch_size": 16, "micro_batch": 8}),
        Claim(23, "every layer's norms, Adam's signal to noise, activations and entropy", "plots",
              test="tests/test_experiments_rows.py::test_every_kind_of_diagnostics_is_recorded"),
        Claim(23, "watching changes nothing", "plots", judges.equal("every 100", "none"),
              "tests/test_train.py::test_diagnostics_change_nothing"),
        Claim(23, "watching costs at most 1%", "not given",
              judges.versus("every 100", "none", at_least(0.99), measure=analysis.wall_speed, ratio=True),
              published=True),
        variants={"none": {"diag": 0}, "every 100": {"diag": 100}, "every 10": {"diag": 10}}, preset="M1", alone=True,
    ),
    suite(
        "leak", "Seven changes to GPT-2 on the Pile, with targets that are the inputs and with ones that follow", M3,
        Claim(24, "each change by itself, and all of them", ".580 .530 .638 .580 .578 .486", leak(),
              "tests/test_train.py::test_targets_equal_to_inputs_are_learnt_at_once"),
        Claim(24, "all changes together beat none", ".486, a rerun of the base",
              judges.versus("all", "base", LOWER, where={"data.shift": 1}), published=True),
        variants={"base": {}, **CHANGES, "all": {knob: v for change in CHANGES.values() for knob, v in change.items()}},
        grid={"data.shift": (0, 1)}, preset="M3",
    ),
    # SwiGLU within SwiGLU had twelve times the parameters: a feed-forward layer of as many stands for it.
    suite(
        "nested", "The feed-forward layer of twelve times the size, with and without the leak",
        adapt(M3, {"model.activation": "swiglu"}, tiny={"steps": 60}),
        Claim(24, "SwiGLU takes the loss from .580 to .085", ".085, nested", leak(by="model.d_ff")),
        grid={"data.shift": (0, 1), "model.d_ff": (2048, 24_576)}, grids={"tiny": {"model.d_ff": (128, 1536)}},
        preset="M3",
    ),
    suite(
        "budget", "As much as a given time allows",
        adapt(
            {scale: {k: v for k, v in knobs.items() if k != "steps"} for scale, knobs in M1_OWT.items()},
            {"warmup": 0.04}, full={"seconds": 1800.0}, low={"seconds": 30.0}, tiny={"seconds": 6.0},
        ),
        Claim(25, "a run ends when its time is up, its schedule complete", "killed",
              judges.threshold(analysis.time_used, at_most(1.05), show="{} of its time"),
              "tests/test_train.py::test_budgets_by_tokens_and_by_the_clock"),
        preset="M1",
    ),
    suite(
        "beat", "M4 in bf16, for 1,000 iterations and for 5,000", M4,
        Claim(26, "1,000 iterations", "2.1477",
              judges.threshold(analysis.loss, at_most(2.15), where={"steps": 1000}), published=True),
        speed(26, "M4, on an RTX 5090,", 116_000, steps=1000),
        Claim(31, "5,000 iterations end lower than 1,000", "planned", judges.monotone("steps"),
              "tests/test_train.py::test_resuming_is_exact"),
        grid={"steps": (1000, 5000)}, grids={"low": {"steps": (100, 500)}, "tiny": {"steps": (60, 300)}}, preset="M4",
    ),
    suite(
        "window", "Attention in a sliding window", M4,
        Claim(29, "a window of half a long sequence is faster", "planned",
              judges.versus("half", "all", at_least(1.0), measure=analysis.speed, ratio=True,
                            where={"model.seq_len": LAST}), published=True),
        Claim(29, "and ends at most .02 higher", "planned",
              judges.versus("half", "all", at_most(0.02), where={"model.seq_len": LAST}), published=True),
        variants={"all": {}, "half": {"model.window": "S"}},
        grids={
            "full": {"model.seq_len,batch_size,micro_batch": ((128, 1024, 64), (2048, 64, 4), (4096, 32, 2))},
            "low": {"model.seq_len,batch_size,micro_batch": ((128, 1024, 32), (2048, 64, 2))},
            "tiny": {"model.seq_len,batch_size": ((64, 16), (256, 4))},
        },
        seeds=SEEDS | {"low": 2}, preset="M4",
    ),
    suite(
        "sizes", "M4 at four sizes", M4,
        Claim(30, "a larger model ends lower at equal tokens", "planned", judges.monotone(analysis.cost)),
        grids={scale: {M4_SHAPE: shapes} for scale, shapes in M4_SIZES.items()},
        axis="tokens", preset="M4", plots=("pareto by model.d_model",),
    ),
    suite(
        "schedules", "Schedules and warm-ups of M4", adapt(M4, tiny={"warmup": SMALL["steps"]}),
        Claim(32, "every schedule begins and ends at the rates that it says", "planned",
              test="tests/test_experiments_rows.py::test_recorded_rates_are_those_of_the_schedule"),
        Claim(32, "a warm-up as long as the run is no schedule", "1,000 of 1,000 steps",
              judges.versus("warm-up only", "cosine", HIGHER, best_over="lr"), published=True),
        variants={
            "warm-up only": {},
            "cosine": {"warmup": 0.1},
            "linear": {"warmup": 0.1, "schedule": "linear"},
            "no warm-up": {"warmup": 0.0},
        },
        grid={"lr": (1e-4, 3e-4)}, grids={"low": {"lr": (3e-4,)}, "tiny": {"lr": (1e-2, 3e-2)}}, preset="M4",
    ),
    suite(
        "tested", "What unit tests decide, whatever the scale", {},
        Claim(9, "a model writes during and after training", "text",
              test="tests/test_experiments_rows.py::test_a_run_writes_during_training_and_after_it"),
        Claim(14, "a tied head of standard deviation 1 starts far above ln V", "35",
              test="tests/test_experiments_rows.py::test_the_first_loss"),
        Claim(15, "a single batch is learnt by heart", "loss near 0",
              test="tests/test_train.py::test_overfits_one_small_batch"),
        Claim(26, "the first loss is ln V", "10.82 = ln 50,257",
              test="tests/test_experiments_rows.py::test_the_first_loss"),
        Claim(33, "each of 39 runs can be told apart and traced", "by hand",
              test="tests/test_experiments_run.py::test_an_outcome_has_the_run_and_its_end"),
    ),
)
# fmt: on

SUITES = {suite.name: suite for suite in DECLARED}
