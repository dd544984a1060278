"""What a suite is: trials, declared as a base, variants and a grid, and claims that are judged on their outcomes.

A suite is data. The runner turns it into trials, each a run of train.py with its own knobs; the ledger keeps their
outcomes; the report judges the claims on the ledger alone.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["tiny", "low", "full", "own"]  # own: a user's sweep, declared by flags
Axis = Literal["tokens", "flops"]
Knobs = Mapping[str, Any]  # dotted keys of train.py's knobs
Where = Mapping[str, Any]  # labels that an outcome must have; a function takes the outcome and says whether it does
LAST = object()  # as a value in a `Where`: the last one declared, which depends on the scale


@dataclass(frozen=True)
class Outcome:
    """A line of the ledger: how a trial ended. `status` is the run's own, or `oom` where the system killed it.

    `knobs` are those that the suite's base does not have; `digest` is that of the corpus. `final` is the run's
    status.json; `steps` has the first and last row of training, `evals` the evaluations, `diag` the last gradient norms
    and the noise scale over training.
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
    recipe: int = 1
    digest: str = ""

    @property
    def val_loss(self) -> float:
        """Final validation loss in nats per token; infinite for a run that did not finish."""
        value = self.final.get("val_loss") if self.status == "finished" else None
        return value if value is not None and math.isfinite(value) else math.inf


class Results:
    """The outcomes of a suite at a scale, selected by their labels."""

    def __init__(self, outcomes: Sequence[Outcome]):
        self.outcomes = list(outcomes)

    def where(self, labels: Where | None = None, /, **more: Any) -> list[Outcome]:
        """The outcomes with all of these labels. Raises `LookupError` if there are none."""
        labels = {**(labels or {}), **more}
        labels = {name: self.values(name)[-1:] if value is LAST else value for name, value in labels.items()}

        def has(outcome: Outcome, name: str, value: Any) -> bool:
            if callable(value):
                return value(outcome)
            return outcome.labels.get(name) in (value if isinstance(value, list) else [value])

        found = [o for o in self.outcomes if all(has(o, *item) for item in labels.items())]
        if not found:
            raise LookupError(f"no trials with {', '.join(f'{k}={v}' for k, v in labels.items() if not callable(v))}")
        return found

    def values(self, label: str) -> list[Any]:
        """The values of a label, in the order in which they were declared."""
        return list(dict.fromkeys(o.labels[label] for o in self.outcomes if label in o.labels))


@dataclass(frozen=True)
class Finding:
    """What a judge found: `ours` in words, and whether the claim `holds`.

    `difference` is what was compared, `interval` half the width of its 95% confidence interval, `p` the probability of
    a difference this large by the noise of seeds alone (None: the claim compares no means). `seeds` is the number of
    runs of each trial; an `artefact` explains the claim away; what is `counted` is the same for all seeds.
    """

    ours: str
    holds: bool | None
    difference: float | None = None
    interval: float | None = None
    p: float | None = None
    seeds: int = 1
    artefact: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Claim:
    """A line of the report: `row` of the published experiments, what was `claimed` and by what number, how it is
    judged, and the unit test that checks it too, if any. A judge raises `LookupError` if a trial is missing. A
    `published` number is compared at the original's size only."""

    row: int
    claimed: str
    theirs: str
    judge: Callable[..., Finding] | None = None  # (results, noise); None: only the test
    test: str = ""
    published: bool = False


@dataclass(frozen=True)
class Suite:
    """Trials: each of `variants` (label to knobs) at every point of `grid` (knob to values), `seeds` times.

    `base` has the knobs for each scale; `grids` replaces parts of the grid at a scale. Names in the grid that begin
    with @ are labels and no knobs; `@ranks` starts trials on as many ranks. On an `axis` all trials have the
    tokens, or the training FLOPs, of the first variant. Suites of one `preset` share their measured noise. `plots`
    names figures of the report. Trials that are `alone` share a GPU with no others, because they measure its speed or
    memory. `cap` limits the memory of a trial's process on a CPU, in bytes.
    """

    name: str
    title: str
    base: Mapping[Scale, Knobs]
    claims: tuple[Claim, ...]
    variants: Mapping[str, Knobs] = field(default_factory=lambda: {"base": {}})
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    grids: Mapping[Scale, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    seeds: Mapping[Scale, int] = field(default_factory=dict)  # 1 for a scale that it lacks
    axis: Axis | None = None
    preset: str = ""
    plots: tuple[str, ...] = ()
    alone: bool = False
    cap: Mapping[Scale, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        return sorted({claim.row for claim in self.claims})

    def points(self, scale: Scale) -> list[dict[str, Any]]:
        """The points of the grid at a scale. A name "a,b" joins knobs that change together; its values are tuples."""
        grid = {**self.grid, **self.grids.get(scale, {})}
        axes = [
            [dict(zip(names.split(","), value if "," in names else (value,), strict=True)) for value in values]
            for names, values in grid.items()
        ]
        return [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)]

    def size(self, scale: Scale) -> int:
        """The number of trials at a scale."""
        return len(self.variants) * len(self.points(scale)) * self.seeds.get(scale, 1)


@dataclass(frozen=True)
class Trial:
    """One run: its knobs, and the `labels` (variant, grid coordinates, seed) by which the report refers to it."""

    suite: Suite
    scale: Scale
    labels: Mapping[str, Any]
    knobs: Knobs

    @property
    def cap(self) -> int | None:
        return self.suite.cap.get(self.scale)

    @property
    def ranks(self) -> int:
        return self.labels.get("ranks", 1)

    @property
    def key(self) -> str:
        """A hash of the suite, the scale, the knobs and the ranks."""
        identity = [self.suite.name, self.scale, dict(self.knobs), *([self.cap] if self.cap else [])]
        identity += [{"ranks": self.ranks}] if self.ranks > 1 else []
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def changes(self) -> Knobs:
        """The knobs that the suite's base does not have."""
        base = self.suite.base[self.scale]
        return {knob: value for knob, value in self.knobs.items() if knob not in base or base[knob] != value}

    def __str__(self) -> str:
        return " ".join([self.suite.name, *(f"{label}={shown(value)}" for label, value in self.labels.items())])


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
