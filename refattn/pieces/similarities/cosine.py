"""The cosine of the angle between q and k; 0 where either is the zero vector."""

import math

import numpy as np


def score(q, k):
    s, q_q, k_k = 0.0, 0.0, 0.0
    for x in range(len(q)):
        s += q[x] * k[x]
        q_q += q[x] * q[x]
        k_k += k[x] * k[x]
    norms = math.sqrt(q_q) * math.sqrt(k_k)
    return 0.0 if norms == 0.0 else s / norms


def amplitude(q, k):
    norms = np.linalg.norm(q, axis=-1)[..., :, None] * np.linalg.norm(k, axis=-1)[..., None, :]
    terms = np.abs(q) @ np.abs(np.swapaxes(k, -1, -2))
    return np.divide(terms, norms, out=np.zeros_like(terms), where=norms != 0.0)


def roundings(d_q, d_k):
    # The sum of products d_q; each norm half of d_q (the square root halves an error) and 1 for the root; their product; the division.
    return 2 * d_q + 4
