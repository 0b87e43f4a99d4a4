"""Numbers side by side: float64 vectors as Numba values with +, -, *, / and a handful of functions, for arithmetic that must round as written.

Every function of this room's arithmetic is written once and serves a number and a vector alike; each operation below is one instruction (or one for
each lane), rounded to nearest, never contracted and never reordered.  Without a compiler (``NUMBA_DISABLE_JIT=1``) vectors have one lane and
are Python's numbers, with the same results.

    fma(x, y, z)                x * y + z, rounded once
    load(a, at), store(a, at, x)    consecutive elements from index `at` on; the last axis is contiguous
    splat(x)                    a number in every lane
    absolute(x), maximum(x, y)  maximum is y where either is NaN
    where_less(a, b, x, y), where_equal(a, b, x, y)     x where a < b (a == b), else y
    with_sign(x, y)             |x| with the sign of y
    pick(table, t)              table[k & 63], and
    power_of_two(t)             2**(k >> 6), for t = MAGIC + k with a whole number k of at most 2**50
    total(x), widest(x)         sum and largest of the lanes
"""

from __future__ import annotations

import math
import operator
import struct
from fractions import Fraction
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

#: Adding a whole number k of moderate size to it leaves k in the last bits.
MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = struct.unpack("<q", struct.pack("<d", MAGIC))[0]
_F64, _I64, _I32 = ir.DoubleType(), ir.IntType(64), ir.IntType(32)


def _lanes_here() -> int:
    if numba.config.DISABLE_JIT:
        return 1
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 8
    return 4 if features.get("avx") else 2


#: Lanes of a vector.
WIDTH = _lanes_here()


class LanesType(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"ExactLanes({WIDTH})")


LANES = LanesType()
_VECTOR = ir.VectorType(_F64, WIDTH)


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: LanesType) -> None:
        super().__init__(manager, kind, _VECTOR)


# ---- emitting ------------------------------------------------------------------------------------------------------------------


def _splatted(builder: ir.IRBuilder, x: Any) -> Any:
    if isinstance(x.type, ir.VectorType):
        return x
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


def _alike(builder: ir.IRBuilder, kinds: Any, values: Any) -> list[Any]:
    """The values, numbers turned into vectors where one of them is a vector."""
    return [_splatted(builder, x) for x in values] if LANES in kinds else list(values)


def _kind(*kinds: Any) -> Any:
    return LANES if LANES in kinds else types.float64


def _call(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    kind = args[0].type
    suffix = f"v{WIDTH}f64" if isinstance(kind, ir.VectorType) else "f64"
    declared = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(args)), f"llvm.{name}.{suffix}")
    return builder.call(declared, args)


def _constant(kind: Any, x: Any) -> Any:
    return ir.Constant(kind, [x] * WIDTH) if isinstance(kind, ir.VectorType) else ir.Constant(kind, x)


def _whole(kind: Any) -> Any:
    return ir.VectorType(_I64, WIDTH) if isinstance(kind, ir.VectorType) else _I64


def _pointer(context: Any, builder: ir.IRBuilder, array: Any, value: Any, at: Any, index: Any) -> Any:
    view = context.make_array(array)(context, builder, value)
    indices, kinds = ([index], [at]) if array.ndim == 1 else (cgutils.unpack_tuple(builder, index), list(at))
    place = builder.ptrtoint(view.data, _I64)
    for n, (one, kind) in enumerate(zip(indices, kinds, strict=True)):
        step = ir.Constant(_I64, 8) if n == array.ndim - 1 else builder.extract_value(view.strides, n)
        place = builder.add(place, builder.mul(context.cast(builder, one, kind, types.int64), step))
    return builder.inttoptr(place, _VECTOR.as_pointer())


# ---- arithmetic ----------------------------------------------------------------------------------------------------------------


def _define_operator(function: Any, instruction: str) -> None:
    @type_callable(function)
    def typed(context: Any) -> Any:
        def typer(x: Any, y: Any) -> Any:
            return LANES if LANES in (x, y) and {x, y} <= {LANES, types.float64} else None

        return typer

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*_alike(builder, signature.args, args))

    for kinds in ((LanesType, LanesType), (LanesType, types.Float), (types.Float, LanesType)):
        lower_builtin(function, *kinds)(emit)


if not numba.config.DISABLE_JIT:
    for _function, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
        _define_operator(_function, _instruction)


@intrinsic
def fma(typingctx, x, y, z):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _call(builder, "fma", *_alike(builder, signature.args, args))

    return _kind(x, y, z)(x, y, z), emit


@intrinsic
def absolute(typingctx, x):  # type: ignore[no-untyped-def]
    return x(x), lambda context, builder, signature, args: _call(builder, "fabs", *args)


@intrinsic
def with_sign(typingctx, x, y):  # type: ignore[no-untyped-def]
    return x(x, y), lambda context, builder, signature, args: _call(builder, "copysign", *args)


def _comparison(test: str) -> Any:
    @intrinsic
    def where(typingctx, a, b, x, y):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            one, two, then, otherwise = _alike(builder, signature.args, args)
            return builder.select(builder.fcmp_ordered(test, one, two), then, otherwise)

        return _kind(a, b, x, y)(a, b, x, y), emit

    return where


where_less = _comparison("<")
where_equal = _comparison("==")


@intrinsic
def maximum(typingctx, x, y):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        one, two = _alike(builder, signature.args, args)
        return builder.select(builder.fcmp_ordered(">", one, two), one, two)

    return _kind(x, y)(x, y), emit


@intrinsic
def splat(typingctx, x):  # type: ignore[no-untyped-def]
    return LANES(x), lambda context, builder, signature, args: _splatted(builder, args[0])


@intrinsic
def pick(typingctx, table, t):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        base, (_, shifted) = context.make_array(table)(context, builder, args[0]).data, args
        at = builder.and_(builder.bitcast(shifted, _whole(shifted.type)), _constant(_whole(shifted.type), 63))
        if t is not LANES:
            return builder.load(builder.gep(base, [at]))
        found = ir.Constant(_VECTOR, ir.Undefined)
        for n in range(WIDTH):
            lane = ir.Constant(_I32, n)
            found = builder.insert_element(found, builder.load(builder.gep(base, [builder.extract_element(at, lane)])), lane)
        return found

    return t(table, t), emit


@intrinsic
def power_of_two(typingctx, t):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        whole = _whole(args[0].type)
        k = builder.sub(builder.bitcast(args[0], whole), _constant(whole, _MAGIC_BITS))
        exponent = builder.add(builder.ashr(k, _constant(whole, 6)), _constant(whole, 1023))
        return builder.bitcast(builder.shl(exponent, _constant(whole, 52)), args[0].type)

    return t(t), emit


# ---- memory and lanes ------------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, a, at):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.load(_pointer(context, builder, a, args[0], at, args[1]), align=8)

    return LANES(a, at), emit


@intrinsic
def store(typingctx, a, at, x):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], _pointer(context, builder, a, args[0], at, args[1]), align=8)
        return context.get_dummy_value()

    return types.void(a, at, x), emit


def _across(combine: Any) -> Any:
    @intrinsic
    def across(typingctx, x):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            lanes = [builder.extract_element(args[0], ir.Constant(_I32, n)) for n in range(WIDTH)]
            found = lanes[0]
            for one in lanes[1:]:
                found = combine(builder, found, one)
            return found

        return types.float64(x), emit

    return across


total = _across(lambda builder, x, y: builder.fadd(x, y))
widest = _across(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


# ---- without a compiler ----------------------------------------------------------------------------------------------------------


def exact_fma(x: float, y: float, z: float) -> float:
    """x * y + z rounded once, from rational numbers."""
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(z)):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return exact.numerator / exact.denominator if exact else x * y + z  # true division of integers rounds once
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _k(t: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", t))[0]) - _MAGIC_BITS


if numba.config.DISABLE_JIT:

    def _store(a: Any, at: Any, x: float) -> None:
        a[at] = x

    fma, absolute, with_sign = exact_fma, abs, math.copysign
    where_less = lambda a, b, x, y: x if a < b else y  # noqa: E731
    where_equal = lambda a, b, x, y: x if a == b else y  # noqa: E731
    maximum = lambda x, y: x if x > y else y  # noqa: E731
    splat = total = widest = load = lambda x, *at: float(x[at[0]] if at else x)
    store = _store
    pick = lambda table, t: float(table[_k(t) & 63])  # noqa: E731
    power_of_two = lambda t: math.ldexp(1.0, _k(t) >> 6)  # noqa: E731
