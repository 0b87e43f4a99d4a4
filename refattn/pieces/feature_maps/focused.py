"""|r| / |r^p| r^p of r = max(x, 0), the power taken number by number: sharper directions, the same length (focused linear attention).

Each vector is divided by its largest entry first, so that no power overflows or vanishes; the zero vector stays.
"""

import numpy as np


def _parts(x, p):
    r = np.maximum(x, 0.0)
    largest = np.max(r, axis=-1, keepdims=True)
    r = r / np.where(largest == 0.0, 1.0, largest)
    sharp = np.where(r == 0.0, 0.0, np.where(r == 0.0, 1.0, r) ** p)
    lengths = [np.sqrt(np.sum(y * y, axis=-1, keepdims=True)) for y in (r, sharp)]
    return largest, r, sharp, lengths[0], np.where(lengths[1] == 0.0, 1.0, lengths[1])


def features(x, p):
    largest, _, sharp, length, sharp_length = _parts(x, p)
    return largest * length / sharp_length * sharp


def pullback(d, x, p):
    # The features of c x are c times those of x, so that their derivative at x is the one at x / largest.
    _, r, sharp, length, sharp_length = _parts(x, p)
    along = np.sum(d * sharp, axis=-1, keepdims=True)
    d_sharp = length / sharp_length * (d - along * sharp / sharp_length**2)
    slope = np.where(r == 0.0, 0.0, p * np.where(r == 0.0, 1.0, r) ** (p - 1.0))
    d_length = along / sharp_length
    return (np.where(x > 0.0, d_sharp * slope + d_length * r / np.where(length == 0.0, 1.0, length), 0.0),)
