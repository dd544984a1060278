"""Optimizers and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.gpt import GPT
from model.owners import Owners
from model.tensors import local
from runtime.config import Heading
from runtime.distributed import ALONE, World

Schedule = Literal["constant", "linear", "cosine", "wsd"]
OptimizerName = Literal["adam", "adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    optimization: Heading
    optimizer: Annotated[OptimizerName, "muon is for the blocks' matrices; the other parameters then use adamw"] = (
        "muon"
    )
    lr: Annotated[float, "(0, inf)", "peak learning rate of adam and adamw"] = 3e-3
    muon_lr: Annotated[float, "(0, inf)", "peak learning rate of muon"] = 2e-2
    weight_decay: Annotated[
        float, "[0, inf)", "weight decay of matrices: decoupled for adamw and muon, L2 for adam"
    ] = 0.1
    beta1: Annotated[float, "[0, 1)", "adam and adamw: decay of the first moment"] = 0.9
    beta2: Annotated[float, "[0, 1)", "adam and adamw: decay of the second moment"] = 0.95
    eps: Annotated[float, "(0, inf)", "adam and adamw: added to the denominator"] = 1e-8
    clip: Annotated[float, "[0, inf)", "maximum gradient norm (0: no clipping)"] = 1.0
    learning_rate_schedule: Heading
    schedule: Annotated[Schedule, "after warm-up; wsd is constant, then linear over the last `decay` of the run"] = (
        "linear"
    )
    warmup: Annotated[float, "[0, inf)", "linear warm-up: fraction of the run, or steps if 1 or more"] = 0.02
    decay: Annotated[float, "(0, 1]", "fraction of the run in which wsd decays"] = 0.4
    final_lr: Annotated[float, "[0, 1]", "final learning rate, as a fraction of the peak"] = 0.0


def orthogonalize(x: Tensor) -> Tensor:
    """Bring the singular values of matrices `[..., rows, columns]`, rows <= columns, close to 1 (0.7 to 1.2).

    Five Newton-Schulz iterations with the quintic of Jordan et al., "Muon", 2024, in the dtype of `x`."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class _Optimizer(Optimizer):
    """An optimizer whose step can be captured in CUDA graphs.

    State is allocated at construction, and values that change between steps are tensors on the parameters' device.
    `rates` holds each parameter group's learning rate as such a tensor; `set_lr` sets it and the group's float "lr".
    `copies` maps parameters to half-precision copies (`GPT.keep_copies`), which the step updates too.
    """

    def __init__(self, groups: Iterable[Tensor] | list[dict], copies: dict[Tensor, Tensor], **defaults):
        super().__init__(groups, defaults)
        self.copies = copies
        device = next(p for group in self.param_groups for p in group["params"]).device
        self.rates = [torch.tensor(group["lr"], dtype=torch.float32, device=device) for group in self.param_groups]
        self.no_clipping = torch.ones((), device=device)


class AdamW(_Optimizer):
    """AdamW, or Adam with L2 regularization if `decoupled` is False. Its state is that of `torch.optim.AdamW`.

    `kernel`, an implementation of `kernels.adamw`, computes the update and writes the `copies`.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        kernel: Callable,
        copies: dict[Tensor, Tensor],
        decoupled: bool = True,
    ):
        super().__init__(groups, copies, lr=lr, betas=betas, eps=eps)
        self.kernel, self.decoupled = kernel, decoupled
        self.steps = torch.zeros_like(self.no_clipping)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": self.steps, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Update all parameters that have a gradient; the gradients are multiplied by the scalar `grad_scale`."""
        self.steps += 1
        scale = self.no_clipping if grad_scale is None else grad_scale
        for group, lr in zip(self.param_groups, self.rates, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            moments = ([local(self.state[p][key]) for p in params] for key in ("exp_avg", "exp_avg_sq"))
            values, grads = [local(p) for p in params], [local(p.grad) for p in params]
            tensors = values, grads, *moments, [self.copies.get(p) for p in params]
            constants = *group["betas"], group["eps"], group["weight_decay"], self.decoupled
            self.kernel(*tensors, lr, self.steps, scale, *constants)


class Muon(_Optimizer):
    """Muon for matrices: the orthogonalized update of SGD with Nesterov momentum.

    It equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, except that matrices of one shape, or its
    transpose, are orthogonalized as one batch, in fewer and larger GEMMs. The learning rate is scaled by
    0.2 sqrt(max(rows, columns)): the update then has AdamW's typical RMS, so the two optimizers need similar rates (Liu
    et al., "Muon is Scalable for LLM Training", 2025).

    With several ranks each orthogonalizes the matrices that it owns, and has only their momenta: those of the others
    are on the meta device.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        copies: dict[Tensor, Tensor] | None = None,
        world: World = ALONE,
    ):
        super().__init__(params, copies or {}, lr=lr, weight_decay=weight_decay, momentum=momentum)
        (group,) = self.param_groups
        self.owners = Owners(group["params"], world)
        for i, p in enumerate(group["params"]):
            device = p.device if i in self.owners.mine else "meta"
            self.state[p]["momentum_buffer"] = torch.zeros(p.shape, dtype=p.dtype, device=device)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Update all parameters, which must have gradients; these are multiplied by the scalar `grad_scale`."""
        scale = self.no_clipping if grad_scale is None else grad_scale
        (group,), (lr,), owners = self.param_groups, self.rates, self.owners
        params = group["params"]
        grads, updates = owners.collect([p.grad for p in params]), []
        if grads:  # a rank may own none
            grads = torch._foreach_mul(grads, scale)
            momenta = [self.state[params[i]]["momentum_buffer"] for i in owners.mine]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = _orthogonalized(torch._foreach_lerp(grads, momenta, group["momentum"]), lr)
        updates = owners.spread(updates, torch.bfloat16)
        parts = [local(p) for p in params]
        torch._foreach_mul_(parts, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(parts, updates)
        copied = [p for p in params if p in self.copies]
        if copied:
            torch._foreach_copy_([self.copies[p] for p in copied], copied)


def _orthogonalized(matrices: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Muon's updates from `matrices`, in bfloat16: those of one shape, or its transpose, in one batch."""
    by_shape = defaultdict(list)
    for i, x in enumerate(matrices):
        by_shape[tuple(sorted(x.shape))].append(i)
    updates = {}
    for (rows, columns), indices in by_shape.items():
        wide = [matrices[i] if matrices[i].shape[0] == rows else matrices[i].mT for i in indices]
        batch = orthogonalize(torch.stack(wide).bfloat16()) * (lr * 0.2 * columns**0.5)
        updates |= {i: x if matrices[i].shape[0] == rows else x.mT for i, x in zip(indices, batch, strict=True)}
    return [updates[i] for i in range(len(matrices))]


def build_optimizers(model: GPT, config: OptimizerConfig, world: World = ALONE) -> list[Optimizer]:
    """Return [AdamW], [Adam], or for Muon [AdamW, Muon], where Muon has the blocks' matrices.

    Weight decay applies to matrices only: norm gains start at 1 and biases at 0, and need none. Each parameter group
    stores its peak learning rate in "peak_lr", for `set_lr`. The optimizers update the model's half-precision copies.
    Muon shares its work out over the ranks of `world`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_muon = config.optimizer == "muon"
    matrices = [p for name, p in named if is_muon and p.ndim == 2 and name.startswith("blocks.")]
    on_muon = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in on_muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    copies = model.copies()
    options = {"kernel": model.kernels.adamw, "copies": copies, "decoupled": config.optimizer != "adam"}
    optimizers = [AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, **options)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, config.weight_decay, copies=copies, world=world))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def whole_state(optimizer: Optimizer) -> dict:
    """The optimizer's `state_dict` for a checkpoint. Called on all ranks.

    Momenta that the ranks share out are gathered on rank 0, in host memory; if the model is sharded each keeps its own.
    """
    state = optimizer.state_dict()
    if isinstance(optimizer, Muon):
        gathered = optimizer.owners.gather(momentum["momentum_buffer"] for momentum in state["state"].values())
        state["state"] = {i: {"momentum_buffer": momentum} for i, momentum in enumerate(gathered)}
    return state


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its peak."""
    for optimizer in optimizers:
        for group, rate in zip(optimizer.param_groups, optimizer.rates, strict=True):
            group["lr"] = group["peak_lr"] * factor
            rate.fill_(group["lr"])


def lr_factor(config: OptimizerConfig, progress: float, warmup: float, step: float) -> float:
    """Learning rate of the next optimizer step, as a fraction of the peak.

    `progress` is the fraction of the run that is done, and `step` the fraction that the next step adds. The rate rises
    linearly during `warmup`, a fraction of the run, and the last step of the warm-up has the peak; then it follows
    `config.schedule` down to `config.final_lr`. With `warmup` of 1 or more the whole run is warm-up."""
    if progress < warmup or warmup >= 1:
        return min(1.0, (progress + step) / warmup)
    remaining = (1 - progress) / (1 - warmup)  # of the schedule after warm-up: 1 to 0
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    elif config.schedule == "wsd":
        remaining = min(1.0, (1 - progress) / config.decay)
    return config.final_lr + (1 - config.final_lr) * remaining
