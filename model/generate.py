"""Sampling from a trained model: `python -m model.generate --run out/small --prompt "def "`."""

import argparse
import codecs
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from kernels import KernelChoice, KernelError, bind
from model import checkpoint
from model.evaluate import evaluating
from model.gpt import GPT, Cache, ModelConfig
from runtime.config import ConfigError
from runtime.errors import UserError
from runtime.hardware import DTYPES, autocast, pick_device, pick_precision
from runtime.run import find


def next_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one id a row from `[B, V]` logits: `[B]`.

    Temperature 0 takes the likeliest. `top_k` keeps that many (0: all); `top_p` keeps the fewest likeliest tokens whose
    probabilities reach it (1: all), the first always among them.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0
    if top_k:
        probabilities[:, top_k:] = 0.0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ids: Sequence[int] | None = None,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: int | None = None,
    generator: torch.Generator,
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """Continue each prompt (at least one id) by up to `max_new_tokens`, ending a row early at the id `stop`.

    Only `ids` are drawn (None: all that the model has, which may be more than its tokenizer: a padded vocabulary).

    The model sees at most its last `seq_len` tokens; until the longest row has more, each is computed once and cached.
    `on_token(row, id)` is called as tokens are drawn; `generator` lives on the CPU, so that a seed gives the same text
    on every device. Returns each row's new ids without `stop`.
    """
    device, seq_len = model.embedding.weight.device, model.config.seq_len
    barred = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if ids is not None:
        barred[:] = True
        barred[list(ids)] = False
    rows, new = [list(p) for p in prompts], [[] for _ in prompts]
    live, cache = list(range(len(rows))), None
    with evaluating(model):
        for _ in range(max_new_tokens):
            if cache is None or cache.length == seq_len:  # full: every position moves, and all that follows from it
                texts = [rows[i][-seq_len:] for i in live]
                longest = max(map(len, texts))
                padding = [longest - len(text) for text in texts]
                inputs = [[0] * n + text for n, text in zip(padding, texts, strict=True)]
                cache = Cache(model.config, torch.tensor(padding, device=device))
            else:
                inputs = [rows[i][-1:] for i in live]
            logits = model.logits(torch.tensor(inputs, device=device), cache).cpu()
            drawn = next_tokens(logits.masked_fill(barred, -math.inf), temperature, top_k, top_p, generator).tolist()
            going = [n for n, token in enumerate(drawn) if token != stop]
            for n in going:
                i, token = live[n], drawn[n]
                rows[i].append(token)
                new[i].append(token)
                on_token(i, token)
            if not going:
                break
            if len(going) < len(live):
                live = [live[n] for n in going]
                cache.keep(going)
    return new


def load_run(folder: Path, device: torch.device, kernels: str = "auto", which: str = "best") -> tuple[GPT, Tokenizer]:
    """The model and tokenizer of a run, from its `best.pt` (or `last.pt` where there is none, or when asked for).

    It has no dropout, which is for training, so that any kernels do."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    path = folder / f"{which}.pt"
    state = checkpoint.load(path if path.exists() else folder / "last.pt", device)
    with device:
        model = GPT(ModelConfig(**state["model_config"] | {"dropout": 0.0}), bind(KernelChoice(every=kernels), device))
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.generate", description="Write text with a trained model.")
    add = parser.add_argument
    add("--run", required=True, help="folder of the run, such as out/small")
    add("--checkpoint", choices=("best", "last"), default="best", help="which checkpoint (default best)")
    add("--prompt", action="append", help="text to go on from; give it again for a batch (default: a new document)")
    add("--tokens", type=int, default=200, help="tokens to write at most (default 200)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest only (default 0: all)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that reach this probability (default 1: all)")
    add("--stop", help="end at this text's token (default: the end-of-text token)")
    add("--seed", type=int, default=0, help="same seed, same text (default 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default auto)")
    add("--precision", default="fp32", choices=("auto", *DTYPES), help="of the matrix products (default fp32)")
    add("--kernels", default="auto", choices=("auto", "torch", "triton"), help="of every op (default auto)")
    args = parser.parse_args(argv)
    for flag, good, rule in (
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top-k", args.top_k >= 0, "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "more than 0 and at most 1"),
        ("tokens", args.tokens >= 1, "at least 1"),
    ):
        if not good:
            parser.error(f"--{flag} must be {rule}")
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        model, tokenizer = load_run(find(args.run), device, args.kernels, args.checkpoint)
        stop = tokenizer.eot if args.stop is None else _one_token(tokenizer, args.stop)
    except (UserError, KernelError) as error:
        parser.error(str(error))
    texts = args.prompt or [""]
    prompts = [[tokenizer.eot, *tokenizer.encode(text)] for text in texts]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def stream(_: int, token: int) -> None:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    single = len(texts) == 1
    if single:
        print(texts[0], end="", flush=True)
    with autocast(device, precision):
        rows = generate(
            model, prompts, args.tokens, tokenizer.ids,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, stop=stop,
            generator=torch.Generator().manual_seed(args.seed),
            on_token=stream if single else lambda row, token: None,
        )  # fmt: skip
    if single:
        print(decoder.decode(b"", final=True))
    else:
        for text, row in zip(texts, rows, strict=True):
            print(json.dumps({"prompt": text, "text": tokenizer.decode(row)}, ensure_ascii=False))
    return 0


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(f"--stop {text!r} is {len(ids)} tokens in this run's vocabulary; it must be one")
    return ids[0]


if __name__ == "__main__":
    sys.exit(main())
