"""max(W x', 0) + eps, x' = sqrt(scale) x (Performer-ReLU).  W, [m D], is a random operand."""

import numpy as np

from . import projection


def features(x, w, scale, eps):
    return np.maximum(projection.features(np.sqrt(scale) * x, w), 0.0) + eps


def pullback(d, x, w, scale, eps):
    scaled = np.sqrt(scale) * x
    d_scaled, d_w = projection.pullback(np.where(projection.features(scaled, w) > 0.0, d, 0.0), scaled, w)
    return np.sqrt(scale) * d_scaled, d_w
