"""Which arithmetic an implementation uses, from a few plain calls: the tightest preset that explains its errors.

Plain: required operands only, nothing hidden, no parameter but those that are fixed.  What is wrong with masks, windows or shapes does not show
there and cannot widen the tolerance; what is wrong everywhere is explained by no preset, and the usual one is taken.  A fault that looks like
coarser arithmetic (scores stored in bfloat16) is indistinguishable from it, and is named as what it is: the preset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..candidate import Candidate
from ..errors import ParameterError
from ..precision import round_to
from ..problem import bind
from ..spec import Variant, every_size, shape
from .cotangents import random
from .gradients import affordable
from .judge import Case, compare, judge
from .probes import Probe
from .profiles import Profile, resolve

#: Long enough for weights to be rounded in many binades, and for tiles.
_PLAIN = every_size({"B": 1, "Hq": 2, "Hkv": 1, "T": 16, "S": 256, "D": 32, "E": 32, "Dq": 32, "Dk": 24, "A": 16, "M": 24})


def calibrated(variant: Variant, candidate: Candidate, dtype: np.dtype, fixed: Mapping[str, Any], alpha: float, seed: int = 0) -> Profile:
    """The tightest preset under which every plain call agrees; its name says so.

    Parameters
    ----------
    variant : Variant
    candidate : Candidate
    dtype : dtype
        Of the real operands.
    fixed : mapping
        Parameters that keep one value.
    alpha : float
        Chance of a false alarm in each call.
    seed : int
    """
    usual = resolve(None, dtype)
    rng = np.random.default_rng([seed, 2])
    cases = [judge(variant, candidate, probe, usual, alpha) for probe in _plain(variant, candidate, dtype, fixed, rng)]
    asked = [c for c in cases if c.outcome in ("agrees", "differs")]
    if not asked:
        return replace(usual, name=f"{usual.name} (the usual one: plain calls were not answered)")
    nearest = np.inf
    for profile in _possible(dtype):
        ratio = max(_ratio(c, profile, alpha) for c in asked)
        if ratio <= 1:
            why = f"the tightest that explains {len(asked)} plain calls: error / tolerance {ratio:.2g}"
            return replace(profile, name=f"{profile.name} ({why})")
        nearest = min(nearest, ratio)
    return replace(usual, name=f"{usual.name} (the usual one: none explains the plain calls, the nearest to {nearest:.2g} x its tolerance)")


def _plain(variant: Variant, candidate: Candidate, dtype: np.dtype, fixed: Mapping[str, Any], rng: np.random.Generator) -> list[Probe]:
    dims = _PLAIN if "S" in variant.axes else {**_PLAIN, "T": _PLAIN["S"]}
    required = [o for o in variant.operands if not o.optional]
    operands = {o.name: round_to(np.asarray(o.draw(rng, shape(o.axes, dims)), np.float64), dtype) for o in required if o.kind == "real"}
    operands |= {o.name: np.ones(shape(o.axes, dims), np.bool_) for o in required if o.kind != "real"}
    first = required[0].name
    spread = {**operands, first: round_to(4.0 * operands[first].astype(np.float64), dtype)}
    probes = []
    for title, given in (("plain", operands), ("plain, scores spread out", spread)):
        problem = bind(variant, (), {**given, **fixed}, candidate.cotangents)
        wanted = candidate.gradients is not None and affordable(problem, dict.fromkeys(candidate.cotangents))
        probes.append(Probe(title, given, dict(fixed), cotangents=random(problem, rng) if wanted else {}))
    return probes


def _possible(dtype: np.dtype) -> Iterator[Profile]:
    """Presets for the dtype that stand for a way of computing and not for a machine, the tightest first."""
    for name in ("math", "flash", "eager", "fa3-fp8"):
        try:
            yield resolve(name, dtype)
        except ParameterError:  # made for other formats
            continue


def _ratio(case: Case, profile: Profile, alpha: float) -> float:
    assert case.problem is not None
    judged = compare(case.problem, case.answers, case.probe, profile, alpha)
    return max(float(np.max(r, initial=0.0)) for r in judged.ratios.values())
