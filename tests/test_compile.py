"""The ahead-of-time gate: the model's kernels pass it, and kernels made to fail it do.

Compiling is done by other processes, since in this one kernels may be interpreted: `python -m bench.compile` for the
model's, and this file, run as a script, for those below.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from bench.compile import is_serialized
from kernels import OPS

triton = pytest.importorskip("triton", reason="triton is not published for this system")
tl = triton.language

ROOT = Path(__file__).parents[1]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i * stride, tl.load(x_ptr + i * stride))


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every value is needed again after all have been read."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x))


@triton.jit
def _shared_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A gather keeps what it picks from, 4 bytes a value, in shared memory."""
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.gather(tl.load(x_ptr + i), BLOCK - 1 - i, 0))


@triton.jit
def _product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.dot(x, x, input_precision="ieee"))


@triton.jit
def _products_kernel(x_ptr, y_ptr, K, POWERS: tl.constexpr):
    """A sum of products, each first an exponent POWERS times."""
    rows, columns = tl.arange(0, 128), tl.arange(0, 64)
    out = tl.zeros([128, 128], dtype=tl.float32)
    for k in range(0, K, 64):
        x = tl.load(x_ptr + rows[:, None] * K + k + columns[None, :])
        product = tl.dot(x, tl.trans(x))
        for _ in tl.static_range(POWERS):
            product = tl.exp2(product)
        out += product
    tl.store(y_ptr + rows[:, None] * 128 + rows[None, :], out)


@triton.jit
def _wrong_kernel(x_ptr, y_ptr):
    tl.static_assert(False, "this kernel is wrong")


# A user's file, with an autotuner.
OWN = """
import torch, triton, triton.language as tl

@triton.autotune([triton.Config({"BLOCK": size}) for size in (256, 512)], key=["n"])
@triton.jit
def _mine(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)

class Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _mine[lambda meta: (triton.cdiv(y.numel(), meta["BLOCK"]),)](x, y, y.numel())
        return y

    @staticmethod
    def backward(ctx, dy):
        return torch.cat((dy, dy), -1)

def mine(x, activation="silu", gated=True):
    return Mine.apply(x)
"""


def compile_seeds() -> dict:
    """What the gate says of the kernels above, the tensor-core instructions it finds in the product,"""
    from bench.compile import CARDS, compile_all, failures, record
    from bench.harness import META, Case

    def compiled(kernel, card, *arguments, dtype=torch.float32, **options):
        x = torch.empty(2**16, dtype=dtype, device="meta")
        (row,) = compile_all(record(card, [("a test", lambda: kernel[(1,)](x, x, *arguments, **options))]))
        return row

    def says(row, **baseline):
        return failures(row, row.measured() | baseline)

    def block_scaled(card, bits):
        op, shape = OPS["block_scaled_linear"], {"rows": 256, "K": 256, "N": 256, "bits": bits}
        call = Case(op, shape, torch.bfloat16, META).call(op.implementations["triton"], "forward")
        (row,) = compile_all(record(card, [("a test", call.run)]))
        return row

    def lengths(card):
        """How often each kernel of attention is compiled for sequences of 129 to 192 tokens."""
        sizes = [{"B": 1, "T": t, "S": t, "H": 2, "KV": 2, "D": 64} for t in range(129, 193)]
        op = OPS["attention"]
        cases = [Case(op, size, torch.bfloat16, META) for size in sizes]
        calls = [case.call(op.implementations["triton"], "forward+backward") for case in cases]
        launches = record(card, [(str(case.shape), call.run) for case, call in zip(cases, calls, strict=True)])
        return Counter(launch.name for launch in launches)

    wide, narrow = (compiled(_copy_kernel, "sm_90", stride, BLOCK=1024) for stride in (1, 3))
    spilling = {"BLOCK": 16384, "num_warps": 1}
    spills = compiled(_spilling_kernel, "sm_90", **spilling)
    half = {"dtype": torch.bfloat16}
    products = {card: compiled(_product_kernel, card, BLOCK=128, **half) for card in CARDS}
    eight = {"dtype": torch.float8_e4m3fn, "POWERS": 0, "num_warps": 8}
    fp8 = {card: compiled(_products_kernel, card, 1024, **eight) for card, about in CARDS.items() if about.fp8}
    scaled = [block_scaled("sm_100", 8), block_scaled("sm_120", 4)]
    return {
        "as in the baseline": says(wide),
        "fewer wide accesses": says(narrow, wide_loads=wide.wide_loads, wide_stores=wide.wide_stores),
        "more registers": says(narrow, registers=narrow.registers // 2),
        "no baseline": failures(wide, {}),
        "spill": says(spills, spill=0),
        "spill, no baseline": failures(spills, {}),
        "spill, accepted": says(compiled(_spilling_kernel, "sm_80", **spilling)),
        "spill, sm_90": says(spills),
        "spill, gfx942": says(compiled(_spilling_kernel, "gfx942", waves_per_eu=4, **spilling), spill=0),
        "shared, sm_89": says(compiled(_shared_kernel, "sm_89", BLOCK=32768)),
        "shared, sm_90": says(compiled(_shared_kernel, "sm_90", BLOCK=32768)),
        "wrong": says(compiled(_wrong_kernel, "sm_90")),
        "matrix": [row.matrix for row in products.values()],
        "products": [text for row in products.values() for text in says(row)],
        "product, small": says(compiled(_product_kernel, "sm_90", BLOCK=32, **half)),
        "product, two warps": says(compiled(_product_kernel, "sm_90", BLOCK=64, num_warps=2, **half)),
        "product, fp32": says(compiled(_product_kernel, "sm_90", BLOCK=32)),
        "product, both ways": says(replace(products["sm_90"], matrix="8 HGMMA 8 HMMA")),
        "product, no way": says(replace(products["gfx942"], matrix="")),
        "fp8": [row.matrix for row in fp8.values()],
        "fp8 products": [text for row in fp8.values() for text in says(row)],
        "fp8 product, as bf16": says(replace(fp8["sm_90"], matrix="8 HGMMA")),
        "block-scaled": [row.matrix for row in scaled],
        "block-scaled products": [text for row in scaled for text in says(row)],
        "block-scaled product, as bf16": says(replace(scaled[1], matrix="8 HMMA", scales_outside=True)),
        "block-scaled product, as fp8": says(replace(scaled[0], scales_outside=True)),
        "serialized": says(compiled(_products_kernel, "sm_90", 1024, POWERS=8, maxnreg=128, **half)),
        "lengths": lengths("sm_90"),
    }


def run_gate() -> list:
    """Exit code and output of runs that narrow, update, refuse and take a user's file, with a baseline not ours."""
    from bench import compile

    runs = []

    def run(*flags):
        with StringIO() as out, redirect_stdout(out), redirect_stderr(out):
            try:
                code = compile.main([*flags])
            except SystemExit as refusal:
                code = refusal.code
            runs.append([code, out.getvalue()])

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(compile, "BASELINES", Path(folder, "baselines")),
        patch.object(compile, "OPS", {"swiglu": OPS["swiglu"]}),  # each run records the launches of all
        patch.object(compile, "run_model", lambda *_: None),
    ):
        only = ["--arch", "90", "--kernel", "swiglu_fwd"]
        run(*only)
        measured = dict.fromkeys(compile.MEASURED, 8)
        others = {"_a_kernel | w4 | sm_90": measured, "_swiglu_fwd_kernel | w4 | sm_80": measured}
        compile.write_baseline(triton.__version__, others)
        run(*only, "--update", "--sass")
        run(*only)
        run("--arch", "90", "--kernel", "swiglu")
        accepted = compile.read_baseline(triton.__version__)
        assert others.items() < accepted.items()
        for launch in accepted.keys() - others.keys():
            accepted[launch]["wide_loads"] += 1
        compile.write_baseline(triton.__version__, accepted)
        run(*only)
        run("--arch", "75")
        run("--arch", "sm_90", "--kernel", "none")
        mine = Path(folder, "mine.py")
        mine.write_text(OWN)
        run("--arch", "90", "--op", "swiglu", "--implementation", f"{mine}:mine")
        with patch.object(triton.knobs.runtime, "interpret", True):
            run(*only)
    return runs


def python(*arguments: str) -> str:
    """The output of a Python in which kernels are compiled."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seeds() -> dict:
    return json.loads(python(__file__, "compile_seeds").splitlines()[-1])  # ptxas may have had a word before


def test_the_models_kernels_pass():
    output = python("-m", "bench.compile", "--arch", "90")  # the other cards, and versions of Triton: make gate
    assert " 0 failures" in output
    elsewhere = {op.name for op in OPS.values() if op.cards and "sm_90" not in op.cards}
    written = {
        name
        for path in ROOT.glob("kernels/*.py")
        if path.stem not in elsewhere
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert written == set(re.findall(r"^\w+_kernel\b", output, re.M))


@pytest.mark.parametrize(
    ("seed", "expected"),
    {
        "as in the baseline": [],
        "fewer wide accesses": ["has 0 128-bit loads, 2 in the baseline", "has 0 128-bit stores, 2 in the baseline"],
        "more registers": [r"takes (\d+) registers, \d+ in the baseline"],
        "no baseline": [],
        "spill": [r"spills [\d,]+ bytes, 0 are accepted"],
        "spill, no baseline": [r"spills [\d,]+ bytes, 0 are accepted"],
        "spill, accepted": [],
        "spill, sm_90": [r"spills [\d,]+ bytes, 0 are accepted"],
        "spill, gfx942": [r"spills [\d,]+ bytes, 0 are accepted"],
        "shared, sm_89": ["wants 131,072 bytes of shared memory, a block has 101,376"],
        "shared, sm_90": [],
        "wrong": ["does not compile"],
        "matrix": [rf"\d+ {name}" for name in ("HMMA", "HMMA", "HGMMA", "UTCHMMA", "HMMA", "mfma")],
        "products": [],
        "product, small": [],
        "product, two warps": [r"has no HGMMA for a product of bf16 or fp16, but \d+ HMMA"],
        "product, fp32": [],
        "product, both ways": ["has no HGMMA for a product of bf16 or fp16, but 8 HGMMA 8 HMMA"],
        "fp8": [rf"\d+ {name}" for name in ("QMMA", "QGMMA", "UTCQMMA", "QMMA")],
        "fp8 products": [],
        "fp8 product, as bf16": ["has no QGMMA for a product of fp8, but 8 HGMMA"],
        "block-scaled": [r"\d+ UTCQMMA", r"\d+ OMMA"],
        "block-scaled products": [],
        "block-scaled product, as bf16": [
            "has no OMMA for a product of fp4, but 8 HMMA",
            "scales by block outside the tensor cores",
        ],
        "block-scaled product, as fp8": ["scales by block outside the tensor cores"],
        "serialized": ["waits for each wgmma before it issues the next", r"spills [\d,]+ bytes, 0 are accepted"],
        "product, no way": ["has no mfma for a product of bf16 or fp16, but no tensor core"],
    }.items(),
)
def test_seeded_kernels(seeds, seed, expected):
    assert len(seeds[seed]) == len(expected)
    assert all(map(re.fullmatch, expected, seeds[seed])), seeds[seed]


def test_products_that_wait_for_one_another():
    """Eight products into two accumulators, waited for after each, after each dot, and once."""
    step = "HGMMA.64x128x16.F32.BF16 {}, gdesc[UR8], {}, !UPT"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def serialized(names):
        lines = (wait if name == "wait" else step.format(name, name) for name in names.split())
        return is_serialized("\n".join(f"        /*0010*/    {line} ;" for line in lines))

    dots = ["R24 R24 R24 R24", "R88 R88 R88 R88"]
    assert serialized(" ".join(dots).replace(" ", " wait ") + " wait")
    assert not serialized(f"{dots[0]} wait {dots[1]} wait")
    assert not serialized(f"{dots[0]} {dots[1]} wait wait")
    assert not serialized("R24 wait R88 wait R24 wait R88 wait")  # dots of one step each
    assert not serialized("")


def test_attention_is_not_compiled_for_each_length(seeds):
    """But for those that 16 divides, and the others."""
    assert seeds["lengths"] == dict.fromkeys((f"_attention_{k}_kernel" for k in ("fwd", "bwd_dkv", "bwd_dq")), 2)


def test_baselines_and_refusals():
    expected = [
        (0, f"There is no baseline for Triton {triton.__version__}"),
        (0, r"(?s)_swiglu_fwd_kernel.*STG"),
        (0, " 0 failures"),
        (1, "FAIL 1 are not in the baseline, the first is _swiglu_bwd_kernel"),
        (1, "FAIL _swiglu_fwd_kernel | .* | sm_90: has 4 128-bit loads, 5 in the baseline"),
        (2, "--arch must be one of sm_80, sm_89, sm_90, sm_100, sm_120, gfx942, not 75"),
        (2, "no kernel has 'none' in its name; there are .*_swiglu_fwd_kernel"),
        (0, "(?s)BLOCK=256.*BLOCK=512.*2 compilations of 1 kernels"),  # each candidate of an autotuner
        (2, "TRITON_INTERPRET is set"),
    ]
    for (code, output), (expected_code, pattern) in zip(
        json.loads(python(__file__, "run_gate")), expected, strict=True
    ):
        assert code == expected_code, output
        assert re.search(pattern.replace("|", r"\|"), output), output


if __name__ == "__main__":
    print(json.dumps({"compile_seeds": compile_seeds, "run_gate": run_gate}[sys.argv[1]]()))
