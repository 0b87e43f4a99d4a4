"""A panel of queries and a tile of keys or values: their products, blocked for registers, and what is done to their scores one by one.

A panel holds `width(a)` queries, three vectors of lanes: lane l of every vector belongs to query l, so that softmax needs no operation across
lanes, and keys and values are read as rows, one element at a time into all lanes.  A panel of n rows is a flat array in which row x
begins at x * width.  Blocks are four rows by three vectors: twelve accumulators, three operands and one broadcast fill AVX2's sixteen
registers, and leave AVX-512 and NEON room.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .simd import (
    absolute,
    add,
    add_transposed,
    between,
    byte_at,
    div,
    exp2,
    fill,
    fma,
    fma_unless_hidden,
    gather,
    lanes,
    larger,
    load,
    mul,
    plus_unless_hidden,
    splat,
    splat_at,
    store,
    sub,
    tanh_ratio,
    times_unless_zero,
    transpose_hidden_in,
    where_equal,
    where_less,
    with_sign,
)

#: Vectors per panel row.
VECTORS = 3
#: An index and an answer that are no literals, for which Numba would compile every callee anew.
START, NO = np.int64(0), np.bool_(False)
LOG2_E = 1.4426950408889634


@njit(error_model="numpy", cache=True)
def width(a):
    """Queries in a panel."""
    return VECTORS * lanes(a)


@njit(error_model="numpy", cache=True)
def put(a, at, x, y, z):
    """Store a row."""
    step = lanes(a)
    store(a, at, x)
    store(a, at + step, y)
    store(a, at + 2 * step, z)


@njit(error_model="numpy", cache=True)
def copy(a, at, target, n):
    """target[:n] = a[at : at + n], n elements that fill vectors; quicker to compile than an assignment, which has messages for what does not fit."""
    for x in range(0, n, lanes(a)):
        store(target, x, load(a, at + x))


@njit(error_model="numpy", cache=True)
def raise_to(top, at, x, y, z):
    """top = the larger of itself and a row."""
    step = lanes(top)
    put(top, at, larger(load(top, at), x), larger(load(top, at + step), y), larger(load(top, at + 2 * step), z))


@njit(error_model="numpy", cache=True)
def scores(keys, first, last, q, q_at, d, s, s_at, s_step, top, top_at, fold):
    """Row j - first of s = key j . q for first <= j < last, where keys[j] is the key's address; with `fold`, top is raised to each row."""
    step, w, size = lanes(q), width(q), q.itemsize
    j, at = first, s_at
    while j + 4 <= last:
        a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = d0 = d1 = d2 = fill(q, 0.0)
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        for x in range(d):
            q0, q1, q2 = load(q, q_at + x * w), load(q, q_at + x * w + step), load(q, q_at + x * w + 2 * step)
            one = splat_at(q, k0 + x * size)
            a0, a1, a2 = fma(one, q0, a0), fma(one, q1, a1), fma(one, q2, a2)
            one = splat_at(q, k1 + x * size)
            b0, b1, b2 = fma(one, q0, b0), fma(one, q1, b1), fma(one, q2, b2)
            one = splat_at(q, k2 + x * size)
            c0, c1, c2 = fma(one, q0, c0), fma(one, q1, c1), fma(one, q2, c2)
            one = splat_at(q, k3 + x * size)
            d0, d1, d2 = fma(one, q0, d0), fma(one, q1, d1), fma(one, q2, d2)
        put(s, at, a0, a1, a2)
        put(s, at + s_step, b0, b1, b2)
        put(s, at + 2 * s_step, c0, c1, c2)
        put(s, at + 3 * s_step, d0, d1, d2)
        if fold:
            x0, x1, x2 = larger(a0, b0), larger(a1, b1), larger(a2, b2)
            y0, y1, y2 = larger(c0, d0), larger(c1, d1), larger(c2, d2)
            raise_to(top, top_at, larger(x0, y0), larger(x1, y1), larger(x2, y2))
        j += 4
        at += 4 * s_step
    while j < last:
        a0 = a1 = a2 = fill(q, 0.0)
        for x in range(d):
            one = splat_at(q, keys[j] + x * size)
            a0 = fma(one, load(q, q_at + x * w), a0)
            a1 = fma(one, load(q, q_at + x * w + step), a1)
            a2 = fma(one, load(q, q_at + x * w + 2 * step), a2)
        put(s, at, a0, a1, a2)
        if fold:
            raise_to(top, top_at, a0, a1, a2)
        j += 1
        at += s_step


@njit(error_model="numpy", cache=True)
def values(v, v_step, n, e, p, p_at, p_step, out, out_at, shrink, shrink_at):
    """out = out * shrink + sum over n keys of v[j, x] * p[j], for the channels x below e; v is a flat tile of rows v_step apart."""
    step, w = lanes(p), width(p)
    f0, f1, f2 = load(shrink, shrink_at), load(shrink, shrink_at + step), load(shrink, shrink_at + 2 * step)
    x, at = 0, out_at
    while x + 4 <= e:
        a0, a1, a2 = mul(load(out, at), f0), mul(load(out, at + step), f1), mul(load(out, at + 2 * step), f2)
        r = at + w
        b0, b1, b2 = mul(load(out, r), f0), mul(load(out, r + step), f1), mul(load(out, r + 2 * step), f2)
        r += w
        c0, c1, c2 = mul(load(out, r), f0), mul(load(out, r + step), f1), mul(load(out, r + 2 * step), f2)
        r += w
        d0, d1, d2 = mul(load(out, r), f0), mul(load(out, r + step), f1), mul(load(out, r + 2 * step), f2)
        for j in range(n):
            r = p_at + j * p_step
            p0, p1, p2 = load(p, r), load(p, r + step), load(p, r + 2 * step)
            r = j * v_step + x
            one = splat(v, r)
            a0, a1, a2 = fma(one, p0, a0), fma(one, p1, a1), fma(one, p2, a2)
            one = splat(v, r + 1)
            b0, b1, b2 = fma(one, p0, b0), fma(one, p1, b1), fma(one, p2, b2)
            one = splat(v, r + 2)
            c0, c1, c2 = fma(one, p0, c0), fma(one, p1, c1), fma(one, p2, c2)
            one = splat(v, r + 3)
            d0, d1, d2 = fma(one, p0, d0), fma(one, p1, d1), fma(one, p2, d2)
        put(out, at, a0, a1, a2)
        put(out, at + w, b0, b1, b2)
        put(out, at + 2 * w, c0, c1, c2)
        put(out, at + 3 * w, d0, d1, d2)
        x += 4
        at += 4 * w
    while x < e:
        a0, a1, a2 = mul(load(out, at), f0), mul(load(out, at + step), f1), mul(load(out, at + 2 * step), f2)
        for j in range(n):
            one, r = splat(v, j * v_step + x), p_at + j * p_step
            a0, a1, a2 = fma(one, load(p, r), a0), fma(one, load(p, r + step), a1), fma(one, load(p, r + 2 * step), a2)
        put(out, at, a0, a1, a2)
        x += 1
        at += w


@njit(error_model="numpy", cache=True)
def hide(s, s_at, s_step, j, n, first, last, at, top, top_at):
    """n rows of scores, of keys j, j + 1, ...: those outside a lane's [first, last) become -inf; top is raised to the others."""
    step = lanes(s)
    for v in range(VECTORS):
        low, high, most = load(first, at + v * step), load(last, at + v * step), load(top, top_at + v * step)
        for r in range(n):
            place = s_at + r * s_step + v * step
            x = between(load(s, place), fill(s, j + r), low, high)
            store(s, place, x)
            most = larger(most, x)
        store(top, top_at + v * step, most)


@njit(error_model="numpy", cache=True)
def cover(s, s_at, s_step, n, hidden, hidden_at):
    """n rows of scores become -inf where `hidden`, rows of a panel, is -inf."""
    step, w = lanes(s), width(s)
    for r in range(n):
        for c in range(0, w, step):
            at = s_at + r * s_step + c
            store(s, at, plus_unless_hidden(load(s, at), load(hidden, hidden_at + r * w + c)))


@njit(error_model="numpy", cache=True)
def fold(s, s_at, s_step, n, top, top_at):
    """top is raised to every one of n rows."""
    step = lanes(s)
    for v in range(VECTORS):
        most = load(top, top_at + v * step)
        for r in range(n):
            most = larger(most, load(s, s_at + r * s_step + v * step))
        store(top, top_at + v * step, most)


@njit(error_model="numpy", cache=True)
def tanh(x, a):
    """Hyperbolic tangent of a vector of a's elements, within 4 units roundoff (tests/test_simd.py).

    Below 5/8 it is x + x**3 `tanh_ratio`(x**2), above 1 - 2 / (exp(2 |x|) + 1).
    """
    size = absolute(x)
    one, two = fill(a, 1.0), fill(a, 2.0)
    large = sub(one, div(two, add(exp2(mul(size, fill(a, 2.0 * LOG2_E))), one)))
    z = mul(x, x)
    small = fma(mul(size, z), tanh_ratio(z), size)
    return with_sign(where_less(size, fill(a, 0.625), small, large), x)


@njit(error_model="numpy", cache=True)
def soft_cap(s, s_at, s_step, n, scale, cap):
    """s = cap * tanh(scale * s / cap); without a cap (0) only the scale."""
    step, w = lanes(s), width(s)
    factor, limit = fill(s, scale), fill(s, cap)
    for r in range(n):
        for at in range(s_at + r * s_step, s_at + r * s_step + w, step):
            x = mul(load(s, at), factor)
            if cap > 0.0:
                x = mul(limit, tanh(div(x, limit), s))
            store(s, at, x)


@njit(error_model="numpy", cache=True)
def add_bias(s, s_at, s_step, n, factor, rows, lane, x, same, space, top, top_at, raises):
    """Row r of s = factor * s + element x + r of each lane's row of a bias, or with `same` element x; -inf hides whatever the score was.

    rows[lane + l] is the address of the row of lane l, and `space` room for a vector.  With `raises`, top is raised to each row.
    """
    step, w, c = lanes(s), width(s), fill(s, factor)
    for first in range(0, w, step):
        whole = 0 if same else n // step * step
        most = load(top, top_at + first)
        for r in range(0, whole, step):
            most = add_transposed(rows, lane + first, x + r, s, s_at + r * s_step + first, s_step, c, most)
        if same:
            gather(s, rows, lane + first, x, space)
        for r in range(whole, n):
            if not same:
                gather(s, rows, lane + first, x + r, space)
            at = s_at + r * s_step + first
            y = fma_unless_hidden(load(s, at), c, load(space, 0))
            store(s, at, y)
            most = larger(most, y)
        if raises:
            store(top, top_at + first, most)


@njit(error_model="numpy", cache=True)
def read_mask(rows, lane, x, n, same, hidden):
    """n elements from x on of each lane's row of booleans, or with `same` element x for all n: 0 if none is true, 2 if all are, 1 otherwise.

    Only in the last case row r of `hidden` becomes 0 where a lane's element x + r is true and -inf where it is not.
    """
    step, w = lanes(hidden), width(hidden)
    some, every = np.uint8(0), np.uint8(1)
    for c in range(lane, lane + w):
        place = rows[c] + x
        for r in range(1 if same else n):
            seen = byte_at(place + r)
            some |= seen
            every &= seen
    if some == 0 or every == 1:
        return 2 * every
    whole = 0 if same else n // step * step
    for first in range(0, w, step):
        for r in range(0, whole, step):
            transpose_hidden_in(rows, lane + first, x + r, hidden, r * w + first, w)
    for r in range(whole, n):
        for c in range(w):
            hidden[r * w + c] = 0.0 if byte_at(rows[lane + c] + x + (0 if same else r)) else -np.inf
    return 1


@njit(error_model="numpy", cache=True)
def skipping_values(v, v_step, n, e, p, p_at, p_step, marks, mark, out, out_at, shrink, shrink_at):
    """`values`, for tiles that hold infinities or NaN: where `marks`, laid out like p, equals `mark`, a lane does not read the key."""
    step, w = lanes(p), width(p)
    hidden = fill(p, mark)
    for x in range(e):
        at = out_at + x * w
        for lane in range(0, w, step):
            gathered = mul(load(out, at + lane), load(shrink, shrink_at + lane))
            for j in range(n):
                place = p_at + j * p_step + lane
                gathered = where_equal(load(marks, place), hidden, gathered, fma(splat(v, j * v_step + x), load(p, place), gathered))
            store(out, at + lane, gathered)


@njit(error_model="numpy", cache=True)
def slopes(s, s_at, s_step, n, cap, out, out_at):
    """Row r of out = slope of the soft-cap at scores that were capped already: 1 - (s / cap)**2; without a cap (0) it is 1."""
    step, w = lanes(s), width(s)
    one, minus, inverse = fill(s, 1.0), fill(s, -1.0), fill(s, 1.0 / cap if cap > 0.0 else 0.0)
    for r in range(n):
        for c in range(0, w, step):
            t = mul(load(s, s_at + r * s_step + c), inverse)
            store(out, out_at + r * s_step + c, fma(mul(minus, t), t, one))


@njit(error_model="numpy", cache=True)
def outer(s, s_at, s_step, first_row, n, rows, rows_step, m, out, out_at, out_step, e):
    """Row j of out += sum over m rows r of s[j, r] * rows[first_row + r], for n rows j of e channels, all padded to whole vectors."""
    step = lanes(s)
    x = 0
    while x < e:
        three = x + 2 * step < e
        j = 0
        while j + 4 <= n:
            o0 = out_at + j * out_step + x
            o1, o2, o3 = o0 + out_step, o0 + 2 * out_step, o0 + 3 * out_step
            s0 = s_at + j * s_step
            s1, s2, s3 = s0 + s_step, s0 + 2 * s_step, s0 + 3 * s_step
            if three:
                a0, a1, a2 = load(out, o0), load(out, o0 + step), load(out, o0 + 2 * step)
                b0, b1, b2 = load(out, o1), load(out, o1 + step), load(out, o1 + 2 * step)
                c0, c1, c2 = load(out, o2), load(out, o2 + step), load(out, o2 + 2 * step)
                d0, d1, d2 = load(out, o3), load(out, o3 + step), load(out, o3 + 2 * step)
                for r in range(m):
                    at = (first_row + r) * rows_step + x
                    r0, r1, r2 = load(rows, at), load(rows, at + step), load(rows, at + 2 * step)
                    one = splat(s, s0 + r)
                    a0, a1, a2 = fma(one, r0, a0), fma(one, r1, a1), fma(one, r2, a2)
                    one = splat(s, s1 + r)
                    b0, b1, b2 = fma(one, r0, b0), fma(one, r1, b1), fma(one, r2, b2)
                    one = splat(s, s2 + r)
                    c0, c1, c2 = fma(one, r0, c0), fma(one, r1, c1), fma(one, r2, c2)
                    one = splat(s, s3 + r)
                    d0, d1, d2 = fma(one, r0, d0), fma(one, r1, d1), fma(one, r2, d2)
                put(out, o0, a0, a1, a2)
                put(out, o1, b0, b1, b2)
                put(out, o2, c0, c1, c2)
                put(out, o3, d0, d1, d2)
            else:
                a0, b0, c0, d0 = load(out, o0), load(out, o1), load(out, o2), load(out, o3)
                for r in range(m):
                    r0 = load(rows, (first_row + r) * rows_step + x)
                    a0, b0 = fma(splat(s, s0 + r), r0, a0), fma(splat(s, s1 + r), r0, b0)
                    c0, d0 = fma(splat(s, s2 + r), r0, c0), fma(splat(s, s3 + r), r0, d0)
                store(out, o0, a0)
                store(out, o1, b0)
                store(out, o2, c0)
                store(out, o3, d0)
            j += 4
        while j < n:
            for y in range(x, x + (VECTORS * step if three else step), step):
                at = out_at + j * out_step + y
                a0 = load(out, at)
                for r in range(m):
                    a0 = fma(splat(s, s_at + j * s_step + r), load(rows, (first_row + r) * rows_step + y), a0)
                store(out, at, a0)
            j += 1
        x += VECTORS * step if three else step


@njit(error_model="numpy", cache=True)
def multiply(a, b, at, row_step, n):
    """a *= b, for n rows; 0 stays 0 whatever b is."""
    step, w = lanes(a), width(a)
    for r in range(n):
        for place in range(at + r * row_step, at + r * row_step + w, step):
            store(a, place, times_unless_zero(load(a, place), load(b, place)))
