"""Attention: every pair of features together, masks, short sequences, launch parameters, large scores, `auto`.

tests/plain_attention.py holds the plain causal forward that both are compared with.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations, product

import pytest
import torch
from parity import DEVICE, assert_accurate, checked, draw, interpreted, results_of
from plain_attention import plain_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention
from kernels.attention import (
    LOWEST,
    OP,
    TABLES,
    Tile,
    attention_auto,
    attention_sdpa,
    attention_torch,
    attention_triton,
    choice,
    document_ranges,
    visible,
)  # fmt: skip
from kernels.launch import IMPLEMENTATIONS
from kernels.sanitizer import sanitize

WITH_SINK = replace(OP, differentiable=("q", "k", "v", "sink"))
AXES = {
    "lengths": [(1, 1), (37, 37), (130, 130), (150, 150), (1, 70), (30, 101), (50, 20)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "d": [16, 32, 64, 96, 128, 256],
    "causal": [True, False],
    "window": [0, 2, 19, 64],
    "documents": [False, True],
    "softcap": [0.0, 2.0],
    "sink": [False, True],
    "slopes": [False, True],
    "scale": [None, 0.4],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "short": [True, False],
}


def pairwise(axes):
    """Pairwise test cases, built greedily: every pair of values of two axes occurs in some case."""
    names = list(axes)
    missing = {
        ((a, i), (b, j)) for a, b in combinations(names, 2) for i in range(len(axes[a])) for j in range(len(axes[b]))
    }
    generator = torch.Generator().manual_seed(0)
    cases = []
    while missing:
        wanted = dict(min(missing, key=str))
        best = None
        for _ in range(60):
            drawn = {name: torch.randint(len(axes[name]), (), generator=generator).item() for name in names} | wanted
            shown = missing & set(combinations(drawn.items(), 2))
            best = max(best or (0, {}, set()), (len(shown), drawn, shown), key=lambda found: found[0])
        missing -= best[2]
        cases.append({name: axes[name][i] for name, i in best[1].items()})
    return cases


def ranges_of(b, s, seed=0):
    """`documents` of random lengths, including 0 and 1, different in each sequence."""
    lengths = torch.randint(0, 12, (b, s), generator=torch.Generator().manual_seed(seed)).square() // 2
    ends = lengths.cumsum(1)
    return document_ranges(torch.searchsorted(ends, torch.arange(s).repeat(b, 1), right=True).to(DEVICE))


def inputs_of(t, s, h=4, kv=2, d=32, b=2, dtype=torch.float32, seed=0):
    return draw(OP, {"B": b, "T": t, "S": s, "H": h, "KV": kv, "D": d}, dtype, seed)


def launched(inputs, **options):
    """The interpreter's record of a forward and a backward pass."""
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    with sanitize(bounds=False, races=False, overflow=False) as record:
        attention_triton(**leaves, **options).sum().backward()
    return record


def test_pairs_are_all_there():
    shown = set()
    for case in pairwise(AXES):
        shown |= set(combinations(case.items(), 2))
    assert shown == {((a, x), (b, y)) for a, b in combinations(AXES, 2) for x, y in product(AXES[a], AXES[b])}


@pytest.mark.parametrize("case", pairwise(AXES), ids=lambda case: "-".join(map(str, case.values())))
def test_parity_of_features_together(case, monkeypatch):
    allow_short(monkeypatch, case["short"])
    (t, s), (h, kv), dtype = case["lengths"], case["heads"], case["dtype"]
    inputs = inputs_of(t, s, h, kv, case["d"], b=9 if t == 1 else 2 if s <= 100 else 1, dtype=dtype)
    inputs |= {name: case[name] for name in ("causal", "window", "softcap", "scale")}
    inputs["documents"] = ranges_of(len(inputs["q"]), s) if case["documents"] else None
    inputs["sink"] = torch.linspace(-2, 2, h, device=DEVICE) if case["sink"] else None
    inputs["slopes"] = 2.0 ** -torch.arange(1, h + 1, device=DEVICE) if case["slopes"] else None
    assert_accurate(WITH_SINK if case["sink"] else OP, "triton", inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1, 32, 75])
def test_plain_flash_attention_and_ours_are_as_accurate_as_the_reference(t, dtype):
    inputs = inputs_of(t, t, h=2, kv=2, b=2, dtype=dtype)
    implementations = OP.implementations | {"plain": partial(plain_attention, block=32)}
    forward = replace(OP, differentiable=(), implementations=implementations)
    for name in ("plain", "triton"):
        assert_accurate(forward, name, inputs)


@pytest.mark.parametrize("softcap", [30.0, 50.0, 1000.0])
def test_a_softcap_that_bends_little_loses_nothing(softcap):
    """Most arguments of tanh are near 0, where a naive tanh cancels."""
    inputs = inputs_of(37, 37) | {"softcap": softcap}
    assert_accurate(OP, "triton", inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_saved_log_sum_exp(causal, packed):
    q, k, v = inputs_of(41, 60).values()
    documents = ranges_of(2, 60) if packed else None
    sink = torch.randn(4, device=DEVICE)
    with checked("triton"):
        _, lse = IMPLEMENTATIONS["attention_fwd"](q, k, v, documents, sink, None, 0.3, causal, 9, 2.0)
    scores = 2 * torch.tanh(torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, 2)) * 0.15)
    seen = visible(41, 60, causal, 9, documents, DEVICE)
    scores = scores.masked_fill(~(seen[:, None] if packed else seen), -torch.inf)
    truth = torch.cat((scores, sink.double().view(1, 4, 1, 1).expand(2, 4, 41, 1)), -1).logsumexp(-1)
    relative, m = lse.double()  # base 2, and in units of the softcap
    torch.testing.assert_close(relative * math.log(2) + 2 * m, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OP.implementations)
def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient(name, dtype):
    """20 queries over 7 keys: the first 13 queries are before all keys."""
    results = results_of(OP, name, inputs_of(20, 7, dtype=dtype))
    for key in ("output 0", "gradient of q"):
        assert not results[key][:, :13].any() and results[key][:, 14:].all(-1).any(), key
    assert all(result.isfinite().all() for result in results.values())


def test_a_query_that_sees_nothing_has_a_finite_log_sum_exp():
    q, k, v = inputs_of(20, 7).values()
    for dtype in (torch.float32, torch.bfloat16):
        given = (x.to(dtype) for x in (q, k, v))
        lse = IMPLEMENTATIONS["attention_fwd"](*given, None, None, None, 0.3, True, 0, 0.0)[1]
        assert lse.isfinite().all() and (lse[-1, ..., :13] < 0.1 * LOWEST).all() and (lse[-1, ..., 13:] > -100).all()


@pytest.mark.parametrize("window", [150, 151, 10**6])
def test_a_window_over_everything_is_none_bit_for_bit(window):
    inputs = inputs_of(150, 150, dtype=torch.bfloat16, d=64)
    plain, windowed = (results_of(OP, "triton", inputs, window=w) for w in (0, window))
    assert all(torch.equal(plain[key], windowed[key]) for key in plain)


def test_a_window_of_one_gives_the_value_itself():
    inputs = inputs_of(20, 50, h=2)
    results = results_of(OP, "triton", inputs, window=1)
    assert torch.equal(results["output 0"], inputs["v"][:, 30:])
    assert not results["gradient of v"][:, :30].any()


@pytest.mark.parametrize("name", OP.implementations)
def test_slopes_take_off_by_distance(name):
    q, k, v = inputs_of(20, 30, h=4, kv=4).values()
    slopes = torch.tensor([0.0, 0.25, 1.0, 100.0], device=DEVICE)
    out = OP.implementations[name](q, k, v, slopes=slopes)
    torch.testing.assert_close(out[:, :, 0], attention_torch(q[:, :, :1], k[:, :, :1], v[:, :, :1])[:, :, 0])
    torch.testing.assert_close(out[:, :, 3], v[:, 10:, 3])  # nothing but its own place
    for place in range(20):
        scores = torch.einsum("bhd,bshd->bhs", q[:, place], k[:, : place + 11]) * 32**-0.5
        scores += slopes[:, None] * torch.arange(-place - 10, 1, device=DEVICE)
        expected = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : place + 11])
        torch.testing.assert_close(out[:, place], expected)


def test_a_sink_without_weight_is_none_bit_for_bit():
    inputs = inputs_of(40, 40)
    sink = torch.full((4,), -torch.inf, device=DEVICE)
    plain, sunk = (results_of(OP, "triton", inputs, sink=s) for s in (None, sink))
    assert all(torch.equal(plain[key], sunk[key]) for key in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_future_changes_nothing_before_it(dtype):
    """Outputs and gradients are bitwise equal under a loss on the first 71 of 140 outputs."""
    results = []
    for factor in (1, -3):
        inputs = inputs_of(140, 140, dtype=dtype)
        leaves = [torch.cat((x[:, :71], factor * x[:, 71:]), 1).requires_grad_() for x in inputs.values()]
        with checked("triton"):
            out = attention_triton(*leaves)[:, :71]
            results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, :71], other[:, :71])
        assert not one[:, 71:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_documents_are_as_if_alone(causal):
    """Changing one document leaves the others bitwise equal, and each equals attention within it alone."""
    lengths = [1, 40, 70, 2, 37]
    index = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    packed = {"documents": document_ranges(index.expand(2, -1).to(DEVICE)), "causal": causal}
    inputs = inputs_of(150, 150, d=16)
    whole = results_of(OP, "triton", inputs, **packed)
    inside = (index == 2).to(DEVICE)
    changed = {key: torch.where(inside[:, None, None], -2 * x, x) for key, x in inputs.items()}
    other = results_of(OP, "triton", changed, **packed)
    for key in whole:
        assert torch.equal(whole[key][:, ~inside], other[key][:, ~inside])
        assert not torch.equal(whole[key][:, inside], other[key][:, inside])
    place = 0
    for length in lengths:
        own = slice(place, place + length)
        alone = attention_torch(*(x[:, own] for x in inputs.values()), causal=causal)
        torch.testing.assert_close(whole["output 0"][:, own], alone)
        place += length


def test_document_ranges():
    ids = torch.tensor([[0, 0, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5]])
    starts, ends = document_ranges(ids)
    assert starts.tolist() == [[0, 0, 2, 3, 3, 3], [0] * 6] and ends.tolist() == [[2, 2, 3, 6, 6, 6], [6] * 6]
    assert starts.dtype == ends.dtype == torch.int32


def test_backward_repeats_bit_for_bit_whatever_the_order_of_programs():
    inputs = inputs_of(150, 150, dtype=torch.bfloat16, d=64, b=1)
    options = {"documents": ranges_of(1, 150), "window": 50, "softcap": 3.0}
    results = []
    for seed in range(2):
        with sanitize(shuffle=seed) if DEVICE.type == "cpu" else checked(""):
            results.append(results_of(OP, "triton", inputs, **options))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def work(seen, own, partner):
    """Scores computed in blocks of `own` rows by `partner` columns, from the first visible column to the last."""
    total = 0
    for rows in seen.split(own):
        columns = rows.any(0).nonzero()
        span = columns.max() - columns.min() + 1
        total += own * partner * -(-span.item() // partner)
    return total


@interpreted
@pytest.mark.parametrize(
    "options", [{"causal": False}, {}, {"window": 16}, {"documents": 64}, {"documents": 100}], ids=str
)
def test_tiles_that_are_hidden_are_skipped(options):
    documents = None
    if "documents" in options:
        documents = document_ranges((torch.arange(256) // options["documents"]).expand(1, -1))
    options = {"causal": True, "window": 0} | options | {"documents": documents}
    record = launched(inputs_of(256, 256, d=16, dtype=torch.bfloat16, b=1), **options)
    seen = visible(256, 256, device="cpu", **options).view(256, 256)
    for kernel, transposed, products in ("fwd", False, 2), ("dkv", True, 4), ("dq", False, 3):
        chosen = TABLES[kernel].pick((64, 256), "sm_90")
        name = f"_attention_{'bwd_' * (kernel != 'fwd')}{kernel}_kernel"
        if name not in record.kernels:
            assert options["causal"] and not options["window"] and documents is None
            continue
        tile = chosen.block_t, chosen.block_s
        expected = work(seen.T, *reversed(tile)) if transposed else work(seen, *tile)
        assert record.kernels[name].flops == 4 * products * 2 * 16 * expected, kernel


def allow_short(monkeypatch, allowed=True):
    """Allow the short kernels for any number of heads, or forbid them."""
    monkeypatch.setattr(attention, "n_sm", lambda device: 1 if allowed else 10**9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 2, 64), (2, 37, 4, 2, 16), (1, 128, 2, 1, 64), (1, 130, 2, 2, 48)], ids=str
)
def test_short_sequences(shape, dtype, monkeypatch):
    b, t, h, kv, d = shape
    allow_short(monkeypatch)
    inputs = inputs_of(t, t, h, kv, d, b, dtype)
    assert_accurate(OP, "triton", inputs, scale=0.2)
    results = [results_of(OP, "triton", inputs)]
    allow_short(monkeypatch, False)
    results.append(results_of(OP, "triton", inputs))
    for key, short in results[0].items():
        torch.testing.assert_close(short, results[1][key], rtol=2e-2, atol=2e-2)


def test_short_sequences_take_nothing_from_keys_that_are_not_there(monkeypatch):
    """All scores are near -190: a padded key with a score of 0 would overflow the softmax weights."""
    allow_short(monkeypatch)
    inputs = inputs_of(100, 100, d=64, dtype=torch.bfloat16)
    inputs |= {"q": -inputs["q"].abs(), "k": 4 + inputs["k"].abs(), "scale": 0.75}
    assert_accurate(OP, "triton", inputs)


SHORT, GENERAL = ("short_fwd", "short_bwd"), ("fwd", "bwd_dq", "bwd_dkv")


@interpreted
@pytest.mark.parametrize("t, s, dtype, options, kernels", [
    (128, 128, torch.float16, {}, SHORT),
    (257, 257, torch.float16, {}, GENERAL),
    (20, 20, torch.float16, {"window": 20}, SHORT),
    (20, 20, torch.float16, {"window": 19}, GENERAL),
    (20, 20, torch.float16, {"causal": False}, GENERAL),
    (20, 20, torch.float16, {"softcap": 1.0}, GENERAL),
    (20, 20, torch.float16, {"sink": torch.zeros(4)}, GENERAL),
    (20, 20, torch.float16, {"slopes": torch.zeros(4)}, GENERAL),
    (20, 20, torch.float32, {}, GENERAL),
    (19, 20, torch.float16, {}, GENERAL),
], ids=str)  # fmt: skip
def test_which_kernels_serve(t, s, dtype, options, kernels):
    record = launched(inputs_of(t, s, d=16, b=1, dtype=dtype), **options)
    assert set(record.kernels) == {f"_attention_{kernel}_kernel" for kernel in kernels}


@interpreted
def test_few_heads_are_no_programs_enough_for_the_short_kernels(monkeypatch):
    monkeypatch.setattr(attention, "n_sm", lambda device: 3)
    for b, kernels in ((1, GENERAL), (2, SHORT)):
        record = launched(inputs_of(20, 20, d=16, b=b, dtype=torch.bfloat16))
        assert set(record.kernels) == {f"_attention_{kernel}_kernel" for kernel in kernels}


@pytest.mark.parametrize("factor, offset", [(3, 0), (10, 0), (1, 10)])
def test_large_scores_lose_no_digits_in_float32(factor, offset):
    """Scores of tens or hundreds, and all of them `offset` squared higher. They are exact, since q and k are multiples
    of 1/8: the error is the softmax's, some roundoffs of the differences of scores that are left a weight. Where that
    of one key is nearly 1 the gradients of q and k are differences of nearly equal numbers, and lose more."""
    inputs = inputs_of(50, 50, d=16)
    for key in "q", "k":
        inputs[key] = (8 * factor * inputs[key]).round() / 8
        inputs[key][..., 0] = offset
    exact, ours = (
        results_of(OP, name, inputs, scale=1.0) for name, dtype in (("torch", torch.float64), ("triton", torch.float32))
    )
    roundoffs = {"output 0": 3, "gradient of v": 3} | dict.fromkeys(("gradient of q", "gradient of k"), 12 + factor**2)
    for key, truth in exact.items():
        error = (ours[key].double() - truth).norm() / truth.norm()
        assert error <= roundoffs[key] * torch.finfo(torch.float32).eps, key


@pytest.mark.parametrize("per_head", ["sink", "slopes"])
def test_numbers_per_head_may_lie_apart_or_be_one(per_head):
    inputs = inputs_of(9, 9)
    for values in (torch.rand(4, 3, device=DEVICE)[:, 1], torch.rand(1, device=DEVICE).expand(4)):
        with checked("triton"):
            ours = attention_triton(**inputs, **{per_head: values})
        torch.testing.assert_close(ours, attention_torch(**inputs, **{per_head: values}))


def test_packed_projection_is_read_without_copies():
    """q, k and v are slices of one tensor, strided over the heads of the others."""

    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function._schema.name)
            return function(*args, **kwargs or {})

    packed = torch.randn(2, 33, 8, 16, device=DEVICE)
    q, k, v = packed.split((4, 2, 2), dim=2)
    implementation = IMPLEMENTATIONS["attention_fwd"]
    with Seen():
        out, _ = implementation(q, k, v, None, None, None, 0.25, True, 0, 0.0)
    assert "aten::new_empty" in names and "aten::clone" not in names
    torch.testing.assert_close(out, attention_torch(q, k, v, 0.25))


@pytest.mark.parametrize("options, message", [
    ({"window": -1}, "window must be 0, for none, or more, not -1"),
    ({"softcap": -1.0}, "softcap must be 0"),
    ({"scale": 0.0}, "scale must be more than 0"),
    ({"documents": torch.zeros(2, 17)}, r"documents \[2, 17\] torch.float32 are not int32 \[2, 2, 17\]"),
    ({"sink": torch.zeros(3)}, r"sink \[3\] is not one number for each of 4 heads"),
    ({"slopes": torch.zeros(2)}, r"slopes \[2\] is not one number for each of 4 heads"),
    ({"v": torch.zeros(2, 17, 2, 16)}, "cannot attend"),
    ({"q": torch.zeros(1, 17, 4, 32)}, "cannot attend"),
    ({"q": torch.zeros(2, 17, 3, 32)}, "cannot attend"),
])  # fmt: skip
@pytest.mark.parametrize("name", OP.implementations)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        OP.implementations[name](**inputs_of(17, 17) | options)


def test_what_an_implementation_lacks_names_one_that_has_it():
    inputs = inputs_of(5, 5)
    with pytest.raises(ValueError, match=r"--kernels\.attention=sdpa"):
        attention_triton(**inputs, dropout=0.1)
    for options in ({"softcap": 2.0}, {"sink": torch.zeros(4, device=DEVICE)}):
        with pytest.raises(ValueError, match=r"--kernels\.attention=triton or torch"):
            attention_sdpa(**inputs, **options)


@pytest.mark.parametrize("name", ["torch", "sdpa"])
def test_dropout_keeps_the_mean(name):
    inputs = {key: x.expand(400, -1, -1, -1) for key, x in inputs_of(12, 12, b=1).items()}
    torch.manual_seed(0)
    plain, dropped = (OP.implementations[name](**inputs, dropout=p) for p in (0.0, 0.5))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain[0], rtol=0, atol=0.3)


@interpreted
@pytest.mark.parametrize("kernel", TABLES)
def test_every_candidate_passes_the_sanitizer(kernel, monkeypatch):
    """One full and one partial block. Candidates that differ in warps or stages alone are run once."""
    table, short = TABLES[kernel], kernel.startswith("short")
    monkeypatch.setattr(attention, "n_sm", lambda device: 1 if short else 10**9)
    distinct = {
        (size[1] if short else 0, tile.block_t, tile.block_s, tile.descriptors): tile
        for size in table.entries
        for tile in table.candidates(size)
    }
    for (length, *_), tile in distinct.items():
        t = length - 7 if short else (tile.block_s if kernel == "dkv" else tile.block_t) + 5
        monkeypatch.setitem(table.entries[attention._size(16, t)], "sm_90", tile)
        leaves = [x.requires_grad_() for x in inputs_of(t, t, 1, 1, 16, 1, torch.bfloat16).values()]
        with sanitize() as record:
            out = attention_triton(*leaves)
            if table.backward:
                out.sum().backward()
        results = [x.grad for x in leaves] if table.backward else [out]
        assert all(x.isfinite().all() for x in results), tile
        assert any(name.endswith(f"_{kernel.replace(' ', '_')}_kernel") for name in record.kernels)


@interpreted
def test_descriptors_load_what_pointers_load(monkeypatch):
    """Results are bitwise equal. Tensors not aligned to 16 bytes fall back to pointers."""
    made = []
    monkeypatch.setattr(
        attention, "_descriptor", lambda *args, make=attention._descriptor: made.append(1) or make(*args)
    )
    options = {"window": 30, "softcap": 3.0}
    packed, odd = (inputs_of(40, 70, 2, 1, d, 1, torch.bfloat16) for d in (16, 12))
    for inputs, expected in ((packed, 11), (odd, 0)):
        results = []
        for descriptors in (False, True):
            for kernel in ("fwd", "dq", "dkv"):
                monkeypatch.setitem(TABLES[kernel].entries[64, 128], "sm_90", Tile(32, 32, 4, 2, descriptors))
            results.append(results_of(OP, "triton", inputs, **options))
        assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
        assert len(made) == expected
        made.clear()


@pytest.mark.parametrize("kernel", TABLES)
def test_tables_have_candidates_and_shapes_for_every_size(kernel):
    table = TABLES[kernel]
    for size, cards in table.entries.items():
        found = table.candidates(size)
        assert found[0] == replace(table.pick(size, "sm_90")) and len(set(found)) == len(found)
        assert all(isinstance(tile, Tile) for tile in cards.values())
        for shape in table.shapes(size):
            assert attention._size(shape["D"], shape["S"]) == size


@pytest.mark.parametrize("asked, expected", [
    ({}, "sdpa"),
    ({"t": 1, "s": 300}, "sdpa"),
    ({"t": 20}, "triton"),
    ({"t": 20, "causal": False}, "sdpa"),
    ({"window": 1023}, "triton"),
    ({"window": 1024}, "sdpa"),
    ({"window": 1024, "causal": False}, "triton"),
    ({"documents": True}, "triton"),
    ({"softcap": 50.0}, "triton"),
    ({"sink": True}, "triton"),
    ({"slopes": True}, "triton"),
    ({"dropout": 0.1}, "sdpa"),
    ({"dropout": 0.1, "documents": True}, "sdpa"),
    ({"dropout": 0.1, "sink": True}, "torch"),
    ({"d": 512}, "sdpa"),
    ({"d": 512, "softcap": 1.0}, "torch"),
    ({"t": 128, "s": 128}, "triton"),
    ({"t": 128, "s": 128, "training": False}, "sdpa"),
    ({"t": 128, "s": 128, "half": False}, "sdpa"),
    ({"t": 128, "s": 128, "d": 128}, "sdpa"),
    ({"t": 129, "s": 129}, "sdpa"),
], ids=str)  # fmt: skip
def test_what_auto_takes(asked, expected):
    name, why = choice(**{"t": 1024, "s": 1024, "d": 64, "training": True} | asked)
    assert name == expected and why


def test_auto_hands_on_what_it_was_given(monkeypatch):
    """`auto` passes every argument on to the implementation that it chooses."""
    inputs = inputs_of(9, 9) | {"scale": 0.3, "window": 3, "softcap": 2.0, "slopes": torch.rand(4, device=DEVICE)}
    inputs |= {"documents": ranges_of(2, 9), "sink": torch.rand(4, device=DEVICE), "causal": False}
    torch.testing.assert_close(attention_auto(**inputs), attention_torch(**inputs))
