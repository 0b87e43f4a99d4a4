"""Values by a variant's whole arrays of NumPy, in float64, where these are faster than loops and keep no more than a few numbers for each pair."""

from __future__ import annotations

import numpy as np

from ...problem import Problem
from ..vectorized import in_full, params_of

#: By variant, operands whose sums are exponents, and how large they may be for two exponentials to be multiplied in place of one that is taken.
EXPONENTS = {"aft_full": ("k", "w"), "aft_local": ("k", "w")}
LARGEST = 100.0


def reason_against(problem: Problem) -> str:
    """Why arrays do not stand for the loops of a problem; "" where they do."""
    if 0 in problem.dims.values():
        return "an axis is empty"
    for name, x in problem.given.items():
        if not np.isfinite(x.astype(np.float64, copy=False)).all():
            return f"{name} is not finite"
    for name in EXPONENTS.get(problem.variant.name, ()):
        if np.abs(problem.given[name].astype(np.float64, copy=False)).max() > LARGEST:
            return f"{name} has elements beyond {LARGEST:g}, whose exponentials it would take apart"
    return ""


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float64."""
    assert problem.variant.vectorized is not None
    with np.errstate(all="ignore"):
        found = problem.variant.vectorized(in_full(problem), params_of(problem))
    return {name: np.asarray(x) for name, x in found.items()}
