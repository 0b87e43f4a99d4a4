"""Which backend computes a call.  Only ``"auto"`` chooses; one that is named and cannot is an error that says why."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import catalog, definition, entrywise
from .costs import flops
from .engine import run as engine
from .engine import vectorized
from .engine.learner import run as learner
from .engine.state import run as state
from .engine.state.allocated import allocated as allocated_by_states
from .errors import BackendUnavailableError, ParameterError
from .functions import Aux
from .problem import Problem, split
from .sequences import Paged
from .spec import Dims, Variant

if TYPE_CHECKING:
    from .derivatives import Gradients

NAMES = ("auto", "definition", "cpu", "cuda")


def run(problem: Problem, backend: str, form: str | None = None, homes: Mapping[str, np.ndarray] = MappingProxyType({})) -> dict[str, np.ndarray]:
    """The outputs asked for, by the backend of that name, and in that form of a recurrence.

    Parameters
    ----------
    homes : mapping of str to ndarray
        Carried arrays, by output, that may be overwritten by what is carried after the call, and are then what is returned of that name.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """

    def reason() -> str:
        if backend == "auto" and form is None and _better_defined(problem):
            return "its definition is done before"
        return _room_of(problem.variant).reason_against(problem) or _without_compiler()

    if _chosen(problem, backend, form, reason) == "definition":
        return definition.run(problem)
    room = _room_of(problem.variant)
    if room is learner:
        return learner.run(problem) if problem.sequences is None else definition.joined(problem, map(learner.run, split(problem)))
    if room is engine:
        return engine.run(problem)
    if problem.sequences is None:
        return state.run(problem, form, homes=homes)
    return definition.joined(problem, (state.run(one, form) for one in split(problem)))


def repeated(problem: Problem, backend: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """Of a call that `run` has run: ``out`` as a function of other arrays of its shapes, which updates a state in its place; or None."""
    room = _room_of(problem.variant)
    if problem.sequences is not None or room is learner or (backend == "auto" and _better_defined(problem)) or _without_compiler():
        return None
    again: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = room.repeated(problem)
    return again


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], backend: str, form: str | None = None) -> Gradients:
    """Gradients for cotangents (BHTD) of some outputs, by the backend of that name, and through that form of a recurrence.

    Raises
    ------
    ParameterError, BackendUnavailableError
    """
    from . import derivatives  # SciPy, wanted here only

    _check_gradients(problem, backend)
    room = _room_of(problem.variant)

    def reason() -> str:
        vain = form is not None or vectorized.reason_against_gradients(problem)
        return reason_against_kernels() if vain else ""

    @functools.cache
    def reason_against_kernels() -> str:
        if room is state:
            return state.reason_against_gradients(problem, form) or _without_compiler()
        if room is learner:
            return learner.reason_against_gradients(problem) or _without_compiler()
        return engine.reason_against_gradients(problem, cotangents) or _without_compiler()

    if _chosen(problem, backend, form, reason) == "definition":
        return derivatives.gradients(problem, cotangents)
    if reason_against_kernels():
        of_one = vectorized.gradients
    elif room is learner:
        of_one = learner.gradients
    elif room is state:
        of_one = functools.partial(state.gradients, form=form)
    else:
        return derivatives.Gradients(engine.gradients(problem, cotangents), {})
    if problem.sequences is None:
        return derivatives.Gradients(of_one(problem, cotangents), {})

    def of_part(n: int, one: Problem) -> Mapping[str, np.ndarray]:
        own = derivatives.cotangents_of(problem, n, cotangents)
        empty = of_one is vectorized.gradients and vectorized.reason_against_gradients(one)
        return derivatives.gradients(one, own).values if empty else of_one(one, own)

    return derivatives.Gradients(derivatives.joined(problem, [of_part(n, one) for n, one in enumerate(split(problem))]), {})


def tile_classes(mask_mod: Callable[..., Any], aux: Aux, shape: tuple[int, int, int, int], block: tuple[int, int]) -> np.ndarray:
    """Classes of the tiles of a `BlockMask` of shape (B, Hq, T, S), by the engine unless there is no compiler or little to ask."""
    if math.prod(shape) <= entrywise.PLAIN_ENTRIES or _without_compiler():
        return entrywise.tile_classes(mask_mod, aux, shape, block)
    from .engine.blocks import classes

    return classes(mask_mod, aux, *shape, block)


def of(variant: Variant) -> tuple[str, ...]:
    """The backends that can run a variant, for some of its parameters at least."""
    dims, params = dict.fromkeys(variant.axes, 1), {p.name: p.default for p in variant.params}
    if variant.recurs:
        return ("definition",) if state.reason_against_variant(variant, dims, params) else ("definition", "cpu")
    if _room_of(variant) is learner:
        return ("definition", "cpu")
    plan = None if variant.plan is None else variant.plan(dims, params)
    return ("definition",) if plan is None or engine.reason_against_plan(plan) else ("definition", "cpu")


def gradients_by(variant: Variant) -> str:
    """What differentiates a variant with its defaults: the engine's kernels, its `vectorized` form, or differences of its definition."""
    kernels = "cpu" in of(variant) and (_room_of(variant) is not learner or variant.name in learner.GRADIENTS)
    if kernels and _room_of(variant) is engine and variant.plan is not None:
        dims, params = dict.fromkeys(variant.axes, 1), {p.name: p.default for p in variant.params}
        kernels = not engine.reason_against_gradients_of_plan(variant.plan(dims, params))
    return "kernels" if kernels else "differences" if variant.vectorized is None else "whole arrays"


def allocated(variant: Variant, dims: Dims, params: Mapping[str, Any], itemsize: int) -> dict[str, int]:
    """Bytes that a forward call allocates, by backends other than the definition."""
    if variant.recurs:
        return {} if state.reason_against_variant(variant, dims, params) else {"cpu": allocated_by_states(variant, dims, params, itemsize)}
    plan = None if variant.plan is None else variant.plan(dims, params)
    return {} if plan is None or engine.reason_against_plan(plan) else {"cpu": engine.allocated(plan, dims, itemsize)}


def _room_of(variant: Variant) -> ModuleType:
    """The module that runs a variant, if the engine does."""
    return state if variant.recurs else learner if learner.knows(variant) else engine


def _chosen(problem: Problem, backend: str, form: str | None, reason: Callable[[], str]) -> str:
    _check(problem, backend, form)
    if backend == "cuda":
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cuda' is not part of this version; use 'cpu', 'definition' or 'auto'")
    if backend == "definition":
        return backend
    against = reason()
    if against and form is not None:
        raise BackendUnavailableError(f"{problem.variant.name}: form {form!r} does not run this call: {against}; leave form out")
    if backend == "cpu" and against:
        raise BackendUnavailableError(f"{problem.variant.name}: backend 'cpu' does not run this call: {against}; use 'definition' or 'auto'")
    return "definition" if against else "cpu"


def _better_defined(problem: Problem) -> bool:
    """Whether the definition is the faster one for values: of a tiny call, and of states too narrow for vectors."""
    return _is_tiny(problem) or (problem.variant.recurs and state.has_narrow_states(problem))


def _is_tiny(problem: Problem) -> bool:
    """Whether a definition runs it as plain Python; so many elements need no count of operations."""
    elements = sum(x.size for x in problem.given.values())
    return elements <= definition.PLAIN_PYTHON_FLOPS and flops(problem) <= definition.PLAIN_PYTHON_FLOPS


def _check_gradients(problem: Problem, backend: str) -> None:
    functions, name = problem.functions, problem.variant.name
    if isinstance(problem.sequences, Paged):
        raise ParameterError(f"{name}: no gradients of Paged keys and values, which are a cache; pass them as Packed, or one sequence at a time")
    if functions is not None and functions.score_mod is not None and functions.slope is None and backend in ("auto", "cpu"):
        raise ParameterError(f"{name}: score_mod has no slope; pass slope=..., or backend='definition' to differentiate numerically")


def _without_compiler() -> str:
    import numba

    return "NUMBA_DISABLE_JIT is set, and vectors exist in compiled code only" if numba.config.DISABLE_JIT else ""


def _check(problem: Problem, backend: str, form: str | None) -> None:
    name = problem.variant.name
    if not isinstance(backend, str) or backend not in NAMES:
        raise ParameterError(f"{name}: {catalog.unknown('backend', backend, NAMES)}")
    if form is None:
        return
    if not isinstance(form, str) or form not in state.FORMS:
        raise ParameterError(f"{name}: {catalog.unknown('form', form, state.FORMS)}")
    if not problem.variant.recurs:
        raise ParameterError(f"{name}: form={form!r}; it has no recurrence, and so no forms")
    if backend == "definition":
        raise ParameterError(f"{name}: form={form!r}, but backend='definition' has one form, the loops of its file; use 'cpu' or 'auto'")
