"""What is made of ledgers: numbers, verdicts, tables, figures and a page, from results whose answers are known."""

import csv
import math
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from experiments import analysis, figures, ledger, report
from experiments.judges import at_most, threshold
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
    assert analysis.knee(speed, share=0.99) == 16


def test_the_largest_batch_that_costs_nothing():
    points = [(1, 2.05), (2, 2.0), (4, 2.005), (8, 2.009), (16, 2.2), (32, 2.001)]
    assert analysis.largest_within(points, 0.01) == 8
    assert analysis.largest_within(points, 0.001) == 2


def test_evaluations_on_the_way():
    run = outcome(evals=[(10, 4.0), (20, 3.0), (40, 2.0)])
    assert analysis.seconds_to(3.5, run) == 2.0
    assert analysis.seconds_to(1.0, run) == math.inf
    assert analysis.evaluations(run, "seconds") == [(1.0, 4.0), (2.0, 3.0), (4.0, 2.0)]
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
    for diag in ({}, {"series": [{"step": 1, "noise_scale": -1.0}]}):
        with pytest.raises(LookupError):
            analysis.critical_batch(outcome(diag=diag))


# The report.


def best_is(lr):
    def judge(results, noise):
        x, y = analysis.best(analysis.curve(results))
        return Finding(f"best {y:.3f} at {x:g}", x == lr, y - 1.615, 0.012, seeds=2)

    return judge


CLAIMS = (
    Claim(10, "Best LR is 1e-2 | or <b>more</b>", 'a & "b"', best_is(1e-2)),
    Claim(1, "Best LR is 3e-3", "1.615", best_is(3e-3)),
    Claim(2, "Larger batches", "4", threshold(analysis.loss, at_most(4), where={"batch_size": 4})),
    Claim(2, "A test says so", "", test="tests/test_x.py::test_y"),
)
PLOTS = ("lr by variant", "batch_size", "layers by variant", "pareto by variant", "gap by variant")
VARIANTS = {"big": {}, "small": {"model.n_layer": 1}}
LR = Suite("lr", "Learning <rates>", {"tiny": {}}, CLAIMS, VARIANTS, {"lr": LRS}, plots=PLOTS)
IDLE = Suite("idle", "Nothing ran", {"tiny": {}}, (Claim(3, "c", "t", lambda r, noise: Finding("x", True)),))


SUITES = {"idle": IDLE, "lr": LR}


def enter(results, suite, outcomes, **fields):
    """Put outcomes in the ledger of a suite, as those of its trials with the same labels."""
    declared = {tuple(trial.labels.values()): trial for trial in trials(suite, "tiny")}
    for found in outcomes:
        trial = declared[found.labels["variant"], *(v for k, v in found.labels.items() if k != "variant"), 0]
        own = {"labels": dict(trial.labels), "knobs": trial.changes, "key": trial.key, "suite": suite.name}
        ledger.append(ledger.place(results, "tiny", suite.name), replace(found, **(own | fields)))


def without_doubt(*asked, section=report.section):
    """A part of the trials shows what pages look like."""
    return replace(section(*asked), doubt="")


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
    enter(results, LR, runs)
    (results / "tiny" / "lr-batch_size.png").write_bytes(b"of a ledger that is gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "section", without_doubt)
        path = report.write(["lr"], SUITES, "tiny", results)
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
    assert "10 finished, 1 nan; 138 s of trials; 2026-01-02; on a CPU, 2 cores; commit abc123." in text


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


def test_what_is_a_label_and_a_measure_is_the_label():
    (row,) = report.table([outcome(seconds=60.0, variant="a")])
    assert list(row)[:3] == ["seconds", "variant", "status"] and row["seconds"] == 60.0


def test_the_page_lists_every_trial(written):
    page = Page((written / "index.html").read_text())
    big = ["big", "0.0001", "0", "finished", "2.235", "4.47", "100", "12,800", "1280", "0.25", "3,145,728", "12.5", ""]
    assert big in page.table and len([row for row in page.table if row[0] in ("big", "small")]) == 11
    lost = next(row for row in page.table if row[3:4] == ["nan"])
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
    assert set(drawn) == {"lr-lr.png", "lr-pareto.png", "lr-gap.png"}  # no batches, no diagnostics
    assert all(1000 < size <= 20_000 for size in drawn.values())
    assert "[gap by variant](lr-gap.png)" in (written / "index.md").read_text()
    assert "batch_size.png" not in (written / "index.md").read_text()


def test_a_report_on_one_suite_keeps_the_others_in_the_index(written, monkeypatch):
    monkeypatch.setattr(report, "section", without_doubt)
    before = (written / "lr.csv").stat().st_mtime_ns
    report.write(["idle"], SUITES, "tiny", written.parent)
    assert (written / "lr.csv").stat().st_mtime_ns == before
    assert "best 1.800" in (written / "index.md").read_text()
    assert Page((written / "index.html").read_text()).fetched


def test_a_report_takes_a_ledger(tmp_path):
    with pytest.raises(ledger.LedgerError, match=r"nothing was run: .*tiny has no ledger; --results"):
        report.write(["idle", "lr"], SUITES, "tiny", tmp_path)
    assert not list(tmp_path.iterdir())


GRID = Suite("s", "S", {"tiny": {"steps": 100, "clip": 1.0}}, IDLE.claims, grid={"lr": (1.0, 2.0, 3.0)})


def judged(results, suite=GRID, **asked):
    """The verdict and the words of the suite's claim."""
    parts = report.compared([report.section(suite, "tiny", results, 0, asked or None, False)])
    (line,), _ = report.judge(parts, "tiny")
    return line.verdict, line.finding.ours


def test_a_suite_is_judged_on_what_it_declares(tmp_path):
    """That is on the trials with its knobs, all of them; others in the ledger are of other sweeps."""
    enter(tmp_path, GRID, [outcome(1.0, variant="base", lr=lr) for lr in (2.0, 1.0)])
    assert judged(tmp_path) == ("not run", "1 of 3 trials are left to run")
    clipped = replace(GRID, base={"tiny": {"steps": 100, "clip": 2.0}})
    enter(tmp_path, clipped, [outcome(2.0, variant="base", lr=lr) for lr in (1.0, 2.0, 3.0)])
    assert judged(tmp_path) == ("not run", "1 of 3 trials are left to run")
    assert judged(tmp_path, clip=2.0) == ("seen once", "x")
    enter(tmp_path, GRID, [outcome(3.0, variant="base", lr=3.0)])
    assert judged(tmp_path) == ("seen once", "x")
    found = report.section(GRID, "tiny", tmp_path, 0, None, False).results.outcomes
    assert [(o.labels["lr"], o.val_loss) for o in found] == [(1.0, 1.0), (2.0, 1.0), (3.0, 3.0)]
    assert found[0].knobs == {"steps": 100, "clip": 1.0, "lr": 1.0, "seed": 0}  # those of the base too


def test_a_rerun_supersedes_and_more_seeds_than_declared_count(tmp_path):
    once = replace(GRID, grid={})
    for seed, loss in ((0, 1.0), (1, 2.0), (0, 3.0)):
        trial = trials(once, "tiny", seeds=2)[seed]
        path = ledger.place(tmp_path, "tiny", "s")
        ledger.append(path, replace(outcome(loss), key=trial.key, labels=dict(trial.labels)))
    found = report.section(once, "tiny", tmp_path, 0, None, False)
    assert [o.val_loss for o in found.results.outcomes] == [3.0, 2.0] and not found.doubt
    assert report.section(once, "tiny", tmp_path, 3, None, False).doubt == "1 of 3 trials are left to run"


@pytest.mark.parametrize("of", [{"digest": "aaa"}, {"recipe": 1}])
def test_outcomes_of_another_text_or_recipe_are_not_compared(tmp_path, of):
    runs = [outcome(1.0, variant="base", lr=lr) for lr in (1.0, 2.0, 3.0)]
    now, later = {"digest": "bbb", "recipe": 2}, {"started": "2026-01-03T00:00:00+0000"}
    enter(tmp_path, GRID, runs[:2], **now | of)
    enter(tmp_path, GRID, runs[2:], **now | later)
    assert judged(tmp_path) == (
        "not run", "2 of 3 trials are of an earlier recipe or another text: run them again"
    )  # fmt: skip
    enter(tmp_path, GRID, runs[:2], **now | later)
    assert judged(tmp_path) == ("seen once", "x")
    # Another suite is in doubt as a whole; one on a text of another name only where the recipe differs.
    others = [
        replace(GRID, name=name, base={"tiny": base})
        for name, base in (("t", {"clip": 2.0}), ("u", {"data.corpus": "stdlib"}))
    ]
    for each in others:
        enter(tmp_path, each, runs, **now | of)
    parts = report.compared([report.section(s, "tiny", tmp_path, 0, None, False) for s in (GRID, *others)])
    assert [bool(part.doubt) for part in parts] == [False, True, "recipe" in of]


def test_noise_is_of_the_preset_or_of_all_at_the_scale():
    def repeated(name, preset, *losses):
        suite = Suite(name, name, {"tiny": {}}, (claim,), preset=preset)
        runs = [replace(outcome(y, seed=i, variant="base"), key=f"{name}{i}") for i, y in enumerate(losses)]
        return report.Section(suite, Results(runs))

    seen = {}

    def look(results, noise):
        seen[results.outcomes[0].val_loss] = noise
        return Finding("", True)

    claim = Claim(1, "", "", look)
    parts = [repeated("a", "M1", 1.0, 1.2), repeated("b", "M2", 2.0), repeated("c", "M1", 3.0, 3.4)]
    parts.append(repeated("d", "", 4.0))
    _, said = report.judge(parts, "tiny")
    assert seen[1.0] == seen[2.0] == seen[3.0] == seen[4.0] and seen[1.0].dof == 2
    assert seen[1.0].sd == pytest.approx(((0.02 + 0.08) / 2) ** 0.5) and "M1 0.224 nats, 2 degrees" in said
    parts.append(repeated("e", "M2", 2.0, 2.1))
    seen.clear()
    report.judge(parts, "tiny")
    assert seen[2.0].dof == 1 and seen[1.0].dof == 2 and seen[4.0].dof == 3


def test_a_report_says_of_what_its_trials_are(tmp_path):
    declared = Suite("s", "S", {"tiny": {"data.corpus": "pile"}}, IDLE.claims)
    for offline, extra, said in ((True, None, "Run offline"), (False, {"clip": 2.0}, "With clip=2.0 in s.")):
        (trial,) = trials(declared, "tiny", extra=extra, offline=offline)
        run = replace(outcome(1.0, **trial.labels), key=trial.key, digest="d1g357")
        ledger.append(ledger.place(tmp_path, "tiny", "s"), run)
        page = report.write(["s"], {"s": declared}, "tiny", tmp_path, extra=extra, offline=offline).read_text()
        assert said in page and "1 seen once" in page
        assert f"text {'docstrings' if offline else 'pile'} d1g357" in page
    plain = report.write(["s"], {"s": declared}, "tiny", tmp_path).read_text()
    assert "With clip" not in plain and "Run offline" not in plain and "1 of 1 trials are left to run" in plain


# Figures.


def lines(plot, runs):
    """The axes, and the points of each line that is not empty."""
    axes = figures.draw(plot, Results(runs)).axes[0]
    return axes, [list(map(tuple, entry.get_xydata())) for entry in axes.lines if len(entry.get_xdata())]


def test_the_loss_against_a_label_with_crosses_for_what_was_lost():
    runs = [*sweep((3.0, 2.0), (0.1, 0.3), variant="a", seed=0), *sweep((4.0, 2.0), (0.1, 0.3), variant="a", seed=1)]
    runs += [outcome(y, status, lr=lr, variant="b") for lr, y, status in
             ((0.1, 2.5, "finished"), (0.3, 0.0, "oom"), (9.0, 1.0, "finished"))]  # fmt: skip
    axes, found = lines("lr by variant", runs)
    assert found == [[(0.1, 3.5), (0.3, 2.0)], [(0.1, 2.5), (9.0, 1.0)], [(0.3, 0.97)]]
    assert axes.lines[-1].get_marker() == "x"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["variant a", "variant b"]
    assert axes.get_xscale() == "log"


def test_a_label_that_is_a_word_is_an_axis_too():
    axes, found = lines("of by variant", [outcome(y, variant="a", of=of) for of, y in (("x", 2.0), ("y", 1.0))])
    assert found == [[(0, 2.0), (1, 1.0)]] and axes.get_xscale() == "linear"


def test_the_gap_is_to_the_first_variant_with_the_same_labels():
    runs = [
        outcome(variant=v, seed=s, evals=[(10, 3.0 + s + d), (20, 2.0 + 2 * d), (30 + 10 * d, 9.0)])
        for v, d in (("base", 0.0), ("other", 0.5)) for s in (0, 1)
    ]  # fmt: skip
    axes, found = lines("gap by variant", runs)
    assert found == [[(10, 0.5), (20, 1.0)]] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["variant other"]


def test_other_lines():
    """Of layers, of agreement over training, and of loss against cost."""
    gradient = {"blocks.0.attention": 3.0, "blocks.0.feed_forward": 4.0, "blocks.1.attention": None}
    series = [{"step": s, "coherence": 1 / s} for s in (1, 2, 4)]
    run = outcome(2.0, diag={"gradient": gradient, "series": series}, variant="a")
    assert lines("layers by variant", [run])[1] == [[(0, 5.0)], [(1, 0.97)]]
    assert lines("coherence by variant", [run])[1] == [[(1, 1.0), (2, 0.5), (4, 0.25)]]
    assert lines("pareto by variant", [run])[1] == [[(1000, 2.0)]]


@pytest.mark.parametrize("plot", [*(f"{name} by variant" for name in figures.LINES), "lr"])
def test_a_figure_with_nothing_to_draw_is_a_lookup_error(plot):
    with pytest.raises(LookupError):
        figures.draw(plot, Results([]))
