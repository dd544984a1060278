"""Diagnostics: every measure against autograd or a dense computation, and the step itself is unchanged."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_model import FEATURES, NO_TRITON, build, documents
from torch.nn.utils import clip_grad_norm_

from kernels.attention import attention_torch, document_ranges, visible
from model.diagnostics import Probe, _group, block_statistics, entropy
from model.optim import OptimizerConfig, build_optimizers

# A batch for the model of `build`, with few distinct ids, so that the micro-batches' gradients are similar.
IDS = torch.randint(7, (6, 24), generator=torch.Generator().manual_seed(5))
TARGETS = IDS.roll(-1, 1)

# Variants of the residual stream and of the attention scores.
MODELS = FEATURES | {
    "learned, layer norm after the sum": {"position": "learned", "norm": "layer", "norm_place": "post", "bias": True},
    "alibi, norm before the sum": {"position": "alibi", "norm_place": "res-post"},
    "no norm, recomputed": {"norm": "none", "recompute": 0.5},
}


def optimizers_of(model, name="adamw"):
    return build_optimizers(model, OptimizerConfig(name, lr=1e-2))


def step(model, optimizers, probed=True, size=2, scale=1.0, clip=1e-3):
    """A step like train.py's with micro-batches of `size`. Returns the probe's row and the parameters before it."""
    probe, grads = Probe(model, optimizers, scale) if probed else None, []
    for ids, targets in zip(IDS.split(size), TARGETS.split(size), strict=True):
        (model(ids, targets, "sum") / IDS.numel() * scale).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        probe and probe.after_backward()
    probe and probe.before_step()
    for p in model.parameters():
        p.grad /= scale
    clip_grad_norm_(model.parameters(), clip)
    before = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    row = probe.after_step(IDS) if probed else None
    model.zero_grad()
    return row, before


def groups_of(model):
    """Names of parameters by group, written out."""
    names = [name for name, _ in model.named_parameters()]
    found = {"embedding": ["embedding.weight"], "position": ["position"] if "position" in names else []}
    found["norms"] = [n for n in names if n.endswith(("norm.gain", "norm.bias"))]
    for i in range(len(model.blocks)):
        for part in ("attention", "feed_forward"):
            found[f"blocks.{i}.{part}"] = [n for n in names if n.startswith(f"blocks.{i}.{part}.")]
    found["head"] = [] if model.config.tied else ["head.weight"]
    return {group: names for group, names in found.items() if names}


def norm(tensors):
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


def gradient(model, ids, targets):
    """Gradient of the mean loss, by parameter name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(ids, targets), parameters), strict=True))


@pytest.mark.parametrize(
    "features, scale",
    [({}, 1.0), ({"tied": False}, 1024.0), *((features, 1.0) for features in MODELS.values() if "norm" in features)],
    ids=str,
)
def test_norms_by_group(features, scale):
    model = build(**features)
    whole, groups = gradient(model, IDS, TARGETS), groups_of(model)
    row, before = step(model, optimizers_of(model), scale=scale)
    now, then = dict(model.named_parameters()), dict(zip(whole, before, strict=True))
    assert sum(len(names) for names in groups.values()) == len(now)
    assert {key: row[key] for key in ("activation", "entropy")} == block_statistics(model, IDS[:4])
    for key in ("gradient", "parameter", "update", "ratio", "snr"):
        assert row[key].keys() == groups.keys()
    for group, names in groups.items():
        assert row["gradient"][group] == pytest.approx(norm(whole[n] for n in names), rel=1e-4)  # before clipping
        assert row["parameter"][group] == pytest.approx(norm(then[n] for n in names), rel=1e-5)
        update = norm(now[n].detach() - then[n] for n in names)
        assert row["update"][group] == pytest.approx(update, rel=1e-5) and update > 0
        assert row["ratio"][group] == pytest.approx(update / norm(then[n] for n in names), rel=1e-5)


def test_groups_by_name():
    names = ("position", "norm.bias", "blocks.11.feed_forward_norm.bias", "blocks.1.attention.q_gain")
    assert [_group(n) for n in names] == ["position", "norms", "norms", "blocks.1.attention"]


def test_a_group_of_zeros_has_no_ratio():
    model = build(tied=False)
    with torch.no_grad():
        model.head.weight.zero_()
    row, _ = step(model, optimizers_of(model))
    assert row["parameter"]["head"] == 0 and row["update"]["head"] > 0
    assert row["ratio"].keys() == groups_of(model).keys() - {"head"}


def test_signal_to_noise_is_that_of_adams_moments():
    model = build(tied=False)
    optimizers, m, v = optimizers_of(model), {}, {}
    for _ in range(3):
        grads = gradient(model, IDS, TARGETS)
        m = {n: 0.9 * m.get(n, 0) + 0.1 * g.double() for n, g in grads.items()}
        v = {n: 0.95 * v.get(n, 0) + 0.05 * g.double().square() for n, g in grads.items()}
        row, _ = step(model, optimizers, clip=math.inf)
    for group, names in groups_of(model).items():
        snr = [(m[n] / (1 - 0.9**3)).abs() / (v[n] / (1 - 0.95**3)).sqrt() for n in names]
        snr = torch.cat([x.flatten() for x in snr]).nan_to_num(0)  # embedding rows of ids that do not occur
        assert row["snr"][group] == pytest.approx(snr.mean().item(), rel=1e-3)
    assert row["snr"]["embedding"] < row["snr"]["head"] <= 1 + 1e-6


def test_groups_on_muon_have_no_signal_to_noise():
    model = build()
    row, _ = step(model, optimizers_of(model, "muon"))
    assert row["snr"].keys() == {"embedding", "norms"} and row["update"].keys() == groups_of(model).keys()


def test_a_step_that_overflowed():
    model = build()
    optimizers, scaler = optimizers_of(model), torch.amp.GradScaler("cpu")
    probe = Probe(model, optimizers, scaler.get_scale())
    scaler.scale(model(IDS, TARGETS) * math.inf).backward()
    probe.after_backward()
    probe.before_step()
    scaler.unscale_(optimizers[0])
    scaler.step(optimizers[0])
    row = probe.after_step(IDS)
    assert set(row["update"].values()) == {0.0} and row["snr"] == {}


def test_agreement_of_micro_batches():
    model = build(tied=False)
    own = [gradient(model, IDS[i : i + 2], TARGETS[i : i + 2]) for i in range(0, 6, 2)]
    own = [torch.cat([g.flatten() for g in grads.values()]).double() for grads in own]
    mean = sum(own) / 3
    small, large = sum(g.square().sum() for g in own) / 3, mean.square().sum()
    b, whole = 48, 144
    signal, noise = (whole * large - b * small) / (whole - b), (small - large) / (1 / b - 1 / whole)
    assert signal > 0
    row, _ = step(model, optimizers_of(model))
    assert row["noise_scale"] == pytest.approx((noise / signal).item(), rel=1e-3)
    cosines = [torch.cosine_similarity(g, mean, 0).item() for g in own]
    assert row["coherence"] == pytest.approx(sum(cosines) / 3, rel=1e-4) and row["coherence"] < 0.99


def test_one_micro_batch_has_no_noise_scale_and_coherence():
    model = build()
    row, _ = step(model, optimizers_of(model), size=6)
    assert row["noise_scale"] is None and row["coherence"] is None and row["gradient"]["embedding"] > 0


def agreement(grads, tokens):
    """The probe's `_agreement` for micro-batches with mean gradients `[N, size]`."""
    parameter = torch.nn.Parameter(torch.zeros(grads.shape[1]))
    probe = Probe(SimpleNamespace(named_parameters=lambda: [("head.weight", parameter)]), [])
    parameter.grad = torch.zeros_like(parameter)
    for grad in grads / len(grads):
        parameter.grad += grad
        probe.after_backward()
    probe.before_step()
    return probe._agreement(tokens)


def test_identical_micro_batches_agree():
    row = agreement(torch.randn(1, 1000).expand(4, -1), 4096)
    assert 0 <= row["noise_scale"] < 0.01 and row["coherence"] == pytest.approx(1, abs=1e-5)


def test_opposed_micro_batches_hide_the_gradient():
    grad = torch.randn(1000)
    row = agreement(torch.stack([grad, -grad, grad, -0.99 * grad]), 4096)
    assert row["noise_scale"] is None and row["coherence"] == pytest.approx(0, abs=1e-5)
    assert agreement(torch.zeros(2, 10), 64) == {"noise_scale": None, "coherence": None}


@pytest.mark.parametrize("n", [2, 8])
def test_noise_of_a_known_size(n):
    """A token's gradient is G plus noise of variance `deviation**2` per element; a micro-batch's has that divided by
    its tokens. With this many elements every norm is close to its expectation."""
    size, micro_batch, deviation = 200_000, 64, 20.0
    generator = torch.Generator().manual_seed(n)
    true = torch.randn(size, generator=generator)
    own = true + deviation / micro_batch**0.5 * torch.randn(n, size, generator=generator)
    row = agreement(own, n * micro_batch)
    assert row["noise_scale"] == pytest.approx(size * deviation**2 / true.square().sum().item(), rel=0.05)
    noise = deviation**2 / micro_batch  # variance per element of a micro-batch's gradient, where G has variance 1
    expected = (1 + noise / n) / math.sqrt((1 + noise) * (1 + noise / n))
    assert row["coherence"] == pytest.approx(expected, rel=0.02)


def dense_entropy(q, k, seen, softcap=0.0, slopes=None):
    """Reference in float64, by head and query."""
    total, (b, t, h, d) = 0.0, q.shape
    for row in range(b):
        for head in range(h):
            scores = q[row, :, head].double() @ k[row, :, head * k.shape[2] // h].double().T / d**0.5
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if slopes is not None:
                scores -= slopes[head] * torch.arange(t)[:, None].sub(torch.arange(t))
            for i in range(t):
                keys = seen[row, i] if seen.ndim == 3 else seen[i]
                p = torch.distributions.Categorical(logits=scores[i][keys])
                total += p.entropy().item()
    return total / (b * t * h)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 37}, {"softcap": 2.0}, {"slopes": torch.tensor([0.5, 0.25, 0.01, 0.0])}, {"lengths": (60, 75, 15)}],
    ids=lambda options: " ".join(options),
)
def test_entropy_is_that_of_the_weights(options):
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 150, 4, 8), torch.randn(2, 150, 2, 8)  # more queries than QUERY_CHUNK
    options = dict(options)
    if lengths := options.pop("lengths", None):
        positions = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        options["documents"] = document_ranges(torch.stack((positions, positions.flip(0).sub(2).neg())))
    seen = visible(150, 150, True, options.get("window", 0), options.get("documents"), "cpu")
    terms = {key: options[key] for key in ("softcap", "slopes") if key in options}
    expected = dense_entropy(q, k, seen, **terms)
    assert entropy(q, k, **options).item() == pytest.approx(expected, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert entropy(q, k, **options).item() == pytest.approx(expected, rel=1e-4)


def test_uniform_attention_over_n_keys_has_entropy_ln_n():
    q, k = torch.zeros(1, 200, 2, 8), torch.randn(1, 200, 2, 8)
    assert entropy(q, k).item() == pytest.approx(math.lgamma(201) / 200, rel=1e-5)  # the mean of ln 1, ..., ln 200
    assert entropy(q, k, window=1).item() == 0


@pytest.mark.parametrize("kernels", ["torch", "sdpa", pytest.param("triton", marks=NO_TRITON)])
@pytest.mark.parametrize("features", MODELS.values(), ids=MODELS)
def test_blocks_as_the_model_computes_them(kernels, features):
    model, ids = build(attention=kernels, **features), documents(9, 15, rows=2)
    model.train()
    seen, streams = [], []
    dense = copy.deepcopy(model).eval()

    def attend(q, k, v, window, documents, dropout, slopes):
        mask = visible(24, 24, True, window, documents, "cpu")
        seen.append(dense_entropy(q, k, mask, slopes=slopes))
        return attention_torch(q, k, v, window=window, documents=documents, slopes=slopes)

    for block in dense.blocks:
        block.attention.kernels = SimpleNamespace(rope=model.kernels.rope, attention=attend)
        block.register_forward_hook(
            lambda block, inputs, outputs: streams.append(sum(x for x in outputs if x is not None))
        )
    with torch.no_grad():
        dense.hidden(ids)
    row = block_statistics(model, ids)
    blocks = [str(i) for i in range(model.config.n_layer)]
    assert list(row["activation"]) == list(row["entropy"]) == blocks
    assert list(row["entropy"].values()) == pytest.approx(seen, rel=1e-3)
    assert list(row["activation"].values()) == pytest.approx([s.pow(2).mean().sqrt().item() for s in streams], rel=1e-3)
    assert model.training and not any(block._forward_hooks for block in model.blocks)
    assert all(block.attention.kernels is model.kernels for block in model.blocks)


def test_a_failing_forward_pass_leaves_the_model_unchanged():
    model = build()
    with pytest.raises(ValueError, match="more than the model's seq_len"):
        block_statistics(model, torch.zeros(1, 25, dtype=torch.long))
    assert all(block.attention.kernels is model.kernels and not block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_probe_does_not_change_a_run(name):
    states = []
    for probed in (True, False):
        model = build(dropout=0.1, attention="torch")
        optimizers = optimizers_of(model, name)
        torch.manual_seed(1)
        for _ in range(3):
            step(model, optimizers, probed)
        moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
        states.append((model.state_dict(), moments, torch.get_rng_state()))
    torch.testing.assert_close(*states, rtol=0, atol=0)
