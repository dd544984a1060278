"""How much memory a run takes: planned before it begins, and found out by growing the micro-batch until none is left.

    python -m experiments.memory --scale tiny --cap 600MB

The plan is measured, not typed. A step is taken on fake tensors, which have shapes and lifetimes and no data, while the
bytes of those that live are tallied: whatever the kernels save, the precision halves or `model.recompute` drops is thus
counted as it is, in a fraction of a second. Three things do not show that way. The Triton head's chunk of logits, which
lives inside the op, is added from its own count. Code that Inductor fuses keeps less than what was counted, where
torch's own kernels are chosen. And allocators round up, and break their memory into pieces.

The frontier is bisected: the largest micro-batch of which three steps fit, each probe a process of its own, and all of
them in the ledger, so that an interrupted search asks nothing twice. On a GPU the card is the limit. On a CPU it is a
declared cap on the process's private writable memory (Linux's RLIMIT_DATA). It acts where memory is asked for, so that
torch fails an allocation, as on a card, and the run records `oom`. What the cap does not count is the shared code of
libraries, a hundred MB or more of the resident memory that a CPU run records.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import train
from experiments import ledger
from experiments import run as runner
from experiments.spec import Knobs, Outcome, Results, Scale, Trial
from kernels import KernelError, bind
from model.evaluate import evaluating
from model.gpt import GPT
from model.optim import build_optimizers
from runtime import hardware
from runtime.config import ConfigError, as_dict, flatten
from runtime.errors import UserError
from runtime.run import commit

SUITE = "memory"
DECISIVE = ("finished", "oom")  # what a probe must come to for the search to go on
STARVED = re.compile("MemoryError|bad_alloc|allocate memory")
CAPPED = (  # sets the cap, then becomes the command that follows it
    "import os, resource, sys; cap = int(sys.argv[1]); "
    "resource.setrlimit(resource.RLIMIT_DATA, (cap, cap)); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Plan:
    """Bytes that a run will hold, each kind at its most.

    The kinds are not all at their most at once: gradients come as activations go. `peak` is the most that the tensors
    hold together, and `base` what the process has beside them: its libraries, on a GPU the context.
    """

    weights: int  # and buffers, such as rotary tables
    gradients: int
    optimizer: int
    activations: int  # kept for the backward of the layers, by one micro-batch
    logits: int  # and all else that the head has in its forward
    peak: int
    base: int

    @property
    def total(self) -> int:
        """At the peak, with what the process has beside tensors."""
        return self.peak + self.base

    def __str__(self) -> str:
        notes = {"peak": "of all of these, which are not at their most at once", "base": "of the process"}
        rows = (*vars(self), "total")
        return "\n".join(f"{row:<12}{readable(getattr(self, row)):>12}  {notes.get(row, '')}".rstrip() for row in rows)


class _Tally(TorchDispatchMode):
    """Bytes of the tensors made under it that are `live`, and the most there were since `peak` was set."""

    def __init__(self):
        super().__init__()
        self._seen = WeakIdKeyDictionary()
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.passing(0)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size

    def passing(self, size: int) -> None:
        """Take note of a moment at which so much lives besides."""
        self.peak = max(self.peak, self.live + size)


def predict(config: train.Config) -> Plan:
    """What a run of this configuration takes on this machine. Raises what `train.py` would of device and kernels."""
    device = hardware.pick_device(config.device)
    precision = hardware.pick_precision(config.precision, device)
    kernels = bind(config.kernels, device)
    compiled, _ = hardware.pick_compile(config.compile, device)
    redraws = bool(config.model.recompute and config.model.dropout)
    captured, _ = hardware.pick_capture(config.capture, device, precision, compiled, redraws)
    shape = config.model.resolved(config.data.expected_vocab_size, config.data.separator)
    rows = config.micro_batch or config.batch_size
    sizes = {}

    def head(x, weight, targets, *options, **named):
        """The loss, and what it adds to the activations before it."""
        sizes["activations"] = tally.live - before
        highest, tally.peak = tally.peak, tally.live
        loss = kernels.linear_cross_entropy(x, weight, targets, *options, **named)
        tally.passing(kernels.workspace("linear_cross_entropy", x, weight, targets, *options, **named))
        sizes["logits"] = tally.peak - before - sizes["activations"]
        tally.peak = max(tally.peak, highest)
        return loss

    counted = replace(kernels, linear_cross_entropy=head)
    with FakeTensorMode(), torch.device(device), _Tally() as tally:
        model = GPT(shape, counted)
        model.residual = hardware.pick_residual(config.residual, device, precision)
        if precision != "fp32":
            model.keep_copies(hardware.DTYPES[precision])
        optimizers = build_optimizers(model, config)
        model_and_state = tally.live
        for _ in range(2):  # what the first leaves is there in the second
            tally.peak = tally.live
            for _ in range(1 if rows == config.batch_size else 2):  # the second finds gradients there
                before = tally.live
                ids = torch.zeros(rows, shape.seq_len, dtype=torch.int64)
                with hardware.autocast(device, precision):
                    loss = model(ids, ids, "sum")
                loss.backward()
                del loss
            clipping = (config.clip or 1.0) / get_total_norm([p.grad for p in model.parameters()])
            sizes["gradients"] = _bytes(p.grad for p in model.parameters())
            for optimizer in optimizers:
                optimizer.step(clipping)
            model.zero_grad()
        if captured:  # a graph keeps the memory of the step, which what runs between its replays cannot use
            step, tally.peak, of_training = tally.peak, tally.live, dict(sizes)
            if not config.diag:  # and a diagnosed step is a whole one more
                with torch.no_grad(), evaluating(model), hardware.autocast(device, precision):
                    model(ids, ids, "sum")
            tally.peak, sizes = step + (step if config.diag else tally.peak) - model_and_state, of_training
        state = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
        sizes |= {
            "weights": _bytes([*model.parameters(), *model.buffers()]),
            "optimizer": _bytes(state),
            "peak": tally.peak,
        }
    return Plan(**sizes, base=_base(config))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _base(config: train.Config) -> int:
    """What a run of the smallest model has come to after a step, on the same data: on a GPU all that the card holds
    outside torch's allocator, on a CPU resident memory. Measured, in a process of its own."""
    kept = ("config", "device", "precision", "compile", "optimizer", *(f"data.{key}" for key in vars(config.data)))
    values = flatten(train.Config, as_dict(config))
    return _measured_base(*(f"--{key}={values[key]}" for key in kept))


@cache
def _measured_base(*flags: str) -> int:
    code = """
        import sys, torch, train
        from model import hardware
        trainer = train.Trainer(*train.configure(sys.argv[1:]))
        trainer.loop()
        free, total = torch.cuda.mem_get_info(trainer.device) if trainer.device.type == "cuda" else (0, 0)
        reserved = hardware.memory(trainer.device)["memory_reserved"]
        print(total - free - reserved if total else hardware.memory(trainer.device)["memory"])
    """
    with tempfile.TemporaryDirectory() as folder:
        smallest = ("n_layer=1", "n_head=1", "d_model=16", "seq_len=16")
        argv = [f"--out={folder}", "--steps=1", "--batch_size=1", *(f"--model.{size}" for size in smallest), *flags]
        command = [sys.executable, "-c", textwrap.dedent(code), *argv]
        done = subprocess.run(command, cwd=train.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the smallest run failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def readable(size: int) -> str:
    """Bytes as `1.25 GiB` or `37.5 MiB`."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def read_bytes(text: str) -> int:
    """`600MB`, `1.5GiB` or plain bytes, as a number. Raises `ValueError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([kMG])(i?)B)?", text)
    if match is None:
        raise ValueError(f"{text!r} is no size, such as 600MB or 1.5GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMG".index(unit or " "))


@dataclass(frozen=True)
class Point:
    """The largest micro-batch of a configuration that fits, 0 where none does, and the record of its run: bytes of
    tensors on a GPU, of the process on a CPU, `measured` and `predicted` alike."""

    configuration: str
    micro_batch: int
    measured: int | None = None
    predicted: int | None = None
    reserved: int | None = None  # on a GPU, as are allocations that had to be tried again
    retries: int | None = None

    def __str__(self) -> str:
        if not self.micro_batch:
            return f"{self.configuration}: nothing fits"
        parts = [f"{self.micro_batch} fit", f"{readable(self.measured)}, planned {readable(self.predicted)}"]
        if self.reserved is not None:
            parts.append(f"{readable(self.reserved)} reserved, {self.retries} retries")
        return f"{self.configuration}: {'; '.join(parts)}"


class ProbeError(RuntimeError):
    """A probe that ended neither well nor for want of memory, so that the search cannot go on."""


def bisect(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n from `low` to `high` that fits, 0 when none does, in at most 2 + log2(high - low) questions.
    What is smaller than an n that fits must fit."""
    if not fits(low):
        return 0
    if low == high or fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Search:
    """Where probes run and are recorded: the suite's ledger at a scale, a folder for runs, a cap in bytes if any."""

    scale: Scale
    results: Path
    out: Path
    cap: int | None = None
    say: Callable[[str], None] = print

    @property
    def ledger(self) -> Path:
        return ledger.place(self.results, self.scale, SUITE)

    def probe(self, name: str, knobs: Knobs, micro_batch: int, **labels: Any) -> Outcome:
        """Three steps, or what `knobs` say, of the configuration called `name`, at a micro-batch: as the ledger has it
        of this machine, or run and put there, with the plan's bytes as `predicted` in `final`."""
        labels = {"configuration": name, "micro_batch": micro_batch, "cap": self.cap} | labels
        knobs = {"steps": 3, "log_every": 1} | dict(knobs) | {"batch_size": micro_batch}
        trial, device = Trial(SUITE, self.scale, labels, knobs), _device(knobs)
        machine = hardware.device_name(device)
        for past in ledger.read(self.ledger):
            if (past.key, past.labels, past.machine) == (trial.key, labels, machine) and past.status in DECISIVE:
                return past
        predicted = {}
        with suppress(UserError, KernelError):  # a configuration that cannot be: its run says why
            plan = predict(runner.configuration(knobs))
            predicted = {"predicted": plan.peak if device.type == "cuda" else plan.total}
        outcome = self._run(trial, machine)
        outcome = replace(outcome, final=dict(outcome.final) | predicted)
        ledger.append(self.ledger, outcome)
        memory = f", {readable(outcome.final['memory'])}" if "memory" in outcome.final else ""
        self.say(f"memory: {name}, micro-batch {micro_batch}: {outcome.status}{memory}, {outcome.seconds:.0f} s")
        return outcome

    def _run(self, trial: Trial, machine: str) -> Outcome:
        command = runner.TRAIN if self.cap is None else (sys.executable, "-c", CAPPED, str(self.cap), *runner.TRAIN)
        job = runner.Job(trial, self.out, machine, commit(), limit=runner.PATIENCE_S[self.scale], command=command)
        try:
            while (outcome := job.ended()) is None:
                time.sleep(runner.POLL_S)
        finally:
            job.kill()
        starved = outcome.status == "crashed" and STARVED.search(outcome.error)  # too early for the run to record it
        return replace(outcome, status="oom") if starved else outcome


def frontier(base: Knobs, configurations: Mapping[str, Knobs], low: int, high: int, search: Search) -> list[Point]:
    """The largest micro-batch from `low` to `high` that fits, of each of the configurations, which are knobs over
    those of `base`. One whose probe fails otherwise is told of and left out.

    Raises `ConfigError` for a CPU without a cap, whose search would take the machine's memory, and a GPU with one.
    """
    if (_device(base).type == "cpu") != (search.cap is not None):
        raise ConfigError(
            "a cap on memory is for the CPU, which takes one, such as --cap=600MB; a GPU is its own limit"
        )
    found = []
    for name, changes in configurations.items():

        def fits(micro_batch: int, name=name, knobs=base | changes) -> bool:
            outcome = search.probe(name, knobs, micro_batch)
            if outcome.status not in DECISIVE:
                raise ProbeError(f"{name}, micro-batch {micro_batch}: {outcome.status}: {outcome.error}")
            return outcome.status == "finished"

        try:
            most = bisect(fits, low, high)
        except ProbeError as error:
            search.say(f"memory: no frontier of {error}")
            continue
        facts = search.probe(name, base | changes, most).final if most else {}
        fields = {"measured": "memory", "predicted": "predicted", "reserved": "memory_reserved"}
        fields["retries"] = "memory_retries"
        found.append(Point(name, most, **{field: facts.get(key) for field, key in fields.items()}))
        search.say(f"memory: {found[-1]}")
    return found


def _device(knobs: Knobs) -> torch.device:
    return hardware.pick_device(knobs.get("device", "auto"))


# The suite


@dataclass(frozen=True)
class Setting:
    """What is searched at a scale: micro-batches up to `high` of each of the configurations, under a `cap` on a CPU.
    Each is then timed at its largest for `timed` steps."""

    base: Knobs
    configurations: Mapping[str, Knobs]
    high: int
    timed: int
    cap: int | None = None


def _recomputing(*shares: float, **knobs: Any) -> dict[str, Knobs]:
    return {f"recompute {share:g}": knobs | {"model.recompute": share} for share in shares}


SDPA = {"kernels": "torch", "kernels.attention": "sdpa"}
ON_GPU = {
    "torch": {"kernels": "torch"},
    "sdpa": SDPA,
    "triton": {"kernels": "triton"},
    **_recomputing(0.25, 0.62, 0.88, 1.0, **SDPA),  # what activation budgets of .75, .38, .12 and 0 leave
}
ANYWHERE = {"data.tokenizer": "bytes", "eval_tokens": 256, "sample_every": 0, "optimizer": "adamw"}
SETTINGS: dict[Scale, Setting] = {
    "tiny": Setting(
        ANYWHERE | {"device": "cpu", "compile": "off", "precision": "fp32"}
        | {"model.n_layer": 4, "model.n_head": 4, "model.d_model": 128, "model.seq_len": 256},
        {"torch": {"kernels": "torch"}, "sdpa": SDPA, **_recomputing(0.5, 1.0, **SDPA)},
        high=32, timed=10, cap=600 * 10**6,
    ),
    "low": Setting(
        ANYWHERE | {"precision": "bf16", "model.vocab_size": 33_283}
        | {"model.n_layer": 8, "model.n_head": 8, "model.d_model": 512, "model.d_ff": 1408, "model.seq_len": 256},
        ON_GPU, high=2048, timed=200,
    ),
    "full": Setting(
        ANYWHERE | {"precision": "bf16", "model.vocab_size": 33_283}
        | {"model.n_layer": 12, "model.n_head": 8, "model.d_model": 768, "model.d_ff": 3072, "model.seq_len": 1024},
        ON_GPU, high=512, timed=200,
    ),
}  # fmt: skip


def run(scale: Scale, results: Path, out: Path, say: Callable[[str], None] = print, cap: int | None = None) -> None:
    """Search the frontier of every configuration; probe all of them at the least of their frontiers, where their bytes
    compare; and time each at its own, twice. Raises `ConfigError` where the scale takes a GPU that is not there."""
    setting = SETTINGS[scale]
    search = Search(scale, results, out, cap or setting.cap, say)
    with ledger.locked(search.ledger), ledger.locked(out / scale / f"{SUITE}.lock"):
        found = frontier(setting.base, setting.configurations, 1, setting.high, search)
        found = [point for point in found if point.micro_batch]
        common = min((point.micro_batch for point in found), default=0)
        for point in found:
            knobs = setting.base | setting.configurations[point.configuration]
            search.probe(point.configuration, knobs, common)
            for repeat in range(2):
                timing = {"steps": setting.timed, "log_every": max(1, setting.timed // 20)}
                search.probe(point.configuration, knobs | timing, point.micro_batch, repeat=repeat)


def _probes(results: Results, configuration: str, timed: bool = False) -> list[Outcome]:
    """Of a configuration, the probes or else the timed runs: those under the last one's cap, on its machine."""
    found = [o for o in results.where(configuration=configuration) if ("repeat" in o.labels) == timed]
    return [o for o in found if (o.labels["cap"], o.machine) == (found[-1].labels["cap"], found[-1].machine)]


def largest(results: Results, configuration: str) -> int:
    """The largest micro-batch that fits, 0 when none does. Raises `LookupError` where nothing was probed."""
    probes = _probes(results, configuration)
    if not probes:
        raise LookupError(f"no probe of {configuration}")
    return max((o.labels["micro_batch"] for o in probes if o.status == "finished"), default=0)


def points(results: Results, configuration: str) -> list[tuple[int, int, int]]:
    """Every micro-batch that fits, in order, with the bytes measured and those predicted."""
    fitting = [o for o in _probes(results, configuration) if o.status == "finished"]
    return sorted((o.labels["micro_batch"], o.final["memory"], o.final["predicted"]) for o in fitting)


def speeds(results: Results, configuration: str) -> list[float]:
    """Tokens a second, warm-up excluded, of the timed runs at the largest micro-batch."""
    done = [o for o in _probes(results, configuration, timed=True) if o.status == "finished"]
    most = max((o.labels["micro_batch"] for o in done), default=0)
    return [o.final["tok_s_steady"] for o in done if o.labels["micro_batch"] == most]


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the flags say. Returns the exit code: 0 done, 2 refused, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", choices=tuple(SETTINGS), default="tiny")
    add("--cap", type=read_bytes, metavar="SIZE", help="memory of a run on a CPU (tiny: 600MB)")
    add("--results", type=Path, default=Path("experiments/results"), metavar="DIR", help="of the ledger")
    add("--out", type=Path, default=Path("out/experiments"), metavar="DIR", help="of the runs' folders")
    asked = parser.parse_args(argv)
    try:
        run(asked.scale, asked.results, asked.out, cap=asked.cap)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
