"""The bilinear form q . (W k)."""

import numpy as np


def score(q, k, w):
    s = 0.0
    for x in range(len(q)):
        row = 0.0
        for y in range(len(k)):
            row += w[x, y] * k[y]
        s += q[x] * row
    return s


def amplitude(q, k, w):
    return np.abs(q) @ np.abs(w) @ np.abs(np.swapaxes(k, -1, -2))


def roundings(d_q, d_k, w):
    return d_q + d_k
