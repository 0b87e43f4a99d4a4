"""Scores, weights and outputs of a few query rows in two float64 each, with bounds: the middle rung of the ladder.

    scores      s = cap tanh(scale q . k / cap) + bias, and how far each may be from its exact value
    weights     exp(s - m) and their sum l, for a float64 m near the largest score of the row
    mixed       sum_j w_j v_j / l

Queries are taken in pairs, keys and channels in tiles of two vectors, so that sums of products stay in registers; keys lie as (tile, width, TILE),
values as (channel tile, key, TILE).  Sums of products run on a grid (`double_double.grid_step`) whose size is known before: for scores four
times the product of the norms of query and key, for outputs four times l times the channel's largest value, each rounded up to a power of two.

Errors of scores and of exp are shared by numerator and denominator.  With weights w_j (1 + e_j) in both, the output moves by exactly

    sum_j p_j e_j (v_j - o) / (1 + sum_j p_j e_j)

so that |e_j| <= eta moves it by at most 2.01 eta max|v|.  What is not shared (the sums of products, of l, the division) is at most a few
multiples of max|v| too, so an output's bound is a number of its row times a number of its channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from . import elementary
from .double_double import TINY, UU, accumulated, divided, grid_error, grid_fold, grid_step, inlined, plus, plus_number, times_number, two_sum
from .elementary import EXP, LEAST, TANH
from .lanes import WIDTH, absolute, fma, load, maximum, splat, store, where_equal, where_less, widest

TILE = 2 * WIDTH
#: Keys after which sums of outputs are folded.
FOLD = 64
#: Larger than the exact value of any weight that is dropped: e**-699, over a sum that is 1 at least.
DROPPED = 2.0**-1000
#: Beyond it low parts of scores, up to half a unit of the last place, might matter beside `LEAST`: such rows are left to the next rung.
FARTHEST = 2.0**40
#: Largest relative error of weights that the bounds below are derived for; beyond it a row is left to the next rung.
MOST = 2.0**-20

compiled = njit(cache=True, error_model="numpy", nogil=True)


# ---- bounds --------------------------------------------------------------------------------------------------------------------


def score_error(d: int) -> float:
    """Error of a score as a multiple of |scale| |q| |k| + |bias|, both norms rounded up to a power of two.

    The sum of products, on a grid of four times the norms; times scale, 3 u**2; over the cap, 12 u**2; plus bias, 2.01 u**2.
    """
    return 4.0 * grid_error(d) + 18.0 * UU


#: What a soft-cap adds, as a multiple of it: tanh, and times the cap.
CAP_ERROR = TANH + 3.0 * UU


def sum_error(n: int) -> float:
    """Relative error of the sum of n weights and a sink: WIDTH sums of n / WIDTH, then those joined."""
    per_lane = -(-n // WIDTH)
    return UU * (2.0 * per_lane * (per_lane + 2) + 4.1 * (WIDTH + 2))


def combine_error(n: int) -> float:
    """Error of a sum of n products w v as a multiple of both sizes.

    From one fold to the next `low` is at most (m + 1.25) 2**(k-53) after m keys; each key adds to it twice and rounds a product, in all
    (FOLD**2 + 5 FOLD) 2**(k-106); and 2**k is four times the sizes.
    """
    return 4.04 * (FOLD * FOLD + 5 * FOLD) * -(-n // FOLD) * UU


def mix_error(n: int) -> float:
    """Error of an output of n keys as a multiple of the channel's size, given exact weights.

    The sum of products, whose size is at most twice l; the error of l; 12 u**2 of the division.
    """
    return 2.02 * combine_error(n) + 1.02 * sum_error(n) + 13.0 * UU


# ---- scores --------------------------------------------------------------------------------------------------------------------


@compiled
def scores(q, q_size, keys, key_size, added, scale, cap, fill, error, high, low, slack):  # type: ignore[no-untyped-def]
    """Scores of an even number of rows.

    `added` is the bias; -inf where a key is hidden and +inf where its score is `fill`.  `error` is `score_error`; `slack` receives the bound of
    each score.  A hidden one is -inf.
    """
    products(q, q_size, keys, key_size, high, low)
    d = q.shape[1]
    base = TINY * d * max(1.0, abs(scale)) + CAP_ERROR * cap
    for r in range(q.shape[0]):
        size_of_row = abs(scale) * q_size[r]
        for j in range(0, high.shape[1], WIDTH):
            h, l = times_number(load(high, (r, j)), load(low, (r, j)), scale)
            if cap > 0.0:
                h, l = divided(h, l, cap, 0.0)
                h, l = elementary.tanh(h, l)
                h, l = times_number(h, l, cap)
            b = load(added, (r, j))
            seen = where_less(absolute(b), np.inf, b, 0.0)
            h, l = plus_number(h, l, seen)
            bound = error * (size_of_row * load(key_size, j) + absolute(seen)) + base
            bound = where_less(bound, np.inf, bound, np.inf)  # NaN where norms are out of range, and it must not be lost in a maximum
            store(slack, (r, j), where_less(absolute(b), np.inf, bound, where_equal(absolute(b), np.inf, 0.0, np.inf)))
            store(high, (r, j), where_less(absolute(b), np.inf, h, where_less(b, 0.0, b, fill)))
            store(low, (r, j), where_less(absolute(b), np.inf, l, 0.0))


@inlined
def _off_grid(high: Any, low: Any, start: Any) -> Any:
    return two_sum(high - start, low)


@compiled
def products(q, q_size, keys, key_size, high, low):  # type: ignore[no-untyped-def]
    """Inner products q . k of all pairs."""
    n_rows, d = q.shape
    for t in range(keys.shape[0]):
        j = t * TILE
        size_a, size_b = load(key_size, j), load(key_size, j + WIDTH)
        for r in range(0, n_rows, 2):
            start_0, start_1 = 6.0 * q_size[r], 6.0 * q_size[r + 1]
            c0a, c0b, c1a, c1b = start_0 * size_a, start_0 * size_b, start_1 * size_a, start_1 * size_b
            h0a, h0b, h1a, h1b = c0a, c0b, c1a, c1b
            l0a = l0b = l1a = l1b = splat(0.0)
            for x in range(d):
                ka, kb = load(keys, (t, x, 0)), load(keys, (t, x, WIDTH))
                q0, q1 = q[r, x], q[r + 1, x]
                h0a, l0a = grid_step(h0a, l0a, q0, ka)
                h0b, l0b = grid_step(h0b, l0b, q0, kb)
                h1a, l1a = grid_step(h1a, l1a, q1, ka)
                h1b, l1b = grid_step(h1b, l1b, q1, kb)
            h0a, l0a = _off_grid(h0a, l0a, c0a)
            h0b, l0b = _off_grid(h0b, l0b, c0b)
            h1a, l1a = _off_grid(h1a, l1a, c1a)
            h1b, l1b = _off_grid(h1b, l1b, c1b)
            store(high, (r, j), h0a)
            store(high, (r, j + WIDTH), h0b)
            store(high, (r + 1, j), h1a)
            store(high, (r + 1, j + WIDTH), h1b)
            store(low, (r, j), l0a)
            store(low, (r, j + WIDTH), l0b)
            store(low, (r + 1, j), l1a)
            store(low, (r + 1, j + WIDTH), l1b)


# ---- weights -------------------------------------------------------------------------------------------------------------------


@compiled
def weights(high, low, slack, sink, top, sum_high, sum_low, eta):  # type: ignore[no-untyped-def]
    """Scores become weights exp(s - top), in place.

    `top` receives m (-inf in a row that sees nothing), `sum_high` and `sum_low` receive l, and `eta` the relative error of weights of which some
    are dropped: infinite where it exceeds `MOST`, as where a score that counts is NaN.
    """
    lane = np.empty((2, WIDTH))
    n_keys = high.shape[1]
    for r in range(high.shape[0]):
        most = splat(-np.inf)
        for j in range(0, n_keys, WIDTH):
            most = maximum(load(high, (r, j)), most)
        m = max(sink, widest(most))
        top[r] = m
        if m == -np.inf:
            high[r], low[r] = 0.0, 0.0
            sum_high[r] = sum_low[r] = eta[r] = 0.0
            continue
        worst, lh, ll = splat(0.0), splat(0.0), splat(0.0)
        for j in range(0, n_keys, WIDTH):
            h, l, off = load(high, (r, j)), load(low, (r, j)), load(slack, (r, j))
            x = h - m
            # a weight that is dropped must be below e**-699
            worst = maximum(where_less(LEAST, x, off, where_less(x + off, LEAST + 1.0, 0.0, np.inf)), worst)
            xh, xl = plus_number(where_less(LEAST, x, h, m), where_less(LEAST, x, l, 0.0), 0.0 - m)
            wh, wl = elementary.exp(xh, xl)
            wh, wl = where_less(LEAST, x, wh, 0.0), where_less(LEAST, x, wl, 0.0)
            lh, ll = accumulated(lh, ll, wh, wl)
            store(high, (r, j), wh)
            store(low, (r, j), wl)
        lh, ll = two_sum(lh, ll)
        store(lane, (0, 0), lh)
        store(lane, (1, 0), ll)
        h = l = 0.0
        if sink - m > LEAST:
            xh, xl = two_sum(sink, -m)
            h, l = elementary.exp(xh, xl)
        for n in range(WIDTH):
            h, l = plus(h, l, lane[0, n], lane[1, n])
        sum_high[r], sum_low[r] = h, l
        # s - m: 2.01 u**2 (|s| + |m|), where |s| <= |m| + 701
        error = 1.01 * (widest(worst) + 4.0 * UU * (abs(m) + 400.0) + EXP) + n_keys * DROPPED
        eta[r] = error if error <= MOST and abs(m) < FARTHEST else np.inf


@compiled
def log_sums(top, sum_high, sum_low, eta, error_of_sum, high, low, bound):  # type: ignore[no-untyped-def]
    """lse = m + log l."""
    for r in range(len(top)):
        m = top[r]
        if m == -np.inf:
            high[r], low[r], bound[r] = -np.inf, 0.0, 0.0
            continue
        h, l = elementary.log(sum_high[r], sum_low[r])
        size = abs(h)
        h, l = plus_number(h, l, m)
        error = 1.01 * (eta[r] + error_of_sum) + elementary.LOG + 7.0 * UU * (size + abs(m))  # 4 u**2 of log, 2.01 u**2 of the sum
        high[r], low[r], bound[r] = h, l, error if abs(h) < np.inf else np.inf


# ---- outputs -------------------------------------------------------------------------------------------------------------------


@compiled
def mixed(w_high, w_low, sum_high, sum_low, values, value_size, high, low):  # type: ignore[no-untyped-def]
    """Outputs of an even number of rows: sums of w v over l; 0 where l is."""
    size = np.empty(len(sum_high))
    for r in range(len(size)):
        size[r] = _power_above(sum_high[r])
    combined(w_high, w_low, size, values, value_size, high, low)
    for r in range(len(size)):
        if sum_high[r] > 0.0:
            for c in range(0, high.shape[1], WIDTH):
                h, l = divided(load(high, (r, c)), load(low, (r, c)), sum_high[r], sum_low[r])
                store(high, (r, c), h)
                store(low, (r, c), l)


@compiled
def combined(w_high, w_low, size, values, value_size, high, low):  # type: ignore[no-untyped-def]
    """Sums of w v for an even number of rows, where `size` is a power of two above each row's sum of |w| (`combine_error`)."""
    n_rows, n_keys = w_high.shape
    for r in range(n_rows):
        for c in range(0, high.shape[1], WIDTH):
            store(high, (r, c), (6.0 * size[r]) * load(value_size, c))
            store(low, (r, c), splat(0.0))
    for first in range(0, n_keys, FOLD):
        last = min(first + FOLD, n_keys)
        for t in range(values.shape[0]):
            for r in range(0, n_rows, 2):
                _add_keys(w_high, w_low, values, first, last, t, r, high, low)
    for r in range(n_rows):
        for c in range(0, high.shape[1], WIDTH):
            h, l = _off_grid(load(high, (r, c)), load(low, (r, c)), (6.0 * size[r]) * load(value_size, c))
            store(high, (r, c), h)
            store(low, (r, c), l)


@compiled
def shares(w_high, w_low, sum_high, sum_low):  # type: ignore[no-untyped-def]
    """w / l within 12 u**2 of itself; 0 where l is."""
    high, low = np.zeros(w_high.shape), np.zeros(w_high.shape)
    for r in range(w_high.shape[0]):
        for j in range(w_high.shape[1]):
            if w_high[r, j] > 0.0:
                high[r, j], low[r, j] = divided(w_high[r, j], w_low[r, j], sum_high[r], sum_low[r])
    return high, low


@compiled
def multiplied(high, low, x):  # type: ignore[no-untyped-def]
    """Every number of an array times x, within 3 u**2 of itself."""
    h, l = np.empty(high.shape), np.empty(high.shape)
    for r in range(high.shape[0]):
        for c in range(high.shape[1]):
            h[r, c], l[r, c] = times_number(high[r, c], low[r, c], x)
    return h, l


@inlined
def _two_steps(h: Any, l: Any, wh: Any, wl: Any, v: Any) -> Any:
    h, l = grid_step(h, l, wh, v)
    return h, fma(wl, v, l)


@compiled
def _add_keys(w_high, w_low, values, first, last, t, r, high, low):  # type: ignore[no-untyped-def]
    a, b = t * TILE, t * TILE + WIDTH
    h0a, h0b, h1a, h1b = load(high, (r, a)), load(high, (r, b)), load(high, (r + 1, a)), load(high, (r + 1, b))
    l0a, l0b, l1a, l1b = load(low, (r, a)), load(low, (r, b)), load(low, (r + 1, a)), load(low, (r + 1, b))
    for j in range(first, last):
        va, vb = load(values, (t, j, 0)), load(values, (t, j, WIDTH))
        w0, w1, x0, x1 = w_high[r, j], w_high[r + 1, j], w_low[r, j], w_low[r + 1, j]
        h0a, l0a = _two_steps(h0a, l0a, w0, x0, va)
        h0b, l0b = _two_steps(h0b, l0b, w0, x0, vb)
        h1a, l1a = _two_steps(h1a, l1a, w1, x1, va)
        h1b, l1b = _two_steps(h1b, l1b, w1, x1, vb)
    h0a, l0a = grid_fold(h0a, l0a)
    h0b, l0b = grid_fold(h0b, l0b)
    h1a, l1a = grid_fold(h1a, l1a)
    h1b, l1b = grid_fold(h1b, l1b)
    store(high, (r, a), h0a)
    store(high, (r, b), h0b)
    store(high, (r + 1, a), h1a)
    store(high, (r + 1, b), h1b)
    store(low, (r, a), l0a)
    store(low, (r, b), l0b)
    store(low, (r + 1, a), l1a)
    store(low, (r + 1, b), l1b)


@compiled
def _power_above(x):  # type: ignore[no-untyped-def]
    """The power of two next above x, or 1 where x is 0."""
    return math.ldexp(1.0, math.frexp(x)[1]) if x > 0.0 else 1.0
