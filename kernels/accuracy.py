"""The accuracy rule: one bound on the error of an implementation, for tests, contests and tuning.

No formula gives the rounding error of every op, and the error of a single run of the reference varies by processor,
since each BLAS sums in its own order. So the expected error is sampled by Monte Carlo arithmetic. The reference runs in
float64, forward and backward, on tensors that emulate another dtype (`Rounded`). Each operation adds random rounding
noise to its result: uniform within half a unit in the last place (ulp) of the emulated dtype, or within 2 ulp in
float32, the error of a GPU's elementary functions. The inputs of sums and matrix products get noise too, as large as
the error of rounding them to the dtype, or of accumulating them one by one in float32. `sigma` is the root mean square
(RMS) deviation of each value over `SAMPLES` runs. It is the same on every processor, grows where a result is
ill-conditioned, and is not 0 where rounded terms cancel to 0.

A result passes if the RMS of its error over the RMS of sigma is at most `SLACK * (1 + SPREAD / sqrt(n))`, in float32
twice that, for each element, each row (the last dimension) and the whole tensor: one element may be unlucky by several
sigma, the mean of a large tensor may not. n is the effective number of elements, sum(sigma^2)^2 / sum(sigma^4), and at
most `ROW` in a row, whose errors are correlated. The sigma of an element is at least the RMS of its row, and that of a
row at least the RMS of the tensor: a few samples may be small by chance, and another algorithm rounds in other places.

Sources: Parker, "Monte Carlo Arithmetic: exploiting randomness in floating-point arithmetic", 1997; Higham and Mary,
"A New Approach to Probabilistic Rounding Error Analysis", 2019 (the error of a sum grows with the root of its terms);
CUDA C++ Programming Guide, "Mathematical Functions" (2 ulp).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels.spec import Op

SAMPLES = 4
SLACK = 1.25
FLOAT32_SLACK = 2.5  # of float32 results, which libraries sum in an order of their own; mistakes there exceed it by far
SPREAD = 8.0
ROW = 4

aten = torch.ops.aten
DECOMPOSED = core_aten_decompositions()  # fused operations, such as the gradient of softmax, round at every step
PRODUCTS = {aten.mm, aten.bmm}
SUMS = {aten.sum, aten.mean}
# Operations that do not round: they move or select values, or change signs.
EXACT = {
    aten.clone, aten.copy, aten.copy_, aten._to_copy, aten.cat, aten.stack, aten.where, aten.masked_fill, aten.index,
    aten.index_select, aten.gather, aten.scatter, aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter,
    aten.neg, aten.abs, aten.amax, aten.maximum, aten.minimum, aten.clamp, aten.relu, aten.embedding, aten.repeat,
    aten.flip, aten.zeros_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_empty, aten.zero_, aten.fill_,
}  # fmt: skip


class Noise:
    """Random rounding errors, from a seed; no errors if the seed is None."""

    def __init__(self, seed: int | None, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def of_result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` with the rounding error of one operation in `dtype`."""
        return self._add(x, dtype, 2.0 if dtype == torch.float32 else 0.5)

    def of_terms(self, x: Tensor, dtype: torch.dtype, n: float) -> Tensor:
        """`x` with noise, such that a sum of `n` of its values has the error of rounding them to `dtype`, or the error
        of accumulating them in float32, whichever is larger."""
        return self._add(x, dtype, 0.5 * math.sqrt(n) if dtype == torch.float32 else 0.5)

    def _add(self, x: Tensor, dtype: torch.dtype, ulp: float) -> Tensor:
        if self.generator is None:
            return x
        info = torch.finfo(dtype)
        spacing = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1).clamp_(info.tiny * info.eps)
        error = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device).sub_(0.5).mul_(2 * ulp)
        return torch.where(x == 0, x, x + error * spacing)


class Rounded(Tensor):
    """A tensor that emulates `dtype`: it reports that dtype and holds float64 values, to which operations add noise."""

    @staticmethod
    def __new__(cls, held: Tensor, dtype: torch.dtype, noise: Noise):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=dtype, device=held.device, **layout)

    def __init__(self, held: Tensor, dtype: torch.dtype, noise: Noise):
        self.held, self.noise = held, noise

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._softmax_backward_data.default:
            return _softmax_backward(*args[:3])
        if func in DECOMPOSED:
            return DECOMPOSED[func](*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.is_floating_point()]
        noise = next(x.noise for x in tensors if isinstance(x, Rounded))
        asked = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.dtype)), None)
        mutates = func._schema.is_mutable
        dtype = args[0].dtype if mutates else asked or _promoted(tensors)

        held_args, held_kwargs = tree_map_only(Tensor, _held, (list(args), kwargs))
        if asked is not None and asked.is_floating_point:
            held_args, held_kwargs = tree_map_only(torch.dtype, lambda _: torch.float64, (held_args, held_kwargs))
        terms = _terms(func, held_args, held_kwargs)
        if terms > 1:
            held_args = [noise.of_terms(x, dtype, terms) if torch.is_tensor(x) else x for x in held_args]
        out = func(*held_args, **held_kwargs)
        moved = func.is_view or func.overloadpacket in EXACT
        exact = moved and _holds(dtype, _promoted(tensors))
        if mutates:
            if not exact:
                held_args[0].copy_(noise.of_result(held_args[0], dtype))
            return args[0]

        def wrap(x):
            return Rounded(x if exact else noise.of_result(x, dtype), dtype, noise) if x.is_floating_point() else x

        return tree_map_only(Tensor, wrap, out)


def _softmax_backward(gradient: Rounded, weights: Rounded, dim: int) -> Tensor:
    """p (dp - sum p dp). The terms of the sum are rounded: FlashAttention computes it from the rounded output."""
    terms, noise = gradient * weights, gradient.noise
    rounded = Rounded(noise.of_terms(terms.held, noise.dtype, 1), terms.dtype, noise)
    return terms - weights * rounded.sum(dim, keepdim=True)


def _held(x: Tensor) -> Tensor:
    if isinstance(x, Rounded):
        return x.held
    return x.double() if x.is_floating_point() else x


def _is_rounded(x: Tensor) -> bool:
    return x.is_floating_point() and x.itemsize > 1


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of an operation's result: 0-dimensional tensors do not promote the others."""
    dtypes = [x.dtype for x in tensors if x.ndim] or [x.dtype for x in tensors]
    return reduce(torch.promote_types, dtypes)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` has every value of `other`. torch promotes no codes."""
    if 1 in (dtype.itemsize, other.itemsize):
        return dtype == other or dtype.itemsize > 1
    return torch.promote_types(dtype, other) == dtype


def _terms(func, args, kwargs) -> float:
    """Number of terms summed into each value of the result."""
    if func.overloadpacket in PRODUCTS:
        return args[0].shape[-1]
    if func.overloadpacket in SUMS:
        return args[0].numel() / max(1, func(*args, **kwargs).numel())
    return 1


def evaluate(
    op: Op, function: Callable, inputs: Mapping[str, Any], wrap: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Tensor]:
    """Outputs of `function` and gradients under fixed random upstream gradients, by name.

    `function` gets copies of the tensors in `inputs`, passed through `wrap`. Arguments that the op writes to are
    outputs too. Codes have no gradient.
    """
    given = {k: tree_map_only(Tensor, lambda x: wrap(x.detach().clone()), value) for k, value in inputs.items()}
    leaves = {k: given[k].requires_grad_() for k in op.differentiable if given[k] is not None}
    outputs = function(**given | {k: x.clone() for k, x in leaves.items()})  # an op may work in place, not on a leaf
    outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
    results = _by_name({k: given[k] for k in op.mutates if given[k] is not None})
    results |= {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        generator, outputs = torch.Generator().manual_seed(1), [x for x in outputs if x.itemsize > 1]
        upstream = [wrap(torch.randn(x.shape, generator=generator).to(x.device, x.dtype)) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        results |= {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return results


def _by_name(arguments: Mapping[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    """Flatten lists of tensors: `name` for a tensor, `name[i]` for the items of a list. None has no name."""
    named = {}
    for name, value in arguments.items():
        if value is None:
            continue
        named |= {name: value} if torch.is_tensor(value) else {f"{name}[{i}]": x for i, x in enumerate(value)}
    return named


@dataclass(frozen=True)
class Truth:
    """By result name: exact values, the expected rounding error `sigma` of each value, and the dtype to return."""

    exact: dict[str, Tensor]
    sigma: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]

    def ratios(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """Error over allowed error of each result, the maximum over elements, rows and the tensor; at most 1 passes.

        Infinite for a wrong shape or dtype, and for values that are not finite where the exact values are.
        """
        return {name: self._ratio(name, results[name]) for name in self.exact}

    def worst(self, results: Mapping[str, Tensor]) -> tuple[str, float]:
        """Name and ratio of the result with the largest ratio."""
        return max(self.ratios(results).items(), key=lambda item: item[1])

    def _ratio(self, name: str, result: Tensor) -> float:
        exact, sigma = self.exact[name], self.sigma[name]
        if result.shape != exact.shape or result.dtype != self.dtypes[name]:
            return math.inf
        if not exact.numel():
            return 0.0
        found = result.double()
        error = torch.where(found == exact, 0.0, (found - exact).abs())  # inf - inf would be NaN
        error, sigma = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (error, sigma))
        overall = _rms(sigma.flatten())
        row = _rms(sigma).maximum(overall)
        parts = (
            (error, sigma.maximum(row), 1),
            (_rms(error), row, _count(sigma).clamp(max=ROW)),
            (_rms(error.flatten()), overall, _count(sigma.flatten())),
        )
        slack = FLOAT32_SLACK if result.dtype == torch.float32 else SLACK
        ratios = [torch.where(e == 0, 0.0, e / (s * slack * (1 + SPREAD / n**0.5))).max() for e, s, n in parts]
        return torch.stack(ratios).max().nan_to_num(nan=math.inf, posinf=math.inf).item()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _count(sigma: Tensor) -> Tensor:
    """Effective number of elements in the sum of squares, at least 1."""
    squares = (sigma / sigma.amax(-1, keepdim=True)).square()
    count = squares.sum(-1, keepdim=True).square() / squares.square().sum(-1, keepdim=True)
    return count.nan_to_num(nan=1).clamp(min=1)


def truth(op: Op, inputs: Mapping[str, Any], samples: int = SAMPLES) -> Truth:
    """Exact results and sigma of `op` on `inputs`, from its reference; `inputs` are in the dtypes under test.

    Codes of 8 bits are data: what is computed of them is rounded to the dtypes of the other tensors, or of the result.
    """
    tensors = [x for x in tree_leaves(dict(inputs)) if torch.is_tensor(x) and _is_rounded(x)]
    narrowest = min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)

    def run(seed: int | None) -> dict[str, Rounded]:
        noise = Noise(seed, tensors[0].device, narrowest)

        def rounded(x: Tensor) -> Tensor:
            return Rounded(x.double(), x.dtype, noise) if _is_rounded(x) else x

        return evaluate(op, op.implementations["torch"], inputs, rounded)

    results = run(None)
    exact = {name: x.held for name, x in results.items()}
    squares = {name: torch.zeros_like(x) for name, x in exact.items()}
    for seed in range(samples):
        for name, x in run(seed).items():
            squares[name] += (x.held - exact[name]).square()
    sigma = {name: (x / samples).sqrt() for name, x in squares.items()}
    return Truth(exact, sigma, {name: x.dtype for name, x in results.items()})
