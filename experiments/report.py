"""Write what the ledgers say: an index of every claim with its verdict, and the trials and figures of each suite.

    results/<scale>/index.html (one file, opens offline), index.md, <suite>.csv, <suite>-<plot>.png

Nothing is typed by hand: numbers, statuses and provenance come from the ledgers, verdicts from the suites' judges.
"""

import base64
import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from experiments import ledger, memory
from experiments.analysis import groups, labels
from experiments.figures import PLOTS
from experiments.judges import Noise, Verdict, verdicts
from experiments.run import trials
from experiments.spec import Claim, Finding, Outcome, Results, Scale, Suite
from runtime.files import write_atomically

try:
    import jinja2
except ImportError as missing:
    raise ImportError("reports need scipy and jinja2: pip install -c constraints.txt '.[experiments]'") from missing

SCALES: Mapping[Scale, str] = {
    "tiny": "Tiny scale: small models that train for seconds, made for a CPU. It shows whether an effect is there, not "
    "how large it is in the published models: losses and speeds are not those of theirs.",
    "low": "Low scale: a fraction of the published tokens, made for one small GPU. Losses are not those of theirs.",
    "full": "Full scale: the published models, data and budgets.",
    "own": "A sweep of your own.",
}
RULES = (
    "Differences: ours less theirs, or what a claim compares, ± half the 95% confidence interval. Runs are paired by "
    "seed; a single seed is compared with the noise of repeated runs at this scale ({noise}), and is at most "
    "'seen once'. A difference is 'within noise' when p > .05, corrected by Holm's method over all claims of this page."
)
OFFLINE = "Run offline, on text that every machine has, with tokenizers of the published sizes: not the published text."
LARGEST = 60_000  # bytes of a figure
# Of a run's end; val_loss is its last evaluation, also where the run did not finish.
MEASURED = ("val_loss", "val_bpb", "step", "tokens", "tok_s_steady", "tok_s_wall", "mfu", "flops_per_token")
MEASURED += ("memory", "memory_reserved", "memory_retries")
KNOWN = ("status", "seconds", "started", "commit", "machine", "key", "error")  # of any trial


@dataclass(frozen=True)
class Section:
    """A suite's part of the report: its outcomes, why they cannot be judged, and whether they are of other text."""

    suite: Suite
    results: Results
    doubt: str = ""
    offline: bool = False


@dataclass(frozen=True)
class Line:
    """A claim's line in the report."""

    suite: str
    claim: Claim
    finding: Finding
    verdict: Verdict

    @property
    def cells(self) -> list[str]:
        ours, test = self.finding.ours, self.claim.test
        ours += f"; held by {test}" if test and ours else test
        claim = [str(self.claim.row), self.suite, self.claim.claimed, self.claim.theirs]
        return [*claim, ours, gap(self.finding), self.verdict]


CLAIMS = ("row", "suite", "claim", "theirs", "ours", "difference", "verdict")
TRIALS = ("status", "val loss", "bits a byte", "steps", "tokens", "seconds", "tok/s", "MFU", "memory", "error")


def write(names: Sequence[str], scale: Scale, results: Path, suites: Mapping[str, Suite] | None = None) -> Path:
    """Write the files of the suites `names`, and the index of all suites. Returns the path of index.html.

    Reads results/<scale>/<suite>.jsonl; a suite without a ledger was not run. Raises `ValueError` for a name that is
    not a suite's."""
    if suites is None:
        from experiments.suites import SUITES as suites
    if unknown := [name for name in names if name not in suites]:
        raise ValueError(f"no suite is called {', '.join(unknown)}; there are {', '.join(suites)}")
    folder = results / scale
    folder.mkdir(parents=True, exist_ok=True)
    sections = [section(suite, scale, results) for suite in suites.values()]
    for part in sections:
        if part.suite.name in names:
            draw(part, folder)
            if part.results.outcomes:
                write_csv(part.results.outcomes, folder / f"{part.suite.name}.csv")
    lines, noise = judge(sections, scale)
    everything = [outcome for part in sections for outcome in part.results.outcomes]
    page = {
        "title": f"Experiments at {scale} scale" if scale != "own" else f"Sweep {', '.join(suites)}",
        "scale": SCALES[scale] + f" {OFFLINE}" * any(part.offline for part in sections),
        "provenance": provenance(everything, scale), "rules": RULES.format(noise=noise),
        "tally": tally(lines), "head": CLAIMS, "lines": sorted(lines, key=lambda line: line.claim.row),
        "sections": [described(part, scale, folder) for part in sections],
    }  # fmt: skip
    write_atomically(folder / "index.md", index_page(page))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_atomically(folder / "index.html", template.get_template("report.html.j2").render(page))
    return folder / "index.html"


# Judging


def section(suite: Suite, scale: Scale, results: Path) -> Section:
    """The suite's outcomes, in the order in which it declares them, without those of trials that it no longer has."""
    outcomes = ledger.read(ledger.place(results, scale, suite.name))
    if suite.name == memory.SUITE:
        return Section(suite, Results(memory.current(outcomes)))
    declared = {ledger.name(trial.labels): trial.knobs for trial in trials(suite, scale)} if outcomes else {}
    order = {ledger.name(json.loads(labels) | {"seed": 0}): i for i, labels in enumerate(declared)}
    found = [(order.get(ledger.name({**o.labels, "seed": 0})), o) for o in outcomes]
    found = [o for at, o in sorted(found, key=lambda pair: (pair[0] or 0, pair[1].started)) if at is not None]
    texts = [
        (declared.get(ledger.name(o.labels), o.knobs).get("data.corpus"), o.knobs.get("data.corpus")) for o in found
    ]
    moved = any(a != b for a, b in texts)
    return Section(suite, Results(found), doubt(declared, found), moved)


def doubt(declared: Mapping[str, Mapping[str, Any]], outcomes: Sequence[Outcome]) -> str:
    """Why claims cannot be judged on these outcomes; empty where they can. More seeds than declared are no reason, nor
    is a knob that `--set` gave to all of the trials that have it."""
    ran = {ledger.name(outcome.labels): outcome.knobs for outcome in outcomes}
    if ran and (left := len(declared.keys() - ran.keys())):
        return f"{left} of {len(declared)} trials are left to run"
    both = [name for name in declared if name in ran]
    for knob in dict.fromkeys(knob for name in both for knob in (*declared[name], *ran[name])):
        pairs = [(declared[name].get(knob), ran[name].get(knob)) for name in both]
        having = [of for of in pairs if of != (None, None)]
        if 0 < (changed := sum(a != b for a, b in having)) < len(having):
            return f"{changed} of {len(having)} trials were run with another {knob} than declared"
    return ""


def judge(sections: Sequence[Section], scale: Scale) -> tuple[list[Line], str]:
    """Every claim with its finding and verdict; and the noise that they were judged by, in words."""
    repeats: dict[str, list[list[Outcome]]] = {"": []}
    for part in sections:
        if "seed" in labels(part.results.outcomes) and not part.doubt:
            alike = list(groups(part.results).values())
            repeats.setdefault(part.suite.recipe, []).extend(alike)
            repeats[""] += alike if part.suite.recipe else []
    noises = {recipe: Noise.of(found) for recipe, found in repeats.items()}
    found = [
        (part.suite.name, claim, look(claim, part, scale, noises.get(part.suite.recipe) or noises[""]))
        for part in sections for claim in part.suite.claims
    ]  # fmt: skip
    ends = verdicts([finding for *_, finding in found], scale)
    lines = [Line(*of, "tested" if of[1].judge is None else end) for of, end in zip(found, ends, strict=True)]
    measured = [f"{name or 'all'} {noise.sd:.3f} nats, {noise.dof} degrees" for name, noise in noises.items() if noise]
    return lines, "; ".join(measured) or "not measured"


def look(claim: Claim, part: Section, scale: Scale, noise: Noise | None) -> Finding:
    """The claim's finding; one that says what is missing, where its trials are not there."""
    if part.doubt or claim.judge is None or not part.results.outcomes:
        return Finding(part.doubt if claim.judge else "", None)
    try:
        return claim.judge(part.results, noise)
    except LookupError as missing:
        published = scale != "full" and getattr(claim.judge, "published", False) and "no trials" in str(missing)
        return Finding("none of this size" if published else str(missing.args[0]), None, published=published)


# What tables say


def number(value: Any, form: str = "") -> str:
    """A number for people, of four digits if no form is given and it is no integer; nothing for None."""
    if value is None:
        return ""
    return format(value, form or ".4g").replace("inf", "∞") if form or isinstance(value, float) else str(value)


def gap(finding: Finding) -> str:
    """The difference, with its 95% confidence interval where that is known."""
    half = f" ± {number(finding.interval, '.2g')}" if finding.interval is not None else ""
    return number(finding.difference, "+.4g") + half if finding.difference is not None else ""


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """A line a trial: its labels, then how it ended; memory in bytes. What is both is the label."""
    text = io.StringIO()
    names = list(dict.fromkeys((*labels(outcomes), *KNOWN, *MEASURED)))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for o in outcomes:
        ends = {name: getattr(o, name) for name in KNOWN} | {name: o.final.get(name) for name in MEASURED}
        writer.writerow(ends | dict(o.labels))
    write_atomically(path, text.getvalue())


def trial_cells(outcome: Outcome, names: Sequence[str]) -> list[str]:
    f = outcome.final
    return [
        *(number(outcome.labels.get(name)) for name in names), outcome.status, number(f.get("val_loss")),
        number(f.get("val_bpb")), number(f.get("step")), number(f.get("tokens"), ","), number(outcome.seconds, ".1f"),
        number(f.get("tok_s_steady"), ",.0f"), number(f.get("mfu"), ".1%"),
        f"{f['memory'] / 2**20:,.0f} MiB" if f.get("memory") else "",
        textwrap.shorten(outcome.error, 100, placeholder=" ..."),
    ]  # fmt: skip


def provenance(outcomes: Sequence[Outcome], scale: Scale) -> str:
    """At what scale, when, on what machine and at which commit the trials ran, and how they ended."""
    if not outcomes:
        return f"Scale {scale}: no trials were run."
    ends = ", ".join(f"{n} {status}" for status, n in Counter(outcome.status for outcome in outcomes).items())
    days = sorted({outcome.started[:10] for outcome in outcomes})
    machines = ", ".join(dict.fromkeys(outcome.machine for outcome in outcomes))
    commits = ", ".join(dict.fromkeys(outcome.commit or "unknown" for outcome in outcomes))
    span = " to ".join(dict.fromkeys((days[0], days[-1])))
    seconds = sum(outcome.seconds for outcome in outcomes)
    return f"Scale {scale}: {ends}; {seconds:,.0f} s of trials; {span}; on {machines}; commit {commits}."


def tally(lines: Iterable[Line]) -> str:
    found = Counter(line.verdict for line in lines)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in get_args(Verdict) if found[verdict])


def described(part: Section, scale: Scale, folder: Path) -> dict[str, Any]:
    """A section as the templates take it."""
    outcomes, names = part.results.outcomes, labels(part.results.outcomes)
    images = [(plot, path) for plot, path in pictures(part.suite, folder) if path.exists()]
    return {
        "name": part.suite.name, "title": part.suite.title, "provenance": provenance(outcomes, scale),
        "images": [(plot, path.name, base64.b64encode(path.read_bytes()).decode()) for plot, path in images],
        "head": [*names, *TRIALS], "trials": [trial_cells(outcome, names) for outcome in outcomes],
    }  # fmt: skip


def index_page(page: Mapping[str, Any]) -> str:
    """The page in Markdown: claims, and links to the trials and figures of each suite."""

    def line(cells: Iterable[str]) -> str:
        escaped = (" ".join(cell.replace("&", "&amp;").replace("<", "&lt;").split()) for cell in cells)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in escaped) + " |"

    table = [line(page["head"]), "|" + "---|" * len(page["head"]), *(line(one.cells) for one in page["lines"])]
    parts = [f"# {page['title']}", page["scale"], page["provenance"], f"Claims: {page['tally']}. {page['rules']}"]
    parts.append("\n".join(table))
    for part in page["sections"]:
        if part["trials"]:
            links = ", ".join(f"[{plot}]({file})" for plot, file, _ in part["images"])
            parts.append(f"{part['title']}: [{part['name']}.csv]({part['name']}.csv){links and ', '}{links}.")
    return "\n\n".join(parts) + "\n"


# Figures


def pictures(suite: Suite, folder: Path) -> list[tuple[str, Path]]:
    return [(plot, folder / f"{suite.name}-{plot}.png") for plot in suite.plots]


def draw(part: Section, folder: Path) -> None:
    """`<suite>-<plot>.png` for each of the suite's plots that its outcomes have something for; an older one goes."""
    from PIL import Image

    for plot, path in pictures(part.suite, folder):
        if plot not in PLOTS:
            raise ValueError(f"suite {part.suite.name} asks for a plot {plot}; there are {', '.join(PLOTS)}")
        try:
            figure = PLOTS[plot](part.results)
        except LookupError:
            path.unlink(missing_ok=True)
            continue
        figure.suptitle(textwrap.fill(part.suite.title, round(11 * (figure.get_figwidth() - 1.6))), fontsize=10)
        for dpi in (90, 70, 50):  # these files are committed: a palette takes a third of the bytes, unseen
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=dpi)
            Image.open(drawn).convert("RGB").quantize(24, Image.Quantize.FASTOCTREE).save(path, optimize=True)
            if path.stat().st_size <= LARGEST:
                break
