"""Plan a training run on many cards before it starts: what fits, how fast it is. A prediction, not a measurement.

    python -m model.plan --config gpt2_124m.py --card H100 --cards 8
    python -m model.plan --table

Memory is predicted by model/memory.py, and speed by the rules of model/cluster.py.
"""

import runtime  # noqa: F401 - checks the environment before torch is imported

# isort: split

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from data.batches import micro_batch_size
from data.prepare import DataConfig
from kernels import KernelChoice, KernelError
from model.cluster import ACHIEVED, CARDS, Cluster, Sizes, StepTime, step_time
from model.gpt import ModelConfig
from model.memory import USABLE, Memory, Setup, largest_fit, predict
from model.optim import OptimizerConfig
from runtime.config import ConfigError, build, flatten, knobs, read_file, read_flags
from runtime.hardware import rated_flops
from runtime.program import leave, program

CONFIGS = Path(__file__).parents[1] / "configs"
# Layers, heads and width of the table's models: 0.12 to 6.6 billion parameters with a vocabulary of 50,304.
TABLE_MODELS = ((12, 12, 768), (24, 16, 1024), (24, 16, 2048), (32, 32, 4096))
TABLE_CARDS = (8, 32, 128, 512, 1024)
TABLE_BATCH = 4096  # sequences of 1,024 tokens: the 4 million tokens of Llama 2


@dataclass(frozen=True)
class Options(OptimizerConfig):
    """What a plan is of: options of train.py by the same names, and the cards."""

    config: Annotated[str, "config file, looked up as a path and then in configs/"] = "gpt2_124m.py"
    card: Annotated[str, "the cards, by a part of their name"] = "H100"
    cards: Annotated[int, "[1, 1048576]", "number of cards"] = 8
    per_machine: Annotated[int, "[1, 1024]", "cards of a machine"] = 8
    achieved: Annotated[float, "(0, 1]", "fraction of the rated FLOP/s in forward and backward passes"] = ACHIEVED
    table: Annotated[bool, "a table of 8 to 1,024 cards and 0.1 to 7 billion parameters, in place of one plan"] = False
    shard: Annotated[Literal["off", "full", "hybrid"], "as in train.py"] = "off"
    batch_size: Annotated[int, "[1, inf)", "sequences per optimizer step, of all cards"] = 32
    micro_batch: Annotated[
        Literal["auto"] | int, "[1, inf)", "sequences per pass on a card (auto: the most that are predicted to fit)"
    ] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "autocast dtype"] = "auto"
    capture: Annotated[Literal["auto", "on", "off"], "run the step as CUDA graphs"] = "auto"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    kernels: KernelChoice = KernelChoice()


def read_options(argv: list[str]) -> Options:
    """Defaults < config file < flags. What only training needs is dropped from the file. Raises `ConfigError`."""
    flags = read_flags(Options, argv, __doc__.partition("\n")[0])
    assigned = flatten(Options, read_file(flags.get("config", Options.config), CONFIGS))
    return build(Options, {key: value for key, value in assigned.items() if key in knobs(Options)} | flags)


def cluster_of(options: Options) -> Cluster:
    name = next((name for name in CARDS if options.card.lower() in name.lower()), None)
    if name is None:
        raise ConfigError(f"no card called {options.card!r}; there are {', '.join(CARDS)}")
    return Cluster(name, options.cards, options.per_machine, options.achieved)


@dataclass(frozen=True)
class Plan:
    """A prediction for a cluster: memory and time of a step, or None where not even one sequence fits."""

    setup: Setup
    cluster: Cluster
    batch_size: int
    micro_batch: int
    memory: Memory
    time: StepTime

    @property
    def tok_s(self) -> float:
        return self.batch_size * self.setup.shape.seq_len / self.time.total

    @property
    def mfu(self) -> float:
        peak = self.cluster.cards * rated_flops(self.cluster.name)
        return self.tok_s * Sizes.of(self.setup.shape).flops / peak


def plan(setup: Setup, cluster: Cluster, batch_size: int, micro_batch: int | Literal["auto"] = "auto") -> Plan | None:
    """Plan a run of `setup` on the cards of `cluster`, with the largest micro-batch that fits if `micro_batch` is auto.

    Returns None if none does. Raises `DataError` if the cards cannot share the batch in such micro-batches.
    """
    micro_batch_size(batch_size, micro_batch, cluster.cards)
    own = batch_size // cluster.cards
    setup = replace(setup, ranks=cluster.cards, local_ranks=cluster.local)
    limit = int(USABLE * cluster.card.memory)
    if micro_batch == "auto":
        micro_batch = largest_fit(setup, own, limit)
    if not micro_batch:
        return None
    memory = predict(setup, micro_batch, micro_batch < own)
    passes = own // micro_batch
    time = step_time(setup.shape, cluster, micro_batch, passes, setup.shard, setup.optimizer.optimizer, setup.captured)
    return Plan(setup, cluster, batch_size, micro_batch, memory, time)


def setup_of(options: Options, shape: ModelConfig) -> Setup:
    """The setup of a run on GPUs, which chooses as train.py does there."""
    precision = "bf16" if options.precision == "auto" else options.precision
    captured = options.capture != "off" and options.shard == "off" and precision != "fp16"
    residual = torch.bfloat16 if precision == "bf16" else None
    return Setup(shape, "cuda", precision, residual, options.kernels, options, captured, shard=options.shard)


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def describe(options: Options) -> list[str]:
    """The lines of one plan."""
    shape = options.model.resolved(options.data.expected_vocab_size, options.data.separator)
    cluster, setup = cluster_of(options), setup_of(options, shape)
    found = plan(setup, cluster, options.batch_size, options.micro_batch)
    room = f"{gib(USABLE * cluster.card.memory)}, {USABLE:.0%} of a card"
    lines = [
        f"PREDICTION, not a measurement, with {cluster.achieved:.0%} of the rated FLOP/s in the passes",
        f"model          {shape.n_parameters():,} parameters, {options.optimizer}, {setup.precision}",
        f"cards          {cluster.cards:,} x {cluster.name}, {cluster.per_machine} a machine, shard {options.shard}",
    ]
    if found is None:
        smallest = predict(replace(setup, ranks=cluster.cards, local_ranks=cluster.local), 1).peak
        return [*lines, f"memory         does not fit: one sequence takes {gib(smallest)} of {room}"]
    parts = [f"{name} {gib(size)}" for name, size in vars(found.memory).items() if name != "peak" and size]
    fits = "fits" if found.memory.peak <= USABLE * cluster.card.memory else "does not fit"
    time = found.time
    return [
        *lines,
        f"micro-batch    {found.micro_batch} sequences of {shape.seq_len:,} tokens",
        f"memory         {gib(found.memory.peak)} {fits} {room}; {', '.join(parts)}",
        f"step           {time.total:.3f} s: passes {time.passes:.3f}, optimizer {time.optimizer:.3f}, "
        f"exposed communication {time.exposed:.3f} of {time.communication:.3f}",
        f"speed          {found.tok_s:,.0f} tok/s, {found.tok_s / cluster.cards:,.0f} a card, MFU {found.mfu:.1%}",
    ]


def table(options: Options) -> Iterator[str]:
    """The lines of the table, as they are known."""
    card = cluster_of(options).name
    yield f"PREDICTION, not a measurement: {card}, {options.per_machine} a machine, {options.optimizer}, bf16, "
    yield f"steps of {TABLE_BATCH:,} x 1,024 tokens, {options.achieved:.0%} of the rated FLOP/s in the passes"
    yield ""
    yield "| parameters | cards | shard | micro-batch | memory | tok/s | a card | MFU | exposed communication |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for n_layer, n_head, d_model in TABLE_MODELS:
        shape = ModelConfig(n_layer=n_layer, n_head=n_head, d_model=d_model).resolved(50304)
        for cards in TABLE_CARDS:
            for shard in ("off", "full", "hybrid") if cards > options.per_machine else ("off", "full"):
                cluster = replace(cluster_of(options), cards=cards)
                found = plan(setup_of(replace(options, shard=shard), shape), cluster, TABLE_BATCH)
                yield f"| {shape.n_parameters() / 1e9:.2f}B | {cards:,} | {shard} | " + row(found)


def row(found: Plan | None) -> str:
    if found is None:
        return "does not fit | | | | | |"
    cards, time = found.cluster.cards, found.time
    speed = f"{found.tok_s:,.0f} | {found.tok_s / cards:,.0f} | {found.mfu:.1%} | {time.exposed / time.total:.1%} |"
    return f"{found.micro_batch} | {gib(found.memory.peak)} | {speed}"


@program
def main(argv: list[str]) -> int:
    options = read_options(argv)
    try:
        for line in table(options) if options.table else describe(options):
            print(line, flush=True)
    except KernelError as error:
        raise ConfigError(str(error)) from error
    return 0


if __name__ == "__main__":
    leave(main())
