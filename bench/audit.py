"""Audit an implementation: `audit` names what is wrong with it, and what would fool a bench.

A right and honest implementation computes its results from its inputs at every call. Each fault here has a name:

    wrong               a result is further from float64 than rounding explains, by kernels/accuracy.py
    strided             the results of strided inputs differ from those of contiguous ones
    writes to inputs    an input that the op does not write to was changed
    stale               the results of new inputs at the same addresses are those of the old ones
    overwritten         a later call changed the results of an earlier one
    lazy                a result is no plain tensor, so that work may be left for when it is read
    patched             a timer of Python or torch was replaced
    undefined           the sanitizer found what is undefined on a GPU, such as an access out of bounds
    raises              a call raised

`bench.harness` finds the rest while it times: results that change, and times that the card cannot reach.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.harness import DEVICE, shrink, truth_of_written
from bench.report import written
from bench.timing import patched, reason, relative_error
from kernels.accuracy import evaluate, truth
from kernels.launch import AVAILABLE
from kernels.sanitizer import SanitizerError, sanitize
from kernels.spec import Op

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLES = 16  # of the error of rounding: with four, one of 30,000 elements may have a small error in all of them
TOLERANCE = 1e-5  # between float32 results that are computed from equal values


def audit(op: Op, function: Callable, shapes: tuple[Mapping[str, int], ...] = ()) -> dict[str, str]:
    """The faults of `function` as an implementation of `op`: by name, what was seen first. Empty if there are none.

    It runs at `shapes`, by default the op's test shapes and a small bench shape, in three dtypes, with gradients.
    """
    small = shrink(op, op.bench_shapes[0], 2, max_bytes=2**17, max_flops=1e7)
    shapes = shapes or (*op.test_shapes, small)
    found: dict[str, str] = {}
    torch.use_deterministic_algorithms(True, warn_only=True)  # which hands out memory filled with NaN
    try:
        for shape in shapes:
            for dtype in DTYPES:
                where = f"at {written(shape)} in {str(dtype).removeprefix('torch.')}"
                for name, what in _guarded(_values(op, function, shape, dtype)):
                    found.setdefault(name, f"{what} {where}")
        for check in (_memory, _layouts):
            for name, what in _guarded(check(op, function, shapes[min(1, len(shapes) - 1)])):
                found.setdefault(name, what)
    finally:
        torch.use_deterministic_algorithms(False)
    if timers := patched():
        found["patched"] = ", ".join(timers)
    return found


def _guarded(check: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The faults that a check yields, and what it raised; under the sanitizer where kernels are interpreted."""
    try:
        with sanitize(shuffle=0) if INTERPRETED else nullcontext():
            yield from check
    except SanitizerError as error:
        yield "undefined", str(error)
    except Exception as error:  # whatever the implementation raises
        yield "raises", reason(error)


def _values(op: Op, function: Callable, shape: Mapping[str, int], dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Whether results and gradients are right and plain tensors, and inputs left as they were."""
    inputs, calls = op.draw(shape, dtype, DEVICE), []

    def spied(**arguments):
        outputs = function(**arguments)
        calls.append((arguments, outputs))
        return outputs

    exact = truth_of_written(op, inputs) if op.mutates else truth(op, inputs, SAMPLES)
    results = evaluate(op, spied, inputs)
    ((arguments, outputs),) = calls
    for x in () if op.mutates else tree_leaves(outputs):
        if type(x) is not Tensor:
            yield "lazy", f"a result is a {type(x).__name__}, not a plain tensor,"
    for key in inputs.keys() - set(op.mutates):
        if not _equal(tree_leaves(arguments[key]), tree_leaves(inputs[key])):
            yield "writes to inputs", f"{key} was changed"
    worst, ratio = exact.worst(results)
    if ratio > 1:
        yield "wrong", f"{worst} is off by {ratio:.1f} times what rounding explains"


def _memory(op: Op, function: Callable, shape: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Whether results are computed from the values of each call, into memory of their own."""
    for gradients in (False, True):
        old, new = (op.draw(shape, torch.float32, DEVICE, seed) for seed in (0, 1))
        values = _copied(new)  # as an op that mutates finds them
        first = _call(op, function, old, gradients)
        saved = _copied(first)
        fresh = _copied(_call(op, function, new, gradients))
        if not op.mutates and not _equal(first, saved):
            yield "overwritten", "a second call changed the results of the first"
        for x, y in zip(tree_leaves(old), tree_leaves(values), strict=True):
            if torch.is_tensor(x):
                x.copy_(y)
        again = _call(op, function, old, gradients)
        if _equal(fresh, saved) or not relative_error(again, fresh) <= TOLERANCE:
            yield "stale", "new inputs gave the results of old ones"


def _layouts(op: Op, function: Callable, shape: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Whether strides of inputs are followed, and those of upstream gradients, which may be 0."""
    if op.mutates:  # its arguments are the optimizer's or the loss's own, and contiguous
        return
    inputs = op.draw(shape, torch.float32, DEVICE)
    expected = _call(op, function, inputs)
    for kind in ("columns", "rows"):
        views = {key: _view(x, kind) if torch.is_tensor(x) and x.ndim else x for key, x in inputs.items()}
        if not relative_error(_call(op, function, views), expected) <= TOLERANCE:
            yield "strided", f"inputs that are every other of the {kind} of a tensor gave other results"
    if not relative_error(_call(op, function, inputs, expanded=True), expected) <= TOLERANCE:
        yield "strided", "an upstream gradient of stride 0 gave other results"


def _view(x: Tensor, kind: str) -> Tensor:
    """A view of equal values in a larger tensor of NaN: every other column, or the right half of every row."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, device=x.device).to(x.dtype)
    view = wide[..., ::2] if kind == "columns" else wide[..., x.shape[-1] :]
    return view.copy_(x)


def _call(
    op: Op, function: Callable, inputs: Mapping[str, Any], gradients: bool = True, expanded: bool = False
) -> tuple[Tensor, ...]:
    """Results, and gradients under upstream gradients of 1, whose strides are 0 if `expanded`."""
    leaves = {key: inputs[key].detach() for key in op.differentiable if gradients and inputs[key] is not None}
    for x in leaves.values():
        x.requires_grad_()
    outputs = function(**inputs | leaves)
    if op.mutates:
        return tuple(x for key in op.mutates for x in tree_leaves(inputs[key]) if torch.is_tensor(x))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not leaves:
        return tuple(x.detach() for x in outputs)
    ones = [torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape) for x in outputs]
    upstream = ones if expanded else [x.contiguous() for x in ones]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return tuple(x.detach() for x in (*outputs, *found))


def _copied(values: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, values)


def _equal(some: Any, others: Any) -> bool:
    pairs = zip(tree_leaves(some), tree_leaves(others), strict=True)
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in pairs)
