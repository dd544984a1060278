"""Reports of the ledgers: an index of every claim with its verdict, and the trials and figures of each suite.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from experiments import figures, ledger
from experiments.judges import Noise, Verdict, verdicts
from experiments.run import trials
from experiments.spec import Claim, Finding, Knobs, Outcome, Results, Scale, Suite
from runtime.files import write_atomically

try:
    import jinja2
except ImportError as missing:
    raise ImportError("reports need scipy and jinja2: pip install -c constraints.txt '.[experiments]'") from missing

HEAD = ("row", "suite", "claim", "theirs", "ours", "difference", "verdict")
# Of a trial's end, in tables; val_loss is the last evaluation, also where the run did not finish. Memory is in bytes.
MEASURED = ("val_loss", "val_bpb", "step", "tokens", "tok_s_steady", "mfu", "memory")
UNSEEN = ("started", "commit", "machine", "key", "recipe", "digest")  # only in the CSV


@dataclass(frozen=True)
class Section:
    """A suite's part of the report: the outcomes of its trials, and the reason why its claims cannot be judged on them
    ("": they can)."""

    suite: Suite
    results: Results
    doubt: str = ""


@dataclass(frozen=True)
class Line:
    """A claim's line in the report."""

    suite: str
    claim: Claim
    finding: Finding
    verdict: Verdict

    @property
    def cells(self) -> list[str]:
        ours, test, found = self.finding.ours, self.claim.test, self.finding
        half = f" ± {found.interval:.2g}" if found.interval is not None else ""
        difference = f"{found.difference:+.4g}{half}".replace("inf", "∞") if found.difference is not None else ""
        ours += f"; held by {test}" if test and ours else test
        return [str(self.claim.row), self.suite, self.claim.claimed, self.claim.theirs, ours, difference, self.verdict]


def write(names: Sequence[str], suites: Mapping[str, Suite], scale: Scale, results: Path,
          seeds: int = 0, extra: Knobs | None = None, offline: bool = False) -> Path:  # fmt: skip
    """Write the files of the suites `names`, whose trials have the knobs `extra`, and the index of all suites. Returns
    the path of index.html. Raises `LedgerError` if no suite has a ledger."""
    folder = results / scale
    if not any(ledger.place(results, scale, name).is_file() for name in suites):
        raise ledger.LedgerError(f"nothing was run: {folder} has no ledger; --results says where ledgers are")
    sections = [section(s, scale, results, seeds, extra if s.name in names else None, offline) for s in suites.values()]
    sections = compared(sections)
    for part in sections:
        if part.suite.name in names and part.results.outcomes:
            draw(part, folder)
            write_csv(part.results.outcomes, folder / f"{part.suite.name}.csv")
    lines, noise = judge(sections, scale)
    page = {
        "scale": scale, "names": names, "offline": offline, "extra": extra or {},
        "provenance": provenance([outcome for part in sections for outcome in part.results.outcomes]),
        "noise": noise, "tally": tally(lines), "head": HEAD,
        "lines": sorted(lines, key=lambda line: line.claim.row),
        "sections": [described(part, folder) for part in sections],
    }  # fmt: skip
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for kind in ("md", "html"):
        write_atomically(folder / f"index.{kind}", templates.get_template(f"report.{kind}.j2").render(page))
    return folder / "index.html"


# Judging


def section(suite: Suite, scale: Scale, results: Path, seeds: int, extra: Knobs | None, offline: bool) -> Section:
    """The suite's outcomes, in the order in which it declares them, with the labels that it gives them now; of more
    seeds than asked for, if there are. Trials that were run with other knobs are not among them."""
    latest = {outcome.key: outcome for outcome in ledger.read(ledger.place(results, scale, suite.name))}
    if not latest:
        return Section(suite, Results([]))
    seeds = seeds or suite.seeds.get(scale, 1)
    ran = max(int(outcome.labels.get("seed", 0)) for outcome in latest.values()) + 1
    declared = trials(suite, scale, max(seeds, ran), extra, offline)
    found = [replace(latest[t.key], labels=t.labels, knobs=t.knobs) for t in declared if t.key in latest]
    missing = sum(trial.labels["seed"] < seeds and trial.key not in latest for trial in declared)
    doubt = f"{missing} of {len(declared) * seeds // max(seeds, ran)} trials are left to run" if missing else ""
    return Section(suite, Results(found), doubt)


def compared(sections: Sequence[Section]) -> list[Section]:
    """The sections, with a `doubt` for those that have outcomes of another recipe than the latest outcome's, or of
    another text of the same name."""

    def text(outcome: Outcome) -> tuple[Any, Any]:
        return outcome.knobs.get("data.corpus"), outcome.knobs.get("data.max_tokens") or 0

    outcomes = sorted((o for part in sections for o in part.results.outcomes), key=lambda outcome: outcome.started)
    latest = {text(o): (outcomes[-1].recipe, o.digest) for o in outcomes if o.steps}  # of those that got to train
    checked = []
    for part in sections:
        trained = [o for o in part.results.outcomes if o.steps]
        old = sum((o.recipe, o.digest) != latest[text(o)] for o in trained)
        why = f"{old} of {len(trained)} trials are of an earlier recipe or another text: run them again"
        checked.append(replace(part, doubt=why) if old and not part.doubt else part)
    return checked


def judge(sections: Sequence[Section], scale: Scale) -> tuple[list[Line], str]:
    """Every claim with its finding and verdict; and the noise that they were judged by, in words."""
    repeats: dict[str, dict[tuple, dict[str, Outcome]]] = {"": {}}
    for part in sections:
        for outcome in part.results.outcomes if not part.doubt else []:
            alike = (part.suite.name, json.dumps({**outcome.knobs, "seed": 0}, sort_keys=True))
            for pool in {"", part.suite.preset}:
                repeats.setdefault(pool, {}).setdefault(alike, {})[outcome.key] = outcome
    noises = {pool: Noise.of(group.values() for group in groups.values()) for pool, groups in repeats.items()}
    found = [
        (part.suite.name, claim, look(claim, part, scale, noises.get(part.suite.preset) or noises[""]))
        for part in sections for claim in part.suite.claims
    ]  # fmt: skip
    elsewhere = [claim.published and scale != "full" for _, claim, _ in found]
    ends = verdicts([finding for *_, finding in found], elsewhere)
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
        if claim.published and scale != "full" and "no trials" in str(missing):
            return Finding("none of this size", False)
        return Finding(str(missing.args[0]), None)


# What pages say


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each trial: its labels, then how it ended. A label takes the place of a number of the same name."""
    return [
        {**o.labels, "status": o.status, **{name: o.final.get(name) for name in MEASURED}, "seconds": o.seconds,
         "error": o.error, **{name: getattr(o, name) for name in UNSEEN}, **o.labels}
        for o in outcomes
    ]  # fmt: skip


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    text, rows = io.StringIO(), table(outcomes)
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def number(value: Any) -> str:
    """A value for people: floats with four digits, integers with commas, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def provenance(outcomes: Sequence[Outcome]) -> str:
    """How trials ended, when, on what machine, at which commit, and on what text."""
    if not outcomes:
        return "No trials were run."
    ends = ", ".join(f"{n} {status}" for status, n in Counter(outcome.status for outcome in outcomes).items())
    days = sorted({outcome.started[:10] for outcome in outcomes})
    commits = ", ".join(dict.fromkeys(outcome.commit or "unknown" for outcome in outcomes))
    machines = ", ".join(dict.fromkeys(outcome.machine for outcome in outcomes))
    texts = {f"{o.knobs.get('data.corpus', 'text')} {o.digest}": None for o in outcomes if o.digest}
    span, seconds = " to ".join(dict.fromkeys((days[0], days[-1]))), sum(outcome.seconds for outcome in outcomes)
    simulated = sum(bool(outcome.final.get("simulated")) for outcome in outcomes)
    ends += f"; {simulated} SIMULATED their precision, without its speed" * bool(simulated)
    told = f"{ends}; {seconds:,.0f} s of trials; {span}; on {machines}; commit {commits}"
    return f"{told}{'; text ' * bool(texts)}{', '.join(texts)}."


def tally(lines: Iterable[Line]) -> str:
    found = Counter(line.verdict for line in lines)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in get_args(Verdict) if found[verdict])


def described(part: Section, folder: Path) -> dict[str, Any]:
    """A section as the templates take it."""
    rows = table(part.results.outcomes)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in UNSEEN]
    images = [(plot, path) for plot, path in pictures(part.suite, folder) if path.exists()]
    cells = [[textwrap.shorten(number(row.get(name)), 100, placeholder=" ...") for name in names] for row in rows]
    return {
        "name": part.suite.name, "title": part.suite.title, "provenance": provenance(part.results.outcomes),
        "images": [(plot, path.name, base64.b64encode(path.read_bytes()).decode()) for plot, path in images],
        "head": names, "trials": cells,
    }  # fmt: skip


def pictures(suite: Suite, folder: Path) -> list[tuple[str, Path]]:
    return [(plot, folder / f"{suite.name}-{plot.partition(' by ')[0]}.png") for plot in suite.plots]


def draw(part: Section, folder: Path) -> None:
    """`<suite>-<plot>.png` for each of the suite's plots that its outcomes have something for; an older one goes."""
    from PIL import Image

    for plot, path in pictures(part.suite, folder):
        try:
            figure = figures.draw(plot, part.results)
        except LookupError:
            path.unlink(missing_ok=True)
            continue
        figure.suptitle(textwrap.fill(part.suite.title, 60), fontsize=10)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=75)  # these files are committed: a palette takes a third of the bytes, unseen
        Image.open(drawn).convert("RGB").quantize(24, Image.Quantize.FASTOCTREE).save(path, optimize=True)
