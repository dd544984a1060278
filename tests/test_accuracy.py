"""The rule of accuracy on results made by hand: it passes what is rounded once and finds one wrong element."""

import math

import pytest
import torch
from torch import Tensor

from kernels import OPS
from kernels.accuracy import Noise, Rounded, Truth, evaluate, truth
from kernels.spec import Cost, Op

HALF = (torch.bfloat16, torch.float16)


def op_of(reference, differentiable=("x",), **fields):
    """An op of one argument beside what `fields` say."""
    return Op(
        name="test", implementations={"torch": reference}, inputs=lambda shape, make: {"x": make(*shape.values())},
        differentiable=differentiable, cost=lambda *_: Cost(0, 0), backward_cost=lambda *_: Cost(0, 0),
        test_shapes=(), bench_shapes=(), **fields,
    )  # fmt: skip


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


PRODUCT = op_of(product, differentiable=())


@pytest.fixture(params=(torch.float32, *HALF), ids=str)
def case(request) -> tuple[Truth, Tensor, torch.dtype]:
    """Products of a large tensor, with what is expected of them, unrounded."""
    dtype = request.param
    x, y = 1 + torch.rand(2, 100, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    return truth(PRODUCT, {"x": x, "y": y}), x.double() * y.double(), dtype


def ratio_of(expected: Truth, result: Tensor) -> float:
    name, ratio = expected.worst({"output 0": result})
    assert name == "output 0"
    return ratio


def test_rounded_once_is_right(case):
    expected, exact, dtype = case
    assert ratio_of(expected, exact.to(dtype)) < 1


def test_a_percent_off_is_wrong(case):
    expected, exact, dtype = case
    assert ratio_of(expected, (1.01 * exact).to(dtype)) > 1


def test_a_wrong_element_and_a_wrong_row_are_wrong(case):
    expected, exact, dtype = case
    largest = exact.abs().max()
    element, row = exact.clone(), exact.clone()
    element[50, 100] += largest / 10
    row[50] = row[50].roll(1)
    assert ratio_of(expected, element.to(dtype)) > 1
    assert ratio_of(expected, row.to(dtype)) > 1


def test_rounding_twice_is_wrong_in_half_precision(case):
    """Once before and once after a factor that moves values between the representable ones."""
    expected, exact, dtype = case
    if dtype in HALF:
        assert ratio_of(expected, ((exact / 0.7).to(dtype).double() * 0.7).to(dtype)) > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_wrong(case, value):
    expected, exact, dtype = case
    result = exact.to(dtype)
    result[3, 4] = value
    assert ratio_of(expected, result) == math.inf


def test_another_shape_or_dtype_is_wrong(case):
    expected, exact, dtype = case
    assert ratio_of(expected, exact.to(dtype)[:1]) == math.inf
    assert ratio_of(expected, exact) == math.inf


def test_infinities_that_are_meant_are_right():
    x = torch.tensor([math.inf, 1.0])
    expected = truth(PRODUCT, {"x": x, "y": torch.ones(2)})
    assert ratio_of(expected, x.clone()) == 0


def test_a_result_that_cancels_is_allowed_the_rounding_of_its_terms():
    """The gradient of q under one key is 0, a difference of two sums; something as small is right, and 1e-4 is not."""
    op, shape = OPS["attention"], {"B": 1, "T": 1, "S": 1, "H": 4, "KV": 4, "D": 64}
    inputs = op.draw(shape, torch.float32, torch.device("cpu"))
    expected = truth(op, inputs)
    results = evaluate(op, op.implementations["torch"], inputs)
    assert not expected.exact["gradient of q"].any()
    for error, right in ((1e-7, True), (1e-4, False)):
        changed = results | {"gradient of q": torch.full_like(inputs["q"], error)}
        assert (expected.worst(changed)[1] <= 1) == right


def test_ill_conditioned_results_are_allowed_more():
    """The difference of nearly equal rounded sums."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    def sigma(reference):
        return truth(op_of(reference), {"x": x}).sigma["output 0"].square().mean().sqrt()

    assert sigma(lambda x: (x + 1000) - 1000) > 100 * sigma(lambda x: x + 1)


def test_arguments_that_are_written_to_are_the_results():
    def step(x: list[Tensor], scale: Tensor) -> None:
        for tensor in x:
            tensor.mul_(scale)

    op = op_of(step, differentiable=(), mutates=("x",))
    inputs = {"x": [torch.ones(3), torch.full((2, 2), 2.0, dtype=torch.bfloat16)], "scale": torch.tensor(0.3)}
    expected, results = truth(op, inputs), evaluate(op, step, inputs)
    assert list(results) == ["x[0]", "x[1]"] and expected.worst(results)[1] < 1
    assert expected.worst(results | {"x[1]": inputs["x"][1]})[1] > 1
    assert (inputs["x"][0] == 1).all()  # the caller's are left as they are


def test_tensors_that_stand_for_another_dtype():
    noise = Noise(0, torch.device("cpu"), torch.bfloat16)
    x = Rounded(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), torch.bfloat16, noise)
    wide = x.float() * 1.5
    assert x.dtype == torch.bfloat16 and wide.dtype == torch.float32
    errors = [(y.held - torch.tensor([1.5, 0.0, 4.5])).abs().max() for y in (wide, wide.bfloat16(), x * 1.5)]
    assert 0 < errors[0] < 1e-6 < 1e-4 < min(errors[1:]) and max(errors) < 2**-7 * 4.5


def test_the_same_inputs_give_the_same_limits():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, other = (truth(PRODUCT, {"x": x, "y": x}).sigma["output 0"] for _ in range(2))
    assert torch.equal(one, other)
