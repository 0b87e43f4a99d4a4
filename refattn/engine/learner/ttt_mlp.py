"""TTT-MLP, a mini-batch or 64 tokens of one at a time: all gradients are taken at the model before it, and so are products of matrices.

    X = K W1        Z = gelu(X) W2        U2 = slope(Z)        U1 = gelu'(X) (U2 W2^T)        both then times eta

and the queries go through both layers as layers.py says, each after its own token's step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ...problem import Problem
from ..panels import START, tanh
from ..references import hold, lent
from ..simd import add, address, element_bytes, fill, fma, lanes, load_at, mul, put_at, splat_at
from ..state.chunks import clear, deliver, fetch, times_numbers, up
from ..state.products import EIGHT, ONE, WHOLE, apart, multiply, rolled, transpose
from ..tasks import take
from ..threads import launch
from .arrays import carried, positions, results, whole
from .kernels import kernel
from .layers import Batch, Layer, answers, deliver_layer, fetch_layer, fetch_norms, fetch_with_one, learn, slopes, through, through_learnt

#: Tokens of a chunk at most.
CHUNK = 64
#: sqrt(2 / pi), and the cubic term of the tanh that stands for gelu's erf.
BEND, CUBE = 0.7978845608028654, 0.044715


class How(NamedTuple):
    """Heads that read a model, tokens, widths, tokens of a mini-batch, of a chunk at most, and whether there are gradients before the first token."""

    group: int
    tokens: int
    width: int
    hidden: int
    mini_batch: int
    chunk: int
    given: int


class Operands(NamedTuple):
    """Addresses of the caller's arrays."""

    q: int
    k: int
    v: int
    eta: int
    norm_weight: int
    norm_bias: int
    token_scale: int
    w1: int
    w2: int
    c1: int
    c2: int
    w1_gradient: int
    c1_gradient: int
    w2_gradient: int
    c2_gradient: int
    out: int
    memory: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys, hidden units (and a one), values or tokens along a row."""

    k_row: int
    f_row: int
    v_row: int
    s_row: int
    q: int
    k: int
    faded: int
    turned: int  # keys, a column for each token
    hidden: int
    learnt: int  # hidden units of keys, a column for each token
    v: int
    U1: int
    U2: int
    P: int
    eta: int
    scales: int  # minus those of tokens
    memory: int
    norms: int  # weight, bias, ones, and a row to spare
    model_1: int
    gradient_1: int
    model_2: int
    gradient_2: int
    back: int  # the second layer transposed
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows, n_k, n_f, n_v = up(how.chunk, unit) + unit, up(how.width + 1, unit), up(how.hidden + 1, unit), up(how.width, unit)
    k_row, f_row, v_row, s_row = n_k * size, n_f * size, n_v * size, rows * size
    q = up(place, 64)
    k = q + rows * k_row
    faded = k + rows * k_row
    turned = faded + rows * max(k_row, f_row)
    hidden = turned + n_k * s_row
    learnt = hidden + rows * f_row
    v = learnt + n_f * s_row
    U1 = v + rows * v_row
    U2 = U1 + rows * f_row
    P = U2 + rows * v_row
    eta = P + rows * s_row
    scales = eta + s_row
    memory = scales + s_row
    norms = memory + rows * v_row
    model_1 = norms + (4 + unit) * v_row
    gradient_1 = model_1 + (n_k + unit) * f_row
    model_2 = gradient_1 + (n_k + unit) * f_row
    gradient_2 = model_2 + (n_f + unit) * v_row
    back = gradient_2 + (n_f + unit) * v_row
    return Room(
        k_row, f_row, v_row, s_row, q, k, faded, turned, hidden, learnt, v, U1, U2, P, eta, scales, memory, norms, model_1, gradient_1, model_2,
        gradient_2, back, back + n_v * f_row,
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def activate(like, x, row, n, hidden, slope):
    """gelu of n rows in place, with a one after the hidden units; and its slope there, unless that is 0."""
    apart()
    size = element_bytes(like)
    one, half, bend, cube, three = fill(like, 1.0), fill(like, 0.5), fill(like, BEND), fill(like, CUBE), fill(like, 3.0 * CUBE)
    for r in range(n):
        for at in range(r * row, (r + 1) * row, lanes(like) * size):
            u = load_at(like, x + at)
            square = mul(u, u)
            bent = tanh(mul(bend, mul(u, fma(cube, square, one))), like)
            share = mul(half, add(one, bent))
            put_at(x + at, mul(u, share))
            if slope:
                steep = mul(mul(half, u), fma(bent, mul(fill(like, -1.0), bent), one))
                put_at(slope + at, fma(mul(steep, bend), fma(three, square, one), share))
        put_at(x + r * row + hidden * size, like.dtype.type(1.0))
        if slope:
            put_at(slope + r * row + hidden * size, like.dtype.type(0.0))


@njit(error_model="numpy", cache=True)
def pull_back(like, layer, back, U2, U1, n, row, eta, spare):
    """U1 = eta U1 (U2 W2^T) for the slopes of gelu in U1, and U2 = eta U2."""
    apart()
    size, one, columns = element_bytes(like), like.dtype.type(1.0), row // (lanes(like) * element_bytes(like))
    multiply(like, spare, row, U2, layer.row, size, back, row, up(n, EIGHT), columns, layer.outputs, one, START, WHOLE, ONE)
    for r in range(n):
        by = splat_at(like, eta + r * size)
        for x in range(r * row, (r + 1) * row, lanes(like) * size):
            rolled()
            put_at(U1 + x, mul(by, mul(load_at(like, U1 + x), load_at(like, spare + x))))
    times_numbers(like, U2, eta, ONE, n, layer.row, U2)


@njit(error_model="numpy", cache=True)
def fetch_batch(like, how, room, operands, first, second, state, t, n, eps):
    """Keys of n tokens and their hidden units, and U of both layers."""
    apart()
    size, one, token = element_bytes(like), like.dtype.type(1.0), state * how.tokens + t
    d, unit = how.width * size, max(lanes(like), EIGHT)
    fetch_with_one(like, operands.k + token * d, d, n, how.width, room.k, room.k_row)
    fetch(like, operands.v + token * d, d, n, how.width, one, room.v, room.v_row)
    deliver(like, operands.eta + token * size, START, ONE, n, one, room.eta, START)
    deliver(like, operands.token_scale + token * size, START, ONE, n, -one, room.scales, START)
    transpose(like, room.k, room.k_row, room.turned, room.s_row, up(n, unit), up(how.width + 1, unit))
    through(like, first, room.k, room.k_row, n, room.hidden)
    activate(like, room.hidden, room.f_row, n, how.hidden, room.U1)
    transpose(like, room.hidden, room.f_row, room.learnt, room.s_row, up(n, unit), up(how.hidden + 1, unit))
    through(like, second, room.hidden, room.f_row, n, room.U2)
    slopes(like, room.U2, room.v_row, room.k, room.k_row, room.v, room.norms, n, how.width, eps)
    pull_back(like, second, room.back, room.U2, room.U1, n, room.f_row, room.eta, room.faded)


@njit(error_model="numpy", cache=True)
def read(like, how, room, operands, first, second, batch, state, t, eps):
    """What the queries of a chunk read; the hidden units of its keys are overwritten."""
    apart()
    one, n, d, v_row = like.dtype.type(1.0), batch.n, how.width * element_bytes(like), room.v_row
    for h in range(state * how.group, (state + 1) * how.group):
        at = (h * how.tokens + t) * d
        fetch_with_one(like, operands.q + at, d, n, how.width, room.q, room.k_row)
        through_learnt(like, first, batch, room.q, room.k_row, room.turned, room.U1, room.hidden)
        activate(like, room.hidden, room.f_row, n, how.hidden, START)
        through_learnt(like, second, batch, room.hidden, room.f_row, room.learnt, room.U2, room.memory)
        deliver(like, room.memory, v_row, n, how.width, one, operands.memory + at, d)
        answers(like, room.memory, v_row, room.q, room.k_row, room.norms, n, how.width, eps)
        deliver(like, room.memory, v_row, n, how.width, one, operands.out + at, d)


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, state, head, start, eps):
    """One task."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    d, f, f_row, v_row, s_row = how.width * size, how.hidden * size, room.f_row, room.v_row, room.s_row
    matrix = state * how.width * f
    first = Layer(how.width, how.hidden, f_row, room.model_1, room.gradient_1)
    second = Layer(how.hidden, how.width, v_row, room.model_2, room.gradient_2)
    fetch_norms(like, operands.norm_weight + head * d, operands.norm_bias + head * d, how.width, room.norms, v_row)
    fetch_layer(like, first, operands.w1 + matrix, operands.c1 + state * f, room.model_1)
    fetch_layer(like, first, operands.w1_gradient + matrix, operands.c1_gradient + state * f, room.gradient_1)
    fetch_layer(like, second, operands.w2 + matrix, operands.c2 + state * d, room.model_2)
    fetch_layer(like, second, operands.w2_gradient + matrix, operands.c2_gradient + state * d, room.gradient_2)
    t, begun, finished = START, how.given, 1
    while t < how.tokens:
        n = min(how.mini_batch - (start + t) % how.mini_batch, how.chunk, how.tokens - t)
        batch = Batch(n, s_row, room.scales, begun, room.P, room.faded)
        if finished:
            transpose(like, room.model_2, v_row, room.back, f_row, up(how.hidden, unit), up(how.width, unit))
        fetch_batch(like, how, room, operands, first, second, state, t, n, eps)
        read(like, how, room, operands, first, second, batch, state, t, eps)
        t += n
        finished = int((start + t) % how.mini_batch == 0)
        learn(like, first, batch, room.k, size, room.k_row, room.U1, finished)
        learn(like, second, batch, room.learnt, s_row, size, room.U2, finished)
        begun = 1 - finished
    if not begun:
        clear(like, room.gradient_1, f_row, how.width + 1, f_row)
        clear(like, room.gradient_2, v_row, how.hidden + 1, v_row)
    deliver_layer(like, first, operands.w1 + matrix, operands.c1 + state * f, room.model_1)
    deliver_layer(like, first, operands.w1_gradient + matrix, operands.c1_gradient + state * f, room.gradient_1)
    deliver_layer(like, second, operands.w2 + matrix, operands.c2 + state * d, room.model_2)
    deliver_layer(like, second, operands.w2_gradient + matrix, operands.c2_gradient + state * d, room.gradient_2)


@njit(error_model="numpy", inline="always")
def take_tasks(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
    mini_batch, eps, given, counter,
):  # fmt: skip
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, width = k.shape
    how = How(q.shape[1] // kv_heads, tokens, width, w1.shape[3], mini_batch, min(CHUNK, mini_batch, tokens), given)
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(v, (0, 0, 0, 0)), address(eta, (0, 0, 0)), address(norm_weight, (0, 0)),
        address(norm_bias, (0, 0)), address(token_scale, (0, 0, 0)), address(w1, (0, 0, 0, 0)), address(w2, (0, 0, 0, 0)), address(c1, (0, 0, 0)),
        address(c2, (0, 0, 0)), address(w1_gradient, (0, 0, 0, 0)), address(c1_gradient, (0, 0, 0)), address(w2_gradient, (0, 0, 0, 0)),
        address(c2_gradient, (0, 0, 0)), address(out, (0, 0, 0, 0)), address(memory, (0, 0, 0, 0)),
    )  # fmt: skip
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, task, task % kv_heads, starts[task // kv_heads], eps)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
    mini_batch, eps, given, counter,
):  # fmt: skip
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(
        q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
        mini_batch, eps, given, counter,
    )  # fmt: skip


def forward_alone(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
    mini_batch, eps, given,
):  # fmt: skip
    """On this thread."""
    take_tasks(
        q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
        mini_batch, eps, given, np.zeros(1, np.int64),
    )  # fmt: skip


def forward_parallel(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out, memory,
    mini_batch, eps, given, threads,
):  # fmt: skip
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(
            q, k, v, eta, norm_weight, norm_bias, token_scale, starts, w1, w2, c1, c2, w1_gradient, c1_gradient, w2_gradient, c2_gradient, out,
            memory, mini_batch, eps, given, counter,
        )  # fmt: skip


# ---- the call ------------------------------------------------------------------------------------------------------------------------


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    operands = whole(problem, "q", "k", "v", "eta", "norm_weight", "norm_bias", "token_scale")
    gradients = ("w1_gradient", "c1_gradient", "w2_gradient", "c2_gradient")
    names = ("w1", "w2", "c1", "c2", *gradients)
    models, (out, memory), starts = carried(problem, *names), results(problem, "out", "memory"), positions(problem)
    if out.size:
        given = int(not problem.given.keys().isdisjoint(["initial_" + name for name in gradients]))
        arguments = (*operands, starts, *models, out, memory, problem.params["mini_batch"], out.dtype.type(problem.params["eps"]), given)
        launch(forward_alone, forward_parallel, out.dtype, arguments, 4.0 * out.size * problem.dims["F"], threads, kernel)
    return {"out": out, "memory": memory, **dict(zip(names, models, strict=True)), "position": starts + float(problem.dims["T"])}
