"""The head in FP8: its products, its loss in chunks, scales, and runs with it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, LOSS, checked, gpu, interpreted
from ranks import Launcher, forks
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy
import train
from kernels import KernelChoice, bind
from kernels.cross_entropy import IGNORE, cross_entropy_in_place_torch, cross_entropy_torch
from kernels.formats import E4M3, E5M2, round_to
from kernels.sanitizer import sanitize
from model import checkpoint
from model.costs import StepOps
from model.fp8_head import DZ_SCALE, FP8Head
from model.gpt import GPT, ModelConfig
from model.precision import check_head, lower
from runtime.config import ConfigError
from runtime.distributed import ALONE
from runtime.hardware import HardwareError

BF16 = torch.bfloat16
by_name = pytest.mark.parametrize("name", ["torch", "triton"])
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def small_gpt(every="torch", **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 32}
    return GPT(ModelConfig(**(sizes | changes)).resolved(101), bind(KernelChoice(every=every), DEVICE)).to(DEVICE)


def head_of(every="torch", **changes):
    """A head in FP8 of 101 classes, hidden states of 2 by 9 tokens, and targets, some of them ignored."""
    model = small_gpt(every, tied=False, **changes)
    lower(model, "bf16", "fp8")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, BF16).requires_grad_()
    targets = torch.randint(101, (2, 9), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[0, :3], targets[1, 0] = IGNORE, 100
    return model.head, x, targets


def loss_and_gradients(head, x, targets, reduction="sum", options=(0.0, 0.0, 0.0), scale=None, upstream=1.0):
    x.grad = head.weight.grad = None
    loss = head.low.cross_entropy(x, targets, reduction, *options, scale=scale)
    (upstream * loss).backward()
    return [loss.detach(), x.grad, head.weight.grad]


# What it computes.


@by_name
@by_reduction
@pytest.mark.parametrize("options", [{}, LOSS], ids=["plain", "options"])
def test_products_are_of_codes_and_the_weights_gradient_is_of_bf16(options, reduction, name):
    head, x, targets = head_of(name)
    scale = torch.tensor(0.3, device=DEVICE)
    options = tuple(options.get(key, 0.0) for key in ("label_smoothing", "z_loss", "softcap"))
    with checked(name):
        loss, dx, dw = loss_and_gradients(head, x, targets, reduction, options, scale)
    flat, rows = targets.flatten(), x.detach().flatten(0, 1).float()
    factor = scale / (1 if reduction == "sum" else 15)
    scale_x, scale_w = head.low.scales.scale[:2, 0]
    w = round_to(head.weight.detach() * (1 / scale_w), E4M3) * scale_w
    z = (round_to(rows * (1 / scale_x), E4M3) * scale_x @ w.t()).to(BF16)
    torch.testing.assert_close(loss, cross_entropy_torch(z, flat, "sum", *options) * factor, rtol=1e-4, atol=0)
    dz = z.float()
    cross_entropy_in_place_torch(dz, flat, torch.empty(18, device=DEVICE), factor, *options)
    codes = round_to(dz / (DZ_SCALE * factor), E5M2)
    torch.testing.assert_close(dx.flatten(0, 1).float(), DZ_SCALE * factor * codes @ w, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(dw, dz.to(BF16).float().t() @ rows, rtol=1e-2, atol=1e-4)
    assert torch.equal(head.low.scales.amax[:2, 0], torch.stack([x.abs().max().float(), head.weight.abs().max()]))


@by_name
def test_gradients_are_near_those_of_bf16(name):
    head, x, targets = head_of(name)
    ours, low = loss_and_gradients(head, x, targets), head.low
    copy = F.pad(head.weight.detach().to(BF16), (0, 0, 0, 27))
    x.grad = head.weight.grad = None
    loss = low.kernels.linear_cross_entropy(x, head.weight, targets, "sum", head_cast=copy)
    loss.backward()
    for a, b, most in zip(ours, (loss, x.grad, head.weight.grad), (1e-3, 0.06, 0.02), strict=True):
        assert 0 < (a - b).float().norm() / b.float().norm() < most


@by_name
@pytest.mark.parametrize("upstream, scale", [(0.5, None), (1.0, 0.5), (2.0, 2.0**-20), (-1.0, None), (1.0, 0.0)])
def test_factors_of_the_loss_change_no_digit(upstream, scale, name):
    """Codes follow the factor, so that gradients of a mean over millions of tokens keep their digits."""
    head, x, targets = head_of(name)
    plain = loss_and_gradients(head, x, targets)
    given = None if scale is None else torch.tensor(scale, device=DEVICE)
    scaled = loss_and_gradients(head, x, targets, scale=given, upstream=upstream)
    factor = 1.0 if scale is None else scale
    for ours, theirs, by in zip(scaled, plain, (factor, factor * upstream, factor * upstream), strict=True):
        torch.testing.assert_close(ours, theirs * by, rtol=1e-6, atol=0)


class Made(TorchDispatchMode):
    """Records the bytes of the largest tensor that is made, and the operators that make FP8 codes."""

    def __init__(self):
        super().__init__()
        self.nbytes, self.of_codes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if torch.is_tensor(result):
            self.nbytes = max(self.nbytes, result.nbytes)
            self.of_codes |= {function.overloadpacket.__name__} if result.dtype in (E4M3.dtype, E5M2.dtype) else set()
        return result


@by_name
def test_chunks_change_nothing_and_no_other_logits_exist(name, monkeypatch):
    head, x, targets = head_of(name)
    x = x.detach().repeat(1, 8, 1).requires_grad_()  # more logits than the head has weights
    targets = targets.repeat(1, 8)
    whole = loss_and_gradients(head, x, targets)
    monkeypatch.setattr(kernels.linear_cross_entropy, "CHUNK_BYTES", 3 * 128 * 50)
    with Made() as made:
        chunked = loss_and_gradients(head, x, targets)
    assert made.nbytes < 144 * 128 * 2
    assert made.of_codes <= {"_to_copy", "copy_", "empty_like", "slice"}, "Inductor cannot choose among FP8 codes"
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@by_name
def test_each_loss_without_gradient_and_refused_with(name):
    head, x, targets = head_of(name)
    total = loss_and_gradients(head, x, targets)[0]
    with torch.no_grad(), checked(name):
        rows = head.low.cross_entropy(x, targets, "none", 0.0, 0.0, 0.0, torch.tensor(2.0, device=DEVICE))
    assert rows.shape == targets.shape and not rows[targets == IGNORE].any()
    torch.testing.assert_close(rows.sum(), 2 * total)
    with pytest.raises(ValueError, match="no gradient with reduction none: take the sum or the mean"):
        head.low.cross_entropy(x, targets, "none", 0.0, 0.0, 0.0)


def test_only_the_gradients_that_are_asked_for():
    head, x, targets = head_of()
    both = loss_and_gradients(head, x, targets)
    assert torch.equal(loss_and_gradients(head, x.detach(), targets)[2], both[2])
    head.weight.requires_grad_(False)
    assert torch.equal(loss_and_gradients(head, x, targets)[1], both[1]) and head.weight.grad is None


def test_nan_is_not_hidden():
    head, x, targets = head_of()
    with torch.no_grad():
        x[1, 3, 5] = math.nan
    loss, dx, dw = loss_and_gradients(head, x, targets)
    assert loss.isnan() and dx[1, 3].isnan().all() and dw.isnan().any() and not dx[1, 4].isnan().any()


# In the model.


def batch(seed=0):
    ids = torch.randint(101, (2, 33), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


def gradients(model):
    model.zero_grad()
    with torch.autocast(DEVICE.type, BF16):
        loss = model(*batch(), "sum")
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_the_head_is_lowered_alone_or_with_the_layers():
    """4 of 6 FLOPs of its weights; the weights stay, and no half-precision copy."""
    for precision, layers in (("bf16", 0), ("fp8", 8), ("nvfp4", 4)):
        model = small_gpt()
        model.keep_copies(BF16)
        before = model.state_dict()
        low = lower(model, precision, "fp8")
        assert len(low.layers) == layers and isinstance(model.head.low, FP8Head) and model.head.copy is None
        assert model.embedding.weight is model.head.weight and model.state_dict().keys() == before.keys()
        products = sum((4 if precision == "fp8" else 6) * linear.weight.numel() for _, linear in low.layers)
        assert low.share == (products + 4 * 101 * 32) / model.flops_per_token()
        (format, simulated), head = low.lines(), f"the head in fp8, {low.share:.0%} of the training FLOPs; the rest in"
        assert format.startswith(head if precision == "bf16" else f"{precision}: qkv, ") and head in format
        assert f"quantised to {'fp8' if precision == 'bf16' else ' and '.join(low.formats)}," in simulated
        assert low.facts() == {"low_flops": low.share, "simulated": True}


def test_costs_are_of_a_layer_and_a_cross_entropy():
    model = small_gpt()
    model.keep_copies(BF16)
    bf16 = StepOps(model, [], SimpleNamespace(share=8, size=8)).costs(True)
    lower(model, "bf16", "fp8")
    ops = StepOps(model, [], SimpleNamespace(share=8, size=8))
    fp8, by_kernel, head = ops.costs(True), ops.costs(False), bf16["linear_cross_entropy"].flops
    assert 3 * fp8["fp8_linear"].flops == 2 * head and fp8["matmul"].flops == bf16["matmul"].flops + head / 3
    assert fp8["cross_entropy"] == by_kernel["cross_entropy"] and "linear_cross_entropy" not in fp8


def test_logits_of_the_model_are_those_of_the_loss():
    """With gradients too, of which the loss has those of dz in codes by another scale."""
    model, (ids, targets), results = small_gpt(), batch(), []
    lower(model, "bf16", "fp8")
    for loss_of in (model, lambda ids, targets: F.cross_entropy(model.project(model.hidden(ids)).mT, targets)):
        model.zero_grad()
        with torch.autocast(DEVICE.type, BF16):
            loss = loss_of(ids, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.05 * theirs.norm()
    torch.testing.assert_close(results[0][0], results[1][0])


@interpreted
def test_triton_kernels_in_the_model():
    choice = KernelChoice(every="torch", linear_cross_entropy="triton", fp8_linear="triton", fp8_quantize="triton")
    results = []
    for each in (KernelChoice(every="torch"), choice):
        torch.manual_seed(0)
        model = GPT(small_gpt().config, bind(each, DEVICE))
        lower(model, "bf16", "fp8")
        with sanitize() as record:
            results.append(gradients(model))
    own = {"_fp8_linear_kernel", "_fp8_quantize_kernel", "_cross_entropy_fwd_kernel", "_scale_kernel"}
    assert record.kernels.keys() == own
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()  # codes of other sums differ by a digit here and there


def test_a_compiled_loss_is_the_same_and_raises_the_same_amax():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        head, x, targets = head_of()
        loss_and_gradients(head, x, targets)
        head.low.scales.advance()
        if compiled:
            head.low.cross_entropy = torch.compile(head.low.cross_entropy, backend="aot_eager", fullgraph=True)
        results.append([*loss_and_gradients(head, x, targets), head.low.scales.amax])
    assert results[1][-1][0] and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_are_quantised_when_scales_advance_or_weights_are_loaded():
    model, other = small_gpt(), small_gpt()
    low, head = lower(model, "bf16", "fp8"), model.head.low
    with torch.no_grad():
        other.head.weight.mul_(-3)
        model.head.weight.copy_(other.head.weight)
    for refresh in (low.advance, lambda: model.load_state_dict(small_gpt().state_dict())):
        old = head.codes.clone()
        refresh()
        scale = head.scales.scale[1]
        assert torch.equal(head.codes[:101].float(), round_to(model.head.weight.detach() * (1 / scale), E4M3))
        assert torch.equal(head.codes_t.float(), head.codes.float().t()) and not head.codes[101:].float().any()
        assert not torch.equal(head.codes.float(), old.float())


# Runs.

HEAD = {"precision": "bf16", "head_precision": "fp8"}


def test_resuming_is_exact(run):
    whole = HEAD | {"precision": "fp8", "schedule": "constant", "steps": 4, "save_every": 2}
    _, straight = run(run="straight", **whole)
    run(run="parts", **whole | {"steps": 2})
    code, parts = run("--resume", run="parts", **whole)
    assert code == 0
    ours, theirs = (checkpoint.load(folder / "last.pt") for folder in (parts, straight))
    for part in ("model", "scales", "head_scales"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    assert ours["scales"]["history"][:4].all() and ours["head_scales"]["history"][:4, :2].all()
    status = json.loads((parts / "status.json").read_text())
    assert status["simulated"] is True and 0 < status["low_flops"] < 1
    with pytest.raises(SystemExit) as exit:
        run("--eval_only", run="parts", **whole)
    assert exit.value.code == 0


@pytest.mark.parametrize("before", [("fp8", "auto"), ("bf16", "fp8"), ("fp8", "fp8"), ("bf16", "auto")], ids=" ".join)
def test_a_run_goes_on_with_the_scales_that_it_had(before):
    """Those of the layers, of the head, of both or neither; others are measured anew."""
    model = small_gpt()
    low = lower(model, *before)
    gradients(model)
    low.advance()
    state, model = low.state(), small_gpt()
    low = lower(model, "fp8", "fp8")
    low.restore(state, Path("last.pt"), ALONE)
    for name, scales in low.all_scales.items():
        assert scales.known == bool(state.get(name))
        assert not scales.known or torch.equal(scales.scale, state[name]["scale"])


@forks
def test_ranks_agree_on_scales(tiny, tmp_path):
    """Each has other rows of the batch, and so other largest magnitudes."""

    def train_on(rank):
        loop = train.Trainer.loop

        def watched(trainer):
            status = loop(trainer)
            torch.save(trainer.low.state()["head_scales"], tmp_path / f"{rank}.pt")
            return status

        train.Trainer.loop = watched
        return train.main(tiny(tmp_path / "out", **HEAD, steps=3, micro_batch=1))

    launcher = Launcher(tmp_path / "said")
    assert launcher.run(2, train_on) == [0, 0], launcher.said()
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours["history"][:3, :2].all()


# Refusals.


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_are_refused(run, capsys, precision):
    code, folder = run(precision=precision, head_precision="fp8")
    said = f"--head_precision=fp8 goes with --precision=bf16, fp8, mxfp8 or nvfp4, not {precision}"
    assert code == 2 and said in capsys.readouterr().err and not folder.exists()


def test_other_widths_and_a_users_own_loss_are_refused():
    own, shape = KernelChoice(), small_gpt().config
    bound = bind(own, DEVICE)
    check_head("fp8", "bf16", DEVICE, shape, bound), check_head("auto", "fp32", DEVICE, shape, bound)
    with pytest.raises(ConfigError, match=r"needs a model\.d_model that is a multiple of 16, not 40"):
        check_head("fp8", "bf16", DEVICE, small_gpt(d_model=40).config, bound)
    bound.names["linear_cross_entropy"] = "mine.py:loss"
    with pytest.raises(ConfigError, match=r"would not call --kernels\.linear_cross_entropy=mine\.py:loss"):
        check_head("fp8", "bf16", DEVICE, shape, bound)


@pytest.mark.parametrize("capability, hip", [((8, 0), None), ((9, 4), "6.3")])
def test_cards_without_fp8_are_refused_by_name(monkeypatch, capability, hip):
    device, shape = gpu(monkeypatch, capability, hip), small_gpt().config
    with pytest.raises(HardwareError, match=r"a card does not multiply in FP8, .* use --head_precision=auto"):
        check_head("fp8", "bf16", device, shape, bind(KernelChoice(), DEVICE))
