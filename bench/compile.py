"""Compile every Triton kernel that the model launches, for cards that are not here: `python -m bench.compile`.

    python -m bench.compile --arch 90 --kernel rmsnorm_fwd --sass    one card, kernels by name, with their machine code
    python -m bench.compile --update                                 write what is measured to the baseline
    python -m bench.compile --implementation mine.py:swiglu --op swiglu    the kernels of a function of your own

Every op, forward and backward, at its bench shapes, and training steps of two models run on meta tensors with a driver
that has no device. Triton specialises each launch as it would on the card, and is stopped before it compiles. Each
distinct specialisation is then compiled.

The exit code is 1 if a kernel does not compile, needs more shared memory than the card has, multiplies in 16, 8 or 4
bits without the tensor-core instruction for its tiles or scales by block outside it, waits for each wgmma before the
next, is not in the baseline, or is worse than there: more spills, a lost 128-bit load or store, or over 1.25 times the
registers plus 8. On sm_90 kernels of heads up to 128 must not spill at all. Versions of Triton differ by 15% in
registers, so each has its own baseline in bench/baselines. With a version that has none, any spill fails and the rest
is not compared.
"""

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
from triton.runtime.autotuner import Autotuner
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.harness import META, Case, on_meta
from bench.report import written
from kernels import OPS, KernelChoice, KernelError, bind, own
from model.command_line import CONFIGS
from model.gpt import GPT, ModelConfig
from runtime.config import Parser, build, flatten, read_file
from runtime.program import program
from train import Config

BASELINES = Path(__file__).with_name("baselines")
MEASURED = ("registers", "spill", "wide_loads", "wide_stores")
# The name of an instruction in a line of nvdisasm or of AMD assembly.
INSTRUCTION = r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?\w+\s+)?([A-Za-z][\w.]*)"
MATRIX = r"^\w*MMA\b|mfma"  # of a tensor core
LOAD, STORE = r"^(LDG|UTMALDG|UBLKCP|(global|buffer)_load)", r"^(STG|UTMASTG|(global|buffer)_store)"
WIDE = r"^U|\.(128|256)|dwordx4"  # of at least 128 bits; bulk (TMA) copies count too


@dataclass(frozen=True)
class Card:
    """A target, and what one multiprocessor of it holds at once: warps, blocks, and bytes of shared memory.

    A block may have `shared` bytes; the driver takes `reserved` more. Its tensor cores multiply bf16 and fp16 with
    `matrix` instructions, or HMMA for tiles of fewer than `rows` rows, fp8 with those named `fp8`, and NVFP4 with
    `fp4`. Sources: CUDA Programming Guide, "Compute Capabilities"; PTX ISA, wgmma, tcgen05 and mma with block scaling;
    AMD CDNA 3 ISA.
    """

    target: GPUTarget
    shared: int
    warps: int
    blocks: int
    matrix: str
    rows: int = 0
    fp8: str = ""
    fp4: str = ""
    reserved: int = 1024

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Blocks that a multiprocessor holds at once, each of that many registers a thread, bytes and warps."""
        by_registers = 512 // (8 * math.ceil(max(1, registers) / 8)) * 4  # four schedulers with 512 a lane, in eights
        by_shared = (self.shared + self.reserved) // max(1, shared + self.reserved)
        return min(self.blocks, by_shared, min(self.warps, by_registers) // warps)


CARDS = {
    "sm_80": Card(GPUTarget("cuda", 80, 32), 163 * 1024, warps=64, blocks=32, matrix="HMMA"),
    "sm_89": Card(GPUTarget("cuda", 89, 32), 99 * 1024, warps=48, blocks=24, matrix="HMMA", fp8="QMMA"),
    "sm_90": Card(GPUTarget("cuda", 90, 32), 227 * 1024, warps=64, blocks=32, matrix="HGMMA", rows=64, fp8="QGMMA"),
    "sm_100": Card(
        GPUTarget("cuda", 100, 32),
        227 * 1024,
        warps=64,
        blocks=32,
        matrix="UTCHMMA",
        rows=64,
        fp8="UTCQMMA",
        fp4="UTCOMMA",
    ),
    "sm_120": Card(GPUTarget("cuda", 120, 32), 99 * 1024, warps=48, blocks=24, matrix="HMMA", fp8="QMMA", fp4="OMMA"),
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
        """Distinguishes the compilations of a kernel: `bf16 fp32:gain,rstd no:residual 16∤D BLOCK_D=512 w4`.

        The dtype of the first pointer and of those that differ from it; blocks of descriptors; arguments that are None,
        are not divisible by 16, or (AMD) take 64-bit offsets; constants that are not false; warps; unusual options.
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
    """The outcome of a compilation: an `error`, or resources and instructions. `spill` and `shared` are bytes."""

    launch: Launch
    error: str = ""
    seconds: float = 0.0
    warps: int = 1
    registers: int = 0
    spill: int = 0
    shared: int = 0
    tiles: tuple[int, ...] = ()  # rows of the products of bf16 or fp16
    has_fp8: bool = False  # products of fp8
    has_fp4: bool = False  # of e2m1
    scales_outside: bool = False  # of blocks with scales that tensor cores do not take
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
        """Whether a baseline can accept spills: except on sm_90 for heads up to 128."""
        names = list(self.launch.signature)
        head_dim = {names[path[0]]: value for path, value in self.launch.constants.items()}.get("D", 0)
        return self.launch.card != "sm_90" or head_dim > 128

    def cells(self) -> dict[str, str]:
        """The row of the printed table, by column."""
        launch, card = self.launch, CARDS[self.launch.card]
        resident = card.resident(self.registers, self.shared, self.warps)
        facts = {
            "regs": self.registers, "spill": self.spill, "shared": self.shared,
            "used": f"{self.shared / card.shared:.0%}", "blocks": resident,
            "occ": f"{resident * self.warps / card.warps:.0%}", "matrix": self.matrix or "-",
            "ld128": f"{self.wide_loads}/{self.loads}", "st128": f"{self.wide_stores}/{self.stores}",
            "sec": f"{self.seconds:.1f}",
        }  # fmt: skip
        cells = {head: f"{'-' if self.error else fact!s:>{max(6, len(head))}}" for head, fact in facts.items()}
        more = f" and {len(launch.sources) - 1} more" if launch.sources[1:] else ""
        names = {"kernel": launch.name, "variant": launch.variant, "card": f"{launch.card:6}"}
        return names | cells | {"launched by": launch.sources[0] + more}


def run_model(config: ModelConfig, sequences: int) -> None:
    """Evaluation, then forward and backward of a training step, in mixed bf16. torch has no autocast for meta tensors,
    so it is imitated."""
    linear = F.linear
    with torch.device("meta"):
        model = GPT(config, bind(KernelChoice(every="triton"), "cuda"))
        ids = torch.empty(sequences, config.seq_len, dtype=torch.int64)
    with (
        patch.object(torch, "is_autocast_enabled", lambda device: True),
        patch.object(torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        patch.object(F, "linear", lambda x, w, bias: linear(x.bfloat16(), w.bfloat16(), bias)),
    ):
        with torch.no_grad():
            model(ids, ids, "sum")
        loss = model(ids, ids, "sum")
    loss.backward()


def workloads(card: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything that launches kernels on a card: a name, and a function to call."""
    for op in OPS.values():
        if op.cards and card not in op.cards:
            continue
        for shape in (*op.bench_shapes, *op.compiled_shapes) if "triton" in op.implementations else ():
            case = Case(op, shape, torch.bfloat16, META)
            yield f"{op.name} {written(shape)}", case.call(op.implementations["triton"], case.passes[-1]).run
    gpt2 = build(Config, flatten(Config, read_file("gpt2_124m.py", CONFIGS)))
    yield "gpt2_124m", partial(run_model, gpt2.model.resolved(gpt2.data.expected_vocab_size), gpt2.micro_batch)
    llama = ModelConfig(n_layer=16, n_head=16, n_kv_head=8, d_model=2048, seq_len=4096, tied=False, qk_norm=False)
    yield "llama_1b", partial(run_model, llama.resolved(128256), 4)


def own_workloads(name: str, op_name: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What launches the kernels of a user's implementation of an op."""
    op = OPS[op_name]
    function = own.load(name, op)
    for shape in op.bench_shapes:
        case = Case(op, shape, torch.bfloat16, META)
        yield f"{op.name} {written(shape)}", case.call(function, case.passes[-1]).run


def every_candidate(tuner: Autotuner, *arguments: object, **options: object) -> None:
    """Launch each candidate of an autotuner, in place of the fastest."""
    for candidate in tuner.configs:
        tuner.fn.run(*arguments, **options | candidate.all_kwargs())


def record(card: str, sources: Iterable[tuple[str, Callable[[], None]]]) -> list[Launch]:
    """The distinct compilations that the sources ask for on a card."""
    asked, found = [], {}

    def note(kernel, key, signature, device, constants, options, attributes, warmup):
        """Replaces the compiler. Without a compiled kernel Triton launches nothing."""
        asked.append(((kernel, key), Launch(kernel, card, signature, constants, attributes, options)))

    device = {"get_current_target": CARDS[card].target, "get_current_device": card, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in device.items()}))
    with on_meta(), patch.object(JITFunction, "_do_compile", note), patch.object(Autotuner, "run", every_candidate):
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
    """Compile a launch and read its machine code."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    start = time.perf_counter()
    compiled = triton.compile(source, target=CARDS[launch.card].target, options=launch.options.__dict__)
    seconds = time.perf_counter() - start
    registers, spill, code = _read_amdgcn(compiled) if "amdgcn" in compiled.asm else _read_cubin(compiled)
    names = re.findall(INSTRUCTION, code, re.MULTILINE)
    loads, stores = ([name for name in names if re.match(pattern, name)] for pattern in (LOAD, STORE))
    wide_loads, wide_stores = (sum(bool(re.search(WIDE, name)) for name in kind) for kind in (loads, stores))
    matrix = Counter(found[0] for found in (re.search(MATRIX, name) for name in names) if found)
    ttir = compiled.asm["ttir"]
    tiles = re.findall(r"tt\.dot .* tensor<(?:\d+x)*(\d+)x\d+xb?f16> \*", ttir)
    return Row(
        launch, seconds=seconds, warps=compiled.metadata.num_warps, registers=registers, spill=spill,
        shared=compiled.metadata.shared, tiles=tuple(map(int, tiles)),
        has_fp8=re.search(r"tt\.dot .*xf8E|tt\.dot_scaled .* lhs = e[45]m", ttir) is not None,
        has_fp4=re.search(r"tt\.dot_scaled .* lhs = e2m1", ttir) is not None,
        scales_outside="tt.dot_scaled" in ttir and ".block_scale" not in compiled.asm.get("ptx", ""),
        matrix=" ".join(f"{number} {name}" for name, number in matrix.items()), loads=len(loads),
        wide_loads=wide_loads, stores=len(stores), wide_stores=wide_stores, code=code,
    )  # fmt: skip


def _read_cubin(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, str]:
    """Registers, bytes spilled and the machine code, on NVIDIA."""
    cache = get_cache_manager(compiled.hash)
    cubin, listing = cache.get_file(f"{compiled.name}.cubin"), cache.get_file("nvdisasm.txt")

    def run(tool: str, *options: str) -> str:
        command = [getattr(triton.knobs.nvidia, tool).path, *options, cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    if listing is None:  # takes a quarter of a second, as long as compiling
        listing = cache.put(run("nvdisasm", "-c", "-ndf"), "nvdisasm.txt", binary=False)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "-res-usage")))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), Path(listing).read_text()


def _read_amdgcn(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, str]:
    """The same on AMD. Scratch memory is a spill; scalars kept in vector registers are not."""
    code = compiled.asm["amdgcn"]
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", code))
    return int(usage["vgpr_count"]), int(usage["private_segment_fixed_size"]), code


def is_serialized(code: str) -> bool:
    """Whether a kernel waits for its HGMMAs or QGMMAs one by one, which ptxas inserts when registers run out.

    Products into the same registers are the steps of one `tl.dot`, to be issued back to back and then waited for.
    """
    chained = waiting = 0
    into, waits = None, False
    for name, operands in re.findall(rf"{INSTRUCTION}(.*)", code, re.MULTILINE):
        if name.startswith("WARPGROUP.DEPBAR"):
            waits = True
        elif name.startswith(("HGMMA", "QGMMA")):
            target = operands.split(",")[0].strip()
            chained += target == into
            waiting += target == into and waits
            into, waits = target, False
    return waiting > chained / 2


def compile_all(launches: list[Launch]) -> Iterator[Row]:
    """A row for each launch, in order. Threads suffice: Triton releases the GIL where it takes long."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for launch, future in [(launch, pool.submit(compile_launch, launch)) for launch in launches]:
            error = future.exception()
            yield Row(launch, f"{type(error).__name__}: {error}") if error else future.result()


def _bases(matrix: str) -> set[str]:
    """Names of instructions without their modifiers."""
    return {name.partition(".")[0] for name in matrix.split()}


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
    for format, has, instruction in (("fp8", row.has_fp8, card.fp8), ("fp4", row.has_fp4, card.fp4)):
        if has and {card.fp8, card.fp4, card.matrix, "HMMA"} & _bases(row.matrix) != {instruction}:
            found.append(f"has no {instruction} for a product of {format}, but {row.matrix or 'no tensor core'}")
    if row.scales_outside:
        found.append("scales by block outside the tensor cores")
    if is_serialized(row.code):
        found.append("waits for each wgmma before it issues the next")
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


@program
def main(argv: list[str] | None = None) -> int:
    """Compile, print and compare. Returns the exit code: 0 all is well, 1 something fails."""
    parser = Parser(prog="python -m bench.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="", help="only this card, such as 90, sm_90 or gfx942")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--implementation", default="", help="only a function of your own: path.py:function")
    parser.add_argument("--op", choices=OPS, help="the op that it implements")
    parser.add_argument("--sass", action="store_true", help="print the machine code too")
    parser.add_argument("--update", action="store_true", help="make what is measured the baseline")
    args = parser.parse_args(argv)
    cards = [card for card in CARDS if args.arch in ("", card, card.removeprefix("sm_"))]
    if not cards:
        parser.error(f"--arch must be one of {', '.join(CARDS)}, not {args.arch}")
    if bool(args.implementation) != bool(args.op):
        parser.error("--implementation and --op, the op that it implements, go together")
    if args.implementation and args.update:
        parser.error("--update is for the kernels of this repository, not for --implementation")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that kernels would be interpreted: unset it to compile them")

    start, version = time.perf_counter(), triton.__version__
    try:
        own_sources = list(own_workloads(args.implementation, args.op)) if args.implementation else None
    except KernelError as error:
        parser.error(str(error))
    everything = [launch for card in cards for launch in record(card, own_sources or workloads(card))]
    launches = [launch for launch in everything if args.kernel in launch.name]
    if not launches:
        names = ", ".join(sorted({launch.name for launch in everything})) or "none"
        parser.error(f"no kernel has {args.kernel!r} in its name; there are {names}")
    launches.sort(key=lambda launch: (launch.name, launch.variant, cards.index(launch.card)))
    kernel, variant = (max(map(len, texts)) for texts in zip(*((x.name, x.variant) for x in launches), strict=True))
    rows = []
    for row in compile_all(launches):
        cells = row.cells()
        cells |= {"kernel": cells["kernel"].ljust(kernel), "variant": cells["variant"].ljust(variant)}
        if not rows:
            print(*(head.ljust(len(text)) for head, text in cells.items()))
        rows.append(row)
        print(" ".join(cells.values()), *[row.code] * args.sass, sep="\n", flush=True)
    print(*dict.fromkeys(row.error for row in rows if row.error), sep="\n\n")

    baseline = None if args.implementation else read_baseline(version)
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
    if args.implementation:
        print("A kernel of your own has no baseline: only spills and limits count.")
    elif baseline is None:
        print(f"There is no baseline for Triton {version}: only spills and limits count. --update adds one.")
    elif new := [str(row.launch) for row in rows if not row.error and str(row.launch) not in accepted]:
        found.append(f"{len(new)} are not in the baseline, the first is {new[0]}: --update accepts what is measured")
    kernels, seconds = len({launch.name for launch in launches}), time.perf_counter() - start
    print(f"{len(rows)} compilations of {kernels} kernels, Triton {version}, {seconds:.0f} s, {len(found)} failures")
    print(*(f"FAIL {text}" for text in found), sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
