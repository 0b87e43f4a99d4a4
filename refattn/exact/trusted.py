"""What every bound here rests on, tried once in compiled code before the first use.

Trusted: that float64 operations round to nearest, ties to even, and keep subnormal numbers (no flush to zero set by another library in the process);
that the compiler neither contracts a * b + c nor reorders sums; that fma rounds once; that Python's division of integers and NumPy's conversions
between formats round once; Arb, where a result says tier 2; and the memory and processor.  Not trusted: the mathematical library, BLAS,
and the accuracy of any function whose error bound is not derived or proved in this room.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from ..errors import BackendUnavailableError
from .double_double import grid_step, two_product, two_sum
from .lanes import WIDTH, load, splat, store


@njit(cache=True, error_model="numpy")
def _answers(x, out):  # type: ignore[no-untyped-def]
    """Transformations whose exact results are known, of numbers the compiler does not know, in every lane."""
    one, tiny = load(x, (0, 0)), load(x, (1, 0))
    s, e = two_sum(one, tiny)
    store(out, (0, 0), s)
    store(out, (1, 0), e)
    a = load(x, (2, 0))
    p, e = two_product(a, a)
    store(out, (2, 0), p)
    store(out, (3, 0), e)
    store(out, (4, 0), a * a - p)  # 0 unless contracted
    h, l = grid_step(splat(6.0), splat(0.0), a, one)
    store(out, (5, 0), h - 6.0)
    store(out, (6, 0), l)
    store(out, (7, 0), load(x, (3, 0)) * load(x, (4, 0)))
    store(out, (8, 0), one + load(x, (5, 0)))  # a tie, to even: down
    store(out, (9, 0), a + load(x, (5, 0)))  # a tie, to even: up


@functools.cache
def check() -> None:
    """Try the arithmetic.

    Raises
    ------
    BackendUnavailableError
        When it does not round as the bounds suppose.
    """
    u = 2.0**-53
    given = (1.0, 2.0**-80, 1.0 + 2 * u, 2.0**-1022, 0.5, u)
    expected = (1.0, 2.0**-80, 1.0 + 4 * u, 4 * u * u, 0.0, 1.0, 2 * u, 2.0**-1023, 1.0, 1.0 + 4 * u)
    found = np.zeros((len(expected), WIDTH))
    _answers(np.repeat(np.array(given)[:, None], WIDTH, axis=1), found)
    for what, got in zip(expected, found, strict=True):
        if not np.all(got == what):
            raise BackendUnavailableError(
                "certify: this processor or compiler does not round float64 to nearest as written"
                f" ({float(got[0]).hex()} instead of {what.hex()}); look for a library that sets flush-to-zero or another rounding mode"
            )
