"""Family `scored`, forward: attention by tiles of keys (Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1).  Normalisers of whole rows: rows.py.

A task is a block of rows of one sequence and key-value head (tiles.py).  It belongs to one thread from its first operation to its last, and tasks are
the same for any number of threads: so are the bits.

    1. transpose the block's queries into panels
    2. for every tile of keys: copy its values to rows that do not collide in the cache, then for every panel
         a. scores, with the maximum of the keys every lane sees; -inf where a lane sees less
         b. weights, and what they shrink earlier sums by
         c. values
    3. divide by the sums, with the sink among them; transpose back; lse
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .panels import LOG2_E, NO, START, copy, cover, fold, hide, scores, skipping_values, values, width
from .references import hold, lent
from .simd import address, lanes, load, mul, store
from .stored import PAD, SAME, decode_rows, find_keys, point_to
from .tasks import take
from .tiles import (
    BLOCKS_BEFORE,
    K_ROW,
    N_K,
    N_Q,
    Q_BATCH,
    Q_ROW,
    Inputs,
    block_range,
    fill_lanes,
    find_block,
    load_panels,
    modify,
    new_lanes,
    new_scratch,
    panel_range,
    store_panels,
    visible,
)
from .weights import SOFTMAX, SPARSEMAX, exponentials, one_by_one

PANELS = 8  # per block of rows, at most
TILE = 128  # keys per tile


class Space(NamedTuple):
    """What a thread needs for one block: its queries and outputs as panels, a tile's scores, a copy of them, its keys and values, statistics."""

    lanes: Any
    scratch: Any
    rows: Any
    queries: Any
    outputs: Any
    scores: Any
    kept: Any
    key_places: Any
    value_places: Any
    keys: Any
    values: Any
    top: Any
    old: Any
    total: Any
    shrink: Any


@njit(error_model="numpy", inline="always")
def workspace(a, how):
    d, e, w = how.d, how.e, width(a)
    n = PANELS * w
    rows = np.empty(n * (d + PAD) if how.q_code != SAME else 0, a.dtype)
    keys = np.empty(TILE * (d + PAD) if how.k_code != SAME else 0, a.dtype)
    tile_scores, kept, tile_values = np.empty(TILE * w, a.dtype), np.empty(TILE * w, a.dtype), np.empty(TILE * (e + PAD), a.dtype)
    one, two, three, four = np.empty(n, a.dtype), np.empty(n, a.dtype), np.empty(n, a.dtype), np.empty(n, a.dtype)
    queries, outputs = np.empty(n * d, a.dtype), np.empty(n * e, a.dtype)
    places, more = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    return Space(
        new_lanes(a, n), new_scratch(a, TILE), rows, queries, outputs, tile_scores, kept, places, more, keys, tile_values, one, two, three, four
    )


@njit(error_model="numpy", inline="always")
def is_plain(inputs, how):
    """Whether scores are used as they come, their scale folded into the exponential."""
    return how.kind == SOFTMAX and inputs.bias.size == 0 and how.cap == 0.0 and how.score_mod == 0 and how.scale > 0.0


@njit(error_model="numpy", inline="always")
def fetch_keys(inputs, how, b, g, row, start, n, space):
    """Addresses of a tile's keys, which are decoded first where they have to be."""
    find_keys(inputs.k, inputs.pages, how.page_size, b, g, row, start, n, space.key_places)
    if how.k_code != SAME:
        decode_rows(space.key_places, n, how.k_code, inputs.tables, how.d, space.keys, how.d + PAD)
        point_to(space.keys, n, how.d + PAD, space.key_places)


@njit(error_model="numpy", inline="always")
def fetch_values(inputs, how, b, g, row, start, n, space):
    """A tile's values; returns 0 while all are finite."""
    find_keys(inputs.v, inputs.pages, how.page_size, b, g, row, start, n, space.value_places)
    return decode_rows(space.value_places, n, how.v_code, inputs.tables, how.e, space.values, how.e + PAD)


@njit(error_model="numpy", inline="always")
def score_panel(inputs, how, b, space, p, state, start, ranges, s, s_at, plain):
    """Scores of a panel with the keys it sees of a tile, finished but for the normaliser, and top raised to them."""
    at, scratch, top = space.lanes, space.scratch, space.top
    here, there, whole_here, whole_there = ranges
    w, d, n = width(s), how.d, there - here
    lane, q_at = p * w, p * how.d * w
    exact = plain and state == 2
    before, after = (whole_here - here) * w, (whole_there - here) * w
    scores(space.key_places, here - start, whole_here - start, space.queries, q_at, d, s, s_at, w, top, lane, NO)
    scores(space.key_places, whole_here - start, whole_there - start, space.queries, q_at, d, s, s_at + before, w, top, lane, exact)
    scores(space.key_places, whole_there - start, there - start, space.queries, q_at, d, s, s_at + after, w, top, lane, NO)
    if exact:
        hide(s, s_at, w, here, whole_here - here, at.first, at.last, lane, top, lane)
        hide(s, s_at + after, w, whole_there, there - whole_there, at.first, at.last, lane, top, lane)
        return
    cut, raised = whole_here > here or whole_there < there, False
    if not plain:
        raised = modify(inputs, how, b, at, lane, s, s_at, w, here, n, top[:0], state, scratch, top, not cut)
    elif state == 1:
        cover(s, s_at, w, n, scratch.hidden, START)
    if cut:
        hide(s, s_at, w, here, n, at.first, at.last, lane, top, lane)
    elif not raised and (how.kind == SOFTMAX or how.kind >= SPARSEMAX):  # the others want no maximum
        fold(s, s_at, w, n, top, lane)


@njit(error_model="numpy", inline="always")
def by_tiles(inputs, how, sequence, b, g, group, n_panels, space):
    """Steps 2 for a whole block, in one go."""
    w, e, row_step = width(space.top), how.e, how.e + PAD
    n_keys, row = sequence[N_K], sequence[K_ROW]
    plain = is_plain(inputs, how)
    factor = how.scale * LOG2_E if plain else LOG2_E
    low, high = block_range(space.lanes, n_panels * w, n_keys)
    for start in range(low, high, TILE):
        stop = min(start + TILE, high)
        fetched, odd = False, 0.0
        for p in range(n_panels):
            lane = p * w
            ranges = panel_range(space.lanes, lane, w, start, stop, n_keys)
            here, n = ranges[0], ranges[1] - ranges[0]
            if n <= 0:
                continue
            state = visible(inputs, how, b, g, group, space.lanes, lane, here, here + n, space.scratch)
            if state == 0:
                continue
            if not fetched:
                fetch_keys(inputs, how, b, g, row, start, stop - start, space)
                odd = fetch_values(inputs, how, b, g, row, start, stop - start, space)
                fetched = True
            score_panel(inputs, how, b, space, p, state, start, ranges, space.scores, START, plain)
            if odd != 0.0:
                copy(space.scores, START, space.kept, n * w)  # which keys a lane does not see, once scores are weights
            if how.kind == SOFTMAX:
                exponentials(space.scores, START, n, factor, space.top, space.old, space.total, space.shrink, lane)
            else:
                one_by_one(space.scores, START, n, how.kind, how.shift, how.power)
            seen = space.values[(here - start) * row_step :]
            if odd == 0.0:
                values(seen, row_step, n, e, space.scores, START, w, space.outputs, p * e * w, space.shrink, lane)
            else:
                skipping_values(seen, row_step, n, e, space.scores, START, w, space.kept, -np.inf, space.outputs, p * e * w, space.shrink, lane)


@njit(error_model="numpy", inline="always")
def finish(inputs, how, b, g, group, begin, end, space, lse):
    """Step 3 for each row: its lse, and in space.shrink by how much its output is scaled."""
    plain = is_plain(inputs, how)
    sequence = inputs.sequences[b]
    for r in range(begin, end):
        n = r - begin
        h, i = g * group + r % group, sequence[Q_ROW] + r // group
        if how.kind != SOFTMAX:
            space.shrink[n], lse[sequence[Q_BATCH], h, i] = 1.0 / how.divisor, -np.inf
            continue
        top, total, sink = space.top[n], space.total[n], inputs.sinks[h]
        if plain and top != -np.inf:  # a scale of 0 times -inf would be NaN
            top *= how.scale
        most = sink if math.isnan(sink) else max(top, sink)
        if most == -np.inf and total == 0.0:  # sees nothing; NaN does not show in the maximum
            space.shrink[n], lse[sequence[Q_BATCH], h, i] = 0.0, most
            continue
        fade = 1.0
        if sink != -np.inf:
            fade = math.exp(top - most)
            total = total * fade + math.exp(sink - most)
        space.shrink[n], lse[sequence[Q_BATCH], h, i] = fade / total, most + math.log(total)


@njit(error_model="numpy", inline="always")
def begin_block(inputs, how, b, g, group, begin, end, n_panels, space):
    """Step 1, and statistics as they are before any key."""
    w, d, e, at = width(space.top), how.d, how.e, space.lanes
    fill_lanes(inputs, inputs.sequences[b], b, g, group, begin, end, n_panels * w, at)
    if how.q_code != SAME:
        decode_rows(at.rows, n_panels * w, how.q_code, inputs.tables, d, space.rows, d + PAD)
        point_to(space.rows, n_panels * w, d + PAD, at.rows)
    load_panels(at.rows, d, n_panels, space.queries)
    space.outputs[: n_panels * e * w] = 0.0
    space.top[:] = -np.inf
    space.old[:] = -np.inf
    space.total[:] = 0.0
    space.shrink[:] = 1.0


@njit(error_model="numpy", inline="always")
def end_block(sequence, e, g, group, begin, end, n_panels, space, out):
    """The end of step 3: outputs scaled by space.shrink and written."""
    step, w, rows = lanes(space.top), width(space.top), space.lanes.rows
    for p in range(n_panels):
        for x in range(e):
            for lane in range(0, w, step):
                place = (p * e + x) * w + lane
                store(space.outputs, place, mul(load(space.outputs, place), load(space.shrink, p * w + lane)))
    for r in range(begin, end):
        rows[r - begin] = address(out, (sequence[Q_BATCH], g * group + r % group, sequence[Q_ROW] + r // group, 0))
    store_panels(space.outputs, e, end - begin, rows)


@njit(error_model="numpy", inline="always")
def block(task, inputs, how, out, lse, space):
    """One task."""
    kv_heads = inputs.k.shape[1]
    group = out.shape[1] // kv_heads
    b, g, number, _ = find_block(task, kv_heads, inputs.sequences, how.heads_first)
    sequence, w = inputs.sequences[b], width(space.top)
    begin = number * how.block_rows
    end = min(begin + how.block_rows, sequence[N_Q] * group)
    n_panels = (end - begin + w - 1) // w
    begin_block(inputs, how, b, g, group, begin, end, n_panels, space)
    by_tiles(inputs, how, sequence, b, g, group, n_panels, space)
    finish(inputs, how, b, g, group, begin, end, space, lse)
    end_block(sequence, how.e, g, group, begin, end, n_panels, space, out)


@njit(error_model="numpy", inline="always")
def take_tasks(inputs, how, out, lse, counter):
    """Takes tasks until there are none."""
    n_tasks = inputs.sequences[-1, BLOCKS_BEFORE] * inputs.k.shape[1]
    owned = workspace(lse, how)
    inputs, space, out, lse = lent(inputs), lent(owned), lent(out), lent(lse)
    task = take(counter)
    while task < n_tasks:
        block(task, inputs, how, out, lse, space)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(inputs, how, out, lse, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(inputs, how, out, lse, counter)


def forward(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse):
    """On this thread."""
    inputs = Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks)
    take_tasks(inputs, how, out, lse, np.zeros(1, np.int64))


def forward_parallel(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), how, out, lse, counter)
