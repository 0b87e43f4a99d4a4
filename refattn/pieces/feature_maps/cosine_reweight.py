"""[max(x, 0) cos(a), max(x, 0) sin(a)], a = pi/2 * position / length, positions counted from 1 (cosFormer).

The products of two tokens' features are those of their relu times cos(a_i - a_j).  `positions` has the tokens of x, [T].
"""

import numpy as np


def _waves(positions, length):
    angles = np.pi / 2.0 * positions[..., None] / length
    return np.cos(angles), np.sin(angles)


def features(x, positions, length):
    cos, sin = _waves(positions, length)
    return np.concatenate([np.maximum(x, 0.0) * cos, np.maximum(x, 0.0) * sin], axis=-1)


def pullback(d, x, positions, length):
    cos, sin = _waves(positions, length)
    of_cos, of_sin = np.split(d, 2, axis=-1)
    d_angles = np.sum(np.maximum(x, 0.0) * (of_sin * cos - of_cos * sin), axis=-1)
    d_positions = np.pi / 2.0 / length * np.sum(d_angles, axis=tuple(range(d_angles.ndim - positions.ndim)))
    return np.where(x > 0.0, of_cos * cos + of_sin * sin, 0.0), d_positions
