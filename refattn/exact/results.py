"""What is known of each element of a result, in the making and finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..problem import to_layout
from .rounding import decided, distance, nearest, within

#: Numbers high + low, each known up to a bound: three arrays of float64.
Enclosed = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Certified:
    """One output, or one gradient, and what is known about each of its elements.

    Attributes
    ----------
    value : ndarray
        In the dtype asked for.
    bound : ndarray of float64
        The exact number is within this distance of `value`; infinite where nothing is known.
    tier : ndarray of uint8
        What decided it: 0 float64, 1 two float64, 2 Arb, 3 rational numbers.
    rounded : ndarray of bool
        Whether `value` is the exact number correctly rounded (to nearest, ties to even); elsewhere it is only enclosed.
    """

    value: np.ndarray
    bound: np.ndarray
    tier: np.ndarray
    rounded: np.ndarray

    def __repr__(self) -> str:
        counts = ", ".join(f"tier {t}: {int(n)}" for t, n in enumerate(np.bincount(self.tier.ravel(), minlength=4)) if n)
        return f"Certified(shape={self.value.shape}, dtype={self.value.dtype}, rounded={int(self.rounded.sum())} of {self.rounded.size}, {counts})"


@dataclass(frozen=True)
class Draft:
    """A result in the making, one for each output; axes B Hq T and its own last one."""

    dtype: np.dtype
    value: np.ndarray
    bound: np.ndarray
    tier: np.ndarray
    rounded: np.ndarray

    def write(self, at: Any, known: Enclosed, tier: int) -> None:
        """Put what is known of some elements; what an earlier rung has decided stays."""
        value, certain, reach = decided(*known, self.dtype)
        before = self.rounded[at]
        for target, new in ((self.value, value), (self.bound, reach), (self.tier, np.uint8(tier)), (self.rounded, certain)):
            target[at] = np.where(before, target[at], new) if before.any() else new

    def declare(self, at: Any, empty: np.ndarray, rule: str) -> None:
        """Put what rows that see nothing return by definition; a mean of all values is left to rational numbers."""
        if empty.any() and rule != "uniform":
            b, h, place = at
            gone = place[empty]
            self.value[b, h, gone], self.bound[b, h, gone], self.rounded[b, h, gone] = (0.0 if rule == "zero" else np.nan), 0.0, True

    def settle(self, at: tuple[int, ...], low: Fraction, high: Fraction, tier: int) -> bool:
        """Put an element whose exact number lies in an interval, and say whether that decides it."""
        value = within(low, high, self.dtype)
        self.put(at, nearest(low, self.dtype) if value is None else value, low, high, tier, value is not None)
        return value is not None

    def put(self, at: tuple[int, ...], value: np.ndarray, low: Fraction, high: Fraction, tier: int, certain: bool) -> None:
        """Put a value for a number that lies in an interval, if it is certain or nearer than what is there."""
        reach = distance(value, low, high)
        if certain or reach < self.bound[at]:
            self.value[at], self.bound[at], self.tier[at], self.rounded[at] = value, reach, tier, certain


def draft(full: tuple[int, ...], dtype: np.dtype) -> Draft:
    """Nothing known yet."""
    return Draft(dtype, np.zeros(full, dtype), np.full(full, np.inf), np.zeros(full, np.uint8), np.zeros(full, np.bool_))


def unknown_are_nan(drafts: Mapping[str, Draft]) -> None:
    """Values of which nothing is known become NaN."""
    for x in drafts.values():
        x.value[~x.rounded & np.isinf(x.bound)] = np.nan


def released(x: Draft, full: tuple[int, ...], axes: str, layout: str) -> Certified:
    """A finished draft in the caller's layout, given its shape in BHTD."""
    value, bound, tier, rounded = (to_layout(axes, y.reshape(full), layout) for y in (x.value, x.bound, x.tier, x.rounded))
    return Certified(value, bound, tier, rounded)
