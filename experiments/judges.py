"""The comparisons that claims are judged by, and the statistics that a verdict takes.

A judge is data: `Versus("none", "rope", HIGHER)` compares two variants. Called with a suite's results and the noise of
seeds, it gives a finding; missing trials raise `LookupError`, and the claim is then not run. The rules of a verdict:

- Noise is measured at the scale at hand: the standard deviation of runs that differ only in their seed, pooled.
- Two variants are compared seed by seed, with Student's t over the differences; one seed alone, against that noise.
- p-values are corrected over all claims of a report by Holm's method. Above .05 a difference is within noise.
- One seed is at most `seen once`; `reproduced` and `refuted` take two.
- A published loss or speed is compared at the original's size only.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import fmean, variance
from typing import Any, Literal

try:
    from scipy.stats import t as student
except ImportError as missing:
    raise ImportError("reports need scipy and jinja2: pip install -c constraints.txt '.[experiments]'") from missing

from experiments import analysis
from experiments.analysis import FAILED, Measure, curve, loss
from experiments.spec import Finding, Outcome, Results, Scale, Where

Verdict = Literal[
    "reproduced", "refuted", "artefact", "seen once", "not seen", "within noise", "tested",
    "not comparable at this scale", "not run",
]  # fmt: skip
ALPHA = 0.05
LOWER, HIGHER = (-math.inf, 0.0), (0.0, math.inf)  # where a difference lies for a claim to hold
DIFFERENT = (-math.inf, math.inf)  # anywhere: only that it is no noise


def at_most(bound: float) -> tuple[float, float]:
    return -math.inf, bound


def at_least(bound: float) -> tuple[float, float]:
    return bound, math.inf


def same(tolerance: float) -> tuple[float, float]:
    return -tolerance, tolerance


def inside(value: float, bounds: tuple[float, float]) -> bool:
    low, high = bounds
    return (low == -math.inf or low < value) and (high == math.inf or value < high)


# Statistics


@dataclass(frozen=True)
class Noise:
    """The standard deviation of a loss over seeds, pooled over groups of repeated runs, and its degrees of freedom."""

    sd: float
    dof: int

    @classmethod
    def of(cls, groups: Iterable[Sequence[Outcome]]) -> "Noise | None":
        """Measured on outcomes that differ only in their seed; None where nothing was repeated."""
        repeats = [[o.val_loss for o in group if math.isfinite(o.val_loss)] for group in groups]
        repeats = [losses for losses in repeats if len(losses) > 1]
        dof = sum(len(losses) - 1 for losses in repeats)
        return cls((sum((len(v) - 1) * variance(v) for v in repeats) / dof) ** 0.5, dof) if dof else None


@dataclass(frozen=True)
class Difference:
    """An estimated difference: its mean over `n` seeds, standard error (None: unknown) and degrees of freedom."""

    mean: float
    n: int = 1
    se: float | None = None
    dof: int = 1

    @property
    def interval(self) -> float | None:
        """Half the width of the 95% confidence interval."""
        known = self.se is not None and math.isfinite(self.mean)
        return float(student.ppf(0.975, self.dof) * self.se) if known else None

    def p(self, bounds: tuple[float, float]) -> float | None:
        """Two-sided p-value of the side of the nearest bound on which the mean lies. Below .05 the 95% interval is all
        within the bounds, or all outside: a test of a direction, and of equivalence where both bounds are finite."""
        if self.se is None:
            return None
        distance = min(abs(self.mean - bound) for bound in ([*filter(math.isfinite, bounds)] or [0.0]))
        if not self.se or math.isinf(distance):
            return float(distance == 0)
        return float(2 * student.sf(distance / self.se, self.dof))


def paired(a: Mapping[int, float], b: Mapping[int, float], noise: Noise | None) -> Difference:
    """The difference of losses by seed, over the seeds that both have. One seed alone has the standard error of the
    difference of two runs. Infinite where one side failed. Raises `LookupError` where both did, or share no seed."""
    pairs = [(a[seed], b[seed]) for seed in a if seed in b]
    if not pairs:
        raise LookupError("no seed was run on both sides")
    failed = [any(map(math.isinf, side)) for side in zip(*pairs, strict=True)]
    if all(failed):
        raise LookupError("runs of both sides did not finish")
    if any(failed):
        return Difference(math.inf if failed[0] else -math.inf, len(pairs), 0.0)
    differences = [x - y for x, y in pairs]
    if (n := len(pairs)) > 1:
        return Difference(fmean(differences), n, (variance(differences) / n) ** 0.5, n - 1)
    return unpaired(differences[0], 1, noise)


def unpaired(difference: float, n: int, noise: Noise | None) -> Difference:
    """The difference of two means over `n` runs each, by the noise."""
    return Difference(difference, n, *((noise.sd * (2 / n) ** 0.5, noise.dof) if noise else ()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of m times m - k, and no less than those
    below it."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = corrected[i] = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return corrected


def verdicts(findings: Sequence[Finding], scale: Scale) -> list[Verdict]:
    """The verdicts of a report's findings, whose p-values are one family."""
    family = [i for i, f in enumerate(findings) if f.p is not None and not (f.published and scale != "full")]
    corrected = dict(zip(family, holm([findings[i].p for i in family]), strict=True))
    return [verdict(finding, scale, corrected.get(i)) for i, finding in enumerate(findings)]


def verdict(finding: Finding, scale: Scale, p: float | None) -> Verdict:
    if finding.published and scale != "full" and finding.ours:
        return "not comparable at this scale"
    if finding.holds is None:
        return "not run"
    if finding.artefact:
        return "artefact"
    if p is not None and p > ALPHA:
        return "within noise"
    if finding.seeds < 2:
        return "seen once" if finding.holds else "not seen"
    return "reproduced" if finding.holds else "refuted"


# Judges

FORMS: Mapping[Measure, str] = {
    loss: "{:.3f}", analysis.late_change: "{:+.3f}", analysis.last_training_loss: "{:.3f}",
    analysis.speed: "{:,.0f} tok/s", analysis.wall_speed: "{:,.0f} tok/s", analysis.memory: "{:,.1f} MiB",
    analysis.first_loss: "{:.2f} ln V",
    analysis.micro_batch_that_fits: "{:g}", analysis.bits_a_byte: "{:.3f}", analysis.cost: "{:,.0f} FLOPs a token",
}  # fmt: skip


def words(measure: Measure, value: float) -> str:
    return FORMS.get(measure, "{:.4g}").format(value) if math.isfinite(value) else "no loss"


def n_seeds(outcomes: Iterable[Outcome]) -> int:
    return len({o.labels.get("seed", o.labels.get("repeat", 0)) for o in outcomes})


def grouped(outcomes: Iterable[Outcome], by: str, of: Callable[[Outcome], Any]) -> dict[Any, list[Any]]:
    """A number of each outcome, in lists by the value of a label."""
    groups: dict[Any, list[Any]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.labels.get(by), []).append(of(outcome))
    return groups


def spread(values: Sequence[float]) -> float:
    """By how much the largest exceeds the smallest, as a share."""
    return max(values) / min(values) - 1


@dataclass(frozen=True)
class Threshold:
    """A measure, `over` the trials (mean, min, max, ...), lies within bounds; in each group `by` a label, if given."""

    measure: Measure
    bounds: tuple[float, float]
    where: Where = field(default_factory=dict)
    over: Callable[[Sequence[float]], float] = fmean
    by: str = ""
    show: str = "{}"
    published: bool = False

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        outcomes = results.where(self.where)
        if outcomes[0].status == "unsupported":
            return Finding(f"unsupported: {outcomes[0].error.strip()}", None)
        values = {name: self.over(found) for name, found in grouped(outcomes, self.by, self.measure).items()}
        form = "{:.1%}".format if self.over is spread else partial(words, self.measure)
        machine = outcomes[-1].machine
        texts = [f"{name} " * bool(self.by) + self.show.format(form(v), machine) for name, v in values.items()]
        low, high = self.bounds
        decisive = min(values.values()) if math.isfinite(low) and self.over is not max else max(values.values())
        bound = low if math.isfinite(low) else high
        delta = decisive - bound if math.isfinite(decisive - bound) else None
        return Finding(
            ", ".join(texts), low <= decisive <= high, delta, seeds=n_seeds(outcomes), published=self.published
        )


@dataclass(frozen=True)
class Versus:
    """The measure of `a` less that of `b` (or their `ratio`), by seed, lies within bounds. A side is a variant, or
    labels; `best_over` a label, each side is taken at its own best value of it."""

    a: str | Where
    b: str | Where
    bounds: tuple[float, float]
    measure: Measure = loss
    ratio: bool = False
    where: Where = field(default_factory=dict)
    best_over: str = ""
    published: bool = False

    def side(self, results: Results, labels: str | Where) -> tuple[dict[int, float], str]:
        """By seed, the measure of a side; and where it is taken."""
        where = {**self.where, **({"variant": labels} if isinstance(labels, str) else labels)}
        at = ""
        if self.best_over:
            where[self.best_over] = best = analysis.best(curve(results, self.best_over, where=where))[0]
            at = f" at {best:g}"
        outcomes = results.where(where)
        values = {o.labels.get("seed", 0): self.measure(o) for o in outcomes}
        if len(values) != len(outcomes):
            raise LookupError(f"{len(outcomes)} runs with {len(values)} seeds cannot be paired")
        return values, at

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        (a, at_a), (b, at_b) = (self.side(results, side) for side in (self.a, self.b))
        ours = " for ".join(words(self.measure, fmean(v.values())) + at for v, at in ((a, at_a), (b, at_b)))
        if self.ratio:
            times = fmean(a.values()) / fmean(b.values())
            bound = next((bound for bound in self.bounds if math.isfinite(bound)), 0.0)
            holds, ours = inside(times, self.bounds), f"{times:.3g} times ({ours})"
            return Finding(ours, holds, times - bound, seeds=min(len(a), len(b)), published=self.published)
        found = paired(a, b, noise)
        holds = inside(found.mean, self.bounds)
        return Finding(ours, holds, found.mean, found.interval, found.p(self.bounds), found.n, self.published)


@dataclass(frozen=True)
class Equal:
    """The losses of two variants are equal to the last digit, seed by seed."""

    a: str
    b: str
    where: Where = field(default_factory=dict)

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        a, b = (Versus(self.a, self.b, HIGHER, where=self.where).side(results, side)[0] for side in (self.a, self.b))
        difference = paired(a, b, None).mean
        equal = all(a[seed] == b[seed] for seed in a if seed in b)
        return Finding(f"{fmean(a.values()):.6f} and {fmean(b.values()):.6f}", equal, difference, seeds=len(a))


@dataclass(frozen=True)
class Best:
    """The lowest loss along an axis is at the value `expected`, `inside` the grid, at its `first` value, or, `over` a
    second axis, at a value that `grows`. It must lead the runner-up by more than noise.

    `rival` labels select the same runs measured in another way: where that alone changes a loss by more than the lead,
    the claim is an artefact of it."""

    axis: str | Measure
    expected: Any
    where: Where = field(default_factory=dict)
    over: str = ""
    rival: Where = field(default_factory=dict)
    published: bool = False

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        n = n_seeds(results.where(self.where))
        slices = [{**self.where, self.over: v} for v in results.values(self.over)] if self.over else [self.where]
        curves = [curve(results, self.axis, where=where) for where in slices]
        if any(len(points) < 2 for points in curves):
            raise LookupError("it takes two points to have a best one")
        at = [analysis.best(points)[0] for points in curves]
        leads = [sorted(y for _, y in points)[1] - analysis.best(points)[1] for points in curves]
        p_values = [unpaired(lead, n, noise).p(HIGHER) for lead in leads]
        p = None if None in p_values else max(p_values)
        if self.over:
            ours = "best: " + ", ".join(f"{x:g} at {v}" for x, v in zip(at, results.values(self.over), strict=True))
            return Finding(ours, at == sorted(at) and at[0] < at[-1], p=p, seeds=n)
        points, x, lead = curves[0], at[0], leads[0]
        holds = {"inside": analysis.interior(points), "first": x == points[0][0]}.get(self.expected, x == self.expected)
        name = words(self.axis, x) if callable(self.axis) else f"{x:g}"
        ours, artefact = f"{words(loss, analysis.best(points)[1])} at {name}, by {lead:.3f}", False
        if self.rival:
            other = curve(results, self.axis, where=self.rival)
            fixed = dict(points)
            moved = max((y - fixed[x] for x, y in other if math.isfinite(y)), key=abs, default=0.0)
            artefact, ours = abs(moved) > lead, f"{ours}; how it is measured alone moves a loss by {moved:+.3f}"
        interval = unpaired(lead, n, noise).interval
        return Finding(ours, holds, lead, interval, p, n, self.published, artefact)


@dataclass(frozen=True)
class Monotone:
    """A measure falls (or rises) at every step along an axis; for a loss, by more than noise. `common` a label, at its
    largest value that all points have."""

    axis: str | Measure
    measure: Measure = loss
    falls: bool = True
    where: Where = field(default_factory=dict)
    common: str = ""

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        where = dict(self.where)
        if self.common:
            x = self.axis if callable(self.axis) else lambda outcome: outcome.labels[self.axis]
            had = grouped((o for o in results.where(where) if x(o) is not None), self.common, x)
            n_points = max((len(set(xs)) for xs in had.values()), default=0)
            if n_points < 2:
                raise LookupError("fewer than two points finished")
            where[self.common] = max(at for at, xs in had.items() if len(set(xs)) == n_points)
        points = [(x, y) for x, y in curve(results, self.axis, self.measure, where) if math.isfinite(y)]
        if len(points) < 2:
            raise LookupError("fewer than two points finished")
        n = n_seeds(results.where(where))
        steps = [(a - b) * (1 if self.falls else -1) for (_, a), (_, b) in pairwise(points)]
        holds, p = all(step > 0 for step in steps), None
        if self.measure is loss and noise:
            tails = [unpaired(step, n, noise).p(HIGHER) for step in steps]
            wrong = [tail for step, tail in zip(steps, tails, strict=True) if step <= 0]
            p = max(tails) if holds else min(1.0, len(steps) * min(wrong))
        at = [words(self.axis, x) if callable(self.axis) else f"{x:,g}" for x, _ in points]
        ours = ", ".join(f"{words(self.measure, y)} at {x}" for x, (_, y) in zip(at, points, strict=True))
        return Finding(ours, holds, points[-1][1] - points[0][1], p=p, seeds=n)


@dataclass(frozen=True)
class Edge:
    """Along `axis` the best value is inside the grid, and from some value above it on training fails: the edge of
    stability. `below` a variant, the edge is lower than that variant's."""

    variant: str = "base"
    below: str = ""
    axis: str = "lr"
    theirs: float | None = None

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        points = curve(results, self.axis, where={"variant": self.variant})
        n, limit = n_seeds(results.where({"variant": self.variant})), analysis.edge(points)
        if self.below:
            other = analysis.edge(curve(results, self.axis, where={"variant": self.below}))
            edges = [math.inf if at is None else at for at in (limit, other)]
            ours = f"{self.variant} fails from {edges[0]:g} on, {self.below} from {edges[1]:g}"
            return Finding(ours, edges[0] < edges[1], seeds=n)
        x, y = analysis.best(points)
        fails = f"edge of stability at {limit:g}" if limit else "no edge of stability in the grid"
        at_size = self.theirs is not None and results.outcomes[0].scale == "full"
        holds = analysis.interior(points) and limit is not None
        return Finding(f"{words(loss, y)} at {x:g}; {fails}", holds, y - self.theirs if at_size else None, seeds=n)


@dataclass(frozen=True)
class Statuses:
    """At some value of the axis `a` diverges or becomes NaN where `b` trains, and never the other way round."""

    a: str
    b: str
    axis: str = "lr"

    def ends(self, results: Results, variant: str) -> dict[float, str]:
        """How the runs of a variant ended; a failure, where one of several seeds failed."""
        found: dict[float, str] = {}
        for o in sorted(results.where({"variant": variant}), key=lambda o: (o.labels[self.axis], loss(o) < math.inf)):
            found.setdefault(o.labels[self.axis], o.status if o.status in FAILED else words(loss, loss(o)))
        return found

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        ends, others = self.ends(results, self.a), self.ends(results, self.b)
        apart = [x for x in ends if x in others and (ends[x] in FAILED) != (others[x] in FAILED)]
        ours = ", ".join(f"{end} at {x:g}" for x, end in ends.items())
        for x in apart:
            ours += f"; {self.b} {'trains' if ends[x] in FAILED else 'fails'} at {x:g}"
        holds = bool(apart) and all(ends[x] in FAILED for x in apart)
        return Finding(ours, holds, seeds=n_seeds(results.where({"variant": self.a})))


@dataclass(frozen=True)
class Saturates:
    """The loss at equal tokens is flat up to some batch, and rises above it. `speed_axis` a label, with the value from
    which speed no longer grows, and the critical batch."""

    axis: str
    where: Where = field(default_factory=dict)
    speed_axis: str = ""
    tolerance: float = 0.02

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        points, n = curve(results, self.axis, where=self.where), n_seeds(results.where(self.where))
        if len(points) < 3:
            raise LookupError("a saturation takes three points")
        (x, y), flat = analysis.best(points), analysis.largest_within(points, self.tolerance)
        found = unpaired(points[-1][1] - y, n, noise)
        ours = f"{words(loss, y)} at {x:g}, within {self.tolerance:g} up to {flat:g}, "
        ours += f"{words(loss, points[-1][1])} at {points[-1][0]:g}"
        if self.speed_axis:
            from experiments.run import configuration

            middle = max(results.values(self.axis), key=lambda v: len(results.where({self.axis: v})))
            level = analysis.knee(curve(results, self.speed_axis, analysis.speed, {self.axis: middle}))
            finest = min(results.where({self.axis: middle}), key=lambda o: o.labels[self.speed_axis])
            critical = analysis.critical_batch(finest) / configuration(finest.knobs).model.seq_len
            ours += f"; speed is level from {self.speed_axis} {level:g} on; critical batch {critical:.3g}"
        return Finding(ours, flat < points[-1][0], found.mean, found.interval, found.p(HIGHER), n)


@dataclass(frozen=True)
class Artefact:
    """A published number that shows under a mistaken measurement and not under an honest one: in every group `by` a
    label the two differ at least twofold. Where they do not, the claim holds or fails as `otherwise` says."""

    mistaken: tuple[Measure, Where]
    honest: tuple[Measure, Where]
    by: str = "variant"
    otherwise: bool = False

    def __call__(self, results: Results, noise: Noise | None) -> Finding:
        mistaken, honest = (
            {name: fmean(values) for name, values in grouped(results.where(where), self.by, measure).items()}
            for measure, where in (self.mistaken, self.honest)
        )
        both = {name: (mistaken[name], honest[name]) for name in mistaken if name in honest}
        if not both:
            raise LookupError("nothing was measured both ways")
        artefact = all(max(a, b) >= 2 * min(a, b) for a, b in both.values())
        ours = ", ".join(f"{name} {a:.3f} (honest {words(loss, b)})" for name, (a, b) in both.items())
        delta = max((b - a for a, b in both.values()), key=abs)
        return Finding(ours, artefact or self.otherwise, delta, seeds=n_seeds(results.outcomes), artefact=artefact)
