"""Which problems the engine runs, and running them.  A plan that no kernel here runs is refused with the reason, never bent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..problem import Problem, sequence_dims
from ..spec import Dims, Plan

#: Positions travel as numbers of the operands' own format.
LONGEST = {np.dtype(np.float32): 2**24, np.dtype(np.float64): 2**53}
#: Normalisers there are kernels for, and what each writes beside `out`.
STATISTICS = {"softmax": "lse", "sigmoid": "", "relu": "", "sparsemax": "threshold", "entmax15": "threshold"}


def format_of(problem: Problem) -> np.dtype:
    """What kernels compute a problem in."""
    return np.dtype(np.float64) if problem.dtype == np.float64 else np.dtype(np.float32)


def plans(problem: Problem) -> list[Plan]:
    """The plan of every sequence."""
    assert problem.variant.plan is not None
    return [problem.variant.plan(dims, problem.params) for dims in sequence_dims(problem)]


def reason_against(problem: Problem) -> str:
    """Why the engine does not run a problem; "" where it does."""
    plan = problem.plan
    if plan is None:
        return "it has no plan"
    return reason_against_plan(plan) or _reason_against_outputs(problem, plan) or reason_against_numbers(problem, plan)


def reason_against_plan(plan: Plan) -> str:
    """Why the engine does not run a plan; "" where it does."""
    similarity = similarity_of(plan)
    if similarity not in ("dot", "cosine", "bilinear") or plan.normalizer not in STATISTICS:
        return f"there is no kernel for {plan.normalizer} of {similarity} scores"
    if plan.projections or plan.fill > -np.inf or (plan.shift and plan.normalizer != "sigmoid"):
        return "there is no kernel for projections, a shift or filled scores"
    mods = [stage.piece.__name__.rpartition(".")[2] for stage in plan.score_mods]
    return "" if mods in ([], ["softcap"]) else f"there is no kernel for the score modifiers {', '.join(mods)}"


def similarity_of(plan: Plan) -> str:
    """The name of a plan's similarity."""
    return plan.similarity.__name__.rpartition(".")[2]


def reason_against_gradients_of_plan(plan: Plan) -> str:
    """Why the engine has no gradients of a plan that it runs; "" where it has."""
    similarity = similarity_of(plan)
    return "" if similarity == "dot" and not plan.residual else f"there is no kernel for gradients of {similarity} scores, or of a residual"


def reason_against_gradients(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> str:
    """Why the engine has no gradients of a problem; "" where it has."""
    others = [name for name in cotangents if name not in ("out", "lse")]
    if others:
        return f"there is no kernel for a cotangent of {others[0]}"
    if problem.params.get("empty_rows", "zero") != "zero":
        return "there is no kernel for gradients of rows that see nothing"
    return reason_against(problem) or ("" if problem.plan is None else reason_against_gradients_of_plan(problem.plan))


def _reason_against_outputs(problem: Problem, plan: Plan) -> str:
    others = [name for name in problem.returns if name not in ("out", STATISTICS[plan.normalizer])]
    return f"it does not return {others[0]}" if others else ""


def reason_against_numbers(problem: Problem, plan: Plan) -> str:
    """What of a problem's sizes and of its plan's numbers the kernels' format does not hold; "" where it holds all."""
    format_ = format_of(problem)
    n_keys = problem.dims.get("S", problem.dims["T"])
    if n_keys >= LONGEST[format_]:
        return f"S={n_keys}; in {format_} it takes fewer than {LONGEST[format_]} keys"
    if problem.sequences is not None:
        if problem.params.get("empty_rows", "zero") == "uniform":
            return "there is no kernel for the mean of a sequence's values"
        if len({(one.scale, one.shift, one.divisor) for one in plans(problem)}) > 1:
            return "its numbers differ from sequence to sequence"
    limits = np.finfo(format_)
    for number in (plan.scale, plan.divisor, *(x for stage in plan.score_mods for x in stage.numbers)):
        if number and not float(limits.smallest_normal) <= abs(number) <= float(limits.max):
            return f"{number:g} is beyond {format_}"
    return ""


def allocated(plan: Plan, dims: Dims, itemsize: int) -> int:
    """Bytes of arrays that a forward call allocates for operands of that itemsize: output, each row's statistic, rounded output, mapped queries.

    The threads' own room for a block and a tile is not counted: it does not grow with the sequences, but for the scores of some dozen rows where a
    normaliser takes whole rows.
    """
    kernel, rows = max(itemsize, 4), dims.get("B", 1) * dims.get("Hq", 1) * dims["T"]
    width = dims.get("E", dims["D"])
    out, statistic, rounded = kernel * rows * width, kernel * rows, itemsize * rows * width if itemsize < kernel else 0
    mapped = {"dot": 0, "cosine": dims.get("D", 0), "bilinear": dims.get("Dk", 0)}[similarity_of(plan)]
    return out + max(kernel * rows * mapped + statistic, rounded)  # the one is gone when the other is made


def run(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """The outputs asked for, in float32, or float64 for float64 operands.

    Parameters
    ----------
    problem : Problem
        One that `reason_against` has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.

    Raises
    ------
    ParameterError
        A function of the caller's does not compile, or raises.
    """
    call = _loaded().Call(problem, threads)
    call.forward()
    outputs = {"out": call.out, STATISTICS[call.plan.normalizer]: call.lse}
    heads = "Hq" in problem.dims
    return {name: outputs[name] if heads else outputs[name][:, 0] for name in problem.returns}


def repeated(problem: Problem) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """``out`` as a function of other operands of a problem's shapes, formats and strides, by name; None where more is to be done than to read them.

    Parameters
    ----------
    problem : Problem
        A dense one.
    """
    plan, format_ = problem.plan, format_of(problem)
    if plan is None or problem.functions is not None or problem.returns != ("out",) or problem.params.get("empty_rows", "zero") != "zero":
        return None
    operands = {plan.query, plan.key, plan.value}
    if similarity_of(plan) != "dot" or plan.residual:
        return None
    plain = problem.dtype == format_ and problem.given.keys() == operands and all(x.ndim == 4 and x.dtype == format_ for x in problem.given.values())
    return _loaded().Repeated(problem) if plain and 0 not in problem.dims.values() and not reason_against(problem) else None


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

    Raises
    ------
    ParameterError
        A function of the caller's does not compile, or raises.
    """
    call = _loaded().Call(problem, threads)
    call.forward()
    return call.backward(cotangents.get("out"), cotangents.get("lse"))


@functools.cache
def _loaded() -> Any:
    """The module that compiles, which nobody who only asks should wait for."""
    from . import call

    return call
