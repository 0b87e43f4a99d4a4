"""elu(x) + 1: x + 1 where x > 0, exp(x) elsewhere (Linear Transformer)."""

import numpy as np


def features(x):
    y = np.minimum(x, 0.0)
    np.exp(y, out=y)  # not (exp(x) - 1) + 1, which loses what lies below the unit roundoff
    return np.add(y, np.maximum(x, 0.0), out=y)


def pullback(d, x):
    return (d * np.where(x > 0.0, 1.0, np.exp(np.minimum(x, 0.0))),)
