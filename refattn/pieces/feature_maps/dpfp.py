"""Products r_i r_(i + n) of the parts r = [max(x, 0), max(-x, 0)], indices going round, for the shifts n = 1 .. nu; divided by their sum (DPFP).

Each shift's products are multiplied by one of the nu numbers `taps`, which are ones in the paper.  The features are those of shift 1, then those of
shift 2, ...  Where the sum is 0, so are the features.
"""

import numpy as np


def _parts(x, taps):
    r = np.concatenate([np.maximum(x, 0.0), np.maximum(-x, 0.0)], axis=-1)
    rolled = [np.roll(r, -n, axis=-1) for n in range(1, len(taps) + 1)]
    products = np.concatenate([tap * r * other for tap, other in zip(taps, rolled, strict=True)], axis=-1)
    total = np.sum(products, axis=-1, keepdims=True)
    return r, rolled, products, np.where(total == 0.0, np.inf, total)


def features(x, taps):
    _, _, products, total = _parts(x, taps)
    return products / total


def pullback(d, x, taps):
    r, rolled, products, total = _parts(x, taps)
    d_products = (d - np.sum(d * products, axis=-1, keepdims=True) / total) / total
    d_r, d_taps = np.zeros(r.shape), np.zeros(len(taps))
    for n, (tap, other, part) in enumerate(zip(taps, rolled, np.split(d_products, len(taps), axis=-1), strict=True)):
        d_taps[n] = np.sum(part * r * other)
        d_r += tap * (part * other + np.roll(part * r, n + 1, axis=-1))
    positive, negative = np.split(d_r, 2, axis=-1)
    return np.where(x > 0.0, positive, 0.0) - np.where(x < 0.0, negative, 0.0), d_taps
