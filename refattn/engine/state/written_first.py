"""The chunked form where all is written before anything is read, and nothing fades or is erased: products of whole matrices, some tokens at a time.

S = S0 + b^T w              dS = scale q^T d_out + d_state          dS0 = dS
out = scale q S             dq = scale d_out S^T,   db = w dS^T,   dw = b dS
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..panels import START
from ..references import hold, lent
from ..simd import address, element_bytes, lanes
from ..tasks import take
from ..threads import launch
from .chunks import deliver, fetch, up
from .kernels import kernel
from .lowered import Lowered
from .products import EIGHT, ONE, WHOLE, apart, multiply, transpose

#: Rows that are multiplied at a time.
TOGETHER = 64


class How(NamedTuple):
    """Heads that read a state, tokens that are read and rows that are written, keys, values, and columns of a task."""

    group: int
    reads: int
    rows: int
    keys: int
    values: int
    columns: int


class Room(NamedTuple):
    """Bytes from row to row of matrices with keys or values along a row, and addresses in a thread's memory."""

    k_row: int
    v_row: int
    left: int  # queries or keys
    right: int  # values, or cotangents of what was read
    to_left: int  # what their product with the other side and a state gives
    to_right: int
    state: int
    d_state: int
    turned: int  # a state, one column for each key
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    n_k, n_v, rows = up(how.keys, unit), up(how.columns, lanes(like)), up(TOGETHER, unit)
    k_row, v_row = n_k * size, n_v * size
    left = up(place, 64)
    right = left + rows * k_row
    to_left = right + rows * v_row
    to_right = to_left + rows * k_row
    state = to_right + rows * v_row
    d_state = state + n_k * v_row
    turned = d_state + n_k * v_row
    return Room(k_row, v_row, left, right, to_left, to_right, state, d_state, turned, turned + up(n_v, unit) * k_row)


@njit(error_model="numpy", cache=True)
def how_of(q, b, w, columns):
    """Sizes, read off the arrays."""
    return How(q.shape[1] // b.shape[1], q.shape[2], b.shape[2] * b.shape[3], q.shape[3], w.shape[4], columns)


@njit(error_model="numpy", cache=True)
def add_pairs(like, how, room, n, to):
    """A state += n rows of the left, turned, times as many of the right."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    vectors = room.v_row // (lanes(like) * size)
    multiply(
        like, to, room.v_row, room.left, size, room.k_row, room.right, room.v_row, up(how.keys, EIGHT), vectors, n, one, ONE, WHOLE, ONE
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def through(like, how, room, n, factor, state):
    """What n rows of the left make of a state."""
    apart()
    size = element_bytes(like)
    vectors = room.v_row // (lanes(like) * size)
    multiply(
        like, room.to_right, room.v_row, room.left, room.k_row, size, state, room.v_row, up(n, EIGHT), vectors, how.keys, factor, START, WHOLE, ONE
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def back_through(like, how, room, n, factor):
    """What n rows of the right make of the state that is turned."""
    apart()
    size = element_bytes(like)
    vectors = room.k_row // (lanes(like) * size)
    multiply(
        like, room.to_left, room.k_row, room.right, room.v_row, size, room.turned, room.k_row, up(n, EIGHT), vectors, how.values, factor, START,
        WHOLE, ONE,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def turn(like, how, room, state):
    """A state, turned."""
    apart()
    step = lanes(like)
    transpose(like, state, room.v_row, room.turned, room.k_row, up(how.keys, max(step, EIGHT)), up(how.values, step))


@njit(error_model="numpy", cache=True)
def write(like, how, room, b, w, states, state, column, width):
    """The state after everything was written: of some columns, in the room."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v = how.keys * size, how.values * size
    fetch(like, states + state * how.keys * v + column * size, v, how.keys, width, one, room.state, room.v_row)
    for t in range(0, how.rows, TOGETHER):
        n, row = min(TOGETHER, how.rows - t), state * how.rows + t
        fetch(like, b + row * k, k, n, how.keys, one, room.left, room.k_row)
        fetch(like, w + row * v + column * size, v, n, width, one, room.right, room.v_row)
        add_pairs(like, how, room, n, room.state)


@njit(error_model="numpy", inline="always")
def columns_forward(like, how, room, q, b, w, states, out, state, column, width, scale):
    """One task; `states` and `out` are addresses of the results."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v = how.keys * size, how.values * size
    write(like, how, room, b, w, states, state, column, width)
    deliver(like, room.state, room.v_row, how.keys, width, one, states + state * how.keys * v + column * size, v)
    for h in range(state * how.group, (state + 1) * how.group):
        for t in range(0, how.reads, TOGETHER):
            n, row = min(TOGETHER, how.reads - t), h * how.reads + t
            fetch(like, q + row * k, k, n, how.keys, one, room.left, room.k_row)
            through(like, how, room, n, scale, room.state)
            deliver(like, room.to_right, room.v_row, n, width, one, out + row * v + column * size, v)


@njit(error_model="numpy", inline="always")
def state_backward(like, how, room, q, b, w, states, d_out, d_q, d_b, d_w, d_states, state, scale):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v = how.keys * size, how.values * size
    at = state * how.keys * v
    write(like, how, room, b, w, states, state, START, how.values)
    turn(like, how, room, room.state)
    fetch(like, d_states + at, v, how.keys, how.values, one, room.d_state, room.v_row)
    for h in range(state * how.group, (state + 1) * how.group):
        for t in range(0, how.reads, TOGETHER):
            n, row = min(TOGETHER, how.reads - t), h * how.reads + t
            fetch(like, q + row * k, k, n, how.keys, scale, room.left, room.k_row)
            fetch(like, d_out + row * v, v, n, how.values, one, room.right, room.v_row)
            add_pairs(like, how, room, n, room.d_state)
            back_through(like, how, room, n, scale)
            deliver(like, room.to_left, room.k_row, n, how.keys, one, d_q + row * k, k)
    turn(like, how, room, room.d_state)
    for t in range(0, how.rows, TOGETHER):
        n, row = min(TOGETHER, how.rows - t), state * how.rows + t
        fetch(like, b + row * k, k, n, how.keys, one, room.left, room.k_row)
        fetch(like, w + row * v, v, n, how.values, one, room.right, room.v_row)
        back_through(like, how, room, n, one)
        deliver(like, room.to_left, room.k_row, n, how.keys, one, d_b + row * k, k)
        through(like, how, room, n, one, room.d_state)
        deliver(like, room.to_right, room.v_row, n, how.values, one, d_w + row * v, v)
    deliver(like, room.d_state, room.v_row, how.keys, how.values, one, d_states + at, v)


@njit(error_model="numpy", inline="always")
def take_forward(q, b, w, state, out, scale, columns, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    how = how_of(q, b, w, columns)
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    queries, keys, values = address(q, (0, 0, 0, 0)), address(b, (0, 0, 0, 0, 0)), address(w, (0, 0, 0, 0, 0))
    states, outs = address(state, (0, 0, 0, 0)), address(out, (0, 0, 0, 0))
    parts = (how.values + columns - 1) // columns
    task = take(counter)
    while task < b.shape[0] * b.shape[1] * parts:
        column = task % parts * columns
        columns_forward(like, how, room, queries, keys, values, states, outs, task // parts, column, min(columns, how.values - column), scale)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", inline="always")
def take_backward(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, counter):
    """Takes tasks until there are none."""
    like = lent(q.reshape(q.size))
    how = how_of(q, b, w, w.shape[4])
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    queries, keys, values = address(q, (0, 0, 0, 0)), address(b, (0, 0, 0, 0, 0)), address(w, (0, 0, 0, 0, 0))
    d_queries, d_keys, d_values = address(d_q, (0, 0, 0, 0)), address(d_b, (0, 0, 0, 0, 0)), address(d_w, (0, 0, 0, 0, 0))
    states, d_outs, d_states = address(state, (0, 0, 0, 0)), address(d_out, (0, 0, 0, 0)), address(d_state, (0, 0, 0, 0))
    task = take(counter)
    while task < b.shape[0] * b.shape[1]:
        state_backward(like, how, room, queries, keys, values, states, d_outs, d_queries, d_keys, d_values, d_states, task, scale)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def forward_worker(q, b, w, state, out, scale, columns, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_forward(q, b, w, state, out, scale, columns, counter)


@njit(error_model="numpy", nogil=True, cache=True)
def backward_worker(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, counter):
    """The same of gradients."""
    take_backward(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, counter)


def forward_alone(q, b, w, state, out, scale, columns):
    """On this thread; `state` is S0, and becomes S."""
    take_forward(q, b, w, state, out, scale, columns, np.zeros(1, np.int64))


def forward_parallel(q, b, w, state, out, scale, columns, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        forward_worker(q, b, w, state, out, scale, columns, counter)


def backward_alone(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale):
    """On this thread; `state` is S0, and d_state the cotangent of S, which becomes that of S0."""
    take_backward(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, np.zeros(1, np.int64))


def backward_parallel(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        backward_worker(q, b, w, state, d_out, d_q, d_b, d_w, d_state, scale, counter)


# ---- calls ---------------------------------------------------------------------------------------------------------------------------


def forward(lowered: Lowered, columns: int, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The output [B, Hq, T, V] and the state [B, H, K, V]; a task has so many columns."""
    out, state = np.zeros((*lowered.q.shape[:3], lowered.w.shape[4]), lowered.q.dtype), lowered.S0.copy()
    if state.size:
        arguments = (lowered.q, lowered.b, lowered.w, state, out, lowered.q.dtype.type(lowered.scale), columns)
        launch(forward_alone, forward_parallel, lowered.q.dtype, arguments, work(lowered), threads, kernel)
    return out, state


def backward(lowered: Lowered, d_out: np.ndarray, d_state: np.ndarray, threads: int | None = None) -> Lowered:
    """Gradients of sum(d_out * out) + sum(d_state * state), in the place of what they belong to."""
    number = lowered.q.dtype.type
    d_q, d_b, d_w, d_S0 = (*(np.zeros(x.shape, number) for x in (lowered.q, lowered.b, lowered.w)), np.array(d_state, number, order="C"))
    if d_S0.size:
        given = (lowered.q, lowered.b, lowered.w, lowered.S0, np.ascontiguousarray(d_out, number))
        arguments = (*given, d_q, d_b, d_w, d_S0, number(lowered.scale))
        launch(backward_alone, backward_parallel, lowered.q.dtype, arguments, 3.0 * work(lowered), threads, kernel)
    return replace(lowered, q=d_q, b=d_b, w=d_w, S0=d_S0)


def work(lowered: Lowered) -> float:
    """Products of numbers in a forward pass."""
    return float(lowered.q.size + lowered.b.size) * lowered.w.shape[4]
