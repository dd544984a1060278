"""Write the README's measured results from bench/results: `python -m bench.report`.

Only the newest row of each bench and device is shown; nothing between the README's markers is typed by hand.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by python -m bench.report -->", "<!-- end of results -->"


def train_table(rows: list[dict]) -> str:
    """Our trainer beside the baseline, by bench."""
    newest = {(row["bench"], row["device"]): row for row in rows}
    lines = [
        "| bench | | bits a byte | seconds | tok/s, steady | tok/s, wall | of the matmul rate | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (bench, _), row in newest.items():
        for name, precision in (("nanofuse", "bf16"), ("nanogpt", "fp32")):
            r = row[name]
            bits = f"{r['val_bpb']:.3f}" if bench == "equal wall-clock" else ""  # else they end at different times
            share = r["tok_s"] * r["flops_per_token"] / row["matmul"][precision]
            lines.append(
                f"| {bench} | {name} | {bits} | {r['seconds']:.0f} | {r['tok_s']:,.0f} | "
                f"{r['tok_s_wall']:,.0f} | {share:.0%} | {r['memory'] / 2**20:,.0f} MiB |"
            )
    where = sorted({f"{row['device']}; torch {row['torch']}; {row['date']}" for row in newest.values()})
    ratios = []
    for (bench, _), row in newest.items():
        mine, theirs = row["nanofuse"], row["nanogpt"]
        if bench == "equal shape":
            ratios.append(f"{bench}: {mine['tok_s'] / theirs['tok_s']:.2f} times the tokens a second")
        else:
            ratios.append(f"{bench}: {mine['val_bpb'] / theirs['val_bpb']:.2f} of the bits a byte")
    return "\n".join([*lines, "", f"{'; '.join(ratios)}. Measured on: {' / '.join(where)}."])


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    rows = [json.loads(line) for line in (ROOT / "bench/results/train.jsonl").read_text().splitlines()]
    readme.write_text(f"{head}{BEGIN}\n\n{train_table(rows)}\n\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
