"""Mesa layer: the queries' solutions, and then linear attention that reads H with them in their place.

With D_t for the product of the decays up to token t of a chunk, D_tj for those after j, and G, H for what stands before the chunk,

    G_t = D_t G + sum_j D_tj beta_j k_j k_j^T        (G_t + diag(ridge)) x_t = q_t        out_t = D_t x_t^T H + sum_j D_tj beta_j (x_t . k_j) v_j

so H is never made for a token.  Conjugate gradients need no G_t either: of all tokens of a chunk at once, one step's image of directions P is

    D P G + (tril(P K^T) * D beta) K + P diag(ridge)

Cholesky's solution needs every G_t, and factors it as L diag(p) L^T, eight rows of L^T at a time, with the queries of all heads as further columns,
which makes them the solutions of L y = q; diag(p) L^T x = y is then solved for all heads together.
G is held transposed, for what is asked is its lower triangle by columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ...problem import Problem
from ..panels import START
from ..references import hold, lent
from ..simd import address, div, element_bytes, fill, fma, lanes, load_at, mul, number_at, put_at, splat_at, sub, total
from ..state.chunks import all_pairs, deliver, exponentials, fetch, times_numbers, up, weigh
from ..state.products import EIGHT, LOWER, LOWER_RESULT, ONE, WHOLE, apart, multiply, rolled, substitute, transpose
from ..tasks import take
from ..threads import launch
from .arrays import carried, results, whole
from .kernels import kernel

#: Tokens of a chunk at most.
CHUNK = 32


class How(NamedTuple):
    """Heads that read a state, tokens, keys, values, tokens of a chunk at most; and the definition's solver, steps and start."""

    group: int
    tokens: int
    keys: int
    values: int
    chunk: int
    solver: int
    steps: int
    start: int


class Operands(NamedTuple):
    """Addresses of the caller's arrays."""

    q: int
    k: int
    v: int
    gate: int
    beta: int
    ridge: int
    gram: int
    state: int
    out: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, values, tokens, or keys and heads along a row."""

    k_row: int
    v_row: int
    s_row: int
    h_row: int
    q_rows: int
    k: int
    written: int  # keys, times beta
    tail: int  # the same, faded until the end of the chunk
    turned: int  # what is written, a column for each token
    v: int
    decays: int
    far: int  # products of the decays before a token, and after the last
    beta: int
    sizes: int  # |residual|^2 of tokens
    pairs: int  # products of the decays after one token up to another
    q: int
    solution: int  # of all heads
    residual: int
    direction: int
    image: int
    faded: int
    diagonal: int
    P: int
    out: int
    ridge: int
    gram: int
    state: int
    rows: int  # diag(p) L^T, and the queries
    factor: int  # L^T, and the solutions
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows, n_k = up(how.chunk, unit) + unit, up(how.keys, unit)
    k_row, v_row, s_row = n_k * size, up(how.values, lanes(like)) * size, rows * size
    h_row = k_row + up(how.group, lanes(like)) * size
    k = up(place, 64)
    written = k + rows * k_row
    tail = written + rows * k_row
    turned = tail + rows * k_row
    v = turned + n_k * s_row
    decays = v + rows * v_row
    far = decays + s_row
    beta = far + s_row
    sizes = beta + s_row
    pairs = sizes + s_row
    q = pairs + rows * s_row
    solution = q + rows * k_row
    residual = solution + how.group * rows * k_row
    direction = residual + rows * k_row
    image = direction + rows * k_row
    faded = image + rows * k_row
    diagonal = faded + rows * k_row
    P = diagonal + rows * k_row
    out = P + rows * s_row
    ridge = out + rows * v_row
    gram = ridge + (unit + 1) * k_row
    state = gram + n_k * k_row
    across = state + n_k * v_row
    factor = across + n_k * h_row
    return Room(
        k_row, v_row, s_row, h_row, rows, k, written, tail, turned, v, decays, far, beta, sizes, pairs, q, solution, residual, direction, image,
        faded, diagonal, P, out, ridge, gram, state, across, factor, factor + n_k * h_row,
    )  # fmt: skip


# ---- by factors ------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def add_token(like, how, room, operands, state, t, i):
    """G of token i of a chunk, the t-th of all; and what is to be factored, from the diagonal on, beside the queries."""
    apart()
    size, k_row, h_row = element_bytes(like), room.k_row, room.h_row
    wide = lanes(like) * size
    fade, keys = splat_at(like, room.decays + i * size), room.k + i * k_row
    for x in range(how.keys):
        by, row, to = splat_at(like, room.written + i * k_row + x * size), room.gram + x * k_row, room.rows + x * h_row
        for w in range(0, k_row, wide):
            rolled()
            y = fma(by, load_at(like, keys + w), mul(fade, load_at(like, row + w)))
            put_at(row + w, y)
            put_at(to + w, y)
        at = to + x * size
        put_at(at, number_at(like, at) + number_at(like, room.ridge + x * size))
        for h in range(how.group):
            q = ((state * how.group + h) * how.tokens + t) * how.keys + x
            put_at(to + k_row + h * size, number_at(like, operands.q + q * size))


@njit(error_model="numpy", cache=True)
def factorise(like, how, room):
    """`rows` and `factor` of what stands in `rows`."""
    apart()
    size, h_row, nan = element_bytes(like), room.h_row, like.dtype.type(np.nan)
    wide, one, zero = lanes(like) * size, like.dtype.type(1.0), like.dtype.type(0.0)
    for top in range(0, how.keys, EIGHT):
        first = top * size // wide * wide
        if top:
            multiply(
                like, room.rows + top * h_row + first, h_row, room.factor + top * size, size, h_row, room.rows + first, h_row, EIGHT,
                (h_row - first) // wide, top, -one, ONE, WHOLE, ONE,
            )  # fmt: skip
        for x in range(top, min(top + EIGHT, how.keys)):
            row, factor = room.rows + x * h_row, room.factor + x * h_row
            for before in range(top, x):
                by, other = splat_at(like, room.factor + before * h_row + x * size), room.rows + before * h_row
                for w in range(first, h_row, wide):
                    rolled()
                    put_at(row + w, sub(load_at(like, row + w), mul(by, load_at(like, other + w))))
            pivot = number_at(like, row + x * size)
            inverse = fill(like, one / pivot if pivot >= zero else nan)
            for w in range(first, h_row, wide):
                rolled()
                put_at(factor + w, mul(inverse, load_at(like, row + w)))


@njit(error_model="numpy", cache=True)
def solve_by_factors(like, how, room, operands, state, t, n):
    """Solutions of all heads of a chunk, and G after it."""
    apart()
    size, k_row, h_row, last = element_bytes(like), room.k_row, room.h_row, up(how.keys, EIGHT) - 1
    heads = (h_row - k_row) // (lanes(like) * size)
    for i in range(n):
        add_token(like, how, room, operands, state, t + i, i)
        factorise(like, how, room)
        there = room.factor + last * h_row
        substitute(like, there + k_row, -h_row, there + last * size, -h_row, -size, last + 1, heads)
        for h in range(how.group):
            to = room.solution + (h * room.q_rows + i) * k_row
            for x in range(how.keys):
                put_at(to + x * size, number_at(like, room.factor + x * h_row + k_row + h * size))


# ---- by conjugate gradients ------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def along(like, a, b, row):
    """Product of two rows."""
    sums = fill(like, 0.0)
    for x in range(0, row, lanes(like) * element_bytes(like)):
        rolled()
        sums = fma(load_at(like, a + x), load_at(like, b + x), sums)
    return total(sums)


@njit(error_model="numpy", cache=True)
def apply(like, how, room, rows, n):
    """image = what G_t + diag(ridge) makes of row t of n."""
    apart()
    size, one, many = element_bytes(like), like.dtype.type(1.0), up(n, EIGHT)
    k_row, s_row, wide = room.k_row, room.s_row, lanes(like) * size
    columns, vectors = (n + lanes(like) - 1) // lanes(like), k_row // wide
    multiply(like, room.P, s_row, rows, k_row, size, room.turned, s_row, many, columns, how.keys, one, START, LOWER_RESULT, ONE)
    weigh(like, room.P, room.pairs, s_row, n, START, ONE)
    multiply(like, room.image, k_row, room.P, s_row, size, room.k, k_row, many, vectors, n, one, START, LOWER, ONE)
    times_numbers(like, rows, room.far + size, ONE, n, k_row, room.faded)
    multiply(like, room.image, k_row, room.faded, k_row, size, room.gram, k_row, many, vectors, how.keys, one, ONE, WHOLE, ONE)
    for x in range(0, n * k_row, k_row):
        for w in range(0, k_row, wide):
            rolled()
            at = room.image + x + w
            put_at(at, fma(load_at(like, room.ridge + w), load_at(like, rows + x + w), load_at(like, at)))


@njit(error_model="numpy", cache=True)
def diagonals(like, how, room, n):
    """Row t: the diagonal of G_t + diag(ridge), and beyond it ones."""
    apart()
    size, k_row, one = element_bytes(like), room.k_row, like.dtype.type(1.0)
    for x in range(k_row // size):
        d = number_at(like, room.gram + x * (k_row + size)) if x < how.keys else one
        for i in range(n):
            d = number_at(like, room.decays + i * size) * d
            at = i * k_row + x * size
            d += number_at(like, room.written + at) * number_at(like, room.k + at)
            put_at(room.diagonal + at, d + number_at(like, room.ridge + x * size) if x < how.keys else one)


@njit(error_model="numpy", cache=True)
def begin(like, how, room, solution, n):
    """Solution, residual and direction before the first step."""
    apart()
    wide, bytes_ = lanes(like) * element_bytes(like), n * room.k_row
    if how.start == 1:
        for x in range(0, bytes_, wide):
            rolled()
            put_at(solution + x, div(load_at(like, room.q + x), load_at(like, room.diagonal + x)))
        apply(like, how, room, solution, n)
    for x in range(0, bytes_, wide):
        rolled()
        residual = load_at(like, room.q + x)
        if how.start == 1:
            residual = sub(residual, load_at(like, room.image + x))
        else:
            put_at(solution + x, fill(like, 0.0))
        put_at(room.residual + x, residual)
        put_at(room.direction + x, residual)
    for i in range(n):
        there = room.residual + i * room.k_row
        put_at(room.sizes + i * element_bytes(like), along(like, there, there, room.k_row))


@njit(error_model="numpy", cache=True)
def solve_by_steps(like, how, room, solution, n, eps):
    """Solutions of a head whose queries are in q."""
    apart()
    size, k_row, zero, one = element_bytes(like), room.k_row, like.dtype.type(0.0), like.dtype.type(1.0)
    wide = lanes(like) * size
    begin(like, how, room, solution, n)
    for _ in range(how.steps):
        apply(like, how, room, room.direction, n)
        for i in range(n):
            at, before = i * k_row, number_at(like, room.sizes + i * size)
            curvature = eps + along(like, room.direction + at, room.image + at, k_row)
            length = before / (curvature if curvature != zero else one)  # a residual of 0 stays
            step, back, sums = fill(like, length), fill(like, -length), fill(like, zero)
            for x in range(at, at + k_row, wide):
                rolled()
                put_at(solution + x, fma(step, load_at(like, room.direction + x), load_at(like, solution + x)))
                residual = fma(back, load_at(like, room.image + x), load_at(like, room.residual + x))
                put_at(room.residual + x, residual)
                sums = fma(residual, residual, sums)
            after, before = total(sums), before + eps
            put_at(room.sizes + i * size, after)
            ratio = fill(like, after / (before if before != zero else one))
            for x in range(at, at + k_row, wide):
                rolled()
                put_at(room.direction + x, fma(ratio, load_at(like, room.direction + x), load_at(like, room.residual + x)))


# ---- a chunk ---------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def solve(like, how, room, operands, state, t, n, eps):
    """Solutions of all heads of a chunk."""
    if how.solver == 0:
        solve_by_factors(like, how, room, operands, state, t, n)
        return
    size, one = element_bytes(like), like.dtype.type(1.0)
    if how.start == 1:
        diagonals(like, how, room, n)
    for h in range(how.group):
        q = operands.q + ((state * how.group + h) * how.tokens + t) * how.keys * size
        fetch(like, q, how.keys * size, n, how.keys, one, room.q, room.k_row)
        solve_by_steps(like, how, room, room.solution + h * room.q_rows * room.k_row, n, eps)


@njit(error_model="numpy", cache=True)
def read(like, how, room, operands, state, t, n):
    """Outputs of a chunk."""
    apart()
    size, one, none, rows = element_bytes(like), like.dtype.type(1.0), START, up(n, EIGHT)
    k_row, v_row, s_row, v = room.k_row, room.v_row, room.s_row, how.values * element_bytes(like)
    columns, vectors = (n + lanes(like) - 1) // lanes(like), v_row // (lanes(like) * size)
    for h in range(how.group):
        solution = room.solution + h * room.q_rows * k_row
        multiply(like, room.P, s_row, solution, k_row, size, room.turned, s_row, rows, columns, how.keys, one, none, LOWER_RESULT, ONE)
        weigh(like, room.P, room.pairs, s_row, n, START, ONE)
        multiply(like, room.out, v_row, room.P, s_row, size, room.v, v_row, rows, vectors, n, one, none, LOWER, ONE)
        times_numbers(like, solution, room.far + size, ONE, n, k_row, room.faded)
        multiply(like, room.out, v_row, room.faded, k_row, size, room.state, v_row, rows, vectors, how.keys, one, ONE, WHOLE, ONE)
        deliver(like, room.out, v_row, n, how.values, one, operands.out + ((state * how.group + h) * how.tokens + t) * v, v)


@njit(error_model="numpy", cache=True)
def faded_and_written(like, room, matrix, row, added, n, keys):
    """A matrix of keys after a chunk: faded, and with what is written times rows added."""
    size = element_bytes(like)
    times_numbers(like, matrix, room.far + n * size, ONE, ONE, keys * row, matrix)
    vectors = row // (lanes(like) * size)
    multiply(like, matrix, row, room.tail, size, room.k_row, added, row, up(keys, EIGHT), vectors, n, like.dtype.type(1.0), ONE, WHOLE, ONE)


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, state, head, eps):
    """One task."""
    size, one, unit = element_bytes(like), like.dtype.type(1.0), max(lanes(like), EIGHT)
    k, v, k_row, h_row = how.keys * size, how.values * size, room.k_row, room.h_row
    width = up(how.keys, unit)
    gram, states = operands.gram + state * how.keys * k, operands.state + state * how.keys * v
    fetch(like, operands.ridge + head * k, k, ONE, how.keys, one, room.ridge, k_row)
    fetch(like, gram, k, how.keys, how.keys, one, room.gram, k_row)
    transpose(like, room.gram, k_row, room.rows, h_row, width, width)
    fetch(like, room.rows, h_row, how.keys, width, one, room.gram, k_row)
    fetch(like, states, v, how.keys, how.values, one, room.state, room.v_row)
    for t in range(0, how.tokens, how.chunk):
        n = min(how.chunk, how.tokens - t)
        token = state * how.tokens + t
        fetch(like, operands.k + token * k, k, n, how.keys, one, room.k, k_row)
        fetch(like, operands.v + token * v, v, n, how.values, one, room.v, room.v_row)
        deliver(like, operands.gate + token * size, START, ONE, n, one, room.decays, START)
        deliver(like, operands.beta + token * size, START, ONE, n, one, room.beta, START)
        exponentials(like, room.decays, room.s_row // (size * lanes(like)))
        all_pairs(like, room.decays, ONE, n, room.pairs, room.s_row, room.far)
        times_numbers(like, room.k, room.beta, ONE, n, k_row, room.written)
        times_numbers(like, room.written, room.pairs + (n - 1) * room.s_row, ONE, n, k_row, room.tail)
        transpose(like, room.written, k_row, room.turned, room.s_row, up(n, unit), width)
        solve(like, how, room, operands, state, t, n, eps)
        read(like, how, room, operands, state, t, n)
        faded_and_written(like, room, room.state, room.v_row, room.v, n, how.keys)
        if how.solver != 0:
            faded_and_written(like, room, room.gram, k_row, room.k, n, how.keys)
    transpose(like, room.gram, k_row, room.rows, h_row, width, width)
    deliver(like, room.rows, h_row, how.keys, how.keys, one, gram, k)
    deliver(like, room.state, room.v_row, how.keys, how.values, one, states, v)


@njit(error_model="numpy", inline="always")
def take_tasks(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, counter):
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, keys = k.shape
    how = How(q.shape[1] // kv_heads, tokens, keys, v.shape[3], min(CHUNK, tokens), solver, steps, start)
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(v, (0, 0, 0, 0)), address(gate, (0, 0, 0)), address(beta, (0, 0, 0)),
        address(ridge, (0, 0)), address(gram, (0, 0, 0, 0)), address(state, (0, 0, 0, 0)), address(out, (0, 0, 0, 0)),
    )  # fmt: skip
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, task, task % kv_heads, eps)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, counter):
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, counter)


def forward_alone(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps):
    """On this thread."""
    take_tasks(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, np.zeros(1, np.int64))


def forward_parallel(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, threads):
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(q, k, v, gate, beta, ridge, gram, state, out, solver, steps, start, eps, counter)


# ---- the call ------------------------------------------------------------------------------------------------------------------------


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    operands = whole(problem, "q", "k", "v", "gate", "beta", "ridge")
    (gram, state), (out,) = carried(problem, "gram", "state"), results(problem, "out")
    if out.size:
        *choices, eps = problem.arguments
        work = float(out.size) * problem.dims["D"] ** 2
        launch(forward_alone, forward_parallel, out.dtype, (*operands, gram, state, out, *choices, out.dtype.type(eps)), work, threads, kernel)
    return {"out": out, "gram": gram, "state": state}
