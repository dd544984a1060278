"""A run's model for the programs that use one: their flags, and loading it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer import Tokenizer
from kernels import KernelChoice, KernelError, bind
from model import checkpoint
from model.gpt import GPT, ModelConfig
from runtime.config import ConfigError
from runtime.hardware import DTYPES, Precision, autocast, pick_device, pick_precision
from runtime.run import find


def load_run(
    folder: Path, device: torch.device, kernels: str = "auto", which: str = "best", precision: Precision = "fp32"
) -> tuple[GPT, Tokenizer]:
    """Load the model and tokenizer of a run from `best.pt`, or from `last.pt` if `which` is "last" or there is no best.

    The model's dropout is 0, so that it runs with every kernel. In half precision its weights are cast once, here."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    path = folder / f"{which}.pt"
    path = path if path.exists() else folder / "last.pt"
    state = checkpoint.load(path, device)
    with device:
        model = GPT(ModelConfig(**state["model_config"] | {"dropout": 0.0}), bind(KernelChoice(every=kernels), device))
    if precision != "fp32":
        model.keep_copies(DTYPES[precision])
    checkpoint.load_weights(model, state, path)
    return model.eval(), tokenizer


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of `load`: which run and checkpoint, and the device, precision and kernels."""
    add = parser.add_argument
    add("--run", required=True, help="the run's folder, such as out/small, or its name in out/")
    add("--checkpoint", choices=("best", "last"), default="best", help="which checkpoint (default best)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default auto)")
    add("--precision", default="fp32", choices=("auto", *DTYPES), help="autocast dtype (default fp32)")
    add("--kernels", default="auto", choices=("auto", "torch", "triton"), help="kernels of all ops (default auto)")


class Loaded(NamedTuple):
    """A run's model, and the context in which to run it."""

    folder: Path
    model: GPT
    tokenizer: Tokenizer
    autocast: Callable[[], AbstractContextManager]


def load(args: Namespace) -> Loaded:
    """Load the run that the flags name. Raises `UserError`."""
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    folder = find(args.run)
    try:
        model, tokenizer = load_run(folder, device, args.kernels, args.checkpoint, precision)
    except KernelError as error:
        raise ConfigError(str(error)) from error
    return Loaded(folder, model, tokenizer, partial(autocast, device, precision))
