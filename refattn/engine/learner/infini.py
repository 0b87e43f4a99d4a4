"""Infini-attention, 64 tokens at a time: softmax within a segment, tile by tile, and a memory that is read before its segment is written.

The memory's matrix has one column more, the sum of all features: what is read of it is what the others are divided by, and a value of 1 writes it.
With m for the largest score of a query so far, l for the sum of its exponentials and o for that of the values, each with its exponential, a tile of
scores s_j turns

    m' = max(m, s_j),     l' = exp(m - m') l + sum_j exp(s_j - m'),     o' = exp(m - m') o + sum_j exp(s_j - m') v_j
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ...problem import Problem
from ..panels import LOG2_E, START
from ..references import hold, lent
from ..simd import add, address, element_bytes, exp2_below, fill, fma, lanes, load_at, maximum, mul, number_at, put_at, sub, total, widest
from ..state.chunks import clear, deliver, fetch, up
from ..state.products import EIGHT, LOWER, LOWER_RESULT, ONE, WHOLE, apart, multiply, rolled, transpose
from ..tasks import take
from ..threads import launch
from .arrays import carried, results, whole
from .kernels import kernel

#: Tokens of a tile.
CHUNK = 64


class How(NamedTuple):
    """Heads that read a memory, tokens, keys, values, tokens of a segment and of a tile, and whether what the memory says of a value is taken off."""

    group: int
    tokens: int
    keys: int
    values: int
    segment: int
    together: int
    delta: int


class Operands(NamedTuple):
    """Addresses of the caller's arrays, and of the features of queries and keys."""

    q: int
    k: int
    q_features: int
    k_features: int
    v: int
    shares: int  # of the memory, for each head of each sequence
    rests: int
    state: int
    mass: int
    out: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, values and a mass, or tokens along a row."""

    k_row: int
    v_row: int
    s_row: int
    rows: int  # of a head's queries
    q: int
    k: int
    turned: int  # keys, a column for each token
    v: int
    P: int
    recalled: int
    out: int
    tops: int
    totals: int
    state: int
    written: int  # what the segment adds to it
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows, n_k = up(how.together, unit), up(how.keys, unit)
    k_row, v_row, s_row = n_k * size, up(how.values + 1, lanes(like)) * size, rows * size
    q = up(place, 64)
    k = q + how.group * rows * k_row
    turned = k + rows * k_row
    v = turned + n_k * s_row
    P = v + rows * v_row
    recalled = P + rows * s_row
    out = recalled + rows * v_row
    tops = out + how.group * rows * v_row
    totals = tops + how.group * s_row
    state = totals + how.group * s_row
    written = state + n_k * v_row
    return Room(k_row, v_row, s_row, rows, q, k, turned, v, P, recalled, out, tops, totals, state, written, written + n_k * v_row)


@njit(error_model="numpy", cache=True)
def weigh(like, room, n, m, ahead, out, tops, totals):
    """Scores of n queries become weights of m keys, and of later ones than the query's own, if they are `ahead`, 0; sums so far are made smaller."""
    apart()
    size = element_bytes(like)
    wide, every = lanes(like) * size, fill(like, LOG2_E)
    for r in range(n):
        row = room.P + r * room.s_row
        seen = r + 1 if ahead else m
        end = up(seen, lanes(like)) * size
        for x in range(seen * size, end, size):
            put_at(row + x, like.dtype.type(-np.inf))
        before = number_at(like, tops + r * size)
        top = fill(like, before)
        for x in range(0, end, wide):
            rolled()
            top = maximum(top, load_at(like, row + x))
        highest = widest(top)
        top, sums = fill(like, highest), fill(like, 0.0)
        for x in range(0, end, wide):
            rolled()
            weight = exp2_below(mul(every, sub(load_at(like, row + x), top)))
            sums = add(sums, weight)
            put_at(row + x, weight)
        for x in range(end, room.s_row, wide):
            rolled()
            put_at(row + x, fill(like, 0.0))
        shrunk = like.dtype.type(math.exp(before - highest))
        put_at(tops + r * size, highest)
        put_at(totals + r * size, number_at(like, totals + r * size) * shrunk + total(sums))
        by = fill(like, shrunk)
        for x in range(out + r * room.v_row, out + (r + 1) * room.v_row, wide):
            rolled()
            put_at(x, mul(by, load_at(like, x)))


@njit(error_model="numpy", cache=True)
def attend(like, how, room, operands, state, first, t, n, scale):
    """Softmax of n queries over the keys of their segment, not yet divided by its sums."""
    apart()
    size, one, none = element_bytes(like), like.dtype.type(1.0), START
    k, v, unit = how.keys * size, how.values * size, max(lanes(like), EIGHT)
    vectors = room.v_row // (lanes(like) * size)
    for h in range(how.group):
        token = (state * how.group + h) * how.tokens + t
        fetch(like, operands.q + token * k, k, n, how.keys, scale, room.q + h * room.rows * room.k_row, room.k_row)
        clear(like, room.out + h * room.rows * room.v_row, room.v_row, up(n, EIGHT), room.v_row)
        for r in range(n):
            put_at(room.tops + h * room.s_row + r * size, like.dtype.type(-np.inf))
            put_at(room.totals + h * room.s_row + r * size, like.dtype.type(0.0))
    for s in range(first, t + n, CHUNK):
        m, key = min(CHUNK, t + n - s), state * how.tokens + s
        fetch(like, operands.k + key * k, k, m, how.keys, one, room.k, room.k_row)
        fetch(like, operands.v + key * v, v, m, how.values, one, room.v, room.v_row)
        transpose(like, room.k, room.k_row, room.turned, room.s_row, up(m, unit), up(how.keys, unit))
        columns, own = (m + lanes(like) - 1) // lanes(like), s == t
        for h in range(how.group):
            q, out = room.q + h * room.rows * room.k_row, room.out + h * room.rows * room.v_row
            wanted, there = LOWER_RESULT if own else WHOLE, LOWER if own else WHOLE
            multiply(like, room.P, room.s_row, q, room.k_row, size, room.turned, room.s_row, up(n, EIGHT), columns, how.keys, one, none, wanted, ONE)
            weigh(like, room, n, m, own, out, room.tops + h * room.s_row, room.totals + h * room.s_row)
            clear(like, room.P + n * room.s_row, room.s_row, up(n, EIGHT) - n, room.s_row)
            multiply(like, out, room.v_row, room.P, room.s_row, size, room.v, room.v_row, up(n, EIGHT), vectors, m, one, ONE, there, ONE)


@njit(error_model="numpy", cache=True)
def recall(like, how, room, features, n):
    """What the memory says for n tokens' features, and in the last column what it is to be divided by, or 1."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    fetch(like, features, how.keys * size, n, how.keys, one, room.k, room.k_row)
    vectors = room.v_row // (lanes(like) * size)
    multiply(
        like, room.recalled, room.v_row, room.k, room.k_row, size, room.state, room.v_row, up(n, EIGHT), vectors, how.keys, one, START, WHOLE, ONE
    )  # fmt: skip
    for r in range(n):
        place = room.recalled + r * room.v_row + how.values * size
        if number_at(like, place) == 0.0:
            put_at(place, one)


@njit(error_model="numpy", cache=True)
def join(like, how, room, operands, state, t, n):
    """Outputs of n queries, of both."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v, wide = how.keys * size, how.values * size, lanes(like) * size
    for h in range(how.group):
        head, out = state * how.group + h, room.out + h * room.rows * room.v_row
        token = head * how.tokens + t
        recall(like, how, room, operands.q_features + token * k, n)
        share, rest = number_at(like, operands.shares + head * size), number_at(like, operands.rests + head * size)
        for r in range(n):
            row, read = out + r * room.v_row, room.recalled + r * room.v_row
            of_memory = fill(like, share / number_at(like, read + v))
            of_softmax = fill(like, rest / number_at(like, room.totals + h * room.s_row + r * size))
            for x in range(0, room.v_row, wide):
                rolled()
                put_at(row + x, fma(of_memory, load_at(like, read + x), mul(of_softmax, load_at(like, row + x))))
        deliver(like, out, room.v_row, n, how.values, one, operands.out + token * v, v)


@njit(error_model="numpy", cache=True)
def remember(like, how, room, operands, state, first, last):
    """The memory after a segment."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v, wide = how.keys * size, how.values * size, lanes(like) * size
    vectors, rows = room.v_row // wide, up(how.keys, EIGHT)
    clear(like, room.written, room.v_row, up(how.keys, max(lanes(like), EIGHT)), room.v_row)
    for t in range(first, last, CHUNK):
        n, token = min(CHUNK, last - t), state * how.tokens + t
        recall(like, how, room, operands.k_features + token * k, n)
        fetch(like, operands.v + token * v, v, n, how.values, one, room.v, room.v_row)
        for r in range(n):
            row, read = room.v + r * room.v_row, room.recalled + r * room.v_row
            if how.delta:
                by = fill(like, -one / number_at(like, read + v))
                for x in range(0, room.v_row, wide):
                    rolled()
                    put_at(row + x, fma(by, load_at(like, read + x), load_at(like, row + x)))
            put_at(row + v, one)
        multiply(
            like, room.written, room.v_row, room.k, size, room.k_row, room.v, room.v_row, rows, vectors, n, one, ONE, WHOLE, ONE
        )  # fmt: skip
    for x in range(0, how.keys * room.v_row, wide):
        rolled()
        put_at(room.state + x, add(load_at(like, room.state + x), load_at(like, room.written + x)))


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, state, scale):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    v = how.values * size
    memory, masses = operands.state + state * how.keys * v, operands.mass + state * how.keys * size
    fetch(like, memory, v, how.keys, how.values, one, room.state, room.v_row)
    for x in range(how.keys):
        put_at(room.state + x * room.v_row + v, number_at(like, masses + x * size))
    for first in range(0, how.tokens, how.segment):
        last = min(first + how.segment, how.tokens)
        for t in range(first, last, CHUNK):
            n = min(CHUNK, last - t)
            attend(like, how, room, operands, state, first, t, n, scale)
            join(like, how, room, operands, state, t, n)
        remember(like, how, room, operands, state, first, last)
    deliver(like, room.state, room.v_row, how.keys, how.values, one, memory, v)
    for x in range(how.keys):
        put_at(masses + x * size, number_at(like, room.state + x * room.v_row + v))


@njit(error_model="numpy", inline="always")
def take_tasks(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, keys = k.shape
    how = How(q.shape[1] // kv_heads, tokens, keys, v.shape[3], segment, min(CHUNK, segment, tokens), delta)
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(q_features, (0, 0, 0, 0)), address(k_features, (0, 0, 0, 0)),
        address(v, (0, 0, 0, 0)), address(shares, 0), address(rests, 0), address(state, (0, 0, 0, 0)), address(mass, (0, 0, 0)),
        address(out, (0, 0, 0, 0)),
    )  # fmt: skip
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, task, scale)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, counter)


def forward_alone(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta):
    """On this thread."""
    take_tasks(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, np.zeros(1, np.int64))


def forward_parallel(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, q_features, k_features, v, shares, rests, state, mass, out, scale, segment, delta, counter)


# ---- the call ------------------------------------------------------------------------------------------------------------------------


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    q, k, v, mix = whole(problem, "q", "k", "v", "mix")
    (state, mass), (out,), number = carried(problem, "state", "mass"), results(problem, "out"), q.dtype.type
    if out.size:
        params, logits = problem.params, mix.astype(np.float64)
        shares, rests = (np.tile(np.exp(-np.logaddexp(0.0, -x)).astype(number), problem.dims["B"]) for x in (logits, -logits))
        scale = problem.dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
        arrays = (q, k, features(q), features(k), v, shares, rests, state, mass, out)
        arguments = (*arrays, number(scale), params["segment"], int(params["update"] == "delta"))
        work = float(out.size) * (min(params["segment"], problem.dims["T"]) + 2 * problem.dims["D"])
        launch(forward_alone, forward_parallel, out.dtype, arguments, work, threads, kernel)
    return {"out": out, "state": state, "mass": mass}


def features(x: np.ndarray) -> np.ndarray:
    """elu(x) + 1."""
    with np.errstate(all="ignore"):
        return np.where(x > 0.0, x + 1, np.exp(np.minimum(x, 0)))
