"""SIMD vectors as Numba values: explicit lanes where the auto-vectoriser cannot be trusted with registers.

A vector is one register of float32 or float64 lanes.  It is an ordinary value inside jitted code (an LLVM vector, never memory), so a handful of
them named in a loop is a register block.  Every operation is an intrinsic that becomes one or a few instructions on any target LLVM knows;
only the width is chosen for the host.

    lanes(a), element_bytes(a)  lanes of a vector of a's elements, and bytes of one; constants to the compiler
    load(a, at)                 consecutive elements from index `at` on; any alignment
    store(a, at, v)
    splat(a, at)                one element in every lane
    address(a, at)              where an element stands, a number
    load_at(a, place), splat_at(a, place), number_at(a, place), put_at(place, x)
                                the same for elements of a's type that stand at an address, whatever array they belong to
    load_part_at(a, place, n)   the first n lanes, the others 0; nothing past them is read
    prefetch_at(place)          a hint that it will be read
    byte_at(place)              an unsigned byte
    bfloat16_at(a, place), float16_at(a, place), and bfloat16_part_at(a, place, n), float16_part_at(a, place, n)
                                a vector, or its first n lanes, of numbers stored in two bytes, exactly as they are
    fill(a, x)                  the number x in every lane, in a's element type
    fma(x, y, z)                x * y + z, rounded once
    add, sub, mul, div          lane by lane
    maximum(x, y)               NaN where either is NaN
    larger(x, y), smaller(x, y) y where either is NaN, for which processors have one instruction
    absolute, with_sign, where_less, where_equal, between, bounded,
    plus_unless_hidden, fma_unless_hidden, times_unless_zero    as their docstrings say
    exp2(x), exp2_below(x)      see below
    tanh_ratio(z)               see below
    lane(v, n)                  one lane as a number
    total(v), widest(v)         sum and largest of the lanes
    store_totals(s, at, row_step, vectors)  sums of the lanes of sixteen vectors at once
    transpose_in, transpose_hidden_in, transpose_out, gather    square blocks, between a panel and rows whose addresses a table holds
    transpose_at                                                 a square block, from one address to another

`at` is an index for a one-dimensional array and a tuple of indices otherwise; the last axis must be contiguous (but for `address`), the others may
have any stride.

exp2: x is split into the nearest integer n and f = x - n in [-1/2, 1/2], exactly; a polynomial in f, by Horner's rule with fma, gives 2**f, and n is
added to its exponent.  The relative error is below 1.27 units of 2**-24 in float32 (degree 6) and below 1.27 units of 2**-53 in float64 (degree
11), proved in tests/test_simd.py.  A result below the smallest normal number is 0, one above the largest is infinite, NaN is NaN.
exp2_below does the same for x up to 0 with fewer instructions: the power of two is multiplied by, which leaves subnormal results subnormal.

tanh_ratio: with z = x**2 it is (tanh(x) - x) / x**3 for |x| below 5/8, a polynomial in float32 and a rational function in float64 (Cephes, Moshier);
x + x**3 times that keeps small numbers exact to the last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LL = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_BYTES = {types.float32: 4, types.float64: 8}


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


def _declared(builder: ir.IRBuilder, name: str, result: Any, arguments: list[Any]) -> Any:
    """A call of an LLVM intrinsic by its full name."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [x.type for x in arguments]), name)
    return builder.call(function, arguments)


def call_llvm(builder: ir.IRBuilder, base: str, *args: Any) -> Any:
    """An LLVM intrinsic whose arguments and result are all vectors, or all numbers, of one kind."""
    kind = args[0].type
    name = f"v{kind.count}{kind.element.intrinsic_name}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name
    return _declared(builder, f"llvm.{base}.{name}", kind, list(args))


def horner(builder: ir.IRBuilder, coefficients: tuple[float, ...], x: Any) -> Any:
    """A polynomial of a vector or a number by Horner's rule with fma, constant term first."""
    constants = [_every(x.type, c) if isinstance(x.type, ir.VectorType) else ir.Constant(x.type, c) for c in coefficients]
    y = constants.pop()
    for c in reversed(constants):
        y = call_llvm(builder, "fma", y, x, c)
    return y


def _integer(context: Any, builder: ir.IRBuilder, x: Any, kind: types.Type) -> Any:
    return context.cast(builder, x, kind, types.int64)


def _place(context: Any, builder: ir.IRBuilder, array: types.Array, value: Any, at: Any, index: Any, last: int | None) -> Any:
    """Address of an element, by the array's strides and `last` bytes between elements of the last axis, or that axis' stride too."""
    view = context.make_array(array)(context, builder, value)
    indices, kinds = ([index], [at]) if array.ndim == 1 else (cgutils.unpack_tuple(builder, index), list(at))
    place = builder.ptrtoint(view.data, _I64)
    for n, (one, kind) in enumerate(zip(indices, kinds, strict=True)):
        known = last is not None and n == array.ndim - 1
        step = ir.Constant(_I64, last) if known else builder.extract_value(view.strides, n)
        place = builder.add(place, builder.mul(_integer(context, builder, one, kind), step))
    return place


def _pointer(context: Any, builder: ir.IRBuilder, array: types.Array, value: Any, at: Any, index: Any) -> Any:
    """Pointer to an element of an array of vectors' elements, whose last axis is contiguous."""
    return builder.inttoptr(_place(context, builder, array, value, at, index, _BYTES[array.dtype]), _LL[array.dtype].as_pointer())


def _as_vector(builder: ir.IRBuilder, pointer: Any, kind: VecType) -> Any:
    return builder.bitcast(pointer, ir.VectorType(_LL[kind.element], kind.count).as_pointer())


# ---- memory --------------------------------------------------------------------------------------------------------------------


@intrinsic
def lanes(typingctx, a):  # type: ignore[no-untyped-def]
    count = VecType(a.dtype).count
    return types.int64(a), lambda context, builder, signature, args: ir.Constant(_I64, count)


@intrinsic
def element_bytes(typingctx, a):  # type: ignore[no-untyped-def]
    """`a.itemsize`, which the compiler does not know."""
    return types.int64(a), lambda context, builder, signature, args: ir.Constant(_I64, _BYTES[a.dtype])


@intrinsic
def load(typingctx, a, at):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, a, args[0], at, args[1])
        return builder.load(_as_vector(builder, pointer, kind), align=_BYTES[a.dtype])

    return kind(a, at), emit


@intrinsic
def prefetch_at(typingctx, place):  # type: ignore[no-untyped-def]
    """A hint that what stands at an address will be read soon, and belongs into the second-level cache; any address will do."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        hint = [builder.inttoptr(args[0], _I8.as_pointer()), *(ir.Constant(_I32, n) for n in (0, 2, 1))]  # to be read, and kept, as data
        _declared(builder, "llvm.prefetch.p0", ir.VoidType(), hint)
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def address(typingctx, a, at):  # type: ignore[no-untyped-def]
    """Where an element of an array of any type and strides stands.  The array must live as long as the address is used."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _place(context, builder, a, args[0], at, args[1], None)

    return types.int64(a, at), emit


@intrinsic
def load_at(typingctx, a, place):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[1], ir.VectorType(_LL[a.dtype], kind.count).as_pointer()), align=1)

    return kind(a, types.int64), emit


@intrinsic
def splat_at(typingctx, a, place):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _splat(builder, builder.load(builder.inttoptr(args[1], _LL[a.dtype].as_pointer()), align=1), kind.count)

    return kind(a, types.int64), emit


@intrinsic
def number_at(typingctx, a, place):  # type: ignore[no-untyped-def]
    """One element of a's type that stands at an address."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[1], context.get_value_type(a.dtype).as_pointer()), align=1)

    return a.dtype(a, types.int64), emit


@intrinsic
def byte_at(typingctx, place):  # type: ignore[no-untyped-def]
    """The byte that stands at an address."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(args[0], _I8.as_pointer()))

    return types.uint8(types.int64), emit


@intrinsic
def put_at(typingctx, place, x):  # type: ignore[no-untyped-def]
    """Write a number at an address."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, x), emit


@intrinsic
def store(typingctx, a, at, v):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _pointer(context, builder, a, args[0], at, args[1])
        builder.store(args[2], _as_vector(builder, pointer, v), align=_BYTES[a.dtype])
        return context.get_dummy_value()

    return types.void(a, at, v), emit


def _masked_load(builder: ir.IRBuilder, vector: ir.VectorType, place: Any, n: Any) -> Any:
    """The first n lanes of what stands at an address, the others 0."""
    numbers = ir.Constant(ir.VectorType(_I64, vector.count), list(range(vector.count)))
    mask = builder.icmp_signed("<", numbers, _splat(builder, n, vector.count))
    arguments = [builder.inttoptr(place, vector.as_pointer()), ir.Constant(_I32, 1), mask, ir.Constant(vector, None)]
    return _declared(builder, f"llvm.masked.load.v{vector.count}{vector.element.intrinsic_name}.p0", vector, arguments)


@intrinsic
def load_part_at(typingctx, a, place, n):  # type: ignore[no-untyped-def]
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _masked_load(builder, ir.VectorType(_LL[a.dtype], kind.count), args[1], _integer(context, builder, args[2], n))

    return kind(a, types.int64, n), emit


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
        return builder.extract_element(args[0], builder.trunc(_integer(context, builder, args[1], n), _I32))

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


@intrinsic
def store_totals(typingctx, s, at, row_step, vectors):  # type: ignore[no-untyped-def]
    """Sums of the lanes of a tuple of sixteen vectors: the first four to s[at], s[at + 1], ..., the next four row_step further, and so on."""
    kind = vectors.dtype

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        given = cgutils.unpack_tuple(builder, args[3])
        element = _BYTES[kind.element]
        base = builder.ptrtoint(_pointer(context, builder, s, args[0], at, args[1]), _I64)
        between_rows = builder.mul(context.cast(builder, args[2], row_step, types.int64), ir.Constant(_I64, element))
        together = min(4, kind.count)
        done = 0
        for first in range(0, len(given), kind.count):
            summed = sums_of_lanes(builder, list(given[first : first + kind.count]), element)
            for lane in range(0, kind.count, together):
                part = builder.shuffle_vector(summed, summed, ir.Constant(ir.VectorType(_I32, together), [lane + n for n in range(together)]))
                offset = builder.add(builder.mul(between_rows, ir.Constant(_I64, done // 4)), ir.Constant(_I64, done % 4 * element))
                builder.store(part, builder.inttoptr(builder.add(base, offset), part.type.as_pointer()), align=element)
                done += together
        return context.get_dummy_value()

    return types.void(s, at, row_step, vectors), emit


def sums_of_lanes(builder: ir.IRBuilder, vectors: list[Any], element: int) -> Any:
    """A vector whose lane l is the sum of the lanes of vector l: neighbours are added, and halves of two vectors joined, until one is left.

    First lanes are neighbours, inside each 16 bytes, where processors move them cheaply; then every 16 bytes are one lane.
    """
    count, inside = len(vectors), 16 // element
    while len(vectors) > 1:
        unit, row = (1, inside) if len(vectors) * inside > count else (inside, count)  # lanes that move together, and what they move in
        even = [n // row * row + n % (row // 2) // unit * 2 * unit + n % unit + count * (n % row >= row // 2) for n in range(count)]
        orders = [ir.Constant(ir.VectorType(_I32, count), [n + odd for n in even]) for odd in (0, unit)]
        pairs = [(vectors[n], vectors[n + 1]) for n in range(0, len(vectors), 2)]
        vectors = [builder.fadd(*(builder.shuffle_vector(a, b, order) for order in orders)) for a, b in pairs]
    return vectors[0]


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
fma = _lanewise(3, lambda builder, kind, x, y, z: call_llvm(builder, "fma", x, y, z), "x * y + z, rounded once")
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
    y = horner(builder, EXP2[kind.element], f)
    exponent = builder.shl(builder.bitcast(shifted, integer), _every(integer, shift))
    y = builder.bitcast(builder.add(builder.bitcast(y, integer), exponent), x.type)
    y = builder.select(builder.fcmp_ordered("<", x, every(float(least))), every(0.0), y)
    y = builder.select(builder.fcmp_ordered(">=", x, every(float(most))), every(float("inf")), y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, y)


exp2 = _lanewise(1, _exp2, "2**x")

#: Numerators and denominators of `tanh_ratio`, constant term first.
TANH = {
    types.float32: ((-3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3), (1.0,)),
    types.float64: (
        (-1.61468768441708447952e3, -9.92877231001918586564e1, -9.64399179425052238628e-1),
        (4.84406305325125486048e3, 2.23548839060100448583e3, 1.12811678491632931402e2, 1.0),
    ),
}


def _tanh_ratio(builder: ir.IRBuilder, kind: VecType, z: Any) -> Any:
    return builder.fdiv(*(horner(builder, coefficients, z) for coefficients in TANH[kind.element]))


tanh_ratio = _lanewise(1, _tanh_ratio, "(tanh(x) - x) / x**3 for z = x**2")


def _exp2_below(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    least, _, shift = _EXPONENT[kind.element]
    integer = ir.VectorType(_I32 if kind.element is types.float32 else _I64, kind.count)
    every = functools.partial(_every, x.type)
    x = builder.select(builder.fcmp_ordered("<", x, every(float(least - 1))), every(float(least - 1)), x)
    rounds = _ROUND[kind.element] + (1 - least)  # what then stands in the last bits is the exponent as it is stored
    shifted = builder.fadd(x, every(rounds))
    f = builder.fsub(x, builder.fsub(shifted, every(rounds)))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, integer), _every(integer, shift)), x.type)
    return builder.fmul(horner(builder, EXP2[kind.element], f), power)


exp2_below = _lanewise(1, _exp2_below, "2**x for x from -inf to 0, or NaN; results below the smallest normal number are subnormal or 0")


def _larger(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _smaller(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


larger = _lanewise(2, _larger, "the larger; y where either is NaN")
smaller = _lanewise(2, _smaller, "the smaller; y where either is NaN")


def _between(builder: ir.IRBuilder, kind: VecType, v: Any, x: Any, low: Any, high: Any) -> Any:
    inside = builder.and_(builder.fcmp_ordered(">=", x, low), builder.fcmp_ordered("<", x, high))
    return builder.select(inside, v, _every(v.type, -float("inf")))


def _bounded(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    return builder.select(builder.fcmp_ordered("==", x, _every(x.type, -float("inf"))), _every(x.type, 0.0), x)


def _plus_unless_hidden(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    hidden = _every(x.type, -float("inf"))
    return builder.select(builder.fcmp_ordered("==", y, hidden), hidden, builder.fadd(x, y))


def _fma_unless_hidden(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any, z: Any) -> Any:
    hidden = _every(x.type, -float("inf"))
    return builder.select(builder.fcmp_ordered("==", z, hidden), hidden, call_llvm(builder, "fma", x, y, z))


def _absolute(builder: ir.IRBuilder, kind: VecType, x: Any) -> Any:
    return call_llvm(builder, "fabs", x)


def _with_sign(builder: ir.IRBuilder, kind: VecType, x: Any, y: Any) -> Any:
    return call_llvm(builder, "copysign", x, y)


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
fma_unless_hidden = _lanewise(3, _fma_unless_hidden, "x * y + z, and -inf where z is -inf whatever x is")
plus_unless_hidden = _lanewise(2, _plus_unless_hidden, "x + y, and -inf where y is -inf whatever x is")
bounded = _lanewise(1, _bounded, "x, and 0 where it is -inf: a maximum nothing has raised yet, fit to be subtracted")
between = _lanewise(4, _between, "v where low <= x < high, elsewhere -inf")


# ---- numbers stored in two bytes -----------------------------------------------------------------------------------------------------


def _bits_at(builder: ir.IRBuilder, count: int, place: Any, n: Any) -> Any:
    """`count` numbers of two bytes, or the first n of them and zeros, as integers of 32 bits."""
    vector = ir.VectorType(_I16, count)
    bits = builder.load(builder.inttoptr(place, vector.as_pointer()), align=1) if n is None else _masked_load(builder, vector, place, n)
    return builder.zext(bits, ir.VectorType(_I32, count))


def _bfloat16(builder: ir.IRBuilder, bits: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    return builder.bitcast(builder.shl(bits, _every(bits.type, 16)), ir.VectorType(ir.FloatType(), bits.type.count))


def _float16(builder: ir.IRBuilder, bits: Any) -> Any:
    """Fraction and exponent of a float16 moved to where float32 has them mean 2**-112 times the number, subnormals included."""
    every = functools.partial(_every, bits.type)
    floats = ir.VectorType(ir.FloatType(), bits.type.count)
    size = builder.shl(builder.and_(bits, every(0x7FFF)), every(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(size, floats), _every(floats, 2.0**112)), bits.type)
    special = builder.icmp_unsigned(">=", size, every(0x7C00 << 13))  # infinities and NaN keep their fraction
    scaled = builder.select(special, builder.or_(size, every(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
    return builder.bitcast(builder.or_(scaled, sign), floats)


def _stored(convert: Callable[[ir.IRBuilder, Any], Any], doc: str) -> tuple[Any, Any]:
    """The intrinsics that read a vector, and a part of one, in a format of two bytes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = signature.return_type
        n = _integer(context, builder, args[2], signature.args[2]) if len(args) == 3 else None
        numbers = convert(builder, _bits_at(builder, kind.count, args[1], n))
        return builder.fpext(numbers, ir.VectorType(_LL[kind.element], kind.count)) if kind.element is types.float64 else numbers

    def whole(typingctx, a, place):  # type: ignore[no-untyped-def]
        return VecType(a.dtype)(a, types.int64), emit

    def part(typingctx, a, place, n):  # type: ignore[no-untyped-def]
        return VecType(a.dtype)(a, types.int64, n), emit

    whole.__doc__, part.__doc__ = doc, doc + "; the first n lanes, the others 0"
    return intrinsic(whole), intrinsic(part)


bfloat16_at, bfloat16_part_at = _stored(_bfloat16, "a vector of bfloat16 numbers that stand at an address")
float16_at, float16_part_at = _stored(_float16, "a vector of float16 numbers that stand at an address")


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


def _in_rows(context: Any, builder: ir.IRBuilder, table: types.Array, places: Any, first: Any, column: Any, item: int, count: int) -> list[Any]:
    """Addresses of one element, of `item` bytes, of `count` rows of a table of addresses."""
    rows = context.make_array(table)(context, builder, places).data
    along = builder.mul(column, ir.Constant(_I64, item))
    return [builder.add(builder.load(builder.gep(rows, [builder.add(first, ir.Constant(_I64, n))])), along) for n in range(count)]


def _in_panel(builder: ir.IRBuilder, pointer: Any, step: Any, kind: VecType) -> list[Any]:
    """Pointers to the vectors of a square block whose rows begin `step` elements apart."""
    base, between_rows = builder.ptrtoint(pointer, _I64), builder.mul(step, ir.Constant(_I64, _BYTES[kind.element]))
    vector = ir.VectorType(_LL[kind.element], kind.count).as_pointer()
    return [builder.inttoptr(builder.add(base, builder.mul(between_rows, ir.Constant(_I64, n))), vector) for n in range(kind.count)]


@intrinsic
def transpose_in(typingctx, a, rows, n, x, panel, at, step):  # type: ignore[no-untyped-def]
    """Rows n, n + 1, ... of a table of addresses (a vector's lanes of them, from element x of each on) become columns of `panel`.

    Element x + j of row n + l goes to panel[at + j * step + l]; `a` says what the elements are.
    """
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, places, first, column, target, place, stride = args
        first, column, stride = (_integer(context, builder, *one) for one in ((first, n), (column, x), (stride, step)))
        vector = ir.VectorType(_LL[a.dtype], kind.count).as_pointer()
        sources = _in_rows(context, builder, rows, places, first, column, _BYTES[a.dtype], kind.count)
        block = _transposed(builder, [builder.load(builder.inttoptr(one, vector), align=1) for one in sources])
        targets = _in_panel(builder, _pointer(context, builder, panel, target, at, place), stride, kind)
        for row, one in zip(block, targets, strict=True):
            builder.store(row, one, align=_BYTES[a.dtype])
        return context.get_dummy_value()

    return types.void(a, rows, n, x, panel, at, step), emit


@intrinsic
def add_transposed(typingctx, rows, n, x, s, at, step, factor, most):  # type: ignore[no-untyped-def]
    """Rows n, n + 1, ... of a table of addresses (a vector's lanes of them, from element x on) added to columns of s, which are scaled first.

    s[at + j * step + l] becomes factor * itself + element x + j of row n + l, and -inf where that element is.  What is returned is `most`
    raised to all of them; both are vectors.
    """
    kind = VecType(s.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places, first, column, panel, place, stride, times, top = args
        first, column, stride = (_integer(context, builder, *one) for one in ((first, n), (column, x), (stride, step)))
        vector = ir.VectorType(_LL[s.dtype], kind.count).as_pointer()
        sources = _in_rows(context, builder, rows, places, first, column, _BYTES[s.dtype], kind.count)
        block = _transposed(builder, [builder.load(builder.inttoptr(one, vector), align=1) for one in sources])
        targets = _in_panel(builder, _pointer(context, builder, s, panel, at, place), stride, kind)
        for row, one in zip(block, targets, strict=True):
            sum_of = _fma_unless_hidden(builder, kind, builder.load(one, align=_BYTES[s.dtype]), times, row)
            builder.store(sum_of, one, align=_BYTES[s.dtype])
            top = _larger(builder, kind, top, sum_of)
        return top

    return kind(rows, n, x, s, at, step, factor, most), emit


@intrinsic
def transpose_hidden_in(typingctx, rows, n, x, panel, at, step):  # type: ignore[no-untyped-def]
    """`transpose_in` of rows of booleans: 0 where true, -inf where false."""
    kind = VecType(panel.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places, first, column, target, place, stride = args
        first, column, stride = (_integer(context, builder, *one) for one in ((first, n), (column, x), (stride, step)))
        vector, stored = ir.VectorType(_LL[panel.dtype], kind.count), ir.VectorType(_I8, kind.count)
        block = []
        for one in _in_rows(context, builder, rows, places, first, column, 1, kind.count):
            seen = builder.icmp_unsigned("!=", builder.load(builder.inttoptr(one, stored.as_pointer()), align=1), _every(stored, 0))
            block.append(builder.select(seen, _every(vector, 0.0), _every(vector, -float("inf"))))
        targets = _in_panel(builder, _pointer(context, builder, panel, target, at, place), stride, kind)
        for row, one in zip(_transposed(builder, block), targets, strict=True):
            builder.store(row, one, align=_BYTES[panel.dtype])
        return context.get_dummy_value()

    return types.void(rows, n, x, panel, at, step), emit


@intrinsic
def transpose_out(typingctx, panel, at, step, rows, n, x):  # type: ignore[no-untyped-def]
    """The way back: panel[at + j * step + l] goes to element x + j of row n + l of a table of addresses."""
    kind = VecType(panel.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, place, stride, places, first, column = args
        first, column, stride = (_integer(context, builder, *one) for one in ((first, n), (column, x), (stride, step)))
        vector = ir.VectorType(_LL[panel.dtype], kind.count).as_pointer()
        sources = _in_panel(builder, _pointer(context, builder, panel, source, at, place), stride, kind)
        block = _transposed(builder, [builder.load(one, align=_BYTES[panel.dtype]) for one in sources])
        for row, one in zip(block, _in_rows(context, builder, rows, places, first, column, _BYTES[panel.dtype], kind.count), strict=True):
            builder.store(row, builder.inttoptr(one, vector), align=1)
        return context.get_dummy_value()

    return types.void(panel, at, step, rows, n, x), emit


@intrinsic
def transpose_at(typingctx, a, source, source_row, target, target_row):  # type: ignore[no-untyped-def]
    """A square block of a's elements, as wide as a vector, from one address to another, transposed; rows are so many bytes apart here and there."""
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, source, source_row, target, target_row = args
        vector = ir.VectorType(_LL[a.dtype], kind.count).as_pointer()

        def rows(place: Any, step: Any) -> list[Any]:
            return [builder.inttoptr(builder.add(place, builder.mul(step, ir.Constant(_I64, n))), vector) for n in range(kind.count)]

        block = _transposed(builder, [builder.load(one, align=1) for one in rows(source, source_row)])
        for row, one in zip(block, rows(target, target_row), strict=True):
            builder.store(row, one, align=1)
        return context.get_dummy_value()

    return types.void(a, *(types.int64,) * 4), emit


@intrinsic
def gather(typingctx, a, rows, n, x, target):  # type: ignore[no-untyped-def]
    """target[l] = element x of row n + l of a table of addresses, for every lane l; `a` says what the elements are."""
    kind = VecType(a.dtype)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, places, first, column, out = args
        first, column = _integer(context, builder, first, n), _integer(context, builder, column, x)
        element = _LL[a.dtype].as_pointer()
        place = context.make_array(target)(context, builder, out).data
        for number, one in enumerate(_in_rows(context, builder, rows, places, first, column, _BYTES[a.dtype], kind.count)):
            builder.store(builder.load(builder.inttoptr(one, element), align=1), builder.gep(place, [ir.Constant(_I64, number)]))
        return context.get_dummy_value()

    return types.void(a, rows, n, x, target), emit
