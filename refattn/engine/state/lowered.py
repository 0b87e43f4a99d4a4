"""A recurrence in numbers: what every form of it takes, and in which its gradients come back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: The five axes of a product.
BATCH, HEADS, TOKENS, WRITES, WIDTH = range(5)


@functools.cache
def places_of(own_heads: str, steps_axis: str) -> Mapping[str, int]:
    """Which of the five axes an axis of that name is, as a recurrence's `heads` and `steps` say; every other is a width."""
    heads = (own_heads,) if own_heads else ("Hq", "Hkv", "H", "G")
    steps = {steps_axis: WRITES} if steps_axis else {}
    return {"B": BATCH, **dict.fromkeys(heads, HEADS), "T": TOKENS, "S": TOKENS, **steps}


@dataclass(frozen=True, eq=False)
class Lowered:
    """Arrays of one format, float32 or float64, C-contiguous; H states, each read by Hq // H query heads (query head h by state h // (Hq // H)).

        S <- exp(g_t) * S * exp(f_t)                        g_t over the rows of S, or one number; f_t over its columns
        S <- S + b_r (w_r - e_r^T S)^T    for r = 0 .. R-1  in this order; if `old`, every e_r reads S as it was before the token, not faded
        out_t = scale * q_t^T S                             or, if `exclusive`, with S as it was before the token, not faded, and
        out_t = scale * q_t^T (S + sum_r (u_t * b_r) w_r^T)

    Gradients are one of these too, each array holding that of its namesake, None where that is None.

    q
        [B, Hq, T, K]
    b, w
        Keys and values of the R writes of a token: [B, H, T, R, K] and [B, H, T, R, V].
    S0
        State before the first token: [B, H, K, V].
    g
        Logarithm of the decay, [B, H, T, K] or [B, H, T, 1]; -inf forgets.  None: nothing fades.
    e
        What an erasure reads, [B, H, T, R, K]; None: nothing is erased.
    u
        Bonus of the token's own keys, [B, H, T, K], of exclusive reads only; None: the token does not see itself.
    f
        Logarithm of the decay of columns, [B, H, T, V], where nothing is `old` or `exclusive`.  None: they do not fade.
    """

    q: np.ndarray
    b: np.ndarray
    w: np.ndarray
    S0: np.ndarray
    g: np.ndarray | None = None
    e: np.ndarray | None = None
    u: np.ndarray | None = None
    f: np.ndarray | None = None
    old: bool = False
    exclusive: bool = False
    scale: float = 1.0
