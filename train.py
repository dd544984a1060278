"""Train a GPT: knobs, set-up, loop.

    python train.py --config small.py --lr=1e-3 --model.n_layer=4
    python train.py --run small --resume

`-h` lists every knob. Everything a run leaves is under out/<run>/ (runtime/run.py says what).
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
from runtime.run import Interrupt, Run, Status, check_writable, choose_folder, commit, explained, status_of

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Config(OptimizerConfig, Length):
    """Every knob of a run: those of its optimizer and its length, and these."""

    # the run
    config: Annotated[str, "file of assignments, looked for as given and in configs/"] = "small.py"
    run: Annotated[str, "name of the run's folder (default: the config's name, numbered when taken)"] = ""
    out: Annotated[str, "folder of the runs"] = "out"
    resume: Annotated[bool, "go on from the run's last checkpoint"] = False
    overwrite: Annotated[bool, "discard the run of that name first"] = False
    seed: Annotated[int, "[0, 18446744073709551616)", "of the initial weights and the order of the data"] = 0
    # what is trained, on what, with what
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    kernels: KernelChoice = KernelChoice()
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "of the matrix products; weights stay fp32"] = "auto"
    residual: Annotated[Literal["auto", "fp32", "bf16"], "the residual stream (auto: bf16 on a GPU in bf16)"] = "auto"
    compile: Annotated[Literal["auto", "on", "off"], "torch.compile (auto: on a CPU with a C++ compiler)"] = "auto"
    capture: Annotated[Literal["auto", "on", "off"], "replay the step as CUDA graphs (auto: on a GPU)"] = "auto"
    deterministic: Annotated[bool, "refuse operations that differ from run to run"] = False
    # batch
    batch_size: Annotated[int, "[1, inf)", "sequences in an optimizer step"] = 32
    micro_batch: Annotated[int, "[0, inf)", "sequences in a forward and backward pass (0: batch_size)"] = 0
    # records
    log_every: Annotated[int, "[1, inf)", "steps between rows of metrics"] = 10
    eval_every: Annotated[int, "[1, inf)", "steps between evaluations"] = 250
    eval_tokens: Annotated[int, "[1, inf)", "size of the evaluation set (at most the validation split)"] = 131072
    save_every: Annotated[int, "[1, inf)", "steps between checkpoints, besides one before each evaluation"] = 250
    sample_every: Annotated[int, "[0, inf)", "steps between samples, besides those at the end (0: only those)"] = 500
    sample_prompt: Annotated[str, "what samples go on from (nothing: a new document)"] = ""
    diag: Annotated[int, "[0, inf)", "steps between diagnostics of gradients, updates and attention (0: none)"] = 0
    wandb: Annotated[Literal["off", "offline", "online"], "mirror the metrics to Weights & Biases"] = "off"

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}")


def configure(argv: list[str]) -> tuple[Config, Path, dict]:
    """The configuration that `argv` asks for, its run's folder, not made yet, and the checkpoint to resume from.

    Precedence: defaults < config file < flags, a run's length replacing one of lower precedence. A resumed run starts
    from its own configuration instead of the defaults, and reads a config file only when `--config` is given.
    """
    flags = read_flags(Config, argv, __doc__.partition("\n")[0])
    name = flags.get("config", Config.config)
    layers = [flatten(Config, read_file(name, ROOT / "configs")), flags]
    out, run, resume, overwrite = read(Config, merge(layers, LENGTHS), "out", "run", "resume", "overwrite")
    folder = choose_folder(Path(out), run, Path(name).stem, resume, overwrite)
    state = checkpoint.load(folder / "last.pt") if resume else {}
    if state:
        if "config" not in state:
            raise ConfigError(f"{folder} holds imported weights, which come without what resuming takes")
        layers = [flatten(Config, state["config"]), *(layers if "config" in flags else [flags])]
    config = build(Config, merge(layers, LENGTHS))
    return replace(config, run=folder.name), folder, state


class Trainer:
    """One run: what it computes with, how far it is, and the steps that take it further."""

    def __init__(self, config: Config, folder: Path, state: dict):
        """Check everything, prepare the corpus, build or restore the model; then, and only then, open the folder."""
        self.config = config

        # The machine, and what it is asked for.
        self.device = hardware.pick_device(config.device)
        self.precision = hardware.pick_precision(config.precision, self.device)
        kernels = bind(config.kernels, self.device)
        compiled, compiling = hardware.pick_compile(config.compile, self.device)
        redraws = bool(config.model.recompute and config.model.dropout)
        captured, capturing = hardware.pick_capture(config.capture, self.device, self.precision, compiled, redraws)
        residual = hardware.pick_residual(config.residual, self.device, self.precision)

        # The model's shape, the run's length, room on the disk.
        shape = config.model.resolved(config.data.expected_vocab_size, config.data.separator)
        self.budget = Budget(config, config.batch_size * shape.seq_len, state.get("budget", {}))
        self.warmup = self.budget.share(config.warmup)
        with torch.device("meta"):
            n_parameters = GPT(shape, kernels).n_parameters()
        check_writable(folder, 4 * 12 * n_parameters)  # three checkpoints and one being written: weights, two moments
        if state:
            checkpoint.check_fits(state, shape, config.optimizer)

        # The data.
        data = prepare(config.data)
        self.tokenizer = data.tokenizer
        if state and self.tokenizer != Tokenizer.load(folder / "tokenizer.json"):
            raise ConfigError(f"{config.data.corpus} has other tokens now than when {folder} was trained on it")
        micro_batch = config.micro_batch or config.batch_size
        self.batches = Batches(data.train, shape.seq_len, config.seed, config.data.shift)
        self.eval_set = eval_batches(data.val, shape.seq_len, micro_batch, config.eval_tokens, config.data.shift)
        self.byte_lengths = torch.from_numpy(self.tokenizer.byte_lengths())

        # The model and its optimizers.
        torch.manual_seed(config.seed)
        hardware.set_up(self.device, config.deterministic)
        with self.device:
            self.model = GPT(shape, kernels)
        self.model.residual = residual
        if self.precision != "fp32":
            self.model.keep_copies(hardware.DTYPES[self.precision])
        if compiled:
            allow_in_inductor()
        self.loss_of = torch.compile(self.model) if compiled else self.model
        self.optimizers = build_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.autocast = partial(hardware.autocast, self.device, self.precision)

        # What a step reads and leaves, in tensors that keep their place: a micro-batch, and the share of a token in the
        # batch's loss; that loss, and its gradient's norm.
        with self.device:
            self.ids, self.targets = torch.zeros(2, micro_batch, shape.seq_len, dtype=torch.int64)
            self.share, self.loss, self.norm = torch.ones(()), torch.zeros(()), torch.zeros(())
        parts = partial(self.forward_backward, first=True), partial(self.forward_backward, first=False), self.update
        self.parts = Step(parts, captured, config.capture == "on", lambda line: self.run.say(line))
        self.in_flight = InFlight(self.device)
        self.probe: Probe | None = None  # of a step whose diagnostics are due

        # How far the run is, and its record.
        self.step, self.sequences, self.saved = 0, 0, -1  # done so far; the step of the last checkpoint
        if state:
            self.restore(state)
        elif config.overwrite and folder.exists():
            shutil.rmtree(folder)
        self.logged, self.busy, self.waited = self.step, 0.0, 0.0  # the last row's step, and seconds since
        self.run = Run(folder, as_dict(replace(config, resume=False, overwrite=False)), self.step if state else None)
        self.tokenizer.save(folder / "tokenizer.json")
        self.run.start_mirror(config.wandb, as_dict(config))
        self.peak, self.flops = hardware.peak_flops(self.device, self.precision), self.model.flops_per_token()
        self.run.say(f"run      {folder}" + (f", from step {self.step}" if state else ""))
        self.run.say(f"data     {config.data.corpus}, {len(data.train):,} tokens, vocabulary {shape.vocab_size:,}")
        self.run.say(f"model    {n_parameters:,} parameters, {self.flops:,} training FLOPs a token")
        self.run.say(f"machine  {hardware.describe(self.device, self.precision)}")
        self.run.say(f"kernels  {kernels}")
        if kernels.names["attention"] == "auto":
            self.run.say(f"         attention auto: {self.model.attention_choice(self.precision != 'fp32')}")
        self.run.say(f"compile  {compiling}")
        self.run.say(f"capture  {capturing}")
        if self.warmup >= 1:
            self.run.say(f"warm-up  {config.warmup:g} steps of {self.budget.steps}: the rate rises to the end")
        if self.device.type == "cuda":
            self.run.say("step     the first compiles its kernels, unless Triton's cache has them: up to half a minute")

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizers(self.optimizers, state["optimizers"])
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())  # empty: it had another precision
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state.get("cuda_rng") is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.sequences, self.saved = state["step"], state["sequences"], state["step"]

    def save(self) -> None:
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
        self.saved = self.step

    def loop(self) -> Status:
        """Train until the budget is used up or something ends the run early."""
        config, timer = self.config, time.perf_counter
        start = self.budget.start()
        if self.step and self.step % config.eval_every == 0:
            self.evaluate()  # in case the run died between its checkpoint and this
        pin = self.device.type == "cuda"
        with Interrupt() as interrupt, Prefetcher(self.batches, self.sequences, config.batch_size, pin) as data:
            while (progress := self.budget.progress(self.step)) < 1:
                if interrupt.signal:
                    return "interrupted"
                if 0 < config.time_limit <= timer() - start:
                    return "time_limit"

                # A batch, and one optimizer step on it.
                begin = timer()
                inputs, targets = data.next()
                self.waited += timer() - begin
                if config.diag and (self.step + 1) % config.diag == 0:
                    self.probe = Probe(self.model, self.optimizers, self.scaler.get_scale())
                loss, norm = self.train_step(inputs, targets, progress)
                self.step += 1
                self.sequences += config.batch_size
                self.in_flight.launched()

                # Every `log_every` steps, and before a checkpoint, the host waits for loss and norm, and looks at them.
                evaluating = self.step % config.eval_every == 0
                saving = evaluating or self.step % config.save_every == 0
                logging = self.step == 1 or self.step % config.log_every == 0
                row = {"loss": loss.item(), "grad_norm": norm.item()} if saving or logging else {}
                self.budget.step_ended()
                self.busy += timer() - begin
                if logging:
                    self.log(row, progress)
                if self.probe:
                    self.diagnose(inputs)
                if row and (status := self.run.trouble(row["loss"], row["grad_norm"], self.model.config.vocab_size)):
                    return status

                # Once in a while: a checkpoint, then what may fail.
                if saving:
                    self.save()
                if evaluating:
                    self.evaluate()
                if config.sample_every and self.step % config.sample_every == 0:
                    self.sample()
        return "finished"

    def train_step(self, inputs: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on `[batch_size, T]` ids. Returns loss and gradient norm, left on the device."""
        config = self.config
        set_lr(self.optimizers, lr_factor(config, progress, self.warmup))
        self.share.fill_(1 / int((targets >= 0).sum()))
        micro_batches = zip(inputs.split(len(self.ids)), targets.split(len(self.ids)), strict=True)
        with self.parts(eager=self.probe is not None) as (first, other, update):
            for i, (x, y) in enumerate(micro_batches):
                self.ids.copy_(x, non_blocking=True)
                self.targets.copy_(y, non_blocking=True)
                other() if i else first()
                if self.probe:
                    self.probe.accumulated()
            update()
        return self.loss.clone(), self.norm.clone()

    def forward_backward(self, first: bool) -> None:
        """Add the loss and gradients of a micro-batch to those of the batch, which begins with the `first`.

        The summed loss of every micro-batch is divided by the tokens of the whole batch, so that accumulating gives
        the large batch's gradient wherever its targets are."""
        if first:
            self.loss.zero_()
            # A graph makes its gradients anew when it is captured, and writes them there from then on: they stay.
            keep = self.parts.replaying and not torch.cuda.is_current_stream_capturing()
            self.model.zero_grad(set_to_none=not keep)
        with self.autocast():
            loss = self.loss_of(self.ids, self.targets, "sum", self.share)
        self.scaler.scale(loss).backward()
        self.loss += loss.detach()

    def update(self) -> None:
        """The optimizers' steps, on gradients whose norm is limited to `clip`."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters()])
        overflow = self.scaler.is_enabled() and not norm.isfinite()  # the scale falls, and no optimizer steps
        self.norm.copy_(torch.zeros_like(norm) if overflow else norm)
        if self.probe:
            self.probe.before()
        clipping = ((self.config.clip or math.inf) / (norm + 1e-6)).clamp(max=1)
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer, clipping)
        self.scaler.update()

    def log(self, row: dict[str, float], progress: float) -> None:
        """Record a row. Speed is over the steps since the last one, without evaluating, saving and sampling."""
        speed = (self.step - self.logged) * self.budget.tokens_per_step / self.busy
        mfu = speed * self.flops / self.peak if self.peak else None
        row = row | {"lr": self.optimizers[0].param_groups[0]["lr"], "tok_s": speed, "mfu": mfu}
        row |= {"data_wait": self.waited, **hardware.memory(self.device, self.parts.replaying)}
        losses, share = f"loss {row['loss']:.4f}  norm {row['grad_norm']:.2f}", f", {mfu:.1%} of peak" if mfu else ""
        line = f"step {self.step:6d}  {progress:4.0%}  {losses}  {speed:,.0f} tok/s{share}"
        self.run.log(self.budget.position(self.step) | row, line)
        self.run.show_progress(progress, f"loss {row['loss']:.3f}, {speed:,.0f} tok/s")
        self.logged, self.busy, self.waited = self.step, 0.0, 0.0

    def diagnose(self, inputs: Tensor) -> None:
        """Record what the probe saw of the step on `inputs`."""
        with self.autocast():
            self.run.log(self.budget.position(self.step) | {"diag": self.probe.after(inputs)})
        self.probe = None

    def evaluate(self) -> None:
        """Record the loss on the fixed evaluation set, in nats a token and bits a byte of text; keep the best."""
        if any(row["step"] == self.step and "val_loss" in row for row in self.run.rows):
            return
        with self.autocast():
            row = self.budget.position(self.step) | evaluate(self.model, self.eval_set, self.byte_lengths)
        if row["val_loss"] <= self.run.best():
            checkpoint.mark_best(self.run.folder)
        line = f"evaluation {row['val_loss']:.4f} nats a token, {row['val_bpb']:.4f} bits a byte"
        self.run.log(row, f"step {self.step:6d}  {line}")

    def sample(self) -> None:
        """Record what the model writes now."""
        ids = [self.tokenizer.eot, *self.tokenizer.encode(self.config.sample_prompt)]
        with self.autocast():
            seeded = torch.Generator().manual_seed(self.config.seed)
            new = generate(self.model, [ids], 200, self.tokenizer.ids, stop=self.tokenizer.eot, generator=seeded)[0]
        self.run.add_sample(self.step, self.config.sample_prompt + self.tokenizer.decode(new))

    def finish(self, status: Status) -> Status:
        """Save what is worth saving, close the record, and return how it went."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            status = "nan"  # since the last step whose loss was looked at
        if status in ("finished", "interrupted", "time_limit") and self.saved < self.step:
            self.save()
        if status == "finished":
            self.evaluate()
            if self.run.sampled < self.step:
                self.sample()
        self.run.plot()
        self.run.close(status, **self.run.summary(self.budget.position(self.step) | {"flops_per_token": self.flops}))
        return status


def main(argv: list[str] | None = None) -> int:
    """Train as the flags say. Returns the exit code: 0 finished or out of time, 1 ended early, 2 refused."""
    try:
        trainer = Trainer(*configure(sys.argv[1:] if argv is None else argv))
    except (UserError, KernelError, ModuleNotFoundError, OSError) as error:
        print(f"error: {explained(error)}", file=sys.stderr)
        return 2
    try:
        return 0 if trainer.finish(trainer.loop()) in ("finished", "time_limit") else 1
    except BaseException as error:
        status = status_of(error)
        with suppress(OSError):  # a full disk, say, which is then the error to show
            trainer.run.close(status, step=trainer.step, error=f"{type(error).__name__}: {error}")
        if not isinstance(error, OSError) and status == "crashed":
            raise
        print(f"error: {status} at step {trainer.step}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
