"""The search for attention's tiles: what it tries, what it leaves out and says. Times are made up."""

import os
import subprocess
import sys
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import tune
from kernels.attention import CONFIGS
from kernels.launch import card

pytest.importorskip("triton", reason="triton is not published for this system")

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H100 = 227 * 1024
OWN, FAST, SLOW, WRONG, RAISES, SPILLS, DIES = (
    (64, 128, 4, 2), (128, 128, 8, 2), (32, 64, 4, 1), (16, 16, 4, 1), (16, 32, 4, 1), (16, 64, 4, 1), (16, 128, 4, 1),
)  # fmt: skip


@pytest.mark.parametrize("kernel, width", CONFIGS)
def test_candidates(kernel, width):
    start = next(iter(CONFIGS[kernel, width].values()))
    every = tune.candidates(kernel, width, start, H100, 1000)
    assert every[0] == start and len(set(every)) == len(every) > 8
    assert tune.candidates(kernel, width, start, H100, 5) == every[:5]
    assert kernel != "one pass" or {keys for _, keys, _, _ in every} == {128}
    for queries, keys, warps, stages in every:
        least = queries * keys + width * (queries if kernel in ("fwd", "dq") else 2 * keys)  # of scores and of sums
        assert least <= 255 * 32 * warps
        two_tiles = 4 * width * (keys if kernel in ("fwd", "dq") else queries)
        assert two_tiles * max(1, stages - 1) <= H100
    assert set(tune.candidates(kernel, width, start, 64 * 1024, 1000)) < set(every)
    assert tune.candidates(kernel, width, start, 0, 1000) == [start]


def test_a_stage_is_not_loaded_ahead():
    """Three of four are 192 KiB here, all four would be 256."""
    assert (64, 64, 8, 4) in tune.candidates("fwd", 256, (64, 32, 8, 2), H100, 1000)


@pytest.mark.parametrize("kernel", ["fwd", "dkv", "one pass", "dq"])
def test_tiles_in_the_table_are_launched_and_agree(kernel, monkeypatch):
    """Forward and backward, as they are timed; with tiles that are no power of two they are launched too, and fail."""
    t = 32 if kernel == "one pass" else 144
    # On a GPU one pass wants as many heads as there are multiprocessors.
    monkeypatch.setattr(tune, "TOKENS", t if DEVICE.type == "cpu" else 512 * t)
    monkeypatch.setattr(tune, "HEADS", {64: 1})
    run, table = tune.launcher(kernel, 64, t, DEVICE), CONFIGS[kernel, 64]
    right, wrong = (16, 128 if kernel == "one pass" else 32, 4, 1), (24, 24, 4, 1)
    calls = {None: run} | {tiles: tune.patch.dict(table, {card(DEVICE): tiles})(run) for tiles in (right, wrong)}
    results = tune.check(calls, defaultdict(list), 64)
    assert len(run()) == (2 if kernel == "fwd" else 4)
    assert results[right] == {"seconds": []}
    assert results[wrong]["failed"]


def future_of(spills):
    return SimpleNamespace(result=lambda: SimpleNamespace(n_spills=spills))


@pytest.fixture
def fake(monkeypatch):
    """A card whose forward takes `us` by tiles, twice that at T 4096, and where some tiles are no good."""
    us = {OWN: 100.0, FAST: 80.0, SLOW: 130.0, SPILLS: 1.0, WRONG: 1.0}
    launched, table = [], CONFIGS["fwd", 64]

    def launcher(kernel, width, t, device):
        def run():
            tiles = table.get(card(device))
            launched.append((t, tiles))
            if tiles == RAISES:
                raise RuntimeError("does not fit\nat all")
            return (torch.ones(4) * (1.1 if tiles == WRONG else 1.001),)

        return run

    def measure(contenders, budget):
        results = {}
        for tiles, make in contenders.items():
            (call,) = make()
            call()
            t, seen = launched[-1]
            assert seen == tiles
            seconds = us.get(tiles, 1) * (2e-6 if t == 4096 else 1e-6)
            results[tiles] = {"warm": [seconds, 9.0, seconds]}
            if tiles == DIES and t == 4096:
                results[tiles] = {"failed": "died"}
        return results

    kernels = defaultdict(list, {SPILLS: [future_of(spills=0), future_of(spills=3)]})
    monkeypatch.setitem(table, card(DEVICE), OWN)
    monkeypatch.setattr(tune, "candidates", lambda *_: [OWN, SLOW, FAST, WRONG, RAISES, SPILLS, DIES])
    for name, value in {"launcher": launcher, "measure": measure, "compile_all": lambda calls: kernels}.items():
        monkeypatch.setattr(tune, name, value)
    return SimpleNamespace(us=us, launched=launched)


def test_the_fastest_is_first_and_what_is_no_good_has_a_reason(fake):
    before = deepcopy(CONFIGS)
    row = tune.tune("fwd", 64, 99, DEVICE, H100)
    assert before == CONFIGS  # though one raised
    assert row["own"] == OWN and row["lengths"] == (1024, 4096)
    ranked = [result for result in row["results"] if "ratio" in result]
    assert [result["tiles"] for result in ranked] == [FAST, OWN, SLOW]
    assert [result["ratio"] for result in ranked] == pytest.approx([0.8, 1, 1.3])
    assert ranked[0]["seconds"] == pytest.approx([80e-6, 160e-6])
    failed = {result["tiles"]: result["failed"] for result in row["results"][3:]}
    assert failed == {
        WRONG: "9.9e-02 from the table's results, spills 0 bytes a thread",
        RAISES: "RuntimeError: does not fit",
        SPILLS: "0.0e+00 from the table's results, spills 12 bytes a thread",
        DIES: "died",
    }
    assert tune.table(row).splitlines() == [
        f"fwd 64, {card(DEVICE)}: time to that of (64, 128, 4, 2), us at T (1024, 4096)",
        "  (128, 128, 8, 2)   0.800       80.0      160.0",
        "  (64, 128, 4, 2)    1.000      100.0      200.0",
        "  (32, 64, 4, 1)     1.300      130.0      260.0",
        *(f"  {tiles!s:18s} {why}" for tiles, why in failed.items()),
    ]
    name = f'("fwd", 64): ... "{card(DEVICE)}"'
    assert tune.entry(row) == f"{name}: (128, 128, 8, 2),  # changed: 0.800 of the time of (64, 128, 4, 2)"


def test_a_gain_within_the_noise_changes_nothing(fake):
    fake.us[FAST] = 99.5
    row = tune.tune("fwd", 64, 99, DEVICE, H100)
    assert row["results"][0]["tiles"] == FAST
    assert tune.entry(row) == f'("fwd", 64): ... "{card(DEVICE)}": (64, 128, 4, 2),'


def test_wide_heads_may_spill():
    calls = {OWN: lambda: (torch.ones(4),), SPILLS: lambda: (torch.ones(4),)}
    compiled = {SPILLS: [future_of(spills=1)]}
    assert "failed" in tune.check(calls, compiled, 128)[SPILLS]
    assert "failed" not in tune.check(calls, compiled, 256)[SPILLS]


def test_it_stops_when_the_table_itself_cannot_be_timed(fake, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda contenders, budget: {own: {"failed": "no card"} for own in contenders})
    with pytest.raises(RuntimeError, match=r"fwd 64: the table's own \(64, 128, 4, 2\) cannot be timed: no card"):
        tune.tune("fwd", 64, 99, DEVICE, H100)


def test_the_lines_for_the_table_and_what_there_was_no_time_for(fake, monkeypatch, capsys, tmp_path):
    limits = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": H100})
    driver = SimpleNamespace(active=SimpleNamespace(utils=limits))
    monkeypatch.setattr(tune, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    row, rows, clock = tune.tune("fwd", 64, 99, DEVICE, H100), [], iter((0, 0, 9, 21))
    monkeypatch.setattr(tune, "tune", lambda kernel, width, *_: row | {"kernel": kernel, "width": width})
    monkeypatch.setattr(tune.records, "append", lambda folder, name, row: rows.append((folder, name, row)))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    assert tune.main(["--kernel=dq", "--seconds=20", f"--results={tmp_path}"]) == 0
    assert [(folder, name, row["width"]) for folder, name, row in rows] == [
        (tmp_path, "tune", 64),
        (tmp_path, "tune", 128),
    ]
    *_, heading, first, second, left = capsys.readouterr().out.splitlines()
    assert heading == "CONFIGS of kernels/attention.py:"
    assert first == "    " + tune.entry(rows[0][2]) and second == "    " + tune.entry(rows[1][2])
    assert left == "not tried in 20 s: dq 256"


COMPILE = """
from types import SimpleNamespace
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from bench import tune

device = {"get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "get_current_stream": 0}
driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in device.items()}))
run, table = tune.launcher("fwd", 64, 1024, torch.device("meta")), tune.CONFIGS["fwd", 64]
tried = (64, 32, 4, 1), (64, 32, 8, 2), (48, 32, 4, 1)
calls = {tiles: tune.patch.dict(table, {"sm_90": tiles})(run) for tiles in tried}
*right, wrong = tune.compile_all(calls).values()
for (kernel,) in right:
    kernel = kernel.result()
    print(kernel.metadata.num_warps, kernel.metadata.num_stages, kernel.module)
try:
    wrong[0].result()
except Exception:
    print("failed")
"""


def test_candidates_are_compiled_and_not_launched():
    """For a card that is not here: a launch would fail."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["4 1 None", "8 2 None", "failed"], done.stderr


def test_without_a_gpu_it_says_what_to_use_instead():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "times a GPU" in line and "`python -m bench.compile --kernel attention`" in line
