"""What models that are trained on the tokens they read have in common, in whole arrays: layer normalisation, its loss, and layers under way."""

import numpy as np


def normalised(z, eps):
    """Less the mean of the last axis and divided by its deviation; and that deviation."""
    centred = z - np.sum(z, axis=-1, keepdims=True) / z.shape[-1]
    deviation = np.sqrt(np.sum(centred * centred, axis=-1, keepdims=True) / z.shape[-1] + eps)
    return centred / deviation, deviation


def loss_slope(z, target, weight, bias, eps):
    """Slope in z of |weight * normalised(z) + bias - target|^2 / 2."""
    normal, deviation = normalised(z, eps)
    slope = weight * (weight * normal + bias - target)
    along_ones, along_normal = (np.sum(x, axis=-1, keepdims=True) / z.shape[-1] for x in (slope, slope * normal))
    return (slope - along_ones - normal * along_normal) / deviation


def under_way(y, layer, scale, x, steps):
    """What a layer makes of inputs y, [.. T in], while it learns: each after the steps up to its own token, of inputs x, times its scale, [.. T 1].

    layer
        Weights, offset, and the gradients of both so far.
    """
    weights, offset, gradient, offset_gradient = layer
    so_far = np.tri(y.shape[-2]) * (y @ np.swapaxes(x, -1, -2) + 1.0)  # an offset's input is 1
    return y @ weights + offset[..., None, :] - scale * (y @ gradient + offset_gradient[..., None, :] + so_far @ steps)


def after(layer, scale, x, steps, ends):
    """The layer after these steps; where a mini-batch ends, moved by all its gradients times the scale, [.. 1]."""
    weights, offset, gradient, offset_gradient = layer
    gradient, offset_gradient = gradient + np.swapaxes(x, -1, -2) @ steps, offset_gradient + np.sum(steps, axis=-2)
    if not ends:
        return weights, offset, gradient, offset_gradient
    return weights - scale[..., None] * gradient, offset - scale * offset_gradient, 0.0 * gradient, 0.0 * offset_gradient


def stretches(start, n, mini_batch, most=64):
    """Where n tokens from a position on are cut: at the ends of mini-batches, and after so many; and whether a mini-batch ends there."""
    first = 0
    while first < n:
        last = min(n, first + most, first + mini_batch - (start + first) % mini_batch)
        yield first, last, (start + last) % mini_batch == 0
        first = last
