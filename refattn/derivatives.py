"""Gradients of definitions, by numerical differentiation in float64.

A definition has no hand-written gradient, which would be one more statement to believe.  For cotangents ``d_<output>`` the number

    phi = sum over outputs of sum(d_<output> * <output>)

is differentiated along every element of every real operand the caller gave, with `scipy.differentiate.derivative`: central differences
of order eight whose step is halved until two estimates agree.  What is summed is each output's *change*, so an element adds no
rounding noise of outputs that do not depend on it, and its gradient is exactly 0 where nothing does.

How accurate: softmax with standard normal operands agrees with automatic differentiation to 12 digits of a gradient's largest element,
with operands a hundred times larger to 9.  Each element carries an error estimate: the difference of the last two estimates, which a
settled sequence overstates, plus the rounding noise of the outputs divided by the step.  It is an estimate, not a bound.

Constants, of gradient 0: elements that are not finite (a bias of -inf hides a key), and outputs that are not finite (lse of an empty
row).  Differences step past the end of an operand's domain (a decay of 1), where the definition's formula is taken to continue.
"""

from __future__ import annotations

import math
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.differentiate import derivative

from . import definition, precision
from .costs import flops
from .errors import DtypeError, ShapeError
from .foreign import as_numpy
from .problem import Problem, from_layout, part_of, spelled, split, to_layout
from .spec import Operand, shape, size

#: Evaluations an element usually takes: itself, the first stencil of eight, and four halvings of two.
USUAL_EVALUATIONS = 17
#: Sum of the absolute weights of the eight-point stencil, as a multiple of 1 / (its largest step); exactly 13.6.
STENCIL_WEIGHT = 14.0
#: Two estimates that differ by less than this settle the matter: the later one is about 2^8 times nearer.
RELATIVE_TOLERANCE = 2.0**-42
#: First steps tried, relative to the usual one; a later one only for elements that had not settled.
STEPS = (1.0, 2.0**-8, 2.0**-16)
#: Seconds of expected work from which a progress bar is worth its lines.
PROGRESS_FROM = 2.0


@dataclass(frozen=True)
class Gradients:
    """Gradients as they were computed: float64, BHTD, each in the shape its operand was given in.

    Attributes
    ----------
    values : mapping of str to ndarray
        ``d_<operand>``, in operand order.
    errors : mapping of str to ndarray
        Estimated absolute error of each element, under the same names.
    """

    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> Gradients:
    """Gradients of ``sum(cotangent * output)`` with respect to every real operand that was given.

    Parameters
    ----------
    problem : Problem
    cotangents : mapping of str to ndarray
        By output name, BHTD, of the outputs' shapes.

    Returns
    -------
    Gradients
    """
    names = [o.name for o in problem.variant.operands if o.kind == "real" and o.name in problem.given]
    cotangents = {name: np.ascontiguousarray(x, np.float64) for name, x in cotangents.items()}
    if problem.sequences is not None:
        return _each_sequence(problem, cotangents)
    values, errors = {}, {}
    with _progress(problem, sum(problem.given[name].size for name in names)) as done:
        for name in names:
            values["d_" + name], errors["d_" + name] = _one_operand(problem, problem.variant.operand(name), cotangents, done)
    return Gradients(MappingProxyType(values), MappingProxyType(errors))


def work(problem: Problem) -> float:
    """Floating-point operations that `gradients` takes, about."""
    elements = sum(problem.given[o.name].size for o in problem.variant.operands if o.kind == "real" and o.name in problem.given)
    return float(USUAL_EVALUATIONS * elements * flops(problem))


def _each_sequence(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> Gradients:
    """Gradients of packed sequences: of operands with tokens where each lies, of operands they share the sum."""
    found = [gradients(one, cotangents_of(problem, n, cotangents)) for n, one in enumerate(split(problem))]
    return Gradients(joined(problem, [x.values for x in found]), joined(problem, [x.errors for x in found]))


def cotangents_of(problem: Problem, n: int, cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of sequence n."""
    return {name: x[part_of(problem, n, name)] for name, x in cotangents.items()}


def joined(problem: Problem, parts: Iterable[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """Gradients, or errors of them, from those of each sequence."""
    real = (o.name for o in problem.variant.operands if o.kind == "real" and o.name in problem.given)
    found = {"d_" + name: np.zeros(problem.given[name].shape) for name in real}
    for n, values in enumerate(parts):
        for name, x in values.items():
            found[name][part_of(problem, n, name)] += x
    return MappingProxyType(found)


def check_cotangent(problem: Problem, output: str, value: Any) -> np.ndarray:
    """The cotangent of an output as the caller gave it, checked: BHTD.

    Raises
    ------
    ShapeError, DtypeError
    """
    variant = problem.variant
    what = f"{variant.name}: d_{output}"
    x = as_numpy(value, what)
    if not precision.is_real(x.dtype):
        raise DtypeError(f"{what} is {x.dtype}; must be floating point, as {output} is")
    axes = next(o.axes for o in variant.outputs if o.name == output)
    names = spelled(axes, problem.layout).split()
    wanted = [size(axis, problem.dims) for axis in names]
    if list(x.shape) != wanted:
        differing = [f"{axis}={m}" for axis, m, n in zip(names, x.shape, wanted, strict=False) if m != n and x.ndim == len(names)]
        found = " and ".join(differing) or f"{x.ndim} axes, shape {x.shape}"
        listing = ", ".join(f"{axis}={n}" for axis, n in zip(names, wanted, strict=True))
        raise ShapeError(f"{what} has {found}; must have the shape of {output}, [{' '.join(names)}] with {listing}")
    return from_layout(axes, x, problem.layout)


def release(problem: Problem, found: Gradients) -> Any:
    """The gradients as a named tuple in the caller's layout, each in its operand's dtype; ``errors`` on it holds the estimates, float64."""

    def in_layout(name: str, x: np.ndarray) -> np.ndarray:
        axes = problem.variant.operand(name[2:]).axes
        return x if problem.layout == "BHTD" else np.ascontiguousarray(to_layout(axes, x, problem.layout, operand=True))

    dtypes = {"d_" + name: x.dtype.newbyteorder("=") for name, x in problem.given.items()}
    rounded = {name: precision.round_to(in_layout(name, x), dtypes[name]) for name, x in found.values.items()}
    errors = {name: in_layout(name, x) for name, x in found.errors.items()}
    kind = type("Gradients", (namedtuple("Gradients", list(rounded)),), {"errors": MappingProxyType(errors)})
    return kind(**rounded)


def _one_operand(
    problem: Problem, operand: Operand, cotangents: Mapping[str, np.ndarray], done: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and error estimate of one operand, in the shape it was given in."""
    x = np.array(problem.given[operand.name], np.float64, order="C")  # a copy: it is changed in place, one element at a time
    flat = x.reshape(-1)
    place = [o.name for o in problem.variant.operands].index(operand.name)
    arrays = list(problem.arrays)
    arrays[place] = np.broadcast_to(x, shape(operand.axes, problem.dims))
    outputs = _outputs(problem, cotangents)
    at_rest = outputs(arrays)
    constant = {name: ~np.isfinite(y) for name, y in at_rest.items()}
    roundings = math.sqrt(1 + flops(problem) / max(1, sum(y.size for y in at_rest.values())))  # of a sum of n terms they grow like sqrt(n)
    noise = np.zeros(flat.size)  # rounding errors of phi, per element
    unseen = 2.0**-53 * sum(_size(cotangents[name], y) for name, y in at_rest.items())  # a change of an output below its rounding

    def phi_at(n: int, value: float) -> float:
        """phi, counted from where it is at rest, with element n set to `value`."""
        rest, flat[n] = flat[n], value
        moved = outputs(arrays)
        flat[n] = rest
        done(1)
        total, size = 0.0, 0.0
        for name, cotangent in cotangents.items():
            with np.errstate(invalid="ignore"):
                change = np.where(constant[name], 0.0, moved[name] - at_rest[name])
                total += float(np.sum(cotangent * change))
            size += _size(cotangent[change != 0.0], moved[name][change != 0.0])
        noise[n] = max(noise[n], 2.0**-53 * roundings * size)
        return total

    def phi(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        values, numbers = np.broadcast_arrays(values, numbers)
        return np.array([phi_at(int(n), float(v)) for n, v in zip(numbers.flat, values.flat, strict=True)]).reshape(values.shape)

    slope, error = np.zeros(flat.size), np.zeros(flat.size)
    step = _usual_step(problem)
    finite = left = np.flatnonzero(np.isfinite(flat))
    slope[left], error[left] = math.nan, math.inf
    for factor in STEPS:
        if left.size:
            settled = _differentiate(phi, left, flat[left], factor * step, noise, slope, error)
            left = left[~settled]
    error[finite] += unseen / step
    return slope.reshape(x.shape), error.reshape(x.shape)


def _size(cotangent: np.ndarray, y: np.ndarray) -> float:
    """Sum of the magnitudes of the finite terms of phi."""
    with np.errstate(invalid="ignore"):
        terms = np.abs(cotangent * y)
    return float(np.sum(terms, where=np.isfinite(terms)))


def _differentiate(
    phi: Callable[..., np.ndarray], numbers: np.ndarray, x: np.ndarray, step: float, noise: np.ndarray, slope: np.ndarray, error: np.ndarray
) -> np.ndarray:
    """Improve `slope` and `error` at the elements `numbers`, whose values are `x`; say which of them have settled."""

    def keep_best(found: Any) -> None:  # called after every halving; a smaller step trades truncation for rounding
        rounding = STENCIL_WEIGHT * noise[numbers] * 2.0 ** (found.nit - 1) / step
        estimate = found.error + rounding
        better = estimate < error[numbers]  # False for the NaN of the first estimate, which has no other to differ from
        slope[numbers[better]], error[numbers[better]] = found.df[better], estimate[better]

    with np.errstate(all="ignore"):
        derivative(phi, x, args=(numbers,), initial_step=step, tolerances={"rtol": RELATIVE_TOLERANCE}, maxiter=10, callback=keep_best)
        rounding = STENCIL_WEIGHT * noise[numbers] / step
        settled: np.ndarray = error[numbers] <= np.maximum(2.0**-30 * np.abs(slope[numbers]), 4.0 * rounding)
    return settled


def _outputs(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> Callable[[list[np.ndarray]], dict[str, np.ndarray]]:
    """The definition as a function of its arrays, returning the outputs that have a cotangent."""
    outputs = definition.runner(problem, definition.compiled(problem.variant), repeated=True)

    def run(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {name: y for name, y in outputs(arrays).items() if name in cotangents}

    return run


def _usual_step(problem: Problem) -> float:
    """Half to a quarter of 1 / (the largest operand): the distance over which products of operands change by about one.

    A power of two, so that adding it to an element is exact.
    """
    largest = max((float(np.max(np.abs(x), where=np.isfinite(x), initial=1.0)) for x in problem.arrays if x.dtype != np.bool_), default=1.0)
    return float(2.0 ** (-1 - math.ceil(math.log2(largest) + 0.5)))


@contextmanager
def _progress(problem: Problem, elements: int) -> Iterator[Callable[[int], None]]:
    """Counts evaluations; shows a bar on a terminal when they will take a while."""
    if not sys.stderr.isatty() or elements == 0:
        yield lambda n: None
        return
    definition.compiled(problem.variant)
    start = time.perf_counter()
    definition.run(problem)
    expected = USUAL_EVALUATIONS * elements
    if (time.perf_counter() - start) * expected < PROGRESS_FROM:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"gradients of {problem.variant.name}", total=expected)
        yield lambda n: bar.advance(task, n)
