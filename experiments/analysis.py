"""What results come to: curves and their minima, edges and knees, differences with their confidence. Pure functions.

A curve is points (x, y) sorted by x. A loss is `val_loss`, in nats a token, and infinite for a run that did not finish.
What is asked of results that are not there raises `LookupError`, which makes a claim `not run`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from experiments.spec import Outcome, Results, interval

Curve = Sequence[tuple[float, float]]


def labels(outcomes: Iterable[Outcome]) -> list[str]:
    """Every label that any of them has: the variant, then others in the order in which they come."""
    found = dict.fromkeys(label for outcome in outcomes for label in outcome.labels)
    return sorted(found, key=lambda label: label != "variant")


def groups(results: Results, *apart: str) -> dict[str, list[Outcome]]:
    """Outcomes alike but for their seed and the labels `apart`, by a name of no more labels than tell them apart."""

    def alike(names: Sequence[str]) -> dict[tuple, list[Outcome]]:
        found: dict[tuple, list[Outcome]] = {}
        for outcome in results.outcomes:
            found.setdefault(tuple(outcome.labels.get(name) for name in names), []).append(outcome)
        return found

    names = [name for name in labels(results.outcomes) if name not in ("seed", *apart)]
    for name in reversed(names):
        fewer = [other for other in names if other != name]
        if len(alike(fewer)) == len(alike(names)):
            names = fewer
    told: dict[str, list[Outcome]] = {}
    for values, found in alike(names).items():
        told.setdefault(", ".join(filter(None, map(_told, names, values))) or "all", []).extend(found)
    return told


def _told(name: str, value: Any) -> str:
    """A label in a few letters; nothing where there is none."""
    if value is None:
        return ""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name == "variant" else f"{name.rpartition('.')[2]} {text}"


def loss(outcome: Outcome) -> float:
    """The final validation loss; infinite where it is not finite, so that it can be compared."""
    value = outcome.val_loss
    return value if value is not None and math.isfinite(value) else math.inf


def throughput(outcome: Outcome) -> float:
    """Steady training tokens a second; 0 for a run that did not get to measure it."""
    return outcome.final.get("tok_s_steady") or 0.0


def curve(results: Results, x: str = "lr", *, y: Callable[[Outcome], float] = loss, **labels) -> Curve:
    """The mean of `y` over the seeds of the trials with `labels`, at every value of the label `x`.

    A loss is infinite where any seed did not finish. Raises `LookupError` where there are no such trials."""
    found: dict[float, list[float]] = {}
    for outcome in results.where(**labels):
        if x in outcome.labels:
            found.setdefault(outcome.labels[x], []).append(y(outcome))
    if not found:
        raise LookupError(f"no trials with {labels} and a label {x}")
    return [(at, fmean(values)) for at, values in sorted(found.items())]


def best(points: Curve) -> tuple[float, float]:
    """The point with the lowest y; the first of equals. Its y is infinite where nothing finished."""
    if not points:
        raise LookupError("a curve without points has no best one")
    return min(points, key=lambda point: point[1])


def interior(points: Curve) -> bool:
    """Whether the lowest point is finite and at neither end: whether the grid is wide enough to have found it."""
    x, y = best(points)
    return math.isfinite(y) and points[0][0] < x < points[-1][0]


def edge(points: Curve, worse: float = 1.15) -> float | None:
    """The edge of stability: the smallest x above the best from which on every loss is infinite or more than `worse`
    times the best. None where the largest x still trains; the smallest x where nothing finished.

    15% more loss is outside the flat bottom of a learning-rate curve: it puts the published sweeps of M0 and M1 at
    their 3e-2 and 5e-3. A few hundred steps on bytes end there with the loss of a model of single bytes."""
    x_best, y_best = best(points)
    if math.isinf(y_best):
        return points[0][0]
    found = None
    for x, y in reversed(points):
        if x <= x_best or y <= worse * y_best:
            break
        found = x
    return found


def knee(points: Curve, share: float = 0.9) -> float:
    """Where a curve saturates: the smallest x with `share` of the way from the first y to the y farthest from it, be
    that up (throughput) or down (loss). Points that are not finite are left out; it takes two that are."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        raise LookupError(f"a knee takes two finite points, not {len(points)}")
    first = points[0][1]
    way = share * max(abs(y - first) for _, y in points)
    return next(x for x, y in points if abs(y - first) >= way)


def largest_within(points: Curve, tolerance: float) -> float:
    """The largest x whose loss, and that of every x between it and the best, is at most `tolerance` above the best: the
    largest batch that costs nothing, on a curve at equal tokens."""
    x_best, y_best = best(points)
    found = x_best
    for x, y in points:
        if x > x_best:
            if y > y_best + tolerance:
                break
            found = x
    return found


def difference(a: Sequence[Outcome], b: Sequence[Outcome]) -> tuple[float, float | None]:
    """Mean loss of `a` less that of `b` over the seeds both have, and half the width of its 95% confidence interval,
    which pairs the runs of a seed; None for a single seed. Infinite, without confidence, where one side has a run that
    did not finish. Raises `LookupError` without a common seed, where both sides failed, and where a seed has two runs.
    """
    sides = []
    for side in (a, b):
        losses = {outcome.labels.get("seed", 0): loss(outcome) for outcome in side}
        if len(losses) != len(side):
            raise LookupError(f"{len(side)} runs with {len(losses)} seeds cannot be paired")
        sides.append(losses)
    pairs = [(value, sides[1][seed]) for seed, value in sides[0].items() if seed in sides[1]]
    if not pairs:
        raise LookupError("no seed was run on both sides")
    failed = [any(map(math.isinf, side)) for side in zip(*pairs, strict=True)]
    if all(failed):
        raise LookupError("runs of both sides did not finish")
    if any(failed):
        return (math.inf if failed[0] else -math.inf), None
    return interval([x - y for x, y in pairs])


def evaluations(outcome: Outcome, axis: str = "step") -> Curve:
    """Validation loss against `step`, `tokens`, `seconds` or `flops` (training FLOPs of the model)."""
    unit, scale = ("tokens", outcome.final.get("flops_per_token", math.nan)) if axis == "flops" else (axis, 1)
    return [(row[unit] * scale, row["val_loss"]) for row in outcome.evals if row.get("val_loss") is not None]


def first_below(outcome: Outcome, bound: float, axis: str = "seconds") -> float | None:
    """Where on `axis` the first evaluation below `bound` was; None when none was."""
    return next((x for x, y in evaluations(outcome, axis) if y < bound), None)


def gap_against_step(a: Outcome, b: Outcome) -> list[tuple[int, float]]:
    """Validation loss of `a` less that of `b`, at the steps at which both were evaluated."""
    other = dict(evaluations(b))
    return [(step, value - other[step]) for step, value in evaluations(a) if step in other]


def layers(diag: Mapping[str, float]) -> list[float]:
    """The norm of every block, in order, from its parts' (`blocks.<i>.attention`, `blocks.<i>.feed_forward`)."""
    squares: dict[int, float] = {}
    for group, norm in diag.items():
        if group.startswith("blocks."):
            block = int(group.split(".")[1])
            squares[block] = squares.get(block, 0.0) + (math.inf if norm is None else norm) ** 2
    if not squares:
        raise LookupError("no diagnostics of blocks")
    return [math.sqrt(squares[block]) for block in sorted(squares)]


def spread(diag: Mapping[str, float]) -> float:
    """The largest over the smallest norm of a block, as of `outcome.diag["gradient"]`; infinite where a norm is not
    finite or the smallest is 0."""
    norms = layers(diag)
    return max(norms) / min(norms) if all(map(math.isfinite, norms)) and min(norms) else math.inf


def series(outcome: Outcome, name: str) -> list[tuple[int, float]]:
    """A diagnostic over the run (`noise_scale` or `coherence`) by step; only its last value where no more was kept."""
    rows = outcome.diag.get("series") or [{"step": outcome.final.get("step", 0), **outcome.diag}]
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def critical_batch(outcome: Outcome) -> float:
    """The critical batch in tokens by McCandlish et al. (2018): the median gradient noise scale of a run's later half,
    since it grows while the loss falls. Estimates that are not positive and finite are noise, and left out."""
    points = [(step, value) for step, value in series(outcome, "noise_scale") if 0 < value < math.inf]
    if not points:
        raise LookupError("no gradient noise scale was measured")
    return median(value for step, value in points if step >= points[-1][0] / 2)


def pareto(points: Curve) -> Curve:
    """The points (cost, loss) than which none is both as cheap and better, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if math.isfinite(value) and (not front or value < front[-1][1]):
            front.append((cost, value))
    return front
