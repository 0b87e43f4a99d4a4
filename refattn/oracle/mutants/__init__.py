"""Executable mistakes: the specification with one or more of its readings changed.

`reading` says what can be read wrongly, `evaluation` and `backward` compute what a kernel answers then, `answers` how far a correct computation of
it may stray, and `faults` lists what real kernels got wrong.
"""

from __future__ import annotations

import functools

from ...spec import Variant
from .answers import Answers as Answers
from .answers import evaluate as evaluate
from .faults import gradients, roundings, routing, scores, tiles, visibility, weights
from .mutant import FEATURES as FEATURES
from .mutant import TILES as TILES
from .mutant import Family as Family
from .mutant import Mutant as Mutant
from .mutant import may_show as may_show
from .mutant import right_value as right_value
from .mutant import shows as shows
from .reading import Reading as Reading
from .reading import combine as combine

_FILES = (scores, visibility, routing, weights, tiles, roundings, gradients)

#: Every mutant there is, and every family.
ALL: tuple[Mutant, ...] = tuple(mutant for file in _FILES for mutant in file.MUTANTS)
FAMILIES: tuple[Family, ...] = tuple(family for file in _FILES for family in file.FAMILIES)


@functools.cache
def mutants(variant: Variant) -> tuple[Mutant, ...]:
    """Those that can show in some call of the variant, the likeliest first."""
    able = may_show(variant)
    return tuple(sorted((m for m in ALL if m.needs <= able), key=lambda m: -m.prior)) if able else ()


@functools.cache
def families(variant: Variant) -> tuple[Family, ...]:
    """Faults with a number in them that can show in some call of the variant."""
    able = may_show(variant)
    return tuple(f for f in FAMILIES if f.needs <= able) if able else ()
