"""exp(x), number by number.  It overflows where exp does: a bounded map would be another kernel."""

import numpy as np


def features(x):
    return np.exp(x)


def pullback(d, x):
    return (d * np.exp(x),)
