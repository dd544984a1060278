"""The config file that `python train.py` takes where none is given, by the device and its memory.

The choice is among files of configs/, so `--config` repeats it. On a GPU it is a model that five minutes suffice for:
at `UTILIZATION` of the card's rated speed they are C FLOPs, and N parameters need C = 6 N D for their D = 20 N tokens
(Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022). Its text is TinyStories, or without that the
docstrings, with a model so small that it does not overfit them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.hardware import device_name, free_memory, pick_device, rated_flops
from runtime.run import numbered

UTILIZATION, SECONDS = 0.3, 300
LEAST_MEMORY = 3 * 10**9  # bytes that the smallest model on a GPU takes, with the CUDA context
SMALL, WITHOUT_DOWNLOAD = "small.py", "docstrings.py"
STORIES = {"tinystories_15m.py": 15e6, "tinystories_31m.py": 31e6, "tinystories_46m.py": 46e6}  # parameters
NAMES = (SMALL, WITHOUT_DOWNLOAD, *STORIES)


def default_config(
    config: str, out: str, resume: bool, device: str, corpus: str, lacking: Callable[[str], str]
) -> tuple[str, list[str]]:
    """The name of the config file to train with, or to `resume` from: `config`, where it is given. And lines that say
    why it was chosen, where it was.

    All but `lacking` are options; `corpus` is "" where it is not given, and `lacking` is that of `choose`. Raises
    `HardwareError` for a device that is not on this machine."""
    if config:
        return config, []
    if resume:
        return last_config(Path(out)), []
    return choose(machine(pick_device(device)), corpus, lacking)


@dataclass(frozen=True)
class Machine:
    """A device: its type and name, free bytes of memory, and rated FLOP/s in half precision (None if unknown)."""

    device: str
    name: str
    free: int = 0
    flops: float | None = None


def machine(device: torch.device) -> Machine:
    """What `choose` needs to know of a device."""
    if device.type != "cuda":
        return Machine(device.type, device_name(device))
    name = device_name(device)
    return Machine("cuda", name, free_memory(device), rated_flops(name))


def choose(machine: Machine, corpus: str, lacking: Callable[[str], str]) -> tuple[str, list[str]]:
    """The config file for a machine, and four lines that say what was chosen and why.

    `corpus` is the user's, "" for that of the config. `lacking` says why the text of a config is not at hand, or too
    short, "" if it is neither; it is asked only on a GPU."""
    device, text = machine.name, corpus or "docstrings of the required packages, which need no download"
    if machine.device != "cuda":
        name, size = SMALL, "what a CPU trains in minutes" + ("; none was tried on mps" * (machine.device == "mps"))
    elif machine.free < LEAST_MEMORY:
        name, size = SMALL, f"models for a GPU take {LEAST_MEMORY / 1e9:.0f} GB of memory"
        device += f", {machine.free / 1e9:.1f} GB free"
    else:
        rated = f"{machine.flops / 1e12:,.0f} TFLOP/s rated" if machine.flops else "rated speed unknown"
        device += f", {machine.free / 1e9:.0f} GB free, {rated}"
        name, size = _by_speed(machine.flops)
        if reason := lacking(name):
            name, size = WITHOUT_DOWNLOAD, "a larger model would overfit this little text"
            text += f": {reason}"
        else:
            text = corpus or "tinystories"
    return name, [
        f"config   {name}: --config={name} trains the same on any machine",
        f"device   {device}",
        f"size     {size}",
        f"text     {text}",
    ]


def _by_speed(flops: float | None) -> tuple[str, str]:
    """The config of the size that suits a card's rated FLOP/s, and the reason."""
    if flops is None:
        name = min(STORIES, key=STORIES.get)
        return name, f"{STORIES[name] / 1e6:.0f}M parameters, the smallest for a GPU, as its speed is unknown"
    fitting = math.sqrt(UTILIZATION * flops * SECONDS / 6 / 20)
    name = min(STORIES, key=lambda name: abs(math.log(STORIES[name] / fitting)))
    words = f"five minutes at {UTILIZATION:.0%} of the rated speed are 20 tokens for each of {fitting / 1e6:.0f}M"
    return name, f"{STORIES[name] / 1e6:.0f}M parameters: {words}"


def last_config(out: Path) -> str:
    """The file among `NAMES` that the newest run in `out` was made with; small.py if there is none."""

    def newest(name: str) -> float:
        written = (folder / "config.json" for folder in numbered(out, Path(name).stem))
        return max((path.stat().st_mtime for path in written if path.exists()), default=0.0)

    return max(NAMES, key=newest)
