"""Compiles the entry points of the learner engine: once per element type, for arrays in C order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types

#: Number of axes of every array that is read, and of every one that is written, by name; the others are numbers.
_READ = {
    **dict.fromkeys(("q", "k", "v", "p", "q_features", "k_features", "level_scale"), 4),
    **dict.fromkeys(("gate", "beta", "eta", "token_scale", "momentum", "kept", "rate", "step"), 3),
    **dict.fromkeys(("ridge", "norm_weight", "norm_bias"), 2),
    **dict.fromkeys(("shares", "rests"), 1),
}
_WRITTEN = {
    "states": 5,
    **dict.fromkeys(("out", "memory", "state", "gram", "surprise", "anchor", "gradient"), 4),
    **dict.fromkeys(("w1", "w2", "w1_gradient", "w2_gradient"), 4),
    **dict.fromkeys(("mass", "offset", "offset_gradient", "c1", "c2", "c1_gradient", "c2_gradient"), 3),
}
#: Parameters that are numbers of the kernel's element; every other one is an integer.
_REAL = {"scale", "eps"}


@functools.cache
def kernel(function: Callable[..., None], element: np.dtype) -> Any:
    """An entry point compiled for float32 or float64; one whose name ends in ``_parallel`` for several threads."""
    number = numba.from_dtype(element)

    def kind(name: str) -> Any:
        if name in _READ or name in _WRITTEN:
            return types.Array(number, _READ[name] if name in _READ else _WRITTEN[name], "C", readonly=name in _READ)
        if name == "starts":
            return types.Array(types.int64, 1, "C", readonly=True)
        return number if name in _REAL else types.int64

    parallel = function.__name__.endswith("_parallel")
    signature = tuple(kind(name) for name in inspect.signature(function).parameters)
    return numba.njit(signature, error_model="numpy", nogil=True, cache=True, parallel=parallel)(function)
