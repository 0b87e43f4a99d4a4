"""From a checked problem to a kernel and back.  A plan that no kernel here runs is refused with the reason, never bent."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..problem import Problem
from ..spec import Dims, Plan

#: Outputs the kernel writes.
OUTPUTS = ("out", "lse")
#: Query-key-channel products from which a second thread pays for being woken.
PARALLEL_FROM = 500_000
#: Positions travel as numbers of the operands' own format.
LONGEST = {np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}

_one_at_a_time = threading.Lock()  # Numba's workqueue layer aborts the process when two threads enter it


def reason_against(problem: Problem) -> str:
    """Why the engine does not run a problem; "" where it does."""
    variant = problem.variant
    if variant.plan is None:
        return "it has no plan"
    others = [name for name in problem.returns if name not in OUTPUTS]
    if others:
        return f"it does not return {others[0]}"
    plan = variant.plan(problem.dims, problem.params)
    if plan.similarity.__name__.rpartition(".")[2] != "dot" or plan.normalizer != "softmax":
        return f"no kernel for {plan.normalizer} of {plan.similarity.__name__.rpartition('.')[2]} scores"
    if plan.projections or plan.residual or plan.shift or plan.fill > -np.inf:
        return "no kernel for its projections, residual, shift or fill"
    mods = [s.piece.__name__.rpartition(".")[2] for s in plan.score_mods]
    if mods not in ([], ["softcap"]):
        return f"no kernel for the score modifiers {', '.join(mods)}"
    if problem.dims["S"] >= LONGEST[_format(problem)]:
        return f"S={problem.dims['S']} is beyond {LONGEST[_format(problem)]} keys in {_format(problem)}"
    return ""


def run(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """The outputs asked for, in float32, or float64 for float64 operands.

    Parameters
    ----------
    problem : Problem
        One that `reason_against` has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    from . import forward

    assert problem.variant.plan is not None
    plan, dims, format_ = problem.variant.plan(problem.dims, problem.params), problem.dims, _format(problem)
    q, k, v = (_rows(problem.given[name], format_) for name in (plan.query, plan.key, plan.value))
    first, last = visible_range(plan, dims)
    heads, n_q = q.shape[1], q.shape[2]
    sinks = problem.given.get(plan.sinks)
    sinks = np.full(heads, -np.inf, format_) if sinks is None else np.ascontiguousarray(sinks, format_)
    cap = plan.score_mods[0].numbers[0] if plan.score_mods else 0.0
    out, lse = np.empty((*q.shape[:3], v.shape[3]), format_), np.empty(q.shape[:3], format_)
    scale = format_.type(plan.scale)
    arguments = (q, k, v, _bias(problem, plan, format_), sinks, first, last, scale, format_.type(cap), out, lse)
    work = q.shape[0] * heads * int(np.maximum(last - first, 0).sum()) * (q.shape[3] + v.shape[3])
    workers = _threads() if threads is None else threads
    if q.shape[0] and n_q:
        if workers == 1 or work < PARALLEL_FROM:
            forward.forward(*arguments)
        else:
            with _one_at_a_time:
                forward.forward_parallel(*arguments, workers)
    _fill_empty(problem.params.get("empty_rows", "zero"), out, lse, v)
    outputs = {"out": out, "lse": lse}
    shapes = {o.name: len(o.axes.split()) for o in problem.variant.outputs}
    return {name: outputs[name] if shapes[name] == outputs[name].ndim else outputs[name][:, 0] for name in problem.returns}


def visible_range(plan: Plan, dims: Dims) -> tuple[np.ndarray, np.ndarray]:
    """First key each query sees and the one after its last, as its structural masks leave them."""
    queries = np.arange(dims["T"])
    first, last = np.zeros_like(queries), np.full_like(queries, dims["S"])
    for stage in plan.masks:
        low, high = stage.piece.span(queries, dims["S"], *stage.numbers)
        first, last = np.maximum(first, low), np.minimum(last, high)
    return first, np.maximum(last, first)


def _format(problem: Problem) -> np.dtype:
    return np.dtype(np.float64) if problem.dtype == np.float64 else np.dtype(np.float32)


def _rows(x: np.ndarray, format_: np.dtype) -> np.ndarray:
    """With a head axis, in the kernel's format, the last axis contiguous; a copy only where one is needed."""
    x = x[:, None] if x.ndim == 3 else x
    if x.dtype != format_ or not x.dtype.isnative or not x.flags.aligned:
        return x.astype(format_)
    return x if x.shape[3] == 1 or x.strides[3] == x.itemsize else np.ascontiguousarray(x)


def _bias(problem: Problem, plan: Plan, format_: np.dtype) -> np.ndarray:
    """What is added to scores, -inf where a mask hides them, with the axes B Hq T S; no element where there is nothing to add."""
    given: Mapping[str, Any] = problem.given
    parts = [given[name] for name in (plan.bias, plan.mask) if name in given]
    if not parts:
        return np.empty((0, 0, 0, 0), format_)
    bias = given.get(plan.bias)
    small = np.zeros((), format_) if bias is None else bias.astype(format_)
    if plan.mask in given:
        small = np.where(given[plan.mask], small, format_.type(-np.inf))
    dims = problem.dims
    axes = [dims.get("B", 1), dims.get("Hq", 1), dims["T"], dims["S"]]
    small = small[:, None] if small.ndim == 3 and "Hq" not in dims else small
    if small.ndim == 0 or small.shape[-1] != dims["S"]:
        small = np.broadcast_to(small, (*small.shape[:-1], dims["S"]))
    return np.broadcast_to(np.ascontiguousarray(small), axes)


def _fill_empty(rule: str, out: np.ndarray, lse: np.ndarray, v: np.ndarray) -> None:
    """What rows that see nothing return; the kernel left them 0."""
    if rule == "zero":
        return
    empty = np.isneginf(lse)
    if not empty.any():
        return
    group = out.shape[1] // v.shape[1]
    mean = np.repeat(v.mean(axis=2, dtype=np.float64), group, axis=1) if v.shape[2] else np.full((*out.shape[:2], v.shape[3]), np.nan)
    filler = mean[:, :, None] if rule == "uniform" else np.nan
    np.copyto(out, np.broadcast_to(filler, out.shape).astype(out.dtype), where=empty[..., None])


@functools.cache
def _threads() -> int:
    import numba

    return int(numba.get_num_threads())
