"""From a checked problem to a kernel and back.  A plan that no kernel here runs is refused with the reason, never bent."""

from __future__ import annotations

import os
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
#: Rows of one key-value head up to which keys are read in order, a vector of a key at a time, and not a panel of queries at a time.
FEW_ROWS = 8
#: Positions travel as numbers of the operands' own format.
LONGEST = {np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}


class _Pool:
    """Numba's threads.  Its workqueue layer aborts the process when two callers enter, and its OpenMP layer a forked child that does."""

    def __init__(self) -> None:
        self.started = self.lost = False
        self.one_at_a_time = threading.Lock()

    def after_fork(self) -> None:
        """A child inherits no threads: it computes alone, to the same bits."""
        self.lost = self.lost or self.started
        self.one_at_a_time = threading.Lock()


_pool = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.after_fork)


def reason_against(problem: Problem) -> str:
    """Why the engine does not run a problem; "" where it does."""
    variant, dims = problem.variant, problem.dims
    if variant.plan is None:
        return "it has no plan"
    others = [name for name in problem.returns if name not in OUTPUTS]
    if others:
        return f"it does not return {others[0]}"
    plan, format_ = variant.plan(dims, problem.params), _format(problem)
    against = reason_against_plan(plan)
    if not against and dims["S"] >= LONGEST[format_]:
        return f"S={dims['S']}; in {format_} it takes fewer than {LONGEST[format_]} keys"
    limits = np.finfo(format_)
    for number in (plan.scale, *(x for stage in plan.score_mods for x in stage.numbers)):
        if number and not limits.smallest_normal <= abs(number) <= limits.max:
            return f"{number:g} is beyond {format_}"
    return against


def reason_against_plan(plan: Plan) -> str:
    """Why the engine does not run a plan; "" where it does."""
    similarity = plan.similarity.__name__.rpartition(".")[2]
    if similarity != "dot" or plan.normalizer != "softmax":
        return f"there is no kernel for {plan.normalizer} of {similarity} scores"
    if plan.projections or plan.residual or plan.shift or plan.fill > -np.inf:
        return "there is no kernel for projections, a residual, a shift or filled scores"
    mods = [stage.piece.__name__.rpartition(".")[2] for stage in plan.score_mods]
    return "" if mods in ([], ["softcap"]) else f"there is no kernel for the score modifiers {', '.join(mods)}"


def run(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """The outputs asked for, in float32, or float64 for float64 operands.

    Parameters
    ----------
    problem : Problem
        One that `reason_against` has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    call = _Call(problem)
    call.forward(threads)
    _fill_empty(problem.params.get("empty_rows", "zero"), call.out, call.lse, call.v)
    outputs = {"out": call.out, "lse": call.lse}
    shapes = {o.name: len(o.axes.split()) for o in problem.variant.outputs}
    return {name: outputs[name] if shapes[name] == outputs[name].ndim else outputs[name][:, 0] for name in problem.returns}


class _Call:
    """The arrays of one call as kernels take them: four axes, one format, results to be written."""

    def __init__(self, problem: Problem) -> None:
        assert problem.variant.plan is not None
        self.plan = plan = problem.variant.plan(problem.dims, problem.params)
        self.format = format_ = _format(problem)
        self.q, self.k, self.v = (_rows(problem.given[name], format_) for name in (plan.query, plan.key, plan.value))
        self.bias = _bias(problem, plan, format_)
        self.first, self.last = visible_range(plan, problem.dims)
        sinks = problem.given.get(plan.sinks)
        with np.errstate(over="ignore"):  # beyond the format is infinite
            sinks = None if sinks is None else np.ascontiguousarray(sinks, format_)
        self.sinks = np.full(self.q.shape[1], -np.inf, format_) if sinks is None else sinks
        self.scale, self.cap = format_.type(plan.scale), format_.type(plan.score_mods[0].numbers[0] if plan.score_mods else 0.0)
        self.out, self.lse = np.empty((*self.q.shape[:3], self.v.shape[3]), format_), np.empty(self.q.shape[:3], format_)
        pairs = int((self.last - self.first).sum())
        self.work = self.q.shape[0] * self.q.shape[1] * pairs * (self.q.shape[3] + self.v.shape[3])

    def forward(self, threads: int | None) -> None:
        arguments = (self.q, self.k, self.v, self.bias, self.sinks, self.first, self.last, self.scale, self.cap, self.out, self.lse)
        if not self.lse.size:
            return
        if self.q.shape[2] * (self.q.shape[1] // self.k.shape[1]) <= FEW_ROWS and self.k.shape[2]:
            from . import decode

            _launch(decode.decode, decode.decode_parallel, arguments, self.work, threads)
            return
        from . import forward

        _launch(forward.forward, forward.forward_parallel, arguments, self.work, threads)


def _launch(alone: Any, together: Any, arguments: tuple[Any, ...], work: float, threads: int | None) -> None:
    from .kernels import kernel

    element = arguments[0].dtype
    workers = available_threads() if threads is None else threads
    if workers == 1 or work < PARALLEL_FROM or _pool.lost:
        kernel(alone, element)(*arguments)
        return
    with _pool.one_at_a_time:
        _pool.started = True
        kernel(together, element)(*arguments, workers)


def visible_range(plan: Plan, dims: Dims) -> tuple[np.ndarray, np.ndarray]:
    """First key each query sees and the one after its last, as its structural masks leave them."""
    queries = np.arange(dims["T"])
    first, last = np.zeros_like(queries), np.full_like(queries, dims["S"])
    for stage in plan.masks:
        low, high = stage.piece.span(queries, dims["S"], *stage.numbers)
        first, last = np.maximum(first, low), np.minimum(last, high)
    first = np.minimum(first, dims["S"])  # a window may lie beyond the last key
    return first, np.maximum(last, first)


def _format(problem: Problem) -> np.dtype:
    return np.dtype(np.float64) if problem.dtype == np.float64 else np.dtype(np.float32)


def _rows(x: np.ndarray, format_: np.dtype) -> np.ndarray:
    """With a head axis, in the kernel's format, the last axis contiguous; a copy only where one is needed."""
    x = x[:, None] if x.ndim == 3 else x
    if x.dtype != format_ or not x.dtype.isnative or not x.flags.aligned:
        return x.astype(format_, order="C")  # left to itself a copy keeps the order of a transposed array
    return x if x.shape[3] == 1 or x.strides[3] == x.itemsize else np.ascontiguousarray(x)


def _bias(problem: Problem, plan: Plan, format_: np.dtype) -> np.ndarray:
    """What is added to scores, -inf where a mask hides them, with the axes B Hq T S; no element where there is nothing to add."""
    given: Mapping[str, Any] = problem.given
    parts = [given[name] for name in (plan.bias, plan.mask) if name in given]
    if not parts:
        return np.empty((0, 0, 0, 0), format_)
    bias = given.get(plan.bias)
    with np.errstate(over="ignore"):  # beyond the format is infinite
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
    """What rows that see nothing return; the kernel left them 0, which they are where there are no keys at all."""
    if rule == "zero" or not v.shape[2]:
        return
    empty = np.isneginf(lse)
    if not empty.any():
        return
    group = out.shape[1] // v.shape[1]
    mean = np.repeat(v.mean(axis=2, dtype=np.float64), group, axis=1)
    filler = mean[:, :, None] if rule == "uniform" else np.nan
    np.copyto(out, np.broadcast_to(filler, out.shape).astype(out.dtype), where=empty[..., None])


def available_threads() -> int:
    """What the caller set, or OMP_NUM_THREADS where it says less than Numba."""
    import numba

    limit = os.environ.get("OMP_NUM_THREADS", "")
    available = int(numba.get_num_threads())
    return min(available, int(limit)) if limit.isdecimal() and int(limit) else available


def reason_against_gradients(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> str:
    """Why the engine has no gradients of a problem; "" where it has."""
    others = [name for name in cotangents if name not in OUTPUTS]
    if others:
        return f"there is no kernel for a cotangent of {others[0]}"
    if problem.params.get("empty_rows", "zero") != "zero":
        return "there is no kernel for gradients of rows that see nothing"
    return reason_against(problem)


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
    """Gradients of sum(cotangent * output) by ``d_<operand>``, in the shapes operands were given in (BHTD), float32 or float64.

    Parameters
    ----------
    problem : Problem
        One that `reason_against_gradients` has nothing against.
    cotangents : mapping of str to ndarray
        For ``out``, ``lse`` or both, in their shapes.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    from . import backward

    call = _Call(problem)
    call.forward(threads)
    q, k, v, format_ = call.q, call.k, call.v, call.format
    d_out = _rows(cotangents["out"], format_) if "out" in cotangents else np.zeros_like(call.out)
    d_lse = cotangents["lse"].reshape(call.lse.shape).astype(format_) if "lse" in cotangents else np.zeros_like(call.lse)
    d_q, d_k, d_v = np.zeros(q.shape, format_), np.zeros(k.shape, format_), np.zeros(v.shape, format_)
    wants_bias = call.plan.bias in problem.given
    d_bias = np.zeros((*q.shape[:3], k.shape[2]) if wants_bias else (0, 0, 0, 0), format_)
    deltas = np.zeros(call.lse.shape, format_)
    arguments = (q, k, v, call.bias, call.first, call.last, call.scale, call.cap, call.out, call.lse, d_out, d_lse, d_q, d_k, d_v, d_bias, deltas)
    if q.size and k.size:
        _launch(backward.backward, backward.backward_parallel, arguments, 2.5 * call.work, threads)
    found = {call.plan.query: d_q, call.plan.key: d_k, call.plan.value: d_v}
    if wants_bias:
        found[call.plan.bias] = _summed_to(d_bias, problem.given[call.plan.bias].shape)
    if call.plan.sinks in problem.given:
        with np.errstate(invalid="ignore", over="ignore"):
            share = np.exp(call.sinks[:, None] - call.lse)
        found[call.plan.sinks] = -np.where(np.isneginf(call.lse), 0.0, share * deltas).sum(axis=(0, 2), dtype=np.float64)
    return {"d_" + name: found[name].reshape(x.shape) for name, x in problem.given.items() if name in found}


def _summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over the axes along which an array of that shape was broadcast."""
    lead = x.ndim - len(shape)
    axes = (*range(lead), *(lead + n for n, size in enumerate(shape) if size != x.shape[lead + n]))
    summed: np.ndarray = x.sum(axis=axes, dtype=np.float64) if axes else x
    return summed
