"""Write what the ledgers say: a page and a CSV a suite, its figures, and an index of every row with its verdict.

    results/<scale>/<suite>.md, <suite>.csv, <suite>-<plot>.png     index.md, index.html (one file, opens offline)

Nothing is typed by hand: numbers, statuses and provenance come from the ledgers, verdicts from the suites' judges.
"""

import base64
import csv
import html
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from experiments import ledger, memory
from experiments.analysis import labels
from experiments.figures import PLOTS
from experiments.run import trials
from experiments.spec import Claim, Finding, Outcome, Results, Scale, Suite, Verdict
from experiments.suites import SUITES
from runtime.files import write_atomically

SCALES: dict[Scale, str] = {
    "tiny": "Tiny scale: small models that train for seconds, made for a CPU. It shows whether an effect is there, not "
    "how large it is in the published models: losses and speeds are not those of theirs.",
    "low": "Low scale: a fraction of the published tokens, made for one small GPU. Losses are not those of theirs.",
    "full": "Full scale: the published models, data and budgets.",
}
DIFFERENCES = "Differences: ours less theirs, or what a claim compares, ± half the 95% confidence interval over seeds."
LARGEST = 60_000  # bytes of a figure
# Of a run's end; val_loss is its last evaluation, also where the run did not finish.
MEASURED = ("val_loss", "val_bpb", "step", "tokens", "tok_s_steady", "tok_s_wall", "mfu", "flops_per_token")
MEASURED += ("memory", "memory_reserved", "memory_retries")
KNOWN = ("status", "seconds", "started", "commit", "machine", "key", "error")  # of any trial


@dataclass(frozen=True)
class Section:
    """A suite's part of the report."""

    suite: Suite
    results: Results
    findings: list[tuple[Claim, Finding]]


def write(names: list[str], scale: Scale, results: Path) -> Path:
    """Write the files of the suites `names`, and the index of all suites. Returns the path of index.html.

    Reads results/<scale>/<suite>.jsonl; a suite without a ledger was not run. Raises `ValueError` for a name that is
    not a suite's."""
    if unknown := [name for name in names if name not in SUITES]:
        raise ValueError(f"no suite is called {', '.join(unknown)}; there are {', '.join(SUITES)}")
    folder = results / scale
    folder.mkdir(parents=True, exist_ok=True)
    sections = [section(suite, scale, results) for suite in SUITES.values()]
    for part in sections:
        if part.suite.name in names:
            draw(part, folder)
            write_csv(part.results.outcomes, folder / f"{part.suite.name}.csv")
            write_atomically(folder / f"{part.suite.name}.md", suite_page(part, scale, folder))
    write_atomically(folder / "index.md", index_page(sections, scale))
    write_atomically(folder / "index.html", index_html(sections, scale, folder))
    return folder / "index.html"


def section(suite: Suite, scale: Scale, results: Path) -> Section:
    """The suite judged on its ledger, its outcomes in the order in which the suite declares them, unless there is a
    doubt that they are what it declares."""
    variants, points = list(suite.variants), suite.points(scale)

    def position(outcome: Outcome) -> tuple[int, int]:
        variant = outcome.labels.get("variant")
        fitting = (i for i, point in enumerate(points) if point.items() <= outcome.labels.items())
        return variants.index(variant) if variant in variants else len(variants), next(fitting, len(points))

    found = Results(sorted(ledger.read(ledger.place(results, scale, suite.name)), key=position))
    reason = doubt(suite, scale, found.outcomes) if found.outcomes and suite.name != memory.SUITE else ""
    judged = [Finding(reason, "not run") if reason else judge(claim, found) for claim in suite.claims]
    return Section(suite, found, list(zip(suite.claims, judged, strict=True)))


def doubt(suite: Suite, scale: Scale, outcomes: Sequence[Outcome]) -> str:
    """Why a suite's claims cannot be judged on these outcomes; empty where they can. More seeds than declared are
    none, nor is a knob that `--set` gave to all of the trials that have it."""
    declared = {ledger.name(trial.labels): trial.knobs for trial in trials(suite, scale)}
    ran = {ledger.name(outcome.labels): outcome.knobs for outcome in outcomes}
    if left := len(declared.keys() - ran.keys()):
        return f"{left} of {len(declared)} trials are left to run"
    if other := sum(ledger.name({**o.labels, "seed": 0}) not in declared for o in outcomes):
        return f"{other} trials are not of the suite as it is declared now"
    for knob in dict.fromkeys(knob for name in declared for knob in (*declared[name], *ran[name])):
        pairs = [(declared[name].get(knob), ran[name].get(knob)) for name in declared]
        having = [of for of in pairs if of != (None, None)]
        if 0 < (changed := sum(a != b for a, b in having)) < len(having):
            return f"{changed} of {len(having)} trials were run with another {knob} than declared"
    return ""


def judge(claim: Claim, results: Results) -> Finding:
    """The claim's finding; `not run`, with what is missing, where its trials are not there."""
    if not results.outcomes:
        return Finding("", "not run")
    try:
        return claim.judge(results)
    except LookupError as missing:
        return Finding(str(missing.args[0]) if missing.args else "", "not run")


# What tables say.


def number(value: Any, form: str = "") -> str:
    """A number for people, of four digits if no form is given and it is no integer; nothing for None."""
    if value is None:
        return ""
    if form or isinstance(value, float):
        return format(value, form or ".4g").replace("inf", "∞")
    return str(value)


def gap(finding: Finding) -> str:
    """The difference, with its 95% confidence over seeds where there are several."""
    if finding.difference is None:
        return ""
    half = f" ± {number(finding.confidence, '.2g')}" if finding.confidence is not None else ""
    return number(finding.difference, "+.4g") + half


def facts(outcome: Outcome) -> dict[str, Any]:
    """What a trial came to; memory in bytes, and seconds with the start of its process and its end."""
    return {name: getattr(outcome, name) for name in KNOWN} | {name: outcome.final.get(name) for name in MEASURED}


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """A line a trial: its labels, then `facts`. What is both is the label."""
    names = labels(outcomes)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys((*names, *KNOWN, *MEASURED))), lineterminator="\n")
    writer.writeheader()
    writer.writerows(facts(outcome) | dict(outcome.labels) for outcome in outcomes)
    write_atomically(path, text.getvalue())


def trials_table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    names = labels(outcomes)
    head = [
        *names,
        "status",
        "val loss",
        "bits a byte",
        "steps",
        "tokens",
        "seconds",
        "tok/s",
        "MFU",
        "memory",
        "error",
    ]
    rows = []
    for outcome in outcomes:
        f = facts(outcome)
        cells = [number(outcome.labels.get(name)) for name in names]
        cells += [f["status"], number(f["val_loss"]), number(f["val_bpb"]), number(f["step"])]
        cells += [number(f["tokens"], ","), number(outcome.seconds, ".1f"), number(f["tok_s_steady"], ",.0f")]
        cells += [number(f["mfu"], ".1%"), f"{f['memory'] / 2**20:,.0f} MiB" if f["memory"] else ""]
        cells.append(textwrap.shorten(outcome.error, 100, placeholder=" ..."))
        rows.append(cells)
    return head, rows


def claims_table(sections: Iterable[Section]) -> tuple[list[str], list[list[str]]]:
    """Every claim with its verdict, by row of the published experiments."""
    rows = [
        (claim.row, [str(claim.row), part.suite.name, claim.claimed, claim.theirs, f.ours, gap(f), f.verdict])
        for part in sections for claim, f in part.findings
    ]  # fmt: skip
    head = ["row", "suite", "claim", "theirs", "ours", "difference", "verdict"]
    return head, [cells for _, cells in sorted(rows, key=lambda row: row[0])]


def provenance(outcomes: Sequence[Outcome], scale: Scale) -> str:
    """At what scale, when, on what machine and at which commit the trials ran, and how they ended."""
    if not outcomes:
        return f"Scale {scale}: no trials were run."
    ends = ", ".join(f"{n} {status}" for status, n in Counter(outcome.status for outcome in outcomes).items())
    days = sorted({outcome.started[:10] for outcome in outcomes})
    places = ", ".join(dict.fromkeys(outcome.machine for outcome in outcomes))
    commits = ", ".join(dict.fromkeys(outcome.commit or "unknown" for outcome in outcomes))
    span = " to ".join(dict.fromkeys((days[0], days[-1])))
    seconds = sum(outcome.seconds for outcome in outcomes)
    return f"Scale {scale}: {ends}; {seconds:,.0f} s of trials; {span}; on {places}; commit {commits}."


def tally(sections: Iterable[Section]) -> str:
    verdicts = Counter(finding.verdict for part in sections for _, finding in part.findings)
    return ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in get_args(Verdict) if verdicts[verdict])


# Markdown.


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells):
        return "| " + " | ".join(plain(cell) for cell in cells) + " |"

    return "\n".join([line(head := list(head)), "|" + "---|" * len(head), *map(line, rows)])


def plain(text: str) -> str:
    """Text that a cell of a table holds as it is."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def suite_page(part: Section, scale: Scale, folder: Path) -> str:
    images = [f"![{plot}]({path.name})" for plot, path in pictures(part.suite, folder)]
    parts = [f"# {part.suite.title}", SCALES[scale], provenance(part.results.outcomes, scale)]
    parts += [markdown(*claims_table([part])), *images]
    if part.results.outcomes:
        parts += ["## Trials", markdown(*trials_table(part.results.outcomes))]
    return "\n\n".join(parts) + "\n"


def index_page(sections: Sequence[Section], scale: Scale) -> str:
    everything = [outcome for part in sections for outcome in part.results.outcomes]
    parts = [f"# Experiments at {scale} scale", SCALES[scale], provenance(everything, scale)]
    pages = [f"[{part.suite.name}]({part.suite.name}.md)" for part in sections if part.results.outcomes]
    parts += [f"Claims: {tally(sections)}. {DIFFERENCES}", markdown(*claims_table(sections))]
    return "\n\n".join([*parts, *([f"Suites: {', '.join(pages)}."] if pages else [])]) + "\n"


# HTML.

STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #fff; --soft: #6a6f76; --line: #dfe2e6; --head: #f4f5f7;
  --reproduced: #1a7f4b; --refuted: #b3372f; --artefact: #9a6400; --other: #6a6f76; }
@media (prefers-color-scheme: dark) { :root { --fg: #e3e5e8; --bg: #16181b; --soft: #9aa0a8; --line: #33373d;
  --head: #202327; --reproduced: #5cc98e; --refuted: #f08a80; --artefact: #e5b054; --other: #9aa0a8; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; color: var(--fg); background: var(--bg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 3rem 0 .25rem; }
.scale { border-left: 4px solid var(--artefact); padding-left: .8rem; }
.from { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
th { background: var(--head); white-space: nowrap; } tbody tr:last-child td { border-bottom: 0; }
.trials td { white-space: nowrap; } .claims td { max-width: 24rem; }
.claims td:nth-child(n+3):nth-child(-n+5) { min-width: 9rem; }
.verdict { color: var(--other); font-weight: 600; } .reproduced { color: var(--reproduced); }
.refuted { color: var(--refuted); } .artefact { color: var(--artefact); }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .85rem; } a { color: inherit; }
"""


def html_table(kind: str, head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    def cell(column: str, text: str) -> str:
        text = html.escape(text)
        if column == "suite":
            text = f'<a href="#{text}">{text}</a>'
        style = f' class="verdict {text.partition(" ")[0]}"' if column == "verdict" else ""
        return f"<td{style}>{text}</td>"

    top = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = ["<tr>" + "".join(map(cell, head, row)) + "</tr>" for row in rows]
    table = [f'<table class="{kind}"><thead><tr>{top}</tr></thead>', "<tbody>", *lines, "</tbody></table>"]
    return "\n".join(['<div class="scroll">', *table, "</div>"])


def index_html(sections: Sequence[Section], scale: Scale, folder: Path) -> str:
    everything = [outcome for part in sections for outcome in part.results.outcomes]
    title = f"Experiments at {scale} scale"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f'<h1>{title}</h1><p class="scale">{SCALES[scale]}</p>',
        f'<p class="from">{html.escape(provenance(everything, scale))}</p>',
        f"<p>Claims: {tally(sections)}. {DIFFERENCES}</p>",
        html_table("claims", *claims_table(sections)),
    ]
    for part in sections:
        outcomes = part.results.outcomes
        parts.append(f'<h2 id="{html.escape(part.suite.name)}">{html.escape(part.suite.title)}</h2>')
        parts.append(f'<p class="from">{html.escape(provenance(outcomes, scale))}</p>')
        for plot, path in pictures(part.suite, folder):
            data = base64.b64encode(path.read_bytes()).decode()
            alt = html.escape(f"{part.suite.title}: {plot}")
            parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
        if outcomes:
            table = html_table("trials", *trials_table(outcomes))
            parts.append(f"<details><summary>{len(outcomes)} trials</summary>{table}</details>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


# Figures.


def pictures(suite: Suite, folder: Path) -> list[tuple[str, Path]]:
    """The suite's plots that were drawn."""
    paths = [(plot, folder / f"{suite.name}-{plot}.png") for plot in suite.plots]
    return [(plot, path) for plot, path in paths if path.exists()]


def draw(part: Section, folder: Path) -> None:
    """`<suite>-<plot>.png` for each of the suite's plots that its outcomes have something for; an older one goes."""
    from PIL import Image

    for plot in part.suite.plots:
        if plot not in PLOTS:
            raise ValueError(f"suite {part.suite.name} asks for a plot {plot}; there are {', '.join(PLOTS)}")
        path = folder / f"{part.suite.name}-{plot}.png"
        try:
            figure = PLOTS[plot](part.results)
        except LookupError:
            path.unlink(missing_ok=True)
            continue
        width = round(11 * (figure.get_figwidth() - 1.6))  # characters, of a line beside the legend
        figure.suptitle(textwrap.fill(part.suite.title, width), fontsize=10)
        for dpi in (100, 80, 60):  # these files are committed: a palette takes a third of the bytes, unseen
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=dpi)
            Image.open(drawn).convert("RGB").quantize(48, Image.Quantize.FASTOCTREE).save(path, optimize=True)
            if path.stat().st_size <= LARGEST:
                break
