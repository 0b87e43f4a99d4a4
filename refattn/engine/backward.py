"""Family `scored`, backward: gradients by recomputing weights from lse, in memory proportional to the sequences (arXiv:2307.08691, algorithm 2).

Each line is the mirror of one in forward.py; g and delta are those of weights.py, for softmax g_ij = p_ij and delta_i = d_out_i . out_i - d_lse_i:

    out_i = sum_j p_ij v_j           d_v_j  = sum_i p_ij d_out_i,      d_p_ij = d_out_i . v_j
    p_ij  = exp(s_ij - lse_i)        d_s_ij = g_ij (d_p_ij - delta_i)
    s_ij += bias_ij                  d_bias = d_s
    s     = cap tanh(scale x / cap)  d_x    = d_s scale (1 - (s / cap)**2), times the slope of a score_mod
    x_ij  = q_i . k_j                d_q_i  = sum_j d_x_ij k_j,        d_k_j = sum_i d_x_ij q_i

A task is a part of the rows of one sequence and key-value head (rows are numbered as in tiles.py).  It owns its rows' d_q, and sums d_k and d_v of
its part on its own; the parts are added in order afterwards.  How many parts depends on the shapes only, so the bits do not depend on the
number of threads, and a single long head still has work for all of them.  d_bias is summed where it is made: a bias with a row for
each query belongs to the part that has the query, which then takes all heads that share the row, one after another; one without has
sums of its own in every part.

    1. transpose a block's queries and d_out into panels, and copy them as rows
    2. for every tile of keys, for every panel
         a. scores, modified as in the forward pass; d_p
         b. p and d_s, in place of them
         c. d_q
       then d_v and d_k of the tile, over all rows of the block at once
    3. transpose d_q back
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .forward import is_plain
from .panels import LOG2_E, NO, START, cover, hide, multiply, outer, scores, skipping_values, values, width
from .references import hold, lent
from .simd import address
from .stored import PAD, SAME, decode_rows, find_keys, find_rows, point_to
from .tasks import take
from .tiles import (
    K_ROW,
    KEYS_BEFORE,
    N_K,
    N_Q,
    Q_BATCH,
    Q_ROW,
    Inputs,
    block_range,
    fill_lanes,
    load_panels,
    modify,
    new_lanes,
    new_scratch,
    padded,
    panel_range,
    store_panels,
    visible,
)
from .weights import SOFTMAX, SPARSEMAX, score_gradients

PANELS = 4  # per block of rows
TILE = 64  # keys per tile: scores and their gradients of a whole block have to stay in the cache
#: Who sums d_bias: nobody, the part that owns the rows, that part for all heads one after another, or every part on its own.
NO_BIAS, OWN_ROWS, SHARED_ROWS, OWN_SUMS = range(4)


class Results(NamedTuple):
    """What a task writes: d_q, d_bias, sums of d_k and d_v by part, deltas."""

    d_q: Any
    d_bias: Any
    sums_k: Any
    sums_v: Any
    deltas: Any


class Space(NamedTuple):
    """What a thread needs for one block at a time."""

    lanes: Any
    scratch: Any
    g_places: Any
    q_rows: Any
    g_rows: Any
    queries: Any
    gradients: Any
    d_queries: Any
    s: Any
    dp: Any
    slope: Any
    key_places: Any
    value_places: Any
    keys: Any
    values: Any
    statistic: Any
    delta: Any
    top: Any
    ones: Any


@njit(error_model="numpy", inline="always")
def workspace(a, how):
    d, e, w = how.d, how.e, width(a)
    n = PANELS * w
    step = n + PAD
    queries, gradients, d_queries = np.empty(n * d, a.dtype), np.empty(n * e, a.dtype), np.empty(n * d, a.dtype)
    q_rows, g_rows = np.zeros(n * padded(d, a), a.dtype), np.zeros(n * padded(e, a), a.dtype)
    s, dp, slope = np.zeros(TILE * step, a.dtype), np.zeros(TILE * step, a.dtype), np.zeros(TILE * step, a.dtype)
    keys, vals = np.empty(TILE * (d + PAD), a.dtype), np.empty(TILE * (e + PAD) if how.v_code != SAME else 0, a.dtype)
    one, two, three = np.empty(n, np.int64), np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    statistic, delta, top = np.empty(n, a.dtype), np.empty(n, a.dtype), np.full(n, -np.inf, a.dtype)
    return Space(
        new_lanes(a, n), new_scratch(a, TILE), one, q_rows, g_rows, queries, gradients, d_queries, s, dp, slope, two, three, keys, vals,
        statistic, delta, top, np.ones(w, a.dtype),
    )  # fmt: skip


@njit(error_model="numpy", inline="always")
def load_block(inputs, how, d_out, out, lse, d_lse, b, g, group, begin, end, n_panels, space, deltas):
    """Step 1, and each row's statistic and delta."""
    sequence, at = inputs.sequences[b], space.lanes
    w, d, e = width(lse), how.d, how.e
    n_rows, wide_d, wide_e = end - begin, padded(how.d, lse), padded(how.e, lse)
    plain = is_plain(inputs, how)
    fill_lanes(inputs, sequence, b, g, group, begin, end, n_panels * w, at)
    find_rows(d_out, sequence[Q_BATCH], sequence[Q_ROW], g, group, begin, end, n_panels * w, space.g_places)
    decode_rows(at.rows, n_panels * w, how.q_code, inputs.tables, d, space.q_rows, wide_d)
    decode_rows(space.g_places, n_panels * w, how.g_code, inputs.tables, e, space.g_rows, wide_e)
    point_to(space.q_rows, n_panels * w, wide_d, at.rows)
    point_to(space.g_rows, n_panels * w, wide_e, space.g_places)
    load_panels(at.rows, d, n_panels, space.queries)
    load_panels(space.g_places, e, n_panels, space.gradients)
    nothing = np.inf if how.kind == SOFTMAX or how.kind >= SPARSEMAX else 0.0
    for n in range(n_panels * w):
        space.statistic[n], space.delta[n] = nothing, 0.0  # a lane without a row, or a row without keys: p is 0
        if n >= n_rows:
            continue
        h, i = at.heads[n], sequence[Q_ROW] + at.queries[n]
        statistic = lse[sequence[Q_BATCH], h, i]
        if statistic != -np.inf or nothing == 0.0:
            delta = -d_lse[sequence[Q_BATCH], h, i]
            if nothing != 0.0:
                for x in range(e):
                    delta += space.g_rows[n * wide_e + x] * out[sequence[Q_BATCH], h, i, x]
            space.statistic[n], space.delta[n] = statistic / how.scale if plain else statistic, delta
            deltas[sequence[Q_BATCH], h, i] = delta


@njit(error_model="numpy", inline="always")
def panel_gradients(inputs, how, b, n_rows, space, p, state, start, n, ranges, odd, c, d_bias):
    """Steps a to c of one panel: p and d_x in place of scores and d_p, and its part of d_q."""
    at, scratch = space.lanes, space.scratch
    s, dp = space.s, space.dp
    w, d, e = width(s), how.d, how.e
    lane, s_step, tile_step = p * w, PANELS * width(s) + PAD, how.d + PAD
    plain = is_plain(inputs, how)
    sloped = how.cap > 0.0 or how.score_mod != 0
    scores(space.key_places, START, n, space.queries, p * d * w, d, s, lane, s_step, space.top, lane, NO)
    if not plain:
        modify(inputs, how, b, at, lane, s, lane, s_step, start, n, space.slope if sloped else space.slope[:0], state, scratch, space.top, NO)
    elif state == 1:
        cover(s, lane, s_step, n, scratch.hidden, START)
    if start < ranges[2] or start + n > ranges[3]:
        hide(s, lane, s_step, start, n, at.first, at.last, lane, space.top, lane)
    scores(space.value_places, START, n, space.gradients, p * e * w, e, dp, lane, s_step, space.top, lane, NO)
    factor = how.scale * LOG2_E if plain else LOG2_E
    score_gradients(
        s, dp, lane, s_step, n, how.kind, factor, how.shift, how.power, how.divisor, space.statistic, space.delta, lane
    )  # fmt: skip
    if lane + w > n_rows:  # lanes without rows
        first = max(lane, n_rows)
        for r in range(n):
            s[r * s_step + first : r * s_step + lane + w] = 0.0
            dp[r * s_step + first : r * s_step + lane + w] = 0.0
    if how.way != NO_BIAS:
        entry = b if d_bias.shape[1] > 1 else 0
        for one in range(lane, min(lane + w, n_rows)):
            h = at.heads[one] if d_bias.shape[2] > 1 else 0
            i = at.queries[one] if d_bias.shape[3] > 1 else 0
            for r in range(n):
                d_bias[c if how.way == OWN_SUMS else 0, entry, h, i, start + r if d_bias.shape[4] > 1 else 0] += dp[r * s_step + one]
    if sloped:
        multiply(dp, space.slope, lane, s_step, n)
    if odd == 0.0:
        values(space.keys, tile_step, n, d, dp, lane, s_step, space.d_queries, p * d * w, space.ones, START)
    else:
        skipping_values(space.keys, tile_step, n, d, dp, lane, s_step, dp, 0.0, space.d_queries, p * d * w, space.ones, START)


@njit(error_model="numpy", inline="always")
def part(b, g, c, n_parts, inputs, how, d_out, out, lse, d_lse, results, space):
    """A part of the rows of one sequence and key-value head."""
    group = out.shape[1] // inputs.k.shape[1]
    sequence, at = inputs.sequences[b], space.lanes
    n_keys, row, before = sequence[N_K], sequence[K_ROW], sequence[KEYS_BEFORE]
    d, e, w = how.d, how.e, width(lse)
    wide_d, wide_e, s_step = padded(d, lse), padded(e, lse), PANELS * w + PAD
    per_block = how.block_rows
    n_blocks = (sequence[N_Q] * group + per_block - 1) // per_block
    d_k, d_v = results.sums_k[c, g, before * wide_d : (before + n_keys) * wide_d], results.sums_v[c, g, before * wide_e : (before + n_keys) * wide_e]
    d_k[:] = 0.0
    d_v[:] = 0.0
    s, dp = space.s, space.dp
    for number in range(c * n_blocks // n_parts, (c + 1) * n_blocks // n_parts):
        begin = number * per_block
        end = min(begin + per_block, sequence[N_Q] * group)
        n_panels = (end - begin + w - 1) // w
        load_block(inputs, how, d_out, out, lse, d_lse, b, g, group, begin, end, n_panels, space, results.deltas)
        space.d_queries[: n_panels * d * w] = 0.0
        low, high = block_range(at, n_panels * w, n_keys)
        for start in range(low, high, TILE):
            n, odd = min(TILE, high - start), 0.0
            from_panel, to_panel = n_panels, 0
            for p in range(n_panels):
                lane = p * w
                ranges = panel_range(at, lane, w, start, start + n, n_keys)
                state = 0
                if ranges[0] < ranges[1]:
                    state = visible(inputs, how, b, g, group, at, lane, start, start + n, space.scratch)
                if state == 0:
                    if to_panel:  # between panels that see the tile: nothing
                        for r in range(n):
                            s[r * s_step + lane : r * s_step + lane + w] = 0.0
                            dp[r * s_step + lane : r * s_step + lane + w] = 0.0
                    continue
                if to_panel == 0:
                    find_keys(inputs.k, inputs.pages, how.page_size, b, g, row, start, n, space.key_places)
                    odd = decode_rows(space.key_places, n, how.k_code, inputs.tables, d, space.keys, d + PAD)  # 0 while all are finite
                    point_to(space.keys, n, d + PAD, space.key_places)
                    find_keys(inputs.v, inputs.pages, how.page_size, b, g, row, start, n, space.value_places)
                    if how.v_code != SAME:
                        decode_rows(space.value_places, n, how.v_code, inputs.tables, e, space.values, e + PAD)
                        point_to(space.values, n, e + PAD, space.value_places)
                from_panel, to_panel = min(from_panel, p), p + 1
                panel_gradients(inputs, how, b, end - begin, space, p, state, start, n, ranges, odd, c, results.d_bias)
            if to_panel > from_panel:
                lane, m = from_panel * w, min(to_panel * w, end - begin) - from_panel * w
                outer(s, lane, s_step, lane, n, space.g_rows, wide_e, m, d_v, start * wide_e, wide_e, e)
                outer(dp, lane, s_step, lane, n, space.q_rows, wide_d, m, d_k, start * wide_d, wide_d, d)
        for n in range(n_panels * d * w):
            space.d_queries[n] *= how.scale
        for r in range(begin, end):
            at.rows[r - begin] = address(results.d_q, (sequence[Q_BATCH], g * group + r % group, sequence[Q_ROW] + r // group, 0))
        store_panels(space.d_queries, d, end - begin, at.rows)


@njit(error_model="numpy", inline="always")
def take_tasks(inputs, how, d_out, out, lse, d_lse, results, counter):
    """Takes tasks until there are none."""
    n_parts, kv_heads = results.sums_k.shape[0], inputs.k.shape[1]
    pairs = (inputs.sequences.shape[0] - 1) * kv_heads
    shared = how.way == SHARED_ROWS  # a task is then all heads, one after another
    owned = workspace(lse, how)
    inputs, results, space = lent(inputs), lent(results), lent(owned)
    d_out, out, lse, d_lse = lent(d_out), lent(out), lent(lse), lent(d_lse)
    n_tasks = n_parts if shared else pairs * n_parts
    task = take(counter)
    while task < n_tasks:
        for pair in range(pairs) if shared else range(task // n_parts, task // n_parts + 1):
            part(pair // kv_heads, pair % kv_heads, task % n_parts, n_parts, inputs, how, d_out, out, lse, d_lse, results, space)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(inputs, how, d_out, out, lse, d_lse, results, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(inputs, how, d_out, out, lse, d_lse, results, counter)


@njit(error_model="numpy", nogil=True, cache=True)
def collect(sums, scale, target, n):
    """Add the parts in order: target[b, g, j] = scale * sum over parts; heads b * Hkv + g = n, one call each."""
    kv_heads, n_k, d = target.shape[1], target.shape[2], target.shape[3]
    b, g = n // kv_heads, n % kv_heads
    wide = padded(d, target)
    for j in range(n_k):
        at = (b * n_k + j) * wide
        for x in range(d):
            total = sums[0, g, at + x]
            for c in range(1, sums.shape[0]):
                total += sums[c, g, at + x]
            target[b, g, j, x] = total * scale


def backward(
    q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how,
    d_out, out, lse, d_lse, d_q, d_k, d_v, d_bias, sums_k, sums_v, deltas,
):  # fmt: skip
    """On this thread."""
    inputs = Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks)
    take_tasks(inputs, how, d_out, out, lse, d_lse, Results(d_q, d_bias, sums_k, sums_v, deltas), np.zeros(1, np.int64))
    for n in range(d_k.shape[0] * d_k.shape[1]):
        collect(sums_k, how.scale, d_k, n)
        collect(sums_v, lse.dtype.type(1.0), d_v, n)


def backward_parallel(
    q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how,
    d_out, out, lse, d_lse, d_q, d_k, d_v, d_bias, sums_k, sums_v, deltas, threads,
):  # fmt: skip
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        inputs = Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks)
        worker(inputs, how, d_out, out, lse, d_lse, Results(d_q, d_bias, sums_k, sums_v, deltas), counter)
    for n in prange(d_k.shape[0] * d_k.shape[1]):
        collect(sums_k, how.scale, d_k, n)
        collect(sums_v, lse.dtype.type(1.0), d_v, n)
