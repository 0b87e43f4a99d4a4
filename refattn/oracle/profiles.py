"""How an implementation computes, as far as its rounding errors depend on it.

A tolerance follows from the operands and a profile.  A profile names where values are rounded and how exactly functions are evaluated;
it does not describe an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..catalog import unknown
from ..errors import ParameterError, UnknownVariantError
from ..precision import as_dtype, format_of

_SINGLE = 2.0**-24
_DOUBLE = 2.0**-53


@dataclass(frozen=True)
class Profile:
    """Where an implementation rounds.

    Attributes
    ----------
    name : str
    accumulate : float
        Unit roundoff of sums, and of everything not named below.
    operands : float
        Unit roundoff of operands transformed before use (queries multiplied by the scale and stored); 0 if never.
    scores : float
        Unit roundoff of scores stored before they are normalised; 0 if they stay in the accumulator.
    probabilities : float
        Unit roundoff of weights stored before they meet the values; 0 if they stay in the accumulator.
    smallest_probability : float
        Smallest positive number of that format; weights below half of it vanish.
    exp_error, tanh_error : float
        Relative error of the functions.
    tile : int
        Keys per step where a running maximum rescales earlier sums; 0 where the whole row is at hand.
    intermediate : float
        Unit roundoff of arrays handed from one operation to the next inside a layer (projections); 0 if none are stored.
    source : str
        Where the figures come from.
    """

    name: str
    accumulate: float
    operands: float = 0.0
    scores: float = 0.0
    probabilities: float = 0.0
    smallest_probability: float = 0.0
    exp_error: float = 2 * _SINGLE
    tanh_error: float = 4 * _SINGLE
    tile: int = 0
    intermediate: float = 0.0
    source: str = ""


def _math(dtype: np.dtype) -> Profile:
    """Whole rows; sums in float32, or float64 for float64; results of every operation stored in at least float32."""
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    narrow = format_of(dtype).unit if dtype.itemsize < 4 else u
    return Profile(
        "math", u, scores=u, probabilities=u, exp_error=2 * u, tanh_error=4 * u, intermediate=narrow, source="textbook evaluation in one precision"
    )


def _flash(dtype: np.dtype) -> Profile:
    """Tiles of 32 keys or more; weights rounded to the operands' format before they meet the values."""
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    narrow = format_of(dtype) if dtype.itemsize < 4 else None
    return Profile(
        "flash",
        u,
        operands=u,
        probabilities=narrow.unit if narrow else 0.0,
        smallest_probability=narrow.tiny if narrow else 0.0,
        exp_error=max(2 * u, 2.0**-22 if u == _SINGLE else 0.0),
        tanh_error=1.2e-5 if narrow else 4 * u,
        tile=32,
        intermediate=narrow.unit if narrow else 0.0,
        source="FlashAttention-2 (arXiv:2307.08691); ex2.approx within 2^-22 (PTX ISA), tanh.approx within 1.2e-5 (exhaustive measurement on sm_75)",
    )


def _eager(dtype: np.dtype) -> Profile:
    """One framework operation after another, every intermediate array stored in the operands' format."""
    if dtype.itemsize >= 4:
        return _replace_name(_math(dtype), "eager")
    narrow = format_of(dtype)
    return Profile(
        "eager",
        _SINGLE,
        operands=narrow.unit,
        scores=narrow.unit,
        probabilities=narrow.unit,
        smallest_probability=narrow.tiny,
        exp_error=narrow.unit,
        tanh_error=narrow.unit,
        intermediate=narrow.unit,
        source="the usual `softmax(q @ k.T * scale) @ v` in a framework's half precision",
    )


def _replace_name(profile: Profile, name: str) -> Profile:
    return Profile(**{**profile.__dict__, "name": name})


#: Presets by name; each makes the profile for a dtype.
PRESETS: dict[str, Callable[[np.dtype], Profile]] = {"math": _math, "flash": _flash, "eager": _eager}


def resolve(name: str | Profile | None, dtype: np.dtype) -> Profile:
    """The profile of that name for operands of `dtype`.

    A name may carry the dtype it is meant for (``"flash-bf16"``).  None is ``"flash"``, which allows everything ``"math"`` does and a
    tiled kernel's additional roundings.

    Raises
    ------
    UnknownVariantError, ParameterError
    """
    if isinstance(name, Profile):
        return name
    if not isinstance(name, str | None):
        raise UnknownVariantError(unknown("profile", name, PRESETS))
    kind, _, spelled = (name or "flash").partition("-")
    if kind not in PRESETS:
        raise UnknownVariantError(unknown("profile", name, PRESETS))
    if spelled and as_dtype(spelled) != dtype:
        raise ParameterError(f"profile {name!r} is for {as_dtype(spelled).name}, but the operands are {dtype.name}")
    return PRESETS[kind](dtype)
