"""Measures of runs, and of curves over several runs: pure functions.

A measure takes an outcome and raises `LookupError` where the run did not get to it. A curve is a list of points (x, y)
sorted by x; a loss is in nats per token, and infinite for a run that diverged or became NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, median

from experiments.spec import Outcome, Results, Where

Curve = Sequence[tuple[float, float]]
Measure = Callable[[Outcome], float]
FAILED = ("nan", "diverged")


# Measures of a run


def loss(outcome: Outcome) -> float:
    """Final validation loss. A run that crashed, was refused or ran out of time or memory tells nothing about it."""
    if outcome.status not in ("finished", *FAILED):
        raise LookupError(f"the run {', '.join(map(str, outcome.labels.values()))} ended as {outcome.status}")
    return outcome.val_loss


def _final(key: str, outcome: Outcome) -> float:
    if not (value := outcome.final.get(key)):
        raise LookupError(f"no {key}, of a run that ended as {outcome.status}")
    return value


def speed(outcome: Outcome) -> float:
    """Training tokens per second, warm-up excluded. A run that simulates its precision tells nothing about it."""
    if outcome.final.get("simulated"):
        raise LookupError(f"{outcome.labels.get('variant', 'its precision')} is simulated here, so it has no speed")
    return _final("tok_s_steady", outcome)


wall_speed = partial(_final, "tok_s_wall")
cost = partial(_final, "flops_per_token")
bits_a_byte = partial(_final, "val_bpb")


def memory(outcome: Outcome) -> float:
    """In MiB, at the peak."""
    return _final("memory", outcome) / 2**20


def batch_that_fits(outcome: Outcome) -> float:
    """The batch of a run that finished; 0 of one that ran out of memory."""
    if outcome.status not in ("finished", "oom"):
        raise LookupError(f"ended as {outcome.status}")
    return outcome.labels["batch_size"] if outcome.status == "finished" else 0.0


def time_used(outcome: Outcome) -> float:
    """Seconds of training, as a share of the seconds that the run was given."""
    if math.isinf(loss(outcome)):
        return math.inf
    return max(row["seconds"] for row in (*outcome.steps, *outcome.evals)) / outcome.knobs["seconds"]


def evaluations(outcome: Outcome, axis: str = "step") -> Curve:
    """Validation loss against `step` or `seconds`."""
    return [(row[axis], row["val_loss"]) for row in outcome.evals if row.get("val_loss") is not None]


def seconds_to(bound: float, outcome: Outcome) -> float:
    """Seconds until the first evaluation below `bound`; infinite when none was."""
    return next((x for x, y in evaluations(outcome, "seconds") if y < bound), math.inf)


def late_change(outcome: Outcome) -> float:
    """Validation loss at the end less that halfway: two runs' difference in it is how much their gap grew."""
    points = [] if math.isinf(loss(outcome)) else evaluations(outcome)
    if len(points) < 2:
        raise LookupError("it takes two evaluations")
    return points[-1][1] - next(y for x, y in points if x >= points[-1][0] / 2)


def layers(norms: Mapping[str, float | None]) -> list[float]:
    """The norm of every block, in order, from those of its parts: `blocks.<i>.attention`, `blocks.<i>.feed_forward`."""
    squares: dict[int, float] = {}
    for part, norm in norms.items():
        if part.startswith("blocks."):
            block = int(part.split(".")[1])
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
    """A diagnostic over the run, `noise_scale` or `coherence`, by step."""
    return [(row["step"], row[name]) for row in outcome.diag.get("series", []) if row.get(name) is not None]


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
    for outcome in results.where(where):
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
    """Where a curve of speeds saturates: the smallest x with `share` of the way from the first y to the highest."""
    first, highest = points[0][1], max(y for _, y in points)
    return next(x for x, y in points if y - first >= share * (highest - first))


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
