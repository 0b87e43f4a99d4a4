"""The sums over visible keys that the bounds of scored attention need, in one pass per row.

Hidden keys are never read, so that poison there does not reach a tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit


class RowSums(NamedTuple):
    """Per query and channel, arrays of shape (B, Hq, T, E).  d is v - out where errors are shared by numerator and denominator, v elsewhere.

    worst: sum of p worst |d|; likely: sum of (p likely d)^2; common: sum of p common |d|; magnitude: sum of p |v|; square: sum of (p v)^2;
    plain: sum of |v|; low, high: smallest and largest visible v; out: sum of p v.
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


def row_sums(
    weights: np.ndarray, visible: np.ndarray, worst: np.ndarray, likely: np.ndarray, common: np.ndarray, v: np.ndarray, centred: bool
) -> RowSums:
    """Weights and errors of shape (B, Hq, T, S), values (B, Hkv, S, E)."""
    return RowSums(*_row_sums(weights, visible, worst, likely, common, np.ascontiguousarray(v), centred))


@njit(cache=True, error_model="numpy")
def _row_sums(weights, visible, worst, likely, common, v, centred):  # type: ignore[no-untyped-def]
    batch, heads, n_q, n_k = weights.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    shape = (batch, heads, n_q, d_v)
    s_worst, s_likely, s_common = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    magnitude, square, plain, out = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
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
                            magnitude[b, h, i, y] += p * abs(value)
                            square[b, h, i, y] += (p * value) ** 2
                            plain[b, h, i, y] += abs(value)
                            low[b, h, i, y] = min(low[b, h, i, y], value)
                            high[b, h, i, y] = max(high[b, h, i, y], value)
                for j in range(n_k):
                    if visible[b, h, i, j]:
                        p = weights[b, h, i, j]
                        for y in range(d_v):
                            d = abs(v[b, g, j, y] - (out[b, h, i, y] if centred else 0.0))
                            s_worst[b, h, i, y] += p * worst[b, h, i, j] * d
                            s_likely[b, h, i, y] += (p * likely[b, h, i, j] * d) ** 2
                            s_common[b, h, i, y] += p * common[b, h, i, j] * d
    return s_worst, s_likely, s_common, magnitude, square, plain, low, high, out
