"""A network of one hidden layer on the concatenation, w . tanh(W [q; k])."""

import math

import numpy as np


def score(q, k, weight, w):
    s = 0.0
    for a in range(len(w)):
        inner = 0.0
        for x in range(len(q)):
            inner += weight[a, x] * q[x]
        for y in range(len(k)):
            inner += weight[a, len(q) + y] * k[y]
        s += w[a] * math.tanh(inner)
    return s


def amplitude(q, k, weight, w):
    w_q, w_k = weight[:, : q.shape[-1]], weight[:, q.shape[-1] :]
    inner = (q @ w_q.T)[..., :, None, :] + (k @ w_k.T)[..., None, :, :]
    inside = (np.abs(q) @ np.abs(w_q).T)[..., :, None, :] + (np.abs(k) @ np.abs(w_k).T)[..., None, :, :]
    return (np.abs(np.tanh(inner)) + inside) @ np.abs(w)  # tanh is nowhere steeper than 1, so errors inside come out no larger


def roundings(d_q, d_k, d_concatenated, hidden):
    # A product, the sum inside, tanh, the product with w, the sum over the hidden layer.
    return 1 + (d_q + d_k - 1) + 1 + 1 + (hidden - 1)
