"""Products that attention's kernels make, of those asked for, counted in the interpreter: `python -m bench.work_done`.

One line of JSON for each shape, of one head in bf16: FLOPs forward and backward, `[done, least]`, and the `most` of the
ratio by the sizes of tiles. Asked for are the scores that are not masked: two products of them forward, five backward.
Tiles add the masked scores within them, and a backward in two kernels makes seven products, where one kernel, whose
tile holds all keys, makes five. It takes a process of its own, since TRITON_INTERPRET is read when Triton is imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from bench.cases import Case
from kernels import OPS
from kernels.attention import LENGTHS, TABLES
from kernels.interpreter import sanitize
from kernels.launch import card

OP = OPS["attention"]
DEVICE = torch.device("cpu")
HEAD = {"B": 1, "H": 1, "KV": 1, "D": 64}
# Sequences, and documents, are whole tiles: `most` counts on it.
SHAPES = [
    HEAD | {"T": t, "S": t, **mask}
    for t, masks in ((128, [{}]), (2048, [{}, {"W": 256}, {"W": 1024}, {"L": 512}]))
    for mask in masks
]
# The pass that a kernel is in, its table, the products that it makes of a score, and whether a tile of it stays at some
# keys, and goes over queries.
KERNELS = {
    "_attention_fwd_kernel": ("forward", "fwd", 2, False),
    "_attention_bwd_dkv_kernel": ("backward", "dkv", 4, True),
    "_attention_bwd_dq_kernel": ("backward", "dq", 3, False),
    "_attention_short_fwd_kernel": ("forward", "short fwd", 2, False),
    "_attention_short_bwd_kernel": ("backward", "short bwd", 5, True),
}


def partners(shape: dict[str, int]) -> float:
    """How many keys a query sees on average."""
    return OP.cost(shape, 2).flops / (4 * shape["B"] * shape["H"] * shape["T"] * shape["D"])


def most(shape: dict[str, int], kernel: str, of_keys: bool) -> float:
    """At most so many times the scores asked for are in a kernel's tiles.

    A tile of queries takes all keys that some of them sees, in tiles of keys: rounded up, at most a tile less one too
    many. An end of the range of keys that moves with the query leaves a query, on average, half a tile of queries less
    one short of it: the later end under a causal mask, both in a window. For a tile of keys it is the other way round.
    """
    tile = TABLES[kernel].pick((shape["D"], min(shape["S"], LENGTHS[-1])), card(DEVICE))
    own, other = min(tile.block_t, shape["T"]), min(tile.block_s, shape["S"])
    if of_keys:
        own, other = other, own
    moving = 2 if shape.get("W") else 1
    return 1 + (other - 1 + moving * (own - 1) / 2) / partners(shape)


def count(shape: dict[str, int]) -> dict:
    case = Case(OP, shape, torch.bfloat16, DEVICE)
    with sanitize(bounds=False, races=False, overflow=False) as record:
        case.call(OP.implementations["triton"], "forward+backward").run()
    made = {name: counts.flops for name, counts in record.kernels.items() if counts.flops}
    row = {"op": OP.name, "shape": shape, "most": {}}
    for step, cost, products in (("forward", OP.cost, 2), ("backward", OP.backward_cost, 5)):
        here = {name: KERNELS[name][1:] for name in made if KERNELS[name][0] == step}
        row[step] = [sum(made[name] for name in here), cost(shape, 2).flops]
        row["most"][step] = sum(n * most(shape, kernel, of_keys) for kernel, n, of_keys in here.values()) / products
    return row


if __name__ == "__main__":
    for shape in SHAPES:
        print(json.dumps(count(shape)), flush=True)
