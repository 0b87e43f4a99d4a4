"""Storage formats and the rounding into them.

float64 to bfloat16 or float8 through float32 rounds twice and is wrong for values near a tie; `round_to` goes through float32
rounded *to odd*, after which a second rounding to a narrower format is exact (Boldo and Melquiond, "Emulation of FMA and
correctly-rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008).
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import DtypeError

_ALIASES = {
    "fp64": "float64", "f64": "float64", "double": "float64",
    "fp32": "float32", "f32": "float32", "single": "float32",
    "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2",
}  # fmt: skip
_FORMATS: dict[str, type] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e3m4": ml_dtypes.float8_e3m4,
    "float8_e4m3": ml_dtypes.float8_e4m3,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


@dataclass(frozen=True)
class Format:
    """A binary floating-point storage format.

    unit
        Unit roundoff: half the distance from 1 to the next number.
    tiny
        Smallest positive number, subnormals included.
    """

    name: str
    dtype: np.dtype
    unit: float
    tiny: float
    largest: float


@functools.cache
def format_of(dtype: object) -> Format:
    """The format of a dtype, given as a name (``"bfloat16"``, ``"bf16"``), a scalar type or a NumPy dtype."""
    resolved = as_dtype(dtype)
    info = ml_dtypes.finfo(resolved)
    return Format(resolved.name, resolved, float(info.eps) / 2, float(info.smallest_subnormal), float(info.max))


def as_dtype(dtype: object) -> np.dtype:
    """The NumPy dtype of a floating-point format, in native byte order.

    Raises
    ------
    DtypeError
        When it names no floating-point format refattn knows.
    """
    name = _ALIASES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(name, str):
        if name not in _FORMATS:
            near = difflib.get_close_matches(name, [*_FORMATS, *_ALIASES], 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(_FORMATS)}"
            raise DtypeError(f"no floating-point format named {name!r}{hint}")
        return np.dtype(_FORMATS[name])
    if name is None:  # NumPy would read it as float64
        raise DtypeError(f"None is not a dtype; known are {', '.join(_FORMATS)}")
    try:
        resolved = np.dtype(name)  # type: ignore[call-overload]
    except TypeError:
        raise DtypeError(f"{name!r} is not a dtype") from None
    if not is_real(resolved):
        raise DtypeError(f"{resolved} is not a floating-point format; known are {', '.join(_FORMATS)}")
    return resolved.newbyteorder("=")


@functools.cache
def is_real(dtype: np.dtype) -> bool:
    """Whether the elements are floating-point numbers of a known format."""
    return dtype.name in _FORMATS


def round_to(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values rounded once, to nearest even, into `dtype`.

    Overflow follows the format: to infinity where it has one, to NaN in float8_e4m3fn and the other formats without.
    """
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore", invalid="ignore"):  # a signalling NaN becomes a quiet one
        if dtype.itemsize >= 4 or dtype == np.float16 or x.dtype == np.float32:  # rounded once as it is
            return x.astype(dtype)
    return _to_odd(np.asarray(x, np.float64)).astype(dtype)


def _to_odd(x: np.ndarray) -> np.ndarray:
    """float32 with the last bit set wherever the conversion was inexact (truncation, then the sticky bit)."""
    with np.errstate(over="ignore"):
        nearest = x.astype(np.float32)
    bits = np.array(nearest.view(np.uint32))
    finite = np.isfinite(x)
    inexact = finite & (nearest.astype(np.float64) != x)
    away = inexact & (np.abs(nearest.astype(np.float64)) > np.abs(x))
    bits[away] -= np.uint32(1)  # towards zero: the sign is the top bit, so this shrinks the magnitude
    bits[inexact] |= np.uint32(1)
    return bits.view(np.float32)


def common(dtypes: dict[str, np.dtype], variant: str) -> np.dtype:
    """The format the results come out in: that of the operands which holds every number of the others, float64 if none is real.

    NumPy is asked about integers only. What it says of bfloat16 and float8 has changed with the version of ml_dtypes: in 0.6 float16
    beside bfloat16 had no answer, and float8_e4m3fn beside float8_e3m4 became the latter, which overflows at 30.
    """
    real = {dtype for dtype in dtypes.values() if is_real(dtype)}
    widest = [format_of(a) for a in real if all(_holds(format_of(a), format_of(b)) for b in real)]
    if real and not widest:
        listing = ", ".join(f"{name} {dtype.name}" for name, dtype in dtypes.items())
        raise DtypeError(f"{variant}: the operands ({listing}) have no common format, one of theirs that holds the numbers of all; cast some")
    result = widest[0].dtype if real else np.dtype(np.float64)
    for dtype in set(dtypes.values()) - real:
        try:
            result = np.promote_types(result, dtype)
        except TypeError:  # integers too wide for a format that NumPy does not know
            return np.dtype(np.float64)
    return result


def _holds(a: Format, b: Format) -> bool:
    """Whether every number of `b` is one of `a`."""
    return a.unit <= b.unit and a.tiny <= b.tiny and a.largest >= b.largest
