"""Runs definitions: one wrapper for every variant.

Numba compiles `define` once per variant, for one signature derived from the declarations, and keeps the result on disk.  A call so
small that compiling would be most of its time runs as plain Python; the arithmetic is the same, operation by operation.

A caller's functions meet a definition from outside, which therefore calls nothing: it is asked for the scores without bias and masks;
the functions are evaluated entry by entry (`refattn.entrywise`); and it is run on queries and keys of zero with their results as the bias
and the mask.  Sequences of different lengths are calls of their own, one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import entrywise
from .costs import flops
from .problem import Problem, output_shape, part_of, split
from .spec import Operand, Param, Variant, shape

#: Below this many floating-point operations a definition runs as plain Python, and Numba is not even imported.
PLAIN_PYTHON_FLOPS = 2_000

Arrays = Sequence[np.ndarray]


def run(problem: Problem, arrays: Arrays | None = None) -> dict[str, np.ndarray]:
    """All outputs of the variant's definition, float64, by name; on other arrays than the problem's where they are given.

    Of sequences of different lengths, the outputs asked for.
    """
    if problem.sequences is not None:
        return joined(problem, (run(one) for one in split(problem)))
    arrays = problem.arrays if arrays is None else arrays
    if flops(problem) <= PLAIN_PYTHON_FLOPS:
        try:
            return runner(problem, problem.variant.define)(arrays)
        except ArithmeticError:  # Python's exp raises where compiled code is infinite
            pass
    return runner(problem, compiled(problem.variant))(arrays)


def runner(problem: Problem, define: Callable[..., Any], repeated: bool = False) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """A dense problem's definition as a function of its arrays, returning all outputs by name.

    Parameters
    ----------
    problem : Problem
    define : callable
        The variant's, compiled or not.
    repeated : bool
        Whether it will be called many times, so that compiling a caller's functions pays.
    """
    names, arguments = [o.name for o in problem.variant.outputs], problem.arguments
    run_once = define if problem.functions is None else _with_functions(problem, define, repeated)

    def outputs(arrays: Arrays) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):  # infinities and NaN are answers here, as they are in compiled code
            results = run_once(*arrays, *arguments)
        return dict(zip(names, (results,) if len(names) == 1 else results, strict=True))

    return outputs


def raw_scores(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a problem with functions, as score_mod is given them; and which entries are seen: (B, Hq, T, S) twice."""
    define = compiled(problem.variant)
    with np.errstate(all="ignore"):
        return _scores(problem, define)(problem.arrays), _seen(problem, define)


def joined(problem: Problem, parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs a problem of several sequences returns, from those of each."""
    axes = {o.name: o.axes for o in problem.variant.outputs}
    found = {name: np.zeros(output_shape(problem, axes[name])) for name in problem.returns}
    for n, outputs in enumerate(parts):
        for name, x in found.items():
            x[part_of(problem, n, name)] = outputs[name]
    return found


def _scores(problem: Problem, define: Callable[..., Any]) -> Callable[[Arrays], np.ndarray]:
    """The definition as a function from its arrays to the scores before bias, masks and the caller's functions."""
    at = [o.name for o in problem.variant.outputs].index("scores")
    neutral, arguments = _neutral(problem), _arguments(problem, shift=0.0)

    def scores(arrays: Arrays) -> np.ndarray:
        found: np.ndarray = define(*arrays[:2], *neutral[2:], *arguments)[at]  # of q and k alone
        return found

    return scores


def _with_functions(problem: Problem, define: Callable[..., Any], repeated: bool) -> Callable[..., Any]:
    """`define` with the problem's functions between its scores and its normaliser."""
    functions = problem.functions
    assert functions is not None
    names = [o.name for o in problem.variant.operands]
    bias_at, mask_at = names.index("bias"), names.index("mask")
    scores, seen, neutral = _scores(problem, define), _seen(problem, define), _neutral(problem)
    arguments = _arguments(problem, scale=0.0)

    def composed(*all_arguments: Any) -> Any:
        arrays = list(all_arguments[: len(names)])
        raw = scores(arrays)
        if functions.score_mod is not None:
            raw = entrywise.scores(functions.score_mod, functions.score_aux, raw, seen, functions.first, repeated)
        arrays[:2] = neutral[:2]
        arrays[bias_at], arrays[mask_at] = np.where(seen, raw + arrays[bias_at], 0.0), seen
        return define(*arrays, *arguments)

    return composed


def _seen(problem: Problem, define: Callable[..., Any]) -> np.ndarray:
    """Which entries parameters, the mask operand and mask_mod all leave visible."""
    functions = problem.functions
    assert functions is not None
    at = [o.name for o in problem.variant.outputs].index("scores")
    flat = define(*_neutral(problem), *_arguments(problem, scale=0.0, shift=0.0))[at]  # 0 where parameters hide nothing
    seen: np.ndarray = np.isfinite(flat) & problem.operands["mask"]
    return seen if functions.mask_mod is None else entrywise.allowed(functions.mask_mod, functions.mask_aux, seen, functions.first)


def _neutral(problem: Problem) -> list[np.ndarray]:
    """Arrays of a definition under which every score is 0: no optional operand, and queries, keys and values of width one."""
    dims = {**problem.dims, "D": 1, "E": 1}

    def neutral(operand: Operand) -> np.ndarray:
        dtype, full = (np.bool_ if operand.kind == "boolean" else np.float64), shape(operand.axes, dims)
        return np.broadcast_to(np.asarray(operand.absent, dtype), full) if operand.optional else np.zeros(full, dtype)

    return [neutral(operand) for operand in problem.variant.operands]


def _arguments(problem: Problem, **changes: float) -> tuple[Any, ...]:
    """The parameters as the definition takes them, some changed."""
    return tuple(changes.get(p.name, value) for p, value in zip(problem.variant.params, problem.arguments, strict=True))


@functools.cache
def compiled(variant: Variant) -> Any:
    """The definition, compiled for its one signature and cached on disk where its file allows it."""
    import numba

    signature = (*(_array_type(o) for o in variant.operands), *(_scalar_type(p) for p in variant.params))
    try:
        return numba.njit(signature, cache=True, error_model="numpy")(variant.define)
    except RuntimeError:  # no place to cache: the file is in an archive or was typed at a prompt
        return numba.njit(signature, error_model="numpy")(variant.define)


def _array_type(operand: Operand) -> Any:
    from numba import types

    element = types.boolean if operand.kind == "boolean" else types.float64
    layout = "A" if operand.optional or operand.broadcast else "C"  # an absent operand is one number, seen everywhere by stride 0
    return types.Array(element, len(operand.axes.split()), layout, readonly=True)


def _scalar_type(p: Param) -> Any:
    from numba import types

    return {"float64": types.float64, "int64": types.int64, "int64 x 2": types.UniTuple(types.int64, 2)}[p.kind.machine]
