"""Plain NumPy: the textbook formula on whole score matrices, a second transcription that shares nothing with the definition.

Arithmetic is in the operands' dtype for float64 and float32, and in float32 with one final rounding for narrower types.  Everything of the
softmax variant can be said, sinks and windows included.  A row that sees no key is 0 and its lse -inf.  Hidden weights are exact zeros that
still multiply v, so NaN in a hidden value row shows, as it does in every framework that forms the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..candidate import Candidate
from . import OPERANDS, PARAMS

REQUIRES = ("numpy",)
INSTALL = "pip install numpy"
CANNOT: dict[str, str] = {}
DTYPES = ("float64", "float32", "float16", "bfloat16")


def load() -> Candidate:
    """Whole-matrix NumPy attention as a candidate."""
    return Candidate(f"numpy {np.__version__} einsum", attention, OPERANDS, PARAMS, returns=("out", "lse"))


def convert(x: np.ndarray) -> np.ndarray:
    """`x` itself."""
    return x


def attention(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention, out and lse.

    Parameters
    ----------
    operands : mapping
        q (B, Hq, T, D), k (B, Hkv, S, D), v (B, Hkv, S, E) and, optionally, bias and mask (broadcast to B, Hq, T, S) and sinks (Hq).
    params : mapping
        scale, softcap, causal, window; those missing are at their defaults.

    Returns
    -------
    out : ndarray, shape (B, Hq, T, E), of q's dtype
    lse : ndarray, shape (B, Hq, T), float32 or float64
    """
    dtype = operands["q"].dtype
    work = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    q, k, v = (operands[name].astype(work) for name in ("q", "k", "v"))
    heads, n_q, n_k = q.shape[1], q.shape[2], k.shape[2]
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scale, softcap, causal = params.get("scale"), params.get("softcap"), params.get("causal", False)

    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        s = np.einsum("bhid,bhjd->bhij", q, k) * work.type(q.shape[3] ** -0.5 if scale is None else scale)
        if softcap is not None:
            s = work.type(softcap) * np.tanh(s / work.type(softcap))
        if operands.get("bias") is not None:
            s = s + operands["bias"].astype(work)
        seen = _visible(n_q, n_k, causal, params.get("window"))
        if operands.get("mask") is not None:
            seen = seen & operands["mask"]
        s = np.where(seen, s, work.type(-np.inf))

        sink = np.full(heads, -np.inf, work) if operands.get("sinks") is None else operands["sinks"].astype(work)
        sink = sink[:, None, None]
        top = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
        empty = top == -np.inf
        shift = np.where(empty, work.type(0), top)  # -inf - -inf would be NaN
        weights = np.exp(s - shift)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(sink - shift)
        out = np.einsum("bhij,bhje->bhie", weights, v) / np.where(empty, work.type(1), total)
        lse = np.where(empty, top, shift + np.log(np.where(empty, work.type(1), total)))[..., 0]
    return out.astype(dtype), lse


def _visible(n_q: int, n_k: int, causal: Any, window: tuple[int | None, int | None] | None) -> np.ndarray:
    """Which pairs the causal mask and the window allow, (T, S)."""
    ahead = np.arange(n_k) - np.arange(n_q)[:, None] - (0 if causal == "top_left" else n_k - n_q)  # key's position minus the query's
    left, right = window or (None, None)
    seen = np.ones((n_q, n_k), bool)
    if causal:
        seen &= ahead <= 0
    if left is not None:
        seen &= ahead >= -left
    if right is not None:
        seen &= ahead <= right
    return seen
