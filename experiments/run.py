"""From a suite to its trials, and from trials to the ledger.

Every trial is a process of train.py in its own session, so that however it ends, nothing else ends with it: a run that
diverged, ran out of memory or was refused is an outcome like any other. On a CPU it is forked from a process that has
imported all it needs, which saves half of a short trial. An outcome is written when its process has ended. A sweep can
be killed at any moment and started again: trials in the ledger are not repeated, and those that were in flight, which
die with the sweep, begin anew.
"""

import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import train
from data.prepare import DataConfig, prepare
from experiments import ledger
from experiments.forks import Fork, confine
from experiments.spec import Axis, Knobs, Outcome, Scale, Suite, Trial
from kernels import KernelChoice, bind
from model.gpt import GPT, ModelConfig
from runtime import hardware
from runtime.budget import LENGTHS
from runtime.config import ConfigError, merge
from runtime.errors import UserError
from runtime.progress import progress_bar
from runtime.records import RECIPE
from runtime.run import commit, read_status
from runtime.signals import Interrupt
from runtime.text import duration

TRAIN = (sys.executable, str(Path(train.__file__).resolve()))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python")
RANK_FAILED = re.compile(r"^E\d{4} .*failed \(exitcode: (-?\d+)\)", re.MULTILINE)  # torchrun's words
PATIENCE_S: dict[Scale, float] = {"tiny": 600, "low": 7200, "full": 86400, "own": 86400}  # or ten times the median
POLL_S = 0.05
ERROR_CHARS = 1000  # of the last lines of a failed run
CARD = "CUDA_VISIBLE_DEVICES"
ON_CARD = 4  # trials at once on a GPU: most of a short trial is start-up, which leaves the card idle
START_S = 15.0  # of a trial: to import torch, open the data, compile
RATES = {"cuda": 1e14, "cpu": 1e10}  # FLOP/s of a first estimate, which the machine's own past corrects


# Trials


def trials(
    suite: Suite, scale: Scale, seeds: int = 0, extra: Knobs | None = None, offline: bool = False
) -> list[Trial]:
    """The trials of a suite in the order declared, with `seeds` in place of the suite's.

    Of knobs, `extra` come last, after those of the base, the variant and the point; a length among them takes the place
    of the suite's axis. Raises `ConfigError` for a scale that the suite does not have, and for a knob of `extra` by
    which trials differ.
    """
    if scale not in suite.base:
        raise ConfigError(f"suite {suite.name} has no scale {scale}: it has {', '.join(suite.base)}")
    extra, seeds = extra or {}, seeds or suite.seeds.get(scale, 1)
    parts = list(itertools.product(suite.variants.items(), suite.points(scale)))
    varied = {"seed"} | {knob for (_, changes), point in parts for knob in (*changes, *point)}
    varied |= LENGTHS if varied & LENGTHS else set()
    if taken := sorted(varied & extra.keys()):
        raise ConfigError(f"{taken[0]} is what trials of suite {suite.name} differ by: --set cannot give it")
    reference = configuration(merge([suite.base[scale], parts[0][0][1], extra], LENGTHS)) if suite.axis else None
    found = []
    for ((variant, changes), point), seed in itertools.product(parts, range(seeds)):
        knobs = {knob: value for knob, value in point.items() if knob[0] != "@"}
        knobs = merge([suite.base[scale], changes, knobs, extra, {"seed": seed}], LENGTHS)
        if reference and not LENGTHS & {*varied, *extra}:
            knobs = merge([knobs, {"tokens": equal_tokens(suite.axis, reference, knobs)}], LENGTHS)
        labels = {"variant": variant, **{label.lstrip("@"): value for label, value in point.items()}, "seed": seed}
        found.append(Trial(suite, scale, labels, on_any_machine(knobs) if offline else knobs))
    return found


def equal_tokens(axis: Axis, reference: train.Config, knobs: Knobs) -> int:
    """The tokens of a trial whose budget equals the reference's in tokens or FLOPs."""
    tokens = reference.tokens or reference.steps * reference.batch_size * reference.model.seq_len
    if axis == "flops":
        with suppress(UserError):  # the run will be refused, and its outcome says why
            flops = [meta_model(config).flops_per_token() for config in (reference, configuration(knobs))]
            tokens = round(tokens * flops[0] / flops[1])
    return tokens


def on_any_machine(knobs: Knobs) -> dict[str, Any]:
    """Knobs for text that every machine has: docstrings, or the standard library's sources in place of OpenWebText,
    with a BPE tokenizer of the same size."""
    moved = dict(knobs)
    if moved.get("data.corpus", "docstrings") not in ("docstrings", "stdlib"):
        moved["data.corpus"] = "stdlib" if moved["data.corpus"] == "openwebtext" else "docstrings"
    if moved.get("data.tokenizer") == "gpt2":
        moved |= {"data.tokenizer": "bpe", "data.vocab_size": 50_257}
    return moved


def configuration(knobs: Knobs) -> train.Config:
    """What train.py makes of knobs. Raises `ConfigError` where it would refuse them."""
    return train.configure(flags(knobs))[0]


def flags(knobs: Knobs) -> list[str]:
    """Flags of train.py for a trial's knobs, on top of configs/trial.py."""
    return [f"--{key}={value}" for key, value in ({"config": "trial.py"} | dict(knobs)).items()]


def meta_model(config: train.Config) -> GPT:
    """The model on the meta device, to count its parameters and FLOPs."""
    return _meta_model(config.shape)


@cache
def _meta_model(shape: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(shape, bind(KernelChoice(every="torch"), torch.device("cpu")))


def digest_of(trial: Trial) -> str:
    """The digest of the text that a trial is trained on, which is prepared if it is not; "" if train.py will refuse."""
    with suppress(UserError):
        return _digest(configuration(trial.knobs).data)
    return ""


@cache
def _digest(data: DataConfig) -> str:
    return prepare(data).digest[:12]


def is_done(trial: Trial, outcome: Outcome | None) -> bool:
    """Whether a trial need not run again: its outcome is of the present recipe and, if it got to train, of the text as
    it is now."""
    if outcome is None or outcome.status == "interrupted" or outcome.recipe != RECIPE:
        return False
    return not outcome.digest or outcome.digest == digest_of(trial)


# One trial


class Job:
    """A trial in flight."""

    def __init__(self, trial: Trial, out: Path, machine: str, environment: Mapping[str, str], limit: float,
                 wandb: str = "off", command: Sequence[str] = TRAIN):  # fmt: skip
        """Start the trial. Its folder is `out`/scale/suite/key, which is emptied first. After `limit` seconds it is
        killed. Only the last checkpoint is written, since none is used."""
        self.trial, self.machine, self.limit, self.environment = trial, machine, limit, dict(environment)
        self.folder = out.absolute() / trial.scale / trial.suite.name / trial.key
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        own = {"out": self.folder.parent, "run": self.folder.name, "wandb": wandb}
        self.started, self._begin, self._ooms = datetime.now().astimezone(), time.perf_counter(), kernel_ooms()
        self._errors = tempfile.NamedTemporaryFile()  # noqa: SIM115 - `ended` closes it
        argv = flags({"save_every": 10**9} | dict(trial.knobs) | own)
        env, linux = os.environ | {"WANDB_RUN_GROUP": trial.suite.name} | self.environment, sys.platform == "linux"
        with self.folder.with_suffix(".log").open("wb") as log:
            if trial.ranks > 1:
                command = (*TORCHRUN, f"--nproc-per-node={trial.ranks}", "--", *command)
            if command == TRAIN and linux and CARD not in env:
                self._process = Fork(argv, Path(log.name), Path(self._errors.name), env, trial.cap)
            else:
                self._process = subprocess.Popen(
                    [*command, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=self._errors, env=env,
                    start_new_session=True, preexec_fn=partial(confine, os.getpid(), trial.cap) if linux else None,
                )  # fmt: skip

    def ended(self) -> Outcome | None:
        """The outcome, or None while the trial runs. A status that the run itself recorded counts, whatever its process
        did afterwards."""
        late = time.perf_counter() - self._begin > self.limit
        if self._process.poll() is None and not late:
            return None
        self.kill()
        kept, (code, words) = ledger.condense(self.folder), self._end()
        status = read_status(self.folder).get("status", "killed")
        if status == "killed":
            starved = code == -signal.SIGKILL and kernel_ooms() > self._ooms
            status = "time_limit" if late else "unsupported" if code == 2 else "oom" if starved else "crashed"
        for path in (*self.folder.glob("*.pt*"), *self.folder.glob("shards-*")):  # checkpoints
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        error = "" if status == "finished" else words
        self._errors.close()
        trial = self.trial
        return Outcome(
            key=trial.key, suite=trial.suite.name, scale=trial.scale, labels=dict(trial.labels), knobs=trial.changes,
            status=status, seconds=time.perf_counter() - self._begin, started=self.started.isoformat(), commit=commit(),
            machine=self.machine, error=error, recipe=RECIPE, digest=digest_of(trial) if kept["steps"] else "", **kept,
        )  # fmt: skip

    def kill(self) -> None:
        """Kill the process, and those that it started, if it still runs, and wait for it."""
        if self._process.poll() is None:
            for end in (os.killpg, os.kill):  # one just forked has no group yet
                with suppress(ProcessLookupError):
                    end(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _end(self) -> tuple[int, str]:
        """Exit code and last words of the process, or of the first rank to fail."""
        self._errors.seek(0)
        code, words = self._process.returncode, self._errors.read().decode(errors="replace")
        if self.trial.ranks > 1 and (failed := RANK_FAILED.search(words)):
            code, words = int(failed[1]), words[: failed.start()]
        killed = [f"killed by {signal.Signals(-code).name}"] if code < 0 else []
        return code, "\n".join([*words.strip().splitlines()[-5:], *killed])[-ERROR_CHARS:]


def kernel_ooms() -> int:
    """Number of processes that Linux has killed because memory ran out, in all control groups; 0 if unknown."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))
    return 0


# A sweep


def places(jobs: int = 0, ranks: int = 1) -> list[dict[str, str]]:
    """An environment for each of the trials that run at once: `jobs`, or by default `ON_CARD` per GPU, or one per core.
    They share the cores. Trials of several `ranks` have as many GPUs to themselves, or run one after the other."""
    cards, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if cards:
        names = os.environ.get(CARD, ",".join(map(str, range(cards)))).split(",")
        if ranks > 1:
            return [{CARD: ",".join(names[i : i + ranks])} for i in range(0, cards - ranks + 1, ranks)]
        return [{CARD: names[i % cards]} for i in range(jobs or ON_CARD * cards)]
    jobs = 1 if ranks > 1 else jobs or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // (jobs * ranks)))}] * jobs


def machine(trial: Trial, jobs: int) -> str:
    """What a trial runs on, `jobs` of them at once."""
    return f"{_device_name(trial.knobs.get('device', 'auto'))}, torch {torch.__version__}, {jobs} at once"


@cache
def _device_name(device: str) -> str:
    try:
        return hardware.device_name(hardware.pick_device(device))
    except UserError:
        return _device_name("auto")  # the run will be refused on this machine


def measures_its_card(trial: Trial) -> bool:
    return trial.scale == "full" or trial.suite.alone or bool(trial.knobs.get("seconds"))


def expected(trial: Trial, past: Sequence[Outcome]) -> float:
    """Expected seconds of a trial, from past outcomes on its machine: what the same trial took last, or else the median
    of its suite, or else an estimate from its FLOPs, scaled by the median error of that estimate for other trials."""
    same = [o.seconds for o in past if o.key == trial.key]
    suite = [o.seconds for o in past if o.suite == trial.suite.name]
    if same or suite:
        return same[-1] if same else median(suite)
    rate = RATES["cuda" if torch.cuda.is_available() and trial.knobs.get("device") != "cpu" else "cpu"]
    measured = [
        (o.seconds, o.final["flops_per_token"] * o.final["tokens"])
        for o in past[-20:]
        if o.final.get("flops_per_token")
    ]
    pace = median([seconds / (START_S + flops / rate) for seconds, flops in measured] or [1.0])
    clocked, flops = _length(tuple(flags(trial.knobs)))
    return START_S + clocked if clocked else pace * (START_S + flops / rate)


@cache
def _length(argv: tuple[str, ...]) -> tuple[float, float]:
    """The seconds that a run is given, and the FLOPs that it takes; 0 for one that train.py will refuse."""
    try:
        config = train.configure(list(argv))[0]
        tokens = config.tokens or config.steps * config.batch_size * config.model.seq_len
        return config.seconds, tokens * meta_model(config).flops_per_token()
    except UserError:
        return 0.0, 0.0


def summary(outcome: Outcome) -> str:
    loss = f", val loss {outcome.val_loss:.4f}" if math.isfinite(outcome.val_loss) else ""
    return f"{outcome.status}{loss}"


class Sweep:
    """A list of trials: those `done`, with their outcomes from the ledgers under `results`, and those `waiting`."""

    def __init__(self, declared: Sequence[Trial], results: Path, jobs: int = 0, rerun: bool = False):
        self.results, self.places = results, places(jobs)
        self.ledgers = list(dict.fromkeys(ledger.place(results, trial.scale, trial.suite.name) for trial in declared))
        self.past = [outcome for path in self.ledgers for outcome in ledger.read(path)]
        latest = {outcome.key: outcome for outcome in self.past}
        distinct = {trial.key: trial for trial in declared}
        self.done = {} if rerun else {key: latest[key] for key, t in distinct.items() if is_done(t, latest.get(key))}
        self.waiting = [trial for key, trial in distinct.items() if key not in self.done]

    def forecast(self, trials: Sequence[Trial]) -> float:
        """Seconds that trials take, as many at once as there are places."""
        at_once = {ranks: len(places(ranks=ranks)) or 1 for ranks in {t.ranks for t in trials} - {1}}
        return sum(self.cost(trial) / at_once.get(trial.ranks, len(self.places)) for trial in trials)

    def cost(self, trial: Trial) -> float:
        here = machine(trial, len(self.places))
        return expected(trial, [outcome for outcome in self.past if outcome.machine == here])

    def run(self, out: Path, time_limit: float = math.inf, within: float = math.inf, wandb: str = "off",
            command: Sequence[str] = TRAIN, say: Callable[[str], None] = print) -> bool:  # fmt: skip
        """Run the waiting trials, one in each place at a time. Returns False if a signal ended the sweep early.

        On a GPU, trials that measure it, and those that ran out of memory beside others, run later, each with a card to
        itself; then those of several ranks. After `time_limit` seconds no more trials start. With `within`, the sweep
        ends after that many seconds: the cheapest suites run first, a trial starts only if it is expected to end in
        time, and one that does not is killed and has no outcome. Raises `LedgerError` if another sweep of one of the
        suites is running, and `ConfigError` for more ranks than this machine has GPUs.
        """
        begin, jobs, total = time.monotonic(), [], len(self.waiting)
        cards = list({place[CARD]: place for place in self.places if CARD in place}.values())
        cards = cards if len(cards) < len(self.places) else []  # those that trials share
        if within < math.inf:
            costs: dict[str, float] = {}
            for trial in self.waiting:
                costs[trial.suite.name] = costs.get(trial.suite.name, 0) + self.cost(trial)
            self.waiting.sort(key=lambda trial: costs[trial.suite.name])
        several = {ranks: places(ranks=ranks) for ranks in sorted({trial.ranks for trial in self.waiting} - {1})}
        if short := [ranks for ranks, free in several.items() if not free]:
            raise ConfigError(f"a trial takes {short[0]} ranks, and this machine has {torch.cuda.device_count()} GPUs")
        single = [trial for trial in self.waiting if trial.ranks == 1]
        free, alone = list(self.places), [trial for trial in single if cards and measures_its_card(trial)]
        later = [(alone, cards), *(([t for t in self.waiting if t.ranks == n], at) for n, at in several.items())]
        self.waiting = [trial for trial in single if trial not in alone]

        def left() -> float:
            return within - (time.monotonic() - begin)

        def next_trial() -> Trial | None:
            if not free or time.monotonic() - begin >= time_limit:
                return None
            return next((t for t in self.waiting if within == math.inf or 1.2 * self.cost(t) <= left()), None)

        with ExitStack() as held:
            for path in self.ledgers:
                held.enter_context(ledger.locked(path))
                held.enter_context(ledger.locked(out / path.relative_to(self.results)))
            interrupt = held.enter_context(Interrupt())
            held.callback(lambda: [job.kill() for job in jobs])
            if (bar := progress_bar(say, total=total, unit="trial")) is not None:
                say = held.enter_context(bar).write
            while True:
                if interrupt.signal:
                    return False
                while trial := next_trial():
                    self.waiting.remove(trial)
                    here = machine(trial, len(self.places))
                    usual = [o.seconds for o in self.past if (o.suite, o.machine) == (trial.suite.name, here)]
                    limit = max(PATIENCE_S[trial.scale], 10 * median(usual or [0]))
                    jobs.append(Job(trial, out, here, free.pop(), limit, wandb, command))
                if later and not jobs:  # from now on a trial has its cards to itself
                    trials, free = later.pop(0)
                    self.waiting, cards = [*self.waiting, *trials], []
                    continue
                if not jobs or left() < 0:
                    break
                for job in list(jobs):
                    if (outcome := job.ended()) is None:
                        continue
                    jobs.remove(job)
                    free.append(job.environment)
                    if outcome.status == "oom" and cards:  # the others may have had the memory
                        alone.append(job.trial)
                        continue
                    ledger.append(ledger.place(self.results, outcome.scale, outcome.suite), outcome)
                    self.past.append(outcome)
                    todo = [*self.waiting, *(t for trials, _ in later for t in trials), *(job.trial for job in jobs)]
                    times = f"{outcome.seconds:.1f} s, ETA {duration(self.forecast(todo))}"
                    say(f"{total - len(todo)}/{total}  {job.trial}  {summary(outcome)}, {times}")
                    if bar is not None:
                        bar.update()
                time.sleep(POLL_S)
            if n := len(self.waiting) + len(jobs):
                say(f"{n} trials are left because the time is up: the same command continues")
        return True
