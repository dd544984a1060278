"""Triton's interpreter made exact, and strict on request.

Under TRITON_INTERPRET=1 a kernel runs on the CPU, each `tl` operation in numpy. As shipped the results are not a GPU's:
bf16 is stored as uint16 and multiplied as integers, casts truncate, masked lanes read as 0, a float argument makes no
promotion. `install` puts that right: a kernel then computes what it would on an NVIDIA GPU, up to the order of sums,
the contraction of a*b + c, and the last bits of functions that the GPU approximates, such as `exp`.

`sanitize` checks each launch within it for what a GPU does not report: accesses out of bounds, races between programs,
dependence on the order of programs, overflow of integer offsets; and counts the bytes moved. It does not see races
within one program.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor


class SanitizerError(AssertionError):
    """A kernel did what on a GPU is undefined: the message names kernel, program, argument and byte."""


@dataclass
class Counts:
    """What launches did. An atomic is a read and a write; FLOPs are those of `tl.dot`, 2 a multiply-add."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0


@dataclass
class Record(Counts):
    """What all launches did, and those of each kernel by its name."""

    kernels: dict[str, Counts] = field(default_factory=dict)


def install() -> None:
    """Make this process's interpreter exact; a second call does nothing.

    Raises `RuntimeError` unless TRITON_INTERPRET=1 was set before Triton was imported.
    """
    if not isinstance(tl.sum, upstream.InterpretedFunction):
        raise RuntimeError("Triton's interpreter is off: set TRITON_INTERPRET=1 before triton is first imported")
    if isinstance(upstream.interpreter_builder, ExactBuilder):
        return
    upstream.interpreter_builder.__class__ = ExactBuilder
    _set_options(sanitize_overflow=False)
    upstream.GridExecutor = _GridExecutor
    upstream._implicit_cvt = _convert_argument
    upstream.ReduceOps.apply_impl = _reduce
    upstream.ScanOps.apply_impl = _scan
    TritonSemantic.load = _load
    # Upstream patches `tl` anew at each launch and each call of a device function, which is most of a kernel's time.
    upstream._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    upstream._patch_lang = lambda fn: upstream._LangPatchScope()
    # numpy >= 2.4 refuses Triton 3.6's int(array of one element), and with it a loop bound held in a tensor.
    tl.core.tensor.__index__ = lambda self: self.handle.data.item()


@contextlib.contextmanager
def sanitize(
    *, bounds: bool = True, races: bool = True, overflow: bool = True, shuffle: int | None = None
) -> Iterator[Record]:
    """Check every launch within the block, and count what it moves.

    Args:
        bounds: each access stays within the extents (by shape and strides) of the tensor that its pointer came from.
            A pointer cast from an integer or another type may go to any tensor of the launch.
        races: no program touches an element that another one stores; atomics may meet atomics; no store has two lanes
            at one address. Programs that wait for each other through atomics are reported all the same.
        overflow: integer sums, differences and products fit their type, in masked lanes too.
        shuffle: seed of a random order of programs; None for the order of their numbers.

    Yields the `Record` of this block. Raises `SanitizerError` from the launch.
    """
    install()
    builder = upstream.interpreter_builder
    before, options = builder.sanitizer, builder.options
    rng = None if shuffle is None else np.random.default_rng(shuffle)
    builder.sanitizer = _Sanitizer(bounds, races, rng)
    _set_options(debug=True, sanitize_overflow=overflow)
    try:
        yield builder.sanitizer.record
    finally:
        builder.sanitizer, builder.options = before, options


def _set_options(**options):
    builder = upstream.interpreter_builder
    builder.options = dataclasses.replace(builder.options, **options)


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


def _poison(dtype: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    """What a lane that loaded nothing holds: NaN, or a large integer."""
    np_dtype = upstream._get_np_dtype(dtype)
    if dtype.is_floating() and (_is_packed(dtype) or np_dtype.kind == "f"):
        return _pack(np.full(shape, np.nan), dtype)
    return TensorHandle(np.full(shape, np.iinfo(np_dtype).max // 3 * 2, np_dtype), dtype)


class ExactBuilder(upstream.InterpreterBuilder):
    """The operations that upstream gets wrong, and the places where a sanitizer looks on."""

    sanitizer: "_Sanitizer | None" = None

    # memory

    def create_masked_load(self, ptrs, mask, other, *args, **kwargs):
        if self.sanitizer:
            self.sanitizer.access("load", ptrs, mask.data)
        if other is None and not np.all(np.asarray(mask.data)):
            other = _poison(ptrs.get_element_ty(), ptrs.data.shape)
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        if self.sanitizer:
            self.sanitizer.access("store", ptrs, mask.data)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        if self.sanitizer:
            self.sanitizer.access("atomic", ptr)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        if self.sanitizer:
            self.sanitizer.access("atomic", ptr, mask.data)
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
        if self.sanitizer:
            self.sanitizer.count(flops=2 * math.prod(lhs.shape) * rhs.shape[-1])
        if lhs.dtype == np.float32 and input_precision == upstream._ir.INPUT_PRECISION.TF32:
            # Triton hands float32 to the tensor cores as it is, and they ignore the low 13 bits.
            lhs, rhs = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (lhs, rhs))
        return _pack(np.matmul(lhs, rhs, dtype=acc.dtype) + acc, d.dtype)

    # launches

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        if self.sanitizer:
            self.sanitizer.start_grid((nx, ny, nz))

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(*(self.sanitizer.start_program((x, y, z)) if self.sanitizer else (x, y, z)))

    def create_assert(self, condition, message):
        if self.sanitizer and not condition:
            raise SanitizerError(f"{self.sanitizer.where}: {message}")
        super().create_assert(condition, message)


class _GridExecutor(upstream.GridExecutor):
    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        if sanitizer := upstream.interpreter_builder.sanitizer:
            sanitizer.start_launch(self.fn.__name__)
            for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
                sanitizer.names.update((id(tensor), path) for path, tensor in _tensors(name, value))
        return args, kwargs

    def __call__(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"):  # a GPU raises no floating-point exceptions
                super().__call__(*args, **kwargs)
        except upstream.InterpreterError as error:  # one for each device function on the way
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            raise


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
    sanitizer = upstream.interpreter_builder.sanitizer
    if sanitizer and hasattr(arg, "data_ptr"):
        sanitizer.add_argument(arg, converted.dtype)
    return converted


_upstream_load = TritonSemantic.load


def _load(self, ptr, mask, other, *args):
    loaded = _upstream_load(self, ptr, mask, other, *args)
    if other is not None and loaded.numel.value == 1:
        # Upstream tests `if other`, which is false for a single zero.
        return self.where(mask, loaded, self.cast(other, loaded.dtype))
    return loaded


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


@dataclass
class _Argument:
    """A tensor argument: its bytes are addresses `start` to `end`."""

    name: str
    start: int
    end: int
    itemsize: int
    pointer: tl.dtype  # handles derived from the argument carry this very object as their type
    owners: "_Owners | None" = None


class _Sanitizer:
    """The checks, the record, and the state of the launch under way."""

    def __init__(self, bounds, races, rng):
        self.bounds, self.races, self.rng = bounds, races, rng
        self.record = Record()

    def start_launch(self, kernel):
        self.kernel = kernel
        self.count(launches=1)
        self.names: dict[int, str] = {}  # of tensors, by id
        self.arguments: dict[int, _Argument] = {}  # by id of their pointer type

    def count(self, **amounts):
        for counts in (self.record, self.record.kernels.setdefault(self.kernel, Counts())):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)

    def add_argument(self, tensor, pointer):
        base = upstream._unwrap_tensor(tensor)
        last = sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
        start, itemsize = base.data_ptr(), base.element_size()
        end = start + (last + 1) * itemsize if base.numel() else start
        self.arguments[id(pointer)] = _Argument(self.names[id(tensor)], start, end, itemsize, pointer)

    def start_grid(self, grid):
        self.grid = grid
        self.order = None if self.rng is None else self.rng.permutation(math.prod(grid))
        if self.races:
            _share_owners(self.arguments.values())

    def start_program(self, index):
        self.program = index if self.order is None else self._index(self.order[np.ravel_multi_index(index, self.grid)])
        return self.program

    def _index(self, number):
        return tuple(int(i) for i in np.unravel_index(number, self.grid))

    @property
    def where(self):
        return f"{self.kernel}, program {self.program}"

    def access(self, kind, ptrs, mask=True):
        """Count and check the lanes of one operation whose mask is true."""
        size = upstream._get_np_dtype(ptrs.get_element_ty()).itemsize
        addresses = ptrs.data[np.broadcast_to(np.asarray(mask, bool), ptrs.data.shape)]
        moved = addresses.size * size
        self.count(bytes_read=moved * (kind != "store"), bytes_written=moved * (kind != "load"))
        own = self.arguments.get(id(ptrs.dtype.scalar))
        for argument in [own] if own else self.arguments.values():
            inside = (addresses >= argument.start) & (addresses + np.uint64(size) <= argument.end)
            if self.races and inside.any():
                self._check_races(kind, argument, addresses[inside], size)
            addresses = addresses[~inside]
            if not addresses.size:
                return
        if self.bounds and addresses.size:
            at = int(addresses.view(np.int64)[0])
            nearest = own or min(self.arguments.values(), key=lambda a: min(abs(at - a.start), abs(at - a.end)))
            raise SanitizerError(
                f"{self.where}: {kind} of {size} bytes at byte {at - nearest.start} of {nearest.name}, which has "
                f"{nearest.end - nearest.start} ({addresses.size} lanes out of bounds)"
            )

    def _check_races(self, kind, argument, addresses, size):
        number = int(np.ravel_multi_index(self.program, self.grid)) + 1
        if conflict := argument.owners.touch(kind, addresses, size, number):
            address, deed, owner = conflict
            special = {number: "another lane of this program", _SEVERAL: "several programs"}
            raise SanitizerError(
                f"{self.where}: race: {kind} at byte {address - argument.start} of {argument.name}, where "
                f"{special.get(owner) or f'program {self._index(owner - 1)}'} did {deed}"
            )


_CONFLICTS = {"load": ("store", "atomic"), "store": ("store", "load", "atomic"), "atomic": ("store", "load")}
_SEVERAL = -1


class _Owners:
    """Which program has touched each element of a piece of memory, during one launch.

    A program is its number + 1, so that 0 is nobody and a large tensor costs nothing until it is touched.
    """

    def __init__(self, start, end, grain):
        self.start, self.grain = start, grain
        self.owner = {kind: np.zeros((end - start) // grain, np.int32) for kind in (*_CONFLICTS, "lane")}

    def touch(self, kind, addresses, size, program):
        """Note an access, or give the address, kind and program of an earlier one that it conflicts with."""
        if size < self.grain:
            self.owner = {kind: owner.repeat(self.grain // size) for kind, owner in self.owner.items()}
            self.grain = size
        elements = (addresses - np.uint64(self.start)).astype(np.int64) // self.grain
        if size > self.grain:
            elements = (elements[:, None] + np.arange(size // self.grain)).ravel()
        if kind == "store":
            lanes = np.arange(elements.size, dtype=np.int32)
            self.owner["lane"][elements] = lanes
            lost = self.owner["lane"][elements] != lanes
            if lost.any():
                return self._first(elements, lost), kind, program
        for earlier in _CONFLICTS[kind]:
            owner = self.owner[earlier][elements]
            conflict = (owner != 0) & (owner != program)
            if conflict.any():
                return self._first(elements, conflict), earlier, int(owner[conflict][0])
        owner = self.owner[kind][elements]
        self.owner[kind][elements] = np.where((owner == 0) | (owner == program), program, _SEVERAL)
        return None

    def _first(self, elements, among):
        return self.start + int(elements[among][0]) * self.grain


def _share_owners(arguments):
    """Give each argument its owners, and arguments that overlap the same ones."""
    groups: list[list[_Argument]] = []
    end = 0
    for argument in sorted(arguments, key=lambda argument: argument.start):
        if argument.start >= end:
            groups.append([])
        groups[-1].append(argument)
        end = max(end, argument.end)
    for group in groups:
        start, end = group[0].start, max(argument.end for argument in group)
        owners = _Owners(start, end, grain=min(argument.itemsize for argument in group))
        for argument in group:
            argument.owners = owners
