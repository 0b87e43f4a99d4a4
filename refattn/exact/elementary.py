"""exp, log and tanh of numbers in two parts, with proven error bounds.

    exp     x = k log 2 / 64 + r, |r| <= log 2 / 128 and a little; e**r by its series, of which terms up to the fourth are kept in two parts; times
            2**((k mod 64) / 64) from a table; times 2**(k div 64)
    tanh    (1 - E) / (1 + E) with E = exp(-2 |x|), which keeps an absolute error
    log     y + log1p(z) with y from the mathematical library, of which nothing is believed, and z = x exp(-y) - 1

`EXP`, `TANH` and `LOG` bound the errors.  tests/test_exact_elementary.py follows every rounding of the evaluation through interval arithmetic over
the whole reduced range, cut into pieces, and finds less; it samples nothing.
"""

from __future__ import annotations

import math
from fractions import Fraction
from math import isqrt
from typing import Any

import numpy as np
from numba import njit

from .double_double import divided, fast_two_sum, inlined, plus_number, times, two_product, two_sum
from .lanes import MAGIC, absolute, fma, pick, power_of_two, where_less, with_sign

#: Relative error of exp, absolute error of tanh, and of log beside the relative error of its argument.
EXP, TANH, LOG = 2.0**-93, 2.0**-91, 2.0**-92
#: Relative error of exp in one float64.
EXP_SINGLE = 2.0**-51
#: exp is asked for arguments from here up to 1; below, weights are dropped and at most e**-700 each.
LEAST = -700.0


def _table() -> tuple[np.ndarray, np.ndarray]:
    """2**(k / 64) in two parts, from integer square roots of numbers with 400 fraction bits."""
    one = 1 << 400
    root = 2 * one
    for _ in range(6):
        root = isqrt(root * one)
    power, high, low = one, [], []
    for _ in range(64):
        exact = Fraction(power, one)
        high.append(float(exact))
        low.append(float(exact - Fraction(high[-1])))
        power = power * root // one
    return np.array(high), np.array(low)


TABLE_HIGH, TABLE_LOW = _table()
PER_UNIT = float.fromhex("0x1.71547652b82fep+6")  # 64 / log 2
#: log 2 / 64 in three parts; products of the first two with whole numbers of up to 17 bits are exact.
STEP_1 = float.fromhex("0x1.62e42fefcp-7")
STEP_2 = float.fromhex("-0x1.c610ca86cp-43")
STEP_3 = float.fromhex("-0x1.c4c67fc0d0951p-82")
THIRD_HIGH, THIRD_LOW = 1 / 6, float(Fraction(1, 6) - Fraction(1 / 6))
FOURTH_HIGH, FOURTH_LOW = 1 / 24, float(Fraction(1, 24) - Fraction(1 / 24))
C5, C6, C7, C8, C9, C10 = (1 / math.factorial(n) for n in range(5, 11))


@inlined
def exp(xh: Any, xl: Any) -> Any:
    """e**(xh + xl) within a relative error of `EXP` (and 2**-1074), for LEAST <= xh <= 1 and |xl| <= u |xh|."""
    t = fma(xh, PER_UNIT, MAGIC)
    k = t - MAGIC
    # r = x - k log 2 / 64: two exact steps, then what is left of the constant together with the low part
    a = fma(0.0 - k, STEP_1, xh)
    rh, e = two_sum(a, 0.0 - k * STEP_2)
    rh, rl = two_sum(rh, e + fma(0.0 - k, STEP_3, xl))
    # z = r**2 and y = r**3 in two parts
    z, ze = two_product(rh, rh)
    y, ye = two_product(z, rh)
    ye = fma(ze, rh, ye)
    # w = r**3 / 6 + r**4 / 24
    m, me = two_product(rh, FOURTH_HIGH)
    g, ge = fast_two_sum(THIRD_HIGH, m)
    ge = ge + (fma(rh, FOURTH_LOW, me) + THIRD_LOW)
    w, we = two_product(y, g)
    we = fma(y, ge, fma(ye, g, we))
    # r**5 and up need one part only
    tail = y * z * fma(rh, fma(rh, fma(rh, fma(rh, fma(rh, C10, C9), C8), C7), C6), C5)
    half = 0.5 * z
    s, e1 = fast_two_sum(rh, half)
    s, e2 = fast_two_sum(s, w)
    low = tail + ((e1 + e2) + (fma(0.5, ze, we) + fma(rl, s, rl)))
    # 2**(k / 64) (1 + s + low)
    th, tl = pick(TABLE_HIGH, t), pick(TABLE_LOW, t)
    p, pe = two_product(th, s)
    h, he = fast_two_sum(th, p)
    h, l = fast_two_sum(h, he + (tl + fma(th, low, fma(tl, s, pe))))
    scale = power_of_two(t)
    return h * scale, l * scale


@inlined
def exp_single(x: Any) -> Any:
    """e**x within a relative error of `EXP_SINGLE` (and 2**-1074), for LEAST <= x <= 1."""
    t = fma(x, PER_UNIT, MAGIC)
    k = t - MAGIC
    r = fma(0.0 - k, STEP_2, fma(0.0 - k, STEP_1, x))
    p = r * fma(r, fma(r, fma(r, fma(r, C5, FOURTH_HIGH), THIRD_HIGH), 0.5), 1.0)
    th = pick(TABLE_HIGH, t)
    return fma(th, p, th) * power_of_two(t)


@inlined
def tanh(xh: Any, xl: Any) -> Any:
    """tanh(xh + xl) within an absolute error of `TANH`, for any finite argument."""
    a = absolute(xh)
    # 1 - tanh is below e**-600 from 300 on
    h = where_less(a, 300.0, a, 300.0)
    l = where_less(a, 300.0, where_less(xh, 0.0, 0.0 - xl, xl), 0.0)
    eh, el = exp(-2.0 * h, -2.0 * l)
    nh, nl = plus_number(0.0 - eh, 0.0 - el, 1.0)
    dh, dl = plus_number(eh, el, 1.0)
    h, l = divided(nh, nl, dh, dl)
    return with_sign(h, xh), where_less(xh, 0.0, 0.0 - l, l)


@njit(cache=True, error_model="numpy")
def log(xh: float, xl: float) -> Any:
    """log(xh + xl) within `LOG` + 2**-104 |log x|, for 1/2 <= x < 2**900; NaN should the library's logarithm be of no use."""
    y = math.log(xh)
    eh, el = exp(0.0 - y, 0.0)
    zh, zl = times(xh, xl, eh, el)
    zh, zl = plus_number(zh, zl, -1.0)
    if not abs(zh) <= 2.0**-40:
        return math.nan, math.nan
    # log1p(z) = z - z**2 / 2 within |z|**3
    return plus_number(zh, zl - 0.5 * zh * zh, y)
