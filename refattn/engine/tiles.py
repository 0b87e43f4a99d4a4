"""What forward and backward passes share: a block of rows, and the scores of one of its panels with one tile of keys.

The rows of all query heads that share a key-value head are numbered together, query by query (row r is query r // group of head r % group), so that
a group reads each key once and short sequences still fill the lanes.  A block is some panels of rows of one sequence and key-value head; a batch
entry, a packed sequence and a paged one are all a row of the table `sequences`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .panels import START, add_bias, cover, read_mask, slopes, soft_cap, width
from .simd import address, byte_at, lanes, load, mul, number_at, put_at, store, transpose_in, transpose_out
from .stages import call
from .stored import PAD, SAME, bytes_of, decode_rows, point_to

#: Columns of `sequences`: where its queries stand, how many they are, where their ranges of keys and its keys begin, how many keys there are, and
#: blocks and keys of all before.  One row more than there are sequences, for these two.
Q_BATCH, Q_ROW, N_Q, RANGE_AT, K_ROW, N_K, BLOCKS_BEFORE, KEYS_BEFORE = range(8)


class Inputs(NamedTuple):
    """Arrays of a call.

    q, k, v, bias and mask are bytes with four axes (see stored.py), of the last two no byte where there are none; `first` and `last` hold each
    query's range of keys; `pages` the pages of each sequence, `tables` what one-byte numbers mean, `blocks` a map of blocks of queries by blocks
    of keys (0 none visible, 1 some, 2 all; no element without a map).
    """

    q: Any
    k: Any
    v: Any
    bias: Any
    mask: Any
    sinks: Any
    first: Any
    last: Any
    sequences: Any
    pages: Any
    tables: Any
    blocks: Any


class How(NamedTuple):
    """Numbers of a call, the first four in the kernel's format.

    `cap` is 0 where there is none; `score_mod`, `slope`, `mask_mod` are addresses of stages (stages.py) and 0 where there are none, each followed by
    that of its arrays, and `raised` that of a number which becomes 1 if one of them raises; `same_bias` and `same_mask` say that one element of a
    row stands for all keys; `heads_first` orders tasks (`find_block`); `g_code` and `way` are for the backward pass.
    """

    scale: Any
    cap: Any
    shift: Any
    divisor: Any
    kind: int
    power: int
    d: int
    e: int
    q_code: int
    k_code: int
    v_code: int
    bias_code: int
    page_size: int
    same_bias: int
    same_mask: int
    block_q: int
    block_k: int
    block_rows: int
    heads_first: int
    score_mod: int
    score_aux: int
    slope: int
    slope_aux: int
    mask_mod: int
    mask_aux: int
    raised: int
    g_code: int = 0
    way: int = 0


class Lanes(NamedTuple):
    """What a block's lanes are: addresses of their rows, their heads, queries and ranges of keys."""

    rows: Any
    bias: Any
    mask: Any
    heads: Any
    queries: Any
    first: Any
    last: Any


class Scratch(NamedTuple):
    """Room for a panel and a tile: decoded bias, what is hidden, slopes, a vector."""

    bias: Any
    bias_rows: Any
    hidden: Any
    slopes: Any
    vector: Any


@njit(error_model="numpy", cache=True)
def padded(n, a):
    """n elements, rounded up to whole vectors."""
    step = lanes(a)
    return (n + step - 1) // step * step


@njit(error_model="numpy", cache=True)
def new_lanes(a, n):
    one, two, three = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    return Lanes(one, two, three, np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, a.dtype), np.empty(n, a.dtype))


@njit(error_model="numpy", cache=True)
def new_scratch(a, tile):
    w = width(a)
    bias, bias_rows = np.empty(w * (tile + PAD), a.dtype), np.empty(w, np.int64)
    return Scratch(bias, bias_rows, np.zeros(tile * w, a.dtype), np.empty(tile * w, a.dtype), np.empty(lanes(a), a.dtype))


@njit(error_model="numpy", cache=True)
def find_block(task, kv_heads, sequences, heads_first):
    """(sequence, key-value head, number of the block, blocks of the sequence) of a task: sequence by sequence, in it head by head, last blocks first.

    With `heads_first` all heads take a block before any takes the next, so that what they share of a bias or mask is still in the cache.
    """
    low, high = 0, sequences.shape[0] - 2  # the last sequence that begins at or before the task, which is none without blocks
    while low < high:
        middle = (low + high + 1) // 2
        if sequences[middle, BLOCKS_BEFORE] * kv_heads <= task:
            low = middle
        else:
            high = middle - 1
    before = sequences[low, BLOCKS_BEFORE]
    own = sequences[low + 1, BLOCKS_BEFORE] - before
    number = task - before * kv_heads
    if heads_first:
        return low, number % kv_heads, own - 1 - number // kv_heads, own
    return low, number // own, own - 1 - number % own, own  # the longest rows of a causal mask first


@njit(error_model="numpy", inline="always")
def fill_lanes(inputs, sequence, b, g, group, begin, end, n, at):
    """Everything about rows begin to end of a block, n lanes of them; a lane without a row repeats the last one, and is not written back."""
    batch, row, ranges = sequence[Q_BATCH], sequence[Q_ROW], sequence[RANGE_AT]
    h, i = begin % group, begin // group
    for r in range(n):
        head = g * group + h
        at.rows[r] = address(inputs.q, (batch, head, row + i, 0))
        at.heads[r], at.queries[r] = head, i
        at.first[r], at.last[r] = inputs.first[ranges + i], inputs.last[ranges + i]
        if inputs.bias.size:
            at.bias[r] = address(inputs.bias, (b, head, i, 0))
        if inputs.mask.size:
            at.mask[r] = address(inputs.mask, (b, head, i, 0))
        if begin + r + 1 < end:
            h += 1
            if h == group:
                h, i = 0, i + 1


@njit(error_model="numpy", cache=True)
def load_panels(rows, d, n_panels, panels):
    """Rows of d numbers, whose addresses a table holds, transposed into panels."""
    step, w, size = lanes(panels), width(panels), panels.itemsize
    whole = d // step * step
    for p in range(n_panels):
        for lane in range(0, w, step):
            for x in range(0, whole, step):
                transpose_in(panels, rows, p * w + lane, x, panels, (p * d + x) * w + lane, w)
        for lane in range(w if whole < d else 0):
            for x in range(whole, d):
                panels[(p * d + x) * w + lane] = number_at(panels, rows[p * w + lane] + x * size)


@njit(error_model="numpy", cache=True)
def store_panels(panels, d, n_rows, rows):
    """The way back, for the first n_rows lanes."""
    step, w, size = lanes(panels), width(panels), panels.itemsize
    for first in range(0, n_rows, step):
        p, lane = first // w, first % w
        whole = d // step * step if first + step <= n_rows else 0  # a vector of lanes that all have rows
        for x in range(0, whole, step):
            transpose_out(panels, (p * d + x) * w + lane, w, rows, first, x)
        for r in range(first, min(first + step, n_rows)):
            for x in range(whole, d):
                put_at(rows[r] + x * size, panels[(p * d + x) * w + r - p * w])


@njit(error_model="numpy", cache=True)
def block_range(at, n, n_keys):
    """Keys that some of n lanes see: from, up to."""
    low, high = n_keys, 0
    for r in range(n):
        low, high = min(low, int(at.first[r])), max(high, int(at.last[r]))
    return low, high


@njit(error_model="numpy", cache=True)
def panel_range(at, lane, w, start, stop, n_keys):
    """Keys of a tile that some lane of a panel sees, from and up to, and those that all see, from and up to, by their ranges."""
    some_first, some_last, all_first, all_last = n_keys, 0, 0, n_keys
    for one in range(lane, lane + w):
        some_first, all_first = min(some_first, int(at.first[one])), max(all_first, int(at.first[one]))
        some_last, all_last = max(some_last, int(at.last[one])), min(all_last, int(at.last[one]))
    here, there = max(start, some_first), min(stop, some_last)
    whole_here = min(max(here, all_first), there)
    return here, there, whole_here, max(min(there, all_last), whole_here)


@njit(error_model="numpy", cache=True)
def mapped(blocks, how, b, g, group, first_query, last_query, here, there):
    """What the map says of a rectangle: 0 where none of its pairs is visible, 2 where all are, 1 otherwise."""
    if blocks.size == 0:
        return 1
    some, every = False, True
    entry = b if blocks.shape[0] > 1 else 0
    heads = range(g * group, g * group + group) if blocks.shape[1] > 1 else range(1)
    for h in heads:
        for i in range(first_query // how.block_q, last_query // how.block_q + 1):
            for j in range(here // how.block_k, (there - 1) // how.block_k + 1):
                kind = blocks[entry, h, i, j]
                some = some or kind > 0
                every = every and kind == 2
    return 2 if every else 1 if some else 0


@njit(error_model="numpy", inline="always")
def report(how, returned):
    """Remember that a function raised, which a kernel cannot."""
    if returned < 0:
        put_at(how.raised, np.int64(1))


@njit(error_model="numpy", inline="always")
def visible(inputs, how, b, g, group, at, lane, here, there, scratch):
    """Which of the keys from here to there a panel's lanes see, ranges aside: 0 none, 2 all, 1 some, and then `scratch.hidden` says which."""
    w, n = width(scratch.hidden), there - here
    state = 2
    if how.mask_mod:
        state = mapped(inputs.blocks, how, b, g, group, at.queries[lane], at.queries[lane + w - 1], here, there)
        if state == 1:
            heads, queries = address(at.heads, lane), address(at.queries, lane)
            seen = call(how.mask_mod, address(scratch.hidden, 0), w, n, here, b, heads, queries, w, how.mask_aux)
            report(how, seen)
            state = 0 if seen == 0 else 2 if seen == n * w else 1
    if state and inputs.mask.size:
        if state == 2:
            state = read_mask(at.mask, lane, START if how.same_mask else here, n, how.same_mask, scratch.hidden)
        else:  # both
            for r in range(n):
                for c in range(w):
                    place = at.mask[lane + c] + (0 if how.same_mask else here + r)
                    if not byte_at(place):
                        scratch.hidden[r * w + c] = -np.inf
    return state


@njit(error_model="numpy", inline="always")
def modify(inputs, how, b, at, lane, s, s_at, s_step, here, n, slope, mask_state, scratch, top, raises):
    """Raw scores of n keys scaled, capped, modified by the user's function, biased and hidden.

    `slope`, unless it is empty, gets the derivative of what bias and masks found with respect to the scaled score.  With `raises`, top is
    raised to the scores if that costs nothing more, which is returned.
    """
    w, factor = width(s), how.scale
    raises = raises and inputs.bias.size > 0 and mask_state != 1
    if inputs.bias.size == 0 or how.cap > 0.0 or how.score_mod:  # a bias scales on its way
        soft_cap(s, s_at, s_step, n, how.scale, how.cap)
        factor = s.dtype.type(1.0)
    if slope.size:
        slopes(s, s_at, s_step, n, how.cap, slope, s_at)
    if how.score_mod:
        heads, queries = address(at.heads, lane), address(at.queries, lane)
        if slope.size:
            for r in range(n):
                for c in range(0, w, lanes(s)):
                    store(scratch.slopes, r * w + c, load(s, s_at + r * s_step + c))
            report(how, call(how.slope, address(scratch.slopes, 0), w, n, here, b, heads, queries, w, how.slope_aux))
            for r in range(n):
                for c in range(0, w, lanes(s)):
                    place = s_at + r * s_step + c
                    store(slope, place, mul(load(slope, place), load(scratch.slopes, r * w + c)))
        report(how, call(how.score_mod, address(s, s_at), s_step, n, here, b, heads, queries, w, how.score_aux))
    if inputs.bias.size:
        rows, first, x = at.bias, lane, START if how.same_bias else here
        if how.bias_code != SAME:
            length = scratch.bias.size // w
            for c in range(w):
                scratch.bias_rows[c] = at.bias[lane + c] + x * bytes_of(how.bias_code, s)
            decode_rows(scratch.bias_rows, w, how.bias_code, inputs.tables, 1 if how.same_bias else n, scratch.bias, length)
            point_to(scratch.bias, w, length, scratch.bias_rows)
            rows, first, x = scratch.bias_rows, START, START
        add_bias(s, s_at, s_step, n, factor, rows, first, x, how.same_bias, scratch.vector, top, lane, raises)
    if mask_state == 1:
        cover(s, s_at, s_step, n, scratch.hidden, START)
    return raises
