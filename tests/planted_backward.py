"""The backward pass of flash attention in NumPy as replaceable stages, and the mistakes real kernels made in it, each as stages replaced.

The algorithm is FlashAttention-2's (arXiv:2307.08691, algorithm 2): weights are recomputed from lse tile by tile, and with delta, the row sums
of d_out * out,

    d_v = p^T d_out,   d_p = d_out v^T,   d_s = p (d_p - delta + d_lse),   d_q = scale d_s k,   d_k = scale d_s^T q.

Arithmetic is float32; weights and d_s are rounded to the operands' format before they are multiplied, as is the output that delta is made of.
`FAULTS` maps a name, which begins with the fault's number in the project's catalogue, to the stages that contain it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import planted

from refattn.candidate import Candidate

F32 = np.float32


# ---- the right stages ----------------------------------------------------------------------------------------------------------


def row_products(d_out, out):
    """delta (B, Hq, T, 1): what the normaliser takes back from every key of a row."""
    return (d_out * out).sum(-1, keepdims=True)


def exponentials(s, lse):
    """Weights from scores and lse; a row that saw nothing weighs nothing."""
    return np.exp(s - np.where(np.isneginf(lse), F32(0), lse))


def with_slope(s, cap):
    """Capped scores and the derivative of the cap."""
    if cap is None:
        return s, np.ones_like(s)
    bent = np.tanh(s / cap)
    return cap * bent, 1 - bent * bent


def shown(s, bias, seen):
    return np.where(seen, s + bias, -np.inf).astype(F32)


def for_values(p, d_out):
    return np.swapaxes(p, -1, -2) @ d_out


def for_weights(d_out, v):
    return d_out @ np.swapaxes(v, -1, -2)


def for_scores(p, d_p, delta, d_lse):
    return p * (d_p - delta + d_lse)


def for_queries(d_s, k, scale):
    return d_s @ k * scale


def for_keys(d_s, p, q, scale):
    return np.swapaxes(d_s, -1, -2) @ q * scale


def heads_to_groups(x, kv_heads):
    """Every key-value head gets the sum over the query heads that read it."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, *rest).sum(axis=2)


def to_shape_of_bias(d_s, given):
    """Summed over every axis along which the bias was repeated."""
    shape = (1,) * (4 - len(given)) + given
    return d_s.sum(axis=tuple(n for n, size in enumerate(shape) if size == 1), keepdims=True).reshape(given)


def for_sinks(p_sink, delta, d_lse):
    """A sink's value is zero, so its weight moves the output only through the normaliser."""
    return (p_sink * (d_lse - delta)).sum(axis=(0, 2, 3))


def query_tiles(n_q, n_k, width):
    return planted.tiles(n_k, n_q, width)


@dataclass(frozen=True)
class Stages:
    """What a backward kernel is made of."""

    tile: int = 16
    forward: planted.Stages = planted.RIGHT
    read: Callable = planted.in_float32
    cotangent: Callable = lambda d_out: d_out.astype(F32)
    visible: Callable = planted.visible
    delta: Callable = row_products
    capped: Callable = with_slope
    shown: Callable = shown
    weights: Callable = exponentials
    values: Callable = for_values
    d_weights: Callable = for_weights
    scores: Callable = for_scores
    queries: Callable = for_queries
    keys: Callable = for_keys
    group: Callable = planted.grouped
    reduce: Callable = heads_to_groups
    bias: Callable = to_shape_of_bias
    sinks: Callable = for_sinks
    query_tiles: Callable = query_tiles
    key_tiles: Callable = planted.tiles
    row: Callable = lambda x, rows: x[:, :, rows]  # lse and delta of a tile of queries
    gathered: Callable = lambda total, part: total + part


@np.errstate(all="ignore")  # exp(-inf) and log(0) are meant, and faults make infinities
def gradients(stages, q, k, v, d_out=None, d_lse=None, bias=None, mask=None, sinks=None, scale=None, softcap=None, causal=False, window=None):
    """d_q, d_k, d_v and, where they were given, d_bias and d_sinks, in the operands' format, by name."""
    stored = v.dtype
    out, lse = planted.attend(stages.forward, q, k, v, bias, mask, sinks, scale, softcap, causal, window)
    kv_heads = k.shape[1]
    q, k, v = stages.read(q, k, v)
    batch, heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    k, v = stages.group(k, heads), stages.group(v, heads)
    full = (batch, heads, n_q, n_k)
    seen = np.broadcast_to(planted.allowed(stages.visible(n_q, n_k, causal, window), mask), full)
    added = np.broadcast_to(F32(0) if bias is None else bias.astype(F32), full)
    v = np.where(seen.any(axis=2)[..., None], v, F32(0))
    scale = planted.factor(scale, d, d_v, heads)
    d_out = np.zeros((*full[:3], d_v), F32) if d_out is None else stages.cotangent(d_out)
    lse, d_lse = lse[..., None], np.zeros((*full[:3], 1), F32) if d_lse is None else d_lse.astype(F32)[..., None]
    delta = stages.delta(d_out, out.astype(F32))

    d_q, d_k, d_v_ = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    d_scores = np.zeros(full, F32)
    for j in stages.key_tiles(n_q, n_k, stages.tile):
        for i in stages.query_tiles(n_q, n_k, stages.tile):
            s, slope = stages.capped(q[:, :, i] @ np.swapaxes(k[:, :, j], -1, -2) * F32(scale), softcap)
            p = stages.weights(stages.shown(s, added[:, :, i, j], seen[:, :, i, j]), stages.row(lse, i))
            d_v_[:, :, j] = stages.gathered(d_v_[:, :, j], stages.values(p.astype(stored).astype(F32), d_out[:, :, i]))
            d_p = stages.d_weights(d_out[:, :, i], v[:, :, j])
            d_s = stages.scores(p, d_p, stages.row(delta, i), d_lse[:, :, i])
            d_scores[:, :, i, j] = d_s
            d_s = (d_s * slope).astype(stored).astype(F32)
            d_q[:, :, i] = stages.gathered(d_q[:, :, i], stages.queries(d_s, k[:, :, j], F32(scale)))
            d_k[:, :, j] = stages.gathered(d_k[:, :, j], stages.keys(d_s, p, q[:, :, i], F32(scale)))
    found = {"d_q": d_q, "d_k": stages.reduce(d_k, kv_heads), "d_v": stages.reduce(d_v_, kv_heads)}
    if bias is not None:
        found["d_bias"] = stages.bias(d_scores, bias.shape)
    if sinks is not None:
        p_sink = exponentials(sinks.astype(F32)[:, None, None] + np.zeros_like(lse), lse)
        found["d_sinks"] = stages.sinks(p_sink, delta, d_lse)
    return {name: x.astype(stored) for name, x in found.items()}


RIGHT = Stages()


def right(**changes) -> Stages:
    return replace(RIGHT, **changes)


# ---- wrong stages --------------------------------------------------------------------------------------------------------------


def last_of_the_group(x, kv_heads):
    batch, heads, *rest = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads, *rest)[:, :, -1]


def mean_of_the_group(x, kv_heads):
    return heads_to_groups(x, kv_heads) / F32(x.shape[1] // kv_heads)


def groups_as_if_tiled(x, kv_heads):
    batch, heads, *rest = x.shape
    return x.reshape(batch, heads // kv_heads, kv_heads, *rest).sum(axis=1)


def transposed_read_as_contiguous(d_out):
    """Where d_out comes at unusual strides, its memory in C order."""
    return planted.as_if_contiguous(d_out).astype(F32)


def first_tile_of_rows(x, rows):
    """lse and delta always of the first tile."""
    return x[:, :, : rows.stop - rows.start]


def first_row_of_the_tile(x, rows):
    return np.broadcast_to(x[:, :, rows.start : rows.start + 1], x[:, :, rows].shape)


def half_of_the_channels_twice(d_out, v):
    """Value channels in programs of 8, the first of which does the work of all."""
    whole = for_weights(d_out, v)
    return whole if v.shape[-1] <= 8 else for_weights(d_out[..., :8], v[..., :8])


def delta_for_every_part(d_out, out):
    """The full delta subtracted once for each program of 8 value channels."""
    return row_products(d_out, out) * max(1, -(-out.shape[-1] // 8))


def in_base_two(s, lse):
    return np.exp2(s * F32(math.log2(math.e)) - np.where(np.isneginf(lse), F32(0), lse))


def bias_of_the_first_head(d_s, given):
    shape = (1,) * (4 - len(given)) + given
    for axis, size in enumerate(shape):
        if size == 1:
            d_s = np.take(d_s, [0], axis=axis) if axis < 2 else d_s.sum(axis=axis, keepdims=True)
    return d_s.reshape(given)


def bias_averaged(d_s, given):
    repeated = d_s.size / max(1, math.prod(given))
    return to_shape_of_bias(d_s, given) / F32(repeated)


def whole_query_tiles(n_q, n_k, width):
    whole = [rows for rows in query_tiles(n_q, n_k, width) if rows.stop - rows.start == width]
    return whole or list(query_tiles(n_q, n_k, width))


def not_the_first_tile_of_queries(n_q, n_k, width):
    every = list(query_tiles(n_q, n_k, width))
    return every if len(every) < 2 else every[1:]


def everything_visible(n_q, n_k, causal, window):
    return np.ones((n_q, n_k), bool)


def always_causal(n_q, n_k, causal, window):
    return planted.visible(n_q, n_k, causal or True, window)


#: Fault -> the stages that have it.  All of them leave the forward pass as it should be.
FAULTS: dict[str, Stages] = {
    "M5 backward without causal mask and window": right(visible=everything_visible),
    "M5 backward causal though it is not asked": right(visible=always_causal),
    "M1 backward aligned at the top left": right(visible=planted.with_arguments(lambda causal, window: ("top_left" if causal else causal, window))),
    "W1 backward sees one key more": right(visible=planted.moved_window(more_left=1)),
    "H1 heads tiled in the backward pass": right(group=planted.tiled_heads, reduce=groups_as_if_tiled),
    "H4 last head of the group": right(reduce=last_of_the_group),
    "H4 mean over the group": right(reduce=mean_of_the_group),
    "H5 gradients dealt to heads as if tiled": right(reduce=groups_as_if_tiled),
    "H9 strides of d_out ignored": right(cotangent=transposed_read_as_contiguous),
    "B1 lse and delta of the first tile": right(row=first_tile_of_rows),
    "B1 lse and delta of a tile's first row": right(row=first_row_of_the_tile),
    "B2 weights for their gradients in d_k": right(keys=lambda d_s, p, q, scale: for_keys(p, p, q, scale)),
    "B3 slope of the soft-cap missing": right(capped=lambda s, cap: (with_slope(s, cap)[0], np.ones_like(s))),
    "B3 slope of the soft-cap not squared": right(
        capped=lambda s, cap: (with_slope(s, cap)[0], np.ones_like(s) if cap is None else 1 - np.abs(np.tanh(s / cap)))
    ),
    "B5 scale missing in d_q": right(queries=lambda d_s, k, scale: d_s @ k),
    "B5 scale missing in d_k": right(keys=lambda d_s, p, q, scale: np.swapaxes(d_s, -1, -2) @ q),
    "B5 scale missing in both": right(
        queries=lambda d_s, k, scale: d_s @ k, keys=lambda d_s, p, q, scale: np.swapaxes(d_s, -1, -2) @ q
    ),
    "B5 ln 2 left in d_q": right(queries=lambda d_s, k, scale: for_queries(d_s, k, scale) * F32(math.log(2))),
    "B5 ln 2 left in both": right(
        queries=lambda d_s, k, scale: for_queries(d_s, k, scale) * F32(math.log(2)),
        keys=lambda d_s, p, q, scale: for_keys(d_s, p, q, scale) * F32(math.log(2)),
    ),
    "B6 delta missing": right(delta=lambda d_out, out: np.zeros_like(out[..., :1])),
    "B6 delta of the wrong sign": right(delta=lambda d_out, out: -row_products(d_out, out)),
    "B7 delta for every part of the values": right(delta=delta_for_every_part),
    "B7 weights' gradient of the first channels": right(d_weights=half_of_the_channels_twice),
    "B8 bias of the first batch and head": right(bias=bias_of_the_first_head),
    "B8 bias averaged": right(bias=bias_averaged),
    "B8 bias after the scale": right(bias=lambda d_s, given: to_shape_of_bias(d_s, given) * F32(0.25)),
    "B12 NaN where a row sees nothing": right(weights=lambda s, lse: np.exp(s - lse)),
    "B13 no gradient of sinks": right(sinks=lambda p_sink, delta, d_lse: np.zeros(p_sink.shape[1], F32)),
    "B13 gradient of sinks of the wrong sign": right(sinks=lambda p_sink, delta, d_lse: -for_sinks(p_sink, delta, d_lse)),
    "L1 lse in base 2 read as natural": right(weights=in_base_two),
    "L8 no gradient through lse": right(scores=lambda p, d_p, delta, d_lse: p * (d_p - delta)),
    "L8 gradient through lse of the wrong sign": right(scores=lambda p, d_p, delta, d_lse: p * (d_p - delta - d_lse)),
    "T2 last tile of queries dropped": right(query_tiles=whole_query_tiles),
    "T2 first tile of queries dropped": right(query_tiles=not_the_first_tile_of_queries),
    "T4 last tile of keys dropped": right(key_tiles=planted.whole_tiles),
    "R7 every tile stores where others did": right(gathered=lambda total, part: part),
}  # fmt: skip


def candidate(stages: Stages, name: str = "planted backward") -> Candidate:
    """The right forward kernel with this backward pass, as the judge takes it; lse may have a cotangent too."""

    def backward(operands, params, cotangents):
        return gradients(stages, **operands, **params, **{f"d_{name}": x for name, x in cotangents.items()})

    return replace(planted.candidate(stages.forward, name), gradients=backward, cotangents=("out", "lse"))
