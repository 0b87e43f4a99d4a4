"""W x: the linear map that random and learned feature maps begin with.

W is [F D], or [H F D] with the heads of x; x is [... H T D].
"""

import numpy as np


def features(x, w):
    return x @ np.swapaxes(w, -1, -2)


def pullback(d, x, w):
    d_w = np.swapaxes(d, -1, -2) @ x
    return d @ w, np.sum(d_w, axis=tuple(range(d_w.ndim - w.ndim)))
