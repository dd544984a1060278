"""Run suites of experiments, and report on them.

python -m experiments                              # list the suites, and what each took on this machine
python -m experiments lr --scale tiny              # run or continue a suite, and write its report
python -m experiments all --scale low --dry-run    # list the trials, and run none
python -m experiments report lr                    # write the report of the trials that have run

python -m experiments --base small.py --grid lr=1e-3,3e-3 --versus model.activation=swiglu,relu2 --seeds 3 --budget 60s
                                                   # a sweep of your own, which ends in the same report
python -m experiments compare out/a out/b          # two runs, or folders of runs: the difference in loss
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from experiments import ledger
from experiments.spec import Scale, Suite
from runtime.config import ConfigError, Parser, knobs, number, read_flags
from runtime.program import leave, program
from runtime.text import duration


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, number(int, "[1, 1000]")
    what = "suites to run, or all; after the word report, to report on; after compare, two folders of runs"
    add("names", nargs="*", metavar="suite", help=what)
    add("--scale", choices=("tiny", "low", "full"), default="tiny")
    add("--dry-run", action="store_true", help="list what would run, and run nothing")
    add("--jobs", type=count, default=0, metavar="N", help="trials at once (default: 4 per GPU, or one per core)")
    add("--seeds", type=count, default=0, metavar="N", help="seeds per trial (default: the suite's)")
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="an option of train.py for all trials")
    add("--rerun", action="store_true", help="run trials again that are done; the latest outcome counts")
    add("--time-limit", type=seconds, default=math.inf, metavar="300s", help="start no trials after this time")
    what = "end within this time: cheapest suites first, and only trials that are expected to finish"
    add("--within", type=seconds, default=math.inf, metavar="300s", help=what)
    add(
        "--offline", action="store_true", help="train on text that needs no download, with tokenizers of the same sizes"
    )
    add("--wandb", choices=("off", "offline", "online"), default="off", help="mirror the runs, grouped by suite")
    what = "folder of ledgers and reports (default: %(default)s; the committed ones are in experiments/results)"
    add("--results", type=Path, default=Path("out/experiments/results"), metavar="DIR", help=what)
    add("--out", type=Path, default=Path("out/experiments"), metavar="DIR", help="folder of the runs")
    own = parser.add_argument_group("a sweep of your own")
    own.add_argument("--base", metavar="CONFIG", help="config file of all trials")
    what = "values of an option, or of ranks, by torchrun; several flags give their product"
    own.add_argument("--grid", action="append", default=[], metavar="KNOB=A,B", help=what)
    own.add_argument(
        "--versus", action="append", default=[], metavar="KNOB=A,B", help="alternatives, compared seed by seed"
    )
    own.add_argument(
        "--budget", default="", metavar="60s", help="length of each trial in s, min, h, steps, tokens or Mtokens"
    )
    own.add_argument("--name", default="sweep", help="name of the sweep, its ledger and its report")
    return parser.parse_args(argv)


def seconds(text: str) -> float:
    """Seconds, of `300s`, `5min`, `1h` or a number of seconds."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        value = float(number) * {"": 1, "s": 1, "min": 60, "h": 3600}[text[len(number) :]]
    except (ValueError, KeyError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a time is such as 300s, 5min or 1h, not {text!r}")
    return value


@program
def main(argv: list[str] | None = None, command: Sequence[str] = ()) -> int:
    """Run suites; `command` starts trials. Returns the exit code: 0 done, 2 refused, 130 interrupted."""
    from experiments.suites import SUITES

    return _main(arguments(argv), SUITES, command)


def _main(asked: argparse.Namespace, suites: Mapping[str, Suite], command: Sequence[str]) -> int:
    asked.results = asked.results / "offline" if asked.offline else asked.results
    for flag, folder in (("--results", asked.results), ("--out", asked.out)):
        if existing := [path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()]:
            raise ConfigError(f"{flag}={folder} is no folder: {existing[0]} is a file")
    verb = asked.names[0] if asked.names[:1] in (["report"], ["compare"]) else ""
    names, scale, extra = asked.names[bool(verb) :], asked.scale, assigned(asked.set)
    if verb == "compare":
        if len(names) != 2:
            raise ConfigError("compare takes two folders of runs")
        from experiments import own

        print(own.compare(*map(Path, names)))
        return 0
    if asked.base is not None:
        if names:
            raise ConfigError(f"--base declares a sweep of its own, without the suite {names[0]}")
        from experiments import own

        flags = (asked.base, asked.grid, asked.versus, asked.seeds or 1, asked.budget, asked.name)
        suites, names, scale = {asked.name: own.suite(*flags, extra)}, [asked.name], "own"
    elif asked.grid or asked.versus or asked.budget:
        raise ConfigError("--grid, --versus and --budget declare a sweep of your own: --base=small.py says of what")
    elif not asked.names:
        print(*listing(suites, asked.results), sep="\n")
        return 0
    names = choose(names or ["all"], suites, scale)
    if not verb and not run(asked, [suites[name] for name in names], scale, extra, command):
        print("interrupted: the same command continues")
        return 130
    if asked.dry_run and not verb:
        return 0
    from experiments import report

    print(f"report   {report.write(names, suites, scale, asked.results, asked.seeds, extra, asked.offline)}")
    return 0


def run(
    asked: argparse.Namespace, suites: Sequence[Suite], scale: Scale, extra: Mapping, command: Sequence[str]
) -> bool:
    """Print the trials and the time they will take; run them unless this is a dry run. Returns False if a signal ended
    it early."""
    from experiments import run as runner

    trials = [t for suite in suites for t in runner.trials(suite, scale, asked.seeds, extra, asked.offline)]
    sweep = runner.Sweep(trials, asked.results, asked.jobs, asked.rerun)
    for trial in trials if asked.dry_run else []:
        print(f"{trial}  {runner.summary(sweep.done[trial.key]) if trial.key in sweep.done else ''}".rstrip())
    machines = " and ".join(sorted({runner.machine(trial, len(sweep.places)) for trial in trials}))
    counts = f"{len(sweep.done)} of them done, {len(sweep.waiting)} runs to start"
    print(f"{len(trials)} trials at scale {scale}, {counts}")
    print(f"on {machines}: about {duration(sweep.forecast(sweep.waiting))}", flush=True)
    if asked.dry_run:
        return True
    return sweep.run(asked.out, asked.time_limit, asked.within, asked.wandb, command or runner.TRAIN)


def choose(names: Sequence[str], suites: Mapping[str, Suite], scale: Scale) -> list[str]:
    """The suites named; `all` are those that have the scale. Raises `ConfigError`."""
    if "all" in names:
        return [name for name, suite in suites.items() if scale in suite.base]
    if unknown := [name for name in names if name not in suites]:
        raise ConfigError(f"no suite called {unknown[0]}: there are {', '.join(suites)}, and all")
    return list(dict.fromkeys(names))


def assigned(assignments: Sequence[str]) -> dict:
    """Parse `KNOB=VALUE` texts into knobs of train.py. Raises `ConfigError`, also for a knob that the runner sets."""
    if not assignments:
        return {}
    if odd := [text for text in assignments if text[:1] in ("", "-", "=") or "=" not in text]:
        raise ConfigError(f"--set takes KNOB=VALUE, not {odd[0]!r}")
    import train
    from experiments.own import OF_THE_SWEEP

    known = knobs(train.Config)
    given = read_flags(train.Config, [f"--{text}" for text in assignments], "")
    if taken := [key for key in given if key in OF_THE_SWEEP]:
        raise ConfigError(f"--set {taken[0]} has no effect: a sweep gives it to each of its trials")
    return {key: known[key].read(value) for key, value in given.items()}


def listing(suites: Mapping[str, Suite], results: Path) -> Iterator[str]:
    """Two lines for each suite: its title and rows; and for each scale the number of trials and of those that ran."""
    for name, suite in suites.items():
        yield f"{name:14s} {suite.title} (row{'s' * (len(suite.rows) > 1)} {', '.join(map(str, suite.rows))})"
        sizes = []
        for scale in suite.base:
            ran = {outcome.key: outcome.seconds for outcome in ledger.read(ledger.place(results, scale, name))}
            took = f" ({len(ran)} ran, {sum(ran.values()):,.0f} s)" * bool(ran)
            sizes.append(f"{scale} {suite.size(scale)} trial{'s' * (suite.size(scale) != 1)}{took}")
        yield f"{'':14s} {'; '.join(sizes)}".rstrip()


if __name__ == "__main__":
    leave(main())
