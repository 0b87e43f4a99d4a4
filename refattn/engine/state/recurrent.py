"""The recurrent form: token by token, a state per head; any length, and the memory of a few states.

The backward pass needs every state again.  The forward pass keeps one in sqrt(T), and the backward pass goes through the tokens from one to the
next, keeping all of those, before it takes them in reverse: memory grows with sqrt(T), and work by one more forward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numba import njit, prange

from ..references import hold, lent
from ..tasks import take
from ..threads import launch
from .kernels import kernel
from .lowered import Lowered

# ---- one token ---------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def times_state(x, S, scale, found):
    """found = scale * x^T S"""
    n, m = S.shape
    for y in range(m):
        found[y] = 0.0
    first = 0
    while first + 4 <= n:  # four rows a pass, or the sums would travel to memory and back for each
        x0, x1, x2, x3 = scale * x[first], scale * x[first + 1], scale * x[first + 2], scale * x[first + 3]
        for y in range(m):
            found[y] += x0 * S[first, y] + x1 * S[first + 1, y] + (x2 * S[first + 2, y] + x3 * S[first + 3, y])
        first += 4
    for r in range(first, n):
        for y in range(m):
            found[y] += scale * x[r] * S[r, y]


@njit(error_model="numpy", cache=True)
def sweep(factors, b, change, S):
    """S = factors * S + b change^T"""
    n, m = S.shape
    for x in range(n):
        factor, key = factors[x], b[x]
        for y in range(m):
            S[x, y] = factor * S[x, y] + key * change[y]


@njit(error_model="numpy", cache=True)
def sweep_and_read(factors, b, change, q, scale, S, found):
    """S = factors * S + b change^T; found = scale * q^T S: each element of S is fetched once, which is what a token costs."""
    n, m = S.shape
    for y in range(m):
        found[y] = 0.0
    first = 0
    while first + 4 <= n:
        f0, f1, f2, f3 = factors[first], factors[first + 1], factors[first + 2], factors[first + 3]
        b0, b1, b2, b3 = b[first], b[first + 1], b[first + 2], b[first + 3]
        q0, q1, q2, q3 = scale * q[first], scale * q[first + 1], scale * q[first + 2], scale * q[first + 3]
        for y in range(m):
            s0, s1 = f0 * S[first, y] + b0 * change[y], f1 * S[first + 1, y] + b1 * change[y]
            s2, s3 = f2 * S[first + 2, y] + b2 * change[y], f3 * S[first + 3, y] + b3 * change[y]
            S[first, y], S[first + 1, y], S[first + 2, y], S[first + 3, y] = s0, s1, s2, s3
            found[y] += q0 * s0 + q1 * s1 + (q2 * s2 + q3 * s3)
        first += 4
    for x in range(first, n):
        for y in range(m):
            S[x, y] = factors[x] * S[x, y] + b[x] * change[y]
            found[y] += scale * q[x] * S[x, y]


@njit(error_model="numpy", cache=True)
def change_of(w, e, S, change):
    """change = w - e^T S"""
    times_state(e, S, -1.0, change)
    for y in range(len(w)):
        change[y] += w[y]


@njit(error_model="numpy", cache=True)
def decays(g, factors):
    """exp(g) of every row of the state for the first write, and 1 for the others."""
    for x in range(factors.shape[1]):
        factors[0, x] = math.exp(g[x if len(g) > 1 else 0]) if len(g) > 0 else 1.0
        factors[1, x] = 1.0


@njit(error_model="numpy", cache=True)
def fade_columns(f, factors, S):
    """S = S * exp(f)"""
    for y in range(len(f)):
        factors[y] = math.exp(f[y])
    for x in range(S.shape[0]):
        for y in range(len(f)):
            S[x, y] *= factors[y]


@njit(error_model="numpy", cache=True)
def update(b, w, e, g, old, q, reads, scale, S, changes, factors, found):
    """S after one token whose writes are b, w, e [R, .], and what each wrote; if `reads`, found = scale * q^T S then.

    factors
        Room for three vectors.
    """
    n_writes, erases = len(b), len(e) > 0
    decays(g, factors)
    for r in range(n_writes):
        if not erases:
            changes[r, :] = w[r]
        elif old:  # all of them before the state changes
            if r == 0:
                for s in range(n_writes):
                    change_of(w[s], e[s], S, changes[s])
        else:
            for x in range(len(e[r])):
                factors[2, x] = factors[min(r, 1), x] * e[r, x]
            change_of(w[r], factors[2], S, changes[r])
        if reads and r == n_writes - 1:
            sweep_and_read(factors[min(r, 1)], b[r], changes[r], q, scale, S, found)
        else:
            sweep(factors[min(r, 1)], b[r], changes[r], S)


@njit(error_model="numpy", cache=True)
def own(q, b, u):
    """q^T (u * b)"""
    total = q[0] * u[0] * b[0]
    for x in range(1, len(q)):
        total += q[x] * u[x] * b[x]
    return total


@njit(error_model="numpy", cache=True)
def dot(one, two):
    total = one[0] * two[0]
    for y in range(1, len(one)):
        total += one[y] * two[y]
    return total


# ---- forward -----------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def forward_head(n, h, q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out):
    """One state through all its tokens; S before token t is kept where `every` divides t."""
    heads, group, n_tokens = state.shape[1], q.shape[1] // state.shape[1], q.shape[2]
    S = state[n, h]
    changes, factors, columns = np.empty(w.shape[3:], q.dtype), np.empty((3, S.shape[0]), q.dtype), np.empty(S.shape[1], q.dtype)
    nothing, none = np.empty((0, 0), q.dtype), np.empty(0, q.dtype)
    for t in range(n_tokens):
        if kept.shape[1] == heads and t % every == 0:
            kept[n, h, t // every] = S
        if exclusive:
            for i in range(h * group, (h + 1) * group):
                times_state(q[n, i, t], S, scale, out[n, i, t])
                if u.shape[1] == heads:
                    for r in range(b.shape[3]):
                        seen = scale * own(q[n, i, t], b[n, h, t, r], u[n, h, t])
                        for y in range(w.shape[4]):
                            out[n, i, t, y] += seen * w[n, h, t, r, y]
        if f.shape[1] == heads:
            fade_columns(f[n, h, t], columns, S)
        update(
            b[n, h, t], w[n, h, t], e[n, h, t] if e.shape[1] == heads else nothing, g[n, h, t] if g.shape[1] == heads else none, old,
            q[n, h * group, t], not exclusive, scale, S, changes, factors, out[n, h * group, t],
        )  # fmt: skip
        if not exclusive:
            for i in range(h * group + 1, (h + 1) * group):
                times_state(q[n, i, t], S, scale, out[n, i, t])


@njit(error_model="numpy", nogil=True, cache=True)
def forward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out):
    """Takes heads until there are none; a function of its own, or Numba would look for reductions in it."""
    held = (q, b, w, e, g, u, f, state, kept, out)
    q, b, w, e, g, u, f, state, kept, out = lent(held)
    heads = state.shape[1]
    task = take(counter)
    while task < state.shape[0] * heads:
        forward_head(task // heads, task % heads, q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out)
        task = take(counter)
    hold(held)


def forward_alone(q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out):
    """On this thread."""
    forward_worker(np.zeros(1, np.int64), q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out)


def forward_parallel(q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        forward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, every, state, kept, out)


def forward(lowered: Lowered, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What queries read [B, Hq, T, V], and the state after the last token [B, H, K, V]."""
    state = lowered.S0.copy()
    return advance(lowered, state, threads), state


def advance(lowered: Lowered, state: np.ndarray, threads: int | None = None) -> np.ndarray:
    """What queries read, going on from `state` instead of S0; it becomes that after the last token."""
    if lowered.written_first:
        return advance(lowered.in_a_row(), state, threads)[:, :, lowered.b.shape[2] :]
    return _forward(lowered, state, np.empty((0, 0, 0, 0, 0), state.dtype), 1, threads)


def _forward(lowered: Lowered, state: np.ndarray, kept: np.ndarray, every: int, threads: int | None) -> np.ndarray:
    out = np.empty((*lowered.q.shape[:3], state.shape[3]), state.dtype)
    arguments = (*inputs(lowered), every, state, kept, out)
    launch(forward_alone, forward_parallel, state.dtype, arguments, work(lowered), threads, kernel)
    return out


# ---- backward ----------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def unread(q, d_out, S, scale, d_q, dS):
    """Of out = scale * q^T S, the gradients of q, and of S added to its sum."""
    n, m = S.shape
    for x in range(n):
        d_q[x] += scale * dot(S[x], d_out)
        for y in range(m):
            dS[x, y] += scale * q[x] * d_out[y]


@njit(error_model="numpy", cache=True)
def unseen(q, b, w, u, d_out, scale, d_q, d_b, d_w, d_u):
    """Of out = scale * q^T (u * b) w^T, gradients added to their sums."""
    through, seen = scale * dot(w, d_out), scale * own(q, b, u)
    for x in range(len(q)):
        d_q[x] += through * u[x] * b[x]
        d_b[x] += through * u[x] * q[x]
        d_u[x] += through * q[x] * b[x]
    for y in range(len(w)):
        d_w[y] += seen * d_out[y]


@njit(error_model="numpy", cache=True)
def unwritten(b, change, dS, d_b, d_change):
    """Of S = S + b change^T, the gradient of b added to its sum, and that of the change."""
    n = len(b)
    times_state(b, dS, 1.0, d_change)
    for x in range(n):
        d_b[x] += dot(dS[x], change)


@njit(error_model="numpy", cache=True)
def unerased(e, S, d_change, d_e, dS):
    """Of change = w - e^T S, gradients of e, and of S added to its sum."""
    n, m = S.shape
    for x in range(n):
        d_e[x] = -dot(S[x], d_change)
        for y in range(m):
            dS[x, y] -= e[x] * d_change[y]


@njit(error_model="numpy", cache=True)
def unfaded(g, S, d_g, dS):
    """Of S = exp(g) * S before, gradients of g and of S before."""
    n, m = S.shape
    factor = math.exp(g[0])
    for x in range(n):
        if len(g) > 1:
            factor = math.exp(g[x])
        d_g[x if len(g) > 1 else 0] += factor * dot(dS[x], S[x])
        for y in range(m):
            dS[x, y] *= factor


@njit(error_model="numpy", cache=True)
def unfaded_columns(f, S, d_f, dS):
    """Of S = S * exp(f) before, gradients of f and of S before."""
    for y in range(len(f)):
        factor, total = math.exp(f[y]), f.dtype.type(0.0)
        for x in range(S.shape[0]):
            dS[x, y] *= factor
            total += dS[x, y] * S[x, y]
        d_f[y] = total


@njit(error_model="numpy", cache=True)
def backward_token(before, b, w, e, g, old, d_b, d_w, d_e, d_g, dS, steps, changes, d_changes, factors):
    """dS from that of the state after a token to that of the state before it, and the gradients of its writes and decay.

    before
        S before the token.
    steps, changes, d_changes, factors
        Room for S before each write, what each wrote, gradients of that, and decays.
    """
    erases, n_writes = len(e) > 0, len(b)
    if erases and not old:  # what update did, each state kept
        decays(g, factors)
        for x in range(steps.shape[1]):
            for y in range(steps.shape[2]):
                steps[0, x, y] = factors[0, x] * before[x, y]
        for r in range(n_writes):
            change_of(w[r], e[r], steps[r], changes[r])
            if r + 1 < n_writes:
                steps[r + 1] = steps[r]
                sweep(factors[1], b[r], changes[r], steps[r + 1])
    for r in range(n_writes - 1, -1, -1):
        if not erases:
            changes[r, :] = w[r]
        elif old:
            change_of(w[r], e[r], before, changes[r])
        unwritten(b[r], changes[r], dS, d_b[r], d_changes[r])
        for y in range(w.shape[1]):
            d_w[r, y] += d_changes[r, y]
        if erases and not old:
            unerased(e[r], steps[r], d_changes[r], d_e[r], dS)
    if len(g) > 0:
        unfaded(g, before, d_g, dS)
    if erases and old:
        for r in range(n_writes):
            unerased(e[r], before, d_changes[r], d_e[r], dS)


@njit(error_model="numpy", cache=True)
def backward_head(n, h, q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state):
    """One state back through all its tokens; d_state turns from the gradient of the last state into that of the first."""
    heads, group, n_tokens = d_state.shape[1], q.shape[1] // d_state.shape[1], q.shape[2]
    dS = d_state[n, h]
    n_keys, n_values = dS.shape
    states = np.empty((every + 1, n_keys, n_values), q.dtype)
    steps = np.empty((b.shape[3], n_keys, n_values), q.dtype)
    changes, d_changes, factors = np.empty(w.shape[3:], q.dtype), np.empty(w.shape[3:], q.dtype), np.empty((3, n_keys), q.dtype)
    nothing, none = np.empty((0, 0), q.dtype), np.empty(0, q.dtype)
    columns, begun = np.empty(n_values, q.dtype), np.empty((n_keys, n_values), q.dtype)
    fades, erases, columns_fade = g.shape[1] == heads, e.shape[1] == heads, f.shape[1] == heads
    for segment in range(kept.shape[2] - 1, -1, -1):
        first, end = segment * every, min((segment + 1) * every, n_tokens)
        states[0] = kept[n, h, segment]
        for t in range(first, end):
            states[t - first + 1] = states[t - first]
            if columns_fade:
                fade_columns(f[n, h, t], columns, states[t - first + 1])
            update(
                b[n, h, t], w[n, h, t], e[n, h, t] if erases else nothing, g[n, h, t] if fades else none, old,
                none, False, scale, states[t - first + 1], changes, factors, none,
            )  # fmt: skip
        for t in range(end - 1, first - 1, -1):
            before, after = states[t - first], states[t - first + 1]
            if not exclusive:
                for i in range(h * group, (h + 1) * group):
                    unread(q[n, i, t], d_out[n, i, t], after, scale, d_q[n, i, t], dS)
            if columns_fade:
                begun[:, :] = before
                fade_columns(f[n, h, t], columns, begun)
            backward_token(
                begun if columns_fade else before, b[n, h, t], w[n, h, t], e[n, h, t] if erases else nothing, g[n, h, t] if fades else none, old,
                d_b[n, h, t], d_w[n, h, t], d_e[n, h, t] if erases else nothing, d_g[n, h, t] if fades else none,
                dS, steps, changes, d_changes, factors,
            )  # fmt: skip
            if columns_fade:
                unfaded_columns(f[n, h, t], before, d_f[n, h, t], dS)
            if exclusive:
                for i in range(h * group, (h + 1) * group):
                    unread(q[n, i, t], d_out[n, i, t], before, scale, d_q[n, i, t], dS)
                    if u.shape[1] == heads:
                        for r in range(b.shape[3]):
                            unseen(
                                q[n, i, t], b[n, h, t, r], w[n, h, t, r], u[n, h, t], d_out[n, i, t], scale,
                                d_q[n, i, t], d_b[n, h, t, r], d_w[n, h, t, r], d_u[n, h, t],
                            )  # fmt: skip


@njit(error_model="numpy", nogil=True, cache=True)
def backward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state):
    """Takes heads until there are none."""
    held = (q, b, w, e, g, u, f, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state)
    q, b, w, e, g, u, f, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state = lent(held)
    heads = d_state.shape[1]
    task = take(counter)
    while task < d_state.shape[0] * heads:
        where = task // heads, task % heads
        backward_head(where[0], where[1], q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state)
        task = take(counter)
    hold(held)


def backward_alone(q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state):
    """On this thread."""
    backward_worker(np.zeros(1, np.int64), q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state)


def backward_parallel(q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        backward_worker(counter, q, b, w, e, g, u, f, old, exclusive, scale, every, kept, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state)


def backward(lowered: Lowered, d_out: np.ndarray, d_state: np.ndarray, threads: int | None = None) -> Lowered:
    """Gradients of sum(d_out * out) + sum(d_state * state)."""
    if lowered.written_first:
        nothing = np.zeros((*d_out.shape[:2], lowered.b.shape[2], d_out.shape[3]), d_out.dtype)
        return backward(lowered.in_a_row(), np.concatenate([nothing, d_out], axis=2), d_state, threads).taken_apart(lowered)
    format_, n_tokens = lowered.S0.dtype, lowered.q.shape[2]
    every = math.isqrt(max(n_tokens - 1, 0)) + 1
    state = lowered.S0.copy()
    kept = np.empty((*state.shape[:2], -(-n_tokens // every), *state.shape[2:]), format_)
    _forward(lowered, state, kept, every, threads)
    d_S0 = np.array(d_state, format_, order="C")
    found: dict[str, Any] = {
        name: np.zeros(x.shape, format_) for name in ("q", "b", "w", "e", "g", "u", "f") if (x := getattr(lowered, name)) is not None
    }
    results = (found.get(name, _absent(name, format_)) for name in ("q", "b", "w", "e", "g", "u", "f"))
    arguments = (*inputs(lowered), every, kept, np.ascontiguousarray(d_out, format_), *results, d_S0)
    launch(backward_alone, backward_parallel, format_, arguments, 4.0 * work(lowered), threads, kernel)
    return replace(lowered, S0=d_S0, **found)


def work(lowered: Lowered) -> float:
    """Multiplications and additions, about: elements of the state times what happens to each."""
    n_keys, n_values = lowered.S0.shape[2:]
    reads, states = lowered.q.shape[0] * lowered.q.shape[1] * lowered.q.shape[2], lowered.b.shape[0] * lowered.b.shape[1] * lowered.b.shape[2]
    writes = lowered.b.shape[3] * (1 if lowered.e is None else 2)
    return float(n_keys * n_values * (reads + states * (writes + (lowered.g is not None) + (lowered.f is not None))))


def inputs(lowered: Lowered) -> tuple[object, ...]:
    """The arguments that kernels begin with; arrays that are absent have no element."""
    format_ = lowered.S0.dtype
    arrays = (_absent(name, format_) if (x := getattr(lowered, name)) is None else x for name in ("q", "b", "w", "e", "g", "u", "f"))
    return (*arrays, int(lowered.old), int(lowered.exclusive), format_.type(lowered.scale))


def _absent(name: str, format_: np.dtype) -> np.ndarray:
    return np.empty((0,) * (5 if name == "e" else 4), format_)
