"""Elementary functions of one number that LLVM can put side by side in a vector: plain arithmetic, no branches, no calls.

The mathematical library takes one number at a time.  In a loop over scores that costs four to thirty times what these do.

    exp(x)      x = n log 2 + r, the nearest integer n; 2**(r / log 2) by the polynomial of `simd.exp2`; times 2**n in two steps, so that results
                below the smallest normal number are rounded once
    exp2(x)     the same without the first step, which is exact here
    log(x)      x = 2**n m with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(f / (2 + f)), f = m - 1, by the first terms of its series
    log2(x)     the same over log 2
    tanh(x)     as `panels.tanh`

Infinities, NaN, zeros and subnormal numbers are answered as in C.  The largest errors, in units of the last place of the result and rounded up: of
every float32, and of 30 million float64 over all exponents and around special points (tests/test_elementary.py looks at fewer).

                exp     exp2    log     log2    tanh
    float32     1.2     1.0     1.0     1.9     1.5
    float64     1.2     1.0     1.2     2.0     1.5

In Python they are NumPy's; inside jitted code float32 gives float32, any other number float64, and arrays go to NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import intrinsic, overload

from .panels import LOG2_E
from .simd import EXP2, TANH, call_llvm, horner

#: Fraction bits, the integer of the same size, and log 2 in two parts, the first so short that its product with an exponent is exact.
_FORMAT: dict[types.Type, tuple[Any, ...]] = {
    types.float32: (23, np.float32, np.int32, types.int32, float.fromhex("0x1.62ep-1"), float.fromhex("0x1.0bfbe8e7bcd5ep-15")),
    types.float64: (52, np.float64, np.int64, types.int64, float.fromhex("0x1.62e42fefa38p-1"), float.fromhex("0x1.ef35793c7673p-45")),
}
#: Below the first of each, exp and exp2 are 0, above the second infinite.
_EXP_RANGE = {types.float32: (-105.0, 89.0), types.float64: (-746.0, 710.0)}
_EXP2_RANGE = {types.float32: (-151.0, 128.0), types.float64: (-1076.0, 1024.0)}
#: Terms of artanh's series until the next is below a tenth of a unit roundoff at the largest argument, (sqrt(2) - 1) / (sqrt(2) + 1).
_TERMS = {types.float32: 4, types.float64: 9}


# ---- one instruction each ------------------------------------------------------------------------------------------------------


@intrinsic
def _fma(typingctx, x, y, z):  # type: ignore[no-untyped-def]
    """x * y + z, rounded once."""
    return x(x, x, x), lambda context, builder, signature, args: call_llvm(builder, "fma", *args)


@intrinsic
def _absolute(typingctx, x):  # type: ignore[no-untyped-def]
    return x(x), lambda context, builder, signature, args: call_llvm(builder, "fabs", *args)


@intrinsic
def _with_sign(typingctx, x, y):  # type: ignore[no-untyped-def]
    """|x| with the sign of y."""
    return x(x, x), lambda context, builder, signature, args: call_llvm(builder, "copysign", *args)


@intrinsic
def _bits(typingctx, x):  # type: ignore[no-untyped-def]
    """The integer in which a number is stored."""
    whole = _FORMAT[x][3]
    return whole(x), lambda context, builder, signature, args: builder.bitcast(args[0], context.get_value_type(whole))


@intrinsic
def _number(typingctx, n):  # type: ignore[no-untyped-def]
    """The number that is stored as an integer."""
    kind = types.float32 if n.bitwidth == 32 else types.float64
    return kind(n), lambda context, builder, signature, args: builder.bitcast(args[0], context.get_value_type(kind))


def _polynomial(coefficients: tuple[float, ...]) -> Any:
    """Horner's rule, constant term first."""

    @intrinsic
    def polynomial(typingctx, x):  # type: ignore[no-untyped-def]
        return x(x), lambda context, builder, signature, args: horner(builder, coefficients, *args)

    return polynomial


# ---- one formula each, for either format -----------------------------------------------------------------------------------------


def _power(kind: types.Type) -> Callable[..., Any]:
    """y * 2**n, for the integer n that stands in the last bits of `shifted`."""
    bits, number, integer = _FORMAT[kind][:3]
    magic, shift, bias = number(1.5 * 2.0**bits).view(integer), integer(bits), integer(1 - np.finfo(number).minexp)

    @njit(error_model="numpy", forceinline=True)
    def power(y, shifted):  # type: ignore[no-untyped-def]
        n = integer(_bits(shifted) - magic)
        half = integer(n >> integer(1))
        return y * _number(integer(integer(half + bias) << shift)) * _number(integer(integer(n - half + bias) << shift))

    return power


def _exp(kind: types.Type) -> Callable[[Any], Any]:
    bits, number, _, _, high, low = _FORMAT[kind]
    per_unit, magic, minus_high, minus_low = number(LOG2_E), number(1.5 * 2.0**bits), number(-high), number(-low)
    least, most = map(number, _EXP_RANGE[kind])
    two_to, power = _polynomial(EXP2[kind]), _power(kind)

    def exp(x):  # type: ignore[no-untyped-def]
        t = least if x < least else x
        t = most if t > most else t
        shifted = _fma(t, per_unit, magic)
        n = shifted - magic
        y = power(two_to(_fma(n, minus_low, _fma(n, minus_high, t)) * per_unit), shifted)
        return x if x != x else y  # noqa: PLR0124 - NaN

    return exp


def _exp2(kind: types.Type) -> Callable[[Any], Any]:
    bits, number = _FORMAT[kind][:2]
    magic = number(1.5 * 2.0**bits)
    least, most = map(number, _EXP2_RANGE[kind])
    two_to, power = _polynomial(EXP2[kind]), _power(kind)

    def exp2(x):  # type: ignore[no-untyped-def]
        t = least if x < least else x
        t = most if t > most else t
        shifted = t + magic
        y = power(two_to(t - (shifted - magic)), shifted)
        return x if x != x else y  # noqa: PLR0124 - NaN

    return exp2


def _split_log(kind: types.Type) -> Callable[[Any], Any]:
    """n and log m of a positive number 2**n m."""
    bits, number, integer = _FORMAT[kind][:3]
    smallest, lift, lifted_by = np.finfo(number).smallest_normal, number(2.0 ** (bits + 9)), number(bits + 9)
    root, shift = number(math.sqrt(0.5)).view(integer), integer(bits)
    one, two, half, zero = number(1), number(2), number(0.5), number(0)
    series = _polynomial(tuple(2.0 / (2 * n + 3) for n in range(_TERMS[kind])))

    @njit(error_model="numpy", forceinline=True)
    def split_log(x):  # type: ignore[no-untyped-def]
        tiny = x < smallest
        stored = _bits(x * lift if tiny else x)
        n = integer(integer(stored - root) >> shift)
        f = _number(integer(stored - integer(n << shift))) - one
        t = f / (two + f)
        z, square = t * t, half * f * f
        return number(n) - (lifted_by if tiny else zero), f - (square - t * (square + z * series(z)))

    return split_log


def _finished_log(number: Any) -> Callable[[Any, Any], Any]:
    """What a logarithm is where its argument is not a positive finite number."""
    zero, infinite, nan = number(0), number(np.inf), number(np.nan)

    @njit(error_model="numpy", forceinline=True)
    def finished_log(x, y):  # type: ignore[no-untyped-def]
        y = x if x == infinite else y
        y = -infinite if x == zero else y
        return y if x >= zero else nan

    return finished_log


def _log(kind: types.Type) -> Callable[[Any], Any]:
    _, number, _, _, high, low = _FORMAT[kind]
    high, low = number(high), number(low)
    split_log, finished_log = _split_log(kind), _finished_log(number)

    def log(x):  # type: ignore[no-untyped-def]
        n, y = split_log(x)
        return finished_log(x, _fma(n, high, _fma(n, low, y)))

    return log


def _log2(kind: types.Type) -> Callable[[Any], Any]:
    number = _FORMAT[kind][1]
    per_unit = number(LOG2_E)
    split_log, finished_log = _split_log(kind), _finished_log(number)

    def log2(x):  # type: ignore[no-untyped-def]
        n, y = split_log(x)
        return finished_log(x, _fma(y, per_unit, n))

    return log2


def _tanh(kind: types.Type) -> Callable[[Any], Any]:
    number = _FORMAT[kind][1]
    one, two, limit = number(1), number(2), number(0.625)
    exp = njit(error_model="numpy", forceinline=True)(_exp(kind))
    top, bottom = map(_polynomial, TANH[kind])

    def tanh(x):  # type: ignore[no-untyped-def]
        size = _absolute(x)
        z = size * size
        small = _fma(size * z, top(z) / bottom(z), size)
        large = one - two / (exp(size + size) + one)
        return _with_sign(small if size < limit else large, x)

    return tanh


# ---- the functions themselves ----------------------------------------------------------------------------------------------------


def exp(x: Any) -> Any:
    """Exponential."""
    return np.exp(x)


def exp2(x: Any) -> Any:
    """Two to the power of x."""
    return np.exp2(x)


def log(x: Any) -> Any:
    """Natural logarithm."""
    return np.log(x)


def log2(x: Any) -> Any:
    """Logarithm to base two."""
    return np.log2(x)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return np.tanh(x)


def _compile_as(function: Callable[[Any], Any], formula: Callable[[types.Type], Callable[[Any], Any]], otherwise: Any) -> None:
    formulas = {kind: formula(kind) for kind in _FORMAT}

    @overload(function, jit_options={"error_model": "numpy", "forceinline": True})
    def typed(x):  # type: ignore[no-untyped-def]
        if x in formulas:
            return formulas[x]
        if isinstance(x, (types.Float, types.Integer, types.Boolean)):
            return lambda x: function(1.0 * x)
        return lambda x: otherwise(x)  # noqa: PLW0108 - Numba reads its arguments' names


_compile_as(exp, _exp, np.exp)
_compile_as(exp2, _exp2, np.exp2)
_compile_as(log, _log, np.log)
_compile_as(log2, _log2, np.log2)
_compile_as(tanh, _tanh, np.tanh)

#: What may stand in for what: the same functions, called by the names users know.
IN_PLACE_OF = {
    getattr(room, name): function
    for name, function in (("exp", exp), ("exp2", exp2), ("log", log), ("log2", log2), ("tanh", tanh))
    for room in (math, np)
}
