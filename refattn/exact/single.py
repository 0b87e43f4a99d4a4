"""Scores, weights and outputs of a few query rows in float64, with bounds: the first rung, for results narrower than float64.

The same three steps as in `refattn.exact.rows`, and the same argument; sums are plain fma chains.  u is 2**-53.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import elementary
from .double_double import TINY, U, inlined
from .elementary import EXP_SINGLE
from .lanes import WIDTH, absolute, fma, load, maximum, splat, store, total, where_equal, where_less, widest, with_sign
from .rows import FOLD, MOST, TILE, compiled

#: Rows taken together, and the score below the largest from which weights are dropped, each at most e**(LEAST + 1).
ROWS, LEAST = 4, -60.0


def sum_error(n: int) -> float:
    """Relative error of the sum of n weights and a sink."""
    return 1.01 * U * (-(-n // WIDTH) + WIDTH + 2)


def mix_error(n: int) -> float:
    """Error of an output of n keys as a multiple of the channel's largest value: sums of FOLD, joined; the sum of weights; the division."""
    return 1.02 * (U * (FOLD + -(-n // FOLD) + 2) + sum_error(n))


@compiled
def scores(q, q_size, keys, key_size, added, scale, cap, fill, high, slack):  # type: ignore[no-untyped-def]
    """Scores of rows, a multiple of `ROWS`, and the bound of each; arguments as in `refattn.exact.rows`.

    A sum of d products errs by 1.01 d u |q| |k|; times scale, over the cap and plus bias, u each.  A capped score errs by four times EXP_SINGLE and
    6 u of the cap more: tanh has a slope of at most 2 in E, and its two sums, the quotient and the product with the cap are rounded.
    """
    d = q.shape[1]
    error = U * (1.01 * d + 4.0)
    base = TINY * d * max(1.0, abs(scale)) + (4.0 * EXP_SINGLE + 6.0 * U) * cap
    _products(q, keys, high)
    for r in range(q.shape[0]):
        size_of_row = abs(scale) * q_size[r]
        for j in range(0, high.shape[1], WIDTH):
            s = load(high, (r, j)) * scale
            if cap > 0.0:
                s = cap * _tanh(s / cap)
            b = load(added, (r, j))
            seen = where_less(absolute(b), np.inf, b, 0.0)
            bound = error * (size_of_row * load(key_size, j) + absolute(seen)) + base
            bound = where_less(bound, np.inf, bound, np.inf)  # NaN where norms are out of range, and it must not be lost in a maximum
            store(slack, (r, j), where_less(absolute(b), np.inf, bound, where_equal(absolute(b), np.inf, 0.0, np.inf)))
            store(high, (r, j), where_less(absolute(b), np.inf, s + seen, where_less(b, 0.0, b, fill)))


@inlined
def _tanh(x: Any) -> Any:
    a = absolute(x)
    e = elementary.exp_single(-2.0 * where_less(a, 300.0, a, 300.0))
    return with_sign((1.0 - e) / (1.0 + e), x)


@compiled
def _products(q, keys, high):  # type: ignore[no-untyped-def]
    d = q.shape[1]
    for t in range(keys.shape[0]):
        a, b = t * TILE, t * TILE + WIDTH
        for r in range(0, q.shape[0], ROWS):
            h0a = h0b = h1a = h1b = h2a = h2b = h3a = h3b = splat(0.0)
            for x in range(d):
                ka, kb = load(keys, (t, x, 0)), load(keys, (t, x, WIDTH))
                h0a, h0b = fma(q[r, x], ka, h0a), fma(q[r, x], kb, h0b)
                h1a, h1b = fma(q[r + 1, x], ka, h1a), fma(q[r + 1, x], kb, h1b)
                h2a, h2b = fma(q[r + 2, x], ka, h2a), fma(q[r + 2, x], kb, h2b)
                h3a, h3b = fma(q[r + 3, x], ka, h3a), fma(q[r + 3, x], kb, h3b)
            store(high, (r, a), h0a)
            store(high, (r, b), h0b)
            store(high, (r + 1, a), h1a)
            store(high, (r + 1, b), h1b)
            store(high, (r + 2, a), h2a)
            store(high, (r + 2, b), h2b)
            store(high, (r + 3, a), h3a)
            store(high, (r + 3, b), h3b)


@compiled
def weights(high, slack, sink, top, sums, eta):  # type: ignore[no-untyped-def]
    """Scores become weights exp(s - top), in place; `eta` is infinite beyond `MOST`, and where a score that counts is NaN."""
    n_keys = high.shape[1]
    for r in range(high.shape[0]):
        most = splat(-np.inf)
        for j in range(0, n_keys, WIDTH):
            most = maximum(load(high, (r, j)), most)
        m = max(sink, widest(most))
        top[r] = m
        if m == -np.inf:
            high[r] = 0.0
            sums[r] = eta[r] = 0.0
            continue
        worst, summed = splat(0.0), splat(0.0)
        for j in range(0, n_keys, WIDTH):
            x, off = load(high, (r, j)) - m, load(slack, (r, j))
            off = where_less(LEAST, x, off + U * absolute(x), where_less(x + off, LEAST + 1.0, 0.0, np.inf))
            worst = maximum(off, worst)
            w = elementary.exp_single(where_less(LEAST, x, x, 0.0))
            w = where_less(LEAST, x, w, 0.0)
            summed = summed + w
            store(high, (r, j), w)
        below = sink - m
        sums[r] = total(summed) + (elementary.exp_single(below) if below > LEAST else 0.0)
        # where a sink counts, its difference to m was rounded
        error = 1.01 * (max(widest(worst), U * -LEAST if sink > -np.inf else 0.0) + EXP_SINGLE) + n_keys * 2.0**-84
        eta[r] = error if error <= MOST else np.inf


@compiled
def log_sums(top, sums, eta, error_of_sum, lse, bound):  # type: ignore[no-untyped-def]
    """lse = m + log l."""
    for r in range(len(top)):
        if top[r] == -np.inf:
            lse[r], bound[r] = -np.inf, 0.0
            continue
        h, _ = elementary.log(sums[r], 0.0)
        lse[r] = top[r] + h
        error = 1.01 * (eta[r] + error_of_sum) + elementary.LOG + 2.0 * U * (abs(h) + abs(top[r]))
        bound[r] = error if abs(lse[r]) < np.inf else np.inf


@compiled
def mixed(w, sums, values, out):  # type: ignore[no-untyped-def]
    """Outputs of rows, a multiple of `ROWS`: sums of w v over l; 0 where l is."""
    n_rows, n_keys = w.shape
    out[:] = 0.0
    for first in range(0, n_keys, FOLD):
        last = min(first + FOLD, n_keys)
        for t in range(values.shape[0]):
            a, b = t * TILE, t * TILE + WIDTH
            for r in range(0, n_rows, ROWS):
                h0a = h0b = h1a = h1b = h2a = h2b = h3a = h3b = splat(0.0)
                for j in range(first, last):
                    va, vb = load(values, (t, j, 0)), load(values, (t, j, WIDTH))
                    h0a, h0b = fma(w[r, j], va, h0a), fma(w[r, j], vb, h0b)
                    h1a, h1b = fma(w[r + 1, j], va, h1a), fma(w[r + 1, j], vb, h1b)
                    h2a, h2b = fma(w[r + 2, j], va, h2a), fma(w[r + 2, j], vb, h2b)
                    h3a, h3b = fma(w[r + 3, j], va, h3a), fma(w[r + 3, j], vb, h3b)
                store(out, (r, a), load(out, (r, a)) + h0a)
                store(out, (r, b), load(out, (r, b)) + h0b)
                store(out, (r + 1, a), load(out, (r + 1, a)) + h1a)
                store(out, (r + 1, b), load(out, (r + 1, b)) + h1b)
                store(out, (r + 2, a), load(out, (r + 2, a)) + h2a)
                store(out, (r + 2, b), load(out, (r + 2, b)) + h2b)
                store(out, (r + 3, a), load(out, (r + 3, a)) + h3a)
                store(out, (r + 3, b), load(out, (r + 3, b)) + h3b)
    for r in range(n_rows):
        if sums[r] > 0.0:
            for c in range(out.shape[1]):
                out[r, c] /= sums[r]
