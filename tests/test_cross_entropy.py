"""Cross-entropy of logits and of hidden states: memory, rounding, extreme targets and logits, autograd."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, LOSS, checked, draw, draw_leaves, results_of
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import check
from kernels import OPS, cross_entropy, linear_cross_entropy
from kernels.cross_entropy import IGNORE, cross_entropy_torch, cross_entropy_triton
from kernels.launch import IMPLEMENTATIONS
from kernels.linear_cross_entropy import linear_cross_entropy_torch, linear_cross_entropy_triton

LINEAR = {"torch": linear_cross_entropy_torch, "triton": linear_cross_entropy_triton}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def assert_rounded_once(result, exact):
    """Within half an ulp, plus float32 arithmetic; the smallest ulp of float16 is 2^-24."""
    error, eps = (result.double() - exact).abs(), torch.finfo(result.dtype).eps
    smallest = 2**-24 if result.dtype == torch.float16 else 0
    assert (error <= 0.501 * (eps * exact.abs()).clamp(min=smallest)).all()


# Memory and padding.


class Recorder(TorchDispatchMode):
    """Records the largest result of any torch operator, and the input shapes of matrix products and the linear op."""

    def __init__(self):
        super().__init__()
        self.nbytes, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if torch.is_tensor(result):
            self.nbytes = max(self.nbytes, result.nbytes)
        if "mm" in str(function) or "linear_cross_entropy" in str(function):
            self.shapes |= {tuple(x.shape) for x in args if torch.is_tensor(x)}
        return result


def test_a_chunk_of_logits_is_all_there_is(monkeypatch):
    """No tensor is as large as all logits, in training or evaluation; chunked results equal unchunked ones."""
    op = OPS["linear_cross_entropy"]
    inputs = {k: v.detach() for k, v in draw(op, {"N": 26, "D": 8, "V": 400}).items()}
    whole = results_of(op, "triton", inputs)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * 448 * 7)
    x, weight, targets = inputs.values()
    arguments = x, F.pad(weight, (0, 0, 0, 48)), targets, None, 400, 0.0, 0.0, 0.0, IGNORE
    with Recorder() as recorder:
        for wanted in (True, False):
            IMPLEMENTATIONS["linear_cross_entropy"](*arguments, wanted, wanted)
    assert recorder.nbytes == 4 * 448 * 8 and {(7, 448), (5, 448)} <= recorder.shapes
    chunked = results_of(op, "triton", inputs)
    for key, value in whole.items():
        torch.testing.assert_close(chunked[key], value)


def test_chunks_are_whole_tiles_and_fit_their_bytes():
    assert linear_cross_entropy.chunk_rows(16384, 50257, 2) == 3328  # of five chunks
    assert linear_cross_entropy.chunk_rows(1000, 50257, 2) == 1024
    assert linear_cross_entropy.chunk_rows(100, 50257, 2) == 100
    assert linear_cross_entropy.chunk_rows(0, 50257, 2) == 1


@BY_REDUCTION
def test_the_vocabulary_is_padded_in_the_products(reduction):
    """101 classes are padded to 128 in every matrix product; the gradient has 101 rows."""
    op = OPS["linear_cross_entropy"]
    inputs = draw_leaves(op, {"N": 6, "D": 8, "V": 101})
    with checked("triton"), Recorder() as recorder:
        linear_cross_entropy_triton(**inputs, reduction=reduction).sum().backward()
    assert {size for shape in recorder.shapes for size in shape} == {6, 8, 128}
    assert inputs["head_weight"].grad.shape == (101, 8)


@pytest.mark.parametrize("options", [{}, LOSS], ids=["plain", "options"])
@pytest.mark.parametrize("weights", [None, (), (7,)], ids=["unweighted", "scalar", "by row"])
@pytest.mark.parametrize("v, width", [(101, 101), (101, 128), (128, 128), (2500, 2560)])
def test_gradient_in_place_of_padded_logits(v, width, weights, options):
    """Equal to the reference in float64, and 0 in the padding even where that held NaN."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    logits, loss = draw(7, width).to(DEVICE), torch.empty(7, device=DEVICE)
    logits[:, v:] = math.nan
    weights = None if weights is None else draw(weights).to(DEVICE)
    targets = torch.tensor([0, v - 1, IGNORE, 5, v, 64, 7], device=DEVICE)
    known = targets != v  # a class that does not exist: NaN, and no gradient
    exact, exact_loss = logits.double(), loss.double()
    arguments = targets.where(known, IGNORE), exact_loss, None if weights is None else weights.double()
    cross_entropy.cross_entropy_in_place_torch(exact, *arguments, **options, vocab_size=v)
    with checked("triton"):
        cross_entropy.cross_entropy_in_place_triton(logits, targets, loss, weights, **options, vocab_size=v)
    assert not logits[:, v:].any() and loss[4].isnan()
    torch.testing.assert_close(logits.double(), exact, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(loss.double()[known], exact_loss[known], rtol=2e-6, atol=2e-6)


def test_the_reference_in_place_is_autograds():
    logits, targets = draw(cross_entropy.OP, {"N": 7, "V": 40}, torch.float64).values()
    leaf, weights = logits.clone().requires_grad_(), torch.randn(7, dtype=torch.float64, device=DEVICE)
    rows = cross_entropy_torch(leaf, targets, "none", **LOSS)
    (gradient,) = torch.autograd.grad(rows, leaf, weights)
    loss = torch.empty_like(weights)
    assert cross_entropy.cross_entropy_in_place_torch(logits, targets, loss, weights, **LOSS) is None
    torch.testing.assert_close(loss, rows.detach())
    torch.testing.assert_close(logits, gradient)


# FP8 codes of the gradient.

IN_PLACE = OPS["cross_entropy_in_place"]
by_in_place = pytest.mark.parametrize("name", IN_PLACE.implementations)


def in_place(name, logits, targets, weights, scale=None, **options):
    """Loss and gradient of a copy of the logits, and codes if there is a scale."""
    z, loss, codes = logits.clone(), logits.new_empty(len(logits)), {}
    if scale is not None:
        blank = torch.full(logits.shape, math.nan, device=DEVICE).to(torch.float8_e5m2)
        codes = {"codes": blank, "codes_scale": torch.full((1,), scale, device=DEVICE)}
    with checked(name):
        IN_PLACE.implementations[name](z, targets, loss, weights, **options, **codes)
    return loss, z, *codes.values()


@by_in_place
@pytest.mark.parametrize("options", [{}, LOSS], ids=["plain", "options"])
def test_codes_are_the_gradient_rounded_once(options, name):
    """To 2 bits of mantissa, or steps of 2^-16; the other results are those without codes."""
    v = 2500
    logits = 3 * torch.randn(7, 2560, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[:, v:] = math.nan
    targets = torch.tensor([0, v - 1, IGNORE, 5, 64, 7, 9], device=DEVICE)
    weights, scale = torch.tensor(0.3, device=DEVICE), 0.3 * 2.0**-13
    plain = in_place(name, logits, targets, weights, **options, vocab_size=v)
    loss, dz, codes, _ = in_place(name, logits, targets, weights, scale, **options, vocab_size=v)
    assert torch.equal(loss, plain[0]) and torch.equal(dz, plain[1])
    exact = in_place("torch", logits.double(), targets, weights.double(), **options, vocab_size=v)[1]
    torch.testing.assert_close(codes.double() * scale, exact, rtol=0.1251, atol=1.01 * 2**-17 * scale)
    assert not codes[2].float().any() and not codes[:, v:].float().any() and (codes.float() != 0).sum() > 5 * v


@pytest.mark.filterwarnings("ignore:All-NaN")
@by_in_place
def test_codes_saturate_and_keep_nan(name):
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[1, 9] = math.nan
    codes = in_place(name, logits, torch.tensor([3, 3], device=DEVICE), None, 2.0**-20)[2].float()
    assert codes[0, 3] == -57344 and codes[0, 4] == 2**14 and codes[1, 9].isnan()


def test_the_bench_checks_codes():
    right = IN_PLACE.implementations["torch"]

    def wrong(*, codes_scale, **inputs):
        right(**inputs, codes_scale=8 * codes_scale)

    results = check(IN_PLACE, {"N": 90, "V": 40, "codes": 1}, {"right": right, "wrong": wrong}, "forward")
    assert "failed" not in results["right"] and "wrong: codes" in results["wrong"]["failed"]


@by_in_place
@pytest.mark.parametrize("change, message", [
    ({"codes": torch.zeros(7, 101).to(torch.float8_e5m2)}, r"codes \[7, 101\] .* are not contiguous e5m2 \[7, 128\]"),
    ({"codes": torch.zeros(7, 128).to(torch.float8_e4m3fn)}, "float8_e4m3fn are not contiguous e5m2"),
    ({"codes": torch.zeros(128, 7).to(torch.float8_e5m2).t()}, "not contiguous e5m2"),
    ({"codes_scale": None}, "go together"),
])  # fmt: skip
def test_codes_that_do_not_fit_are_refused(change, message, name):
    with pytest.raises(ValueError, match=message):
        IN_PLACE.implementations[name](**draw(IN_PLACE, IN_PLACE.test_shapes[-1]) | change)


# Rounding.


def test_an_example_that_two_roundings_get_wrong():
    logits = torch.tensor([[0.5, -0.25, 0.125, 0.0]], dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    cross_entropy_triton(logits, torch.tensor([1], device=DEVICE)).backward(torch.tensor(0.7, device=DEVICE))
    assert logits.grad[0, 1] == -0.58203125  # -0.58 of the sum, times 0.7, would be -0.578125


@HALF
@BY_REDUCTION
@pytest.mark.parametrize("inplace", [False, True])
def test_the_gradient_of_logits_is_rounded_once(reduction, inplace, dtype):
    op = OPS["cross_entropy"]
    logits, targets = draw(op, {"N": 6, "V": 300}, dtype).values()
    upstream = 1 + torch.rand(6 if reduction == "none" else (), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    with checked("triton"):
        loss = cross_entropy_triton(ours * 1, targets, reduction, inplace=inplace)
        (gradient,) = torch.autograd.grad(loss, ours, upstream)
    cross_entropy_torch(exact, targets, reduction).backward(upstream.double())
    assert_rounded_once(gradient, exact.grad)


@HALF
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream, scale", [(0.7, None), (1.0, 0.7), (0.7, 1.3)])
def test_gradients_of_hidden_states_are_rounded_once(upstream, scale, reduction, dtype):
    """Small integers make the logits exact, so that the expected gradient follows from the rounded dz."""
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
    x, weight = draw(-2, 3, (5, 16)).to(DEVICE, dtype), draw(-1, 2, (70, 16)).to(DEVICE, dtype)
    targets = torch.tensor([3, 69, IGNORE, 0, 11], device=DEVICE)
    upstream, scale = (None if v is None else torch.tensor(v, device=DEVICE) for v in (upstream, scale))
    n = 4 if reduction == "mean" else 1
    factor = None if scale is None and n == 1 else (1 if scale is None else scale) / torch.tensor(n, device=DEVICE)
    outside = upstream if factor is None or dtype == torch.bfloat16 else upstream * factor
    dz = x @ weight.t()
    weights = factor if dtype == torch.bfloat16 else None  # float16 would underflow
    cross_entropy.cross_entropy_in_place_torch(dz, targets, torch.empty(5, device=DEVICE), weights)
    leaves = x.requires_grad_(), weight.requires_grad_()
    with checked("triton"):
        loss = linear_cross_entropy_triton(*leaves, targets, reduction, scale=scale)
        dx, dw = torch.autograd.grad(loss, leaves, upstream)
    dz = dz.double() * outside.double()
    for result, exact in ((dx, dz @ weight.detach().double()), (dw, dz.t() @ x.detach().double())):
        room = 1e-6 * exact.abs().max()  # sums in float32
        error = (result.double() - exact).abs()
        assert (error <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + room).all()


def test_half_precision_products_are_summed_in_float32(monkeypatch):
    """The head's gradient is 256 in the first of nine chunks and 1 in the others, which a sum in bf16 would lose."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 2 * 64 * 2)
    x = torch.ones(18, 1, dtype=torch.bfloat16, device=DEVICE)
    x[:2] = 256
    weight = torch.zeros(2, 1, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        linear_cross_entropy_triton(x, weight, torch.zeros(18, dtype=torch.long, device=DEVICE), "sum").backward()
    assert weight.grad.flatten().tolist() == [-264, 264] and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_under_a_loss_scale_do_not_underflow(reduction):
    """Gradients of a mean over 100 rows and 9,000 classes are about 1e-6, where float16 has less than two digits."""
    shape, results = {"N": 100, "V": 9000}, {}
    for name in ("torch", "triton"):
        inputs = draw(OPS["cross_entropy"], shape, torch.float16)
        logits = inputs["logits"].requires_grad_()
        loss = OPS["cross_entropy"].implementations[name](logits, inputs["targets"], reduction)
        results[name] = torch.autograd.grad(loss * (2**16 if reduction == "mean" else 1), logits)[0]
    torch.testing.assert_close(results["triton"], results["torch"], rtol=2e-2, atol=2e-5)


def test_float16_gradients_of_the_linear_op_do_not_underflow():
    """A scale of 2^-20, undone after the loss, would underflow dz if it were applied before."""
    inputs = draw(OPS["linear_cross_entropy"], {"N": 6, "D": 4, "V": 300}, torch.float16)
    results, x = [], inputs.pop("x").requires_grad_()
    for scale in (1.0, 2.0**-20):
        loss = linear_cross_entropy_triton(x, **inputs, scale=torch.tensor(scale, device=DEVICE))
        results.append(torch.autograd.grad(loss / scale, x)[0])
    assert results[0].any() and torch.equal(*results)


# A cast of the head, and a factor, given by the caller.


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [64, 70, 101])
@BY_REDUCTION
def test_a_cast_of_the_head_is_the_cast_inside(reduction, v, x_dtype):
    """Bitwise equal, padded or not; the float32 weight gets an unrounded gradient."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, weight = draw(5, 16).to(DEVICE, x_dtype), draw(v, 16).to(DEVICE)
    targets = torch.tensor([3, v - 1, IGNORE, 0, 11], device=DEVICE)
    cast = weight.bfloat16()
    results = []
    for head_cast in (None, cast, F.pad(cast, (0, 0, 0, -v % 64))):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with checked("triton"), torch.autocast(DEVICE.type, torch.bfloat16, enabled=head_cast is None):
            loss = linear_cross_entropy_triton(*leaves, targets, reduction, head_cast=head_cast)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for given in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(given, results[0], strict=True))
    assert results[0][1].dtype == x_dtype
    assert not torch.equal(results[0][2], results[0][2].bfloat16().float())


@pytest.mark.parametrize("rows", [101, 128])
def test_the_reference_takes_a_cast_too(rows):
    """It multiplies by the copy; the weight gets the gradient."""
    x, weight, targets = draw(OPS["linear_cross_entropy"], {"N": 7, "D": 33, "V": 101}, torch.float64).values()
    cast = torch.zeros(rows, 33, dtype=torch.float64, device=DEVICE)
    cast[:101] = 2 * weight
    expected = [x.clone().requires_grad_(), (2 * weight).requires_grad_()]
    given = [x.clone().requires_grad_(), weight.float().requires_grad_()]
    losses = linear_cross_entropy_torch(*expected, targets), linear_cross_entropy_torch(*given, targets, head_cast=cast)
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    gradients = torch.autograd.grad(losses[0], expected), torch.autograd.grad(losses[1], given)
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1][1], gradients[0][1].float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", [(100, 33), (192, 33), (101, 32)])
def test_a_cast_that_does_not_fit_is_refused(shape, name):
    inputs = draw(OPS["linear_cross_entropy"], {"N": 7, "D": 33, "V": 101})
    with pytest.raises(ValueError, match=r"is neither \[101, 33\] nor \[128, 33\]"):
        LINEAR[name](**inputs, head_cast=torch.zeros(shape, device=DEVICE))


@pytest.mark.parametrize("name", LINEAR)
@BY_REDUCTION
def test_a_scale_is_a_factor_of_the_loss(reduction, name):
    op = OPS["linear_cross_entropy"]
    scale, results = torch.tensor(0.3, device=DEVICE), []
    for inside in (True, False):
        inputs = draw_leaves(op, op.test_shapes[1])
        leaves = [inputs[key] for key in op.differentiable]
        loss = LINEAR[name](**inputs, reduction=reduction, scale=scale if inside else None)
        loss = loss if inside else loss * scale
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(results[0], results[1])


# Targets and logits.


@pytest.mark.parametrize("margin", [0.0, 10.0, 40.0, 80.0])
def test_confident_predictions_lose_nothing(margin):
    logits = torch.zeros(2, 1000, device=DEVICE)
    logits[0, 3], logits[1, 999] = margin, -margin
    targets = torch.tensor([3, 3], device=DEVICE)
    truth, ours = logits.double().requires_grad_(), logits.requires_grad_()
    expected, loss = cross_entropy_torch(truth, targets, "none"), cross_entropy_triton(ours, targets, "none")
    rest = 999 * math.exp(-margin)
    assert loss[0].item() == pytest.approx(math.log1p(rest), rel=1e-6)
    assert loss[1].item() == pytest.approx(expected[1].item(), rel=1e-6)
    loss.sum().backward()
    assert ours.grad[0, 3].item() == pytest.approx(-rest / (1 + rest), rel=1e-6)


@pytest.mark.parametrize("target", [-2, 101, 2**40])
def test_target_out_of_range_is_nan_and_reads_nothing(target):
    logits = torch.randn(3, 101, device=DEVICE)
    with checked("triton"):
        loss = cross_entropy_triton(logits, torch.tensor([5, target, IGNORE], device=DEVICE), "none")
    assert loss.isnan().tolist() == [False, True, False] and loss[2] == 0


@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_another_index_to_ignore(ignore_index):
    """`ignore_index` may be a valid class."""
    logits, targets = draw(OPS["cross_entropy"], {"N": 9, "V": 40}).values()
    targets = targets.where(targets != IGNORE, ignore_index)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = cross_entropy_triton(ours, targets, ignore_index=ignore_index)
    expected = torch.nn.functional.cross_entropy(theirs, targets, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@BY_REDUCTION
def test_all_ignored_is_zero(reduction):
    op = OPS["linear_cross_entropy"]
    inputs = draw_leaves(op, op.test_shapes[1])
    inputs["targets"].fill_(IGNORE)
    loss = linear_cross_entropy_triton(**inputs, reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not inputs["x"].grad.any() and not inputs["head_weight"].grad.any()


def test_infinite_logits_are_impossible_classes():
    logits = torch.randn(2, 40, device=DEVICE)
    logits[:, 30:] = -math.inf
    targets = torch.tensor([3, 7], device=DEVICE)
    torch.testing.assert_close(cross_entropy_triton(logits, targets), cross_entropy_torch(logits, targets))


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_rows_that_do_not_count_have_no_gradient_whatever_their_logits():
    logits = torch.ones(3, 40, device=DEVICE)
    logits[1:, 7], targets = math.nan, torch.tensor([3, IGNORE, 40], device=DEVICE)
    cross_entropy_triton(logits.requires_grad_(), targets, "sum").backward()
    assert logits.grad[0].any() and not logits.grad[1:].any()


# Autograd.


def test_a_second_backward():
    """A second backward of the logits op equals the first. The linear op scaled its gradient in place, and raises."""
    logits, targets = draw(OPS["cross_entropy"], {"N": 7, "V": 101}).values()
    loss = 2 * cross_entropy_triton(logits.requires_grad_(), targets)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    inputs = draw(OPS["linear_cross_entropy"], {"N": 7, "D": 33, "V": 101})
    inputs["head_weight"].requires_grad_()
    loss = 2 * linear_cross_entropy_triton(**inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_in_place_of_the_logits():
    logits, _ = draw(OPS["cross_entropy"], {"N": 7, "V": 101}).values()
    logits = logits.requires_grad_()
    intermediate = logits * 1
    targets = torch.arange(len(logits), device=DEVICE)
    loss = cross_entropy_triton(intermediate, targets, "sum", inplace=True)
    assert torch.equal(intermediate, logits)
    loss.backward(retain_graph=True)
    assert torch.equal(intermediate, logits.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_triton(logits.detach().t().requires_grad_() * 1, torch.zeros(101).long(), inplace=True)


# Launch parameters.


@pytest.mark.parametrize("table", [cross_entropy.LOSS, cross_entropy.GRADIENT, cross_entropy.IN_PLACE])
@pytest.mark.parametrize("size", cross_entropy.SIZES)
def test_tables_have_every_size_and_their_own_entries_for_candidates(size, table):
    candidates = list(table.candidates(size))
    assert table.pick(size, "sm_90") in candidates and len(candidates) == len(set(candidates)) < 60
    assert all(shape["V"] <= size for shape in table.shapes(size))


@pytest.mark.parametrize("tile", [(1, 64, 1, 1), (2, 32, 1, 3), (4, 256, 1, 1)], ids=str)
@pytest.mark.parametrize("v", [191, 192, 193])
def test_rows_of_many_blocks(v, tile, monkeypatch):
    """Targets in the first, an inner and the last block, full or partial; tables are read at every launch."""
    for table in (cross_entropy.LOSS, cross_entropy.GRADIENT):
        monkeypatch.setitem(table.entries, 1024, {"": cross_entropy.RowTile(*tile)})
    targets = torch.tensor([0, 63, 64, 130, v - 1], device=DEVICE)
    logits = torch.randn(5, v, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, truth = logits.float().to(DEVICE).requires_grad_(), logits.float().double().to(DEVICE).requires_grad_()
    with checked("triton"):
        loss = cross_entropy_triton(ours, targets, "sum", **LOSS)
        loss.backward()
    expected = cross_entropy_torch(truth, targets, "sum", **LOSS)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)
