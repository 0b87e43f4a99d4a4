"""A bound on rounding errors in two versions, and the few ways bounds combine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def spread(count: int, alpha: float) -> float:
    """How many standard deviations `count` independent errors stay within, but for a chance of alpha: sqrt(2 ln(2 N / alpha))."""
    return math.sqrt(2 * math.log(2 * max(count, 2) / alpha))


def gamma(k: Any, u: float) -> Any:
    """Relative error of the worst sum of k rounded terms."""
    return np.where(k * u < 1, k * u / np.maximum(1 - k * u, u), np.inf)


def distance(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """How far an answer is from the exact one: infinitely where it is no number, and not at all where that is none."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(x - exact)
    return np.where(np.isfinite(exact), np.where(np.isnan(off), np.inf, off), 0.0)


@dataclass(frozen=True)
class Bound:
    """Largest error, worst case and statistically.  Arrays or numbers that broadcast."""

    worst: Any
    likely: Any

    @staticmethod
    def roundings(k: Any, u: float, lam: float) -> Bound:
        """k roundings of unit u, relative to what is rounded."""
        return Bound(gamma(k, u), lam * np.sqrt(k) * u)

    def __add__(self, other: Bound) -> Bound:
        """Of the sum of two quantities with independent errors."""
        return Bound(self.worst + other.worst, np.hypot(self.likely, other.likely))

    def __mul__(self, magnitude: Any) -> Bound:
        return Bound(self.worst * magnitude, self.likely * magnitude)

    def linear(self, extra: Any) -> Bound:
        """With an error that has one sign throughout."""
        return Bound(self.worst + extra, self.likely + extra)

    def where(self, condition: np.ndarray) -> Bound:
        """0 wherever the condition does not hold."""
        return Bound(np.where(condition, self.worst, 0.0), np.where(condition, self.likely, 0.0))

    def where_roundings_repeat(self, condition: np.ndarray) -> Bound:
        """Only the worst case, wherever roundings are known not to be independent."""
        return Bound(self.worst, np.where(condition, np.inf, self.likely))

    @property
    def smaller(self) -> np.ndarray:
        return np.fmin(self.worst, self.likely)  # NaN: nothing is known that way
