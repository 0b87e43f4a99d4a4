"""Softmax over the features of each token (efficient attention's queries)."""

import numpy as np


def features(x):
    weights = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def pullback(d, x):
    y = features(x)
    return (y * (d - np.sum(d * y, axis=-1, keepdims=True)),)
