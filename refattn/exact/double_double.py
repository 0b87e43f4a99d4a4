"""Numbers as unevaluated sums of two float64: about 106 bits, for a number or a vector of them.

u is 2**-53.  A pair (h, l) stands for h + l exactly.  Every function says how far its pair may be from the exact result of its arguments; the bounds
hold while nothing overflows, and where a result underflows up to ``TINY`` more, which no caller of this room notices beside its own bounds.

    two_sum(a, b), fast_two_sum(a, b)   a + b exactly (Knuth; Dekker, who needs |a| >= |b| or a == 0)
    two_product(a, b)                   a * b exactly, but for underflow
    grid_step                           one term of a sum of products, see there
"""

from __future__ import annotations

from typing import Any

from numba import njit

from .lanes import fma

#: Unit roundoff, its square, and what underflow may add to an error.
U, UU, TINY = 2.0**-53, 2.0**-106, 2.0**-1060

#: A function that LLVM puts in the place of its call.
inlined = njit(cache=True, error_model="numpy", forceinline=True)


@inlined
def two_sum(a: Any, b: Any) -> Any:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@inlined
def fast_two_sum(a: Any, b: Any) -> Any:
    s = a + b
    return s, b - (s - a)


@inlined
def two_product(a: Any, b: Any) -> Any:
    p = a * b
    return p, fma(a, b, 0.0 - p)


@inlined
def grid_step(high: Any, low: Any, a: Any, b: Any) -> Any:
    """Add a * b to a sum kept on a grid, in four operations where the usual compensated product takes ten.

    `high` starts at C = 1.5 * 2**k and the sum is ``(high - C) + low``.  While the sums of |a * b| stay below 2**(k-2), `high` stays between 2**k and
    2**(k+1), where neighbours are 2**(k-52) apart.  So t is on that grid, ``high - t`` is exact, and what is left of the product,
    ``a * b - (t - high)``, is at most 2**(k-53) and is rounded with an error of at most 2**(k-106) (or 2**-1075).  After m terms |low| is at most
    m * 2**(k-53) (1 + m u), and adding to it errs by at most u times that.  Of n terms, from low = 0:

        error <= 2**(k-106) * n (n + 3) / 2 * 1.001 + n 2**-1074       (`grid_error`; n below 2**40)
    """
    t = fma(a, b, high)
    return t, low + fma(a, b, high - t)


@inlined
def grid_fold(high: Any, low: Any) -> Any:
    """Move what `low` has of the grid into `high`, exactly, after which |low| <= 2**(k-53)."""
    t = high + low
    return t, low + (high - t)


def grid_error(n: int) -> float:
    """Error of a sum of n products on a grid, as a multiple of 2**k."""
    return 1.001 * n * (n + 3) / 2 * UU


@inlined
def times_number(h: Any, l: Any, x: Any) -> Any:
    """(h + l) * x within 3 u**2 |h x|: the low product is at most 2 u |h x| and is rounded once, in the fma."""
    p, e = two_product(h, x)
    return fast_two_sum(p, fma(l, x, e))


@inlined
def plus_number(h: Any, l: Any, x: Any) -> Any:
    """h + l + x within 2.01 u**2 (|h| + |x|): the two low parts are added with one rounding."""
    s, e = two_sum(h, x)
    return two_sum(s, e + l)


@inlined
def plus(h: Any, l: Any, x: Any, y: Any) -> Any:
    """(h + l) + (x + y) within 4.1 u**2 (|h| + |x|): low parts of at most u (|h| + |x|) each, added with two roundings."""
    s, e = two_sum(h, x)
    return two_sum(s, e + (l + y))


@inlined
def times(h: Any, l: Any, x: Any, y: Any) -> Any:
    """(h + l) (x + y) within 7 u**2 |h x|.

    Left out: l y, at most u**2 |h x|.  Roundings: l x and then h y joined with the product's own error, of sizes up to 1, 2 and 3 u |h x|.
    """
    p, e = two_product(h, x)
    return fast_two_sum(p, fma(h, y, fma(l, x, e)))


@inlined
def divided(h: Any, l: Any, x: Any, y: Any) -> Any:
    """(h + l) / (x + y) within 12 u**2 |h / x|.

    q = h / x rounded; h - q x = r is a float64; so the quotient is exactly q + (r + l - q y) / (x + y).  The parenthesis is at most 3.1 u |h| and is
    computed with errors of 2 and 3 u**2 |h|; dividing it by x instead of x + y, and rounding that, costs 3.1 u**2 |h / x| each.
    """
    q = h / x
    r = fma(0.0 - q, x, h) + fma(0.0 - q, y, l)
    return two_sum(q, r / x)


@inlined
def accumulated(high: Any, low: Any, x: Any, y: Any) -> Any:
    """(high + low) + (x + y) where `low` collects what rounding `high` leaves: after n such additions from zero the error is at most
    2 n (n + 2) u**2 times the sum of |x|.

    The leftovers and the y are at most u times the sums so far; each of the 2 n additions to `low` errs by u times the sum of those.
    """
    s, e = two_sum(high, x)
    return s, low + (e + y)
