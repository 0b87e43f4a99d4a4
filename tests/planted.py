"""Flash attention in NumPy as replaceable stages, and the mistakes real kernels made, each as one stage replaced.

`attend` is right as long as its stages are.  `FAULTS` maps a name, which begins with the fault's number in the project's catalogue of bugs
found in published kernels, to the stages that contain it.  Arithmetic is float32 whatever the operands are stored in; the weights are rounded
to the operands' format before they meet the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from refattn.candidate import Candidate

F32 = np.float32
FAR = 10**6  # a tile wider than any row


# ---- the right stages ----------------------------------------------------------------------------------------------------------


def in_float32(q, k, v):
    """The operands in working precision."""
    return q.astype(F32), k.astype(F32), v.astype(F32)


def grouped(x, heads):
    """Key-value heads repeated so that query head h finds its own at h."""
    return np.repeat(x, heads // x.shape[1], axis=1)


def factor(scale, d, d_v, heads):
    """What the products are multiplied by."""
    return 1 / math.sqrt(d) if scale is None else scale


def products(q, k, scale):
    return q @ np.swapaxes(k, -1, -2) * scale


def finished(s, scale, cap, bias, seen):
    """Scores after soft-cap, bias and mask, in that order."""
    if cap is not None:
        s = cap * np.tanh(s / cap)
    return np.where(seen, s + bias, -np.inf).astype(F32)


def visible(n_q, n_k, causal, window):
    """Which pairs causality and the window allow, (T, S)."""
    ahead = np.arange(n_k) - np.arange(n_q)[:, None] - (0 if causal == "top_left" else n_k - n_q)
    left, right = window or (None, None)
    seen = np.ones((n_q, n_k), bool)
    seen &= ahead <= 0 if causal else True
    seen &= ahead >= -left if left is not None else True
    seen &= ahead <= right if right is not None else True
    return seen


def allowed(seen, mask):
    """Those pairs less what the mask forbids, (B, Hq, T, S) or fewer axes."""
    return seen if mask is None else seen & mask


def tiles(n_q, n_k, width):
    return (slice(start, min(start + width, n_k)) for start in range(0, n_k, width))


def online(top, total, acc, s, v, stored):
    """One tile: what was gathered under the old maximum shrinks to the new one's scale."""
    new = np.maximum(top, s.max(-1, keepdims=True, initial=-np.inf))
    base = np.where(np.isneginf(new), F32(0), new)  # a row that has seen no key yet
    p, shrink = np.exp(s - base), np.exp(top - base)
    return new, shrink * total + p.sum(-1, keepdims=True), shrink * acc + p.astype(stored).astype(F32) @ v


def with_sink(top, total, acc, sink):
    """The sink joins the denominator."""
    new = np.maximum(top, sink)
    base = np.where(np.isneginf(new), F32(0), new)
    shrink = np.exp(top - base)
    return new, shrink * total + np.exp(sink - base), shrink * acc


def divided(total, acc, v, n_k):
    return acc / np.where(total > 0, total, F32(1))


def log_sum_exp(top, total, scale):
    return top + np.log(total)


@dataclass(frozen=True)
class Stages:
    """What a kernel is made of."""

    tile: int = 16
    lowest: float = -math.inf  # where the running maximum starts
    read: Callable = in_float32
    group: Callable = grouped
    factor: Callable = factor
    products: Callable = products
    finished: Callable = finished
    visible: Callable = visible
    allowed: Callable = allowed
    tiles: Callable = tiles
    update: Callable = online
    sink: Callable = with_sink
    divided: Callable = divided
    lse: Callable = log_sum_exp
    hidden_values: bool = False  # whether values that nobody sees are multiplied by zero instead of skipped


@np.errstate(all="ignore")  # exp(-inf) and log(0) are meant, and faults make infinities
def attend(stages, q, k, v, bias=None, mask=None, sinks=None, scale=None, softcap=None, causal=False, window=None):
    """q (B, Hq, T, D), k (B, Hkv, S, D), v (B, Hkv, S, E) -> out (B, Hq, T, E) in the operands' format and lse (B, Hq, T) in float32."""
    stored = v.dtype
    q, k, v = stages.read(q, k, v)
    batch, heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    k, v = stages.group(k, heads), stages.group(v, heads)
    full = (batch, heads, n_q, n_k)
    seen = np.broadcast_to(stages.allowed(stages.visible(n_q, n_k, causal, window), mask), full)
    bias = np.broadcast_to(F32(0) if bias is None else bias.astype(F32), full)
    if not stages.hidden_values:
        v = np.where(seen.any(axis=2)[..., None], v, F32(0))
    scale = stages.factor(scale, d, d_v, heads)

    top, total = np.full((*full[:3], 1), stages.lowest, F32), np.zeros((*full[:3], 1), F32)
    acc = np.zeros((*full[:3], d_v), F32)
    for tile in stages.tiles(n_q, n_k, stages.tile):
        s = stages.products(q, k[:, :, tile], scale)
        s = stages.finished(s, scale, softcap, bias[..., tile], seen[..., tile])
        top, total, acc = stages.update(top, total, acc, s, v[:, :, tile], stored)
    if sinks is not None:
        top, total, acc = stages.sink(top, total, acc, sinks.astype(F32)[:, None, None])
    return stages.divided(total, acc, v, n_k).astype(stored), stages.lse(top, total, scale)[..., 0]


OPERANDS = frozenset({"q", "k", "v", "bias", "mask", "sinks"})
PARAMS = frozenset({"scale", "softcap", "causal", "window"})


def candidate(stages: Stages, name: str = "planted") -> Candidate:
    """The kernel as the judge takes it, both alignments of ``causal`` included."""
    return Candidate(name, lambda operands, params: attend(stages, **operands, **params), OPERANDS, PARAMS, returns=("out", "lse"))


RIGHT = Stages()


# ---- wrong stages --------------------------------------------------------------------------------------------------------------


def each(read):
    """A `read` stage that treats the three operands alike."""
    return lambda q, k, v: in_float32(*(read(x) for x in (q, k, v)))


def keys(change):
    """A `read` stage that changes the keys."""

    def read(q, k, v):
        q, k, v = in_float32(q, k, v)
        return q, change(k), v

    return read


def as_if_contiguous(x):
    """The memory from the first element on, in C order whatever the strides are."""
    steps = np.empty(x.shape, np.uint8).strides
    return np.lib.stride_tricks.as_strided(x, x.shape, tuple(x.itemsize * s for s in steps))


def value_width_from_keys(q, k, v):
    width = k.shape[3]
    padded = np.zeros_like(v, F32)
    padded[..., :width] = v[..., :width]
    return q.astype(F32), k.astype(F32), padded


def scaled_in_place(q, k, v):
    q *= q.dtype.type(2)
    return q.astype(F32) / 2, k.astype(F32), v.astype(F32)


def whole_tiles_of_eight(x):
    x = x.astype(F32)
    if x.shape[-1] > 8:
        x[..., x.shape[-1] // 8 * 8 :] = 0
    return x


def half_of_the_values(q, k, v):
    q, k, v = in_float32(q, k, v)
    if v.shape[-1] > 16:  # two programs of 16 channels, both at offset 0
        v = np.concatenate([v[..., 16:32], np.zeros_like(v[..., : v.shape[-1] - v[..., 16:32].shape[-1]])], -1)
    return q, k, v


def heads_mixed_with_time(x):
    batch, heads, n, d = x.shape
    return np.ascontiguousarray(x).reshape(batch, n, heads, d).swapaxes(1, 2)


def tiled_heads(x, heads):
    return np.tile(x, (1, heads // x.shape[1], 1, 1))


def time_repeated(x, heads):
    batch, kv_heads, n, d = x.shape
    return np.repeat(x, heads // kv_heads, axis=2).reshape(batch, heads, n, d)


def moved_window(more_left=0, more_right=0, more_causal=0):
    """Windows and causal edges with one key more or less."""

    def seen(n_q, n_k, causal, window):
        ahead = np.arange(n_k) - np.arange(n_q)[:, None] - (0 if causal == "top_left" else n_k - n_q)
        left, right = window or (None, None)
        found = np.ones((n_q, n_k), bool)
        found &= ahead <= more_causal if causal else True
        found &= ahead >= -(left + more_left) if left is not None else True
        found &= ahead <= right + more_right if right is not None else True
        return found

    return seen


def with_arguments(change):
    """A `visible` stage that is right for other arguments than it is given."""
    return lambda n_q, n_k, causal, window: visible(n_q, n_k, *change(causal, window))


def window_at_the_top_left(n_q, n_k, causal, window):
    return visible(n_q, n_k, causal, None) & visible(n_q, n_k, "top_left", None if window is None else (window[0], 0))


def window_needs_a_mask(seen, mask):
    return np.ones_like(seen) if mask is None else seen & mask


def filled_with(fill):
    def finish(s, scale, cap, bias, seen):
        return np.where(seen, finished(s, scale, cap, bias, True), F32(fill))

    return finish


def mask_before_cap(s, scale, cap, bias, seen):
    s = np.where(seen, s, F32(-np.inf))
    return (s if cap is None else cap * np.tanh(s / cap)) + bias


def capped_as(curve):
    """A `finished` stage with another curve than cap * tanh(s / cap)."""

    def finish(s, scale, cap, bias, seen):
        return finished(s if cap is None else curve(s, cap, scale), scale, None, bias, seen)

    return finish


def biased_as(change):
    return lambda s, scale, cap, bias, seen: finished(s, scale, cap, change(bias, scale), seen)


def scores_through(dtype):
    """Scores stored in a narrow format before the softmax."""
    return lambda s, scale, cap, bias, seen: finished(s, scale, cap, bias, seen).astype(dtype).astype(F32)


def summed_in(dtype):
    """Products of queries and keys summed in a narrow format."""

    def score(q, k, scale):
        s = np.zeros((*q.shape[:3], k.shape[2]), dtype)
        for x in range(q.shape[3]):
            s = (s + (q[..., x][..., None].astype(dtype) * k[..., x][:, :, None].astype(dtype)).astype(dtype)).astype(dtype)
        return s.astype(F32) * scale

    return score


def gathered_in(dtype):
    """The running sums stored in a narrow format from tile to tile."""

    def update(*given):
        top, total, acc = online(*given)
        return top, total.astype(dtype).astype(F32), acc.astype(dtype).astype(F32)

    return update


def one_not_rescaled(which):
    """Either the sum or the accumulator keeps the old maximum's scale."""

    def update(top, total, acc, s, v, stored):
        new, right_total, right_acc = online(top, total, acc, s, v, stored)
        fresh = online(top, 0 * total, 0 * acc, s, v, stored)
        return (new, total + fresh[1], right_acc) if which == "total" else (new, right_total, acc + fresh[2])

    return update


def powers_of_two(top, total, acc, s, v, stored):
    new = np.maximum(top, s.max(-1, keepdims=True))
    base = np.where(np.isneginf(new), F32(0), new)
    p, shrink = np.exp2(s - base), np.exp2(top - base)
    return new, shrink * total + p.sum(-1, keepdims=True), shrink * acc + p.astype(stored).astype(F32) @ v


def no_maximum(top, total, acc, s, v, stored):
    p = np.exp(s)
    return np.zeros_like(top), total + p.sum(-1, keepdims=True), acc + p @ v


def unguarded(top, total, acc, s, v, stored):
    """-inf less -inf, where the first tiles of a row are hidden."""
    new = np.maximum(top, s.max(-1, keepdims=True))
    p, shrink = np.exp(s - new), np.exp(top - new)
    return new, shrink * total + p.sum(-1, keepdims=True), shrink * acc + p.astype(stored).astype(F32) @ v


def softmax_along(axis):
    """The softmax over another axis than the keys', a whole row in one tile."""

    def update(top, total, acc, s, v, stored):
        highest = s.max(axis, keepdims=True, initial=-np.inf)
        p = np.exp(s - np.where(np.isneginf(highest), F32(0), highest))
        p = p / np.where(p.sum(axis, keepdims=True) > 0, p.sum(axis, keepdims=True), F32(1))
        return s.max(-1, keepdims=True, initial=-np.inf), np.ones_like(total), p @ v

    return update


def pads_in_the_sum(top, total, acc, s, v, stored):
    """Lanes beyond the last key hold score 0 and count in the denominator."""
    short = 16 - s.shape[-1]
    padded = np.concatenate([s, np.zeros((*s.shape[:-1], short), F32)], -1)
    zeros = np.zeros((*v.shape[:2], short, v.shape[3]), F32)
    return online(top, total, acc, padded, np.concatenate([v, zeros], 2), stored)


def neighbour_in_the_sum(top, total, acc, s, v, stored):
    """The row sum's reduction spans the next row, where there is one."""
    new, right, acc = online(top, total, acc, s, v, stored)
    paired = right.copy()
    paired[:, :, 0:-1:2] += right[:, :, 1::2]
    return new, paired, acc


def sink_as_number(top, total, acc, sink):
    return top, total + sink, acc


def sink_of_head(which):
    return lambda top, total, acc, sink: with_sink(top, total, acc, which(sink))


def sink_against_base_two(top, total, acc, sink):
    """The output times sigmoid(lse - sink), with lse in base 2."""
    lse = top + np.log2(total)
    return top, total * (1 + np.exp(sink - lse)), acc


def whole_tiles(n_q, n_k, width):
    """Floor division: the last keys are in no tile, but for rows shorter than one."""
    return (slice(start, start + width) for start in range(0, n_k // width * width, width)) if n_k >= width else tiles(n_q, n_k, width)


def extent_of_queries(n_q, n_k, width):
    return tiles(n_q, min(n_q, n_k), width)


def no_first_tile(n_q, n_k, width):
    return tiles(n_q, n_k, width) if n_k <= 2 * width else list(tiles(n_q, n_k, width))[1:]


def nan_where_empty(total, acc, v, n_k):
    return acc / total


def mean_where_empty(total, acc, v, n_k):
    mean = v.sum(axis=2, keepdims=True) / max(n_k, 1)
    return np.where(total > 0, divided(total, acc, v, n_k), mean)


def nan_without_keys(total, acc, v, n_k):
    return divided(total, acc, v, n_k) if n_k else np.full_like(acc, np.nan)


def scale_folded_into_bfloat16(q, k, scale):
    """Queries multiplied by the scale and stored before they meet the keys."""
    return (q * F32(scale)).astype(ml_dtypes.bfloat16).astype(F32) @ np.swapaxes(k, -1, -2)


def masks_added(s, scale, cap, bias, seen):
    """Two masks of 0.7 times the least number, one for the bias and one for the rest, added: together they are beyond the format."""
    far = F32(-0.7) * np.finfo(F32).max
    s = finished(s, scale, cap, F32(0), True)
    return s + np.where(np.isneginf(bias), far, bias) + np.where(seen, F32(0), far)


def tile_at_the_edge_skipped(n_q, n_k, causal, window, width=8):
    """Tiles of keys that a window enters in the middle are left out where the query has others."""
    seen = visible(n_q, n_k, causal, window)
    if window is None or window[0] is None:
        return seen
    kept = seen.copy()
    for i in range(n_q):
        keys_seen = np.flatnonzero(seen[i])
        if keys_seen.size and keys_seen[0] % width and keys_seen[0] // width < keys_seen[-1] // width:
            kept[i, : (keys_seen[0] // width + 1) * width] = False
    return kept


def odd_groups_rounded_down(n_q, n_k, causal, window):
    """The last key of a query's range from a bound that is divided by the group size and multiplied again."""
    seen = visible(n_q, n_k, causal, window)
    if causal:
        last = np.arange(n_q) + (0 if causal == "top_left" else n_k - n_q)
        seen &= np.arange(n_k) < np.maximum(1, (last + 1) // 7 * 7)[:, None]
    return seen


def head_stride_of_queries(x, heads):
    """The offset of a key-value head counted in widths of all query heads, as if there were as many of them: the memory runs out and wraps."""
    kv_heads = x.shape[1]
    group = heads // kv_heads
    return np.stack([x[:, (h // group * group) % kv_heads] for h in range(heads)], axis=1)


def sink_beside_the_maximum(top, total, acc, sink):
    return top, total + np.exp(sink - top), acc


def sink_for_every_tile(top, total, acc, sink):
    """Every split of the keys counts the sink."""
    return with_sink(top, total, acc, sink + F32(math.log(2)))


def weights_through(dtype):
    """Weights stored in a narrow format before they meet the values."""
    return lambda top, total, acc, s, v, stored: online(top, total, acc, s, v, dtype)


def padded_lanes_with_the_least_number(top, total, acc, s, v, stored, width=16):
    """Lanes beyond the keys hold the least finite number instead of minus infinity."""
    pad = -s.shape[-1] % width
    s = np.concatenate([s, np.full((*s.shape[:-1], pad), np.finfo(F32).min)], -1)
    v = np.concatenate([v, np.ones((*v.shape[:2], pad, v.shape[3]), v.dtype)], 2)
    return online(top, total, acc, s, v, stored)


def lse_of_another_head(top, total, scale):
    return np.roll(log_sum_exp(top, total, scale), 1, axis=1)


# ---- faults of calls in succession ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remembering:
    """A kernel that keeps something of its first call for every shape: what a cache keyed by too little does."""

    what: str

    def candidate(self) -> Candidate:
        kept: dict[tuple[int, ...], object] = {}

        def call(operands, params):
            held = dict(operands) | dict(params)
            shape = (*operands["q"].shape, *operands["k"].shape)
            held[self.what] = kept.setdefault(shape, None if held.get(self.what) is None else np.copy(held[self.what])[()])
            return attend(RIGHT, **held)

        return Candidate(f"remembers {self.what}", call, OPERANDS, PARAMS, returns=("out", "lse"))


def right(**changes) -> Stages:
    return replace(RIGHT, **changes)


#: Fault -> the stages that have it.
FAULTS: dict[str, Stages | Remembering] = {
    "S1 scale omitted": right(factor=lambda scale, d, d_v, heads: 1.0 if scale is None else scale),
    "S2 multiplied by the root of d": right(factor=lambda scale, d, d_v, heads: math.sqrt(d) if scale is None else scale),
    "S3 root of the value width": right(factor=lambda scale, d, d_v, heads: d_v**-0.5 if scale is None else scale),
    "S3 root of the model width": right(factor=lambda scale, d, d_v, heads: (d * heads) ** -0.5 if scale is None else scale),
    "S4 user's scale ignored": right(factor=lambda scale, d, d_v, heads: d**-0.5),
    "S5 scale of an earlier call": Remembering("scale"),
    "S7 exp2 without log2(e)": right(update=powers_of_two),
    "S8 scale applied twice": right(factor=lambda scale, d, d_v, heads: factor(scale, d, d_v, heads) ** 2),
    "S9 scale folded into queries in bfloat16": right(products=scale_folded_into_bfloat16),
    "S10 softmax over queries": right(update=softmax_along(2), tile=FAR),
    "S11 softmax over heads": right(update=softmax_along(1), tile=FAR),
    "S12 heads by reshape": right(read=each(heads_mixed_with_time)),
    "S13 keys shifted by one": right(read=keys(lambda k: np.roll(k, 1, axis=2))),
    "S14 no maximum subtracted": right(update=no_maximum),
    "M1 top-left for bottom-right": right(visible=with_arguments(lambda causal, window: ("top_left" if causal else causal, window))),
    "M1 bottom-right for top-left": right(visible=with_arguments(lambda causal, window: (bool(causal), window))),
    "M3 strictly earlier keys": right(visible=moved_window(more_causal=-1)),
    "M3 one key of the future": right(visible=moved_window(more_causal=1)),
    "M4 causal of an earlier call": Remembering("causal"),
    "M6 mask inverted": right(allowed=lambda seen, mask: seen if mask is None else seen & ~mask),
    "M7 mask added as numbers": right(
        allowed=lambda seen, mask: seen,
        finished=lambda s, scale, cap, bias, seen: finished(s + seen, scale, cap, bias, True),
    ),
    "M8 mask of batch 0": right(allowed=lambda seen, mask: seen if mask is None else seen & mask[:1]),
    "M8 mask of head 0": right(allowed=lambda seen, mask: seen if mask is None else seen & mask[:, :1]),
    "M10 window needs a mask": right(allowed=window_needs_a_mask),
    "M12 NaN on a row that sees nothing": right(divided=nan_where_empty),
    "M13 mean on a row that sees nothing": right(divided=mean_where_empty),
    "M15 -5e4 for minus infinity": right(lowest=-5e4),
    "M17 two masks added": right(finished=masks_added, divided=lambda total, acc, v, n_k: acc / total),
    "M18 hidden first tile": right(update=unguarded, tile=4),
    "M19 tiny fill": right(finished=filled_with(-1e-12)),
    "M20 plus infinity": right(finished=filled_with(np.inf)),
    "M21 soft-cap after the mask": right(finished=mask_before_cap),
    "M22 mask of an earlier call": Remembering("mask"),
    "M24 scores multiplied by the mask": right(finished=lambda s, scale, cap, bias, seen: finished(s, scale, cap, bias, True) * seen),
    "W1 one key more": right(visible=moved_window(more_left=1)),
    "W1 one key fewer": right(visible=moved_window(more_left=-1)),
    "W2 right side open": right(visible=with_arguments(lambda causal, window: (causal, window and (window[0], None)))),
    "W3 sides exchanged": right(visible=with_arguments(lambda causal, window: (causal, window and (window[1], window[0])))),
    "W4 window at the top left": right(visible=window_at_the_top_left),
    "W6 tile at the window's edge skipped": right(visible=tile_at_the_edge_skipped),
    "W9 window lost": right(visible=with_arguments(lambda causal, window: (causal, None))),
    "H1 heads tiled": right(group=tiled_heads),
    "H2 causal bound in whole groups of seven": right(visible=odd_groups_rounded_down),
    "H3 key-value heads at the stride of query heads": right(group=head_stride_of_queries),
    "H7 time repeated": right(group=time_repeated),
    "H8 strides ignored": right(read=each(as_if_contiguous)),
    "H11 value width from the keys": right(read=value_width_from_keys),
    "H12 values for keys": right(read=lambda q, k, v: in_float32(q, v if k.shape == v.shape else k, v)),
    "H14 keys of batch 0": right(read=keys(lambda k: np.broadcast_to(k[:1], k.shape))),
    "P5 bias before the scale": right(finished=biased_as(lambda bias, scale: bias * F32(scale))),
    "P5 bias added twice": right(finished=biased_as(lambda bias, scale: 2 * bias)),
    "X1 not normalised": right(divided=lambda total, acc, v, n_k: acc),
    "X1 divided by the number of keys": right(divided=lambda total, acc, v, n_k: acc / max(n_k, 1)),
    "X2 accumulator not rescaled": right(update=one_not_rescaled("acc")),
    "X3 sum not rescaled": right(update=one_not_rescaled("total")),
    "X4 maximum starts at zero": right(lowest=0.0),
    "X5 neighbour's sum": right(update=neighbour_in_the_sum),
    "X6 sink as a number": right(sink=sink_as_number),
    "X7 sink beside the maximum": right(sink=sink_beside_the_maximum),
    "X8 sink counted by two splits": right(sink=sink_for_every_tile),
    "X9 sink dropped": right(sink=lambda top, total, acc, sink: (top, total, acc)),
    "X10 sink against base 2": right(sink=sink_against_base_two),
    "X11 sink by another head": right(sink=sink_of_head(lambda sink: np.roll(sink, 1, axis=0))),
    "X11 sink of head 0": right(sink=sink_of_head(lambda sink: sink[:1])),
    "X12 soft-cap dropped": right(finished=capped_as(lambda s, cap, scale: s)),
    "X13 scores times tanh": right(finished=capped_as(lambda s, cap, scale: s * np.tanh(s / cap))),
    "X13 no final multiplication": right(finished=capped_as(lambda s, cap, scale: np.tanh(s / cap))),
    "X14 cap on unscaled scores": right(finished=capped_as(lambda s, cap, scale: scale * cap * np.tanh(s / scale / cap))),
    "X16 weights stored in float8": right(update=weights_through(ml_dtypes.float8_e4m3fn)),
    "T1 padding in the denominator": right(update=pads_in_the_sum),
    "T3 padding at the least number": right(update=padded_lanes_with_the_least_number),
    "T4 last partial tile dropped": right(tiles=whole_tiles),
    "T4 first tile dropped": right(tiles=no_first_tile),
    "T5 number of queries for keys": right(tiles=extent_of_queries),
    "T7 NaN without keys": right(divided=nan_without_keys),
    "T17 half of the values": right(read=half_of_the_values),
    "T18 width in whole eights": right(read=each(whole_tiles_of_eight)),
    "L1 lse in base 2": right(lse=lambda top, total, scale: (top + np.log(total)) / F32(math.log(2))),
    "L2 lse without maximum": right(lse=lambda top, total, scale: np.log(total)),
    "L2 lse without scale": right(lse=lambda top, total, scale: top / F32(scale) + np.log(total)),
    "L3 lse of zero for an empty row": right(lse=lambda top, total, scale: np.where(total > 0, log_sum_exp(top, total, scale), F32(0))),
    "L4 lse of another head": right(lse=lse_of_another_head),
    "N1 scores summed in float16": right(products=summed_in(np.float16)),
    "N2 scores stored in float16": right(finished=scores_through(np.float16)),
    "N2 scores stored in bfloat16": right(finished=scores_through(ml_dtypes.bfloat16)),
    "N4 sums gathered in float16": right(update=gathered_in(np.float16)),
    "N4 sums gathered in bfloat16": right(update=gathered_in(ml_dtypes.bfloat16)),
    "R3 operand overwritten": right(read=scaled_in_place),
    "R4 keys of an earlier call": Remembering("k"),
}

#: Multiplying a hidden value by zero shows where it is NaN only: most frameworks do it, so it is an observation and no failure.
OBSERVED = {"M14 zero times NaN": right(hidden_values=True)}


def planted(fault: str) -> Candidate:
    """A fresh candidate with that fault, remembering nothing."""
    held = {**FAULTS, **OBSERVED}[fault]
    return held.candidate() if isinstance(held, Remembering) else candidate(held, fault)
