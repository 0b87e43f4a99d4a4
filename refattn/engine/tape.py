"""Differentiation of plain NumPy, backwards: what a reduction or a `vectorized` form is written in is recorded on the way, and its gradients are
collected on the way back.

Of NumPy there is what these need, and everything else is refused: arithmetic and the functions of `SLOPES`, sums, maxima, running sums, maxima and
`logaddexp`, products of matrices and systems of equations, joining, repeating, reshaping, slices.  A comparison gives a plain array, and so does
whatever is made of plain arrays alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

Array = np.ndarray


class Part(NamedTuple):
    """A gradient that is 0 but where an index says."""

    at: Any
    d: Array


#: Gradients of a value -> those of what it was made of.
Pull = Callable[[Array], Array | Part]

_numbers = itertools.count()


class Traced(NDArrayOperatorsMixin):
    """An array that knows what it was made of: pairs of what and the function that takes its gradient there."""

    def __init__(self, value: Any, made_of: Iterable[tuple[Traced, Pull]] = ()) -> None:
        self.value = np.asarray(value, np.float64)
        self.made_of = tuple(made_of)
        self.number = next(_numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __int__(self) -> int:
        """What has no gradient."""
        return int(self.value)

    def __getitem__(self, at: Any) -> Traced:
        return Traced(self.value[at], [(self, lambda d: Part(at, d))])

    def reshape(self, *sizes: int) -> Traced:
        return Traced(self.value.reshape(*sizes), [(self, lambda d: d.reshape(self.shape))])

    def max(self, axis: int, keepdims: bool = False) -> Traced:
        """The gradient goes to the first of several that are the largest."""
        top = np.expand_dims(self.value.argmax(axis=axis), axis)

        def pull(d: Array) -> Array:
            into = np.zeros(self.shape)
            np.put_along_axis(into, top, d if keepdims else np.expand_dims(d, axis), axis)
            return into

        return Traced(self.value.max(axis=axis, keepdims=keepdims), [(self, pull)])

    def sum(self, axis: int, keepdims: bool = False) -> Traced:
        def pull(d: Array) -> Array:
            return np.broadcast_to(d if keepdims else np.expand_dims(d, axis), self.shape)

        return Traced(self.value.sum(axis=axis, keepdims=keepdims), [(self, pull)])

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [x.value if isinstance(x, Traced) else np.asarray(x, np.float64) for x in inputs]
        if method == "__call__" and not options and ufunc in _COMPARISONS:
            return ufunc(*plain)
        if method == "accumulate" and ufunc in _RUNNING and options.keys() == {"axis"}:
            return _RUNNING[ufunc](inputs[0], options["axis"])
        if method == "__call__" and not options and ufunc is np.matmul:
            return _matmul(*inputs)
        if method != "__call__" or options or ufunc not in SLOPES:
            return NotImplemented
        y = ufunc(*plain)

        def pull(x: Traced, rule: Callable[..., Any]) -> Pull:
            return lambda d: _gathered(d * rule(y, *plain), x.shape)

        return Traced(y, [(x, pull(x, rule)) for x, rule in zip(inputs, SLOPES[ufunc], strict=True) if isinstance(x, Traced)])

    def __array_function__(self, function: Any, types: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        return _FUNCTIONS[function](*args, **options) if function in _FUNCTIONS else NotImplemented


def value_of(x: Any) -> Array:
    """The numbers of an array, traced or plain."""
    return x.value if isinstance(x, Traced) else np.asarray(x, np.float64)


def collect(gradients: Iterable[tuple[Any, Array]], leaves: Mapping[str, Traced]) -> dict[str, Array]:
    """Gradients of leaves, from those of whatever was made of them.

    Parameters
    ----------
    gradients : iterable of (array, ndarray)
        Of traced arrays; plain ones depend on no leaf and are passed over.
    leaves : mapping of str to Traced
    """
    found: dict[int, Array] = {}
    waiting: dict[int, Traced] = {}
    sums: set[int] = set()  # of which the array in `found` is nobody else's

    def add(x: Traced, d: Array | Part) -> None:
        waiting[x.number] = x
        at, d = d if isinstance(d, Part) else (..., d)
        if x.number not in found and at is ...:
            found[x.number] = d
            return
        if x.number not in sums:
            found[x.number] = np.array(np.broadcast_to(found.get(x.number, 0.0), x.shape))
            sums.add(x.number)
        if isinstance(at, tuple) and any(isinstance(one, np.ndarray) for one in at):  # an element may be there several times
            np.add.at(found[x.number], at, d)
        else:
            found[x.number][at] += d

    for made, gradient in gradients:
        if isinstance(made, Traced):
            add(made, np.asarray(gradient, np.float64).reshape(made.shape))
    with np.errstate(all="ignore"):
        while waiting:  # the youngest first: all that was made of it has been
            x = waiting.pop(max(waiting))
            for part, pull in x.made_of:
                add(part, pull(found[x.number]))
    return {name: found.get(x.number, np.zeros(x.shape)) for name, x in leaves.items()}


# ---- what of NumPy there is ------------------------------------------------------------------------------------------------------------


def _gathered(d: Array, shape: tuple[int, ...]) -> Array:
    """The reverse of broadcasting from this shape."""
    if d.shape == shape:
        return d
    d = d.sum(axis=tuple(range(d.ndim - len(shape))))
    return d.sum(axis=tuple(n for n, size in enumerate(shape) if size == 1 and d.shape[n] != 1), keepdims=True)


def _share(y: Array, x: Array) -> Array:
    """exp(x - y), of an x that is part of a sum whose logarithm y is."""
    return np.exp(x - np.where(np.isneginf(y), 0.0, y))


#: Slope in each argument, of (result, *arguments).
SLOPES: dict[np.ufunc, tuple[Callable[..., Any], ...]] = {
    np.add: (lambda y, a, b: 1.0, lambda y, a, b: 1.0),
    np.subtract: (lambda y, a, b: 1.0, lambda y, a, b: -1.0),
    np.multiply: (lambda y, a, b: b, lambda y, a, b: a),
    np.divide: (lambda y, a, b: 1.0 / b, lambda y, a, b: -y / b),
    np.power: (lambda y, a, b: b * a ** (b - 1.0), lambda y, a, b: y * np.log(a)),
    np.maximum: (lambda y, a, b: a > b, lambda y, a, b: b >= a),
    np.minimum: (lambda y, a, b: a < b, lambda y, a, b: b <= a),
    np.logaddexp: (lambda y, a, b: _share(y, a), lambda y, a, b: _share(y, b)),
    np.negative: (lambda y, a: -1.0,),
    np.absolute: (lambda y, a: np.sign(a),),
    np.exp: (lambda y, a: y,),
    np.log: (lambda y, a: 1.0 / a,),
    np.log1p: (lambda y, a: 1.0 / (1.0 + a),),
    np.tanh: (lambda y, a: 1.0 - y * y,),
    np.expm1: (lambda y, a: y + 1.0,),
    np.sqrt: (lambda y, a: 0.5 / y,),
    np.cos: (lambda y, a: -np.sin(a),),
    np.sin: (lambda y, a: np.cos(a),),
}
_COMPARISONS = frozenset({np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal})


def _running_logaddexp(x: Traced, axis: int) -> Traced:
    y = np.logaddexp.accumulate(x.value, axis=axis)

    def pull(d: Array) -> Array:
        """d_j = sum over i >= j of d_i exp(x_j - y_i), from the end: what is passed on shrinks by exp(y_i - y_(i+1))."""
        d, values, sums = (np.moveaxis(a, axis, 0) for a in (d, x.value, y))
        passed = np.array(d)
        for i in range(len(d) - 2, -1, -1):
            passed[i] += passed[i + 1] * _share(sums[i + 1], sums[i])
        return np.moveaxis(passed * _share(sums, values), 0, axis)

    return Traced(y, [(x, pull)])


def _running_maximum(x: Traced, axis: int) -> Traced:
    y = np.maximum.accumulate(x.value, axis=axis)

    def pull(d: Array) -> Array:
        """To the latest element that was the largest so far."""
        d, values, tops = (np.moveaxis(a, axis, -1) for a in (d, x.value, y))
        places = np.maximum.accumulate(np.where(values >= tops, np.arange(values.shape[-1]), 0), axis=-1)
        into = np.zeros(values.shape)
        np.add.at(into, (*np.indices(values.shape)[:-1], places), d)
        return np.moveaxis(into, -1, axis)

    return Traced(y, [(x, pull)])


def _matmul(a: Any, b: Any) -> Traced:
    one, other = value_of(a), value_of(b)
    parts: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parts.append((a, lambda d: _gathered(d @ np.swapaxes(other, -1, -2), one.shape)))
    if isinstance(b, Traced):
        parts.append((b, lambda d: _gathered(np.swapaxes(one, -1, -2) @ d, other.shape)))
    return Traced(one @ other, parts)


def _solve(a: Any, b: Any) -> Traced:
    """Of a x = b, with a matrix on the right; NaN where a is singular."""
    matrix = value_of(a)
    singular = np.linalg.slogdet(matrix)[0] == 0.0
    if singular.any():
        matrix = np.where(singular[..., None, None], np.nan, matrix)
    x = np.linalg.solve(matrix, value_of(b))

    def back(d: Array) -> Array:
        return np.linalg.solve(np.swapaxes(matrix, -1, -2), d)

    parts: list[tuple[Traced, Pull]] = []
    if isinstance(a, Traced):
        parts.append((a, lambda d: _gathered(-back(d) @ np.swapaxes(x, -1, -2), matrix.shape)))
    if isinstance(b, Traced):
        parts.append((b, lambda d: _gathered(back(d), b.shape)))
    return Traced(x, parts)


def _cumsum(x: Traced, axis: int) -> Traced:
    return Traced(np.cumsum(x.value, axis=axis), [(x, lambda d: np.flip(np.cumsum(np.flip(d, axis), axis=axis), axis))])


def _concatenate(arrays: Iterable[Any], axis: int = 0) -> Traced:
    arrays = list(arrays)
    values = [value_of(x) for x in arrays]
    ends = np.cumsum([x.shape[axis] for x in values])

    def part(n: int) -> Pull:
        where = [slice(None)] * values[n].ndim
        where[axis] = slice(ends[n] - values[n].shape[axis], ends[n])
        return lambda d: d[tuple(where)]

    return Traced(np.concatenate(values, axis=axis), [(x, part(n)) for n, x in enumerate(arrays) if isinstance(x, Traced)])


def _repeat(x: Traced, times: int, axis: int) -> Traced:
    def pull(d: Array) -> Array:
        return d.reshape(*x.shape[:axis], x.shape[axis], times, *d.shape[axis + 1 :]).sum(axis=axis + 1)

    axis %= len(x.shape)
    return Traced(np.repeat(x.value, times, axis=axis), [(x, pull)])


def _broadcast_to(x: Traced, shape: tuple[int, ...]) -> Traced:
    return Traced(np.broadcast_to(x.value, shape), [(x, lambda d: _gathered(d, x.shape))])


def _swapaxes(x: Traced, one: int, other: int) -> Traced:
    return Traced(np.swapaxes(x.value, one, other), [(x, lambda d: np.swapaxes(d, one, other))])


def _where(condition: Array, a: Any, b: Any) -> Traced:
    def pull(x: Traced, side: bool) -> Pull:
        return lambda d: _gathered(np.where(condition == side, d, 0.0), x.shape)

    return Traced(np.where(condition, value_of(a), value_of(b)), [(x, pull(x, side)) for x, side in ((a, True), (b, False)) if isinstance(x, Traced)])


_RUNNING = {np.logaddexp: _running_logaddexp, np.maximum: _running_maximum}
_FUNCTIONS: dict[Any, Callable[..., Traced]] = {
    np.sum: lambda x, axis, keepdims=False: x.sum(axis, keepdims),
    np.max: lambda x, axis, keepdims=False: x.max(axis, keepdims),
    np.linalg.solve: _solve,
    np.reshape: lambda x, shape: x.reshape(*shape),
    np.cumsum: _cumsum,
    np.concatenate: _concatenate,
    np.repeat: _repeat,
    np.broadcast_to: _broadcast_to,
    np.swapaxes: _swapaxes,
    np.where: _where,
}
