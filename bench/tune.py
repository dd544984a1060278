"""Other tiles for attention's kernels on this card, timed beside those of its table: `python -m bench.tune`.

The candidates of a kernel and width, those nearest to the table's tiles, take their place in the table in turn: all are
compiled side by side, held against the table's own results, then timed by CUDA-graph replay, in bf16, causal. Of a
backward all is timed, and only the kernel's share changes. What is not timed is listed with the reason; up to a width
of 128 a spill is one. At the end are the lines for CONFIGS in kernels/attention.py: it is for you to write them there.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from operator import truediv
from pathlib import Path
from statistics import geometric_mean, median
from unittest.mock import patch

import torch

from bench import records
from bench.cases import relative_error
from bench.timing import measure, reason
from kernels.attention import CONFIGS, ONE_PASS, tiles_of
from kernels.launch import IMPLEMENTATIONS, card, triton

Tiles = tuple[int, int, int, int]  # as in CONFIGS: rows of queries, rows of keys, warps, stages
Calls = dict[Tiles | None, Callable[[], tuple[torch.Tensor, ...]]]
DTYPE, TOKENS = torch.bfloat16, 16384
HEADS = {64: 12, 128: 16, 256: 8}  # by width
ROWS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
REGISTERS, LANES = 255, 32  # of a thread, and threads of a warp: NVIDIA's; AMD has more of both
TURNS_S, GAIN = 0.05, 0.01  # some ten samples of each candidate at each length; a gain that is more than noise


def candidates(kernel: str, width: int, start: Tiles, shared: int, most: int) -> list[Tiles]:
    """`start`, then others by how many doublings and halvings they are from it, `most` in all. Registers may hold their
    sums and scores, in float32, and `shared` bytes what they load ahead; they need more, so that some spill or fail."""
    found = {start: 0.0}
    for tiles in product(ROWS, (ONE_PASS,) if kernel == "one pass" else ROWS, WARPS, STAGES):
        queries, keys, warps, stages = tiles
        if kernel in ("dkv", "one pass"):
            held, loaded = 2 * keys * (width + queries), queries
        else:
            held, loaded = queries * (width + keys * (2 if kernel == "dq" else 1)), keys
        ahead = max(1, stages - 1) * 2 * loaded * width * DTYPE.itemsize
        if held <= REGISTERS * LANES * warps and ahead <= shared:
            found[tiles] = sum(abs(math.log2(a / b)) for a, b in zip(tiles, start, strict=True))
    return sorted(found, key=found.get)[:most]


def launcher(kernel: str, width: int, t: int, device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What is timed, on random inputs: the forward, or the backward with what the forward saved."""
    q, k, v, do = torch.randn(4, TOKENS // t, t, HEADS[width], width, dtype=DTYPE, device=device)
    options = {"scale": width**-0.5, "causal": True, "window": 0, "softcap": 0.0}
    forward = partial(IMPLEMENTATIONS["attention_fwd"], q, k, v, None, None, None, **options)
    if kernel == "fwd":
        return forward
    return partial(IMPLEMENTATIONS["attention_bwd"], do, q, k, v, None, None, *forward(), **options)


def compile_all(calls: Calls) -> dict[Tiles | None, list]:
    """The kernels that each call is the first to launch, compiled side by side. Nothing runs, and one that does not
    compile raises its error when it is launched."""
    run, found = triton.JITFunction.run, {}
    with (
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
        patch.object(triton.JITFunction, "run", lambda *args, warmup, **options: run(*args, warmup=True, **options)),
    ):
        for tiles, call in calls.items():
            known = set(mode.future_kernels)
            call()
            found[tiles] = [kernel for key, kernel in mode.future_kernels.items() if key not in known]
    return found


def check(calls: Calls, compiled: dict[Tiles | None, list], width: int) -> dict[Tiles | None, dict]:
    """A result for each, without seconds yet; `failed` instead, the reason, where it raises, spills, or is further from
    the first, the table's own, than the rounding of results explains."""
    found = {tiles: {"seconds": []} for tiles in calls}
    (_, own), *others = calls.items()
    truth, allowed = tuple(x.float() for x in own()), torch.finfo(DTYPE).eps
    for tiles, call in others:
        try:
            error, spilled = (
                relative_error(call(), truth),
                4 * sum(kernel.result().n_spills for kernel in compiled[tiles]),
            )
            if not error <= allowed or (spilled and width <= 128):
                found[tiles] = {"failed": f"{error:.1e} from the table's results, spills {spilled} bytes a thread"}
        except Exception as error:  # whatever one raises, the others are timed
            found[tiles] = {"failed": reason(error)}
    return found


def tune(kernel: str, width: int, most: int, device: torch.device, shared: int) -> dict:
    """Try up to `most` tiles. Returns the row to record: `own` tiles, the table's, None where this card takes two
    passes; then the results, best first, each with seconds by length and their mean ratio to `own`, or `failed`."""
    table, name, lengths = CONFIGS[kernel, width], card(device), (ONE_PASS,) if kernel == "one pass" else (1024, 4096)
    own = tiles_of(kernel, width, device)
    tried = candidates(kernel, width, own or next(iter(table.values())), shared, most)
    found = {}
    for t in lengths:
        run = launcher(kernel, width, t, device)
        calls = {own: run} | {tiles: patch.dict(table, {name: tiles})(run) for tiles in tried if tiles != own}
        found = found or check(calls, compile_all(calls), width)
        left = {tiles: partial(list, [call]) for tiles, call in calls.items() if "failed" not in found[tiles]}
        for tiles, result in measure(left, TURNS_S * len(left)).items():
            seconds = found[tiles]["seconds"]
            found[tiles] = result if "failed" in result else {"seconds": [*seconds, median(result["warm"])]}
    if "failed" in found[own]:
        raise RuntimeError(f"{kernel} {width}: the table's own {own} cannot be timed: {found[own]['failed']}")
    for result in found.values():
        if "failed" not in result:
            result["ratio"] = geometric_mean(map(truediv, result["seconds"], found[own]["seconds"]))
    results = [{"tiles": tiles} | result for tiles, result in found.items()]
    results.sort(key=lambda result: result.get("ratio", math.inf))
    row = {"bench": "tune", "op": "attention", "dtype": "bfloat16", "kernel": kernel, "width": width, "card": name}
    return row | {"own": own, "lengths": lengths, "results": results}


def table(row: dict) -> str:
    """Who is faster than whom, then who was not timed."""
    lines = [f"{row['kernel']} {row['width']}, {row['card']}: time to that of {row['own']}, us at T {row['lengths']}"]
    for result in row["results"]:
        times = [f"{1e6 * seconds:10,.1f}" for seconds in result.get("seconds", ())]
        lines.append(" ".join((f"  {result['tiles']!s:18s}", result.get("failed") or f"{result['ratio']:.3f}", *times)))
    return "\n".join(lines)


def entry(row: dict) -> str:
    """The line for CONFIGS: the fastest where it gains more than noise, else what is there."""
    best, own = row["results"][0], row["own"]
    tiles = best["tiles"] if best["ratio"] < 1 - GAIN else own
    changed = "" if tiles == own else f"  # changed: {best['ratio']:.3f} of the time of {own}"
    return f'("{row["kernel"]}", {row["width"]}): ... "{row["card"]}": {tiles},{changed}'


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, 0; exits with 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--kernel", choices=sorted({kernel for kernel, _ in CONFIGS}), help="only this one")
    parser.add_argument("--width", type=int, choices=HEADS, help="only heads of this width")
    parser.add_argument("--candidates", type=int, default=48, help="tiles to try of a kernel and width, at most (48)")
    parser.add_argument("--seconds", type=float, default=480, help="begin no kernel and width after so long (480)")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record (bench/results)")
    args = parser.parse_args(argv)
    wanted = [key for key in CONFIGS if args.kernel in (None, key[0]) and args.width in (None, key[1])]
    if not wanted:
        parser.error(f"{args.kernel} has no tiles for a width of {args.width}")
    if not torch.cuda.is_available():
        instead = "`python -m bench.compile --kernel attention` shows registers, spills and an estimate without one"
        parser.exit(2, f"bench.tune times a GPU, and torch finds none here: {instead}\n")
    shared = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    wanted.sort(key=lambda key: key[1])  # the rarest last
    rows, begin = [], time.monotonic()
    while len(rows) < len(wanted) and time.monotonic() - begin < args.seconds:
        rows.append(tune(*wanted[len(rows)], args.candidates, torch.device("cuda"), shared))
        records.append(args.results, "tune", rows[-1])
        print(table(rows[-1]), flush=True)
    print("CONFIGS of kernels/attention.py:", *map(entry, rows), sep="\n    ")
    if left := wanted[len(rows) :]:
        print(f"not tried in {args.seconds:g} s: {', '.join(f'{kernel} {width}' for kernel, width in left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
