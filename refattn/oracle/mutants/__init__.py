"""Executable mistakes: the specification with one or more of its readings changed.

`reading` says what can be read wrongly, `evaluation` and `backward` compute what a kernel answers then, `answers` how far a correct computation of
it may stray, and `faults` lists what real kernels got wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Variant
from . import answers, mutant
from .answers import Answers as Answers
from .faults import gradients, roundings, routing, scores, tiles, visibility, weights
from .mutant import FEATURES as FEATURES
from .mutant import TILES as TILES
from .mutant import Family as Family
from .mutant import Mutant as Mutant
from .mutant import right_value as right_value
from .reading import Reading as Reading
from .reading import combine as combine
from .states import evaluation as state_evaluation
from .states import faults as state_faults
from .states import scope as state_scope
from .states.evaluation import ROUGHLY as ROUGHLY
from .states.evaluation import StateAnswers as StateAnswers
from .states.reading import StateReading as StateReading
from .states.scope import STATE_FEATURES as STATE_FEATURES

_FILES = (scores, visibility, routing, weights, tiles, roundings, gradients, state_faults)

#: Every mutant there is, and every family.
ALL: tuple[Mutant, ...] = tuple(mutant for file in _FILES for mutant in file.MUTANTS)
FAMILIES: tuple[Family, ...] = tuple(family for file in _FILES for family in file.FAMILIES)


def evaluate(
    problem: Problem, changes: Mapping[str, Any], cotangents: Mapping[str, np.ndarray] | None = None, earlier: Problem | None = None
) -> Answers | StateAnswers:
    """What a kernel answers that reads the specification with these changes: fields of `Reading`, or of `states.reading.StateReading`."""
    if problem.plan is None and problem.recurrence is not None:
        return state_evaluation.evaluate(problem, changes)
    return answers.evaluate(problem, changes, cotangents, earlier)


def may_show(variant: Variant) -> frozenset[str]:
    """What some call of the variant can have."""
    return state_scope.may_show(variant) if variant.plan is None and variant.recurrence is not None else mutant.may_show(variant)


def shows(
    problem: Problem,
    returns: tuple[str, ...] = (),
    cotangents: Mapping[str, np.ndarray] | None = None,
    earlier: Problem | None = None,
) -> frozenset[str]:
    """What one call has: a mutant whose `needs` are not all among it answers as the specification does."""
    if problem.plan is None and problem.recurrence is not None:
        return state_scope.shows(problem, returns)
    return mutant.shows(problem, returns, cotangents, earlier)


@functools.cache
def mutants(variant: Variant) -> tuple[Mutant, ...]:
    """Those that can show in some call of the variant, the likeliest first."""
    able = may_show(variant)
    own = [m for m in ALL if m.needs <= able and ("recurrence" in m.needs) == ("recurrence" in able)]
    return tuple(sorted(own, key=lambda m: -m.prior)) if able else ()


@functools.cache
def families(variant: Variant) -> tuple[Family, ...]:
    """Faults with a number in them that can show in some call of the variant."""
    able = may_show(variant)
    return tuple(f for f in FAMILIES if f.needs <= able and ("recurrence" in f.needs) == ("recurrence" in able)) if able else ()
