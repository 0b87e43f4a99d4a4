"""A recurrence in numbers: what every form of it takes, and in which its gradients come back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    written_first
        Whether all is written before anything is read, and nothing fades or is erased: then b and w have as many tokens as there are, and q has its
        own.
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
    written_first: bool = False

    def in_a_row(self) -> Lowered:
        """The same with one token after the other, of which the first are not read and the last write nothing."""
        reads, writes = self.q.shape[2], self.b.shape[2]
        q = _padded(self.q, writes, 0)
        return replace(self, q=q, b=_padded(self.b, 0, reads), w=_padded(self.w, 0, reads), written_first=False)

    def taken_apart(self, of: Lowered) -> Lowered:
        """The way back, to the tokens that those of `of` are."""
        writes = of.b.shape[2]
        return replace(self, q=self.q[:, :, writes:], b=self.b[:, :, :writes], w=self.w[:, :, :writes], written_first=True)


def _padded(x: np.ndarray, before: int, after: int) -> np.ndarray:
    """Zeros before the first token and after the last."""
    return np.pad(x, [(0, 0), (0, 0), (before, after), *[(0, 0)] * (x.ndim - 3)])
