"""Family `scored`, forward, where a weight depends on all scores of its row: sparsemax and entmax-1.5.

As in forward.py, but a block is one panel, and its tiles are taken twice: first the scores of all, from which each row's threshold follows, then
weights and values, of the tiles that have weights at all.  Memory for a panel's scores grows with the keys.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .forward import TILE, begin_block, end_block, fetch_keys, fetch_values, score_panel, workspace
from .panels import NO, START, copy, skipping_values, values, width
from .references import hold, lent
from .stored import PAD
from .tasks import take
from .tiles import BLOCKS_BEFORE, K_ROW, N_K, N_Q, Q_BATCH, Q_ROW, Inputs, block_range, find_block, panel_range, visible
from .weights import ENTMAX15, ROOT, SPARSEMAX, SUPPORT, beyond, thresholds


@njit(error_model="numpy", inline="always")
def by_rows(inputs, how, sequence, b, g, group, space):
    """Weights and values of one panel."""
    w, e, row_step = width(space.top), how.e, how.e + PAD
    n_keys, row = sequence[N_K], sequence[K_ROW]
    low, high = block_range(space.lanes, w, n_keys)
    kind = SPARSEMAX if how.kind == SUPPORT else ENTMAX15 if how.kind == ROOT else how.kind
    s = np.empty(max(high - low, 0) * w, space.top.dtype)
    for start in range(low, high, TILE):
        stop = min(start + TILE, high)
        ranges = panel_range(space.lanes, START, w, start, stop, n_keys)
        s[(start - low) * w : (stop - low) * w] = -np.inf
        state = visible(inputs, how, b, g, group, space.lanes, START, ranges[0], ranges[1], space.scratch) if ranges[1] > ranges[0] else 0
        if state:
            fetch_keys(inputs, how, b, g, row, start, stop - start, space)
            score_panel(inputs, how, b, space, START, state, start, ranges, s, (ranges[0] - low) * w, NO)
    thresholds(s, max(high - low, 0), kind, space.top, space.old, space.shrink, 0)
    space.shrink[:] = 1.0
    for start in range(low, high, TILE):
        n, at = min(TILE, high - start), (start - low) * w
        copy(s, at, space.scores, n * w)
        beyond(space.scores, 0, n, how.kind, space.top, space.old, space.total, 0)
        used = False
        for place in range(n * w):
            used = used or space.scores[place] != 0.0  # NaN is used
        odd = fetch_values(inputs, how, b, g, row, start, n, space)  # what is not finite reaches even a weight of zero
        if odd == 0.0 and used:
            values(space.values, row_step, n, e, space.scores, START, w, space.outputs, START, space.shrink, START)
        elif odd != 0.0:
            skipping_values(space.values, row_step, n, e, space.scores, START, w, s[at:], -np.inf, space.outputs, START, space.shrink, START)


@njit(error_model="numpy", inline="always")
def block(task, inputs, how, out, statistic, space):
    """One task."""
    kv_heads = inputs.k.shape[1]
    group = out.shape[1] // kv_heads
    b, g, number, _ = find_block(task, kv_heads, inputs.sequences, how.heads_first)
    sequence = inputs.sequences[b]
    begin = number * how.block_rows
    end = min(begin + how.block_rows, sequence[N_Q] * group)
    begin_block(inputs, how, b, g, group, begin, end, START + 1, space)
    by_rows(inputs, how, sequence, b, g, group, space)
    half = how.kind in (ENTMAX15, ROOT)
    averages = how.kind in (SUPPORT, ROOT)
    for r in range(begin, end):
        n = r - begin
        top = space.top[n]
        tau = top * (0.5 if half else 1.0) + space.old[n]  # NaN among the scores shows here, and not in the maximum
        statistic[sequence[Q_BATCH], g * group + r % group, sequence[Q_ROW] + r // group] = tau
        space.shrink[n] = 0.0 if tau == -np.inf else 1.0 / space.total[n] if averages else 1.0
    end_block(sequence, how.e, g, group, begin, end, START + 1, space, out)


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


def rows(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse):
    """On this thread; `lse` takes the thresholds."""
    inputs = Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks)
    take_tasks(inputs, how, out, lse, np.zeros(1, np.int64))


def rows_parallel(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks, how, out, lse, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(Inputs(q, k, v, bias, mask, sinks, first, last, sequences, pages, tables, blocks), how, out, lse, counter)
