"""Hardware: choice of device, precision, torch.compile and CUDA graphs; peak FLOP/s and memory statistics."""

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
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4"]
LOW = ("fp8", "mxfp8", "nvfp4")  # formats of linear layers; the rest of the model computes in bf16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense bf16/fp16 tensor-core TFLOP/s with fp32 accumulation, from NVIDIA's and AMD's data sheets. On GeForce cards this
# is half the advertised fp16 rate, which is for fp16 accumulation.
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
    """This machine does not support the requested device, precision, compilation or capture."""


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is a GPU if there is one. Raises `HardwareError` if it is missing."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name != "auto" and name not in available:
        raise HardwareError(f"device {name!r} is not on this machine, which has {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> Precision:
    """Return the precision to train in; `auto` is bf16 if the device has bf16 matrix units, else fp32.

    That of fp8, mxfp8 and nvfp4 is bf16: `model.precision` lowers layers from there. Raises `HardwareError` for bf16 on
    a GPU without it, and for fp8 on one that has other FP8 formats or none."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = device.type == "mps" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if name == "auto":
        return "bf16" if bf16 else "fp32"
    if name == "fp8":
        check_fp8(device, "--precision=bf16")
    if name == "bf16" or name in LOW:
        if not bf16 and device.type == "cuda":
            raise HardwareError(
                f"{torch.cuda.get_device_name(device)} does not compute in bf16: use --precision=fp16 or fp32"
            )
        return "bf16"
    return name


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies e4m3 and e5m2, or is a CPU, which emulates it. AMD's cards have formats of other
    biases."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
    return device.type == "cpu"


def check_fp8(device: torch.device, instead: str) -> None:
    """Raise `HardwareError` on a device without FP8, with the option to use `instead`."""
    if not has_fp8(device):
        raise HardwareError(
            f"{device_name(device)} does not multiply in FP8, as NVIDIA's cards since Ada and Hopper do: use {instead}"
        )


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for `precision`; it is disabled for fp32."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Peak dense FLOP/s of the device's tensor cores; None for fp32, a CPU or an unknown card."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return rated_flops(torch.cuda.get_device_name(device))


def rated_flops(card: str) -> float | None:
    """Peak bf16 FLOP/s of a card by its name. None if unknown: a Ti, SUPER or Laptop variant has its own rate."""
    for name, rate in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D|Max-Q)\b)", card):
            return 1e12 * rate
    return None


def rated_bandwidth(card: str) -> float | None:
    """Bytes a second of a card's memory by its whole name; None where this table does not know it."""
    gigabytes = MEMORY_GBPS.get(card.removeprefix("NVIDIA "))
    return gigabytes and 1e9 * gigabytes


def pick_residual(name: str, device: torch.device, precision: Precision) -> torch.dtype | None:
    """Return the dtype of the residual stream; None means that of the parameters.

    `auto` is bf16 for training in bf16 on a GPU, where it halves the memory traffic of norms. Raises `HardwareError`
    for bf16 with another precision."""
    if name == "bf16" and precision != "bf16":
        raise HardwareError(f"a bf16 residual stream needs --precision=bf16, not {precision}; or use --residual=fp32")
    bf16 = name == "bf16" or (name == "auto" and device.type == "cuda" and precision == "bf16")
    return torch.bfloat16 if bf16 else None


def pick_compile(name: str, device: torch.device, sharded: bool = False) -> tuple[bool, str]:
    """Whether to use torch.compile, and a line that says why. `auto` does not on a GPU, which uses CUDA graphs instead.

    Raises `HardwareError` if `on` is impossible."""
    obstacle = ""
    if sharded:
        obstacle = "a sharded model gathers its parameters as it runs"
    elif device.type == "mps":
        obstacle = "torch.compile does not support mps well yet"
    elif not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), "g++", "clang++")):
        obstacle = "there is no C++ compiler (g++ or clang++)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        obstacle = "Python's C headers are missing (python3-dev)"
    if name == "on" and obstacle:
        raise HardwareError(f"cannot compile on this machine: {obstacle}; --compile=off runs without")
    if name == "off" or (name == "auto" and device.type == "cuda"):
        return False, "no"
    if obstacle:
        return False, f"no: {obstacle}"
    return True, "yes: the first step takes up to a minute, or a few seconds if the compiled code is cached"


def pick_capture(
    name: str,
    device: torch.device,
    precision: Precision,
    compiled: bool,
    recompute_dropout: bool,
    sharded: bool = False,
) -> tuple[bool, str]:
    """Whether to capture the training step as CUDA graphs, and a line that says why.

    `recompute_dropout`: whether layers with dropout recompute their activations. Raises `HardwareError` if `on` is
    impossible."""
    obstacle = ""
    if device.type != "cuda":
        obstacle = f"{device.type} has no CUDA graphs"
    elif sharded:
        obstacle = "a sharded model gathers its parameters as it runs"
    elif precision == "fp16":
        obstacle = "fp16's loss scaling is decided on the host"
    elif recompute_dropout:
        obstacle = "model.recompute with model.dropout reads the RNG state on the host"
    if name == "on" and obstacle:
        raise HardwareError(f"cannot capture the step: {obstacle}; --capture=off runs without")
    if not obstacle and name == "auto" and compiled:
        obstacle = "the model is compiled; --capture=on does both"
    if name == "off" or obstacle:
        return False, "no" + (f": {obstacle}" if obstacle and name != "off" else "")
    return True, f"yes: after {WARM_UP} eager steps, forward, backward and optimizers are replayed as CUDA graphs"


def check_memory(
    device: torch.device, n_parameters: int, activations: int, seq_len: int, batch_size: int, micro_batch: int
) -> None:
    """Raise `HardwareError` for a model or batch that is certain not to fit, before anything is allocated.

    `activations` is the number of those kept per token for the backward pass. What this counts is a lower bound, so a
    run may still be out of memory."""
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host
    weights = 12 * n_parameters  # fp32 weights, gradients and one moment
    copy = 8 * n_parameters  # of weights and moment, in the host's memory, for a checkpoint to be written from
    if device.type != "cuda":
        weights += copy
    ids = 16 * seq_len  # int64 inputs and targets of a sequence
    sequence = ids + 2 * activations * seq_len  # activations are in half precision at least
    memory = f"this machine's {device.type} has {_gigabytes(total)} of memory"
    if weights + sequence > total:
        raise HardwareError(
            f"a model of {n_parameters:,} parameters and seq_len {seq_len:,} takes at least "
            f"{_gigabytes(weights + sequence)} to train and {memory}: lower model.n_layer, model.d_model, "
            "the vocabulary or model.seq_len"
        )
    if copy > host:
        raise HardwareError(
            f"a model of {n_parameters:,} parameters takes at least {_gigabytes(copy)} of the host's memory to save "
            f"and this machine has {_gigabytes(host)}: lower model.n_layer, model.d_model or the vocabulary"
        )
    if ids * batch_size > host:
        raise HardwareError(
            f"a batch of {batch_size:,} sequences takes {_gigabytes(ids * batch_size)} and this machine has "
            f"{_gigabytes(host)} of memory: lower batch_size"
        )
    most = (total - weights) // sequence
    if micro_batch > most:
        fits = largest_micro_batch(batch_size, most)
        raise HardwareError(
            f"a micro-batch of {micro_batch:,} sequences takes at least {_gigabytes(sequence * micro_batch)} and "
            f"{memory}: set micro_batch to {fits:,} or less"
        )


def largest_micro_batch(batch_size: int, most: int) -> int:
    """The largest micro-batch of at most `most` sequences that divides the batch; 0 if there is none."""
    return next((n for n in range(most, 0, -1) if batch_size % n == 0), 0)


def _gigabytes(size: int) -> str:
    return f"{size // 10**9:,} GB"


def set_up(device: torch.device, deterministic: bool) -> None:
    """Configure the process: deterministic algorithms, the current GPU (graphs are captured on it), the CPU allocator.

    On a CPU, glibc is told to keep freed memory. By default it returns large blocks to the system, and the page faults
    of allocating them again cost a sixth of a small model's step."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # for this torch imports its compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        with suppress(AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**30)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads"


def describe(device: torch.device, precision: Precision) -> str:
    """One line with the device, the precision and the peak FLOP/s."""
    peak = peak_flops(device, precision)
    rated = f"{peak / 1e12:,.0f} TFLOP/s rated" if peak else "rated speed unknown"
    return f"{device.type} ({device_name(device)}), {precision}, {rated}"


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process can still allocate, those that torch holds for reuse included."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


def memory(device: torch.device, graphs: bool = False) -> dict[str, int | None]:
    """Memory statistics: peak bytes allocated (on a CPU, of the process), peak bytes reserved, allocation retries.

    With CUDA `graphs` the peak is the reserved memory, because graphs keep all memory of their pool."""
    if device.type != "cuda":
        return {"memory": _peak_rss(), "memory_reserved": None, "memory_retries": None}
    stats = torch.cuda.memory_stats(device)
    return {
        "memory": stats["reserved_bytes.all.peak" if graphs else "allocated_bytes.all.peak"],
        "memory_reserved": stats["reserved_bytes.all.peak"],
        "memory_retries": stats["num_alloc_retries"],
    }


def _peak_rss() -> int:
    """Peak resident memory of this process in bytes. Linux's ru_maxrss may include that of the parent process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, or came of one, as that of a CUDA graph whose capture it ended.

    On a CPU torch raises a plain RuntimeError, known by its text only."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
