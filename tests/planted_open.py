"""Faults that no catalogue holds: numbers that are off by something odd, and formulas that are another attention altogether.

Each comes with the codes under which it may rightly be named, because a family with a fitted number covers it; for most there is none, and
any name is a wrong one.  All are stages of planted.py's kernel or kernels of their own.
"""

from __future__ import annotations

import numpy as np
import planted
from planted import F32, right

from refattn.candidate import Candidate


def whole_rows(weigh):
    """An `update` stage that has the whole row before it: weights from scores, however they come."""

    def update(top, total, acc, s, v, stored):
        p = np.where(np.isneginf(s), F32(0), weigh(s)).astype(F32)
        return np.zeros_like(top), p.sum(-1, keepdims=True), p @ v

    return right(update=update, tile=planted.FAR)


def softplus(s):
    return np.logaddexp(0, s)


slightly_larger = planted.capped_as(lambda s, cap, scale: 1.004 * cap * np.tanh(s / cap / 1.004))
half_as_large_again = planted.capped_as(lambda s, cap, scale: 1.5 * cap * np.tanh(s / cap / 1.5))


def shifted_for_the_last_head(seen, mask):
    """The last head of every batch misses the first key that it sees."""
    seen = planted.allowed(seen, mask)
    if seen.ndim < 4:
        return seen
    seen = seen.copy()
    seen[:, -1, :, :1] = False
    return seen


def warmed(q, k, v):
    """Values to the power of 1.1, signs kept."""
    q, k, v = planted.in_float32(q, k, v)
    return q, k, np.sign(v) * np.abs(v) ** F32(1.1)


def late_for_the_last_head(top, total, acc, s, v, stored):
    """The last head's weights meet the values of the key after, in tiles narrower than the others: the last one of a row."""
    if s.shape[-1] not in (1, 16):
        v = v.copy()
        v[:, -1] = np.roll(v[:, -1], -1, axis=1)
    return planted.online(top, total, acc, s, v, stored)


def drifting(q, k, scale):
    """Scores that fall off with the distance between the positions, as if every head had a small slope of its own."""
    s = planted.products(q, k, scale)
    heads, n_q, n_k = s.shape[1:]
    distance = np.abs(np.arange(n_k) - np.arange(n_q)[:, None] - (n_k - n_q))
    return s - (F32(0.03) * (1 + np.arange(heads)))[:, None, None].astype(F32) * distance


def first_channel_twice(q, k, scale):
    return planted.products(q, k, scale) + scale * q[..., :1] * np.swapaxes(k[..., :1], -1, -2)


def euclidean(q, k, scale):
    """Minus half the squared distance in place of the product."""
    return planted.products(q, k, scale) - scale * 0.5 * (np.swapaxes((k * k).sum(-1, keepdims=True), -1, -2) + (q * q).sum(-1, keepdims=True))


def cosine(q, k, scale):
    unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), F32(1e-6)) for x in (q, k)]
    return planted.products(unit[0], unit[1], scale * F32(np.sqrt(q.shape[-1])))


def linear(q, k, v, **keywords):
    """elu(x) + 1 as feature map, everything else forgotten."""
    q, k, v = planted.in_float32(q, k, v)
    k, v = (planted.grouped(x, q.shape[1]) for x in (k, v))
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    state, mass = np.swapaxes(k, -1, -2) @ v, k.sum(axis=2)[..., None]
    return q @ state / np.where(mass.any(), q @ mass, 1)


def bare(function, name, params=frozenset()):
    def call(operands, keywords):
        return function(**operands, **keywords).astype(operands["v"].dtype)

    return Candidate(name, call, frozenset({"q", "k", "v"}), params)


def mean_of_values(q, k, v):
    v = planted.grouped(v.astype(F32), q.shape[1])
    return np.broadcast_to(v.sum(axis=2, keepdims=True) / max(1, v.shape[2]), (*q.shape[:3], v.shape[3]))


def _stages(stages, name):
    return planted.candidate(stages, name)


#: Name -> (candidate, codes that are right; none: no name is).
CANDIDATES = {
    name: (_stages(stages, name), frozenset(codes))
    for name, (stages, codes) in {
        "window two keys wider": (right(visible=planted.moved_window(more_left=2)), {"W1"}),
        "window two keys narrower": (right(visible=planted.moved_window(more_left=-2)), {"W1"}),
        "window three keys wider to the right": (right(visible=planted.moved_window(more_right=3)), {"W1"}),
        "causal two keys late": (right(visible=planted.moved_window(more_causal=2)), {"M3"}),
        "causal three keys early": (right(visible=planted.moved_window(more_causal=-3)), {"M3"}),
        "cap half as large again": (right(finished=half_as_large_again), {"X12", "X13", "X14"}),
        "cap a part in 250 too large": (right(finished=slightly_larger), {"X12", "X13", "X14"}),
        "values warmed": (right(read=warmed), set()),
        "last tile of the last head one key late": (right(update=late_for_the_last_head), set()),
        "scores 1.07 times too large": (
            right(factor=lambda scale, d, d_v, heads: 1.07 * planted.factor(scale, d, d_v, heads)), {"S1", "S3", "S6", "S7", "S8"}
        ),
        "scores 0.61 times too small": (
            right(factor=lambda scale, d, d_v, heads: 0.61 * planted.factor(scale, d, d_v, heads)), {"S1", "S3", "S6", "S7", "S8"}
        ),
        "values 0.9 times too small": (right(divided=lambda total, acc, v, n_k: F32(0.9) * planted.divided(total, acc, v, n_k)), set()),
        "bias 1.3 times too large": (right(finished=planted.biased_as(lambda bias, scale: F32(1.3) * bias)), {"P5"}),
        "softplus instead of exp": (whole_rows(softplus), set()),
        "squares instead of exp": (whole_rows(lambda s: s * s), set()),
        "exponentials of the absolute score": (whole_rows(lambda s: np.exp(np.minimum(np.abs(s), 80))), set()),
        "last head misses its first key": (right(allowed=shifted_for_the_last_head), set()),
        "scores fall off with distance": (right(products=drifting), set()),
        "first channel counted twice": (right(products=first_channel_twice), set()),
        "distances instead of products": (right(products=euclidean), set()),
        "directions instead of products": (right(products=cosine), set()),
        "values to the power of one third": (right(divided=lambda total, acc, v, n_k: np.cbrt(planted.divided(total, acc, v, n_k))), set()),
        "sink half": (right(sink=lambda top, total, acc, sink: planted.with_sink(top, total, acc, 0.5 * sink)), {"X6", "X10"}),
    }.items()
} | {
    "linear attention": (bare(linear, "linear attention"), frozenset()),
    "mean of values": (bare(mean_of_values, "mean of values"), frozenset({"S3", "S1", "S7"})),
}  # fmt: skip
