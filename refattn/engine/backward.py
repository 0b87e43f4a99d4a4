"""Family `scored`, backward: gradients by recomputing weights from lse, in memory proportional to the sequences (arXiv:2307.08691, algorithm 2).

With p_ij = exp(s_ij - lse_i) and delta_i = sum_x d_out_ix out_ix - d_lse_i, each line the mirror of one in forward.py:

    out_i = sum_j p_ij v_j           d_v_j  = sum_i p_ij d_out_i,      d_p_ij = d_out_i . v_j
    p_ij  = exp(s_ij - lse_i)        d_s_ij = p_ij (d_p_ij - delta_i)
    s_ij += bias_ij                  d_bias = d_s
    s     = cap tanh(scale x / cap)  d_x    = d_s scale (1 - (s / cap)**2)
    x_ij  = q_i . k_j                d_q_i  = sum_j d_x_ij k_j,        d_k_j = sum_i d_x_ij q_i

A task is a part of the rows of one batch and key-value head (rows are numbered as in forward.py).  It owns its rows' d_q, and sums d_k and d_v of
its part on its own; the parts are added in order afterwards.  How many parts depends on the shapes only, so the bits do not depend on the
number of threads, and a single long head still has work for all of them.

    1. transpose a block's queries and d_out into panels, and copy them as rows
    2. for every tile of keys, for every panel
         a. scores, modified as in the forward pass; d_p
         b. p and d_s, in place of them
         c. d_q
       then d_v and d_k of the tile, over all rows of the block at once
    3. transpose d_q back
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .forward import PAD, PANELS, blocks, load_panels, rows_per_block, store_panels
from .panels import (
    LOG2_E,
    add_bias,
    hide,
    multiply,
    outer,
    score_gradients,
    scores,
    skipping_values,
    slopes,
    soft_cap,
    values,
    width,
)
from .simd import lanes
from .tasks import take

TILE = 64  # keys per tile: scores and their gradients of a whole block have to stay in the cache
MOST_PARTS = 8  # of a head's rows
ENOUGH_TASKS = 16  # to keep every thread busy


@njit(error_model="numpy", cache=True)
def parts(q, k):
    """How many parts a head's rows are cut into."""
    heads = k.shape[0] * k.shape[1]
    n_blocks = blocks(q.shape[2] * (q.shape[1] // k.shape[1]), rows_per_block(q))
    return max(1, min(n_blocks, MOST_PARTS, (ENOUGH_TASKS + heads - 1) // heads))


@njit(error_model="numpy", cache=True)
def padded(n, a):
    """n elements, rounded up to whole vectors."""
    step = lanes(a)
    return (n + step - 1) // step * step


@njit(error_model="numpy", cache=True)
def copy_rows(a, b, g, group, begin, end, n, target, step):
    """Rows of the block as they are, padded with zeros to `step` elements."""
    for r in range(begin, end):
        at = (r - begin) * step
        for x in range(n):
            target[at + x] = a[b, g * group + r % group, r // group, x]
        target[at + n : at + step] = 0.0


@njit(error_model="numpy", cache=True)
def part(task, n_parts, q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_bias, sums_k, sums_v, deltas, space):
    """One task: a part of the rows of one batch and key-value head."""
    _, heads, n_q, d = q.shape
    kv_heads, n_k, e = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    b, g, c = task // (kv_heads * n_parts), task // n_parts % kv_heads, task % n_parts
    n_rows, w = n_q * group, width(q)
    per_block = PANELS * w
    n_blocks = blocks(n_rows, per_block)
    queries, gradients, d_queries, s, dp, slope, square, stats, bounds, q_table, g_table, out_table, bias_table, q_rows, g_rows, tile, ones = space
    keys, vals = k[b, g], v[b, g]
    wide_d, wide_e, s_step = padded(d, q), padded(e, q), per_block + lanes(q)
    d_k, d_v = sums_k[c, b, g], sums_v[c, b, g]
    d_k[:] = 0.0
    d_v[:] = 0.0
    tile_step = d + PAD
    capped = cap > 0.0
    plain = bias.size == 0 and not capped and scale > 0.0
    factor = scale * LOG2_E if plain else LOG2_E

    for number in range(c * n_blocks // n_parts, (c + 1) * n_blocks // n_parts):
        begin = number * per_block
        end = min(begin + per_block, n_rows)
        n_panels = (end - begin + w - 1) // w
        load_panels(q, b, g, group, begin, end, n_panels, q_table, queries)
        load_panels(d_out, b, g, group, begin, end, n_panels, g_table, gradients)
        copy_rows(q, b, g, group, begin, end, d, q_rows, wide_d)
        copy_rows(d_out, b, g, group, begin, end, e, g_rows, wide_e)
        d_queries[: n_panels * d * w] = 0.0
        for r in range(begin, begin + n_panels * w):
            row, n = min(r, end - 1), r - begin
            h, i = g * group + row % group, row // group
            bounds[0, n], bounds[1, n] = first[i], last[i]
            bias_table[n] = b * bias.strides[0] + h * bias.strides[1] + i * bias.strides[2]
            stats[0, n], stats[1, n] = np.inf, 0.0  # a lane without a row, or a row without keys: p is 0
            if r < end and lse[b, h, i] != -np.inf:
                delta = -d_lse[b, h, i]
                for x in range(e):
                    delta += d_out[b, h, i, x] * out[b, h, i, x]
                stats[0, n], stats[1, n] = lse[b, h, i] / scale if plain else lse[b, h, i], delta
                deltas[b, h, i] = delta

        low, high = n_k, 0
        for n in range(n_panels * w):
            low, high = min(low, int(bounds[0, n])), max(high, int(bounds[1, n]))
        for start in range(low, high, TILE):
            stop = min(start + TILE, high)
            n = stop - start
            odd = 0.0  # stays 0 while all keys are finite
            for j in range(n):
                for x in range(d):
                    value = keys[start + j, x]
                    tile[j * tile_step + x] = value
                    odd += value - value
            from_panel, to_panel = n_panels, 0
            for p in range(n_panels):
                lane = p * w
                some_first, some_last, all_first, all_last = n_k, 0, 0, n_k
                for one in range(lane, lane + w):
                    some_first, all_first = min(some_first, int(bounds[0, one])), max(all_first, int(bounds[0, one]))
                    some_last, all_last = max(some_last, int(bounds[1, one])), min(all_last, int(bounds[1, one]))
                if start >= some_last or stop <= some_first:
                    if to_panel:  # between panels that see the tile: nothing
                        for j in range(n):
                            s[j * s_step + lane : j * s_step + lane + w] = 0.0
                            dp[j * s_step + lane : j * s_step + lane + w] = 0.0
                    continue
                from_panel, to_panel = min(from_panel, p), p + 1
                scores(keys, start, stop, queries, p * d * w, d, s, lane, s_step, stats[2], lane, False)
                if not plain:
                    soft_cap(s, lane, s_step, n, scale, cap)
                    if capped:
                        slopes(s, lane, s_step, n, cap, slope, lane)
                    if bias.size:
                        add_bias(s, lane, s_step, start, n, bias, bias_table, lane, square)
                if start < all_first or stop > all_last:
                    hide(s, lane, s_step, start, n, bounds[0], bounds[1], lane, stats[2], lane)
                scores(vals, start, stop, gradients, p * e * w, e, dp, lane, s_step, stats[2], lane, False)
                score_gradients(s, dp, lane, s_step, n, factor, stats[0], stats[1], lane)
                if d_bias.size:
                    for one in range(lane, min(lane + w, end - begin)):
                        row = begin + one
                        for j in range(n):
                            d_bias[b, g * group + row % group, row // group, start + j] = dp[j * s_step + one]
                if capped:
                    multiply(dp, slope, lane, s_step, n)
                if odd == 0.0:
                    values(tile, tile_step, n, d, dp, lane, s_step, d_queries, p * d * w, ones, 0)
                else:
                    skipping_values(tile, tile_step, n, d, dp, lane, s_step, dp, 0.0, d_queries, p * d * w, ones, 0)
            if to_panel > from_panel:
                at, m = from_panel * w, min(to_panel * w, end - begin) - from_panel * w
                outer(s, at, s_step, at, n, g_rows, wide_e, m, d_v, start * wide_e, wide_e, e)
                outer(dp, at, s_step, at, n, q_rows, wide_d, m, d_k, start * wide_d, wide_d, d)
        for n in range(n_panels * d * w):
            d_queries[n] *= scale
        store_panels(d_queries, d, d_q, b, g, group, begin, end, n_panels, out_table)


@njit(error_model="numpy", cache=True)
def workspace(q, e):
    """What a thread needs for one block at a time."""
    d, w = q.shape[3], width(q)
    n = PANELS * w
    step = n + lanes(q)
    queries, gradients, d_queries = np.empty(n * d, q.dtype), np.empty(n * e, q.dtype), np.empty(n * d, q.dtype)
    s, dp, slope = np.zeros(TILE * step, q.dtype), np.zeros(TILE * step, q.dtype), np.zeros(TILE * step, q.dtype)
    square, stats, bounds = np.empty(lanes(q) * lanes(q), q.dtype), np.full((3, n), -np.inf, q.dtype), np.empty((2, n), q.dtype)
    q_table, g_table, out_table, bias_table = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    q_rows, g_rows, tile = np.empty(n * padded(d, q), q.dtype), np.empty(n * padded(e, q), q.dtype), np.empty(TILE * (d + PAD), q.dtype)
    ones = np.ones(w, q.dtype)
    return queries, gradients, d_queries, s, dp, slope, square, stats, bounds, q_table, g_table, out_table, bias_table, q_rows, g_rows, tile, ones


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_bias, sums_k, sums_v, deltas, counter):
    """Takes tasks until there are none."""
    n_parts = sums_k.shape[0]
    n_tasks = k.shape[0] * k.shape[1] * n_parts
    space = workspace(q, v.shape[3])
    task = take(counter)
    while task < n_tasks:
        part(task, n_parts, q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_bias, sums_k, sums_v, deltas, space)
        task = take(counter)


@njit(error_model="numpy", cache=True)
def collect(sums, scale, target, n):
    """Add the parts in order: target[b, g, j] = scale * sum over parts; heads b * Hkv + g = n, one call each."""
    kv_heads, n_k, d = target.shape[1], target.shape[2], target.shape[3]
    b, g = n // kv_heads, n % kv_heads
    wide = padded(d, target)
    for j in range(n_k):
        for x in range(d):
            total = sums[0, b, g, j * wide + x]
            for c in range(1, sums.shape[0]):
                total += sums[c, b, g, j * wide + x]
            target[b, g, j, x] = total * scale


@njit(error_model="numpy", nogil=True, cache=True)
def partial_sums(q, k, e):
    """Arrays for the parts' sums of d_k and d_v, rows padded to whole vectors."""
    shape = (parts(q, k), k.shape[0], k.shape[1])
    return np.empty((*shape, k.shape[2] * padded(k.shape[3], q)), q.dtype), np.empty((*shape, k.shape[2] * padded(e, q)), q.dtype)


def backward(q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_k, d_v, d_bias, deltas):
    """On this thread."""
    sums_k, sums_v = partial_sums(q, k, v.shape[3])
    worker(q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_bias, sums_k, sums_v, deltas, np.zeros(1, np.int64))
    for n in range(k.shape[0] * k.shape[1]):
        collect(sums_k, scale, d_k, n)
        collect(sums_v, q.dtype.type(1.0), d_v, n)


def backward_parallel(q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_k, d_v, d_bias, deltas, threads):
    """On several threads; the same bits."""
    sums_k, sums_v = partial_sums(q, k, v.shape[3])
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, bias, first, last, scale, cap, out, lse, d_out, d_lse, d_q, d_bias, sums_k, sums_v, deltas, counter)
    for n in prange(k.shape[0] * k.shape[1]):
        collect(sums_k, scale, d_k, n)
        collect(sums_v, q.dtype.type(1.0), d_v, n)
