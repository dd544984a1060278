"""Optimisers and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Schedule = Literal["constant", "linear", "cosine", "wsd"]
OptimizerName = Literal["adam", "adamw", "muon"]


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices `[..., rows, columns]`, rows <= columns, with their singular values taken to about 1 (0.7 to 1.2): five
    Newton-Schulz steps of the quintic of Jordan et al., "Muon", 2024, in the dtype of `x`."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(Optimizer):
    """Nesterov's momentum, orthogonalised, on matrices: `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but
    that matrices of one size, transposed or not, are orthogonalised as one stack, in fewer and larger products.

    Its rate is scaled by 0.2 sqrt(max(rows, columns)), which gives its update AdamW's usual RMS, so that the two rates
    are alike in size (Liu et al., "Muon is Scalable for LLM Training", 2025).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, momenta, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            alike = defaultdict(list)
            for p, update in zip(params, updates, strict=True):
                rows, columns = sorted(p.shape)
                wide = (p, update) if p.shape[0] == rows else (p.mT, update.mT)
                alike[rows, columns].append(wide)
            for (_, columns), pairs in alike.items():
                wide, updates = zip(*pairs, strict=True)
                stack = orthogonalised(torch.stack(updates).bfloat16())
                torch._foreach_add_(wide, stack.unbind(), alpha=-group["lr"] * 0.2 * columns**0.5)


def build_optimizers(
    model: nn.Module,
    name: OptimizerName,
    lr: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> list[Optimizer]:
    """AdamW on everything, or Muon on the matrices of the blocks and AdamW on the rest; or Adam, whose weight decay is
    part of the gradient where theirs is decoupled.

    Weight decay is on matrices only: on a gain it would pull towards 0, which is not where a gain starts. Each
    parameter group keeps its peak in `peak_lr`, which `set_lr` scales.
    """
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    hidden = [p for key, p in named if p.ndim == 2 and key.startswith("blocks.")] if name == "muon" else []
    taken = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    optimizers: list[Optimizer] = [adam(groups, lr=lr, betas=betas, eps=eps, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, muon_lr, weight_decay))
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
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def lr_factor(schedule: Schedule, progress: float, warmup: float, decay: float, final: float) -> float:
    """The share of the peak learning rate to use.

    Args:
        schedule: the shape after warm-up. `wsd` is constant and then linear over the last `decay` of the run.
        progress: share of the run that is done, 0 to 1.
        warmup: share of the run over which the rate rises linearly from 0; from 1 on the peak is not passed.
        decay: share of the run that `wsd` decays over.
        final: share of the peak at progress 1, for every schedule but `constant`.
    """
    if progress < warmup or warmup >= 1:
        return progress / warmup
    left = (1 - progress) / (1 - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    elif schedule == "wsd":
        left = min(1.0, (1 - progress) / decay)
    return final + (1 - final) * left
