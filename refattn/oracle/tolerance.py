"""How far a correct answer may be from the exact one, element by element, for given operands and a given way of computing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import definition, derivatives, precision
from ..problem import Problem, output_dtype, split
from .bounds import spread
from .bounds.backward import Backward, applies
from .bounds.perturbed import perturbed, perturbed_gradients
from .bounds.recurrent import recurrent
from .bounds.scored import Scored
from .gradients import Backpropagated, sequences
from .profiles import Profile

#: Chance that a correct implementation is refused in one call.
ALPHA = 1e-3


def tolerances(
    problem: Problem,
    truth: Mapping[str, np.ndarray],
    profile: Profile,
    alpha: float = ALPHA,
    dtypes: Mapping[str, np.dtype] | None = None,
    backward: Backpropagated | None = None,
) -> dict[str, np.ndarray]:
    """Largest error of a correct answer, for every output the problem returns, and every gradient.

    Parameters
    ----------
    problem : Problem
    truth : mapping of str to ndarray
        All outputs of the definition, float64.
    profile : Profile
    alpha : float
        Chance of a false alarm in this call.
    dtypes : mapping, optional
        What each output is stored in; what the caller's dtype implies unless said.
    backward : Backpropagated, optional
        Gradients that were asked for too; each is stored in the dtype of its operand unless said.

    Returns
    -------
    dict of str to ndarray
        float64, in the shape of each output (BHTD) or operand, positive everywhere; infinite where no answer is wrong, because numbers on the way
        may exceed the largest of their format.
    """
    gradients = backward.values if backward is not None else {}
    lam = spread(sum(truth[name].size for name in problem.returns) + sum(x.size for x in gradients.values()), alpha)
    stored = {name: output_dtype(problem, name) for name in problem.returns} | {name: problem.given[name[2:]].dtype for name in gradients}
    return _with_spread(problem, truth, profile, lam, {**stored, **(dtypes or {})}, backward)


def _with_spread(
    problem: Problem,
    truth: Mapping[str, np.ndarray],
    profile: Profile,
    lam: float,
    stored: Mapping[str, np.dtype],
    backward: Backpropagated | None = None,
) -> dict[str, np.ndarray]:
    if problem.sequences is not None:  # what is returned of them says too little of how it came about
        found = definition.joined(problem, (_with_spread(one, definition.run(one), profile, lam, stored) for one in split(problem)))
        if backward is not None:
            gradients = (
                {name: x for name, x in _with_spread(one, definition.run(one), profile, lam, stored, part).items() if name in part.values}
                for one, part in sequences(problem, backward.cotangents)
            )
            found |= derivatives.joined(problem, gradients)
        return found
    exact = {name: truth[name] for name in problem.returns} | dict(backward.values if backward is not None else {})
    if not any(x.size for x in exact.values()):
        return {name: np.zeros(x.shape) for name, x in exact.items()}
    with np.errstate(all="ignore"):  # a bound that overflows is infinite, and a hidden NaN is left out below
        bounds = _bounds(problem, truth, profile, lam, backward)
    own = 1.0 + 2.0**-53 / profile.accumulate  # our answer is float64's, with the errors of that
    lost = sum(problem.dims.values()) * _smallest(profile.accumulate)  # no sum has more products
    return {name: _stored(own * (bounds[name].reshape(x.shape) + lost), x, stored[name]) for name, x in exact.items()}


def _smallest(unit: float) -> float:
    """Smallest positive number of the format of that unit roundoff: a product below it is off by up to half as much, whatever its size."""
    return float(np.finfo(np.float64 if unit <= np.finfo(np.float64).eps else np.float32).smallest_subnormal)


def _bounds(
    problem: Problem, truth: Mapping[str, np.ndarray], profile: Profile, lam: float, backward: Backpropagated | None
) -> Mapping[str, np.ndarray]:
    """Error before the result is rounded into its format, by the sharpest analysis there is."""
    found: Mapping[str, np.ndarray]
    if problem.plan is not None:
        scored = Scored(problem, truth, problem.plan, profile, lam)
        found = scored.bounds()
        if backward is not None and applies(problem, backward.cotangents):
            return {**found, **Backward(scored, backward.cotangents).bounds()}
    elif problem.recurrence is not None:
        found = recurrent(problem, truth, profile, lam)
        if not found.keys() >= set(problem.returns):  # an output that no recurrence has
            found = {**perturbed(problem, truth, profile, lam), **found}
    else:
        found = perturbed(problem, truth, profile, lam)
    if backward is None:
        return found
    moved = perturbed_gradients(problem, backward.cotangents, backward.values, profile, lam)
    return {**found, **{name: moved[name] + backward.errors[name] for name in moved}}


def _stored(bound: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Error after the result is rounded into its format."""
    target = precision.format_of(dtype)
    magnitude = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    bound = np.where(np.isnan(bound), np.where(np.isfinite(exact), np.inf, 0.0), bound)  # of what is no number, nothing is allowed to differ
    return bound + target.unit * (magnitude + bound) + target.tiny
