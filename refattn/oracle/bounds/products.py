"""Rounding errors of sums of products: families `state` and `feature`.

A state recurrence is a polynomial in its operands with coefficients of one sign, so the definition on absolute values is the sum of the
magnitudes of its terms, and on squares the sum of their squares.  Feature-map attention divides two sums of positive weights: with the
values replaced by their magnitudes, the definition gives sum of w |v|.  No term goes through more roundings than the axes have entries.
"""

from __future__ import annotations

import numpy as np

from ... import definition
from ...problem import Problem
from ...spec import Operand
from ..profiles import Profile
from .bound import Bound


def products(problem: Problem, truth: dict[str, np.ndarray], profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Largest error of every output."""
    dims = problem.dims
    chain = 2 * dims["T"] + dims.get("S", 0) + dims["D"] + 8
    roundings = Bound.roundings(chain, profile.accumulate, lam)
    function = profile.exp_error + profile.operands + profile.probabilities + profile.scores
    roundings += Bound(4 * function, lam * 4 * function)
    if problem.variant.family == "feature":
        magnitude = _on(problem, lambda o, x: np.abs(x) if o.name == "v" else x)
        return {name: (roundings * (magnitude[name] + np.abs(truth[name]))).smaller for name in truth}
    magnitude = _on(problem, lambda o, x: np.abs(x))
    square = _on(problem, lambda o, x: x**2)
    return {
        name: np.minimum(roundings.worst * magnitude[name], roundings.likely * np.maximum(np.abs(truth[name]), np.sqrt(square[name])))
        for name in truth
    }


def _on(problem: Problem, change) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """The definition on changed real operands; boolean ones stay."""

    def one(operand: Operand, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(change(operand, x)) if operand.kind == "real" and x.size else x

    arrays = tuple(one(o, x) for o, x in zip(problem.variant.operands, problem.arrays, strict=True))
    return definition.run(problem, arrays)
