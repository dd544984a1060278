"""CUDA graphs emulated on a CPU: the operators of a function are recorded and replayed.

A graph fixes the addresses of tensors and the numbers that the host computed. So does a recording: a replay runs each
operator on the same tensors and numbers, and writes its results to the same memory. Replays then differ from eager
calls if the function uses a number computed on the host, a tensor that is rebound, or state allocated late.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import runtime.capture
from runtime import hardware

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Recorded(TorchDispatchMode):
    """Replaces `torch.cuda.CUDAGraph` on a CPU: a context that records the operators that run under it.

    Unlike a capture it runs them too, so the first replay, which follows it, does nothing. Raises if the host reads a
    value from the device, and for an operation between ranks."""

    replays = 0  # of all graphs

    def __init__(self):
        super().__init__()
        self.calls, self.is_new = [], True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in HOST_READS:
            raise RuntimeError(f"{operator} makes the host wait for the device")
        if operator.namespace == "c10d":
            raise RuntimeError(f"{operator} is a collective operation in a graph")
        results = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self):
        if self.is_new:
            self.is_new = False
            return
        with torch.autocast("cpu", enabled=False):  # its casts are among what was recorded
            for operator, args, kwargs, results in self.calls:
                again = operator(*args, **kwargs)
                for kept, new in zip(tensors(results), tensors(again), strict=True):
                    if kept.data_ptr() != new.data_ptr():  # neither a view nor in place: memory of the graph
                        kept.copy_(new)
        Recorded.replays += 1


def tensors(results):
    return [x for x in tree_leaves(results) if torch.is_tensor(x)]


class Eager(runtime.capture.Captured):
    """Replaces `Captured` without replays. It records too, because the recording's references to tensors decide whether
    autograd accumulates in place, which may affect the layout of a sum and hence rounding."""

    def __call__(self):
        super().__call__()
        self.stages.clear()


def emulate_graphs(monkeypatch):
    """Have training on a CPU replay recordings in place of CUDA graphs."""
    monkeypatch.setattr(hardware, "pick_capture", lambda *args: (True, "yes"))
    monkeypatch.setattr(runtime.capture, "synchronizations", lambda: nullcontext([]))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: torch._C._len_torch_dispatch_stack() > 0)
    monkeypatch.setattr(Recorded, "replays", 0)
