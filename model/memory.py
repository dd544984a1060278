"""Predict the memory of a training run, and the largest micro-batch that fits.

The model takes a step on fake tensors, which have shapes and lifetimes and no data, while the bytes of live tensors are
counted. So what the kernels save, half precision halves and `model.recompute` drops needs no formula, and a step of
GPT-2 small takes half a second on any machine, for any device. Rules add what fake tensors do not show:

- What a kernel allocates inside a custom op is its own `workspace` (kernels/spec.py), such as the chunk of logits.
- CUDA graphs and several ranks take more, and divide the state: `_replicated` and `_sharded` have the rules.

The allocator's rounding and fragmentation, the CUDA context and the communicator's buffers are not counted: leave 15%
of a card's memory to them (`USABLE`). Code that torch.compile fuses takes less than what is counted.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from kernels import OPS, KernelChoice, Kernels, bind
from kernels.attention import choice
from kernels.common import cdiv
from kernels.own import is_own
from model.cluster import Shard
from model.evaluate import evaluating
from model.gpt import GPT, ModelConfig
from model.optim import OptimizerConfig, build_optimizers
from runtime.hardware import DTYPES, Precision, autocast

USABLE = 0.85  # fraction of a card's memory for tensors
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a training step, besides the micro-batch.

    shape: the resolved model.
    device: type of the device that the run is for, `cuda`, `cpu` or `mps`. It need not be on this machine.
    residual: dtype of the residual stream, None for that of the weights.
    captured: whether the step runs as CUDA graphs.
    ranks, local_ranks: number of ranks, and of those on one machine.
    shard: `off` (each rank has a replica), `full` (sharded over all ranks) or `hybrid` (over those of a machine).
    """

    shape: ModelConfig
    device: str = "cuda"
    precision: Precision = "bf16"
    residual: torch.dtype | None = torch.bfloat16
    kernels: KernelChoice = KernelChoice()
    optimizer: OptimizerConfig = OptimizerConfig()
    captured: bool = False
    ranks: int = 1
    local_ranks: int = 1
    shard: Shard = "off"

    @property
    def shards(self) -> int:
        """The number of ranks that the model is sharded over."""
        return {"off": 1, "hybrid": self.local_ranks, "full": self.ranks}[self.shard]


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one device. The parts are not all at their maximum at once: `peak` is less than their sum."""

    weights: int  # and buffers, such as the RoPE table
    copies: int  # half-precision copies of weights, which the forward pass multiplies by
    gradients: int
    optimizer: int
    buffers: int  # for communication: gathered parameters, gradients that are not reduced yet
    activations: int  # of one micro-batch: inputs, and what the layers keep for the backward pass
    head: int  # workspace of the head and the loss
    peak: int


@dataclass(frozen=True)
class _Step:
    """A measured step on one device.

    passes: peak of forward and backward passes, beside weights, copies and optimizer state. transient: the same, beside
    the gradients that exist at the time too. update, evaluation: peaks of the optimizers and of a forward pass without
    gradients, beside all of these.
    root, block: numbers of parameters outside the blocks, and of one block."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    momentum: int  # of Muon; the optimizer's bytes include it
    activations: int
    head: int
    passes: int
    transient: int
    update: int
    evaluation: int
    root: int
    block: int


class _Tally(TorchDispatchMode):
    """Counts the bytes of live tensors that were made under it. Random initialisation is skipped, which saves a second.

    `live`: bytes now. `base`: bytes at `restart`. `gradients`: bytes of the gradients, if `count_gradient` is told of
    them. `peak`: maximum of the live bytes beside `base`. `transient`: the same, beside `base` and gradients."""

    def __init__(self):
        super().__init__()
        self._seen = WeakIdKeyDictionary()
        self.live = self.gradients = 0
        self.restart()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.note()
        return result

    def _freed(self, size: int) -> None:
        self.live -= size

    def restart(self) -> None:
        self.base, self.peak, self.transient = self.live, 0, 0

    def note(self, size: int = 0) -> None:
        """Take the current moment into the maxima, with `size` bytes more than the live tensors."""
        self.peak = max(self.peak, self.live - self.base + size)
        self.transient = max(self.transient, self.live - self.base - self.gradients + size)

    def count_gradient(self, parameter: Tensor) -> None:
        """Call after the backward pass has made or added to the gradient of `parameter`."""
        if parameter not in self._seen:
            self._seen[parameter] = True
            self.gradients += parameter.grad.nbytes


def predict(setup: Setup, micro_batch: int, accumulates: bool = False) -> Memory:
    """Memory of a training step on micro-batches of `micro_batch` sequences.

    `accumulates`: whether a step has several micro-batches. Raises `KernelError` as `bind` does. A user's own kernel is
    planned as the one of `auto`.
    """
    by_op = vars(setup.kernels)
    kernels = replace(setup.kernels, **{op: "" if op != "every" else "auto" for op in by_op if is_own(by_op[op])})
    optimizer = OptimizerConfig(optimizer=setup.optimizer.optimizer)  # nothing else of it matters
    alone = Setup(setup.shape, setup.device, setup.precision, setup.residual, kernels, optimizer)
    step = _measure(alone, micro_batch)
    if accumulates:  # all gradients exist from the second micro-batch on
        step = replace(step, passes=step.transient + step.gradients)
    return _replicated(step, setup) if setup.shard == "off" else _sharded(step, setup)


def _replicated(step: _Step, setup: Setup) -> Memory:
    """The step on each rank of DDP, or on a single rank.

    Matrices that Muon updates are shared out: a rank has the momentum of its own, and gets the updates of all in bf16.
    CUDA graphs keep their memory for themselves, so the work between them needs its own: gradients are copied to
    buckets, to be summed over the ranks, and the model is evaluated.
    """
    gathered = step.momentum // 2 if setup.ranks > 1 else 0
    optimizer = step.optimizer - step.momentum + cdiv(step.momentum, setup.ranks)
    buckets = step.gradients if setup.captured and setup.ranks > 1 else 0
    between = max(buckets, step.evaluation) if setup.captured else 0
    update = step.gradients + cdiv(step.update, setup.ranks) + gathered
    peak = step.weights + step.copies + optimizer + max(step.passes, update) + between
    return Memory(step.weights, step.copies, step.gradients, optimizer, buckets, step.activations, step.head, peak)


def _sharded(step: _Step, setup: Setup) -> Memory:
    """The step with fully sharded parameters, gradients and optimizer state (FSDP2).

    The root group (embedding, last norm, head) stays gathered, and the head is copied once more where its rows are
    padded. Of the blocks one computes while the next is gathered, all in the compute dtype; there are no copies.
    Gradients of a block are whole until they are reduced, in float32, while the block before it makes its own. Clipping
    and optimizers work on shards."""
    half = DTYPES[setup.precision].itemsize
    gathered = half * (2 * step.root + 2 * step.block) + 4 * 2 * step.block
    weights, gradients, optimizer, update = (
        cdiv(size, setup.shards) for size in (step.weights, step.gradients, step.optimizer, step.update)
    )
    peak = weights + gradients + optimizer + max(step.transient + gathered, update)
    return Memory(weights, 0, gradients, optimizer, gathered, step.activations, step.head, peak)


def largest_fit(setup: Setup, batch_size: int, limit: int) -> int:
    """The largest micro-batch that fits `limit` bytes and divides `batch_size`, a rank's sequences in a step.

    Returns 0 if there is none."""
    one = predict(setup, 1, batch_size > 1)
    most = (limit - one.weights - one.copies - one.optimizer) // one.activations
    for n in range(min(batch_size, most), 0, -1):
        if batch_size % n == 0 and predict(setup, n, n < batch_size).peak <= limit:
            return n
    return 0


@lru_cache(maxsize=256)
def _measure(setup: Setup, micro_batch: int) -> _Step:
    """Take a step on fake tensors. These are CPU tensors, since a torch without CUDA has no others; the kernels are
    those of the device."""
    kernels, sizes = _kernels(setup), {}

    def head(x: Tensor, weight: Tensor, targets: Tensor, *options, **named) -> Tensor:
        sizes["activations"] = tally.live - tally.base - tally.gradients
        before, tally.transient = tally.transient, 0
        loss = kernels.linear_cross_entropy(x, weight, targets, *options, **named)
        tally.note(kernels.workspace("linear_cross_entropy", x, weight, targets, *options, **named))
        sizes["head"] = tally.transient - sizes["activations"]
        tally.transient = max(tally.transient, before)
        return loss

    with FakeTensorMode(), _Tally() as tally:
        model = GPT(setup.shape, replace(kernels, linear_cross_entropy=head))
        model.residual = setup.residual
        if setup.precision != "fp32":
            model.keep_copies(DTYPES[setup.precision])
        optimizers = build_optimizers(model, setup.optimizer)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(tally.count_gradient)
        tally.restart()
        ids = torch.zeros(micro_batch, setup.shape.seq_len, dtype=torch.int64)
        targets = ids.clone()
        with autocast(CPU, setup.precision):
            loss = model(ids, targets, "sum")
        loss.backward()
        del loss
        sizes |= {"passes": tally.peak, "transient": tally.transient}
        tally.transient = 0
        scale = (1 / get_total_norm([p.grad for p in model.parameters()])).clamp(max=1)
        for optimizer in optimizers:
            optimizer.step(scale)
        sizes["update"] = tally.transient
        training, tally.transient = dict(sizes), 0
        with torch.no_grad(), evaluating(model), autocast(CPU, setup.precision):
            model(ids, targets, "sum")
        sizes = training | {"evaluation": tally.transient - ids.nbytes - targets.nbytes}
        state = [
            (key, x) for optimizer in optimizers for values in optimizer.state.values() for key, x in values.items()
        ]
        copies = [module.copy for module in model.modules() if getattr(module, "copy", None) is not None]
        n_block = sum(p.numel() for p in model.blocks[0].parameters())
        return _Step(
            weights=_bytes([*model.parameters(), *model.buffers()]) - _bytes(copies),
            copies=_bytes(copies),
            gradients=tally.gradients,
            optimizer=_bytes(x for _, x in state),
            momentum=_bytes(x for key, x in state if key == "momentum_buffer"),
            root=model.n_parameters() - len(model.blocks) * n_block,
            block=n_block,
            **sizes,
        )


def _kernels(setup: Setup) -> Kernels:
    """The kernels that the run binds. `auto` attention chooses by the device of its input, which is fake here."""
    kernels = bind(setup.kernels, setup.device)
    if setup.device != "cuda" or kernels.names["attention"] != "auto":
        return kernels

    def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        sizes = q.shape[1], k.shape[1], q.shape[-1]
        name, _ = choice(*sizes, torch.is_grad_enabled(), q.element_size() == 2, **options)
        return OPS["attention"].implementations[name](q, k, v, **options)

    return replace(kernels, attention=attention)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
