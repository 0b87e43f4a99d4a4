"""MLX's ``mx.fast.scaled_dot_product_attention`` on the CPU stream.

Meaning: ``mask="causal"`` is aligned bottom-right; a boolean mask is True where a query may attend, a floating one is added to the scaled
scores; sinks are logits per query head that enter the denominator only; ``scale`` must be given; query head h reads key-value head
``h // (Hq // Hkv)``.  There is one mask, so causal with a mask or a bias is combined before the call.  Hidden scores become the least
finite number, so a row that sees no key is the mean of *all* values; emptied by an additive -inf it is NaN; with a sink it is 0.  On the CPU the
scores are kept in the operands' dtype (in bfloat16 they have eight bits), softmax is float32.

Cannot say: top-left alignment when T != S, soft-cap, sliding window, lse; float64, because its softmax is in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..candidate import Candidate, Inexpressible
from ..errors import DtypeError
from . import OPERANDS, PARAMS, refuse

REQUIRES = ("mlx.core",)
INSTALL = "pip install 'mlx[cpu]' (on a Mac: pip install mlx)"
CANNOT = {
    "softcap": "no soft-cap",
    "window": "no sliding window",
    "float64": "its softmax is in float32 whatever the operands are",
}
DTYPES = ("float32", "float16", "bfloat16")


def load() -> Candidate:
    """mx.fast.scaled_dot_product_attention of the installed MLX as a candidate."""
    from importlib.metadata import version

    return Candidate(
        f"mlx {version('mlx')} fast.scaled_dot_product_attention",
        _call,
        OPERANDS - CANNOT.keys(),
        PARAMS - CANNOT.keys(),
        fixed={"empty_rows": "uniform"},
        profile="eager",
    )


def convert(x: np.ndarray) -> Any:
    """An MLX array of the same dtype (a copy: MLX arrays do not share NumPy's memory or strides).

    Raises
    ------
    DtypeError
        When MLX has no such element type.
    """
    import mlx.core as mx

    if not hasattr(mx, x.dtype.name if x.dtype != np.bool_ else "bool_"):
        raise DtypeError(f"mlx has no element type {x.dtype.name}")
    native = np.asarray(x, x.dtype.newbyteorder("="), order="C")
    if native.dtype == ml_dtypes.bfloat16:
        return mx.array(native)
    return mx.array(native, dtype=getattr(mx, "bool_" if native.dtype == np.bool_ else native.dtype.name))  # or float64 would narrow


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
    import mlx.core as mx

    refuse(sys.modules[__name__], operands, params)
    q, k, v = (convert(operands[name]) for name in ("q", "k", "v"))
    mask = _mask(operands, params.get("causal", False), q.shape[2], k.shape[2])
    sinks = None if operands.get("sinks") is None else convert(operands["sinks"])
    scale = q.shape[3] ** -0.5 if params.get("scale") is None else params["scale"]
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, stream=mx.cpu)
    mx.eval(out)
    return out


def _mask(operands: Mapping[str, np.ndarray], causal: Any, n_q: int, n_k: int) -> Any:
    bias, allowed = operands.get("bias"), operands.get("mask")
    if causal == "top_left" and n_q != n_k:
        raise Inexpressible("causal is aligned bottom-right only")
    if bias is None and allowed is None:
        return "causal" if causal else None
    if causal:
        triangle = np.tri(n_q, n_k, n_k - n_q, dtype=bool)
        allowed = triangle if allowed is None else allowed & triangle
    if bias is None:
        assert allowed is not None
        return convert(allowed)
    added = bias if allowed is None else np.where(allowed, bias, bias.dtype.type(-np.inf))
    if operands.get("sinks") is None and n_k and np.broadcast_to(added == -np.inf, (*added.shape[:-1], n_k)).all(axis=-1).any():
        raise Inexpressible("a row emptied by an additive mask is NaN, by a boolean one the mean of all values")
    return convert(added)
