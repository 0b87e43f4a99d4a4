"""A chunk of tokens: what its steps read of one another, and of the state before it.

The R writes of a token are steps of their own.  Within a chunk, with D_t for the diagonal matrix of token t's decay and s_j for the step's token,

    U   = (1 + A)**-1 (W - E^ S)        A_ij = e_i . (D_(s_j + 1) ... D_t) b_j        E^_i = D_1 ... D_t e_i
    out = Q^ S + P U                    P_tj = q_t . (D_(s_j + 1) ... D_t) b_j        Q^_t = D_1 ... D_t q_t
    S   <- D_1 ... D_n S + B~^T U                                                     B~_j = D_(s_j + 1) ... D_n b_j

Where columns of the state fade too, and nothing is erased, with F_t for the diagonal matrix of theirs,

    out_t = (Q^ S)_t F_1 ... F_t + sum_j P_tj (w_j F_(s_j + 1) ... F_t),    S <- D_1 ... D_n S F_1 ... F_n + B~^T U,    U_j = w_j F_(s_j + 1) ... F_n

where A has the steps j before i and P those that query t sees, and an old erasure or an exclusive query ends its products at t - 1 in place of t.

Every factor is a product of decays, never a quotient, and no logarithm is summed: exp(G_t - G_j) of sums G loses digits when either is large, is
NaN after a decay of 0, and split into exp(G_t) exp(-G_j) it overflows.  With one decay for the whole state all products of a chunk are one small
matrix.  With a decay for every key they would be a cube: so tokens come in blocks of sixteen steps, and from block to block both sides have
their own part of the product, up to where the row's block begins and from there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from ..panels import LOG2_E, START
from ..simd import address, element_bytes, exp2, fill, lanes, load_at, load_part_at, mul, number_at, prefetch_at, put_at, splat_at, times_unless_zero
from .products import EIGHT, LOWER_RESULT, ONE, WHOLE, apart, faded_row, multiply, rolled, substitute, transpose

#: Steps of a chunk, of one whose gradients are taken, and of a block, or one token's where it has more.
CHUNK, CHUNK_BACK, BLOCK = 32, 64, 16
#: An answer that is no literal.
YES = np.bool_(True)
#: What fades: nothing, the state as one, or every row of it by itself.
NO_DECAY, ONE_DECAY, OWN_DECAYS = range(3)


class How(NamedTuple):
    """Sizes and switches: heads that read a state, tokens, steps of one, keys, values, tokens of a chunk and of a block, columns of a task."""

    group: int
    tokens: int
    steps: int
    keys: int
    values: int
    chunk: int
    block: int
    columns: int
    decay: int
    erase: int
    old: int
    exclusive: int
    bonus: int
    fade: int  # whether columns do


class Operands(NamedTuple):
    """Addresses of the caller's arrays."""

    q: int
    b: int
    w: int
    e: int
    g: int
    u: int
    f: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, values or steps along a row; and rows of a head's queries."""

    k_row: int
    v_row: int
    s_row: int
    q_rows: int
    q: int  # queries of all heads, times the scale
    b: int
    e: int
    w: int  # values, then U
    a: int  # decays: a row of them, or a row for every token
    far: int  # D_1 ... D_t, row t: 1 to begin with
    near: int  # the same from the beginning of a block
    tail: int  # D_(t + 1) ... D_n, row t
    pairs: int  # all products of decays of a chunk, where they are numbers
    q_near: int
    e_near: int
    b_tail: int
    turned: int  # keys, one column for each step
    A: int
    P: int
    q_far: int
    e_far: int
    b_far: int
    bonus: int
    state: int
    out: int
    a_steps: int  # decays of a block, a row for every step
    f: int  # decays of columns, a row for every token
    f_far: int  # F_1 ... F_t, row t
    f_tail: int  # F_(t + 1) ... F_n, row t
    spare: int  # what the backward pass has beside


@njit(error_model="numpy", cache=True)
def up(n, unit):
    """n rounded up to a multiple."""
    return (n + unit - 1) // unit * unit


@njit(error_model="numpy", cache=True)
def room_at(like, how, place, in_place):
    """Where everything lies from an address on; `spare` ends it.  With `in_place` far sides replace what they are made of."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    steps, n_k = up(how.chunk * how.steps, unit) + unit, up(how.keys, unit)
    k_row, v_row, s_row = n_k * size, up(how.columns, lanes(like)) * size, steps * size
    q_rows = up(how.chunk, unit) + unit
    place = up(place, 64)
    q = place
    b = q + how.group * q_rows * k_row
    e = b + steps * k_row
    w = e + steps * k_row
    a = w + steps * v_row
    far = a + q_rows * k_row + s_row
    near = far + q_rows * k_row + s_row
    tail = near + (how.block + 1) * k_row
    pairs = tail + q_rows * k_row
    q_near = pairs + steps * s_row
    e_near = q_near + (how.block + unit) * k_row
    b_tail = e_near + (how.block * how.steps + unit) * k_row
    turned = b_tail + (how.block * how.steps + unit) * k_row
    A = turned + n_k * s_row
    P = A + steps * s_row
    bonus = P + how.group * q_rows * s_row
    state = up(bonus + how.group * q_rows * how.steps * size, 64)
    out = state + n_k * v_row
    a_steps = out + how.group * q_rows * v_row
    f = a_steps + (BLOCK + 1) * k_row
    f_far = f + how.fade * q_rows * v_row
    f_tail = f_far + how.fade * q_rows * v_row
    q_far = f_tail + how.fade * q_rows * v_row
    e_far = q_far + (0 if in_place else how.group * q_rows * k_row)
    b_far = e_far + (0 if in_place else steps * k_row)
    spare = b_far + (0 if in_place else steps * k_row)
    if in_place:
        q_far, e_far, b_far = q, e, b
    return Room(
        k_row, v_row, s_row, q_rows, q, b, e, w, a, far, near, tail, pairs, q_near, e_near, b_tail, turned, A, P, q_far, e_far, b_far, bonus, state,
        out, a_steps, f, f_far, f_tail, spare,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def how_of(q, b, w, e, g, u, f, chunk, block, columns, old, exclusive):
    """Sizes and switches, read off the arrays."""
    decay = NO_DECAY if g.size == 0 else ONE_DECAY if g.shape[3] == 1 and q.shape[3] > 1 else OWN_DECAYS
    group, steps = q.shape[1] // b.shape[1], b.shape[3]
    return How(
        group, q.shape[2], steps, q.shape[3], w.shape[4], chunk, block, columns, decay, int(e.size > 0), old, exclusive, int(u.size > 0),
        int(f.size > 0),
    )  # fmt: skip


@njit(error_model="numpy", inline="always")
def operands_of(q, b, w, e, g, u, f):
    return Operands(
        address(q, (0, 0, 0, 0)), address(b, (0, 0, 0, 0, 0)), address(w, (0, 0, 0, 0, 0)), address(e, (0, 0, 0, 0, 0)), address(g, (0, 0, 0, 0)),
        address(u, (0, 0, 0, 0)), address(f, (0, 0, 0, 0)),
    )  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def fetch(like, source, source_row, rows, columns, factor, target, target_row):
    """target = factor * source; columns up to the end of a row, and rows up to whole vectors and eights of them, become zero.

    As many rows after these, the next chunk's, are called for.
    """
    apart()
    step, size = lanes(like), element_bytes(like)
    wide, whole, every, zero = step * size, columns // step * step * size, fill(like, factor), fill(like, 0.0)
    for r in range(rows):
        come, go = source + r * source_row, target + r * target_row
        for x in range(0, whole, wide):
            rolled()
            prefetch_at(come + rows * source_row + x)
            put_at(go + x, mul(every, load_at(like, come + x)))
        if whole < target_row:
            put_at(go + whole, mul(every, load_part_at(like, come + whole, columns - whole // size)))
        for x in range(whole + wide, target_row, wide):
            rolled()
            put_at(go + x, zero)
    clear(like, target + rows * target_row, target_row, up(rows, max(step, EIGHT)) - rows, target_row)


@njit(error_model="numpy", cache=True)
def clear(like, target, target_row, rows, width):
    """Zeros: rows of so many bytes, a multiple of a vector's."""
    apart()
    wide = lanes(like) * element_bytes(like)
    for r in range(rows):
        for x in range(0, width, wide):
            rolled()
            put_at(target + r * target_row + x, fill(like, 0.0))


@njit(error_model="numpy", cache=True)
def deliver(like, source, source_row, rows, columns, factor, target, target_row):
    """target = factor * source, nothing beyond its columns."""
    apart()
    step, size = lanes(like), element_bytes(like)
    wide, whole, every = step * size, columns // step * step * size, fill(like, factor)
    for r in range(rows):
        come, go = source + r * source_row, target + r * target_row
        for x in range(0, whole, wide):
            rolled()
            put_at(go + x, mul(every, load_at(like, come + x)))
        for x in range(whole, columns * size, size):
            put_at(go + x, like.dtype.type(factor) * number_at(like, come + x))


@njit(error_model="numpy", cache=True)
def times(like, source, factors, factor_row, repeat, rows, row, target):
    """Row r of target = row r of source times row r // repeat of factors, element by element."""
    apart()
    wide = lanes(like) * element_bytes(like)
    for r in range(rows):
        by, at = factors + r // repeat * factor_row, r * row
        for x in range(0, row, wide):
            rolled()
            put_at(target + at + x, mul(load_at(like, source + at + x), load_at(like, by + x)))


@njit(error_model="numpy", cache=True)
def times_numbers(like, source, numbers, repeat, rows, row, target):
    """Row r of target = row r of source times number r // repeat."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for r in range(rows):
        by, at = splat_at(like, numbers + r // repeat * size), r * row
        for x in range(0, row, wide):
            rolled()
            put_at(target + at + x, mul(load_at(like, source + at + x), by))


@njit(error_model="numpy", cache=True)
def exponentials(like, place, vectors):
    """exp of numbers in place."""
    apart()
    wide, factor = lanes(like) * element_bytes(like), fill(like, LOG2_E)
    for x in range(place, place + vectors * wide, wide):
        rolled()
        put_at(x, exp2(mul(load_at(like, x), factor)))


# ---- one decay for the whole state --------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def all_pairs(like, a, repeat, n, pairs, s_row, far):
    """pairs[i, j] = product of the decays of the tokens after j's up to i's for steps j <= i, otherwise 0; far[t] = that of the tokens before t."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    clear(like, pairs, s_row, ONE, s_row)
    put_at(far, like.dtype.type(1.0))
    for i in range(n):
        factor, row = like.dtype.type(1.0), pairs + i * s_row
        if i % repeat == 0:
            t = i // repeat
            factor = number_at(like, a + t * size)
            put_at(far + (t + 1) * size, number_at(like, far + t * size) * factor)
        if i:
            every = fill(like, factor)
            for x in range(0, s_row, wide):
                rolled()
                put_at(row + x, mul(every, load_at(like, row - s_row + x)))
        put_at(row + i * size, like.dtype.type(1.0))


@njit(error_model="numpy", cache=True)
def weigh(like, target, pairs, s_row, rows, first, every):
    """Row r of target times row first + r * every of pairs, the one before the first being zero, and zero where that is."""
    apart()
    wide = lanes(like) * element_bytes(like)
    for r in range(rows):
        place, by = target + r * s_row, first + r * every
        if by < 0:
            clear(like, place, s_row, ONE, s_row)
            continue
        for x in range(0, s_row, wide):
            rolled()
            put_at(place + x, times_unless_zero(load_at(like, pairs + by * s_row + x), load_at(like, place + x)))


@njit(error_model="numpy", cache=True)
def weigh_all(like, how, room, n, with_P, target_A, target_P):
    """`weigh` for erasures and, if wanted, queries; no step reads what it writes itself."""
    apart()
    steps, size = how.steps, element_bytes(like)
    if how.erase:
        if how.old:
            for i in range(n * steps):
                weigh(like, target_A + i * room.s_row, room.pairs, room.s_row, ONE, i // steps * steps - 1, START)
        else:
            weigh(like, target_A, room.pairs, room.s_row, n * steps, START, ONE)
            for i in range(n * steps):
                put_at(target_A + i * (room.s_row + size), like.dtype.type(0.0))
    for h in range(how.group if with_P else 0):
        weigh(like, target_P + h * room.q_rows * room.s_row, room.pairs, room.s_row, n, -1 if how.exclusive else steps - 1, steps)


# ---- a decay for every key ----------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def ahead(like, a, n, row, target):
    """Row t of target = product of the rows of a before t, for t up to n."""
    apart()
    wide, one = lanes(like) * element_bytes(like), fill(like, 1.0)
    for x in range(0, row, wide):
        rolled()
        product = one
        put_at(target + x, product)
        for t in range(n):
            product = mul(product, load_at(like, a + t * row + x))
            put_at(target + (t + 1) * row + x, product)


@njit(error_model="numpy", cache=True)
def behind(like, a, n, row, target):
    """Row t of target = product of the rows of a after t and before n."""
    apart()
    wide, one = lanes(like) * element_bytes(like), fill(like, 1.0)
    for x in range(0, row, wide):
        rolled()
        product = one
        for t in range(n - 1, -1, -1):
            put_at(target + t * row + x, product)
            product = mul(product, load_at(like, a + t * row + x))


@njit(error_model="numpy", cache=True)
def spread(like, a, n, steps, row, target):
    """Rows of a, each before its token's further steps, at which nothing fades."""
    apart()
    wide, one = lanes(like) * element_bytes(like), fill(like, 1.0)
    for i in range(n * steps):
        for x in range(0, row, wide):
            rolled()
            put_at(target + i * row + x, one if i % steps else load_at(like, a + i // steps * row + x))


@njit(error_model="numpy", cache=True)
def clear_from(like, target, target_row, rows, first):
    """Zeros from a column on, to the end of the rows."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for r in range(rows):
        place, end = target + r * target_row + first, target + (r + 1) * target_row
        while place < end and (place - target - r * target_row) % wide:
            put_at(place, like.dtype.type(0.0))
            place += size
        clear(like, place, target_row, ONE, end - place)


@njit(error_model="numpy", cache=True)
def rows_of_block(like, how, room, near_rows, near, each, delayed, strict, rows, t, n, products):
    """Rows of A or P for n tokens from t on, each of `each` rows: earlier blocks through `turned`, then their own."""
    apart()
    k_row, s_row, size = room.k_row, room.s_row, element_bytes(like)
    first, many = t * how.steps, n * each
    here, to = rows + t * each * k_row, products + t * each * s_row
    if first:
        times(like, here, near + (0 if delayed else k_row), k_row, each, many, k_row, near_rows)
        clear(like, near_rows + many * k_row, k_row, up(many, EIGHT) - many, k_row)
        vectors = (first + lanes(like) - 1) // lanes(like)
        one, none = like.dtype.type(1.0), START
        multiply(like, to, s_row, near_rows, k_row, size, room.turned, s_row, up(many, EIGHT), vectors, how.keys, one, none, WHOLE, ONE)
    if how.block * how.steps != BLOCK:  # where blocks are whole, whoever reads eights of rows stays within the sixteen numbers of one
        clear_from(like, to, s_row, many, first * size)
    vectors, rest = k_row // (lanes(like) * size), to + first * size
    a = room.a + t * k_row if how.steps == 1 else room.a_steps
    for r in range(many):
        start = r // each * how.steps - 1 if delayed else (r + 1) * how.steps // each - 1  # the last step it reads
        faded_row(like, rest + r * s_row, here + r * k_row, a, room.b + first * k_row, k_row, vectors, start)
        if strict:
            put_at(rest + r * (s_row + size), like.dtype.type(0.0))


@njit(error_model="numpy", inline="always")
def by_blocks(like, how, room, n, with_P):
    """A, and P if wanted, of a chunk of n tokens."""
    k_row, s_row, size, steps = room.k_row, room.s_row, element_bytes(like), how.steps
    wide = lanes(like) * size
    for t in range(0, n, how.block):
        many, first = min(how.block, n - t), t * steps
        if steps > 1:
            spread(like, room.a + t * k_row, many, steps, k_row, room.a_steps)
        ahead(like, room.a + t * k_row, many, k_row, room.near)
        if how.erase:
            rows_of_block(like, how, room, room.e_near, room.near, steps, how.old, 1 - how.old, room.e, t, many, room.A)
        if with_P:
            for h in range(how.group):
                q, P = room.q + h * room.q_rows * k_row, room.P + h * room.q_rows * s_row
                rows_of_block(like, how, room, room.q_near, room.near, ONE, how.exclusive, START, q, t, many, P)
        if t + many == n:
            break
        for k in range(how.keys):  # earlier steps fade by this block, which then joins them
            fade, row = splat_at(like, room.near + many * k_row + k * size), room.turned + k * s_row
            for x in range(0, first * size, wide):
                rolled()
                put_at(row + x, mul(fade, load_at(like, row + x)))
        behind(like, room.a + t * k_row, many, k_row, room.tail)
        times(like, room.b + first * k_row, room.tail, k_row, steps, many * steps, k_row, room.b_tail)
        rows = many * steps
        unit = max(lanes(like), EIGHT)
        clear(like, room.b_tail + rows * k_row, k_row, up(rows, unit) - rows, k_row)
        transpose(like, room.b_tail, k_row, room.turned + first * size, s_row, up(rows, unit), up(how.keys, unit))


# ---- a chunk ------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def read_chunk(like, how, room, operands, state, column, width, t, n, with_queries, scale):
    """Rows of tokens t to t + n - 1: queries if wanted, keys, erasures, values of some columns, decays; and the bonus of each step's own keys."""
    apart()
    size, steps, k, v = element_bytes(like), how.steps, how.keys * element_bytes(like), how.values * element_bytes(like)
    one = like.dtype.type(1.0)
    token = state * how.tokens + t
    fetch(like, operands.b + token * steps * k, k, n * steps, how.keys, one, room.b, room.k_row)
    fetch(like, operands.w + token * steps * v + column * size, v, n * steps, width, one, room.w, room.v_row)
    if how.erase:
        fetch(like, operands.e + token * steps * k, k, n * steps, how.keys, one, room.e, room.k_row)
    if how.decay == OWN_DECAYS:
        fetch(like, operands.g + token * k, k, n, how.keys, one, room.a, room.k_row)
        exponentials(like, room.a, n * room.k_row // (size * lanes(like)))
    elif how.decay == ONE_DECAY:
        fetch(like, operands.g + token * size, START, ONE, n, one, room.a, room.s_row)
        exponentials(like, room.a, room.s_row // (size * lanes(like)))
    else:
        for i in range(n):
            put_at(room.a + i * size, one)
    if how.fade:
        fetch(like, operands.f + token * v + column * size, v, n, width, one, room.f, room.v_row)
        exponentials(like, room.f, n * room.v_row // (size * lanes(like)))
        ahead(like, room.f, n, room.v_row, room.f_far)
    if with_queries:
        for h in range(how.group):
            q = room.q + h * room.q_rows * room.k_row
            fetch(like, operands.q + ((state * how.group + h) * how.tokens + t) * k, k, n, how.keys, scale, q, room.k_row)
            if how.bonus:
                for i in range(n * steps):
                    sum_of, u = like.dtype.type(0.0), operands.u + (token + i // steps) * k
                    for x in range(0, k, size):
                        there = number_at(like, room.b + i * room.k_row + x) * number_at(like, u + x)
                        sum_of += number_at(like, q + i // steps * room.k_row + x) * there
                    put_at(room.bonus + (h * room.q_rows * steps + i) * size, sum_of)


@njit(error_model="numpy", cache=True)
def relate(like, how, room, n, with_queries):
    """A, P, and the far sides, of what was read."""
    apart()
    size, steps, k_row, s_row = element_bytes(like), how.steps, room.k_row, room.s_row
    rows, unit = n * steps, max(lanes(like), EIGHT)
    one, none = like.dtype.type(1.0), START
    if how.decay == OWN_DECAYS:
        by_blocks(like, how, room, n, with_queries)
        ahead(like, room.a, n, k_row, room.far)
        behind(like, room.a, n, k_row, room.tail)
        times(like, room.b, room.tail, k_row, steps, rows, k_row, room.b_far)
        if how.erase:
            times(like, room.e, room.far + (0 if how.old else k_row), k_row, steps, rows, k_row, room.e_far)
        if with_queries:
            for h in range(how.group):
                at = h * room.q_rows * k_row
                times(like, room.q + at, room.far + (0 if how.exclusive else k_row), k_row, ONE, n, k_row, room.q_far + at)
        return
    all_pairs(like, room.a, steps, rows, room.pairs, s_row, room.far)
    if how.erase or with_queries:
        transpose(like, room.b, k_row, room.turned, s_row, up(rows, unit), up(how.keys, unit))
    vectors = (rows + lanes(like) - 1) // lanes(like)
    if how.erase:
        multiply(like, room.A, s_row, room.e, k_row, size, room.turned, s_row, up(rows, EIGHT), vectors, how.keys, one, none, LOWER_RESULT, ONE)
    if with_queries:
        for h in range(how.group):
            q, P = room.q + h * room.q_rows * k_row, room.P + h * room.q_rows * s_row
            multiply(like, P, s_row, q, k_row, size, room.turned, s_row, up(n, EIGHT), vectors, how.keys, one, none, LOWER_RESULT, steps)
    weigh_all(like, how, room, n, with_queries, room.A, room.P)
    times_numbers(like, room.b, room.pairs + (rows - 1) * s_row, ONE, rows, k_row, room.b_far)
    if how.erase:
        times_numbers(like, room.e, room.far + (0 if how.old else size), steps, rows, k_row, room.e_far)
    if with_queries:
        for h in range(how.group):
            at = h * room.q_rows * k_row
            times_numbers(like, room.q + at, room.far + (0 if how.exclusive else size), ONE, n, k_row, room.q_far + at)


@njit(error_model="numpy", cache=True)
def solve(like, how, room, n):
    """U in place of the values."""
    apart()
    if how.erase:
        rows, vectors = n * how.steps, room.v_row // (lanes(like) * element_bytes(like))
        size, one = element_bytes(like), like.dtype.type(1.0)
        multiply(
            like, room.w, room.v_row, room.e_far, room.k_row, size, room.state, room.v_row, up(rows, EIGHT), vectors, how.keys, -one, ONE,
            WHOLE, ONE,
        )  # fmt: skip
        substitute(like, room.w, room.v_row, room.A, room.s_row, size, up(rows, EIGHT), vectors)


@njit(error_model="numpy", cache=True)
def to_the_end(like, how, room, n):
    """Values as faded as they are at the end of the chunk, in their place."""
    apart()
    behind(like, room.f, n, room.v_row, room.f_tail)
    times(like, room.w, room.f_tail, room.v_row, how.steps, n * how.steps, room.v_row, room.w)


@njit(error_model="numpy", cache=True)
def advance(like, how, room, n):
    """The state after the chunk in place of that before it."""
    apart()
    size, rows = element_bytes(like), n * how.steps
    wide = lanes(like) * size
    if how.decay != NO_DECAY:
        for k in range(how.keys):
            fade = splat_at(like, room.far + (n * room.k_row + k * size if how.decay == OWN_DECAYS else n * size))
            for x in range(room.state + k * room.v_row, room.state + (k + 1) * room.v_row, wide):
                rolled()
                put_at(x, mul(fade, load_at(like, x)))
    if how.fade:
        times(like, room.state, room.f_far + n * room.v_row, START, ONE, how.keys, room.v_row, room.state)
    vectors, one = room.v_row // wide, like.dtype.type(1.0)
    multiply(
        like, room.state, room.v_row, room.b_far, size, room.k_row, room.w, room.v_row, up(how.keys, EIGHT), vectors, rows, one, ONE, WHOLE,
        ONE,
    )  # fmt: skip
