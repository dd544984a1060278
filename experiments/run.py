"""From a suite to its trials, and from trials to the ledger.

Every trial is a process of train.py in its own session, so that however it ends, nothing else ends with it: a run that
diverged, ran out of memory or was refused is an outcome like any other. An outcome is written when its process has
ended. A sweep can be killed at any moment and started again: trials in the ledger are not repeated, and those that were
in flight, which die with the sweep, begin anew.
"""

import ctypes
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import train
from experiments import ledger
from experiments.spec import Axis, Knobs, Outcome, Rule, Scale, Suite, Trial
from kernels import KernelChoice, KernelError, bind
from model.gpt import GPT, ModelConfig
from runtime import hardware
from runtime.budget import LENGTHS
from runtime.config import ConfigError, merge
from runtime.errors import UserError
from runtime.progress import progress_bar
from runtime.run import Interrupt, commit

TRAIN = (sys.executable, str(Path(train.__file__).resolve()))
POWERS: dict[Rule, float] = {"fixed": 0.0, "sqrt": 0.5, "linear": 1.0}  # of the batch, in the learning rate
PATIENCE_S: dict[Scale, float] = {"tiny": 600, "low": 7200, "full": 86400, "own": 86400}  # or ten times the median
POLL_S = 0.05
ERROR_CHARS = 1000  # of the last lines of a failed run
CONTEXT_BYTES = 2**30  # of a process on a GPU, besides its tensors
ON_CARD = 4  # trials at once on a GPU, memory allowing: most of a short trial is start-up, which leaves the card idle
START_S = 15.0  # of a trial: to import torch, open the data, compile
RATES = {"cuda": 1e14, "cpu": 1e10}  # FLOP/s of a first estimate, which the machine's own past corrects
ALONE = ("choose-batch", "diagnostics")  # suites that compare speeds at every scale
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec no lock may be waited for


# Trials


def trials(
    suite: Suite,
    scale: Scale,
    axis: Axis | None = None,
    rule: Rule | None = None,
    seeds: int = 0,
    extra: Knobs | None = None,
) -> list[Trial]:
    """The trials of a suite in the order declared; `axis`, `rule` and `seeds` take the place of the suite's.

    Of knobs, `extra` come last, after those of the base, the variant and the point. Raises `ConfigError` for a scale
    that the suite does not have, for a knob of `extra` by which trials differ, and for a budget that does not convert.
    """
    if scale not in suite.base:
        raise ConfigError(f"suite {suite.name} has no scale {scale}: it has {', '.join(suite.base)}")
    axis, rule, seeds, extra = axis or suite.axis, rule or suite.rule, seeds or suite.seeds[scale], extra or {}
    own = {knob for of in (*suite.variants.values(), *suite.points(scale)) for knob in of} | {"seed"}
    own |= LENGTHS if own & LENGTHS else set()
    if taken := sorted(own & extra.keys()):
        raise ConfigError(f"{taken[0]} is what trials of suite {suite.name} differ by: --set cannot give it")
    base = merge([suite.base[scale], extra], LENGTHS)
    follow = spend = dict
    if rule != "fixed":
        follow = partial(scale_rates, base=configuration(base), power=POWERS[rule])
    if axis:
        first = next(iter(suite.variants.values()))
        spend = budget_on(axis, configuration(merge([suite.base[scale], first, extra], LENGTHS)))
    found = []
    for (variant, own), point, seed in itertools.product(suite.variants.items(), suite.points(scale), range(seeds)):
        knobs = follow(merge([suite.base[scale], own, point, extra, {"seed": seed}], LENGTHS))
        if not LENGTHS & {*own, *point}:  # a length that is a trial's own is what the trial is about
            knobs = spend(knobs)
        found.append(Trial(suite.name, scale, {"variant": variant, **point, "seed": seed}, knobs))
    if suite.matched:
        check_matched(found)
    return found


def offline(trial: Trial) -> Trial:
    """The trial on text that every machine has: docstrings, or the standard library's sources in place of OpenWebText,
    with a BPE tokenizer of the same size as the trial's."""
    knobs = dict(trial.knobs)
    if knobs.get("data.corpus", "docstrings") not in ("docstrings", "stdlib"):
        knobs["data.corpus"] = "stdlib" if knobs["data.corpus"] == "openwebtext" else "docstrings"
    if knobs.get("data.tokenizer") == "gpt2":
        knobs |= {"data.tokenizer": "bpe", "data.vocab_size": 50_257}
    return replace(trial, knobs=knobs)


def check_matched(trials: Sequence[Trial]) -> None:
    """Raise `ConfigError` where the models of trials differ by more than 3% in parameters."""
    sizes = {trial.labels["variant"]: meta_model(configuration(trial.knobs)).n_parameters() for trial in trials}
    if max(sizes.values()) > 1.03 * min(sizes.values()):
        counts = ", ".join(f"{variant} {size:,}" for variant, size in sizes.items())
        raise ConfigError(f"suite {trials[0].suite} compares models of as many parameters, and has {counts}")


def configuration(knobs: Knobs) -> train.Config:
    """What train.py makes of knobs. Raises `ConfigError` where it would refuse them."""
    return train.configure(flags(knobs))[0]


def flags(knobs: Knobs) -> list[str]:
    """What train.py is called with for knobs, beneath which lies configs/trial.py."""
    return [f"--{key}={value}" for key, value in ({"config": "trial.py"} | dict(knobs)).items()]


def scale_rates(knobs: Knobs, base: train.Config, power: float) -> dict[str, Any]:
    """Knobs with learning rates that follow the batch, as a power of how many times the base's it is."""
    factor = (knobs.get("batch_size", base.batch_size) / base.batch_size) ** power
    rates = {key: factor * knobs.get(key, getattr(base, key)) for key in ("lr", "muon_lr")}
    return dict(knobs) | (rates if factor != 1 else {})


def budget_on(axis: Axis, reference: train.Config) -> Callable[[Knobs], dict[str, Any]]:
    """A function that gives knobs the budget of `reference`, in units of `axis`. Raises `ConfigError` where only a
    measured speed could convert it."""
    unit = next(unit for unit in ("steps", "tokens", "seconds") if getattr(reference, unit))
    if axis != unit and "seconds" in (axis, unit):
        raise ConfigError(f"a budget in {unit} is none in {axis} before it has run: --set {axis}=... gives one")
    step = reference.batch_size * reference.model.seq_len
    tokens = reference.tokens or reference.steps * step
    if axis == "flops":
        return partial(_spend, flops=tokens * meta_model(reference).flops_per_token(), otherwise=tokens)
    amount = {"steps": math.ceil(tokens / step), "tokens": tokens, "seconds": reference.seconds}[axis]
    return lambda knobs: merge([knobs, {axis: amount}], LENGTHS)


def _spend(knobs: Knobs, flops: int, otherwise: int) -> dict[str, Any]:
    try:
        tokens = round(flops / meta_model(configuration(knobs)).flops_per_token())
    except UserError:
        tokens = otherwise  # the run will be refused, and its outcome says why
    return merge([knobs, {"tokens": tokens}], LENGTHS)


def meta_model(config: train.Config) -> GPT:
    """The model on the meta device, to count its parameters and FLOPs."""
    return _meta_model(config.model.resolved(config.data.expected_vocab_size, config.data.separator))


@cache
def _meta_model(shape: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(shape, bind(KernelChoice(every="torch"), torch.device("cpu")))


# One trial


class Job:
    """A trial in flight."""

    def __init__(
        self,
        trial: Trial,
        out: Path,
        machine: str,
        version: str,
        environment: Mapping[str, str] | None = None,
        limit: float = math.inf,
        wandb: str = "off",
        command: Sequence[str] = TRAIN,
    ):
        """Start it: under `out`/scale/suite, in a folder named by its key, emptied first. `version` is the commit;
        after `limit` seconds it is killed. Its checkpoints serve no one, so only the last is asked for."""
        self.trial, self.machine, self.version, self.limit = trial, machine, version, limit
        self.environment = dict(environment or {})
        self.folder = out.absolute() / trial.scale / trial.suite / trial.key
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        own = {"out": self.folder.parent, "run": self.folder.name, "wandb": wandb}
        self.started, self._begin, self._ooms = datetime.now().astimezone(), time.perf_counter(), kernel_ooms()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - `ended` closes it
        with self.folder.with_suffix(".log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *flags({"save_every": 10**9} | dict(trial.knobs) | own)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=self._errors, start_new_session=True,
                env=os.environ | {"WANDB_RUN_GROUP": trial.suite} | self.environment,
                preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
            )  # fmt: skip

    def ended(self) -> Outcome | None:
        """What came of it, None while it runs."""
        running = self._process.poll() is None
        late = running and time.perf_counter() - self._begin > self.limit
        if running and not late:
            return None
        self.kill()
        kept, code = ledger.condense(self.folder), self._process.returncode
        status = kept["final"].get("status", "running")
        if late:
            status = "time_limit"
        elif code == 2 and status == "running":
            status = "unsupported"
        elif status == "running":
            status = "oom" if code == -signal.SIGKILL and kernel_ooms() > self._ooms else "crashed"
        for checkpoint in self.folder.glob("*.pt*"):
            checkpoint.unlink()
        error = "" if status == "finished" else self._last_words(code)
        self._errors.close()
        return Outcome(
            key=self.trial.key, suite=self.trial.suite, scale=self.trial.scale, labels=dict(self.trial.labels),
            knobs=dict(self.trial.knobs), status=status, seconds=time.perf_counter() - self._begin,
            started=self.started.isoformat(), commit=self.version, machine=self.machine, error=error, **kept,
        )  # fmt: skip

    def kill(self) -> None:
        """End it and what it started, if it has not ended, and wait."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _last_words(self, code: int) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        killed = [f"killed by {signal.Signals(-code).name}"] if code < 0 else []
        return "\n".join([*lines[-5:], *killed])[-ERROR_CHARS:]


def _die_with(parent: int) -> None:
    """Have this process, forked from `parent`, killed when that one dies: Linux's prctl PR_SET_PDEATHSIG."""
    LIBC.prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def kernel_ooms() -> int:
    """How many processes Linux has killed for want of memory, in any control group; 0 where it does not say."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))
    return 0


# A sweep


def places(jobs: int = 0) -> list[dict[str, str]]:
    """The environments of trials that run at once: `jobs`, or as many as cores, which they share. On GPUs `ON_CARD` a
    card, of which `sweep` fills as many as the card's memory allows."""
    cards, cores = torch.cuda.device_count(), os.cpu_count() or 1
    jobs = jobs or ON_CARD * cards or cores
    if cards:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": names[i % cards]} for i in range(jobs)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs


def share_of_card(trial: Trial) -> float:
    """The share of a GPU that a trial needs: of its memory, as planned; all of it for a run that is measured by the
    clock, at the published size, or that the planner cannot plan. 0 on a CPU."""
    if not torch.cuda.is_available() or str(trial.knobs.get("device", "auto")) == "cpu":
        return 0.0
    if trial.scale == "full" or trial.knobs.get("seconds") or trial.suite in ALONE:
        return 1.0
    alike = {knob: v for knob, v in trial.knobs.items() if knob not in {"seed", "lr", *LENGTHS}}
    return _planned_share(tuple(flags(alike | {"steps": 1})))


@cache
def _planned_share(argv: tuple[str, ...]) -> float:
    from experiments import memory

    try:
        peak = memory.predict(train.configure(list(argv))[0], CONTEXT_BYTES).total
    except (UserError, KernelError):
        return 1.0
    return 1.15 * peak / torch.cuda.get_device_properties(0).total_memory  # allocators round up


def machine(trial: Trial, jobs: int) -> str:
    """What a trial runs on, `jobs` of them at once."""
    return f"{_device_name(trial.knobs.get('device', 'auto'))}, torch {torch.__version__}, {jobs} at once"


@cache
def _device_name(device: str) -> str:
    try:
        return hardware.device_name(hardware.pick_device(device))
    except UserError:
        return _device_name("auto")  # the run will be refused on this machine


class Plan:
    """What there is to do for trials, given what the ledgers under `results` have.

    `runs` are those to start: trials of equal knobs, by key, which one process serves. `copies` are outcomes to enter
    at another place: of a run that was done under other labels, or that another has superseded there since.
    """

    def __init__(self, trials: Sequence[Trial], results: Path, rerun: bool = False):
        self.trials, self.results = trials, results
        self.ledgers = list(dict.fromkeys(map(self.ledger, trials)))
        self.past = [outcome for path in self.ledgers for outcome in ledger.history(path)]
        done = {} if rerun else {outcome.key: outcome for outcome in self.past if outcome.status != "interrupted"}
        holds = {(outcome.suite, outcome.scale, ledger.name(outcome.labels)): outcome for outcome in self.past}
        self.runs: dict[str, list[Trial]] = {}
        self.copies: list[Outcome] = []
        self.done: dict[int, Outcome] = {}  # by the trial's index
        for index, trial in enumerate(trials):
            if outcome := done.get(trial.key):
                self.done[index] = outcome
                there = holds.get((trial.suite, trial.scale, ledger.name(trial.labels)))
                if there is None or (there.key, there.started) != (outcome.key, outcome.started):
                    self.copies.append(replace(outcome, labels=dict(trial.labels)))
            else:
                self.runs.setdefault(trial.key, []).append(trial)

    def ledger(self, of: Trial | Outcome) -> Path:
        return ledger.place(self.results, of.scale, of.suite)

    def enter(self, outcome: Outcome) -> None:
        """Put the outcome of a run in the ledger at each of its places."""
        for trial in self.runs[outcome.key]:
            ledger.append(self.ledger(trial), replace(outcome, labels=dict(trial.labels)))

    def table(self) -> list[str]:
        """A table for each suite: of every trial its labels and, where it is done, its outcome."""
        lines = []
        for path in self.ledgers:
            found = [(i, trial) for i, trial in enumerate(self.trials) if self.ledger(trial) == path]
            rows = [["suite", *found[0][1].labels, "outcome"]]
            for i, trial in found:
                done = summary(self.done[i]) if i in self.done else ""
                rows.append([trial.suite, *map(shown, trial.labels.values()), done])
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + [""]
        return lines


def rough(trial: Trial | Outcome) -> float:
    """Seconds that a trial takes, from its FLOPs alone: to be scaled by what others took."""
    return _rough(tuple(flags(trial.knobs)))


@cache
def _rough(argv: tuple[str, ...]) -> float:
    try:
        config = train.configure(list(argv))[0]
        per_token, step = meta_model(config).flops_per_token(), config.batch_size * config.model.seq_len
    except (UserError, ValueError):
        return START_S  # it will be refused
    if config.seconds:
        return START_S + config.seconds
    tokens = config.tokens or config.steps * step
    evaluated = tokens / step / config.eval_every * config.eval_tokens / 3  # a third of the FLOPs: no backward
    on = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    return START_S + (tokens + evaluated) * per_token / RATES[on]


def expected(trial: Trial, past: Sequence[Outcome]) -> float:
    """Seconds that a trial takes, given outcomes on its machine: as the same trial last did, or as the median of its
    suite, or by its FLOPs, scaled by the median of what those of others took."""
    same = [o.seconds for o in past if o.key == trial.key]
    suite = [o.seconds for o in past if o.suite == trial.suite]
    if same or suite:
        return same[-1] if same else median(suite)
    return rough(trial) * median([o.seconds / rough(o) for o in past[-20:]] or [1.0])


def forecast(trials: Sequence[Trial], past: Sequence[Outcome], jobs: int) -> float | None:
    """Seconds that trials take, `jobs` at once; None where nothing has run on this machine."""
    machines = {machine(trial, jobs) for trial in trials}
    past = [outcome for outcome in past if outcome.machine in machines]
    return sum(expected(trial, past) for trial in trials) / jobs if past or not trials else None


def clock(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(outcome: Outcome) -> str:
    loss = f", val loss {outcome.val_loss:.4f}" if math.isfinite(outcome.val_loss) else ""
    return f"{outcome.status}{loss}"


def sweep(
    plan: Plan,
    out: Path,
    environments: Sequence[Mapping[str, str]],
    wandb: str = "off",
    time_limit: float = math.inf,
    command: Sequence[str] = TRAIN,
    say: Callable[[str], None] = print,
    within: float = math.inf,
) -> bool:
    """Run a plan's trials, one in each of the environments at a time. Returns False if a signal ended it early.

    After `time_limit` seconds it starts no more trials and ends with those in flight. `within` a time, it takes the
    cheapest suites first, starts no trial that is not expected to end in time, and kills the ones that are wrong about
    it, which leave no outcome. Raises `LedgerError` where another sweep of one of the suites is under way."""
    past, version, begin = list(plan.past), commit(), time.monotonic()
    waiting, free, jobs = [run[0] for run in plan.runs.values()], list(environments), []

    def elapsed() -> float:
        return time.monotonic() - begin

    def costs(trial: Trial) -> float:
        here = machine(trial, len(environments))
        return expected(trial, [o for o in past if o.machine == here])

    def room(trial: Trial, environment: Mapping[str, str]) -> bool:
        """Whether a trial fits beside those on the same card."""
        card = environment.get("CUDA_VISIBLE_DEVICES")
        beside = [job.trial for job in jobs if job.environment.get("CUDA_VISIBLE_DEVICES") == card]
        return not card or not beside or sum(map(share_of_card, (trial, *beside))) <= 1

    def next_start() -> tuple[Trial, Mapping[str, str]] | None:
        if elapsed() >= time_limit:
            return None
        for trial in waiting:
            if within == math.inf or elapsed() + 1.2 * costs(trial) <= within:
                place = next((environment for environment in free if room(trial, environment)), None)
                return (trial, place) if place is not None else None  # in order: a large trial is not passed over
        return None

    if within < math.inf:
        totals = {suite: sum(costs(t) for t in waiting if t.suite == suite) for suite in {t.suite for t in waiting}}
        waiting.sort(key=lambda trial: totals[trial.suite])
    with ExitStack() as held:
        for path in plan.ledgers:
            held.enter_context(ledger.locked(path))
            held.enter_context(ledger.locked(out / path.relative_to(plan.results).with_suffix(".lock")))
        for outcome in plan.copies:
            ledger.append(plan.ledger(outcome), outcome)
        interrupt = held.enter_context(Interrupt())
        held.callback(lambda: [job.kill() for job in jobs])
        if (bar := progress_bar(say, total=len(waiting), unit="trial")) is not None:
            say = held.enter_context(bar).write
        while True:
            if interrupt.signal:
                return False
            while free and (start := next_start()):
                trial, environment = start
                waiting.remove(trial)
                free.remove(environment)
                here = machine(trial, len(environments))
                usual = [o.seconds for o in past if (o.suite, o.machine) == (trial.suite, here)]
                limit = max(PATIENCE_S[trial.scale], 10 * median(usual or [0]))
                jobs.append(Job(trial, out, here, version, environment, limit, wandb, command))
            if not jobs or elapsed() > within:
                break
            for job in list(jobs):
                if (outcome := job.ended()) is None:
                    continue
                plan.enter(outcome)
                jobs.remove(job)
                free.append(job.environment)
                past.append(outcome)
                left = forecast([*waiting, *(job.trial for job in jobs)], past, len(environments))
                n_ended, labels = len(plan.runs) - len(waiting) - len(jobs), outcome.labels.items()
                which = " ".join([outcome.suite, *(f"{key}={shown(value)}" for key, value in labels)])
                times = f"{outcome.seconds:.1f} s, ETA {clock(left)}"
                say(f"{n_ended}/{len(plan.runs)}  {which}  {summary(outcome)}, {times}")
                if bar is not None:
                    bar.update()
            time.sleep(POLL_S)
        if left := len(waiting) + len(jobs):
            say(f"{left} trials are left, for want of time: the same command goes on")
    return True
