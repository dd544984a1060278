"""Write the README's measured results from bench/results: `python -m bench.report`.

A table is a list of rows, and a row holds the text of each column by its head. Only the newest rows are shown, of the
machine that measured last; nothing between the README's markers is typed by hand.
"""

import math
import re
import sys
from collections.abc import Callable

from bench import records
from bench.harness import PASSES
from bench.processes import ROOT

OURS = "triton"


def markdown(rows: list[dict[str, str]]) -> str:
    """A column for each head that a row has, in the order they come; empty where a row has no text for it."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace(" --- ", "---")


def where(row: dict, *more: str) -> str:
    return f"{', '.join((row['device'], *more))}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def versions(row: dict) -> str:
    return where(row, f"driver {row['driver']}", f"triton {row['triton']}")


def interpreted(row: dict) -> str:
    processor = {"device": row["device"].partition(",")[0]}
    return where(row | processor, "one thread", f"triton {row['triton']} interpreted") + "."


def card(row: dict) -> str:
    most = row["ceiling"]
    rates = f"The card copies {rate(most['copy'], 'B/s')} and multiplies {rate(most['matmul'], 'FLOP/s')}"
    return f"{rates}; inputs cold in L2. One card: {versions(row)}."


def newest(rows: list[dict], bench: str, device: str | None = None) -> list[dict]:
    """The last row of each op, shape and pass, on the machine of the last of all."""
    rows = [row for row in rows if (row["bench"], row.get("on")) == (bench, device)]
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    return list({(row["op"], str(row["shape"]), row.get("pass")): row for row in rows}.values())


def written(shape: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in shape.items())


def sees(shape: dict[str, int]) -> str:
    """The keys of a causal mask, a window or documents."""
    if "W" in shape:
        return f"the last {shape['W']:,}"
    return f"its document, T/{shape['T'] // shape['L']}" if "L" in shape else "all before it"


def bound(row: dict) -> tuple[float, str, float]:
    """What limits an op: the bytes or FLOPs of a call, the unit of their rate, and the machine's best rate."""
    copy, matmul = row["ceiling"]["copy"], row["ceiling"]["matmul"]
    memory = row["bytes"] / copy > row["flops"] / matmul
    return (row["bytes"], "B/s", copy) if memory else multiplied(row)


def multiplied(row: dict) -> tuple[float, str, float]:
    """`bound`, of the matrix products alone."""
    return row["flops"], "FLOP/s", row["ceiling"]["matmul"]


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:,.0f} GB/s" if unit == "B/s" else f"{per_second / 1e12:,.2f} TFLOP/s"


def line(name: str, result: dict, amount: float, unit: str, most: float) -> str:
    """A contender's result in words: a call does an `amount`, and the machine at best `most` a second."""
    if "failed" in result:
        return f"  {name:22s} {result['failed']}"
    seconds = result.get("cold", result["warm"])
    text = f"  {name:22s} {seconds * 1e6:11,.1f} us {rate(amount / seconds, unit):>15s} {amount / seconds / most:4.0%}"
    if "host" in result:
        text += f", {result['warm'] * 1e6:,.1f} us warm, {result['host'] * 1e6:,.1f} us of the host"
        text += f", {result['memory'] / 2**20:,.0f} MiB" + ("" if result["graph"] else ", eager: the host waits")
    return f"{text}, error {result['error']:.2f} of what rounding explains"


def cold(row: dict) -> dict[str, float]:
    """Seconds of all that were timed."""
    return {who: result["cold"] for who, result in row["results"].items() if "cold" in result}


def bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def train_table(rows: list[dict]) -> str:
    """Our trainer beside the baseline, by bench."""
    by_bench = {row["bench"]: row for row in rows}
    whole, shape = by_bench["equal wall-clock"], by_bench["equal shape"]
    cells = []
    for name, precision in (("nanofuse", "bf16"), ("nanofuse, compiled before", "bf16"), ("nanogpt", "fp32")):
        r = whole[name]
        cells.append({
            "": name, "bits a byte": f"{r['val_bpb']:.3f}",
            "of the baseline's": f"{r['val_bpb'] / whole['nanogpt']['val_bpb']:.2f}", "seconds": f"{r['seconds']:.0f}",
            "first step": f"{r['first_step']:.0f} s" if "first_step" in r else "",
            "tok/s, steady": f"{r['tok_s']:,.0f}", "tok/s, wall": f"{r['tok_s_wall']:,.0f}",
            "of matmul rate": f"{r['tok_s'] * r['flops_per_token'] / whole['matmul'][precision]:.0%}",
            "peak memory": f"{r['memory'] / 2**20:,.0f} MiB",
        })  # fmt: skip
    mine, theirs = (shape[name]["tok_s"] for name in ("nanofuse", "nanogpt"))
    ratios = f"At equal shape {mine:,.0f} against {theirs:,.0f} tok/s: {mine / theirs:.2f} times as many."
    places = " ".join(dict.fromkeys(f"{where(row)}." for row in (shape, whole)))
    return f"{markdown(cells)}\n\n{ratios} {places}"


def kernels_table(rows: list[dict]) -> str:
    """The kernels on a GPU: speed; without one: bytes and calls, and the speed of torch."""
    timed = newest(rows, "speed", "cuda")
    counted = [newest(rows, "bytes moved"), newest(rows, "speed", "cpu"), newest(rows, "host calls")]
    return "\n\n".join(([gpu_table(timed)] if timed else []) + ([cpu_table(*counted)] if any(counted) else []))


def gpu_table(rows: list[dict]) -> str:
    cells = []
    for row in sorted(rows, key=lambda row: row["op"]):
        seconds, mine = cold(row), row["results"][OURS]
        ours = seconds.pop(OURS, math.inf)
        rival = min(seconds, key=seconds.get, default=None)
        best = min(seconds.values(), default=math.inf)
        cell = {"op": row["op"], "shape": written(row["shape"]), "pass": row["pass"]}
        cell["ours, us"] = mine.get("failed") or bold(f"{1e6 * ours:,.0f}", ours < best)
        cell["fastest rival, us"] = f"{rival} {bold(f'{1e6 * best:,.0f}', best < ours)}" if rival else ""
        if ours < math.inf:
            amount, _, most = bound(row)
            cell |= {"limit, us": f"{1e6 * amount / most:,.0f}", "ours, of the limit": f"{amount / most / ours:.0%}"}
            cell |= {"host, us": f"{1e6 * mine['host']:,.0f}", "memory": f"{mine['memory'] / 2**20:,.0f} MiB"}
        cells.append(cell)
    most = "the limit is what moving the bytes takes at the speed of a copy, or the products at that of a large one"
    return f"{markdown(cells)}\n\n{card(rows[-1])} There {most}."


def cpu_table(moved: list[dict], speed: list[dict], called: list[dict]) -> str:
    cells = []
    for op in dict.fromkeys(row["op"] for row in (*moved, *speed, *called)):
        cell = {"op": op}
        for name in PASSES:
            ratios = sorted(row[name][0] / row[name][1] for row in moved if row["op"] == op and name in row)
            span = dict.fromkeys(f"{ratio:.3f}" for ratio in (ratios[:1] + ratios[-1:]))
            cell[f"bytes moved, of the least: {name}"] = " to ".join(span)
        for name in PASSES:
            results = next((row["results"] for row in speed if (row["op"], row["pass"]) == (op, name)), {})
            seconds = [results.get(who, {}).get("warm") for who in ("torch", "torch.compile")]
            faster = f"{seconds[0] / seconds[1]:.2f}" if all(seconds) else "failed" if results else ""
            cell[f"torch.compile, times eager's speed: {name}"] = faster
        calls = [max(row["calls"][who].values()) for row in called if row["op"] == op for who in (OURS, "torch")]
        cell["functions the host calls, forward and backward: ours, torch's"] = ", ".join(map(str, calls))
        cells.append(cell)
    return f"{markdown(cells)}\n\n{interpreted((*moved, *speed, *called)[-1])}"


def attention_table(rows: list[dict]) -> str:
    """Attention on a GPU: speed; without one: the products that its kernels make."""
    timed, counted = newest(rows, "speed", "cuda"), newest(rows, "work done")
    return "\n\n".join(([rivals_table(timed)] if timed else []) + ([work_table(counted)] if counted else []))


def rivals_table(rows: list[dict]) -> str:
    """TFLOP/s of all that were timed, a line for each shape, those of a width together, then by length."""
    rows = sorted(rows, key=lambda row: (row["shape"]["D"], sees(row["shape"]), row["shape"]["T"]))
    rivals = dict.fromkeys(who for row in rows for who in row["results"] if who != OURS)
    cells = {}
    for row in rows:
        shape, seconds = row["shape"], cold(row)
        heads = f"{shape['H']} of {shape['D']}" + (f", {shape['KV']} of keys" if shape["KV"] < shape["H"] else "")
        empty = {f"{name}: {who}": "-" for name in PASSES for who in ("ours", *rivals)}
        sizes = {"sequences": f"{shape['B']} x {shape['T']:,}", "heads": heads, "a query sees": sees(shape)}
        cell = cells.setdefault(written(shape), sizes | empty)
        for who, taken in seconds.items():
            text = f"{row['flops'] / taken / 1e12:,.0f}"
            cell[f"{row['pass']}: {'ours' if who == OURS else who}"] = bold(text, taken == min(seconds.values()))
    return f"{markdown(list(cells.values()))}\n\nTFLOP/s on the scores that are not masked. {card(rows[-1])}"


def work_table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        ratios = {name: f"{row[name][0] / row[name][1]:.2f}" for name in ("forward", "backward")}
        products = {f"products made, of those asked for: {name}": ratio for name, ratio in ratios.items()}
        cells.append({"tokens": f"{row['shape']['T']:,}", "a query sees": sees(row["shape"])} | products)
    said = "Asked for are the scores that are not masked: two products of them forward, five backward"
    more = "a backward in two kernels makes seven of every tile, 1.40 times as many"
    return f"{markdown(cells)}\n\n{said}; {more}. {interpreted(rows[-1])}"


def steps_table(rows: list[dict]) -> str:
    """Whole training steps on the machine of the last row, the newest of each shape, variant and optimizer."""
    timed = [row for row in rows if "failed" not in row and row["mfu"] and row["device"] == rows[-1]["device"]]
    latest = {(row["shape"], row["variant"], row["optimizer"]): row for row in timed}.values()
    cells = []
    for row in latest:
        best = min(other["ms"] for other in latest if other["shape"] == row["shape"])
        cells.append({
            "model": row["shape"], "sequences": f"{row['batch']} x {row['seq_len']:,}",
            "step": f"{row['variant']}, {row['optimizer']}", "ms": bold(f"{row['ms']:.1f}", row["ms"] == best),
            "tok/s": f"{row['tok_s']:,.0f}", "MFU": f"{row['mfu']:.1%}", "memory": f"{row['memory'] / 2**30:.1f} GiB",
            "ms of the host": f"{row['host_ms']:.1f}",
        })  # fmt: skip
    said = "Captured and eager are the Triton kernels, torch the references, with SDPA"
    said += "; MFU is of the card's rated FLOP/s"
    return f"{markdown(cells)}\n\nOne card, in bf16: {versions(timed[-1])}. {said}." if cells else ""


# The name between the README's markers, the record that it is written from, and how.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "results": ("train", train_table),
    "kernels": ("kernels", kernels_table),
    "attention": ("attention", attention_table),
    "steps": ("steps", steps_table),
}


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`."""
    begin, end = f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"
    filled, n = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{content}\n\n{end}", text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"the README has {n} pairs of {begin} and {end}, not one")
    return filled


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, (record, make) in TABLES.items():
        if rows := records.read(records.RESULTS, record):
            text = fill(text, name, make(rows))
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
