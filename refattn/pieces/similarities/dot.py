"""The inner product q . k."""

import numpy as np


def score(q, k):
    s = 0.0
    for x in range(len(q)):
        s += q[x] * k[x]
    return s


def amplitude(q, k):
    return np.abs(q) @ np.abs(np.swapaxes(k, -1, -2))


def roundings(d_q, d_k):
    return d_q
