"""The work of a training step by op, and how a profile finds the ops."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps

from torch.optim import Optimizer
from torch.profiler import record_function

from kernels import OPS
from kernels.launch import AVAILABLE, triton
from kernels.spec import Cost
from model.gpt import GPT, Linear
from model.optim import Muon


class StepOps:
    """The ops of a training step: their work, and how a profile finds them (`Ops` of runtime/profile.py)."""

    def __init__(
        self, model: GPT, optimizers: Iterable[Optimizer], batch_size: int, micro_batch: int, compiled: bool = False
    ):
        """Batches are in sequences. `compiled`: the step runs a compiled model, whose modules must not change."""
        self.model, self.optimizers, self.compiled = model, optimizers, compiled
        self.batch_size, self.micro_batch = batch_size, micro_batch

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
        labelled = replace(kernels, **{op: _labelled(getattr(kernels, op), op) for op in kernels.names})
        modules = [m for m in self.model.modules() if not self.compiled and getattr(m, "kernels", None) is kernels]
        try:
            for module in modules:
                module.kernels = labelled
            yield
        finally:
            for module in modules:
                module.kernels = kernels

    def costs(self, labelled: bool) -> dict[str, Cost]:
        """Least bytes and FLOPs of each op in a step, forward and backward together, recomputation not counted.

        `matmul` are the linear layers except the head. If not `labelled`, ops are told apart by their kernels alone,
        and the head's products are among the `matmul` too."""
        model, c = self.model, self.model.config
        half = model.head.copy is not None
        itemsize, rows, passes = 2 if half else 4, self.micro_batch * c.seq_len, self.batch_size // self.micro_batch
        heads = {"B": self.micro_batch, "T": c.seq_len, "S": c.seq_len, "H": c.n_head, "KV": c.n_kv_head}
        heads["D"] = c.head_dim
        head = {"N": rows, "D": c.d_model, "V": c.vocab_size}
        calls = [("linear_cross_entropy", head), *(("attention", heads | {"W": window}) for window in c.windows)]
        calls += c.n_layer * [("rope", heads)]
        if c.norm == "rms":
            fp32_residual = half and model.residual is None
            shape = {"rows": rows, "D": c.d_model, "fp32_residual": fp32_residual}
            calls += (2 * c.n_layer + 1) * [("rmsnorm", shape)]
        if c.activation == "swiglu":
            calls += c.n_layer * [("swiglu", {"rows": rows, "F": c.d_ff})]
        costs = [(op, cost(shape, itemsize)) for op, shape in calls for cost in (OPS[op].cost, OPS[op].backward_cost)]
        for module in model.modules():
            if isinstance(module, Linear) and module is not model.head:
                n_in, n_out = module.in_features, module.out_features
                n_values = rows * (n_in + n_out) + n_in * n_out  # that each of three products reads or writes
                costs.append(("matmul", Cost(3 * n_values * itemsize, 6 * rows * n_in * n_out)))
        if not labelled:
            costs = [("matmul" if op == "linear_cross_entropy" else op, cost) for op, cost in costs]
            costs.append(("cross_entropy", OPS["cross_entropy_in_place"].cost(head, itemsize)))
        costs = [(op, Cost(passes * cost.bytes, passes * cost.flops)) for op, cost in costs]
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if isinstance(optimizer, Muon):
                costs += [("muon", _muon_cost(*sorted(p.shape))) for p in parameters]
            else:
                costs.append(("adamw", OPS["adamw"].cost({"N": 1, "n": sum(p.numel() for p in parameters)}, 4)))
        totals: dict[str, Cost] = {}
        for op, cost in costs:
            total = totals.get(op, Cost(0, 0))
            totals[op] = Cost(total.bytes + cost.bytes, total.flops + cost.flops)
        return totals


def _muon_cost(rows: int, columns: int) -> Cost:
    """Reads a matrix, its gradient and momentum, writes the first and the last; five Newton-Schulz iterations."""
    return Cost(20 * rows * columns, 5 * (4 * rows**2 * columns + 2 * rows**3))


def _labelled(function: Callable, op: str) -> Callable:
    @wraps(function)
    def call(*arguments, **options):
        with record_function(op):
            return function(*arguments, **options)

    return call
