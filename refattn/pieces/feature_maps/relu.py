"""max(x, 0) + eps."""

import numpy as np


def features(x, eps=0.0):
    return np.maximum(x, 0.0) + eps


def pullback(d, x, eps=0.0):
    return (np.where(x > 0.0, d, 0.0),)
