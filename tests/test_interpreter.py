"""Kernels in the interpreter compute what they do on a GPU."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled in this process: TRITON_INTERPRET is not 1", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.sanitizer import Observer, install, observe, sanitize

install()

BLOCK = 16
ROOT = Path(__file__).parents[1]


# Numbers


@triton.jit
def cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(out_ptr.dtype.element_ty))


def interesting_floats():
    """Float32 of all kinds: random bits, halves between neighbours of each narrow type, denormals, infinities, NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3000,), generator=generator, dtype=torch.int64).to(torch.int32)
    near_one = torch.randn(3000, generator=generator) * torch.logspace(-9, 9, 3000)
    ties = (torch.randint(0, 2**16, (2000,), generator=generator) << 15).to(torch.int32).view(torch.float32)
    powers = 2.0 ** torch.arange(-30, 20).float() * torch.tensor([1.0, 1.0625, 1.125, 1.1875, -1.5])[:, None]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 448, 464, 65504, 65520, 57344, 61440])
    return torch.cat([bits.view(torch.float32), near_one, ties, powers.flatten(), special, torch.zeros(8192)])[:8192]


FLOATS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def assert_same(ours, theirs):
    """Bit for bit, NaN for NaN."""
    ours, theirs = ours.float(), theirs.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num().view(torch.int32), theirs.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_casts_are_torchs(dtype):
    x = interesting_floats()
    narrow = torch.empty(8192, dtype=dtype)
    cast[(1,)](x, narrow, 8192)
    largest = torch.finfo(dtype).max
    assert_same(narrow, (x.clamp(-largest, largest) if dtype.itemsize == 1 else x).to(dtype))  # fp8 saturates on a GPU
    wide = torch.empty(8192)
    cast[(1,)](narrow, wide, 8192)
    assert_same(wide, narrow)


@triton.jit
def truncate(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_a_cast_that_is_told_to_truncate_does():
    x, out = torch.randn(1024), torch.empty(1024, dtype=torch.bfloat16)
    truncate[(1,)](x, out, 1024)
    assert torch.equal(out.float().view(torch.int32), x.view(torch.int32) & ~0xFFFF)


def test_casts_between_integers_and_bfloat16_are_torchs():
    whole = torch.randint(-(2**20), 2**20, (1024,), dtype=torch.int32)
    narrow, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.int32)
    cast[(1,)](whole, narrow, 1024)
    cast[(1,)](narrow, back, 1024)
    assert torch.equal(narrow, whole.bfloat16()) and torch.equal(back, narrow.int())


@triton.jit
def arithmetic(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + lane), tl.load(y_ptr + lane)
    tl.store(out_ptr + lane, x + y)
    tl.store(out_ptr + BLOCK + lane, x * y)
    tl.store(out_ptr + 2 * BLOCK + lane, -x)
    tl.store(out_ptr + 3 * BLOCK + lane, tl.where(x < y, x, tl.abs(y)))
    tl.store(out_ptr + 4 * BLOCK + lane, tl.exp(x.to(tl.float32)))
    tl.store(out_ptr + 5 * BLOCK + lane, x + 0.5)
    tl.store(out_ptr + 6 * BLOCK + lane, (x < y).to(x.dtype))
    tl.store(out_ptr + 7 * BLOCK + lane, tl.fma(x, y, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_torchs(dtype):
    x, y = torch.randn(2, 1024).to(dtype)
    out = torch.empty(8, 1024, dtype=dtype)
    arithmetic[(1,)](x, y, out, 1024)
    wide = x.float() * y.float() + x.float()
    exact = (
        x + y, x * y, -x, torch.where(x < y, x, y.abs()), x.float().exp().to(dtype), x + 0.5, x < y, wide.to(dtype)
    )  # fmt: skip
    for ours, theirs in zip(out, exact, strict=True):
        assert_same(ours, theirs)


@triton.jit
def times(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane) * scale)


def test_a_float_argument_is_float32():
    """As in compiled code: bf16 times a float argument is a product in float32."""
    x, out = torch.randn(1, BLOCK).bfloat16(), torch.empty(1, BLOCK)
    times[(1,)](x, out, 1 / 3, BLOCK)
    assert torch.equal(out, x.float() * torch.tensor(1 / 3))


@triton.jit
def drop_nan(x_ptr, out_ptr, lo, hi):
    x = tl.load(x_ptr)
    tl.store(out_ptr, tl.maximum(x, lo))
    tl.store(out_ptr + 1, tl.minimum(x, hi))
    tl.store(out_ptr + 2, tl.clamp(x, lo, hi))
    tl.store(out_ptr + 3, tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out_ptr + 4, tl.clamp(x, lo, hi, propagate_nan=tl.PropagateNan.ALL))


def test_maximum_and_clamp_drop_nan_unless_told():
    drop_nan[(1,)](torch.tensor([torch.nan]), out := torch.empty(5), 1.0, 2.0)
    assert out[:3].tolist() == [1, 2, 1] and out[3:].isnan().all()


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), input_precision=PRECISION))


def run_dot(a, b, precision=None):
    result = torch.empty(len(a), len(a))
    with sanitize() as record:
        dot[(1,)](a, b, result, precision, len(a))
    assert record.flops == 2 * len(a) ** 3
    return result.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dot_accumulates_in_float32(dtype):
    a, b = torch.randn(2, 64, 64).to(dtype)
    exact, magnitude = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((run_dot(a, b) - exact).abs() <= 64 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("precision", [None, "tf32", "ieee"])
def test_dot_of_float32_is_tf32_unless_told(precision):
    a, b = torch.randn(2, 64, 64)
    if precision != "ieee":  # tensor cores take 10 bits of the mantissa
        exact_a, exact_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b))
    else:
        exact_a, exact_b = a.double(), b.double()
    bound = 64 * 2**-24 * (a.double().abs() @ b.double().abs())
    assert ((run_dot(a, b, precision) - exact_a @ exact_b).abs() <= bound).all()
    if precision != "ieee":
        assert ((run_dot(a, b, precision) - a.double() @ b.double()).abs() > bound).any()


@triton.jit
def dot_scaled(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr,
    A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, 16), tl.arange(0, 32)
    a_k, b_k = tl.arange(0, K // 2 if A == "e2m1" else K), tl.arange(0, K // 2 if B == "e2m1" else K)
    blocks = tl.arange(0, K // BLOCK)
    a = tl.load(a_ptr + m[:, None] * a_k.shape[0] + a_k[None, :])
    b = tl.load(b_ptr + n[None, :] * b_k.shape[0] + b_k[:, None])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // BLOCK) + blocks[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // BLOCK) + blocks[None, :])
    out = tl.dot_scaled(a, a_scale, A, b, b_scale, B)
    tl.store(out_ptr + m[:, None] * 32 + n[None, :], out)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def operand(name, rows, k, block):
    """Random codes and scales as a kernel takes them, and the numbers that they stand for."""
    if name == "e2m1":
        codes = torch.randint(16, (rows, k))
        values, data = E2M1[codes], (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    else:
        data = torch.randn(rows, k).to({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name])
        values = data.float()
    if block == 16:  # NVFP4
        scale = torch.rand(rows, k // block).to(torch.float8_e4m3fn)
        factors = scale.float()
    else:
        scale = torch.randint(120, 135, (rows, k // block), dtype=torch.uint8)
        factors = torch.exp2(scale.float() - 127)
    return data, scale, values * factors.repeat_interleave(block, 1)


@pytest.mark.parametrize("a, b, block", [
    ("e2m1", "e2m1", 16), ("e2m1", "e2m1", 32), ("e4m3", "e4m3", 32), ("e5m2", "e4m3", 32), ("e4m3", "e2m1", 32),
])  # fmt: skip
def test_dot_scaled_multiplies_what_codes_and_scales_stand_for(a, b, block):
    """NVFP4 has e4m3 scales of 16 values, which the interpreter as shipped reads as powers of two."""
    lhs, lhs_scale, lhs_values = operand(a, 16, 64, block)
    rhs, rhs_scale, rhs_values = operand(b, 32, 64, block)
    out = torch.empty(16, 32)
    with sanitize() as record:
        dot_scaled[(1,)](lhs, lhs_scale, rhs, rhs_scale, out, a, b, 64, block)
    torch.testing.assert_close(out, lhs_values @ rhs_values.T, rtol=1e-5, atol=1e-4)
    assert record.flops == 2 * 16 * 32 * 64


def test_a_scale_of_255_is_nan():
    data, scale, _ = operand("e4m3", 16, 32, 32)
    rhs, rhs_scale, _ = operand("e4m3", 32, 32, 32)
    scale[3] = 255
    dot_scaled[(1,)](data, scale, rhs, rhs_scale, out := torch.empty(16, 32), "e4m3", "e4m3", 32, 32)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def reduce(x_ptr, out_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if HOW == "max":
        tl.store(out_ptr, tl.max(x.to(tl.float32), axis=0))
    elif HOW == "sum":
        tl.store(out_ptr, tl.sum(x, axis=0))
    else:
        tl.store(out_ptr + tl.arange(0, BLOCK), tl.associative_scan(x, 0, plus))


@pytest.mark.parametrize("how, combine", [("sum", "_sum_combine"), ("scan", "plus")])
def test_sums_of_bfloat16_are_refused(how, combine):
    x, out = torch.randn(BLOCK).bfloat16(), torch.empty(BLOCK)
    with pytest.raises(TypeError, match=rf"{combine} over bf16 rounds .*: convert to float32 before"):
        reduce[(1,)](x, out, how, BLOCK)
    reduce[(1,)](x, out, "max", BLOCK)
    assert out[0] == x.max()


# Memory


def test_missing_other_reaches_the_output():
    def run(dtype):
        out = torch.zeros(1)
        sum_without_other[(1,)](torch.ones(5, dtype=dtype), out, 5, BLOCK)
        return out.item()

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert math.isnan(run(dtype)), dtype
    assert abs(run(torch.int32)) > 1e9


@triton.jit
def sum_without_other(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)))


def test_a_single_zero_is_an_other():
    out = torch.ones(1)
    load_one[(1,)](torch.ones(1), out, False)
    assert out == 0


@triton.jit
def load_one(x_ptr, out_ptr, wanted):
    tl.store(out_ptr, tl.load(x_ptr, mask=wanted, other=0.0))


@triton.jit
def copy_tile(x, out, row, column, offset_out):
    out.store([offset_out, 0], x.load([row, column]))


@triton.jit
def copy_tile_by_pointers(x_ptr, out_ptr, M, N, row, column, offset_out, PADDING: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[4, 8], padding_option=PADDING)
    out = tl.make_tensor_descriptor(out_ptr, shape=[4, 8], strides=[8, 1], block_shape=[4, 8])
    copy_tile(x, out, row, column, offset_out)


def tile_of(x, row, column, fill):
    """What a descriptor loads: `[4, 8]` from `row` and `column`, `fill` outside of `x`."""
    wide = torch.full((x.shape[0] + 16, x.shape[1] + 16), fill, dtype=x.dtype)
    wide[8 : 8 + x.shape[0], 8 : 8 + x.shape[1]] = x
    return wide[8 + row : 12 + row, 8 + column : 16 + column]


EDGES = pytest.mark.parametrize("row, column", [(0, 0), (3, 8), (-2, 0), (4, -8), (-3, 16), (6, 0)])


@EDGES
@pytest.mark.parametrize("dtype", (*FLOATS[:2], torch.float32, torch.int32), ids=str)
def test_a_descriptor_loads_zeros_beyond_its_shape(row, column, dtype):
    x, out = torch.randn(6, 16).mul(100).to(dtype), torch.full((4, 8), 7).to(dtype)
    with sanitize() as record:
        copy_tile[(1,)](descriptor(x), descriptor(out), row, column, 0)
    assert torch.equal(out, tile_of(x, row, column, 0))
    inside = tile_of(torch.ones(6, 16), row, column, 0).sum().item()
    assert record.bytes_read == inside * dtype.itemsize and record.bytes_written == 32 * dtype.itemsize


def descriptor(x):
    return TensorDescriptor.from_tensor(x, [4, 8])


@EDGES
@pytest.mark.parametrize("dtype", (*FLOATS[:2], torch.float32), ids=str)
@pytest.mark.parametrize("padding, fill", [("zero", 0.0), ("nan", math.nan)])
def test_a_descriptor_made_in_a_kernel_pads_as_it_was_told(row, column, dtype, padding, fill):
    x, out = torch.randn(6, 16).to(dtype), torch.full((4, 8), 7, dtype=dtype)
    with sanitize():
        copy_tile_by_pointers[(1,)](x, out, 6, 16, row, column, 0, padding)
    assert_same(out, tile_of(x, row, column, fill))


@pytest.mark.parametrize("offset", [-1, 0, 2, 4])
def test_a_descriptor_stores_nothing_beyond_its_shape(offset):
    """Rows before and after the descriptor's are the same tensor's, and keep what they hold."""
    x, out = torch.randn(4, 8), torch.full((8, 8), 7.0)
    expected = out.clone()
    for i in range(4):
        if 0 <= i + offset < 4:
            expected[2 + i + offset] = x[i]
    with sanitize() as record:
        copy_tile[(1,)](descriptor(x), descriptor(out[2:6]), 0, 0, offset)
    assert torch.equal(out, expected)
    assert record.bytes_written == (expected != 7).sum() * 4


# Observers


def test_an_observer_is_told_what_a_kernel_does():
    class Log(Observer):
        def __init__(self):
            self.said = []

        def launch(self, kernel):
            self.said.append(kernel)

        def argument(self, name, tensor, pointer):
            self.said.append((name, tuple(tensor.shape)))

        def grid(self, size):
            self.said.append(size)

        def program(self, index):
            self.said.append(index)
            return index

        def access(self, kind, addresses, itemsize, pointer):
            self.said.append((kind, len(addresses) * itemsize))

    x, log = torch.randn(BLOCK), Log()
    with observe(log):
        times[(2,)](x, x, 2.0, BLOCK)
    programs = [entry for i in range(2) for entry in ((i, 0, 0), ("load", 4 * BLOCK), ("store", 4 * BLOCK))]
    assert log.said == ["times", ("x_ptr", (BLOCK,)), ("out_ptr", (BLOCK,)), (2, 1, 1), *programs]
    times[(2,)](x, x, 2.0, BLOCK)
    assert len(log.said) == 10


@triton.jit
def divide_by_zero():
    return 1 // 0


@triton.jit
def call_one_that_fails():
    divide_by_zero()


def test_an_exception_in_a_kernel_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError):
        call_one_that_fails[(1,)]()


def test_without_the_switch_it_says_so():
    code = """if True:
        from kernels.sanitizer import install, sanitize
        for start in (install, sanitize().__enter__):
            try:
                start()
            except RuntimeError as error:
                print(error)
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("set TRITON_INTERPRET=1 before triton is first imported") == 2
