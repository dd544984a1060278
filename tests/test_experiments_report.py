"""What is made of ledgers: numbers, verdicts, tables, figures and a page, from results whose answers are known."""

import csv
import math
import random
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from experiments import analysis, figures, ledger, report
from experiments.judges import Threshold, at_most
from experiments.run import trials
from experiments.spec import Claim, Finding, Outcome, Results, Suite

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
CS336 = (2.235, 1.841, 1.648, 1.615, 1.800, 2.125, 3.302, 3.398, 4.405)


def outcome(loss=2.0, status="finished", diag=(), evals=(), **labels):
    """A run of 100 steps of 8 sequences of 16 tokens, a second for ten of them; `evals` are (step, loss)."""
    rows = [{"step": s, "tokens": 128 * s, "seconds": s / 10, "val_loss": value} for s, value in evals]
    steps = [{"step": s, "tokens": 128 * s, "seconds": s / 10, "loss": 5.5 - s / 50} for s in (1, 50, 100)]
    final = {
        "val_loss": loss,
        "val_bpb": 2 * (loss or 0),
        "step": 100,
        "tokens": 12800,
        "seconds": 10.0,
        "tok_s_steady": 1280.0,
    }
    final |= {"tok_s_wall": 1200.0, "flops_per_token": 1000, "memory": 3 * 2**20, "mfu": 0.25}
    key = "-".join(map(str, labels.values()))
    return Outcome(
        key, "s", "tiny", labels, {"batch_size": labels.get("batch_size", 8)}, status, 12.5, "2026-01-02T03:04:05+0000",
        "abc123", "a CPU, 2 cores", final=final, steps=steps, evals=rows, diag=dict(diag),
    )  # fmt: skip


def sweep(losses=CS336, lrs=LRS, **labels):
    return [outcome(loss, lr=lr, **labels) for lr, loss in zip(lrs, losses, strict=True)]


# Numbers.


def test_a_curve_is_the_mean_over_seeds_by_x():
    runs = [*sweep((3.0, 1.0, 2.0), (0.3, 0.1, 0.2), seed=0), *sweep((5.0, 2.0, 2.0), (0.3, 0.1, 0.2), seed=1)]
    other = sweep((9.0,), (0.1,), seed=0, variant="other")
    assert analysis.curve(Results([*runs, *other]), where={"variant": None}) == [(0.1, 1.5), (0.2, 2.0), (0.3, 4.0)]
    assert analysis.curve(Results(other), where={"variant": "other"}) == [(0.1, 9.0)]
    assert analysis.curve(Results(runs), x="seed", y=analysis.speed, where={"lr": 0.1}) == [(0, 1280.0), (1, 1280.0)]


@pytest.mark.parametrize("failed", [{"status": "nan"}, {"status": "diverged"}, {"loss": math.nan}, {"loss": None}])
def test_a_loss_is_infinite_where_any_seed_failed(failed):
    runs = [outcome(2.0, lr=0.1, seed=0), outcome(lr=0.1, seed=1, **failed), outcome(3.0, lr=0.2, seed=0)]
    assert analysis.curve(Results(runs)) == [(0.1, math.inf), (0.2, 3.0)]


@pytest.mark.parametrize("status", ["oom", "crashed", "unsupported", "time_limit"])
def test_a_run_that_got_no_answer_is_a_lookup_error(status):
    with pytest.raises(LookupError, match=f"ended as {status}"):
        analysis.curve(Results([outcome(2.0, lr=0.1, status=status)]))


def test_a_curve_that_was_not_run_is_a_lookup_error():
    for asked in ({"where": {"variant": "none"}}, {"x": "batch_size"}):
        with pytest.raises(LookupError, match="no trials with"):
            analysis.curve(Results(sweep()), **asked)
    for points in ([], [(1, math.inf)]):
        with pytest.raises(LookupError, match="no trial trains"):
            analysis.best(points)


def test_the_published_curve_has_its_published_best_and_edge():
    points = list(zip(LRS, CS336, strict=True))
    assert analysis.best(points) == (3e-3, 1.615)
    assert analysis.interior(points)
    assert analysis.edge(points) == 3e-2
    assert analysis.edge(points, worse=2.0) == 1e-1
    assert analysis.edge(points[:5]) is None


@pytest.mark.parametrize(
    ("losses", "interior", "edge"),
    [
        ((3, 2, math.inf, math.inf), True, 3),
        ((3, 2, 2.1, math.inf), True, 4),
        ((3, 2, math.inf, 2.1), True, None),  # what trains above it shows that it was no edge
        ((math.inf, 2, 2.1, 2.2), True, None),  # nor is what fails below the best
        ((4, 3, 2.5, 2), False, None),
        ((2, 3, 4, 5), False, 2),
        ((math.inf,) * 4, False, 1),
    ],
)
def test_edges_of_stability(losses, interior, edge):
    points = list(zip((1, 2, 3, 4), losses, strict=True))
    assert analysis.edge(points) == edge
    with suppress(LookupError):  # nothing finished
        assert analysis.interior(points) == interior


def test_knees():
    speed = [(1, 10.0), (2, 19.0), (4, 30.0), (8, 31.0), (16, 31.5)]
    assert analysis.knee(speed) == 4
    assert analysis.knee([(x, -y) for x, y in speed]) == 4
    assert analysis.knee(speed, share=0.99) == 16
    assert analysis.knee([(1, math.inf), *speed[1:], (32, math.inf)]) == 8
    with pytest.raises(LookupError, match="not 1"):
        analysis.knee([(1, 2.0), (2, math.inf)])


def test_the_largest_batch_that_costs_nothing():
    points = [(1, 2.05), (2, 2.0), (4, 2.005), (8, 2.009), (16, 2.2), (32, 2.001)]
    assert analysis.largest_within(points, 0.01) == 8
    assert analysis.largest_within(points, 0.001) == 2


def test_evaluations_on_the_way():
    run = outcome(evals=[(10, 4.0), (20, 3.0), (40, 2.0)])
    assert analysis.seconds_to(3.5, run) == 2.0
    assert analysis.seconds_to(1.0, run) == math.inf
    assert analysis.evaluations(run, "tokens") == [(1280, 4.0), (2560, 3.0), (5120, 2.0)]
    assert analysis.late_change(run) == -1.0  # from step 20, halfway
    with pytest.raises(LookupError):
        analysis.late_change(outcome(evals=[(10, 4.0)]))


def test_spread_over_blocks():
    gradient = {"embedding": 1e9, "blocks.0.attention": 3.0, "blocks.0.feed_forward": 4.0, "blocks.1.attention": 0.5}
    gradient |= {f"blocks.{i}.attention": float(i) / 2 for i in range(2, 11)}
    assert analysis.layers(gradient) == [5.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert analysis.gradient_spread(outcome(diag={"gradient": gradient})) == 10.0
    for bad in (0.0, math.inf, math.nan, None):
        diag = {"gradient": gradient | {"blocks.1.attention": bad}}
        assert analysis.gradient_spread(outcome(diag=diag)) == math.inf
    for none in ({}, {"gradient": {"embedding": 1.0}}, {"gradient": {"blocks.0.attention": None}}):
        with pytest.raises(LookupError):
            analysis.gradient_spread(outcome(diag=none))


def test_the_critical_batch_is_of_the_later_half():
    values = [(10, 5.0), (60, 100.0), (70, None), (80, 300.0), (90, -4.0), (100, 200.0)]
    series = [{"step": s, "noise_scale": v, "coherence": v and 0.5} for s, v in values]
    run = outcome(diag={"noise_scale": 200.0, "series": series})
    assert analysis.critical_batch(run) == 200.0
    assert analysis.series(run, "coherence")[:2] == [(10, 0.5), (60, 0.5)]
    assert analysis.critical_batch(outcome(diag={"noise_scale": 7.0})) == 7.0
    for diag in ({}, {"noise_scale": None}, {"noise_scale": -1.0}):
        with pytest.raises(LookupError):
            analysis.critical_batch(outcome(diag=diag))


def test_the_front_holds_what_nothing_beats():
    points = [(1, 3.0), (2, 3.5), (3, 2.0), (3, 2.5), (4, 2.0), (5, math.inf), (6, 1.0)]
    assert analysis.pareto(points[::-1]) == [(1, 3.0), (3, 2.0), (6, 1.0)]


def test_groups_are_named_by_what_tells_them_apart():
    runs = [
        outcome(variant=v, **{"model.n_layer": n, "lr": 0.1, "seed": s}) for v in "ab" for n in (4, 12) for s in (0, 1)
    ]
    assert list(analysis.groups(Results(runs))) == ["a, n_layer 4", "a, n_layer 12", "b, n_layer 4", "b, n_layer 12"]
    assert {name: len(found) for name, found in analysis.groups(Results(runs), "variant").items()} == {
        "n_layer 4": 4,
        "n_layer 12": 4,
    }
    assert list(analysis.groups(Results(runs[:2]))) == ["all"]
    shapes = [outcome(**{"model.n_layer": n, "model.d_model": 64 * n, "tied": t}) for n, t in ((4, 1), (4, 0), (8, 0))]
    assert list(analysis.groups(Results(shapes))) == ["n_layer 4, tied 1", "n_layer 4, tied 0", "n_layer 8, tied 0"]


# The report.


def best_is(lr):
    def judge(results, noise):
        x, y = analysis.best(analysis.curve(results))
        return Finding(f"best {y:.3f} at {x:g}", x == lr, y - 1.615, 0.012, seeds=2)

    return judge


CLAIMS = (
    Claim(10, "Best LR is 1e-2 | or <b>more</b>", 'a & "b"', best_is(1e-2)),
    Claim(1, "Best LR is 3e-3", "1.615", best_is(3e-3)),
    Claim(2, "Larger batches", "4", Threshold(analysis.loss, at_most(4), {"batch_size": 4})),
    Claim(2, "A test says so", "", test="tests/test_x.py::test_y"),
)
PLOTS = ("curves", "lr", "batch", "layers", "pareto", "gap")
LR = Suite(
    "lr", "Learning <rates>", (1, 10, 2), {"tiny": {}}, CLAIMS, {"big": {}, "small": {}}, {"lr": LRS}, plots=PLOTS
)
IDLE = Suite("idle", "Nothing ran", (3,), {"tiny": {}}, (Claim(3, "c", "t", lambda r, noise: Finding("x", True)),))


SUITES = {"idle": IDLE, "lr": LR}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report on a sweep with two variants, the second run first, and a trial that became nan."""
    results = tmp_path_factory.mktemp("results")
    runs = [
        outcome(v + 1, lr=lr, variant="small", evals=[(50, v + 2), (100, v + 1)]) for lr, v in ((1e-3, 2), (3e-3, 3))
    ]
    runs += [outcome(v, lr=lr, variant="big", evals=[(100, v)]) for lr, v in zip(LRS[:-1], CS336[:-1], strict=True)]
    runs += [outcome(9.0, "nan", lr=1.0, variant="big", evals=[(50, 9.0)])]
    runs[-1] = replace(runs[-1], error="RuntimeError: <b> is not finite")
    for run in runs:
        ledger.append(ledger.place(results, "tiny", "lr"), run)
    (results / "tiny" / "lr-batch.png").write_bytes(b"of a ledger that is gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "doubt", lambda *_: "")  # a part of the trials shows what pages look like
        path = report.write(["lr"], "tiny", results, {"idle": IDLE, "lr": LR})
    assert path == results / "tiny" / "index.html"
    return path.parent


def rows(table):
    """The cells of a markdown page's first table."""
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].replace("\\|", "/").split("|")] for line in lines]


def test_every_claim_has_a_line_and_a_verdict(written):
    head, _, *lines = rows(written / "index.md")
    assert head == ["row", "suite", "claim", "theirs", "ours", "difference", "verdict"]
    assert [line[0] for line in lines] == ["1", "2", "2", "3", "10"]
    by_row = {line[0]: line for line in reversed(lines)}
    # the curve has two variants, whose mean at 3e-3 is no longer the best
    assert by_row["1"][4:] == ["best 1.800 at 0.01", "+0.185 ± 0.012", "refuted"]
    assert by_row["10"][-1] == "reproduced"
    assert by_row["2"][-1] == "not run" and "batch_size" in by_row["2"][4]  # its judge did not find its trial
    assert by_row["3"][-1] == "not run"  # its judge would say that it holds, and no trial was run
    assert lines[2][4:] == ["tests/test_x.py::test_y", "", "tested"]
    assert "Claims: 1 reproduced, 1 refuted, 1 tested, 2 not run." in (written / "index.md").read_text()


def test_text_is_escaped(written):
    assert rows(written / "index.md")[-1][2:4] == ["Best LR is 1e-2 / or &lt;b>more&lt;/b>", 'a &amp; "b"']
    page = (written / "index.html").read_text()
    assert "<b>" not in page and "<rates>" not in page
    assert "or &lt;b&gt;more&lt;/b&gt;" in page and "Learning &lt;rates&gt;" in page


@pytest.mark.parametrize("name", ["index.md", "index.html"])
def test_pages_say_where_their_numbers_come_from(written, name):
    text = (written / name).read_text()
    assert "Tiny scale: small models that train for seconds, made for a CPU" in text
    assert "Scale tiny: 10 finished, 1 nan; 138 s of trials; 2026-01-02; on a CPU, 2 cores; commit abc123." in text


def test_the_csv_has_a_line_a_trial(written):
    lines = list(csv.DictReader((written / "lr.csv").open()))
    assert len(lines) == 11
    assert [line["variant"] for line in lines] == ["big"] * 9 + ["small"] * 2  # as the suite declares them
    assert [float(line["lr"]) for line in lines[:9]] == list(LRS)
    first, lost = lines[0], lines[8]
    assert (first["status"], first["error"]) == ("finished", "")
    assert (lost["status"], lost["error"]) == ("nan", "RuntimeError: <b> is not finite")
    numbers = {"val_loss": 2.235, "val_bpb": 4.47, "tokens": 12800, "seconds": 12.5, "tok_s_steady": 1280}
    numbers |= {"step": 100, "memory": 3 * 2**20, "mfu": 0.25}
    assert {name: float(first[name]) for name in numbers} == numbers
    assert first["commit"] == "abc123" and first["machine"] == "a CPU, 2 cores"


def test_the_page_lists_every_trial(written):
    page = Page((written / "index.html").read_text())
    big = ["big", "0.0001", "finished", "2.235", "4.47", "100", "12,800", "12.5", "1,280", "25.0%", "3 MiB", ""]
    assert big in page.table and len([row for row in page.table if row[0] in ("big", "small")]) == 11
    lost = next(row for row in page.table if row[1:3] == ["1", "nan"])
    assert lost[-1] == "RuntimeError: <b> is not finite"


class Page(HTMLParser):
    """Tags that are open, links, what the page would fetch, and the cells of all rows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.fetched, self.tags, self.table = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.table.append([])
        elif tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "href":
                self.links.append(value)
            elif name in ("src", "srcset", "data", "poster", "action"):
                self.fetched.append(value)

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file(written):
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.fetched) == len(list(written.glob("*.png"))) > 0
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)
    assert all(link in ("#lr", "#idle") for link in page.links) and page.links
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in text
    assert {f'id="{name}"' in text for name in ("lr", "idle")} == {True}
    assert text.count('<td class="verdict not">not run</td>') == 2


def test_figures_are_drawn_small_and_only_where_there_is_something_to_draw(written):
    drawn = {path.name: path.stat().st_size for path in written.glob("*.png")}
    assert set(drawn) == {"lr-curves.png", "lr-lr.png", "lr-pareto.png", "lr-gap.png"}  # no batches, no diagnostics
    assert all(1000 < size <= 60_000 for size in drawn.values())
    assert "[gap](lr-gap.png)" in (written / "index.md").read_text()
    assert "batch.png" not in (written / "index.md").read_text()


def test_a_report_on_one_suite_keeps_the_others_in_the_index(written, monkeypatch):
    monkeypatch.setattr(report, "doubt", lambda *_: "")
    before = (written / "lr.csv").stat().st_mtime_ns
    report.write(["idle"], "tiny", written.parent, SUITES)
    assert (written / "lr.csv").stat().st_mtime_ns == before
    assert "best 1.800" in (written / "index.md").read_text()
    assert Page((written / "index.html").read_text()).fetched


def test_nothing_was_run(tmp_path):
    suites = {name: replace(suite, base={"full": {}}) for name, suite in SUITES.items()}
    text = report.write(["idle", "lr"], "full", tmp_path, suites).read_text()
    assert "Full scale" in text and "no trials were run" in text and "Claims: 1 tested, 4 not run." in text
    assert not (tmp_path / "full" / "lr.csv").exists()


def test_a_suite_is_judged_on_what_it_declares(tmp_path):
    base, grid = {"steps": 100, "clip": 1.0}, {"lr": (1.0, 2.0, 3.0)}
    declared = Suite("s", "S", (3,), {"tiny": base}, IDLE.claims, grid=grid)

    def found(*points):
        """The finding on outcomes with these rates and other knobs."""
        path = ledger.place(tmp_path, "tiny", "s")
        path.unlink(missing_ok=True)
        for lr, knobs in points:
            ledger.append(
                path, replace(outcome(1.0, lr=lr, variant="base", seed=0), knobs=base | {"lr": lr, "seed": 0} | knobs)
            )
        (line,), _ = report.judge([report.section(declared, "tiny", tmp_path)], "tiny")
        return line.verdict, line.finding.ours

    rates = [(lr, {}) for lr in grid["lr"]]
    assert found(*rates) == ("seen once", "x")
    assert found(*rates[:2]) == ("not run", "1 of 3 trials are left to run")
    assert found(*rates, (9.0, {})) == ("seen once", "x")  # a trial that the suite no longer has is left out
    assert [o.labels["lr"] for o in report.section(declared, "tiny", tmp_path).results.outcomes] == [1.0, 2.0, 3.0]
    assert found(*rates[:2], (3.0, {"clip": 2.0}))[1] == "1 of 3 trials were run with another clip than declared"
    assert found(*((lr, {"clip": 2.0}) for lr in grid["lr"])) == ("seen once", "x")


def test_noise_is_of_the_recipe_or_of_all_at_the_scale(tmp_path):
    def repeated(name, recipe, *losses):
        suite = Suite(name, name, (), {"tiny": {}}, (), recipe=recipe)
        return report.Section(suite, Results([outcome(y, seed=i, variant="base") for i, y in enumerate(losses)]))

    seen = {}

    def look(results, noise):
        seen[results.outcomes[0].val_loss] = noise
        return Finding("", True)

    claim = Claim(1, "", "", look)
    parts = [repeated("a", "M1", 1.0, 1.2), repeated("b", "M2", 2.0), repeated("c", "M1", 3.0, 3.4)]
    parts.append(repeated("d", "", 4.0))
    parts = [replace(part, suite=replace(part.suite, claims=(claim,))) for part in parts]
    _, said = report.judge(parts, "tiny")
    assert seen[1.0] == seen[2.0] == seen[3.0] == seen[4.0] and seen[1.0].dof == 2
    assert seen[1.0].sd == pytest.approx(((0.02 + 0.08) / 2) ** 0.5) and "M1 0.224 nats, 2 degrees" in said
    parts.append(replace(repeated("e", "M2", 2.0, 2.1), suite=replace(parts[1].suite, name="e")))
    seen.clear()
    report.judge(parts, "tiny")
    assert seen[2.0].dof == 1 and seen[1.0].dof == 2 and seen[4.0].dof == 3


def test_a_report_on_offline_trials_says_so(tmp_path):
    declared = Suite("s", "S", (3,), {"tiny": {"data.corpus": "pile"}}, IDLE.claims)
    for corpus, said in (("pile", False), ("docstrings", True)):
        (trial,) = trials(declared, "tiny")
        run = replace(outcome(1.0, **trial.labels), knobs=dict(trial.knobs) | {"data.corpus": corpus}, started=corpus)
        ledger.append(ledger.place(tmp_path / corpus, "tiny", "s"), run)
        page = report.write(["s"], "tiny", tmp_path / corpus, {"s": declared}).read_text()
        assert ("Run offline, on text that every machine has" in page) == said


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no suite is called rl; there are idle, lr"):
        report.write(["rl"], "tiny", tmp_path, SUITES)
    odd = {"odd": Suite("odd", "t", (), {"tiny": {}}, (), plots=("pie",))}
    with pytest.raises(ValueError, match="plot pie; there are curves, lr"):
        report.write(["odd"], "tiny", tmp_path, odd)
    assert not list((tmp_path / "tiny").glob("*.png"))


# Figures.


def drawn(figure):
    """What each panel shows: its lines' points, by label."""
    return [
        {entry.get_label(): list(map(tuple, entry.get_xydata())) for entry in axes.lines if entry.get_label()[0] != "_"}
        for axes in figure.axes
    ]


def test_curves_are_on_steps_and_on_seconds():
    runs = [outcome(evals=[(50, 3.0), (100, 2.0)], variant="a"), outcome(evals=[(50, 2.5), (100, 1e9)], variant="b")]
    steps, seconds = drawn(figures.curves(Results(runs)))
    assert steps["a"] == [(50, 3.0), (100, 2.0)] and seconds["a"] == [(5, 3.0), (10, 2.0)]
    assert figures.curves(Results(runs)).axes[0].get_ylim()[1] == pytest.approx(1.15 * 3.0)  # not 1e9
    (steps, _) = drawn(figures.curves(Results([outcome(variant="a")])))
    assert steps == {"all": [(1, 5.48), (50, 4.5), (100, 3.5)]}  # evaluated at the end only: its training loss
    lost = outcome(math.nan, "nan", variant="b")
    lost.steps[-1]["loss"] = math.nan
    assert drawn(figures.curves(Results([runs[0], lost])))[0]["b"] == [(1, 5.48), (50, 4.5)]


def test_the_lr_curve_marks_best_edge_and_lost():
    axes = figures.lr(Results([*sweep()[:-1], outcome(0.0, "diverged", lr=1.0)])).axes[0]
    marked = {entry.get_marker(): list(map(tuple, entry.get_xydata())) for entry in axes.lines}
    assert marked["*"] == [(3e-3, 1.615)]
    assert marked["x"] == [(1.0, 0.97)]
    assert [entry.get_xdata()[0] for entry in axes.lines if entry.get_linestyle() == ":"] == [3e-2]
    assert axes.get_xscale() == "log"


def test_the_batch_figure_marks_knee_and_noise_scale():
    runs = [outcome(2.0, batch_size=b, diag={"noise_scale": 16.0 * 24} if b == 8 else {}) for b in (8, 1, 64)]
    for run, speed in zip(runs, (950.0, 100.0, 1000.0), strict=True):
        run.final["tok_s_steady"] = speed
    loss, speed = figures.batch(Results(runs)).axes
    assert [entry.get_xdata()[0] for entry in loss.lines if entry.get_linestyle() == "--"] == [24]
    assert [entry.get_xdata()[0] for entry in speed.lines if entry.get_linestyle() == ":"] == [8]
    assert loss.get_xlabel() == speed.get_xlabel() == "batch_size, sequences"


def test_a_line_is_drawn_through_trials_that_differ_in_the_batch_alone():
    at = [(1, 0.1, 3.0), (4, 0.1, 2.0), (16, 0.1, 1.5), (4, 0.2, 1.9), (16, 0.4, 1.2)]
    runs = [outcome(loss, batch_size=b, lr=lr) for b, lr, loss in at]
    losses = drawn(figures.batch(Results(runs)))[0]
    assert losses == {"lr 0.1": [(1, 3.0), (4, 2.0), (16, 1.5)], "other": [(4, 1.9), (16, 1.2)]}
    runs = [outcome(2.0, batch_size=b, micro_batch=m) for b, m in ((32, 1), (32, 4), (8, 4))]
    loss, speed = figures.batch(Results(runs)).axes
    assert (loss.get_xlabel(), speed.get_xlabel()) == ("batch_size, sequences", "micro_batch, sequences")


def test_layers_are_a_line_a_variant_over_its_blocks():
    norms = {"pre": (1.0, 2.0), "post": (1e-6, 1.0, 10.0)}
    runs = [
        outcome(variant=name, diag={"gradient": {f"blocks.{i}.attention": v for i, v in enumerate(values)}})
        for name, values in norms.items()
    ]
    (panel,) = drawn(figures.layers(Results(runs)))
    assert panel == {name: list(enumerate(values)) for name, values in norms.items()}
    dead = outcome(variant="a", diag={"activation": {"0": 2.0, "1": 4.0, "2": math.inf, "3": None, "10": 5.0}})
    (panel,) = figures.layers(Results([dead])).axes
    shown, lost = (entry.get_xydata().tolist() for entry in panel.lines)
    assert shown == [[0, 2.0], [1, 4.0], [4, 5.0]] and [x for x, _ in lost] == [2, 3]
    assert panel.get_yscale() == "log"


def test_the_frontier_has_measured_and_predicted(monkeypatch):
    points = {"plain": [(1, 2**20, 2**21), (2, None, 2**22)], "lean": []}
    monkeypatch.setattr(figures.memory, "points", lambda results, name: points[name])
    runs = [outcome(configuration=name) for name in points]
    lines = [entry.get_xydata().tolist() for entry in figures.frontier(Results(runs)).axes[0].lines]
    assert [line for line in lines if line] == [[[1, 1.0]], [[1, 2.0], [2, 4.0]]]
    with pytest.raises(LookupError):
        figures.frontier(Results(runs[1:]))


def test_the_gap_is_to_the_first_variant_with_the_same_labels():
    runs = [
        outcome(variant=v, seed=s, evals=[(10, 3.0 + s + d), (20, 2.0 + 2 * d), (30 + 10 * d, 9.0)])
        for v, d in (("base", 0.0), ("other", 0.5)) for s in (0, 1)
    ]  # fmt: skip
    lines = [entry.get_xydata().tolist() for entry in figures.gap(Results(runs)).axes[0].lines]
    assert lines[:2] == [[[10, 0.5], [20, 1.0]]] * 2


def test_the_front_is_drawn_through_what_nothing_beats():
    runs = [outcome(v, "finished" if v else "nan", variant=str(v)) for v in (3.0, 2.0, 0.0)]
    panels = figures.pareto(Results(runs)).axes
    assert [panel.lines[-1].get_xydata().tolist() for panel in panels] == [[[10, 2.0]], [[1.28e7, 2.0]], [[1000, 2.0]]]


def test_coherence_is_drawn_over_training():
    series = [{"step": s, "noise_scale": 100.0 * s, "coherence": 1 / s} for s in (1, 2, 4)]
    runs = [outcome(variant=name, diag={"series": series}) for name in "ab"]
    coherence, noise = drawn(figures.coherence(Results(runs)))
    assert coherence["a"] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert noise["b"] == [(1, 100.0), (2, 200.0), (4, 400.0)]


@pytest.mark.parametrize("plot", figures.PLOTS)
def test_a_figure_with_nothing_to_draw_is_a_lookup_error(plot):
    with pytest.raises(LookupError):
        figures.PLOTS[plot](Results([]))


def test_a_figure_of_many_trials_is_small(tmp_path):
    noise = random.Random(0)
    runs = [
        outcome(variant=f"a rather long name {i}", evals=[(s, 2 + noise.random()) for s in range(1, 61)])
        for i in range(24)
    ]  # fmt: skip
    report.draw(report.Section(Suite("s", "Many", (), {}, (), plots=("curves",)), Results(runs)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["s-curves.png"]
    assert (tmp_path / "s-curves.png").stat().st_size <= report.LARGEST <= 60_000
