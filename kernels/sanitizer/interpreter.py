"""A Triton interpreter that computes what a GPU does.

Under TRITON_INTERPRET=1 a kernel runs on the CPU, each `tl` operation in numpy. As shipped the results are not a GPU's:
bf16 is stored as uint16 and multiplied as integers, casts truncate, masked lanes read as 0, a float argument makes no
promotion. `install` puts that right: a kernel then computes what it would on an NVIDIA GPU, up to the order of sums,
the contraction of a*b + c, and the last bits of functions that the GPU approximates, such as `exp`. An exception in a
kernel is raised as it is, not wrapped in one `InterpreterError` per device function.

`observe` reports every launch, program, memory access and dot product to an `Observer`.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

Access = Literal["load", "store", "atomic"]
Index = tuple[int, int, int]


class Observer:
    """What the interpreter reports to. These methods do nothing: override those of interest."""

    def launch(self, kernel: str) -> None:
        """A launch of `kernel` begins; its tensor arguments follow, then its grid."""

    def argument(self, name: str, tensor: torch.Tensor, pointer: tl.dtype) -> None:
        """A tensor argument. Pointers derived from it have this very object `pointer` as their type."""

    def grid(self, size: Index) -> None:
        """The number of programs along each axis."""

    def program(self, index: Index) -> Index:
        """A program begins. The program that is returned runs in its place."""
        return index

    def access(self, kind: Access, addresses: np.ndarray, itemsize: int, pointer: tl.dtype) -> None:
        """A load, store or atomic, before it happens: uint64 addresses of its unmasked lanes, `itemsize` bytes each."""

    def dot(self, flops: int) -> None:
        """A `tl.dot`; a multiply-add is 2 FLOPs."""

    def assertion_failed(self, message: str) -> None:
        """A `tl.device_assert` that fails, or an integer overflow. On return an `AssertionError` is raised."""


def install() -> None:
    """Make this process's interpreter exact; a second call does nothing.

    Raises `RuntimeError` unless TRITON_INTERPRET=1 was set before Triton was imported.
    """
    if not isinstance(tl.sum, upstream.InterpretedFunction):
        raise RuntimeError("Triton's interpreter is off: set TRITON_INTERPRET=1 before triton is first imported")
    builder = upstream.interpreter_builder
    if isinstance(builder, ExactBuilder):
        return
    builder.__class__ = ExactBuilder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    upstream.GridExecutor = _GridExecutor
    upstream._implicit_cvt = _convert_argument
    upstream.ReduceOps.apply_impl = _reduce
    upstream.ScanOps.apply_impl = _scan
    TritonSemantic.load, TritonSemantic.dot_scaled = _load, _dot_scaled
    Autotuner.run = _run_first
    # For speed: what follows is most of a kernel's time upstream.
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    TritonSemantic.computation_type_impl = functools.cache(TritonSemantic.computation_type_impl)
    upstream._get_np_dtype = _np_dtype
    tl.core.block_type.__init__, tl.core.tensor.__init__ = _make_block_type, _make_tensor
    # Upstream patches `tl` anew at each launch and each call of a device function.
    upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    upstream._patch_lang = lambda fn: upstream._LangPatchScope()
    # numpy >= 2.4 refuses Triton 3.6's int(array of one element), and with it a loop bound held in a tensor.
    tl.core.tensor.__index__ = lambda self: self.handle.data.item()


@contextlib.contextmanager
def observe(observer: Observer, **options: Any) -> Iterator[None]:
    """Report the launches within the block to `observer`, and run them with these `options` of Triton's interpreter,
    such as `debug=True`, which turns `tl.device_assert` on."""
    install()
    builder = upstream.interpreter_builder
    before = builder.observer, builder.options
    builder.observer, builder.options = observer, dataclasses.replace(builder.options, **options)
    try:
        yield
    finally:
        builder.observer, builder.options = before


def _run_first(tuner: Autotuner, *arguments: Any, **options: Any) -> None:
    """Launch the first candidate of an autotuner: without a GPU there is nothing to time them on."""
    tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))
    first = tuner.prune_configs(options)[0]
    options |= first.all_kwargs()
    if first.pre_hook is not None:
        first.pre_hook(tuner.nargs | options)
    tuner.fn.run(*arguments, **options)


# Numbers that numpy has no type for: upstream keeps their bits in integers.

_PACKED = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def _is_packed(dtype):
    return dtype.scalar.name in _PACKED


def _unpack(handle) -> np.ndarray:
    """The numbers a handle holds, packed ones as float32."""
    if not _is_packed(handle.dtype):
        return handle.data
    return torch.from_numpy(np.array(handle.data)).view(_PACKED[handle.dtype.scalar.name]).float().numpy()


def _pack(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Numbers in `dtype`, rounded to nearest even; fp8 saturates, as `cvt.satfinite` does."""
    dtype = dtype.scalar
    if not _is_packed(dtype):
        return TensorHandle(values.astype(upstream._get_np_dtype(dtype)), dtype)
    torch_dtype = _PACKED[dtype.name]
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if torch_dtype.itemsize == 1:
        largest = torch.finfo(torch_dtype).max
        wide = wide.clamp(-largest, largest)
    bits = wide.to(torch_dtype).view(torch.uint8 if torch_dtype.itemsize == 1 else torch.uint16)
    return TensorHandle(bits.numpy(), dtype)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _unscale(handle, scale, name: str, k_axis: int, k_pack: bool) -> np.ndarray:
    """An operand of `tl.dot_scaled` as numbers: codes times the scale of their block along `k_axis`.

    Two e2m1 codes share a byte, the first in the low bits; they are neighbours along K, or the other axis without
    `k_pack`. Scales are e8m0 in uint8, or e4m3; those of the second operand are `[N, K / block]`."""
    codes = handle.data
    if name == "e2m1":
        axis = k_axis if k_pack else 1 - k_axis
        values = np.stack((_E2M1[codes & 15], _E2M1[codes >> 4]), axis + 1).reshape(
            [2 * size if i == axis else size for i, size in enumerate(codes.shape)]
        )
    else:
        dtype = {"e4m3": tl.float8e4nv, "e5m2": tl.float8e5}.get(name, handle.dtype.scalar)
        values = _unpack(TensorHandle(codes, dtype)).astype(np.float32)
    if scale is None:
        return values
    if scale.dtype.scalar == tl.float8e4nv:
        factors = _unpack(scale)
    else:
        factors = np.where(scale.data == 255, np.nan, np.exp2(scale.data.astype(np.float32) - 127)).astype(np.float32)
    factors = factors if k_axis else factors.T
    return values * factors.repeat(values.shape[k_axis] // factors.shape[k_axis], k_axis)


def _poison(dtype: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    """What a lane that loaded nothing holds: NaN, or a large integer."""
    np_dtype = upstream._get_np_dtype(dtype)
    if dtype.is_floating() and (_is_packed(dtype) or np_dtype.kind == "f"):
        return _pack(np.full(shape, np.nan), dtype)
    return TensorHandle(np.full(shape, np.iinfo(np_dtype).max // 3 * 2, np_dtype), dtype)


class ExactBuilder(upstream.InterpreterBuilder):
    """The operations that upstream gets wrong, and the reports to an observer."""

    observer: Observer | None = None
    names: dict[int, str]  # of the launch's tensors, by id

    # memory

    def _report(self, kind, ptrs, mask=True):
        if self.observer:
            itemsize = upstream._get_np_dtype(ptrs.get_element_ty()).itemsize
            addresses = ptrs.data[np.broadcast_to(np.asarray(mask, bool), ptrs.data.shape)]
            self.observer.access(kind, addresses, itemsize, ptrs.dtype.scalar)

    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        self._report("load", ptrs, mask.data)
        if other is None and not np.all(np.asarray(mask.data)):
            other = _poison(ptrs.get_element_ty(), ptrs.data.shape)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        self._report("store", ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_descriptor_load(self, desc, indices, *args, **kwargs):
        loaded = super().create_descriptor_load(desc, indices, *args, **kwargs)
        if desc.padding == upstream._ir.PADDING_OPTION.PAD_NAN:  # upstream casts NaN to the integers that hold bf16
            _, mask = desc.materialize_pointers(indices)
            loaded.data[~np.asarray(mask.data)] = _poison(loaded.dtype, ()).data
        return loaded

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        self._report("atomic", ptr)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        self._report("atomic", ptr, mask.data)
        if not _is_packed(val.dtype):
            return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)
        # bf16: Triton has no atomic for it but addition. Lane by lane, since two lanes may share an address.
        addresses, terms = ptr.data.ravel(), val.data.ravel()
        old, one = np.zeros_like(terms), np.ones(1, bool)
        for lane in np.flatnonzero(np.broadcast_to(mask.data, ptr.data.shape)):
            here = slice(lane, lane + 1)
            old[here] = upstream._interpreter.load(addresses[here], one, terms[here], terms.dtype)
            total = self.create_fadd(TensorHandle(old[here], val.dtype), TensorHandle(terms[here], val.dtype))
            upstream._interpreter.store(addresses[here], total.data, one)
        return TensorHandle(old.reshape(ptr.data.shape), val.dtype.scalar)

    def create_select(self, cond, lhs, rhs):
        result = super().create_select(cond, lhs, rhs)
        if result.dtype.is_ptr() and lhs.dtype.scalar is not rhs.dtype.scalar:
            result.dtype = copy.copy(result.dtype)  # came from two arguments, so is held to neither
        return result

    # arithmetic

    def get_bf16(self, value):
        return _pack(np.array([value]), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        return _pack(_unpack(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode in (None, upstream._ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not _is_packed(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        result = op(_unpack(lhs), _unpack(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == bool else _pack(result, lhs.dtype)

    def unary_op(self, arg, op):
        return _pack(op(_unpack(arg)), arg.dtype) if _is_packed(arg.dtype) else super().unary_op(arg, op)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        quiet = propagate_nans == upstream._ir.PROPAGATE_NAN.NONE
        smaller, larger = (np.fmin, np.fmax) if quiet else (np.minimum, np.maximum)
        return self.binary_op(self.binary_op(arg, lo, larger), hi, smaller)

    def create_fma(self, x, y, z):
        product = np.multiply(_unpack(x), _unpack(y), dtype=np.float64)
        return _pack(product + _unpack(z), z.dtype)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lhs, rhs, acc = _unpack(a), _unpack(b), _unpack(d)
        if self.observer:
            self.observer.dot(flops=2 * math.prod(lhs.shape) * rhs.shape[-1])
        if lhs.dtype == np.float32 and input_precision == upstream._ir.INPUT_PRECISION.TF32:
            # Triton hands float32 to the tensor cores as it is, and they ignore the low 13 bits.
            lhs, rhs = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (lhs, rhs))
        return _pack(np.matmul(lhs, rhs, dtype=acc.dtype) + acc, d.dtype)

    def create_dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_k_pack, b_k_pack, d):
        lhs = _unscale(a, a_scale, a_format.name.lower(), 1, a_k_pack)
        rhs = _unscale(b, b_scale, b_format.name.lower(), 0, b_k_pack)
        if self.observer:
            self.observer.dot(flops=2 * math.prod(lhs.shape) * rhs.shape[-1])
        return _pack(np.matmul(lhs, rhs, dtype=np.float32) + d.data, d.dtype)

    # launches

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        if self.observer:
            self.observer.grid((nx, ny, nz))

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(*(self.observer.program((x, y, z)) if self.observer else (x, y, z)))

    def create_assert(self, condition, message):
        if self.observer and not condition:
            self.observer.assertion_failed(message)
        super().create_assert(condition, message)


class _GridExecutor(upstream.GridExecutor):
    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        builder = upstream.interpreter_builder
        if builder.observer:
            builder.observer.launch(self.fn.__name__)
            given = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
            builder.names = {id(tensor): name for item in given for name, tensor in _tensors(*item)}
        return args, kwargs

    def __call__(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"):  # a GPU raises no floating-point exceptions
                super().__call__(*args, **kwargs)
        except upstream.InterpreterError as error:
            cause = error
            while isinstance(cause, upstream.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


def _tensors(name, value):
    """Every tensor in an argument, with the name to call it by."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(value, TensorDescriptor):
        yield name, value.base
    elif hasattr(value, "data_ptr"):
        yield name, value


_upstream_convert = upstream._implicit_cvt


def _convert_argument(arg):
    if isinstance(arg, bool | float):  # compiled code takes scalars, which promote as tensors do
        return upstream.interpreter_semantic.to_tensor(arg)
    converted = _upstream_convert(arg)
    builder = upstream.interpreter_builder
    if builder.observer and hasattr(arg, "data_ptr"):
        builder.observer.argument(builder.names[id(arg)], upstream._unwrap_tensor(arg), converted.dtype)
    return converted


_upstream_load = TritonSemantic.load


def _load(self, ptr, mask, other, *args):
    loaded = _upstream_load(self, ptr, mask, other, *args)
    if other is not None and loaded.numel.value == 1:
        # Upstream tests `if other`, which is false for a single zero.
        return self.where(mask, loaded, self.cast(other, loaded.dtype))
    return loaded


_scalar_np_dtype = functools.cache(upstream._get_np_dtype)


def _np_dtype(dtype):
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _scalar_np_dtype(dtype.scalar)


@functools.cache
def _shape(sizes):
    """A shape as a type holds it, its text, its number of elements, and the shape as a tensor holds it."""
    shape = tl.tuple(sizes)
    return shape, str(shape), validate_block_shape(sizes), tl.tuple([tl.constexpr(size) for size in sizes])


def _make_block_type(self, element_ty, shape):
    shape = shape.value if isinstance(shape, tl.constexpr) else shape
    sizes = tuple(getattr(size, "value", size) for size in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, text, self.numel, _ = _shape(sizes)
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


def _make_tensor(self, handle, type):
    _, _, numel, self.shape = _shape(tuple(type.shape.values) if type.is_block() else ())
    self.handle, self.type, self.dtype, self.numel = handle, type, type.scalar, tl.constexpr(numel)


_OPERATORS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(self, lhs, rhs, binary_op):
    """Fail if a sum, a difference or a product of integers does not fit their type. Upstream says so in operations of
    `tl`, ten for each operation of a kernel."""
    dtype = lhs.type.scalar
    if not self.builder.options.sanitize_overflow or dtype.int_bitwidth >= 64:
        return
    exact = _OPERATORS[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    if exact.min() < dtype.get_int_min_value() or exact.max() > dtype.get_int_max_value():
        message = f"int{dtype.int_bitwidth} overflow detected for operation {binary_op.__name__}"
        self.builder.create_assert(False, message)


_upstream_dot_scaled = TritonSemantic.dot_scaled


class _FormatName(str):
    """What Triton up to 3.7 takes for a `constexpr`, and later versions for a string."""

    @property
    def value(self):
        return str(self)


def _dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *args):
    """Interpreted code passes the names of formats as they are."""
    lhs_format, rhs_format = (_FormatName(getattr(name, "value", name)) for name in (lhs_format, rhs_format))
    return _upstream_dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *args)


def _on_exact_numbers(apply_impl):
    def apply(self, inputs):
        if any(_is_packed(x.dtype) for x in inputs):
            raise TypeError(
                f"{self.combine_fn.__name__} over {inputs[0].dtype} rounds at every step, in an order that the "
                "compiler chooses: convert to float32 before the reduction"
            )
        return apply_impl(self, inputs)

    return apply


_reduce = _on_exact_numbers(upstream.ReduceOps.apply_impl)
_scan = _on_exact_numbers(upstream.ScanOps.apply_impl)
