"""Diagnostics of a training step: norms by parameter group, activations and attention entropy by block, and the
gradient noise scale.

`Probe.after_step` returns these measures as floats:

    gradient     gradient norm before clipping
    parameter    parameter norm before the step
    update       norm of the step's change of the parameters, weight decay included
    ratio        update / parameter; groups that are all zeros are left out
    snr          signal-to-noise ratio of Adam: mean of |m_hat| / sqrt(v_hat), with 0 for elements that never had a
                 gradient; groups with parameters on Muon, which has no v, are left out
    activation   root mean square of the residual stream after each block
    entropy      entropy of the attention weights in nats, mean over sequences, heads and queries; ln n if n are equal
    noise_scale  tr(Sigma) / |G|^2 in tokens, where Sigma is the covariance of one token's gradient and G is the true
                 gradient: roughly the critical batch size, beyond which larger batches hardly help
    coherence    cosine similarity between a micro-batch's gradient and the whole batch's, mean over micro-batches

The first five are by parameter group: embedding, position, blocks.0.attention (with its QK-norm),
blocks.0.feed_forward, ..., norms, and head if untied. The next two are by block, with the index as a string.

Let g_i be the gradients of N micro-batches of b tokens, g their mean, and B = N b. The unbiased estimates are

    |G|^2 = (B |g|^2 - b mean |g_i|^2) / (B - b),   tr(Sigma) = (mean |g_i|^2 - |g|^2) / (1/b - 1/B)

A single step's estimate is noisy, especially for small N; average over steps. All micro-batches are assumed to have the
same number of targets. Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kernels.attention import scores
from model.evaluate import evaluating
from model.gpt import GPT
from model.tensors import local, norms, shard_group, summed
from runtime.distributed import ALONE, World

SEQUENCES = 4  # sequences of the batch to measure activations and entropy on
QUERY_CHUNK = 128  # queries whose attention weights are in memory at a time


class Probe:
    """Measures one optimizer step, without changing its result in any bit.

        probe = Probe(model, optimizers)
        probe.before_backward()
        for each micro-batch: ...backward(); probe.after_backward()
        ...sum the gradients over the ranks; probe.before_step(); unscale, clip and step
        row = probe.after_step(ids)

    All ranks of a sharded model call it, and each measures its part. It holds two copies of the gradients during
    accumulation, and one of the parameters during the step. `scale` is the factor of the losses (a GradScaler's scale).
    """

    def __init__(self, model: GPT, optimizers: list[Optimizer], scale: float = 1.0, world: World = ALONE):
        self.model, self.optimizers, self.scale, self.world = model, optimizers, scale, world
        self.groups: dict[str, list[int]] = {}
        self.parameters: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            self.groups.setdefault(_group(name), []).append(len(self.parameters))
            self.parameters.append(parameter)
        self.group = shard_group(self.parameters[0])
        # FSDP2 sums the gradients of a micro-batch at once: its ranks' micro-batches count as one.
        self.apart = world if self.group is None else ALONE
        self.squares: list[Tensor] = []  # |g_i|^2 of every micro-batch, scaled as in .grad

    def before_backward(self) -> None:
        """Call before the first micro-batch, also when the step begins anew."""
        self.squares.clear()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Call after the backward pass of each micro-batch.

        Updates `total`, the accumulated gradient, and `directions`, the sum of the micro-batches' unit gradients. The
        dot product of the two is N |g| times the coherence."""
        grads = [local(p.grad) for p in self.parameters]
        if not self.squares:
            self.total, self.directions = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        # The difference to the previous total is this micro-batch's own gradient. It is computed in place.
        for grad, total in zip(grads, self.total, strict=True):
            torch.sub(grad, total, out=total)
        norm = torch.linalg.vector_norm(norms(self.total, self.group))
        for grad, total, direction in zip(grads, self.total, self.directions, strict=True):
            direction.addcdiv_(total, norm)
            total.copy_(grad)
        self.squares.append(norm.square())

    @torch.no_grad()
    def before_step(self) -> None:
        """Call when the gradients of the whole batch are there, before they are unscaled."""
        grads = [local(p.grad) for p in self.parameters]
        self.gradient_norms = norms(grads, self.group)
        dots = [torch.dot(d.flatten(), g.flatten()) for d, g in zip(self.directions, grads, strict=True)]
        self.direction_dot = summed(torch.stack(dots).sum(), self.group)
        del self.total, self.directions
        parameters = [local(p.detach()) for p in self.parameters]
        self.parameter_norms = norms(parameters, self.group)
        self.previous_parameters = [p.clone() for p in parameters]

    @torch.no_grad()
    def after_step(self, ids: Tensor) -> dict[str, Any]:
        """Call after the step on `ids` `[B, T]`, this rank's rows of the batch. Returns the measures listed at the top.

        Activations and entropy take a forward pass of the first sequences, under the caller's autocast."""
        pairs = zip(self.parameters, self.previous_parameters, strict=True)
        update_norms = norms((local(p) - previous for p, previous in pairs), self.group)
        del self.previous_parameters
        row = {"gradient": self._by_group(self.gradient_norms / self.scale)}
        row["parameter"], row["update"] = self._by_group(self.parameter_norms), self._by_group(update_norms)
        row["ratio"] = {k: row["update"][k] / norm for k, norm in row["parameter"].items() if norm}
        row["snr"] = self._snr()
        row |= block_statistics(self.model, ids[:SEQUENCES])
        return row | self._agreement(ids.numel() * self.world.size)

    def _by_group(self, norms: Tensor) -> dict[str, float]:
        """Combine the norms of parameters `[number of parameters]` into norms of groups."""
        values = norms.tolist()
        return {group: math.hypot(*(values[i] for i in members)) for group, members in self.groups.items()}

    def _snr(self) -> dict[str, float]:
        """Adam's signal-to-noise ratio by group."""
        sums = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = optimizer.state.get(p, {})
                    if "exp_avg_sq" in state and state["step"] > 0:  # 0 if fp16 overflowed in every step
                        (beta1, beta2), t = group["betas"], float(state["step"])
                        m, v = local(state["exp_avg"]), local(state["exp_avg_sq"])
                        ratios = (m.abs() / v.sqrt()).masked_fill_(v == 0, 0)
                        sums[p] = summed(ratios.sum(), self.group) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        snr = {}
        for group, members in self.groups.items():
            parameters = [self.parameters[i] for i in members]
            if all(p in sums for p in parameters):
                snr[group] = sum(sums[p].item() for p in parameters) / sum(p.numel() for p in parameters)
        return snr

    def _agreement(self, tokens: int) -> dict[str, float | None]:
        """Noise scale and coherence of a batch of `tokens` tokens.

        Both are None for a single micro-batch. The noise scale is also None if the estimate of |G|^2 is not positive.
        """
        n, row = len(self.squares) * self.apart.size, {"noise_scale": None, "coherence": None}
        if n < 2:
            return row
        norm = math.hypot(*self.gradient_norms.tolist())
        squares, dot = self.apart.sum(sum(torch.stack(self.squares).tolist()), self.direction_dot.item())
        large, small = norm**2, n * squares  # |g|^2, mean |g_i|^2; .grad has g_i / n
        signal, noise = (n * large - small) / (n - 1), (small - large) / (n - 1) * tokens  # |G|^2, tr(Sigma)
        if signal > 0:
            row["noise_scale"] = max(0.0, noise / signal)  # rounding may make it negative
        coherence = dot / (n * norm) if norm else math.nan
        if math.isfinite(coherence):
            row["coherence"] = coherence
        return row


def _group(name: str) -> str:
    """The group of a parameter, from its name."""
    parts = name.split(".")
    module = parts[:3] if parts[0] == "blocks" else parts[:1]
    return "norms" if module[-1].endswith("norm") else ".".join(module)


@torch.no_grad()
def block_statistics(model: GPT, ids: Tensor) -> dict[str, dict[str, float]]:
    """`activation` and `entropy` of every block for `ids` `[B, T]`, from a forward pass in evaluation mode, eagerly."""
    mean_squares, entropies = [], []

    def record_activation(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor | None]) -> None:
        x, residual = outputs
        mean_squares.append((x if residual is None else x + residual).float().square().mean())

    def recording_entropy(attention: Callable) -> Callable:
        def wrapper(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, **options: Any) -> Tensor:
            entropies.append(entropy(q, k, **options))
            return attention(q, k, v, dropout=dropout, **options)

        return wrapper

    kernels = model.kernels
    recording = replace(kernels, attention=recording_entropy(kernels.attention))
    hooks = [block.register_forward_hook(record_activation) for block in model.blocks]
    try:
        for block in model.blocks:
            block.attention.kernels = recording
        with evaluating(model):
            model.hidden(ids.to(model.embedding.weight.device))
    finally:
        for block, hook in zip(model.blocks, hooks, strict=True):
            block.attention.kernels = kernels
            hook.remove()
    measures = {"activation": torch.stack(mean_squares).sqrt(), "entropy": torch.stack(entropies)}
    return {key: {str(i): value for i, value in enumerate(values.tolist())} for key, values in measures.items()}


def entropy(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Mean entropy (a scalar, in nats) of the causal attention weights of `q` `[B, T, H, D]` and `k` `[B, T, KV, D]`.

    The other arguments are those of `kernels.attention`."""
    b, t, h, _ = q.shape
    total = torch.zeros((), device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, t, QUERY_CHUNK):
            end = min(start + QUERY_CHUNK, t)
            visible_documents = None if documents is None else documents[..., :end]
            options = {"window": window, "documents": visible_documents, "softcap": softcap, "slopes": slopes}
            logits = scores(q[:, start:end].float(), k[:, :end].float(), scale, **options)
            total += torch.special.entr(logits.softmax(-1)).sum()
    return total / (b * h * t)
