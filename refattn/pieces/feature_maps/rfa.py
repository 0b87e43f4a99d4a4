"""Random features of vectors of length one: [sin(w_r . (sigma x / |x|)), cos(w_r . (sigma x / |x|))] / sqrt(m), r = 1..m (RFA).

The rows of W, [m D], are a random operand, sigma, [D], a learned one.
"""

import numpy as np

from . import l2_unit, projection


def features(x, w, sigma):
    angles = projection.features(sigma * l2_unit.features(x), w)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1) / np.sqrt(w.shape[-2])


def pullback(d, x, w, sigma):
    unit = l2_unit.features(x)
    sin, cos = np.split(features(x, w, sigma), 2, axis=-1)
    of_sin, of_cos = np.split(d, 2, axis=-1)
    d_stretched, d_w = projection.pullback(of_sin * cos - of_cos * sin, sigma * unit, w)
    [d_x] = l2_unit.pullback(sigma * d_stretched, x)
    return d_x, d_w, np.sum(d_stretched * unit, axis=tuple(range(x.ndim - 1)))
