"""Property-based tests: Triton against the reference on random shapes, strides and targets."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DEVICE, assert_accurate, checked

from kernels import OPS
from kernels.attention import document_ranges
from kernels.linear_cross_entropy import IGNORE
from kernels.rope import rope_tables

drawn = settings(max_examples=10, deadline=None, derandomize=True)
sizes = st.integers(1, 9)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)


def normal(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


@drawn
@given(sizes, st.integers(1, 600), dtypes, st.booleans(), seeds)
def test_rmsnorm(rows, d, dtype, residual, seed):
    inputs = {"x": normal((rows, d), dtype, seed), "gain": normal(d, dtype, seed + 1)}
    inputs["residual"] = normal((rows, d), dtype, seed + 2)
    options = {} if residual else {"residual": None}
    assert_accurate(OPS["rmsnorm"], "triton", inputs, **options)


@drawn
@given(sizes, st.integers(1, 600), dtypes, st.sampled_from(["silu", "gelu", "relu", "relu2"]), seeds)
def test_swiglu(rows, f, dtype, activation, seed):
    inputs = {"x": normal((rows, 2 * f), dtype, seed)}
    assert_accurate(OPS["swiglu"], "triton", inputs, activation=activation)


@drawn
@given(sizes, sizes, st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), dtypes, st.booleans(), seeds)
def test_rope(b, t, kv, group, half, dtype, interleaved, seed):
    """Any head dimension, any grouping of heads, positions in any order."""
    cos, sin = rope_tables(50, 2 * half, device=DEVICE)
    inputs = {
        "qkv": normal((b, t, (group * kv + 2 * kv) * 2 * half), dtype, seed), "cos": cos, "sin": sin,
        "n_head": group * kv, "n_kv_head": kv,
        "q_gain": normal(2 * half, dtype, seed + 1), "k_gain": normal(2 * half, dtype, seed + 2),
        "positions": torch.randint(50, (b, t), generator=torch.Generator().manual_seed(seed)).to(DEVICE),
    }  # fmt: skip
    assert_accurate(OPS["rope"], "triton", inputs, interleaved=interleaved)


@drawn
@given(
    sizes, st.integers(1, 5000), dtypes, st.sampled_from(["mean", "sum", "none"]), st.sampled_from([0.0, 0.2]), seeds
)
def test_cross_entropy(n, v, dtype, reduction, label_smoothing, seed):
    targets = torch.randint(IGNORE, v, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    inputs = {"logits": normal((n, v), dtype, seed), "targets": targets}
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_accurate(OPS["cross_entropy"], "triton", inputs, **options)


@drawn
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 3), st.integers(1, 3), st.sampled_from([16, 24, 64]), dtypes,
    st.booleans(), st.sampled_from([0, 2, 7, 40]), st.lists(st.integers(0, 30), max_size=12), seeds,
)  # fmt: skip
def test_attention(t, s, kv, group, d, dtype, causal, window, lengths, seed):
    """Any number of queries, keys and heads, any window, any documents including empty ones."""
    inputs = {"q": normal((2, t, group * kv, d), dtype, seed)}
    inputs |= {name: normal((2, s, kv, d), dtype, seed + i) for i, name in enumerate("kv", 1)}
    documents = torch.searchsorted(torch.tensor(lengths).cumsum(0), torch.arange(s), right=True)
    options = {"causal": causal, "window": window, "documents": document_ranges(documents.repeat(2, 1).to(DEVICE))}
    assert_accurate(OPS["attention"], "triton", inputs, **options)


@drawn
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.permutations(range(3)), st.integers(1, 3), seeds)
def test_any_strides(a, b, d, order, step, seed):
    """Permuted and strided views of three dimensions equal their contiguous copies bitwise."""
    x = normal((2 * a, 2 * b * step, 2 * d), torch.float32, seed)[:, ::step].permute(order)
    swiglu, rmsnorm = (OPS[name].implementations["triton"] for name in ("swiglu", "rmsnorm"))
    with checked("triton"):
        torch.testing.assert_close(rmsnorm(x), rmsnorm(x.contiguous()), rtol=0, atol=0)
        torch.testing.assert_close(swiglu(x), swiglu(x.contiguous()), rtol=0, atol=0)
