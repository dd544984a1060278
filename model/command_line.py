"""From the command line of train.py to a configuration, and the run that it starts or resumes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data.fetch import lacking
from model import checkpoint
from model.pretrained import decided_by
from model.resume import check_fits
from model.without_training import without_training
from runtime.budget import LENGTHS
from runtime.config import ConfigError, as_dict, build, flatten, merge, read, read_file, read_flags
from runtime.defaults import default_config
from runtime.distributed import World
from runtime.run import Run, SilentRun, open_run
from runtime.text import typed

CONFIGS = Path(__file__).parents[1] / "configs"
C = TypeVar("C")


def read_command_line(cls: type[C], argv: list[str], doc: str, world: World) -> tuple[C, Run, dict[str, Any]]:
    """Read the flags `argv` of a program that `doc` describes, for a configuration of the class `cls`. Returns it, the
    run (not started yet) and the checkpoint to resume from.

    Precedence: defaults < config file < flags. The run's length (steps, tokens or seconds) is replaced as a whole. A
    resumed run takes its own configuration in place of the defaults, and reads a config file only if `--config` is
    given. The checkpoint is {} unless `--resume` is. Rank 0 reads it; other ranks get it without its tensors. Raises
    `UserError`.
    """
    if not world.is_main:
        config, folder, state = world.broadcast(None)
        return config, SilentRun(folder), state
    flags = read_flags(cls, argv, doc, CONFIGS)
    if "sample_prompt" in flags:
        flags["sample_prompt"] = typed(flags["sample_prompt"])
    options = *read(cls, flags, "config", "out", "resume", "device"), flags.get("data.corpus", "")
    name, why = default_config(*options, partial(lacking, flags))
    layers = [{"config": name, **flatten(cls, read_file(name, CONFIGS))}, flags]
    without_training(cls, *layers, world)
    out, run, resume, overwrite = read(cls, merge(layers, LENGTHS), "out", "run", "resume", "overwrite")
    run = open_run(Path(out), run, Path(name).stem, resume, overwrite, world)
    run.opening = why
    try:
        state = checkpoint.load_to_resume(run.folder / "last.pt", cls) if run.resumes else {}
        if state:
            layers = [flatten(cls, state["config"]), *(layers if "config" in flags else [flags])]
        elif source := read(cls, merge(layers, LENGTHS), "init_from")[0]:
            layers.insert(1, decided_by(source, layers[0], flags))
        config = replace(build(cls, merge(layers, LENGTHS)), run=run.folder.name)
        if state:
            check_fits(state, config.shape, config.optimizer)
            config.check_resumes(state)
            if config.init_from != state["config"]["init_from"]:
                raise ConfigError(f"{run.folder} goes on from its own weights: init_from is for a new run")
    except BaseException:
        run.release()
        raise
    run.config = as_dict(replace(config, resume=False, overwrite=False))
    world.broadcast((config, run.folder, {key: state[key] for key in state.keys() - {"model", "optimizers"}}))
    return config, run, state
