"""Gradients of a variant that has no kernel for them: back through its `vectorized` form, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..problem import Problem
from ..spec import Choice, shape
from .tape import Traced, collect, value_of


def in_full(problem: Problem) -> dict[str, np.ndarray]:
    """Operands in float64 or boolean, with every axis; one that was not given is its neutral element."""
    found = {}
    for o in problem.variant.operands:
        x = np.asarray(problem.given.get(o.name, o.absent), bool if o.kind == "boolean" else np.float64)
        found[o.name] = np.broadcast_to(x, shape(o.axes, problem.dims))
    return found


def leaves_of(problem: Problem, own: Mapping[str, np.ndarray]) -> dict[str, Traced]:
    """What is differentiated: operands that were given and are no truth values."""
    return {name: Traced(own[name]) for name in problem.given if own[name].dtype != bool}


def as_given(problem: Problem, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of leaves by ``d_<operand>``, in the shapes operands were given in; of real operands, and 0 where an element is not finite."""
    real = {o.name for o in problem.variant.operands if o.kind == "real"}
    return {"d_" + name: _as_given(problem.given[name], d) for name, d in found.items() if name in real}


def _as_given(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    if d.shape != x.shape:
        d = d.sum(axis=tuple(range(d.ndim - x.ndim)))
        d = d.sum(axis=tuple(n for n, size in enumerate(x.shape) if size == 1 and d.shape[n] != 1), keepdims=True)
    return np.where(np.isfinite(np.asarray(x, np.float64)), d, 0.0)


def reason_against_gradients(problem: Problem) -> str:
    """Why there are no such gradients of a problem; "" where there are."""
    if problem.variant.vectorized is None:
        return "there is no kernel for its gradients"
    if problem.functions is not None:
        return "its gradients know no functions of the caller's"
    return "an axis is empty" if 0 in problem.dims.values() else ""


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of sum(cotangent * output) by ``d_<operand>``, float64, in the shapes operands were given in (BHTD).

    An output that is not finite is a constant.

    Parameters
    ----------
    problem : Problem
        A dense one that `reason_against_gradients` has nothing against.
    cotangents : mapping of str to ndarray
        By output, in their shapes.
    """
    assert problem.variant.vectorized is not None
    own = in_full(problem)
    leaves = leaves_of(problem, own)
    with np.errstate(all="ignore"):
        found = problem.variant.vectorized({**own, **leaves}, params_of(problem))
    seeds = [(y, np.where(np.isfinite(value_of(y)), cotangents[name], 0.0)) for name, y in found.items() if name in cotangents]
    return as_given(problem, collect(seeds, leaves))


def params_of(problem: Problem) -> dict[str, Any]:
    """Parameters as a definition receives them, but for choices, which stay what they are called."""
    params = problem.params
    return {p.name: params[p.name] if isinstance(p.kind, Choice) else p.encode(params[p.name], problem.dims) for p in problem.variant.params}
