"""How far a correct answer may be from the exact one, element by element, for given operands and a given way of computing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import definition, precision
from ..problem import Problem, output_dtype, split
from .bounds import spread
from .bounds.perturbed import perturbed
from .bounds.products import products
from .bounds.scored import Scored
from .profiles import Profile

#: Chance that a correct implementation is refused in one call.
ALPHA = 1e-3


def tolerances(
    problem: Problem,
    truth: Mapping[str, np.ndarray],
    profile: Profile,
    alpha: float = ALPHA,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> dict[str, np.ndarray]:
    """Largest error of a correct answer, for every output the problem returns.

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

    Returns
    -------
    dict of str to ndarray
        float64, in the shape of each output (BHTD), positive everywhere.
    """
    lam = spread(sum(truth[name].size for name in problem.returns), alpha)
    return _with_spread(problem, truth, profile, lam, {name: (dtypes or {}).get(name, output_dtype(problem, name)) for name in problem.returns})


def _with_spread(
    problem: Problem, truth: Mapping[str, np.ndarray], profile: Profile, lam: float, stored: Mapping[str, np.dtype]
) -> dict[str, np.ndarray]:
    if problem.sequences is not None:  # what is returned of them says too little of how it came about
        parts = ((rows, _with_spread(one, definition.run(one), profile, lam, stored)) for one, rows in split(problem))
        return definition.joined(problem, parts)
    with np.errstate(all="ignore"):  # a bound that overflows is infinite, and a hidden NaN is left out below
        bounds = _bounds(problem, truth, profile, lam)
    own = 2.0 if profile.accumulate <= np.finfo(np.float64).eps else 1.0  # against a float64 answer, ours is no more exact than theirs
    return {name: _stored(own * bounds[name].reshape(truth[name].shape), truth[name], stored[name]) for name in problem.returns}


def _bounds(problem: Problem, truth: Mapping[str, np.ndarray], profile: Profile, lam: float) -> Mapping[str, np.ndarray]:
    """Error before the result is rounded into its format, by the sharpest analysis there is."""
    variant = problem.variant
    if variant.plan is not None:
        return Scored(problem, truth, variant.plan(problem.dims, problem.params), profile, lam).bounds()
    analysis = products if variant.family in ("feature", "state") else perturbed
    return analysis(problem, dict(truth), profile, lam)


def _stored(bound: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Error after the result is rounded into its format."""
    target = precision.format_of(dtype)
    magnitude = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    bound = np.where(np.isnan(bound), np.inf, bound)
    return bound + target.unit * (magnitude + bound) + target.tiny
