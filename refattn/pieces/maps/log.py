"""log(x): the natural logarithm of a decay given as a factor; -inf at 0."""

import numpy as np


def apply(x):
    return np.log(x)


def slope(x):
    return 1.0 / x
