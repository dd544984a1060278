"""Numbers of runs and of curves, as pure functions.

A measure takes an outcome and raises `LookupError` where the run did not get to it. A curve is a list of points (x, y)
sorted by x; a loss is in nats per token, and infinite for a run that diverged or became NaN.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

from experiments.spec import Outcome, Results, Where

Curve = Sequence[tuple[float, float]]
Measure = Callable[[Outcome], float]
FAILED = ("nan", "diverged")


# Measures of a run


def loss(outcome: Outcome) -> float:
    """Final validation loss. A run that crashed, was refused or ran out of time or memory tells nothing about it."""
    if outcome.status not in ("finished", *FAILED):
        raise LookupError(f"the run {', '.join(map(str, outcome.labels.values()))} ended as {outcome.status}")
    value = outcome.val_loss
    return value if value is not None and math.isfinite(value) else math.inf


def _final(key: str, outcome: Outcome) -> float:
    if not (value := outcome.final.get(key)):
        raise LookupError(f"no {key}, of a run that ended as {outcome.status}")
    return value


speed = partial(_final, "tok_s_steady")  # training tokens per second, warm-up excluded
wall_speed = partial(_final, "tok_s_wall")
cost = partial(_final, "flops_per_token")
bits_a_byte = partial(_final, "val_bpb")


def memory(outcome: Outcome) -> float:
    """In MiB, at the peak."""
    return _final("memory", outcome) / 2**20


def fits(outcome: Outcome) -> float:
    """1 for a run that finished, 0 for one that ran out of memory."""
    if outcome.status not in ("finished", "oom"):
        raise LookupError(f"ended as {outcome.status}")
    return float(outcome.status == "finished")


def micro_batch_that_fits(outcome: Outcome) -> float:
    return fits(outcome) * outcome.labels["micro_batch"]


def first_loss(outcome: Outcome) -> float:
    """Training loss of the first step, in units of ln V, the loss of a uniform guess."""
    from experiments.run import configuration

    if not outcome.steps:
        raise LookupError(f"ended as {outcome.status} before its first row")
    config = configuration(outcome.knobs)
    return outcome.steps[0]["loss"] / math.log(config.model.vocab_size or config.data.expected_vocab_size)


def last_training_loss(outcome: Outcome) -> float:
    return outcome.steps[-1]["loss"] if outcome.steps and outcome.status == "finished" else loss(outcome)


def time_used(outcome: Outcome) -> float:
    """Seconds of training, as a share of the seconds that the run was given."""
    if math.isinf(loss(outcome)):
        return math.inf
    return max(row["seconds"] for row in (*outcome.steps, *outcome.evals)) / outcome.knobs["seconds"]


def evaluations(outcome: Outcome, axis: str = "step") -> Curve:
    """Validation loss against `step`, `tokens` or `seconds`."""
    return [(row[axis], row["val_loss"]) for row in outcome.evals if row.get("val_loss") is not None]


def seconds_to(bound: float, outcome: Outcome) -> float:
    """Seconds until the first evaluation below `bound`; infinite when none was."""
    return next((x for x, y in evaluations(outcome, "seconds") if y < bound), math.inf)


def late_change(outcome: Outcome) -> float:
    """Validation loss at the end less that halfway: two runs' difference in it is how much their gap grew."""
    points = [] if math.isinf(loss(outcome)) else evaluations(outcome)
    half = next((y for x, y in points if x >= points[-1][0] / 2), None)
    if len(points) < 2 or half is None:
        raise LookupError("it takes two evaluations")
    return points[-1][1] - half


def layers(norms: Mapping[str, float | None]) -> list[float]:
    """The norm of every block, in order, from its parts' (`blocks.<i>.attention`, `blocks.<i>.feed_forward`), or from
    numbers by the block's index."""
    squares: dict[int, float] = {}
    for group, norm in norms.items():
        if group.startswith("blocks.") or group.isdigit():
            block = int(group.removeprefix("blocks.").split(".")[0])
            squares[block] = squares.get(block, 0.0) + (math.inf if norm is None else norm) ** 2
    if not squares:
        raise LookupError("no diagnostics of blocks")
    return [math.sqrt(squares[block]) for block in sorted(squares)]


def gradient_spread(outcome: Outcome) -> float:
    """The largest over the smallest gradient norm of a block; infinite where one is not finite or 0."""
    gradient = outcome.diag.get("gradient", {})
    if not any(norm is not None and math.isfinite(norm) for norm in gradient.values()):
        raise LookupError(f"no finite gradient, of a run that ended as {outcome.status}")
    norms = layers(gradient)
    return max(norms) / min(norms) if all(map(math.isfinite, norms)) and min(norms) else math.inf


def series(outcome: Outcome, name: str) -> list[tuple[int, float]]:
    """A diagnostic over the run (`noise_scale` or `coherence`) by step; only its last value where no more was kept."""
    rows = outcome.diag.get("series") or [{"step": outcome.final.get("step", 0), **outcome.diag}]
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def coherence(index: int, outcome: Outcome) -> float:
    """Cosine of micro-batches' gradients with their mean, at the first (0) or last (-1) diagnosed step."""
    if len(points := series(outcome, "coherence")) < 2:
        raise LookupError("no run measured coherence more than once")
    return points[index][1]


def critical_batch(outcome: Outcome) -> float:
    """The critical batch in tokens (McCandlish et al. 2018): the median gradient noise scale of a run's later half,
    since it grows while the loss falls. Estimates that are not positive and finite are noise, and left out."""
    points = [(step, value) for step, value in series(outcome, "noise_scale") if 0 < value < math.inf]
    if not points:
        raise LookupError("no gradient noise scale was measured")
    return median(value for step, value in points if step >= points[-1][0] / 2)


# Curves


def curve(results: Results, x: str | Measure = "lr", y: Measure = loss, where: Where | None = None) -> Curve:
    """The mean of `y` over seeds, at every value of the label or measure `x`. Raises `LookupError` without trials."""
    found: dict[float, list[float]] = {}
    for outcome in results.where(where or {}):
        at = x(outcome) if callable(x) else outcome.labels.get(x)
        if at is not None:
            found.setdefault(at, []).append(y(outcome))
    if not found:
        raise LookupError(f"no trials with a label {x}")
    return [(at, fmean(values)) for at, values in sorted(found.items())]


def best(points: Curve) -> tuple[float, float]:
    """The point with the lowest y. Raises `LookupError` where none is finite."""
    point = min(points, key=lambda point: point[1], default=(0, math.inf))
    if math.isinf(point[1]):
        raise LookupError("no trial trains")
    return point


def interior(points: Curve) -> bool:
    """Whether the lowest point is at neither end: whether the grid is wide enough to have found it."""
    return points[0][0] < best(points)[0] < points[-1][0]


def edge(points: Curve, worse: float = 1.15) -> float | None:
    """The edge of stability: the smallest x above the best from which on every loss is infinite or more than `worse`
    times the best. None where the largest x still trains; the smallest x where nothing finished.

    15% more loss is outside the flat bottom of a learning-rate curve: it puts the published sweeps of M0 and M1 at
    their 3e-2 and 5e-3. A few hundred steps on bytes end there with the loss of a model of single bytes."""
    x_best, y_best = min(points, key=lambda point: point[1])
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
    found, y_best = best(points)
    for x, y in points:
        if x > found:
            if y > y_best + tolerance:
                break
            found = x
    return found


def pareto(points: Curve) -> Curve:
    """The points (cost, loss) that no other point beats in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for at, value in sorted(points):
        if math.isfinite(value) and (not front or value < front[-1][1]):
            front.append((at, value))
    return front


# Names


def labels(outcomes: Iterable[Outcome]) -> list[str]:
    """Every label that any of them has: the variant, then others in the order in which they come."""
    found = dict.fromkeys(label for outcome in outcomes for label in outcome.labels)
    return sorted(found, key=lambda label: label != "variant")


def groups(results: Results, *apart: str) -> dict[str, list[Outcome]]:
    """Outcomes that differ only in their seed and the labels `apart`, named by the fewest labels that tell groups
    apart."""

    def split(names: Sequence[str]) -> dict[tuple, list[Outcome]]:
        found: dict[tuple, list[Outcome]] = {}
        for outcome in results.outcomes:
            found.setdefault(tuple(outcome.labels.get(name) for name in names), []).append(outcome)
        return found

    def told(name: str, value: Any) -> str:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return "" if value is None else text if name == "variant" else f"{name.rpartition('.')[2]} {text}"

    names = [name for name in labels(results.outcomes) if name not in ("seed", *apart)]
    for name in reversed(names):
        fewer = [other for other in names if other != name]
        if len(split(fewer)) == len(split(names)):
            names = fewer
    named: dict[str, list[Outcome]] = {}
    for values, found in split(names).items():
        named.setdefault(", ".join(filter(None, map(told, names, values))) or "all", []).extend(found)
    return named
