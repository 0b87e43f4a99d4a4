"""Exponentials of W x + b and of -(W x + b), learned (Hedgehog).  W is [F D] and b [F], or with the heads of x before.

activation
    0: each half divided by its sum, two softmaxes; 1: bare exponentials; 2: both halves divided by the sum of all, one softmax.
"""

import numpy as np

from . import projection, softmax_features


def features(x, w, b, activation):
    y = projection.features(x, w) + b[..., None, :]
    if activation == 0:
        return np.concatenate([softmax_features.features(y), softmax_features.features(-y)], axis=-1)
    both = np.concatenate([y, -y], axis=-1)
    return np.exp(both) if activation == 1 else softmax_features.features(both)


def pullback(d, x, w, b, activation):
    y = projection.features(x, w) + b[..., None, :]
    both = np.concatenate([y, -y], axis=-1)
    if activation == 0:
        plus, minus = (softmax_features.pullback(half, side)[0] for half, side in zip(np.split(d, 2, axis=-1), (y, -y), strict=True))
    else:
        [d_both] = (d * np.exp(both),) if activation == 1 else softmax_features.pullback(d, both)
        plus, minus = np.split(d_both, 2, axis=-1)
    d_b = np.sum(plus - minus, axis=-2)
    return *projection.pullback(plus - minus, x, w), np.sum(d_b, axis=tuple(range(d_b.ndim - b.ndim)))
