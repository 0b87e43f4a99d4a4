"""Linear memories that learn with momentum, 64 tokens at a time: with u_t = -rate_t (the error of token t), every memory is a sum over tokens.

    S_t = E_t S + sum_j E_tj k_j u_j^T        E_tj = momentum_{j+1} ... momentum_t,   E_t alike from the chunk's first token on
    M_t = A_t M + B_t S + sum_j C_tj k_j u_j^T
    A_t = kept_t A_{t-1}        B_t = kept_t B_{t-1} + step_t E_t        C_tj = kept_t C_{t-1,j} + step_t E_tj

Errors are what the memory before token c(t) answers at p_t, less v_t.  Titans take c(t) for the first of t's own chunk of gradients and k_t for p_t,
Momentum DeltaNet every token for itself.  Where c lies among the 64 tokens, u reads earlier ones,

    u_t = -rate_t (A_c p_t^T M + B_c p_t^T S - v_t^T) - sum_{j < c} rate_t C_{c-1,j} (p_t . k_j) u_j,

a triangular system whatever the length of those chunks; before it the anchor that is carried is read instead.  Nothing is divided by.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..panels import START
from ..references import hold, lent
from ..simd import address, element_bytes, fill, fma, lanes, load_at, mul, number_at, put_at, splat_at, sub
from ..state.chunks import all_pairs, deliver, fetch, times_numbers, up, weigh
from ..state.products import EIGHT, LOWER, LOWER_RESULT, ONE, WHOLE, apart, multiply, rolled, substitute, transpose
from ..tasks import take
from ..threads import launch
from .kernels import kernel

#: Tokens that are computed together at most.
CHUNK = 64


class How(NamedTuple):
    """Heads that read a memory, tokens, keys, values, tokens whose gradients are taken at one memory, and tokens together at most.

    And whether errors are asked for at vectors of their own; at keys otherwise.
    """

    group: int
    tokens: int
    keys: int
    values: int
    chunk: int
    together: int
    asked: int


class Operands(NamedTuple):
    """Addresses of the caller's arrays."""

    q: int
    k: int
    v: int
    p: int
    momentum: int
    kept: int
    rate: int
    step: int
    state: int
    surprise: int
    anchor: int
    out: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, values or tokens along a row."""

    k_row: int
    v_row: int
    s_row: int
    q: int
    k: int
    p: int  # where errors are asked for
    by: int  # rows of one of them, each times a number
    turned: int  # keys, a column for each token
    v: int
    U: int
    momentum: int
    kept: int
    rate: int
    step: int
    E: int
    C: int
    from_E: int  # E before a token, and after the last; and so the next two
    from_A: int
    from_B: int
    numbers: int
    P: int
    out: int
    state: int
    surprise: int
    anchor: int
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows, n_k = up(how.together, unit) + unit, up(how.keys, unit)
    k_row, v_row, s_row = n_k * size, up(how.values, lanes(like)) * size, rows * size
    q = up(place, 64)
    k = q + rows * k_row
    p = k + how.asked * rows * k_row
    by = p + rows * k_row
    turned = by + rows * k_row
    v = turned + n_k * s_row
    U = v + rows * v_row
    momentum = U + rows * v_row
    kept = momentum + s_row
    rate = kept + s_row
    step = rate + s_row
    E = step + s_row
    C = E + rows * s_row
    from_E = C + rows * s_row
    from_A = from_E + s_row
    from_B = from_A + s_row
    numbers = from_B + s_row
    P = numbers + s_row
    out = P + rows * s_row
    state = out + rows * v_row
    surprise = state + n_k * v_row
    anchor = surprise + n_k * v_row
    return Room(
        k_row, v_row, s_row, q, k, p, by, turned, v, U, momentum, kept, rate, step, E, C, from_E, from_A, from_B, numbers, P, out, state, surprise,
        anchor, anchor + n_k * v_row,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def relate(like, room, n):
    """E, A, B and C of n tokens."""
    apart()
    size, one = element_bytes(like), like.dtype.type(1.0)
    all_pairs(like, room.momentum, ONE, n, room.E, room.s_row, room.from_E)
    put_at(room.from_A, one)
    put_at(room.from_B, like.dtype.type(0.0))
    for i in range(n):
        at, after = i * size, (i + 1) * size
        kept, step = number_at(like, room.kept + at), number_at(like, room.step + at)
        put_at(room.from_A + after, kept * number_at(like, room.from_A + at))
        put_at(room.from_B + after, kept * number_at(like, room.from_B + at) + step * number_at(like, room.from_E + after))
        every, by, row = fill(like, kept), fill(like, step), i * room.s_row
        for x in range(row, row + room.s_row, lanes(like) * size):
            rolled()
            c = mul(by, load_at(like, room.E + x))
            put_at(room.C + x, fma(every, load_at(like, room.C + x - room.s_row), c) if i else c)


@njit(error_model="numpy", cache=True)
def add_numbered(like, room, rows, numbers, n, keys, right, to, keep):
    """to = rows, each times its number, times right; or added to it."""
    apart()
    size, v_row = element_bytes(like), room.v_row
    times_numbers(like, rows, numbers, ONE, n, room.k_row, room.by)
    vectors, one = v_row // (lanes(like) * size), like.dtype.type(1.0)
    multiply(like, to, v_row, room.by, room.k_row, size, right, v_row, up(n, EIGHT), vectors, keys, one, keep, WHOLE, ONE)


@njit(error_model="numpy", cache=True)
def first_of(how, position, i):
    """c of token i, of which the first is at that position; below 0 where c lies before the first."""
    return i - (position + i) % how.chunk


@njit(error_model="numpy", cache=True)
def numbers_at(like, how, room, position, n, begin, source):
    """Numbers of the tokens' c from token `begin` on, and 0 before it."""
    size = element_bytes(like)
    for i in range(n):
        here = number_at(like, source + first_of(how, position, i) * size) if i >= begin else like.dtype.type(0.0)
        put_at(room.numbers + i * size, here)


@njit(error_model="numpy", cache=True)
def learn(like, how, room, position, n):
    """U of n tokens."""
    apart()
    size, one, rows = element_bytes(like), like.dtype.type(1.0), up(n, EIGHT)
    wide, v_row, s_row = lanes(like) * size, room.v_row, room.s_row
    begin = min(-position % how.chunk, n)  # tokens before it read the anchor
    if begin:
        for i in range(n):
            put_at(room.numbers + i * size, like.dtype.type(i < begin))
        add_numbered(like, room, room.p, room.numbers, n, how.keys, room.anchor, room.U, START)
    if begin < n:
        numbers_at(like, how, room, position, n, begin, room.from_A)
        add_numbered(like, room, room.p, room.numbers, n, how.keys, room.state, room.U, np.int64(begin > 0))
        numbers_at(like, how, room, position, n, begin, room.from_B)
        add_numbered(like, room, room.p, room.numbers, n, how.keys, room.surprise, room.U, ONE)
    for i in range(n):
        minus = fill(like, -number_at(like, room.rate + i * size))
        for x in range(i * v_row, (i + 1) * v_row, wide):
            rolled()
            put_at(room.U + x, mul(minus, sub(load_at(like, room.U + x), load_at(like, room.v + x))))
    if first_of(how, position, n - 1) > 0:  # otherwise nobody reads an error of these tokens
        times_numbers(like, room.p, room.rate, ONE, n, room.k_row, room.by)
        columns = (n + lanes(like) - 1) // lanes(like)
        multiply(like, room.P, s_row, room.by, room.k_row, size, room.turned, s_row, rows, columns, how.keys, one, START, LOWER_RESULT, ONE)
        for i in range(n):
            weigh(like, room.P + i * s_row, room.C, s_row, ONE, max(first_of(how, position, i), 0) - 1, START)
        substitute(like, room.U, v_row, room.P, s_row, size, rows, v_row // wide)


@njit(error_model="numpy", cache=True)
def read(like, how, room, operands, state, t, n, scale):
    """What the queries of n tokens read."""
    apart()
    size, one, none, rows = element_bytes(like), like.dtype.type(1.0), START, up(n, EIGHT)
    k_row, v_row, s_row = room.k_row, room.v_row, room.s_row
    columns, vectors = (n + lanes(like) - 1) // lanes(like), v_row // (lanes(like) * size)
    for h in range(state * how.group, (state + 1) * how.group):
        token, k, v = h * how.tokens + t, how.keys * size, how.values * size
        fetch(like, operands.q + token * k, k, n, how.keys, scale, room.q, k_row)
        multiply(like, room.P, s_row, room.q, k_row, size, room.turned, s_row, rows, columns, how.keys, one, none, LOWER_RESULT, ONE)
        weigh(like, room.P, room.C, s_row, n, START, ONE)
        multiply(like, room.out, v_row, room.P, s_row, size, room.U, v_row, rows, vectors, n, one, none, LOWER, ONE)
        add_numbered(like, room, room.q, room.from_A + size, n, how.keys, room.state, room.out, ONE)
        add_numbered(like, room, room.q, room.from_B + size, n, how.keys, room.surprise, room.out, ONE)
        deliver(like, room.out, v_row, n, how.values, one, operands.out + token * v, v)


@njit(error_model="numpy", cache=True)
def combined(like, how, room, n, weights, by_state, by_surprise, to):
    """to = numbers times M and S, and the weighted sum of n tokens' k_j u_j^T."""
    apart()
    size, v_row = element_bytes(like), room.v_row
    wide, first, second = lanes(like) * size, splat_at(like, by_state), splat_at(like, by_surprise)
    for x in range(0, how.keys * v_row, wide):
        rolled()
        put_at(to + x, fma(first, load_at(like, room.state + x), mul(second, load_at(like, room.surprise + x))))
    if n:
        times_numbers(like, room.k, weights, ONE, n, room.k_row, room.by)
        rows, one = up(how.keys, EIGHT), like.dtype.type(1.0)
        multiply(like, to, v_row, room.by, size, room.k_row, room.U, v_row, rows, v_row // wide, n, one, ONE, WHOLE, ONE)


@njit(error_model="numpy", cache=True)
def advance(like, how, room, position, n, last):
    """M, S and, if it will be read or is a result, the anchor after n tokens."""
    size, c = element_bytes(like), first_of(how, position, n - 1)
    if c >= 0 and (last or (position + n) % how.chunk):
        combined(like, how, room, c, room.C + (c - 1) * room.s_row, room.from_A + c * size, room.from_B + c * size, room.anchor)
    end = (n - 1) * room.s_row
    combined(like, how, room, n, room.C + end, room.from_A + n * size, room.from_B + n * size, room.state)
    combined(like, how, room, n, room.E + end, room.numbers, room.from_E + n * size, room.surprise)


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, state, start, scale):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    k, v, at = how.keys * size, how.values * size, state * how.keys * how.values * size
    unit = max(lanes(like), EIGHT)
    fetch(like, operands.state + at, v, how.keys, how.values, one, room.state, room.v_row)
    fetch(like, operands.surprise + at, v, how.keys, how.values, one, room.surprise, room.v_row)
    fetch(like, operands.anchor + at, v, how.keys, how.values, one, room.anchor, room.v_row)
    for t in range(0, how.tokens, CHUNK):
        n = min(CHUNK, how.tokens - t)
        token = state * how.tokens + t
        fetch(like, operands.k + token * k, k, n, how.keys, one, room.k, room.k_row)
        if how.asked:
            fetch(like, operands.p + token * k, k, n, how.keys, one, room.p, room.k_row)
        fetch(like, operands.v + token * v, v, n, how.values, one, room.v, room.v_row)
        deliver(like, operands.momentum + token * size, START, ONE, n, one, room.momentum, START)
        deliver(like, operands.kept + token * size, START, ONE, n, one, room.kept, START)
        deliver(like, operands.rate + token * size, START, ONE, n, one, room.rate, START)
        deliver(like, operands.step + token * size, START, ONE, n, one, room.step, START)
        transpose(like, room.k, room.k_row, room.turned, room.s_row, up(n, unit), up(how.keys, unit))
        relate(like, room, n)
        learn(like, how, room, start + t, n)
        read(like, how, room, operands, state, t, n, scale)
        put_at(room.numbers, like.dtype.type(0.0))
        advance(like, how, room, start + t, n, t + n == how.tokens)
    deliver(like, room.state, room.v_row, how.keys, how.values, one, operands.state + at, v)
    deliver(like, room.surprise, room.v_row, how.keys, how.values, one, operands.surprise + at, v)
    deliver(like, room.anchor, room.v_row, how.keys, how.values, one, operands.anchor + at, v)


@njit(error_model="numpy", inline="always")
def take_tasks(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, keys = k.shape
    how = How(q.shape[1] // kv_heads, tokens, keys, v.shape[3], chunk, min(CHUNK, tokens), int(p.size > 0))
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(v, (0, 0, 0, 0)), address(p, (0, 0, 0, 0)), address(momentum, (0, 0, 0)),
        address(kept, (0, 0, 0)), address(rate, (0, 0, 0)), address(step, (0, 0, 0)), address(state, (0, 0, 0, 0)), address(surprise, (0, 0, 0, 0)),
        address(anchor, (0, 0, 0, 0)), address(out, (0, 0, 0, 0)),
    )  # fmt: skip
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, task, starts[task // kv_heads], scale)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, counter)


def forward_alone(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk):
    """On this thread."""
    take_tasks(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, np.zeros(1, np.int64))


def forward_parallel(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, p, momentum, kept, rate, step, starts, state, surprise, anchor, out, scale, chunk, counter)


def learn_and_read(
    tokens: tuple[np.ndarray, ...],
    starts: np.ndarray,
    memories: tuple[np.ndarray, ...],
    out: np.ndarray,
    scale: float,
    chunk: int,
    threads: int | None,
) -> None:
    """What queries read, and memory, surprise and anchor after the last token in their place; the same for any number of threads.

    Parameters
    ----------
    tokens : tuple of ndarray
        q, k, v [B, H, T, .], p alike or empty where it is k, and momentum, kept, rate and step [B, H, T].
    starts : ndarray
        Tokens before the first, [B].
    memories : tuple of ndarray
        Memory, surprise and anchor before the first token, [B, H, K, V].
    out : ndarray
    scale : float
        Of queries.
    chunk : int
        Tokens whose errors are taken at one memory.
    threads : int, optional
        As many as Numba uses, unless said.
    """
    if out.size:
        arguments = (*tokens, starts, *memories, out, out.dtype.type(scale), chunk)
        launch(forward_alone, forward_parallel, out.dtype, arguments, 2.0 * out.size * tokens[1].shape[3], threads, kernel)
