"""A caller's functions evaluated entry by entry in float64: what definitions take them to mean, independently of any kernel.

Few entries are evaluated by the Python function itself, many by its compiled form.  Arrays of `aux` are read as float64, int64 or booleans.
Entries that are hidden are not evaluated, so nothing that may stand there matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import ParameterError
from .functions import Aux, captured, is_jitted, name_of

#: Up to this many entries plain Python is done before a function would be compiled.
PLAIN_ENTRIES = 10_000


def scores(function: Callable[..., Any], aux: Aux, raw: np.ndarray, seen: np.ndarray, first: int = 0, compiled: bool = False) -> np.ndarray:
    """``function(score, b, h, i, j, *aux)`` of every score (B, Hq, T, S) that is seen, 0 elsewhere.

    Parameters
    ----------
    function : callable
        A score_mod or its slope.
    aux : tuple of ndarray
    raw : ndarray of float64
    seen : ndarray of bool
    first : int
        The number of the first batch.
    compiled : bool
        Compile it however few the entries: for functions evaluated many times.

    Raises
    ------
    ParameterError
        When it cannot be compiled, fails, or returns no number.
    """
    out = np.zeros(raw.shape)
    _evaluate(_score_loop, "score_mod", function, aux, (raw, seen, first, out), compiled or seen.sum() > PLAIN_ENTRIES)
    return out


def allowed(function: Callable[..., Any], aux: Aux, seen: np.ndarray, first: int = 0) -> np.ndarray:
    """Where ``function(b, h, i, j, *aux)`` is true, of the entries (B, Hq, T, S) that are `seen` without it.

    Raises
    ------
    ParameterError
        When it cannot be compiled or fails.
    """
    out = np.zeros(seen.shape, np.bool_)
    _evaluate(_mask_loop, "mask_mod", function, aux, (seen, first, out), seen.sum() > PLAIN_ENTRIES)
    return out


def tile_classes(function: Callable[..., Any], aux: Aux, shape: tuple[int, int, int, int], block: tuple[int, int]) -> np.ndarray:
    """What a `BlockMask` of that shape (B, Hq, T, S) says of each tile, counted pair by pair."""
    batch, heads, n_q, n_k = shape
    rows, columns = (np.arange(0, n, step) for n, step in zip((n_q, n_k), block, strict=True))
    classes = np.zeros((batch, heads, len(rows), len(columns)), np.int8)
    if not classes.size:
        return classes
    heights, widths = np.diff(rows, append=n_q), np.diff(columns, append=n_k)
    for b in range(batch):
        visible = allowed(function, aux, np.ones((1, *shape[1:]), np.bool_), b)[0]
        counts = np.add.reduceat(np.add.reduceat(visible, rows, axis=1, dtype=np.int64), columns, axis=2)
        classes[b] = (counts > 0).astype(np.int8) + (counts == np.outer(heights, widths))
    return classes


def _score_loop(function, aux, raw, seen, first, out):  # type: ignore[no-untyped-def]
    for b in range(raw.shape[0]):
        for h in range(raw.shape[1]):
            for i in range(raw.shape[2]):
                for j in range(raw.shape[3]):
                    if seen[b, h, i, j]:
                        out[b, h, i, j] = function(raw[b, h, i, j], first + b, h, i, j, *aux)


def _mask_loop(function, aux, seen, first, out):  # type: ignore[no-untyped-def]
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            for i in range(seen.shape[2]):
                for j in range(seen.shape[3]):
                    if seen[b, h, i, j] and function(b + first, h, i, j, *aux):
                        out[b, h, i, j] = True


def _evaluate(loop: Callable[..., None], role: str, function: Callable[..., Any], aux: Aux, arrays: tuple[Any, ...], compiled: bool) -> None:
    wide = tuple(x if x.dtype == np.bool_ else x.astype(np.float64 if x.dtype.kind == "f" else np.int64) for x in aux)
    plain = getattr(function, "py_func", function)
    told: Exception | None = None
    with np.errstate(all="ignore"):
        if not compiled:
            try:
                return loop(plain, wide, *arrays)
            except Exception as trouble:  # Python's integers and `math` raise where compiled arithmetic goes on with inf or NaN, which then decides
                told = trouble
                arrays[-1].fill(0)
        try:
            jitted = function if is_jitted(function) else _jitted(function, _state(plain))
            return _compiled(loop, function, _state(plain))(jitted, wide, *arrays)
        except Exception as trouble:
            cause = told or trouble  # the interpreter's complaint is the clearer one
            raise ParameterError(f"{role} {name_of(function)} cannot be evaluated: {_first_line(cause)}") from cause


@functools.lru_cache(maxsize=64)
def _compiled(loop: Callable[..., None], function: Callable[..., Any], state: tuple[Any, ...]) -> Any:
    """A loop for one function, so that it goes when the function is forgotten."""
    import numba

    return numba.njit(error_model="numpy")(loop)


@functools.lru_cache(maxsize=64)
def _jitted(function: Callable[..., Any], state: tuple[Any, ...]) -> Any:
    import numba

    return numba.njit(error_model="numpy")(function)


def _state(function: Any) -> tuple[Any, ...]:
    """What compiled code keeps of the variables a function reads: another state needs another compilation."""
    plain = int | float | complex | str | bytes | np.generic
    return tuple((name, type(x), x if isinstance(x, plain) else id(x)) for name, x in captured(function))


def _first_line(trouble: Exception) -> str:
    """What went wrong, without the stages of a compiler it went through."""
    lines = [line.strip() for line in str(trouble).splitlines()]
    useful = [line for line in lines if line and not line.startswith("Failed in nopython mode")]
    told = " ".join(useful[: 2 if useful and useful[0].endswith(":") else 1])
    kind = type(trouble).__name__
    return f"{kind}: {told}" if told else kind
