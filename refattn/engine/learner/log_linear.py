"""Log-linear attention, chunk by chunk: a chunk is an aligned block of the tree's positions, or what a sequence has of one.

The level of two tokens of a block hangs on their places in it, and everything before the block is at one level for all its tokens, that of the state
it lies in.  So with D_t for the product of the decays up to token t of the chunk, and D_tj for those after j,

    out_t = sum_j level_scale_t[level(t, j)] D_tj (q_t . k_j) v_j + D_t sum_l level_scale_t[max(l, level(t, first))] q_t^T S[l]

where the maximum is for a sequence that begins inside a block: what came before it in the block is in levels that are still to be merged.
Between two chunks all levels that the first token of the second one merges are one state, and the first chunk's tokens are added to that; after the
last chunk they go to the levels in which the tree leaves them, neighbours all, so that each is a product.  A level that holds nothing is not read,
whatever its weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ...problem import Problem
from ..panels import START
from ..references import hold, lent
from ..simd import add, address, element_bytes, lanes, load_at, mul, number_at, put_at, splat_at, times_unless_zero
from ..state.chunks import all_pairs, clear, deliver, exponentials, fetch, times_numbers, up
from ..state.products import EIGHT, LOWER, LOWER_RESULT, ONE, WHOLE, apart, multiply, rolled, transpose
from ..tasks import take
from ..threads import launch
from .arrays import carried, positions, results, whole
from .kernels import kernel

#: Tokens of a chunk at most, and the levels inside one beside that of the token itself.
CHUNK, INNER = 64, 6


class How(NamedTuple):
    """Heads that read a state, tokens, keys, values, levels, tokens of a chunk at most, and whether there is a state before the first token."""

    group: int
    tokens: int
    keys: int
    values: int
    levels: int
    chunk: int
    given: int


class Operands(NamedTuple):
    """Addresses of the caller's arrays."""

    q: int
    k: int
    v: int
    gate: int
    level_scale: int
    states: int
    out: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, values or tokens along a row; and bytes of a state."""

    k_row: int
    v_row: int
    s_row: int
    level: int
    q: int
    q_far: int
    k: int
    k_tail: int
    v: int
    turned: int  # keys, a column for each token
    decays: int
    far: int  # products of the decays before a token, and after the last
    pairs: int  # products of the decays after one token up to another
    weights: int  # of a query for every token
    numbers: int
    P: int
    out: int
    states: int
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows = up(how.chunk, unit) + unit
    k_row, v_row, s_row, n_k = up(how.keys, unit) * size, up(how.values, lanes(like)) * size, rows * size, up(how.keys, unit)
    level = n_k * v_row
    q = up(place, 64)
    q_far = q + rows * k_row
    k = q_far + rows * k_row
    k_tail = k + rows * k_row
    v = k_tail + rows * k_row
    turned = v + rows * v_row
    decays = turned + n_k * s_row
    far = decays + s_row
    pairs = far + s_row
    weights = pairs + rows * s_row
    numbers = weights + s_row
    P = numbers + s_row
    out = up(P + rows * s_row, 64)
    states = out + rows * v_row
    return Room(
        k_row, v_row, s_row, level, q, q_far, k, k_tail, v, turned, decays, far, pairs, weights, numbers, P, out, states,
        states + how.levels * level,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def bit_length(n):
    """Bits of a number that is not negative."""
    length = 0
    while n >> length:
        length += 1
    return length


@njit(error_model="numpy", cache=True)
def tokens_at(level, first, i):
    """Tokens of a chunk that are at a level for its token i, from one up to another; `first` is the place of the chunk's first in the block."""
    if level == 0:
        return i, i + 1
    bit, place = level - 1, first + i
    end = (place >> bit << bit) - first if place >> bit & 1 else START
    return max(end - (1 << bit), START), max(end, START)


@njit(error_model="numpy", cache=True)
def merged_into(position, levels):
    """The level that takes in all below it before the token at that position is written; 0 where none does."""
    return min(bit_length(position ^ (position - 1)), levels - 1) if position > 0 else 0


@njit(error_model="numpy", cache=True)
def merge(like, states, used, into, size):
    """All levels below one, of so many bytes, are added to it."""
    apart()
    wide, to = lanes(like) * element_bytes(like), states + into * size
    for level in range(into):
        if used[level]:
            if not used[into]:
                clear(like, to, size, ONE, size)
            for x in range(0, size, wide):
                rolled()
                put_at(to + x, add(load_at(like, to + x), load_at(like, states + level * size + x)))
            used[level], used[into] = 0, 1


@njit(error_model="numpy", cache=True)
def weigh(like, room, n, first, scales, levels):
    """P times decays and the query's weights of levels, for the tokens of a block from its place `first` on; zero beyond the query's own token."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for i in range(n):
        row = scales + i * levels * size
        for level in range(INNER, -1, -1):  # the farthest first: what a level's last vector has too much of is written again by the next
            begin, end = tokens_at(level, first, i)
            by = splat_at(like, row + min(level, levels - 1) * size)
            for x in range(begin * size, end * size, wide):
                rolled()
                put_at(room.weights + x, by)
        pairs, P = room.pairs + i * room.s_row, room.P + i * room.s_row
        for x in range(0, up((i + EIGHT) * size, wide), wide):
            rolled()
            there = mul(load_at(like, P + x), load_at(like, room.weights + x))
            put_at(P + x, times_unless_zero(load_at(like, pairs + x), there))


@njit(error_model="numpy", cache=True)
def weights_before(like, room, n, first, level, scales, levels):
    """A number for each query of a chunk: what is left of a level that was before it, times the weight of the level it is at by then."""
    apart()
    size, at = element_bytes(like), level
    for i in range(n):
        at = max(at, min(bit_length((first + i) ^ first), levels - 1))
        put_at(room.numbers + i * size, number_at(like, room.far + (i + 1) * size) * number_at(like, scales + (i * levels + at) * size))


@njit(error_model="numpy", cache=True)
def read(like, how, room, operands, used, state, t, n, first, scale):
    """Outputs of a chunk."""
    apart()
    size, one, none, rows = element_bytes(like), like.dtype.type(1.0), START, up(n, EIGHT)
    k_row, v_row, s_row, vectors = room.k_row, room.v_row, room.s_row, room.v_row // (lanes(like) * element_bytes(like))
    columns = (n + lanes(like) - 1) // lanes(like)
    for h in range(state * how.group, (state + 1) * how.group):
        token = h * how.tokens + t
        scales = operands.level_scale + token * how.levels * size
        fetch(like, operands.q + token * how.keys * size, how.keys * size, n, how.keys, scale, room.q, k_row)
        multiply(like, room.P, s_row, room.q, k_row, size, room.turned, s_row, rows, columns, how.keys, one, none, LOWER_RESULT, ONE)
        weigh(like, room, n, first, scales, how.levels)
        multiply(like, room.out, v_row, room.P, s_row, size, room.v, v_row, rows, vectors, n, one, none, LOWER, ONE)
        for level in range(how.levels):
            if used[level]:
                weights_before(like, room, n, first, level, scales, how.levels)
                times_numbers(like, room.q, room.numbers, ONE, n, k_row, room.q_far)
                there = room.states + level * room.level
                multiply(like, room.out, v_row, room.q_far, k_row, size, there, v_row, rows, vectors, how.keys, one, ONE, WHOLE, ONE)
        deliver(like, room.out, v_row, n, how.values, one, operands.out + token * how.values * size, how.values * size)


@njit(error_model="numpy", cache=True)
def write(like, how, room, used, begin, end, level):
    """Some tokens of a chunk are added to a level."""
    apart()
    size, to = element_bytes(like), room.states + level * room.level
    rows, vectors = up(how.keys, EIGHT), room.v_row // (lanes(like) * size)
    keys, values = room.k_tail + begin * room.k_row, room.v + begin * room.v_row
    one, kept = like.dtype.type(1.0), np.int64(used[level])
    multiply(like, to, room.v_row, keys, size, room.k_row, values, room.v_row, rows, vectors, end - begin, one, kept, WHOLE, ONE)
    used[level] = 1


@njit(error_model="numpy", cache=True)
def advance(like, how, room, used, n, first, into):
    """The states after a chunk: into one level, which takes in all below it, or the levels of the tree if that is -1."""
    apart()
    size, last = element_bytes(like), first + n - 1
    merge(like, room.states, used, into if into >= 0 else min(bit_length(last ^ first), how.levels - 1), room.level)
    for level in range(how.levels):
        if used[level]:
            times_numbers(like, room.states + level * room.level, room.far + n * size, ONE, ONE, room.level, room.states + level * room.level)
    times_numbers(like, room.k, room.pairs + (n - 1) * room.s_row, ONE, n, room.k_row, room.k_tail)
    if into >= 0:
        write(like, how, room, used, START, n, into)
        return
    for level in range(INNER + 1):
        begin, end = tokens_at(level, first, n - 1)
        if begin < end:
            write(like, how, room, used, begin, end, min(level, how.levels - 1))


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, used, state, start, scale):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    v, unit = how.values * size, lanes(like)
    there = operands.states + state * how.levels * how.keys * v
    for level in range(how.levels):
        used[level] = how.given
        if how.given:
            fetch(like, there + level * how.keys * v, v, how.keys, how.values, one, room.states + level * room.level, room.v_row)
    merge(like, room.states, used, merged_into(start, how.levels), room.level)
    t = START
    while t < how.tokens:
        first = (start + t) % CHUNK
        n = min(CHUNK - first, how.tokens - t)
        token = state * how.tokens + t
        fetch(like, operands.k + token * how.keys * size, how.keys * size, n, how.keys, one, room.k, room.k_row)
        fetch(like, operands.v + token * v, v, n, how.values, one, room.v, room.v_row)
        deliver(like, operands.gate + token * size, START, ONE, n, one, room.decays, START)
        exponentials(like, room.decays, room.s_row // (size * unit))
        all_pairs(like, room.decays, ONE, n, room.pairs, room.s_row, room.far)
        transpose(like, room.k, room.k_row, room.turned, room.s_row, up(n, max(unit, EIGHT)), up(how.keys, max(unit, EIGHT)))
        read(like, how, room, operands, used, state, t, n, first, scale)
        t += n
        advance(like, how, room, used, n, first, merged_into(start + t, how.levels) if t < how.tokens else START - 1)
    for level in range(how.levels):
        if not used[level]:
            clear(like, room.states + level * room.level, room.level, ONE, room.level)
        deliver(like, room.states + level * room.level, room.v_row, how.keys, how.values, one, there + level * how.keys * v, v)


@njit(error_model="numpy", inline="always")
def take_tasks(q, k, v, gate, level_scale, starts, states, out, scale, given, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, keys = k.shape
    how = How(q.shape[1] // kv_heads, tokens, keys, v.shape[3], level_scale.shape[3], min(CHUNK, tokens), given)
    owned, used = np.zeros(room_at(like, how, START).end + 64, np.uint8), np.zeros(how.levels, np.int64)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(v, (0, 0, 0, 0)), address(gate, (0, 0, 0)),
        address(level_scale, (0, 0, 0, 0)), address(states, (0, 0, 0, 0, 0)), address(out, (0, 0, 0, 0)),
    )  # fmt: skip
    flags = lent(used)
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, flags, task, starts[task // kv_heads], scale)
        task = take(counter)
    hold((owned, used))


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, gate, level_scale, starts, states, out, scale, given, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, k, v, gate, level_scale, starts, states, out, scale, given, counter)


def forward_alone(q, k, v, gate, level_scale, starts, states, out, scale, given):
    """On this thread."""
    take_tasks(q, k, v, gate, level_scale, starts, states, out, scale, given, np.zeros(1, np.int64))


def forward_parallel(q, k, v, gate, level_scale, starts, states, out, scale, given, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, gate, level_scale, starts, states, out, scale, given, counter)


# ---- the call ------------------------------------------------------------------------------------------------------------------------


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    operands = whole(problem, "q", "k", "v", "gate", "level_scale")
    (states,), (out,), starts = carried(problem, "state"), results(problem, "out"), positions(problem)
    if out.size:
        arguments = (*operands, starts, states, out, out.dtype.type(problem.params["scale"]), int("initial_state" in problem.given))
        work = float(out.size) * problem.dims["D"]
        launch(forward_alone, forward_parallel, out.dtype, arguments, work, threads, kernel)
    return {"out": out, "state": states, "position": starts + float(problem.dims["T"])}
