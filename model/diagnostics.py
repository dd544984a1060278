"""What goes on inside a step of training: norms and signal by group of parameters, activations and attention's entropy
by block, and how far the gradients of its micro-batches agree.

`Probe.after` gives, as plain numbers:

    gradient     norm of the gradient, before clipping
    parameter    norm of the parameters, before the step
    update       norm of what the step added to them, weight decay included
    ratio        update / parameter; a group of zeros is left out
    snr          Adam's signal to noise: the mean of |m_hat| / sqrt(v_hat), 0 where there has been no gradient; groups
                 of which a part is on Muon, which has no v, are left out
    activation   root mean square of the stream that leaves each block
    entropy      of attention's weights in nats, the mean over sequences, heads and queries; ln n for n equal weights
    noise_scale  tr(Sigma) / |G|^2 in tokens, Sigma the covariance of a token's gradient and G the true gradient: about
                 the batch from which on more tokens stop paying
    coherence    cosine of the gradient of a micro-batch with that of the whole batch, the mean over micro-batches

the first five by group (embedding, position, blocks.0.attention with its QK-norm, blocks.0.feed_forward, ..., norms,
head where it is not the embedding), the next two by the block's index as text. With g_i the gradients of N
micro-batches of b tokens, g their mean and B = N b, the unbiased estimates are

    |G|^2 = (B |g|^2 - b mean |g_i|^2) / (B - b),   tr(Sigma) = (mean |g_i|^2 - |g|^2) / (1/b - 1/B)

One step's are noisy, all the more for a small N: average over steps. Micro-batches are taken to have equally many
targets. Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kernels.attention import scores
from model.evaluate import evaluating
from model.gpt import GPT

SEQUENCES = 4  # that activations and entropy are measured on
QUERIES = 128  # whose weights are held at a time


class Probe:
    """Watches one optimizer step, which it leaves as it is to the last bit.

        probe = Probe(model, optimizers)
        for each micro-batch: ...backward(); probe.accumulated()
        ...unscale and clip; probe.before(); the optimizers' steps
        row = probe.after(ids)

    It holds two copies of the gradients while they accumulate, and one of the parameters over the step. `scale` is what
    losses are multiplied by before their backward (a GradScaler's).
    """

    def __init__(self, model: GPT, optimizers: list[Optimizer], scale: float = 1.0):
        self.model, self.optimizers, self.scale = model, optimizers, scale
        self.groups: dict[str, list[int]] = {}
        self.parameters: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            self.groups.setdefault(_group(name), []).append(len(self.parameters))
            self.parameters.append(parameter)
        self.squares: list[Tensor] = []  # |g_i|^2 of every micro-batch, as they add up in .grad

    @torch.no_grad()
    def accumulated(self) -> None:
        """After each micro-batch's backward: keep the sum of gradients so far, and that of the micro-batches' own
        gradients at length 1, whose product with the whole batch's gradient is N times the coherence."""
        grads = [p.grad for p in self.parameters]
        if not self.squares:
            self.so_far, self.directions = ([torch.zeros_like(g) for g in grads] for _ in range(2))
        for grad, kept in zip(grads, self.so_far, strict=True):
            torch.sub(grad, kept, out=kept)
        norm = torch.linalg.vector_norm(_norms(self.so_far))
        for grad, kept, direction in zip(grads, self.so_far, self.directions, strict=True):
            direction.addcdiv_(kept, norm)
            kept.copy_(grad)
        self.squares.append(norm.square())

    @torch.no_grad()
    def before(self) -> None:
        """Just before the optimizers' steps."""
        self.gradient = _norms(self.so_far)
        products = [torch.dot(d.flatten(), g.flatten()) for d, g in zip(self.directions, self.so_far, strict=True)]
        self.product = torch.stack(products).sum()
        del self.so_far, self.directions
        self.parameter = _norms(self.parameters)
        self.copies = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after(self, ids: Tensor) -> dict[str, Any]:
        """After the step on `ids` `[B, T]`, all of its micro-batches: the measures that this file begins with. The
        first sequences go through the model once more, under the caller's autocast."""
        update = _norms(p - before for p, before in zip(self.parameters, self.copies, strict=True))
        del self.copies
        row = {"gradient": self._by_group(self.gradient / self.scale), "parameter": self._by_group(self.parameter)}
        row["update"] = self._by_group(update)
        row["ratio"] = {k: row["update"][k] / norm for k, norm in row["parameter"].items() if norm}
        row["snr"] = self._snr()
        row |= watch(self.model, ids[:SEQUENCES])
        return row | self._agreement(ids.numel())

    def _by_group(self, norms: Tensor) -> dict[str, float]:
        values = norms.tolist()
        return {group: math.hypot(*(values[i] for i in members)) for group, members in self.groups.items()}

    def _snr(self) -> dict[str, float]:
        sums = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    state = optimizer.state.get(p, {})
                    if "exp_avg_sq" in state and state["step"] > 0:  # 0: fp16 has overflowed in every step
                        (beta1, beta2), t = group["betas"], float(state["step"])
                        v = state["exp_avg_sq"]
                        shares = (state["exp_avg"].abs() / v.sqrt()).masked_fill_(v == 0, 0)
                        sums[p] = shares.sum() * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        snr = {}
        for group, members in self.groups.items():
            parameters = [self.parameters[i] for i in members]
            if all(p in sums for p in parameters):
                snr[group] = sum(sums[p].item() for p in parameters) / sum(p.numel() for p in parameters)
        return snr

    def _agreement(self, tokens: int) -> dict[str, float | None]:
        """None for what a single micro-batch does not tell, and for a noise scale when the noise hides the gradient."""
        n, row = len(self.squares), {"noise_scale": None, "coherence": None}
        if n < 2:
            return row
        norm = math.hypot(*self.gradient.tolist())
        large, small = norm**2, n * sum(torch.stack(self.squares).tolist())  # |g|^2, mean |g_i|^2: .grad has g_i / n
        signal, noise = (n * large - small) / (n - 1), (small - large) / (n - 1) * tokens
        if signal > 0:
            row["noise_scale"] = max(0.0, noise / signal)  # below 0 by rounding only
        coherence = self.product.item() / (n * norm) if norm else math.nan
        if math.isfinite(coherence):
            row["coherence"] = coherence
        return row


def _group(name: str) -> str:
    """The group that a parameter is in, by its name."""
    parts = name.split(".")
    own = parts[:3] if parts[0] == "blocks" else parts[:1]
    return "norms" if own[-1].endswith("norm") else ".".join(own)


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    """`[number of tensors]`, left on their device."""
    return torch.stack([torch.linalg.vector_norm(x) for x in tensors])


@torch.no_grad()
def watch(model: GPT, ids: Tensor) -> dict[str, dict[str, float]]:
    """`activation` and `entropy` of every block for `ids` `[B, T]`, from an evaluation pass of the eager model."""
    squares, entropies = [], []

    def stream(block: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor | None]) -> None:
        said, before = outputs
        squares.append((said if before is None else said + before).float().square().mean())

    def watched(attention: Callable) -> Callable:
        def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, **options: Any) -> Tensor:
            entropies.append(entropy(q, k, **options))
            return attention(q, k, v, dropout=dropout, **options)

        return attend

    kernels = model.kernels
    watching = replace(kernels, attention=watched(kernels.attention))
    hooks = [block.register_forward_hook(stream) for block in model.blocks]
    try:
        for block in model.blocks:
            block.attention.kernels = watching
        with evaluating(model):
            model.hidden(ids.to(model.embedding.weight.device))
    finally:
        for block, hook in zip(model.blocks, hooks, strict=True):
            block.attention.kernels = kernels
            hook.remove()
    values = {"activation": torch.stack(squares).sqrt(), "entropy": torch.stack(entropies)}
    return {key: {str(i): value for i, value in enumerate(of_blocks.tolist())} for key, of_blocks in values.items()}


def entropy(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    window: int = 0,
    documents: Tensor | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Mean entropy, a scalar in nats, of the weights of causal attention of `q` `[B, T, H, D]` to `k` `[B, T, KV, D]`;
    the rest is as `kernels.attention` has it."""
    b, t, h, _ = q.shape
    total = torch.zeros((), device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, t, QUERIES):
            end = min(start + QUERIES, t)
            known = None if documents is None else documents[..., :end]
            of = q[:, start:end].float(), k[:, :end].float()
            logits = scores(*of, scale, window=window, documents=known, softcap=softcap, slopes=slopes)
            total += torch.special.entr(logits.softmax(-1)).sum()
    return total / (b * h * t)
