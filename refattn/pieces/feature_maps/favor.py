"""FAVOR+ positive features of the softmax kernel (Performer): (exp(w_r . x' - |x'|^2 / 2 - top) + eps) / sqrt(m), x' = sqrt(scale) x.

The m rows w_r of W, [m D], are a random operand.  An exponent is at most |w_r|^2 / 2, so nothing overflows where `stabilizer`
is NONE and `top` 0.

stabilizer
    TOKEN: top is the token's largest w_r . x', which divides all weights of a query by the same.  SEQUENCE: the largest over all tokens, which does
    so for keys, and looks at keys to come.  Neither is exact once eps is added.
"""

import numpy as np

from . import projection

NONE, TOKEN, SEQUENCE = range(3)


def _parts(x, w, scale, eps, stabilizer):
    """Scaled inputs, the exponentials and the places of the maxima."""
    scaled = np.sqrt(scale) * x
    projected = projection.features(scaled, w)
    top, at = 0.0, np.zeros(projected.shape)
    if stabilizer != NONE:
        axes = (-1,) if stabilizer == TOKEN else (-2, -1)
        top = np.max(projected, axis=axes, keepdims=True, initial=-np.inf)  # there may be no tokens
        at = projected == top
        at = at / np.sum(at, axis=axes, keepdims=True)  # a tie is shared
    return scaled, np.exp(projected - np.sum(scaled * scaled, axis=-1, keepdims=True) / 2.0 - top), at


def features(x, w, scale, eps, stabilizer):
    return (_parts(x, w, scale, eps, stabilizer)[1] + eps) / np.sqrt(w.shape[-2])


def pullback(d, x, w, scale, eps, stabilizer):
    scaled, exponentials, at = _parts(x, w, scale, eps, stabilizer)
    d_exponent = d * exponentials / np.sqrt(w.shape[-2])
    d_projected = d_exponent - at * np.sum(d_exponent, axis=(-2, -1) if stabilizer == SEQUENCE else -1, keepdims=True)
    d_scaled, d_w = projection.pullback(d_projected, scaled, w)
    return np.sqrt(scale) * (d_scaled - scaled * np.sum(d_exponent, axis=-1, keepdims=True)), d_w


def orthogonal(rng, shape):
    """Rows of normal vectors' lengths, orthogonal within each block of D of them: how a projection [m D] is drawn."""
    m, d = shape
    blocks = []
    for _ in range(-(-m // d)):
        q, r = np.linalg.qr(rng.standard_normal((d, d)))
        blocks.append((q * np.sign(np.diag(r))).T)  # without the signs the first entry of the first row is negative whatever was drawn
    return np.concatenate(blocks)[:m] * np.linalg.norm(rng.standard_normal((m, d)), axis=-1, keepdims=True)
