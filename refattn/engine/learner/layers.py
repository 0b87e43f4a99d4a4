"""Layers of a model that learns: their products with tokens of a mini-batch, whose models are no two the same, and layer normalisation.

A layer is a matrix whose last row is its offset, which inputs meet with a one at their end.  With W for the model before the mini-batch, G for the
sum of its gradients so far, s_t for a token's scale, and U_j for token j's own step in what the layer makes of its input x_j, a later input y_t finds

    y_t^T W - s_t (y_t^T G + sum_{j <= t} (y_t . x_j) U_j^T)

Rows are whole vectors, zero beyond their columns, and stay so: `ones` is a row of ones as long as they are, zero beyond.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from ..panels import START
from ..simd import add, div, element_bytes, fill, fma, lanes, load_at, mul, number_at, put_at, splat_at, sub, total
from ..state.chunks import clear, deliver, fetch, times_numbers, up
from ..state.products import EIGHT, LOWER, LOWER_RESULT, ONE, WHOLE, apart, multiply, rolled


class Layer(NamedTuple):
    """Inputs, the offset's one not counted, outputs, bytes of a row, and the addresses of W and G."""

    inputs: int
    outputs: int
    row: int
    model: int
    gradient: int


class Batch(NamedTuple):
    """Tokens, bytes of a row of them, minus their scales, whether there are gradients so far, and room for a product of tokens and faded inputs."""

    n: int
    s_row: int
    scales: int
    begun: int
    P: int
    faded: int


# ---- models ------------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def fetch_layer(like, layer, matrix, offset, to):
    """A matrix and an offset of the caller's."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    fetch(like, matrix, layer.outputs * size, layer.inputs, layer.outputs, one, to, layer.row)
    fetch(like, offset, START, ONE, layer.outputs, one, to + layer.inputs * layer.row, layer.row)


@njit(error_model="numpy", cache=True)
def deliver_layer(like, layer, matrix, offset, source):
    """The way back."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    deliver(like, source, layer.row, layer.inputs, layer.outputs, one, matrix, layer.outputs * size)
    deliver(like, source + layer.inputs * layer.row, layer.row, ONE, layer.outputs, one, offset, START)


@njit(error_model="numpy", cache=True)
def through(like, layer, x, x_row, n, to):
    """What n inputs make of W."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    vectors = layer.row // (lanes(like) * size)
    multiply(like, to, layer.row, x, x_row, size, layer.model, layer.row, up(n, EIGHT), vectors, layer.inputs + 1, one, START, WHOLE, ONE)


@njit(error_model="numpy", cache=True)
def below(like, matrix, row, numbers, n):
    """Row r times number r; zero beyond the diagonal, as far as whoever reads eights of rows comes."""
    apart()
    size = element_bytes(like)
    wide = lanes(like) * size
    for r in range(n):
        at, by = matrix + r * row, splat_at(like, numbers + r * size)
        for x in range(0, (r + 1) * size, wide):
            rolled()
            put_at(at + x, mul(by, load_at(like, at + x)))
        for c in range(r + 1, r // EIGHT * EIGHT + EIGHT):
            put_at(at + c * size, like.dtype.type(0.0))


@njit(error_model="numpy", cache=True)
def through_learnt(like, layer, batch, y, y_row, turned, U, to):
    """What inputs find, each after its own token's step; `turned` has the inputs that were learnt from, a column for each token."""
    apart()
    size, one, none, rows, terms = element_bytes(like), like.dtype.type(1.0), START, up(batch.n, EIGHT), layer.inputs + 1
    columns, vectors = (batch.n + lanes(like) - 1) // lanes(like), layer.row // (lanes(like) * size)
    multiply(like, batch.P, batch.s_row, y, y_row, size, turned, batch.s_row, rows, columns, terms, one, none, LOWER_RESULT, ONE)
    below(like, batch.P, batch.s_row, batch.scales, batch.n)
    through(like, layer, y, y_row, batch.n, to)
    if batch.begun:
        times_numbers(like, y, batch.scales, ONE, batch.n, y_row, batch.faded)
        multiply(like, to, layer.row, batch.faded, y_row, size, layer.gradient, layer.row, rows, vectors, terms, one, ONE, WHOLE, ONE)
    multiply(like, to, layer.row, batch.P, batch.s_row, size, U, layer.row, rows, vectors, batch.n, one, ONE, LOWER, ONE)


@njit(error_model="numpy", cache=True)
def learn(like, layer, batch, x, x_step, x_row, U, finished):
    """G after these tokens; W after a mini-batch that ends with them, whose G nobody reads any more.

    Tokens' inputs x are so many bytes apart: from one number to the next of a token, and from token to token.
    """
    apart()
    size, rows, vectors = element_bytes(like), up(layer.inputs + 1, EIGHT), layer.row // (lanes(like) * element_bytes(like))
    factor, one = number_at(like, batch.scales + (batch.n - 1) * size), like.dtype.type(1.0)
    to, times, keep = (layer.model, factor, ONE) if finished and not batch.begun else (layer.gradient, one, np.int64(batch.begun))
    multiply(like, to, layer.row, x, x_step, x_row, U, layer.row, rows, vectors, batch.n, times, keep, WHOLE, ONE)
    if finished and batch.begun:
        every = fill(like, factor)
        for at in range(0, rows * layer.row, lanes(like) * size):
            rolled()
            put_at(layer.model + at, fma(every, load_at(like, layer.gradient + at), load_at(like, layer.model + at)))


# ---- rows --------------------------------------------------------------------------------------------------------------------------------


@njit(error_model="numpy", cache=True)
def fetch_norms(like, weight, bias, columns, norms, row):
    """Rows of weights, bias and ones; one more is room for a slope."""
    size, one = element_bytes(like), like.dtype.type(1.0)
    fetch(like, weight, START, ONE, columns, one, norms, row)
    fetch(like, bias, START, ONE, columns, one, norms + row, row)
    ones = norms + 2 * row
    clear(like, ones, row, ONE, row)
    for x in range(ones, ones + columns * size, size):
        put_at(x, one)


@njit(error_model="numpy", cache=True)
def fetch_with_one(like, source, source_row, rows, columns, target, target_row):
    """Rows that have a one after their columns, for what is added to a product: an offset is one more row of its matrix."""
    fetch(like, source, source_row, rows, columns, like.dtype.type(1.0), target, target_row)
    for r in range(rows):
        put_at(target + r * target_row + columns * element_bytes(like), like.dtype.type(1.0))


@njit(error_model="numpy", cache=True)
def standardise(like, z, row, ones, columns, eps):
    """(z - mean) / std of a row in place; returns std, the root of the variance and eps."""
    apart()
    wide, number = lanes(like) * element_bytes(like), like.dtype.type
    sums = fill(like, 0.0)
    for x in range(0, row, wide):
        rolled()
        sums = add(sums, load_at(like, z + x))
    minus, sums = fill(like, -total(sums) / number(columns)), fill(like, 0.0)
    for x in range(0, row, wide):
        rolled()
        centred = fma(minus, load_at(like, ones + x), load_at(like, z + x))
        put_at(z + x, centred)
        sums = fma(centred, centred, sums)
    std = number(math.sqrt(total(sums) / number(columns) + eps))
    by = fill(like, std)
    for x in range(0, row, wide):
        rolled()
        put_at(z + x, div(load_at(like, z + x), by))
    return std


@njit(error_model="numpy", cache=True)
def slopes(like, z, row, k, k_row, v, norms, n, columns, eps):
    """Of n rows of what a layer gives for keys, in place: the slope of |weight LN + bias - (v - k)|^2 / 2; `norms` are weight, bias and ones."""
    apart()
    wide, number = lanes(like) * element_bytes(like), like.dtype.type
    weight, bias, ones = norms, norms + row, norms + 2 * row
    spare = norms + 3 * row
    for r in range(n):
        at, keys, values = z + r * row, k + r * k_row, v + r * row
        std = standardise(like, at, row, ones, columns, eps)
        along_ones, along_z = fill(like, 0.0), fill(like, 0.0)
        for x in range(0, row, wide):
            rolled()
            by, here = load_at(like, weight + x), load_at(like, at + x)
            error = sub(fma(by, here, load_at(like, bias + x)), sub(load_at(like, values + x), load_at(like, keys + x)))
            slope = mul(by, error)
            put_at(spare + x, slope)
            along_ones, along_z = add(along_ones, slope), fma(slope, here, along_z)
        minus_mean, minus_along = fill(like, -total(along_ones) / number(columns)), fill(like, -total(along_z) / number(columns))
        by = fill(like, std)
        for x in range(0, row, wide):
            rolled()
            centred = fma(minus_mean, load_at(like, ones + x), load_at(like, spare + x))
            put_at(at + x, div(fma(minus_along, load_at(like, at + x), centred), by))


@njit(error_model="numpy", cache=True)
def answers(like, z, row, q, q_row, norms, n, columns, eps):
    """Of n rows in place: q + weight LN + bias."""
    apart()
    wide = lanes(like) * element_bytes(like)
    weight, bias, ones = norms, norms + row, norms + 2 * row
    for r in range(n):
        at, queries = z + r * row, q + r * q_row
        standardise(like, at, row, ones, columns, eps)
        for x in range(0, row, wide):
            rolled()
            y = fma(load_at(like, weight + x), load_at(like, at + x), load_at(like, bias + x))
            put_at(at + x, add(load_at(like, queries + x), y))
