"""Write the README's measured results from bench/results: `python -m bench.report`.

Only the newest row of each bench is shown; nothing between the README's markers is typed by hand.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: written by python -m bench.report -->", "<!-- end of results -->"


def train_table(rows: list[dict]) -> str:
    """Our trainer beside the baseline, by bench."""
    newest = {row["bench"]: row for row in rows}
    whole, shape = newest["equal wall-clock"], newest["equal shape"]
    lines = [
        "| | bits a byte | seconds | tok/s, steady | tok/s, wall | of matmul rate | peak memory | tok/s, equal shape |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, precision in (("nanofuse", "bf16"), ("nanogpt", "fp32")):
        r = whole[name]
        share = r["tok_s"] * r["flops_per_token"] / whole["matmul"][precision]
        lines.append(
            f"| {name} | {r['val_bpb']:.3f} | {r['seconds']:.0f} | {r['tok_s']:,.0f} | {r['tok_s_wall']:,.0f} | "
            f"{share:.0%} | {r['memory'] / 2**20:,.0f} MiB | {shape[name]['tok_s']:,.0f} |"
        )
    bits = whole["nanofuse"]["val_bpb"] / whole["nanogpt"]["val_bpb"]
    speed = shape["nanofuse"]["tok_s"] / shape["nanogpt"]["tok_s"]
    where = f"{whole['device']}, torch {whole['torch']}, {whole['date']}, commit {whole['commit']}"
    return "\n".join([*lines, "", f"{bits:.2f} of the bits a byte; {speed:.2f} times the tokens a second. {where}."])


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
