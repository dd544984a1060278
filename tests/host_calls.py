"""What an eager op costs the host, counted: `python tests/host_calls.py` prints a JSON object of counts by op and pass.

Everything runs as on a GPU up to the driver, on small CPU tensors: autograd, the host functions, Triton's way to a
launch. Kernels are neither compiled nor launched. Counts are of Python calls (`all`, and those of our own code, `own`),
of C functions called from Python, and of launches; `us` is the least time of a call on this thread, on a warm cache.
The overhead of `torch.autograd.backward` itself, some 30 Python calls, is in what takes a gradient.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kernels import OPS

launches = Counter()


class NoKernel:
    """Stands in for a compiled kernel."""

    packed_metadata = function = None

    def __init__(self, name: str):
        self.name = name

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        launches[self.name] += 1


def compile_nothing(kernel: JITFunction, key: str, *rest) -> NoKernel:
    cache = kernel.device_caches[0][0]
    cache[key] = NoKernel(kernel.__name__)
    return cache[key]


def count(run) -> dict:
    """Counts of one call, after one that fills the caches."""
    run()
    launches.clear()
    counts, modules = Counter(), Counter()

    def note(frame, event, argument):
        counts[event] += 1
        if event == "call":
            modules[frame.f_code.co_filename] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    own = sum(n for file, n in modules.items() if file.startswith(str(ROOT / "kernels")))
    language = sum(n for file, n in modules.items() if "triton/language" in file)
    names = dict(launches)
    times = []
    for _ in range(50):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return {
        "all": counts["call"], "own": own, "language": language, "c": counts["c_call"], "launches": names,
        "us": round(min(times) * 1e6, 1),
    }  # fmt: skip


def passes(op):
    """The forward, and forward and backward, of an op at a small shape in bf16."""
    inputs = op.inputs(op.test_shapes[1], lambda *size: torch.randn(*size).bfloat16())
    leaves = [inputs[name].requires_grad_() for name in op.differentiable]

    def forward():
        return op.implementations["triton"](**inputs)

    outputs = forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.ones_like(out) for out in outputs]

    def both():
        outputs = forward()
        torch.autograd.backward(outputs, upstream[0] if torch.is_tensor(outputs) else upstream, inputs=leaves)
        for leaf in leaves:
            leaf.grad = None

    return {"forward": forward, "forward+backward": both}


def main() -> None:
    torch.set_num_threads(1)
    values = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in values.items()}))
    JITFunction._do_compile = compile_nothing
    ops = [op for op in OPS.values() if "triton" in op.implementations and not op.mutates]
    print(json.dumps({op.name: {name: count(run) for name, run in passes(op).items()} for op in ops}))


if __name__ == "__main__":
    main()
