"""What a suite is: its trials, declared as a base, alternatives and a grid; and what its claims are judged on.

A suite is data. The runner turns it into trials, each a run of train.py with knobs of its own, and the ledger holds
what came of them; the report judges the claims on the ledger alone.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, Literal

Scale = Literal["tiny", "low", "full"]
Axis = Literal["steps", "tokens", "seconds", "flops"]
Rule = Literal["fixed", "sqrt", "linear"]
Verdict = Literal["reproduced", "refuted", "artefact", "not comparable at this scale", "not run"]
Knobs = Mapping[str, Any]  # dotted keys of train.py's knobs


@dataclass(frozen=True)
class Trial:
    """One run: its knobs, and by which `labels` (variant, coordinates of the grid, seed) the report knows it."""

    suite: str
    scale: Scale
    labels: Mapping[str, Any]
    knobs: Knobs

    @property
    def key(self) -> str:
        """Equal for equal knobs, whatever their order."""
        text = json.dumps([self.suite, self.scale, dict(self.knobs)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """A line of the ledger: what came of a trial. `status` is one of runtime.run's, or `oom` where the system killed it.

    `final` is the run's status.json; `steps` and `evals` are thinned rows of its metrics, `diag` its last diagnostics.
    """

    key: str
    suite: str
    scale: Scale
    labels: Mapping[str, Any]
    knobs: Knobs
    status: str
    seconds: float
    started: str
    commit: str
    machine: str
    error: str = ""
    final: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    evals: Sequence[Mapping[str, Any]] = ()
    diag: Mapping[str, Any] = field(default_factory=dict)

    @property
    def val_loss(self) -> float:
        """Nats a token on the evaluation set at the end; infinite for a run that did not get there."""
        return self.final.get("val_loss", float("inf")) if self.status == "finished" else float("inf")


@dataclass(frozen=True)
class Finding:
    """What a claim comes to: `ours` in words, the `difference` from theirs or between variants, and half the width of
    its 95% confidence interval over seeds, where there are two or more."""

    ours: str
    verdict: Verdict
    difference: float | None = None
    confidence: float | None = None


class Results:
    """The latest outcomes of a suite at a scale, by their labels."""

    def __init__(self, outcomes: Sequence[Outcome]):
        self.outcomes = list(outcomes)

    def where(self, **labels: Any) -> list[Outcome]:
        """Those with all of these labels."""
        return [o for o in self.outcomes if all(o.labels.get(k) == v for k, v in labels.items())]

    def one(self, **labels: Any) -> Outcome:
        """The only one with these labels, of several seeds the first. Raises `LookupError` when there are none, or
        several otherwise."""
        found = self.where(**labels)
        if len({json.dumps({**o.labels, "seed": 0}, sort_keys=True) for o in found}) == 1:
            found = [min(found, key=lambda outcome: outcome.labels.get("seed", 0))]
        if len(found) != 1:
            raise LookupError(f"{len(found)} trials have {labels}")
        return found[0]

    def values(self, label: str) -> list[Any]:
        """The values of a label, in the order in which they were declared."""
        return list(dict.fromkeys(o.labels[label] for o in self.outcomes if label in o.labels))


def interval(samples: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% confidence interval by Student's t; None for a single sample."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}
    n = len(samples)
    return mean(samples), t.get(n, 2.26) * stdev(samples) / n**0.5 if n > 1 else None


@dataclass(frozen=True)
class Claim:
    """A line of the report: what was `claimed`, by `theirs`, and how our results are judged.

    `judge` may raise LookupError where a trial that it needs is not there: the line is then `not run`."""

    row: int
    claimed: str
    theirs: str
    judge: Callable[[Results], Finding]


@dataclass(frozen=True)
class Suite:
    """Trials: each of `variants` (a label to knobs), at every point of `grid` (a knob to its values), `seeds` times.

    `base` gives knobs for each scale that the suite can run at, and `grids` other values of the grid for a scale. The
    learning rates of trials with another batch than the base's follow `rule`. `axis` is what all trials have equal: the
    base's budget, in its own unit or as the tokens, or FLOPs, that it comes to for the first variant. `plots` names
    figures of the report (experiments/report.py). Variants that are `matched` have as many parameters, within 3%, or
    the runner starts none of them.
    """

    name: str
    title: str
    rows: tuple[int, ...]
    base: Mapping[Scale, Knobs]
    claims: tuple[Claim, ...]
    variants: Mapping[str, Knobs] = field(default_factory=lambda: {"base": {}})
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    grids: Mapping[Scale, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    seeds: Mapping[Scale, int] = field(default_factory=lambda: {"tiny": 1, "low": 1, "full": 1})
    rule: Rule = "fixed"
    axis: Axis | None = None
    matched: bool = False
    plots: tuple[str, ...] = ("curves",)

    def points(self, scale: Scale) -> list[dict[str, Any]]:
        """The points of the grid at a scale. A name "a,b" joins knobs that change together; its values are tuples."""
        grid = {**self.grid, **self.grids.get(scale, {})}
        axes = [
            [dict(zip(names.split(","), value if "," in names else (value,), strict=True)) for value in values]
            for names, values in grid.items()
        ]
        return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]
