"""Which problems the learner engine runs, and running them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Variant
from ..run import format_of

#: The module that computes each variant that is known here, and those modules that have kernels of their own.
MODULES = {
    **{name: name for name in ("forgetting", "infini", "log_linear", "mesa", "momentum_delta", "titans", "ttt_linear", "ttt_mlp")},
    **dict.fromkeys(("aft_full", "aft_local", "article_sdpa", "efficient_additive", "fastformer"), "whole_arrays"),
}
COMPILED = ("infini", "log_linear", "mesa", "momentum", "ttt_linear", "ttt_mlp")
#: Those variants that have kernels for gradients too.
GRADIENTS = ("forgetting",)


def knows(variant: Variant) -> bool:
    """Whether a module here computes a variant."""
    return variant.name in MODULES


def reason_against(problem: Problem) -> str:
    """Why the engine does not run a problem of a variant it knows; "" where it does."""
    module, format_ = module_of(problem.variant), format_of(problem)
    limits = np.finfo(format_)
    for name, x in problem.params.items():
        if isinstance(x, float) and x and not float(limits.smallest_normal) <= abs(x) <= float(limits.max):
            return f"{name}={x:g} is beyond {format_}"
    return str(module.reason_against(problem)) if hasattr(module, "reason_against") else ""


def reason_against_gradients(problem: Problem) -> str:
    """Why the engine has no gradients of a problem of a variant it knows; "" where it has."""
    return reason_against(problem) if problem.variant.name in GRADIENTS else "there is no kernel for its gradients"


def run(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """The outputs asked for, in float32, or float64 for float64 operands.

    Parameters
    ----------
    problem : Problem
        A dense one that `reason_against` has nothing against.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    found: dict[str, Any] = module_of(problem.variant).outputs(problem, threads)
    return {name: found[name] for name in problem.returns}


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], threads: int | None = None) -> dict[str, np.ndarray]:
    """Gradients of sum(cotangent * output) by ``d_<operand>``, in the shapes operands were given in (BHTD), float32 or float64.

    Parameters
    ----------
    problem : Problem
        A dense one that `reason_against_gradients` has nothing against.
    cotangents : mapping of str to ndarray
        By output, in their shapes.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    """
    found: dict[str, np.ndarray] = module_of(problem.variant).gradients(problem, cotangents, threads)
    return found


def module_of(variant: Variant) -> ModuleType:
    """The module that computes a variant."""
    return importlib.import_module("." + MODULES[variant.name], __package__)
