"""The model: shapes, counts, initial loss, masking, caching, generation and half-precision weights."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from recording import Recorded, emulate_graphs

from kernels import KernelChoice, KernelError, bind
from kernels.attention import scores
from kernels.launch import AVAILABLE
from kernels.linear_cross_entropy import IGNORE
from model import generate as generate_module
from model.evaluate import evaluate
from model.generate import Decoder, generate, next_tokens, window_start
from model.gpt import GPT, KVCache, ModelConfig
from runtime.config import ConfigError

SHAPES = {
    "plain": {"tied": True, "qk_norm": False},
    "qwen": {"tied": False, "qk_norm": True, "n_kv_head": 2, "head_dim": 24},
}


SEPARATOR = 100
FEATURES = {
    "plain": {},
    "grouped, QK-norm": {"n_kv_head": 1, "qk_norm": True},
    "windows": {"window": "SL:5", "n_layer": 3},
    "documents": {"separator": SEPARATOR},
    "all": {"n_kv_head": 2, "window": "LS:7", "separator": SEPARATOR},
    "learned, documents": {"position": "learned", "separator": SEPARATOR},
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "ALiBi": {"position": "alibi", "n_kv_head": 2},
}
SWITCHES = {
    "LayerNorm": {"norm": "layer"},
    "no norm": {"norm": "none"},
    "post-norm": {"norm_place": "post"},
    "LayerNorm, res-post-norm": {"norm": "layer", "norm_place": "res-post"},
    "interleaved": {"position": "rope-interleaved"},
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "ALiBi": {"position": "alibi"},
    "no positions": {"position": "none"},
    "SiLU": {"activation": "silu"},
    "squared ReLU, biases": {"activation": "relu2", "bias": True},
    "recomputed": {"recompute": 0.5},
}
NO_TRITON = pytest.mark.skipif(torch.cuda.is_available() or not AVAILABLE, reason="the interpreter is off")
ATTENTION = ["torch", "sdpa", pytest.param("triton", marks=NO_TRITON)]


def build(seed=0, kernels="auto", attention="", **changes):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 4, "d_model": 64, "seq_len": 24, "vocab_size": 101, "tied": True}
    config = ModelConfig(**(sizes | changes)).resolved(101)
    return GPT(config, bind(KernelChoice(kernels, attention=attention)))


def documents(*lengths, rows=1):
    """Random ids `[rows, sum of lengths]`: documents of these lengths, each starting with the separator."""
    ids = torch.randint(SEPARATOR, (rows, sum(lengths)))
    ids[:, [sum(lengths[:i]) for i in range(len(lengths))]] = SEPARATOR
    return ids


@pytest.mark.parametrize("vocab, width, tied", [(257, 64, True), (2048, 128, False), (50257, 256, True)])
def test_first_loss_is_that_of_a_uniform_guess(vocab, width, tied):
    model = build(vocab_size=vocab, d_model=width, tied=tied)
    ids = torch.randint(vocab, (8, 24), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(vocab, (8, 24), generator=torch.Generator().manual_seed(1))
    assert model(ids, targets).item() == pytest.approx(math.log(vocab), rel=0.02)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_future_changes_nothing_before_it(shape):
    model = build(**shape)
    ids = torch.randint(101, (2, 24))
    changed = ids.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 101
    before, after = model.hidden(ids), model.hidden(changed)
    assert torch.equal(before[:, :13], after[:, :13]) and not torch.allclose(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_begins_uniform_and_sees_no_future(changes):
    model = build(d_model=128, vocab_size=257, tied=False, **changes)
    ids, targets = torch.randint(257, (2, 16, 24)).unbind(0)
    assert model(ids, targets).item() == pytest.approx(math.log(257), rel=0.02)
    changed = ids.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 257
    with torch.no_grad():
        before, after = model.hidden(ids), model.hidden(changed)
    assert torch.equal(before[:, :13], after[:, :13]) and not torch.allclose(before[:, 13:], after[:, 13:])


def rotated(x, interleaved):
    """RoPE of heads `[T, H, D]` by complex multiplication."""
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles)[:, None])
    return turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)


def dense(model, ids):
    """A plain reference: final hidden states `[T, C]` of ids `[T]`, without QK-norm and grouped-query attention."""
    c, weights = model.config, {k: v.detach().clone() for k, v in model.named_parameters()}
    t, d = len(ids), c.head_dim

    def linear(name, x):
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name, x):
        if c.norm == "none":
            return x
        centred = x - x.mean(-1, keepdim=True) if c.norm == "layer" else x
        y = centred / (centred.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weights[f"{name}.gain"]
        return y + weights[f"{name}.bias"] if c.norm == "layer" else y

    def attention(name, x):
        q, k, v = linear(f"{name}.qkv", x).view(t, 3, c.n_head, d).unbind(1)
        if c.position.startswith("rope"):
            q, k = (rotated(x, c.position == "rope-interleaved") for x in (q, k))
        scores = torch.einsum("thd,shd->hts", q, k) / d**0.5
        if c.position == "alibi":
            places, falls = torch.arange(t), torch.tensor([2 ** (-8 * (h + 1) / c.n_head) for h in range(c.n_head)])
            scores = scores - falls[:, None, None] * (places[:, None] - places)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        return linear(f"{name}.out", torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1))

    def feed_forward(name, x):
        z = linear(f"{name}.gate_up", x)
        if c.activation == "swiglu":
            gate, up = z.chunk(2, -1)
            z = gate * gate.sigmoid() * up
        else:
            z = {"silu": z * z.sigmoid(), "relu2": z.clamp(min=0) ** 2}[c.activation]
        return linear(f"{name}.down", z)

    x = weights["embedding.weight"][ids]
    if c.position == "learned":
        x = x + weights["position"][:t]
    if c.position == "sinusoidal":
        i = torch.arange(c.d_model)
        angles = torch.arange(t)[:, None] / 10000 ** (2 * (i // 2) / c.d_model)
        x = x + 0.25 * c.d_model**-0.5 * torch.where(i % 2 == 0, angles.sin(), angles.cos())
    for layer in range(c.n_layer):
        for part, f in (("attention", attention), ("feed_forward", feed_forward)):
            name = f"blocks.{layer}.{part}"
            if c.norm_place == "pre":
                x = x + f(name, norm(f"{name}_norm", x))
            elif c.norm_place == "post":
                x = norm(f"{name}_norm", x + f(name, x))
            else:
                x = x + norm(f"{name}_norm", f(name, x))
    return norm("norm", x)


IN_TRITON = ("interleaved", "ALiBi", "squared ReLU, biases", "post-norm")


@pytest.mark.parametrize(
    "switch, kernels",
    [(name, "torch") for name in SWITCHES] + [pytest.param(name, "triton", marks=NO_TRITON) for name in IN_TRITON],
)
def test_every_switch_is_its_formula(switch, kernels):
    model = build(kernels=kernels, qk_norm=False, **SWITCHES[switch])
    with torch.no_grad():
        for parameter in model.parameters():  # so that gains are not all 1 and biases not all 0
            parameter += 0.1 * torch.randn_like(parameter)
        ids = torch.randint(101, (9,))
        torch.testing.assert_close(model.hidden(ids[None])[0], dense(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "relu2"])
def test_activations_without_a_gate_have_as_many_weights(activation):
    for width in (64, 128, 512):
        gated, plain = (build(d_model=width, activation=name) for name in ("swiglu", activation))
        assert plain.n_parameters() == gated.n_parameters()
        assert plain.flops_per_token() == gated.flops_per_token()


def test_options_that_add_parameters_but_no_gemms_leave_flops_unchanged():
    plain = build()
    for changes, more in (
        ({"position": "learned"}, 24 * 64),
        ({"position": "sinusoidal"}, 0),
        ({"bias": True}, 2 * (3 * 64 + 64 + 2 * 192 + 64)),
        ({"norm": "layer"}, 5 * 64),
        ({"norm": "none"}, -5 * 64),
    ):
        model = build(**changes)
        assert model.n_parameters() == plain.n_parameters() + more
        assert model.flops_per_token() == plain.flops_per_token()


@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_the_configured_std(tied):
    model = build(d_model=256, d_ff=512, vocab_size=300, tied=tied, n_kv_head=2, init="xavier", embedding_std=0.5)
    block = model.blocks[0]
    q, k, _ = block.attention.qkv.weight.split((256, 128, 128))
    for weight, std in (
        (model.embedding.weight, 0.5),
        (model.head.weight, 0.5 if tied else (2 / 556) ** 0.5),
        (q, (2 / 512) ** 0.5),
        (k, (2 / 384) ** 0.5),
        (block.feed_forward.gate_up.weight, (2 / 768) ** 0.5),
        (block.feed_forward.down.weight, (2 / 768) ** 0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert q.abs().max() <= 3 * (2 / 512) ** 0.5
    assert build(position="learned", embedding_std=0.5).position.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("sizes", [{"head_dim": 32}, {"n_head": 2, "n_kv_head": 1, "head_dim": 64}, {"head_dim": 128}])
def test_heads_that_look_back_attend_to_the_token_before(sizes):
    model = build(vocab_size=1000, init="look-back", **sizes)
    config, block, ids = model.config, model.blocks[0], torch.randint(1000, (4, 24))
    packed = block.attention.qkv(block.attention_norm(model.embedding(ids), None)[0])
    gains = block.attention.q_gain, block.attention.k_gain
    q, k, _ = model.kernels.rope(packed, model.cos, model.sin, config.n_head, config.n_kv_head, *gains)
    before = scores(q, k).softmax(-1).diagonal(-1, -2, -1)
    assert before.min() > 0.8 and before.mean() > 0.9
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(1000), rel=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_changes_no_gradient(dropout):
    ids, gradients, passes = torch.randint(101, (2, 24)), [], []
    for share in (0.0, 0.5, 1.0):
        model, calls = build(n_layer=4, dropout=dropout, recompute=share), []
        for block in model.blocks:
            block.attention.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(ids, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
        passes.append(len(calls))
    assert passes == [4, 6, 8]
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_position_matters():
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    hidden = build().hidden(ids)
    assert not torch.allclose(hidden[0, 2], hidden[0, 4], atol=1e-4)


def test_parameter_and_flop_counts():
    model = build(tied=False, n_kv_head=2, d_ff=160, qk_norm=True)
    qkv, out, gate_up, down = 64 * (64 + 2 * 32), 64 * 64, 64 * 320, 160 * 64
    matrices = 2 * (qkv + out + gate_up + down)
    assert model.n_parameters() == matrices + 2 * 101 * 64 + 5 * 64 + 2 * 2 * 16
    assert model.flops_per_token() == 6 * (matrices + 101 * 64) + 6 * 2 * 24 * 64
    windowed = build(tied=False, n_kv_head=2, d_ff=160, window="SL:8")
    assert windowed.flops_per_token() == 6 * (matrices + 101 * 64) + 12 * 64 * 12 + round(12 * 64 * (8 - 64 / 48))
    tied = build(n_kv_head=2, d_ff=160, qk_norm=True)
    assert tied.n_parameters() == model.n_parameters() - 101 * 64
    assert tied.flops_per_token() == model.flops_per_token()


def test_sizes_from_a_million_to_a_billion():
    for sizes, millions in (((3, 4, 128, 2048), 0.9), ((12, 12, 768, 50257), 124), ((24, 32, 2048, 32000), 1281)):
        layers, heads, width, vocab = sizes
        with torch.device("meta"):
            model = build(n_layer=layers, n_head=heads, d_model=width, vocab_size=vocab)
        assert model.n_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": 65}, "d_model 65 must be a multiple of n_head 4"),
        ({"d_model": 12}, "head_dim 3 must be even"),
        ({"n_kv_head": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
        ({"norm": "none", "norm_place": "post"}, "norm_place post needs a norm: norm must be rms or layer, not none"),
        (
            {"init": "look-back", "position": "alibi"},
            "init look-back needs position rope, not alibi; or use init fan-in",
        ),
        ({"init": "look-back", "qk_norm": False}, "init look-back needs qk_norm True, not False"),
        ({"vocab_size": 100}, "vocab_size 100 is less than the tokenizer's 101"),
        *(
            ({"window": text}, f"window must be a number of keys, such as 256, or S and L by layer, .* not {text!r}")
            for text in ("0", "-4", "8.5", "SSX", "ssl", "S:", "S:0", ":8", "8:S", "SL 8", "²")
        ),
    ],
)
def test_invalid_shapes(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


@pytest.mark.parametrize("changes", [*SHAPES.values(), *FEATURES.values(), *SWITCHES.values()])
def test_parameters_are_counted_without_building_the_model(changes):
    model = build(**changes)
    assert model.config.n_parameters() == model.n_parameters()


def test_parameters_do_not_depend_on_kernels():
    one, other = build(kernels="torch"), build(seed=1, kernels="auto")
    other.load_state_dict(one.state_dict())
    ids = torch.randint(101, (2, 24))
    torch.testing.assert_close(one(ids, ids), other(ids, ids))


@pytest.mark.parametrize("kernels, features", [("auto", "plain"), ("torch", "plain"), ("auto", "all")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "layer", "norm_place": "post", "position": "learned", "recompute": 0.5},
        {"norm_place": "res-post", "label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 5.0},
    ],
    ids=["default", "post-norm", "res-post-norm"],
)
def test_the_model_is_one_graph(kernels, features, changes):
    model, ids = build(kernels=kernels, **FEATURES[features], **changes), documents(9, 15, rows=2)
    torch.compiler.reset()
    traced = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(ids, ids), model(ids, ids))


@pytest.mark.parametrize(
    "text, windows",
    [
        ("", (0, 0, 0, 0, 0)),
        ("8", (8, 8, 8, 8, 8)),
        ("24", (0, 0, 0, 0, 0)),
        ("SL", (12, 0, 12, 0, 12)),
        ("LSS:8", (0, 8, 8, 0, 8)),
        ("SSSSSSSL:23", (23, 23, 23, 23, 23)),
    ],
)
def test_each_layer_has_its_window(text, windows):
    assert ModelConfig(n_layer=5, seq_len=24, window=text).windows == windows


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("window, receptive_field", [("5", 8), ("SL:5", 23)])
def test_a_window_hides_earlier_positions(attention, window, receptive_field):
    """Each layer sees the current position and the 4 before it, so the receptive field grows by 4 per layer."""
    model = build(attention=attention, window=window)
    ids = torch.randint(101, (1, 24))
    last = model.hidden(ids)[0, -1]
    for back in (receptive_field, receptive_field + 1):
        if back < 24:
            changed = ids.clone()
            changed[0, 23 - back] = (changed[0, 23 - back] + 1) % 101
            assert torch.allclose(model.hidden(changed)[0, -1], last, atol=1e-6, rtol=0) == (back > receptive_field)


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_document_is_independent_of_the_others(attention):
    model = build(attention=attention, **FEATURES["all"])
    lengths = (7, 1, 12, 4)
    ids = documents(*lengths, rows=2)
    ids[1, :8] = torch.randint(SEPARATOR, (8,))  # the row starts within a document
    hidden = model.hidden(ids)
    torch.testing.assert_close(hidden[1:, :8], model.hidden(ids[1:, :8]))
    for part, states in zip(ids[0].split(lengths), hidden[0].split(lengths), strict=True):
        torch.testing.assert_close(states, model.hidden(part[None])[0])
    changed = ids.clone()
    changed[:, 9:20] = (changed[:, 9:20] + 1) % SEPARATOR  # a document without its separator
    same = (model.hidden(changed) == hidden).all(-1).all(0)
    assert same.tolist() == [True] * 9 + [False] * 11 + [True] * 4


def test_positions_restart_in_each_document():
    """RoPE depends on position differences only, so this must be tested on positions and not on outputs."""
    model, ids = build(separator=SEPARATOR), documents(4, 1, 3)
    assert model._context(ids, None).positions.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    cache = KVCache(model.config, torch.tensor([2]))
    model.hidden(ids[:, :3], cache)
    assert model._context(ids[:, 3:], cache).positions.tolist() == [[1, 0, 0, 1, 2]]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_cached_states_equal_a_full_forward_pass(attention, features):
    """The cache is filled in chunks of several tokens and of one."""
    model, ids = build(attention=attention, **features), documents(8, 11, 5, rows=3)
    sizes = (6, 1, 1, 9, 1, 6)
    with torch.no_grad():
        cache, whole = KVCache(model.config, torch.zeros(3, dtype=torch.int64)), model.hidden(ids)
        for part, truth in zip(ids.split(sizes, 1), whole.split(sizes, 1), strict=True):
            torch.testing.assert_close(model.hidden(part, cache), truth)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_left_padding_changes_nothing(attention, features):
    """Both before and after another row is dropped from the cache."""
    model, ids, padding = build(attention=attention, **features), documents(11, 13, rows=3), [0, 6, 2]
    with torch.no_grad():
        alone = [model.hidden(row[None, n:])[0] for row, n in zip(ids, padding, strict=True)]
        cache = KVCache(model.config, torch.tensor(padding))
        for row, n, states in zip(range(3), padding, model.hidden(ids[:, :10], cache), strict=True):
            torch.testing.assert_close(states[n:], alone[row][: 10 - n])
        cache.keep([2, 1])
        for i, j in pairwise((10, 11, 12, 18, 19, 24)):
            states = model.hidden(ids[[2, 1], i:j], cache)
            torch.testing.assert_close(states, torch.stack([alone[2][i - 2 : j - 2], alone[1][i - 6 : j - 6]]))


def test_more_tokens_than_the_context_length_are_refused():
    model = build()
    cache = KVCache(model.config, torch.zeros(1, dtype=torch.int64))
    model.hidden(torch.zeros(1, 20, dtype=torch.int64), cache)
    for ids, cached in ((torch.zeros(1, 25, dtype=torch.int64), None), (torch.zeros(1, 5, dtype=torch.int64), cache)):
        with pytest.raises(ValueError, match="25 tokens are more than the model's seq_len 24"):
            model.hidden(ids, cached)


def test_dropout_is_for_training():
    sure, model = build(), build(dropout=0.3)
    ids = torch.randint(101, (2, 24))
    model.load_state_dict(sure.state_dict())
    assert not torch.equal(model(ids, ids), model(ids, ids))
    assert torch.equal(model.eval()(ids, ids), sure(ids, ids))
    model.train()
    results = [evaluate(model, [(ids, ids)], torch.ones(101)) for model in (model, sure)]
    assert results[0] == results[1]
    texts = [generate(model, [[1]], 20, temperature=0, generator=torch.Generator()) for model in (model, sure)]
    assert texts[0] == texts[1] and model.training


def test_dropout_applies_in_three_places():
    """Dropout of 0.5 zeroes half of the embedding's output, the sub-layer outputs and the attention weights."""
    model, ids = build(dropout=0.5), torch.randint(101, (400, 1))
    zero_fractions = []

    def count(x):
        zero_fractions.append((x == 0).float().mean().item())

    for module in (model.dropout, model.blocks[1].dropout):
        module.register_forward_hook(lambda module, args, out: count(out))
    model.blocks[0].attention.out.register_forward_pre_hook(lambda module, args: count(args[0]))
    model.hidden(ids)
    assert zero_fractions == pytest.approx([0.5] * 4, abs=0.05)  # a block has two sub-layers


def test_dropout_needs_an_attention_kernel_that_has_it():
    config = ModelConfig(n_layer=1, n_head=2, d_model=16, dropout=0.1).resolved(11)
    with pytest.raises(KernelError, match=r"attention has no dropout: use --kernels\.attention=sdpa \(or torch\)"):
        GPT(config, replace(bind(KernelChoice()), names={"attention": "triton"}))


def test_evaluation_counts_known_targets_and_their_bytes():
    model, lengths = build(), torch.arange(101)
    ids, targets = torch.randint(101, (2, 4, 24)).unbind(0)
    padded = targets.clone()
    padded[2:] = IGNORE
    with torch.no_grad():
        nats = model(ids[:2], targets[:2], "sum").item()
    result = evaluate(model, [(ids, padded)], lengths)
    assert result["val_loss"] == pytest.approx(nats / 48)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / targets[:2].sum().item())


LOSS = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_softcap": 2.0}


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=NO_TRITON)])
@pytest.mark.parametrize("knobs", [{}, *({key: value} for key, value in LOSS.items()), LOSS], ids=str)
def test_the_training_loss_is_its_formula_and_evaluation_keeps_only_the_softcap(kernels, knobs):
    """In float64 from the model's own hidden states."""
    model, (ids, targets) = build(kernels=kernels, **knobs), torch.randint(101, (2, 2, 24))
    torch.nn.init.normal_(model.head.weight, std=0.5)  # logits that a softcap of 2 changes
    with torch.no_grad():
        logits = model.hidden(ids).double() @ model.head.weight.double().T
        if cap := knobs.get("logit_softcap"):
            logits = cap * torch.tanh(logits / cap)
        lse, picked = logits.logsumexp(-1), logits.gather(-1, targets[..., None])[..., 0]
        smoothing, z_loss = knobs.get("label_smoothing", 0.0), knobs.get("z_loss", 0.0)
        trained = lse - (1 - smoothing) * picked - smoothing * logits.mean(-1) + z_loss * lse.square()
        assert model(ids, targets).item() == pytest.approx(trained.mean().item(), rel=1e-4)
        assert model.eval()(ids, targets).item() == pytest.approx((lse - picked).mean().item(), rel=1e-4)
        torch.testing.assert_close(model.logits(ids).double(), logits[:, -1], rtol=1e-4, atol=1e-4)


def test_evaluation_takes_no_gradients():
    model, taken = build(), []
    model.register_forward_hook(lambda *_: taken.append(torch.is_grad_enabled()))
    evaluate(model, [torch.randint(101, (2, 4, 24)).unbind(0)], torch.arange(101))
    assert taken == [False]


def test_residual_projections_are_scaled_by_depth():
    model = build(n_layer=8)
    for name, width in (("attention.out", 64), ("feed_forward.down", model.config.d_ff)):
        weight = model.get_submodule(f"blocks.3.{name}").weight
        assert weight.std().item() == pytest.approx((16 * width) ** -0.5, rel=0.1)


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(**kind):
        uniform = torch.rand(4000, dtype=torch.float64, generator=generator)
        sampled = next_tokens(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | kind, uniform=uniform)
        return (torch.bincount(sampled, minlength=4) / 4000).tolist()

    assert share() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert share(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert share(top_k=9) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert share(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert share(top_k=3, top_p=0.9) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert share(top_p=0.01) == [1, 0, 0, 0]
    assert share(temperature=0) == [1, 0, 0, 0]
    assert share(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)


def test_generation_in_a_batch_equals_generation_alone():
    model, prompts = build(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate(model, prompts, 30, temperature=0, generator=torch.Generator())
    alone = [generate(model, [p], 30, temperature=0, generator=torch.Generator())[0] for p in prompts]
    assert together == alone and all(len(row) == 30 for row in together)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_cached_generation_equals_full_forward_passes(features, captured, monkeypatch):
    """Rows of several lengths: one ends early, others exceed the context length. CUDA graphs are emulated."""
    model, prompts = build(**features), [[1, 2, SEPARATOR, 3], [4] * 3, [7] * 20]
    monkeypatch.setattr(generate_module, "Decoder", lambda *args, **kind: Decoder(*args, captured=captured))
    emulate_graphs(monkeypatch)

    def write(tokens, **kind):
        return generate(model, prompts, tokens, temperature=3.0, generator=torch.Generator().manual_seed(1), **kind)

    # Stop at a token of the first row that no other row has earlier: other rows must not end early.
    first, *others = write(6)
    stop = next(first[n] for n in (5, 4, 3, 2, 1) if not any(first[n] in row[:n] for row in others))
    rows, active, generator = [list(prompt) for prompt in prompts], [0, 1, 2], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(30):
            if not active:
                break
            contexts = [rows[i][window_start(len(rows[i]), 24) :] for i in active]
            logits = torch.cat([model.logits(torch.tensor([context])) for context in contexts])
            uniform = torch.rand(3, dtype=torch.float64, generator=generator)[active]
            sampled = dict(zip(active, next_tokens(logits, 3.0, 0, 1.0, uniform).tolist(), strict=True))
            active = [i for i in active if sampled[i] != stop]
            for i in active:
                rows[i].append(sampled[i])
    assert 0 not in active
    assert [prompt + new for prompt, new in zip(prompts, write(30, stop=stop), strict=True)] == rows
    assert (Recorded.replays > 10) == captured


def test_the_context_loses_its_first_half_when_it_is_full():
    assert [window_start(n, 24) for n in (1, 24, 25, 36, 37, 60)] == [0, 0, 12, 12, 24, 36]
    assert [window_start(n, 1) for n in (1, 2, 3)] == [0, 1, 2]


def test_each_token_is_processed_once_until_the_context_is_full():
    model, passed = build(), []
    model.embedding.register_forward_hook(lambda module, ids, out: passed.append(ids[0].shape[1]))
    generate(model, [[1] * 20, [2]], 8, generator=torch.Generator())
    generate(model, [[1] * 30, [2]], 2, generator=torch.Generator())
    assert passed == [20, 1, 1, 1, 1, 13, 1, 1, 18, 1]


def test_only_the_given_ids_are_sampled():
    model = build()
    for temperature in (0, 5.0):
        (row,) = generate(model, [[1]], 60, [3, 5, 100], temperature=temperature, generator=torch.Generator())
        assert {3, 5, 100} >= set(row)


def test_generation_repeats_with_its_seed_and_ends_at_the_stop_token():
    model = build()

    def write(seed, stop=None):
        return generate(model, [[1]], 40, temperature=2.0, generator=torch.Generator().manual_seed(seed), stop=stop)[0]

    assert write(0) == write(0) != write(1)
    stop = write(0)[10]
    assert write(0, stop) == write(0)[: write(0).index(stop)]


# Half-precision copies of the weights, and the dtype of the residual stream


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=NO_TRITON)])
@pytest.mark.parametrize("features", [{}, {"tied": False, "bias": True}, {"norm": "none", "recompute": 1.0}], ids=str)
def test_copies_of_the_weights_change_no_result(features, kernels):
    """The GEMMs are those of autocast, which casts the weights itself. Autocast rounds weight gradients to bf16."""
    results = []
    for copied in (False, True):
        model = build(kernels=kernels, **features)
        if copied:
            model.keep_copies(torch.bfloat16)
        ids = documents(9, 15, rows=2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, ids.roll(-1, 1))
            logits = model.logits(ids).detach()
        loss.backward()
        results.append((loss.detach(), logits, [p.grad for p in model.parameters()]))
    (loss, logits, gradients), (copied_loss, copied_logits, copied_gradients) = results
    assert torch.equal(loss, copied_loss) and torch.equal(logits, copied_logits)
    for ours, plain in zip(copied_gradients, gradients, strict=True):
        assert ours.dtype == torch.float32 and (ours - plain).norm() <= 0.01 * plain.norm()


def test_copies_follow_what_is_loaded_and_are_not_saved():
    source, model = build(seed=1, bias=True), build(seed=2, bias=True)
    model.keep_copies(torch.bfloat16)
    assert model.state_dict().keys() == source.state_dict().keys()
    model.load_state_dict(source.state_dict())
    matrices = {p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name} | {model.head.weight}
    assert model.copies().keys() == matrices
    assert all(torch.equal(copy, weight.bfloat16()) for weight, copy in model.copies().items())
    assert model.head.copy.shape == (128, 64) and not model.head.copy[101:].any()  # of 101 rows


def test_the_residual_stream_has_the_requested_dtype():
    model, dtypes = build(n_layer=3), set()
    model.residual = torch.bfloat16
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: dtypes.update(x.dtype for x in outputs))
    with torch.autocast("cpu", torch.bfloat16):
        ids = documents(9, 15)
        loss = model(ids, ids.roll(-1, 1))
        model.residual = None
        exact = model(ids, ids.roll(-1, 1))
    assert dtypes == {torch.bfloat16, torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3) and loss.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, half, said",
    [
        ({}, True, "sdpa for a plain mask"),
        ({"window": "SL:5"}, True, "triton for windows, sdpa for a plain mask"),
        ({"separator": SEPARATOR, "position": "alibi"}, False, "triton for documents, slopes"),
        ({"dropout": 0.1, "window": "5"}, True, "sdpa for dropout"),
    ],
)
def test_attention_choice_is_described(changes, half, said):
    assert build(**changes, head_dim=128).attention_choice(half) == said
