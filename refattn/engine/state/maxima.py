"""The running maximum that input gates without bound need: m_t = max(g_t + m_{t-1}, i_t)."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(error_model="numpy", cache=True)
def forward(g, i, maxima):
    """maxima[:, 0] is m before the first token; the rest is filled."""
    for n in range(i.shape[0]):
        for t in range(i.shape[1]):
            maxima[n, t + 1] = max(g[n, t] + maxima[n, t], i[n, t])


@njit(error_model="numpy", cache=True)
def backward(g, i, maxima, d_maxima, d_g, d_i, d_first):
    """Add the gradients of all m to those of what they were made of, and to that of m before the first token."""
    for n in range(i.shape[0]):
        total = d_maxima[n, 0] * 0.0
        for t in range(i.shape[1] - 1, -1, -1):
            total += d_maxima[n, t + 1]
            if i[n, t] >= g[n, t] + maxima[n, t]:
                d_i[n, t] += total
                total *= 0.0
            else:
                d_g[n, t] += total
        d_first[n] += total


def running(g: np.ndarray, i: np.ndarray, first: np.ndarray) -> np.ndarray:
    """m before the first token and after each, [B, H, T + 1], of decays and gates [B, H, T] and m before the first token [B, H]."""
    maxima = np.empty((*i.shape[:2], i.shape[2] + 1), i.dtype)
    maxima[..., 0] = first
    forward(*map(_rows, (g, i, maxima)))
    return maxima


def unrun(g: np.ndarray, i: np.ndarray, maxima: np.ndarray, d_maxima: np.ndarray, d_g: np.ndarray, d_i: np.ndarray, d_first: np.ndarray) -> None:
    """Add to the last three what gradients of every m mean for g, i and m before the first token; C-contiguous, all in one format."""
    backward(*map(_rows, (g, i, maxima, d_maxima, d_g, d_i)), d_first.reshape(-1))


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])
