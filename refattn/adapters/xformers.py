"""xformers' ``memory_efficient_attention`` on a CUDA device.  Written from the documented signature, not run here.

Meaning: layout B M H K; causal is a mask object, ``LowerTriangularMask`` top-left and ``LowerTriangularFromBottomRightMask`` bottom-right;
``LocalAttentionFromBottomRightMask(left, right)`` is a window that does not count the query's own position; a bias is a tensor of shape
(B, H, M, Mk), and a boolean mask is one of 0 and -inf; grouped heads are a fifth axis, expanded by the caller; ``scale=None`` is 1/sqrt(D).
A row that sees no key has no documented answer; its own reference gives NaN.

Cannot say: soft-cap, sinks, a window with no limit on one side, a causal mask object together with a window, a mask or a bias (there is one
``attn_bias``; causal with a bias has ``add_bias``, top-left only), lse, float64.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..candidate import Candidate, Inexpressible
from ..errors import BackendUnavailableError
from . import OPERANDS, PARAMS, refuse
from .torch import convert

REQUIRES = ("torch", "xformers.ops")
INSTALL = "pip install xformers (a build for your CUDA)"
CANNOT = {"softcap": "no soft-cap", "sinks": "no sinks"}
DTYPES = ("float32", "float16", "bfloat16")
DEVICE = "cuda"


def load() -> Candidate:
    """memory_efficient_attention of the installed xformers as a candidate.

    Raises
    ------
    BackendUnavailableError
        When there is no CUDA device.
    """
    import torch
    import xformers

    if not torch.cuda.is_available():
        raise BackendUnavailableError("xformers: its kernels need a CUDA device, and torch.cuda sees none here")
    return Candidate(
        f"xformers {xformers.__version__} memory_efficient_attention",
        _call,
        OPERANDS - CANNOT.keys(),
        PARAMS - CANNOT.keys(),
        fixed={"empty_rows": "nan"},
    )


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
    from xformers.ops import memory_efficient_attention

    refuse(sys.modules[__name__], operands, params)
    q, k, v = (convert(operands[name]).to(DEVICE).transpose(1, 2) for name in ("q", "k", "v"))
    if 0 in (*q.shape, *k.shape):
        raise Inexpressible("axes of length zero have no documented answer")
    attn_bias = _attn_bias(operands, params, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != kv_heads:
        if attn_bias is not None and hasattr(attn_bias, "unflatten"):
            attn_bias = attn_bias.unflatten(1, (kv_heads, heads // kv_heads))
        q = q.unflatten(2, (kv_heads, heads // kv_heads))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, heads // kv_heads, -1) for x in (k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=attn_bias, scale=params.get("scale"))
    return (out.flatten(2, 3) if heads != kv_heads else out).transpose(1, 2).cpu()


def _attn_bias(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], full: tuple[int, ...]) -> Any:
    """The one attn_bias there is: a mask object, or a tensor of the full shape."""
    from xformers.ops.fmha import attn_bias as kinds

    causal, window = params.get("causal", False), params.get("window")
    bias, mask = operands.get("bias"), operands.get("mask")
    dense = bias is not None or mask is not None
    if (window is not None and (causal or dense)) or (causal and dense):
        raise Inexpressible("one attn_bias: a causal or window mask object excludes everything else")
    if window is not None:
        if None in window:
            raise Inexpressible("a local mask object has two limits")
        return kinds.LocalAttentionFromBottomRightMask(window_left=window[0], window_right=window[1])
    if causal:
        return kinds.LowerTriangularMask() if causal == "top_left" else kinds.LowerTriangularFromBottomRightMask()
    if not dense:
        return None
    dtype = operands["q"].dtype
    added = np.zeros((), dtype) if bias is None else bias
    if mask is not None:
        added = np.where(mask, added, dtype.type(-np.inf))
    return convert(np.array(np.broadcast_to(added, full), dtype)).to(DEVICE)
