"""The report's figures. Each takes results and returns a figure; with nothing to draw it raises `LookupError`."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from statistics import median
from typing import Any

from experiments import analysis, memory
from experiments.analysis import Curve, Measure
from experiments.spec import Outcome, Results

Tracks = Mapping[str, list[Curve]]  # by name, lines of one colour


def loss(outcome: Outcome) -> float:
    """Final loss; infinite, and a cross in a figure, for a run that did not finish."""
    value = outcome.val_loss
    return value if value is not None and math.isfinite(value) else math.inf


def speed(outcome: Outcome) -> float:
    return outcome.final.get("tok_s_steady") or math.nan


def panels(n: int):
    """A figure of `n` panels in a row, with room for a legend, and the panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * n + 1.6, 3.6), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def coloured(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name: distinct ones, or, of more than ten, a scale in their order."""
    from matplotlib import colormaps

    names = list(names)
    if len(names) <= 10:
        return dict(zip(names, colormaps["tab10"].colors, strict=False))
    return {name: colormaps["viridis"](i / (len(names) - 1)) for i, name in enumerate(names)}


def draw(panel, tracks: Tracks, most: int = 20, legend: bool = True, **style) -> None:
    """Lines, with crosses along the top for points that are not finite. A legend beside the panel has every second,
    third, ... name where there are too many."""
    colours = coloured(tracks)
    shown = list(tracks)[:: math.ceil(len(tracks) / most) or 1] if len(tracks) > 1 else []
    for name, many in tracks.items():
        for i, points in enumerate(many):
            finite = [(x, y) for x, y in points if math.isfinite(y)]
            label = name if i == 0 and finite else None
            panel.plot([x for x, _ in finite], [y for _, y in finite], color=colours[name], label=label, **style)
            if lost := [x for x, y in points if not math.isfinite(y)]:
                across = panel.get_xaxis_transform()
                panel.plot(lost, [0.97] * len(lost), "x", color=colours[name], transform=across)
    handles = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if legend and (chosen := [name for name in shown if name in handles]):
        panel.legend([handles[name] for name in chosen], chosen, fontsize=6, frameon=False, loc="upper left",
                     bbox_to_anchor=(1, 1))  # fmt: skip


def curves(results: Results):
    """Loss on steps and on seconds, a line a trial: of validation if it was evaluated on the way, else of training."""

    def losses(outcome: Outcome, x: str) -> Curve:
        rows, key = (outcome.evals, "val_loss") if len(outcome.evals) > 1 else (outcome.steps, "loss")
        return [(row[x], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]

    figure, axes = panels(2)
    for panel, x in zip(axes, ("step", "seconds"), strict=True):
        tracks = {
            name: [points for o in part if (points := losses(o, x))] for name, part in analysis.groups(results).items()
        }
        starts = [points[0][1] for many in tracks.values() for points in many]
        if not starts:
            raise LookupError("no losses were kept")
        draw(panel, tracks, legend=panel is axes[-1], linewidth=1)
        top = min(panel.get_ylim()[1], 1.15 * max(starts))  # a run that explodes would flatten all others
        panel.set(xlabel=x, ylabel="loss, nats per token", ylim=(None, top))
    return figure


def against(panel, results: Results, x: str, y: Measure, label: str, legend: bool = True) -> dict[str, Curve]:
    """`y` against a label, a line for each group of trials that differ in nothing else, and a point where a group has
    only one. Returns the lines. Raises `LookupError` where the label does not vary."""
    known = Results([o for o in results.outcomes if x in o.labels and y(o) == y(o)])
    if len(xs := sorted(known.values(x))) < 2:
        raise LookupError(f"no trials with several values of {x}")
    found = {name: analysis.curve(Results(part), x, y) for name, part in analysis.groups(known, x).items()}
    single = sorted(point for points in found.values() if len(points) == 1 for point in points)
    lines = {name: points for name, points in found.items() if len(points) > 1}
    draw(panel, {name: [points] for name, points in lines.items()}, legend=legend, marker="o", markersize=3)
    if single:
        panel.plot(*zip(*single, strict=True), "o", color="gray", markersize=3, label="other")
    if xs[0] > 0 and xs[-1] > 10 * xs[0]:
        panel.set_xscale("log")
        if len(xs) <= 12:
            panel.set_xticks(xs, [f"{value:g}" for value in xs], fontsize=7)
            panel.minorticks_off()
    panel.set_xlabel(label)
    return lines


def lr(results: Results):
    """Final loss against learning rate, with the best (star), the edge of stability (dotted), lost runs (crosses)."""
    figure, (panel,) = panels(1)
    label = "learning rate (star: best, dotted: edge, cross: lost)"
    found = against(panel, results, "lr", loss, label)
    for points, colour in zip(found.values(), coloured(found).values(), strict=True):
        with suppress(LookupError):
            panel.plot(*analysis.best(points), "*", markersize=11, color=colour)
        if (edge := analysis.edge(points)) is not None:
            panel.axvline(edge, linestyle=":", color=colour)
    panel.set_ylabel("validation loss")
    return figure


def batch(results: Results):
    """Loss against the batch, with the median gradient noise scale in sequences; speed, with its knee, against the
    micro-batch, or the batch where no micro-batch varies."""
    varied = [label for label in ("batch_size", "micro_batch") if len(results.values(label)) > 1]
    if not varied:
        raise LookupError("no trials with several batches")
    figure, axes = panels(2)
    against(axes[0], results, varied[0], loss, f"{varied[0]}, sequences", legend=False)
    with suppress(LookupError):
        found = against(axes[1], results, varied[-1], speed, f"{varied[-1]}, sequences")
        for points, colour in zip(found.values(), coloured(found).values(), strict=True):
            axes[1].axvline(analysis.knee(points), linestyle=":", color=colour)
    scales = []
    for o in results.outcomes:
        if o.status == "finished":
            with suppress(LookupError):
                scales.append(analysis.critical_batch(o) * o.final["step"] * o.knobs["batch_size"] / o.final["tokens"])
    if scales:
        axes[0].axvline(median(scales), linestyle="--", color="gray")
    axes[0].set_ylabel("validation loss (dashed: noise scale)")
    axes[1].set_ylabel("tok/s (dotted: knee)")
    return figure


def pareto(results: Results):
    """Final loss against its cost, in seconds, training FLOPs and FLOPs per token; and the front."""
    costs: dict[str, Callable[[Outcome], float]] = {
        "seconds": lambda o: o.final.get("seconds", o.seconds),
        "training FLOPs": lambda o: o.final["flops_per_token"] * o.final["tokens"],
        "training FLOPs a token": lambda o: o.final["flops_per_token"],
    }
    groups = analysis.groups(Results([outcome for outcome in results.outcomes if loss(outcome) < math.inf]))
    if not groups:
        raise LookupError("no trial finished")
    figure, axes = panels(len(costs))
    for panel, (title, cost) in zip(axes, costs.items(), strict=True):
        tracks = {name: [[(cost(o), loss(o)) for o in part]] for name, part in groups.items()}
        draw(panel, tracks, legend=panel is axes[-1], marker="o", markersize=4, linestyle="")
        front = analysis.pareto([point for (points,) in tracks.values() for point in points])
        panel.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, zorder=0)
        panel.set(xlabel=title, ylabel="validation loss")
    return figure


def frontier(results: Results):
    """Memory, measured (points) and predicted (lines), against the micro-batch, a colour for each configuration."""
    found = {str(name): memory.points(results, name) for name in results.values("configuration")}
    if not any(found.values()):
        raise LookupError("no memory was measured")
    figure, (panel,) = panels(1)
    for i, style in ((1, {"marker": "o", "linestyle": ""}), (2, {"linestyle": "-", "linewidth": 1})):
        tracks = {n: [[(p[0], p[i] / 2**20) for p in points if p[i] is not None]] for n, points in found.items()}
        draw(panel, tracks, **style)
    panel.set(xlabel="micro-batch, sequences", ylabel="MiB (points: measured; lines: predicted)")
    return figure


def gap(results: Results):
    """Validation loss less that of the first variant with the same other labels, against step."""
    variants = results.values("variant")
    gaps: dict[str, list[Curve]] = {}
    for outcome in results.outcomes:
        base = [o for o in results.outcomes if o.labels == {**outcome.labels, "variant": variants[0]}]
        if outcome.labels.get("variant") in variants[1:] and len(base) == 1:
            first = dict(analysis.evaluations(base[0]))
            points = [(step, y - first[step]) for step, y in analysis.evaluations(outcome) if step in first]
            gaps.setdefault(outcome.labels["variant"], []).extend([points] if points else [])
    if not any(gaps.values()):
        raise LookupError("no variant was evaluated where the first was")
    figure, (panel,) = panels(1)
    draw(panel, gaps, linewidth=1)
    panel.axhline(0, color="gray", linewidth=0.8)
    panel.set(xlabel="step", ylabel=f"validation loss less that of {variants[0]}")
    return figure


def layers(results: Results):
    """Norms of the last gradients and sizes of the last activations by block, a line for each group."""
    kinds = {"gradient": "norm of the gradient", "activation": "rms of the activations"}
    last = {name: outcomes[0].diag for name, outcomes in analysis.groups(results).items()}
    kinds = {kind: title for kind, title in kinds.items() if any(diag.get(kind) for diag in last.values())}
    if not kinds:
        raise LookupError("no diagnostics of layers")
    figure, axes = panels(len(kinds))
    for panel, (kind, title) in zip(axes, kinds.items(), strict=True):
        tracks = {name: [list(enumerate(analysis.layers(diag[kind])))] for name, diag in last.items() if diag.get(kind)}
        draw(panel, tracks, legend=panel is axes[-1], linewidth=1)
        panel.set(xlabel="block", ylabel=title, yscale="log")
    return figure


def coherence(results: Results):
    """Agreement of the micro-batches' gradients, and the gradient noise scale, over training."""
    kinds = {"coherence": "cosine with the mean gradient", "noise_scale": "gradient noise scale, tokens"}
    groups = analysis.groups(results)
    tracks = {
        kind: {name: [points for o in part if (points := analysis.series(o, kind))] for name, part in groups.items()}
        for kind in kinds
    }
    if not any(points for found in tracks.values() for points in found.values()):
        raise LookupError("no gradients of micro-batches were compared")
    figure, axes = panels(len(kinds))
    for panel, (kind, title) in zip(axes, kinds.items(), strict=True):
        draw(panel, tracks[kind], legend=panel is axes[-1], marker=".", linewidth=1)
        panel.set(xlabel="step", ylabel=title)
    return figure


PLOTS: dict[str, Callable[[Results], Any]] = {
    f.__name__: f for f in (curves, lr, batch, layers, frontier, pareto, gap, coherence)
}
