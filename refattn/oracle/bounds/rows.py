"""The sums over visible keys that the bounds of scored attention need, row by row.

Hidden keys are never read, so that poison there does not reach a tolerance.  Keys of equal weight are most often one key repeated, whose
roundings are the same each time and add up: a sum of squares has their sum's square besides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit


class RowSums(NamedTuple):
    """Per query and channel, arrays of shape (B, Hq, T, E).  d is v - out where errors are shared by numerator and denominator, v elsewhere.

    worst: sum of worst |d|; likely: sum of (likely d)^2; common: sum of common |d|; magnitude: sum of p |v|; square: sum of (p v)^2;
    plain: sum of |v|; low, high: smallest and largest visible v; out: sum of p v; peak: the largest |sum of p v| over the first keys, however
    many.
    """

    worst: np.ndarray
    likely: np.ndarray
    common: np.ndarray
    magnitude: np.ndarray
    square: np.ndarray
    plain: np.ndarray
    low: np.ndarray
    high: np.ndarray
    out: np.ndarray
    peak: np.ndarray

    @property
    def partial(self) -> np.ndarray:
        """How large the sums may be that are rounded on the way to `out`, but for unlikely orders."""
        return np.maximum(np.maximum(np.abs(self.out), self.peak), np.sqrt(self.square))


def row_sums(
    weights: np.ndarray, visible: np.ndarray, worst: np.ndarray, likely: np.ndarray, common: np.ndarray, v: np.ndarray, centred: bool
) -> RowSums:
    """Weights, of either sign, and their absolute errors of shape (B, Hq, T, S), values (B, Hkv, S, E)."""
    return RowSums(*_row_sums(weights, visible, worst, likely, common, np.ascontiguousarray(v), centred))


@njit(cache=True, error_model="numpy")
def _row_sums(weights, visible, worst, likely, common, v, centred):  # type: ignore[no-untyped-def]
    batch, heads, n_q, n_k = weights.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    shape = (batch, heads, n_q, d_v)
    s_worst, s_likely, s_common = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    magnitude, square, plain = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    out, peak = np.zeros(shape), np.zeros(shape)
    low, high = np.full(shape, np.inf), np.full(shape, -np.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                for j in range(n_k):
                    if visible[b, h, i, j]:
                        p = weights[b, h, i, j]
                        for y in range(d_v):
                            value = v[b, g, j, y]
                            out[b, h, i, y] += p * value
                            peak[b, h, i, y] = max(peak[b, h, i, y], abs(out[b, h, i, y]))
                            magnitude[b, h, i, y] += abs(p * value)
                            square[b, h, i, y] += (p * value) ** 2
                            plain[b, h, i, y] += abs(value)
                            low[b, h, i, y] = min(low[b, h, i, y], value)
                            high[b, h, i, y] = max(high[b, h, i, y], value)
                for j in range(n_k):
                    if visible[b, h, i, j]:
                        for y in range(d_v):
                            d = abs(v[b, g, j, y] - (out[b, h, i, y] if centred else 0.0))
                            s_worst[b, h, i, y] += worst[b, h, i, j] * d
                            s_likely[b, h, i, y] += (likely[b, h, i, j] * d) ** 2
                            s_common[b, h, i, y] += common[b, h, i, j] * d
                order = np.argsort(weights[b, h, i])
                start = 0
                while start < n_k:
                    end = start + 1
                    while end < n_k and weights[b, h, i, order[end]] == weights[b, h, i, order[start]]:
                        end += 1
                    if end > start + 1 and weights[b, h, i, order[start]] != 0.0:
                        for y in range(d_v):
                            together, alike = 0.0, 0.0
                            for n in range(start, end):
                                j = order[n]
                                if visible[b, h, i, j]:
                                    value = v[b, g, j, y]
                                    together += likely[b, h, i, j] * (value - (out[b, h, i, y] if centred else 0.0))
                                    alike += weights[b, h, i, j] * value
                            s_likely[b, h, i, y] += together**2
                            square[b, h, i, y] += alike**2
                    start = end
    return s_worst, s_likely, s_common, magnitude, square, plain, low, high, out, peak
