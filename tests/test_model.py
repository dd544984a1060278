"""The model: its shapes, counts and first loss, what it may see, and what it generates."""

import math

import pytest
import torch

from kernels import KernelChoice, bind
from kernels.linear_cross_entropy import IGNORE
from model.config import ConfigError
from model.evaluate import evaluate
from model.generate import generate, next_tokens
from model.gpt import GPT, ModelConfig

SHAPES = {
    "plain": {"tied": True, "qk_norm": False},
    "qwen": {"tied": False, "qk_norm": True, "n_kv_head": 2, "head_dim": 24},
}


def build(seed=0, kernels="auto", **changes):
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 4, "d_model": 64, "seq_len": 24, "vocab_size": 101, "tied": True}
    config = ModelConfig(**(sizes | changes)).resolved(101)
    return GPT(config, bind(KernelChoice(every=kernels)))


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


def test_position_matters():
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    hidden = build().hidden(ids)
    assert not torch.allclose(hidden[0, 2], hidden[0, 4], atol=1e-4)


def test_counts_are_what_they_say():
    model = build(tied=False, n_kv_head=2, d_ff=160, qk_norm=True)
    qkv, out, gate_up, down = 64 * (64 + 2 * 32), 64 * 64, 64 * 320, 160 * 64
    matrices = 2 * (qkv + out + gate_up + down)
    assert model.n_parameters() == matrices + 2 * 101 * 64 + 5 * 64 + 2 * 2 * 16
    assert model.flops_per_token() == 6 * (matrices + 101 * 64) + 6 * 2 * 24 * 64
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
        ({"vocab_size": 100}, "vocab_size 100 is less than the tokenizer's 101"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_kernels_never_show_in_the_parameters():
    one, other = build(kernels="torch"), build(seed=1, kernels="auto")
    other.load_state_dict(one.state_dict())
    ids = torch.randint(101, (2, 24))
    torch.testing.assert_close(one(ids, ids), other(ids, ids))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_model_is_one_graph(kernels):
    model, ids = build(kernels=kernels), torch.randint(101, (2, 24))
    torch.compiler.reset()
    traced = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(ids, ids), model(ids, ids))


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


def test_sampling_keeps_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def share(**kind):
        drawn = next_tokens(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | kind, generator=generator)
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    assert share() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert share(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert share(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert share(top_p=0.01) == [1, 0, 0, 0]
    assert share(temperature=0) == [1, 0, 0, 0]
    assert share(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)


def test_generation_in_a_batch_is_as_alone():
    model, prompts = build(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate(model, prompts, 30, temperature=0, generator=torch.Generator())
    alone = [generate(model, [p], 30, temperature=0, generator=torch.Generator())[0] for p in prompts]
    assert together == alone and all(len(row) == 30 for row in together)


def test_generation_repeats_with_its_seed_and_ends_at_the_stop_token():
    model = build()

    def write(seed, stop=None):
        return generate(model, [[1]], 40, temperature=2.0, generator=torch.Generator().manual_seed(seed), stop=stop)[0]

    assert write(0) == write(0) != write(1)
    stop = write(0)[10]
    assert write(0, stop) == write(0)[: write(0).index(stop)]
