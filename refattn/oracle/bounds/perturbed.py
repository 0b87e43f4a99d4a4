"""Rounding errors of a variant nobody has analysed: how its definition answers to operands perturbed by a unit roundoff.

A backward-stable algorithm returns the exact result of operands that are off by a few roundings.  Each real operand is perturbed, every
element by a random sign, several times; the root mean square of the answers, scaled by the square root of the longest chain of roundings,
stands for one standard deviation.  This is statistical only, and says nothing about an algorithm that is not backward stable.
"""

from __future__ import annotations

import math

import numpy as np

from ... import definition
from ...problem import Problem
from ..profiles import Profile

_DRAWS = 8
_STEP = 2.0**-26  # far above float64's own rounding, far below where the definition bends


def perturbed(problem: Problem, truth: dict[str, np.ndarray], profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Largest error of every output."""
    rng = np.random.default_rng(0)
    total = {name: np.zeros_like(x) for name, x in truth.items()}
    for _ in range(_DRAWS):
        arrays = tuple(
            np.ascontiguousarray(x * (1 + _STEP * rng.choice((-1.0, 1.0), x.shape))) if o.kind == "real" else x
            for o, x in zip(problem.variant.operands, problem.arrays, strict=True)
        )
        answer = definition.run(problem, arrays)
        for name, x in truth.items():
            with np.errstate(invalid="ignore"):
                total[name] += np.nan_to_num((answer[name] - x) / _STEP, nan=0.0, posinf=0.0, neginf=0.0) ** 2
    chain = math.sqrt(sum(problem.dims.values()))
    unit = profile.accumulate + profile.operands + profile.scores + profile.probabilities + profile.exp_error
    return {name: lam * unit * (chain * np.sqrt(x / _DRAWS) + chain * np.abs(np.nan_to_num(truth[name]))) for name, x in total.items()}
