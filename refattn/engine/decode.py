"""Family `scored`, few queries and many keys: a step of generation.  Bound by memory, so keys and values are read once, in order.

A task is a stretch of keys of one sequence and key-value head, for all rows of the head's group (row r is query r // group of head r % group).
Vectors run along the widths of keys and values, and along keys in between.  Stretches have one length whatever the number of threads,
and are merged in order: so are the bits.

Memory is read at its pace only if it never waits for arithmetic: rows are called for ahead, in every loop that reads them.  Calls are
hints that a processor with many under way may drop: every row is called into the second-level cache, where more may be under way than into the first,
and three times, from far, half as far and a quarter.  A tile is long, so that there are few turns from keys to values.

    1. for every tile of keys: scores of every row; scale, soft-cap, bias, hidden keys to -inf; exponentials; values
    2. merge the stretches by their maxima and sums; the sink; lse
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .panels import LOG2_E, START, copy, tanh
from .references import hold, lent
from .simd import (
    add,
    address,
    byte_at,
    div,
    element_bytes,
    exp2_below,
    fill,
    fma,
    lanes,
    load,
    load_at,
    load_part_at,
    maximum,
    mul,
    number_at,
    plus_unless_hidden,
    prefetch_at,
    splat,
    store,
    store_totals,
    sub,
    total,
    widest,
)
from .stages import call
from .stored import PAD, SAME, bytes_of, call_for, decode_row, find_keys, point_to
from .tasks import take
from .tiles import BLOCKS_BEFORE, K_ROW, N_K, N_Q, Q_BATCH, Q_ROW, RANGE_AT, Inputs, find_block, mapped, padded, report

STRETCH = 1024  # keys per task
TILE = 512  # keys whose scores are finished together
MAPPED_TILE = 64  # where a map may hide whole tiles
PART = 32  # decoded keys, or values, that stay in the first-level cache
SHORT = 8  # keys whose values are gathered for some channels before others
ROWS = 4  # queries taken together
AHEAD = 18432  # bytes called for before they are read, and
MOST_AHEAD = 128  # keys


class Space(NamedTuple):
    """What a thread needs.

    Queries and what is gathered (`vector_of`), scores and a copy of them, one decoded row, what a function hides, statistics, heads and numbers of
    queries; addresses of keys and values, a part of them decoded, and the addresses of that.
    """

    queries: Any
    gathered: Any
    s: Any
    kept: Any
    row: Any
    hidden: Any
    top: Any
    tops: Any
    sums: Any
    heads: Any
    numbers: Any
    key_places: Any
    value_places: Any
    keys: Any
    values: Any
    key_rows: Any
    value_rows: Any


@njit(error_model="numpy", cache=True)
def room(n, a):
    """Room for n elements that begins where a line of the cache does: a vector that lies across two is read twice."""
    line = 64 // element_bytes(a)
    space = np.empty(n + line, a.dtype)
    first = -(address(space, 0) // element_bytes(a)) % line
    return space[first : first + n]


@njit(error_model="numpy", inline="always")
def workspace(a, how, rows):
    d, e = padded(how.d, a), padded(how.e, a)
    queries, gathered, s = room((rows + ROWS) * d, a), room((rows + ROWS) * e, a), room((rows + ROWS) * TILE, a)
    kept, hidden = np.empty(rows * TILE, a.dtype), np.empty(rows * TILE, a.dtype)
    keys, vals = room(PART * (how.d + PAD) if how.k_code != SAME else 0, a), room(PART * (how.e + PAD) if how.v_code != SAME else 0, a)
    vals[:] = 0.0  # the last run of a part may be longer than the part
    key_rows, value_rows = np.empty(PART, np.int64), np.empty(PART, np.int64)
    point_to(keys, PART, how.d + PAD, key_rows)
    point_to(vals, PART, how.e + PAD, value_rows)
    heads, numbers = np.empty(rows, np.int32), np.empty(rows, np.int32)
    top, tops, sums = np.empty(rows, a.dtype), np.empty(rows, a.dtype), np.empty(rows, a.dtype)
    most = TILE + SHORT + MOST_AHEAD
    return Space(
        queries, gathered, s, kept, np.empty(max(TILE, d) + PAD, a.dtype), hidden, top, tops, sums, heads, numbers,
        np.empty(most, np.int64), np.empty(most, np.int64), keys, vals, key_rows, value_rows,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def vector_of(r, x, wide, a):
    """Where the vector of channels x, x + 1, ... of row r stands among rows taken together: beside those of the other rows."""
    return (r // ROWS * wide + x) * ROWS + r % ROWS * lanes(a)


@njit(error_model="numpy", cache=True)
def four_of(places, n):
    """Addresses n to n + 3 of a table."""
    at = address(places, n)
    return number_at(places, at), number_at(places, at + 8), number_at(places, at + 16), number_at(places, at + 24)


@njit(error_model="numpy", cache=True)
def prefetch_thrice(far, half, near, offset):
    """Call for a line of three rows."""
    prefetch_at(far + offset)
    prefetch_at(half + offset)
    prefetch_at(near + offset)


@njit(error_model="numpy", cache=True)
def dot_products(keys, first, ahead, n, queries, rows, d, s, at):
    """s[r * TILE + at + j] = query r . key first + j, four keys by four rows, for n keys and up to three more; `keys` are addresses.

    Queries stand as `vector_of` says, padded with zeros.  Keys up to so many ahead are called for.
    """
    step, size = lanes(s), element_bytes(s)
    whole, wide = d // step * step, padded(d, s)
    for j in range(0, n, 4):
        k0, k1, k2, k3 = four_of(keys, first + j)
        f0, f1, f2, f3 = four_of(keys, first + j + ahead)
        h0, h1, h2, h3 = four_of(keys, first + j + ahead // 2)
        n0, n1, n2, n3 = four_of(keys, first + j + ahead // 4)
        for r in range(0, rows, ROWS):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = fill(s, 0.0)
            row = address(queries, r * wide)
            for x in range(0, whole, step):
                q = row + ROWS * x * size
                q0, q1 = load_at(s, q), load_at(s, q + step * size)
                q2, q3 = load_at(s, q + 2 * step * size), load_at(s, q + 3 * step * size)
                prefetch_thrice(f0, h0, n0, x * size)
                one = load_at(s, k0 + x * size)
                a0, a1, a2, a3 = fma(one, q0, a0), fma(one, q1, a1), fma(one, q2, a2), fma(one, q3, a3)
                prefetch_thrice(f1, h1, n1, x * size)
                one = load_at(s, k1 + x * size)
                b0, b1, b2, b3 = fma(one, q0, b0), fma(one, q1, b1), fma(one, q2, b2), fma(one, q3, b3)
                prefetch_thrice(f2, h2, n2, x * size)
                one = load_at(s, k2 + x * size)
                c0, c1, c2, c3 = fma(one, q0, c0), fma(one, q1, c1), fma(one, q2, c2), fma(one, q3, c3)
                prefetch_thrice(f3, h3, n3, x * size)
                one = load_at(s, k3 + x * size)
                d0, d1, d2, d3 = fma(one, q0, d0), fma(one, q1, d1), fma(one, q2, d2), fma(one, q3, d3)
            if whole < d:
                q = row + ROWS * whole * size
                q0, q1 = load_at(s, q), load_at(s, q + step * size)
                q2, q3 = load_at(s, q + 2 * step * size), load_at(s, q + 3 * step * size)
                one = load_part_at(s, k0 + whole * size, d - whole)
                a0, a1, a2, a3 = fma(one, q0, a0), fma(one, q1, a1), fma(one, q2, a2), fma(one, q3, a3)
                one = load_part_at(s, k1 + whole * size, d - whole)
                b0, b1, b2, b3 = fma(one, q0, b0), fma(one, q1, b1), fma(one, q2, b2), fma(one, q3, b3)
                one = load_part_at(s, k2 + whole * size, d - whole)
                c0, c1, c2, c3 = fma(one, q0, c0), fma(one, q1, c1), fma(one, q2, c2), fma(one, q3, c3)
                one = load_part_at(s, k3 + whole * size, d - whole)
                d0, d1, d2, d3 = fma(one, q0, d0), fma(one, q1, d1), fma(one, q2, d2), fma(one, q3, d3)
            store_totals(s, r * TILE + at + j, TILE, (a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3))


@njit(error_model="numpy", cache=True)
def gather_values(values, first, ahead, n, s, at, rows, e, out):
    """out += sum over n keys of s[r * TILE + at + j] * value first + j, four rows at a time; `values` are addresses, `out` as `vector_of` says.

    A short run of keys is read for four vectors of channels, then for the next.  The last run is whole, where s is 0 past n.  Values up to so many
    ahead are called for.
    """
    step, size = lanes(s), element_bytes(s)
    whole, wide = e // step * step, padded(e, s)
    far_by, half_by, near_by = 8 * ahead, 8 * (ahead // 2), 8 * (ahead // 4)
    for begin in range(0, n, SHORT):
        for r in range(0, rows, ROWS):
            s0 = r * TILE + at
            s1, s2, s3 = s0 + TILE, s0 + 2 * TILE, s0 + 3 * TILE
            x = 0
            while x + 4 * step <= whole:
                o0 = (r * wide) + ROWS * x
                o1, o2, o3 = o0 + ROWS * step, o0 + 2 * ROWS * step, o0 + 3 * ROWS * step
                a0, b0, c0, d0 = load(out, o0), load(out, o0 + step), load(out, o0 + 2 * step), load(out, o0 + 3 * step)
                a1, b1, c1, d1 = load(out, o1), load(out, o1 + step), load(out, o1 + 2 * step), load(out, o1 + 3 * step)
                a2, b2, c2, d2 = load(out, o2), load(out, o2 + step), load(out, o2 + 2 * step), load(out, o2 + 3 * step)
                a3, b3, c3, d3 = load(out, o3), load(out, o3 + step), load(out, o3 + 2 * step), load(out, o3 + 3 * step)
                value = address(values, first + begin)
                for j in range(begin, begin + SHORT):  # a number that the compiler knows
                    place = number_at(values, value) + x * size
                    far, half, near = number_at(values, value + far_by), number_at(values, value + half_by), number_at(values, value + near_by)
                    v0, v1 = load_at(s, place), load_at(s, place + step * size)
                    v2, v3 = load_at(s, place + 2 * step * size), load_at(s, place + 3 * step * size)
                    prefetch_thrice(far, half, near, x * size)
                    p = splat(s, s0 + j)
                    a0, a1, a2, a3 = fma(p, v0, a0), fma(p, v1, a1), fma(p, v2, a2), fma(p, v3, a3)
                    prefetch_thrice(far, half, near, (x + step) * size)
                    p = splat(s, s1 + j)
                    b0, b1, b2, b3 = fma(p, v0, b0), fma(p, v1, b1), fma(p, v2, b2), fma(p, v3, b3)
                    prefetch_thrice(far, half, near, (x + 2 * step) * size)
                    p = splat(s, s2 + j)
                    c0, c1, c2, c3 = fma(p, v0, c0), fma(p, v1, c1), fma(p, v2, c2), fma(p, v3, c3)
                    prefetch_thrice(far, half, near, (x + 3 * step) * size)
                    p = splat(s, s3 + j)
                    d0, d1, d2, d3 = fma(p, v0, d0), fma(p, v1, d1), fma(p, v2, d2), fma(p, v3, d3)
                    value += 8
                put_four(out, o0, a0, b0, c0, d0)
                put_four(out, o1, a1, b1, c1, d1)
                put_four(out, o2, a2, b2, c2, d2)
                put_four(out, o3, a3, b3, c3, d3)
                x += 4 * step
            while x < e:
                o0 = r * wide + ROWS * x
                a0, b0, c0, d0 = load(out, o0), load(out, o0 + step), load(out, o0 + 2 * step), load(out, o0 + 3 * step)
                value = address(values, first + begin)
                for j in range(begin, begin + SHORT):
                    place = number_at(values, value) + x * size
                    far, half, near = number_at(values, value + far_by), number_at(values, value + half_by), number_at(values, value + near_by)
                    prefetch_thrice(far, half, near, x * size)
                    v0 = load_at(s, place) if x < whole else load_part_at(s, place, e - whole)
                    a0, b0 = fma(splat(s, s0 + j), v0, a0), fma(splat(s, s1 + j), v0, b0)
                    c0, d0 = fma(splat(s, s2 + j), v0, c0), fma(splat(s, s3 + j), v0, d0)
                    value += 8
                put_four(out, o0, a0, b0, c0, d0)
                x += step


@njit(error_model="numpy", cache=True)
def put_four(a, at, x, y, z, t):
    """Store four vectors."""
    step = lanes(a)
    store(a, at, x)
    store(a, at + step, y)
    store(a, at + 2 * step, z)
    store(a, at + 3 * step, t)


@njit(error_model="numpy", cache=True)
def gather_carefully(values, first, n, s, kept, at, rows, e, out):
    """`gather_values`, for values that are not all finite: a key whose score was -inf is not read."""
    wide, step, size = padded(e, s), lanes(s), element_bytes(s)
    for r in range(rows):
        for j in range(n):
            here = r * TILE + at + j
            if kept[here] != -np.inf:
                for x in range(e):
                    out[vector_of(r, x // step * step, wide, s) + x % step] += s[here] * number_at(s, values[first + j] + x * size)


@njit(error_model="numpy", cache=True)
def ends(n, s):
    """Where the last four vectors of n scores end."""
    step = 4 * lanes(s)
    return (n + step - 1) // step * step


@njit(error_model="numpy", cache=True)
def scale_and_cap(s, at, n, scale, cap):
    """A row's scores scaled and soft-capped."""
    step = lanes(s)
    factor, limit = fill(s, scale), fill(s, cap)
    for c in range(at, at + n, step):
        x = mul(load(s, c), factor)
        if cap > 0.0:
            x = mul(limit, tanh(div(x, limit), s))
        store(s, c, x)


@njit(error_model="numpy", cache=True)
def add_bias(inputs, how, b, h, i, j, s, at, n, row):
    """The bias of keys j, j + 1, ... added to a row's scores."""
    step = lanes(s)
    if how.same_bias:
        decode_row(address(inputs.bias, (b, h, i, 0)), how.bias_code, inputs.tables, 1, row, 0)
        row[:n] = row[0]
    else:
        decode_row(address(inputs.bias, (b, h, i, j * bytes_of(how.bias_code, s))), how.bias_code, inputs.tables, n, row, 0)
    for c in range(0, n, step):
        store(s, at + c, plus_unless_hidden(load(s, at + c), load(row, c)))


@njit(error_model="numpy", inline="always")
def finish_scores(inputs, how, b, g, group, rows, start, n, space):
    """Raw scores of a tile scaled, capped, modified by the user's functions, biased, and hidden where a row does not see a key."""
    s, sequence = space.s, inputs.sequences[b]
    heads, queries = address(space.heads, 0), address(space.numbers, 0)
    for r in range(rows):
        scale_and_cap(s, r * TILE, n, how.scale, how.cap)
    if how.score_mod:
        report(how, call(how.score_mod, address(s, 0), TILE, rows, start, b, heads, queries, n, how.score_aux))
    if how.mask_mod:
        report(how, call(how.mask_mod, address(space.hidden, 0), TILE, rows, start, b, heads, queries, n, how.mask_aux))
    for r in range(rows):
        h, i, at = g * group + r % group, r // group, r * TILE
        if inputs.bias.size:
            add_bias(inputs, how, b, h, i, start, s, at, n, space.row)
        if how.mask_mod:
            for c in range(at, at + n):
                if space.hidden[c] != 0.0:
                    s[c] = -np.inf
        if inputs.mask.size:
            place = address(inputs.mask, (b, h, i, 0 if how.same_mask else start))
            for c in range(n):
                if not byte_at(place + (0 if how.same_mask else c)):
                    s[at + c] = -np.inf
        first, last = inputs.first[sequence[RANGE_AT] + i], inputs.last[sequence[RANGE_AT] + i]
        s[at : at + max(0, min(n, first - start))] = -np.inf
        s[at + max(0, min(n, last - start)) : at + ends(n, s)] = -np.inf


@njit(error_model="numpy", cache=True)
def raise_tops(s, rows, n, top, tops):
    """tops[r] = the larger of top[r] and a row's n scores."""
    step, end = lanes(s), ends(n, s)
    for r in range(rows):
        m0 = m1 = m2 = m3 = fill(s, top[r])
        for j in range(r * TILE, r * TILE + end, 4 * step):
            m0, m1 = maximum(m0, load(s, j)), maximum(m1, load(s, j + step))
            m2, m3 = maximum(m2, load(s, j + 2 * step)), maximum(m3, load(s, j + 3 * step))
        tops[r] = widest(maximum(maximum(m0, m1), maximum(m2, m3)))


@njit(error_model="numpy", cache=True)
def exponentials(s, rows, n, e, top, tops, sums, gathered):
    """Weights in place of scores, whose tops are to become `tops`, and what was gathered before shrunk to their scale."""
    step, wide, end = lanes(s), padded(e, s), ends(n, s)
    factor = fill(s, LOG2_E)
    for r in range(rows):
        at, old, new = r * TILE, top[r], tops[r]
        if new == -np.inf:
            s[at : at + end] = 0.0
            continue
        largest, sum_of = fill(s, new), fill(s, 0.0)
        for j in range(at, at + end, step):
            x = exp2_below(mul(sub(load(s, j), largest), factor))
            store(s, j, x)
            sum_of = add(sum_of, x)
        if old != new:
            fade = math.exp(old - new)
            sums[r] *= fade
            shrink = fill(s, fade)
            for x in range(0, wide, step):
                place = vector_of(r, x, wide, s)
                store(gathered, place, mul(load(gathered, place), shrink))
            top[r] = new
        sums[r] += total(sum_of)


@njit(error_model="numpy", cache=True)
def find_places(x, pages, page_size, b, g, row, first, last, n, places):
    """Addresses of n keys from `first` on, of which the one before `last` stands for those that there are not."""
    found = min(n, last - first)
    find_keys(x, pages, page_size, b, g, row, first, found, places)
    for j in range(found, n):
        places[j] = places[found - 1]


@njit(error_model="numpy", cache=True)
def decode_part(places, first, ahead, n, code, tables, d, target):
    """Rows first, first + 1, ... of a table of addresses in the kernel's format; rows that many later are called for."""
    width = d * bytes_of(code, target)
    for j in range(first, first + n):
        for distance in (ahead, ahead // 2, ahead // 4):
            call_for(places[j + distance], width)
        decode_row(places[j], code, tables, d, target, (j - first) * (d + PAD))


@njit(error_model="numpy", cache=True)
def rows_ahead(width):
    """How many rows of so many bytes to call for before they are read: about 20 KiB, several times what is under way from memory at any time."""
    return min(4 + AHEAD // width, MOST_AHEAD)


@njit(error_model="numpy", inline="always")
def stretch(b, g, c, group, inputs, how, careful, slot, partial, space):
    """One task: partial[slot, row] = (values gathered, padded; largest score; sum of exponentials) of a stretch; returns whether all are finite."""
    sequence, s = inputs.sequences[b], space.s
    n_q, n_keys, d, e = sequence[N_Q], sequence[N_K], how.d, how.e
    rows, wide_d, wide_e = group * n_q, padded(how.d, s), padded(how.e, s)
    padded_rows = (rows + ROWS - 1) // ROWS * ROWS
    for r in range(rows):
        place = address(inputs.q, (sequence[Q_BATCH], g * group + r % group, sequence[Q_ROW] + r // group, 0))
        decode_row(place, how.q_code, inputs.tables, d, space.row, 0)
        for x in range(0, wide_d, lanes(s)):
            store(space.queries, vector_of(r, x, wide_d, s), load(space.row, x))
        space.heads[r], space.numbers[r] = g * group + r % group, r // group
    space.gathered[: padded_rows * wide_e] = 0.0
    space.top[:rows] = -np.inf
    space.sums[:rows] = 0.0
    low, high = n_keys, 0
    for i in range(n_q):
        low, high = min(low, inputs.first[sequence[RANGE_AT] + i]), max(high, inputs.last[sequence[RANGE_AT] + i])
    low, high = max(low, c * STRETCH), min(high, (c + 1) * STRETCH, n_keys)
    row, k_bytes, v_bytes = sequence[K_ROW], bytes_of(how.k_code, s), bytes_of(how.v_code, s)
    k_ahead, v_ahead = rows_ahead(d * k_bytes), rows_ahead(e * v_bytes)
    tile = MAPPED_TILE if inputs.blocks.size else TILE
    for start in range(low, high, tile):
        n = min(tile, high - start)
        if how.mask_mod and mapped(inputs.blocks, how, b, g, group, 0, n_q - 1, start, start + n) == 0:
            continue
        places = space.key_places
        find_places(inputs.k, inputs.pages, how.page_size, b, g, row, start, n_keys, n + SHORT + k_ahead, places)
        if how.k_code == SAME:
            dot_products(places, START, k_ahead, n, space.queries, rows, d, s, START)
        for part in range(0, n if how.k_code != SAME else 0, PART):
            m = min(PART, n - part)
            decode_part(places, part, k_ahead, m, how.k_code, inputs.tables, d, space.keys)
            dot_products(space.key_rows, START, START, m, space.queries, rows, d, s, part)
        finish_scores(inputs, how, b, g, group, rows, start, n, space)
        if careful:
            copy(s, START, space.kept, rows * TILE)
        places = space.value_places
        find_places(inputs.v, inputs.pages, how.page_size, b, g, row, start, n_keys, n + SHORT + v_ahead, places)
        raise_tops(s, rows, n, space.top, space.tops)
        exponentials(s, rows, n, e, space.top, space.tops, space.sums, space.gathered)
        s[rows * TILE : padded_rows * TILE] = 0.0
        if how.v_code == SAME and not careful:
            gather_values(places, START, v_ahead, n, s, START, rows, e, space.gathered)
            continue
        for part in range(0, n, PART):
            m, own, first = min(PART, n - part), places, part
            if how.v_code != SAME:
                decode_part(places, part, v_ahead, m, how.v_code, inputs.tables, e, space.values)
                own, first = space.value_rows, 0
            if careful:
                gather_carefully(own, first, m, s, space.kept, part, rows, e, space.gathered)
            else:
                gather_values(own, first, START, m, s, part, rows, e, space.gathered)
    odd = fill(s, 0.0)
    for r in range(rows):
        for x in range(0, wide_e, lanes(s)):
            y = load(space.gathered, vector_of(r, x, wide_e, s))
            store(partial, (slot, r, x), y)
            odd = add(odd, sub(y, y))
        partial[slot, r, wide_e], partial[slot, r, wide_e + 1] = space.top[r], space.sums[r]
    return total(odd) == 0.0


@njit(error_model="numpy", cache=True)
def merge(b, g, kv_heads, inputs, partial, out, lse):
    """All stretches of one sequence and key-value head, added in the place of the first."""
    sequence, step = inputs.sequences[b], lanes(partial)
    e, wide, group = out.shape[3], padded(out.shape[3], partial), out.shape[1] // kv_heads
    own = inputs.sequences[b + 1, BLOCKS_BEFORE] - sequence[BLOCKS_BEFORE]
    begin = sequence[BLOCKS_BEFORE] * kv_heads + g * own
    batch, n_q = sequence[Q_BATCH], sequence[N_Q]
    for r in range(group * n_q):
        h, i = g * group + r % group, sequence[Q_ROW] + r // group
        top = inputs.sinks[h]
        for c in range(begin, begin + own):
            if not partial[c, r, wide] <= top:  # NaN must win
                top = partial[c, r, wide]
        if own == 0 or top == -np.inf:
            for x in range(e):
                out[batch, h, i, x] = 0.0
            lse[batch, h, i] = top
            continue
        sum_of = math.exp(inputs.sinks[h] - top)
        for c in range(begin, begin + own):
            weight = out.dtype.type(math.exp(partial[c, r, wide] - top))
            sum_of += weight * partial[c, r, wide + 1]
            times = fill(partial, weight)
            for x in range(0, wide, step):
                y = mul(times, load(partial, (c, r, x)))
                store(partial, (begin, r, x), y if c == begin else add(load(partial, (begin, r, x)), y))
        for x in range(e):
            out[batch, h, i, x] = partial[begin, r, x] / sum_of
        lse[batch, h, i] = top + math.log(sum_of)


@njit(error_model="numpy", inline="always")
def take_tasks(inputs, how, partial, out, counter):
    """Takes tasks until there are none; one whose values are not all finite is done again, carefully."""
    kv_heads = inputs.k.shape[1]
    group = out.shape[1] // kv_heads
    owned = workspace(out, how, partial.shape[1])
    inputs, space, partial, out = lent(inputs), lent(owned), lent(partial), lent(out)
    task, again = take(counter), False
    while task < partial.shape[0]:
        b, g, c, own = find_block(task, kv_heads, inputs.sequences, how.heads_first)
        c = own - 1 - c  # in the order of memory
        slot = inputs.sequences[b, BLOCKS_BEFORE] * kv_heads + g * own + c
        finite = stretch(b, g, c, group, inputs, how, again, slot, partial, space)
        again = not finite and not again
        if not again:
            task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(inputs, how, partial, out, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(inputs, how, partial, out, counter)


@njit(error_model="numpy", nogil=True, cache=True)
def merge_all(inputs, partial, out, lse):
    kv_heads = inputs.k.shape[1]
    for b in range(inputs.sequences.shape[0] - 1):
        for g in range(kv_heads):
            merge(b, g, kv_heads, inputs, partial, out, lse)


def decode(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse):
    """On this thread."""
    inputs = Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks)
    partial = np.empty((sequences[-1, BLOCKS_BEFORE] * k.shape[1], how.block_rows, padded(how.e, out) + 2), out.dtype)
    take_tasks(inputs, how, partial, out, np.zeros(1, np.int64))
    merge_all(inputs, partial, out, lse)


def decode_parallel(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    partial = np.empty((sequences[-1, BLOCKS_BEFORE] * k.shape[1], how.block_rows, padded(how.e, out) + 2), out.dtype)
    for _ in prange(threads):
        worker(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), how, partial, out, counter)
    merge_all(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), partial, out, lse)
