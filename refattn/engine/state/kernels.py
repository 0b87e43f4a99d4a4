"""Compiles the entry points of the state engine: once per element type, for the arrays of `Lowered`, which lie in C order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

#: Number of axes of every array argument, by name.
_AXES = {
    **dict.fromkeys(("q", "g", "u", "f", "state", "out", "d_q", "d_g", "d_u", "d_f", "d_state", "d_out"), 4),
    **dict.fromkeys(("b", "w", "e", "kept", "d_b", "d_w", "d_e"), 5),
}
_WRITTEN = {
    "forward": {"state", "kept", "out"},
    "backward": {"d_q", "d_g", "d_u", "d_f", "d_state", "d_b", "d_w", "d_e"},
}


@functools.cache
def kernel(function: Callable[..., None], element: np.dtype) -> Any:
    """An entry point compiled for float32 or float64; one whose name ends in ``_parallel`` for several threads."""
    number = numba.from_dtype(element)
    written = _WRITTEN[function.__name__.partition("_")[0]]

    def kind(name: str) -> Any:
        if name in _AXES:
            return types.Array(number, _AXES[name], "C", readonly=name not in written)
        return number if name == "scale" else types.int64

    parallel = function.__name__.endswith("_parallel")
    signature = tuple(kind(name) for name in inspect.signature(function).parameters)
    return numba.njit(signature, error_model="numpy", nogil=True, cache=True, parallel=parallel)(function)
