"""The tensor power x'^(x) p of x' = sqrt(scale) x, all D^p products: the inner product of two is (scale x . y)^p (power attention)."""

import numpy as np


def features(x, p, scale):
    scaled = np.sqrt(scale) * x
    y = scaled
    for _ in range(int(p) - 1):
        y = (y[..., :, None] * scaled[..., None, :]).reshape(*x.shape[:-1], y.shape[-1] * x.shape[-1])
    return y


def pullback(d, x, p, scale):
    scaled = np.sqrt(scale) * x
    total, width = np.zeros(x.shape), x.shape[-1]
    for place in range(int(p)):  # the cotangent against the product of all factors but the one at this place
        rest = d.reshape(*x.shape[:-1], *[width] * int(p))
        for other in reversed(range(int(p))):
            if other != place:
                axis = x.ndim - 1 + other
                rest = np.sum(rest * scaled.reshape(*x.shape[:-1], *[width if n == other else 1 for n in range(int(p))]), axis=axis, keepdims=True)
        total += rest.reshape(x.shape)
    return (np.sqrt(scale) * total,)
