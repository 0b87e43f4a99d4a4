"""SIMD vectors as Numba values: explicit lanes where the auto-vectoriser cannot be trusted with registers.

A vector is one register of float32 or float64 lanes.  It is an ordinary value inside jitted code (an LLVM vector, never memory), so a handful of
them named in a loop is a register block.  Every operation is an intrinsic that becomes one or a few instructions on any target LLVM knows;
only the width is chosen for the host.

    lanes(a)                    lanes of a vector of a's elements, a constant to the compiler
    load(a, at)                 consecutive elements from index `at` on; any alignment
    store(a, at, v)
    prefetch(a, at)             a hint that it will be read
    load_part(a, at, n)         the first n lanes, the others 0; nothing past them is read
    store_part(a, at, n, v)
    splat(a, at)                one element in every lane
    fill(a, x)                  the number x in every lane, in a's element type
    fma(x, y, z)                x * y + z, rounded once
    add, sub, mul, div          lane by lane
    maximum(x, y)               NaN where either is NaN
    absolute, with_sign, where_less, where_equal, between, bounded, plus_unless_hidden, times_unless_zero     as their docstrings say
    exp2(x)                     see below
    lane(v, n)                  one lane as a number
    total(v), widest(v)         sum and largest of the lanes

`at` is an index for a one-dimensional array and a tuple of indices otherwise; the last axis must be contiguous, the others may have any stride.

exp2: x is split into the nearest integer n and f = x - n in [-1/2, 1/2], exactly; a polynomial in f, by Horner's rule with fma, gives 2**f, and n is
added to its exponent.  The relative error is below 1.27 units of 2**-24 in float32 (degree 6) and below 1.27 units of 2**-53 in float64 (degree
11), proved in tests/test_simd.py.  A result below the smallest normal number is 0, one above the largest is infinite, NaN is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_LL = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_BYTES = {types.float32: 4, types.float64: 8}
_NAME = {types.float32: "f32", types.float64: "f64"}
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@functools.cache
def register_bytes() -> int:
    """Width of the host's vector registers: 64 with AVX-512, 32 with AVX, else 16 (SSE2, NEON, and what LLVM makes of it elsewhere)."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx") else 16


class VecType(types.Type):
    """Numba's type of a vector."""

    def __init__(self, element: types.Type) -> None:
        self.element, self.count = element, register_bytes() // _BYTES[element]
        super().__init__(name=f"Vec({element}, {self.count})")


@register_model(VecType)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: VecType) -> None:
        super().__init__(manager, kind, ir.VectorType(_LL[kind.element], kind.count))


# ---- emitting ------------------------------------------------------------------------------------------------------------------


def _every(vector: ir.VectorType, x: Any) -> ir.Constant:
    return ir.Constant(vector, [x] * vector.count)


def _splat(builder: ir.IRBuilder, x: Any, count: int) -> Any:
    vector = ir.VectorType(x.type, count)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count))


def _call(builder: ir.IRBuilder, base: str, kind: VecType, *args: Any) -> Any:
    """An LLVM intrinsic whose arguments and result are vectors of one kind."""
    name = f"llvm.{base}.v{kind.count}{_NAME[kind.element]}"
    function = builder.module.globals.get(name)
    if function is None:
        vector = args[0].type
        function = ir.Function(builder.module, ir.FunctionType(vector, [vector] * len(args)), name)
    return builder.call(function, args)


def _pointer(context: Any, builder: ir.IRBuilder, array: types.Array, value: Any, at: Any, index: Any) -> Any:
    """Pointer to an element."""
    view = context.make_array(array)(context, builder, value)
    indices = [index] if array.ndim == 1 else [builder.extract_value(index, n) for n in range(array.ndim)]
    kinds = [at] if array.ndim == 1 else list(at)
    offset = ir.Constant(_I64, 0)
    for n, (one, kind) in enumerate(zip(indices, kinds, strict=True)):
        step = ir.Constant(_I64, _BYTES[array.dtype]) if n == array.ndim - 1 else builder.extract_value(view.strides, n)
        offset = builder.add(offset, builder.mul(context.cast(builder, one, kind, types.int64), step))
    return builder.inttoptr(builder.add(builder.ptrtoint(view.data, _I64), offset), _LL[array.dtype].as_pointer())


def _as_vector(builder: ir.IRBuilder, pointer: Any, kind: VecType) -> Any:
    return builder.bitcast(pointer, ir.VectorType(_LL[kind.element], kind.count).as_pointer())


# ---- memory --------------------------------------------------------------------------------------------------------------------


@intrinsic
def lanes(typingctx, a):  # type: ignore[no-untyped-def]
    count = VecType(a.dtype).count
    return types.int64(a), lambda context, builder, signature, args: ir.Constant(_I64, count)


@intrinsic
def is_double(typingctx, a):  # type: ignore[no-untyped-def]
    """Whether a's elements are float64, a constant to the compiler."""
    return types.boolean(a), lambda context, builder, signature, args: ir.Constant(ir.IntType(1), int(a.dtype is types.float64))


@intrinsic
def load(typingctx, a, at):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, a, args[0], at, args[1])
        return builder.load(_as_vector(builder, pointer, kind), align=_BYTES[a.dtype])

    return kind(a, at), emit


@intrinsic
def prefetch(typingctx, a, at):  # type: ignore[no-untyped-def]
    """A hint that an element will be read soon; any index will do."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = builder.bitcast(_pointer(context, builder, a, args[0], at, args[1]), ir.IntType(8).as_pointer())
        hint = builder.module.globals.get("llvm.prefetch.p0")
        if hint is None:
            hint = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32]), "llvm.prefetch.p0")
        builder.call(hint, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return types.void(a, at), emit


@intrinsic
def store(typingctx, a, at, v):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, a, args[0], at, args[1])
        builder.store(args[2], _as_vector(builder, pointer, v), align=_BYTES[a.dtype])
        return context.get_dummy_value()

    return types.void(a, at, v), emit


def _first(builder: ir.IRBuilder, count: int, n: Any) -> Any:
    """The mask of the first n lanes."""
    numbers = ir.Constant(ir.VectorType(_I64, count), list(range(count)))
    return builder.icmp_signed("<", numbers, _splat(builder, n, count))


def _masked(builder: ir.IRBuilder, what: str, kind: VecType, result: Any, arguments: list[Any]) -> Any:
    name = f"llvm.masked.{what}.v{kind.count}{_NAME[kind.element]}.p0"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [x.type for x in arguments]), name)
    return builder.call(function, arguments)


@intrinsic
def load_part(typingctx, a, at, n):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _as_vector(builder, _pointer(context, builder, a, args[0], at, args[1]), kind)
        vector = ir.VectorType(_LL[a.dtype], kind.count)
        mask = _first(builder, kind.count, context.cast(builder, args[2], n, types.int64))
        return _masked(builder, "load", kind, vector, [pointer, ir.Constant(_I32, _BYTES[a.dtype]), mask, _every(vector, 0.0)])

    return kind(a, at, n), emit


@intrinsic
def store_part(typingctx, a, at, n, v):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _as_vector(builder, _pointer(context, builder, a, args[0], at, args[1]), v)
        mask = _first(builder, v.count, context.cast(builder, args[2], n, types.int64))
        _masked(builder, "store", v, ir.VoidType(), [args[3], pointer, ir.Constant(_I32, _BYTES[a.dtype]), mask])
        return context.get_dummy_value()

    return types.void(a, at, n, v), emit


@intrinsic
def splat(typingctx, a, at):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _splat(builder, builder.load(_pointer(context, builder, a, args[0], at, args[1])), kind.count)

    return kind(a, at), emit


@intrinsic
def fill(typingctx, a, x):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _splat(builder, context.cast(builder, args[1], x, a.dtype), kind.count)

    return kind(a, x), emit


@intrinsic
def lane(typingctx, v, n):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.extract_element(args[0], builder.trunc(context.cast(builder, args[1], n, types.int64), _I32))

    return v.element(v, n), emit


def _reduced(builder: ir.IRBuilder, kind: VecType, v: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes combined, halves first."""
    half = kind.count // 2
    while half:
        order = ir.Constant(ir.VectorType(_I32, kind.count), [(n + half) % kind.count for n in range(kind.count)])
        v = combine(v, builder.shuffle_vector(v, v, order))
        half //= 2
    return builder.extract_element(v, ir.Constant(_I32, 0))


@intrinsic
def total(typingctx, v):  # type: ignore[no-untyped-def]
    """Sum of the lanes, halves added to halves."""
    return v.element(v), lambda context, builder, signature, args: _reduced(builder, v, args[0], builder.fadd)


@intrinsic
def widest(typingctx, v):  # type: ignore[no-untyped-def]
    """The largest lane; NaN where any is."""
    return v.element(v), lambda context, builder, signature, args: _reduced(builder, v, args[0], functools.partial(_maximum, builder, v))


# ---- arithmetic ------------------------------------------------------------------------------------------------------------------


def _lanewise(count: int, emit: Callable[..., Any], doc: str) -> Any:
    """An intrinsic of `count` vectors of one kind that returns one more; `emit(builder, kind, *vectors)`."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return emit(builder, signature.return_type, *args)

    def one(typingctx, x):  # type: ignore[no-untyped-def]
        return x(x), generate

    def two(typingctx, x, y):  # type: ignore[no-untyped-def]
        return x(x, y), generate

    def three(typingctx, x, y, z):  # type: ignore[no-untyped-def]
        return x(x, y, z), generate

    def four(typingctx, v, x, y, z):  # type: ignore[no-untyped-def]
        return v(v, x, y, z), generate

    typed: Any = (one, two, three, four)[count - 1]
    typed.__doc__ = doc
    return intrinsic(typed)


def _maximum(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    larger = builder.select(builder.fcmp_ordered(">", x, y), x, y)  # y where either is NaN
    return builder.select(builder.fcmp_unordered("uno", x, x), x, larger)


add = _lanewise(2, lambda builder, kind, x, y: builder.fadd(x, y), "x + y")
sub = _lanewise(2, lambda builder, kind, x, y: builder.fsub(x, y), "x - y")
mul = _lanewise(2, lambda builder, kind, x, y: builder.fmul(x, y), "x * y")
div = _lanewise(2, lambda builder, kind, x, y: builder.fdiv(x, y), "x / y")
fma = _lanewise(3, lambda builder, kind, x, y, z: _call(builder, "fma", kind, x, y, z), "x * y + z, rounded once")
maximum = _lanewise(2, _maximum, "the larger; NaN where either is NaN")

#: Coefficients of 2**f on [-1/2, 1/2], constant term first: 1 + f g(f), where g interpolates (2**f - 1) / f at Chebyshev nodes; then rounded.
EXP2 = {
    types.float32: tuple(
        map(
            float.fromhex,
            ("0x1p+0", "0x1.62e43p-1", "0x1.ebfbep-3", "0x1.c6af6cp-5", "0x1.3b2a54p-7", "0x1.5f089p-10", "0x1.44138ap-13"),
        )
    ),
    types.float64: tuple(
        map(
            float.fromhex,
            (
                "0x1p+0", "0x1.62e42fefa39efp-1", "0x1.ebfbdff82c598p-3", "0x1.c6b08d704a0c2p-5", "0x1.3b2ab6fba1ddap-7", "0x1.5d87fe78a5276p-10",
                "0x1.430913096fd9fp-13", "0x1.ffcbfc670dcd4p-17", "0x1.62bfd47773353p-20", "0x1.b524fae627834p-24", "0x1.e6063f7217bc6p-28",
                "0x1.e9d3fe3952179p-32",
            ),
        )
    ),
}  # fmt: skip
#: Adding and subtracting this rounds to an integer, which then stands in the last bits: 1.5 * 2**(fraction bits).
_ROUND = {types.float32: 1.5 * 2.0**23, types.float64: 1.5 * 2.0**52}
#: Exponents of the smallest normal number and of the first that is none, and where an exponent's bits begin.
_EXPONENT = {types.float32: (-126, 128, 23), types.float64: (-1022, 1024, 52)}


def _exp2(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    least, most, shift = _EXPONENT[kind.element]
    integer = ir.VectorType(_I32 if kind.element is types.float32 else _I64, kind.count)
    every = functools.partial(_every, x.type)
    shifted = builder.fadd(x, every(_ROUND[kind.element]))
    f = builder.fsub(x, builder.fsub(shifted, every(_ROUND[kind.element])))
    *others, y = map(every, EXP2[kind.element])
    for coefficient in reversed(others):
        y = _call(builder, "fma", kind, y, f, coefficient)
    exponent = builder.shl(builder.bitcast(shifted, integer), _every(integer, shift))
    y = builder.bitcast(builder.add(builder.bitcast(y, integer), exponent), x.type)
    y = builder.select(builder.fcmp_ordered("<", x, every(float(least))), every(0.0), y)
    y = builder.select(builder.fcmp_ordered(">=", x, every(float(most))), every(float("inf")), y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


exp2 = _lanewise(1, _exp2, "2**x")


def _between(builder: ir.IRBuilder, kind: VecType, v: Any, x: Any, low: Any, high: Any) -> Any:
    inside = builder.and_(builder.fcmp_ordered(">=", x, low), builder.fcmp_ordered("<", x, high))
    return builder.select(inside, v, _every(v.type, -float("inf")))


def _bounded(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    return builder.select(builder.fcmp_ordered("==", x, _every(x.type, -float("inf"))), _every(x.type, 0.0), x)


def _plus_unless_hidden(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    hidden = _every(x.type, -float("inf"))
    return builder.select(builder.fcmp_ordered("==", y, hidden), hidden, builder.fadd(x, y))


def _absolute(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    return _call(builder, "fabs", kind, x)


def _with_sign(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    return _call(builder, "copysign", kind, x, y)


def _where_equal(builder: ir.IRBuilder, kind: VecType, x: Any, mark: Any, y: Any, z: Any) -> Any:
    return builder.select(builder.fcmp_ordered("==", x, mark), y, z)


def _where_less(builder: ir.IRBuilder, kind: VecType, x: Any, limit: Any, y: Any, z: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, limit), y, z)


def _times_unless_zero(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    zero = _every(x.type, 0.0)
    return builder.select(builder.fcmp_ordered("==", x, zero), zero, builder.fmul(x, y))


times_unless_zero = _lanewise(2, _times_unless_zero, "x * y, and 0 where x is 0 whatever y is")
absolute = _lanewise(1, _absolute, "|x|")
with_sign = _lanewise(2, _with_sign, "|x| with the sign of y")
where_equal = _lanewise(4, _where_equal, "y where x == mark, elsewhere z")
where_less = _lanewise(4, _where_less, "y where x < limit, elsewhere z")
plus_unless_hidden = _lanewise(2, _plus_unless_hidden, "x + y, and -inf where y is -inf whatever x is")
bounded = _lanewise(1, _bounded, "x, and 0 where it is -inf: a maximum nothing has raised yet, fit to be subtracted")
between = _lanewise(4, _between, "v where low <= x < high, elsewhere -inf")


# ---- blocks ----------------------------------------------------------------------------------------------------------------------


def _transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """A square block of vectors transposed in registers: lane i of row j becomes lane j of row i, one bit of the numbers at a time."""
    count = len(rows)
    step = 1
    while step < count:
        kept = [lane if not lane & step else count + lane - step for lane in range(count)]
        moved = [lane + step if not lane & step else count + lane for lane in range(count)]
        for i in range(count):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = (builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, count), order)) for order in (kept, moved))
        step *= 2
    return rows


def _row(context: Any, builder: ir.IRBuilder, a: types.Array, value: Any, table: types.Array, offsets: Any, n: Any) -> Any:
    """Address of the row whose byte offset stands at index n of a table."""
    view, places = context.make_array(a)(context, builder, value), context.make_array(table)(context, builder, offsets)
    return builder.add(builder.ptrtoint(view.data, _I64), builder.load(builder.gep(places.data, [n])))


@intrinsic
def transpose_in(typingctx, a, rows, n, x, panel, at, step):  # type: ignore[no-untyped-def]
    """Rows n, n + 1, ... of `a` (a vector's lanes of them, starting at element x of each) become columns of `panel`.

    Row m begins rows[m] bytes into `a`.  Element x + j of row n + l goes to panel[at + j * step + l].
    """
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, offsets, first, column, target, place, stride = args
        item = ir.Constant(_I64, _BYTES[a.dtype])
        vector = ir.VectorType(_LL[a.dtype], kind.count).as_pointer()
        along = builder.mul(context.cast(builder, column, x, types.int64), item)
        loaded = []
        for number in range(kind.count):
            row = builder.add(context.cast(builder, first, n, types.int64), ir.Constant(_I64, number))
            address = builder.add(_row(context, builder, a, value, rows, offsets, row), along)
            loaded.append(builder.load(builder.inttoptr(address, vector), align=_BYTES[a.dtype]))
        base = builder.ptrtoint(_pointer(context, builder, panel, target, at, place), _I64)
        between_rows = builder.mul(context.cast(builder, stride, step, types.int64), item)
        for number, row in enumerate(_transposed(builder, loaded)):
            address = builder.add(base, builder.mul(between_rows, ir.Constant(_I64, number)))
            builder.store(row, builder.inttoptr(address, vector), align=_BYTES[a.dtype])
        return context.get_dummy_value()

    return types.void(a, rows, n, x, panel, at, step), emit


@intrinsic
def gather(typingctx, a, rows, n, x, target):  # type: ignore[no-untyped-def]
    """target[l] = element x of row n + l of `a`, for every lane l; row m begins rows[m] bytes into `a`."""
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, offsets, first, column, out = args
        item = ir.Constant(_I64, _BYTES[a.dtype])
        element = _LL[a.dtype].as_pointer()
        along = builder.mul(context.cast(builder, column, x, types.int64), item)
        place = context.make_array(target)(context, builder, out)
        for number in range(kind.count):
            row = builder.add(context.cast(builder, first, n, types.int64), ir.Constant(_I64, number))
            address = builder.add(_row(context, builder, a, value, rows, offsets, row), along)
            builder.store(builder.load(builder.inttoptr(address, element)), builder.gep(place.data, [ir.Constant(_I64, number)]))
        return context.get_dummy_value()

    return types.void(a, rows, n, x, target), emit


@intrinsic
def transpose_out(typingctx, panel, at, step, a, rows, n, x):  # type: ignore[no-untyped-def]
    """The way back: panel[at + j * step + l] goes to element x + j of row n + l of `a`."""
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, place, stride, value, offsets, first, column = args
        item = ir.Constant(_I64, _BYTES[a.dtype])
        vector = ir.VectorType(_LL[a.dtype], kind.count).as_pointer()
        base = builder.ptrtoint(_pointer(context, builder, panel, source, at, place), _I64)
        between_rows = builder.mul(context.cast(builder, stride, step, types.int64), item)
        loaded = []
        for number in range(kind.count):
            address = builder.add(base, builder.mul(between_rows, ir.Constant(_I64, number)))
            loaded.append(builder.load(builder.inttoptr(address, vector), align=_BYTES[a.dtype]))
        along = builder.mul(context.cast(builder, column, x, types.int64), item)
        for number, column_of in enumerate(_transposed(builder, loaded)):
            row = builder.add(context.cast(builder, first, n, types.int64), ir.Constant(_I64, number))
            address = builder.add(_row(context, builder, a, value, rows, offsets, row), along)
            builder.store(column_of, builder.inttoptr(address, vector), align=_BYTES[a.dtype])
        return context.get_dummy_value()

    return types.void(panel, at, step, a, rows, n, x), emit
