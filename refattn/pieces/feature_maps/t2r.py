"""max(W x + b, 0), learned (T2R).  W is [F D] and b [F], or with the heads of x before."""

import numpy as np

from . import projection


def features(x, w, b):
    return np.maximum(projection.features(x, w) + b[..., None, :], 0.0)


def pullback(d, x, w, b):
    d_pre = np.where(projection.features(x, w) + b[..., None, :] > 0.0, d, 0.0)
    d_b = np.sum(d_pre, axis=-2)
    return *projection.pullback(d_pre, x, w), np.sum(d_b, axis=tuple(range(d_b.ndim - b.ndim)))
