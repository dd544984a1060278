"""The comparisons that claims are judged by, and the statistics that a verdict takes.

A suite declares a judge by its arguments: `versus("none", "rope", HIGHER)` compares two variants. Called with the
suite's results and the noise of seeds, it gives a finding; missing trials raise `LookupError`, and the claim is then
not run. The rules of a verdict:

- Noise is measured at the scale at hand: the standard deviation of runs that differ only in their seed, pooled.
- Two variants are compared seed by seed, with Student's t over the differences; one seed alone, against that noise.
- p-values are corrected over all claims of a report by Holm's method. Above .05 a difference is within noise.
- One seed is at most `seen once`; `reproduced` and `refuted` take two.
- A published loss or speed is compared at the original's size only.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean, variance
from typing import Any, Literal

try:
    from scipy.special import stdtr, stdtrit  # Student's t: its distribution, and the quantiles
except ImportError as missing:
    raise ImportError("reports need scipy and jinja2: pip install -c constraints.txt '.[experiments]'") from missing

from experiments import analysis
from experiments.analysis import FAILED, Measure, curve, loss
from experiments.spec import Finding, Outcome, Results, Where

Verdict = Literal[
    "reproduced", "refuted", "artefact", "seen once", "not seen", "within noise", "tested",
    "not comparable at this scale", "not run",
]  # fmt: skip
Bounds = tuple[float, float]
ALPHA = 0.05
LOWER, HIGHER = (-math.inf, 0.0), (0.0, math.inf)  # where a difference lies for a claim to hold
DIFFERENT = (-math.inf, math.inf)  # anywhere: only that it is no noise


def at_most(bound: float) -> Bounds:
    return -math.inf, bound


def at_least(bound: float) -> Bounds:
    return bound, math.inf


def same(tolerance: float) -> Bounds:
    return -tolerance, tolerance


def inside(value: float, bounds: Bounds) -> bool:
    low, high = bounds
    return (low == -math.inf or low < value) and (high == math.inf or value < high)


# Statistics


@dataclass(frozen=True)
class Noise:
    """The standard deviation of a loss over seeds, pooled over groups of repeated runs, and its degrees of freedom."""

    sd: float
    dof: int

    @classmethod
    def of(cls, groups: Iterable[Iterable[Outcome]]) -> "Noise | None":
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
        return float(stdtrit(self.dof, 0.975) * self.se) if known else None

    def p(self, bounds: Bounds) -> float | None:
        """Two-sided p-value of the side of the nearest bound on which the mean lies. Below .05 the 95% interval is all
        within the bounds, or all outside: a test of a direction, and of equivalence where both bounds are finite."""
        if self.se is None:
            return None
        distance = min(abs(self.mean - bound) for bound in ([*filter(math.isfinite, bounds)] or [0.0]))
        if not self.se or math.isinf(distance):
            return float(distance == 0)
        return float(2 * stdtr(self.dof, -distance / self.se))


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


def verdict(finding: Finding, elsewhere: bool, p: float | None) -> Verdict:
    """The verdict of a finding with a corrected p-value; `elsewhere`: of a number published for another scale."""
    if finding.holds is None:
        return "not run"
    if elsewhere:
        return "not comparable at this scale"
    if finding.artefact:
        return "artefact"
    if p is not None and p > ALPHA:
        return "within noise"
    if finding.seeds < 2 and not finding.counted:
        return "seen once" if finding.holds else "not seen"
    return "reproduced" if finding.holds else "refuted"


def verdicts(findings: Sequence[Finding], elsewhere: Sequence[bool]) -> list[Verdict]:
    """The verdicts of a report's findings, whose p-values are one family, without those of other scales."""
    family = [i for i, finding in enumerate(findings) if finding.p is not None and not elsewhere[i]]
    corrected = dict(zip(family, holm([findings[i].p for i in family]), strict=True))
    return [verdict(finding, elsewhere[i], corrected.get(i)) for i, finding in enumerate(findings)]


# Judges

FORMS: Mapping[Measure, str] = {
    loss: "{:.3f}", analysis.late_change: "{:+.3f}", analysis.bits_a_byte: "{:.3f}",
    analysis.speed: "{:,.0f} tok/s", analysis.wall_speed: "{:,.0f} tok/s", analysis.memory: "{:,.1f} MiB",
    analysis.cost: "{:,.0f} FLOPs a token",
}  # fmt: skip


def judge(function: Callable[..., Finding]) -> Callable[..., partial[Finding]]:
    """A decorator of judges: a call with all arguments but `results` and `noise` returns a function of these two."""
    return partial(partial, function)


def words(measure: str | Measure, value: Any) -> str:
    """A value of a measure, or of a label."""
    if isinstance(measure, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return FORMS.get(measure, "{:.4g}").format(value) if math.isfinite(value) else "no loss"


def n_seeds(outcomes: Iterable[Outcome]) -> int:
    return len({o.labels.get("seed", 0) for o in outcomes})


def grouped(outcomes: Iterable[Outcome], by: str, of: Measure) -> dict[Any, list[float]]:
    """A number of each outcome, in lists by the value of a label."""
    groups: dict[Any, list[float]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.labels.get(by), []).append(of(outcome))
    return groups


def spread(values: Sequence[float]) -> float:
    """By how much the largest exceeds the smallest, as a share."""
    return max(values) / min(values) - 1


@judge
def threshold(
    measure: Measure, bounds: Bounds, results: Results, noise: Noise | None, *,
    where: Where | None = None, over: Callable[[Sequence[float]], float] = fmean, by: str = "", show: str = "{}",
) -> Finding:  # fmt: skip
    """A measure, `over` the trials (mean, min, max, ...), lies within bounds; in each group `by` a label, if given."""
    outcomes = results.where(where)
    if outcomes[0].status == "unsupported":
        return Finding(f"unsupported: {outcomes[0].error.strip()}", None)
    values = {name: over(found) for name, found in grouped(outcomes, by, measure).items()}
    form = "{:.1%}".format if over is spread else partial(words, measure)
    texts = [f"{name} " * bool(by) + show.format(form(v), outcomes[-1].machine) for name, v in values.items()]
    low, high = bounds
    decisive = min(values.values()) if math.isfinite(low) and over is not max else max(values.values())
    delta = decisive - (low if math.isfinite(low) else high)
    holds = low <= decisive <= high
    return Finding(", ".join(texts), holds, delta if math.isfinite(delta) else None, seeds=n_seeds(outcomes))


@judge
def counted(count: Callable[[], float], bounds: Bounds, show: str, results: Results, noise: Noise | None) -> Finding:
    """A number that follows from counts, whatever the outcomes, lies within bounds."""
    results.where()  # raises if nothing was run
    number = count()
    return Finding(show.format(number), inside(number, bounds), counted=True)


def by_seed(results: Results, side: str | Where, measure: Measure, where: Where | None) -> dict[int, float]:
    """A measure of the runs of a variant, or with these labels, by their seed."""
    outcomes = results.where({**(where or {}), **({"variant": side} if isinstance(side, str) else side)})
    values = {o.labels.get("seed", 0): measure(o) for o in outcomes}
    if len(values) != len(outcomes):
        raise LookupError(f"{len(outcomes)} runs with {len(values)} seeds cannot be paired")
    return values


@judge
def versus(
    a: str | Where, b: str | Where, bounds: Bounds, results: Results, noise: Noise | None, *,
    measure: Measure = loss, ratio: bool = False, where: Where | None = None, best_over: str = "",
) -> Finding:  # fmt: skip
    """The measure of `a` less that of `b` (or their `ratio`), by seed, lies within bounds. A side is a variant, or
    labels; `best_over` a label, each side is taken at its own best value of it."""
    sides, texts = [], []
    for side in ({"variant": side} if isinstance(side, str) else side for side in (a, b)):
        at = {}
        if best_over:
            at = {best_over: analysis.best(curve(results, best_over, where={**(where or {}), **side}))[0]}
        sides.append(by_seed(results, {**side, **at}, measure, where))
        texts.append(words(measure, fmean(sides[-1].values())) + "".join(f" at {words(*x)}" for x in at.items()))
    ours = " for ".join(texts)
    if ratio:
        times = fmean(sides[0].values()) / fmean(sides[1].values())
        bound = next(filter(math.isfinite, bounds))
        return Finding(f"{times:.3g} times ({ours})", inside(times, bounds), times - bound, seeds=min(map(len, sides)))
    found = paired(*sides, noise)
    return Finding(ours, inside(found.mean, bounds), found.mean, found.interval, found.p(bounds), found.n)


@judge
def equal(a: str, b: str, results: Results, noise: Noise | None, *, where: Where | None = None) -> Finding:
    """The losses of two variants are equal to the last digit, seed by seed."""
    sides = [by_seed(results, variant, loss, where) for variant in (a, b)]
    difference = paired(*sides, None)
    same_seed = [(sides[0][seed], sides[1][seed]) for seed in sides[0] if seed in sides[1]]
    ours = " and ".join(f"{fmean(side.values()):.6f}" for side in sides)
    return Finding(ours, all(x == y for x, y in same_seed), difference.mean, seeds=difference.n)


@judge
def best(
    axis: str | Measure, expected: Any, results: Results, noise: Noise | None, *,
    where: Where | None = None, over: str = "", rival: Where | None = None,
) -> Finding:  # fmt: skip
    """The lowest loss along an axis is at the value `expected`, `inside` the grid, at its `first` value, or, `over` a
    second axis, at a value that `grows`. It must lead the runner-up by more than noise.

    `rival` labels select the same runs measured in another way: where that alone changes a loss by more than the lead,
    the claim is an artefact of it."""
    n = n_seeds(results.where(where))
    slices = [{**(where or {}), over: value} for value in results.values(over)] if over else [where]
    curves = [curve(results, axis, where=part) for part in slices]
    if any(len(points) < 2 for points in curves):
        raise LookupError("it takes two points to have a best one")
    at = [analysis.best(points)[0] for points in curves]
    leads = [unpaired(sorted(y for _, y in points)[1] - analysis.best(points)[1], n, noise) for points in curves]
    p = max(lead.p(HIGHER) for lead in leads) if noise else None
    if over:
        ours = "best: " + ", ".join(
            f"{words('', x)} at {value}" for x, value in zip(at, results.values(over), strict=True)
        )
        return Finding(ours, at == sorted(at) and at[0] < at[-1], p=p, seeds=n)
    points, x, lead = curves[0], at[0], leads[0]
    holds = {"inside": analysis.interior(points), "first": x == points[0][0]}.get(expected, x == expected)
    ours, artefact = f"{words(loss, analysis.best(points)[1])} at {words(axis, x)}, by {lead.mean:.3f}", False
    if rival:
        fixed, other = dict(points), curve(results, axis, where=rival)
        moved = max((y - fixed[x] for x, y in other if math.isfinite(y)), key=abs, default=0.0)
        artefact, ours = abs(moved) > lead.mean, f"{ours}; how it is measured alone moves a loss by {moved:+.3f}"
    return Finding(ours, holds, lead.mean, lead.interval, p, n, artefact)


@judge
def monotone(
    axis: str | Measure, results: Results, noise: Noise | None, *, measure: Measure = loss, where: Where | None = None
) -> Finding:
    """A measure falls at every step along an axis; a loss, by more than noise."""
    points = [(x, y) for x, y in curve(results, axis, measure, where) if math.isfinite(y)]
    if len(points) < 2:
        raise LookupError("fewer than two points finished")
    n, p = n_seeds(results.where(where)), None
    steps = [unpaired(before - after, n, noise) for (_, before), (_, after) in pairwise(points)]
    wrong = [step for step in steps if step.mean <= 0]
    if measure is loss and noise:
        p = min(1.0, len(steps) * min(s.p(HIGHER) for s in wrong)) if wrong else max(s.p(HIGHER) for s in steps)
    ours = ", ".join(f"{words(measure, y)} at {words(axis, x)}" for x, y in points)
    return Finding(ours, not wrong, points[-1][1] - points[0][1], p=p, seeds=n)


@judge
def edge(
    results: Results, noise: Noise | None, *,
    variant: str = "base", below: str = "", axis: str = "lr", theirs: float | None = None,
) -> Finding:  # fmt: skip
    """Along `axis` the best value is inside the grid, and from some value above it on training fails: the edge of
    stability. `below` a variant, the edge is lower than that variant's."""
    points, n = curve(results, axis, where={"variant": variant}), n_seeds(results.where(variant=variant))
    limit = analysis.edge(points)
    if below:
        other = analysis.edge(curve(results, axis, where={"variant": below}))
        edges = [math.inf if at is None else at for at in (limit, other)]
        ours = f"{variant} fails from {edges[0]:g} on, {below} from {edges[1]:g}"
        return Finding(ours, edges[0] < edges[1], seeds=n)
    x, y = analysis.best(points)
    fails = f"edge of stability at {limit:g}" if limit else "no edge of stability in the grid"
    holds = analysis.interior(points) and limit is not None
    at_size = theirs is not None and results.outcomes[0].scale == "full"
    return Finding(f"{words(loss, y)} at {x:g}; {fails}", holds, y - theirs if at_size else None, seeds=n)


@judge
def statuses(a: str, b: str, results: Results, noise: Noise | None, *, axis: str = "lr") -> Finding:
    """At some value of the axis `a` diverges or becomes NaN where `b` trains, and never the other way round."""
    ends: list[dict[float, str]] = [{}, {}]
    for variant, found in zip((a, b), ends, strict=True):  # a failure, where one of several seeds failed
        for o in sorted(results.where(variant=variant), key=lambda o: (o.labels[axis], loss(o) < math.inf)):
            found.setdefault(o.labels[axis], o.status if o.status in FAILED else words(loss, loss(o)))
    failed = [{x: end in FAILED for x, end in found.items()} for found in ends]
    apart = {x: fails for x, fails in failed[0].items() if failed[1].get(x, fails) != fails}
    ours = ", ".join(f"{end} at {x:g}" for x, end in ends[0].items())
    ours += "".join(f"; {b} {'trains' if fails else 'fails'} at {x:g}" for x, fails in apart.items())
    return Finding(ours, bool(apart) and all(apart.values()), seeds=n_seeds(results.where(variant=a)))


@judge
def saturates(
    axis: str, results: Results, noise: Noise | None, *,
    where: Where | None = None, speed_axis: str = "", tolerance: float = 0.02,
) -> Finding:  # fmt: skip
    """The loss at equal tokens is flat up to some batch, and rises above it. `speed_axis` a label, with the value from
    which speed no longer grows, and the critical batch."""
    points, n = curve(results, axis, where=where), n_seeds(results.where(where))
    if len(points) < 3:
        raise LookupError("a saturation takes three points")
    (x, y), flat = analysis.best(points), analysis.largest_within(points, tolerance)
    (last, highest), found = points[-1], unpaired(points[-1][1] - y, n, noise)
    ours = f"{words(loss, y)} at {x:g}, within {tolerance:g} up to {flat:g}, {words(loss, highest)} at {last:g}"
    if speed_axis:
        middle = max(results.values(axis), key=lambda value: len(results.where({axis: value})))
        level = analysis.knee(curve(results, speed_axis, analysis.speed, {axis: middle}))
        finest = min(results.where({axis: middle}), key=lambda o: o.labels[speed_axis])
        critical = analysis.critical_batch(finest) / finest.knobs["model.seq_len"]
        ours += f"; speed is level from {speed_axis} {level:g} on; critical batch {critical:.3g}"
    return Finding(ours, flat < last, found.mean, found.interval, found.p(HIGHER), n)


@judge
def artefact(
    mistaken: tuple[Measure, Where], honest: tuple[Measure, Where], results: Results, noise: Noise | None, *,
    by: str = "variant", otherwise: bool = False,
) -> Finding:  # fmt: skip
    """A published number that shows under a mistaken measurement and not under an honest one: in every group `by` a
    label the two differ at least twofold. Where they do not, the claim holds or fails as `otherwise` says."""
    found, fair = (grouped(results.where(where), by, measure) for measure, where in (mistaken, honest))
    both = {name: (fmean(values), fmean(fair[name])) for name, values in found.items() if name in fair}
    if not both:
        raise LookupError("nothing was measured both ways")
    shows = all(max(pair) >= 2 * min(pair) for pair in both.values())
    ours = ", ".join(f"{name} {a:.3f} (honest {words(loss, b)})" for name, (a, b) in both.items())
    delta = max((b - a for a, b in both.values()), key=abs)
    return Finding(ours, shows or otherwise, delta, seeds=n_seeds(results.outcomes), artefact=shows)
