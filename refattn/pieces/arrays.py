"""What `vectorized` forms share: functions of whole arrays, plain or recorded, in NumPy alone."""

import numpy as np


def softmax(scores):
    """Weights along the last axis, and the logarithm of the sum of exponentials; a row of -inf has weights of 0 and -inf."""
    if scores.shape[-1] == 0:
        return scores, np.full(scores.shape[:-1], -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    top = np.where(top == -np.inf, 0.0, top)
    exponentials = np.exp(scores - top)
    total = np.sum(exponentials, axis=-1, keepdims=True)
    nothing = total == 0.0
    total = np.where(nothing, 1.0, total)
    return exponentials / total, np.where(nothing, -np.inf, top + np.log(total))[..., 0]


def sigmoid(x):
    """1 / (1 + exp(-x)), to the last digits of the smallest."""
    return np.exp(-np.logaddexp(0.0, -x))


def sums_between(x):
    """Of the last axis T: [..., i, j] = x_(j+1) + ... + x_i for j < i, else 0.  Nothing is subtracted, so -inf stays -inf and makes no NaN."""
    n = x.shape[-1]
    later = np.arange(n)[:, None] > np.arange(n)
    return np.cumsum(np.where(later, x[..., None], 0.0), axis=-2)
