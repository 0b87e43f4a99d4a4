"""Random cosines and sines: exp(power |x'|^2 / 2) [cos(w_r . x'), sin(w_r . x')] / sqrt(m), x' = sqrt(scale) x, r = 1..m.

With power 0 their products estimate the Gaussian exp(-scale |x - y|^2 / 2), with power 1 the softmax kernel exp(scale x . y).  The m rows
w_r of W, [m D], are a random operand.
"""

import numpy as np

from . import projection


def features(x, w, scale, power):
    scaled = np.sqrt(scale) * x
    angles = projection.features(scaled, w)
    amplitude = np.exp(power * np.sum(scaled * scaled, axis=-1, keepdims=True) / 2.0) / np.sqrt(w.shape[-2])
    return amplitude * np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def pullback(d, x, w, scale, power):
    scaled = np.sqrt(scale) * x
    y = features(x, w, scale, power)
    (of_cos, of_sin), (cos, sin) = np.split(d, 2, axis=-1), np.split(y, 2, axis=-1)
    d_scaled, d_w = projection.pullback(of_sin * cos - of_cos * sin, scaled, w)
    return np.sqrt(scale) * (d_scaled + power * scaled * np.sum(d * y, axis=-1, keepdims=True)), d_w
