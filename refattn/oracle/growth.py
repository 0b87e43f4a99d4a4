"""How the error of an implementation grows with the number of keys.

Values are positive here, so that the output does not shrink as more of them are averaged and an error is what it is relative to the
output.  Roundings that are independent then grow no faster than the root of the number of keys; roundings of one sign, of accumulators that
truncate, grow in proportion to it; the rounding of the result into its format does not grow at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import precision
from ..candidate import Candidate
from ..spec import Variant, shape
from .findings import Growth
from .judge import judge
from .probes import Probe
from .profiles import Profile

KEYS = (16, 64, 256, 1024, 4096)
_SIZES = {"B": 1, "Hq": 2, "Hkv": 1, "T": 8, "D": 32, "E": 16}


def growth(
    variant: Variant,
    candidate: Candidate,
    dtype: np.dtype,
    fixed: Mapping[str, Any],
    profile: Profile,
    alpha: float,
    *,
    keys: tuple[int, ...] = KEYS,
    seed: int = 0,
) -> Growth | None:
    """The largest error at several numbers of keys, or None where the variant has no keys apart from its queries or a call gives no number.

    Parameters
    ----------
    variant : Variant
    candidate : Candidate
    dtype : dtype
        Of the real operands.
    fixed : mapping
        Parameters that keep one value.
    profile : Profile
    alpha : float
        Chance that a correct answer is refused at one number of keys.
    keys : tuple of int
        Increasing, two or more.
    seed : int
    """
    plan = variant.plan
    if plan is None or "S" not in variant.axes or not set(variant.axes) - {"S"} <= _SIZES.keys():
        return None
    rng = np.random.default_rng(seed)
    errors, ratios = [], []
    for n in keys:
        dims = {**_SIZES, "S": n}
        params = {**candidate.fixed, **fixed}
        value = plan(dims, {p.name: params.get(p.name, p.default) for p in variant.params}).value
        operands = {}
        for o in variant.operands:
            if not o.optional:
                drawn = o.draw(rng, shape(o.axes, dims))
                operands[o.name] = precision.round_to(np.abs(drawn) + 1.0 if o.name == value else drawn, dtype)
        case = judge(variant, candidate, Probe(f"S={n}", operands, params), profile, alpha)
        if case.worst is None or "out" not in case.answers:
            return None
        error = np.abs(case.answers["out"].astype(np.float64) - case.truth["out"])
        if not np.isfinite(error).all():
            return None
        errors.append(max(float(error.max()), np.finfo(np.float64).tiny))
        ratios.append(float(case.ratios["out"].max()))
    return Growth(keys, tuple(ratios), float(np.polyfit(np.log(keys), np.log(errors), 1)[0]), tuple(errors))
