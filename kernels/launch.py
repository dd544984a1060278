"""Launching a Triton kernel as a torch op.

An op is the raw computation, forward or backward, opaque to `torch.compile`; a `torch.autograd.Function` joins the
two. That costs an eager call half of what `torch.library.custom_op` with `register_autograd` does.
"""

import os
import shutil
from collections.abc import Callable
from functools import wraps

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


def c_compiler() -> str | None:
    """The C compiler with which Triton compiles its launchers, found as Triton does."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


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
