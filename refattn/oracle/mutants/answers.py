"""What a reading answers, and how far a correct computation of it may stray.

The tolerance is the one of a right kernel (`refattn.oracle.bounds.scored`), with the mutant's own weights, scores, heads and values for the truth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ... import precision
from ...problem import Problem, output_dtype
from ..bounds import spread
from ..bounds.scored import Scored
from ..profiles import Profile
from . import backward
from .evaluation import POSITIVE, THRESHOLDED, Evaluation, divisor_of, forward
from .reading import Reading


@dataclass(frozen=True)
class Answers:
    """The outputs of a reading, and its gradients where cotangents were given, float64 in BHTD.

    Attributes
    ----------
    outputs : mapping of str to ndarray
        Every output of the variant by name, and ``d_<operand>``.
    evaluation : Evaluation
        How they came about.
    """

    outputs: Mapping[str, np.ndarray]
    evaluation: Evaluation
    cotangents: Mapping[str, np.ndarray] = field(default_factory=dict)

    def tolerance(self, profile: Profile, alpha: float, dtypes: Mapping[str, np.dtype] | None = None) -> dict[str, np.ndarray]:
        """Largest error of a correct computation of this reading, by output, but for a chance of alpha in this call."""
        problem = self.evaluation.problem
        lam = spread(sum(self.outputs[name].size for name in problem.returns), alpha)
        with np.errstate(all="ignore"):
            bounds = _bounds(self.evaluation, profile, lam)
            bounds |= backward.bounds(self.evaluation, self.cotangents, self.outputs, profile, lam) if self.cotangents else {}
        own = 2.0 if profile.accumulate <= np.finfo(np.float64).eps else 1.0
        return {
            name: _stored(own * bounds[name].reshape(x.shape), x, (dtypes or {}).get(name) or stored_in(problem, name))
            for name, x in self.outputs.items()
            if name in bounds
        }


def evaluate(
    problem: Problem, changes: Mapping[str, Any], cotangents: Mapping[str, np.ndarray] | None = None, earlier: Problem | None = None
) -> Answers:
    """What a kernel answers that reads the specification with these changes.

    Parameters
    ----------
    problem : Problem
        A dense call of a variant with a plan, without functions of the caller's.
    changes : mapping
        Fields of `Reading` and their values; none of them is the specification.
    cotangents : mapping of str to ndarray, optional
        By output name, BHTD; then gradients are among the outputs, where the variant's backward is known (`backward.knows`).
    earlier : Problem, optional
        The call of the same shapes before this one, for what a kernel may have kept of it.
    """
    found = forward(problem, reading(tuple(sorted(changes.items()))), earlier)
    outputs = dict(found.outputs)
    if cotangents:
        gradients = backward.gradients(found, cotangents)
        for name, x in problem.given.items() if gradients else ():
            if problem.variant.operand(name).kind == "real":  # an operand that an earlier call's stands for has no part in the answer
                d_x = gradients.get("d_" + name, np.zeros(x.shape))
                outputs["d_" + name] = d_x if d_x.shape == x.shape else np.zeros(x.shape)
    return Answers(outputs, found, dict(cotangents or {}))


@functools.lru_cache(maxsize=4096)
def reading(changes: tuple[tuple[str, Any], ...]) -> Reading:
    return Reading(**dict(changes))


def stored_in(problem: Problem, name: str) -> np.dtype:
    """What an output or a gradient is stored in."""
    return problem.given[name[2:]].dtype.newbyteorder("=") if name.startswith("d_") else output_dtype(problem, name)


def _stored(bound: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Error after the result is rounded into its format."""
    target = precision.format_of(dtype)
    magnitude = np.where(np.isfinite(exact), np.abs(exact), 0.0)
    bound = np.where(np.isnan(bound), np.inf, bound)
    return bound + target.unit * (magnitude + bound) + target.tiny


def _bounds(found: Evaluation, profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Errors before the result is stored: those of a right kernel on the rows, weights and scores of this one."""
    reading, outputs = found.reading, {name: x for name, x in found.outputs.items() if not name.startswith("d_")}
    weights = np.nan_to_num(found.weights.p, nan=0.0, posinf=0.0, neginf=0.0)
    held = {name: x for name, x in outputs.items() if name not in ("weights", "scores")}
    headless = "Hq" not in found.problem.dims
    truth = {**held, "weights": weights[:, 0] if headless else weights, "scores": found.scores.s[:, 0] if headless else found.scores.s}
    if "threshold" in truth:
        truth["threshold"] = found.weights.total[..., 0]
    bounds = dict(Scored(_as_read(found), truth, _plan(found, weights), _profile(reading, profile), lam).bounds())
    if reading.function not in ("given", "softmax"):
        bounds |= _of_another_function(found, bounds["scores"], profile, lam)
    if "threshold" in truth and "threshold" not in bounds:
        bounds["threshold"] = np.max(bounds["scores"], axis=-1, initial=0.0) + profile.accumulate * np.abs(np.nan_to_num(truth["threshold"]))
    if "lse" in bounds:
        bounds["lse"] = bounds["lse"] + found.weights.lse_slack
    if "lse" in bounds and reading.lse == "base 2":
        bounds["lse"] = bounds["lse"] / np.log(2.0)
    slack = found.weights.slack
    if not np.isscalar(slack):
        if found.plan.projections:
            slack = np.einsum("bhte,hem->btm", slack, np.abs(found.problem.operands[found.plan.projections[3][0]]))
        bounds["out"] = bounds["out"] + np.reshape(slack, bounds["out"].shape)
    return bounds


def _plan(found: Evaluation, weights: np.ndarray) -> Any:
    """The plan of what was computed, as far as roundings depend on it."""
    plan, reading = found.plan, found.reading
    plan = replace(plan, scale=found.scores.scale)
    if reading.hidden != "skipped":
        plan = replace(plan, fill=reading.fill if reading.hidden == "filled" else np.nan)
    if plan.normalizer in ("softmax", "softmax over queries"):
        more_than_one = weights.sum(-1).max(initial=0.0) > 1 + 1e-9
        return replace(plan, normalizer="softmax over queries" if more_than_one or reading.axis not in ("given", "keys") else plan.normalizer)
    if plan.normalizer == "relu" and reading.denominator != "sum":
        return replace(plan, divisor=divisor_of(found.problem, plan, reading, found.scores))
    return replace(plan, normalizer="softmax") if reading.function == "softmax" else plan


def _of_another_function(found: Evaluation, score_error: np.ndarray, profile: Profile, lam: float) -> dict[str, np.ndarray]:
    """Errors of weights by a function that the variant does not have: what it makes of the errors of the scores, added up."""
    function, s, weights = found.reading.function, found.scores.s, np.nan_to_num(found.weights.p)
    e = np.where(found.scores.seen, np.nan_to_num(score_error), 0.0)
    u = profile.accumulate
    scale = np.ones((*s.shape[:3], 1))
    if function in THRESHOLDED:  # the threshold moves as well
        halves, power, outer, _ = THRESHOLDED[function]
        e = np.max(2 * e, axis=-1, keepdims=True, initial=0.0) + 4 * u * math.sqrt(s.shape[3] + 1) * (1 + np.where(found.scores.seen, np.abs(s), 0.0))

        def weigh(x: np.ndarray) -> np.ndarray:
            return np.asarray(np.maximum(x / halves - found.weights.total, 0.0) ** (power * outer))
    elif function in POSITIVE:
        divisor = divisor_of(found.problem, found.plan, found.reading, found.scores)

        def weigh(x: np.ndarray) -> np.ndarray:
            return np.asarray(POSITIVE[function](x, found.plan.power, divisor))
    else:
        sigmoid = function.startswith("sigmoid")

        def weigh(x: np.ndarray) -> np.ndarray:
            return np.asarray(1.0 / (1.0 + np.exp(-x)) if sigmoid else np.maximum(x, 0.0))

        scale = np.where(found.scores.seen, weigh(s), 0.0).sum(-1, keepdims=True)
    scale = np.where(scale > 0, scale, 1.0)
    at = np.where(found.scores.seen, s, 0.0)
    moved = np.maximum(np.abs(weigh(at + e) - weigh(at)), np.abs(weigh(at - e) - weigh(at))) / scale + 8 * u * weights
    moved = np.where(found.scores.seen, moved, 0.0)
    if function not in POSITIVE and function not in THRESHOLDED:
        moved = moved + weights * moved.sum(-1, keepdims=True)
    v = np.abs(np.where(np.isfinite(found.rows.v), found.rows.v, 0.0))
    summed = lam * (u * math.sqrt(s.shape[3] + 2) + profile.probabilities) * (weights @ v)
    return {"out": moved @ v + summed, "weights": moved + profile.probabilities * weights, "threshold": np.max(e, axis=-1, initial=0.0)}


def _profile(reading: Reading, profile: Profile) -> Profile:
    """The profile with what a reading rounds besides: its roundings are made, but another order of the same ones may come out otherwise."""
    changed = {
        "scores": reading.scores_format or reading.arrays_format,
        "operands": reading.products_format,
        "probabilities": reading.weights_format or reading.arrays_format,
    }
    # two numbers that lie apart by less than a place, on both sides of a tie, are rounded a whole place apart: two unit roundoffs
    units = {name: max(getattr(profile, name), 2 * precision.format_of(form).unit) for name, form in changed.items() if form}
    if changed["probabilities"]:
        units["smallest_probability"] = max(profile.smallest_probability, precision.format_of(changed["probabilities"]).tiny)
    return replace(profile, **units) if units else profile


def _as_read(found: Evaluation) -> Problem:
    """The problem whose keys and values stand once per query head, as they were read."""
    problem, plan, rows = found.problem, found.plan, found.rows
    heads, headless = rows.q.shape[1], "Hq" not in problem.dims
    if plan.query == plan.key:
        return problem
    if plan.projections:
        maps = {n: found.rows.heads for pair in plan.projections[1:3] for n in pair}
        given = {n: x[maps[n]] if n in maps else x for n, x in problem.given.items()}
        return replace(problem, dims={**problem.dims, "Hkv": heads}, given=given)
    given = dict(problem.given)
    for name, x in ((plan.query, rows.q), (plan.key, rows.k), (plan.value, rows.v)):
        given[name] = np.ascontiguousarray(x[:, 0] if headless else x)
    dims = {**problem.dims, **({} if headless else {"Hkv": heads})}
    return replace(problem, dims=dims, given=given)
