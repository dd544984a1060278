"""Train a GPT on one device.

    python train.py --config small.py --lr=1e-3 --model.n_layer=4
    python train.py --run small --resume

`-h` lists every option. A run writes all its files to out/<run>/; runtime/run.py lists them.
"""

import math
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from data.batches import Batches, Prefetcher, eval_batches
from data.prepare import DataConfig, prepare
from data.tokenizer import Tokenizer
from kernels import KernelChoice, KernelError, bind
from kernels.launch import allow_in_inductor
from model import checkpoint
from model.diagnostics import Probe
from model.evaluate import evaluate
from model.generate import generate
from model.gpt import GPT, ModelConfig
from model.optim import OptimizerConfig, build_optimizers, load_optimizers, lr_factor, set_lr
from runtime import hardware
from runtime.budget import LENGTHS, Budget, Length
from runtime.capture import InFlight, Step
from runtime.config import ConfigError, as_dict, build, flatten, merge, read, read_file, read_flags
from runtime.errors import UserError
from runtime.run import Interrupt, Run, Status, check_writable, choose_folder, commit, error_message, status_of

ROOT = Path(__file__).parent


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


def configure(argv: list[str]) -> tuple[Config, Path, dict]:
    """Read the flags. Returns the configuration, the run's folder (not created yet) and the checkpoint to resume from.

    Precedence: defaults < config file < flags. The run's length (steps, tokens or seconds) is replaced as a whole. A
    resumed run takes its own configuration in place of the defaults, and reads a config file only if `--config` is
    given. The checkpoint is {} unless `--resume` is. Raises `UserError`.
    """
    flags = read_flags(Config, argv, __doc__.partition("\n")[0])
    name = flags.get("config", Config.config)
    layers = [flatten(Config, read_file(name, ROOT / "configs")), flags]
    out, run, resume, overwrite = read(Config, merge(layers, LENGTHS), "out", "run", "resume", "overwrite")
    folder = choose_folder(Path(out), run, Path(name).stem, resume, overwrite)
    state = checkpoint.load(folder / "last.pt") if resume else {}
    if state:
        if "config" not in state:
            raise ConfigError(f"{folder} holds imported weights, without the optimizer state that resuming needs")
        layers = [flatten(Config, state["config"]), *(layers if "config" in flags else [flags])]
    config = build(Config, merge(layers, LENGTHS))
    return replace(config, run=folder.name), folder, state


class Trainer:
    """One training run: its model, optimizers, data and progress."""

    def __init__(self, config: Config, folder: Path, state: dict):
        """Set up the run, from the checkpoint `state` if it is not empty.

        Everything that can fail is done before `folder` is created, so that a refused run leaves no files behind.
        """
        self.config = config

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

        # Checks that need no data: the model's shape, the run's length, free disk space, the checkpoint.
        shape = config.model.resolved(config.data.expected_vocab_size, config.data.separator)
        self.budget = Budget(config, config.batch_size * shape.seq_len, state.get("budget", {}))
        self.warmup = self.budget.warmup_fraction(config.warmup)
        with torch.device("meta"):
            n_parameters = GPT(shape, kernels).n_parameters()
        check_writable(folder, 4 * 12 * n_parameters)  # four files (one is the partial) of fp32 weights and two moments
        if state:
            checkpoint.check_fits(state, shape, config.optimizer)

        # Data.
        data = prepare(config.data)
        self.tokenizer = data.tokenizer
        if state and self.tokenizer != Tokenizer.load(folder / "tokenizer.json"):
            raise ConfigError(f"{config.data.corpus} has other tokens now than when {folder} was trained on it")
        micro_batch = config.micro_batch or config.batch_size
        self.batches = Batches(data.train, shape.seq_len, config.seed, config.data.shift)
        self.eval_set = eval_batches(data.val, shape.seq_len, micro_batch, config.eval_tokens, config.data.shift)
        self.byte_lengths = torch.from_numpy(self.tokenizer.byte_lengths())

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
        self.in_flight = InFlight(self.device)
        self.probe: Probe | None = None  # set during a step whose diagnostics are due

        # Progress: zero, or the checkpoint's.
        self.step, self.sequences, self.saved_step = 0, 0, -1
        if state:
            self.restore(state)
        self.logged_step, self.train_seconds, self.data_wait = self.step, 0.0, 0.0  # the seconds are since that row

        # The run's folder. Nothing was written to it before this point.
        if config.overwrite and not state and folder.exists():
            shutil.rmtree(folder)
        self.run = Run(folder, as_dict(replace(config, resume=False, overwrite=False)), self.step if state else None)
        self.tokenizer.save(folder / "tokenizer.json")
        self.run.start_wandb(config.wandb, as_dict(config))
        self.run.say(f"run      {folder}" + (f", from step {self.step}" if state else ""))
        self.run.say(f"data     {config.data.corpus}, {len(data.train):,} tokens, vocabulary {shape.vocab_size:,}")
        self.run.say(f"model    {n_parameters:,} parameters, {self.flops:,} training FLOPs per token")
        self.run.say(f"machine  {hardware.describe(self.device, self.precision)}")
        self.run.say(f"kernels  {kernels}")
        if kernels.names["attention"] == "auto":
            self.run.say(f"         attention auto: {self.model.attention_choice(self.precision != 'fp32')}")
        self.run.say(f"compile  {compile_note}")
        self.run.say(f"capture  {capture_note}")
        if self.warmup >= 1:
            self.run.say(f"warm-up  {config.warmup:g} steps of {self.budget.steps}: the rate rises to the end")
        if self.device.type == "cuda":
            self.run.say("step     the first step compiles the kernels that Triton has not cached: up to half a minute")

    def restore(self, state: dict) -> None:
        """Load the checkpoint that `save` wrote."""
        self.model.load_state_dict(state["model"])
        load_optimizers(self.optimizers, state["optimizers"])
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())  # {}: the run was not in fp16
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.sequences, self.saved_step = state["step"], state["sequences"], state["step"]

    def save(self) -> None:
        """Write the checkpoint last.pt."""
        state = {
            "config": as_dict(self.config),
            "model_config": asdict(self.model.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "step": self.step,
            "sequences": self.sequences,
            "budget": self.budget.state(self.step),
            "metrics": self.run.rows[-1] if self.run.rows else {},
            "commit": commit(),
        }
        checkpoint.save(self.run.folder, state)
        self.saved_step = self.step

    def is_due(self, every: int) -> bool:
        """Whether an action that is repeated every `every` steps (0: never) is due after the current step."""
        return every > 0 and self.step % every == 0

    def loop(self) -> Status:
        """Train until the run's length is reached or something ends it early. Returns the status to record."""
        config, timer = self.config, time.perf_counter
        start_time = self.budget.start()
        # A run that died between a checkpoint and its evaluation has yet to evaluate.
        if self.step and self.is_due(config.eval_every):
            self.evaluate()
        pin = self.device.type == "cuda"
        with Interrupt() as interrupt, Prefetcher(self.batches, self.sequences, config.batch_size, pin) as data:
            while (progress := self.budget.progress(self.step)) < 1:
                # Stop early on SIGINT or SIGTERM, or at the time limit.
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
                saving = self.is_due(config.save_every) or self.is_due(config.eval_every)
                metrics = {"loss": loss.item(), "grad_norm": grad_norm.item()} if logging or saving else None
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
        set_lr(self.optimizers, lr_factor(self.config, progress, self.warmup))
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
        self.run.log(row, f"{line}  {tok_s:,.0f} tok/s" + (f", {mfu:.1%} of peak" if mfu else ""))
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
            row = self.budget.position(self.step) | evaluate(self.model, self.eval_set, self.byte_lengths)
        if row["val_loss"] <= self.run.best():
            checkpoint.mark_best(self.run.folder)
        line = f"evaluation {row['val_loss']:.4f} nats per token, {row['val_bpb']:.4f} bits per byte"
        self.run.log(row, f"step {self.step:6d}  {line}")

    def sample(self) -> None:
        """Generate 200 tokens after `sample_prompt`, with the run's seed, and append them to samples.txt."""
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
        if status == "finished":
            self.evaluate()
            if self.run.sampled_step < self.step:
                self.sample()
        self.run.plot()
        self.run.close(status, **self.run.summary(self.budget.position(self.step) | {"flops_per_token": self.flops}))
        return status


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit code: 0 finished or stopped at the time limit, 1 ended early, 2 invalid configuration."""
    try:
        trainer = Trainer(*configure(sys.argv[1:] if argv is None else argv))
    except (UserError, KernelError, ModuleNotFoundError, OSError) as error:
        print(f"error: {error_message(error)}", file=sys.stderr)
        return 2
    try:
        return 0 if trainer.finish(trainer.loop()) in ("finished", "time_limit") else 1
    except BaseException as error:
        status = status_of(error)
        with suppress(OSError):  # the disk may be full; `error` is the one to show
            trainer.run.close(status, step=trainer.step, error=f"{type(error).__name__}: {error}")
        if not isinstance(error, OSError) and status == "crashed":
            raise
        print(f"error: {status} at step {trainer.step}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
