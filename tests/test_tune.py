"""The search for launch parameters: what it tries, what it leaves out and says. Times are made up."""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from bench import harness, tune
from kernels import OPS
from kernels.spec import Cost, LaunchTable, Op

pytest.importorskip("triton", reason="triton is not published for this system")

ROOT = Path(__file__).parents[1]
TABLES = [pytest.param(op, table, id=f"{op.name}-{table.kernel}") for op in OPS.values() for table in op.launches]


@dataclass(frozen=True)
class Tile:
    block: int
    num_warps: int = 4


OWN, FAST, SLOW, WRONG, RAISES, DIES, DRIFTS, SPILLS = (Tile(i) for i in range(8))
SHAPES = {"rows": 2, "D": 8}, {"rows": 4, "D": 8}
LAUNCHES = LaunchTable(
    kernel="double",
    entries={"narrow": {"": OWN}, "wide": {"": OWN}},
    candidates=lambda size: (SLOW, OWN, FAST, WRONG, RAISES, DIES, DRIFTS, SPILLS),
    shapes=lambda size: SHAPES,
)
launched = []


def double(x):
    tile = LAUNCHES.pick("narrow", tune.card(x.device))
    launched.append((x.shape[0], tile))
    if tile == RAISES:
        raise RuntimeError("does not fit\nat all")
    return x * (2.1 if tile == WRONG else 2.0)


DOUBLE = Op(
    name="doubling",
    implementations={"torch": lambda x: 2 * x, "triton": double},
    inputs=lambda shape, make: {"x": make(shape["rows"], shape["D"])},
    differentiable=("x",),
    cost=lambda shape, itemsize: Cost(1, 1),
    backward_cost=lambda shape, itemsize: Cost(0, 0),
    test_shapes=SHAPES,
    bench_shapes=SHAPES,
    launches=(LAUNCHES,),
)
JOB = tune.Job(DOUBLE, LAUNCHES, "narrow")


@pytest.fixture
def fake(monkeypatch):
    """A card where a tile takes so many microseconds, and twice that at the second shape."""
    us, said = {OWN: 100.0, FAST: 80.0, SLOW: 130.0, DRIFTS: 1.0}, []

    def measure(contenders, budget):
        results = {}
        for name, make in contenders.items():
            make()[0].run()
            rows, tile = launched[-1]
            assert repr(tile) == name
            seconds = us.get(tile, 1) * (2e-6 if rows == 4 else 1e-6)
            results[name] = {"warm": [seconds, 9.0, seconds], "drift": 0.5 if tile == DRIFTS else 0.0}
            if tile == DIES and rows == 4:
                results[name] = {"failed": "died"}
        return results

    future = SimpleNamespace(result=lambda: SimpleNamespace(n_spills=6))
    compiled = {repr(SPILLS): [SimpleNamespace(n_spills=2), future]}
    monkeypatch.setattr(tune, "compile_all", lambda job, functions: dict.fromkeys(functions, ()) | compiled)
    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(tune, "say", said.append)
    with patch.dict(LAUNCHES.entries["narrow"]):
        yield SimpleNamespace(us=us, said=said)


def tuned(tmp_path, most=99, known=None):
    return tune.tune(JOB, most, tmp_path / "lock", known or {})


def test_the_fastest_is_first_and_what_is_no_good_has_a_reason(fake, tmp_path):
    row = tuned(tmp_path)
    assert row["own"] == repr(OWN) and row["pass"] == "forward" and row["shapes"] == list(SHAPES)
    ranked = [result for result in row["results"] if "ratio" in result]
    assert [result["entry"] for result in ranked] == list(map(repr, (FAST, OWN, SLOW)))
    assert [result["ratio"] for result in ranked] == pytest.approx([0.8, 1, 1.3])
    assert ranked[0]["seconds"] == pytest.approx([80e-6, 160e-6])
    failed = {result["entry"]: result["failed"] for result in row["results"][3:]}
    assert failed.keys() == set(map(repr, (WRONG, RAISES, DIES, DRIFTS, SPILLS)))
    assert failed[repr(SPILLS)] == "spills 24 bytes per thread"
    assert failed[repr(WRONG)].startswith("wrong: output 0 is off by ")
    assert failed[repr(RAISES)] == "RuntimeError: does not fit" and failed[repr(DIES)] == "died"
    assert failed[repr(DRIFTS)].startswith("other results after it was timed")
    head, first, *lines = tune.table(row).splitlines()
    assert head.endswith(": time to that of Tile(block=0, num_warps=4), us at rows=2 D=8; rows=4 D=8")
    assert first.split() == ["Tile(block=1,", "num_warps=4)", "0.800", "80.0", "160.0"] and len(lines) == 7
    card = tune.card(tune.DEVICE)
    assert tune.entries([row]).splitlines() == [
        "entries of doubling's double:",
        f"    'narrow': \"{card}\": {FAST!r},  # changed: 0.800 of the time of {OWN!r}",
    ]


def test_a_gain_within_the_noise_changes_nothing(fake, tmp_path):
    fake.us[FAST] = 99.5
    row = tuned(tmp_path)
    assert row["results"][0]["entry"] == repr(FAST) and tune.entry(row).endswith(f'": {OWN!r},')


def test_candidates_are_the_first_ones_and_not_those_known_to_fail(fake, tmp_path):
    row = tuned(tmp_path, most=2, known={repr(SLOW): "an illegal access", repr(DIES): "not of the first"})
    outcomes = {result["entry"]: result.get("failed", "timed") for result in row["results"]}
    assert outcomes == {repr(OWN): "timed", repr(FAST): "timed", repr(SLOW): "an illegal access"}
    assert fake.said[:2] == [{"trying": repr(OWN)}, {"trying": repr(FAST)}]


def test_where_the_table_itself_cannot_be_timed_the_others_are(fake, tmp_path):
    row = tuned(tmp_path, known={repr(OWN): "no card for it"})
    ranked = {result["entry"]: result["ratio"] for result in row["results"] if "ratio" in result}
    assert ranked == pytest.approx({repr(FAST): 80 / 130, repr(SLOW): 1})
    assert tune.entry(row).endswith(f"{FAST!r},  # changed: {OWN!r} could not be timed: no card for it")
    LAUNCHES.entries["narrow"].pop(tune.card(tune.DEVICE))  # the last candidate's, of a process that would have ended
    row = tuned(tmp_path, most=1, known={repr(OWN): "no card", repr(SLOW): "neither"})
    assert "none could be timed" in tune.entry(row)


def test_a_card_that_fails_ends_the_process(fake, tmp_path, monkeypatch):
    """It would fail all that follow, and is not taken for their failure. No timer is left to end this process."""
    timers = []
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
        monkeypatch.setattr(f"faulthandler.{name}", lambda *args, name=name, **options: timers.append(name))

    def synchronize():
        if launched[-1][1] == RAISES:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(harness, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match="illegal"):
        tuned(tmp_path)
    assert fake.said[-1] == {"trying": repr(RAISES)}
    assert timers[-2:] == ["dump_traceback_later", "cancel_dump_traceback_later"]


# Launched with the real thing, this file's op is gone over in processes of its own; one candidate ends them.
CHILD = """
import os, sys
sys.path.insert(0, {folder!r})
import test_tune
from bench import harness, tune

def double(x):
    if test_tune.LAUNCHES.pick("narrow", tune.card(x.device)) == test_tune.WRONG:
        print("an illegal access", file=sys.stderr, flush=True)
        os._exit(9)
    return 2 * x

test_tune.DOUBLE.implementations["triton"] = double
tune.OPS = dict(double=test_tune.DOUBLE)
tune.compile_all = lambda job, functions: dict.fromkeys(functions, ())
harness.TURNS_S = 0
sys.exit(tune.main(sys.argv[1:]))
"""


def test_a_candidate_that_ends_its_process_is_named_and_the_rest_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "CHILD", [sys.executable, "-c", CHILD.format(folder=str(Path(__file__).parent))])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows, untried = tune.tune_all([JOB], 3, tmp_path, seconds=100, workers=1)
    said = "doubling double 'narrow' Tile(block=3, num_warps=4): ended its process: an illegal access"
    assert said in capsys.readouterr().out
    assert [row["size"] for row in rows] == ["'narrow'"] and not untried
    failed = {result["entry"]: result["failed"] for result in rows[0]["results"] if "failed" in result}
    assert failed == {repr(WRONG): "an illegal access"} and len(rows[0]["results"]) == 4
    assert tune.records.read(tmp_path, "tune")[0]["card"] == tune.card(tune.DEVICE)


def test_what_there_was_no_time_for_is_said(tmp_path):
    rows, untried = tune.tune_all([JOB, JOB], 3, tmp_path, seconds=-1, workers=2)
    assert untried == ["doubling double 'narrow'"] * 2 and not rows


def test_sizes_are_tried_by_turns_those_of_the_heaviest_ops_first(monkeypatch):
    def op(name, *sizes):
        return SimpleNamespace(
            name=name, cards=(), launches=(SimpleNamespace(kernel="k", entries=dict.fromkeys(sizes)),)
        )

    ops = op("rope", 1, 2), op("rmsnorm", 1, 2), op("attention", 1, 2, 3, 4, 5)
    monkeypatch.setattr(tune, "OPS", {op.name: op for op in ops})
    names = [job.name for job in tune.jobs()]
    first = [f"attention k {i}" for i in (1, 2)] + ["rmsnorm k 1"]
    assert sorted(names[:3]) == sorted(first) and names[0] == "attention k 1"
    assert names.index("rope k 1") < names.index("attention k 5") < names.index("rope k 2")
    assert [job.name for job in tune.jobs("rms")] == ["rmsnorm k 1", "rmsnorm k 2"]


@pytest.mark.parametrize("op, table", TABLES)
def test_tables_of_the_ops_can_be_gone_over(op, table):
    """Each size has candidates of the entries' own type and shapes that the op takes."""
    assert len({other.kernel for other in op.launches}) == len(op.launches)
    for size, by_card in table.entries.items():
        entries, candidates = list(by_card.values()), list(table.candidates(size))
        assert candidates and len(set(candidates)) == len(candidates)
        assert {type(entry) for entry in (*entries, *candidates)} == {type(candidates[0])}
        assert set(candidates) - set(entries)
        assert table.shapes(size) and not (table.backward and not op.differentiable)
        for shape in table.shapes(size):
            op.inputs(shape, lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="meta"))


# Compiled for a card that is not here: a launch would fail.
COMPILE = """
from types import SimpleNamespace
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from dataclasses import dataclass
from bench import tune
from kernels.spec import LaunchTable, Op

@triton.jit
def _double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)

@dataclass(frozen=True)
class Tile:
    block: int
    num_warps: int

def double(x):
    tile, y = TABLE.pick("any", "sm_90"), torch.empty_like(x)
    _double[(triton.cdiv(x.numel(), tile.block),)](x, y, x.numel(), BLOCK=tile.block, num_warps=tile.num_warps)
    return y

TABLE = LaunchTable("double", {"any": {"": Tile(64, 1)}}, lambda size: (), lambda size: ({"n": 4096},))
OP = Op("double", {"torch": lambda x: 2 * x, "triton": double}, lambda shape, make: {"x": make(shape["n"])}, (),
        None, None, (), (), launches=(TABLE,))
device = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in device.items()}))
job = tune.Job(OP, TABLE, "any")
tiles = {"own": Tile(64, 1), "wide": Tile(1024, 8), "wrong": Tile(48, 4)}  # 48 is no power of two
tried = {name: job.variant(tile) for name, tile in tiles.items()}
(own,), (wide,), (wrong,) = tune.compile_all(job, tried).values()
for kernel in (own, wide):
    kernel = kernel.result()
    print(kernel.metadata.num_warps, kernel.module)
try:
    wrong.result()
except Exception:
    print("failed")
((again,),) = tune.compile_all(job, {"wide": tried["wide"]}).values()
print(again.metadata.num_warps)
"""


def test_candidates_are_compiled_and_not_launched(tmp_path):
    path = tmp_path / "compiled.py"  # Triton reads the source of a kernel from its file
    path.write_text(textwrap.dedent(COMPILE))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["1 None", "8 None", "failed", "8"], done.stderr


def test_without_a_gpu_it_says_what_to_use_instead(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        tune.main([])
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2 and "times a GPU" in line and re.search(r"`python -m bench\.compile`", line)
