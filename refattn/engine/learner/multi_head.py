"""Multi-head attention with its projections by the kernels of softmax, between products of NumPy's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Dims, Plan, Variant
from ..call import Call
from ..run import format_of, reason_against_numbers

#: Tokens, their map and what is added, by the operand of softmax that they become.
PROJECTIONS = {"q": ("query", "w_q", "b_q"), "k": ("key", "w_k", "b_k"), "v": ("value", "w_v", "b_v")}


def reason_against(problem: Problem) -> str:
    """Why the kernels do not run a problem; "" where they do."""
    if "weights" in problem.returns:
        return "it does not return weights"
    planned = replace(problem, variant=_between_projections(problem.variant))
    assert planned.plan is not None
    return reason_against_numbers(planned, planned.plan)


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """``out`` of a dense problem, in float32 or float64; it does not depend on the number of the engine's threads."""
    x = _in_format(problem)
    call = Call(_as_softmax(problem, x), threads)
    call.forward()
    return {"out": side_by_side(call.out) @ _flat(x["w_o"]) + x.get("b_o", 0)}


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
    """Gradients by ``d_<operand>``, for a cotangent of ``out``."""
    x = _in_format(problem)
    d_out = cotangents["out"].astype(x["query"].dtype)
    call = Call(_as_softmax(problem, x), threads)
    call.forward()
    of_heads = call.backward(d_out[:, None] @ x["w_o"].swapaxes(1, 2))
    found = {"w_o": _over_tokens(call.out, np.broadcast_to(d_out[:, None], (*call.out.shape[:3], d_out.shape[2]))), "b_o": d_out.sum(axis=(0, 1))}
    for inner, (tokens, weight, bias) in PROJECTIONS.items():
        d = of_heads["d_" + inner]
        found[tokens] = side_by_side(d) @ _flat(x[weight].swapaxes(1, 2))
        found[weight] = _over_tokens(np.broadcast_to(x[tokens][:, None], (*d.shape[:3], x[tokens].shape[2])), d)
        found[bias] = d.sum(axis=(0, 2))
    return {"d_" + name: d for name, d in found.items() if name in problem.given}


def _in_format(problem: Problem) -> dict[str, np.ndarray]:
    """Operands as kernels compute, but for the mask."""
    return {name: a if a.dtype == bool else a.astype(format_of(problem), copy=False) for name, a in problem.given.items()}


def _as_softmax(problem: Problem, x: Mapping[str, np.ndarray]) -> Problem:
    """Softmax of the heads' queries, keys and values."""
    given = {}
    for inner, (tokens, weight, bias) in PROJECTIONS.items():
        given[inner] = x[tokens][:, None] @ x[weight]
        if bias in x:
            given[inner] += x[bias][:, None]
    if "mask" in x:
        given["mask"] = x["mask"]
    return replace(problem, variant=_between_projections(problem.variant), given=given)


@functools.cache
def _between_projections(variant: Variant) -> Variant:
    """The variant without its projections."""
    whole = variant.plan
    assert whole is not None

    def plan(dims: Dims, params: Mapping[str, Any]) -> Plan:
        return replace(whole(dims, params), query="q", key="k", value="v", projections=())

    return replace(variant, plan=plan)


def side_by_side(heads: np.ndarray) -> np.ndarray:
    """B H T E as B T H*E."""
    batch, n_heads, n, width = heads.shape
    return heads.swapaxes(1, 2).reshape(batch, n, n_heads * width)


def _flat(weight: np.ndarray) -> np.ndarray:
    """H E M as H*E M."""
    return weight.reshape(-1, weight.shape[2])


def _over_tokens(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each head's sum over entries of the batch and tokens of a^T b."""
    return (a.swapaxes(2, 3) @ b).sum(axis=0)
