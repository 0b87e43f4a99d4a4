"""Compiles the entry points: once per element type, for arrays of any strides, whatever layouts callers bring.

Left to itself Numba compiles anew for every combination of contiguous, strided and read-only arrays, some seconds each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import numba
import numpy as np
from numba import types

from .tiles import How

#: Element and number of axes of every array argument, by name; None stands for the kernel's own element.
_ARRAYS = {
    **dict.fromkeys(("q", "k", "v", "bias", "mask", "d_out"), (types.uint8, 4)),
    **dict.fromkeys(("first", "last"), (types.int64, 1)),
    **dict.fromkeys(("sequences", "pages"), (types.int64, 2)),
    **dict.fromkeys(("out", "d_q", "d_k", "d_v"), (None, 4)),
    **dict.fromkeys(("lse", "d_lse", "deltas"), (None, 3)),
    "sinks": (None, 1), "tables": (None, 2), "blocks": (types.int8, 4), "d_bias": (None, 5),
    **dict.fromkeys(("sums_k", "sums_v"), (None, 3)),
}  # fmt: skip
#: What entry points write, the names of results of the forward pass in one and those of the backward pass in the other.
_FORWARD, _BACKWARD = {"out", "lse"}, {"d_q", "d_k", "d_v", "d_bias", "sums_k", "sums_v", "deltas"}


@functools.cache
def kernel(function: Callable[..., None], element: np.dtype) -> Any:
    """An entry point compiled for float32 or float64; one whose name ends in ``_parallel`` for several threads."""
    number = numba.from_dtype(element)
    names = tuple(inspect.signature(function).parameters)
    written = _BACKWARD if "d_q" in names else _FORWARD

    def kind(name: str) -> Any:
        if name == "how":
            return types.NamedTuple([types.int64 if hint is int else number for hint in get_type_hints(How).values()], How)
        if name == "threads":
            return types.int64
        own, axes = _ARRAYS[name]
        return types.Array(number if own is None else own, axes, "A", readonly=name not in written)

    parallel = function.__name__.endswith("_parallel")
    return numba.njit(tuple(map(kind, names)), error_model="numpy", nogil=True, cache=True, parallel=parallel)(function)
