"""Family `scored`, forward: softmax attention by tiles of keys, with a running maximum (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1).

A task is a block of rows of one batch and key-value head.  The rows of all query heads that share the head are numbered together, query by
query (row r is query r // group of head r % group), so that a group reads each key once and short sequences still fill the lanes.  A
task belongs to one thread from its first operation to its last, and tasks are the same for any number of threads: so are the bits.

    1. transpose the block's queries into panels
    2. for every tile of keys: copy its values to rows that do not collide in the cache, then for every panel
         a. scores, with the maximum of the keys every lane sees; -inf where a lane sees less
         b. exponentials, and what they shrink earlier sums by
         c. values
    3. divide by the sums, with the sink among them; transpose back; lse
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .panels import LOG2_E, add_bias, exponentials, hide, scores, skipping_values, soft_cap, values, width
from .simd import lanes, load, mul, store, transpose_in, transpose_out
from .tasks import take

PANELS = 4  # per block of rows
TILE = 128  # keys per tile
PAD = 16  # elements between a tile's rows, so that rows a power of two apart do not share cache sets


@njit(error_model="numpy", cache=True)
def rows_per_block(a):
    return PANELS * width(a)


@njit(error_model="numpy", cache=True)
def blocks(n_rows, per_block):
    return (n_rows + per_block - 1) // per_block


@njit(error_model="numpy", cache=True)
def find_rows(a, b, g, group, begin, end, n, table):
    """table[r - begin] = bytes from the start of `a` to row r of a batch and key-value head; past the end, to the last row."""
    for r in range(begin, begin + n):
        row = min(r, end - 1)
        table[r - begin] = b * a.strides[0] + (g * group + row % group) * a.strides[1] + row // group * a.strides[2]


@njit(error_model="numpy", cache=True)
def load_panels(a, b, g, group, begin, end, n_panels, table, panels):
    """Rows begin to end of `a`, transposed into panels."""
    step, w, d = lanes(a), width(a), a.shape[3]
    whole = d // step * step
    find_rows(a, b, g, group, begin, end, n_panels * w, table)
    for p in range(n_panels):
        for lane in range(0, w, step):
            for x in range(0, whole, step):
                transpose_in(a, table, p * w + lane, x, panels, (p * d + x) * w + lane, w)
        for lane in range(w if whole < d else 0):
            row = min(begin + p * w + lane, end - 1)
            for x in range(whole, d):
                panels[(p * d + x) * w + lane] = a[b, g * group + row % group, row // group, x]


@njit(error_model="numpy", cache=True)
def store_panels(panels, d, a, b, g, group, begin, end, n_panels, table):
    """The way back."""
    step, w = lanes(a), width(a)
    find_rows(a, b, g, group, begin, end, n_panels * w, table)
    for p in range(n_panels):
        for lane in range(0, w, step):
            number = p * w + lane
            whole = d // step * step if begin + number + step <= end else 0  # a vector of lanes that all have rows
            for x in range(0, whole, step):
                transpose_out(panels, (p * d + x) * w + lane, w, a, table, number, x)
            for r in range(number, min(number + step, end - begin)):
                row = begin + r
                for x in range(whole, d):
                    a[b, g * group + row % group, row // group, x] = panels[(p * d + x) * w + r - p * w]


@njit(error_model="numpy", cache=True)
def block(task, q, k, v, bias, sinks, first, last, scale, cap, out, lse, space):
    """One task; `first` and `last` are each query's range of keys, `bias` has no element where there is none, `cap` is 0 where there is none."""
    _, heads, n_q, d = q.shape
    kv_heads, n_k, e = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    step, w, n_rows = lanes(q), width(q), n_q * group
    per_block = PANELS * w
    n_blocks = blocks(n_rows, per_block)
    b, g = task // (kv_heads * n_blocks), task // n_blocks % kv_heads
    begin = (n_blocks - 1 - task % n_blocks) * per_block  # the longest rows of a causal mask first
    end = min(begin + per_block, n_rows)
    n_panels = (end - begin + w - 1) // w
    queries, outputs, tile_scores, kept, tile_values, square, stats, bounds, table, bias_table = space
    plain = bias.size == 0 and cap == 0.0 and scale > 0.0  # scores are used as they come, their scale folded into the exponential
    keys = k[b, g]

    load_panels(q, b, g, group, begin, end, n_panels, table, queries)
    for r in range(begin, begin + n_panels * w):
        row = min(r, end - 1)  # a lane without a row repeats the last one, and is not written back
        h, i = g * group + row % group, row // group
        bounds[0, r - begin], bounds[1, r - begin] = first[i], last[i]
        bias_table[r - begin] = b * bias.strides[0] + h * bias.strides[1] + i * bias.strides[2]
    outputs[: n_panels * e * w] = 0.0
    stats[0, :] = -np.inf
    stats[1, :] = -np.inf
    stats[2, :] = 0.0

    low, high = n_k, 0
    for r in range(n_panels * w):
        low, high = min(low, int(bounds[0, r])), max(high, int(bounds[1, r]))
    factor = scale * LOG2_E if plain else LOG2_E
    row_step = e + PAD
    for start in range(low, high, TILE):
        stop = min(start + TILE, high)
        odd = 0.0  # stays 0 while all values are finite
        for j in range(start, stop):
            for y in range(e):
                value = v[b, g, j, y]
                tile_values[(j - start) * row_step + y] = value
                odd += value - value
        for p in range(n_panels):
            lane = p * w
            some_first, some_last, all_first, all_last = n_k, 0, 0, n_k  # keys that some lane sees, and that all see
            for one in range(lane, lane + w):
                some_first, all_first = min(some_first, int(bounds[0, one])), max(all_first, int(bounds[0, one]))
                some_last, all_last = max(some_last, int(bounds[1, one])), min(all_last, int(bounds[1, one]))
            here, there = max(start, some_first), min(stop, some_last)
            if here >= there:
                continue
            whole_here = min(max(here, all_first), there)
            whole_there = max(min(there, all_last), whole_here)
            q_at = p * d * w
            n, at, end_at = there - here, (whole_here - here) * w, (whole_there - here) * w
            scores(keys, here, whole_here, queries, q_at, d, tile_scores, 0, w, stats[0], lane, False)
            scores(keys, whole_here, whole_there, queries, q_at, d, tile_scores, at, w, stats[0], lane, plain)
            scores(keys, whole_there, there, queries, q_at, d, tile_scores, end_at, w, stats[0], lane, False)
            if plain:
                hide(tile_scores, 0, w, here, whole_here - here, bounds[0], bounds[1], lane, stats[0], lane)
                hide(tile_scores, end_at, w, whole_there, there - whole_there, bounds[0], bounds[1], lane, stats[0], lane)
            else:
                soft_cap(tile_scores, 0, w, n, scale, cap)
                if bias.size:
                    add_bias(tile_scores, 0, w, here, n, bias, bias_table, lane, square)
                hide(tile_scores, 0, w, here, n, bounds[0], bounds[1], lane, stats[0], lane)
            if odd != 0.0:
                kept[: n * w] = tile_scores[: n * w]  # which keys a lane does not see, once scores are exponentials
            exponentials(tile_scores, 0, n, factor, stats[0], stats[1], stats[2], stats[3], lane)
            seen = tile_values[(here - start) * row_step :]
            if odd == 0.0:
                values(seen, row_step, n, e, tile_scores, 0, w, outputs, p * e * w, stats[3], lane)
            else:
                skipping_values(seen, row_step, n, e, tile_scores, 0, w, kept, -np.inf, outputs, p * e * w, stats[3], lane)

    for r in range(begin, end):
        n = r - begin
        h, i = g * group + r % group, r // group
        top, total = stats[0, n], stats[2, n]
        if plain and top != -np.inf:  # a scale of 0 times -inf would be NaN
            top *= scale
        most = sinks[h] if math.isnan(sinks[h]) else max(top, sinks[h])
        if most == -np.inf:  # sees nothing
            stats[3, n] = 0.0
            lse[b, h, i] = -np.inf
            continue
        fade = math.exp(top - most)
        total = total * fade + math.exp(sinks[h] - most)
        stats[3, n] = fade / total if top != -np.inf else 0.0
        lse[b, h, i] = most + math.log(total)
    for p in range(n_panels):
        for x in range(e):
            for lane in range(0, w, step):
                at = (p * e + x) * w + lane
                store(outputs, at, mul(load(outputs, at), load(stats, (3, p * w + lane))))
    store_panels(outputs, e, out, b, g, group, begin, end, n_panels, table)


@njit(error_model="numpy", cache=True)
def workspace(q, e):
    """What a thread needs for one block: queries, outputs, a tile's scores, a copy of them, its values, a square, statistics, ranges, rows."""
    d, w, n = q.shape[3], width(q), PANELS * width(q)
    queries, outputs = np.empty(n * d, q.dtype), np.empty(n * e, q.dtype)
    tile_scores, kept, tile_values = np.empty(TILE * w, q.dtype), np.empty(TILE * w, q.dtype), np.empty(TILE * (e + PAD), q.dtype)
    square, stats, bounds = np.empty(lanes(q) * lanes(q), q.dtype), np.empty((4, n), q.dtype), np.empty((2, n), q.dtype)
    return queries, outputs, tile_scores, kept, tile_values, square, stats, bounds, np.empty(n, np.int64), np.empty(n, np.int64)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, bias, sinks, first, last, scale, cap, out, lse, counter, n_tasks):
    """Takes tasks until there are none."""
    space = workspace(q, v.shape[3])
    task = take(counter)
    while task < n_tasks:
        block(task, q, k, v, bias, sinks, first, last, scale, cap, out, lse, space)
        task = take(counter)


@njit(error_model="numpy", nogil=True, cache=True)
def count_tasks(q, k):
    batch, heads, n_q = q.shape[:3]
    kv_heads = k.shape[1]
    return batch * kv_heads * blocks(n_q * (heads // kv_heads), rows_per_block(q))


def forward(q, k, v, bias, sinks, first, last, scale, cap, out, lse):
    """On this thread."""
    worker(q, k, v, bias, sinks, first, last, scale, cap, out, lse, np.zeros(1, np.int64), count_tasks(q, k))


def forward_parallel(q, k, v, bias, sinks, first, last, scale, cap, out, lse, threads):
    """On several threads; the same bits."""
    counter, n_tasks = np.zeros(1, np.int64), count_tasks(q, k)
    for _ in prange(threads):
        worker(q, k, v, bias, sinks, first, last, scale, cap, out, lse, counter, n_tasks)
