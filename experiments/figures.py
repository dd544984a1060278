"""The report's figures. Each draws results on panels of its own; one with nothing to draw raises `LookupError`."""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from statistics import median
from typing import Any

from experiments import analysis, memory
from experiments.spec import Outcome, Results


def panels(n: int, legend: bool = True):
    """A figure of `n` panels in a row, and they."""
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
    step = math.ceil(len(handles) / most) or 1
    if len(handles) > 1:
        chosen = list(handles)[::step]
        figure.legend([handles[name] for name in chosen], chosen, loc="outside right upper", fontsize=7, frameon=False)


def log_where_wide(axes, xs: Iterable[float], most: int = 12) -> None:
    """A logarithmic axis for values that span more than a decade, which are its ticks where they are few."""
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
    found = {name: list(filter(None, map(losses, outcomes))) for name, outcomes in analysis.groups(results).items()}
    starts = [rows[0][2] for tracks in found.values() for rows in tracks]
    if not starts:
        raise LookupError("no losses were kept")
    figure, axes = panels(2)
    colours = coloured(found)
    for panel, i, x in zip(axes, (0, 1), ("step", "seconds"), strict=True):
        for name, tracks in found.items():
            for rows in tracks:
                points = [(row[i], row[2]) for row in rows]
                panel.plot(*zip(*points, strict=True), color=colours[name], label=name, linewidth=1)
        top = min(panel.get_ylim()[1], 1.15 * max(starts))  # a run that explodes would flatten all others
        panel.set(xlabel=x, ylabel="loss, nats a token", ylim=(None, top))
    legend(figure, axes[0])
    return figure


def losses(outcome: Outcome) -> list[tuple[int, float, float]]:
    """Step, seconds and loss on the way, as far as it was finite."""
    rows, key = (outcome.evals, "val_loss") if len(outcome.evals) > 1 else (outcome.steps, "loss")
    return [(row["step"], row["seconds"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def lr(results: Results):
    """Final loss against learning rate, with the best (star), the edge of stability (dotted), lost runs (crosses)."""
    swept = Results([outcome for outcome in results.outcomes if "lr" in outcome.labels])
    if len(swept.values("lr")) < 2:
        raise LookupError("no trials with several learning rates")
    found = {name: analysis.curve(Results(outcomes)) for name, outcomes in analysis.groups(swept, "lr").items()}
    figure, (axes,) = panels(1)
    colours = coloured(found)
    for name, points in found.items():
        line(axes, points, color=colours[name], marker="o", markersize=3, label=name)
        x, y = analysis.best(points)
        if math.isfinite(y):
            axes.plot(x, y, "*", markersize=11, color=colours[name])
        if (edge := analysis.edge(points)) is not None:
            axes.axvline(edge, linestyle=":", color=colours[name])
    log_where_wide(axes, [x for points in found.values() for x, _ in points])
    axes.set(xlabel="learning rate (star: best, dotted: edge, cross: lost)", ylabel="validation loss")
    legend(figure, axes)
    return figure


def batch(results: Results):
    """Loss against the batch, with the median of the gradient noise scales in sequences; speed, with its knee, against
    the micro-batch, or the batch where it is one."""
    varied = [label for label in ("batch_size", "micro_batch") if len(results.values(label)) > 1]
    if not varied:
        raise LookupError("no trials with several batches")
    figure, axes = panels(2, legend=False)
    for panel, x, y in zip(axes, (varied[0], varied[-1]), (analysis.loss, analysis.throughput), strict=True):
        swept(panel, results, x, y)
        panel.set_xlabel(f"{x}, sequences")
    if scales := noise_scales(results):
        axes[0].axvline(median(scales), linestyle="--", color="gray")
    axes[0].set_ylabel("validation loss (dashed: noise scale)")
    axes[1].set_ylabel("tok/s (dotted: knee)")
    return figure


def swept(axes, results: Results, x: str, y: Callable[[Outcome], float]) -> None:
    """`y` by the label `x`, a line a group and a dotted one at the knee of a speed; groups of one point are points."""
    results = Results([outcome for outcome in results.outcomes if x in outcome.labels and y(outcome)])
    found = {name: analysis.curve(Results(part), x, y=y) for name, part in analysis.groups(results, x).items()}
    lines = {name: points for name, points in found.items() if len(points) > 1}
    for (name, points), colour in zip(lines.items(), coloured(lines).values(), strict=True):
        line(axes, points, color=colour, marker="o", markersize=3, label=name)
        if y is analysis.throughput:
            axes.axvline(analysis.knee(points), linestyle=":", color=colour)
    if rest := [points[0] for name, points in found.items() if name not in lines]:
        line(axes, rest, color="gray", marker="o", markersize=3, linestyle="", label="other")
    log_where_wide(axes, results.values(x))
    if lines:
        axes.legend(fontsize=7)


def noise_scales(results: Results) -> list[float]:
    """The critical batches of the trials that finished and measured it, in sequences."""
    found = []
    for outcome in results.outcomes:
        if outcome.status == "finished":
            with suppress(LookupError):
                sequences = outcome.final["step"] * outcome.knobs["batch_size"]
                found.append(analysis.critical_batch(outcome) * sequences / outcome.final["tokens"])
    return found


def layers(results: Results):
    """Heat maps of the last diagnostics, a row a group and a column a block: norms of gradients, activations' size."""
    from matplotlib.colors import LogNorm

    kinds = {"gradient": "norm of the gradient", "activation": "rms of the activations"}
    last = {name: outcomes[0].diag for name, outcomes in analysis.groups(results).items()}
    kinds = {kind: title for kind, title in kinds.items() if any(diag.get(kind) for diag in last.values())}
    if not kinds:
        raise LookupError("no diagnostics of layers")
    figure, axes = panels(len(kinds), legend=False)
    figure.set_figheight(max(2.4, 0.9 + 0.24 * len(last)))
    for panel, (kind, title) in zip(axes, kinds.items(), strict=True):
        rows = {name: by_block(diag[kind]) for name, diag in last.items() if diag.get(kind)}
        width = max(map(len, rows.values()))
        grid = [
            [v if 0 < v < math.inf else math.nan for v in row] + [math.nan] * (width - len(row))
            for row in rows.values()
        ]
        shown = [v for row in grid for v in row if v == v]
        scale = LogNorm(min(shown), max(shown)) if shown and min(shown) < max(shown) else None
        image = panel.imshow(grid, aspect="auto", norm=scale, cmap="viridis", interpolation="nearest")
        panel.set(title=title, xlabel="block", yticks=range(len(rows)))
        panel.set_yticklabels(rows, fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=panel)
    return figure


def by_block(diag: dict[str, float]) -> list[float]:
    """A diagnostic's numbers by block: of groups of parameters, or by the block's index."""
    if any(group.startswith("blocks.") for group in diag):
        return analysis.layers(diag)
    return [math.nan if diag[i] is None else diag[i] for i in sorted(diag, key=int)]


def frontier(results: Results):
    """Memory, measured (points) and predicted (lines), against the micro-batch, a colour a configuration."""
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
    """Final loss against its cost: seconds, FLOPs, and the FLOPs of a token, some 6 a parameter; and the front."""
    costs: dict[str, Callable[[Outcome], float]] = {
        "seconds": lambda o: o.final.get("seconds", o.seconds),
        "training FLOPs": lambda o: o.final["flops_per_token"] * o.final["tokens"],
        "training FLOPs a token": lambda o: o.final["flops_per_token"],
    }
    found = {
        name: done for name, outcomes in analysis.groups(results).items()
        if (done := [o for o in outcomes if math.isfinite(analysis.loss(o))])
    }  # fmt: skip
    if not found:
        raise LookupError("no trial finished")
    figure, axes = panels(len(costs))
    colours = coloured(found)
    for panel, (title, cost) in zip(axes, costs.items(), strict=True):
        points = {name: [(cost(o), analysis.loss(o)) for o in outcomes] for name, outcomes in found.items()}
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
    others = {}
    for outcome in results.outcomes:
        base = {**outcome.labels, "variant": variants[0]}
        if outcome.labels.get("variant") in variants[1:] and len(results.where(**base)) == 1:
            points = analysis.gap_against_step(outcome, results.one(**base))
            others.setdefault(outcome.labels["variant"], []).append(points)
    if not any(points for many in others.values() for points in many):
        raise LookupError("no variant was evaluated where the first was")
    colours = coloured(others)
    for name, many in others.items():
        for points in filter(None, many):
            line(axes, points, color=colours[name], marker=".", label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylabel=f"validation loss less that of {variants[0]}")
    legend(figure, axes)
    return figure


def coherence(results: Results):
    """Coherence of the micro-batches' gradients and the gradient noise scale over training."""
    kinds = {"coherence": "cosine with the mean gradient", "noise_scale": "gradient noise scale, tokens"}
    found = analysis.groups(results)
    series = {
        kind: [
            (name, points) for name, outcomes in found.items() for o in outcomes if (points := analysis.series(o, kind))
        ]
        for kind in kinds
    }
    if not any(series.values()):
        raise LookupError("no gradients of micro-batches were compared")
    figure, axes = panels(len(kinds))
    colours = coloured(found)
    for panel, (kind, title) in zip(axes, kinds.items(), strict=True):
        for name, points in series[kind]:
            line(panel, points, color=colours[name], marker=".", linewidth=1, label=name)
        panel.set(xlabel="step", ylabel=title)
    legend(figure, axes[0])
    return figure


PLOTS: dict[str, Callable[[Results], Any]] = {
    "curves": curves,
    "lr": lr,
    "batch": batch,
    "layers": layers,
    "frontier": frontier,
    "pareto": pareto,
    "gap": gap,
    "coherence": coherence,
}
