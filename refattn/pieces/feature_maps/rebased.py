"""The products x' x'^T, x' = sqrt(scale) (gamma norm(x) + beta), norm subtracting the mean and dividing by the standard deviation (ReBased).

gamma and beta are learned, [D], or with the heads of x before.
"""

import numpy as np

from . import power


def _norm(x, eps):
    centred = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred / deviation, deviation


def features(x, gamma, beta, eps, scale):
    return power.features(gamma[..., None, :] * _norm(x, eps)[0] + beta[..., None, :], 2, scale)


def pullback(d, x, gamma, beta, eps, scale):
    normed, deviation = _norm(x, eps)
    [d_affine] = power.pullback(d, gamma[..., None, :] * normed + beta[..., None, :], 2, scale)
    d_normed = gamma[..., None, :] * d_affine
    d_x = (d_normed - np.mean(d_normed, axis=-1, keepdims=True) - normed * np.mean(d_normed * normed, axis=-1, keepdims=True)) / deviation
    d_gamma, d_beta = np.sum(d_affine * normed, axis=-2), np.sum(d_affine, axis=-2)
    extra = tuple(range(d_beta.ndim - beta.ndim))
    return d_x, np.sum(d_gamma, axis=extra), np.sum(d_beta, axis=extra)
