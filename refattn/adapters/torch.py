"""PyTorch's ``torch.nn.functional.scaled_dot_product_attention`` on the CPU, and its gradients.

Meaning: ``is_causal=True`` is aligned top-left, ``torch.nn.attention.bias.causal_lower_right`` bottom-right; a boolean ``attn_mask`` is True
where a query may attend, a floating one is added to the scaled scores; ``scale=None`` is 1/sqrt(D); query head h reads key-value head
``h // (Hq // Hkv)`` (``enable_gqa=True``).  A row that sees no key, by boolean or by -inf, is 0 on every CPU path.  A mask together with
``is_causal`` is an error, so causal with a mask or a bias goes into one ``attn_mask``, as its documentation spells it.

Cannot say: soft-cap, sliding window, sinks (each would be our own mask or scores, not its feature), lse.

With E equal to D the flash kernel answers at every size, with E different from D the math path; under ``torch.nn.attention.sdpa_kernel``
the caller chooses.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..candidate import Candidate
from ..errors import DtypeError
from . import OPERANDS, PARAMS, refuse

REQUIRES = ("torch",)
INSTALL = "pip install torch"
CANNOT = {"softcap": "no soft-cap", "window": "no sliding window", "sinks": "no sinks"}
DTYPES = ("float64", "float32", "float16", "bfloat16")

#: NumPy has no such type of its own, so its bits travel as integers: ml_dtypes name -> torch name.
_BY_BITS = {name: name for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")}


def load() -> Candidate:
    """Scaled dot-product attention of the installed PyTorch as a candidate."""
    import torch

    name = f"torch {torch.__version__} scaled_dot_product_attention"
    return Candidate(name, _call, OPERANDS - CANNOT.keys(), PARAMS - CANNOT.keys(), profile="torch-cpu-flash", gradients=_gradients)


def convert(x: np.ndarray) -> Any:
    """A tensor with the same bits and strides; it shares memory with `x` unless `x` is read-only, byte-swapped or runs backwards.

    Raises
    ------
    DtypeError
        When PyTorch has no such element type.
    """
    import torch

    bits = x.dtype.name if ml_dtypes_only(x.dtype) else ""
    if bits and bits not in _BY_BITS:
        raise DtypeError(f"torch has no element type {bits}")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    if any(step < 0 for step in x.strides):
        x = x.copy()
    elif not x.flags.writeable:
        x = _writable_twin(x)
    if not bits:
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(f"u{x.itemsize}")).view(getattr(torch, _BY_BITS[bits]))


def ml_dtypes_only(dtype: np.dtype) -> bool:
    """Whether the type comes from ml_dtypes, which no framework but JAX and MLX reads."""
    return dtype.type.__module__ == ml_dtypes.__name__


def _writable_twin(x: np.ndarray) -> np.ndarray:
    """A copy with the strides of `x`, gaps and broadcast axes included: a tensor cannot be read-only."""
    low, high = np.lib.array_utils.byte_bounds(x)
    memory = np.empty(high - low, np.uint8)
    twin: np.ndarray = np.ndarray(x.shape, x.dtype, memory.data, strides=x.strides) if x.size else np.empty(x.shape, x.dtype)
    twin[...] = x
    return twin


def vjp(function: Callable[[Mapping[str, Any]], Mapping[str, Any]], leaves: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray]) -> Any:
    """Gradients by autograd; one that does not depend on a leaf is zero."""
    import torch

    tensors = {name: convert(x).requires_grad_() for name, x in leaves.items()}
    outputs = function(tensors)
    asked = [outputs[name] for name in cotangents]
    grads = torch.autograd.grad(asked, list(tensors.values()), [convert(x) for x in cotangents.values()], materialize_grads=True)
    return {"d_" + name: x for name, x in zip(tensors, grads, strict=True)}


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
    refuse(sys.modules[__name__], operands, params)
    return _attention({name: convert(x) for name, x in operands.items()}, params)


def _gradients(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], cotangents: Mapping[str, np.ndarray]) -> Any:
    refuse(sys.modules[__name__], operands, params)
    fixed = {name: convert(x) for name, x in operands.items() if x.dtype == np.bool_}
    leaves = {name: x for name, x in operands.items() if name not in fixed}
    return vjp(lambda tensors: {"out": _attention({**tensors, **fixed}, params)}, leaves, cotangents)


def _attention(tensors: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    mask, is_causal = _attn_mask(tensors, params.get("causal", False), q.shape[2], k.shape[2])
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=params.get("scale"), enable_gqa=grouped)


def _attn_mask(tensors: Mapping[str, Any], causal: Any, n_q: int, n_k: int) -> tuple[Any, bool]:
    """What to pass as ``attn_mask`` and ``is_causal``."""
    import torch

    bias, allowed = (_four_axes(tensors.get(name)) for name in ("bias", "mask"))
    top_left = causal == "top_left" or (causal and n_q == n_k)
    if bias is None and allowed is None:
        return (_lower_right(n_q, n_k) if causal and not top_left else None), bool(top_left)
    if causal:
        triangle = torch.ones(n_q, n_k, dtype=torch.bool).tril(0 if top_left else n_k - n_q)
        allowed = triangle if allowed is None else allowed & triangle
    if bias is None or allowed is None:
        return (allowed if bias is None else bias), False
    return torch.where(allowed, bias, -torch.inf), False


def _four_axes(x: Any) -> Any:
    """An attn_mask must have at least the last two axes."""
    return None if x is None else x[(None,) * (4 - x.ndim)]


def _lower_right(n_q: int, n_k: int) -> Any:
    from torch.nn.attention.bias import causal_lower_right

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lower right causal bias will produce NaNs")  # true elsewhere; rows of 0 on the CPU
        return causal_lower_right(n_q, n_k)
