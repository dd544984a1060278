"""The work of a training step by op, and how a profile finds the ops."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

from torch.optim import Optimizer
from torch.profiler import record_function

from kernels import EMITTING, OPS
from kernels.formats import NVFP4
from kernels.launch import AVAILABLE, triton
from kernels.spec import Cost
from model.block_scaled import BlockScaledLayer
from model.fp8 import FP8Layer
from model.gpt import GPT, Linear
from model.micro_batch import MicroBatch
from model.optim import Muon
from model.tensors import local


class StepOps:
    """The ops of a training step: their work, and how a profile finds them (`Ops` of runtime/profile.py)."""

    def __init__(self, model: GPT, optimizers: Iterable[Optimizer], micro_batch: MicroBatch, compiled: bool = False):
        """`micro_batch` may become smaller later. `compiled`: the step runs a compiled model, whose modules must not
        change."""
        self.model, self.optimizers, self.micro_batch, self.compiled = model, optimizers, micro_batch, compiled

    def kernels(self) -> dict[str, str]:
        """The op of each Triton kernel, by the kernel's name."""
        if not AVAILABLE:
            return {}
        modules = {op: sys.modules[OPS[op].implementations["torch"].__module__] for op in reversed(OPS)}
        return {
            value.__name__: op
            for op, module in modules.items()
            for value in vars(module).values()
            if isinstance(value, triton.KernelInterface) and value.fn.__module__ == module.__name__
        }

    @contextmanager
    def labels(self) -> Iterator[None]:
        """A context in which the profiler sees each call of a kernel under the name of its op.

        It replaces the functions that the modules call. A compiled model has no labels: it would be compiled again."""
        kernels = self.model.kernels
        ops = {op: op for op in kernels.names}
        ops |= {f"{op}_fp8": op for op in EMITTING if getattr(kernels, f"{op}_fp8")}
        labelled = replace(kernels, **{name: _labelled(getattr(kernels, name), op) for name, op in ops.items()})
        callers = [x for module in self.model.modules() for x in (module, getattr(module, "low", None))]
        callers = [x for x in callers if not self.compiled and getattr(x, "kernels", None) is kernels]
        try:
            for caller in callers:
                caller.kernels = labelled
            yield
        finally:
            for caller in callers:
                caller.kernels = kernels

    def costs(self, labelled: bool) -> dict[str, Cost]:
        """Least bytes and FLOPs of each op in a step of this rank, forward and backward together, recomputation not
        counted.

        `matmul` are the linear layers except the head; of FP8 layers the weight gradients. If not `labelled`, ops are
        told apart by their kernels alone, and the products of the head, and low ones without a kernel of ours, are
        among them too. A head in FP8 counts as a layer and a cross-entropy."""
        model, c = self.model, self.model.config
        fp8_head = model.head.low is not None
        half = model.head.copy is not None or fp8_head
        size, passes = self.micro_batch.size, self.micro_batch.share // self.micro_batch.size
        itemsize, rows = 2 if half else 4, size * c.seq_len
        heads = {"B": size, "T": c.seq_len, "S": c.seq_len, "H": c.n_head, "KV": c.n_kv_head}
        heads["D"] = c.head_dim
        head = {"N": rows, "D": c.d_model, "V": c.vocab_size}
        calls = [("attention", heads | {"W": window}) for window in c.windows] + c.n_layer * [("rope", heads)]
        calls += [] if fp8_head else [("linear_cross_entropy", head)]
        if c.norm == "rms":
            fp32_residual = half and model.residual is None
            shape = {"rows": rows, "D": c.d_model, "fp32_residual": fp32_residual}
            calls += (2 * c.n_layer + 1) * [("rmsnorm", shape)]
        if c.activation == "swiglu":
            calls += c.n_layer * [("swiglu", {"rows": rows, "F": c.d_ff})]
        costs = [(op, cost(shape, itemsize)) for op, shape in calls for cost in (OPS[op].cost, OPS[op].backward_cost)]
        for module in model.modules():
            if isinstance(module, Linear) and (fp8_head or module is not model.head):
                costs += _products(module, rows, itemsize)
        if not labelled:
            names = model.kernels.names
            gemms = {op for op in ("fp8_linear", "block_scaled_linear") if names[op] != "triton"}
            costs = [("matmul" if op in gemms | {"linear_cross_entropy"} else op, cost) for op, cost in costs]
        if fp8_head or not labelled:
            costs.append(("cross_entropy", OPS["cross_entropy_in_place"].cost(head | {"codes": fp8_head}, itemsize)))
        costs = [(op, Cost(passes * cost.bytes, passes * cost.flops)) for op, cost in costs]
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            n = sum(local(p).numel() for p in parameters)
            if isinstance(optimizer, Muon):
                costs += [("muon", _orthogonalization(*sorted(parameters[i].shape))) for i in optimizer.owners.mine]
                costs.append(("muon", Cost(8 * n, 0)))  # reads and writes the parameters
            else:
                costs.append(("adamw", OPS["adamw"].cost({"N": 1, "n": n}, 4)))
        totals: dict[str, Cost] = {}
        for op, cost in costs:
            total = totals.get(op, Cost(0, 0))
            totals[op] = Cost(total.bytes + cost.bytes, total.flops + cost.flops)
        return totals


def _products(layer: Linear, rows: int, itemsize: int) -> Iterator[tuple[str, Cost]]:
    """Op and work of the three products of a linear layer: y, dx and dW."""
    n_in, n_out = layer.in_features, layer.out_features
    y, dx = {"rows": rows, "K": n_in, "N": n_out}, {"rows": rows, "K": n_out, "N": n_in}
    dw = {"rows": n_out, "K": rows, "N": n_in, "gradient": 1}
    product = Cost((rows * (n_in + n_out) + n_in * n_out) * itemsize, 2 * rows * n_in * n_out)
    if isinstance(layer.low, BlockScaledLayer):
        bits = {"bits": 4 if layer.low.format is NVFP4 else 8}
        yield from (("block_scaled_linear", OPS["block_scaled_linear"].cost(s | bits, itemsize)) for s in (y, dx, dw))
    elif isinstance(layer.low, FP8Layer):
        yield from (("fp8_linear", OPS["fp8_linear"].cost(s, itemsize)) for s in (y, dx))
        yield "matmul", product
    else:
        yield from [("matmul", product)] * 3


def _orthogonalization(rows: int, columns: int) -> Cost:
    """Muon's work on a matrix that the rank owns: it reads the gradient, reads and writes the momentum, and takes five
    Newton-Schulz iterations."""
    return Cost(12 * rows * columns, 5 * (4 * rows**2 * columns + 2 * rows**3))


def _labelled(function: Callable, op: str) -> Callable:
    @wraps(function)
    def call(*arguments, **options):
        with record_function(op):
            return function(*arguments, **options)

    return call
