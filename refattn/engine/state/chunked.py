"""The chunked form: products of matrices, chunk by chunk (chunks.py says which), on the vectors of the host.

A task is some columns of values of one state, from the first chunk to the last: columns do not read one another, so how many a task has changes no
bit, and one head can use every thread.  What a chunk needs beside its state is computed where it is used and nowhere kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numba import njit, prange

from ..panels import START
from ..references import hold, lent
from ..simd import address, element_bytes, fma, lanes, load_at, mul, put_at, register_bytes, splat_at
from ..tasks import take
from ..threads import available_threads, launch
from . import written_first
from .chunked_backward import backward_alone, backward_parallel
from .chunks import BLOCK, CHUNK, CHUNK_BACK, YES, advance, deliver, fetch, how_of, operands_of, read_chunk, relate, room_at, solve, times, up
from .kernels import kernel
from .lowered import Lowered
from .products import EIGHT, LOWER, ONE, WHOLE, apart, multiply, rolled


@njit(error_model="numpy", cache=True)
def add_bonus(like, how, room, n):
    """out += bonus of each step's own key times its value."""
    apart()
    size, steps = element_bytes(like), how.steps
    for h in range(how.group):
        for i in range(n * steps):
            by = splat_at(like, room.bonus + (h * room.q_rows * steps + i) * size)
            out, w = room.out + (h * room.q_rows + i // steps) * room.v_row, room.w + i * room.v_row
            for x in range(0, room.v_row, lanes(like) * size):
                rolled()
                put_at(out + x, fma(by, load_at(like, w + x), load_at(like, out + x)))


@njit(error_model="numpy", cache=True)
def read_fading(like, how, room, n):
    """What queries read of the state, and of the chunk's own steps, where columns fade: values token by token, in their place."""
    apart()
    size, steps, v_row = element_bytes(like), how.steps, room.v_row
    for h in range(how.group):
        out = room.out + h * room.q_rows * v_row
        times(like, out, room.f_far + v_row, v_row, ONE, n, v_row, out)
    for x in range(0, v_row, lanes(like) * size):
        for t in range(n):
            fade = load_at(like, room.f + t * v_row + x)
            for i in range(t * steps):
                rolled()
                put_at(room.w + i * v_row + x, mul(fade, load_at(like, room.w + i * v_row + x)))
            for h in range(how.group):
                row = h * room.q_rows + t
                P, out = room.P + row * room.s_row, room.out + row * v_row + x
                read = load_at(like, out)
                for i in range((t + 1) * steps):
                    rolled()
                    read = fma(splat_at(like, P + i * size), load_at(like, room.w + i * v_row + x), read)
                put_at(out, read)


@njit(error_model="numpy", inline="always")
def read_out(like, how, room, n):
    """Outputs of a chunk: what queries read of the state before it, and of its own steps, whose U is made on the way."""
    size, vectors = element_bytes(like), room.v_row // (lanes(like) * element_bytes(like))
    rows, one, none = up(n, EIGHT), like.dtype.type(1.0), START
    for h in range(how.group):
        out, q = room.out + h * room.q_rows * room.v_row, room.q_far + h * room.q_rows * room.k_row
        multiply(
            like, out, room.v_row, q, room.k_row, size, room.state, room.v_row, rows, vectors, how.keys, one, none, WHOLE, ONE
        )  # fmt: skip
    if how.bonus:
        add_bonus(like, how, room, n)
    if how.fade:
        read_fading(like, how, room, n)
    else:
        solve(like, how, room, n)
        for h in range(how.group):
            out, P = room.out + h * room.q_rows * room.v_row, room.P + h * room.q_rows * room.s_row
            multiply(
                like, out, room.v_row, P, room.s_row, size, room.w, room.v_row, rows, vectors, n * how.steps, one, ONE, LOWER, how.steps
            )  # fmt: skip


@njit(error_model="numpy", inline="always")
def columns_forward(like, how, room, operands, state, column, width, scale, states, out):
    """One task; `states` and `out` are addresses of the results."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    v = how.values * size
    there = states + state * how.keys * v + column * size
    fetch(like, there, v, how.keys, width, one, room.state, room.v_row)
    for t in range(0, how.tokens, how.chunk):
        n = min(how.chunk, how.tokens - t)
        read_chunk(like, how, room, operands, state, column, width, t, n, YES, scale)
        relate(like, how, room, n, YES)
        read_out(like, how, room, n)
        for h in range(how.group):
            to = out + ((state * how.group + h) * how.tokens + t) * v + column * size
            deliver(like, room.out + h * room.q_rows * room.v_row, room.v_row, n, width, one, to, v)
        advance(like, how, room, n)
    deliver(like, room.state, room.v_row, how.keys, width, one, there, v)


@njit(error_model="numpy", inline="always")
def take_tasks(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    how = how_of(q, b, w, e, g, u, f, chunk, block, columns, old, exclusive)
    owned = np.zeros(room_at(like, how, START, YES).spare + 64, np.uint8)
    room = room_at(like, how, address(owned, 0), YES)
    operands, states, outs = operands_of(q, b, w, e, g, u, f), address(state, (0, 0, 0, 0)), address(out, (0, 0, 0, 0))
    parts = (how.values + how.columns - 1) // how.columns
    n_tasks = b.shape[0] * b.shape[1] * parts
    task = take(counter)
    while task < n_tasks:
        column = task % parts * how.columns
        columns_forward(like, how, room, operands, task // parts, column, min(how.columns, how.values - column), scale, states, outs)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, counter)


def forward_alone(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive):
    """On this thread."""
    take_tasks(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, np.zeros(1, np.int64))


def forward_parallel(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, b, w, e, g, u, f, state, out, scale, chunk, block, columns, old, exclusive, counter)


# ---- calls ---------------------------------------------------------------------------------------------------------------------------


def reason_against(lowered: Lowered) -> str:
    """Why the chunked form does not run a recurrence; "" where it does."""
    steps = lowered.b.shape[3]
    if lowered.f is not None and lowered.e is not None:
        return "columns of its state fade, and something is erased"
    return f"a token has {steps} writes; the chunked form takes up to {BLOCK}" if steps > BLOCK else ""


def arguments_of(lowered: Lowered) -> tuple[np.ndarray, ...]:
    """q, b, w, e, g, u, f, with empty arrays for those that are not there."""
    four, five = np.empty((0,) * 4, lowered.q.dtype), np.empty((0,) * 5, lowered.q.dtype)
    e = five if lowered.e is None else lowered.e
    return lowered.q, lowered.b, lowered.w, e, *(four if x is None else x for x in (lowered.g, lowered.u, lowered.f))


def sizes(lowered: Lowered, most: int = CHUNK) -> tuple[int, int]:
    """Tokens of a chunk of so many steps, and of a block.

    Where columns fade, a chunk is a block: what its values take to fade grows with the square of its length.
    """
    steps = lowered.b.shape[3]
    block = max(1, BLOCK // steps)
    return block if lowered.f is not None else max(block, most // steps // block * block), block


def columns_of(lowered: Lowered, threads: int) -> int:
    """Columns of values a task has: all, unless there are fewer states than threads; whole vectors."""
    batch, heads, _, values = lowered.S0.shape
    vector = register_bytes() // lowered.q.dtype.itemsize
    parts = max(1, threads // max(1, batch * heads))
    return min(values, up.py_func(-(-values // parts), vector)) if parts > 1 else values


def backward(lowered: Lowered, d_out: np.ndarray, d_state: np.ndarray, threads: int | None = None) -> Lowered:
    """Gradients of sum(d_out * out) + sum(d_state * state), in the place of what they belong to.

    Parameters
    ----------
    lowered : Lowered
        One that `reason_against` has nothing against.
    d_out, d_state : ndarray
        Cotangents, in the shapes and the format of the results.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    if lowered.written_first:
        return written_first.backward(lowered, d_out, d_state, threads)
    operands = arguments_of(lowered)
    results = tuple(np.zeros(one.shape, one.dtype) for one in operands)
    d_S0 = np.array(d_state, lowered.q.dtype, order="C")
    if lowered.q.size and lowered.S0.size:
        number, values = lowered.q.dtype.type, lowered.w.shape[4]
        arguments = (
            *operands,
            lowered.S0,
            np.ascontiguousarray(d_out, number),
            *results,
            d_S0,
            number(lowered.scale),
            *sizes(lowered, CHUNK_BACK),
            values,
        )
        arguments = (*arguments, int(lowered.old), int(lowered.exclusive))
        launch(backward_alone, backward_parallel, lowered.q.dtype, arguments, 3.0 * lowered.q.size * values, threads, kernel)
    names = ("q", "b", "w", "e", "g", "u", "f")
    found: dict[str, Any] = {name: one for name, one in zip(names, results, strict=True) if getattr(lowered, name) is not None}
    return replace(lowered, S0=d_S0, **found)


def forward(lowered: Lowered, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The output [B, Hq, T, V] and the state after the last token [B, H, K, V].

    Parameters
    ----------
    lowered : Lowered
        One that `reason_against` has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    columns = columns_of(lowered, available_threads() if threads is None else threads)
    if lowered.written_first:
        return written_first.forward(lowered, columns, threads)
    batch, query_heads, tokens, keys = lowered.q.shape
    values = lowered.w.shape[4]
    out, state = np.zeros((batch, query_heads, tokens, values), lowered.q.dtype), lowered.S0.copy()
    if not (out.size or state.size) or not tokens:
        return out, state
    chunk, block = sizes(lowered)
    number = lowered.q.dtype.type
    arguments = (*arguments_of(lowered), state, out, number(lowered.scale), chunk, block, columns, int(lowered.old), int(lowered.exclusive))
    work = float(batch * query_heads * tokens) * keys * values
    launch(forward_alone, forward_parallel, lowered.q.dtype, arguments, work, threads, kernel)
    return out, state
