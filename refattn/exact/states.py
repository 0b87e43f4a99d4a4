"""A state in two float64, token by token, with a bound for each column.

    S = decay * S;   S += key (value - erase^T S)^T for each write;   read = query^T S

An interval for each number of S would grow by |I - key erase^T|, numbers taken by their sizes: exponentially, where the state itself does not grow
at all.  So the bound is one of lengths: column j of the computed state is within rho_j of the exact one in the Euclidean norm, and a token
multiplies rho_j by at most the spectral norm of what it does to a column, which is 1 for the delta rule with keys of length one.  To that it
adds what was rounded.  Norms:

    a decay                     the largest factor
    I - b e^T                   (|b||e| + sqrt(|b|^2 |e|^2 + 4 (1 - b . e))) / 2, from the two-dimensional space of b and e
    diag(d) - b e^T             by bisection with a test of definiteness: see `_is_below`

Rounding errors of a dot product of n terms in two float64 are at most `dot_error(n)` times the lengths of its vectors (Cauchy and Schwarz).
What underflows, in a bound too, is less than `TINY`, added wherever something that is not 0 was multiplied.
Lengths of columns are taken as sqrt(K) times their largest number, which neither overflows nor vanishes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from .double_double import TINY, UU, accumulated, plus, times, two_sum
from .lanes import WIDTH, absolute, load, maximum, splat, store, where_less

compiled = njit(cache=True, error_model="numpy", nogil=True)

#: Covers the rounding of what is computed of positive numbers.
UP = 1.0 + 2.0**-40
#: Bisections for the norm of a decay with an erasure of the state before it.
STEPS = 20
#: Squares of numbers between these, either way, neither vanish nor overflow in sums.
SMALL, LARGE = 2.0**-400, 2.0**400


class Vectors(NamedTuple):
    """Vectors along the last axis: high and low parts, [2, ..., K], and of each its length, and how far it may be from the exact one."""

    numbers: np.ndarray
    size: np.ndarray
    off: np.ndarray


def padded(n: int) -> int:
    """Columns in whole vectors."""
    return -(-n // WIDTH) * WIDTH


@compiled
def dot_error(n):  # type: ignore[no-untyped-def]
    """Error of a dot product of n terms as a multiple of both lengths: products, 7 u**2 each, and their sum."""
    return (2.1 * n * (n + 2) + 8.0) * UU


# ---- norms -----------------------------------------------------------------------------------------------------------------------


@compiled
def length(x):  # type: ignore[no-untyped-def]
    """At least the Euclidean length of a vector."""
    most = 0.0
    for n in range(x.size):
        most = max(most, abs(x[n])) if not math.isnan(x[n]) else np.inf
    if not (most > 0.0 and most < np.inf):
        return most
    squares = 0.0
    for n in range(x.size):
        part = x[n] / most
        squares += part * part
    return most * math.sqrt(squares) * UP


@compiled
def lengths(x):  # type: ignore[no-untyped-def]
    """Of every last axis of an array of two."""
    found = np.empty(x.shape[0])
    for n in range(x.shape[0]):
        found[n] = length(x[n])
    return found


@compiled
def _of_rank_one(b, e):  # type: ignore[no-untyped-def]
    """At least the spectral norm of I - b e^T."""
    bb = ee = be = 0.0
    for n in range(b.size):
        bb += b[n] * b[n]
        ee += e[n] * e[n]
        be += b[n] * e[n]
    if not (SMALL < bb < LARGE and SMALL < ee < LARGE):
        return (1.0 + length(b) * length(e)) * UP
    both = math.sqrt(bb) * math.sqrt(ee)
    # the sums err by at most n u of the sums of sizes, the last of which is at most `both`
    slack = (b.size + 8) * 2.0**-51 * (both * both + 4.0 + 4.0 * both)
    return (both + math.sqrt(max(both * both + 4.0 * (1.0 - be), 0.0) + slack)) / 2.0 * UP


@compiled
def _is_below(bound, d, b, e, bb):  # type: ignore[no-untyped-def]
    """Whether `bound` is proved to be above the square of the spectral norm of diag(d) - b e^T; it must be at least (1 + 2**-20) d**2.

    bound I - M^T M = R + U C U^T with R = bound - d**2 > 0, U = [d b, e] and C = [[0, 1], [1, -|b|^2]].  By the inertia of
    [[R, U], [U^T, -1/C]] it is positive definite if and only if det(1/C + U^T (1/R) U) < 0, 1/C = [[|b|^2, 1], [1, 0]].
    """
    p, q, s, sizes = bb, 1.0, 0.0, 1.0
    for x in range(d.size):
        share = 1.0 / (bound - d[x] * d[x])  # within 2**-31 of itself, as the difference is at least 2**-21 of both
        p += d[x] * b[x] * d[x] * b[x] * share
        s += e[x] * e[x] * share
        q += d[x] * b[x] * e[x] * share
        sizes += abs(d[x] * b[x] * e[x]) * share
    least = abs(q) - 2.0**-28 * sizes
    return least > 0.0 and p * s * (1.0 + 2.0**-28) < least * least


@compiled
def _of_faded(d, b, e, most):  # type: ignore[no-untyped-def]
    """At least the spectral norm of diag(d) - b e^T, where it is at most `most`, by bisection."""
    largest = bb = ee = 0.0
    for x in range(d.size):
        largest = max(largest, d[x])
        bb += b[x] * b[x]
        ee += e[x] * e[x]
    low, high = largest * largest * (1.0 + 2.0**-19), most * most * UP
    if not (SMALL < bb < LARGE and SMALL < ee < LARGE and SMALL < low < high < LARGE):
        return most
    for _ in range(STEPS):
        middle = math.sqrt(low * high)
        if _is_below(middle, d, b, e, bb):
            high = middle
        else:
            low = middle
    return math.sqrt(high) * UP


@compiled
def growths(b, e, d, d_off, old, fading, growth):  # type: ignore[no-untyped-def]
    """What a token multiplies the bound by: `growth` at each write, and `fading` as it fades, erasures of the state before the token with it.

    As in `run`, but d is [S, K].
    """
    for t in range(d.shape[0]):
        most = off = 0.0
        for x in range(d.shape[1]):
            most, off = max(most, d[t, x]), max(off, d_off[t, x])
        fading[t] = most + off
        for w in range(b.size.shape[1]):
            growth[t, w] = 1.0
            b_size, e_size, b_off, e_off = b.size[t, w], e.size[t, w], b.off[t, w], e.off[t, w]
            if e_size == 0.0 and e_off == 0.0:
                continue
            extra = (b_size + b_off) * e_off + b_off * e_size
            if not old[w]:
                growth[t, w] = (_of_rank_one(b.numbers[0, t, w], e.numbers[0, t, w]) + extra) * UP
                continue
            fading[t] += b_size * e_size
            if w == 0:  # nothing has been erased of the faded state
                fading[t] = _of_faded(d[t], b.numbers[0, t, w], e.numbers[0, t, w], fading[t]) + off
            fading[t] += extra
        fading[t] *= UP


# ---- the recurrence ----------------------------------------------------------------------------------------------------------------


@compiled
def run(q, after, exclusive, b, w, w_off, e, old, d, d_off, fading, growth, state, rho, read, read_off):  # type: ignore[no-untyped-def]
    """All tokens of one state.

    q, b and e are `Vectors`, [G, T], [S, W] and [S, W] of them.  Other numbers lie as (2, ...), high and low parts: w [2, S, W, V], d [2, S, K],
    state [2, K, V] and read [2, G, T, V]; bounds are w_off [S, W, V], d_off [S, K], rho [V] and read_off [G, T, V].  e or d of no tokens is none.
    """
    n_tokens, n_writes, n_keys = b.numbers.shape[1:]
    n_reads, n_values = q.size.shape[1], w.shape[3]
    fades, erases = d.shape[1] > 0, e.size.shape[0] > 0
    root = math.sqrt(n_keys) * UP
    size = np.empty(n_values)  # of each column, at least its length
    found, off = np.empty((2, n_writes, n_values)), np.zeros((n_writes, n_values))
    _sizes(state[0], root, size)
    first = 0
    while first < n_reads and after[first] < 0:
        first = _read(q, first, state, size, rho, read, read_off)
    for t in range(n_tokens):
        while exclusive and first < n_reads and after[first] == t:
            first = _read(q, first, state, size, rho, read, read_off)
        if erases:
            for i in range(n_writes):
                if old[i]:
                    _dot(e.numbers[:, t, i], e.size[t, i], e.off[t, i], state, size, found[0, i], found[1, i], off[i])
        if fades:
            largest_off = 0.0
            for x in range(n_keys):
                largest_off = max(largest_off, d_off[t, x])
            _fade(d[0, t], d[1, t], largest_off, fading[t], state, root, size, rho)
        else:
            for j in range(0, n_values, WIDTH):  # an old erasure is in it
                store(rho, j, load(rho, j) * fading[t])
        for i in range(n_writes):
            if erases and not old[i]:
                _dot(e.numbers[:, t, i], e.size[t, i], e.off[t, i], state, size, found[0, i], found[1, i], off[i])
            elif not erases:
                found[:, i] = 0.0
                off[i] = 0.0
            _write(b.numbers[:, t, i], b.size[t, i], b.off[t, i], w[:, t, i], w_off[t, i], found[:, i], off[i], growth[t, i], state, root, size, rho)
        while not exclusive and first < n_reads and after[first] == t:
            first = _read(q, first, state, size, rho, read, read_off)


@compiled
def _sizes(high, root, size):  # type: ignore[no-untyped-def]
    for j in range(0, high.shape[1], WIDTH):
        most = splat(0.0)
        for x in range(high.shape[0]):
            most = maximum(most, absolute(load(high, (x, j))))
        store(size, j, most * root)


@compiled
def _read(q, i, state, size, rho, read, read_off):  # type: ignore[no-untyped-def]
    """Query i of every head that reads this state."""
    for h in range(q.size.shape[0]):
        q_size = q.size[h, i] + q.off[h, i]
        tiny = TINY if q_size > 0.0 else 0.0
        _dot(q.numbers[:, h, i], q.size[h, i], q.off[h, i], state, size, read[0, h, i], read[1, h, i], read_off[h, i])
        for j in range(0, rho.size, WIDTH):
            passed_on = q_size * load(rho, j) + where_less(0.0, load(rho, j), tiny, 0.0)
            store(read_off[h, i], j, (load(read_off[h, i], j) + passed_on) * UP)
    return i + 1


@compiled
def _dot(x, x_size, x_off, state, size, high, low, off):  # type: ignore[no-untyped-def]
    """x^T S, and how far it is from that of the exact x and the computed S."""
    n_keys = x.shape[1]
    error = dot_error(n_keys) * x_size + x_off
    tiny = TINY * n_keys if x_size + x_off > 0.0 else 0.0
    for j in range(0, size.size, WIDTH):
        h = l = splat(0.0)
        for n in range(n_keys):
            ph, pl = times(load(state[0], (n, j)), load(state[1], (n, j)), x[0, n], x[1, n])
            h, l = accumulated(h, l, ph, pl)
        h, l = two_sum(h, l)
        store(high, j, h)
        store(low, j, l)
        column = load(size, j)
        store(off, j, (error * column + where_less(0.0, column, tiny, 0.0)) * UP)


@compiled
def _fade(dh, dl, d_off, growth, state, root, size, rho):  # type: ignore[no-untyped-def]
    for j in range(0, size.size, WIDTH):
        most = splat(0.0)
        for x in range(dh.size):
            h, l = times(load(state[0], (x, j)), load(state[1], (x, j)), dh[x], dl[x])
            store(state[0], (x, j), h)
            store(state[1], (x, j), l)
            most = maximum(most, absolute(h))
        before, column = load(size, j), most * root
        store(size, j, column)
        local = d_off * before + 7.2 * UU * column + where_less(0.0, before + load(rho, j), root * TINY, 0.0)
        store(rho, j, (load(rho, j) * growth + local) * UP)


@compiled
def _write(b, b_size, b_off, w, w_off, found, found_off, growth, state, root, size, rho):  # type: ignore[no-untyped-def]
    """S += b (w - found)^T."""
    n_keys = b.shape[1]
    for j in range(0, size.size, WIDTH):
        wh, wl = load(w[0], j), load(w[1], j)
        uh, ul = load(found[0], j), load(found[1], j)
        h, l = plus(wh, wl, 0.0 - uh, 0.0 - ul)
        most = splat(0.0)
        for x in range(n_keys):
            ph, pl = times(h, l, b[0, x], b[1, x])
            sh, sl = plus(load(state[0], (x, j)), load(state[1], (x, j)), ph, pl)
            store(state[0], (x, j), sh)
            store(state[1], (x, j), sl)
            most = maximum(most, absolute(sh))
        change, before, column = absolute(h), load(size, j), most * root
        store(size, j, column)
        known = load(w_off, j) + load(found_off, j) + 4.2 * UU * (absolute(wh) + absolute(uh))
        moved = (b_size + b_off) * known + b_off * change
        local = moved + UU * (11.4 * b_size * change + 4.2 * before) + root * TINY
        still = change + known
        store(rho, j, (load(rho, j) * growth + where_less(0.0, still, local, 0.0)) * UP)
