"""Rounding errors of a variant nobody has analysed: how its definition answers to operands perturbed by a unit roundoff.

A backward-stable algorithm returns the exact result of operands that are off by a few roundings.  Each real operand is perturbed, every
element by a random sign, several times; the root mean square of the answers, scaled by the square root of the longest chain of roundings,
stands for one standard deviation.  This is statistical only, and says nothing about an algorithm that is not backward stable.

What leaves the format on the way, and comes back, shows in no operand and in no answer: of that nothing is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ... import definition, derivatives
from ...problem import Problem
from ..profiles import Profile
from .bound import distance

_DRAWS = 8
_STEP = 2.0**-26  # far above float64's own rounding, far below where the definition bends


def perturbed(problem: Problem, truth: Mapping[str, np.ndarray], profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Largest error of every output."""
    rng = np.random.default_rng(0)

    def answer() -> Mapping[str, np.ndarray]:
        arrays = tuple(_moved(rng, x) if o.kind == "real" else x for o, x in zip(problem.variant.operands, problem.arrays, strict=True))
        return definition.run(problem, arrays)

    return _errors(problem, truth, answer, profile, lam, _DRAWS)


def perturbed_gradients(
    problem: Problem, cotangents: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], profile: Profile, lam: float
) -> dict[str, np.ndarray]:
    """Largest error of every gradient, from cotangents perturbed as operands are.

    What cancels exactly whatever the operands are (a softmax of one key) answers to no perturbation, and not in rounded arithmetic: each
    gradient has besides the roundings of sum(cotangent * output), over the size of its operand.
    """
    rng = np.random.default_rng(0)

    def answer() -> Mapping[str, np.ndarray]:
        given = {name: _moved(rng, x) if problem.variant.operand(name).kind == "real" else x for name, x in problem.given.items()}
        moved = replace(problem, given=given)
        return derivatives.gradients(moved, {name: _moved(rng, x) for name, x in cotangents.items()}).values

    with_stored = replace(profile, operands=profile.operands + profile.gradient_weights + profile.gradient_scores)
    found = _errors(problem, truth, answer, with_stored, lam, _DRAWS // 2)  # each is differentiated numerically
    outputs = definition.run(problem)
    with np.errstate(invalid="ignore"):
        terms = math.sqrt(sum(float(np.sum(np.nan_to_num(x * outputs[name], posinf=0.0, neginf=0.0) ** 2)) for name, x in cotangents.items()))
    return {name: x + lam * _unit(with_stored) * terms / _size(problem.given[name[2:]]) for name, x in found.items()}


def _size(x: np.ndarray) -> float:
    """Root mean square of what is finite."""
    finite = x.astype(np.float64)[np.isfinite(x.astype(np.float64))]
    return math.sqrt(float(np.mean(finite**2))) or 1.0 if finite.size else 1.0


def _unit(profile: Profile) -> float:
    return profile.accumulate + profile.operands + profile.scores + profile.probabilities + profile.exp_error


def _moved(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype(np.float64) * (1 + _STEP * rng.choice((-1.0, 1.0), x.shape)))


def _errors(
    problem: Problem, truth: Mapping[str, np.ndarray], answer: Callable[[], Mapping[str, np.ndarray]], profile: Profile, lam: float, draws: int
) -> dict[str, np.ndarray]:
    roots = {name: np.zeros_like(x) for name, x in truth.items()}  # of mean squares; squares themselves may leave float64
    for _ in range(draws):
        moved = answer()
        for name, x in truth.items():
            roots[name] = np.hypot(roots[name], distance(moved[name], x) / _STEP / math.sqrt(draws))
    chain = math.sqrt(sum(problem.dims.values()))
    size = {name: np.where(np.isfinite(x), np.abs(x), 0.0) for name, x in truth.items()}
    return {name: lam * _unit(profile) * chain * (x + size[name]) for name, x in roots.items()}
