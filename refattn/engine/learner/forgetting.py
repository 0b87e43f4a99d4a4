"""Forgetting attention by the kernels of softmax, with a function of scores that adds the gates between a key and a query.

What lies between is the difference of two running sums.  They are kept as sums of two float64 each, so that a difference is exact to about its own
last bit, however long the sequence; float32 needs the first alone.  Gates of -inf are left out of the sums and counted: they hide a key from a query
that has another number of them behind it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...functions import Functions
from ...pieces.masks import causal
from ...pieces.similarities import dot
from ...problem import Problem
from ...spec import Dims, Plan, Stage, Variant
from ..call import Call
from ..run import format_of, reason_against_numbers

#: Beyond it scores might overflow.
LARGEST = {np.dtype(np.float32): 1e37, np.dtype(np.float64): 1e300}


def reason_against(problem: Problem) -> str:
    """Why the kernels do not run a problem; "" where they do."""
    planned = replace(problem, variant=_planned(problem.variant, ""))
    assert planned.plan is not None
    if reason := reason_against_numbers(planned, planned.plan):
        return reason
    gate, largest = problem.given["gate"].astype(np.float64), LARGEST[format_of(problem)]
    gate[gate == -np.inf] = 0.0
    return "" if np.abs(gate).sum() <= largest else f"its gates are NaN, infinite, or sum to more than {largest:g}"


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    call = Call(_as_softmax(problem), threads)
    call.forward()
    return {"out": call.out, "lse": call.lse}


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
    """Gradients by ``d_<operand>``, for cotangents of ``out``, ``lse`` or both.

    A gate is in the scores of queries from its token on with keys before it: all scores of those queries, less those with keys from its token on,
    which no other query sees.  So its gradient is a sum over tokens from it on, of a row's scores' gradients less a column's.  A row's sum to
    d_lse; a column's are what a bias of keys would get.
    """
    shape = (*problem.given["gate"].shape[:2], 1, problem.dims["S"])
    columns = {**problem.given, "columns": np.zeros(shape, problem.dtype)}
    call = Call(_as_softmax(replace(problem, given=columns), slope=straight), threads)
    call.forward()
    found = call.backward(cotangents.get("out"), cotangents.get("lse"))
    of_tokens = -found.pop("d_columns")[:, :, 0].astype(np.float64)
    n_q = min(problem.dims["T"], problem.dims["S"])  # those before the first key see nothing
    if "lse" in cotangents and n_q:
        of_tokens[..., -n_q:] += cotangents["lse"][..., -n_q:]
    d_gate = np.cumsum(of_tokens[..., ::-1], axis=-1)[..., ::-1]
    d_gate[..., :1] = 0.0
    return {**found, "d_gate": np.where(np.isneginf(problem.given["gate"].astype(np.float64)), 0.0, d_gate)}


def _as_softmax(problem: Problem, slope: Callable[..., Any] | None = None) -> Problem:
    """Softmax of the same queries, keys and values with a function of scores."""
    gate = problem.given["gate"].astype(np.float64)
    closed = gate == -np.inf
    high, low = running_sums(np.where(closed, 0.0, gate))
    before = np.array([problem.dims["S"] - problem.dims["T"]])
    score_mod, sums = (faded_closely, (high, low, before)) if problem.dtype == np.float64 else (faded, (high, before))
    mask_mod, counts = (as_many_closed, (np.cumsum(closed, axis=-1), before)) if closed.any() else (None, ())
    functions = Functions(score_mod=score_mod, slope=slope, mask_mod=mask_mod, score_aux=sums, mask_aux=counts)
    return replace(problem, variant=_planned(problem.variant, "columns" if "columns" in problem.given else ""), functions=functions)


@functools.cache
def _planned(variant: Variant, bias: str) -> Variant:
    """The variant with a plan, of all but its gates."""

    def plan(dims: Dims, params: Mapping[str, Any]) -> Plan:
        scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
        return Plan(similarity=dot, scale=scale, masks=(Stage(causal, (dims["S"] - dims["T"],)),), bias=bias)

    return replace(variant, plan=plan)


# ---- functions of scores; query i stands at key i + before ------------------------------------------------------------------------


def faded(score: Any, b: Any, h: Any, i: Any, j: Any, sums: Any, before: Any) -> Any:
    at = max(i + before[0], 0)  # queries before the first key see nothing
    return score + (sums[b, h, at] - sums[b, h, j])


def faded_closely(score: Any, b: Any, h: Any, i: Any, j: Any, high: Any, low: Any, before: Any) -> Any:
    at = max(i + before[0], 0)
    return score + ((high[b, h, at] - high[b, h, j]) + (low[b, h, at] - low[b, h, j]))


def straight(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 1.0


def as_many_closed(b: Any, h: Any, i: Any, j: Any, counts: Any, before: Any) -> Any:
    return counts[b, h, max(i + before[0], 0)] == counts[b, h, j]


# ---- sums ------------------------------------------------------------------------------------------------------------------------


def running_sums(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running sums along the last axis, each as the nearest float64 and what it lacks: inside stretches first, then of stretches."""
    n = x.shape[-1]
    length = math.isqrt(max(n - 1, 0)) + 1
    stretches = np.zeros((*x.shape[:-1], -(-n // length) * length))
    stretches[..., :n] = x
    high, low = _scanned(stretches.reshape(*x.shape[:-1], -1, length))
    ends, rests = _scanned(high[..., -1], low[..., -1])
    before = ([(0, 0)] * (ends.ndim - 1)) + [(1, 0)]
    high, low = _plus(high, low, *(np.pad(one, before)[..., :-1, None] for one in (ends, rests)))
    high, low = (np.ascontiguousarray(one.reshape(*x.shape[:-1], -1)[..., :n]) for one in (high, low))
    return high, low


def _scanned(x: np.ndarray, rest: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    high, low = np.array(x), np.zeros_like(x) + rest
    for n in range(1, x.shape[-1]):
        high[..., n], low[..., n] = _plus(high[..., n - 1], low[..., n - 1], high[..., n], low[..., n])
    return high, low


def _plus(a: np.ndarray, a_rest: np.ndarray, b: np.ndarray, b_rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of two sums of two (Knuth, TAOCP 4.2.2: the error of an addition is a float64 number)."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b) + (a_rest + b_rest)
    high = total + error
    return high, error - (high - total)
