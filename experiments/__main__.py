"""Run suites of experiments, and report on them.

python -m experiments                              # what there is, and what it takes
python -m experiments lr --scale tiny              # run a suite, or go on with it, and write its report
python -m experiments all --scale low --dry-run    # show what would be run
python -m experiments report lr                    # write the report of what was run

python -m experiments --base small.py --grid lr=1e-3,3e-3 --versus model.norm_place=pre,post --seeds 3 --budget 60s
                                                   # a sweep of your own, which ends in the same report
python -m experiments compare out/a out/b          # two runs, or folders of runs: their difference, with its interval
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import get_args

import train
from experiments import ledger
from experiments.run import TRAIN, Plan, clock, forecast, machine, offline, places, sweep, trials
from experiments.spec import Axis, Rule, Scale, Suite
from runtime.config import ConfigError, knobs, read_flags
from runtime.errors import UserError

MEMORY = "memory"  # the suite that is no grid of trials but a search, in which outcomes say what is tried next


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="suite",
        help="suites to run, or all; after the word report, to report on; after compare, two folders of runs",
    )
    add("--scale", choices=("tiny", "low", "full"), default="tiny")
    add("--dry-run", action="store_true", help="say what would be run, and run nothing")
    add("--jobs", type=positive, default=0, metavar="N", help="trials at once (default: as fit the GPUs, or cores)")
    add("--axis", choices=get_args(Axis), help="what all trials of a suite have equal (default: the suite's)")
    add("--rule", choices=get_args(Rule), help="how learning rates follow the batch (default: the suite's)")
    add("--seeds", type=positive, default=0, metavar="N", help="runs of every trial (default: the suite's)")
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="a knob of train.py, for every trial")
    add("--rerun", action="store_true", help="run again what was run; the latest outcome holds")
    add("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="start no more trials after so long")
    add(
        "--within",
        type=duration,
        default=math.inf,
        metavar="300s",
        help="end in time: cheapest suites first, and no trial that would not end by then",
    )
    add("--offline", action="store_true", help="on text that every machine has, with tokenizers of the same sizes")
    add("--wandb", choices=("off", "offline", "online"), default="off", help="mirror the runs, grouped by suite")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        help="of ledgers and reports (default: experiments/results, "
        "or out/experiments/results for a sweep of your own)",
    )
    add("--out", type=Path, default=Path("out/experiments"), metavar="DIR", help="of the runs' folders")
    own = parser.add_argument_group("a sweep of your own")
    own.add_argument("--base", metavar="CONFIG", help="config file of train.py that all trials start from")
    own.add_argument(
        "--grid", action="append", default=[], metavar="KNOB=A,B", help="a knob's values; of several, the product"
    )
    own.add_argument("--versus", action="append", default=[], metavar="KNOB=A,B", help="alternatives: compared by seed")
    own.add_argument("--budget", default="", metavar="60s", help="of each trial: s, min, h, steps, tokens or Mtokens")
    own.add_argument("--name", default="sweep", help="of the sweep, whose ledger and report it names")
    return parser.parse_args(argv)


def duration(text: str) -> float:
    """Seconds, of `300s`, `5min`, `1h` or a number of seconds."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        return float(number) * {"": 1, "s": 1, "min": 60, "h": 3600}[text[len(number) :]]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"a time is such as 300s, 5min or 1h, not {text!r}") from None


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"it must be 1 or more, not {number}")
    return number


def main(argv: list[str] | None = None, command: Sequence[str] = TRAIN) -> int:
    """Do as the flags say, training by `command`. Returns the exit code: 0 done, 2 refused, 130 interrupted."""
    try:
        from experiments.suites import SUITES

        return _main(arguments(argv), SUITES, command)
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _main(asked: argparse.Namespace, suites: Mapping[str, Suite], command: Sequence[str]) -> int:
    from experiments import own

    if asked.names[:1] == ["compare"]:
        if len(asked.names) != 3:
            raise ConfigError("compare takes two folders of runs")
        print(own.compare(*map(Path, asked.names[1:])))
        return 0
    reporting = asked.names[:1] == ["report"]
    if asked.base:
        declared = own.suite(asked.base, asked.grid, asked.versus, asked.seeds or 1, asked.budget, asked.name)
        suites = {asked.name: declared}
        asked.scale, asked.seeds = "own", 0
        names = [asked.name]
    elif asked.grid or asked.versus or asked.budget:
        raise ConfigError("--grid, --versus and --budget declare a sweep of your own: --base=small.py says of what")
    asked.results = asked.results or Path("out/experiments/results" if asked.base else "experiments/results")
    if asked.offline:
        asked.results = asked.results / "offline"
    if not asked.base:
        if not asked.names:
            print(*listing(suites, asked.results, len(places(asked.jobs))), sep="\n")
            return 0
        names = choose(asked.names[reporting:] or ["all"], suites, asked.scale)
    if not reporting:
        if not run(asked, [suites[name] for name in names], command):
            print("interrupted: the same command goes on")
            return 130
        if asked.dry_run:
            return 0
    from experiments import report

    print(f"report   {report.write(names, asked.scale, asked.results, suites)}")
    return 0


def run(asked: argparse.Namespace, suites: Sequence[Suite], command: Sequence[str]) -> bool:
    """Say what there is to run and, unless only that is asked for, run it. Returns whether it came to its end."""
    environments = places(asked.jobs)
    extra = typed(asked.set)
    todo = [
        trial for suite in suites if suite.name != MEMORY
        for trial in trials(suite, asked.scale, asked.axis, asked.rule, asked.seeds, extra)
    ]  # fmt: skip
    todo = [offline(trial) for trial in todo] if asked.offline else todo
    plan = Plan(todo, asked.results, asked.rerun)
    runs = [run[0] for run in plan.runs.values()]
    machines = " and ".join(sorted({machine(trial, len(environments)) for trial in todo}))
    searching = MEMORY in (suite.name for suite in suites)
    if searching and len(suites) == 1 and (asked.rerun or asked.seeds or asked.axis or asked.rule or asked.set):
        raise ConfigError(f"{MEMORY} is a search: --rerun, --seeds, --axis, --rule and --set are for other suites")
    counts = f"{len(plan.done)} of them done, {len(runs)} runs to start"
    print(*plan.table(), sep="\n")
    print(f"{counted(todo)} at scale {asked.scale}, {counts}{', and the memory frontier to search' * searching}")
    print(f"on {machines}: time {clock(forecast(runs, plan.past, len(environments)))}", flush=True)
    if asked.dry_run:
        return True
    begin, limit = time.monotonic(), min(asked.time_limit, asked.within)
    ended = sweep(plan, asked.out, environments, asked.wandb, asked.time_limit, command, within=asked.within)
    if ended and searching and time.monotonic() - begin < limit and (asked.within == math.inf or len(suites) == 1):
        from experiments import memory

        try:
            memory.run(asked.scale, asked.results, asked.out, print)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)  # of one suite among many: the others have their report
    return ended


def choose(names: Sequence[str], suites: Mapping[str, Suite], scale: Scale) -> list[str]:
    """The suites named; `all` are those that have the scale. Raises `ConfigError`."""
    if "all" in names:
        return [name for name, suite in suites.items() if scale in suite.base]
    if unknown := [name for name in names if name not in suites]:
        raise ConfigError(f"no suite called {unknown[0]}: there are {', '.join(suites)}, and all")
    return list(dict.fromkeys(names))


def typed(assignments: Sequence[str]) -> dict:
    """`KNOB=VALUE` as knobs of train.py. Raises `ConfigError`."""
    known = knobs(train.Config)
    given = read_flags(train.Config, [f"--{text}" for text in assignments], "")
    return {key: known[key].read(value) for key, value in given.items()}


def counted(trials: Sized) -> str:
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}"


def listing(suites: Mapping[str, Suite], results: Path, jobs: int) -> list[str]:
    """Each suite in two lines: its rows and title, and the number of trials, and the time they take, at each scale."""
    lines = []
    for name, suite in suites.items():
        lines.append(f"{name:14s} {suite.title} (row{'s' * (len(suite.rows) > 1)} {', '.join(map(str, suite.rows))})")
        costs = []
        for scale in suite.base:
            distinct = {trial.key: trial for trial in trials(suite, scale)}
            took = forecast(list(distinct.values()), ledger.history(ledger.place(results, scale, name)), jobs)
            n = "a search" if name == MEMORY else counted(distinct)
            costs.append(f"{scale} {n}" + (f", {clock(took)}" if took is not None else ""))
        lines.append(f"{'':14s} {'; '.join(costs)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
