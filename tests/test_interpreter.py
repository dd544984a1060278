"""The interpreter computes what a GPU does, and the sanitizer catches kernels with a bug, each named after its own."""

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

from kernels.sanitizer import Counts, SanitizerError, install, sanitize

install()

BLOCK = 16


# Kernels with a bug


@triton.jit
def load_off_by_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets <= n, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets < n)


@triton.jit
def store_off_by_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets <= n)


@triton.jit
def unmasked_store(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0))


@triton.jit
def negative_offset(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets - 1, mask=offsets < n, other=0.0), mask=offsets < n)


@triton.jit
def atomic_out_of_bounds(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr + tl.program_id(0) * n, 1.0)


@triton.jit
def compare_and_swap_out_of_bounds(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.atomic_cas(out_ptr.to(tl.pointer_type(tl.int32)) + n, 0, 1)


@triton.jit
def accumulation_without_atomics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0)
    tl.store(out_ptr, tl.load(out_ptr) + tl.sum(x))


@triton.jit
def every_program_stores_one_element(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def reads_the_output_of_the_previous_program(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out_ptr + program, 1.0 + tl.load(out_ptr + program - 1, mask=program > 0, other=0.0))


@triton.jit
def overwrites_what_the_previous_program_read(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + program + 1))


@triton.jit
def the_last_program_overwrites_what_all_read(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(x_ptr)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x_ptr, x + 1)


@triton.jit
def two_lanes_store_to_one_address(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane // 2, lane.to(tl.float32))


@triton.jit
def offset_overflows_int32(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.load(x_ptr + row * (n << 25), mask=row < 0)


@triton.jit
def device_assert_fails(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    tl.device_assert(tl.program_id(0) < 2, "too many programs")


@pytest.mark.parametrize(
    "kernel, message",
    [
        (load_off_by_one, r"program \(2, 0, 0\): load of 4 bytes at byte 160 of x_ptr, which has 160 \(1 lanes"),
        (store_off_by_one, r"program \(2, 0, 0\): store of 4 bytes at byte 160 of out_ptr, which has 160 \(1 lanes"),
        (unmasked_store, r"program \(2, 0, 0\): store of 4 bytes at byte 160 of out_ptr, which has 160 \(8 lanes"),
        (negative_offset, r"program \(0, 0, 0\): load of 4 bytes at byte -4 of x_ptr"),
        (atomic_out_of_bounds, r"program \(1, 0, 0\): atomic of 4 bytes at byte 160 of out_ptr"),
        (compare_and_swap_out_of_bounds, r"program \(0, 0, 0\): atomic of 4 bytes at byte 160 of out_ptr"),
        (accumulation_without_atomics, r"race: load at byte 0 of out_ptr, where program \(0, 0, 0\) did store"),
        (every_program_stores_one_element, r"race: store at byte 0 of out_ptr, where program \(0, 0, 0\) did store"),
        (reads_the_output_of_the_previous_program, r"race: load at byte 0 of out_ptr, where program \(0, 0, 0\) did"),
        (overwrites_what_the_previous_program_read, r"race: store at byte 4 of x_ptr, where program \(0, 0, 0\) did l"),
        (the_last_program_overwrites_what_all_read, r"race: store at byte 0 of x_ptr, where several programs did load"),
        (two_lanes_store_to_one_address, r"race: store at byte 0 of out_ptr, where another lane of this program"),
        (offset_overflows_int32, r"program \(2, 0, 0\): int32 overflow detected for operation mul"),
        (device_assert_fails, r"program \(2, 0, 0\): too many programs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sanitizer_catches(kernel, message):
    with sanitize(), pytest.raises(SanitizerError, match=f"{kernel.__name__}, .*{message}"):
        kernel[(3,)](torch.randn(40), torch.zeros(40), 40, BLOCK)


def test_sanitizer_catches_overrun_into_another_argument():
    """The next byte is the other argument's: the pointer, not the address, says which argument is meant."""
    x, out = torch.zeros(80).split(40)
    with sanitize(), pytest.raises(SanitizerError, match="byte 160 of x_ptr, which has 160"):
        load_off_by_one[(3,)](x, out, 40, BLOCK)


def test_sanitizer_catches_reads_of_an_empty_tensor():
    with sanitize(), pytest.raises(SanitizerError, match="byte 0 of x_ptr, which has 0"):
        copy_block[(1,)](torch.zeros(5, 0), torch.zeros(40), 1, BLOCK)


@triton.jit
def touch(ptr, KIND: tl.constexpr):
    if KIND == "load":
        tl.load(ptr)
    elif KIND == "store":
        tl.store(ptr, 1)
    else:
        tl.atomic_add(ptr, 1)


@triton.jit
def two_programs_meet(x_ptr, y_ptr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        touch(x_ptr, FIRST)
    else:
        touch(y_ptr, SECOND)


@pytest.mark.parametrize("first", ["load", "store", "atomic"])
@pytest.mark.parametrize("second", ["load", "store", "atomic"])
def test_two_programs_may_meet_to_load_or_both_by_atomics(first, second):
    x = torch.zeros(1, dtype=torch.int32)
    with sanitize():
        two_programs_meet[(2,)](x, x.clone(), first, second)
        if first == second != "store":
            two_programs_meet[(2,)](x, x, first, second)
        else:
            with pytest.raises(SanitizerError, match=rf"race: {second} .* of y_ptr, where .* did {first}"):
                two_programs_meet[(2,)](x, x, first, second)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_sanitizer_catches_races_between_views_of_two_widths(narrow_first):
    wide = torch.zeros(1, dtype=torch.int32)
    views = (wide.view(torch.int16)[1:], wide)
    with sanitize(), pytest.raises(SanitizerError, match="race"):
        two_programs_meet[(2,)](*(views if narrow_first else views[::-1]), "store", "store")


def test_sanitizer_catches_races_in_overlapping_views():
    x = torch.zeros(40)
    with sanitize(), pytest.raises(SanitizerError, match="race: load at byte 64 of x_ptr"):
        copy_block[(2,)](x, x[1:], 32, BLOCK)  # the end of the first block is the start of the second
    with sanitize():
        copy_block[(1,)](x, x[1:], 16, BLOCK)


@triton.jit
def copy_block(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), mask=offsets < n)


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


def test_order_of_programs_is_shuffled_by_the_seed():
    def run(seed):
        out = torch.zeros(32)
        with sanitize(races=False, shuffle=seed):
            reads_the_output_of_the_previous_program[(32,)](out, out, 32, BLOCK)
        return out

    assert torch.equal(run(None), torch.arange(1.0, 33))
    assert not torch.equal(run(0), run(None))
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_checks_can_be_left_out():
    with sanitize(races=False):
        accumulation_without_atomics[(3,)](torch.ones(40), out := torch.zeros(40), 40, BLOCK)
    assert out[0] == 40
    with sanitize(overflow=False):
        offset_overflows_int32[(3,)](torch.ones(40), out, 40, BLOCK)
    with sanitize(bounds=False):
        load_off_by_one[(3,)](torch.ones(48)[:40], out, 40, BLOCK)
    accumulation_without_atomics[(3,)](torch.ones(40), torch.zeros(40), 40, BLOCK)


# Kernels without one: all checks on, in a shuffled order


@pytest.fixture
def strict():
    with sanitize(shuffle=0) as record:
        yield record


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x, y = tl.load(x_ptr + offsets, mask=mask), tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


def test_in_place_on_a_tensor_passed_three_times(strict):
    x = torch.arange(40.0)
    add[(3,)](x, x, x, 40, BLOCK)
    assert torch.equal(x, 2 * torch.arange(40.0))
    assert strict.kernels == {"add": Counts(launches=1, bytes_read=2 * 160, bytes_written=160)}


@triton.jit
def scale_rows(x_ptr, out_ptr, stride_row, stride_col, n, scale, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride_row + offsets * stride_col, mask=offsets < n)
    tl.store(out_ptr + tl.program_id(0) * n + offsets, x * scale, mask=offsets < n)


def test_strided_view(strict):
    x, out = torch.randn(7, 20)[::2, 1::2].T, torch.empty(10, 4)
    scale_rows[(10,)](x, out, *x.stride(), 4, 2.0, BLOCK)
    assert torch.equal(out, 2 * x)
    with pytest.raises(SanitizerError, match=r"of x_ptr, which has 556 \(1 lanes"):  # x ends in the middle of its rows
        scale_rows[(10,)](x, out, *x.stride(), 5, 2.0, BLOCK)


@triton.jit
def count_multiples(counts_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.atomic_add(counts_ptr + lane // 8, tl.where(lane % (tl.program_id(0) + 1) == 0, 1, 0).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_atomic_add_across_programs_and_lanes(strict, dtype):
    counts = torch.zeros(2, dtype=dtype)
    count_multiples[(3,)](counts, 16)
    assert counts.tolist() == [8 + 4 + 3, 8 + 4 + 3]
    size = 3 * 16 * dtype.itemsize
    assert (strict.bytes_read, strict.bytes_written) == (size, size)


@triton.jit
def reverse_blocks(x_ptrs, out_ptr, absent_ptr, BLOCK: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    blocks = ()
    for i in tl.static_range(N):
        blocks = (*blocks, tl.load(x_ptrs[i] + lane))
    for i in tl.static_range(N):
        tl.store(out_ptr + i * BLOCK + lane, blocks[N - 1 - i])


def test_tuples_of_pointers_and_blocks(strict):
    x, out = torch.randn(3, BLOCK), torch.empty(3, BLOCK)
    reverse_blocks[(1,)](tuple(x), out, None, BLOCK, 3)
    assert torch.equal(out, x.flip(0))
    with pytest.raises(SanitizerError, match=r"of x_ptrs\[1\], which has 32"):
        reverse_blocks[(1,)]((x[0], x[1, :8]), out, None, BLOCK, 2)


@triton.jit
def row_sums(x_ptr, starts_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < end, other=0.0)
    tl.store(out_ptr + row, tl.sum(total))


def test_accumulator_of_a_loop_with_bounds_in_tensors(strict):
    x, starts, out = torch.ones(100), torch.tensor([0, 7, 7, 60, 100], dtype=torch.int32), torch.empty(4)
    row_sums[(4,)](x, starts, out, BLOCK)
    assert out.tolist() == [7, 0, 53, 40]
    assert strict.bytes_read == 100 * 4 + 4 * 2 * 4


@triton.jit
def either(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(tl.where(lane % 2 == 0, x_ptr, y_ptr) + lane))


def test_a_pointer_chosen_by_lane(strict):
    x, y, out = torch.randn(3, BLOCK)
    either[(1,)](x.clone(), y.clone(), out, BLOCK)
    assert torch.equal(out, torch.where(torch.arange(BLOCK) % 2 == 0, x, y))
    with pytest.raises(SanitizerError, match="out of bounds"):
        either[(1,)](x.clone(), y[:15].clone(), out, BLOCK)


@triton.jit
def fill_first_bytes(x_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(x_ptr.to(tl.pointer_type(tl.int16)) + lane, lane.to(tl.int16))


@pytest.mark.parametrize("given", [tl.int16, tl.int32, tl.int64], ids=str)
def test_a_pointer_cast_to_another_type(strict, given):
    x = torch.zeros(BLOCK // 2, dtype=torch.int64)
    fill_first_bytes[(1,)](triton.reinterpret(x, given), BLOCK)
    assert x.view(torch.int16)[:BLOCK].tolist() == list(range(BLOCK))
    with pytest.raises(SanitizerError, match="store of 2 bytes at byte 64 of x_ptr, which has 64"):
        fill_first_bytes[(1,)](triton.reinterpret(x, given), 4 * BLOCK)


@triton.jit
def two_launches(x_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) + 1)


def test_launches_do_not_race_with_each_other(strict):
    x = torch.zeros(64)
    two_launches[(4,)](x, 16)
    two_launches[(2,)](x, 32)
    assert (x == 2).all()
    assert strict.kernels["two_launches"].launches == 2
    assert strict.bytes_read == strict.bytes_written == 2 * 256


def test_bytes_of_a_masked_copy():
    x = torch.randn(37).bfloat16()
    with sanitize() as record:
        copy_block[(3,)](x, torch.empty(37), 37, BLOCK)
    assert (record.bytes_read, record.bytes_written, record.flops) == (37 * 2, 37 * 4, 0)


# Exactness


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


def test_a_float_argument_is_float32():
    """As in compiled code: bf16 times a float argument is a product in float32."""
    x, out = torch.randn(1, BLOCK).bfloat16(), torch.empty(1, BLOCK)
    scale_rows[(1,)](x, out, BLOCK, 1, BLOCK, 1 / 3, BLOCK)
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


def test_without_the_switch_it_says_so():
    path = Path(__file__).parents[1] / "kernels" / "interpreter.py"
    code = (
        f"import runpy; module = runpy.run_path({str(path)!r})\n"
        "for start in (module['install'], module['sanitize']().__enter__):\n"
        "    try: start()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.count("set TRITON_INTERPRET=1 before triton is first imported") == 2
