"""Write the README's measured results, and plots, from bench/results: `python -m bench.report`.

Only the newest row of each bench is shown; nothing between the README's markers is typed by hand. A GPU's figures are
shown once one was measured, and not before.
"""

import re
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

from bench import records
from bench.cases import PASSES

ROOT = Path(__file__).parents[1]
OURS = ("triton", "sdpa", "torch")  # of an op's implementations, the one that stands for it
# Attention's tables: by length, causal or in these windows; and, at this shape, by window.
WINDOWS = (256, 1024)
WINDOWED = {"B": 4, "T": 4096, "S": 4096, "H": 12, "KV": 12, "D": 64}


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
    """What was measured of the kernels: on a GPU their speed; without one, the bytes they move and torch's speed."""
    on_gpu, on_cpu, moved = newest(rows, "speed", "cuda"), newest(rows, "speed", "cpu"), newest(rows, "bytes moved")
    tables = [gpu_table(on_gpu)] if on_gpu else []
    return "\n\n".join(tables + ([cpu_table(moved, on_cpu)] if moved or on_cpu else []))


def newest(rows: list[dict], bench: str, device: str | None = None) -> list[dict]:
    """The last row of each op, shape and pass, on the machine of the last of all."""
    rows = [row for row in rows if (row["bench"], row.get("on")) == (bench, device)]
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    return list({(row["op"], str(row["shape"]), row.get("pass")): row for row in rows}.values())


def gpu_table(rows: list[dict]) -> str:
    head = ["op", "shape", "pass", "kernel", "us", "speed", "of the card's", "us, host", "memory", "times as fast as"]
    cells = []
    for row in sorted(rows, key=lambda row: row["op"]):
        results = row["results"]
        name = next(name for name in OURS if name in results)
        ours = results[name]
        start = [row["op"], written(row["shape"]), row["pass"], name]
        if "failed" in ours:
            cells.append([*start, ours["failed"], *[""] * 5])
            continue
        amount, unit, most = bound(row)
        speed = amount / ours["cold"]
        rivals = [
            f"{other} {'failed' if 'failed' in theirs else format(theirs['cold'] / ours['cold'], '.2f')}"
            for other, theirs in results.items() if other != name
        ]  # fmt: skip
        sizes = [f"{ours['host'] * 1e6:,.0f}", f"{ours['memory'] / 2**20:,.0f} MiB", ", ".join(rivals)]
        cells.append([*start, f"{ours['cold'] * 1e6:,.1f}", rate(speed, unit), f"{speed / most:.0%}", *sizes])
    plots = [f"![{op}](bench/results/{op}.png)" for op in dict.fromkeys(row["op"] for row in rows)]
    return f"{table(head, cells)}\n\n{card(rows[-1])}\n\n{chr(10).join(plots)}"


def card(row: dict) -> str:
    most = row["ceiling"]
    rates = f"The card copies {rate(most['copy'], 'B/s')} and multiplies {rate(most['matmul'], 'FLOP/s')}"
    versions = where(row, f"driver {row['driver']}", f"triton {row['triton']}")
    return f"{rates}; inputs cold in L2. {versions}."


def cpu_table(moved: list[dict], speed: list[dict]) -> str:
    head = ["op", *(f"bytes moved, of the least: {name}" for name in PASSES)]
    head += [f"torch.compile, times eager's speed: {name}" for name in PASSES]
    cells = []
    for op in dict.fromkeys(row["op"] for row in (*moved, *speed)):
        ratios = [sorted(row[name][0] / row[name][1] for row in moved if row["op"] == op) for name in PASSES]
        spans = [" to ".join(dict.fromkeys((f"{r[0]:.3f}", f"{r[-1]:.3f}"))) for r in ratios if r]
        times = {row["pass"]: row["results"] for row in speed if row["op"] == op}
        faster = [compiled_over_eager(times[name]) if name in times else "" for name in PASSES]
        cells.append([op, *(spans or ["", ""]), *faster])
    return f"{table(head, cells)}\n\n{interpreted((*moved, *speed)[-1])}"


def interpreted(row: dict) -> str:
    processor = {"device": row["device"].partition(",")[0]}
    return where(row | processor, "one thread", f"triton {row['triton']} interpreted") + "."


def compiled_over_eager(results: dict[str, dict]) -> str:
    if "failed" in results["torch.compile"]:
        return "failed"
    return f"{results['torch']['warm'] / results['torch.compile']['warm']:.2f}"


def attention_table(rows: list[dict]) -> str:
    """Attention on a GPU, by length and by window; without one, the products that its kernels make."""
    timed, counted = newest(rows, "speed", "cuda"), newest(rows, "work done")
    if not timed:
        return work_table(counted)
    return "\n\n".join([length_table(timed), *window_table(timed), card(timed[-1])])


def length_table(rows: list[dict]) -> str:
    lengths, passes = sorted({row["shape"]["T"] for row in rows}), {}
    for row in rows:
        shape = row["shape"]
        if shape.get("W") in (None, *WINDOWS):
            line = (shape["D"], shape["H"], shape["KV"]), sees(shape)
            passes.setdefault(line, {}).setdefault(shape["T"], {})[row["pass"]] = row
    cells = []
    for ((d, h, kv), seen), by_length in sorted(passes.items()):
        taken = {t: with_backward(by_length[t]) for t in by_length}
        heads = f"{h} of {d}" + (f", {kv} of keys" if kv < h else "")
        for name in (PASSES[0], "backward", PASSES[1]):
            results = [taken.get(t, {}).get(name) for t in lengths]
            cells.append([heads, seen, name, *(beside_best(*result) if result else "" for result in results)])
    head = ["heads", "a query sees", "pass", *(f"T {t:,}" for t in lengths)]
    said = "TFLOP/s on scores that are not masked (of the card's), and times as fast as the fastest rival"
    return f"{table(head, cells)}\n\n{said}; the backward is what forward+backward takes beyond the forward."


def sees(shape: dict[str, int]) -> str:
    """The keys of a causal mask, a window or documents."""
    if "W" in shape:
        return f"the last {shape['W']:,}"
    return f"its document, T/{shape['T'] // shape['L']}" if "L" in shape else "all before it"


def with_backward(rows: dict[str, dict]) -> dict[str, tuple[float, dict[str, float], float]]:
    """By pass FLOPs, the seconds of all that were timed, and the card's FLOP/s; the backward's are differences."""
    found = {}
    for name, row in rows.items():
        found[name] = row["flops"], cold(row), row["ceiling"]["matmul"]
    if len(found) == len(PASSES):
        (least, forward, _), (flops, both, most) = (found[name] for name in PASSES)
        found["backward"] = flops - least, {who: both[who] - forward[who] for who in both if who in forward}, most
    return found


def cold(row: dict) -> dict[str, float]:
    """Seconds of all that were timed."""
    return {who: result["cold"] for who, result in row["results"].items() if "cold" in result}


def beside_best(flops: float, seconds: dict[str, float], most: float) -> str:
    if OURS[0] not in seconds:
        return "failed"
    ours = flops / seconds[OURS[0]]
    rivals = {who: taken for who, taken in seconds.items() if who != OURS[0]}
    best = min(rivals, key=rivals.get, default=None)
    ratio = f", {rivals[best] / seconds[OURS[0]]:.2f} {best}" if best else ""
    return f"{ours / 1e12:,.0f} ({ours / most:.0%}){ratio}"


def window_table(rows: list[dict]) -> list[str]:
    """Ours and FlexAttention's time by window, the causal mask as the window of all; nothing without a window."""
    times = {}
    for row in rows:
        window = row["shape"].get("W", WINDOWED["T"])
        if row["shape"] in (WINDOWED, WINDOWED | {"W": window}):
            times |= {(who, row["pass"], window): seconds for who, seconds in cold(row).items()}
    windows = sorted({window for _, _, window in times})
    if windows in ([], [WINDOWED["T"]]):
        return []
    head = [f"us, {written(WINDOWED)}", "pass", *(f"window {window:,}" for window in windows)]
    cells = []
    for who, name in product((OURS[0], "FlexAttention"), PASSES):
        taken = [times.get((who, name, window)) for window in windows]
        cells.append([who, name, *(f"{seconds * 1e6:,.0f}" if seconds else "" for seconds in taken)])
    return [table(head, cells)]


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


def plot(rows: list[dict], folder: Path) -> None:
    """`<op>.png`: GB/s or TFLOP/s by shape of everything that was timed on a GPU, a panel for each pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = newest(rows, "speed", "cuda")
    for op in dict.fromkeys(row["op"] for row in timed):
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
