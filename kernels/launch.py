"""What stands between a Triton kernel and torch: registering the function that launches it, and the size of the grid.

An op is the raw computation, forward or backward, opaque to `torch.compile`; the room's `torch.autograd.Function` joins
the two. That costs an eager call half of what `torch.library.custom_op` with `register_autograd` does.
"""

from collections.abc import Callable
from functools import cache

import torch

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
        with torch.cuda.device_of(first[0] if isinstance(first, list) else first):
            return function(first, *rest)

    return launch


def library_op(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Register the decorated host function, which allocates outputs and launches kernels, as `nanofuse::<its name>`.

    Its annotations are the op's schema; it writes to none of its arguments but those in `mutates`, and returns none of
    them. `fake` takes the same arguments and only allocates. The undecorated function stays in `IMPLEMENTATIONS`, for
    tools that run it on meta tensors.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CPU")
        _library.impl(name, _on_its_gpu(function), "CUDA")
        torch.library.register_fake(f"nanofuse::{name}", fake, lib=_library)
        IMPLEMENTATIONS[name] = function
        return getattr(torch.ops.nanofuse, name).default

    return register


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
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, per program that fits on a multiprocessor.

    A card's own count; on the CPU, where the interpreter runs them one after the other, 1, so that a 132nd of the rows
    give each program the work it has on an H100; 132 for the meta device, which compiles for one.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


def card(device: torch.device) -> str:
    """What Triton compiles for, such as `sm_90` or `gfx942`; what the CPU interprets is taken for `sm_90`."""
    if device.type == "cpu":
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """`x` with the values of its last dimension adjacent: itself where its strides allow, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """`x` `[B, T, H, D]` with adjacent values, and heads apart by what 32 bits hold: itself or a copy."""
    return adjacent(x) if x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as `[rows, columns]` with adjacent columns: a view where its strides allow, else a copy."""
    return adjacent(x.reshape(-1, x.shape[-1]))
