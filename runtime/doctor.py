"""Examine this machine: `python -m runtime.doctor`. Each trouble comes with the one command that mends it.

Each check takes the facts that it judges as arguments and gives a `Finding`; `examine` asks the machine for them. The
exit code is 1 if something that training needs is in trouble; the hub and W&B are not needed.
"""

import importlib.metadata
import netrc
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from runtime.config import Parser
from runtime.program import program

OLDEST_PYTHON, OLDEST_TORCH, OLDEST_TRITON = "3.11", "2.11", "3.6"  # as in pyproject.toml
OPTIONAL = ("hub", "W&B")
GB = 10**9
PIP = f"{shlex.quote(sys.executable)} -m pip install"
FITTING_TORCH = (
    f"{PIP} uv && {shlex.quote(sys.executable)} -m uv pip install --python {shlex.quote(sys.executable)} "
    "--reinstall-package torch --torch-backend=auto torch"
)


@dataclass(frozen=True)
class Finding:
    """What a check found: a `fact` in words, and if it is a trouble, the command that mends it."""

    name: str
    fact: str
    mend: str = ""

    def __str__(self) -> str:
        line = f"{'MEND' if self.mend else 'ok':4}  {self.name:8} {self.fact}"
        return line + (f"\n{'':15}$ {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its cards, its version and the newest CUDA that it runs. `error` if it does not answer."""

    cards: tuple[str, ...] = ()
    version: str = ""
    cuda: str = ""
    error: str = ""


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number. Without `packaging`: training on bytes needs torch and numpy alone."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def check_python(version: str) -> Finding:
    if _release(version) < _release(OLDEST_PYTHON):
        return Finding("Python", f"{version} is older than {OLDEST_PYTHON}", f"PYTHON=python{OLDEST_PYTHON} make train")
    return Finding("Python", f"{version}, {sys.executable}")


def check_torch(version: str) -> Finding:
    if _release(version) < _release(OLDEST_TORCH):
        return Finding("torch", f"{version} is older than {OLDEST_TORCH}", f"{PIP} --upgrade 'torch>={OLDEST_TORCH}'")
    return Finding("torch", version)


def check_gpu(
    driver: Driver | None, seen: tuple[str, ...], torch_version: str, built_for: str | None, hidden: str | None
) -> Finding:
    """Whether torch sees the cards that the driver has.

    `driver` is None where there is none, `seen` are torch's names of its GPUs, `built_for` is the version of CUDA that
    torch was built for, and `hidden` is CUDA_VISIBLE_DEVICES."""
    if seen:
        return Finding("GPU", ", ".join(seen))
    if driver is None:
        return Finding("GPU", "none: runs are on the CPU")
    if driver.error:
        return Finding("GPU", f"NVIDIA's driver does not answer: {driver.error}", "sudo modprobe nvidia")
    if not driver.cards:
        return Finding("GPU", "none: runs are on the CPU")
    unseen = f"torch {torch_version} does not see {driver.cards[0]}"
    if built_for is None:
        return Finding("GPU", f"{unseen}: it is built without CUDA", FITTING_TORCH)
    if driver.cuda and _release(driver.cuda)[0] < _release(built_for)[0]:
        old = f"driver {driver.version} runs CUDA up to {driver.cuda}, and this torch is built for {built_for}"
        return Finding("GPU", f"{unseen}: {old}", FITTING_TORCH)
    if hidden is not None:
        return Finding("GPU", f"{unseen}: CUDA_VISIBLE_DEVICES is {hidden!r}", "unset CUDA_VISIBLE_DEVICES")
    say_why = f'{shlex.quote(sys.executable)} -c "import torch; torch.cuda.init()"'
    return Finding("GPU", f"{unseen}, though it is built for CUDA {built_for}: the command says why", say_why)


def check_triton(version: str | None, system: str, gpu: bool) -> Finding:
    if version is None and system != "Linux":
        return Finding("Triton", f"none: it is published for Linux, and on {system} kernels are torch's")
    if version is None and not gpu:
        return Finding("Triton", "none: on a CPU kernels are torch's; .[kernels] has it for the sanitizer")
    if version is None:
        return Finding("Triton", "not installed: kernels are torch's", f"{PIP} 'triton>={OLDEST_TRITON}'")
    if _release(version) < _release(OLDEST_TRITON):
        return Finding(
            "Triton", f"{version} is older than {OLDEST_TRITON}", f"{PIP} --upgrade 'triton>={OLDEST_TRITON}'"
        )
    return Finding("Triton", version)


def check_compiler(compiler: str | None, headers: bool, on_gpu: bool) -> Finding:
    """Triton compiles its launchers with a C compiler, and torch.compile uses one on a CPU. `headers`: Python.h."""
    user = "Triton cannot launch kernels, and `auto` takes torch's" if on_gpu else "torch.compile is off"
    if compiler is None:
        return Finding("compiler", f"there is no C compiler: {user}", "sudo apt-get install -y g++ python3-dev")
    if not headers:
        return Finding("compiler", f"Python's C headers are missing: {user}", "sudo apt-get install -y python3-dev")
    return Finding("compiler", compiler)


def check_gpu_memory(free: int, total: int) -> Finding:
    fact = f"{free / GB:.1f} of {total / GB:.1f} GB free on the GPU"
    if free < total / 2:
        return Finding("memory", f"{fact}: other processes hold the rest; the command lists them", "nvidia-smi")
    return Finding("memory", fact)


def check_memory(free: int) -> Finding:
    fact = f"{free / GB:.1f} GB free"
    if free < 2 * GB:
        return Finding(
            "memory", f"{fact}: a run takes about 2; the command lists what holds it", "ps aux --sort=-rss | head"
        )
    return Finding("memory", fact)


def check_disk(folder: Path, free: int) -> Finding:
    fact = f"{free / GB:.1f} GB free in {folder}"
    if free < 5 * GB:
        return Finding("disk", f"{fact}: checkpoints and texts may fill it; the command lists runs", "du -sh out/*")
    return Finding("disk", fact)


def check_hub(endpoint: str, error: str, env: Mapping[str, str]) -> Finding:
    """`error` is why the hub was not reached, "" if it was."""
    proxies = [f"{key}={env[key]}" for key in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy") if env.get(key)]
    through = f" ({', '.join(proxies)})" if proxies else " (no proxy is set)"
    if env.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "HF_HUB_OFFLINE is set: only texts in its cache are found", "unset HF_HUB_OFFLINE")
    if error:
        mend = "export HF_ENDPOINT=https://the-mirror" if proxies else "export HTTPS_PROXY=http://the-proxy:port"
        return Finding("hub", f"{endpoint} is not reached{through}: {error}", mend)
    return Finding("hub", f"{endpoint}{through if proxies else ''}")


def check_wandb(installed: bool, logged_in: bool) -> Finding:
    if not installed:
        return Finding("W&B", "not installed: --log=wandb needs it", f"{PIP} wandb")
    if not logged_in:
        return Finding("W&B", "not logged in: --log=wandb needs it", f"{shlex.quote(sys.executable)} -m wandb login")
    return Finding("W&B", "logged in")


# What the machine says


def ask_driver() -> Driver | None:
    """NVIDIA's driver by nvidia-smi; None where there is no such program."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        listed, header = (
            subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True, timeout=20) for flags in (["-L"], [])
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(error=str(error))
    if listed.returncode:
        return Driver(error=" ".join((listed.stdout + listed.stderr).split()))
    found = {key: re.search(rf"{key} Version:\s*([\d.]+)", header.stdout) for key in ("Driver", "CUDA")}
    version, cuda = (match[1] if match else "" for match in found.values())
    return Driver(tuple(re.findall(r"^GPU \d+: (.*?) \(UUID", listed.stdout, re.MULTILINE)), version, cuda)


def ask_hub(endpoint: str) -> str:
    """Why the hub is not reached within five seconds; "" if it is, whatever it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError as error:
        return str(error) if error.code in (407, 502, 503, 504) else ""
    except (OSError, ValueError) as error:
        return " ".join(str(getattr(error, "reason", error)).split())
    return ""


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc(os.environ.get("NETRC")).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _free_memory() -> int:
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))[1])
    except (OSError, TypeError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def examine_gpu() -> Finding:
    seen = tuple(
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return check_gpu(None if seen else ask_driver(), seen, torch.__version__, torch.version.cuda, hidden)


def examine_compiler() -> Finding:
    found = (shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return check_compiler(next(filter(None, found), None), headers, torch.cuda.is_available())


def examine() -> list[Finding]:
    """Every check, on this machine."""
    from huggingface_hub.constants import ENDPOINT

    triton = importlib.metadata.version("triton") if find_spec("triton") else None
    gpu = torch.cuda.is_available()
    offline, here = os.environ.get("HF_HUB_OFFLINE"), Path.cwd()
    return [
        check_python(platform.python_version()),
        check_torch(torch.__version__),
        examine_gpu(),
        check_triton(triton, platform.system(), gpu),
        examine_compiler(),
        *([check_gpu_memory(*torch.cuda.mem_get_info())] if gpu else []),
        check_memory(_free_memory()),
        check_disk(here, shutil.disk_usage(here).free),
        check_hub(ENDPOINT, "" if offline else ask_hub(ENDPOINT), os.environ),
        check_wandb(find_spec("wandb") is not None, _has_wandb_key()),
    ]


def warnings(device: torch.device, asked: str) -> list[str]:
    """What a run on `device` should know, in a line each: a GPU that torch does not see, where the device was chosen
    by `auto`; on a GPU, Triton without a C compiler."""
    found = [examine_compiler()] if device.type == "cuda" else [examine_gpu()] * (asked == "auto")
    return [f"{finding.fact}; to mend it: {finding.mend}" for finding in found if finding.mend]


@program
def main(argv: list[str] | None = None) -> int:
    Parser(prog="python -m runtime.doctor", description=__doc__.partition("\n")[0]).parse_args(argv)
    found = examine()
    print(*found, sep="\n")
    return int(any(finding.mend and finding.name not in OPTIONAL for finding in found))


if __name__ == "__main__":
    sys.exit(main())
