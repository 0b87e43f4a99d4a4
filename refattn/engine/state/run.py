"""Which problems the state engine runs, in which form, and running them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ...errors import BackendUnavailableError
from ...problem import Problem
from ...spec import Dims, Recurrence, Reduction, Variant
from .lowered import places_of

FORMS = ("recurrent", "quadratic", "chunked")


def reason_against(problem: Problem) -> str:
    """Why the engine does not run a problem; "" where it does."""
    if problem.reduction is not None:
        return _reason_against_passes(problem.reduction)
    rule = problem.recurrence
    if rule is None:
        return "it has no recurrence"
    others = [name for name in problem.returns if name not in ("out", *_carried(rule))]
    return _reason_against_rule(rule) or _reason_against_carried(problem.variant, rule) or (f"it does not return {others[0]}" if others else "")


def reason_against_variant(variant: Variant, dims: Dims, params: Mapping[str, Any]) -> str:
    """Why the engine does not run a variant with such parameters; "" where it does."""
    reduction = None if variant.reduction is None else variant.reduction(dims, params)
    if reduction is not None:
        return _reason_against_passes(reduction)
    if variant.recurrence is None:
        return "it has no recurrence"
    rule = variant.recurrence(dims, params)
    return _reason_against_rule(rule) or _reason_against_carried(variant, rule)


def _reason_against_passes(reduction: Reduction) -> str:
    return next(filter(None, (_reason_against_rule(one.recurrence) for one in reduction.passes)), "")


def _reason_against_rule(rule: Recurrence) -> str:
    if rule.exclusive and rule.input_gate:
        return "there is no kernel for an exclusive read with an input gate"
    if not rule.causal and (rule.log_decay or rule.exclusive or any(w.erase for w in rule.writes)):
        return "there is no kernel for what fades or erases and is not causal"
    if len({w.old for w in rule.writes if w.erase}) > 1:
        return "there is no kernel for erasures of which some read the state before the token"
    if rule.log_value_decay and (rule.exclusive or not rule.causal or rule.normalizer or rule.input_gate or any(w.old for w in rule.writes)):
        return (
            "there is no kernel for columns that fade beside an exclusive read, an old erasure, a normaliser or an input gate, or without causality"
        )
    if rule.steps and len(rule.writes) > 1:
        return "there is no kernel for several writes of several steps"
    return ""


def _reason_against_carried(variant: Variant, rule: Recurrence) -> str:
    known = {o.name for o in variant.operands}
    unknown = [name for name in (rule.initial, rule.mass, rule.maximum) if name not in known and name.removeprefix("initial_") in variant.carried]
    return f"there is no operand {unknown[0]}" if unknown else ""


def has_narrow_states(problem: Problem) -> bool:
    """Whether all states of a problem have one column, or one and its mass: nothing for vectors to work along, so that its definition is faster."""
    if problem.reduction is not None:
        rules = [(one.recurrence, one.axes) for one in problem.reduction.passes]
    else:
        axes = {o.name: o.axes for o in problem.variant.operands}
        rules = [(problem.recurrence, axes)] if problem.recurrence is not None else []
    return all(_columns(rule, axes, problem.dims) <= 2 for rule, axes in rules)


def _columns(rule: Recurrence, axes: Mapping[str, str], dims: Dims) -> float:
    """Columns of a recurrence's states; infinite where only its operands say."""
    others = places_of(rule.heads, rule.steps)
    names = [f if isinstance(f, str) else f.operand for write in rule.writes for f in write.value]
    widths = [[int(axis) if axis.isdecimal() else dims.get(axis, math.inf) for axis in axes[name].split() if axis not in others] for name in names]
    return max((math.prod(sizes) for sizes in widths), default=1)


def reason_against_gradients(problem: Problem, form: str | None) -> str:
    """Why the engine has no gradients of a problem; "" where it has."""
    if form == "quadratic":
        return "the quadratic form has no gradients"
    against = reason_against(problem)
    if not against and problem.recurrence is not None and any(_is_zero(problem, name) for name in _logarithms(problem.recurrence)):
        return "the logarithm of a decay of 0 has no slope"
    return against


def run(
    problem: Problem, form: str | None = None, threads: int | None = None, homes: Mapping[str, np.ndarray] = MappingProxyType({})
) -> dict[str, np.ndarray]:
    """The outputs asked for, in float32, or float64 for float64 operands.

    Parameters
    ----------
    problem : Problem
        A dense one that `reason_against` has nothing against.
    form : {"recurrent", "quadratic", "chunked"}, optional
        The fastest unless said.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.
    homes : mapping of str to ndarray
        Carried arrays that may be overwritten by what is carried then.  A state is where it can be, which spares a copy, and the array returned.

    Raises
    ------
    BackendUnavailableError
        That form cannot express the problem.
    """
    if problem.reduction is not None:
        return _loaded().Reduced(problem).outputs(functools.partial(run, form=form, threads=threads))
    lowering = _loaded().Lowering(problem)
    how = _form(problem, lowering.lowered, form)
    home = lowering.home(homes) if how is _loaded().recurrent else None
    if home is None:
        found = lowering.outputs(*how.forward(lowering.lowered, threads))
    else:
        name, state = home
        found = {**lowering.outputs(how.advance(lowering.lowered, state, threads), state), name: homes[name]}
    return {name: found[name] for name in problem.returns}


def repeated(problem: Problem) -> Callable[[Mapping[str, np.ndarray]], np.ndarray] | None:
    """What queries read, as a function of operands by name like the problem's, which updates the state in its place; None where that is not enough.

    Parameters
    ----------
    problem : Problem
        A dense one that has been run.
    """
    return None if reason_against(problem) else _loaded().repeated(problem)


def gradients(problem: Problem, cotangents: Mapping[str, np.ndarray], form: str | None = None, threads: int | None = None) -> dict[str, np.ndarray]:
    """Gradients of sum(cotangent * output) by ``d_<operand>``, in the shapes operands were given in (BHTD).

    Parameters
    ----------
    problem : Problem
        A dense one that `reason_against_gradients` has nothing against.
    cotangents : mapping of str to ndarray
        By output, in their shapes.
    form : {"recurrent", "chunked"}, optional
        The fastest unless said.
    threads : int, optional
        As many as Numba uses, unless said.  The result does not depend on it.

    Raises
    ------
    BackendUnavailableError
        That form cannot express the problem.
    """
    if problem.reduction is not None:
        forward, backward = (functools.partial(one, form=form, threads=threads) for one in (run, gradients))
        return _loaded().Reduced(problem, trace=True).gradients(cotangents, forward, backward)
    lowering = _loaded().Lowering(problem)
    how = _form(problem, lowering.lowered, form)
    outputs = how.forward(lowering.lowered, threads) if lowering.needs_outputs else None
    found: dict[str, np.ndarray] = lowering.gradients(how.backward(lowering.lowered, *lowering.cotangents(cotangents, outputs), threads))
    return found


def _form(problem: Problem, lowered: Any, form: str | None) -> Any:
    """The module of a form; of none, the fastest that expresses it."""
    loaded = _loaded()
    tokens = lowered.q.shape[2] + (lowered.b.shape[2] if lowered.written_first else 0)
    if form is None and tokens < loaded.CHUNKED_FROM:
        form = "recurrent"
    if form in (None, "chunked"):
        against = loaded.chunked.reason_against(lowered)
        if form and against:
            raise BackendUnavailableError(f"{problem.variant.name}: form 'chunked' does not run this call: {against}; use 'recurrent', or None")
        form = "recurrent" if against else "chunked"
    return getattr(loaded, form)


def _carried(rule: Recurrence) -> list[str]:
    """Outputs that a recurrence has beside `out`."""
    names = [rule.initial, *([rule.mass] if rule.normalizer else []), *([rule.maximum] if rule.input_gate else [])]
    return [name.removeprefix("initial_") for name in names]


def _logarithms(rule: Recurrence) -> list[str]:
    """Operands that a recurrence takes the logarithm of."""
    factors = [f for f in (*rule.log_decay, *rule.input_gate) if not isinstance(f, str) and f.map is not None]
    return [f.operand for f in factors if f.map is not None and f.map.__name__.endswith(".log")]


def _is_zero(problem: Problem, name: str) -> bool:
    return name in problem.given and bool((np.asarray(problem.given[name]) == 0).any())


@functools.cache
def _loaded() -> Any:
    """The modules that compile, which nobody who only asks should wait for."""
    from . import forms

    return forms
