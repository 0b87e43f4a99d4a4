"""Arrays of numbers in two float64, each with a bound of its own: what is computed once per token, and what a state's reading becomes.

An `Enclosed` (h, l, r) says that the exact number is within r of h + l; r is infinite where nothing is known.  Bounds are computed in float64 and
multiplied by `UP` at the end, which covers their own rounding; `TINY` covers what underflows; an h that is not finite has no finite bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from . import elementary
from .double_double import TINY, UU, accumulated, divided, plus, times, two_sum
from .elementary import EXP, LEAST
from .results import Enclosed

#: Covers the rounding of a bound made of fewer than a hundred additions and products of positive numbers.
UP = 1.0 + 2.0**-45
#: Larger than e**(LEAST + 1).
NOTHING = 2.0**-1000

compiled = njit(cache=True, error_model="numpy", nogil=True)


def exactly(x: np.ndarray) -> Enclosed:
    """Numbers that are known."""
    return x, np.zeros(x.shape), np.where(np.isfinite(x), 0.0, np.inf)


def product(x: Enclosed, y: Enclosed) -> Enclosed:
    return _by(_products, x, y)


def total(x: Enclosed, y: Enclosed) -> Enclosed:
    return _by(_totals, x, y)


def quotient(x: Enclosed, y: Enclosed) -> Enclosed:
    """x / y; 0 where y is known to be 0, or infinite."""
    return _by(_quotients, x, y)


def larger(x: Enclosed, y: Enclosed) -> Enclosed:
    """The larger of two: it moves by no more than either."""
    first = (x[0] > y[0]) | ((x[0] == y[0]) & (x[1] > y[1])) | np.isnan(x[0])
    return np.where(first, x[0], y[0]), np.where(first, x[1], y[1]), np.fmax(x[2], y[2])


def size(x: Enclosed) -> Enclosed:
    sign = np.where(x[0] < 0.0, -1.0, 1.0)
    return sign * x[0], sign * x[1], x[2]


def exponential(x: Enclosed) -> Enclosed:
    """e**x, of which nothing is known above 1; 0 at -inf, whatever the bound."""
    flat = [np.ascontiguousarray(part).reshape(-1) for part in x]
    found = tuple(np.empty(flat[0].size) for _ in range(3))
    _exponentials(*flat, *found)
    h, l, r = (part.reshape(x[0].shape) for part in found)
    return h, l, r


def summed(x: Enclosed) -> Enclosed:
    """Sums along the last axis."""
    rows = [np.ascontiguousarray(part).reshape(-1, part.shape[-1]) for part in x]
    found = tuple(np.empty(len(rows[0])) for _ in range(3))
    _sums(*rows, *found)
    h, l, r = (part.reshape(x[0].shape[:-1]) for part in found)
    return h, l, r


def _by(kernel: Any, x: Enclosed, y: Enclosed) -> Enclosed:
    full = np.broadcast_shapes(x[0].shape, y[0].shape)
    flat = [np.ascontiguousarray(np.broadcast_to(part, full)).reshape(-1) for part in (*x, *y)]
    found = tuple(np.empty(flat[0].size) for _ in range(3))
    kernel(*flat, *found)
    h, l, r = (part.reshape(full) for part in found)
    return h, l, r


@compiled
def bounded(h, r):  # type: ignore[no-untyped-def]
    """A bound with its own rounding covered; infinite where it is NaN, and beside a number that is not finite."""
    found = r * UP
    return found if found >= 0.0 and abs(h) < np.inf else np.inf


@compiled
def _products(ah, al, ar, bh, bl, br, h, l, r):  # type: ignore[no-untyped-def]
    for n in range(h.size):
        h[n], l[n] = times(ah[n], al[n], bh[n], bl[n])
        a, b = abs(ah[n]), abs(bh[n])
        error = a * br[n] + ar[n] * (b + br[n]) + 7.1 * UU * a * b
        if a + ar[n] > 0.0 and b + br[n] > 0.0:
            error += TINY  # what underflows, in the bound too
            if al[n] == 0.0 and bl[n] == 0.0 and ar[n] == 0.0 and br[n] == 0.0 and a * b > 2.0**-900:
                error = 0.0  # of two float64 it is exact
        r[n] = bounded(h[n], error)


@compiled
def _totals(ah, al, ar, bh, bl, br, h, l, r):  # type: ignore[no-untyped-def]
    for n in range(h.size):
        h[n], l[n] = plus(ah[n], al[n], bh[n], bl[n])
        error = ar[n] + br[n]
        if (ah[n] != 0.0 and bh[n] != 0.0) and (al[n] != 0.0 or bl[n] != 0.0):  # otherwise the sum is exact
            error += 4.2 * UU * (abs(ah[n]) + abs(bh[n])) + TINY
        r[n] = bounded(h[n], error)


@compiled
def _quotients(ah, al, ar, bh, bl, br, h, l, r):  # type: ignore[no-untyped-def]
    for n in range(h.size):
        if (bh[n] == 0.0 and bl[n] == 0.0 and br[n] == 0.0) or bh[n] == np.inf:
            known = abs(ah[n]) < np.inf and ar[n] < np.inf
            h[n], l[n], r[n] = 0.0, 0.0, 0.0 if known else np.inf
            continue
        h[n], l[n] = divided(ah[n], al[n], bh[n], bl[n])
        least = (abs(bh[n]) - br[n]) * (1.0 - 2.0**-45)
        if not (least > 2.0**-900 and abs(bh[n]) < 2.0**900):  # r of `divided` might lose what underflows
            r[n] = np.inf
        elif ah[n] == 0.0 and ar[n] == 0.0:
            r[n] = 0.0
        else:
            r[n] = bounded(h[n], (ar[n] + abs(h[n]) * br[n] * (1.0 + 2.0**-50)) / least + 12.1 * UU * abs(h[n]) + TINY / least + TINY)


@compiled
def _exponentials(xh, xl, xr, h, l, r):  # type: ignore[no-untyped-def]
    for n in range(h.size):
        if xh[n] == -np.inf or xh[n] < LEAST:
            h[n], l[n] = 0.0, 0.0
            r[n] = 0.0 if xh[n] == -np.inf else (NOTHING if xr[n] < 1.0 else np.inf)
        elif xh[n] <= 1.0:
            h[n], l[n] = elementary.exp(xh[n], xl[n])
            exact = xh[n] == 0.0 and xl[n] == 0.0
            # e**(x + d) - e**x is at most 1.01 |d| e**x for |d| below 2**-20
            error = (1.01 * xr[n] + (0.0 if exact else 1.01 * EXP)) * h[n] + (0.0 if exact else TINY)
            r[n] = bounded(h[n], error) if xr[n] < 2.0**-20 else np.inf
        else:
            h[n], l[n], r[n] = np.nan, 0.0, np.inf


@compiled
def _sums(xh, xl, xr, h, l, r):  # type: ignore[no-untyped-def]
    n_terms = xh.shape[1]
    for n in range(h.size):
        a = b = size = error = 0.0
        for x in range(n_terms):
            a, b = accumulated(a, b, xh[n, x], xl[n, x])
            size += abs(xh[n, x])
            error += xr[n, x]
        h[n], l[n] = two_sum(a, b)
        r[n] = bounded(h[n], error * (1.0 + n_terms * 2.0**-50) + 2.1 * n_terms * (n_terms + 2) * UU * size)
