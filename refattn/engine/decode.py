"""Family `scored`, few queries and many keys: a step of generation.  Bound by memory, so keys and values are read once, in order.

A task is a stretch of keys of one batch and key-value head, for all rows of the head's group (row r is query r // group of head r % group).
Vectors run along the widths of keys and values, and along keys in between.  Stretches have one length whatever the number of threads,
and are merged in order: so are the bits.

    1. for every tile of keys: scores of every row; scale, soft-cap, bias, hidden keys to -inf; exponentials; values
    2. merge the stretches by their maxima and sums; the sink; lse
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .panels import LOG2_E, tanh
from .simd import add, div, exp2, fill, fma, lanes, load, load_part, maximum, mul, plus_unless_hidden, store, store_part, sub, total, widest
from .tasks import take

STRETCH = 1024  # keys per task
TILE = 64  # keys whose scores, and values, stay in the first-level cache


@njit(error_model="numpy", cache=True)
def stretches(n_keys):
    return (n_keys + STRETCH - 1) // STRETCH


@njit(error_model="numpy", cache=True)
def dot_products(k, first, n, queries, rows, d, s):
    """s[r * TILE + j] = queries[r] . k[first + j]; queries are flat rows of d."""
    step = lanes(s)
    whole = d // step * step
    for j in range(n):
        r = 0
        while r + 4 <= rows:
            a0 = a1 = a2 = a3 = fill(s, 0.0)
            for x in range(0, whole, step):
                key, at = load(k, (first + j, x)), r * d + x
                a0, a1 = fma(key, load(queries, at), a0), fma(key, load(queries, at + d), a1)
                a2, a3 = fma(key, load(queries, at + 2 * d), a2), fma(key, load(queries, at + 3 * d), a3)
            if whole < d:
                key, at = load_part(k, (first + j, whole), d - whole), r * d + whole
                a0, a1 = fma(key, load_part(queries, at, d - whole), a0), fma(key, load_part(queries, at + d, d - whole), a1)
                a2, a3 = fma(key, load_part(queries, at + 2 * d, d - whole), a2), fma(key, load_part(queries, at + 3 * d, d - whole), a3)
            at = r * TILE + j
            s[at], s[at + TILE], s[at + 2 * TILE], s[at + 3 * TILE] = total(a0), total(a1), total(a2), total(a3)
            r += 4
        while r < rows:
            a0 = fill(s, 0.0)
            for x in range(0, whole, step):
                a0 = fma(load(k, (first + j, x)), load(queries, r * d + x), a0)
            if whole < d:
                a0 = fma(load_part(k, (first + j, whole), d - whole), load_part(queries, r * d + whole, d - whole), a0)
            s[r * TILE + j] = total(a0)
            r += 1


@njit(error_model="numpy", cache=True)
def modified(s, at, n, scale, cap, bias, b, h, i, j):
    """A row's scores scaled, soft-capped, and with the bias of keys j, j + 1, ... added."""
    step = lanes(s)
    factor, limit = fill(s, scale), fill(s, cap)
    for c in range(0, n, step):
        x = mul(load(s, at + c), factor)
        if cap > 0.0:
            x = mul(limit, tanh(div(x, limit), s))
        if bias.size:
            x = plus_unless_hidden(x, load_part(bias, (b, h, i, j + c), n - c))
        store(s, at + c, x)


@njit(error_model="numpy", cache=True)
def weighted(v, first, n, s, at, e, out, out_at):
    """out += sum over n keys of s[j] * v[first + j], four keys at a time."""
    step = lanes(s)
    j = 0
    while j + 4 <= n:
        p0, p1, p2, p3 = fill(s, s[at + j]), fill(s, s[at + j + 1]), fill(s, s[at + j + 2]), fill(s, s[at + j + 3])
        row = first + j
        x = 0
        while x + step <= e:
            y = fma(p0, load(v, (row, x)), load(out, out_at + x))
            y = fma(p1, load(v, (row + 1, x)), y)
            y = fma(p2, load(v, (row + 2, x)), y)
            store(out, out_at + x, fma(p3, load(v, (row + 3, x)), y))
            x += step
        if x < e:
            y = fma(p0, load_part(v, (row, x), e - x), load_part(out, out_at + x, e - x))
            y = fma(p1, load_part(v, (row + 1, x), e - x), y)
            y = fma(p2, load_part(v, (row + 2, x), e - x), y)
            store_part(out, out_at + x, e - x, fma(p3, load_part(v, (row + 3, x), e - x), y))
        j += 4
    while j < n:
        for x in range(e):
            out[out_at + x] += s[at + j] * v[first + j, x]
        j += 1


@njit(error_model="numpy", cache=True)
def carefully_weighted(v, first, n, s, at, e, out, out_at):
    """`weighted`, for values that are not all finite: a key of weight 0 is not read."""
    for j in range(n):
        if s[at + j] != 0.0:
            for x in range(e):
                out[out_at + x] += s[at + j] * v[first + j, x]


@njit(error_model="numpy", cache=True)
def stretch(task, n_stretches, q, k, v, bias, first, last, scale, cap, careful, partial, space):
    """One task: partial[row] = (values gathered, largest score, sum of exponentials) of a stretch."""
    _, heads, n_q, d = q.shape
    kv_heads, n_k, e = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    rows = group * n_q
    b, g, c = task // (kv_heads * n_stretches), task // n_stretches % kv_heads, task % n_stretches
    queries, s, gathered, top, sums = space
    keys, vals = k[b, g], v[b, g]
    step = lanes(s)
    for r in range(rows):
        for x in range(d):
            queries[r * d + x] = q[b, g * group + r % group, r // group, x]
    gathered[: rows * e] = 0.0
    top[:rows] = -np.inf
    sums[:rows] = 0.0
    low, high = n_k, 0
    for i in range(n_q):
        low, high = min(low, first[i]), max(high, last[i])
    low, high = max(low, c * STRETCH), min(high, (c + 1) * STRETCH, n_k)
    for start in range(low, high, TILE):
        n = min(TILE, high - start)
        dot_products(keys, start, n, queries, rows, d, s)
        for r in range(rows):
            h, i, at = g * group + r % group, r // group, r * TILE
            for j in range(n, (n + step - 1) // step * step):
                s[at + j] = -np.inf
            modified(s, at, n, scale, cap, bias, b, h, i, start)
            for j in range(n):
                if not first[i] <= start + j < last[i]:
                    s[at + j] = -np.inf
            for j in range(n, (n + step - 1) // step * step):
                s[at + j] = -np.inf
            most = load(s, at)
            for j in range(step, n, step):
                most = maximum(most, load(s, at + j))
            old, new = top[r], widest(most)
            if new <= old:
                new = old
            if new == -np.inf:
                for j in range(n):
                    s[at + j] = 0.0
                continue
            shift, factor, sum_of = fill(s, -new * LOG2_E), fill(s, LOG2_E), fill(s, 0.0)
            for j in range(0, n, step):
                x = exp2(fma(load(s, at + j), factor, shift))
                store(s, at + j, x)
                sum_of = add(sum_of, x)
            if old != new:
                fade = q.dtype.type(math.exp(old - new))
                sums[r] *= fade
                for x in range(e):
                    gathered[r * e + x] *= fade
                top[r] = new
            sums[r] += total(sum_of)
        for r in range(rows):
            if careful:
                carefully_weighted(vals, start, n, s, r * TILE, e, gathered, r * e)
            else:
                weighted(vals, start, n, s, r * TILE, e, gathered, r * e)
    finite = True
    for r in range(rows):
        for x in range(e):
            partial[task, r, x] = gathered[r * e + x]
            finite = finite and math.isfinite(gathered[r * e + x])
        partial[task, r, e], partial[task, r, e + 1] = top[r], sums[r]
    return finite


@njit(error_model="numpy", cache=True)
def merge(n, n_stretches, partial, sinks, out, lse):
    """All stretches of one batch and key-value head."""
    heads, e = out.shape[1], out.shape[3]
    n_q, kv_heads = out.shape[2], partial.shape[0] // n_stretches // out.shape[0]
    group = heads // kv_heads
    b, g = n // kv_heads, n % kv_heads
    for r in range(group * n_q):
        h, i = g * group + r % group, r // group
        top = sinks[h]
        for c in range(n * n_stretches, (n + 1) * n_stretches):
            if not partial[c, r, e] <= top:  # NaN must win
                top = partial[c, r, e]
        for x in range(e):
            out[b, h, i, x] = 0.0
        if top == -np.inf:
            lse[b, h, i] = top
            continue
        sum_of = math.exp(sinks[h] - top)
        for c in range(n * n_stretches, (n + 1) * n_stretches):
            if partial[c, r, e] != -np.inf:
                weight = out.dtype.type(math.exp(partial[c, r, e] - top))
                sum_of += weight * partial[c, r, e + 1]
                for x in range(e):
                    out[b, h, i, x] += weight * partial[c, r, x]
        for x in range(e):
            out[b, h, i, x] /= sum_of
        lse[b, h, i] = top + math.log(sum_of)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, bias, first, last, scale, cap, partial, counter, n_stretches):
    """Takes tasks until there are none."""
    rows, d, e = q.shape[2] * (q.shape[1] // k.shape[1]), q.shape[3], v.shape[3]
    space = np.empty(rows * d, q.dtype), np.empty(rows * TILE, q.dtype), np.empty(rows * e, q.dtype), np.empty(rows, q.dtype), np.empty(rows, q.dtype)
    task = take(counter)
    while task < partial.shape[0]:
        if not stretch(task, n_stretches, q, k, v, bias, first, last, scale, cap, False, partial, space):
            stretch(task, n_stretches, q, k, v, bias, first, last, scale, cap, True, partial, space)
        task = take(counter)


@njit(error_model="numpy", cache=True)
def partials(q, k, e):
    """Where tasks leave their results."""
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    return np.empty((k.shape[0] * k.shape[1] * stretches(k.shape[2]), rows, e + 2), q.dtype)


@njit(error_model="numpy", nogil=True, cache=True)
def decode(q, k, v, bias, sinks, first, last, scale, cap, out, lse):
    """On this thread."""
    partial, n_stretches = partials(q, k, v.shape[3]), stretches(k.shape[2])
    worker(q, k, v, bias, first, last, scale, cap, partial, np.zeros(1, np.int64), n_stretches)
    for n in range(k.shape[0] * k.shape[1]):
        merge(n, n_stretches, partial, sinks, out, lse)


@njit(error_model="numpy", nogil=True, parallel=True, cache=True)
def decode_parallel(q, k, v, bias, sinks, first, last, scale, cap, out, lse, threads):
    """On several threads; the same bits."""
    partial, n_stretches, counter = partials(q, k, v.shape[3]), stretches(k.shape[2]), np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, bias, first, last, scale, cap, partial, counter, n_stretches)
    for n in range(k.shape[0] * k.shape[1]):
        merge(n, n_stretches, partial, sinks, out, lse)
