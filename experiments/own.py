"""A user's own sweep, declared by flags, and the comparison of runs that are there.

A sweep is a suite like the published ones: the same runner, ledger, judges and report, under out/experiments.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import train
from experiments import analysis, ledger
from experiments.judges import DIFFERENT, HIGHER, Best, Noise, Versus, paired, unpaired
from experiments.spec import Claim, Outcome, Suite
from runtime.config import ConfigError, flatten, knobs

UNITS = {"s": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600), "steps": ("steps", 1)}
UNITS |= {"tokens": ("tokens", 1), "ktokens": ("tokens", 10**3), "Mtokens": ("tokens", 10**6)}


def read_budget(text: str) -> dict[str, Any]:
    """`60s`, `5min`, `500steps` or `2Mtokens` as a knob of train.py. Raises `ConfigError`."""
    match = re.fullmatch(r"([\d.]+) ?([a-zA-Z]+)", text)
    if match is None or match[2] not in UNITS:
        raise ConfigError(f"--budget is a number and one of {', '.join(UNITS)}, such as 60s, not {text!r}")
    knob, factor = UNITS[match[2]]
    amount = float(match[1]) * factor
    return {knob: amount if knob == "seconds" else round(amount)}


def read_values(text: str, known: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """`lr=1e-3,3e-3` as the knob and its values. Raises `ConfigError`."""
    key, _, values = text.partition("=")
    given = flatten(train.Config, {key: ""})  # a section by its name means its first knob
    key = next(iter(given))
    if key not in known:
        raise ConfigError(f"no knob called {key}: python train.py -h lists every knob")
    return key, [known[key].read(value) for value in values.split(",")]


def suite(base: str, grid: Sequence[str], versus: Sequence[str], seeds: int, budget: str, name: str) -> Suite:
    """The suite that the flags declare: `versus` knobs make its variants, of which the first is compared with each
    other one, at the best point of the grid where there is one. Raises `ConfigError`."""
    known = knobs(train.Config)
    axes = dict(read_values(text, known) for text in grid)
    sides = [read_values(text, known) for text in versus]
    variants = {
        ", ".join(map(str, values)) or "base": dict(zip((key for key, _ in sides), values, strict=True))
        for values in itertools.product(*(values for _, values in sides))
    }
    over = next((key for key, values in axes.items() if len(values) > 1), "")
    first, *others = variants
    claims = [
        Claim(i, f"{other} differs from {first}" + f", each at its best {over}" * bool(over), "",
              Versus(other, first, DIFFERENT, best_over=over))
        for i, other in enumerate(others, 1)
    ]  # fmt: skip
    if over and len(axes[over]) > 2:
        claims += [
            Claim(len(others) + i, f"the best {over} of {variant} is inside the grid", "",
                  Best(over, "inside", where={"variant": variant}))
            for i, variant in enumerate(variants, 1)
        ]  # fmt: skip
    base_knobs = {"config": base, **(read_budget(budget) if budget else {})}
    plots = ("curves", *["lr"] * ("lr" in axes), *["gap"] * bool(others))
    return Suite(
        name, " ".join((base, *grid, *versus)), tuple(range(1, len(claims) + 1)), {"own": base_knobs}, tuple(claims),
        variants, axes, seeds={"own": seeds}, plots=plots,
    )  # fmt: skip


def runs(folder: Path) -> list[Outcome]:
    """The run in a folder, or every run in folders below it. Raises `ConfigError` where there is none."""
    found = []
    for status in sorted(folder.rglob("status.json")):
        config = json.loads((status.parent / "config.json").read_text())
        kept = ledger.condense(status.parent)
        labels = {"run": str(status.parent), "seed": config.get("seed", 0)}
        found.append(Outcome(status.parent.name, "", "own", labels, flatten(train.Config, config),
                             kept["final"]["status"], 0.0, "", "", "", **kept))  # fmt: skip
    if not found:
        raise ConfigError(f"{folder} has no run: a run's folder has a status.json")
    return found


def compare(a: Path, b: Path) -> str:
    """Two runs, or groups of runs, side by side: the knobs by which they differ, their ends, and the difference in
    loss with its 95% interval: by seed where each side has one run of each, else of means."""
    sides = [runs(a), runs(b)]
    lines = []
    for key in sorted({key for side in sides for o in side for key in o.knobs} - {"run", "out", "seed", "resume"}):
        values = [sorted({str(o.knobs.get(key)) for o in side}) for side in sides]
        if values[0] != values[1]:
            lines.append(f"{key}: {', '.join(values[0])} against {', '.join(values[1])}")
    for side in sides:
        for o in side:
            speed = f"{o.final.get('tok_s_steady') or 0:,.0f} tok/s"
            lines.append(f"{o.labels['run']}  seed {o.labels['seed']}  {o.status}, val loss {o.val_loss:.4f}, {speed}")
    if failed := [o for side in sides for o in side if o.status not in ("finished", *analysis.FAILED)]:
        raise ConfigError(f"{failed[0].labels['run']} ended as {failed[0].status}: there is no loss to compare")
    by_seed = [{o.labels["seed"]: analysis.loss(o) for o in side} for side in sides]
    noise = Noise.of(sides)
    alone = all(len(losses) == len(side) for losses, side in zip(by_seed, sides, strict=True))
    if alone and by_seed[0].keys() & by_seed[1].keys():
        found, how = paired(*by_seed, noise), "paired by seed"
    else:
        means = [fmean(analysis.loss(o) for o in side) for side in sides]
        found, how = unpaired(means[0] - means[1], min(map(len, sides)), noise), "means, by the spread of each side"
    interval = f" ± {found.interval:.2g}" if found.interval is not None else ""
    told = "" if found.se is not None else "; one seed tells nothing of the noise"
    p = f", p {found.p(HIGHER):.2g}" if found.se is not None else ""
    return "\n".join([*lines, f"difference in loss {found.mean:+.4f}{interval}, {found.n} seeds, {how}{p}{told}"])
