"""How a panel's scores become weights, and what a change of a score does to them: one kernel for every row normaliser.

    SOFTMAX     p = exp(s - lse)                     as tiles come, with a running maximum and sum
    SIGMOID     p = 1 / (1 + exp(-(s + shift)))      entry by entry
    RELU        p = max(s, 0)**power / divisor       entry by entry
    SPARSEMAX   p = max(s - tau, 0)                  tau such that a row sums to 1, which takes the whole row
    ENTMAX15    p = max(s / 2 - tau, 0)**2           the same

The gradient has one form for all, with a slope g of each weight and one number delta for each row, d_s = g (d_p - delta):

                g                        delta
    SOFTMAX     p                        sum_j p_j d_p_j - d_lse
    SIGMOID     p (1 - p)                0
    RELU        d p / d s                0
    SPARSEMAX   1 where p > 0            sum_j g_j d_p_j / sum_j g_j
    ENTMAX15    sqrt(p)                  sum_j g_j d_p_j / sum_j g_j

As d_p_j = d_out . v_j, delta is d_out . u with u = sum_j g_j v_j / sum_j g_j: for softmax the output itself, for the last two a second output, of
the weights g / sum g, which SUPPORT and ROOT stand for.  tau is found by Newton's method from below on sum_j p_j(tau) = 1, a convex falling
function, so that it rises to the solution and there stops rising (Martins and Astudillo, arXiv:1602.02068; Peters et al., arXiv:1905.05702).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .panels import LOG2_E, VECTORS, width
from .simd import (
    add,
    bounded,
    div,
    exp2,
    exp2_below,
    fill,
    fma,
    lanes,
    load,
    maximum,
    mul,
    smaller,
    store,
    sub,
    times_unless_zero,
    where_less,
)

SOFTMAX, SIGMOID, RELU, SPARSEMAX, ENTMAX15, SUPPORT, ROOT = range(7)
MOST_STEPS = 100  # of Newton's method, which takes about ten


@njit(error_model="numpy", cache=True)
def exponentials(s, s_at, n, factor, top, old, total, shrink, at):
    """n rows of s = 2**(factor * (s - top)); shrink = 2**(factor * (old - top)), by which total shrinks before it gains them; old = top.

    A maximum of -inf, of a lane that has seen no key, is taken to be 0.
    """
    step, w = lanes(s), width(s)
    c = fill(s, factor)
    for v in range(VECTORS):
        most = bounded(load(top, at + v * step))
        fade = exp2_below(mul(sub(load(old, at + v * step), most), c))
        store(shrink, at + v * step, fade)
        store(old, at + v * step, load(top, at + v * step))
        one = two = fill(s, 0.0)
        place = s_at + v * step
        for _ in range(n // 2):
            x, y = exp2_below(mul(sub(load(s, place), most), c)), exp2_below(mul(sub(load(s, place + w), most), c))
            store(s, place, x)
            store(s, place + w, y)
            one, two = add(one, x), add(two, y)
            place += 2 * w
        if n % 2:
            x = exp2_below(mul(sub(load(s, place), most), c))
            store(s, place, x)
            one = add(one, x)
        store(total, at + v * step, fma(load(total, at + v * step), fade, add(one, two)))


@njit(error_model="numpy", cache=True)
def one_by_one(s, s_at, n, kind, shift, power):
    """Weights that need nothing but their own score, in place of n rows of them; RELU without its divisor."""
    step, w = lanes(s), width(s)
    one, zero = fill(s, 1.0), fill(s, 0.0)
    for at in range(s_at, s_at + n * w, step):
        x = load(s, at)
        if kind == SIGMOID:
            store(s, at, div(one, add(one, exp2(mul(add(x, fill(s, shift)), fill(s, -LOG2_E))))))
        else:
            x = maximum(x, zero)
            y = x
            for _ in range(power - 1):
                y = mul(y, x)
            store(s, at, y)


@njit(error_model="numpy", cache=True)
def thresholds(s, n, kind, top, tau, change, at):
    """tau of each lane from all n rows of its scores, whose largest is top, less top or for ENTMAX15 top / 2.

    NaN where a score is NaN or +inf; -1 where none is above -inf.  `change` is overwritten.
    """
    step, w = lanes(s), width(s)
    half = fill(s, 0.5 if kind == ENTMAX15 else 1.0)
    one, two, zero = fill(s, 1.0), fill(s, 2.0), fill(s, 0.0)
    for v in range(VECTORS):
        lane = at + v * step
        most = bounded(load(top, lane))
        t = fill(s, -1.0)
        for _ in range(MOST_STEPS):
            total, slope = zero, zero
            for place in range(v * step, n * w + v * step, w):
                x = maximum(sub(mul(sub(load(s, place), most), half), t), zero)
                if kind == ENTMAX15:
                    total, slope = fma(x, x, total), fma(two, x, slope)
                else:
                    total, slope = add(total, x), add(slope, where_less(zero, x, one, zero))
            new = add(t, div(sub(total, one), slope))
            store(tau, lane, t)
            store(change, lane, sub(new, t))
            rises = False
            for c in range(lane, lane + step):
                rises = rises or change[c] > 0.0
            if not rises:
                break
            t = where_less(t, new, new, t)
        for c in range(lane, lane + step):
            if not change[c] <= np.inf:  # NaN among the scores
                tau[c] = np.nan


@njit(error_model="numpy", cache=True)
def beyond(s, s_at, n, kind, top, tau, total, at):
    """Weights from what `thresholds` found, in place of n rows of scores; total gains them."""
    step, w = lanes(s), width(s)
    half = fill(s, 0.5 if kind in (ENTMAX15, ROOT) else 1.0)
    one, zero = fill(s, 1.0), fill(s, 0.0)
    for v in range(VECTORS):
        lane = at + v * step
        most, t, gathered = bounded(load(top, lane)), load(tau, lane), load(total, lane)
        for place in range(s_at + v * step, s_at + n * w + v * step, w):
            x = maximum(sub(mul(sub(load(s, place), most), half), t), zero)
            if kind == ENTMAX15:
                x = mul(x, x)
            if kind == SUPPORT:
                x = where_less(zero, x, one, zero)
            gathered = add(gathered, x)
            store(s, place, x)
        store(total, lane, gathered)


@njit(error_model="numpy", cache=True)
def score_gradients(s, dp, at, s_step, n, kind, factor, shift, power, divisor, statistic, delta, lane):
    """n rows of s = p and dp = g * (dp - delta), 0 where g is 0 whatever dp is; `statistic` is lse in the units of s, or tau.

    SOFTMAX takes a score above lse, where only roundings can bring it, for lse.
    """
    step = lanes(s)
    c, one, zero, half = fill(s, factor), fill(s, 1.0), fill(s, 0.0), fill(s, 0.5)
    for v in range(VECTORS):
        row, less = load(statistic, lane + v * step), load(delta, lane + v * step)
        for place in range(at + v * step, at + v * step + n * s_step, s_step):
            x = load(s, place)
            if kind == SOFTMAX:
                p = exp2_below(mul(smaller(zero, sub(x, row)), c))  # NaN stays NaN
                g = p
            elif kind == SIGMOID:
                e = exp2(mul(add(x, fill(s, shift)), fill(s, -LOG2_E)))
                p = div(one, add(one, e))
                g = times_unless_zero(p, times_unless_zero(p, e))
            elif kind == RELU:
                x = maximum(x, zero)
                g = div(where_less(zero, x, fill(s, power), sub(x, x)), fill(s, divisor))
                for _ in range(power - 1):
                    g = mul(g, x)
                p = div(mul(g, x), fill(s, power))
            else:
                x = maximum(sub(mul(x, half), row) if kind == ENTMAX15 else sub(x, row), zero)
                g = x if kind == ENTMAX15 else where_less(zero, x, one, sub(x, x))  # NaN where x is
                p = mul(x, x) if kind == ENTMAX15 else x
            store(s, place, p)
            store(dp, place, times_unless_zero(g, sub(load(dp, place), less)))
