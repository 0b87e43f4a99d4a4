"""Which backend computes a call.  Only ``"auto"`` chooses; one that is named and cannot is an error that says why."""

from __future__ import annotations

import numpy as np

from . import catalog, definition
from .costs import flops
from .errors import BackendUnavailableError, ParameterError
from .problem import Problem

NAMES = ("auto", "definition", "cpu", "cuda")


def run(problem: Problem, backend: str) -> dict[str, np.ndarray]:
    """The outputs asked for, by the backend of that name.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """
    return definition.run(problem) if _chosen(problem, backend) == "definition" else _engine(problem)


def choose_backward(problem: Problem, backend: str) -> None:
    """Refuse a backend that has no gradients.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """
    _check(problem, backend)
    if backend in ("cpu", "cuda"):
        raise BackendUnavailableError(f"{problem.variant.name}: backend {backend!r} has no gradients in this version; use 'definition' or 'auto'")


def _chosen(problem: Problem, backend: str) -> str:
    _check(problem, backend)
    if backend == "cuda":
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cuda' is not part of this version; use 'cpu', 'definition' or 'auto'")
    if backend == "definition" or (backend == "auto" and flops(problem) <= definition.PLAIN_PYTHON_FLOPS):
        return "definition"
    from .engine.run import reason_against

    reason = reason_against(problem)
    if backend == "cpu" and reason:
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cpu' does not run this call: {reason}; use 'definition' or 'auto'")
    return "definition" if reason else "cpu"


def _check(problem: Problem, backend: str) -> None:
    if not isinstance(backend, str) or backend not in NAMES:
        raise ParameterError(f"{problem.variant.name}: {catalog.unknown('backend', backend, NAMES)}")


def _engine(problem: Problem) -> dict[str, np.ndarray]:
    from .engine.run import run as run_on_cpu

    return run_on_cpu(problem)
