"""An implementation to be judged, as the judge sees it: something that takes named NumPy arrays and parameters and returns arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class Inexpressible(Exception):
    """Raised by a candidate that has no way to say a call.  The text says why, in a few words; the call counts as not examined."""


@dataclass(frozen=True)
class Candidate:
    """An implementation to be judged.

    Attributes
    ----------
    name : str
        As reports call it.
    call : callable
        ``call(operands, params)``: both by name, operands as NumPy arrays (BHTD, in the dtype under test), only those given and only
        names of `operands` and `params`.  Returns one array per name in `returns` (a single one bare), in any array type, BHTD.
    operands, params : frozenset of str
        Names of the variant's operands and parameters that it takes.
    returns : tuple of str
    fixed : mapping
        Parameters whose value is how it behaves, not something it can be told: ``{"empty_rows": "uniform"}``.
    profile : str
        Arithmetic it uses, a name of `refattn.oracle.profiles`; "" for the usual one of the dtype.
    variant : str
    words : bool
        Whether it understands parameter values that are words of ours, such as ``causal="top_left"``.
    gradients : callable, optional
        ``gradients(operands, params, cotangents)``: its backward pass, for cotangents by output name, BHTD.  Returns gradients by name
        (``d_q``, ``d_k``, ...) as a mapping or named tuple, each in its operand's shape, or all of the given real operands' in order.
    cotangents : tuple of str
        Outputs that `gradients` takes cotangents of.
    """

    name: str
    call: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], Any]
    operands: frozenset[str]
    params: frozenset[str] = frozenset()
    returns: tuple[str, ...] = ("out",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    profile: str = ""
    variant: str = "softmax"
    words: bool = True
    gradients: Callable[[Mapping[str, np.ndarray], Mapping[str, Any], Mapping[str, np.ndarray]], Any] | None = None
    cotangents: tuple[str, ...] = ("out",)
