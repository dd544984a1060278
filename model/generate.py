"""Generate text with a trained model: `python -m model.generate --run out/small --prompt "def "`."""

import codecs
import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from model.evaluate import evaluating
from model.gpt import GPT, KVCache, StaticKVCache
from model.load import add_flags, load
from model.tensors import is_sharded
from runtime.capture import Captured
from runtime.config import ConfigError, Parser, number
from runtime.errors import UserError
from runtime.phase import phase
from runtime.program import leave, program
from runtime.text import typed

FLOAT32 = torch.finfo(torch.float32)  # of the logits


class GenerateError(UserError):
    """A model whose output is no distribution to sample from."""


def next_tokens(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    """Sample one id per row of logits `[B, V]`, by the random numbers `uniform` `[B]` in [0, 1). Returns `[B]`.

    Temperature 0 is greedy. `top_k` keeps the k most likely tokens (0: all). `top_p` keeps the smallest set of most
    likely tokens whose probabilities sum to at least `top_p` (1: all); the most likely token is always kept.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Less the maximum, no quotient overflows at any temperature; the softmax is the same.
    logits, order = (logits - logits.amax(-1, keepdim=True)) / temperature, None
    if top_p < 1:
        logits, order = logits.sort(-1, descending=True)
        logits, order = (x[:, :top_k] if top_k else x for x in (logits, order))
    elif top_k:
        logits, order = logits.topk(min(top_k, logits.shape[-1]))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        preceding = probabilities.cumsum(-1) - probabilities  # sum over more likely tokens
        probabilities = probabilities.where(preceding < max(top_p, FLOAT32.tiny), 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    sampled = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform[:, None], right=True)
    sampled = sampled.clamp(max=probabilities.shape[-1] - 1)  # of NaN, for which the caller looks
    return (sampled if order is None else order.gather(-1, sampled)).squeeze(-1)


def window_start(length: int, seq_len: int) -> int:
    """Index of the first token of the context after `length` tokens: a multiple of half `seq_len`.

    Moving by one token would change all positions, and so all cached keys, at every step."""
    half = max(1, seq_len // 2)
    return half * max(0, math.ceil((length - seq_len) / half))


class Decoder:
    """Continues the rows of a batch token by token, with a KV cache.

    If `captured`, a step runs as a CUDA graph, since launching its kernels one by one takes longer than running them.
    """

    def __init__(self, model: GPT, sample: Callable[[Tensor, Tensor], Tensor], captured: bool):
        """`sample(logits, uniform)` draws the next ids, as `next_tokens` does."""
        self.model, self.sample, self.captured = model, sample, captured
        self.device, self.seq_len = model.embedding.weight.device, model.config.seq_len
        self.cache: KVCache | StaticKVCache | None = None
        self.length = 0  # of the cache

    def __call__(self, rows: Sequence[list[int]], uniform: Tensor) -> list[int]:
        """Return the next id of each row. `rows` are those of the previous call, each with one more id."""
        if self.cache is None or self.length == self.seq_len:
            return self.sample(self._fill(rows), uniform.to(self.device)).tolist()
        self.length += 1
        self.ids.copy_(torch.tensor([row[-1:] for row in rows]))
        self.uniform.copy_(uniform)
        self.run()
        if self.captured and self.run == self._step:  # which has compiled its kernels
            self.run = Captured(self._step, torch.cuda.graph_pool_handle())
        return self.next.tolist()

    def _fill(self, rows: Sequence[list[int]]) -> Tensor:
        """Process the contexts of all rows. Returns the logits of the next tokens."""
        contexts = [row[window_start(len(row), self.seq_len) :] for row in rows]
        self.length = max(map(len, contexts))
        padding = [self.length - len(context) for context in contexts]
        inputs = [[0] * n + context for n, context in zip(padding, contexts, strict=True)]
        cache = KVCache(self.model.config, torch.tensor(padding, device=self.device))
        logits = self.model.logits(torch.tensor(inputs, device=self.device), cache)
        if isinstance(self.cache, StaticKVCache):
            self.cache.load(cache)
        else:
            self._use(StaticKVCache(cache, self.model.config) if self.captured else cache, len(rows))
        return logits

    def _use(self, cache: KVCache | StaticKVCache, n_rows: int) -> None:
        self.cache, self.run = cache, self._step
        self.ids = torch.empty(n_rows, 1, dtype=torch.int64, device=self.device)
        self.uniform = torch.empty(n_rows, dtype=torch.float64, device=self.device)
        self.next = torch.empty(n_rows, dtype=torch.int64, device=self.device)

    def _step(self) -> None:
        self.next.copy_(self.sample(self.model.logits(self.ids, self.cache), self.uniform))

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows of the batch."""
        if self.captured:
            self.cache = None  # the next call captures a smaller batch
        else:
            self.cache.keep(rows)
            self._use(self.cache, len(rows))


@phase("sample")
@torch.no_grad()
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
    ended: Callable[[list[int]], bool] = lambda new: False,
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> list[list[int]]:
    """Continue each prompt (at least one id) by up to `max_new_tokens`; a row ends early at the id `stop`, or
    when `ended` is true of its new ids.

    Only `ids` are sampled (None: all ids of the model, whose vocabulary may be padded beyond the tokenizer's). The
    context is all tokens up to `seq_len`. Beyond that its first half is dropped whenever it is full (`window_start`),
    and the cache of keys and values is filled again. `on_token(row, id)` is called for each new token. `generator` is
    on the CPU, so that a seed gives the same text on every device. Returns the new ids of each row, without `stop`.
    Raises `GenerateError` if a logit is not finite.
    """
    device = model.embedding.weight.device
    excluded = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if ids is not None:
        excluded[:] = True
        excluded[list(ids)] = False
    excluded = excluded.to(device)

    def sample(logits: Tensor, uniform: Tensor) -> Tensor:
        ids = next_tokens(logits.masked_fill(excluded, -math.inf), temperature, top_k, top_p, uniform)
        return ids.where(logits.isfinite().all(-1), -1)

    rows, new = [list(p) for p in prompts], [[] for _ in prompts]
    active = list(range(len(rows)))  # rows that have not ended
    sharded = is_sharded(model.embedding.weight)
    decoder = Decoder(model, sample, captured=device.type == "cuda" and not sharded)
    # FSDP2 gathers parameters into buffers that training uses too, and inference tensors cannot be written to there.
    with torch.inference_mode(not sharded), evaluating(model):
        for _ in range(max_new_tokens):
            uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
            sampled = decoder([rows[i] for i in active], uniform[active])
            if -1 in sampled:
                raise GenerateError("the model's logits are NaN or infinite: its training diverged, or fp16 overflowed")
            continuing = [n for n, token in enumerate(sampled) if token != stop]
            for n in continuing:
                i, token = active[n], sampled[n]
                rows[i].append(token)
                new[i].append(token)
                on_token(i, token)
            continuing = [n for n in continuing if not ended(new[active[n]])]
            if not continuing:
                break
            if len(continuing) < len(active):
                active = [active[n] for n in continuing]
                decoder.keep(continuing)
    return new


def continued(model: GPT, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int) -> str:
    """The text of `prompt` at the start of a document, and what the model makes of it."""
    ids, generator = [tokenizer.eot, *tokenizer.encode(prompt)], torch.Generator().manual_seed(seed)
    (new,) = generate(model, [ids], max_new_tokens, tokenizer.ids, stop=tokenizer.eot, generator=generator)
    return prompt + tokenizer.decode(new)


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.generate", description="Generate text with a trained model.")
    add_flags(parser)
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        help="text to continue; repeat the flag for a batch (default: start a new document)",
    )
    add("--tokens", type=number(int, "[1, inf)"), default=200, help="maximum number of new tokens (default 200)")
    add("--temperature", type=_temperature, default=0.8, help="sampling temperature; 0 is greedy (default 0.8)")
    add(
        "--top-k", type=number(int, "[0, inf)"), default=0, help="sample from the k most likely tokens (default 0: all)"
    )
    add(
        "--top-p",
        type=number(float, "(0, 1]"),
        default=1.0,
        help="nucleus sampling with this probability (default 1: all tokens)",
    )
    add("--stop", help="text of one token that ends generation (default: the end-of-text token)")
    add("--seed", type=number(int), default=0, help="random seed (default 0)")
    args = parser.parse_args(argv)
    _, model, tokenizer, autocast = load(args)
    stop = tokenizer.eot if args.stop is None else _one_token(tokenizer, args.stop)
    texts = [typed(text) for text in args.prompt or [""]]
    prompts = [[tokenizer.eot, *tokenizer.encode(text)] for text in texts]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def stream(_: int, token: int) -> None:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    single = len(texts) == 1
    if single:
        print(texts[0], end="", flush=True)
    with autocast():
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


def _temperature(text: str) -> float:
    """An argument that is 0 or that float32, in which logits are divided by it, holds to full precision."""
    value = number(float, f"[0, {FLOAT32.max}]")(text)
    if 0 < value < FLOAT32.tiny:
        raise ArgumentTypeError(f"it must be 0, which is greedy, or at least {FLOAT32.tiny:.2g}, not {text}")
    return value


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(f"--stop {text!r} is {len(ids)} tokens in this run's vocabulary; it must be one")
    return ids[0]


if __name__ == "__main__":
    leave(main())
