"""Train a GPT, on one device or on many.

    python train.py    # a config that suits this machine
    python train.py --config small.py --lr=1e-3 --model.n_layer=4
    python train.py --run small --resume
    torchrun --nproc-per-node=8 -- train.py --config gpt2_124m.py

`-h` lists the options, and `-h model` those of the model. A run writes its files to out/<run>/ (runtime/run.py).
"""

import runtime  # noqa: F401 - checks the environment before torch is imported

# isort: split

import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from data.batches import Prefetcher, micro_batch_size
from data.prepare import DataConfig
from kernels import KernelChoice, KernelError
from kernels.launch import allow_in_inductor
from model import checkpoint
from model.choices import Choices, HardwareConfig, choose
from model.command_line import read_command_line
from model.costs import StepOps
from model.diagnostics import Probe
from model.evaluate import eval_loss, evaluate
from model.generate import continued
from model.gpt import ModelConfig
from model.introduction import introduction
from model.micro_batch import MicroBatch
from model.optim import OptimizerConfig, build_optimizers, lr_factor, set_lr, whole_state
from model.parallel import build_model, wrap
from model.precision import lower
from model.pretrained import load_pretrained
from model.run_data import RunData
from model.saver import Saver
from model.tensors import gradient_norm, local
from runtime.budget import Budget, Length
from runtime.capture import InFlight, Part, Step
from runtime.config import Heading, as_dict
from runtime.distributed import ALONE, World
from runtime.errors import UserError
from runtime.hardware import autocast
from runtime.job import Job
from runtime.meter import Meter, describe
from runtime.phase import phase
from runtime.profile import Profiler, parse_window
from runtime.program import leave
from runtime.random_state import random_states, restore_random_state, seed_rank
from runtime.records import RECIPE
from runtime.run import Run, Status, check_writable, commit
from runtime.signals import Interrupt
from runtime.text import use_utf8
from runtime.trackers import tracker_names

REFUSALS = (UserError, KernelError, ModuleNotFoundError, OSError)  # errors that a sentence explains


@dataclass(frozen=True)
class Config(HardwareConfig, OptimizerConfig, Length):
    """All options of a run. Those of the hardware, the optimizer and the run's length are inherited."""

    run_folder: Heading
    config: Annotated[str, "config file, looked up as a path and then in configs/ (default: by the device)"] = ""
    run: Annotated[str, "name of the run's folder (default: the config's name, numbered if it exists)"] = ""
    out: Annotated[str, "folder of all runs"] = "out"
    resume: Annotated[bool, "continue from the run's last checkpoint"] = False
    overwrite: Annotated[bool, "delete the run of this name first"] = False
    init_from: Annotated[str, "weights to start from: a run, a folder in Hugging Face's format, or hub:org/name"] = ""
    eval_only: Annotated[bool, "evaluate the run's best checkpoint, and do not train"] = False
    print_config: Annotated[bool, "print all options with what is chosen for this machine, and do not train"] = False
    seed: Annotated[int, "[0, 18446744073709551616)", "seed of the initial weights and the data order"] = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    kernels: KernelChoice = KernelChoice()
    batch: Heading
    batch_size: Annotated[int, "[1, inf)", "sequences per optimizer step"] = 32
    micro_batch: Annotated[Literal["auto"] | int, "[0, inf)", "sequences per pass (0: all; auto: what fits)"] = "auto"
    logging_and_evaluation: Heading
    log_every: Annotated[int, "[1, inf)", "steps between rows of metrics"] = 10
    eval_every: Annotated[int, "[1, inf)", "steps between evaluations; each saves a checkpoint first"] = 250
    eval_tokens: Annotated[int, "[1, inf)", "tokens to evaluate on, at most the whole validation split"] = 131072
    save_every: Annotated[int, "[1, inf)", "steps between checkpoints"] = 250
    sample_every: Annotated[int, "[0, inf)", "steps between samples (0: only at the end)"] = 500
    sample_prompt: Annotated[str, "prompt of the samples (empty: start a new document)"] = ""
    diag: Annotated[int, "[0, inf)", "steps between diagnostics of gradients, updates and attention (0: none)"] = 0
    profile: Annotated[str, "STEP or STEP:N, profile N (3) steps: a trace, and a table by op and phase"] = ""
    log: Annotated[str, "also log the rows to wandb, wandb-offline or tensorboard, or several with commas"] = "off"
    wandb: Annotated[Literal["off", "offline", "online"], "as --log=wandb or wandb-offline"] = "off"
    compare: Annotated[float, "[0, inf)", "seconds to measure what each kernel brings, after training (0: not)"] = 0.0

    def __post_init__(self):
        super().__post_init__()
        parse_window(self.profile)
        tracker_names(self.log, self.wandb)
        micro_batch_size(self.batch_size, self.micro_batch, ranks=1)

    @property
    def shape(self) -> ModelConfig:
        """The model's configuration with every derived value."""
        return self.model.resolved(self.data.expected_vocab_size, self.data.separator)


def configure(argv: list[str], world: World = ALONE) -> tuple[Config, Run, dict]:
    """The configuration that `argv` asks for, its run (not started yet), and the checkpoint to resume from if any."""
    return read_command_line(Config, argv, __doc__, world)


class Trainer:
    """One training run: its model, optimizers, data and progress."""

    def __init__(self, config: Config, run: Run, state: dict, interrupt: Interrupt | None = None, world: World = ALONE):
        """Set up the run, from the checkpoint `state` if it is not empty. `interrupt` catches signals already.

        Everything that can fail is done before the run is started, so that a refused one leaves no files behind.
        """
        self.config, self.run, self.interrupt, self.world = config, run, interrupt or Interrupt(), world

        # Device, precision, kernels, sharding, torch.compile and CUDA graphs.
        chosen = choose(config, world)
        self.device, self.precision, self.captured = chosen.device, chosen.precision, chosen.captured

        # Checks that need no data: memory, the run's length, free disk space.
        sizes = config.micro_batch, config.batch_size, state.get("micro_batch", 0)
        self.micro_batch = MicroBatch(*sizes, chosen.setup, self.device, world)
        self.budget = Budget(config, config.batch_size * config.shape.seq_len, state.get("budget", {}))
        self.warmup = self.budget.warmup_fraction(config.warmup)
        self.recipe = state.get("recipe", 1) if state else RECIPE  # a resumed run keeps its own
        self.step_fraction = self.budget.step_fraction if self.recipe > 1 else 0.0
        if world.is_main:  # four files (one is the partial) of fp32 weights and two moments
            check_writable(run.folder, 4 * 12 * config.shape.n_parameters())

        # Data: a tokenizer, training windows and an evaluation set.
        self.data = RunData(config, run.folder, state, self.micro_batch.size, world)

        # Model.
        torch.manual_seed(config.seed)
        self.model = build_model(chosen.setup, chosen.kernels, self.device)
        self.low = lower(self.model, config.precision, config.head_precision)
        if chosen.compiled:
            allow_in_inductor()
        forward = torch.compile(self.model) if chosen.compiled else self.model
        self.parallel = wrap(self.model, forward, world, self.captured)
        self.autocast = partial(autocast, self.device, self.precision)
        self.flops = self.model.flops_per_token()

        if world.rank:
            seed_rank(config.seed, 0, world)  # dropout differs by rank

        # Optimizers.
        self.optimizers = build_optimizers(self.model, config, world)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

        # The step. CUDA graphs need inputs and outputs at fixed addresses, so these tensors are allocated once.
        with self.device:
            self.token_weight = torch.tensor(1 / self.budget.tokens_per_step)  # all targets of the batch count
            self.loss, self.norm = torch.zeros(()), torch.zeros(())  # of the whole batch
        self.allocate()
        self.eval_loss = eval_loss(self.model, forward, self.captured, self.ids, self.targets, self.loss)
        trial = self.parallel.accumulate()(partial(self.forward_backward, first=True))
        self.micro_batch.confirm(self.allocate, trial)
        self.in_flight = InFlight(self.device)
        self.probe: Probe | None = None  # set during a step whose diagnostics are due
        self.saver = Saver(run.folder, self.device, world, chosen.setup.shard != "off")
        ops = StepOps(self.model, self.optimizers, self.micro_batch, chosen.compiled)
        self.profiler = Profiler(config.profile if world.is_main else "", run.folder, self.device, ops, run.say)

        # Progress: zero, or the checkpoint's.
        self.step, self.sequences, self.saved_step = 0, 0, -1
        if state:
            self.restore(state, run.folder / "last.pt")
        elif config.init_from:
            load_pretrained(self.model, config.init_from, world)
        self.meter = Meter(self.step, self.budget.tokens_per_step, self.flops, self.device, self.precision, world)
        self.start(state, chosen)

    def start(self, state: dict, chosen: Choices) -> None:
        """Create the run's folder, or open it to go on from the checkpoint `state`, and say what the run is."""
        config, run, world = self.config, self.run, self.world
        new_eval_set = "eval_set" in self.data.changes
        run.start(self.step if state else None)
        run.rows, run.sampled_step = world.broadcast((run.rows, run.sampled_step))
        if new_eval_set:
            run.best_after = max((row["step"] for row in run.rows if "val_loss" in row), default=0)
        if world.is_main:
            self.data.tokenizer.save(run.folder / "tokenizer.json")
            if state:
                checkpoint.reopen_best(run.folder, self.step, new_eval_set, run.is_best(self.step))
        run.start_trackers(tracker_names(config.log, config.wandb), as_dict(config), self.step)
        run.introduce(introduction(self, chosen, resumed=bool(state)))
        if world.restarted:
            run.log_restart(self.budget.position(self.step), world.size)

    def allocate(self) -> None:
        """Make the inputs of a micro-batch, and the step on them, which is captured anew."""
        shape = self.micro_batch.size, self.model.config.seq_len
        self.ids, self.targets = torch.zeros(2, *shape, dtype=torch.int64, device=self.device)
        parts = partial(self.forward_backward, first=True), partial(self.forward_backward, first=False), self.update
        self.step_parts = Step(parts, self.captured, self.config.capture == "on", lambda line: self.run.say(line))

    def restore(self, state: dict, path: Path) -> None:
        """Load the checkpoint `state` that `save` wrote to `path`. Raises `CheckpointError`."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        checkpoint.restore({"model": self.model.state_dict(), "optimizers": optimizers}, state, path, self.world)
        self.model.refresh_copies()
        self.low.restore(state, path, self.world)
        self.scaler.load_state_dict(self.scaler.state_dict() | state["scaler"])
        restore_random_state(state, self.device, self.world)
        self.step, self.sequences, self.saved_step = state["step"], state["sequences"], state["step"]
        self.run.best_after = state.get("best_after", 0)

    def save(self) -> None:
        """Copy the state, which a thread writes as last.pt."""
        state = {
            "config": as_dict(self.config),
            "model_config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizers": [whole_state(optimizer) for optimizer in self.optimizers],
            **self.low.state(),
            **random_states(self.device, self.world),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "sequences": self.sequences,
            "budget": self.budget.state(self.step),
            "recipe": self.recipe,
            "data": self.data.fingerprints,
            "best_after": self.run.best_after,
            "micro_batch": self.micro_batch.size,
            "metrics": self.run.rows[-1] if self.run.rows else {},
            "commit": commit(),
        }
        self.saver.save(state)
        self.saved_step = self.step

    def is_due(self, every: int) -> bool:
        """Whether what is done every `every` steps (0: never) is due after the current step."""
        return self.step > 0 and every > 0 and self.step % every == 0

    def loop(self) -> Status:
        """Train until the run's length is reached or something ends it early. Returns the status to record."""
        config, world = self.config, self.world
        self.interrupt.at_once = False  # from here on there is work to save
        self.budget.start()
        pin = self.device.type == "cuda"
        batches = Prefetcher(self.data.batches, self.sequences, config.batch_size, pin, world.rank, world.size)
        with batches as data, self.profiler:
            while True:
                # Evaluate and sample at the start, so that a run that died after its last checkpoint makes up for it.
                if self.is_due(config.eval_every):
                    self.evaluate()
                if self.is_due(config.sample_every):
                    self.sample()

                # Stop at the run's length, and early if a save has failed, on a signal, or at the time limit.
                self.saver.check()
                progress = self.budget.progress(self.step)
                progress, stop, asked = self.interrupt.agree(world, progress, self.budget.is_late())
                if progress >= 1 or stop:
                    return "finished" if progress >= 1 else stop

                self.profiler.step(self.step + 1)

                with self.meter.training():
                    # Get the next batch. A wait here means that reading data is the bottleneck, so it is recorded.
                    with self.meter.waiting():
                        inputs, targets = data.next()

                    # Take one optimizer step, with a probe attached if its diagnostics are due.
                    if config.diag and (self.step + 1) % config.diag == 0:
                        self.probe = Probe(self.model, self.optimizers, self.scaler.get_scale(), world)
                    loss, grad_norm = self.train_step(inputs, targets, progress)
                    self.step += 1
                    self.sequences += config.batch_size
                    self.in_flight.launched()

                    # Read loss and gradient norm only when they are needed: it makes the host wait for the device.
                    logging = self.step == 1 or self.is_due(config.log_every)
                    saving = asked or self.is_due(config.save_every) or self.is_due(config.eval_every)
                    metrics = None
                    if logging or saving or self.is_due(config.sample_every):
                        metrics = {"loss": world.sum(loss.item())[0], "grad_norm": world.broadcast(grad_norm.item())}
                self.budget.step_ended()

                if logging:
                    self.log(metrics, progress)
                if self.probe:
                    self.diagnose(inputs)

                # End a run that diverged, before its weights are saved.
                if metrics and (failure := self.run.failure(**metrics, vocab_size=self.model.config.vocab_size)):
                    return failure

                # Save before evaluation and sampling, so that their failure loses no step.
                if saving:
                    self.save()

    def train_step(self, inputs: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on ids and targets `[batch_size, T]`.

        `progress` (0 to 1) sets the learning rate. Returns the loss (nats per token) and the gradient norm as scalar
        tensors on the device, so that the host need not wait for them.
        """
        set_lr(self.optimizers, lr_factor(self.config, progress, self.warmup, self.step_fraction))
        while True:
            with self.step_parts(eager=self.probe is not None) as (first_pass, next_pass, update):
                if self.micro_batch.attempt(partial(self.accumulate, inputs, targets, first_pass, next_pass)):
                    self.parallel.reduce()
                    self.low.reduce()
                    if self.probe:
                        self.probe.before_step()
                    self.saver.before_update()
                    with phase("optimizer"):
                        update()
                    return self.loss.clone(), self.norm.clone()
            self.allocate()  # out of memory, and nothing has changed: begin again with smaller micro-batches
            self.run.say(f"batch    {self.micro_batch}, as memory did not suffice in step {self.step + 1}")

    def accumulate(self, inputs: Tensor, targets: Tensor, first_pass: Part, next_pass: Part) -> None:
        """Run forward and backward of each micro-batch of this rank's ids and targets."""
        if self.probe:
            self.probe.before_backward()
        micro_batches = list(zip(inputs.split(len(self.ids)), targets.split(len(self.ids)), strict=True))
        for i, (x, y) in enumerate(micro_batches):
            self.ids.copy_(x, non_blocking=True)
            self.targets.copy_(y, non_blocking=True)
            # The last backward pass sums the gradients over the ranks as it goes; a probe measures before that.
            alone = self.probe or i + 1 < len(micro_batches)
            with self.parallel.accumulate() if alone else nullcontext():
                (next_pass if i else first_pass)()
            if self.probe:
                self.probe.after_backward()

    def forward_backward(self, first: bool) -> None:
        """Accumulate loss and gradients of a micro-batch; the `first` one of a batch resets both.

        The loss of each micro-batch is its sum over targets divided by the number of targets in the whole batch. The
        gradients then add up to those of one large batch, however the targets are spread over micro-batches.
        """
        if first:
            self.loss.zero_()
            # Replays write to the gradients that the capture allocated in graph memory, so these must be kept.
            keep = self.step_parts.replaying and not torch.cuda.is_current_stream_capturing()
            self.model.zero_grad(set_to_none=not keep)
        with phase("forward"), self.autocast():
            loss = self.parallel(self.ids, self.targets, "sum", self.token_weight)
        with phase("backward"):
            self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def update(self) -> None:
        """Clip the gradients to the norm `clip` and step the optimizers."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = gradient_norm(self.model.parameters())
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # then no optimizer steps, and the scale is halved
        self.norm.copy_(torch.zeros_like(norm) if overflow else norm)
        # The optimizers multiply the gradients by this factor, which saves a pass over them.
        clip_factor = ((self.config.clip or math.inf) / (norm + 1e-6)).clamp(max=1)
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer, clip_factor)
        self.scaler.update()
        self.low.advance()

    def log(self, metrics: dict[str, float], progress: float) -> None:
        """Log a row: `metrics`, learning rate, speed and memory."""
        row = self.budget.position(self.step) | metrics | {"lr": self.optimizers[0].param_groups[0]["lr"]}
        row |= self.meter.row(self.step, self.step_parts.replaying)
        self.run.log(row, describe(row, progress, self.budget.remaining(self.step)))
        self.run.show_progress(progress, f"loss {row['loss']:.3f}, {row['tok_s']:,.0f} tok/s")

    def diagnose(self, inputs: Tensor) -> None:
        """Log what the probe measured during the step on `inputs`, and detach the probe."""
        with self.autocast():
            self.run.log(self.budget.position(self.step) | {"diag": self.probe.after_step(inputs)})
        self.probe = None

    def evaluate(self) -> None:
        """Log the validation loss, in nats per token and bits per byte, and keep the best checkpoint."""
        if any(row["step"] == self.step and "val_loss" in row for row in self.run.rows):
            return
        with self.autocast(), self.low.unmeasured():
            metrics = evaluate(self.model, self.data.eval_set, self.data.byte_lengths, self.eval_loss, self.world)
        row = self.budget.position(self.step) | metrics
        line = f"evaluation {row['val_loss']:.4f} nats per token, {row['val_bpb']:.4f} bits per byte"
        self.run.log(row, f"step {self.step:6d}  {line}")
        if self.run.is_best(self.step):
            self.saver.mark_best()

    def sample(self) -> None:
        """Generate 200 tokens after `sample_prompt`, with the run's seed, and append them to samples.txt."""
        if self.run.sampled_step >= self.step:
            return
        with self.autocast():
            text = continued(self.model, self.data.tokenizer, self.config.sample_prompt, 200, self.config.seed)
        self.run.add_sample(self.step, text)

    def finish(self, status: Status) -> Status:
        """Save, evaluate and sample one last time if the run went well, and close its record. Returns its status."""
        # The last steps may have diverged after the last loss that was read.
        if self.world.max(not all(local(p).isfinite().all() for p in self.model.parameters()))[0]:
            status = "nan"
        if status in ("finished", "interrupted", "time_limit") and self.saved_step < self.step:
            self.save()
        for last in (self.evaluate, self.sample):
            if status == "finished" and self.world.max(self.interrupt.signal)[0]:
                status = "interrupted"
            if status == "finished":
                last()
        self.run.plot()
        self.saver.wait()
        facts = {"flops_per_token": self.flops, "micro_batch": self.micro_batch.size} | self.low.facts()
        self.run.close(status, **self.run.summary(self.budget.position(self.step) | facts))
        self.run.say_what_next(self.config.doubled if status == "finished" else "")
        return status


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit code: 0 finished or stopped at the time limit, 1 ended early, 2 invalid configuration."""
    use_utf8()
    with Interrupt(at_once=True) as interrupt, Job(REFUSALS) as job:
        world = job.join()
        config, run, state = configure(sys.argv[1:] if argv is None else argv, world)
        job.run = run
        if world.broadcast(bool(state) and config.reached(state) and run.is_finished()):
            run.say(f"{run.folder} is finished, at step {state['step']}: nothing is left to do; more steps train on")
            return 0
        job.trainer = trainer = Trainer(config, run, state, interrupt, world)
        with trainer.saver:
            status = trainer.finish(trainer.loop())
        if config.compare and status == "finished" and world.is_main:
            job.trainer = trainer = None  # its memory is needed
            run.compare(config.compare)
        return 0 if status in ("finished", "time_limit") else 1
    return job.code


if __name__ == "__main__":
    leave(main())
