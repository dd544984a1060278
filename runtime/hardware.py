"""What the machine can do: the device, the precisions it computes in, its rated peak."""

import ctypes
import os
import platform
import re
import resource
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from runtime.capture import WARM_UP
from runtime.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16/fp16 tensor-core TFLOP/s with float32 accumulation, from NVIDIA's and AMD's data sheets. GeForce cards run
# that at half their advertised float16 rate.
PEAK_TFLOPS = {
    "GB200": 2500, "B300": 2500, "B200": 2250, "GH200": 989, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H100": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "T4": 65, "V100": 125,
    "RTX PRO 6000": 503, "RTX 6000 Ada": 364, "RTX A6000": 155,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7,
    "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 4070 Ti": 80.2, "RTX 4070": 58.3, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080": 59.5, "RTX 3070": 40.6, "RTX 3060": 25.6,
    "MI355X": 2300, "MI325X": 1307, "MI300X": 1307, "MI250X": 383,
}  # fmt: skip

# GB/s of their memory, from NVIDIA's data sheets, by torch's name for the card.
MEMORY_GBPS = {
    "B200": 8000, "H200": 4800, "H100 80GB HBM3": 3350, "H100 NVL": 3900, "H100 PCIe": 2000,
    "A100-SXM4-80GB": 2039, "A100 80GB PCIe": 1935, "A100-SXM4-40GB": 1555, "A100-PCIE-40GB": 1555,
    "L40S": 864, "L4": 300, "GeForce RTX 5090": 1792, "GeForce RTX 4090": 1008, "GeForce RTX 3090": 936,
}  # fmt: skip

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class HardwareError(UserError):
    """A device or precision that this machine does not have."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `HardwareError` for a device that is not there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name != "auto" and name not in available:
        raise HardwareError(f"device {name!r} is not on this machine, which has {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies it in hardware, else fp32. Raises `HardwareError` when it cannot."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = device.type == "mps" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if name == "auto":
        return "bf16" if bf16 else "fp32"
    if name == "bf16" and not bf16 and device.type == "cuda":
        raise HardwareError(
            f"{torch.cuda.get_device_name(device)} does not compute in bf16: take --precision=fp16 or fp32"
        )
    return name


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """What matrix products are computed in `precision` under."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Rated FLOP/s of the device's matrix units, None where this table does not know it."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return rated_flops(torch.cuda.get_device_name(device))


def rated_flops(card: str) -> float | None:
    """Peak bf16 FLOP/s of a card by its name; None rather than a near relative's rate (Ti, SUPER, Laptop)."""
    for name, rate in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D|Max-Q)\b)", card):
            return 1e12 * rate
    return None


def rated_bandwidth(card: str) -> float | None:
    """Bytes a second of a card's memory by its whole name; None where this table does not know it."""
    gigabytes = MEMORY_GBPS.get(card.removeprefix("NVIDIA "))
    return gigabytes and 1e9 * gigabytes


def pick_residual(name: str, device: torch.device, precision: Precision) -> torch.dtype | None:
    """Dtype of the residual stream, None for the parameters' own. `auto` is bf16 for bf16 on a GPU, where it halves the
    norms' traffic. Raises `HardwareError` for bf16 under another precision."""
    if name == "bf16" and precision != "bf16":
        raise HardwareError(f"a bf16 residual stream takes --precision=bf16, not {precision}; --residual=fp32 does not")
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda" and precision == "bf16")
    return torch.bfloat16 if bf16 else None


def pick_compile(name: str, device: torch.device) -> tuple[bool, str]:
    """Whether to use torch.compile, and what to say of it: `auto` does on a CPU, while a GPU's step is captured in a
    CUDA graph. Raises `HardwareError` where it is asked for in vain."""
    lacking = ""
    if device.type == "mps":
        lacking = "torch.compile does not serve mps well yet"
    elif not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "g++", "clang++")):
        lacking = "there is no C++ compiler (g++ or clang++)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking = "Python's C headers are missing (python3-dev)"
    if name == "on" and lacking:
        raise HardwareError(f"cannot compile on this machine: {lacking}; --compile=off runs without")
    if name == "off" or (name == "auto" and device.type == "cuda"):
        return False, "no"
    if lacking:
        return False, f"no: {lacking}"
    return True, "yes: the first step takes up to a minute, a few seconds when it finds its code in the cache"


def pick_capture(
    name: str, device: torch.device, precision: Precision, compiled: bool, redraws: bool
) -> tuple[bool, str]:
    """Whether to capture the training step in a CUDA graph, and what to say of it. `redraws`: dropout is drawn again
    where activations are recomputed. Raises `HardwareError` where it is asked for in vain."""
    lacking = ""
    if device.type != "cuda":
        lacking = f"{device.type} has no CUDA graphs"
    elif precision == "fp16":
        lacking = "fp16's loss scale is decided on the host"
    elif redraws:
        lacking = "model.recompute with model.dropout reads the random state on the host"
    if name == "on" and lacking:
        raise HardwareError(f"cannot capture the step: {lacking}; --capture=off runs without")
    if not lacking and name == "auto" and compiled:
        lacking = "the model is compiled; --capture=on does both"
    if name == "off" or lacking:
        return False, "no" + (f": {lacking}" if lacking and name != "off" else "")
    return True, f"yes: after {WARM_UP} eager steps, forward, backward and optimizers are replayed as CUDA graphs"


def set_up(device: torch.device, deterministic: bool) -> None:
    """What the process needs before it computes: deterministic operations if asked for, its GPU as the current one, on
    which graphs are captured, and memory that is kept.

    On a CPU a step allocates what the last one freed. Taken from the system each time, page by page, that is a sixth of
    a small model's step, so glibc is told to keep what is freed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**30)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def describe(device: torch.device, precision: Precision) -> str:
    """The device, precision and rated speed in one line."""
    peak = peak_flops(device, precision)
    rated = f"{peak / 1e12:,.0f} TFLOP/s rated" if peak else "rated speed unknown"
    return f"{device.type} ({device_name(device)}), {precision}, {rated}"


def memory(device: torch.device, graphs: bool = False) -> dict[str, int | None]:
    """Bytes held at the peak (by the process on a CPU), bytes reserved, and allocations that had to be retried. CUDA
    graphs hold what is reserved for them, allocated or not."""
    if device.type != "cuda":
        return {"memory": _peak_resident(), "memory_reserved": None, "memory_retries": None}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory": stats["reserved_bytes.all.peak" if graphs else "allocated_bytes.all.peak"],
        "memory_reserved": stats["reserved_bytes.all.peak"],
        "memory_retries": stats["num_alloc_retries"],
    }


def _peak_resident() -> int:
    """The most memory that this process has held. Linux's ru_maxrss would count the process that started it too."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device: torch has no exception of its own for the CPU's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
