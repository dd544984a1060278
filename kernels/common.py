"""What several ops need: on the host the GPU, sizes of blocks and layouts of tensors; in kernels tanh, FP8
codes and the tiles of a product."""

from functools import cache, partial

import torch

from kernels.launch import tl, triton


@cache
def n_sm(device: torch.device) -> int:
    """Number of SMs of a GPU.

    1 on the CPU, where the interpreter runs programs one after the other: a 132nd of the rows then gives each program
    the work that it has on an H100. 132 on the meta device, which kernels are compiled from.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


def card(device: torch.device) -> str:
    """What Triton compiles for, such as `sm_90` or `gfx942`; `sm_90` on the CPU, for the interpreter."""
    if device.type == "cpu":
        return "sm_90"
    return _card_of_gpu(device) if device.type == "cuda" else _card_of_driver()


def _card_of_driver() -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@cache
def _card_of_gpu(device: torch.device) -> str:
    with torch.cuda.device(device):
        return _card_of_driver()


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up. `triton.cdiv` is for kernels, too, and takes seven Python calls on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is `n` or more; likewise in place of `triton.next_power_of_2`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


# Contiguous whatever the strides of the original, in a third of the time of `torch.empty` with shape, dtype and device.
empty_like = partial(torch.empty_like, memory_format=torch.contiguous_format)


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """`x` with the values of its last dimension adjacent: itself where its strides allow, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """`x` `[B, T, H, D]` with adjacent values, and heads apart by what 32 bits hold: itself or a copy."""
    return adjacent(x) if x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as `[rows, columns]` with adjacent columns: a view where its strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else adjacent(x)


@triton.jit
def tanh(x, HALF: tl.constexpr):
    """The hyperbolic tangent of a float32. The closed form is off by a roundoff of 1, more than small values have to
    lose, which take the series: unless x comes of values in `HALF` precision, whose own rounding is coarser."""
    y = 2 * tl.sigmoid(2 * x) - 1
    if not HALF:
        square = x * x
        y = tl.where(square < 0.04, x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315)))), y)
    return y


@triton.jit
def fp8_codes(x, inverse, DTYPE: tl.constexpr):
    """FP8 codes, e4m3 or e5m2, of a float32 x times the inverse of its scale; as `formats.codes_of`."""
    LARGEST: tl.constexpr = 57344.0 if DTYPE.is_fp8e5() else 448.0
    return tl.clamp(x * inverse, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def raise_amax(amax_ptr, largest):
    """Raise amax to the largest value of a block, of magnitudes in float32, by one atomic. The order of programs does
    not matter."""
    tl.atomic_max(amax_ptr, tl.max(tl.max(largest, axis=1), axis=0), sem="relaxed")


@triton.jit
def tile_of_product(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows and columns of this program's tile of a product `[M, N]`. GROUP_M rows of tiles are computed column by
    column, so that their inputs stay in L2."""
    n_columns = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * n_columns)
    height = min(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * n_columns)
    rows = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def store_tile(y_ptr, acc, rows, columns, M, N):
    """Store a tile of a contiguous product `[M, N]`."""
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], acc, mask=mask)
