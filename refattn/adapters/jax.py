"""``jax.nn.dot_product_attention`` through XLA.

Meaning: layout BTNH; ``is_causal`` and ``local_window_size=(left, right)`` are aligned top-left, the window inclusive and not counting the
query's own position; ``mask`` is True where a query may attend; ``bias`` is added to the scaled scores; ``scale=None`` is 1/sqrt(D); query
head h reads key-value head ``h // (Hq // Hkv)``.  Hidden scores become a large negative number, so a row that sees no key is the mean of
*all* values; a row whose visible keys all have a bias of -inf is NaN, or the mean of the keys the mask hides.  Scores and softmax are
float32, the normalised weights are rounded to the operands' dtype before they meet v.

Cannot say: bottom-right alignment when T != S (causal or window), value width other than key width, soft-cap, sinks; float64, because its
softmax is in float32 whatever the operands are.  Its ``return_residual`` (lse in the operands' dtype, about -2e38 for an empty row) is not asked for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..candidate import Candidate, Inexpressible
from . import OPERANDS, PARAMS, refuse

REQUIRES = ("jax",)
INSTALL = "pip install jax"
CANNOT = {"softcap": "no soft-cap", "sinks": "no sinks", "float64": "its softmax is in float32 whatever the operands are"}
DTYPES = ("float32", "float16", "bfloat16")


def load() -> Candidate:
    """jax.nn.dot_product_attention of the installed JAX as a candidate."""
    import jax

    return Candidate(
        f"jax {jax.__version__} nn.dot_product_attention",
        _call,
        OPERANDS - CANNOT.keys(),
        PARAMS - CANNOT.keys(),
        fixed={"empty_rows": "uniform"},
        profile="jax-xla",
        gradients=_gradients,
    )


def convert(x: np.ndarray) -> Any:
    """A JAX array of the same dtype (a copy: JAX arrays neither change nor have strides).

    A 64-bit array stays 64-bit, though JAX *computes* in 64 bits only where its own ``jax_enable_x64`` is on.
    """
    import jax.numpy as jnp

    native = x.astype(x.dtype.newbyteorder("="), copy=False)
    with _wide() if native.dtype.itemsize == 8 else contextlib.nullcontext():
        return jnp.array(native)


def _wide() -> Any:
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # where it was before JAX 0.8

    return enable_x64()


def vjp(function: Callable[[Mapping[str, Any]], Mapping[str, Any]], leaves: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray]) -> Any:
    """Gradients by ``jax.vjp``."""
    import jax

    _, pull = jax.vjp(lambda arrays: {name: function(arrays)[name] for name in cotangents}, {name: convert(x) for name, x in leaves.items()})
    (found,) = pull({name: convert(x) for name, x in cotangents.items()})
    return {"d_" + name: x for name, x in found.items()}


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
    window = _window(operands, params)
    return _attention({name: convert(x) for name, x in operands.items()}, params, window)


def _gradients(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], cotangents: Mapping[str, np.ndarray]) -> Any:
    window = _window(operands, params)
    fixed = {name: convert(x) for name, x in operands.items() if x.dtype == np.bool_}
    leaves = {name: x for name, x in operands.items() if name not in fixed}
    return vjp(lambda arrays: {"out": _attention({**arrays, **fixed}, params, window)}, leaves, cotangents)


def _attention(arrays: Mapping[str, Any], params: Mapping[str, Any], window: Any) -> Any:
    import jax

    q, k, v = (arrays[name].swapaxes(1, 2) for name in ("q", "k", "v"))
    bias, mask = arrays.get("bias"), arrays.get("mask")
    causal = bool(params.get("causal", False))
    out = jax.nn.dot_product_attention(
        q, k, v, bias, mask, scale=params.get("scale"), is_causal=causal, local_window_size=window, implementation="xla"
    )
    return out.swapaxes(1, 2)


def _window(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> tuple[int, int] | None:
    """What to pass as ``local_window_size``; refuses what cannot be said."""
    refuse(sys.modules[__name__], operands, params)
    n_q, n_k = operands["q"].shape[2], operands["k"].shape[2]
    causal, window = params.get("causal", False), params.get("window")
    if operands["v"].shape[3] != operands["k"].shape[3]:
        raise Inexpressible("the value width must equal the key width")
    if n_q != n_k and (causal is True or (window is not None and causal != "top_left")):
        raise Inexpressible("causal and window are aligned top-left only")
    if window is not None:
        left, right = (n_q + n_k if side is None else side for side in window)
        window = left, right
    _refuse_rows_emptied_by_bias(operands, causal, window)
    return window


def _refuse_rows_emptied_by_bias(operands: Mapping[str, np.ndarray], causal: Any, window: Any) -> None:
    """A row can be emptied by masks alone (the mean of all values) or with the help of a bias, which has no one answer."""
    bias, mask = operands.get("bias"), operands.get("mask")
    if bias is None or not np.isneginf(bias.astype(np.float32)).any():
        return
    n_q, n_k = operands["q"].shape[2], operands["k"].shape[2]
    ahead = np.arange(n_k) - np.arange(n_q)[:, None]
    left, right = window or (n_q + n_k, n_q + n_k)
    seen = (ahead >= -left) & (ahead <= (min(right, 0) if causal else right))
    seen = seen if mask is None else seen & mask
    emptied = seen.any(axis=-1) & ~(seen & (bias > -np.inf)).any(axis=-1)
    if emptied.any():
        raise Inexpressible("a row whose visible keys all have a bias of -inf is NaN or a mean of hidden values, whichever else hides keys")
