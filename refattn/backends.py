"""Which backend computes a call.  Only ``"auto"`` chooses; one that is named and cannot is an error that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from . import catalog, definition
from .costs import flops
from .errors import BackendUnavailableError, ParameterError
from .problem import Problem
from .spec import Variant

if TYPE_CHECKING:
    from .derivatives import Gradients

NAMES = ("auto", "definition", "cpu", "cuda")


def run(problem: Problem, backend: str) -> dict[str, np.ndarray]:
    """The outputs asked for, by the backend of that name.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """

    def reason() -> str:
        if backend == "auto" and flops(problem) <= definition.PLAIN_PYTHON_FLOPS:
            return "plain Python is done before a kernel is loaded"
        from .engine.run import reason_against

        return reason_against(problem)

    if _chosen(problem, backend, reason) == "definition":
        return definition.run(problem)
    from .engine.run import run as on_cpu

    return on_cpu(problem)


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], backend: str) -> Gradients:
    """Gradients for cotangents (float64, BHTD) of some outputs, by the backend of that name.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """
    from . import derivatives  # SciPy, wanted here only

    def reason() -> str:
        from .engine.run import reason_against_gradients

        return reason_against_gradients(problem, cotangents)

    if _chosen(problem, backend, reason) == "definition":
        return derivatives.gradients(problem, cotangents)
    from .engine.run import gradients as on_cpu

    return derivatives.Gradients(on_cpu(problem, cotangents), {})


def of(variant: Variant) -> tuple[str, ...]:
    """The backends that can run a variant, for some of its parameters at least."""
    from .engine.run import reason_against_plan

    plan = None if variant.plan is None else variant.plan(dict.fromkeys(variant.axes, 1), {p.name: p.default for p in variant.params})
    return ("definition",) if plan is None or reason_against_plan(plan) else ("definition", "cpu")


def _chosen(problem: Problem, backend: str, reason: Callable[[], str]) -> str:
    _check(problem, backend)
    if backend == "cuda":
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cuda' is not part of this version; use 'cpu', 'definition' or 'auto'")
    if backend == "definition":
        return backend
    against = reason() or _without_compiler()
    if backend == "cpu" and against:
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cpu' does not run this call: {against}; use 'definition' or 'auto'")
    return "definition" if against else "cpu"


def _without_compiler() -> str:
    import numba

    return "NUMBA_DISABLE_JIT is set, and vectors exist in compiled code only" if numba.config.DISABLE_JIT else ""


def _check(problem: Problem, backend: str) -> None:
    if not isinstance(backend, str) or backend not in NAMES:
        raise ParameterError(f"{problem.variant.name}: {catalog.unknown('backend', backend, NAMES)}")
