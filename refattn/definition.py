"""Runs definitions: one wrapper for every variant.

Numba compiles `define` once per variant, for one signature derived from the declarations, and keeps the result on disk.  A call so
small that compiling would be most of its time runs as plain Python; the arithmetic is the same, operation by operation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .costs import flops
from .problem import Problem
from .spec import Operand, Param, Variant

#: Below this many floating-point operations a definition runs as plain Python, and Numba is not even imported.
PLAIN_PYTHON_FLOPS = 2_000


def run(problem: Problem, arrays: Sequence[np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """All outputs of the variant's definition, float64, by name; on other arrays than the problem's where they are given."""
    variant = problem.variant
    tiny = flops(problem) <= PLAIN_PYTHON_FLOPS
    define = variant.define if tiny else compiled(variant)
    with np.errstate(all="ignore"):  # infinities and NaN are answers here, as they are in compiled code
        results = define(*(problem.arrays if arrays is None else arrays), *problem.arguments)
    if len(variant.outputs) == 1:
        results = (results,)
    return {o.name: x for o, x in zip(variant.outputs, results, strict=True)}


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
