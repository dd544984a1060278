"""Write the README's measured results from bench/results: `python -m bench.report`.

A table is a list of rows, each with the text of its cells by column head. It shows the newest rows of the machine that
measured last. Nothing between the README's markers is typed by hand.
"""

import math
import re
import sys
from collections.abc import Callable

from bench import records
from bench.harness import PASSES
from bench.processes import ROOT
from runtime.config import Parser
from runtime.program import program

OURS = "triton"


def markdown(rows: list[dict[str, str]]) -> str:
    """A column for each head of any row, in order of appearance; empty cells for rows without it."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace(" --- ", "---")


def origin(row: dict) -> str:
    """Device, versions, date and commit of a row."""
    driver = [f"driver {row['driver']}"] if row.get("driver") else []
    triton = [f"Triton {row['triton']}"] if row.get("triton") else []
    return ", ".join([row["device"], *driver, *triton, f"torch {row['torch']}", row["date"], f"commit {row['commit']}"])


def newest(rows: list[dict], *keys: str) -> list[dict]:
    """The last row for each value of the keys, on the machine of the last row."""
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    return list({str([row[key] for key in keys]): row for row in rows}.values())


def written(shape: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in shape.items())


def mask(shape: dict[str, int]) -> str:
    if "W" in shape:
        return f"window {shape['W']:,}"
    return f"documents of T/{shape['T'] // shape['L']}" if "L" in shape else "causal"


def bound(row: dict) -> tuple[float, str, float]:
    """What limits an op: the bytes or FLOPs of a call, their unit, and the machine's best rate. FLOPs for attention."""
    copy, matmul = row["ceiling"]["copy"], row["ceiling"]["matmul"]
    if row["op"] != "attention" and row["bytes"] / copy > row["flops"] / matmul:
        return row["bytes"], "B/s", copy
    return row["flops"], "FLOP/s", matmul


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:,.0f} GB/s" if unit == "B/s" else f"{per_second / 1e12:,.2f} TFLOP/s"


def line(row: dict, name: str, result: dict) -> str:
    """The result of a contender, for the terminal."""
    if "failed" in result:
        return f"  {name:22s} {result['failed']}"
    amount, unit, best = bound(row)
    seconds = result.get("cold", result["warm"])
    text = f"  {name:22s} {seconds * 1e6:11,.1f} us {rate(amount / seconds, unit):>15s} {amount / seconds / best:4.0%}"
    if "host" in result:
        text += f", {result['warm'] * 1e6:,.1f} us warm, {result['host'] * 1e6:,.1f} us on the host"
        text += f", {result['memory'] / 2**20:,.0f} MiB" + ("" if result["graph"] else ", eager: the host waits")
    return f"{text}, error {result['error']:.2f} of what rounding explains"


def cold(row: dict) -> dict[str, float]:
    """Seconds of the contenders that were timed."""
    return {who: result["cold"] for who, result in row["results"].items() if "cold" in result}


def bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def train_table(rows: list[dict]) -> str:
    """Our trainer beside the baseline, for the same seconds and at equal shape."""
    by_bench = {row["bench"]: row for row in rows}
    run, equal = by_bench["equal wall-clock"], by_bench["equal shape"]
    cells = []
    for name, precision in (("nanofuse", "bf16"), ("nanofuse, compiled before", "bf16"), ("nanogpt", "fp32")):
        r = run[name]
        cells.append({
            "": name, "bits per byte": f"{r['val_bpb']:.3f}",
            "vs nanogpt": f"{r['val_bpb'] / run['nanogpt']['val_bpb']:.2f}", "seconds": f"{r['seconds']:.0f}",
            "first step": f"{r['first_step']:.0f} s" if "first_step" in r else "",
            "tok/s, steady": f"{r['tok_s']:,.0f}", "tok/s, overall": f"{r['tok_s_wall']:,.0f}",
            "of matmul rate": f"{r['tok_s'] * r['flops_per_token'] / run['matmul'][precision]:.0%}",
            "peak memory": f"{r['memory'] / 2**20:,.0f} MiB",
        })  # fmt: skip
    ours, theirs = (equal[name]["tok_s"] for name in ("nanofuse", "nanogpt"))
    text = f"At equal shape {ours:,.0f} tok/s against {theirs:,.0f}: {ours / theirs:.2f} times as fast."
    if run.get("digest"):
        text += f" Text: digest {run['digest'][:12]}."
    return f"{markdown(cells)}\n\n{text} {' '.join(dict.fromkeys(f'{origin(row)}.' for row in (equal, run)))}"


def timed(rows: list[dict], attention: bool) -> list[dict]:
    """The newest rows of a GPU: of attention, or of all other ops."""
    rows = [row for row in rows if row["on"] == "cuda" and (row["op"] == "attention") == attention]
    return newest(rows, "op", "shape", "pass")


def ceilings(row: dict) -> str:
    rates = [rate(row["ceiling"]["copy"], "B/s"), rate(row["ceiling"]["matmul"], "FLOP/s")]
    return f"This card copies {rates[0]} and multiplies {rates[1]}; inputs are cold in L2. One {origin(row)}."


def kernels_table(rows: list[dict]) -> str:
    """Our kernel beside its fastest rival."""
    cells = []
    for row in sorted(timed(rows, attention=False), key=lambda row: row["op"]):
        seconds, result = cold(row), row["results"][OURS]
        ours = seconds.pop(OURS, math.inf)
        rival = min(seconds, key=seconds.get, default=None)
        best = min(seconds.values(), default=math.inf)
        cell = {"op": row["op"], "shape": written(row["shape"]), "pass": row["pass"]}
        cell["ours, us"] = result.get("failed") or bold(f"{1e6 * ours:,.0f}", ours < best)
        cell["fastest rival, us"] = f"{rival} {bold(f'{1e6 * best:,.0f}', best < ours)}" if rival else ""
        if ours < math.inf:
            amount, _, most = bound(row)
            cell |= {"limit, us": f"{1e6 * amount / most:,.0f}", "limit / ours": f"{amount / most / ours:.0%}"}
            cell |= {"host, us": f"{1e6 * result['host']:,.0f}", "memory": f"{result['memory'] / 2**20:,.0f} MiB"}
        cells.append(cell)
    limit = "The limit is the least bytes at the rate of a large copy, or the FLOPs at that of a large matrix product"
    return f"{markdown(cells)}\n\n{limit}. {ceilings(timed(rows, attention=False)[-1])}"


def attention_table(rows: list[dict]) -> str:
    """TFLOP/s of all contenders, a line for each shape, sorted by head dimension, mask and length."""
    rows = timed(rows, attention=True)
    names = dict.fromkeys([OURS, *(who for row in rows for who in row["results"])])
    cells = {}
    for row in sorted(rows, key=lambda row: (row["shape"]["D"], mask(row["shape"]), row["shape"]["T"])):
        shape, seconds = row["shape"], cold(row)
        heads = f"{shape['H']} of {shape['D']}" + (f", {shape['KV']} of keys" if shape["KV"] < shape["H"] else "")
        sizes = {"sequences": f"{shape['B']} x {shape['T']:,}", "heads": heads, "mask": mask(shape)}
        cell = cells.setdefault(written(shape), sizes | {f"{name}: {who}": "-" for name in PASSES for who in names})
        for who, taken in seconds.items():
            text = f"{row['flops'] / taken / 1e12:,.0f}"
            cell[f"{row['pass']}: {who}"] = bold(text, taken == min(seconds.values()))
    return f"{markdown(list(cells.values()))}\n\nTFLOP/s of the unmasked scores. {ceilings(rows[-1])}"


def steps_table(rows: list[dict]) -> str:
    """Whole training steps on the machine of the last row: the newest of each shape, variant and optimizer."""
    rows = [row for row in rows if "failed" not in row and row["mfu"] and row["device"] == rows[-1]["device"]]
    latest, cells = newest(rows, "shape", "variant", "optimizer"), []
    for row in latest:
        best = min(other["ms"] for other in latest if other["shape"] == row["shape"])
        cells.append({
            "model": row["shape"], "sequences": f"{row['batch']} x {row['seq_len']:,}",
            "step": f"{row['variant']}, {row['optimizer']}", "ms": bold(f"{row['ms']:.1f}", row["ms"] == best),
            "tok/s": f"{row['tok_s']:,.0f}", "MFU": f"{row['mfu']:.1%}", "memory": f"{row['memory'] / 2**30:.1f} GiB",
            "host, ms": f"{row['host_ms']:.1f}",
        })  # fmt: skip
    said = "Captured and eager run the Triton kernels; torch and torch.compile the references with SDPA. MFU is of the"
    return f"{markdown(cells)}\n\n{said} card's rated bf16 FLOP/s. One {origin(rows[-1])}." if cells else ""


def pace(row: dict, result: dict) -> float:
    """What is shown of a wait: seconds, or the amount per second."""
    return result["amount"] / result["seconds"] if row["unit"] else result["seconds"]


def paces(row: dict) -> list[str]:
    """Every contender of a wait in words, ours first, with its memory where that was measured."""
    unit = f"{row['unit']}/s" if row["unit"] else "s"
    return [
        f"{who} {pace(row, result):,.{0 if row['unit'] else 2}f} {unit}"
        + (f", {result['memory'] / 1e6:,.0f} MB" if "memory" in result else "")
        for who, result in row["results"].items()
    ]


def waits_table(rows: list[dict]) -> str:
    """What a user waits for besides the step: ours, and a line for each that it is beside."""
    cells = []
    for row in newest(rows, "bench"):
        (ours, *others), (first, *results) = paces(row), row["results"].values()
        for other, result in zip(others, results, strict=True):
            cells.append({
                "what": row["bench"], "ours": ours.partition(" ")[2], "beside": other,
                "ours / theirs": f"{pace(row, first) / pace(row, result):.2f}",
            })  # fmt: skip
    note = "Medians. The ratio is better below 1 for seconds, and above 1 for rates. Memory is anonymous."
    return f"{markdown(cells)}\n\n{note} {origin(rows[-1])}."


# The name between the README's markers, the record that it is written from, and how.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "results": ("train", train_table),
    "kernels": ("kernels", kernels_table),
    "attention": ("kernels", attention_table),
    "steps": ("steps", steps_table),
    "waits": ("waits", waits_table),
}


def fill(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`."""
    begin, end = f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"
    filled, n = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{content}\n\n{end}", text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"the README has {n} pairs of {begin} and {end}, not one")
    return filled


@program
def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m bench.report", description=__doc__.partition("\n")[0]).parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, (record, make) in TABLES.items():
        if rows := records.read(records.TRACKED, record):
            text = fill(text, name, make(rows))
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
