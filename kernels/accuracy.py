"""How far from the exact result an implementation may be: one rule for tests, contests and tuning.

No formula gives the rounding error of every op, and the error of one run of the reference depends on luck: another BLAS
sums in another order. So the error to expect is sampled, by Monte Carlo arithmetic. The reference runs in float64,
forward and backward, on tensors that remember which dtype they stand for (`Rounded`). Each operation adds to its result
what rounding to that dtype adds: a uniform error of half a unit in the last place (ulp) to either side; in float32 it
is 2 ulp, the error of a GPU's elementary functions. The terms of sums and matrix products are disturbed too, as much as
rounding them to the dtype, or accumulating them one by one in float32, disturbs the sum. `sigma`, the root mean square
deviation over `SAMPLES` such runs, is the error of each value that rounding explains. It is the same on every
processor, it is large where a result is ill-conditioned, and it is not 0 where the exact result is 0 because rounded
terms cancel.

The error of a result, as a root mean square, is compared with sigma's for each element, each row (the last dimension)
and the whole tensor. Over n elements their quotient may be up to `SLACK * (1 + SPREAD / sqrt(n))`: a single element may
be unlucky by several sigma, a large tensor may not. n counts the elements that matter, sum(sigma^2)^2 / sum(sigma^4),
and in a row at most `ROW`, since its errors may have one cause. A sigma below the root mean square of its row is raised
to that, and a row's to the tensor's: a few samples may be small by chance, and another algorithm rounds elsewhere.

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
SPREAD = 8.0
ROW = 4

aten = torch.ops.aten
DECOMPOSED = core_aten_decompositions()  # a fused operation, such as the gradient of softmax, rounds in its steps
PRODUCTS = {aten.mm, aten.bmm}
SUMS = {aten.sum, aten.mean}
# Operations that only move values, pick among them or change their sign.
EXACT = {
    aten.clone, aten.copy, aten.copy_, aten._to_copy, aten.cat, aten.stack, aten.where, aten.masked_fill, aten.index,
    aten.index_select, aten.gather, aten.scatter, aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter,
    aten.neg, aten.abs, aten.amax, aten.maximum, aten.minimum, aten.clamp, aten.relu, aten.embedding, aten.repeat,
    aten.flip, aten.zeros_like, aten.full_like, aten.empty_like, aten.new_zeros, aten.new_empty, aten.zero_, aten.fill_,
}  # fmt: skip


class Noise:
    """Rounding errors drawn from a seed; none at all when the seed is None."""

    def __init__(self, seed: int | None, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def of_result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` as an operation in `dtype` may give it."""
        return self._add(x, dtype, 2.0 if dtype == torch.float32 else 0.5)

    def of_terms(self, x: Tensor, dtype: torch.dtype, n: float) -> Tensor:
        """`x` so disturbed that a sum of `n` of its values, or a matrix product, is as wrong as one that rounds them to
        `dtype` and accumulates in float32; of the two errors only the larger."""
        return self._add(x, dtype, 0.5 * math.sqrt(n) if dtype == torch.float32 else 0.5)

    def _add(self, x: Tensor, dtype: torch.dtype, ulp: float) -> Tensor:
        if self.generator is None:
            return x
        info = torch.finfo(dtype)
        spacing = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1).clamp_(info.tiny * info.eps)
        error = torch.rand(x.shape, generator=self.generator, dtype=x.dtype, device=x.device).sub_(0.5).mul_(2 * ulp)
        return torch.where(x == 0, x, x + error * spacing)


class Rounded(Tensor):
    """Float64 values that stand for those of another dtype, which is the one that the tensor shows."""

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
        exact = moved and _promoted(tensors) == torch.promote_types(_promoted(tensors), dtype) == dtype
        if mutates:
            if not exact:
                held_args[0].copy_(noise.of_result(held_args[0], dtype))
            return args[0]

        def wrap(x):
            return Rounded(x if exact else noise.of_result(x, dtype), dtype, noise) if x.is_floating_point() else x

        return tree_map_only(Tensor, wrap, out)


def _softmax_backward(gradient: Rounded, weights: Rounded, dim: int) -> Tensor:
    """p (dp - sum p dp). FlashAttention takes the sum from the output, which was rounded to the dtype under test."""
    terms, noise = gradient * weights, gradient.noise
    rounded = Rounded(noise.of_terms(terms.held, noise.dtype, 1), terms.dtype, noise)
    return terms - weights * rounded.sum(dim, keepdim=True)


def _held(x: Tensor) -> Tensor:
    if isinstance(x, Rounded):
        return x.held
    return x.double() if x.is_floating_point() else x


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of an operation's result: tensors without dimensions do not widen the others."""
    dtypes = [x.dtype for x in tensors if x.ndim] or [x.dtype for x in tensors]
    return reduce(torch.promote_types, dtypes)


def _terms(func, args, kwargs) -> float:
    """How many terms each value of the result is the sum of."""
    if func.overloadpacket in PRODUCTS:
        return args[0].shape[-1]
    if func.overloadpacket in SUMS:
        return args[0].numel() / max(1, func(*args, **kwargs).numel())
    return 1


def evaluate(
    op: Op, function: Callable, inputs: Mapping[str, Any], wrap: Callable[[Tensor], Tensor] = lambda x: x
) -> dict[str, Tensor]:
    """Results by name: the outputs of `function`, and the gradients under fixed random upstream gradients.

    The tensors among `inputs` are copied first, and each is given as what `wrap` makes of it. The results of an op that
    mutates arguments are those arguments.
    """
    given = {k: tree_map_only(Tensor, lambda x: wrap(x.detach().clone()), value) for k, value in inputs.items()}
    leaves = {k: given[k].requires_grad_() for k in op.differentiable if given[k] is not None}
    outputs = function(**given | {k: x.clone() for k, x in leaves.items()})  # a leaf is not to be written to
    if op.mutates:
        return _by_name({k: given[k] for k in op.mutates})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        upstream = [wrap(torch.randn(x.shape, generator=generator).to(x.device, x.dtype)) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        results |= {f"gradient of {k}": g for k, g in zip(leaves, gradients, strict=True)}
    return results


def _by_name(arguments: Mapping[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    """Tensors by the name of their argument, and those of a list by their place in it."""
    named = {}
    for name, value in arguments.items():
        named |= {name: value} if torch.is_tensor(value) else {f"{name}[{i}]": x for i, x in enumerate(value)}
    return named


@dataclass(frozen=True)
class Truth:
    """Exact results by name, the error `sigma` of each value that rounding explains, and the dtypes results have."""

    exact: dict[str, Tensor]
    sigma: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]

    def ratios(self, results: Mapping[str, Tensor]) -> dict[str, float]:
        """The error of each result over what is allowed, of the worst element, the worst row or the tensor: at most 1
        is right. Infinite for a result of another shape or dtype, or that is not finite where the exact one is.
        """
        return {name: self._ratio(name, results[name]) for name in self.exact}

    def worst(self, results: Mapping[str, Tensor]) -> tuple[str, float]:
        """The name and ratio of the result that is furthest from right."""
        return max(self.ratios(results).items(), key=lambda item: item[1])

    def _ratio(self, name: str, result: Tensor) -> float:
        exact, sigma = self.exact[name], self.sigma[name]
        if result.shape != exact.shape or result.dtype != self.dtypes[name]:
            return math.inf
        if not exact.numel():
            return 0.0
        error = torch.where(result == exact, 0.0, (result.double() - exact).abs())  # equal infinities differ by NaN
        error, sigma = (x.reshape(-1, x.shape[-1] if x.ndim else 1) for x in (error, sigma))
        overall = _rms(sigma.flatten())
        row = _rms(sigma).maximum(overall)
        parts = (
            (error, sigma.maximum(row), 1),
            (_rms(error), row, _count(sigma).clamp(max=ROW)),
            (_rms(error.flatten()), overall, _count(sigma.flatten())),
        )
        ratios = [torch.where(e == 0, 0.0, e / (s * SLACK * (1 + SPREAD / n**0.5))).max() for e, s, n in parts]
        return torch.stack(ratios).max().nan_to_num(nan=math.inf, posinf=math.inf).item()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _count(sigma: Tensor) -> Tensor:
    """How many values make up the sum of squares, at least 1."""
    squares = (sigma / sigma.amax(-1, keepdim=True)).square()
    count = squares.sum(-1, keepdim=True).square() / squares.square().sum(-1, keepdim=True)
    return count.nan_to_num(nan=1).clamp(min=1)


def truth(op: Op, inputs: Mapping[str, Any], samples: int = SAMPLES) -> Truth:
    """The exact results of `op` on `inputs`, whose tensors are of the dtypes under test, by its reference."""
    tensors = [x for x in tree_leaves(dict(inputs)) if torch.is_tensor(x) and x.is_floating_point()]
    narrowest = min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)

    def run(seed: int | None) -> dict[str, Rounded]:
        noise = Noise(seed, tensors[0].device, narrowest)

        def rounded(x: Tensor) -> Tensor:
            return Rounded(x.double(), x.dtype, noise) if x.is_floating_point() else x

        return evaluate(op, op.implementations["torch"], inputs, rounded)

    results = run(None)
    exact = {name: x.held for name, x in results.items()}
    squares = {name: torch.zeros_like(x) for name, x in exact.items()}
    for seed in range(samples):
        for name, x in run(seed).items():
            squares[name] += (x.held - exact[name]).square()
    sigma = {name: (x / samples).sqrt() for name, x in squares.items()}
    return Truth(exact, sigma, {name: x.dtype for name, x in results.items()})
