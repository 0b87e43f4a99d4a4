"""Compiles the entry points: once per element type, for arrays of any strides, whatever layouts callers bring.

Left to itself Numba compiles anew for every combination of contiguous, strided and read-only arrays, some seconds each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

#: Axes of every array argument by name; `first` and `last` hold integers, names of results are written to.
_AXES = {
    "q": 4, "k": 4, "v": 4, "bias": 4, "sinks": 1, "first": 1, "last": 1, "out": 4, "lse": 3,
    "d_out": 4, "d_lse": 3, "d_q": 4, "d_k": 4, "d_v": 4, "d_bias": 4, "deltas": 3,
}  # fmt: skip
_WRITTEN = {"d_q", "d_k", "d_v", "d_bias", "deltas"}


@functools.cache
def kernel(function: Callable[..., None], element: np.dtype) -> Any:
    """An entry point compiled for float32 or float64; one whose name ends in ``_parallel`` for several threads."""
    number = numba.from_dtype(element)
    writes = _WRITTEN | (set() if "d_q" in inspect.signature(function).parameters else {"out", "lse"})  # inputs of the backward pass

    def kind(name: str) -> Any:
        if name not in _AXES:
            return types.int64 if name == "threads" else number
        return types.Array(types.int64 if name in ("first", "last") else number, _AXES[name], "A", readonly=name not in writes)

    signature = tuple(kind(name) for name in inspect.signature(function).parameters)
    parallel = function.__name__.endswith("_parallel")
    return numba.njit(signature, error_model="numpy", nogil=True, cache=True, parallel=parallel)(function)
