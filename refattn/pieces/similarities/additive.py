"""A network of one hidden layer, w . tanh(W_q q + W_k k + b)."""

import math

import numpy as np


def score(q, k, w_q, w_k, w, b):
    s = 0.0
    for a in range(len(w)):
        inner = b[a]
        for x in range(len(q)):
            inner += w_q[a, x] * q[x]
        for y in range(len(k)):
            inner += w_k[a, y] * k[y]
        s += w[a] * math.tanh(inner)
    return s


def amplitude(q, k, w_q, w_k, w, b):
    inner = (q @ w_q.T)[..., :, None, :] + (k @ w_k.T)[..., None, :, :] + b
    inside = (np.abs(q) @ np.abs(w_q).T)[..., :, None, :] + (np.abs(k) @ np.abs(w_k).T)[..., None, :, :] + np.abs(b)
    return (np.abs(np.tanh(inner)) + inside) @ np.abs(w)  # tanh is nowhere steeper than 1, so errors inside come out no larger


def roundings(d_q, d_k, w_q, w_k, hidden, b):
    # A product, the sum inside with its bias, tanh, the product with w, the sum over the hidden layer.
    return 1 + (d_q + d_k) + 1 + 1 + (hidden - 1)
