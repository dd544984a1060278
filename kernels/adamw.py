"""AdamW over a list of tensors, in place, in one pass that also clips gradients and writes half-precision copies.

With c the clipping factor (`grad_scale`), t the number of this step, counted from 1, and w the weight decay:

    g = c * grad                            Adam (`decoupled=False`) adds w * p to it
    m = beta1 * m + (1 - beta1) * g         exp_avg
    v = beta2 * v + (1 - beta2) * g^2       exp_avg_sq
    p = p - lr * w * p                      AdamW alone
    p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The rate, the step and the clipping factor are tensors, so that a captured CUDA graph replays with new values.

A copy is its weight rounded to bf16 or fp16: written where the new weight is in a register already, it saves the cast
of every weight in the next forward pass.

Sources: Kingma and Ba, "Adam", 2015, algorithm 1; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
algorithm 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from kernels.common import card, tanh
from kernels.launch import library_op, tl, triton
from kernels.spec import Cost, LaunchTable, Op, accumulation_dtype

HALF = {torch.bfloat16, torch.float16}


def adamw_torch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
) -> None:
    """Take one step on every tensor of a list.

    Args:
        params, exp_avgs, exp_avg_sqs: contiguous tensors, float32; updated in place.
        grads: as large, of the same dtype; left alone.
        copies: for each of `params` a contiguous tensor as large, in bf16 or fp16 (one dtype for the whole list), which
            takes the new values; or None.
        lr, step, grad_scale: 0-dimensional float32 tensors on the device of `params`: the learning rate, the number of
            this step from 1, and what gradients are multiplied by before anything else (1 when there is no clipping).
        beta1, beta2, eps: of Adam.
        weight_decay: for every tensor of the list.
        decoupled: AdamW; False adds the decay to the gradient, as Adam does.

    Raises `ValueError` when the lists do not fit together.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, copies)
    if not params:
        return
    update = torch._fused_adamw_ if decoupled else torch._fused_adam_
    # The scale of the fused call divides, and overwrites the gradients.
    grads = torch._foreach_mul(grads, grad_scale)
    update(
        params, grads, exp_avgs, exp_avg_sqs, [], [step] * len(params), lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if copied := [(copy.view_as(p), p) for copy, p in zip(copies, params, strict=True) if copy is not None]:
        torch._foreach_copy_(*map(list, zip(*copied, strict=True)))


def _check(params, grads, exp_avgs, exp_avg_sqs, copies):
    for name, tensors in {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "copies": copies}.items():
        if len(tensors) != len(params):
            raise ValueError(f"{len(tensors)} {name} do not fit {len(params)} params")
        for x, p in zip(tensors, params, strict=True):
            if x is not None and (x.numel() != p.numel() or not x.is_contiguous()):
                raise ValueError(f"one of {name} {list(x.shape)} is not contiguous and as large as its {list(p.shape)}")
    if not all(p.is_contiguous() for p in params):
        raise ValueError("params are to be contiguous")
    dtypes = {copy.dtype for copy in copies if copy is not None}
    if len(dtypes) > 1 or not dtypes <= HALF:
        raise ValueError(f"copies are in {' and '.join(sorted(map(str, dtypes)))}, not all in bf16 or all in fp16")


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, mask, has_copy, lr, bias1, bias2, grad_scale, rest1, beta2, rest2, eps,
    weight_decay, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """One block of values. `rest` is 1 - beta; `bias1` 1 - beta1^t, `bias2` 1 / sqrt(1 - beta2^t)."""
    p, g = tl.load(p_ptr, mask=mask), tl.load(g_ptr, mask=mask) * grad_scale
    m, v = tl.load(m_ptr, mask=mask), tl.load(v_ptr, mask=mask)
    if DECOUPLED:
        p -= lr * weight_decay * p
    else:
        g += weight_decay * p
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p -= lr / bias1 * m / (tl.sqrt(v) * bias2 + eps)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    tl.store(p_ptr, p, mask=mask)
    if has_copy:
        tl.store(copy_ptr, p, mask=mask)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x < 0, without the cancellation near 0: with t = tanh(x/2), exp(x) is (1 + t) / (1 - t)."""
    t = tanh(x / 2, False)
    return -2 * t / (1 - t)


@triton.jit
def _adamw_kernel(
    chunks_ptr, tensors, lr_ptr, step_ptr, grad_scale_ptr, log_beta1, log_beta2, rest1, beta2, rest2, eps,
    weight_decay,
    COPY: tl.constexpr, DECOUPLED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor a program: `chunks_ptr` `[chunks, 7]` holds addresses and sizes (see `_chunk_table`).
    `tensors` is unused: it tells the interpreter which tensors the addresses belong to."""
    entry = chunks_ptr + tl.program_id(0) * 7
    p_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    copy = tl.load(entry + 4)
    copy_ptr = copy.to(tl.pointer_type(COPY))
    has_copy = copy != 0
    count = tl.load(entry + 5).to(tl.int32)
    is_whole = tl.load(entry + 6) != 0
    lr, step, grad_scale = tl.load(lr_ptr), tl.load(step_ptr), tl.load(grad_scale_ptr)
    bias1, bias2 = _one_minus_exp(step * log_beta1), tl.rsqrt(_one_minus_exp(step * log_beta2))
    lanes = tl.arange(0, BLOCK)
    if is_whole:
        for start in tl.range(0, CHUNK, BLOCK, num_stages=STAGES):
            i = start + lanes
            _update(
                # An address from a table comes without the alignment that accesses of 16 bytes need.
                tl.multiple_of(p_ptr + i, [16]), tl.multiple_of(g_ptr + i, [16]), tl.multiple_of(m_ptr + i, [16]),
                tl.multiple_of(v_ptr + i, [16]), tl.multiple_of(copy_ptr + i, [8]), None, has_copy,
                lr, bias1, bias2, grad_scale, rest1, beta2, rest2, eps, weight_decay, DECOUPLED,
            )  # fmt: skip
    else:
        for start in range(0, count, BLOCK):
            i = start + lanes
            _update(
                p_ptr + i, g_ptr + i, m_ptr + i, v_ptr + i, copy_ptr + i, i < count, has_copy,
                lr, bias1, bias2, grad_scale, rest1, beta2, rest2, eps, weight_decay, DECOUPLED,
            )  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """Values of a program, how many it works on at a time, warps, and stages of the pipeline over its blocks."""

    chunk: int
    block: int
    num_warps: int
    num_stages: int = 1


LAUNCHES = LaunchTable(
    kernel="_adamw_kernel",
    entries={"any": {"": Chunk(8192, 2048, num_warps=8)}},
    candidates=lambda size: (
        Chunk(8192, 2048, 8), Chunk(16384, 2048, 8), Chunk(8192, 1024, 4), Chunk(8192, 2048, 8, num_stages=2),
        Chunk(8192, 4096, 8), Chunk(4096, 1024, 4), Chunk(32768, 2048, 8),
    ),
    shapes=lambda size: OP.bench_shapes,
)  # fmt: skip


_TABLES: dict[tuple, Tensor] = {}
_CAPTURED: list[Tensor] = []


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _chunk_table(lists: list[list[Tensor | None]], chunk: int) -> Tensor:
    """The work of a launch, `[chunks, 7]` int64 on the device of the tensors.

    A row holds the addresses of one chunk in each of the five lists (0 for no copy), its number of values, and whether
    it is a full chunk of aligned addresses. Tables are kept by those addresses: tensors stay in place from step to
    step. Raises `RuntimeError` for a new table during the capture of a CUDA graph.
    """
    params = lists[0]
    addresses = [[0 if x is None else x.data_ptr() for x in tensors] for tensors in lists]
    sizes = [p.numel() for p in params]
    key = params[0].device, chunk, *sizes, *chain.from_iterable(addresses)
    capturing = _capturing(params[0])
    table = _TABLES.pop(key, None)
    if table is None:
        if capturing:
            raise RuntimeError("adamw needs a table of addresses: call it on these tensors once before the capture")
        sizes, addresses = torch.tensor(sizes, device="cpu"), torch.tensor(addresses, device="cpu").T
        n_chunks = (sizes + chunk - 1) // chunk
        index = torch.arange(len(sizes), device="cpu").repeat_interleave(n_chunks)
        offset = (torch.arange(len(index), device="cpu") - (n_chunks.cumsum(0) - n_chunks)[index]) * chunk
        count = (sizes[index] - offset).clamp(max=chunk)
        itemsizes = torch.tensor([4, 4, 4, 4, 2], device="cpu")
        begins = addresses[index] + (addresses[index] != 0) * offset[:, None] * itemsizes
        is_whole = (count == chunk) & (begins % 16 == 0).all(1)
        table = torch.cat((begins, count[:, None], is_whole[:, None]), 1)
        if params[0].is_cuda:  # from pinned memory: the host does not wait
            table = table.pin_memory().to(params[0].device, non_blocking=True)
    if capturing:
        _CAPTURED.append(table)  # the graph reads it in every replay
    elif len(_TABLES) >= 64:
        del _TABLES[next(iter(_TABLES))]  # the one used longest ago
    _TABLES[key] = table
    return table


def _returns_nothing(*arguments):
    return None


@library_op(_returns_nothing, mutates=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def _adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    copies: list[Tensor], copied: list[int], lr: Tensor, step: Tensor, grad_scale: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    """`copies[i]` is of `params[copied[i]]`: torch.compile takes no list with None in it that an op writes to."""
    launch = LAUNCHES.pick("any", card(params[0].device))
    copy_of = dict(zip(copied, copies, strict=True))
    lists = [params, grads, exp_avgs, exp_avg_sqs, [copy_of.get(i) for i in range(len(params))]]
    chunks = _chunk_table(lists, launch.chunk)
    if not len(chunks):
        return
    copy_dtype = tl.float16 if copies and copies[0].dtype == torch.float16 else tl.bfloat16
    tensors = tuple(x for xs in lists for x in xs if x is not None) if params[0].is_cpu else None
    _adamw_kernel[(len(chunks),)](
        chunks, tensors, lr, step, grad_scale, math.log(beta1), math.log(beta2), 1 - beta1, beta2, 1 - beta2,
        eps, weight_decay, copy_dtype, decoupled, launch.chunk, launch.block, launch.num_stages,
        num_warps=launch.num_warps,
    )  # fmt: skip


def adamw_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
) -> None:
    """The same in one launch for the whole list. A first call on some tensors writes a table of their addresses to the
    device; later calls, and those that a CUDA graph captures, do not."""
    _check(params, grads, exp_avgs, exp_avg_sqs, copies)
    if any(x.dtype != torch.float32 for xs in (params, grads, exp_avgs, exp_avg_sqs) for x in xs):
        raise ValueError("the triton kernel of adamw updates float32 tensors by float32 gradients")
    if params:
        copied = [i for i, copy in enumerate(copies) if copy is not None]
        copies = [copies[i] for i in copied]
        _adamw_(
            params, grads, exp_avgs, exp_avg_sqs, copies, copied, lr, step, grad_scale,
            beta1, beta2, eps, weight_decay, decoupled,
        )  # fmt: skip


def _inputs(shape, make):
    """The third step of a list, its copies in bf16."""

    def draw():
        tensors = [make(shape["n"]) for _ in range(shape["N"])]
        return [x.to(accumulation_dtype(x)) for x in tensors]

    params = draw()
    scalar = partial(torch.tensor, dtype=torch.float32, device=params[0].device)
    return {
        "params": params, "grads": draw(), "exp_avgs": draw(), "exp_avg_sqs": [x.square() for x in draw()],
        "copies": [torch.empty_like(p, dtype=torch.bfloat16) for p in params],
        "lr": scalar(0.01), "step": scalar(3.0), "grad_scale": scalar(0.5),
        "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
    }  # fmt: skip


OP = Op(
    name="adamw",
    implementations={"torch": adamw_torch, "triton": adamw_triton},
    inputs=_inputs,
    differentiable=(),
    cost=lambda s, itemsize: Cost(30 * s["N"] * s["n"], 16 * s["N"] * s["n"]),  # float32 state, bf16 copies
    backward_cost=lambda s, itemsize: Cost(0, 0),
    test_shapes=({"N": 1, "n": 1}, {"N": 3, "n": 127}, {"N": 2, "n": 8200}, {"N": 5, "n": 30}),
    bench_shapes=({"N": 148, "n": 840_000}, {"N": 100, "n": 420_000}),
    mutates=("params", "exp_avgs", "exp_avg_sqs", "copies"),
    launches=(LAUNCHES,),
)
