"""Compile every Triton kernel that the model launches, for cards that are not here: `python -m bench.compile`.

    python -m bench.compile --arch 90 --kernel rmsnorm             one card, kernels by a part of their name
    python -m bench.compile --arch 90 --kernel rmsnorm_fwd --sass  and their machine code
    python -m bench.compile --update                               accept what is measured: write the baseline

Every op runs forward and backward at its bench shapes, and so do training steps of two models, on meta tensors and with
a driver that has no device: Triton specialises each launch as it would on the card (dtypes, constants, arguments that
are 1 or a multiple of 16) and is stopped short of launching it. What differs is then compiled.

The exit code is 1 when a kernel does not compile, wants more shared memory than the card has, multiplies bf16 or fp16
by other instructions than its tiles could take, waits for each wgmma before the next one, is not in the baseline, or is
worse than there: it spills more, has lost a 128-bit load or store, or takes over 1.25 times the registers and 8 more.
On sm_90 no kernel of heads up to 128 may spill, whatever the baseline says. Versions of Triton differ by 15% in
registers, so each has a baseline of its own in bench/baselines; under one that has none, any spill fails and the rest
is not compared. `make gate` goes through the versions that have one.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.harness import META, Case, on_meta
from bench.report import written
from kernels import OPS, KernelChoice, bind
from model.gpt import GPT, ModelConfig
from runtime.config import build, flatten, read_file
from train import ROOT, Config

BASELINES = Path(__file__).with_name("baselines")
MEASURED = ("registers", "spill", "wide_loads", "wide_stores")
COLUMNS = [
    "kernel", "variant", "card", "regs", "spill", "shared", "used", "blocks", "occ", "matrix", "ld128", "st128",
    "sec", "launched by",
]  # fmt: skip
LINE = "{} {} {:6} {:>4} {:>5} {:>7} {:>4} {:>6} {:>4} {:>10} {:>6} {:>6} {:>5}  {}".format
INSTRUCTION = r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"  # a line of nvdisasm's, and the name in it


@dataclass(frozen=True)
class Card:
    """A target, and what one multiprocessor of it holds at once: warps, blocks, and bytes of shared memory.

    A block may have `shared` bytes, and the driver takes `reserved` beside them. Its tensor cores multiply bf16
    and fp16 by `matrix` instructions, but tiles of fewer than `rows` rows by HMMA. Sources: CUDA Programming Guide,
    "Compute Capabilities", the table of technical specifications; PTX ISA, wgmma and tcgen05; AMD CDNA 3 ISA.
    """

    target: GPUTarget
    shared: int
    warps: int
    blocks: int
    matrix: str
    rows: int = 0
    reserved: int = 1024

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """How many blocks, each of so many registers a thread, bytes and warps, a multiprocessor holds at once."""
        by_registers = 512 // (8 * math.ceil(max(1, registers) / 8)) * 4  # four schedulers with 512 a lane, in eights
        by_shared = (self.shared + self.reserved) // max(1, shared + self.reserved)
        return min(self.blocks, by_shared, min(self.warps, by_registers) // warps)


CARDS = {
    "sm_80": Card(GPUTarget("cuda", 80, 32), 163 * 1024, warps=64, blocks=32, matrix="HMMA"),
    "sm_89": Card(GPUTarget("cuda", 89, 32), 99 * 1024, warps=48, blocks=24, matrix="HMMA"),
    "sm_90": Card(GPUTarget("cuda", 90, 32), 227 * 1024, warps=64, blocks=32, matrix="HGMMA", rows=64),
    "sm_100": Card(GPUTarget("cuda", 100, 32), 227 * 1024, warps=64, blocks=32, matrix="UTCHMMA", rows=64),
    "sm_120": Card(GPUTarget("cuda", 120, 32), 99 * 1024, warps=48, blocks=24, matrix="HMMA"),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 64 * 1024, warps=32, blocks=32, matrix="mfma", reserved=0),
}


@dataclass
class Launch:
    """A kernel as Triton would compile it for a card, and the names of the `sources` that launch it so."""

    kernel: JITFunction
    card: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: object
    sources: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def variant(self) -> str:
        """What tells this compilation from the kernel's others: `bf16 fp32:gain,rstd no:residual 16∤D BLOCK_D=512 w4`.

        The dtype of the first pointer and of those that differ from it; blocks of descriptors; arguments that are None,
        that 16 does not divide, or that take offsets of 64 bits (AMD asks); constants but those that are false; warps,
        unusual options.
        """
        names = [name.removesuffix("_ptr") for name in self.signature]
        types = {name: kind for name, kind in zip(names, self.signature.values(), strict=True) if kind != "constexpr"}
        pointers = {name: kind[1:] for name, kind in types.items() if kind.startswith("*")}
        blocks = {name: kind[11:-1] for name, kind in types.items() if kind.startswith("tensordesc<")}
        constants = {names[path[0]]: value for path, value in self.constants.items()}
        known = {names[path[0]]: dict(pairs) for path, pairs in self.attributes.items()}
        first, *others = dict.fromkeys(pointers.values()) or [""]
        groups = {f"{dtype}:": [name for name in pointers if pointers[name] == dtype] for dtype in others}
        groups |= {f"{block}:": [name for name in blocks if blocks[name] == block] for block in blocks.values()}
        groups["no:"] = [name for name, value in constants.items() if value is None]
        groups["16∤"] = [name for name in types if name in known and "tt.divisibility" not in known[name]]
        if self.card == "gfx942":
            groups["far:"] = [name for name in pointers if "tt.pointer_range" not in known.get(name, ())]
        usual = {option: getattr(type(self.options), option, None) for option in ("num_stages", "num_ctas", "maxnreg")}
        options = {option: getattr(self.options, option, None) for option in usual}
        words = [first, *(label + ",".join(members) for label, members in groups.items() if members)]
        words += [name if value is True else f"{name}={value}" for name, value in constants.items() if value]
        words += [f"w{self.options.num_warps}", *(f"{k}={v}" for k, v in options.items() if v != usual[k])]
        return " ".join(words)

    def __str__(self) -> str:
        return f"{self.name} | {self.variant} | {self.card}"


@dataclass(frozen=True)
class Row:
    """What came of a compilation: `error`, or what the machine code needs and does. `spill` and `shared` are bytes."""

    launch: Launch
    error: str = ""
    seconds: float = 0.0
    warps: int = 1
    registers: int = 0
    spill: int = 0
    shared: int = 0
    tiles: tuple[int, ...] = ()  # rows of the products of bf16 or fp16
    matrix: str = ""  # tensor-core instructions
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    code: str = ""

    def measured(self) -> dict[str, int]:
        """What a baseline keeps."""
        return {name: getattr(self, name) for name in MEASURED}

    @property
    def may_spill(self) -> bool:
        """Whether a baseline can accept spills: not on sm_90, but for heads wider than 128."""
        names = list(self.launch.signature)
        head_dim = {names[path[0]]: value for path, value in self.launch.constants.items()}.get("D", 0)
        return self.launch.card != "sm_90" or head_dim > 128

    def line(self, widths: tuple[int, int]) -> str:
        """The row of the table, its first two columns padded to `widths`."""
        launch, card = self.launch, CARDS[self.launch.card]
        source = launch.sources[0] + (f" and {len(launch.sources) - 1} more" if launch.sources[1:] else "")
        resident = card.resident(self.registers, self.shared, self.warps)
        numbers = (
            self.registers, self.spill, self.shared, f"{self.shared / card.shared:.0%}",
            resident, f"{resident * self.warps / card.warps:.0%}", self.matrix or "-",
            f"{self.wide_loads}/{self.loads}", f"{self.wide_stores}/{self.stores}", f"{self.seconds:.1f}",
        )  # fmt: skip
        names = launch.name.ljust(widths[0]), launch.variant.ljust(widths[1]), launch.card
        return LINE(*names, *("-" * len(numbers) if self.error else numbers), source)


@contextmanager
def autocast() -> Iterator[None]:
    """`torch.autocast(..., torch.bfloat16)` on the meta device, where torch has none and may not be asked."""
    linear = F.linear
    with (
        patch.object(torch, "is_autocast_enabled", lambda device: True),
        patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        patch.object(F, "linear", lambda x, w, bias: linear(x.bfloat16(), w.bfloat16(), bias)),
    ):
        yield


def run_model(config: ModelConfig, sequences: int) -> None:
    """Evaluation, then forward and backward of a training step, in mixed bf16."""
    with torch.device("meta"):
        model = GPT(config, bind(KernelChoice(every="triton"), "cuda"))
        ids = torch.empty(sequences, config.seq_len, dtype=torch.int64)
    with autocast():
        with torch.no_grad():
            model(ids, ids, "sum")
        loss = model(ids, ids, "sum")
    loss.backward()


def workloads() -> Iterator[tuple[str, Callable[[], None]]]:
    """What launches kernels: a name, and a function to call."""
    for op in OPS.values():
        for shape in (*op.bench_shapes, *op.compiled_shapes) if "triton" in op.implementations else ():
            case = Case(op, shape, torch.bfloat16, META)
            yield f"{op.name} {written(shape)}", case.call(op.implementations["triton"], case.passes[-1]).run
    gpt2 = build(Config, flatten(Config, read_file("gpt2_124m.py", ROOT / "configs")))
    yield "gpt2_124m", partial(run_model, gpt2.model.resolved(gpt2.data.expected_vocab_size), gpt2.micro_batch)
    llama = ModelConfig(n_layer=16, n_head=16, n_kv_head=8, d_model=2048, seq_len=4096, tied=False, qk_norm=False)
    yield "llama_1b", partial(run_model, llama.resolved(128256), 4)


def record(card: str, sources: Iterable[tuple[str, Callable[[], None]]]) -> list[Launch]:
    """The distinct compilations that the sources ask for on a card."""
    asked, found = [], {}

    def note(kernel, key, signature, device, constants, options, attributes, warmup):
        """Stands in for compiling; Triton launches nothing when it is given no compiled kernel."""
        asked.append(((kernel, key), Launch(kernel, card, signature, constants, attributes, options)))

    device = {"get_current_target": CARDS[card].target, "get_current_device": card, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in device.items()}))
    with on_meta(), patch.object(JITFunction, "_do_compile", note):
        for name, run in sources:
            asked.clear()
            run()
            for key, launch in dict(asked).items():
                found.setdefault(key, launch).sources.append(name)
    label, times = Counter(map(str, found.values())).most_common(1)[0]
    if times > 1:
        raise ValueError(f"Launch.variant does not tell {times} compilations apart: {label}")
    return list(found.values())


def compile_launch(launch: Launch) -> Row:
    """Compile, and read from the machine code what it needs and does."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=CARDS[launch.card].target, options=launch.options.__dict__)
    seconds = time.perf_counter() - start
    facts = _read_amdgcn(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else _read_cubin(compiled)
    tiles = re.findall(r"tt\.dot .* tensor<(?:\d+x)*(\d+)x\d+xb?f16> \*", compiled.asm["ttir"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Row(launch, "", seconds, warps, shared=shared, tiles=tuple(map(int, tiles)), **facts)


def _read_cubin(compiled: triton.compiler.CompiledKernel) -> dict:
    """Resources and instructions of NVIDIA machine code. A bulk (TMA) copy counts as wide."""

    def run(tool: str, *options: str) -> str:
        command = [getattr(triton.knobs.nvidia, tool).path, *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    cache = get_cache_manager(compiled.hash)
    cubin, listing = cache.get_file(f"{compiled.name}.cubin"), cache.get_file("nvdisasm.txt")
    if listing is None:  # takes a quarter of a second, as long as compiling
        listing = cache.put(run("nvdisasm", "-c", "-ndf"), "nvdisasm.txt", binary=False)
    code = Path(listing).read_text()
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "-res-usage")))
    names = re.findall(INSTRUCTION, code, re.MULTILINE)
    matrix = [name for name in (name.partition(".")[0] for name in names) if name.endswith("MMA")]
    loads = [name for name in names if name.startswith(("LDG", "UTMALDG", "UBLKCP"))]
    stores = [name for name in names if name.startswith(("STG", "UTMASTG"))]
    spill = int(usage["STACK"]) + int(usage["LOCAL"])
    return _facts(int(usage["REG"]), spill, matrix, loads, stores, r"^U|\.(128|256)", code)


def _read_amdgcn(code: str) -> dict:
    """The same of AMD assembly. Scratch memory is a spill; scalars kept in vector registers are none."""
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", code))
    matrix = re.findall(r"^\s+v_(s?mfma)", code, re.MULTILINE)
    loads, stores = (re.findall(rf"^\s+(?:global|buffer)_{k}_(\w+)", code, re.MULTILINE) for k in ("load", "store"))
    spill = int(usage["private_segment_fixed_size"])
    return _facts(int(usage["vgpr_count"]), spill, matrix, loads, stores, "dwordx4", code)


def _facts(registers, spill, matrix, loads, stores, wide, code) -> dict:
    """Fields of a `Row`; `wide` is what the names of 128-bit accesses match."""
    return {
        "registers": registers, "spill": spill, "code": code,
        "matrix": " ".join(f"{number} {name}" for name, number in Counter(matrix).items()),
        "loads": len(loads), "wide_loads": sum(bool(re.search(wide, name)) for name in loads),
        "stores": len(stores), "wide_stores": sum(bool(re.search(wide, name)) for name in stores),
    }  # fmt: skip


def is_serialized(code: str) -> bool:
    """Whether a kernel waits for its HGMMAs one by one, as ptxas makes it where registers do not suffice.

    Products into the same registers are the steps of one `tl.dot`, to be issued back to back with a wait at their end.
    """
    chained = waiting = 0
    into, waits = None, False
    for name, operands in re.findall(rf"{INSTRUCTION}(.*)", code, re.MULTILINE):
        if name.startswith("WARPGROUP.DEPBAR"):
            waits = True
        elif name.startswith("HGMMA"):
            target = operands.split(",")[0].strip()
            chained += target == into
            waiting += target == into and waits
            into, waits = target, False
    return waiting > chained / 2


def compile_all(launches: list[Launch]) -> Iterator[Row]:
    """A row for each launch, in order. Triton releases the GIL where it takes long, so that threads serve."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for launch, future in [(launch, pool.submit(compile_launch, launch)) for launch in launches]:
            error = future.exception()
            yield Row(launch, f"{type(error).__name__}: {error}") if error else future.result()


def failures(row: Row, baseline: dict[str, int]) -> list[str]:
    """What is wrong with a compilation. `baseline` is what was `measured` when it was accepted, if it was."""
    if row.error:
        return ["does not compile"]
    found = []
    card = CARDS[row.launch.card]
    if row.shared > card.shared:
        found.append(f"wants {row.shared:,} bytes of shared memory, a block has {card.shared:,}")
    wanted = {card.matrix if rows >= card.rows else "HMMA" for rows in row.tiles}
    if wanted and wanted != {card.matrix, "HMMA"} & set(row.matrix.split()):
        kinds = " and ".join(sorted(wanted))
        found.append(f"has no {kinds} for a product of bf16 or fp16, but {row.matrix or 'no tensor core'}")
    if is_serialized(row.code):
        found.append("waits for each HGMMA before it issues the next")
    if row.spill > (was := baseline.get("spill", 0) if row.may_spill else 0):
        found.append(f"spills {row.spill:,} bytes, {was:,} are accepted")
    for kind in ("loads", "stores"):
        if (now := getattr(row, f"wide_{kind}")) < (was := baseline.get(f"wide_{kind}", 0)):
            found.append(f"has {now} 128-bit {kind}, {was} in the baseline")
    if row.registers > 1.25 * (was := baseline.get("registers", math.inf)) + 8:
        found.append(f"takes {row.registers} registers, {was} in the baseline")
    return found


def read_baseline(version: str) -> dict[str, dict[str, int]] | None:
    """What was measured of each launch when it was accepted; None for a version that has no baseline."""
    path = BASELINES / f"{version}.json"
    if not path.exists():
        return None
    return {
        f"{variant} | {card}": dict(zip(MEASURED, numbers, strict=True))
        for variant, by_card in json.loads(path.read_text()).items()
        for card, numbers in by_card.items()
    }


def write_baseline(version: str, accepted: dict[str, dict[str, int]]) -> None:
    """A line for each variant of a kernel, the numbers in the order of `MEASURED`."""
    by_variant: dict[str, dict[str, list[int]]] = {}
    for launch, measured in sorted(accepted.items()):
        variant, _, card = launch.rpartition(" | ")
        by_variant.setdefault(variant, {})[card] = [measured[name] for name in MEASURED]
    dump = partial(json.dumps, ensure_ascii=False)
    lines = (f"{dump(variant)}: {dump(by_card)}" for variant, by_card in by_variant.items())
    BASELINES.mkdir(exist_ok=True)
    (BASELINES / f"{version}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    """Compile, print and compare. Returns the exit code: 0 all is well, 1 something fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="", help="only this card, such as 90, sm_90 or gfx942")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--sass", action="store_true", help="print the machine code too")
    parser.add_argument("--update", action="store_true", help="make what is measured the baseline")
    args = parser.parse_args(argv)
    cards = [card for card in CARDS if args.arch in ("", card, card.removeprefix("sm_"))]
    if not cards:
        parser.error(f"--arch must be one of {', '.join(CARDS)}, not {args.arch}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that kernels would be interpreted: unset it to compile them")

    start, version, sources = time.perf_counter(), triton.__version__, list(workloads())
    everything = [launch for card in cards for launch in record(card, sources)]
    launches = [launch for launch in everything if args.kernel in launch.name]
    if not launches:
        names = ", ".join(sorted({launch.name for launch in everything}))
        parser.error(f"no kernel has {args.kernel!r} in its name; there are {names}")
    launches.sort(key=lambda launch: (launch.name, launch.variant, cards.index(launch.card)))
    widths = max(len(launch.name) for launch in launches), max(len(launch.variant) for launch in launches)
    print(LINE(COLUMNS[0].ljust(widths[0]), COLUMNS[1].ljust(widths[1]), *COLUMNS[2:]))
    rows = []
    for row in compile_all(launches):
        rows.append(row)
        print(row.line(widths), *[row.code] * args.sass, sep="\n", flush=True)
    print(*dict.fromkeys(row.error for row in rows if row.error), sep="\n\n")

    baseline = read_baseline(version)
    if args.update:
        others = {
            launch: measured
            for launch, measured in (baseline or {}).items()
            if args.kernel not in launch.partition(" | ")[0] or launch.rpartition(" | ")[2] not in cards
        }
        baseline = others | {str(row.launch): row.measured() for row in rows if not row.error}
        write_baseline(version, baseline)
    accepted = baseline or {}
    found = [f"{row.launch}: {text}" for row in rows for text in failures(row, accepted.get(str(row.launch), {}))]
    if baseline is None:
        print(f"There is no baseline for Triton {version}: only spills and limits count. --update adds one.")
    elif new := [str(row.launch) for row in rows if not row.error and str(row.launch) not in accepted]:
        found.append(f"{len(new)} are not in the baseline, the first is {new[0]}: --update accepts what is measured")
    kernels, seconds = len({launch.name for launch in launches}), time.perf_counter() - start
    print(f"{len(rows)} compilations of {kernels} kernels, Triton {version}, {seconds:.0f} s, {len(found)} failures")
    print(*(f"FAIL {text}" for text in found), sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
