"""The plan of a run: its memory against real steps, and its rules against published runs."""

from dataclasses import replace

import pytest
import torch
from torch.nn.utils import get_total_norm

from kernels import KernelChoice, KernelError, bind
from model.cluster import BUS, CARDS, HOP_LINK, HOP_NETWORK, Cluster, step_time
from model.gpt import GPT, ModelConfig
from model.memory import Setup, largest_fit, predict
from model.optim import OptimizerConfig, build_optimizers
from model.plan import main
from runtime.hardware import DTYPES, autocast, rated_bandwidth, rated_flops

SMALL = ModelConfig(n_layer=3, n_head=4, d_model=128, d_ff=256, seq_len=128).resolved(2000)
ON_CPU = Setup(SMALL, device="cpu", precision="fp32", residual=None)
ON_GPU = Setup(SMALL)
CPU = torch.device("cpu")


def peak_of_a_real_step(setup: Setup, micro_batch: int, accumulates: bool) -> int:
    """Bytes of all tensors at the peak of a step on the CPU, from the allocations that torch's profiler records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = GPT(setup.shape, bind(setup.kernels, CPU))
        if setup.precision != "fp32":
            model.keep_copies(DTYPES[setup.precision])
        model.residual = setup.residual
        optimizers = build_optimizers(model, setup.optimizer)
        ids, targets = torch.zeros(2, micro_batch, setup.shape.seq_len, dtype=torch.int64)
        for _ in range(1 + accumulates):
            with autocast(CPU, setup.precision):
                loss = model(ids, targets, "sum")
            loss.backward()
        norm = get_total_norm([p.grad for p in model.parameters()])
        for optimizer in optimizers:
            optimizer.step(1 / norm)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


SDPA = KernelChoice(attention="sdpa")
ADAMW = OptimizerConfig(optimizer="adamw")
MEASURED = {
    "fp32": (ON_CPU, 4, False),
    "accumulating": (replace(ON_CPU, optimizer=ADAMW), 2, True),
    "optimizer-peak": (ON_CPU, 1, False),
    "recompute": (replace(ON_CPU, shape=replace(SMALL, recompute=1.0)), 8, False),
    "bf16": (replace(ON_CPU, precision="bf16", residual=torch.bfloat16, kernels=SDPA), 8, True),
    "documents": (replace(ON_CPU, shape=replace(SMALL, separator=0, dropout=0.1)), 4, False),
    "options": (replace(ON_CPU, shape=replace(SMALL, norm="layer", position="learned", activation="gelu")), 4, False),
    "untied": (replace(ON_CPU, optimizer=ADAMW, shape=replace(SMALL, tied=False, n_kv_head=2)), 4, False),
}


@pytest.mark.parametrize("case", MEASURED)
def test_predicted_peak_is_that_of_a_real_step(case):
    setup, micro_batch, accumulates = MEASURED[case]
    real = peak_of_a_real_step(setup, micro_batch, accumulates)
    assert predict(setup, micro_batch, accumulates).peak == pytest.approx(real, rel=0.01)


def test_parts_are_those_of_the_model():
    memory, n = predict(replace(ON_GPU, optimizer=ADAMW), 4), SMALL.n_parameters()
    tables = 4 * SMALL.seq_len * SMALL.head_dim  # cos and sin
    assert memory.weights == 4 * n + tables and memory.gradients == 4 * n
    assert memory.optimizer == pytest.approx(8 * n, abs=8)  # two moments and a step
    norms = 2 * SMALL.n_layer * (SMALL.d_model + SMALL.head_dim) + SMALL.d_model
    assert memory.copies == 2 * (n - norms + 48 * SMALL.d_model)  # the head's is padded to 2,048 rows
    total = sum(vars(memory).values()) - memory.peak
    assert total - memory.gradients <= memory.peak <= total


def test_what_a_gpu_needs_is_predicted_without_one():
    memory = {triton: predict(replace(ON_GPU, kernels=KernelChoice(triton)), 64) for triton in ("torch", "auto")}
    logits = 64 * SMALL.seq_len * SMALL.vocab_size
    assert memory["torch"].head > 10 * logits > memory["auto"].head  # float32 logits and gradients; or chunks
    assert predict(replace(ON_GPU, captured=True), 64).peak > memory["auto"].peak
    own = replace(ON_GPU, kernels=KernelChoice(swiglu="mine.py:swiglu"))
    assert predict(own, 64) == memory["auto"]
    with pytest.raises(KernelError, match="no 'flash' kernel"):
        predict(replace(ON_GPU, kernels=KernelChoice(attention="flash")), 1)


def test_the_largest_micro_batch_that_fits_divides_the_batch():
    peaks = {n: predict(ON_GPU, n, n < 8).peak for n in (1, 2, 4, 8)}
    assert [largest_fit(ON_GPU, 8, peak) for peak in peaks.values()] == list(peaks)
    assert [largest_fit(ON_GPU, 8, peak - 1) for peak in peaks.values()] == [0, 1, 2, 4]


def test_shards_divide_the_state():
    setup = replace(ON_GPU, optimizer=ADAMW)
    whole = predict(setup, 1)
    memory = {n: predict(replace(setup, shard="full", ranks=n), 1) for n in (1, 2, 8)}
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(memory[8], name) == pytest.approx(getattr(whole, name) / 8, abs=1)
    assert memory[8].peak < memory[2].peak < memory[1].peak
    assert memory[8].activations == whole.activations and memory[8].copies == 0
    assert predict(replace(setup, shard="hybrid", ranks=64, local_ranks=8), 1) == memory[8]


@pytest.mark.parametrize("captured", [False, True])
def test_replicas_share_muons_momentum(captured):
    whole, shared = (predict(replace(ON_GPU, ranks=n, captured=captured), 1) for n in (1, 4))
    matrices = sum(p.numel() for p in GPT(SMALL, bind(KernelChoice())).blocks.parameters() if p.ndim == 2)
    assert whole.optimizer - shared.optimizer == 4 * matrices * 3 / 4
    assert shared.peak - shared.buffers < whole.peak


def test_graphs_leave_no_memory_to_the_buckets_of_gradients():
    eager, captured = (predict(replace(ON_GPU, ranks=4, captured=captured), 1) for captured in (False, True))
    assert captured.buffers == captured.gradients == captured.peak - eager.peak and not eager.buffers


# Published runs: (shape, cluster, sequences a card takes at once, times a step, sharding, tokens a second and card).

LLAMA3_8B = ModelConfig(
    n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, seq_len=8192, tied=False, qk_norm=False
).resolved(128256)
LLAMA2_7B = replace(LLAMA3_8B, n_kv_head=32, d_ff=11008, seq_len=4096, vocab_size=32000)
GPT2_XL = ModelConfig(
    n_layer=48, n_head=25, d_model=1600, d_ff=6400, activation="gelu", bias=True, norm="layer", position="learned",
    qk_norm=False,
).resolved(50304)  # fmt: skip
H100, A100 = "H100 80GB HBM3", "A100-SXM4-80GB"
PUBLISHED = {
    # llm.c, scripts/run_gpt2_1558M.sh: 8 H100 take 2.80 s for 1,048,576 tokens. The rules say 2.90 s.
    "llm.c-gpt2-xl": (GPT2_XL, Cluster(H100, 8), 16, 8, "off", 1_048_576 / 2.80 / 8),
    # fms-fsdp, README.md: Llama 2 7B on 128 A100, HSDP, 2 sequences, no recomputation. The rules say 14% less.
    "fms-fsdp-llama2-7b": (LLAMA2_7B, Cluster(A100, 128), 2, 1, "hybrid", 3760),
    # torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: FSDP and torch.compile on H100 limited to 500 W of 700,
    # with selective recomputation. The rules say 28% more on 8, and 31% more on 128.
    "torchtitan-llama3-8b": (LLAMA3_8B, Cluster(H100, 8), 2, 1, "full", 6667),
    "torchtitan-llama3-8b-128": (LLAMA3_8B, Cluster(H100, 128), 2, 1, "full", 6514),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_predicted_speed_is_within_a_third_of_published_runs(name):
    shape, cluster, micro_batch, micro_batches, shard, published = PUBLISHED[name]
    time = step_time(shape, cluster, micro_batch, micro_batches, shard)
    assert micro_batch * micro_batches * shape.seq_len / time.total == pytest.approx(published, rel=1 / 3)


def test_predicted_loss_from_8_to_128_cards_is_within_3_points_of_the_published_one():
    """torchtitan loses 2.3% from 8 to 128 cards (2.7% without torch.compile). The rules say nothing: 0.0%."""
    a_card = [1 / step_time(LLAMA3_8B, Cluster(H100, cards, achieved=0.35), 2, 1, "full").total for cards in (8, 128)]
    assert a_card[1] / a_card[0] == pytest.approx(6514 / 6667, abs=0.03)


def test_predicted_state_is_within_a_tenth_of_the_published_one():
    """torchtitan's cards have 15.0 GiB less on 128 than on 8 (15.4 without torch.compile), and the rules say 14.0."""
    on_8, on_128 = (predict(Setup(LLAMA3_8B, optimizer=ADAMW, shard="full", ranks=ranks), 1).peak for ranks in (8, 128))
    assert (on_8 - on_128) / 2**30 == pytest.approx(77.0 - 62.0, rel=0.1)


def test_collectives_send_the_bytes_of_a_ring_over_the_slowest_link():
    one, several = Cluster(H100, 8), Cluster(H100, 16, per_machine=2)
    size = 1e12  # so much that latency is nothing
    assert one.gather(size) == pytest.approx(7 / 8 * size / (BUS * 450e9), rel=1e-3)
    assert one.reduce(size) == pytest.approx(2 * one.gather(size), rel=1e-3)
    assert several.gather(size) == pytest.approx(15 / 16 * size / (BUS * 2 * 50e9), rel=1e-3)
    assert several.gather(size, 2) == pytest.approx(1 / 2 * size / (BUS * 450e9), rel=1e-3)
    assert several.reduce_between_machines(size) == pytest.approx(2 * 7 / 8 * size / (BUS * 50e9), rel=1e-3)
    assert Cluster(H100, 1).reduce(size) == 0
    assert Cluster(H100, 1024).gather(0) == pytest.approx(896 * HOP_LINK + 128 * HOP_NETWORK)


def test_communication_hides_behind_the_passes_where_there_is_time():
    def exposed(*arguments, **options):
        time = step_time(SMALL, Cluster(H100, 64), *arguments, **options)
        assert 0 < time.exposed <= time.communication
        return time.exposed / time.communication

    assert exposed(512) < exposed(1) < exposed(1, captured=True) == 1
    assert exposed(64, 1, "full") < exposed(1, 1, "full")
    assert exposed(64, 1, "hybrid") < exposed(1, 1, "hybrid")


def test_muon_is_shared_out_over_replicas_in_graphs_too():
    eager, captured, one = (
        step_time(GPT2_XL, Cluster(H100, cards), 8, optimizer="muon", captured=captured)
        for cards, captured in ((8, False), (8, True), (1, True))
    )
    assert eager.optimizer == captured.optimizer < one.optimizer / 4
    assert eager.communication == captured.communication


def test_all_cards_have_rates():
    assert all(rated_flops(name) and rated_bandwidth(name) for name in CARDS)


# The program


def test_the_program_prints_a_prediction(capsys):
    small = ["--model.n_layer=2", "--model.d_model=64", "--model.n_head=2", "--cards=16", "--batch_size=64"]
    assert main([*small, "--micro_batch=auto", "--shard=full", "--optimizer=adamw"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PREDICTION, not a measurement")
    assert "16 x H100 80GB HBM3, 8 a machine, shard full" in lines[2]
    assert lines[3] == "micro-batch    4 sequences of 1,024 tokens"
    assert "fits 63.3 GiB, 85% of a card" in lines[4] and "tok/s" in lines[-1]


def test_the_program_says_what_does_not_fit(capsys):
    large = ["--model.n_layer=1", "--model.d_model=16384", "--model.n_head=64"]
    assert main(["--card=l4", "--micro_batch=auto", *large]) == 0
    assert "does not fit: one sequence takes" in capsys.readouterr().out


def test_the_table_is_marked_as_a_prediction(monkeypatch, capsys):
    monkeypatch.setattr("model.plan.TABLE_MODELS", ((2, 2, 64), (1, 64, 16384)))
    monkeypatch.setattr("model.plan.TABLE_CARDS", (8, 1024))
    assert main(["--table", "--optimizer=adamw"]) == 0
    first, _, _, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("PREDICTION, not a measurement")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert {len(row) for row in rows} == {9}
    assert [row[:3] for row in rows[2:7]] == [
        ["0.00B", "8", "off"], ["0.00B", "8", "full"],
        ["0.00B", "1,024", "off"], ["0.00B", "1,024", "full"], ["0.00B", "1,024", "hybrid"],
    ]  # fmt: skip
    assert rows[7][3] == "does not fit" and all(rows[2][3:])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--card=TPU"], "no card called 'TPU'"),
        (["--cards=7"], "batch_size 512 must be a multiple of 112 (7 ranks x micro_batch 16), such as 448 or 560"),
        (
            ["--micro_batch=48"],
            "batch_size 512 must be a multiple of 384 (8 ranks x micro_batch 48), such as 384",
        ),
        (["--micro_batch=big"], "micro_batch must be auto or a whole number"),
        (["--shard=some"], "shard must be off, full or hybrid"),
        (["--config=missing.py"], "no config file 'missing.py'"),
        (["--precision=fp8"], "precision must be"),
    ],
)
def test_bad_flags_are_refused(flags, message, capsys):
    assert main(flags) == 2
    assert message in capsys.readouterr().err
