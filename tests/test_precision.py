"""Linear layers in FP8, MXFP8 and NVFP4: which they are, what they compute, their scales, and runs in them."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from parity import DEVICE, gpu, interpreted
from ranks import Launcher, forks
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kernels import EMITTING, KernelChoice, bind
from kernels.formats import E4M3, E5M2, quantize_nvfp4, round_to
from kernels.sanitizer import sanitize
from model import checkpoint
from model.evaluate import _compiled_loss, evaluating
from model.fp8 import HISTORY, MARGIN, Scales
from model.gpt import GPT, KVCache, Linear, ModelConfig
from model.precision import check_whole, lower
from runtime.config import ConfigError
from runtime.hardware import LOW, HardwareError, pick_precision

TORCH = KernelChoice(every="torch")
by_precision = pytest.mark.parametrize("precision", LOW)


def small_gpt(choice=TORCH, **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32}
    return GPT(ModelConfig(**(sizes | changes)).resolved(64), bind(choice, DEVICE)).to(DEVICE)


def batch(seed=0, tokens=32):
    ids = torch.randint(64, (2, tokens + 1), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def loss_of(model, seed=0):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return model(*batch(seed), "sum")


def gradients(model, seed=0):
    model.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


# Which layers


@pytest.mark.parametrize("precision, layers, products", [("fp8", 7, 4), ("mxfp8", 7, 6), ("nvfp4", 5, 6)])
def test_the_blocks_layers_are_lowered_and_of_nvfp4_not_the_last_sixth(precision, layers, products):
    model = small_gpt(n_layer=7)
    low = lower(model, precision)
    found = [name for name, module in model.named_modules() if isinstance(module, Linear) and module.low]
    kinds = ("attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down")
    assert found == [f"blocks.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    numbers = sum(model.get_submodule(name).weight.numel() for name in found)
    share = products * numbers / model.flops_per_token()
    assert low.share == share
    line = f"{precision}: qkv, out, gate_up, down of {layers} of 7 layers, {share:.0%} of the training FLOPs"
    assert low.lines()[0].startswith(line) and low.lines()[1].startswith("SIMULATED: ")
    assert low.facts() == {"low_flops": share, "simulated": True}


def test_layers_of_other_widths_stay_and_a_model_without_any_is_refused():
    model = small_gpt(d_ff=72)
    lower(model, "fp8")
    assert model.blocks[0].feed_forward.gate_up.low and not model.blocks[0].feed_forward.down.low
    with pytest.raises(ConfigError, match=r"--precision=fp8 finds no layer to lower: .* multiples of 16"):
        lower(small_gpt(d_model=40, head_dim=20), "fp8")
    with pytest.raises(ConfigError, match="nvfp4 takes 2 layers or more"):
        lower(small_gpt(n_layer=1), "nvfp4")


def test_sharded_weights_are_refused():
    with pytest.raises(ConfigError, match=r"--precision=fp8 quantises whole weights, which --shard=full divides: use"):
        check_whole("fp8", "auto", "full")
    with pytest.raises(ConfigError, match=r"--head_precision=fp8 quantises whole weights, which --shard=hybrid"):
        check_whole("bf16", "fp8", "hybrid")
    check_whole("fp8", "fp8", "off"), check_whole("bf16", "auto", "hybrid")


def test_other_precisions_lower_nothing():
    model = small_gpt()
    low = lower(model, "bf16")
    assert not low.lines() and not low.facts() and not low.state()["scales"] and not low.simulated
    assert all(module.low is None for module in model.modules() if isinstance(module, Linear))


@by_precision
def test_weights_stay_float32_under_their_names(precision):
    plain, model = small_gpt(), small_gpt()
    lower(model, precision)
    theirs, ours = plain.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


# What they compute


def layer_of(precision, bias=False, choice=TORCH):
    """The lowered layers of a model, one of them, and an input and an upstream gradient for that."""
    model = small_gpt(choice, bias=bias)
    low = lower(model, precision)
    torch.manual_seed(1)
    linear = model.blocks[0].attention.qkv
    x = torch.randn(2, 32, 32, device=DEVICE).bfloat16().requires_grad_()
    dy = 1e-6 * torch.randn(2, 32, 96, device=DEVICE).bfloat16()
    return low, linear, x, dy


def coded(x, scale, format):
    return round_to(x.detach().float() * (1 / scale), format) * scale


def test_fp8_multiplies_codes_and_the_weights_gradient_is_of_bf16():
    low, linear, x, dy = layer_of("fp8")
    y = linear(x)
    y.backward(dy)
    scale_x, scale_w, scale_dy = low.scales.scale[:3, 0]
    w = coded(linear.weight, scale_w, E4M3)
    torch.testing.assert_close(y, (coded(x, scale_x, E4M3) @ w.t()).bfloat16(), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(x.grad, (coded(dy, scale_dy, E5M2) @ w).bfloat16(), rtol=1e-2, atol=1e-11)
    expected = dy.flatten(0, 1).float().t() @ x.detach().flatten(0, 1).float()
    torch.testing.assert_close(linear.weight.grad, expected, rtol=1e-2, atol=1e-7)
    assert torch.equal(low.scales.amax[:3, 0], torch.stack([t.abs().max().float() for t in (x, linear.weight, dy)]))


@pytest.mark.parametrize("precision, error", [("mxfp8", 0.04), ("nvfp4", 0.2)])
def test_simulated_products_are_near(precision, error):
    _, linear, x, dy = layer_of(precision, bias=True)
    y = linear(x)
    y.backward(dy)
    exact = torch.nn.functional.linear(x.float(), linear.weight, linear.bias)
    dx, dw = dy.float() @ linear.weight, dy.flatten(0, 1).float().t() @ x.detach().flatten(0, 1).float()
    for ours, theirs in ((y, exact), (x.grad, dx), (linear.weight.grad, dw)):
        distance = (ours.float() - theirs).norm() / theirs.norm()
        assert error / 20 < distance < error
    torch.testing.assert_close(linear.bias.grad, dy.flatten(0, 1).float().sum(0), rtol=2e-2, atol=1e-7)


def dequantized(quantized):
    return quantized.dequantize() * quantized.tensor_scale


def test_nvfp4_rounds_gradients_at_random_and_inputs_to_nearest():
    _, linear, x, dy = layer_of("nvfp4")
    first, again = linear(x), linear(x)
    assert torch.equal(first, again)
    x_2d, w = x.detach().flatten(0, 1), quantize_nvfp4(linear.weight, (16, 16))
    expected = (dequantized(quantize_nvfp4(x_2d, (1, 16))) @ dequantized(w).t()).bfloat16()
    torch.testing.assert_close(first.flatten(0, 1), expected, rtol=1e-2, atol=1e-4)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        x.grad = linear.weight.grad = None
        linear(x).backward(dy)
        runs.append((x.grad, linear.weight.grad))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][1], runs[2][1])


@by_precision
def test_nan_is_not_hidden(precision):
    _, linear, x, _ = layer_of(precision)
    with torch.no_grad():
        x[0, 3, 5] = math.nan
    assert linear(x)[0, 3].isnan().all()


@by_precision
@pytest.mark.parametrize("tokens", [1, 7])
def test_any_number_of_tokens(precision, tokens):
    model = small_gpt()
    lower(model, precision)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        model(*batch(tokens=tokens)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Codes of the layers' inputs, from the kernels that compute those


def quantised_apart(kernels):
    """The same, but inputs are quantised where they are multiplied."""
    return replace(kernels, **{f"{op}_fp8": None for op in EMITTING})


def steps_of(kernels, residual=None, **changes):
    """Loss, gradients and scales of the second of two steps in FP8, then the loss of a text and the logits after it;
    how many tensors the layers quantised, forward and backward, in each step; and those layers."""
    counts = [0]

    def counted(*arguments):
        counts[-1] += 1
        return kernels.fp8_quantize(*arguments)

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32}
    model = GPT(ModelConfig(**(sizes | changes)).resolved(64), replace(kernels, fp8_quantize=counted)).to(DEVICE)
    model.residual = residual
    low, results = lower(model, "fp8"), []
    for seed in range(2):
        torch.manual_seed(seed)
        model.zero_grad()
        counts.append(0)
        loss = loss_of(model, seed)
        counts.append(0)
        loss.backward()
        counts.append(0)
        results = [loss.detach(), *(p.grad for p in model.parameters())]
        results += [x.clone() for x in low.state()["scales"].values()]
        low.advance()
    amax, (ids, _) = low.scales.amax.clone(), batch(2)
    with evaluating(model), torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        cache = KVCache(model.config, torch.zeros(2, dtype=torch.int64, device=DEVICE))
        results += [loss_of(model, 2), model.logits(ids[:, :8], cache), model.logits(ids[:, 8:9], cache)]
    assert torch.equal(low.scales.amax, amax), "evaluation and generation leave amax alone"
    return results, [*counts[1:3], *counts[4:6]], low


@pytest.mark.parametrize("changes, emitted, emitted_backward", [
    ({}, 6, 2), ({"residual": torch.bfloat16}, 6, 2), ({"recompute": 1.0}, 6, 8), ({"dropout": 0.1}, 6, 2),
    ({"bias": True}, 6, 2), ({"norm": "layer"}, 2, 2), ({"norm": "none"}, 2, 2), ({"activation": "relu2"}, 6, 2),
    ({"norm_place": "post"}, 2, 2), ({"norm_place": "res-post"}, 2, 2), ({"d_ff": 72}, 4, 0),
], ids=str)  # fmt: skip
def test_norms_and_activations_quantise_as_the_layers_do(changes, emitted, emitted_backward):
    """Bit for bit. Of the first step, which measures scales, the layers quantise everything."""
    kernels = bind(TORCH, DEVICE)
    ours, counts, low = steps_of(kernels, **changes)
    theirs, (forward, backward, *again), _ = steps_of(quantised_apart(kernels), **changes)
    assert forward == len(low.layers) and again == [forward, backward]
    assert counts == [forward, backward, forward - emitted, backward - emitted_backward]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@interpreted
def test_norms_and_activations_quantise_in_triton_as_the_layers_do():
    kernels = bind(KernelChoice(every="torch", rmsnorm="triton", swiglu="triton", fp8_quantize="triton"), DEVICE)
    with sanitize() as record:
        (ours, _, _), (theirs, _, _) = steps_of(kernels, n_layer=1), steps_of(quantised_apart(kernels), n_layer=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert record.kernels.keys() >= {"_rmsnorm_fwd_kernel", "_swiglu_fwd_kernel", "_fp8_quantize_kernel"}


def test_a_norm_of_the_users_own_is_quantised_in_a_pass_of_its_own_and_that_is_said(tmp_path):
    (tmp_path / "mine.py").write_text("from kernels.rmsnorm import rmsnorm_torch as rmsnorm")
    mine = f"{tmp_path / 'mine.py'}:rmsnorm"
    kernels = bind(KernelChoice(every="torch", rmsnorm=mine), DEVICE)
    ours, counts, low = steps_of(kernels)
    theirs, *_ = steps_of(bind(TORCH, DEVICE))
    assert counts == [8, 8, 6, 6] and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert f"rmsnorm {mine}: its results are quantised in a pass of its own, by fp8_quantize" in low.lines()
    assert not any("fp8_quantize" in line for line in lower(small_gpt(), "fp8").lines())


@interpreted
def test_triton_kernels_in_a_layer_and_in_the_model():
    triton, results = KernelChoice(every="torch", fp8_linear="triton", fp8_quantize="triton"), []
    for choice in (TORCH, triton):
        low, linear, x, dy = layer_of("fp8", choice=choice)
        (y := linear(x)).backward(dy)
        results.append([y, x.grad, linear.weight.grad, low.scales.amax])
        assert low.simulated == (choice is TORCH) and len(low.lines()) == 1 + low.simulated
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-9)
    model = small_gpt(triton)
    lower(model, "fp8")
    with sanitize() as record:
        assert all(g.isfinite().all() for g in gradients(model))
    assert record.kernels.keys() == {"_fp8_linear_kernel", "_fp8_quantize_kernel"}


@interpreted
@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_native_products_are_the_simulated_up_to_rounding(precision):
    """With gradients rounded to nearest, since random numbers differ."""
    native, results = KernelChoice(every="torch", block_scaled_linear="triton", block_quantize="triton"), []
    for choice in (TORCH, native):
        low, linear, x, dy = layer_of(precision, choice=choice)
        linear.low.of_gradient = linear.low.of_input
        with sanitize(shuffle=0) as record:
            (y := linear(x)).backward(1e6 * dy)
        results.append([y, x.grad, linear.weight.grad])
        assert low.simulated == low.facts()["simulated"] == (choice is TORCH) and len(low.lines()) == 1 + low.simulated
    amax = {"_block_amax_kernel"} if precision == "nvfp4" else set()
    assert record.kernels.keys() == {"_block_scaled_linear_kernel", "_block_quantize_kernel"} | amax
    assert record.kernels["_block_scaled_linear_kernel"].launches == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-3)


class Seen(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket)
        return func(*args, **kwargs or {})


@interpreted
@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_step_reads_nothing_on_the_host_and_weights_keep_their_addresses(precision, name):
    choice = KernelChoice(every="torch", block_scaled_linear=name, block_quantize=name)
    _, linear, x, dy = layer_of(precision, choice=choice)
    tensors = [*linear.low.codes, *linear.low.codes_t]
    before, values = [t.data_ptr() for t in tensors], [t.clone() for t in tensors]
    with Seen() as seen:
        linear(x).backward(dy)
        with torch.no_grad():
            linear.weight.mul_(-1)
        linear.low.refresh()
    aten = torch.ops.aten
    assert not seen.names & {aten._local_scalar_dense, aten.item, aten.nonzero, aten.lift_fresh}
    assert [t.data_ptr() for t in (*linear.low.codes, *linear.low.codes_t)] == before
    assert not torch.equal(values[0].view(torch.uint8), linear.low.codes.codes.view(torch.uint8))


@pytest.mark.parametrize("precision", ["fp8", "mxfp8"])
def test_recomputed_layers_have_the_same_gradients(precision):
    results = []
    for share in (0.0, 1.0):
        model = small_gpt(recompute=share)
        low = lower(model, precision)
        gradients(model, seed=1)
        low.advance()
        results.append([*gradients(model), *low.state()["scales"].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_compiled_layers_compute_the_same_and_raise_the_same_amax():
    """One that quantises its input, one that has codes of it from the norm, and one from the activation."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = small_gpt(KernelChoice(every="torch", rmsnorm="triton", swiglu="triton"), n_layer=1)
        low, block = lower(model, "fp8"), model.blocks[0]
        gradients(model)
        low.advance()
        model.zero_grad()

        def forward(x, block=block):
            y, _, codes = block.feed_forward_norm(x, None, block.feed_forward.gate_up.target())
            return block.feed_forward(y, codes), block.attention.qkv(x)

        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE).bfloat16().requires_grad_()
        outputs = (torch.compile(forward, backend="aot_eager", fullgraph=True) if compiled else forward)(x)
        sum(y.float().square().sum() for y in outputs).backward()
        results.append([*outputs, x.grad, *(p.grad for p in block.parameters() if p.grad is not None), low.scales.amax])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][-1].count_nonzero() == 10


# Scales


def test_scales_follow_the_largest_of_the_steps_before():
    scales = Scales([E4M3, E5M2], DEVICE)
    scales.measure(0, torch.tensor([-8.0, 2.0], device=DEVICE))
    scales.measure(1, torch.zeros(3, device=DEVICE))
    assert scales.scale.flatten().tolist() == pytest.approx([8 / 448, 1.0]) and not scales.known
    for step in range(HISTORY + 1):
        scales.amax[0] = 100.0 if step == 0 else 4.0
        scales.advance()
        largest = 100 if step < HISTORY else 4
        assert scales.scale[0].item() == pytest.approx(MARGIN * largest / 448)
        assert scales.scale[1] == 1 and not scales.amax.any() and scales.known


def test_evaluation_leaves_amax_and_micro_batches_raise_it():
    model = small_gpt()
    low = lower(model, "fp8")
    gradients(model)
    low.advance()
    gradients(model, seed=1)
    first = low.scales.amax.clone()
    with torch.no_grad():
        loss_of(model, seed=2)
    assert torch.equal(low.scales.amax, first)
    gradients(model, seed=2)
    both = low.scales.amax.clone()
    assert (both >= first).all() and (both > first).any()


def test_evaluation_by_the_compiled_training_step_leaves_scales(run, monkeypatch):
    """It computes gradients too. Here the model itself stands in for the compiled one."""
    knobs = {"precision": "fp8", "steps": 3, "eval_every": 1, "eval_tokens": 256}
    _, plain = run(run="plain", **knobs)
    monkeypatch.setattr("train.eval_loss", lambda model, *_: partial(_compiled_loss, model, model))
    _, folder = run(run="compiled", **knobs)
    ours, theirs = (checkpoint.load(path / "last.pt")["scales"] for path in (folder, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_are_quantised_when_scales_advance():
    model = small_gpt()
    low = lower(model, "fp8")
    layer = model.blocks[1].feed_forward.down.low
    before = layer.codes.clone()
    with torch.no_grad():
        layer.linear.weight.mul_(-3)
    assert torch.equal(layer.codes.float(), before.float())
    low.advance()
    scale = low.scales.scale[layer.first + 1]
    assert torch.equal(layer.codes.float() * scale, coded(layer.linear.weight, scale, E4M3))
    assert torch.equal(layer.codes_t.float(), layer.codes.float().t())


@by_precision
def test_loaded_weights_are_quantised(precision):
    model, other = small_gpt(), small_gpt()
    lower(model, precision)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5).add_(0.01)
    model.load_state_dict(other.state_dict())
    lower(other, precision)
    assert torch.equal(loss_of(model), loss_of(other))


# Runs


@by_precision
def test_resuming_is_exact(run, precision):
    """Scales, weights and random numbers go on as if nothing had been."""
    whole = {"precision": precision, "schedule": "constant", "steps": 6, "save_every": 3}
    _, straight = run(run="straight", **whole)
    run(run="parts", **whole | {"steps": 3})
    code, parts = run("--resume", run="parts", **whole)
    assert code == 0
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (parts, straight))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    assert ours["scales"].keys() == theirs["scales"].keys()
    assert all(torch.equal(ours["scales"][name], theirs["scales"][name]) for name in ours["scales"])
    assert bool(ours["scales"]) == (precision == "fp8")


def test_a_run_is_recorded_and_said_to_be_simulated(run, capsys):
    code, folder = run(precision="nvfp4", steps=2)
    said = capsys.readouterr().out
    assert code == 0 and "nvfp4: qkv, out, gate_up, down of 1 of 2 layers" in said and "SIMULATED" in said
    status = json.loads((folder / "status.json").read_text())
    assert status["simulated"] is True and 0 < status["low_flops"] < 1


def test_checkpoints_load_under_any_precision(run):
    """From FP8 to bf16 and back; the scales of weights that were trained without are measured anew."""
    for precision, steps in (("fp8", 2), ("bf16", 4), ("nvfp4", 6), ("fp8", 8)):
        resume = ["--resume"] if steps > 2 else []
        code, folder = run(*resume, run="mine", precision=precision, steps=steps)
        assert code == 0
    assert checkpoint.load(folder / "last.pt")["step"] == 8


def test_scales_of_a_damaged_checkpoint_are_refused(run, capsys):
    _, folder = run(run="mine", precision="fp8", steps=2)
    state = checkpoint.load(folder / "last.pt")
    state["scales"]["amax"] = torch.zeros(3, 1)
    checkpoint.save(folder, {key: value for key, value in state.items() if key != "format"})
    assert run("--resume", run="mine", precision="fp8", steps=4)[0] == 2
    assert "its scales.amax is float32 [3, 1], not float32 [24, 1]" in capsys.readouterr().err


@forks
def test_ranks_agree_on_scales(tiny, tmp_path):
    """Each has other rows of the batch, and so other largest magnitudes."""

    def run(rank):
        loop = train.Trainer.loop

        def watched(trainer):
            status = loop(trainer)
            torch.save(trainer.low.state()["scales"], tmp_path / f"{rank}.pt")
            return status

        train.Trainer.loop = watched
        return train.main(tiny(tmp_path / "out", precision="fp8", steps=3, micro_batch=1))

    launcher = Launcher(tmp_path / "said")
    assert launcher.run(2, run) == [0, 0], launcher.said()
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours["history"][:3].all()


# Hardware


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_fp8_on_cards_that_have_it(monkeypatch, capability):
    device = gpu(monkeypatch, capability)
    assert pick_precision("fp8", device) == pick_precision("auto", device) == "bf16"


@pytest.mark.parametrize("capability, hip", [((8, 0), None), ((9, 4), "6.3")])
def test_fp8_is_refused_by_name_on_other_cards_and_simulations_are_not(monkeypatch, capability, hip):
    device = gpu(monkeypatch, capability, hip)
    with pytest.raises(HardwareError, match=r"a card does not multiply in FP8, .* use --precision=bf16"):
        pick_precision("fp8", device)
    assert pick_precision("nvfp4", device) == pick_precision("mxfp8", device) == "bf16"


def test_low_precisions_need_bf16_of_a_gpu(monkeypatch):
    device = gpu(monkeypatch, (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(HardwareError, match="a card does not compute in bf16"):
        pick_precision("nvfp4", device)
