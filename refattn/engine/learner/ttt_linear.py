"""TTT-Linear, a mini-batch or 64 tokens of one at a time: all gradients are taken at the model before it, and so are products of matrices.

    Z = K W        U = eta slope(Z)        memory = Q W - s (Q G + tril(Q K^T) U)        G <- G + K^T U

with s for the tokens' scales and G for the sum of the mini-batch's gradients so far; after its last token W <- W - s_last G and G <- 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from ...problem import Problem
from ..panels import START
from ..references import hold, lent
from ..simd import address, element_bytes, lanes
from ..state.chunks import clear, deliver, fetch, times_numbers, up
from ..state.products import EIGHT, ONE, apart, transpose
from ..tasks import take
from ..threads import launch
from .arrays import carried, positions, results, whole
from .kernels import kernel
from .layers import Batch, Layer, answers, deliver_layer, fetch_layer, fetch_norms, fetch_with_one, learn, slopes, through, through_learnt

#: Tokens of a chunk at most.
CHUNK = 64


class How(NamedTuple):
    """Heads that read a model, tokens, width, tokens of a mini-batch, of a chunk at most, and whether there are gradients before the first token."""

    group: int
    tokens: int
    width: int
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
    state: int
    offset: int
    gradient: int
    offset_gradient: int
    out: int
    memory: int


class Room(NamedTuple):
    """Addresses in a thread's memory, and bytes from row to row of matrices with keys and a one, values or tokens along a row."""

    k_row: int
    v_row: int
    s_row: int
    q: int
    faded: int
    k: int
    turned: int  # keys, a column for each token
    v: int
    U: int
    P: int
    eta: int
    scales: int  # minus those of tokens
    memory: int
    norms: int  # weight, bias, ones, and a row to spare
    model: int
    gradient: int
    end: int


@njit(error_model="numpy", cache=True)
def room_at(like, how, place):
    """Where everything lies from an address on."""
    size, unit = element_bytes(like), max(lanes(like), EIGHT)
    rows, n_k = up(how.chunk, unit) + unit, up(how.width + 1, unit)
    k_row, v_row, s_row = n_k * size, up(how.width, lanes(like)) * size, rows * size
    q = up(place, 64)
    faded = q + rows * k_row
    k = faded + rows * k_row
    turned = k + rows * k_row
    v = turned + n_k * s_row
    U = v + rows * v_row
    P = U + rows * v_row
    eta = P + rows * s_row
    scales = eta + s_row
    memory = up(scales + s_row, 64)
    norms = memory + rows * v_row
    model = norms + (4 + unit) * v_row
    gradient = model + (n_k + unit) * v_row
    return Room(
        k_row, v_row, s_row, q, faded, k, turned, v, U, P, eta, scales, memory, norms, model, gradient, gradient + (n_k + unit) * v_row
    )  # fmt: skip


@njit(error_model="numpy", cache=True)
def fetch_batch(like, how, room, operands, layer, state, t, n, eps):
    """Keys of n tokens, and their U."""
    apart()
    size, one, token = element_bytes(like), like.dtype.type(1.0), state * how.tokens + t
    d, unit = how.width * size, max(lanes(like), EIGHT)
    fetch_with_one(like, operands.k + token * d, d, n, how.width, room.k, room.k_row)
    fetch(like, operands.v + token * d, d, n, how.width, one, room.v, room.v_row)
    deliver(like, operands.eta + token * size, START, ONE, n, one, room.eta, START)
    deliver(like, operands.token_scale + token * size, START, ONE, n, -one, room.scales, START)
    transpose(like, room.k, room.k_row, room.turned, room.s_row, up(n, unit), up(how.width + 1, unit))
    through(like, layer, room.k, room.k_row, n, room.U)
    slopes(like, room.U, room.v_row, room.k, room.k_row, room.v, room.norms, n, how.width, eps)
    times_numbers(like, room.U, room.eta, ONE, n, room.v_row, room.U)


@njit(error_model="numpy", inline="always")
def forward(like, how, room, operands, state, head, start, eps):
    """One task."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    d, v_row, matrix, offset = how.width * size, room.v_row, state * how.width * how.width * size, state * how.width * size
    layer = Layer(how.width, how.width, v_row, room.model, room.gradient)
    fetch_norms(like, operands.norm_weight + head * d, operands.norm_bias + head * d, how.width, room.norms, v_row)
    fetch_layer(like, layer, operands.state + matrix, operands.offset + offset, room.model)
    fetch_layer(like, layer, operands.gradient + matrix, operands.offset_gradient + offset, room.gradient)
    t, begun = START, how.given
    while t < how.tokens:
        n = min(how.mini_batch - (start + t) % how.mini_batch, how.chunk, how.tokens - t)
        batch = Batch(n, room.s_row, room.scales, begun, room.P, room.faded)
        fetch_batch(like, how, room, operands, layer, state, t, n, eps)
        for h in range(state * how.group, (state + 1) * how.group):
            at = (h * how.tokens + t) * d
            fetch_with_one(like, operands.q + at, d, n, how.width, room.q, room.k_row)
            through_learnt(like, layer, batch, room.q, room.k_row, room.turned, room.U, room.memory)
            deliver(like, room.memory, v_row, n, how.width, one, operands.memory + at, d)
            answers(like, room.memory, v_row, room.q, room.k_row, room.norms, n, how.width, eps)
            deliver(like, room.memory, v_row, n, how.width, one, operands.out + at, d)
        t += n
        finished = int((start + t) % how.mini_batch == 0)
        learn(like, layer, batch, room.k, size, room.k_row, room.U, finished)
        begun = 1 - finished
    if not begun:
        clear(like, room.gradient, v_row, how.width + 1, v_row)
    deliver_layer(like, layer, operands.state + matrix, operands.offset + offset, room.model)
    deliver_layer(like, layer, operands.gradient + matrix, operands.offset_gradient + offset, room.gradient)


@njit(error_model="numpy", inline="always")
def take_tasks(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given, counter
):  # fmt: skip
    """Takes tasks until there are none; nothing here counts references while it works."""
    like = lent(q.reshape(q.size))
    batch, kv_heads, tokens, width = k.shape
    how = How(q.shape[1] // kv_heads, tokens, width, mini_batch, min(CHUNK, mini_batch, tokens), given)
    owned = np.zeros(room_at(like, how, START).end + 64, np.uint8)
    room = room_at(like, how, address(owned, 0))
    operands = Operands(
        address(q, (0, 0, 0, 0)), address(k, (0, 0, 0, 0)), address(v, (0, 0, 0, 0)), address(eta, (0, 0, 0)), address(norm_weight, (0, 0)),
        address(norm_bias, (0, 0)), address(token_scale, (0, 0, 0)), address(state, (0, 0, 0, 0)), address(offset, (0, 0, 0)),
        address(gradient, (0, 0, 0, 0)), address(offset_gradient, (0, 0, 0)), address(out, (0, 0, 0, 0)), address(memory, (0, 0, 0, 0)),
    )  # fmt: skip
    task = take(counter)
    while task < batch * kv_heads:
        forward(like, how, room, operands, task, task % kv_heads, starts[task // kv_heads], eps)
        task = take(counter)
    hold(owned)


@njit(error_model="numpy", nogil=True, cache=True)
def worker(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given, counter
):  # fmt: skip
    """What each of several threads does; a function of its own, or Numba would look for reductions in it."""
    take_tasks(
        q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given,
        counter,
    )  # fmt: skip


def forward_alone(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given
):  # fmt: skip
    """On this thread."""
    take_tasks(
        q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given,
        np.zeros(1, np.int64),
    )  # fmt: skip


def forward_parallel(
    q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given, threads
):  # fmt: skip
    """On several threads; the same bits."""
    counter = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker(
            q, k, v, eta, norm_weight, norm_bias, token_scale, starts, state, offset, gradient, offset_gradient, out, memory, mini_batch, eps, given,
            counter,
        )  # fmt: skip


# ---- the call ------------------------------------------------------------------------------------------------------------------------


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    operands = whole(problem, "q", "k", "v", "eta", "norm_weight", "norm_bias", "token_scale")
    names = ("state", "offset", "gradient", "offset_gradient")
    models, (out, memory), starts = carried(problem, *names), results(problem, "out", "memory"), positions(problem)
    if out.size:
        given = int(not problem.given.keys().isdisjoint(("initial_gradient", "initial_offset_gradient")))
        arguments = (*operands, starts, *models, out, memory, problem.params["mini_batch"], out.dtype.type(problem.params["eps"]), given)
        launch(forward_alone, forward_parallel, out.dtype, arguments, 2.0 * out.size * problem.dims["D"], threads, kernel)
    return {"out": out, "memory": memory, **dict(zip(names, models, strict=True)), "position": starts + float(problem.dims["T"])}
