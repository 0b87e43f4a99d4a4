"""Operands as kernels take them, C-contiguous and in one format, and the arrays that results are written to."""

from __future__ import annotations

import numpy as np

from ...problem import Problem
from ...spec import shape
from ..run import format_of


def whole(problem: Problem, *names: str) -> tuple[np.ndarray, ...]:
    """Operands in the kernels' format; one that was not given is its neutral element, everywhere."""
    return tuple(_whole(problem, name) for name in names)


def carried(problem: Problem, *names: str) -> tuple[np.ndarray, ...]:
    """What is carried before the first token, by the names of outputs, in arrays to be overwritten with what is carried then."""
    return tuple(np.array(x) for x in whole(problem, *("initial_" + name for name in names)))


def results(problem: Problem, *names: str) -> tuple[np.ndarray, ...]:
    """Outputs, to be filled."""
    axes = {o.name: o.axes for o in problem.variant.outputs}
    return tuple(np.zeros(shape(axes[name], problem.dims), format_of(problem)) for name in names)


def positions(problem: Problem) -> np.ndarray:
    """Tokens before the first, of every sequence."""
    given = problem.given.get("initial_position")
    return np.zeros(problem.dims["B"], np.int64) if given is None else given.astype(np.float64).astype(np.int64)


def _whole(problem: Problem, name: str) -> np.ndarray:
    operand, format_ = problem.variant.operand(name), format_of(problem)
    if name not in problem.given:
        return np.full(shape(operand.axes, problem.dims), operand.absent, format_)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.require(problem.given[name], format_, ["C", "ALIGNED"])
