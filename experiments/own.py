"""A user's own sweep, declared by flags, and the comparison of existing runs.

A sweep is a suite like the published ones: the same runner, ledger, judges and report.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import train
from data.batches import micro_batch_size
from experiments import analysis, judges, ledger
from experiments.judges import DIFFERENT, HIGHER, Noise, paired, unpaired
from experiments.run import configuration, trials
from experiments.spec import Claim, Knobs, Outcome, Suite
from runtime.budget import LENGTHS
from runtime.config import ConfigError, Knob, flatten, knobs
from runtime.run import read_status

UNITS = {"s": ("seconds", 1), "min": ("seconds", 60), "h": ("seconds", 3600), "steps": ("steps", 1)}
UNITS |= {"tokens": ("tokens", 1), "ktokens": ("tokens", 10**3), "Mtokens": ("tokens", 10**6)}
RANKS = Knob("ranks", int, "", 1, (), "[1, 1024]")
OF_THE_SWEEP = ("run", "out", "resume", "overwrite", "wandb", "seed")  # knobs that the runner gives to trials


def read_budget(text: str) -> dict[str, Any]:
    """`60s`, `5min`, `500steps` or `2Mtokens` as a knob of train.py. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+\.?\d*) ?([a-zA-Z]+)", text)
    if match is None or match[2] not in UNITS:
        raise ConfigError(f"--budget is a number and one of {', '.join(UNITS)}, such as 60s, not {text!r}")
    knob, factor = UNITS[match[2]]
    amount = float(match[1]) * factor if knob == "seconds" else round(float(match[1]) * factor)
    if not amount:
        raise ConfigError(f"--budget must be more than 0, not {text!r}")
    return {knob: amount}


def read_values(text: str, flag: str) -> tuple[str, list[Any]]:
    """`lr=1e-3,3e-3` as the knob and its values; `ranks=1,2` as the label and its values. Raises `ConfigError`."""
    known = knobs(train.Config) | {"ranks": RANKS}
    key, _, values = text.partition("=")
    key = next(iter(flatten(train.Config, {key: ""})))  # a section by its name means its first knob
    if key not in known:
        raise ConfigError(f"{flag}={text}: no knob called {key!r}; python train.py -h lists every knob")
    if key in OF_THE_SWEEP:
        raise ConfigError(f"{flag} cannot give {key}, which a sweep gives to each of its trials")
    read = [known[key].read(value) for value in values.split(",")]
    if len(set(read)) < len(read):
        raise ConfigError(f"{flag} {text} has a value twice")
    return ("@ranks" if key == "ranks" else key), read


def suite(
    base: str, grid: Sequence[str], versus: Sequence[str], seeds: int, budget: str, name: str, extra: Knobs
) -> Suite:
    """The suite that the flags declare. The values of `versus` are its variants; the first is compared with each of the
    others, at the best point of the grid if there is a grid. Raises `ConfigError`, also for what train.py refuses."""
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ConfigError(f"--name is the name of a file, not {name!r}")
    axes, sides = [read_values(text, "--grid") for text in grid], [read_values(text, "--versus") for text in versus]
    given = [key for key, _ in (*axes, *sides)]
    length = read_budget(budget) if budget else {}
    if twice := [key for key in {*given, *length} if given.count(key) > 1 or (length and key in LENGTHS & {*given})]:
        raise ConfigError(f"{twice[0]} is given twice: each knob is in one --grid, --versus or --budget")
    variants = {
        ", ".join(map(str, values)) or "base": dict(zip((key for key, _ in sides), values, strict=True))
        for values in itertools.product(*(values for _, values in sides))
    }
    over = next((key for key, values in axes if len(values) > 1), "")
    first, *others = variants
    claims = [
        (f"{other} differs from {first}" + f", each at its best {over}" * bool(over),
         judges.versus(other, first, DIFFERENT, best_over=over))
        for other in others
    ]  # fmt: skip
    if over and len(dict(axes)[over]) > 2 and not isinstance(dict(axes)[over][0], str):
        claims += [
            (
                f"the best {over} of {variant} is inside the grid",
                judges.best(over, "inside", where={"variant": variant}),
            )
            for variant in variants
        ]
    declared = Suite(
        name, " ".join((base, *grid, *versus)), {"own": {"config": base, **length}},
        tuple(Claim(i, claimed, "", judge) for i, (claimed, judge) in enumerate(claims, 1)),
        variants, dict(axes), seeds={"own": seeds},
        plots=(*[f"{over} by variant"] * bool(over), *["gap by variant"] * bool(others)),
    )  # fmt: skip
    for trial in trials(declared, "own", 1, extra):
        try:
            config = configuration(trial.knobs)
            micro_batch_size(config.batch_size, config.micro_batch, trial.ranks)
        except ConfigError as error:
            raise ConfigError(f"{trial}: {error} (--set gives a knob to every trial)") from error
    return declared


def runs(folder: Path) -> list[Outcome]:
    """The run in a folder, or every run in folders below it. Raises `ConfigError` where there is none."""
    found = []
    below = (sorted(place.rglob("status.json")) for place in (folder, Path("out") / folder))  # its path, or its name
    for status in next(filter(None, below), []):
        try:
            config = flatten(train.Config, json.loads((status.parent / "config.json").read_text("utf-8")))
            kept = ledger.condense(status.parent)
            end = read_status(status.parent)["status"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{status.parent} is no run that can be read: {error}") from error
        labels = {"run": str(status.parent), "seed": config.get("seed", 0)}
        found.append(Outcome(status.parent.name, "", "own", labels, config, end, 0.0, "", "", "", **kept))
    if not found:
        raise ConfigError(f"{folder} has no run: a run's folder has a status.json")
    return found


def compare(a: Path, b: Path) -> str:
    """Compare two runs, or groups of runs, in words: the knobs that differ, how each run ended, and the difference in
    loss with its 95% interval. It is paired by seed if each side has one run of each seed, else of the means."""
    sides = [runs(a), runs(b)]
    everything = [o for side in sides for o in side]
    if failed := [o for o in everything if o.status not in ("finished", *analysis.FAILED)]:
        raise ConfigError(f"{failed[0].labels['run']} ended as {failed[0].status}: there is no loss to compare")
    lines = []
    for key in sorted({key for o in everything for key in o.knobs} - {*OF_THE_SWEEP}):
        values = [", ".join(sorted({str(o.knobs.get(key)) for o in side})) for side in sides]
        if values[0] != values[1]:
            lines.append(f"{key}: {values[0]} against {values[1]}")
    for o in everything:
        speed = f"{o.final.get('tok_s_steady') or 0:,.0f} tok/s"
        lines.append(f"{o.labels['run']}  seed {o.labels['seed']}  {o.status}, val loss {o.val_loss:.4f}, {speed}")
    by_seed, noise = [{o.labels["seed"]: o.val_loss for o in side} for side in sides], Noise.of(sides)
    if [*map(len, by_seed)] == [*map(len, sides)] and by_seed[0].keys() & by_seed[1].keys():
        found, how = paired(*by_seed, noise), "paired by seed"
    else:
        means = [fmean(o.val_loss for o in side) for side in sides]
        found, how = unpaired(means[0] - means[1], min(map(len, sides)), noise), "means, by the spread of each side"
    interval = f" ± {found.interval:.2g}" if found.interval is not None else ""
    told = f", p {found.p(HIGHER):.2g}" if found.se is not None else "; one seed cannot measure the noise"
    return "\n".join([*lines, f"difference in loss {found.mean:+.4f}{interval}, {found.n} seeds, {how}{told}"])
