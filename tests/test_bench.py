"""The benches' own logic: what is checked before it is timed, what is counted, what the tables say; no timing."""

import gc
import json
import math
import re
import subprocess
import sys
import time
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import interpreted

import kernels
import train
from bench import bench_kernels, conftest, gpu, harness, processes, records, report, rivals, steps, timing
from bench.harness import Case, bytes_moved, shrink
from bench.rivals import RIVALS
from bench.timing import Call, relative_error
from kernels import OPS
from kernels.attention import attention_torch
from kernels.spec import Cost, Op

ROOT = Path(__file__).parents[1]
BLOCKS = {"B": 1, "T": 8, "S": 8, "H": 1, "KV": 1, "D": 8}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_wrong_function_and_one_that_raises_are_not_timed():
    op = OPS["swiglu"]
    right = op.implementations["torch"]
    functions = {
        "right": right, "a hundredth off": lambda x: 1.01 * right(x), "NaN": lambda x: right(x) + math.nan,
        "wrong gradient": lambda x: right(x.detach()) + (x - x.detach()).chunk(2, -1)[0], "raises": torch.mm,
    }  # fmt: skip
    results = harness.check(op, {"rows": 5, "F": 64}, functions, "forward+backward")
    assert "failed" not in results.pop("right")
    assert results.pop("raises")["failed"].startswith("TypeError: ")
    assert len(results) == 3 and all(result["failed"].startswith("wrong") for result in results.values())


def test_a_contender_that_raises_does_not_stop_the_rest():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    if not torch.cuda.is_available():
        contenders = {"fails": lambda: [Call(fails)], "cannot be made": fails, "works": lambda: [Call(tuple)]}
        results = timing.measure(contenders, budget=0)
        assert results["fails"] == results["cannot be made"] == {"failed": "RuntimeError: no such kernel"}
        assert len(results["works"]["warm"]) == 3 and min(results["works"]["warm"]) > 0


def test_repeated_calls_go_round_the_inputs():
    made = []
    last = timing.repeated([Call(lambda i=i: made.append(i) or i) for i in range(3)], 7)()
    assert made == [0, 1, 2, 0, 1, 2, 0] and last == 0


class FakeGraph:
    """Replays nothing, and holds on to nothing: what a CUDA graph does to the memory that it was captured with."""

    def replay(self):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """Timing as on a GPU, whose every run takes a millisecond."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(timing, "stopwatch", lambda run: (run() and 1e-3) or 1e-3)
    monkeypatch.setattr(timing, "synchronizes", lambda call: False)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 0)


def test_what_a_graph_touches_lives_as_long_as_it_is_replayed(graphs, monkeypatch):
    """Inputs of a contender that are freed when the next one's are made would be read by its replays all the same."""
    inputs = []

    def make():
        calls = []
        for _ in range(2):
            x = torch.ones(3)
            inputs.append(weakref.ref(x))
            calls.append(Call(lambda x=x: (x + 1,)))
        return calls

    alive = []

    def stopwatch(run):
        if isinstance(run, timing.Captured) and not alive:  # both are ready, and timing begins
            gc.collect()
            alive.extend(ref() is not None for ref in inputs)
        return 1e-3

    monkeypatch.setattr(timing, "stopwatch", stopwatch)
    results = timing.measure({"first": make, "second": make}, budget=0)
    assert alive == [True] * 4
    gc.collect()
    assert all(ref() is None for ref in inputs)
    assert {"warm", "cold", "host", "memory"} < results["first"].keys() and results["first"]["drift"] == 0


def test_results_are_compared_after_timing_with_those_before(monkeypatch):
    x, steady = torch.ones(4), torch.ones(4)
    monkeypatch.setattr(timing, "stopwatch", lambda run: run() and timing.SAMPLE_S)  # one call a sample

    def grows():
        x.add_(1)
        return (x,)

    results = timing.measure({
        "puts back": lambda: [Call(grows, x.fill_)], "does not": lambda: [Call(grows)],
        "changed by another": lambda: [Call(lambda: (steady,))],
        "another": lambda: [Call(lambda: (steady.add_(1),))],
    }, budget=0)  # fmt: skip
    assert results["puts back"]["drift"] == 0
    assert all(not results[name]["drift"] <= 1e-3 for name in ("does not", "changed by another", "another"))


def test_what_is_not_believed():
    case = Case(OPS["swiglu"], {"rows": 2**16, "F": 2048}, torch.bfloat16, torch.device("cpu"))
    card = "NVIDIA H100 80GB HBM3"
    forward = case.least_seconds("forward", card)
    assert forward == pytest.approx(3 * 2 * 2**16 * 2048 / 3.35e12)
    assert case.least_seconds("forward+backward", card) == pytest.approx(forward * 5 / 3)  # of the backward
    wide = Case(OPS["linear_cross_entropy"], {"N": 16384, "D": 768, "V": 50304}, torch.bfloat16, torch.device("cpu"))
    products = wide.least_seconds("forward+backward", card)
    assert products == wide.cost("forward+backward").flops / 989e12
    assert case.least_seconds("forward", "a card of tomorrow") == 0

    measured = {"warm": [0.9], "cold": [1.0, 9.0, 1.0], "drift": 0.0}
    assert harness.doubt(measured, 1.0) is None
    assert (
        harness.doubt(measured, 1.01) == "impossible: 1,000,000.0 us, where the card's rated speeds allow 1,010,000.0"
    )
    for drift in (0.5, math.nan):
        assert harness.doubt(measured | {"drift": drift}, 0).startswith("other results after it was timed")


def decay_torch(params, lr, decay=0.5):
    for p in params:
        p.mul_(1 - lr * decay)


DECAY = Op(
    name="decay",
    implementations={"torch": decay_torch, "triton": decay_torch, "auto": decay_torch},
    inputs=lambda shape, make: {"params": [make(shape["n"]) for _ in range(shape["N"])], "lr": torch.tensor(0.5)},
    differentiable=(),
    cost=lambda shape, itemsize: Cost(2 * itemsize * shape["N"] * shape["n"], 0),
    backward_cost=lambda shape, itemsize: Cost(0, 0),
    test_shapes=({"N": 1, "n": 3}, {"N": 2, "n": 5}),
    bench_shapes=({"N": 2, "n": 5},),
    mutates=("params",),
)


def test_an_op_that_writes_to_its_arguments():
    case = Case(DECAY, DECAY.bench_shapes[0], torch.float32, torch.device("cpu"))
    assert case.passes == ("forward",)
    call = case.call(decay_torch, "forward")
    first = tuple(x.clone() for x in call.run())
    assert len(first) == 2 and relative_error(call.run(), first) > 0.1
    call.restore(0)
    assert relative_error(call.run(), first) == 0
    functions = {"right": decay_torch, "wrong": lambda params, lr: decay_torch(params, 1.01 * lr)}
    results = harness.check(DECAY, DECAY.bench_shapes[0], functions, "forward")
    assert "failed" not in results["right"] and results["wrong"]["failed"].startswith("wrong")
    row, samples = harness.contest(DECAY, DECAY.bench_shapes[0], "forward", {"right": decay_torch}, {})
    assert "failed" not in row["results"]["right"] and samples["right"]


def test_adamw_is_checked():
    op, functions = OPS["adamw"], {}
    for name, scale in (("torch", 1), ("other", 1.001)):
        functions[name] = lambda lr, scale=scale, **inputs: op.implementations["torch"](lr=scale * lr, **inputs)
    results = harness.check(op, {"N": 2, "n": 100}, functions, "forward")
    assert results["torch"]["error"] < 1 and results["other"]["failed"].startswith("wrong: params")


def test_a_choice_between_implementations_is_no_contender():
    found, absent = harness.contenders(DECAY)
    assert {"torch", "torch.compile"} <= found.keys() and "auto" not in found
    assert harness.GPU or absent == {"triton": "there is no GPU"}


@pytest.mark.parametrize(
    "op",
    [op for op in OPS.values() if any(name.startswith("F.") for name in RIVALS.get(op.name, ()))],
    ids=lambda op: op.name,
)
def test_torchs_own_functions_are_the_ops(op):
    ours = {name for name in RIVALS[op.name] if name.startswith("F.")}
    found = {name: RIVALS[op.name][name]() for name in ours if hasattr(torch.nn.functional, name.removeprefix("F."))}
    for result in harness.check(op, op.test_shapes[1], found, "forward+backward").values():
        assert "failed" not in result, result


def test_rivals_are_of_ops_that_there_are():
    assert RIVALS.keys() <= OPS.keys()


def test_rivals_are_had_where_they_are_installed(monkeypatch):
    def apply(x, residual, gain, eps, *options):
        stream = x + residual
        return torch.nn.functional.rms_norm(stream, gain.shape, gain, eps), stream

    liger = SimpleNamespace(LigerFusedAddRMSNormFunction=SimpleNamespace(apply=apply))
    monkeypatch.setattr(harness, "GPU", True)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", liger)
    monkeypatch.setitem(sys.modules, "quack", None)
    op = OPS["rmsnorm"]
    found, absent = harness.contenders(op)
    assert next(iter(found)) == "triton" and {"torch", "F.rms_norm", "Liger"} < found.keys() and "auto" not in found
    assert absent.keys() == {"QuACK"} and "quack" in absent["QuACK"]
    (result,) = harness.check(op, op.test_shapes[1], {"Liger": found["Liger"]}, "forward+backward").values()
    assert "failed" not in result


def flash_attn():
    """The interface of flash_attn, as far as a rival takes it; the packed one gives the log-sum-exp too."""

    def dense(q, k, v, causal, window_size):
        left, right = window_size
        assert causal and right <= 0
        return attention_torch(q, k, v, window=left + 1)

    def packed(q, k, v, begins, key_begins, longest, longest_keys, **options):
        sizes = begins.diff()
        assert begins.dtype == torch.int32 and begins is key_begins and longest == longest_keys == sizes.max()
        documents = zip(*(x[None].split(sizes.tolist(), 1) for x in (q, k, v)), strict=True)
        return torch.cat([dense(*document, **options)[0] for document in documents]), None

    return SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=packed)


@pytest.mark.parametrize("mask", [{}, {"W": 5}, {"L": 8}, {"L": 9, "W": 5}], ids=str)
def test_attentions_rivals_attend(mask, monkeypatch):
    shape = {"B": 2, "T": 32, "S": 32, "H": 4, "KV": 2, "D": 16} | mask
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, flash_attn())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = {name: make() for name, make in RIVALS["attention"].items() if not name.startswith("SDPA")}
    flex = found.pop("FlexAttention")  # which takes no gradients on a CPU
    found["SDPA flash"] = rivals.sdpa("MATH")
    results = harness.check(OPS["attention"], shape, found, "forward+backward")
    without = {"FlexAttention": lambda q, k, v, **options: flex(q.detach(), k.detach(), v.detach(), **options)}
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        results |= harness.check(OPS["attention"], shape, without, "forward")
    assert len(results) == 4
    for result in results.values():
        assert "failed" not in result, result


def test_a_block_mask_is_made_once(monkeypatch):
    from torch.nn.attention import flex_attention as module

    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda q, k, v, block_mask, enable_gqa: q)
    monkeypatch.setattr(module, "create_block_mask", lambda *sizes, **_: made.append(sizes))
    flex, case = rivals.flex_attention(), Case(OPS["attention"], BLOCKS | {"L": 4}, torch.float32, torch.device("cpu"))
    inputs = [case.draw()[0] for _ in range(2)]
    for i in (0, 1, 0, 1):
        flex(**inputs[i])
    assert len(made) == 2


def test_the_grids_of_attention():
    short, everything = map(bench_kernels.attention_shapes, ("short", "all"))
    assert everything[: len(short)] == short
    assert len({str(shape) for shape in everything}) == len(everything)
    for shape in everything:
        assert shape["B"] * shape["T"] == 16384 and shape["T"] == shape["S"] > shape.get("W", 0)
        assert shape["T"] % shape.get("L", 1) == 0 and OPS["attention"].cost(shape, 2).flops > 0
    assert {shape["W"] for shape in everything if shape["D"] == 64 and "W" in shape} == {64 << i for i in range(6)}


def test_a_case_is_skipped_when_the_time_is_up():
    item = SimpleNamespace(config=SimpleNamespace(getoption={"within": 0.0}.get))
    with pytest.raises(pytest.skip.Exception, match="the 0 s of --within were over"):
        conftest.pytest_runtest_setup(item)
    item.config.getoption = {"within": None}.get
    conftest.pytest_runtest_setup(item)


def test_shapes_shrink_until_they_fit():
    rmsnorm, attention, adamw = (OPS[name] for name in ("rmsnorm", "attention", "adamw"))
    assert shrink(rmsnorm, {"rows": 10, "D": 8}, 4, max_bytes=700) == {"rows": 5, "D": 8}
    assert shrink(rmsnorm, {"rows": 10, "D": 8}, 4, max_bytes=0) == {"rows": 1, "D": 8}  # no fewer than one
    assert shrink(adamw, {"N": 3, "n": 2**30}, 4, max_bytes=2**26) == {"N": 1, "n": 2**30}
    window = {"B": 4, "T": 64, "S": 64, "H": 4, "KV": 2, "D": 8, "W": 9}
    least = attention.cost(window | {"B": 1, "T": 16, "S": 16}, 4).flops
    assert shrink(attention, window, 4, math.inf, max_flops=least) == window | {"B": 1, "T": 16, "S": 16}


def test_results_are_checked_at_fewer_rows_and_heads_and_no_other_length():
    attention, loss = OPS["attention"], OPS["cross_entropy"]

    def checked(op, shape):
        return shrink(op, shape, 2, max_bytes=2**26, max_flops=5e10, same_length=True)

    short = {"B": 128, "T": 128, "S": 128, "H": 12, "KV": 12, "D": 64}
    assert checked(attention, short) == short | {"B": 64}
    longer = short | {"B": 4, "T": 4096, "S": 4096, "H": 32, "KV": 8, "D": 128}
    assert checked(attention, longer) == longer | {"B": 1, "H": 4, "KV": 1}
    assert checked(loss, {"N": 8192, "V": 128256}) == {"N": 256, "V": 128256}


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_shapes_for_a_cpu_take_little_time(op, monkeypatch):
    monkeypatch.setattr(bench_kernels, "GPU", False)
    (shape,) = bench_kernels.timed_shapes(op, "short")
    assert op.cost(shape, 4).flops <= 2e9 and op.cost(shape, 4).bytes <= 2**28


def test_a_case_draws_the_same_again_and_costs_both_passes():
    op, shape = OPS["rmsnorm"], {"rows": 3, "D": 8}
    case = Case(op, shape, torch.float32, torch.device("cpu"))
    results = [case.call(op.implementations["torch"], "forward+backward").run() for _ in range(2)]
    assert len(results[0]) == 2 + len(op.differentiable) and relative_error(results[0], results[1]) == 0
    forward, backward = op.cost(shape, 4), op.backward_cost(shape, 4)
    assert case.cost("forward+backward").bytes == forward.bytes + backward.bytes


@interpreted
@pytest.mark.parametrize(
    "name, most", {"rmsnorm": 1.26, "rope": 1.05, "swiglu": 1, "cross_entropy": 1.05, "adamw": 1.05}.items()
)
def test_kernels_move_little_more_than_they_must(name, most):
    """Every program of rmsnorm loads the gain again, which caches serve."""
    ratios = bytes_moved(OPS[name], shrink(OPS[name], OPS[name].bench_shapes[0], 2, max_bytes=2**19))
    assert len(ratios) == 1 + bool(OPS[name].differentiable) and all(1 <= ratio <= most for ratio in ratios.values())


@interpreted
def test_an_op_is_checked_and_timed_by_one_command(tmp_path):
    """All but the timing of what torch.compile compiles, which takes long."""
    command = [sys.executable, "-m", "bench.op", "swiglu", "-k", "interpreted", f"--results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert re.search(
        r"rows=5 F=127 float32, error over what rounding explains: torch 0\.\d+, triton 0\.\d+", done.stdout
    )
    assert "bytes loaded and stored over the least: forward 1.000, forward+backward 1.000" in done.stdout


def test_results_are_tracked_only_if_asked():
    assert records.RESULTS == ROOT / "out/bench" and records.TRACKED == ROOT / "bench/results"
    assert "/out/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_process_is_read_limited_and_killed_with_its_children(capsys):
    python = [sys.executable, "-c"]
    ended = processes.run([*python, "import os; print(os.environ['A'])"], 300, echo=True, A='{"a": 7}')
    assert (ended.status, ended.failure, ended.lines, ended.said) == ("passed", None, ['{"a": 7}'], {"a": 7})
    assert capsys.readouterr().out == '{"a": 7}\n'
    ended = processes.run([*python, "import sys; print('half'); sys.exit('no such thing')"])
    assert (ended.status, ended.failure, ended.lines) == ("failed (1)", "no such thing", ["half"])
    begin = time.monotonic()
    ended = processes.run(["sh", "-c", "sleep 300 & sleep 300"], 0.2)  # its child holds the pipe too
    assert ended.status == ended.failure == "over 0.2 s" and time.monotonic() - begin < 60


def test_a_failing_part_does_not_stop_the_next_and_the_exit_code_says_so(tmp_path, capfd):
    python = [sys.executable, "-c"]
    parts = [
        ("exits", 300, [[*python, "pass"], [*python, "print('FAILED a'); print('half'); raise SystemExit(3)"]]),
        ("hangs", 0.2, [[*python, "import time; time.sleep(300)"]]),
        ("works", 300, [[*python, "print('done')"]]),
    ]
    assert gpu.run_all(parts, tmp_path) == 1
    rows = records.read(tmp_path, "gpu")
    assert [(row["part"], row["status"]) for row in rows] == [
        ("exits", "failed (3)"), ("hangs", "over 0.2 s"), ("works", "passed"),
    ]  # fmt: skip
    assert rows[0]["last"] == "half" and rows[0]["failures"] == ["FAILED a"] and all("commit" in row for row in rows)
    assert "\ndone" in capfd.readouterr().out
    assert gpu.run_all(parts[2:], tmp_path) == 0


def test_the_parts_fit_in_five_minutes_and_end_by_themselves(tmp_path):
    parts = gpu.parts(tmp_path, 16)
    assert [name for name, *_ in parts] == ["tests", "steps", "kernels", "attention", "tune"]
    assert sum(limit for _, limit, _ in parts) <= 300 and len(parts[0][2]) == 16
    assert all((ROOT / path).exists() for path in gpu.TESTS)
    for _, limit, (command,) in parts[1:]:  # those that are timed, a case or so before they are killed
        (seconds,) = (float(flag.partition("=")[2]) for flag in command if flag.startswith(("--within=", "--seconds=")))
        assert seconds <= limit - 5 and f"--results={tmp_path}" in command


def test_parts_are_chosen_by_name(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_all", lambda parts, results: ran.extend(name for name, *_ in parts) or 0)
    assert gpu.main(["tune", "steps"]) == 0 and ran == ["steps", "tune"]
    assert gpu.main(["tunes"]) == 2
    assert "no part is called tunes: there are tests, steps" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) != 0 and "no GPU" in capsys.readouterr().err


def test_shards_run_each_test_once():
    items, config = list(range(7)), SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    seen = []
    for i in range(3):
        config.getoption, own = lambda _, i=i: f"{i}/3", list(items)
        gpu.pytest_collection_modifyitems(config, own)
        seen += own
    assert sorted(seen) == items and len(seen) == 7


@pytest.mark.parametrize("shape", steps.SHAPES)
def test_steps_are_trained_with_knobs_that_exist(shape, tmp_path):
    (tmp_path / "defaults.py").touch()
    for variant in (steps.VARIANTS | steps.LOW).values():
        knobs = steps.SHAPES[shape] | variant | {"config": tmp_path / "defaults.py", "steps": 1, "out": tmp_path}
        config, *_ = train.configure([f"--{key}={value}" for key, value in knobs.items()])
        assert config.model.resolved(256).vocab_size == steps.SHAPES[shape]["model.vocab_size"]


def test_a_step_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "SAMPLE_S", 1e-3)
    knobs = {"model.n_layer": 1, "model.n_head": 2, "model.d_model": 32, "model.seq_len": 16, "batch_size": 2}
    knobs |= {"model.vocab_size": 300, "device": "cpu", "precision": "fp32"}
    row = steps.measure(steps.trainer_of(knobs | steps.VARIANTS["eager"], tmp_path), tmp_path / "lock")
    assert row["batch"] == 2 and row["seq_len"] == 16 and row["tok_s"] == pytest.approx(32 / row["ms"] * 1e3)
    assert row["loss"] < row["first_loss"] and row["mfu"] is None and row["kernels"] == []
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    "capability, fp8, nvfp4", [((8, 0), False, False), ((9, 0), True, False), ((10, 0), True, True)]
)
def test_steps_in_low_precision_are_timed_where_a_card_has_it(monkeypatch, capability, fp8, nvfp4):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "card", lambda device: "sm_{}{}".format(*capability))
    assert steps.is_due("124M", "fp8") == steps.is_due("M4", "fp8, triton") == fp8
    assert steps.is_due("124M", "nvfp4") == steps.is_due("M4", "mxfp8") == nvfp4
    assert steps.is_due("42M", "captured") and not steps.is_due("42M", "fp8")


def test_a_step_that_fails_is_recorded_and_the_rest_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps, "VARIANTS", {"captured": {"no.such.knob": 1}})
    assert steps.main(["--shape=M0", "--seconds=1e-9", f"--results={tmp_path}"]) == 1
    assert "M0" in capsys.readouterr().out
    (row,) = records.read(tmp_path, "steps")
    assert row["failed"] == "not begun: the time was up" and row["variant"] == "captured"
    late = time.monotonic() + 60
    assert "failed" in steps.run("M0", "no such variant", tmp_path / "lock", late)


MACHINE = {"date": "2020-01-02", "commit": "abc", "device": "Card", "driver": "1.2", "torch": "9", "triton": "8"}
SPEED = MACHINE | {
    "bench": "speed", "on": "cuda", "op": "rmsnorm", "shape": {"rows": 4, "D": 8}, "pass": "forward", "bytes": 4e9,
    "flops": 1e6, "ceiling": {"copy": 5e12, "matmul": 1e15}, "results": {
        "triton": {"cold": 1e-3, "warm": 9e-4, "host": 2e-5, "memory": 2**20, "graph": True, "error": 1e-3},
        "torch": {"cold": 3e-3, "warm": 2e-3, "host": 4e-5, "memory": 2**21, "graph": True, "error": 1e-3},
        "Liger": {"failed": "wrong: relative error"},
    },
}  # fmt: skip


def test_the_kernels_table():
    older = SPEED | {"results": {"triton": {"failed": "crashed"}}}
    elsewhere = SPEED | {"device": "Another", "shape": {"rows": 9, "D": 9}}
    text = report.kernels_table([elsewhere, older, SPEED])
    line = "| rmsnorm | rows=4 D=8 | forward | **1,000** | torch 3,000 | 800 | 80% | 20 | 1 MiB |"
    assert line in text and not re.search("crashed|Another|=9", text) and "One Card, driver 1.2" in text
    lost = SPEED | {"results": SPEED["results"] | {"torch": {"cold": 5e-4}}}
    assert "| 1,000 | torch **500** |" in report.kernels_table([lost])
    assert "| crashed |  |" in report.kernels_table([older])


def attention_row(name, flops, **seconds):
    results = {who: {"cold": taken} if taken else {"failed": "wrong"} for who, taken in seconds.items()}
    shape = {"B": 4, "T": 4096, "S": 4096, "H": 12, "KV": 12, "D": 64}
    return SPEED | {"op": "attention", "shape": shape, "pass": name, "flops": flops, "results": results}


def test_the_attention_table():
    rows = [
        attention_row("forward", 4e12, triton=1e-2, flash=8e-3, slow=1.0),
        attention_row("forward+backward", 14e12, triton=3e-2, flash=4.8e-2),
    ]
    other = attention_row("forward", 1e12, triton=None, flash=1e-2)
    other["shape"] = other["shape"] | {"KV": 4, "T": 512, "L": 128}
    text = report.attention_table([*rows, other])
    assert "| forward: triton | forward: flash | forward: slow | forward+backward: triton |" in text
    assert "| 4 x 4,096 | 12 of 64 | causal | 400 | **500** | 4 | **467** | 292 | - |" in text
    assert "| 4 x 512 | 12 of 64, 4 of keys | documents of T/4 | - | **100** | - | - | - | - |" in text
    assert "multiplies 1,000.00 TFLOP/s" in text and "driver 1.2" in text


def test_the_table_of_training_steps():
    row = MACHINE | {"bench": "steps", "shape": "124M", "variant": "eager", "optimizer": "adamw", "batch": 32}
    row |= {"seq_len": 1024, "ms": 70.0, "tok_s": 468114.3, "mfu": 0.378, "memory": 13 * 2**30, "host_ms": 36.0}
    rows = [
        row | {"ms": 99.0},
        row,
        row | {"variant": "torch.compile", "ms": 66.0},
        row | {"shape": "M0", "failed": "no"},
    ]
    text = report.steps_table(rows)
    assert "| 124M | 32 x 1,024 | eager, adamw | 70.0 | 468,114 | 37.8% | 13.0 GiB | 36.0 |" in text
    assert "| torch.compile, adamw | **66.0** |" in text and "99.0" not in text and "M0" not in text
    assert report.steps_table([row | {"mfu": None}]) == ""


def test_the_table_of_training_names_the_text_it_was_on():
    run = {"val_bpb": 1.5, "seconds": 180.0, "tok_s": 2000.0, "tok_s_wall": 1900.0, "flops_per_token": 5e6}
    run |= {"memory": 2**30, "first_step": 28.2}
    row = MACHINE | {"bench": "equal wall-clock", "matmul": {"bf16": 1e11, "fp32": 5e10}, "nanogpt": run}
    row |= {"nanofuse": run | {"val_bpb": 0.75}, "nanofuse, compiled before": run}
    equal = MACHINE | {"bench": "equal shape", "nanofuse": {"tok_s": 300}, "nanogpt": {"tok_s": 200}}
    text = report.train_table([row, equal])  # of a version that recorded no digest
    assert "| nanofuse | 0.750 | 0.50 | 180 | 28 s | 2,000 | 1,900 | 10% | 1,024 MiB |" in text
    assert "300 tok/s against 200: 1.50 times" in text and "digest" not in text
    assert "digest 0123456789ab." in report.train_table([row | {"digest": "0123456789abcdef"}, equal])


def test_the_table_of_waits():
    generate = {"nanofuse": {"seconds": 2.0, "amount": 900}, "transformers": {"seconds": 3.0, "amount": 900}}
    prepare = {"nanofuse": {"seconds": 3.0, "amount": 300, "memory": 250e6}, "buffers": {"seconds": 2.5, "amount": 300}}
    save = {"nanofuse": {"seconds": 0.3}, "a copy": {"seconds": 0.1}, "DCP": {"seconds": 0.4}}
    rows = [
        MACHINE | {"bench": name, "unit": unit, "results": results}
        for name, unit, results in (("save", "", save), ("generate", "tok", generate), ("prepare", "MB", prepare))
    ]
    older = rows[0] | {"results": generate}
    text = report.waits_table([older, *rows])
    assert "| save | 0.30 s | a copy 0.10 s | 3.00 |\n| save | 0.30 s | DCP 0.40 s | 0.75 |" in text
    assert "| generate | 450 tok/s | transformers 300 tok/s | 1.50 |" in text
    assert "| prepare | 100 MB/s, 250 MB | buffers 120 MB/s | 0.83 |" in text


def test_waits_are_measured(tmp_path):
    command = [sys.executable, "-m", "pytest", "bench/bench_waits.py", "--size=tiny", f"--results={tmp_path}"]
    command += ["-k", "not trial and not end and not list"]  # half of the time, for the start of processes
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = records.read(tmp_path, "waits")
    assert len(rows) == len({row["bench"] for row in rows}) == 10
    for row in rows:
        ours = next(iter(row["results"]))
        assert f"{row['bench']}: {ours} " in done.stdout and len(row["results"]) > 1
        assert all(value > 0 or key == "tokens" for r in row["results"].values() for key, value in r.items()), row
    assert report.waits_table(rows).count("\n| ") >= 10


def test_what_stands_between_the_markers_is_replaced():
    readme = (ROOT / "README.md").read_text()
    for name in report.TABLES:
        filled = report.fill(readme, name, "new \\1")
        assert filled.count("new \\1") == 1 and report.fill(filled, name, "") == report.fill(readme, name, "")
    with pytest.raises(ValueError, match="0 pairs"):
        report.fill("nothing", "kernels", "")


# What a run on bytes of `stdlib` can do without: a machine with a GPU may have torch, triton and numpy, and no network.
ABSENT = {
    "annotated_types", "tqdm", "matplotlib", "tiktoken", "tokenizers", "packaging", "pyarrow", "wandb",
    "huggingface_hub", "safetensors",
}  # fmt: skip
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)


sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
import train

sys.exit(train.main(sys.argv[1:]))
"""


def test_training_on_bytes_needs_torch_and_numpy_alone(tiny, tmp_path):
    changes = {
        "data.corpus": "stdlib",
        "data.max_tokens": 50_000,
        "data.cache": tmp_path,
        "steps": 3,
        "wandb": "offline",
    }
    done = python(WITHOUT, *tiny(tmp_path / "out", **changes))
    assert done.returncode == 0, done.stderr
    assert "no loss.png: the package matplotlib is not installed" in done.stdout
    assert "W&B is off for this run: this configuration needs the package wandb, which is not installed" in done.stdout
    assert json.loads((tmp_path / "out/small/status.json").read_text())["status"] == "finished"


def test_a_package_that_is_needed_is_named(tiny, tmp_path):
    done = python(WITHOUT, *tiny(tmp_path / "out", **{"data.tokenizer": "bpe"}))
    assert done.returncode == 2 and done.stderr == (
        "error: this configuration needs the package tokenizers, which is not installed\n"
    )
    assert not (tmp_path / "out").exists()
