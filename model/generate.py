"""Generate text with a trained model: `python -m model.generate --run out/small --prompt "def "`."""

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
from model.gpt import GPT, KVCache, ModelConfig
from runtime.config import ConfigError
from runtime.errors import UserError
from runtime.hardware import DTYPES, autocast, pick_device, pick_precision
from runtime.run import find


def next_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Sample one id per row of logits `[B, V]`. Returns `[B]`.

    Temperature 0 is greedy. `top_k` keeps the k most likely tokens (0: all). `top_p` keeps the smallest set of most
    likely tokens whose probabilities sum to at least `top_p` (1: all); the most likely token is always kept.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    probabilities = logits.softmax(-1)
    preceding = probabilities.cumsum(-1) - probabilities  # sum over more likely tokens
    probabilities[preceding >= top_p] = 0.0
    if top_k:
        probabilities[:, top_k:] = 0.0
    sampled = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, sampled).squeeze(-1)


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
    """Continue each prompt (at least one id) by up to `max_new_tokens`; a row ends early at the id `stop`.

    Only `ids` are sampled (None: all ids of the model, whose vocabulary may be padded beyond the tokenizer's). The
    context is the last `seq_len` tokens. Keys and values are cached until a row reaches that length; then the window
    slides, and every step recomputes them. `on_token(row, id)` is called for each new token. `generator` is on the CPU,
    so that a seed gives the same text on every device. Returns the new ids of each row, without `stop`.
    """
    device, seq_len = model.embedding.weight.device, model.config.seq_len
    excluded = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if ids is not None:
        excluded[:] = True
        excluded[list(ids)] = False
    rows, new = [list(p) for p in prompts], [[] for _ in prompts]
    active, cache = list(range(len(rows))), None  # rows that have not ended
    with evaluating(model):
        for _ in range(max_new_tokens):
            if cache is None or cache.length == seq_len:  # full: the window slides, which changes every position
                contexts = [rows[i][-seq_len:] for i in active]
                longest = max(map(len, contexts))
                padding = [longest - len(context) for context in contexts]
                inputs = [[0] * n + context for n, context in zip(padding, contexts, strict=True)]
                cache = KVCache(model.config, torch.tensor(padding, device=device))
            else:
                inputs = [rows[i][-1:] for i in active]
            logits = model.logits(torch.tensor(inputs, device=device), cache).cpu()
            sampled = next_tokens(
                logits.masked_fill(excluded, -math.inf), temperature, top_k, top_p, generator
            ).tolist()
            continuing = [n for n, token in enumerate(sampled) if token != stop]
            for n in continuing:
                i, token = active[n], sampled[n]
                rows[i].append(token)
                new[i].append(token)
                on_token(i, token)
            if not continuing:
                break
            if len(continuing) < len(active):
                active = [active[n] for n in continuing]
                cache.keep(continuing)
    return new


def load_run(folder: Path, device: torch.device, kernels: str = "auto", which: str = "best") -> tuple[GPT, Tokenizer]:
    """Load the model and tokenizer of a run from `best.pt`, or from `last.pt` if `which` is "last" or there is no best.

    The model's dropout is 0, so that it runs with every kernel."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    path = folder / f"{which}.pt"
    state = checkpoint.load(path if path.exists() else folder / "last.pt", device)
    with device:
        model = GPT(ModelConfig(**state["model_config"] | {"dropout": 0.0}), bind(KernelChoice(every=kernels), device))
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.generate", description="Generate text with a trained model.")
    add = parser.add_argument
    add("--run", required=True, help="folder of the run, such as out/small")
    add("--checkpoint", choices=("best", "last"), default="best", help="which checkpoint (default best)")
    add(
        "--prompt",
        action="append",
        help="text to continue; repeat the flag for a batch (default: start a new document)",
    )
    add("--tokens", type=int, default=200, help="maximum number of new tokens (default 200)")
    add("--temperature", type=float, default=0.8, help="sampling temperature; 0 is greedy (default 0.8)")
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens (default 0: all)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling with this probability (default 1: all tokens)")
    add("--stop", help="text of one token that ends generation (default: the end-of-text token)")
    add("--seed", type=int, default=0, help="random seed (default 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default auto)")
    add("--precision", default="fp32", choices=("auto", *DTYPES), help="autocast dtype (default fp32)")
    add("--kernels", default="auto", choices=("auto", "torch", "triton"), help="kernels of all ops (default auto)")
    args = parser.parse_args(argv)
    for flag, valid, rule in (
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top-k", args.top_k >= 0, "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "more than 0 and at most 1"),
        ("tokens", args.tokens >= 1, "at least 1"),
    ):
        if not valid:
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
