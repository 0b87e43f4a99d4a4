"""Derivatives with respect to scores in two float64, with bounds, from weights and the products d_out . v.

    dP_ij = d_out_i . v_j        D_i = sum_j p_ij dP_ij        g_ij = p_ij (dP_ij - D_i + d_lse_i)        h_ij = g_ij (1 - tanh**2) under a soft-cap

g is what a bias receives, -p_sink (D - d_lse) what a sink does, and h times scale is what products q . k receive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import elementary
from .double_double import TINY, UU, accumulated, divided, plus, plus_number, times, times_number, two_sum
from .elementary import EXP, LEAST
from .results import Enclosed
from .rows import DROPPED, compiled


@compiled
def slopes(  # type: ignore[no-untyped-def]
    p_high, p_low, dp_high, dp_low, dp_error, p_error, added, d_lse, only, g_high, g_low, g_error, shift, shift_error
):
    """g of every visible pair, and its bound; `shift` receives d_lse - D of each row in two parts, `shift_error` its bound.

    `dp_error` bounds each dP, `p_error` is the relative error of a row's weights.  In a row that sees one key and no sink (`only`) p = 1 and dP = D,
    so g is d_lse.
    """
    n_rows, n_keys = p_high.shape
    for r in range(n_rows):
        high = low = size = spread = most = 0.0
        for j in range(n_keys):
            if added[r, j] != -np.inf:
                h, l = times(p_high[r, j], p_low[r, j], dp_high[r, j], dp_low[r, j])
                high, low = accumulated(high, low, h, l)
                size += abs(h)
                spread += p_high[r, j] * dp_error[r, j]
                most = max(most, abs(dp_high[r, j]) + dp_error[r, j])
        high, low = two_sum(high, low)
        own = 1.01 * (p_error[r] + UU * (8.0 + 2.0 * n_keys * (n_keys + 2.0)))
        error = own * size + 1.01 * spread + n_keys * DROPPED * most
        high, low = plus_number(-high, -low, d_lse[r])
        error += 2.1 * UU * (abs(high) + 2.0 * abs(d_lse[r])) + TINY
        shift[r, 0], shift[r, 1], shift_error[r] = high, low, error
        for j in range(n_keys):
            if added[r, j] == -np.inf:
                g_high[r, j] = g_low[r, j] = g_error[r, j] = 0.0
            elif only[r]:
                g_high[r, j], g_low[r, j], g_error[r, j] = d_lse[r], 0.0, 0.0
            else:
                h, l = plus(dp_high[r, j], dp_low[r, j], high, low)
                off = error + dp_error[r, j] + 4.1 * UU * (abs(dp_high[r, j]) + abs(high))
                x, y = times(p_high[r, j], p_low[r, j], h, l)
                g_high[r, j], g_low[r, j] = x, y
                g_error[r, j] = 1.01 * (p_high[r, j] * off + (p_error[r] + 7.0 * UU) * abs(x)) + DROPPED * (abs(h) + off) + TINY


@compiled
def sink_slopes(sink, top, sum_high, sum_low, p_error, shift, shift_error, out):  # type: ignore[no-untyped-def]
    """What a sink receives of each row: its share times `shift`; (row, 3): two parts and a bound."""
    for r in range(len(top)):
        x, y, error = 0.0, 0.0, DROPPED * (abs(shift[r, 0]) + shift_error[r])
        if sink - top[r] > LEAST:
            h, l = two_sum(sink, -top[r])
            h, l = elementary.exp(h, l)
            h, l = divided(h, l, sum_high[r], sum_low[r])
            x, y = times(h, l, shift[r, 0], shift[r, 1])
            error += 1.01 * (h * shift_error[r] + (p_error[r] + 1.01 * EXP + 7.0 * UU) * abs(x)) + TINY
        out[r, 0], out[r, 1], out[r, 2] = x, y, error


@compiled
def capped_slopes(s_high, s_low, slack, added, scale, cap, high, low, error):  # type: ignore[no-untyped-def]
    """g becomes h, in place, given products q . k: times 1 - tanh(scale q . k / cap)**2, whose error is twice that of the tanh and 12 u**2."""
    for r in range(high.shape[0]):
        for j in range(high.shape[1]):
            if abs(added[r, j]) < np.inf:
                h, l = times_number(s_high[r, j], s_low[r, j], scale)
                h, l = divided(h, l, cap, 0.0)
                h, l = elementary.tanh(h, l)
                h, l = times(h, l, h, l)
                h, l = plus_number(-h, -l, 1.0)
                off = 2.1 * (slack[r, j] / cap + elementary.TANH) + 12.0 * UU
                g = abs(high[r, j]) + error[r, j]
                high[r, j], low[r, j] = times(high[r, j], low[r, j], h, l)
                error[r, j] = 1.01 * error[r, j] + g * (off + 7.0 * UU) + TINY


@compiled
def without_fixed(added, high, low, error):  # type: ignore[no-untyped-def]
    """Scores that are a fixed number hand nothing on."""
    for r in range(high.shape[0]):
        for j in range(high.shape[1]):
            if added[r, j] == np.inf:
                high[r, j] = low[r, j] = error[r, j] = 0.0


class Total:
    """A sum of arrays in two float64 with a bound, added to term by term.

    The bound grows by that of the term and by what rounding adds: `low` collects two roundings a term, each of at most u times what it holds.
    """

    def __init__(self, full: tuple[int, ...]) -> None:
        self.high, self.low, self.bound, self.held = (np.zeros(full) for _ in range(4))

    def add(self, at: Any, high: np.ndarray, low: np.ndarray, bound: np.ndarray) -> None:
        s, e = two_sum_arrays(self.high[at], high)
        self.held[at] = (self.held[at] + np.abs(e) + np.abs(low)) * (1.0 + 2.0**-50)
        self.bound[at] = (self.bound[at] + bound + 2.1 * 2.0**-53 * self.held[at]) * (1.0 + 2.0**-50)
        self.high[at], self.low[at] = s, self.low[at] + (e + low)

    def result(self) -> Enclosed:
        return (*two_sum_arrays(self.high, self.low), self.bound)


def two_sum_arrays(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)
