"""Evaluate a run on the tasks of lm-eval, EleutherAI's lm-evaluation-harness.

    python -m model.lm_eval --run out/small --tasks hellaswag,arc_easy --limit 100

Likelihoods are those that lm-eval computes with transformers from the run's export.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model.generate import generate
from model.load import Loaded, add_flags, load
from runtime.config import ConfigError, Parser, number
from runtime.errors import UserError
from runtime.program import leave, program
from runtime.progress import progress_bar
from runtime.text import say

MAX_NEW_TOKENS = 256  # where a task sets no limit, as lm-eval's own models

OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")  # of a task's generation


class Scorer:
    """What lm-eval asks of a model, which is `loaded`. `batch_size` is the rows of a forward pass."""

    def __init__(self, loaded: Loaded, batch_size: int):
        self.model, self.tokenizer, self.autocast = loaded.model, loaded.tokenizer, loaded.autocast
        self.batch_size, self.device = batch_size, loaded.model.embedding.weight.device
        self.seq_len, self.eot = loaded.model.config.seq_len, loaded.tokenizer.eot

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation after its context, and whether it is the greedy one.

        Context and continuation are encoded as one text. Spaces at the context's end count to the continuation, since
        tokens begin with their space. An empty context is the end-of-text token. Contexts lose their first tokens if
        all are more than the model's. Raises `UserError` for a continuation that is too long alone."""
        encoded = []
        for context, continuation in pairs:
            before = self.tokenizer.encode(context.rstrip())
            encoded.append((before or [self.eot], self.tokenizer.encode(context + continuation)[len(before) :]))
        return self._score(encoded)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood (nats) of each text after the end-of-text token, in disjoint windows; the last window reaches
        back to a full context."""
        windows = []
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), self.seq_len):
                windows.append((row, ([self.eot, *ids[:start]], ids[start : start + self.seq_len])))
        totals = [0.0] * len(texts)
        for (row, _), (nats, _) in zip(windows, self._score([pair for _, pair in windows]), strict=True):
            totals[row] += nats
        return totals

    @torch.inference_mode()
    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is greedy, of ids. The longest pairs come first, so that
        batches have little padding."""
        if (longest := max((len(continuation) for _, continuation in pairs), default=0)) > self.seq_len:
            raise UserError(f"a continuation has {longest} tokens, more than the model's seq_len {self.seq_len}")
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        bar = progress_bar(say, desc="likelihoods", total=len(pairs))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [torch.tensor((pairs[i][0] + pairs[i][1])[-self.seq_len - 1 :]) for i in batch]
            ids = pad_sequence([row[:-1] for row in rows], batch_first=True).to(self.device)
            with self.autocast():
                hidden = self.model.hidden(ids)
                for i, row, states in zip(batch, rows, hidden, strict=True):
                    targets = row[-len(pairs[i][1]) :].to(self.device)
                    logits = self.model.project(states[len(row) - 1 - len(targets) : len(row) - 1])
                    nats = F.cross_entropy(logits, targets, reduction="sum").item()
                    found[i] = -nats, bool((logits.argmax(-1) == targets).all())
            if bar is not None:
                bar.update(len(batch))
        return found

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Continue each context, by its `OPTIONS`, up to one of the texts `until` or the end-of-text token.

        It is greedy unless `do_sample`. Raises `UserError` for an option that is not one of those."""
        texts = []
        for options, group in groupby(requests, key=lambda request: request[1]):
            if unknown := sorted(options.keys() - set(OPTIONS)):
                raise UserError(
                    f"a task wants the generation option {unknown[0]}, which is not one of {', '.join(OPTIONS)}"
                )
            contexts = [self.tokenizer.encode(context) or [self.eot] for context, _ in group]
            for start in range(0, len(contexts), self.batch_size):
                texts += self._generate(contexts[start : start + self.batch_size], **options)
        return texts

    def _generate(
        self, contexts: list[list[int]], until: str | list[str] = (), max_gen_toks: int = MAX_NEW_TOKENS,
        do_sample: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    ) -> list[str]:  # fmt: skip
        ends = [until] if isinstance(until, str) else until

        def cut(ids: list[int]) -> str:
            text = self.tokenizer.decode(ids)
            return text[: min((text.index(end) for end in ends if end in text), default=len(text))]

        with self.autocast():
            rows = generate(
                self.model, contexts, max_gen_toks, self.tokenizer.ids, temperature=temperature if do_sample else 0.0,
                top_k=top_k, top_p=top_p, stop=self.eot, generator=torch.Generator().manual_seed(0),
                ended=lambda ids: any(end in self.tokenizer.decode(ids) for end in ends),
            )  # fmt: skip
        return [cut(ids) for ids in rows]


def adapter(scorer: Scorer) -> Any:
    """The scorer as an `lm_eval.api.model.LM`."""
    from lm_eval.api.model import LM

    class Nanofuse(LM):
        def loglikelihood(self, requests):
            return scorer.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return scorer.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests):
            return scorer.generate_until([request.args for request in requests])

    return Nanofuse()


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.lm_eval", description="Evaluate a run on tasks of lm-eval.")
    add_flags(parser)
    add = parser.add_argument
    add("--tasks", required=True, help="names of lm-eval's tasks, separated by commas: hellaswag,arc_easy")
    add("--num-fewshot", type=number(int, "[0, inf)"), help="examples in the context (default: the task's)")
    add("--limit", type=number(int, "[1, inf)"), help="documents of each task (default: all)")
    add("--batch-size", type=number(int, "[1, inf)"), default=8, help="rows of a forward pass (default 8)")
    args = parser.parse_args(argv)

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    loaded = load(args)
    manager, names = TaskManager(), args.tasks.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        near = get_close_matches(unknown[0], manager.all_tasks, 1)
        raise ConfigError(f"lm-eval has no task {unknown[0]!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    results = lm_eval.simple_evaluate(
        adapter(Scorer(loaded, args.batch_size)), tasks=names, num_fewshot=args.num_fewshot, limit=args.limit,
        task_manager=manager, log_samples=False,
    )  # fmt: skip
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    return 0


if __name__ == "__main__":
    leave(main())
