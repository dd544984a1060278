"""Implementations of SwiGLU with one fault each, named as bench/audit.py names it: broken kernels, and cheats."""

import time

import torch
from torch import Tensor

from kernels.launch import tl, triton
from kernels.swiglu import swiglu_torch

ZOO = {}


def fault(name: str):
    """Put the decorated maker of an implementation into the zoo. Each call of it makes one that has run nothing."""

    def keep(make):
        ZOO[make.__name__] = name, make
        return make

    return keep


def own(function):
    """`function` with the signature of the op."""
    return lambda x, activation="silu", gated=True: function(x)


@fault("wrong")
def a_hundredth_off():
    return own(lambda x: 1.01 * swiglu_torch(x))


@fault("wrong")
def computes_in_half_precision():
    return own(lambda x: swiglu_torch(x.bfloat16()).to(x.dtype))


@fault("wrong")
def gradient_of_the_gate_alone():
    def function(x):
        gate, up = x.chunk(2, -1)
        return swiglu_torch(torch.cat((gate, up.detach()), -1))

    return own(function)


@fault("wrong")
def returns_nothing_computed():
    return own(lambda x: x.chunk(2, -1)[0] * 0)


@fault("wrong")
def forgets_the_last_column():
    def function(x):
        y = swiglu_torch(x)
        return torch.cat((y[..., :-1], 0 * y[..., -1:]), -1)

    return own(function)


@fault("raises")
def has_no_gradient():
    return own(lambda x: swiglu_torch(x.detach()))


@fault("raises")
def only_powers_of_two():
    def function(x):
        assert x.shape[-1] & (x.shape[-1] - 1) == 0, "the width must be a power of 2"
        return swiglu_torch(x)

    return own(function)


@fault("writes to inputs")
def works_in_place():
    def function(x):
        y = swiglu_torch(x)
        with torch.no_grad():
            x.data.zero_()
        return y.clone()

    return own(function)


@fault("strided")
def assumes_contiguous_rows():
    def function(x):
        if x.is_contiguous():
            return swiglu_torch(x)
        return swiglu_torch(torch.as_strided(x, x.shape, (x.shape[-1], 1)))

    return own(function)


@fault("stale")
def caches_by_address():
    kept = {}

    def function(x):
        key = x.data_ptr(), x.shape, x.dtype
        if key not in kept:
            kept[key] = x, swiglu_torch(x)  # x is kept, or its address would be given to another
        return kept[key][1]

    return own(function)


@fault("stale")
def caches_by_shape():
    kept = {}
    return own(lambda x: kept.setdefault((x.shape, x.dtype), swiglu_torch(x)))


class _Buffered(torch.autograd.Function):
    buffers = {}  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = swiglu_torch(x)
        return _Buffered.buffers.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y).view_as(y)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(swiglu_torch(x), x, dy)


@fault("overwritten")
def returns_one_buffer():
    return own(_Buffered.apply)


class Promise(Tensor):
    """A tensor that might compute itself when it is read."""


@fault("lazy")
def promises_a_result():
    return own(lambda x: swiglu_torch(x).as_subclass(Promise))


@fault("patched")
def stops_the_clock():
    def function(x):
        time.perf_counter = lambda: 0.0
        return swiglu_torch(x)

    return own(function)


@triton.jit
def _copy_past_the_end(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i <= n)


@triton.jit
def _copy_racing(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


def _copied_by(kernel):
    def function(x):
        y = swiglu_torch(x)
        kernel[(triton.cdiv(y.numel(), 64),)](y.detach().contiguous(), torch.empty_like(y), y.numel(), BLOCK=64)
        return y

    return own(function)


@fault("undefined")
def stores_out_of_bounds():
    return _copied_by(_copy_past_the_end)


@fault("undefined")
def stores_in_a_race():
    return _copied_by(_copy_racing)
