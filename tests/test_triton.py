"""The Triton implementations under autograd modes, as torch.library ops, under torch.compile, and in the model."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from parity import DEVICE, checked, draw, draw_leaves, interpreted, results_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import OPS, KernelChoice, bind, has_card
from kernels.attention import document_ranges
from kernels.cross_entropy import IGNORE
from kernels.launch import IMPLEMENTATIONS, _on_its_gpu
from kernels.rope import rope_tables
from kernels.sanitizer import sanitize
from model.gpt import GPT, ModelConfig

WITH_TRITON = [op for op in OPS.values() if "triton" in op.implementations and not op.mutates and has_card(op, DEVICE)]
LACKING = [op.name for op in OPS.values() if not has_card(op, DEVICE)]  # their kernels may crash the compiler
DIFFERENTIABLE = [op for op in WITH_TRITON if op.differentiable]
by_op = pytest.mark.parametrize("op", WITH_TRITON, ids=lambda op: op.name)
by_differentiable_op = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


def summed(outputs):
    """A scalar that depends differently on every element."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((o * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).cos()).sum() for o in outputs)


@by_op
def test_without_gradients(op):
    inputs = draw_leaves(op, op.test_shapes[1])
    expected = op.implementations["triton"](**inputs)
    with torch.no_grad():
        torch.testing.assert_close(op.implementations["triton"](**inputs), expected)
    with torch.inference_mode():
        torch.testing.assert_close(op.implementations["triton"](**inputs), expected)


@by_differentiable_op
def test_accumulated_checkpointed_and_used_twice(op):
    """Two checkpointed passes, whose outputs are used twice, accumulate twice the plain gradients."""
    plain, twice = draw_leaves(op, op.test_shapes[1]), draw_leaves(op, op.test_shapes[1])
    summed(op.implementations["torch"](**plain)).backward()
    for _ in range(2):
        outputs = checkpoint(lambda: op.implementations["triton"](**twice), use_reentrant=False)
        (0.25 * summed(outputs) + 0.75 * summed(outputs)).backward()
    for key in op.differentiable:
        torch.testing.assert_close(twice[key].grad, 2 * plain[key].grad)


@by_differentiable_op
def test_gradient_of_some_inputs_only(op):
    """A frozen input gets no gradient, and the other inputs get theirs."""
    for key in op.differentiable:
        ours, theirs = (draw(op, op.test_shapes[1]) for _ in range(2))
        for inputs, name in ((ours, "triton"), (theirs, "torch")):
            inputs[key].requires_grad_()
            summed(op.implementations[name](**inputs)).backward()
        torch.testing.assert_close(ours[key].grad, theirs[key].grad)


@by_op
def test_repeats_bit_for_bit(op):
    """Results are bitwise equal for any order of programs."""
    inputs = draw(op, op.test_shapes[-2], torch.bfloat16)
    results = []
    for seed in range(2):
        with sanitize(shuffle=seed) if DEVICE.type == "cpu" else checked(""):
            results.append(results_of(op, "triton", inputs))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@by_differentiable_op
def test_empty_batch(op):
    shape = op.test_shapes[1] | {next(k for k in ("rows", "N", "B") if k in op.test_shapes[1]): 0}
    inputs = draw_leaves(op, shape)
    summed(op.implementations["triton"](**inputs)).backward()
    assert all(not inputs[key].grad.any() for key in op.differentiable)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no device to wait for")
@by_differentiable_op
def test_the_host_never_waits(op):
    inputs = draw_leaves(op, op.test_shapes[1])
    summed(op.implementations["triton"](**inputs)).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        summed(op.implementations["triton"](**inputs)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inputs_are_left_alone():
    for op in DIFFERENTIABLE:
        inputs = draw_leaves(op, op.test_shapes[1])
        copies = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
        summed(op.implementations["triton"](**inputs)).backward()
        assert all(torch.equal(inputs[k], v) for k, v in copies.items()), op.name


def test_norm_under_autocast_keeps_the_stream_wide():
    """Half-precision x and float32 residual: the new residual is float32, y is half precision."""
    x, residual, gain = torch.randn(5, 48, dtype=torch.bfloat16), torch.randn(5, 48), torch.randn(48)
    inputs = {k: v.to(DEVICE) for k, v in {"x": x, "residual": residual, "gain": gain}.items()}
    results = {}
    for name in ("torch", "triton"):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        outputs = OPS["rmsnorm"].implementations[name](**leaves)
        summed(tuple(o.float() for o in outputs)).backward()
        results[name] = [*outputs, *(v.grad for v in leaves.values())]
    assert [r.dtype for r in results["triton"]] == [r.dtype for r in results["torch"]]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        tolerance = 2e-2 if ours.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_stream_used_alone():
    """A layer whose normalised value is dropped still passes the stream's gradient through."""
    inputs = draw_leaves(OPS["rmsnorm"], OPS["rmsnorm"].test_shapes[1])
    OPS["rmsnorm"].implementations["triton"](**inputs)[1].sum().backward()
    assert torch.equal(inputs["x"].grad, torch.ones_like(inputs["x"])) and not inputs["gain"].grad.any()


# Arguments.


@pytest.mark.parametrize("op, change, message", [
    ("linear_cross_entropy", {"targets": torch.zeros(3).long()}, "targets"),
    ("linear_cross_entropy", {"reduction": "average"}, "mean, sum, none"),
    ("attention", {"k": torch.zeros(2, 17, 3, 32)}, "cannot attend"),
    ("swiglu", {"activation": "tanh"}, "silu, gelu, relu, relu2"),
    ("swiglu", {"x": torch.zeros(2, 5)}, "even"),
    ("rope", {"n_head": 5}, "5 heads"),
    ("rope", {"k_gain": None}, "QK-norm"),
    ("rope", {"k_gain": torch.ones(16)}, r"\[32\] and \[16\] are not \[32\]"),
    ("fp8_linear", {"x": torch.zeros(2, 64)}, r"x \[2, 64\] does not end in 80"),
    ("fp8_linear", {"x": torch.zeros(2, 24), "weight": torch.zeros(16, 24)}, r"multiples of 16, not \[16, 24\]"),
    ("rmsnorm", {"gain": torch.ones(1)}, r"gain \[1\] is not \[64\]"),
    ("rmsnorm", {"residual": torch.ones(64)}, r"residual \[64\] is not \[1, 64\]"),
    ("rope", {"positions": torch.zeros(2, 6).long()}, "positions"),
    ("rope", {"cos": torch.zeros(3, 16), "sin": torch.zeros(3, 16)}, "3 positions"),
    ("rope", {"cos": torch.zeros(7, 8), "sin": torch.zeros(7, 8)}, "heads of 32"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(op, change, message):
    with pytest.raises(ValueError, match=message):
        OPS[op].implementations["triton"](**draw_leaves(OPS[op], OPS[op].test_shapes[1]) | change)


# Offsets.


@pytest.mark.parametrize("op", ["rmsnorm", "swiglu", "rope", "attention", "cross_entropy"])
def test_offsets_beyond_two_to_the_31(op):
    """Three rows a billion elements apart; memory that is never touched is never given out."""
    distance = 2**30 + 16
    far = torch.empty(2 * distance + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (distance, 1))
    near = torch.randn(3, 64, device=DEVICE).bfloat16()
    far.copy_(near)
    results = []
    for x in (far, near):
        if op == "rope":
            cos, sin = rope_tables(1, 16, device=DEVICE)
            inputs = {"qkv": x[:, None], "cos": cos, "sin": sin, "n_head": 2, "n_kv_head": 1}
        elif op == "attention":
            inputs = dict.fromkeys("qkv", x[None, :, None])
        else:
            extra = {"targets": torch.tensor([1, 2, 63], device=DEVICE)} if op == "cross_entropy" else {}
            inputs = {"logits" if op == "cross_entropy" else "x": x, **extra}
        with checked("triton"), torch.no_grad():
            results.append(OPS[op].implementations["triton"](**inputs))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_offsets_of_heads_beyond_two_to_the_31():
    """[B, H, T, D] in memory, seen as [B, T, H, D]."""
    distance = 2**30 + 16
    far = torch.empty(2 * distance + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (1, 3, 3, 16), (48, 16, distance, 1)
    )
    near = torch.randn(1, 3, 3, 16, device=DEVICE).bfloat16()
    far.copy_(near)
    options, (cos, sin) = (0.25, True, 0, 0.0), rope_tables(3, 16, device=DEVICE)
    attend, backward, turn_back = (IMPLEMENTATIONS[name] for name in ("attention_fwd", "attention_bwd", "rope_bwd"))
    with checked("triton"):
        saved = attend(near, near, near, None, None, None, *options)
        results = [
            (
                *attend(x, x, x, None, None, None, *options),
                *backward(x, x, x, x, None, None, None, *saved, *options),
                turn_back(x, x, x, None, cos, sin, None, None, None, 1e-6, False)[0],
            )
            for x in (far, near)
        ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# Launch parameters.

CANDIDATES = [
    pytest.param(op, table, tile, id=f"{op.name}{table.kernel}-{tile}")
    for op in WITH_TRITON if op.name in ("rmsnorm", "rope", "swiglu") for table in op.launches
    for tile in table.candidates(min(table.entries))
]  # fmt: skip


@pytest.mark.parametrize("op, table, tile", CANDIDATES)
def test_every_candidate_is_right(op, table, tile, monkeypatch):
    """At the smallest size class; candidates of the others are scaled from it."""
    shape = {"rmsnorm": {"rows": 9, "D": 600}, "rope": {"B": 1, "T": 9, "H": 2, "KV": 1, "D": 64}}.get(
        op.name, {"rows": 5, "F": 1200}
    )
    inputs = draw(op, shape)
    expected = results_of(op, "torch", inputs)
    for size in table.entries:
        monkeypatch.setitem(table.entries, size, {"": tile})
    torch.testing.assert_close(results_of(op, "triton", inputs), expected, rtol=1e-5, atol=1e-5)


# As torch.library ops, and compiled.


@pytest.mark.parametrize("current, entered", [(0, []), (1, [0])])
def test_a_launch_is_on_the_gpu_of_the_tensors(monkeypatch, current, entered):
    """Which is entered unless it is the current one; a list of tensors is where its first is."""
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: devices.append(index) or nullcontext())

    class OnGpu0:
        def get_device(self):
            return 0

    x, y = OnGpu0(), torch.ones(3)
    assert _on_its_gpu(lambda *tensors: tensors)(x, y) == (x, y) and devices == entered
    assert _on_its_gpu(lambda *tensors: tensors)([x], y) == ([x], y) and devices == 2 * entered


def test_the_host_function_is_called_unless_something_looks_on():
    """A mode, a subclass of tensors and a compiler see the op; plain calls save the way through the dispatcher."""

    class Plain(torch.Tensor):
        pass

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})

    op, x, seen = OPS["swiglu"].implementations["triton"], torch.randn(2, 8, device=DEVICE), []
    expected = op(x)
    with torch.profiler.profile() as profile:
        op(x)
        assert torch.equal(op(x.as_subclass(Plain)), expected)
    assert sum(event.name == "nanofuse::swiglu_fwd" for event in profile.events()) == 1
    with Recorder():
        op(x)
    assert seen == [torch.ops.nanofuse.swiglu_fwd.default]


def library_calls():
    """Arguments of every op of the library, from the ops that it serves."""
    inputs = {op.name: draw(op, op.test_shapes[1]) for op in WITH_TRITON}
    x, gain, residual = (inputs["rmsnorm"][k] for k in ("x", "gain", "residual"))
    rstd = torch.rand(len(x), device=DEVICE)
    packed = inputs["swiglu"]["x"]
    qkv, cos, sin, q_gain, k_gain = (inputs["rope"][k] for k in ("qkv", "cos", "sin", "q_gain", "k_gain"))
    q, k, v = OPS["rope"].implementations["torch"](qkv, cos, sin, 4, 2)
    query, key, value = inputs["attention"].values()
    lse = torch.randn(2, query.shape[0], query.shape[2], query.shape[1], device=DEVICE)  # and the maximum, in float32
    documents = document_ranges(torch.arange(key.shape[1], device=DEVICE).expand(key.shape[:2]) // 5)
    sink = torch.randn(query.shape[2], device=DEVICE)
    logits, targets = inputs["cross_entropy"].values()
    loss, stats = torch.ops.nanofuse.cross_entropy_fwd(logits, targets, 0.0, 0.0, 0.0, IGNORE)
    hidden, head, head_targets = inputs["linear_cross_entropy"].values()
    *tensors, copies, lr, step, grad_scale, beta1, beta2, eps, decay = (
        OPS["adamw"].inputs({"N": 2, "n": 9}, lambda *size: torch.randn(*size, device=DEVICE)).values()
    )
    one = torch.ones(1, device=DEVICE)
    scalars = lr, step, grad_scale, beta1, beta2, eps, decay
    codes, head_codes, *scales, _, _ = inputs["fp8_linear"].values()
    no_codes, dz_codes = (None, None), (torch.empty(logits.shape, dtype=torch.float8_e5m2, device=DEVICE), one)
    quantized = OPS["fp8_quantize"].draw({"rows": 5, "columns": 9}, torch.float32, DEVICE)
    eight, four = (OPS["block_quantize"].draw({"rows": 5, "columns": 9, "bits": b}, x.dtype, DEVICE) for b in (8, 4))
    result = "x", "codes", "block_scale", "scale", "codes_t", "block_scale_t", "scale_t"
    seed, signs = torch.ones(1, dtype=torch.int64, device=DEVICE), torch.ones(16, device=DEVICE)
    return {
        "adamw_": [(*tensors, copies[1:], [1], *scalars, True), (*tensors, [], [], *scalars, False)],
        "attention_fwd": [
            (query, key, value, None, None, None, 0.2, True, 0, 0.0),
            (query, key, value, documents, sink, sink, 0.2, False, 3, 5.0),
        ],
        "attention_bwd": [
            (query, query, key, value, None, None, None, query, lse, 0.2, True, 0, 0.0),
            (query, query, key, value, documents, sink, sink, query, lse, 0.2, False, 3, 5.0),
        ],
        "fp8_linear": [(codes, head_codes, *scales, torch.bfloat16, precise) for precise in (False, True)],
        "block_scaled_linear": [
            tuple(OPS["block_scaled_linear"].draw(shape, x.dtype, DEVICE).values())
            for shape in OPS["block_scaled_linear"].test_shapes[2:4]
        ],
        "block_quantize_": [
            (*(eight[key] for key in result[:4]), None, None, None, False, None, None),
            (*(four[key] for key in result), True, seed, signs),
        ],
        "fp8_quantize_": [tuple(quantized.values()), (*list(quantized.values())[:3], None, None)],
        "rmsnorm_fwd": [(x, gain, residual, 1e-6), (x, None, None, 1e-6)],
        "rmsnorm_fp8_fwd": [(x, gain, residual, 1e-6, one, 0 * one), (x, None, None, 1e-6, one, None)],
        "rmsnorm_bwd": [(x, residual, x, gain, rstd, False), (x.half(), None, x, None, rstd, True)],
        "rope_fwd": [(qkv, cos, sin, q_gain, k_gain, None, 4, 2, 1e-6, False)],
        "rope_bwd": [(q, k, v, qkv, cos, sin, q_gain, k_gain, None, 1e-6, True)],
        "swiglu_fwd": [(packed, "silu", True), (packed, "relu2", False)],
        "swiglu_fp8_fwd": [(packed, "silu", True, one, 0 * one), (packed, "relu2", False, one, None)],
        "swiglu_fp8_bwd": [
            (packed[:, ::2], packed, "silu", True, one, 0 * one),
            (packed, packed, "relu2", False, one, 0 * one),
        ],
        "swiglu_bwd": [(packed[:, ::2], packed, "silu", True), (packed, packed, "relu2", False)],
        "cross_entropy_fwd": [(logits, targets, 0.0, 0.0, 0.0, IGNORE)],
        "cross_entropy_bwd": [(loss, logits, targets, stats, 0.0, 0.0, 0.0, IGNORE)],
        "cross_entropy_bwd_": [(loss, logits.clone(), targets, stats, 0.0, 0.0, 0.0, IGNORE)],
        "cross_entropy_in_place": [
            (logits.clone(), targets, loss.clone(), weights, 0.0, 0.0, 0.0, IGNORE, logits.shape[1], *to)
            for weights, to in ((None, no_codes), (loss, no_codes), (torch.rand((), device=DEVICE), dz_codes))
        ],
        "linear_cross_entropy": [
            (hidden, F.pad(head, (0, 0, 0, 27)), head_targets, None, len(head), 0.0, 0.0, 0.0, IGNORE, with_dx, True)
            for with_dx in (True, False)
        ],
        "scale_": [(x.clone(), torch.rand((), device=DEVICE))],
    }


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name.rstrip("_") not in LACKING])
def test_library_op_is_what_torch_expects(name):
    for arguments in library_calls()[name]:
        checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if "fp8" in name or name.startswith("block_") or any(torch.is_tensor(x) and x.itemsize == 1 for x in arguments):
            checks.remove("test_schema")  # compares copies by arithmetic, which fp8 has none of
        torch.library.opcheck(getattr(torch.ops.nanofuse, name).default, arguments, test_utils=checks)


def small_gpt(kernels, **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 64, "seq_len": 24, "tied": True}
    config = ModelConfig(**(sizes | changes)).resolved(101)
    return GPT(config, bind(kernels, DEVICE)).to(DEVICE)


def batch(seed=0, rows=3):
    ids = torch.randint(101, (rows, 25), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("autocast", [False, True])
def test_whole_model_compiles_as_one_graph(autocast):
    """Loss and gradients of the traced model, forward and backward, are those of the model as written."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = small_gpt(KernelChoice(every="triton"))
        function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss = function(*batch())
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain, rtol=1e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6)


# In the model.


@interpreted
@pytest.mark.parametrize("op", [op.name for op in DIFFERENTIABLE if hasattr(KernelChoice, op.name)])
def test_a_flag_swaps_its_op_and_no_other(op):
    model = small_gpt(KernelChoice(**{"every": "torch", op: "triton"}))
    with sanitize() as record:
        model(*batch()).backward()
    own = {"linear_cross_entropy": ("cross_entropy", "scale")}.get(op, (op, "sum_rows"))
    assert record.kernels and all(any(part in name for part in own) for name in record.kernels)


@interpreted
@pytest.mark.parametrize("shape", [{"n_layer": 1}, {"window": "SL:8", "separator": 0}], ids=["plain", "windows"])
def test_training_follows_the_reference(shape):
    """Twelve steps of AdamW on changing batches: losses agree to rounding, which the steps amplify, at every one.
    With grouped queries; with a window in one layer of two, and documents of some ten tokens."""
    models = [small_gpt(KernelChoice(every=every), **shape) for every in ("torch", "triton")]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-3) for model in models]
    losses = []
    for step in range(12):
        losses.append([])
        for model, optimizer in zip(models, optimizers, strict=True):
            ids, targets = batch(step % 2, rows=2)
            loss = model(ids.where(ids > 10, 0), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    reference, ours = torch.tensor(losses).T
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=0)
    assert ours[-2:].mean() < 0.75 * ours[:2].mean()
