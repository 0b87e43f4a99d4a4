"""Maps and feature maps in balls: what the pieces compute in float64, written again from what they say.

`apply` takes arrays of balls as the piece takes arrays of numbers.  Functions that have corners are taken of numbers that may lie on either side of
them, so that maxima are unions where balls overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from ..pieces.feature_maps import (
    cosine_reweight,
    dpfp,
    elu_plus_one,
    favor,
    favor_trig,
    focused,
    hedgehog,
    l2_unit,
    power,
    projection,
    random_relu,
    rebased,
    relu,
    rfa,
    silu,
    softmax_features,
    t2r,
    taylor2,
)
from ..pieces.feature_maps import exp as exp_features
from ..pieces.maps import exp, log, negative, one_minus_exp, times

Array = Any  # ndarray of balls


def to_balls(x: np.ndarray) -> Array:
    """Numbers exactly as they are."""
    import flint

    return np.frompyfunc(flint.arb, 1, 1)(np.asarray(x, np.float64)) if np.size(x) else np.empty(np.shape(x), object)


def exponentials(x: Array) -> Array:
    return _exps(x)


def has(piece: ModuleType | None) -> bool:
    """Whether a map has a ball version; none at all has."""
    return piece is None or piece in _MAPS or piece in _FEATURES


def is_entrywise(piece: ModuleType | None) -> bool:
    """Whether the map takes number by number and needs no other operand."""
    return piece is None or piece in _MAPS


def apply(piece: ModuleType, x: Array, weights: tuple[Array, ...], numbers: tuple[float, ...]) -> Array:
    """The map of balls, at flint's present precision."""
    if piece in _MAPS:
        function = _MAPS[piece]
        return np.frompyfunc(lambda one: function(one, *numbers), 1, 1)(x) if x.size else x
    return _FEATURES[piece](x, *weights, *numbers)


# ---- number by number --------------------------------------------------------------------------------------------------------------


def _each(function: Callable[[Any], Any]) -> Callable[[Array], Array]:
    return np.frompyfunc(function, 1, 1)


def _positive(x: Any) -> Any:
    return x.max(0)


def _elu_plus_one(x: Any) -> Any:
    return x + 1 if x > 0 else x.exp() if x <= 0 else (x + 1).union(x.exp())


_exps, _positives, _roots, _cosines, _sines = (
    _each(function) for function in (lambda x: x.exp(), _positive, lambda x: x.sqrt(), lambda x: x.cos(), lambda x: x.sin())
)


_MAPS: dict[ModuleType, Callable[..., Any]] = {
    exp: lambda x: x.exp(),
    log: lambda x: type(x).neg_inf() if x.is_zero() else x.log(),
    negative: lambda x: -x,
    one_minus_exp: lambda x: -x.expm1(),
    times: lambda x, factor: x * factor,
}


# ---- vectors -------------------------------------------------------------------------------------------------------------------------


def _number(x: float) -> Any:
    import flint

    return flint.arb(x)


def _sum(x: Array) -> Array:
    return np.sum(x, axis=-1, keepdims=True)


def _divided(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is."""
    return np.frompyfunc(lambda a, b: b if b.is_zero() else a / b, 2, 1)(x, y)


def _projected(x: Array, w: Array) -> Array:
    return x @ np.swapaxes(w, -1, -2)


def _scaled(x: Array, scale: float) -> Array:
    return x * _number(scale).sqrt()


def _softmax(x: Array) -> Array:
    e = _exps(x)
    return e / _sum(e)


def _tensor(x: Array, p: int) -> Array:
    y = x
    for _ in range(int(p) - 1):
        y = (y[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return y


def _largest(x: Array, axes: tuple[int, ...]) -> Array:
    for axis in axes:
        x = np.frompyfunc(lambda a, b: a.max(b), 2, 1).reduce(x, axis=axis, keepdims=True)
    return x


def _dpfp(x: Array, taps: Array) -> Array:
    r = np.concatenate([_positives(x), _positives(-x)], axis=-1)
    products = np.concatenate([tap * r * np.roll(r, -n, axis=-1) for n, tap in enumerate(taps, 1)], axis=-1)
    return _divided(products, _sum(products))


def _l2_unit(x: Array) -> Array:
    return _divided(x, _roots(_sum(x * x)))


def _favor(x: Array, w: Array, scale: float, eps: float, stabilizer: int) -> Array:
    scaled = _scaled(x, scale)
    exponents = _projected(scaled, w)
    top = 0 if stabilizer == favor.NONE else _largest(exponents, (-1,) if stabilizer == favor.TOKEN else (-2, -1))
    return (_exps(exponents - _sum(scaled * scaled) / 2 - top) + eps) / _number(w.shape[-2]).sqrt()


def _favor_trig(x: Array, w: Array, scale: float, exponent: float) -> Array:
    scaled = _scaled(x, scale)
    angles = _projected(scaled, w)
    amplitude = _exps(_sum(scaled * scaled) * exponent / 2) / _number(w.shape[-2]).sqrt()
    return amplitude * np.concatenate([_cosines(angles), _sines(angles)], axis=-1)


def _focused(x: Array, p: float) -> Array:
    r = _positives(x)
    sharp = _each(lambda a: a if a.is_zero() else a ** _number(p))(r)
    length, other = (_roots(_sum(y * y)) for y in (r, sharp))
    alone = np.sum(np.frompyfunc(lambda a: not a.is_zero(), 1, 1)(r), axis=-1, keepdims=True) <= 1  # then it stays, exactly
    return np.where(alone, r, _divided(length * sharp, other))


def _hedgehog(x: Array, w: Array, b: Array, activation: int) -> Array:
    y = _projected(x, w) + b[..., None, :]
    if activation == 0:
        return np.concatenate([_softmax(y), _softmax(-y)], axis=-1)
    both = np.concatenate([y, -y], axis=-1)
    return _exps(both) if activation == 1 else _softmax(both)


def _rebased(x: Array, gamma: Array, beta: Array, eps: float, scale: float) -> Array:
    width = x.shape[-1]
    centred = x - _sum(x) / width
    normed = centred / _roots(_sum(centred * centred) / width + eps)
    return _tensor(_scaled(gamma[..., None, :] * normed + beta[..., None, :], scale), 2)


def _rfa(x: Array, w: Array, sigma: Array) -> Array:
    angles = _projected(sigma * _l2_unit(x), w)
    return np.concatenate([_sines(angles), _cosines(angles)], axis=-1) / _number(w.shape[-2]).sqrt()


def _cosine_reweight(x: Array, positions: Array, length: float) -> Array:
    angles = (positions * _number(length).pi() / 2 / length)[..., None]
    return np.concatenate([_positives(x) * _cosines(angles), _positives(x) * _sines(angles)], axis=-1)


def _taylor2(x: Array, scale: float) -> Array:
    ones = to_balls(np.ones((*x.shape[:-1], 1)))
    scaled = _scaled(x, scale)
    return np.concatenate([ones, scaled, _tensor(scaled, 2) / _number(2.0).sqrt()], axis=-1)


_FEATURES: dict[ModuleType, Callable[..., Array]] = {
    cosine_reweight: _cosine_reweight,
    dpfp: _dpfp,
    elu_plus_one: _each(_elu_plus_one),
    exp_features: _exps,
    favor: _favor,
    favor_trig: _favor_trig,
    focused: _focused,
    hedgehog: _hedgehog,
    l2_unit: _l2_unit,
    power: lambda x, p, scale: _tensor(_scaled(x, scale), p),
    projection: _projected,
    random_relu: lambda x, w, scale, eps: _positives(_projected(_scaled(x, scale), w)) + eps,
    rebased: _rebased,
    relu: lambda x, eps=0.0: _positives(x) + eps,
    rfa: _rfa,
    silu: _each(lambda x: x / (1 + (-x).exp())),
    softmax_features: _softmax,
    t2r: lambda x, w, b: _positives(_projected(x, w) + b[..., None, :]),
    taylor2: _taylor2,
}
