"""x * sigmoid(x) (MiniMax's lightning attention)."""

import numpy as np


def _sigmoid(x):
    small = np.exp(-np.sqrt(x * x))  # of -|x|: never overflows
    return np.where(x > 0.0, 1.0, small) / (1.0 + small)


def features(x):
    return x * _sigmoid(x)


def pullback(d, x):
    s = _sigmoid(x)
    return (d * s * (1.0 + x * (1.0 - s)),)
