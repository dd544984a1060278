"""The sanitizer catches kernels with a bug, each named after its own, and lets the others pass."""

import os
import shutil
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

from kernels.sanitizer import Counts, SanitizerError, sanitize
from kernels.sanitizer.__main__ import main

BLOCK = 16
FOLDER = Path(__file__).parents[1] / "kernels" / "sanitizer"


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
def difference_underflows_int32(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    far = (-(2**31 - 2)) - tl.program_id(0) * 2
    tl.store(out_ptr + tl.arange(0, BLOCK), far.to(tl.float32), mask=tl.arange(0, BLOCK) < 0)


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
        (difference_underflows_int32, r"program \(2, 0, 0\): int32 overflow detected for operation sub"),
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


@triton.jit
def copy_by_addresses(addresses_ptr, tensors, n, BLOCK: tl.constexpr):
    """One tensor of a list a program: a row of the table holds the address to read and that to write."""
    row = addresses_ptr + 2 * tl.program_id(0)
    x_ptr, out_ptr = (tl.load(row + i).to(tl.pointer_type(tl.float32)) for i in (0, 1))
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane, mask=lane < n), mask=lane < n)


def test_addresses_in_a_table_belong_to_the_tensors_of_the_launch(strict):
    x, out = torch.randn(3, 5), [torch.empty(5) for _ in range(3)]
    table = torch.tensor([[a.data_ptr(), b.data_ptr()] for a, b in zip(x, out, strict=True)])
    copy_by_addresses[(3,)](table, (*x, *out), 5, BLOCK)
    assert torch.equal(torch.stack(out), x)
    with pytest.raises(SanitizerError, match=r"load of 4 bytes at byte 20 of tensors\[2\], which has 20"):
        copy_by_addresses[(3,)](table, (*x, *out), 6, BLOCK)
    table[1, 1] = table[0, 1]
    with pytest.raises(SanitizerError, match=r"race: store at byte 0 of tensors\[3\]"):
        copy_by_addresses[(3,)](table, (*x, *out), 5, BLOCK)


@triton.jit
def copy_tile(x, out):
    out.store([0, 0], x.load([0, 0]))


def test_a_descriptor_larger_than_its_tensor_is_caught(strict):
    """Beyond the descriptor's shape it loads zeros; beyond the tensor there is somebody else's memory."""
    x, out = torch.randn(3, 8), torch.empty(4, 8)
    right, larger = (TensorDescriptor(x, [rows, 8], [8, 1], [4, 8]) for rows in (3, 4))
    copy_tile[(1,)](right, TensorDescriptor.from_tensor(out, [4, 8]))
    assert torch.equal(out[:3], x) and not out[3].any()
    with pytest.raises(SanitizerError, match=r"load of 4 bytes at byte 96 of x, which has 96 \(8 lanes"):
        copy_tile[(1,)](larger, TensorDescriptor.from_tensor(out, [4, 8]))


# On its own


def test_the_example_of_its_page(tmp_path):
    """In a folder that has the package and nothing else of ours."""
    shutil.copytree(FOLDER, tmp_path / "kernels" / "sanitizer")
    page = (FOLDER / "README.md").read_text()
    code, said = (page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "text"))
    (tmp_path / "check.py").write_text(code)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith(said.strip()), done.stderr


PROGRAM = """
import sys
import torch, triton, triton.language as tl

@triton.autotune([triton.Config({"BLOCK": size}) for size in (16, 32)], key=["n"])
@triton.jit
def add_one(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i <= n)

if __name__ == "__main__":
    size, n, code = map(int, sys.argv[1:])
    x = torch.zeros(size)
    add_one[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, n)
    assert x[:n].eq(1).all()
    sys.exit(code)
"""


def test_a_program_runs_under_it_from_the_command_line(tmp_path, capsys):
    """From a copy of the folder, which needs nothing else, and with an autotuner, which takes its first candidate."""
    shutil.copytree(FOLDER, tmp_path / "copied")
    (tmp_path / "mine.py").write_text(PROGRAM)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(*arguments, **variables):
        command = [sys.executable, "-m", "copied", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env | variables, capture_output=True, text=True)

    good = run("mine.py", "41", "40", "3")
    assert good.returncode == 3 and "add_one: 1 launches, 160 bytes read, 164 written" in good.stdout, good
    bad = run("--shuffle=1", "mine.py", "40", "40", "0", TRITON_INTERPRET="1")  # the other began again with it
    assert (
        bad.returncode == 1 and "SanitizerError: add_one, program (2, 0, 0): store of 4 bytes at byte 160" in bad.stderr
    )
    assert "i <= n" in bad.stderr and "interpreter.py" not in bad.stderr and "runpy" not in bad.stderr
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "absent.py")])
    assert "there is no file" in capsys.readouterr().err
