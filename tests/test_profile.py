"""--profile: profiled runs, and the table of traces as a GPU gives them."""

import gzip
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from kernels import KernelChoice, bind
from kernels.spec import Cost
from model import checkpoint
from model.costs import StepOps
from model.gpt import GPT, ModelConfig
from model.optim import OptimizerConfig, build_optimizers
from model.precision import lower
from runtime.config import ConfigError
from runtime.hardware import autocast
from runtime.profile import Profiler, Table, parse_window

ROWS = ("step", "loss", "grad_norm", "lr", "val_loss")


def result(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return checkpoint.load(folder / "last.pt")["model"], [[row.get(key) for key in ROWS] for row in rows]


def test_a_profiled_run_is_equal_to_the_bit_and_its_table_adds_up(run, capsys):
    knobs = {"steps": 8, "log_every": 1, "micro_batch": 2}
    weights, rows = result(run(run="plain", **knobs)[1])
    capsys.readouterr()
    code, folder = run(run="profiled", profile="5:2", **knobs)
    profiled, same_rows = result(folder)
    assert code == 0 and rows == same_rows
    assert all(torch.equal(weights[key], profiled[key]) for key in weights)
    title, header, *lines, advice = (folder / "profile" / "step-5.txt").read_text().splitlines()
    total = float(re.fullmatch(r"step 5 to 6: ([\d.]+) ms a step .*, main thread of the host", title)[1])
    assert header.split() == ["forward", "backward", "optimizer", "total", "share", "GB/s", "TFLOP/s"]
    cells = {line[:22].strip(): line[22:].split() for line in lines}
    ours = {"rmsnorm", "rope", "attention", "swiglu", "linear_cross_entropy", "matmul", "muon", "adamw"}
    assert ours | {"data wait", "evaluation", "checkpoint", "python", "loop", "logging"} <= cells.keys()
    shares = [float(next(cell for cell in row if cell.endswith("%"))[:-1]) for row in cells.values()]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    for op in ours - {"muon", "adamw"}:
        forward, backward, both, *_ = map(float, (cell.rstrip("%") for cell in cells[op]))
        assert forward > 0 < backward and both == pytest.approx(forward + backward, abs=0.01)
    said = capsys.readouterr().out
    assert f"profile  {title}" in said and f"profile  {advice}" in said and total > 0
    with gzip.open(folder / "profile" / "step-5.trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    assert {path.name for path in (folder / "profile").iterdir()} == {"step-5.txt", "step-5.trace.json.gz"}


@pytest.mark.parametrize(
    "window, said", [("9", "none: step 9 is not among"), ("5", "none: step 5 is not among"), ("4:9", "step 4: ")]
)
def test_a_window_beyond_the_run(run, capsys, window, said):
    code, folder = run(steps=4, profile=window)
    assert code == 0 and f"profile  {said}" in capsys.readouterr().out
    assert (folder / "profile").exists() == (window == "4:9")


def test_a_profile_that_cannot_be_written_is_said(run, monkeypatch, capsys):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    code, folder = run(steps=4, profile="2:1")
    assert code == 0 and "profile  is lost: cannot write" in capsys.readouterr().out
    assert not list((folder / "profile").iterdir())


def test_windows():
    assert parse_window("") == (0, 0) and parse_window("7") == (7, 3) and parse_window("7:1") == (7, 1)
    for text in ("0", "7:0", "x", "7:", ":3", "-1", "1.5", "1:2:3", "7 ", "٣"):
        with pytest.raises(ConfigError, match="profile must be a step such as 100"):
            parse_window(text)


def batch(share, size):
    """The sequences of a rank's batch, and of a micro-batch."""
    return SimpleNamespace(share=share, size=size)


def test_costs_are_those_of_the_models_flops():
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "d_model": 32, "seq_len": 256, "window": "SL:64"}
    model = GPT(ModelConfig(**sizes, tied=False).resolved(101), bind(KernelChoice()))
    optimizers = build_optimizers(model, OptimizerConfig())
    whole, parts = (StepOps(model, optimizers, batch(8, size)).costs(True) for size in (8, 2))
    names = ("matmul", "linear_cross_entropy", "attention")
    flops = sum(whole[name].flops for name in names) - whole["attention"].flops // 7  # the recomputed scores
    assert flops == pytest.approx(8 * 256 * model.flops_per_token(), rel=0.01)
    assert {name: cost.flops for name, cost in whole.items()} == {name: cost.flops for name, cost in parts.items()}
    assert parts["matmul"].bytes > whole["matmul"].bytes and parts["swiglu"].bytes == whole["swiglu"].bytes
    graphs = StepOps(model, optimizers, batch(8, 8)).costs(False)
    assert graphs["matmul"].flops == whole["matmul"].flops + whole["linear_cross_entropy"].flops
    assert graphs.keys() == whole.keys() - {"linear_cross_entropy"} | {"cross_entropy"}


def test_costs_are_of_the_ranks_own_matrices():
    model = GPT(ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16).resolved(101), bind(KernelChoice()))
    adamw, muon = build_optimizers(model, OptimizerConfig())
    ops = StepOps(model, (adamw, muon), batch(8, 8))
    alone, all_of_them = ops.costs(True), muon.owners.mine
    muon.owners.owned = [all_of_them[1::2], all_of_them[::2]]
    ours = ops.costs(True)
    muon.owners.rank = 1
    theirs, n = ops.costs(True), sum(p.numel() for group in muon.param_groups for p in group["params"])
    assert ours["muon"].flops + theirs["muon"].flops == alone["muon"].flops > ours["muon"].flops > 0
    assert ours["muon"].bytes + theirs["muon"].bytes == alone["muon"].bytes + 8 * n  # each updates all parameters
    assert ours["adamw"] == theirs["adamw"] == alone["adamw"]


@pytest.mark.parametrize("precision, op, products", [
    ("fp8", "fp8_linear", 2), ("mxfp8", "block_scaled_linear", 3), ("nvfp4", "block_scaled_linear", 3),
])  # fmt: skip
def test_products_in_low_precision_have_a_row_of_their_own(precision, op, products):
    """In FP8 all but the weight gradients. Where torch multiplies, kernels do not tell them from others."""
    config = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16).resolved(101)
    model = GPT(config, bind(KernelChoice()))
    model.keep_copies(torch.bfloat16)
    ops, ids = StepOps(model, [], batch(8, 8)), torch.zeros(1, 16, dtype=torch.int64)
    bf16 = ops.costs(True)["matmul"].flops
    lowered = lower(model, precision)
    lowered.advance()  # from then on norms and activations emit FP8
    layers, costs = [linear for _, linear in lowered.layers], ops.costs(True)
    assert costs[op].flops == products * 2 * 8 * 16 * sum(layer.weight.numel() for layer in layers)
    assert costs[op].flops + costs.get("matmul", Cost(0, 0)).flops == bf16
    assert op not in ops.costs(False)
    with ops.labels(), torch.profiler.profile() as profile:
        with autocast(torch.device("cpu"), "bf16"):
            loss = model(ids, ids)
        loss.backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[op] == products * len(layers) and counts["rmsnorm"] == 2 * model.config.n_layer + 1


def test_triton_kernels_are_known_by_their_names():
    kernels = StepOps(None, [], batch(1, 1)).kernels()
    names = {"_rmsnorm_bwd_kernel": "rmsnorm", "_sum_rows_kernel": "rmsnorm", "_adamw_kernel": "adamw"}
    assert names.items() <= kernels.items() and kernels["_attention_fwd_kernel"] == "attention"


# Traces of a GPU, as Kineto writes them: kernels are tied by `correlation` to the runtime calls that launch them.


class FakeOps:
    def kernels(self):
        return {"_rmsnorm_fwd_kernel": "rmsnorm", "_rmsnorm_bwd_kernel": "rmsnorm", "_adamw_kernel": "adamw"}

    def labels(self):
        return nullcontext()

    def costs(self, labelled):
        work = {"rmsnorm": Cost(10**6, 10**3), "attention": Cost(10**5, 10**9), "matmul": Cost(10**6, 10**9)}
        return work | {"adamw": Cost(3 * 10**6, 10)} | ({"head": Cost(1, 10**9)} if labelled else {})


class Trace:
    """Events of a trace; times are in microseconds."""

    def __init__(self):
        self.events = [{"ph": "M", "name": "process_name"}]
        self.n = 0

    def add(self, category, name, start, duration, thread=1, **args):
        event = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": thread}
        self.events.append(event | {"args": args})

    def label(self, name, start, duration):
        self.add("user_annotation", name, start, duration)
        self.add("gpu_user_annotation", name, start + 1000, duration, thread=7)  # Kineto mirrors labels on the GPU

    def launch(self, at, start, *kernels, call="cuLaunchKernelEx", thread=1):
        """A runtime call at `at`, and its kernels (name, duration), one after the other from `start` on."""
        self.n += 1
        self.add("cuda_driver" if call.startswith("cu") else "cuda_runtime", call, at, 1, thread, correlation=self.n)
        for name, duration in kernels:
            self.add("kernel", name, start, duration, thread=7, correlation=self.n)
            start += duration

    def table(self):
        return Table.of(self.events, FakeOps())


def microseconds(table):
    return {key: round(1e6 * time, 3) for key, time in table.times.items() if time > 1e-9}


def test_kernels_are_attributed_by_labels_sequence_numbers_and_names():
    trace = Trace()
    trace.label("step", 0, 1000)
    trace.label("data", 0, 50)
    trace.label("forward", 50, 100)
    trace.label("rmsnorm", 60, 10)
    trace.add("cpu_op", "_RMSNorm", 61, 8, **{"Sequence number": 4, "Fwd thread id": 0})
    trace.launch(65, 70, ("_rmsnorm_fwd_kernel", 30))
    trace.label("attention", 80, 10)
    trace.add("cpu_op", "aten::mul", 81, 8, **{"Sequence number": 5, "Fwd thread id": 0})
    trace.launch(85, 100, ("elementwise_kernel", 20))
    trace.add("cpu_op", "aten::linear", 92, 8, **{"Sequence number": 6, "Fwd thread id": 0})
    trace.launch(95, 120, ("sm90_xmma_gemm_bf16", 80))
    trace.label("backward", 150, 200)
    for start, number, name in ((160, 6, "MmBackward0"), (180, 5, "MulBackward0"), (200, 4, "_RMSNormBackward")):
        node = f"autograd::engine::evaluate_function: {name}"
        trace.add("cpu_op", node, start, 10, thread=2, **{"Sequence number": number, "Fwd thread id": 1})
    trace.add("cpu_op", "aten::mm", 161, 5, thread=2)
    trace.launch(162, 200, ("sm90_xmma_gemm_bf16", 100), thread=2)
    trace.launch(182, 300, ("elementwise_kernel", 40), thread=2)
    trace.launch(202, 340, ("_rmsnorm_bwd_kernel", 60), thread=2)
    trace.label("optimizer", 350, 100)
    trace.label("Optimizer.step#AdamW.step", 360, 80)
    trace.launch(370, 400, ("_adamw_kernel", 50), ("ncclDevKernel_AllGather_RING_LL", 10))
    trace.label("evaluation", 500, 400)
    trace.label("attention", 510, 50)
    trace.launch(520, 530, ("elementwise_kernel", 100))
    table = trace.table()
    assert microseconds(table) == {
        ("rmsnorm", "forward"): 30, ("attention", "forward"): 20, ("matmul", "forward"): 80,
        ("matmul", "backward"): 100, ("attention", "backward"): 40, ("rmsnorm", "backward"): 60,
        ("adamw", "optimizer"): 50, ("communication", "optimizer"): 10, ("evaluation", ""): 100 + 30 + 270,
        ("data wait", ""): 50, ("launch gaps", "forward"): 20, ("launch gaps", ""): 40 + 100,
    }  # fmt: skip
    assert sum(table.times.values()) == pytest.approx(table.seconds) == pytest.approx(1e-3)
    assert table.on_gpu and not table.replays and "head" in table.work
    (line,) = (line for line in table.lines("step 1") if line.startswith("rmsnorm"))
    assert line.split() == ["rmsnorm", "0.030", "0.060", "0.090", "9.0%", f"{1e6 / 90e-6 / 1e9:.1f}", "1.11e-05"]
    (line,) = (line for line in table.lines("step 1") if line.startswith("adamw"))
    assert line.split()[:4] == ["adamw", "0.050", "0.050", "5.0%"] and line.split()[4] == "60.0"


def test_kernels_of_a_replayed_graph_are_known_by_their_names():
    trace = Trace()
    for begin in (0, 1000):
        trace.label("step", begin, 1000)
        graph = [("_rmsnorm_fwd_kernel", 100), ("nvjet_hsh_128", 300), ("_rmsnorm_bwd_kernel", 200), ("reduce", 50)]
        trace.launch(begin + 10, begin + 20, *graph, call="cudaGraphLaunch")
        trace.label("optimizer", begin + 40, 20)
        trace.launch(begin + 50, begin + 670, ("_adamw_kernel", 60), ("nvjet_hsh_64", 40), call="cudaGraphLaunch")
        trace.add("gpu_memcpy", "Memcpy HtoD", begin + 5, 10, thread=8)
    table = trace.table()
    assert microseconds(table) == {
        ("rmsnorm", "forward"): 100, ("matmul", "forward+backward"): 300, ("rmsnorm", "backward"): 200,
        ("other", "forward+backward"): 50, ("adamw", "optimizer"): 60, ("matmul", "optimizer"): 40,
        ("loop", ""): 10, ("launch gaps", ""): 5 + 5 + 230,
    }  # fmt: skip
    assert table.replays and table.n_steps == 2 and "head" not in table.work
    assert "matmul" in table.lines("")[2] and table.rate_seconds("matmul") == pytest.approx(300e-6)
    assert "launch gaps are 24%" in table.advice() and "a larger micro_batch" in table.advice()


def test_a_kernel_that_overlaps_others_leaves_no_gap_twice():
    trace = Trace()
    trace.label("step", 0, 100)
    trace.launch(1, 10, ("reduce", 80))
    trace.launch(2, 20, ("reduce", 10))
    trace.launch(3, 95, ("reduce", 25))  # ends after the host's step
    assert microseconds(trace.table()) == {("loop", ""): 115, ("launch gaps", ""): 15}
    assert trace.table().seconds == pytest.approx(120e-6)


def advice(times, **facts):
    facts = {"on_gpu": True, "replays": False, "compiled": False} | facts
    return Table(1, 1.0, times, {}, **facts).advice()


@pytest.mark.parametrize(
    "times, facts, said",
    [
        ({("data wait", ""): 0.3, ("launch gaps", ""): 0.4}, {}, "data wait is 30% of the step"),
        ({("evaluation", ""): 0.6, ("matmul", "forward"): 0.4}, {}, "evaluation is 60% of these steps"),
        ({("launch gaps", ""): 0.25, ("matmul", "forward"): 0.75}, {}, "launch gaps are 25%.*--capture=on would help"),
        ({("launch gaps", ""): 0.25}, {"replays": True}, "a larger micro_batch would help"),
        ({("python", "forward"): 0.3}, {"on_gpu": False}, "--compile=on, or a larger micro_batch, would help"),
        ({("python", "forward"): 0.3}, {"on_gpu": False, "compiled": True}, "step: a larger micro_batch would help"),
        ({("attention", "forward"): 0.2, ("attention", "backward"): 0.2, ("loop", ""): 0.6}, {}, "attention takes 40%"),
    ],
)
def test_advice_is_drawn_from_the_largest_cause(times, facts, said):
    assert re.search(said, advice(times, **facts))


@pytest.mark.parametrize("begins_at", [1, 4])
def test_memory_is_recorded_in_the_step_before_the_trace(monkeypatch, tmp_path, begins_at):
    """Or in the first step of the trace, if the process starts with it. The GPU is waited for around the trace."""
    calls = []
    memory = SimpleNamespace(
        _record_memory_history=lambda **options: calls.append("off" if options == {"enabled": None} else "on"),
        _dump_snapshot=lambda path: calls.append(Path(path).name),
    )
    profile = SimpleNamespace(
        prepare_trace=lambda: calls.append("prepare"), start_trace=lambda: calls.append("start"),
        stop_trace=lambda: calls.append("stop"), export_chrome_trace=lambda path: 1 / 0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory", memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: profile)
    monkeypatch.setattr(Profiler, "_write", lambda self, profile, first: calls.append("write"))
    (tmp_path / "run").mkdir()
    with Profiler("4:1", tmp_path / "run", torch.device("cuda"), FakeOps(), print) as profiler:
        for step in range(begins_at, 7):
            calls.append(step)
            profiler.step(step)
    snapshot = ["step-4.memory.pickle", "off"]
    if begins_at == 1:
        expected = [1, 2, 3, "prepare", "on", 4, *snapshot, "wait", "start", 5, "wait", "stop", "write", 6]
    else:
        expected = [4, "prepare", "on", "wait", "start", 5, *snapshot, "wait", "stop", "write", 6]
    assert calls == expected


def test_an_error_in_the_window_ends_the_trace_without_a_report(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train.Trainer, "update", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(profile="1")
    assert not torch.autograd._profiler_enabled() and not (tmp_path / "out" / "small" / "profile").exists()
