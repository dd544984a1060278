"""Write the README's measured results, and plots, from bench/results: `python -m bench.report`.

Only the newest row of each bench is shown; nothing between the README's markers is typed by hand. A GPU's figures are
shown once one was measured, and not before.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import records
from bench.cases import PASSES

ROOT = Path(__file__).parents[1]
OURS = "triton"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)).replace(" --- ", "---")


def where(row: dict, *more: str) -> str:
    return f"{', '.join((row['device'], *more))}, torch {row['torch']}, {row['date']}, commit {row['commit']}"


def train_table(rows: list[dict]) -> str:
    """Our trainer beside the baseline, by bench."""
    by_bench = {row["bench"]: row for row in rows}
    whole, shape = by_bench["equal wall-clock"], by_bench["equal shape"]
    head = ["", "bits a byte", "of the baseline's", "seconds", "first step", "tok/s, steady", "tok/s, wall"]
    head += ["of matmul rate", "peak memory"]
    cells = []
    for name, precision in (("nanofuse", "bf16"), ("nanofuse, compiled before", "bf16"), ("nanogpt", "fp32")):
        r = whole[name]
        bits = [f"{r['val_bpb']:.3f}", f"{r['val_bpb'] / whole['nanogpt']['val_bpb']:.2f}", f"{r['seconds']:.0f}"]
        first = f"{r['first_step']:.0f} s" if "first_step" in r else ""
        share = r["tok_s"] * r["flops_per_token"] / whole["matmul"][precision]
        speeds = [f"{r['tok_s']:,.0f}", f"{r['tok_s_wall']:,.0f}", f"{share:.0%}"]
        cells.append([name, *bits, first, *speeds, f"{r['memory'] / 2**20:,.0f} MiB"])
    mine, theirs = (shape[name]["tok_s"] for name in ("nanofuse", "nanogpt"))
    ratios = f"At equal shape {mine:,.0f} against {theirs:,.0f} tok/s: {mine / theirs:.2f} times as many."
    places = " ".join(dict.fromkeys(f"{where(row)}." for row in (shape, whole)))
    return f"{table(head, cells)}\n\n{ratios} {places}"


def kernels_table(rows: list[dict]) -> str:
    """What was measured of the kernels: on a GPU their speed; without one, what they move, call, and torch's speed."""
    on_gpu, on_cpu = newest(rows, "speed", "cuda"), newest(rows, "speed", "cpu")
    moved, called = newest(rows, "bytes moved"), newest(rows, "host calls")
    tables = [gpu_table(on_gpu)] if on_gpu else []
    return "\n\n".join(tables + ([cpu_table(moved, on_cpu, called)] if moved or on_cpu or called else []))


def newest(rows: list[dict], bench: str, device: str | None = None) -> list[dict]:
    """The last row of each op, shape and pass, on the machine of the last of all."""
    rows = [row for row in rows if (row["bench"], row.get("on")) == (bench, device)]
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    return list({(row["op"], str(row["shape"]), row.get("pass")): row for row in rows}.values())


def gpu_table(rows: list[dict]) -> str:
    head = [
        "op",
        "shape",
        "pass",
        "ours, us",
        "fastest rival, us",
        "limit, us",
        "ours, of the limit",
        "host, us",
        "memory",
    ]
    cells = []
    for row in sorted(rows, key=lambda row: row["op"]):
        start = [row["op"], written(row["shape"]), row["pass"]]
        seconds = cold(row)
        ours = seconds.pop(OURS, math.inf)
        rival = min(seconds, key=seconds.get, default=None)
        theirs = f"{rival} {microseconds(seconds[rival], ours)}" if rival else ""
        if ours == math.inf:
            cells.append([*start, row["results"][OURS]["failed"], theirs, *[""] * 4])
            continue
        amount, _, most = bound(row)
        host, memory = (row["results"][OURS][key] for key in ("host", "memory"))
        limits = [f"{1e6 * amount / most:,.0f}", f"{amount / most / ours:.0%}"]
        best = min(seconds.values(), default=math.inf)
        sizes = [f"{1e6 * host:,.0f}", f"{memory / 2**20:,.0f} MiB"]
        cells.append([*start, microseconds(ours, best), theirs, *limits, *sizes])
    plots = [f"![{op}](bench/results/{op}.png)" for op in plotted(rows)]
    most = "the limit is what moving the bytes takes at the speed of a copy, or the products at that of a large one"
    return "\n\n".join([table(head, cells), f"{card(rows[-1])} There {most}.", *plots])


def microseconds(seconds: float, other: float) -> str:
    """Bold where it is less than the other's."""
    text = f"{1e6 * seconds:,.0f}"
    return f"**{text}**" if seconds < other else text


def card(row: dict) -> str:
    most = row["ceiling"]
    rates = f"The card copies {rate(most['copy'], 'B/s')} and multiplies {rate(most['matmul'], 'FLOP/s')}"
    return f"{rates}; inputs cold in L2. One card: {versions(row)}."


def versions(row: dict) -> str:
    return where(row, f"driver {row['driver']}", f"triton {row['triton']}")


def cpu_table(moved: list[dict], speed: list[dict], called: list[dict]) -> str:
    head = ["op", *(f"bytes moved, of the least: {name}" for name in PASSES)]
    head += [f"torch.compile, times eager's speed: {name}" for name in PASSES]
    head += ["functions the host calls, forward and backward: ours, torch's"]
    cells = []
    for op in dict.fromkeys(row["op"] for row in (*moved, *speed, *called)):
        ratios = [sorted(row[n][0] / row[n][1] for row in moved if row["op"] == op and n in row) for n in PASSES]
        spans = [" to ".join(dict.fromkeys((f"{r[0]:.3f}", f"{r[-1]:.3f}"))) if r else "" for r in ratios]
        times = {row["pass"]: row["results"] for row in speed if row["op"] == op}
        faster = [compiled_over_eager(times[name]) if name in times else "" for name in PASSES]
        calls = {row["op"]: [max(row["calls"][who].values()) for who in (OURS, "torch")] for row in called}
        cells.append([op, *spans, *faster, ", ".join(map(str, calls.get(op, ())))])
    return f"{table(head, cells)}\n\n{interpreted((*moved, *speed, *called)[-1])}"


def interpreted(row: dict) -> str:
    processor = {"device": row["device"].partition(",")[0]}
    return where(row | processor, "one thread", f"triton {row['triton']} interpreted") + "."


def compiled_over_eager(results: dict[str, dict]) -> str:
    if "failed" in results["torch.compile"]:
        return "failed"
    return f"{results['torch']['warm'] / results['torch.compile']['warm']:.2f}"


def attention_table(rows: list[dict]) -> str:
    """What was measured of attention: on a GPU its speed; without one, the products that its kernels make."""
    timed, counted = newest(rows, "speed", "cuda"), newest(rows, "work done")
    return "\n\n".join(([rivals_table(timed)] if timed else []) + ([work_table(counted)] if counted else []))


def rivals_table(rows: list[dict]) -> str:
    """TFLOP/s of all that were timed, a line for each shape, those of a width together, then by length."""
    by_shape: dict[str, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: (row["shape"]["D"], sees(row["shape"]), row["shape"]["T"])):
        by_shape.setdefault(written(row["shape"]), {})[row["pass"]] = row
    rivals = list(dict.fromkeys(who for row in rows for who in row["results"] if who != OURS))
    cells = []
    for passes in by_shape.values():
        shape = next(iter(passes.values()))["shape"]
        heads = f"{shape['H']} of {shape['D']}" + (f", {shape['KV']} of keys" if shape["KV"] < shape["H"] else "")
        cells.append([f"{shape['B']} x {shape['T']:,}", heads, sees(shape)])
        for name in PASSES:
            seconds = cold(passes[name]) if name in passes else {}
            for who in (OURS, *rivals):
                rate = f"{passes[name]['flops'] / seconds[who] / 1e12:,.0f}" if who in seconds else "-"
                cells[-1].append(f"**{rate}**" if who in seconds and seconds[who] == min(seconds.values()) else rate)
    head = ["sequences", "heads", "a query sees", *(f"{name}: {who}" for name in PASSES for who in ("ours", *rivals))]
    return f"{table(head, cells)}\n\nTFLOP/s on the scores that are not masked. {card(rows[-1])}"


def sees(shape: dict[str, int]) -> str:
    """The keys of a causal mask, a window or documents."""
    if "W" in shape:
        return f"the last {shape['W']:,}"
    return f"its document, T/{shape['T'] // shape['L']}" if "L" in shape else "all before it"


def cold(row: dict) -> dict[str, float]:
    """Seconds of all that were timed."""
    return {who: result["cold"] for who, result in row["results"].items() if "cold" in result}


def steps_table(rows: list[dict]) -> str:
    """Whole training steps on the machine of the last row, the newest of each shape, variant and optimizer."""
    timed = [row for row in rows if "failed" not in row and row["mfu"] and row["device"] == rows[-1]["device"]]
    latest = {(row["shape"], row["variant"], row["optimizer"]): row for row in timed}
    cells = []
    for (shape, variant, optimizer), row in latest.items():
        best = min(other["ms"] for other in latest.values() if other["shape"] == shape)
        ms = f"**{row['ms']:.1f}**" if row["ms"] == best else f"{row['ms']:.1f}"
        sizes = f"{row['batch']} x {row['seq_len']:,}"
        speeds = [ms, f"{row['tok_s']:,.0f}", f"{row['mfu']:.1%}", f"{row['memory'] / 2**30:.1f} GiB"]
        cells.append([shape, sizes, f"{variant}, {optimizer}", *speeds, f"{row['host_ms']:.1f}"])
    head = ["model", "sequences", "step", "ms", "tok/s", "MFU", "memory", "ms of the host"]
    said = (
        "Captured and eager are the Triton kernels, torch the references, with SDPA; MFU is of the card's rated FLOP/s"
    )
    return f"{table(head, cells)}\n\nOne card, in bf16: {versions(timed[-1])}. {said}." if cells else ""


def work_table(rows: list[dict]) -> str:
    passes = ("forward", "backward")
    cells = []
    for row in rows:
        ratios = [f"{row[name][0] / row[name][1]:.2f}" for name in passes]
        cells.append([f"{row['shape']['T']:,}", sees(row["shape"]), *ratios])
    head = ["tokens", "a query sees", *(f"products made, of those asked for: {name}" for name in passes)]
    said = "Asked for are the scores that are not masked: two products of them forward, five backward"
    more = "a backward in two kernels makes seven of every tile, 1.40 times as many"
    return f"{table(head, cells)}\n\n{said}; {more}. {interpreted(rows[-1])}"


def written(shape: dict[str, int]) -> str:
    return " ".join(f"{key}={size}" for key, size in shape.items())


def bound(row: dict) -> tuple[float, str, float]:
    """What takes the time: the amount, its rate's unit, and the most that the machine does of it in a second."""
    copy, matmul = row["ceiling"]["copy"], row["ceiling"]["matmul"]
    memory = row["bytes"] / copy > row["flops"] / matmul
    return (row["bytes"], "B/s", copy) if memory else (row["flops"], "FLOP/s", matmul)


def multiplied(row: dict) -> tuple[float, str, float]:
    """`bound`, of the products alone."""
    return row["flops"], "FLOP/s", row["ceiling"]["matmul"]


def rate(per_second: float, unit: str) -> str:
    return f"{per_second / 1e9:,.0f} GB/s" if unit == "B/s" else f"{per_second / 1e12:,.2f} TFLOP/s"


def plotted(rows: list[dict]) -> list[str]:
    """Ops that were timed at more shapes than one."""
    shapes: dict[str, set[str]] = {}
    for row in rows:
        shapes.setdefault(row["op"], set()).add(written(row["shape"]))
    return [op for op in shapes if len(shapes[op]) > 1]


def plot(rows: list[dict], folder: Path) -> None:
    """`<op>.png`: GB/s or TFLOP/s by shape of everything that was timed on a GPU, a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = newest(rows, "speed", "cuda")
    for op in plotted(timed):
        figure, panels = plt.subplots(1, len(PASSES), figsize=(12, 5), layout="constrained")
        for name, axes in zip(PASSES, panels, strict=True):
            here = [row for row in timed if (row["op"], row["pass"]) == (op, name)]
            for contender in dict.fromkeys(key for row in here for key in row["results"]):
                points = [
                    (written(row["shape"]), bound(row)[0] / row["results"][contender]["cold"])
                    for row in here if "cold" in row["results"].get(contender, {})
                ]  # fmt: skip
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=contender)
            if here:
                _, unit, most = bound(here[-1])
                axes.axhline(most, color="gray", linestyle=":", label="the card's own")
                axes.set(title=f"{op}, {name}, {here[-1]['device']}", ylabel=unit, ylim=(0, None))
                axes.tick_params("x", rotation=30)
                axes.legend()
        figure.savefig(folder / f"{op}.png", dpi=100)
        plt.close(figure)


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
    plot(records.read(records.RESULTS, "kernels"), records.RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
