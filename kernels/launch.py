"""What stands between a Triton kernel and torch: registering the function that launches it, and the size of the grid.

An op is the raw computation, forward or backward, opaque to `torch.compile`; a `torch.autograd.Function` joins the
two. That costs an eager call half of what `torch.library.custom_op` with `register_autograd` does.
"""

from collections.abc import Callable
from functools import cache, partial, wraps

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

try:
    import triton
    import triton.language as tl
except ImportError:  # not published for this system: `bind` says so when a Triton kernel is asked for

    class _Absent:
        """Stands in for the module while the kernels are defined, and for nothing after that."""

        def __getattr__(self, name):
            return self

        def __call__(self, *functions, **options):
            return functions[0] if functions else self

    triton = tl = _Absent()

AVAILABLE = hasattr(triton, "__version__") and isinstance(triton.__version__, str)
IMPLEMENTATIONS: dict[str, Callable] = {}
_library = torch.library.Library("nanofuse", "DEF")


def _on_its_gpu(function: Callable) -> Callable:
    """`function`, on the GPU of its first argument: Triton launches on the current one, wherever tensors are."""

    def launch(first: torch.Tensor | list[torch.Tensor], *rest):
        device = (first[0] if isinstance(first, list) else first).get_device()
        if device == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(device):
            return function(first, *rest)

    return launch


def library_op(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated host function, which allocates outputs and launches kernels, as `nanofuse::<its name>`.

    Its annotations are the op's schema; it writes to none of its arguments but those in `mutates`, and returns none of
    them. `fake` takes the same arguments and only allocates. The undecorated function stays in `IMPLEMENTATIONS`, for
    tools that run it on meta tensors.

    What replaces it calls the op where torch has to see it: when compiling, under a `TorchDispatchMode`, or with a
    subclass of tensors. Otherwise it calls the host function, which saves the dispatcher's tenth of the host's time.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _library.impl(name, function, "CPU")
        on_its_gpu = _on_its_gpu(function)
        _library.impl(name, on_its_gpu, "CUDA")
        torch.library.register_fake(f"nanofuse::{name}", fake, lib=_library)
        IMPLEMENTATIONS[name] = function
        op = getattr(torch.ops.nanofuse, name).default

        @wraps(function)
        def call(*arguments):
            if torch.compiler.is_compiling() or _len_torch_dispatch_stack():
                return op(*arguments)
            first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
            if type(first) not in (torch.Tensor, torch.nn.Parameter):
                return op(*arguments)
            if first.is_cuda:
                return on_its_gpu(*arguments)
            return function(*arguments) if first.is_cpu else op(*arguments)

        return call

    return register


def allow_in_inductor() -> None:
    """Let Inductor take our ops as they are: to be called before `torch.compile`.

    It would find out by itself, and log a line for each. The line holds the op's inputs with all that they are made of,
    and so takes torch 2.11 exponential time in the number of layers."""
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST  # takes seconds to import

    FALLBACK_ALLOW_LIST.update(f"nanofuse::{name}" for name in IMPLEMENTATIONS)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up. `triton.cdiv` is for kernels, too, and takes seven Python calls on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is `n` or more; likewise in place of `triton.next_power_of_2`."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


@triton.jit
def tanh(x, HALF: tl.constexpr):
    """The hyperbolic tangent of a float32. The closed form is off by a roundoff of 1, more than small values have to
    lose, which take the series: unless x comes of values in `HALF` precision, whose own rounding is coarser."""
    y = 2 * tl.sigmoid(2 * x) - 1
    if not HALF:
        square = x * x
        y = tl.where(square < 0.04, x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315)))), y)
    return y


@cache
def n_sm(device: torch.device) -> int:
    """Number of SMs of a GPU.

    1 on the CPU, where the interpreter runs programs one after the other: a 132nd of the rows then gives each program
    the work that it has on an H100. 132 on the meta device, which kernels are compiled from.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


multiprocessors = n_sm  # the former name


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


@triton.jit
def _sum_rows_kernel(x_ptr, y_ptr, n_rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, n_rows, BLOCK_R):
        rows = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        acc += tl.load(x_ptr + rows * D + d, mask=(rows < n_rows) & (d < D), other=0.0)
    tl.store(y_ptr + d, tl.sum(acc, axis=0)[None, :], mask=d < D)


def sum_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """Sum the programs' partial sums, `x` `[programs, D]` float32, into `out` `[D]` of any dtype, in a fixed order.

    One launch where `x.sum(0).to(dtype)` takes two. The many partial sums of a GPU are read 16 columns a program, which
    spreads a gain of 768 over 48 SMs.
    """
    n_rows, d = x.shape
    block_r = min(256, next_power_of_2(n_rows))
    block_d = 4096 // block_r
    _sum_rows_kernel[(cdiv(d, block_d),)](x, out, n_rows, d, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=8)


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
