"""Train a GPT on one device.

    python train.py --config small.py --lr=1e-3 --model.n_layer=4
    python train.py --run small --resume

`-h` lists every option. A run writes all its files to out/<run>/; runtime/run.py lists them.
"""

import runtime  # noqa: F401 - checks the environment before torch is imported

# isort: split

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from data.batches import Batches, Prefetcher, eval_batches
from data.prepare import DataConfig, prepare, reopen
from data.tokenizer import Tokenizer
from kernels import KernelChoice, KernelError, bind
from kernels.launch import allow_in_inductor
from model import checkpoint
from model.diagnostics import Probe
from model.evaluate import evaluate
from model.generate import generate
from model.gpt import GPT, ModelConfig, check_kernels
from model.optim import OptimizerConfig, build_optimizers, load_optimizers, lr_factor, set_lr
from runtime import hardware
from runtime.budget import LENGTHS, Budget, Length
from runtime.capture import InFlight, Step
from runtime.config import ConfigError, as_dict, build, flatten, merge, read, read_file, read_flags
from runtime.doctor import warnings
from runtime.errors import UserError
from runtime.program import leave
from runtime.records import RECIPE
from runtime.run import Run, Status, check_writable, choose_folder, commit, end_early
from runtime.signals import Interrupt
from runtime.text import duration, say, typed, use_utf8

ROOT = Path(__file__).parent
REFUSALS = (UserError, KernelError, ModuleNotFoundError, OSError)  # errors that a sentence explains


@dataclass(frozen=True)
class Config(OptimizerConfig, Length):
    """All options of a run. The optimizer's and the run's length are inherited."""

    # run folder
    config: Annotated[str, "config file, looked up as a path and then in configs/"] = "small.py"
    run: Annotated[str, "name of the run's folder (default: the config's name, numbered if it exists)"] = ""
    out: Annotated[str, "folder of all runs"] = "out"
    resume: Annotated[bool, "continue from the run's last checkpoint"] = False
    overwrite: Annotated[bool, "delete the run of this name first"] = False
    seed: Annotated[int, "[0, 18446744073709551616)", "seed of the initial weights and the data order"] = 0
    # model, data, hardware
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    kernels: KernelChoice = KernelChoice()
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "autocast dtype; weights stay fp32"] = "auto"
    residual: Annotated[
        Literal["auto", "fp32", "bf16"], "dtype of the residual stream (auto: bf16 on a GPU in bf16)"
    ] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile (auto: on a CPU with a C++ compiler)"] = "auto"
    capture: Annotated[Literal["auto", "on", "off"], "run the step as CUDA graphs (auto: on a GPU)"] = "auto"
    deterministic: Annotated[bool, "use deterministic algorithms only (torch.use_deterministic_algorithms)"] = False
    # batch
    batch_size: Annotated[int, "[1, inf)", "sequences per optimizer step"] = 32
    micro_batch: Annotated[int, "[0, inf)", "sequences per forward and backward pass (0: batch_size)"] = 0
    # logging
    log_every: Annotated[int, "[1, inf)", "steps between rows of metrics"] = 10
    eval_every: Annotated[int, "[1, inf)", "steps between evaluations; each saves a checkpoint first"] = 250
    eval_tokens: Annotated[int, "[1, inf)", "tokens to evaluate on, at most the whole validation split"] = 131072
    save_every: Annotated[int, "[1, inf)", "steps between checkpoints"] = 250
    sample_every: Annotated[int, "[0, inf)", "steps between samples (0: only at the end)"] = 500
    sample_prompt: Annotated[str, "prompt of the samples (empty: start a new document)"] = ""
    diag: Annotated[int, "[0, inf)", "steps between diagnostics of gradients, updates and attention (0: none)"] = 0
    wandb: Annotated[Literal["off", "offline", "online"], "also log the metrics to Weights & Biases"] = "off"

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}")

    @property
    def shape(self) -> ModelConfig:
        """The model's configuration with every derived value."""
        return self.model.resolved(self.data.expected_vocab_size, self.data.separator)


def configure(argv: list[str]) -> tuple[Config, Run, dict]:
    """Read the flags. Returns the configuration, the run (not started yet) and the checkpoint to resume from.

    Precedence: defaults < config file < flags. The run's length (steps, tokens or seconds) is replaced as a whole. A
    resumed run takes its own configuration in place of the defaults, and reads a config file only if `--config` is
    given. The checkpoint is {} unless `--resume` is. Raises `UserError`.
    """
    flags = read_flags(Config, argv, __doc__.partition("\n")[0])
    if "sample_prompt" in flags:
        flags["sample_prompt"] = typed(flags["sample_prompt"])
    name = flags.get("config", Config.config)
    layers = [flatten(Config, read_file(name, ROOT / "configs")), flags]
    out, run, resume, overwrite = read(Config, merge(layers, LENGTHS), "out", "run", "resume", "overwrite")
    folder = choose_folder(Path(out), run, Path(name).stem, resume, overwrite)
    run = Run(folder, resume, overwrite)
    try:
        state = load_to_resume(folder / "last.pt") if resume else {}
        if state:
            layers = [flatten(Config, state["config"]), *(layers if "config" in flags else [flags])]
        config = replace(build(Config, merge(layers, LENGTHS)), run=folder.name)
        if state:
            checkpoint.check_fits(state, config.shape, config.optimizer)
            config.check_resumes(state)
    except BaseException:
        run.release()
        raise
    run.config = as_dict(replace(config, resume=False, overwrite=False))
    return config, run, state


def load_to_resume(path: Path) -> dict:
    """Load a checkpoint to resume from; its configuration gets the keys that it lacks. Raises `CheckpointError`."""
    state = checkpoint.load_to_resume(path)
    try:
        state["config"] = as_dict(build(Config, flatten(Config, state["config"])))
    except ConfigError as error:
        raise checkpoint.CheckpointError(f"{path} cannot be used: its config: {error}") from error
    return state


class Trainer:
    """One training run: its model, optimizers, data and progress."""

    def __init__(self, config: Config, run: Run, state: dict, interrupt: Interrupt | None = None):
        """Set up the run, from the checkpoint `state` if it is not empty. `interrupt` catches signals already.

        Everything that can fail is done before the run is started, so that a refused one leaves no files behind.
        """
        self.config, self.run, self.interrupt, folder = config, run, interrupt or Interrupt(), run.folder

        # Hardware: device, precision, kernels, torch.compile and CUDA graphs.
        self.device = hardware.pick_device(config.device)
        self.precision = hardware.pick_precision(config.precision, self.device)
        residual = hardware.pick_residual(config.residual, self.device, self.precision)
        kernels = bind(config.kernels, self.device)
        compiled, compile_note = hardware.pick_compile(config.compile, self.device)
        recompute_dropout = bool(config.model.recompute and config.model.dropout)
        captured, capture_note = hardware.pick_capture(
            config.capture, self.device, self.precision, compiled, recompute_dropout
        )

        # Checks that need no data: the model's shape, memory, the run's length, free disk space.
        shape = config.shape
        check_kernels(shape, kernels)
        n_parameters = shape.n_parameters()
        micro_batch = config.micro_batch or config.batch_size
        activations = shape.n_layer * shape.d_model  # per token: what every model keeps for the backward pass
        hardware.check_memory(self.device, n_parameters, activations, shape.seq_len, config.batch_size, micro_batch)
        self.budget = Budget(config, config.batch_size * shape.seq_len, state.get("budget", {}))
        self.warmup = self.budget.warmup_fraction(config.warmup)
        self.recipe = state.get("recipe", 1) if state else RECIPE  # a resumed run keeps its own
        self.step_fraction = self.budget.step_fraction if self.recipe > 1 else 0.0
        check_writable(folder, 4 * 12 * n_parameters)  # four files (one is the partial) of fp32 weights and two moments

        # Data. A resumed run gets its own tokens, if they are still cached: its corpus may have changed since.
        own = Tokenizer.load(folder / "tokenizer.json") if state else None
        data = (state and reopen(config.data, own, state.get("data", {}).get("text", ""))) or prepare(config.data, say)
        self.tokenizer = data.tokenizer
        if state and self.tokenizer != own:
            raise ConfigError(f"{config.data.corpus} has other tokens now than when {folder} was trained on it")
        self.batches = Batches(data.train, shape.seq_len, config.seed, config.data.shift)
        self.eval_set = eval_batches(data.val, shape.seq_len, micro_batch, config.eval_tokens, config.data.shift)
        self.byte_lengths = torch.from_numpy(self.tokenizer.byte_lengths())
        self.fingerprints = checkpoint.fingerprints(data.summary, self.eval_set)
        changes = checkpoint.data_changes(state, as_dict(config), self.fingerprints) if state else {}

        # Model.
        torch.manual_seed(config.seed)
        hardware.set_up(self.device, config.deterministic)
        with self.device:
            self.model = GPT(shape, kernels)
        self.model.residual = residual
        if self.precision != "fp32":
            self.model.keep_copies(hardware.DTYPES[self.precision])
        if compiled:
            allow_in_inductor()
        self.loss_function = torch.compile(self.model) if compiled else self.model
        self.autocast = partial(hardware.autocast, self.device, self.precision)
        self.flops = self.model.flops_per_token()
        self.peak = hardware.peak_flops(self.device, self.precision)

        # Optimizers.
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

        # The step. CUDA graphs need inputs and outputs at fixed addresses, so these tensors are allocated once.
        with self.device:
            self.ids, self.targets = torch.zeros(2, micro_batch, shape.seq_len, dtype=torch.int64)
            self.token_weight = torch.ones(())  # 1 / number of targets in the batch
            self.loss, self.norm = torch.zeros(()), torch.zeros(())  # of the whole batch
        parts = partial(self.forward_backward, first=True), partial(self.forward_backward, first=False), self.update
        self.step_parts = Step(parts, captured, config.capture == "on", lambda line: self.run.say(line))
        # Evaluation by the step's compiled forward takes 0.8 of the eager one's time. A forward without gradients takes
        # 0.67, but 4 to 13 s to compile. With dropout the step's is not the one to evaluate.
        compiled_loss = self.compiled_loss if compiled and not config.model.dropout else None
        self.eval_loss = self.captured_loss if captured and not compiled else compiled_loss
        self.eval_parts = Step([self.eval_forward], captured, False, lambda line: None)
        self.in_flight = InFlight(self.device)
        self.probe: Probe | None = None  # set during a step whose diagnostics are due
        self.saver = checkpoint.Saver(folder, self.device)

        # Progress: zero, or the checkpoint's.
        self.step, self.sequences, self.saved_step = 0, 0, -1
        self.best_after = 0  # best.pt has the lowest loss of the evaluations after this step, all on one set
        if state:
            self.restore(state, folder / "last.pt")
        self.logged_step, self.train_seconds, self.data_wait = self.step, 0.0, 0.0  # the seconds are since that row

        # The run's folder. Nothing was written to it before this point.
        run.start(self.step if state else None)
        if "eval_set" in changes:
            self.best_after = max((row["step"] for row in run.rows if "val_loss" in row), default=0)
            checkpoint.set_best_aside(folder, self.step)
        elif state and run.is_best(self.step, self.best_after):
            checkpoint.mark_best(folder)  # a kill may have come between the checkpoint and this
        self.tokenizer.save(folder / "tokenizer.json")
        self.run.start_wandb(config.wandb, as_dict(config))
        self.run.say(f"run      {folder}" + (f", from step {self.step}" if state else ""))
        self.run.say(f"data     {data}: {len(data.train):,} tokens, vocabulary {shape.vocab_size:,}")
        for change in changes.values():
            self.run.say(f"changed  {change}")
        self.run.say(f"model    {n_parameters:,} parameters, {self.flops:,} training FLOPs per token")
        self.run.say(f"machine  {hardware.describe(self.device, self.precision)}")
        for line in warnings(self.device, config.device):
            self.run.say(f"doctor   {line}")
        self.run.say(f"kernels  {kernels}")
        if kernels.names["attention"] == "auto":
            self.run.say(f"         attention auto: {self.model.attention_choice(self.precision != 'fp32')}")
        self.run.say(f"compile  {compile_note}")
        self.run.say(f"capture  {capture_note}")
        if self.warmup >= 1:
            self.run.say(f"warm-up  {config.warmup:g} steps of {self.budget.steps}: the rate rises to the end")
        if self.device.type == "cuda":
            self.run.say("step     the first step compiles the kernels that Triton has not cached: up to half a minute")

    def tensors(self) -> dict:
        """The parts of a checkpoint that have tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict, path: Path) -> None:
        """Load the checkpoint `state` that `save` wrote to `path`. Raises `CheckpointError`."""
        current = self.tensors()
        if self.device.type != "cuda" or state.get("cuda_rng") is None:
            state["cuda_rng"] = current["cuda_rng"]
        checkpoint.check_tensors(state, current, path)
        self.model.load_state_dict(state["model"])
        load_optimizers(self.optimizers, state["optimizers"])
        self.scaler.load_state_dict(self.scaler.state_dict() | state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.sequences, self.saved_step = state["step"], state["sequences"], state["step"]
        self.best_after = state.get("best_after", 0)

    def save(self) -> None:
        """Copy the state, which a thread writes as last.pt."""
        state = {
            "config": as_dict(self.config),
            "model_config": asdict(self.model.config),
            **self.tensors(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "sequences": self.sequences,
            "budget": self.budget.state(self.step),
            "recipe": self.recipe,
            "data": self.fingerprints,
            "best_after": self.best_after,
            "metrics": self.run.rows[-1] if self.run.rows else {},
            "commit": commit(),
        }
        self.saver.save(state)
        self.saved_step = self.step

    def is_due(self, every: int) -> bool:
        """Whether an action that is repeated every `every` steps (0: never) is due after the current step."""
        return every > 0 and self.step % every == 0

    def loop(self) -> Status:
        """Train until the run's length is reached or something ends it early. Returns the status to record."""
        config, interrupt, timer = self.config, self.interrupt, time.perf_counter
        interrupt.at_once = False  # from here on there is work to save
        start_time = self.budget.start()
        # A run that died between a checkpoint and its evaluation or sample has yet to do these.
        if self.step and self.is_due(config.eval_every):
            self.evaluate()
        if self.step and self.is_due(config.sample_every):
            self.sample()
        pin = self.device.type == "cuda"
        with Prefetcher(self.batches, self.sequences, config.batch_size, pin) as data:
            while (progress := self.budget.progress(self.step)) < 1:
                # Stop early if a save has failed, on a signal, or at the time limit.
                self.saver.check()
                if interrupt.signal:
                    return "interrupted"
                if 0 < config.time_limit <= timer() - start_time:
                    return "time_limit"

                # Get the next batch. A wait here means that reading data is the bottleneck, so it is recorded.
                step_start = timer()
                inputs, targets = data.next()
                self.data_wait += timer() - step_start

                # Take one optimizer step, with a probe attached if its diagnostics are due.
                if config.diag and (self.step + 1) % config.diag == 0:
                    self.probe = Probe(self.model, self.optimizers, self.scaler.get_scale())
                loss, grad_norm = self.train_step(inputs, targets, progress)
                self.step += 1
                self.sequences += config.batch_size
                self.in_flight.launched()

                # Read loss and gradient norm only when they are needed: it makes the host wait for the device.
                logging = self.step == 1 or self.is_due(config.log_every)
                saving = interrupt.take_save() or self.is_due(config.save_every) or self.is_due(config.eval_every)
                reading = logging or saving or self.is_due(config.sample_every)
                metrics = {"loss": loss.item(), "grad_norm": grad_norm.item()} if reading else None
                self.budget.step_ended()
                self.train_seconds += timer() - step_start

                # Log a row of metrics.
                if logging:
                    self.log(metrics, progress)

                # Log the diagnostics of this step.
                if self.probe:
                    self.diagnose(inputs)

                # End a run that diverged, before its weights are saved.
                if metrics and (failure := self.run.failure(**metrics, vocab_size=self.model.config.vocab_size)):
                    return failure

                # Save a checkpoint. This comes before evaluation and sampling, so that their failure loses no step.
                if saving:
                    self.save()

                # Evaluate on the validation set.
                if self.is_due(config.eval_every):
                    self.evaluate()

                # Generate a sample.
                if self.is_due(config.sample_every):
                    self.sample()
        return "finished"

    def train_step(self, inputs: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on ids and targets `[batch_size, T]`.

        `progress` (0 to 1) sets the learning rate. Returns the loss (nats per token) and the gradient norm as scalar
        tensors on the device, so that the host need not wait for them.
        """
        set_lr(self.optimizers, lr_factor(self.config, progress, self.warmup, self.step_fraction))
        self.token_weight.fill_(1 / int((targets >= 0).sum()))
        micro_batches = zip(inputs.split(len(self.ids)), targets.split(len(self.ids)), strict=True)
        with self.step_parts(eager=self.probe is not None) as (first_pass, next_pass, update):
            for i, (x, y) in enumerate(micro_batches):
                self.ids.copy_(x, non_blocking=True)
                self.targets.copy_(y, non_blocking=True)
                if i == 0:
                    first_pass()
                else:
                    next_pass()
                if self.probe:
                    self.probe.after_backward()
            self.saver.before_update()
            update()
        return self.loss.clone(), self.norm.clone()

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
        with self.autocast():
            loss = self.loss_function(self.ids, self.targets, "sum", self.token_weight)
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def update(self) -> None:
        """Clip the gradients to the norm `clip` and step the optimizers."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters()])
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # then no optimizer steps, and the scale is halved
        self.norm.copy_(torch.zeros_like(norm) if overflow else norm)
        if self.probe:
            self.probe.before_step()
        # The optimizers multiply the gradients by this factor, which saves a pass over them.
        clip_factor = ((self.config.clip or math.inf) / (norm + 1e-6)).clamp(max=1)
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer, clip_factor)
        self.scaler.update()

    def log(self, metrics: dict[str, float], progress: float) -> None:
        """Log a row: `metrics`, learning rate, memory, and the speed since the last row without evaluation, saving and
        sampling."""
        tok_s = (self.step - self.logged_step) * self.budget.tokens_per_step / self.train_seconds
        mfu = tok_s * self.flops / self.peak if self.peak else None
        row = self.budget.position(self.step) | metrics
        row |= {"lr": self.optimizers[0].param_groups[0]["lr"], "tok_s": tok_s, "mfu": mfu, "data_wait": self.data_wait}
        row |= hardware.memory(self.device, self.step_parts.replaying)
        line = f"step {self.step:6d}  {progress:4.0%}  loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}"
        line += f"  {tok_s:,.0f} tok/s" + (f", {mfu:.1%} of peak" if mfu else "")
        left = self.budget.remaining(self.step)
        times = f"{duration(row['seconds'])} elapsed" + ("" if left is None else f", {duration(left)} left")
        self.run.log(row, f"{line}  {times}")
        self.run.show_progress(progress, f"loss {row['loss']:.3f}, {tok_s:,.0f} tok/s")
        self.logged_step, self.train_seconds, self.data_wait = self.step, 0.0, 0.0

    def diagnose(self, inputs: Tensor) -> None:
        """Log what the probe measured during the step on `inputs`, and detach the probe."""
        with self.autocast():
            self.run.log(self.budget.position(self.step) | {"diag": self.probe.after_step(inputs)})
        self.probe = None

    def evaluate(self) -> None:
        """Log the validation loss, in nats per token and bits per byte, and keep the best checkpoint."""
        if any(row["step"] == self.step and "val_loss" in row for row in self.run.rows):
            return
        with self.autocast():
            metrics = evaluate(self.model, self.eval_set, self.byte_lengths, self.eval_loss)
        row = self.budget.position(self.step) | metrics
        line = f"evaluation {row['val_loss']:.4f} nats per token, {row['val_bpb']:.4f} bits per byte"
        self.run.log(row, f"step {self.step:6d}  {line}")
        if self.run.is_best(self.step, self.best_after):
            self.saver.mark_best()

    def compiled_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of a batch by the step's compiled forward. Called as in the step, it is not compiled again."""
        self.model.train()
        with torch.enable_grad():
            return self.loss_function(ids, targets, "sum", torch.ones_like(self.token_weight))

    def captured_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of a batch by a forward that is replayed as a CUDA graph."""
        self.ids.copy_(ids)
        self.targets.copy_(targets)
        with self.eval_parts() as (forward,):
            forward()
        return self.loss

    def eval_forward(self) -> None:
        self.loss.copy_(self.model(self.ids, self.targets, "sum"))

    def sample(self) -> None:
        """Generate 200 tokens after `sample_prompt`, with the run's seed, and append them to samples.txt."""
        if self.run.sampled_step >= self.step:
            return
        prompt = [self.tokenizer.eot, *self.tokenizer.encode(self.config.sample_prompt)]
        generator = torch.Generator().manual_seed(self.config.seed)
        options = {"stop": self.tokenizer.eot, "generator": generator}
        with self.autocast():
            (new_tokens,) = generate(self.model, [prompt], 200, self.tokenizer.ids, **options)
        self.run.add_sample(self.step, self.config.sample_prompt + self.tokenizer.decode(new_tokens))

    def finish(self, status: Status) -> Status:
        """Save, evaluate and sample one last time if the run went well, and close its record. Returns its status."""
        # The last steps may have diverged after the last loss that was read.
        if not all(p.isfinite().all() for p in self.model.parameters()):
            status = "nan"
        if status in ("finished", "interrupted", "time_limit") and self.saved_step < self.step:
            self.save()
        for last in (self.evaluate, self.sample):
            if status == "finished" and self.interrupt.signal:
                status = "interrupted"
            if status == "finished":
                last()
        self.run.plot()
        self.saver.wait()
        self.run.close(status, **self.run.summary(self.budget.position(self.step) | {"flops_per_token": self.flops}))
        length = next(name for name in LENGTHS if getattr(self.config, name))
        longer = f"--{length}={2 * getattr(self.config, length)}" if status == "finished" else ""
        self.run.say_what_next(longer)
        return status


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit code: 0 finished or stopped at the time limit, 1 ended early, 2 invalid configuration."""
    use_utf8()
    run = trainer = None
    with Interrupt(at_once=True) as interrupt:
        try:
            config, run, state = configure(sys.argv[1:] if argv is None else argv)
            if state and config.reached(state) and run.is_finished():
                say(f"{run.folder} is finished, at step {state['step']}: nothing is left to do; more steps train on")
                return 0
            trainer = Trainer(config, run, state, interrupt)
            with trainer.saver:
                return 0 if trainer.finish(trainer.loop()) in ("finished", "time_limit") else 1
        except (Exception, KeyboardInterrupt) as error:
            if (code := end_early(error, run, trainer.step if trainer else 0, REFUSALS)) is None:
                raise
            return code
        finally:
            if run is not None:
                run.release()


if __name__ == "__main__":
    leave(main())
