"""Rounding what is known up to a bound: the result is certain where both ends of the interval round to the same number (Ziv's test)."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from ..precision import round_to


def decided(high: np.ndarray, low: np.ndarray, bound: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round numbers high + low, each known up to `bound`, into `dtype`.

    Parameters
    ----------
    high, low : ndarray of float64
        With |low| at most half a unit of high's last place.
    bound : ndarray of float64
        Infinite or NaN where nothing is known.

    Returns
    -------
    value : ndarray of dtype
        The correctly rounded number where `certain`, elsewhere the rounded high.
    certain : ndarray of bool
    distance : ndarray of float64
        How far the exact number may be from `value`.
    """
    with np.errstate(all="ignore"):
        wider = bound + 2.0**-51 * (np.abs(low) + bound)  # covers its own rounding and that of the next line
        below, above = high + (low - wider), high + (low + wider)
        if dtype != np.float64:  # high + low itself is rounded, so one more step outwards
            below, above = np.nextafter(below, -np.inf), np.nextafter(above, np.inf)
        value, other = round_to(below, dtype), round_to(above, dtype)
        a, b = value.astype(np.float64, copy=False), other.astype(np.float64, copy=False)
        beyond = np.isnan(a) & np.isnan(b) & np.isfinite(bound) & (np.sign(below) == np.sign(above))  # of formats that have no infinity
        certain = (a == b) | beyond
        unsettled = ~certain | (a == 0.0)  # the sign of a zero is that of high
        if unsettled.any():
            value[unsettled] = round_to(high[unsettled], dtype)
        at = value.astype(np.float64, copy=False)
        distance = (np.where(at == high, 0.0, np.abs(at - high)) + np.abs(low) + wider) * (1.0 + 2.0**-50)
        distance[np.isnan(distance)] = np.inf
    return value, certain, distance


def nearest(x: Fraction, dtype: np.dtype) -> np.ndarray:
    """A rational number correctly rounded, as an array of no axes."""
    return round_to(np.array(_float(x, to_odd=dtype != np.float64)), dtype)


def within(low: Fraction, high: Fraction, dtype: np.dtype) -> np.ndarray | None:
    """What every number of an interval rounds to, or None where they differ."""
    one, two = nearest(low, dtype), nearest(high, dtype)
    a, b = float(one), float(two)
    beyond = math.isnan(a) and math.isnan(b) and (low > 0) == (high > 0)  # of formats that have no infinity
    return one if a == b or beyond else None


def distance(value: np.ndarray, low: Fraction, high: Fraction) -> float:
    """How far numbers of an interval may be from a value, rounded up; infinite from one that is not finite."""
    at = float(value)
    if not math.isfinite(at):
        return math.inf
    reach = max(abs(Fraction(at) - low), abs(Fraction(at) - high))
    near = _float(reach, to_odd=False)
    return near if math.isinf(near) or reach <= Fraction(near) else math.nextafter(near, math.inf)


def _float(x: Fraction, to_odd: bool) -> float:
    """The nearest float64, or the one of its two neighbours whose last bit is odd, which can be rounded again."""
    try:
        near = x.numerator / x.denominator  # rounded once
    except OverflowError:
        near = math.inf if x > 0 else -math.inf
    if not to_odd or math.isinf(near) or Fraction(near) == x:
        return near
    towards_zero = near if abs(Fraction(near)) < abs(x) else math.nextafter(near, 0.0)
    return float((np.array(towards_zero).view(np.int64) | 1).view(np.float64)) if towards_zero else math.ldexp(1 if x > 0 else -1, -1074)
