"""Family `scored`, few queries and many keys: a step of generation.  Bound by memory, so keys and values are read once, in order.

A task is a stretch of keys of one sequence and key-value head, for all rows of the head's group (row r is query r // group of head r % group).
Vectors run along the widths of keys and values, and along keys in between.  Stretches have one length whatever the number of threads,
and are merged in order: so are the bits.

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
    exp2,
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
from .stored import PAD, SAME, bytes_of, decode_row, decode_rows, find_keys, point_to
from .tasks import take
from .tiles import BLOCKS_BEFORE, K_ROW, N_K, N_Q, Q_BATCH, Q_ROW, RANGE_AT, Inputs, find_block, mapped, padded, report

STRETCH = 1024  # keys per task
TILE = 64  # keys whose scores, and values, stay in the first-level cache
ROWS = 4  # taken together


class Space(NamedTuple):
    """What a thread needs: queries as rows, what is gathered, scores and a copy of them, a bias, and where keys and values are."""

    queries: Any
    gathered: Any
    s: Any
    kept: Any
    bias: Any
    hidden: Any
    top: Any
    sums: Any
    heads: Any
    numbers: Any
    key_places: Any
    value_places: Any
    next_keys: Any
    next_values: Any
    keys: Any
    values: Any


@njit(error_model="numpy", inline="always")
def workspace(a, how, rows):
    d, e = padded(how.d, a), padded(how.e, a)
    queries, gathered = np.zeros((rows + ROWS) * d, a.dtype), np.zeros((rows + ROWS) * e, a.dtype)
    s, kept, hidden = np.zeros((rows + ROWS) * TILE, a.dtype), np.zeros((rows + ROWS) * TILE, a.dtype), np.zeros((rows + ROWS) * TILE, a.dtype)
    keys = np.empty(TILE * (how.d + PAD) if how.k_code != SAME else 0, a.dtype)
    vals = np.empty(TILE * (how.e + PAD) if how.v_code != SAME else 0, a.dtype)
    heads, numbers = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    one, two, three, four = np.zeros(TILE, np.int64), np.zeros(TILE, np.int64), np.zeros(TILE, np.int64), np.zeros(TILE, np.int64)
    return Space(
        queries, gathered, s, kept, np.empty(TILE + PAD, a.dtype), hidden, np.empty(rows, a.dtype), np.empty(rows, a.dtype), heads, numbers,
        one, two, three, four, keys, vals,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def dot_products(keys, ahead, n, queries, rows, d, s):
    """s[r * TILE + j] = queries[r] . key j, four keys by four rows; queries are rows padded with zeros, `keys` addresses of n keys and more.

    What stands at the addresses `ahead` is called for meanwhile, so that memory does not wait for arithmetic.
    """
    step, size = lanes(s), s.itemsize
    whole, wide = d // step * step, padded(d, s)
    for j in range(0, n, 4):
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        for x in range(0, d * size, 64):
            prefetch_at(ahead[j] + x)
            prefetch_at(ahead[j + 1] + x)
            prefetch_at(ahead[j + 2] + x)
            prefetch_at(ahead[j + 3] + x)
        for r in range(0, rows, ROWS):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = fill(s, 0.0)
            at = r * wide
            for x in range(0, whole, step):
                q0, q1 = load(queries, at + x), load(queries, at + wide + x)
                q2, q3 = load(queries, at + 2 * wide + x), load(queries, at + 3 * wide + x)
                key = load_at(s, k0 + x * size)
                a0, a1, a2, a3 = fma(key, q0, a0), fma(key, q1, a1), fma(key, q2, a2), fma(key, q3, a3)
                key = load_at(s, k1 + x * size)
                b0, b1, b2, b3 = fma(key, q0, b0), fma(key, q1, b1), fma(key, q2, b2), fma(key, q3, b3)
                key = load_at(s, k2 + x * size)
                c0, c1, c2, c3 = fma(key, q0, c0), fma(key, q1, c1), fma(key, q2, c2), fma(key, q3, c3)
                key = load_at(s, k3 + x * size)
                d0, d1, d2, d3 = fma(key, q0, d0), fma(key, q1, d1), fma(key, q2, d2), fma(key, q3, d3)
            if whole < d:
                q0, q1 = load(queries, at + whole), load(queries, at + wide + whole)
                q2, q3 = load(queries, at + 2 * wide + whole), load(queries, at + 3 * wide + whole)
                key = load_part_at(s, k0 + whole * size, d - whole)
                a0, a1, a2, a3 = fma(key, q0, a0), fma(key, q1, a1), fma(key, q2, a2), fma(key, q3, a3)
                key = load_part_at(s, k1 + whole * size, d - whole)
                b0, b1, b2, b3 = fma(key, q0, b0), fma(key, q1, b1), fma(key, q2, b2), fma(key, q3, b3)
                key = load_part_at(s, k2 + whole * size, d - whole)
                c0, c1, c2, c3 = fma(key, q0, c0), fma(key, q1, c1), fma(key, q2, c2), fma(key, q3, c3)
                key = load_part_at(s, k3 + whole * size, d - whole)
                d0, d1, d2, d3 = fma(key, q0, d0), fma(key, q1, d1), fma(key, q2, d2), fma(key, q3, d3)
            store_totals(s, r * TILE + j, TILE, (a0, b0, c0, d0, a1, b1, c1, d1, a2, b2, c2, d2, a3, b3, c3, d3))


@njit(error_model="numpy", cache=True)
def gather_values(values, ahead, n, s, rows, e, out):
    """out[r] += sum over n keys of s[r * TILE + j] * value j, two vectors of four rows at a time; rows of `out` are padded to whole vectors.

    Each step over the keys calls for a part of what stands at the addresses `ahead`.
    """
    step, size = lanes(s), s.itemsize
    whole, wide = e // step * step, padded(e, s)
    for r in range(0, rows, ROWS):
        s0 = r * TILE
        s1, s2, s3 = s0 + TILE, s0 + 2 * TILE, s0 + 3 * TILE
        x = 0
        while x < e:
            o0 = r * wide + x
            o1, o2, o3 = o0 + wide, o0 + 2 * wide, o0 + 3 * wide
            if x + 2 * step <= whole:
                a0, a1, b0, b1 = load(out, o0), load(out, o0 + step), load(out, o1), load(out, o1 + step)
                c0, c1, d0, d1 = load(out, o2), load(out, o2 + step), load(out, o3), load(out, o3 + step)
                for j in range(n):
                    place = values[j] + x * size
                    prefetch_at(ahead[j] + x * size)
                    prefetch_at(ahead[j] + (x + step) * size)
                    v0, v1 = load_at(s, place), load_at(s, place + step * size)
                    p = splat(s, s0 + j)
                    a0, a1 = fma(p, v0, a0), fma(p, v1, a1)
                    p = splat(s, s1 + j)
                    b0, b1 = fma(p, v0, b0), fma(p, v1, b1)
                    p = splat(s, s2 + j)
                    c0, c1 = fma(p, v0, c0), fma(p, v1, c1)
                    p = splat(s, s3 + j)
                    d0, d1 = fma(p, v0, d0), fma(p, v1, d1)
                store(out, o0, a0)
                store(out, o0 + step, a1)
                store(out, o1, b0)
                store(out, o1 + step, b1)
                store(out, o2, c0)
                store(out, o2 + step, c1)
                store(out, o3, d0)
                store(out, o3 + step, d1)
                x += 2 * step
                continue
            a0, b0, c0, d0 = load(out, o0), load(out, o1), load(out, o2), load(out, o3)
            for j in range(n):
                place = values[j] + x * size
                v0 = load_at(s, place) if x < whole else load_part_at(s, place, e - whole)
                a0, b0 = fma(splat(s, s0 + j), v0, a0), fma(splat(s, s1 + j), v0, b0)
                c0, d0 = fma(splat(s, s2 + j), v0, c0), fma(splat(s, s3 + j), v0, d0)
            store(out, o0, a0)
            store(out, o1, b0)
            store(out, o2, c0)
            store(out, o3, d0)
            x += step


@njit(error_model="numpy", cache=True)
def gather_carefully(values, n, s, kept, rows, e, out):
    """`gather_values`, for values that are not all finite: a key whose score was -inf is not read."""
    wide, size = padded(e, s), s.itemsize
    for r in range(rows):
        for j in range(n):
            if kept[r * TILE + j] != -np.inf:
                for x in range(e):
                    out[r * wide + x] += s[r * TILE + j] * number_at(s, values[j] + x * size)


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
            add_bias(inputs, how, b, h, i, start, s, at, n, space.bias)
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
        s[at + max(0, min(n, last - start)) : at + TILE] = -np.inf


@njit(error_model="numpy", cache=True)
def exponentials(s, at, n, r, e, space):
    """A row's weights in place of its scores, and what was gathered before shrunk to their scale."""
    step, wide = lanes(s), padded(e, s)
    most = load(s, at)
    for j in range(step, n, step):
        most = maximum(most, load(s, at + j))
    old = space.top[r]
    new = widest(maximum(most, fill(s, old)))
    if new == -np.inf:
        s[at : at + TILE] = 0.0
        return
    largest, factor, sum_of = fill(s, new), fill(s, LOG2_E), fill(s, 0.0)
    for j in range(0, TILE, step):
        x = exp2(mul(sub(load(s, at + j), largest), factor))
        store(s, at + j, x)
        sum_of = add(sum_of, x)
    if old != new:
        fade = math.exp(old - new)
        space.sums[r] *= fade
        shrink = fill(s, fade)
        for x in range(r * wide, r * wide + wide, step):
            store(space.gathered, x, mul(load(space.gathered, x), shrink))
        space.top[r] = new
    space.sums[r] += total(sum_of)


@njit(error_model="numpy", cache=True)
def find_tile(inputs, how, b, g, row, start, n, keys, values):
    """Addresses of a tile's keys and values, the last repeated up to a multiple of four."""
    find_keys(inputs.k, inputs.pages, how.page_size, b, g, row, start, n, keys)
    find_keys(inputs.v, inputs.pages, how.page_size, b, g, row, start, n, values)
    for j in range(n, (n + 3) // 4 * 4):
        keys[j], values[j] = keys[n - 1], values[n - 1]


@njit(error_model="numpy", inline="always")
def stretch(b, g, c, group, inputs, how, careful, slot, partial, space):
    """One task: partial[slot, row] = (values gathered, largest score, sum of exponentials) of a stretch."""
    sequence, s = inputs.sequences[b], space.s
    n_q, n_keys, d, e = sequence[N_Q], sequence[N_K], how.d, how.e
    rows, wide_d, wide_e = group * n_q, padded(how.d, s), padded(how.e, s)
    for r in range(rows):
        place = address(inputs.q, (sequence[Q_BATCH], g * group + r % group, sequence[Q_ROW] + r // group, 0))
        decode_row(place, how.q_code, inputs.tables, d, space.queries, r * wide_d)
        space.heads[r], space.numbers[r] = g * group + r % group, r // group
    space.queries[rows * wide_d : (rows + ROWS) * wide_d] = 0.0
    space.gathered[: rows * wide_e] = 0.0
    space.top[:rows] = -np.inf
    space.sums[:rows] = 0.0
    low, high = n_keys, 0
    for i in range(n_q):
        low, high = min(low, inputs.first[sequence[RANGE_AT] + i]), max(high, inputs.last[sequence[RANGE_AT] + i])
    low, high = max(low, c * STRETCH), min(high, (c + 1) * STRETCH, n_keys)
    row, keys, vals = sequence[K_ROW], space.key_places, space.value_places
    if low < high:
        find_tile(inputs, how, b, g, row, low, min(TILE, high - low), space.next_keys, space.next_values)
    for start in range(low, high, TILE):
        n = min(TILE, high - start)
        for j in range(TILE):
            keys[j], vals[j] = space.next_keys[j], space.next_values[j]
        if start + TILE < high:
            find_tile(inputs, how, b, g, row, start + TILE, min(TILE, high - start - TILE), space.next_keys, space.next_values)
        if how.mask_mod and mapped(inputs.blocks, how, b, g, group, 0, n_q - 1, start, start + n) == 0:
            continue
        if how.k_code != SAME:
            decode_rows(keys, n, how.k_code, inputs.tables, d, space.keys, d + PAD)
            point_to(space.keys, (n + 3) // 4 * 4, d + PAD, keys)
        dot_products(keys, vals, n, space.queries, rows, d, s)
        finish_scores(inputs, how, b, g, group, rows, start, n, space)
        if careful:
            copy(s, START, space.kept, rows * TILE)
        for r in range(rows):
            exponentials(s, r * TILE, n, r, e, space)
        s[rows * TILE :] = 0.0
        if how.v_code != SAME:
            decode_rows(vals, n, how.v_code, inputs.tables, e, space.values, e + PAD)
            point_to(space.values, n, e + PAD, vals)
        if careful:
            gather_carefully(vals, n, s, space.kept, rows, e, space.gathered)
        else:
            gather_values(vals, space.next_keys, n, s, rows, e, space.gathered)
    finite = True
    for r in range(rows):
        for x in range(e):
            partial[slot, r, x] = space.gathered[r * wide_e + x]
            finite = finite and math.isfinite(space.gathered[r * wide_e + x])
        partial[slot, r, e], partial[slot, r, e + 1] = space.top[r], space.sums[r]
    return finite


@njit(error_model="numpy", cache=True)
def merge(b, g, kv_heads, inputs, partial, out, lse):
    """All stretches of one sequence and key-value head."""
    sequence = inputs.sequences[b]
    e, group = out.shape[3], out.shape[1] // kv_heads
    own = inputs.sequences[b + 1, BLOCKS_BEFORE] - sequence[BLOCKS_BEFORE]
    begin = sequence[BLOCKS_BEFORE] * kv_heads + g * own
    batch, n_q = sequence[Q_BATCH], sequence[N_Q]
    for r in range(group * n_q):
        h, i = g * group + r % group, sequence[Q_ROW] + r // group
        top = inputs.sinks[h]
        for c in range(begin, begin + own):
            if not partial[c, r, e] <= top:  # NaN must win
                top = partial[c, r, e]
        for x in range(e):
            out[batch, h, i, x] = 0.0
        if top == -np.inf:
            lse[batch, h, i] = top
            continue
        sum_of = math.exp(inputs.sinks[h] - top)
        for c in range(begin, begin + own):
            if partial[c, r, e] != -np.inf or math.isnan(top):
                weight = out.dtype.type(math.exp(partial[c, r, e] - top))
                sum_of += weight * partial[c, r, e + 1]
                for x in range(e):
                    out[batch, h, i, x] += weight * partial[c, r, x]
        for x in range(e):
            out[batch, h, i, x] /= sum_of
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
    partial = np.empty((sequences[-1, BLOCKS_BEFORE] * k.shape[1], how.block_rows, how.e + 2), out.dtype)
    take_tasks(inputs, how, partial, out, np.zeros(1, np.int64))
    merge_all(inputs, partial, out, lse)


def decode_parallel(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    partial = np.empty((sequences[-1, BLOCKS_BEFORE] * k.shape[1], how.block_rows, how.e + 2), out.dtype)
    for _ in prange(threads):
        worker(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), how, partial, out, counter)
    merge_all(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), partial, out, lse)
