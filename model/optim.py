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

Schedule = Literal["constant", "linear", "cosine", "wsd"]
OptimizerName = Literal["adam", "adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its learning rate over the run."""

    optimizer: Annotated[OptimizerName, "muon trains the matrices of the blocks, adamw the rest"] = "muon"
    lr: Annotated[float, "(0, inf)", "peak learning rate of adam and adamw"] = 3e-3
    muon_lr: Annotated[float, "(0, inf)", "peak learning rate of muon"] = 2e-2
    weight_decay: Annotated[
        float, "[0, inf)", "weight decay of matrices: decoupled for adamw and muon, L2 for adam"
    ] = 0.1
    beta1: Annotated[float, "[0, 1)", "adam and adamw: decay of the first moment"] = 0.9
    beta2: Annotated[float, "[0, 1)", "adam and adamw: decay of the second moment"] = 0.95
    eps: Annotated[float, "(0, inf)", "adam and adamw: added to the denominator"] = 1e-8
    clip: Annotated[float, "[0, inf)", "gradient norm to clip to (0: none)"] = 1.0
    # the learning rate over the run
    schedule: Annotated[Schedule, "after warm-up; wsd is constant, then linear over the last `decay`"] = "linear"
    warmup: Annotated[float, "[0, inf)", "share of the run in which the rate rises linearly; from 1 on, steps"] = 0.02
    decay: Annotated[float, "(0, 1]", "share of the run in which wsd falls"] = 0.4
    final_lr: Annotated[float, "[0, 1]", "share of the peak at the end"] = 0.0


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices `[..., rows, columns]`, rows <= columns, with their singular values taken to about 1 (0.7 to 1.2): five
    Newton-Schulz steps of the quintic of Jordan et al., "Muon", 2024, in the dtype of `x`."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class _Optimizer(Optimizer):
    """An optimizer whose step a CUDA graph can replay: its state is there from the start, and what changes from step to
    step is read from tensors on the parameters' device. `rates` holds the learning rate of each parameter group, which
    `set_lr` writes; a group's own "lr" is the same as a float."""

    def __init__(self, groups: Iterable[Tensor] | list[dict], copies: dict[Tensor, Tensor], **defaults):
        super().__init__(groups, defaults)
        self.copies = copies
        device = next(p for group in self.param_groups for p in group["params"]).device
        self.rates = [torch.tensor(group["lr"], dtype=torch.float32, device=device) for group in self.param_groups]
        self.no_clipping = torch.ones((), device=device)


class AdamW(_Optimizer):
    """AdamW, or Adam with `decoupled=False`: its weight decay is part of the gradient. `torch.optim.AdamW`'s state.

    The update is `kernel`'s, an implementation of `kernels.adamw`, which also writes the weights' `copies`: tensors by
    parameter, in the dtype that products are made in, with as many elements.
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

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            self.steps.copy_(state["step"])
            state["step"] = self.steps

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, multiplied by `grad_scale` first."""
        self.steps += 1
        scale = self.no_clipping if grad_scale is None else grad_scale
        for group, lr in zip(self.param_groups, self.rates, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            moments = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq"))
            lists = params, [p.grad for p in params], *moments, [self.copies.get(p) for p in params]
            constants = *group["betas"], group["eps"], group["weight_decay"], self.decoupled
            self.kernel(*lists, lr, self.steps, scale, *constants)


class Muon(_Optimizer):
    """Nesterov momentum, orthogonalised, for matrices: `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, except
    that matrices of one size, transposed or not, are orthogonalised as one batch, in fewer and larger products.

    Its rate is scaled by 0.2 sqrt(max(rows, columns)), which gives its update AdamW's usual RMS, so that the two rates
    are alike in size (Liu et al., "Muon is Scalable for LLM Training", 2025). `copies` are as of `AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        copies: dict[Tensor, Tensor] | None = None,
    ):
        super().__init__(params, copies or {}, lr=lr, weight_decay=weight_decay, momentum=momentum)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, multiplied by `grad_scale` first."""
        scale = self.no_clipping if grad_scale is None else grad_scale
        for group, lr in zip(self.param_groups, self.rates, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            grads = torch._foreach_mul([p.grad for p in params], scale)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            same_size = defaultdict(list)
            for p, update in zip(params, updates, strict=True):
                rows, columns = sorted(p.shape)
                wide = (p, update) if p.shape[0] == rows else (p.mT, update.mT)
                same_size[rows, columns].append(wide)
            for (_, columns), pairs in same_size.items():
                wide, updates = zip(*pairs, strict=True)
                batch = orthogonalised(torch.stack(updates).bfloat16())
                torch._foreach_sub_(wide, (batch * (lr * 0.2 * columns**0.5)).unbind())
            copied = [p for p in params if p in self.copies]
            if copied:
                torch._foreach_copy_([self.copies[p] for p in copied], copied)


def build_optimizers(model: GPT, config: OptimizerConfig) -> list[Optimizer]:
    """AdamW on everything, or Muon on the matrices of the blocks and AdamW on the rest; or Adam.

    Weight decay is on matrices only: on a gain it would pull towards 0, which is not where a gain starts. Each
    parameter group keeps its peak in `peak_lr`, which `set_lr` scales. The model's copies are kept up to date.
    """
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    hidden = [p for key, p in named if p.ndim == 2 and key.startswith("blocks.")] if config.optimizer == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    copies = model.copies()
    options = {"kernel": model.kernels.adamw, "copies": copies, "decoupled": config.optimizer != "adam"}
    optimizers = [AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, **options)]
    if hidden:
        optimizers.append(Muon(hidden, config.muon_lr, config.weight_decay, copies=copies))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def load_optimizers(optimizers: list[Optimizer], states: list[dict]) -> None:
    """Restore moments and step counts; rates and decays stay as now configured."""
    for optimizer, state in zip(optimizers, states, strict=True):
        configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for optimizer in optimizers:
        for group, rate in zip(optimizer.param_groups, optimizer.rates, strict=True):
            group["lr"] = group["peak_lr"] * factor
            rate.fill_(group["lr"])


def lr_factor(config: OptimizerConfig, progress: float, warmup: float) -> float:
    """The factor of the peak learning rate at `progress`, the share of the run that is done, 0 to 1.

    It rises linearly from 0 over `warmup`, a share of the run (from 1 on the peak is not passed), then follows
    `config.schedule` to `config.final_lr` at the end."""
    if progress < warmup or warmup >= 1:
        return progress / warmup
    left = (1 - progress) / (1 - warmup)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    elif config.schedule == "wsd":
        left = min(1.0, (1 - progress) / config.decay)
    return config.final_lr + (1 - config.final_lr) * left
