"""The report's figures. A plot is named "<x> by <label>": a colour for each value of the label."""

import math
from collections.abc import Callable
from typing import Any

from experiments import analysis
from experiments.analysis import Curve
from experiments.spec import Outcome, Results, shown


def gap(outcome: Outcome, results: Results) -> Curve:
    """Validation loss less that of the first variant with the same other labels, against step."""
    first = results.values("variant")[0]
    base = [o for o in results.outcomes if o.labels == {**outcome.labels, "variant": first} and o is not outcome]
    losses = dict(analysis.evaluations(base[0])) if base else {}
    return [(step, y - losses[step]) for step, y in analysis.evaluations(outcome) if step in losses]


def pareto(outcome: Outcome, results: Results) -> Curve:
    return [(outcome.final["flops_per_token"], outcome.val_loss)]


def layers(outcome: Outcome, results: Results) -> Curve:
    return list(enumerate(analysis.layers(outcome.diag.get("gradient", {}))))


def coherence(outcome: Outcome, results: Results) -> Curve:
    return analysis.series(outcome, "coherence")


# By name: the line of an outcome, its axes' titles and scales.
LINES: dict[str, tuple[Callable[[Outcome, Results], Curve], dict[str, str]]] = {
    "gap": (gap, {"xlabel": "step", "ylabel": "validation loss less that of the first variant"}),
    "pareto": (pareto, {"xlabel": "training FLOPs a token", "ylabel": "validation loss", "xscale": "log"}),
    "layers": (layers, {"xlabel": "block", "ylabel": "norm of the last gradient", "yscale": "log"}),
    "coherence": (coherence, {"xlabel": "step", "ylabel": "cosine with the mean gradient"}),
}


def draw(plot: str, results: Results) -> Any:
    """A figure: of `LINES`, or of the final loss against a label, averaged over seeds. Raises `LookupError` if there is
    nothing to draw."""
    from matplotlib.figure import Figure

    x, _, by = plot.partition(" by ")
    figure = Figure(figsize=(5.8, 3.6), layout="constrained")
    axes = figure.subplots()
    parts = {value: [o for o in results.outcomes if o.labels.get(by) == value] for value in results.values(by)}
    for i, (value, part) in enumerate((parts or {"": results.outcomes}).items()):
        if x in LINES:
            lines = [LINES[x][0](outcome, results) for outcome in part if outcome.status == "finished"]
        else:
            lines = [analysis.curve(Results(part), x, lambda outcome: outcome.val_loss)]
        name = f"{by.rpartition('.')[2]} {shown(value)}"
        for line in filter(None, lines):
            finite = [(at, y) for at, y in line if math.isfinite(y)]
            axes.plot([x for x, _ in finite], [y for _, y in finite], "o-", ms=3, lw=1, color=f"C{i}", label=name)
            name = None  # one entry in the legend
            lost = [at for at, y in line if not math.isfinite(y)]  # crosses along the top
            axes.plot(lost, [0.97] * len(lost), "x", color=f"C{i}", transform=axes.get_xaxis_transform())
    if not any(len(line.get_xdata()) for line in axes.lines):
        raise LookupError("there is nothing to draw")
    axes.set(**LINES[x][1] if x in LINES else {"xlabel": x, "ylabel": "validation loss (cross: lost)"})
    values = results.values(x)
    if values and all(isinstance(value, int | float) for value in values) and max(values) > 10 * min(values) > 0:
        axes.set_xscale("log")
    if by:
        axes.legend(fontsize=6, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
