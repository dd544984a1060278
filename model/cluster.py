"""Predict the time of a training step on many cards, from their rated speeds.

    step = passes + exposed communication + optimizer

- passes: the model's FLOPs at `achieved` times the rated FLOP/s. No data sheet says that fraction: `ACHIEVED` has what
  published runs come to.
- communication: bytes of ring collectives over the slowest link, at the fraction `BUS` of its rated speed, and NCCL's
  latency of each hop. What the passes leave no time to hide is exposed, and so are the transfers that have nothing to
  hide behind: the first parameters to be gathered, and the last gradients to be reduced.
- optimizer: the bytes of its state at the memory's rated speed, and for Muon its matrix products.

Not counted: input, logging, checkpoints, slow cards, other jobs on the network, and the loss of speed at micro-batches
too small to fill a card.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from kernels import OPS, KernelChoice, bind
from kernels.common import cdiv
from model.gpt import GPT, ModelConfig
from runtime.hardware import rated_bandwidth, rated_flops

Shard = Literal["off", "full", "hybrid"]

# Fraction of the rated bf16 FLOP/s in forward and backward passes. Published runs, by this model's count of FLOPs:
# GPT-2 1.5B by llm.c on 8 H100 46%, Llama 3 8B by torchtitan on 8 H100 35%, Llama 2 7B by fms-fsdp on 128 A100 52%.
ACHIEVED = 0.45
BUS = 0.8  # of a link's rated speed, as nccl-tests measures on NVLink and InfiniBand (360 of 450 GB/s on 8 H100)
# Seconds that a message takes to the next card, from the constants by which NCCL chooses its algorithms (tuning.cc).
HOP_LINK, HOP_NETWORK = 3.4e-6, 14e-6


@dataclass(frozen=True)
class Card:
    """A card as it is sold in machines of eight. Bytes, and bytes a second in one direction.

    link: to the other cards of its machine. network: the card's share of its machine's network."""

    memory: float
    link: float
    network: float


# From NVIDIA's data sheets, of the cards and of DGX machines: NVLink 3, 4 and 5 carry 300, 450 and 900 GB/s, PCIe 4 and
# 5 carry 32 and 64 GB/s; InfiniBand HDR, NDR and 2 x NDR for each card of a DGX, and 100 Gb/s Ethernet for each machine
# of PCIe cards.
CARDS = {
    "B200": Card(180e9, 900e9, 50e9),
    "H200": Card(141e9, 450e9, 50e9),
    "H100 80GB HBM3": Card(80e9, 450e9, 50e9),
    "H100 PCIe": Card(80e9, 64e9, 1.6e9),
    "A100-SXM4-80GB": Card(80e9, 300e9, 25e9),
    "A100-SXM4-40GB": Card(40e9, 300e9, 25e9),
    "L40S": Card(48e9, 32e9, 1.6e9),
    "L4": Card(24e9, 32e9, 1.6e9),
    "GeForce RTX 4090": Card(24e9, 32e9, 1.6e9),
}


@dataclass(frozen=True)
class Cluster:
    """`cards` cards of one kind, `per_machine` of them in each machine."""

    name: str = "H100 80GB HBM3"
    cards: int = 8
    per_machine: int = 8
    achieved: float = ACHIEVED

    @property
    def card(self) -> Card:
        return CARDS[self.name]

    @property
    def local(self) -> int:
        """Cards of one machine that take part."""
        return min(self.cards, self.per_machine)

    @property
    def machines(self) -> int:
        return cdiv(self.cards, self.per_machine)

    def gather(self, size: float, cards: int | None = None) -> float:
        """Seconds to gather `size` bytes, of which each card has its part, on all of them or on `cards` neighbours.

        Reducing `size` bytes to a part on each takes as long. The ring enters and leaves every machine by all its
        network cards at once."""
        cards = cards or self.cards
        machines, card = cdiv(cards, self.per_machine), self.card
        rate = card.link if machines == 1 else min(card.link, self.per_machine * card.network)
        hops = (cards - machines) * HOP_LINK + (machines if machines > 1 else 0) * HOP_NETWORK
        return (cards - 1) / cards * size / (BUS * rate) + hops if cards > 1 else 0.0

    def reduce(self, size: float) -> float:
        """Seconds to sum `size` bytes on all cards: reduced to parts, which are gathered. NCCL takes trees where the
        latency of a ring would be longer."""
        tree = 2 * ((self.local - 1) * HOP_LINK + math.log2(self.machines) * HOP_NETWORK)
        ring = self.gather(0)
        return 2 * self.gather(size) - 2 * ring + min(2 * ring, tree)

    def reduce_between_machines(self, size: float) -> float:
        """Seconds to sum `size` bytes on the cards that have one place in different machines."""
        if self.machines == 1:
            return 0.0
        bytes_sent = 2 * (self.machines - 1) / self.machines * size
        return bytes_sent / (BUS * self.card.network) + 2 * math.log2(self.machines) * HOP_NETWORK


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model: layers, training FLOPs of a token, parameters of one block, and those outside the blocks;
    FLOPs of Muon's update of one block."""

    layers: int
    flops: int
    block: int
    root: int
    muon: int

    @classmethod
    @cache
    def of(cls, shape: ModelConfig) -> "Sizes":
        """The numbers of the resolved `shape`."""
        with torch.device("meta"):
            model = GPT(shape, bind(KernelChoice("torch")))
        block = list(model.blocks[0].parameters())
        n_block = sum(p.numel() for p in block)
        matrices = [sorted(p.shape) for p in block if p.ndim == 2]
        muon = sum(5 * (4 * rows**2 * columns + 2 * rows**3) for rows, columns in matrices)
        root = model.n_parameters() - shape.n_layer * n_block
        return cls(shape.n_layer, model.flops_per_token(), n_block, root, muon)

    @property
    def parameters(self) -> int:
        return self.root + self.layers * self.block


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. `communication` is all of it, and `exposed` the part that adds to the step."""

    passes: float
    communication: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.passes + self.exposed + self.optimizer


def step_time(
    shape: ModelConfig,
    cluster: Cluster,
    micro_batch: int,
    micro_batches: int = 1,
    shard: Shard = "off",
    optimizer: str = "adamw",
    captured: bool = False,
) -> StepTime:
    """Predict a step in bf16, in which each card takes `micro_batches` of `micro_batch` sequences."""
    sizes = Sizes.of(shape)
    speed = cluster.achieved * rated_flops(cluster.name)
    again = 1 + shape.recompute / 3  # the forward is a third
    one_pass = micro_batch * shape.seq_len * sizes.flops * again / speed
    if shard == "off":
        communication, exposed = _replicated(sizes, cluster, 2 / 3 * one_pass, captured)
    else:
        cards = cluster.cards if shard == "full" else cluster.local
        communication, exposed = _sharded(sizes, cluster, cards, one_pass)
        communication, exposed = micro_batches * communication, micro_batches * exposed
    update, gathered = _update(sizes, cluster, shard, optimizer, speed)
    return StepTime(micro_batches * one_pass, communication + gathered, exposed + gathered, update)


def _replicated(sizes: Sizes, cluster: Cluster, backward: float, captured: bool) -> tuple[float, float]:
    """Seconds of communication of DDP, and of these the exposed ones. Float32 gradients are summed once a step, during
    the last backward pass; but those of the embedding, which come at its end, after it, and all after a captured
    one."""
    last, blocks = cluster.reduce(4 * sizes.root), cluster.reduce(4 * sizes.layers * sizes.block)
    hidden = 0.0 if captured else min(blocks, backward)
    return last + blocks, last + blocks - hidden


def _sharded(sizes: Sizes, cluster: Cluster, cards: int, one_pass: float) -> tuple[float, float]:
    """Seconds of communication of FSDP2 in one micro-batch, and of these the exposed ones. Each block's bf16 parameters
    are gathered for the forward and again for the backward, while the block before it computes. Its float32 gradients
    are reduced while the next computes; between machines too, if each has all parameters."""

    def reduce(parameters: int) -> float:
        between = cluster.reduce_between_machines(4 * parameters / cards) if cards < cluster.cards else 0.0
        return cluster.gather(4 * parameters, cards) + between

    root, block = cluster.gather(2 * sizes.root, cards), cluster.gather(2 * sizes.block, cards)
    reduce_root, reduce_block = reduce(sizes.root), reduce(sizes.block)
    communication = root + reduce_root + sizes.layers * (2 * block + reduce_block)
    edges = root + block + reduce_block + reduce_root  # before the first block computes, and after the last
    return communication, edges + max(0.0, communication - edges - one_pass)


def _update(sizes: Sizes, cluster: Cluster, shard: Shard, optimizer: str, speed: float) -> tuple[float, float]:
    """Seconds of the optimizers, and of their communication."""
    shards = {"off": 1, "full": cluster.cards, "hybrid": cluster.local}[shard]
    of_adamw = sizes.root if optimizer == "muon" else sizes.parameters
    seconds = OPS["adamw"].cost({"N": 1, "n": of_adamw / shards}, 4).bytes / rated_bandwidth(cluster.name)
    if optimizer != "muon":
        return seconds, 0.0
    cards = cluster.cards if shard == "off" else shards  # that share out the matrices
    seconds += sizes.layers * sizes.muon / min(cards, 4 * sizes.layers) / speed
    n = sizes.layers * sizes.block
    if shard == "off":  # the updates, in bf16, are gathered
        return seconds, cluster.gather(2 * n)
    return seconds, cluster.gather(6 * n, cards) / cards  # float32 gradients go to the owners, and updates back
