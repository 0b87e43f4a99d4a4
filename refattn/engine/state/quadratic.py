"""The quadratic form: every token looks back at every earlier write, and no state is carried; O(T) memory, O(T^2) work.

    seen(x, t)_m = x^T exp(g_{t(m)+1} + ... + g_t) b_m           how much of write m, of token t(m), a vector x reads after token t
    change_n     = w_n - sum_{m < n} seen(e_n, t(n))_m change_m  what write n adds, its erasure done: a triangular system, solved from the top
    out_t        = scale * sum_{m: t(m) <= t} seen(q_t, t)_m change_m

S0 is one more write before all others.  The decay between two tokens is a sum of their own g alone, begun at the later one, so that nothing
overflows and -inf forgets.  Forward only: the backward pass of another form serves.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from ..references import hold, lent
from ..tasks import take
from ..threads import launch
from .kernels import kernel
from .lowered import Lowered
from .recurrent import inputs, own


@njit(error_model="numpy", cache=True)
def look_back(x, t, n_own, b, g, seen, faded):
    """seen[s, r] = how much of write r of token s <= t the vector x reads, and `faded`, what is left of x for S0.

    n_own
        How many of token t's own writes are seen; -1 for none and t's decay not applied either.
    """
    gone = np.zeros_like(x)
    for s in range(t, -1, -1):
        n_seen = b.shape[1] if s < t else max(n_own, 0)
        for y in range(len(x)):
            faded[y] = x[y] * math.exp(gone[y])
        for r in range(b.shape[1]):
            total = x[0] * 0.0
            for y in range(len(x) if r < n_seen else 0):
                total += faded[y] * b[s, r, y]
            seen[s, r] = total
        if len(g) > 0 and not (s == t and n_own < 0):
            for y in range(len(x)):
                gone[y] += g[s, y if g.shape[1] > 1 else 0]
    for y in range(len(x)):
        faded[y] = x[y] * math.exp(gone[y])


@njit(error_model="numpy", cache=True)
def add_seen(t, seen, changes, faded, S0, f, scale, found):
    """found = found + scale * (seen by changes, and faded^T S0), columns being as faded as they are at token t"""
    for y in range(f.shape[1]):
        left, total = f.dtype.type(1.0), f.dtype.type(0.0)
        for s in range(t, -1, -1):
            for r in range(seen.shape[1]):
                total += seen[s, r] * (left * changes[s, r, y])
            left *= math.exp(f[s, y])
        for x in range(len(faded)):
            total += faded[x] * (left * S0[x, y])
        found[y] += scale * total
    if f.shape[1] > 0:
        return
    for s in range(t + 1):
        for r in range(seen.shape[1]):
            for y in range(len(found)):
                found[y] += scale * seen[s, r] * changes[s, r, y]
    for x in range(len(faded)):
        for y in range(len(found)):
            found[y] += scale * faded[x] * S0[x, y]


@njit(error_model="numpy", cache=True)
def forward_head(n, h, q, b, w, e, g, u, f, old, exclusive, scale, state, out):
    """All tokens of one state; `state` turns from S0 into that after the last token."""
    heads, group, n_tokens = state.shape[1], q.shape[1] // state.shape[1], q.shape[2]
    S0 = state[n, h].copy()
    changes, seen, faded = w[n, h].copy(), np.zeros(w.shape[2:4], q.dtype), np.empty(q.shape[3], q.dtype)
    decays = g[n, h] if g.shape[1] == heads else np.empty((0, 1), q.dtype)
    fades = f[n, h] if f.shape[1] == heads else np.empty((0, 0), q.dtype)
    minus_one = q.dtype.type(-1.0)
    for t in range(n_tokens):
        if e.shape[1] == heads:
            for r in range(w.shape[3]):
                look_back(e[n, h, t, r], t, -1 if old else r, b[n, h], decays, seen, faded)
                add_seen(t, seen, changes, faded, S0, fades, minus_one, changes[t, r])
        for i in range(h * group, (h + 1) * group):
            look_back(q[n, i, t], t, -1 if exclusive else w.shape[3], b[n, h], decays, seen, faded)
            out[n, i, t, :] = minus_one * 0.0
            add_seen(t, seen, changes, faded, S0, fades, scale, out[n, i, t])
            if exclusive and u.shape[1] == heads:
                for r in range(w.shape[3]):
                    bonus = scale * own(q[n, i, t], b[n, h, t, r], u[n, h, t])
                    for y in range(w.shape[4]):
                        out[n, i, t, y] += bonus * w[n, h, t, r, y]
    gone, left = np.zeros(q.shape[3], q.dtype), np.ones(w.shape[4], q.dtype)
    state[n, h, :, :] = minus_one * 0.0
    for s in range(n_tokens - 1, -1, -1):
        for x in range(len(gone)):
            for r in range(w.shape[3]):
                for y in range(w.shape[4]):
                    state[n, h, x, y] += math.exp(gone[x]) * b[n, h, s, r, x] * (left[y] * changes[s, r, y])
            if len(decays) > 0:
                gone[x] += decays[s, x if decays.shape[1] > 1 else 0]
        for y in range(fades.shape[1]):
            left[y] *= math.exp(fades[s, y])
    for x in range(len(gone)):
        for y in range(w.shape[4]):
            state[n, h, x, y] += math.exp(gone[x]) * (left[y] * S0[x, y])


@njit(error_model="numpy", nogil=True, cache=True)
def forward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, state, out):
    """Takes heads until there are none; a function of its own, or Numba would look for reductions in it."""
    held = (q, b, w, e, g, u, f, state, out)
    q, b, w, e, g, u, f, state, out = lent(held)
    heads = state.shape[1]
    task = take(counter)
    while task < state.shape[0] * heads:
        forward_head(task // heads, task % heads, q, b, w, e, g, u, f, old, exclusive, scale, state, out)
        task = take(counter)
    hold(held)


def forward_alone(q, b, w, e, g, u, f, old, exclusive, scale, state, out):
    """On this thread."""
    forward_worker(np.zeros(1, np.int64), q, b, w, e, g, u, f, old, exclusive, scale, state, out)


def forward_parallel(q, b, w, e, g, u, f, old, exclusive, scale, state, out, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        forward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, state, out)


def forward(lowered: Lowered, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What queries read [B, Hq, T, V], and the state after the last token [B, H, K, V]."""
    if lowered.written_first:
        out, state = forward(lowered.in_a_row(), threads)
        return out[:, :, lowered.b.shape[2] :], state
    state = lowered.S0.copy()
    out = np.empty((*lowered.q.shape[:3], state.shape[3]), state.dtype)
    work = float(lowered.q[..., 0].size * lowered.w[0, 0, :, :, 0].size * sum(state.shape[2:]))
    launch(forward_alone, forward_parallel, state.dtype, (*inputs(lowered), state, out), work, threads, kernel)
    return out, state
