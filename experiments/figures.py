"""The report's figures. Each takes results and returns a figure; with nothing to draw it raises `LookupError`."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from statistics import median
from typing import Any

from experiments import analysis, memory
from experiments.spec import Outcome, Results

Points = list[tuple[float, float]]


def loss(outcome: Outcome) -> float:
    """Final loss; infinite, and a cross in a figure, for a run that did not finish."""
    value = outcome.val_loss
    return value if value is not None and math.isfinite(value) else math.inf


def speed(outcome: Outcome) -> float:
    return outcome.final.get("tok_s_steady") or math.nan


def panels(n: int, legend: bool = True):
    """A figure of `n` panels in a row, and the panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * n + (1.6 if legend else 0), 3.6), layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False)[0]


def coloured(names: Iterable[str]) -> dict[str, Any]:
    """A colour for each name: distinct ones, or, of more than ten, a scale in their order."""
    from matplotlib import colormaps

    names = list(names)
    if len(names) <= 10:
        return dict(zip(names, colormaps["tab10"].colors, strict=False))
    return {name: colormaps["viridis"](i / (len(names) - 1)) for i, name in enumerate(names)}


def legend(figure, axes, most: int = 20) -> None:
    """A legend beside the panels, of every second, third, ... line where there are too many."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(handles) > 1:
        chosen = list(handles)[:: math.ceil(len(handles) / most)]
        figure.legend([handles[name] for name in chosen], chosen, loc="outside right upper", fontsize=7, frameon=False)


def log_where_wide(axes, xs: Iterable[float], most: int = 12) -> None:
    """A logarithmic axis for values that span more than a decade; ticks at the values where they are few."""
    xs = sorted(set(xs))
    if len(xs) > 1 and xs[0] > 0 and xs[-1] > 10 * xs[0]:
        axes.set_xscale("log")
        if len(xs) <= most:
            axes.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=7)
            axes.minorticks_off()


def line(axes, points: analysis.Curve, **style) -> None:
    """A curve, with crosses along the top for points that are not finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    lost = [x for x, y in points if not math.isfinite(y)]
    axes.plot(*(zip(*finite, strict=True) if finite else ([], [])), **style)
    style = {"color": style.get("color"), "marker": "x", "linestyle": ""}
    axes.plot(lost, [0.97] * len(lost), transform=axes.get_xaxis_transform(), **style)


def curves(results: Results):
    """Loss on steps and on seconds, a line a trial: of validation if it was evaluated on the way, else of training."""

    def losses(outcome: Outcome) -> list[tuple[int, float, float]]:
        rows, key = (outcome.evals, "val_loss") if len(outcome.evals) > 1 else (outcome.steps, "loss")
        return [(row["step"], row["seconds"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]

    found = {name: list(filter(None, map(losses, outcomes))) for name, outcomes in analysis.groups(results).items()}
    starts = [rows[0][2] for tracks in found.values() for rows in tracks]
    if not starts:
        raise LookupError("no losses were kept")
    figure, axes = panels(2)
    colours = coloured(found)
    for i, (panel, x) in enumerate(zip(axes, ("step", "seconds"), strict=True)):
        for name, tracks in found.items():
            for rows in tracks:
                panel.plot([r[i] for r in rows], [r[2] for r in rows], color=colours[name], label=name, linewidth=1)
        top = min(panel.get_ylim()[1], 1.15 * max(starts))  # a run that explodes would flatten all others
        panel.set(xlabel=x, ylabel="loss, nats per token", ylim=(None, top))
    legend(figure, axes[0])
    return figure


def lr(results: Results):
    """Final loss against learning rate, with the best (star), the edge of stability (dotted), lost runs (crosses)."""
    swept = Results([outcome for outcome in results.outcomes if "lr" in outcome.labels])
    if len(swept.values("lr")) < 2:
        raise LookupError("no trials with several learning rates")
    found = {name: analysis.curve(Results(part), "lr", loss) for name, part in analysis.groups(swept, "lr").items()}
    figure, (axes,) = panels(1)
    colours = coloured(found)
    for name, points in found.items():
        line(axes, points, color=colours[name], marker="o", markersize=3, label=name)
        with suppress(LookupError):
            axes.plot(*analysis.best(points), "*", markersize=11, color=colours[name])
        if (edge := analysis.edge(points)) is not None:
            axes.axvline(edge, linestyle=":", color=colours[name])
    log_where_wide(axes, [x for points in found.values() for x, _ in points])
    axes.set(xlabel="learning rate (star: best, dotted: edge, cross: lost)", ylabel="validation loss")
    legend(figure, axes)
    return figure


def batch(results: Results):
    """Loss against the batch, with the median gradient noise scale in sequences; speed, with its knee, against the
    micro-batch, or the batch where no micro-batch varies."""
    varied = [label for label in ("batch_size", "micro_batch") if len(results.values(label)) > 1]
    if not varied:
        raise LookupError("no trials with several batches")
    figure, axes = panels(2, legend=False)
    for panel, x, y in zip(axes, (varied[0], varied[-1]), (loss, speed), strict=True):
        swept(panel, results, x, y)
        panel.set_xlabel(f"{x}, sequences")
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


def swept(axes, results: Results, x: str, y: Callable[[Outcome], float]) -> None:
    """`y` against the label `x`, a line for each group; groups of one point are points."""
    results = Results([outcome for outcome in results.outcomes if x in outcome.labels and y(outcome) == y(outcome)])
    found = {name: analysis.curve(Results(part), x, y) for name, part in analysis.groups(results, x).items()}
    lines = {name: points for name, points in found.items() if len(points) > 1}
    for (name, points), colour in zip(lines.items(), coloured(lines).values(), strict=True):
        line(axes, points, color=colour, marker="o", markersize=3, label=name)
        if y is speed:
            axes.axvline(analysis.knee(points), linestyle=":", color=colour)
    if rest := [points[0] for name, points in found.items() if name not in lines]:
        line(axes, rest, color="gray", marker="o", markersize=3, linestyle="", label="other")
    log_where_wide(axes, results.values(x))
    if lines:
        axes.legend(fontsize=7)


def layers(results: Results):
    """Heat maps of the last diagnostics, a row for each group and a column for each block."""
    from matplotlib.colors import LogNorm

    kinds = {"gradient": "norm of the gradient", "activation": "rms of the activations"}
    last = {name: outcomes[0].diag for name, outcomes in analysis.groups(results).items()}
    kinds = {kind: title for kind, title in kinds.items() if any(diag.get(kind) for diag in last.values())}
    if not kinds:
        raise LookupError("no diagnostics of layers")
    figure, axes = panels(len(kinds), legend=False)
    figure.set_figheight(max(2.4, 0.9 + 0.24 * len(last)))
    for panel, (kind, title) in zip(axes, kinds.items(), strict=True):
        rows = {name: analysis.layers(diag[kind]) for name, diag in last.items() if diag.get(kind)}
        width = max(map(len, rows.values()))
        padded = [[*row, *[0.0] * (width - len(row))] for row in rows.values()]
        grid = [[v if 0 < v < math.inf else math.nan for v in row] for row in padded]
        shown = [v for row in grid for v in row if v == v]
        scale = LogNorm(min(shown), max(shown)) if shown and min(shown) < max(shown) else None
        image = panel.imshow(grid, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
        panel.set(title=title, xlabel="block", yticks=range(len(rows)))
        panel.set_yticklabels(rows, fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=panel)
    return figure


def frontier(results: Results):
    """Memory, measured (points) and predicted (lines), against the micro-batch, a colour for each configuration."""
    found = {str(name): memory.points(results, name) for name in results.values("configuration")}
    if not any(found.values()):
        raise LookupError("no memory was measured")
    figure, (axes,) = panels(1)
    colours = coloured(found)
    for name, points in found.items():
        at = [n for n, *_ in points]
        for i, style in ((1, {"marker": "o", "linestyle": "", "label": name}), (2, {"linestyle": "-", "linewidth": 1})):
            axes.plot(at, [math.nan if p[i] is None else p[i] / 2**20 for p in points], color=colours[name], **style)
    axes.set(xlabel="micro-batch, sequences", ylabel="MiB (points: measured; lines: predicted)")
    legend(figure, axes)
    return figure


def pareto(results: Results):
    """Final loss against its cost, in seconds, training FLOPs and FLOPs per token; and the front."""
    costs: dict[str, Callable[[Outcome], float]] = {
        "seconds": lambda o: o.final.get("seconds", o.seconds),
        "training FLOPs": lambda o: o.final["flops_per_token"] * o.final["tokens"],
        "training FLOPs a token": lambda o: o.final["flops_per_token"],
    }
    finished = Results([outcome for outcome in results.outcomes if loss(outcome) < math.inf])
    found = analysis.groups(finished)
    if not found:
        raise LookupError("no trial finished")
    figure, axes = panels(len(costs))
    colours = coloured(found)
    for panel, (title, cost) in zip(axes, costs.items(), strict=True):
        points: dict[str, Points] = {name: [(cost(o), loss(o)) for o in part] for name, part in found.items()}
        for name, at in points.items():
            panel.plot(*zip(*at, strict=True), "o", markersize=4, color=colours[name], label=name)
        front = analysis.pareto([point for at in points.values() for point in at])
        panel.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, zorder=0)
        log_where_wide(panel, [x for at in points.values() for x, _ in at], most=0)
        panel.set(xlabel=title, ylabel="validation loss")
    legend(figure, axes[0])
    return figure


def gap(results: Results):
    """Validation loss less that of the first variant with the same other labels, against step."""
    variants = results.values("variant")
    figure, (axes,) = panels(1)
    gaps: dict[str, list[Points]] = {}
    for outcome in results.outcomes:
        base = [o for o in results.outcomes if o.labels == {**outcome.labels, "variant": variants[0]}]
        if outcome.labels.get("variant") in variants[1:] and len(base) == 1:
            first = dict(analysis.evaluations(base[0]))
            points = [(step, y - first[step]) for step, y in analysis.evaluations(outcome) if step in first]
            gaps.setdefault(outcome.labels["variant"], []).append(points)
    if not any(points for many in gaps.values() for points in many):
        raise LookupError("no variant was evaluated where the first was")
    colours = coloured(gaps)
    for name, many in gaps.items():
        for points in filter(None, many):
            line(axes, points, color=colours[name], marker=".", label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"validation loss less that of {variants[0]}")
    legend(figure, axes)
    return figure


PLOTS: dict[str, Callable[[Results], Any]] = {f.__name__: f for f in (curves, lr, batch, layers, frontier, pareto, gap)}
