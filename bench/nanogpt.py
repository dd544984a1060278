"""The baseline of bench_train: nanoGPT's recipe for a CPU, written plainly, in eager float32.

4 layers, 4 heads, 128 wide, blocks of 64, batches of 12; learned positions, LayerNorm, GELU; AdamW, 1e-3 to 1e-4 by a
cosine; on bytes. `python -m bench.nanogpt --seconds 60` trains for so long and prints a line of JSON.
"""

import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batches, eval_batches
from data.prepare import DataConfig, prepare
from model.evaluate import evaluate
from runtime.config import Parser, number
from runtime.hardware import memory
from runtime.program import program

LAYERS, HEADS, WIDTH, BLOCK, BATCH = 4, 4, 128, 64, 12
LR, FINAL_LR, WARMUP_STEPS = 1e-3, 1e-4, 100


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NanoGPT(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / (2 * LAYERS) ** (0.5 * name.endswith(("out.weight", "down.weight"))))

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        x = self.embedding(ids) + self.position.weight
        logits = F.linear(self.norm(self.layers(x)), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

    def flops_per_token(self) -> int:
        matrices = sum(p.numel() for p in self.layers.parameters() if p.ndim == 2) + self.embedding.weight.numel()
        return 6 * matrices + 6 * LAYERS * BLOCK * WIDTH


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor) -> None:
    loss = model(ids, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@program
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.nanogpt", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=number(float, "(0, inf)"), required=True)
    parser.add_argument("--corpus", default="docstrings")
    args = parser.parse_args(argv)
    data = prepare(DataConfig(corpus=args.corpus, tokenizer="bytes"), say=lambda line: None)
    torch.manual_seed(0)
    model, batches = NanoGPT(data.tokenizer.vocab_size), Batches(data.train, BLOCK, seed=0)
    optimizer = build_optimizer(model)
    step, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < args.seconds:
        cosine = 0.5 * (1 + math.cos(math.pi * spent / args.seconds))
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR + (LR - FINAL_LR) * cosine)
        train_step(model, optimizer, *batches.get(step * BATCH, BATCH))
        step += 1
    rate = {"tok_s": step * BATCH * BLOCK / spent, "flops_per_token": model.flops_per_token()}
    lengths = torch.from_numpy(data.tokenizer.byte_lengths())
    row = evaluate(model, eval_batches(data.val, BLOCK, 256, len(data.val)), lengths) | memory(torch.device("cpu"))
    print(json.dumps({"steps": step, "seconds": spent, "digest": data.summary.get("digest")} | rate | row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
