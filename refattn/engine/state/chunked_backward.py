"""Gradients of the chunked form, chunk by chunk from the last to the first; letters are those of chunks.py, d of what a cotangent belongs to.

    out = Q^ S + P U                 dU  = P^T dout + B~ dS'        dP = dout U^T      dQ^ = dout S^T
    U   = (1 + A)**-1 (W - E^ S)     dW  = (1 + A^T)**-1 dU         dA = -dW U^T       dE^ = -dW S^T
    S'  = D_1 ... D_n S + B~^T U     dS  = D_1 ... D_n dS' + Q^^T dout - E^^T dW       dB~ = U dS'^T

and from A, P and the far sides to q, e and b by the same products of decays.  The logarithm of a decay has every term it stands in: with L_t for the
sum of q_t dq_t, e_t de_t and -b_t db_t, it is the sum of L over the tokens from its own to the end of the chunk, and of what the state after the
chunk owes to them.  Sums end with the chunk, so their rounding does not grow with the sequence.

Where columns fade, every value goes back from the end of the chunk to its own token, and each decay on the way has its gradient there.  The state
before the chunk owes to them as to those of rows: M is what was read of it, and what is left of it after the chunk, times the cotangents.

States before chunks are needed in reverse: the first pass keeps one in `KEPT` chunks, and from each the chunks up to the next are gone through again.
A task is a state, from the first pass to the last: its columns owe to the same queries, keys and decays, and nearly all the work is what they share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ..panels import NO, START
from ..references import hold, lent
from ..simd import add, address, element_bytes, fill, fma, lanes, load_at, mul, number_at, put_at, splat_at, total
from ..tasks import take
from .chunks import (
    NO_DECAY,
    OWN_DECAYS,
    YES,
    advance,
    ahead,
    behind,
    clear,
    deliver,
    fetch,
    how_of,
    operands_of,
    read_chunk,
    relate,
    room_at,
    solve,
    times,
    to_the_end,
    up,
    weigh_all,
)
from .products import EIGHT, LOWER, LOWER_RESULT, ONE, UPPER, WHOLE, apart, multiply, rolled, substitute, transpose

#: Chunks between states that are kept.
KEPT = 64


class Back(NamedTuple):
    """Addresses beside those of `Room`; d_ of rows as they were read, far_ of the far sides."""

    d_state: int
    turned: int  # a state, one column for each key
    d_U: int
    U: int  # one column for each step
    d_P: int
    d_A: int
    d_q: int
    d_e: int
    d_b: int
    d_u: int
    far_q: int
    far_e: int
    far_b: int
    b_near: int
    b_fade: int
    L: int
    d_bonus: int
    y: int  # what queries read of the state before its columns faded
    d_f: int
    M: int  # what L is for keys, of columns and the state before the chunk
    w_steps: int  # one vector of a value as it fades, token by token
    kept: int
    marks: int
    end: int


@njit(error_model="numpy", cache=True)
def back_at(like, how, room):
    """Where everything lies, from the end of the other room on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    steps, queries = room.s_row // size, how.group * room.q_rows
    n_k, n_v = room.k_row // size, room.v_row // size
    chunks = (how.tokens + how.chunk - 1) // how.chunk
    one_state = n_k * room.v_row
    d_state = up(room.spare, 64)
    turned = d_state + one_state
    d_U = turned + up(n_v, unit) * room.k_row
    U = d_U + steps * room.v_row
    d_P = U + up(n_v, unit) * room.s_row
    d_A = d_P + queries * room.s_row
    d_q = d_A + steps * room.s_row
    d_e = d_q + queries * room.k_row
    d_b = d_e + steps * room.k_row
    d_u = d_b + steps * room.k_row
    far_q = d_u + room.q_rows * room.k_row
    far_e = far_q + queries * room.k_row
    far_b = far_e + steps * room.k_row
    b_near = far_b + steps * room.k_row
    b_fade = b_near + steps * room.k_row
    L = b_fade + steps * room.k_row
    d_bonus = L + (room.q_rows + 1) * room.k_row
    y = up(d_bonus + queries * how.steps * size, 64)
    d_f = y + how.fade * room.q_rows * room.v_row
    M = d_f + how.fade * room.q_rows * room.v_row
    w_steps = M + how.fade * (room.q_rows + 1) * room.v_row
    kept = w_steps + how.fade * room.q_rows * lanes(like) * size
    marks = kept + min(chunks, KEPT) * one_state
    end = marks + (chunks // KEPT + 1) * one_state
    return Back(
        d_state, turned, d_U, U, d_P, d_A, d_q, d_e, d_b, d_u, far_q, far_e, far_b, b_near, b_fade, L, d_bonus, y, d_f, M, w_steps, kept, marks,
        end,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def copy(like, source, target, size):
    """So many bytes, whole vectors."""
    apart()
    for x in range(0, size, lanes(like) * element_bytes(like)):
        rolled()
        put_at(target + x, load_at(like, source + x))


@njit(error_model="numpy", cache=True)
def add_times(like, source, factors, factor_row, repeat, rows, row, target):
    """Row r of target += row r of source times row r // repeat of factors."""
    apart()
    wide = lanes(like) * element_bytes(like)
    for r in range(rows):
        by, at = factors + r // repeat * factor_row, r * row
        for x in range(0, row, wide):
            rolled()
            put_at(target + at + x, fma(load_at(like, source + at + x), load_at(like, by + x), load_at(like, target + at + x)))


@njit(error_model="numpy", cache=True)
def add_times_numbers(like, source, numbers, repeat, rows, row, target):
    """Row r of target += row r of source times number r // repeat."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for r in range(rows):
        by, at = splat_at(like, numbers + r // repeat * size), r * row
        for x in range(0, row, wide):
            rolled()
            put_at(target + at + x, fma(load_at(like, source + at + x), by, load_at(like, target + at + x)))


# ---- inside a chunk --------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def inside_back(like, rows, d_rows, each, n, repeat, b, d_b, a, d_products, k_row, s_row, delayed, strict):
    """Mirror of `inside`: d_rows and d_b are added to."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for x in range(0, k_row, wide):
        rolled()
        for j in range(n * repeat):
            first = j // repeat
            key, fade, gathered = load_at(like, b + j * k_row + x), fill(like, 1.0), fill(like, 0.0)
            for t in range(first, n):
                if t > first + delayed:
                    fade = mul(fade, load_at(like, a + (t - delayed) * k_row + x))
                for r in range(t * each, (t + 1) * each):
                    if (delayed and t == first) or (strict and r <= j):
                        continue
                    by = mul(splat_at(like, d_products + r * s_row + j * size), fade)
                    gathered = fma(by, load_at(like, rows + r * k_row + x), gathered)
                    put_at(d_rows + r * k_row + x, fma(by, key, load_at(like, d_rows + r * k_row + x)))
            put_at(d_b + j * k_row + x, add(gathered, load_at(like, d_b + j * k_row + x)))


@njit(error_model="numpy", cache=True)
def rows_of_block_back(like, how, room, back, near_rows, each, delayed, strict, rows, d_rows, t, n, d_products):
    """Mirror of `rows_of_block`."""
    apart()
    k_row, s_row, size = room.k_row, room.s_row, element_bytes(like)
    first, many, vectors = t * how.steps, n * each, room.k_row // (lanes(like) * element_bytes(like))
    at = t * each * k_row
    from_products = d_products + t * each * s_row
    one, none, only = like.dtype.type(1.0), START, ONE
    if first:
        near = room.near + (0 if delayed else k_row)
        multiply(like, near_rows, k_row, from_products, s_row, size, back.b_near, k_row, up(many, EIGHT), vectors, first, one, none, WHOLE, only)
        add_times(like, near_rows, near, k_row, each, many, k_row, d_rows + at)
        times(like, rows + at, near, k_row, each, many, k_row, near_rows)
        multiply(like, back.far_b, k_row, from_products, size, s_row, near_rows, k_row, up(first, EIGHT), vectors, many, one, none, WHOLE, only)
        add_times(like, back.far_b, back.b_fade, k_row, how.steps, first, k_row, back.d_b)
    inside_back(
        like, rows + at, d_rows + at, each, n, how.steps, room.b + first * k_row, back.d_b + first * k_row, room.a + t * k_row,
        from_products + first * size, k_row, s_row, delayed, strict,
    )  # fmt: skip


@njit(error_model="numpy", inline="always")
def by_blocks_back(like, how, room, back, n):
    """Mirror of `by_blocks`: what A and P owe to queries, erasures and keys."""
    k_row, s_row, steps = room.k_row, room.s_row, how.steps
    clear(like, back.d_b, k_row, n * steps, k_row)
    clear(like, back.d_e, k_row, n * steps, k_row)
    for h in range(how.group):
        clear(like, back.d_q + h * room.q_rows * k_row, k_row, n, k_row)
    for t in range(0, n, how.block):
        many = min(how.block, n - t)
        ahead(like, room.a + t * k_row, many, k_row, room.near)
        behind(like, room.a, t, k_row, back.b_fade)
        times(like, room.b, back.b_fade, k_row, steps, t * steps, k_row, back.b_near)
        if how.erase:
            rows_of_block_back(like, how, room, back, room.e_near, steps, how.old, 1 - how.old, room.e, back.d_e, t, many, back.d_A)
        for h in range(how.group):
            at, P = h * room.q_rows * k_row, back.d_P + h * room.q_rows * s_row
            rows_of_block_back(like, how, room, back, room.q_near, ONE, how.exclusive, START, room.q + at, back.d_q + at, t, many, P)


@njit(error_model="numpy", cache=True)
def by_pairs_back(like, how, room, back, n):
    """The same where decays are numbers."""
    apart()
    k_row, s_row, size, steps = room.k_row, room.s_row, element_bytes(like), how.steps
    rows, vectors = n * steps, room.k_row // (lanes(like) * size)
    one, none, only = like.dtype.type(1.0), START, ONE
    weigh_all(like, how, room, n, YES, back.d_A, back.d_P)
    for h in range(how.group):
        at, P = h * room.q_rows * k_row, back.d_P + h * room.q_rows * s_row
        multiply(like, back.d_q + at, k_row, P, s_row, size, room.b, k_row, up(n, EIGHT), vectors, rows, one, none, LOWER, steps)
        multiply(like, back.d_b, k_row, P, size, s_row, room.q + at, k_row, up(rows, EIGHT), vectors, n, one, int(h > 0), UPPER, steps)
    if how.erase:
        multiply(like, back.d_e, k_row, back.d_A, s_row, size, room.b, k_row, up(rows, EIGHT), vectors, rows, one, none, LOWER, only)
        multiply(like, back.d_b, k_row, back.d_A, size, s_row, room.e, k_row, up(rows, EIGHT), vectors, rows, one, only, UPPER, only)


# ---- a chunk ---------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def bonus_back(like, how, room, back, n):
    """Cotangents of each step's bonus; `room.w` still has the values."""
    apart()
    size, steps = element_bytes(like), how.steps
    for h in range(how.group):
        for i in range(n * steps):
            d_out, w, sum_of = room.out + (h * room.q_rows + i // steps) * room.v_row, room.w + i * room.v_row, fill(like, 0.0)
            for x in range(0, room.v_row, lanes(like) * size):
                rolled()
                sum_of = fma(load_at(like, d_out + x), load_at(like, w + x), sum_of)
            put_at(back.d_bonus + (h * room.q_rows * steps + i) * size, total(sum_of))


@njit(error_model="numpy", cache=True)
def fading_back(like, how, room, back, n):
    """Mirror of `read_fading`: values fade to the end of the chunk, and from what they owe there, in d_U, comes what they owe at first.

    Leaves in the place of d_out what is owed to what queries read of the state.
    """
    apart()
    size, steps, v_row, s_row = element_bytes(like), how.steps, room.v_row, room.s_row
    wide = lanes(like) * size
    clear(like, back.d_f, v_row, n, v_row)
    clear(like, back.M, v_row, n + 1, v_row)
    for h in range(how.group):
        clear(like, back.d_P + h * room.q_rows * s_row, s_row, n, s_row)
    for i in range(n * steps):
        first, w, d_w = i // steps, room.w + i * v_row, back.d_U + i * v_row
        for x in range(0, v_row, wide):
            value, owed = load_at(like, w + x), load_at(like, d_w + x)
            put_at(back.w_steps + first * wide, value)
            for t in range(first + 1, n):
                rolled()
                value = mul(value, load_at(like, room.f + t * v_row + x))
                put_at(back.w_steps + t * wide, value)
            put_at(w + x, value)
            for t in range(n - 1, first - 1, -1):
                for h in range(how.group):
                    rolled()
                    row = h * room.q_rows + t
                    d_out, at = load_at(like, room.out + row * v_row + x), row * s_row + i * size
                    owed = fma(splat_at(like, room.P + at), d_out, owed)
                    through = total(mul(d_out, load_at(like, back.w_steps + t * wide)))
                    put_at(back.d_P + at, number_at(like, back.d_P + at) + through)
                if t > first:
                    owed, d_f = mul(owed, load_at(like, room.f + t * v_row + x)), back.d_f + t * v_row + x
                    put_at(d_f, fma(owed, load_at(like, back.w_steps + (t - 1) * wide), load_at(like, d_f)))
            put_at(d_w + x, owed)
    one, none, only, of_values = like.dtype.type(1.0), START, ONE, v_row // wide
    for h in range(how.group):
        q, d_out = room.q_far + h * room.q_rows * room.k_row, room.out + h * room.q_rows * v_row
        multiply(like, back.y, v_row, q, room.k_row, size, room.state, v_row, up(n, EIGHT), of_values, how.keys, one, none, WHOLE, only)
        times(like, d_out, room.f_far + v_row, v_row, only, n, v_row, d_out)
        add_times(like, d_out, back.y, v_row, only, n, v_row, back.M)


@njit(error_model="numpy", cache=True)
def products_back(like, how, room, back, n, width):
    """d_U up to d_W, d_A, d_P, the far sides and the state: everything that products of matrices give."""
    apart()
    k_row, v_row, s_row, size, steps = room.k_row, room.v_row, room.s_row, element_bytes(like), how.steps
    wide = lanes(like) * size
    rows, unit = n * steps, max(lanes(like), EIGHT)
    every, of_keys, of_values, of_steps = up(rows, EIGHT), k_row // wide, v_row // wide, (rows + lanes(like) - 1) // lanes(like)
    n_k = k_row // size
    one, none, only = like.dtype.type(1.0), START, ONE
    multiply(like, back.d_U, v_row, room.b_far, k_row, size, back.d_state, v_row, every, of_values, how.keys, one, none, WHOLE, only)
    if how.fade:
        fading_back(like, how, room, back, n)
    else:
        for h in range(how.group):
            P, d_out = room.P + h * room.q_rows * s_row, room.out + h * room.q_rows * v_row
            multiply(like, back.d_U, v_row, P, size, s_row, d_out, v_row, every, of_values, n, one, only, UPPER, steps)
    if how.erase:
        clear(like, back.d_U + rows * v_row, v_row, every - rows, v_row)
        clear(like, room.A + rows * s_row, s_row, every - rows, s_row)
        last = every - 1
        substitute(like, back.d_U + last * v_row, -v_row, room.A + last * (s_row + size), -size, -s_row, every, of_values)
    transpose(like, room.w, v_row, back.U, s_row, up(rows, unit), v_row // size)
    transpose(like, room.state, v_row, back.turned, k_row, n_k, v_row // size)
    for h in range(how.group):
        d_out = room.out + h * room.q_rows * v_row
        P, q = back.d_P + h * room.q_rows * s_row, back.far_q + h * room.q_rows * k_row
        if not how.fade:
            multiply(like, P, s_row, d_out, v_row, size, back.U, s_row, up(n, EIGHT), of_steps, width, one, none, LOWER_RESULT, steps)
        multiply(like, q, k_row, d_out, v_row, size, back.turned, k_row, up(n, EIGHT), of_keys, width, one, none, WHOLE, only)
    if how.erase:
        multiply(like, back.d_A, s_row, back.d_U, v_row, size, back.U, s_row, every, of_steps, width, -one, none, LOWER_RESULT, only)
        multiply(like, back.far_e, k_row, back.d_U, v_row, size, back.turned, k_row, every, of_keys, width, -one, none, WHOLE, only)


@njit(error_model="numpy", cache=True)
def state_back(like, how, room, back, n, width):
    """d_B~, and the cotangent of the state before the chunk in place of that after it; L of the end of the chunk."""
    apart()
    k_row, v_row, size, rows = room.k_row, room.v_row, element_bytes(like), n * how.steps
    wide = lanes(like) * size
    every, of_keys, of_values, n_k = up(rows, EIGHT), k_row // wide, v_row // wide, k_row // size
    one, none, only = like.dtype.type(1.0), START, ONE
    transpose(like, back.d_state, v_row, back.turned, k_row, n_k, v_row // size)
    multiply(like, back.far_b, k_row, room.w, v_row, size, back.turned, k_row, every, of_keys, width, one, none, WHOLE, only)
    clear(like, back.L, k_row, n + 1, k_row)
    if how.fade:
        times(like, back.d_state, room.f_far + n * v_row, START, ONE, how.keys, v_row, back.d_state)
    if how.decay != NO_DECAY:
        for k in range(how.keys):
            place = room.far + (n * k_row + k * size if how.decay == OWN_DECAYS else n * size)
            fade, sum_of = splat_at(like, place), fill(like, 0.0)
            for x in range(k * v_row, (k + 1) * v_row, wide):
                rolled()
                sum_of = fma(load_at(like, room.state + x), load_at(like, back.d_state + x), sum_of)
                put_at(back.d_state + x, mul(fade, load_at(like, back.d_state + x)))
            put_at(back.L + n * k_row + k * size, number_at(like, place) * total(sum_of))
    if how.fade:
        for k in range(how.keys):
            add_times(like, room.state + k * v_row, back.d_state + k * v_row, v_row, ONE, ONE, v_row, back.M + n * v_row)
    for h in range(how.group):
        q, d_out = room.q_far + h * room.q_rows * k_row, room.out + h * room.q_rows * v_row
        multiply(like, back.d_state, v_row, q, size, k_row, d_out, v_row, n_k, of_values, n, one, only, WHOLE, only)
    if how.erase:
        multiply(like, back.d_state, v_row, room.e_far, size, k_row, back.d_U, v_row, n_k, of_values, rows, -one, only, WHOLE, only)


@njit(error_model="numpy", cache=True)
def join_far(like, how, room, back, n):
    """What the far sides owe to queries, erasures and keys, and with that L; of the keys' far side the end of the chunk has its own term."""
    apart()
    k_row, size, steps, own = room.k_row, element_bytes(like), how.steps, how.decay == OWN_DECAYS
    rows = n * steps
    e_at, q_at = 0 if how.old else 1, 0 if how.exclusive else 1
    if own:
        times(like, back.far_b, room.tail, k_row, steps, rows, k_row, back.far_b)
        if how.erase:
            add_times(like, back.far_e, room.far + e_at * k_row, k_row, steps, rows, k_row, back.d_e)
    else:
        fades = room.pairs + (rows - 1) * room.s_row
        for i in range(rows):
            scale_row(like, back.far_b + i * k_row, k_row, fades + i * size)
        if how.erase:
            add_times_numbers(like, back.far_e, room.far + e_at * size, steps, rows, k_row, back.d_e)
    for h in range(how.group):
        at = h * room.q_rows * k_row
        if own:
            add_times(like, back.far_q + at, room.far + q_at * k_row, k_row, ONE, n, k_row, back.d_q + at)
        else:
            add_times_numbers(like, back.far_q + at, room.far + q_at * size, ONE, n, k_row, back.d_q + at)
    wide, minus = lanes(like) * size, fill(like, -1.0)
    for i in range(rows):
        own_row, end = back.L + (i // steps + 1) * k_row, back.L + n * k_row
        for x in range(0, k_row, wide):
            rolled()
            key, far = load_at(like, room.b + i * k_row + x), load_at(like, back.far_b + i * k_row + x)
            d_key = add(load_at(like, back.d_b + i * k_row + x), far)
            put_at(back.d_b + i * k_row + x, d_key)
            if how.decay != NO_DECAY:
                put_at(end + x, fma(key, far, load_at(like, end + x)))
                put_at(own_row + x, fma(mul(minus, key), d_key, load_at(like, own_row + x)))
    if how.decay != NO_DECAY:
        if how.erase:
            add_products(like, room.e, back.d_e, steps, rows, k_row, back.L + e_at * k_row)
        for h in range(how.group):
            at = h * room.q_rows * k_row
            add_products(like, room.q + at, back.d_q + at, ONE, n, k_row, back.L + q_at * k_row)


@njit(error_model="numpy", cache=True)
def scale_row(like, row, width, place):
    apart()
    by = splat_at(like, place)
    for x in range(row, row + width, lanes(like) * element_bytes(like)):
        rolled()
        put_at(x, mul(by, load_at(like, x)))


@njit(error_model="numpy", cache=True)
def add_products(like, a, b, repeat, rows, row, target):
    """Row r // repeat of target += row r of a times row r of b."""
    apart()
    for r in range(rows):
        add_times(like, a + r * row, b + r * row, row, ONE, ONE, row, target + r // repeat * row)


@njit(error_model="numpy", cache=True)
def write_decays(like, how, room, back, n, target):
    """Gradients of the logarithms of decays: sums of L from the end; where a decay is 0, so is that of its logarithm."""
    apart()
    k_row, size = room.k_row, element_bytes(like)
    own = how.decay == OWN_DECAYS
    for x in range(how.keys if own else 1):
        sum_of = like.dtype.type(0.0)
        for t in range(n - 1, -1, -1):
            row = back.L + (t + 1) * k_row
            if own:
                sum_of += number_at(like, row + x * size)
            else:
                for k in range(how.keys):
                    sum_of += number_at(like, row + k * size)
            faded = number_at(like, room.a + (t * k_row + x * size if own else t * size))
            place = target + (t * how.keys + x if own else t) * size
            put_at(place, sum_of if faded != 0.0 else like.dtype.type(0.0))


@njit(error_model="numpy", cache=True)
def write_fades(like, how, room, back, n, target):
    """The same of columns: what fades inside the chunk is there already, and of the state before it there are sums of M from the end."""
    apart()
    v_row, size = room.v_row, element_bytes(like)
    for x in range(0, v_row, lanes(like) * size):
        sum_of = load_at(like, back.M + n * v_row + x)
        for t in range(n - 1, -1, -1):
            rolled()
            sum_of, d_f = add(sum_of, load_at(like, back.M + t * v_row + x)), back.d_f + t * v_row + x
            put_at(d_f, add(sum_of, load_at(like, d_f)))
    deliver(like, back.d_f, v_row, n, how.values, like.dtype.type(1.0), target, how.values * size)


@njit(error_model="numpy", cache=True)
def write_chunk(like, how, room, back, operands, gradients, state, t, n, scale):
    """Gradients of one chunk, where the caller wants them."""
    apart()
    size, steps, k_row, v_row = element_bytes(like), how.steps, room.k_row, room.v_row
    k, v, one, token, rows = how.keys * size, how.values * size, like.dtype.type(1.0), state * how.tokens + t, n * steps
    wide = lanes(like) * size
    if how.decay != NO_DECAY:
        write_decays(like, how, room, back, n, gradients.g + token * (k if how.decay == OWN_DECAYS else size))
    if how.fade:
        write_fades(like, how, room, back, n, gradients.f + token * v)
    if how.bonus:  # decays have no part in it
        clear(like, back.d_u, k_row, n, k_row)
        fetch(like, operands.u + token * k, k, n, how.keys, one, back.far_e, k_row)
        for h in range(how.group):
            for i in range(rows):
                token_row, number = (h * room.q_rows + i // steps) * k_row, (h * room.q_rows * steps + i) * size
                by, had = splat_at(like, back.d_bonus + number), splat_at(like, room.bonus + number)
                key, d_key, u, d_u = room.b + i * k_row, back.d_b + i * k_row, back.far_e + i // steps * k_row, back.d_u + i // steps * k_row
                q, d_q = room.q + token_row, back.d_q + token_row
                for x in range(0, k_row, wide):
                    rolled()
                    one_q, one_b, one_u = mul(by, load_at(like, q + x)), load_at(like, key + x), load_at(like, u + x)
                    put_at(d_u + x, fma(one_q, one_b, load_at(like, d_u + x)))
                    put_at(d_key + x, fma(one_q, one_u, load_at(like, d_key + x)))
                    put_at(d_q + x, fma(mul(by, one_b), one_u, load_at(like, d_q + x)))
                d_w, d_out = back.d_U + i * v_row, room.out + (h * room.q_rows + i // steps) * v_row
                for x in range(0, v_row, wide):
                    rolled()
                    put_at(d_w + x, fma(had, load_at(like, d_out + x), load_at(like, d_w + x)))
        deliver(like, back.d_u, k_row, n, how.keys, one, gradients.u + token * k, k)
    for h in range(how.group):
        to = gradients.q + ((state * how.group + h) * how.tokens + t) * k
        deliver(like, back.d_q + h * room.q_rows * k_row, k_row, n, how.keys, scale, to, k)
    deliver(like, back.d_b, k_row, rows, how.keys, one, gradients.b + token * steps * k, k)
    if how.erase:
        deliver(like, back.d_e, k_row, rows, how.keys, one, gradients.e + token * steps * k, k)
    deliver(like, back.d_U, v_row, rows, how.values, one, gradients.w + token * steps * v, v)


@njit(error_model="numpy", inline="always")
def head_backward(like, how, room, back, operands, gradients, state, scale, states, d_outs, d_states):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    v, one_state, column, width = how.values * size, room.k_row // size * room.v_row, START, how.values
    at = state * how.keys * v
    fetch(like, states + at, v, how.keys, width, one, room.state, room.v_row)
    fetch(like, d_states + at, v, how.keys, width, one, back.d_state, room.v_row)
    chunks = (how.tokens + how.chunk - 1) // how.chunk
    stretches = (chunks + KEPT - 1) // KEPT
    for number in range(stretches * 2 - 1):  # forward from mark to mark, then back through the stretches, each of which goes forward again
        stretch = number if number < stretches else 2 * stretches - 2 - number
        begin, end = stretch * KEPT, min((stretch + 1) * KEPT, chunks)
        mark, back_again = back.marks + stretch * one_state, number >= stretches - 1
        if number < stretches:
            copy(like, room.state, mark, one_state)
        else:
            copy(like, mark, room.state, one_state)
        for c in range(begin, end):
            if back_again:
                copy(like, room.state, back.kept + (c - begin) * one_state, one_state)
                if c + 1 == end:
                    break
            n = min(how.chunk, how.tokens - c * how.chunk)
            read_chunk(like, how, room, operands, state, column, width, c * how.chunk, n, NO, scale)
            relate(like, how, room, n, NO)
            solve(like, how, room, n)
            if how.fade:
                to_the_end(like, how, room, n)
            advance(like, how, room, n)
        if not back_again:
            continue
        for c in range(end - 1, begin - 1, -1):
            t = c * how.chunk
            n = min(how.chunk, how.tokens - t)
            copy(like, back.kept + (c - begin) * one_state, room.state, one_state)
            read_chunk(like, how, room, operands, state, column, width, t, n, YES, scale)
            for h in range(how.group):
                come = d_outs + ((state * how.group + h) * how.tokens + t) * v
                fetch(like, come, v, n, width, one, room.out + h * room.q_rows * room.v_row, room.v_row)
            relate(like, how, room, n, YES)
            if how.bonus:
                bonus_back(like, how, room, back, n)
            solve(like, how, room, n)
            products_back(like, how, room, back, n, width)
            if how.decay == OWN_DECAYS:
                by_blocks_back(like, how, room, back, n)
            else:
                by_pairs_back(like, how, room, back, n)
            state_back(like, how, room, back, n, width)
            join_far(like, how, room, back, n)
            write_chunk(like, how, room, back, operands, gradients, state, t, n, scale)
    deliver(like, back.d_state, room.v_row, how.keys, width, one, d_states + at, v)


@njit(error_model="numpy", inline="always")
def take_tasks(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, counter):
    """Takes tasks until there are none."""
    like = lent(q.reshape(q.size))
    how = how_of(q, b, w, e, g, u, f, chunk, block, columns, old, exclusive)
    owned = np.zeros(back_at(like, how, room_at(like, how, START, NO)).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0), NO)
    back = back_at(like, how, room)
    operands, states = operands_of(q, b, w, e, g, u, f), address(state, (0, 0, 0, 0))
    results = operands_of(d_q, d_b, d_w, d_e, d_g, d_u, d_f)
    d_outs, d_states = address(d_out, (0, 0, 0, 0)), address(d_state, (0, 0, 0, 0))
    task = take(counter)
    while task < b.shape[0] * b.shape[1]:
        head_backward(like, how, room, back, operands, results, task, scale, states, d_outs, d_states)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, counter)


def backward_alone(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive):
    """On this thread; d_state is the cotangent of the last state, and becomes that of the first."""
    counter = np.zeros(1, np.int64)
    take_tasks(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, counter)


def backward_parallel(
    q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, threads
):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, b, w, e, g, u, f, state, d_out, d_q, d_b, d_w, d_e, d_g, d_u, d_f, d_state, scale, chunk, block, columns, old, exclusive, counter)
