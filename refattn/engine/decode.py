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
from .simd import (
    add,
    div,
    exp2,
    fill,
    fma,
    lanes,
    load,
    load_part,
    maximum,
    mul,
    plus_unless_hidden,
    prefetch,
    splat,
    store,
    store_part,
    sub,
    total,
    widest,
)
from .tasks import take

STRETCH = 1024  # keys per task
TILE = 64  # keys whose scores, and values, stay in the first-level cache


@njit(error_model="numpy", cache=True)
def stretches(n_keys):
    return (n_keys + STRETCH - 1) // STRETCH


@njit(error_model="numpy", cache=True)
def dot_products(k, v, first, n, queries, rows, d, s):
    """s[r * TILE + j] = queries[r] . k[first + j]; queries are rows of `wide` elements, d of them and zeros; blocks of 4 keys by 4 rows.

    The values of the same keys are called for meanwhile, so that memory does not wait for arithmetic.
    """
    step = lanes(s)
    whole, wide = d // step * step, (d + step - 1) // step * step
    for j in range(0, n, 4):
        j0, j1, j2, j3 = first + j, first + min(j + 1, n - 1), first + min(j + 2, n - 1), first + min(j + 3, n - 1)  # past the end, the last again
        for x in range(0, wide, step):
            prefetch(v, (j0, x))
            prefetch(v, (j1, x))
            prefetch(v, (j2, x))
            prefetch(v, (j3, x))
        r = 0
        while r + 4 <= rows:
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = fill(s, 0.0)
            at = r * wide
            for x in range(0, wide, step):
                q0, q1, q2, q3 = (
                    load(queries, at + x),
                    load(queries, at + wide + x),
                    load(queries, at + 2 * wide + x),
                    load(queries, at + 3 * wide + x),
                )
                key = load(k, (j0, x)) if x < whole else load_part(k, (j0, x), d - whole)
                a0, a1, a2, a3 = fma(key, q0, a0), fma(key, q1, a1), fma(key, q2, a2), fma(key, q3, a3)
                key = load(k, (j1, x)) if x < whole else load_part(k, (j1, x), d - whole)
                b0, b1, b2, b3 = fma(key, q0, b0), fma(key, q1, b1), fma(key, q2, b2), fma(key, q3, b3)
                key = load(k, (j2, x)) if x < whole else load_part(k, (j2, x), d - whole)
                c0, c1, c2, c3 = fma(key, q0, c0), fma(key, q1, c1), fma(key, q2, c2), fma(key, q3, c3)
                key = load(k, (j3, x)) if x < whole else load_part(k, (j3, x), d - whole)
                d0, d1, d2, d3 = fma(key, q0, d0), fma(key, q1, d1), fma(key, q2, d2), fma(key, q3, d3)
            at = r * TILE + j
            put_totals(s, at, a0, b0, c0, d0)
            put_totals(s, at + TILE, a1, b1, c1, d1)
            put_totals(s, at + 2 * TILE, a2, b2, c2, d2)
            put_totals(s, at + 3 * TILE, a3, b3, c3, d3)
            r += 4
        while r < rows:
            a0 = b0 = c0 = d0 = fill(s, 0.0)
            for x in range(0, whole, step):
                q0 = load(queries, r * wide + x)
                a0, b0 = fma(load(k, (j0, x)), q0, a0), fma(load(k, (j1, x)), q0, b0)
                c0, d0 = fma(load(k, (j2, x)), q0, c0), fma(load(k, (j3, x)), q0, d0)
            if whole < d:
                q0, m = load(queries, r * wide + whole), d - whole
                a0, b0 = fma(load_part(k, (j0, whole), m), q0, a0), fma(load_part(k, (j1, whole), m), q0, b0)
                c0, d0 = fma(load_part(k, (j2, whole), m), q0, c0), fma(load_part(k, (j3, whole), m), q0, d0)
            put_totals(s, r * TILE + j, a0, b0, c0, d0)
            r += 1


@njit(error_model="numpy", cache=True)
def put_totals(s, at, a, b, c, d):
    s[at], s[at + 1], s[at + 2], s[at + 3] = total(a), total(b), total(c), total(d)


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
def weighted(v, k, first, n, s, at, e, out, out_at, twice):
    """out += sum over n keys of s[j] * v[first + j], four keys at a time, for one row or (`twice`) this and the next.

    The first row calls for the keys of the next tile meanwhile.
    """
    step = lanes(s)
    whole, last = e // step * step, first + n - 1
    for j in range(0, n, 4):
        # weights past the end are zeros, and their keys the last one again
        j0, j1, j2, j3 = first + j, min(first + j + 1, last), min(first + j + 2, last), min(first + j + 3, last)
        if at == 0:
            for x in range(0, k.shape[1], step):
                prefetch(k, (first + TILE + j, x))
                prefetch(k, (first + TILE + j + 1, x))
                prefetch(k, (first + TILE + j + 2, x))
                prefetch(k, (first + TILE + j + 3, x))
        p0, p1, p2, p3 = splat(s, at + j), splat(s, at + j + 1), splat(s, at + j + 2), splat(s, at + j + 3)
        if twice:
            next_at = at + TILE + j
            r0, r1, r2, r3 = splat(s, next_at), splat(s, next_at + 1), splat(s, next_at + 2), splat(s, next_at + 3)
            for x in range(0, whole, step):
                v0, v1, v2, v3 = load(v, (j0, x)), load(v, (j1, x)), load(v, (j2, x)), load(v, (j3, x))
                y, z = load(out, out_at + x), load(out, out_at + e + x)
                store(out, out_at + x, fma(p3, v3, fma(p2, v2, fma(p1, v1, fma(p0, v0, y)))))
                store(out, out_at + e + x, fma(r3, v3, fma(r2, v2, fma(r1, v1, fma(r0, v0, z)))))
            if whole < e:
                m = e - whole
                v0, v1, v2, v3 = (
                    load_part(v, (j0, whole), m),
                    load_part(v, (j1, whole), m),
                    load_part(v, (j2, whole), m),
                    load_part(v, (j3, whole), m),
                )
                y, z = load_part(out, out_at + whole, m), load_part(out, out_at + e + whole, m)
                store_part(out, out_at + whole, m, fma(p3, v3, fma(p2, v2, fma(p1, v1, fma(p0, v0, y)))))
                store_part(out, out_at + e + whole, m, fma(r3, v3, fma(r2, v2, fma(r1, v1, fma(r0, v0, z)))))
        else:
            for x in range(0, whole, step):
                y = fma(p1, load(v, (j1, x)), fma(p0, load(v, (j0, x)), load(out, out_at + x)))
                store(out, out_at + x, fma(p3, load(v, (j3, x)), fma(p2, load(v, (j2, x)), y)))
            if whole < e:
                m = e - whole
                y = fma(p1, load_part(v, (j1, whole), m), fma(p0, load_part(v, (j0, whole), m), load_part(out, out_at + whole, m)))
                store_part(out, out_at + whole, m, fma(p3, load_part(v, (j3, whole), m), fma(p2, load_part(v, (j2, whole), m), y)))


@njit(error_model="numpy", cache=True)
def carefully_weighted(v, first, n, s, kept, at, e, out, out_at):
    """`weighted`, for values that are not all finite: a key whose score was -inf is not read."""
    for j in range(n):
        if kept[at + j] != -np.inf:
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
    queries, s, kept, gathered, top, sums = space
    keys, vals = k[b, g], v[b, g]
    step = lanes(s)
    wide = (d + step - 1) // step * step
    queries[:] = 0.0
    for r in range(rows):
        for x in range(d):
            queries[r * wide + x] = q[b, g * group + r % group, r // group, x]
    gathered[: rows * e] = 0.0
    top[:rows] = -np.inf
    sums[:rows] = 0.0
    low, high = n_k, 0
    for i in range(n_q):
        low, high = min(low, first[i]), max(high, last[i])
    low, high = max(low, c * STRETCH), min(high, (c + 1) * STRETCH, n_k)
    for start in range(low, high, TILE):
        n = min(TILE, high - start)
        dot_products(keys, vals, start, n, queries, rows, d, s)
        for r in range(rows):
            h, i, at = g * group + r % group, r // group, r * TILE
            modified(s, at, n, scale, cap, bias, b, h, i, start)
            s[at : at + max(0, min(n, first[i] - start))] = -np.inf
            s[at + max(0, min(n, last[i] - start)) : at + TILE] = -np.inf
            kept[at : at + TILE] = s[at : at + TILE]
            most = load(s, at)
            for j in range(step, n, step):
                most = maximum(most, load(s, at + j))
            old = top[r]
            new = widest(maximum(most, fill(s, old)))
            if new == -np.inf:
                s[at : at + TILE] = 0.0
                continue
            largest, factor, sum_of = fill(s, new), fill(s, LOG2_E), fill(s, 0.0)
            for j in range(0, TILE, step):
                x = exp2(mul(sub(load(s, at + j), largest), factor))
                store(s, at + j, x)
                sum_of = add(sum_of, x)
            if old != new:
                fade = q.dtype.type(math.exp(old - new))
                sums[r] *= fade
                for x in range(e):
                    gathered[r * e + x] *= fade
                top[r] = new
            sums[r] += total(sum_of)
        for r in range(0, rows, 1 if careful else 2):
            if careful:
                carefully_weighted(vals, start, n, s, kept, r * TILE, e, gathered, r * e)
            else:
                weighted(vals, keys, start, n, s, r * TILE, e, gathered, r * e, r + 1 < rows)
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
    space = (
        np.empty(rows * (d + lanes(q)), q.dtype),
        np.empty(rows * TILE, q.dtype),
        np.empty(rows * TILE, q.dtype),
        np.empty(rows * e, q.dtype),
        np.empty(rows, q.dtype),
        np.empty(rows, q.dtype),
    )
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


def decode(q, k, v, bias, sinks, first, last, scale, cap, out, lse):
    """On this thread."""
    partial, n_stretches = partials(q, k, v.shape[3]), stretches(k.shape[2])
    worker(q, k, v, bias, first, last, scale, cap, partial, np.zeros(1, np.int64), n_stretches)
    for n in range(k.shape[0] * k.shape[1]):
        merge(n, n_stretches, partial, sinks, out, lse)


def decode_parallel(q, k, v, bias, sinks, first, last, scale, cap, out, lse, threads):
    """On several threads; the same bits."""
    partial, n_stretches, counter = partials(q, k, v.shape[3]), stretches(k.shape[2]), np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, bias, first, last, scale, cap, partial, counter, n_stretches)
    for n in range(k.shape[0] * k.shape[1]):
        merge(n, n_stretches, partial, sinks, out, lse)
