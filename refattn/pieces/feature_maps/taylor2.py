"""1, x' and the products x' x'^T / sqrt(2) of x' = sqrt(scale) x: the inner product of two is 1 + s + s^2 / 2, s = scale x . y (Based)."""

import numpy as np

from . import power


def features(x, scale):
    return np.concatenate([np.ones((*x.shape[:-1], 1)), np.sqrt(scale) * x, power.features(x, 2, scale) / np.sqrt(2.0)], axis=-1)


def pullback(d, x, scale):
    _, first, second = np.split(d, [1, 1 + x.shape[-1]], axis=-1)
    return (np.sqrt(scale) * first + power.pullback(second / np.sqrt(2.0), x, 2, scale)[0],)
