"""What is looked into once the calls of a suite are judged.

Which known fault explains them; facts read off the implementation by calls of their own, where something failed; the smallest call that fails;
and how the error grows with length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..candidate import Candidate
from ..errors import RefattnError
from ..spec import Variant
from . import probes
from .diagnose import diagnose
from .findings import Investigation
from .growth import growth
from .judge import Case, judge
from .probes import Probe
from .profiles import Profile
from .recover import facts
from .shrink import minimal

#: Features of a call from which on each is asked for alone as well.
_MANY = 3


def investigate(
    variant: Variant,
    candidate: Candidate,
    cases: Sequence[Case],
    profile: Profile,
    alpha: float,
    dtype: np.dtype,
    fixed: Mapping[str, Any],
    *,
    suite: str = "",
    seed: int = 0,
) -> Investigation:
    """All that can be said beyond the cases.

    Parameters
    ----------
    variant : Variant
    candidate : Candidate
    cases : sequence of Case
        All calls in the order they were made.
    profile : Profile
    alpha : float
        Chance that a correct answer is refused in one call.
    dtype : dtype
        Of the real operands.
    fixed : mapping
        Parameters that keep one value.
    suite : str
        Its name; "" where the operands were the caller's.
    seed : int
        What the suite was drawn with.
    """

    def ask(probe: Probe) -> Case:
        return judge(variant, candidate, probe, profile, alpha)

    def further() -> Iterator[Probe]:
        """Calls of another draw, and what is left of them with one feature alone, the cheap ones first."""
        drawn = [p for p in probes.suite("standard", variant, candidate, dtype, fixed, seed + 1).probes if p.decides and p.repeatable]
        alone = [one for probe in drawn for one in _one_by_one(variant, probe, {*fixed, *candidate.fixed})]
        return iter(sorted([*drawn, *alone], key=lambda p: sum(x.size for x in p.operands.values())))

    diagnosis, explained = diagnose(variant, cases, profile, alpha, ask, further, candidate.cotangents)
    alone = [c for c in cases if c.failed and c.probe.repeatable and c.problem is not None]
    smallest = min(alone, key=lambda c: sum(x.size for x in c.probe.operands.values()), default=None)
    found = None
    if smallest is not None:
        found = minimal(variant, candidate, smallest, profile, alpha, keep=fixed, same=explained)
        found = found if found is not smallest else None
    try:
        grown = growth(variant, candidate, dtype, fixed, profile, alpha, seed=seed) if suite in ("standard", "full") else None
    except RefattnError:  # a parameter that keeps one value may not fit these sizes
        grown = None
    read = facts(variant, candidate, dtype, fixed, profile) if any(c.failed for c in cases) else ()
    return Investigation(diagnosis=diagnosis, facts=read, growth=grown, minimal=found)


def _one_by_one(variant: Variant, probe: Probe, kept: Collection[str]) -> Iterator[Probe]:
    """A call of many features as calls of one each: one optional operand, or one parameter that is not at its default."""
    optional = [o.name for o in variant.operands if o.optional and o.name in probe.operands]
    changed = [p.name for p in variant.params if p.name not in kept and probe.params.get(p.name, p.default) != p.default]
    if len(optional) + len(changed) < _MANY:
        return
    for only in (*optional, *changed):
        operands = {n: x for n, x in probe.operands.items() if n not in optional or n == only}
        params = {n: value for n, value in probe.params.items() if n not in changed or n == only}
        yield replace(probe, title=f"{probe.title}, {only} alone", operands=operands, params=params, examines=(only,))
