"""What `vectorized` forms and reductions share: functions of whole arrays, plain or recorded, in NumPy alone."""

import numpy as np


def up_to_query(n_q, n_k):
    """Which keys lie no later than a query, [T S], the last query being aligned with the last key."""
    return np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q


def softmax(scores):
    """Weights along the last axis, and the logarithm of the sum of exponentials; a row of -inf has weights of 0 and -inf."""
    if scores.shape[-1] == 0:
        return scores, np.full(scores.shape[:-1], -np.inf)
    exponentials, total, log_total = _raised(scores, -1)
    return exponentials / total, log_total[..., 0]


def log_sum_exp(x, axis):
    """The logarithm of the sum of exponentials along an axis that is not empty; of nothing but -inf, -inf."""
    return np.sum(_raised(x, axis)[2], axis=axis)  # of one number


def _raised(x, axis):
    """Exponentials less the largest, their sum or 1 where it is 0, and the logarithm of the sum."""
    exponentials, top = _exponentials(x, axis)
    total = np.sum(exponentials, axis=axis, keepdims=True)
    nothing = total == 0.0
    total = np.where(nothing, 1.0, total)
    return exponentials, total, np.where(nothing, -np.inf, top + np.log(total))


def _exponentials(x, axis):
    """Of x less its largest, and that, or 0 where it is -inf."""
    top = np.max(x, axis=axis, keepdims=True)
    top = np.where(top == -np.inf, 0.0, top)
    return np.exp(x - top), top


def mixed(keys, biases, values):
    """Means of values [.. S X], each channel by the softmax of keys [.. S X] + biases [.. T S]; and the logarithm of the sum of exponentials.

    Apart the exponentials of both make two products of matrices; where they might underflow, they are taken of every sum.
    """
    if keys.shape[-2] == 0:
        nothing = 0.0 * biases[..., :0] @ values
        return nothing, np.full((*nothing.shape[:-1], keys.shape[-1]), -np.inf)
    if _width(keys) + _width(biases) < 600.0:
        of_keys, top = _exponentials(keys, -2)
        of_biases, highest = _exponentials(biases, -1)
        total = of_biases @ of_keys
        nothing = total == 0.0
        total = np.where(nothing, 1.0, total)
        return of_biases @ (of_keys * values) / total, np.where(nothing, -np.inf, top + highest + np.log(total))
    weights, log_total = softmax(biases[..., None, :] + np.swapaxes(keys, -1, -2)[..., None, :, :])
    return np.sum(weights * np.swapaxes(values, -1, -2)[..., None, :, :], axis=-1), log_total


def _width(x):
    """From the smallest number that is finite to the largest."""
    x = getattr(x, "value", x)
    finite = x[np.isfinite(x)]
    return finite.max() - finite.min() if finite.size else 0.0


def sigmoid(x):
    """1 / (1 + exp(-x)), to the last digits of the smallest."""
    return np.exp(-np.logaddexp(0.0, -x))


def sums_between(x):
    """Of the last axis T: [..., i, j] = x_(j+1) + ... + x_i for j < i, else 0.  Nothing is subtracted, so -inf stays -inf and makes no NaN."""
    n = x.shape[-1]
    later = np.arange(n)[:, None] > np.arange(n)
    return np.cumsum(np.where(later, x[..., None], 0.0), axis=-2)


def faded(gate, n_q):
    """Of gates [.. S]: the sum of those after each key up to each of the last n_q tokens, [.. T S]; of queries before the first key whatever."""
    n_k = gate.shape[-1]
    return sums_between(gate)[..., np.maximum(np.arange(n_q) + n_k - n_q, 0), :]


def products_between(x):
    """Of the last axis T: [..., i, j] = x_(j+1) ... x_i for j <= i, else 0.  Nothing is divided by, nor is a logarithm taken: an x may be 0."""
    n = x.shape[-1]
    own = np.eye(n)
    row = np.broadcast_to(own[0], (*x.shape[:-1], n))
    rows = [row[..., None, :]]
    for i in range(1, n):
        row = x[..., i, None] * row + own[i]
        rows.append(row[..., None, :])
    return np.concatenate(rows, axis=-2)


def each_sequence(form, x, shared=()):
    """Outputs of sequences that differ in more than their numbers: of each as `form` finds them without the axis B, which `shared` operands lack."""
    alone = [form({name: a if name in shared else a[b] for name, a in x.items()}) for b in range(x["q"].shape[0])]
    return {name: np.concatenate([one[name][None] for one in alone], axis=0) for name in alone[0]}
