"""What train.py does in place of training: `--print_config` and `--eval_only`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from model import evaluate
from model.choices import choose
from runtime import hardware
from runtime.budget import LENGTHS
from runtime.config import as_dict, build, flatten, merge, read
from runtime.distributed import ALONE, World
from runtime.run import RunError, choose_folder

ACTIONS = {"config", "resume", "overwrite", "print_config", "eval_only"}  # not of a config file


def without_training(cls: type, file: dict[str, Any], flags: dict[str, Any], world: World = ALONE) -> None:
    """Do what `print_config` or `eval_only` asks for and exit; return if neither is set. Nothing on disk changes.

    `file` and `flags` are values of the configuration class `cls` by dotted key, and this is rank 0 of `world`; the
    others need not call it. `print_config` prints a config file,
    with where each value is from, and what stands for it on this machine. `eval_only` evaluates the run's best
    checkpoint. Raises `UserError`."""
    given = merge([file, flags], LENGTHS)
    printing, evaluating, resume, out, run = read(cls, given, "print_config", "eval_only", "resume", "out", "run")
    if not (printing or evaluating):
        return
    name = Path(file["config"]).name
    sources = {name: file, "flag": flags}
    if resume or evaluating:
        folder = choose_folder(Path(out), run, Path(name).stem, resume=True, overwrite=False)
        own = {str(folder): saved_config(cls, folder)}
        sources = own | (sources if "config" in flags else {"flag": flags})
    config = build(cls, merge(sources.values(), LENGTHS))
    if printing:
        print("\n".join(config_lines(config, sources, world)))
        raise SystemExit(0)
    precision = "bf16" if config.precision in hardware.LOW else config.precision  # the weights that are saved are whole
    options = {"run": folder, "device": config.device, "precision": precision, "tokens": config.eval_tokens}
    if config.kernels.every in ("auto", "torch", "triton"):
        options["kernels"] = config.kernels.every
    raise SystemExit(evaluate.main([f"--{key}={value}" for key, value in options.items()]))


def saved_config(cls: type, folder: Path) -> dict[str, Any]:
    """The configuration of a run by dotted key. Raises `RunError`."""
    path = folder / "config.json"
    try:
        return flatten(cls, as_dict(build(cls, flatten(cls, json.loads(path.read_text(encoding="utf-8"))))))
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is no configuration of train.py: {error}") from error


def config_lines(config: Any, sources: Mapping[str, Mapping[str, Any]], world: World = ALONE) -> Iterator[str]:
    """A config file of all values, each with the last of `sources` that has it."""
    known, chosen = {}, choices(config, world)
    for source, values in sources.items():
        if LENGTHS & values.keys():
            known = {key: other for key, other in known.items() if key not in LENGTHS}
        known |= dict.fromkeys(values, source)

    def comment(key: str) -> str:
        return known.get(key, "default") + (f": {chosen[key]}" if key in chosen else "")

    for name, value in vars(config).items():
        if is_dataclass(value):
            yield f"{name} = dict("
            for inner, setting in vars(value).items():
                if inner in value.__dataclass_fields__:
                    yield f"    {inner}={setting!r},".ljust(40) + f"  # {comment(f'{name}.{inner}')}"
            yield ")"
        elif name not in ACTIONS:
            yield f"{name} = {value!r}".ljust(40) + f"  # {comment(name)}"


def choices(config: Any, world: World) -> dict[str, str]:
    """What stands for `auto`, 0 and nothing on this machine, by dotted key. Raises as `choose` does."""
    chosen = choose(config, world.silent())
    found = {"device": f"{chosen.device}, {hardware.device_name(chosen.device)}", "precision": chosen.precision}
    found |= {"residual": "fp32" if chosen.setup.residual is None else "bf16"} | chosen.notes
    given, resolved = asdict(config.model), asdict(config.shape)
    found |= {f"model.{key}": str(value) for key, value in resolved.items() if value != given[key]}
    return found | {f"kernels.{op}": name for op, name in chosen.kernels.names.items()}
