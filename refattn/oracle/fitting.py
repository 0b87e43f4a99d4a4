"""Numbers of faults that have one: fitted to what an implementation answered, and called by their names where they have one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

#: Residuals of an answer under one value of the number: one array per call, weighted so that a tolerance is about one.
Residuals = Callable[[float], Sequence[np.ndarray]]

_GRID = 17
_STEPS = 12

_CONSTANTS: Mapping[str, float] = {
    "log2(e)": math.log2(math.e),
    "ln 2": math.log(2.0),
    "2": 2.0,
    "1/2": 0.5,
    "4": 4.0,
    "1/4": 0.25,
    "8": 8.0,
    "1/8": 0.125,
    "sqrt(2)": math.sqrt(2.0),
    "1/sqrt(2)": math.sqrt(0.5),
    "-1": -1.0,
    "0": 0.0,
}


def fitted(residuals: Residuals, bounds: tuple[float, float], logarithmic: bool) -> float:
    """The number within bounds that leaves the least sum of squares.

    The best points of a coarse grid are refined by Gauss-Newton steps: near the truth the answer depends on the number smoothly, and only
    rounding errors are left.
    """
    low, high = bounds
    grid = np.geomspace(low, high, _GRID) if logarithmic else np.linspace(low, high, _GRID)
    squares = [_square(residuals(float(x))) for x in grid]
    best, least = float(grid[int(np.argmin(squares))]), min(squares)
    for start in np.argsort(squares)[:2]:
        found, square = _refined(residuals, float(grid[start]), low, high)
        if square < least:
            best, least = found, square
    return best


def refitted(residuals: Residuals, start: float, bounds: tuple[float, float]) -> float:
    """The number near `start` that leaves the least sum of squares."""
    return _refined(residuals, start, *bounds)[0]


def _refined(residuals: Residuals, start: float, low: float, high: float) -> tuple[float, float]:
    x, here = start, residuals(start)
    square = _square(here)
    for _ in range(_STEPS):
        step = 1e-5 * max(abs(x), 1e-3 * (high - low))
        up, down = residuals(x + step), residuals(x - step)
        slope = [(b - a) / (2 * step) for a, b in zip(down, up, strict=True)]
        curvature = sum(float(np.nansum(s * s)) for s in slope)
        if not curvature > 0 or not math.isfinite(curvature):
            break
        move = -sum(float(np.nansum(s * r)) for s, r in zip(slope, here, strict=True)) / curvature
        for _ in range(6):  # a step too far is halved
            tried = min(max(x + move, low), high)
            there = residuals(tried)
            if _square(there) < square:
                break
            move /= 2
        else:
            break
        done = abs(tried - x) <= 1e-13 * abs(x)
        x, here, square = tried, there, _square(there)
        if done:
            break
    return x, square


def _square(residuals: Sequence[np.ndarray]) -> float:
    with np.errstate(over="ignore"):
        return sum(float(np.nansum(r * r)) for r in residuals)


def names(value: float, sizes: Mapping[str, int]) -> list[tuple[str, float]]:
    """Constants within half a per cent of a value, nearest first: numbers with names, and roots and inverses of the sizes of a call."""
    known = dict(_CONSTANTS)
    for axis, n in sizes.items():
        if n > 1:
            known |= {axis: float(n), f"sqrt({axis})": math.sqrt(n), f"1/{axis}": 1.0 / n, f"1/sqrt({axis})": n**-0.5}
    near = [(name, x) for name, x in known.items() if abs(x - value) <= 0.005 * abs(value) + 1e-9]
    return sorted(near, key=lambda found: abs(found[1] - value))
