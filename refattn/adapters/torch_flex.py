"""PyTorch's ``flex_attention``, run eagerly (not compiled) on the CPU, forward only.

Meaning: ``mask_mod`` is True where a query may attend, and is applied after ``score_mod``; ``score_mod`` sees the scaled score, so soft-cap
then bias is the order written here; causal, windows, masks and biases are the caller's functions, with captured tensors, as its
documentation shows.  ``enable_gqa=True`` groups heads ``h // (Hq // Hkv)``.  A row that sees no key is 0 with lse -inf.  lse is natural-log.
Scores and softmax are float32 (float64 for float64) and the normalised weights are rounded to the operands' dtype before they meet v.

Cannot say: sinks; no keys at all (S=0), where its row maximum has nothing to reduce; no queries together with a mask or a score change.

Uncompiled calls warn and go through Dynamo unless the switch that the warning names is on; the switch is put back after each call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..candidate import Candidate, Inexpressible
from ..errors import BackendUnavailableError
from . import OPERANDS, PARAMS, refuse
from .torch import convert

REQUIRES = ("torch", "torch.nn.attention.flex_attention")
INSTALL = "pip install 'torch>=2.9'"
CANNOT = {"sinks": "no sinks"}
DTYPES = ("float64", "float32", "float16", "bfloat16")


def load() -> Candidate:
    """FlexAttention of the installed PyTorch, eager, as a candidate.

    Raises
    ------
    BackendUnavailableError
        When this PyTorch has no ``AuxRequest``, the way to ask for lse since 2.9.
    """
    import torch
    from torch.nn.attention import flex_attention

    if not hasattr(flex_attention, "AuxRequest"):
        raise BackendUnavailableError(f"torch-flex: torch {torch.__version__} is too old to return lse; install it with: {INSTALL}")

    return Candidate(
        f"torch {torch.__version__} flex_attention (eager)", _call, OPERANDS - CANNOT.keys(), PARAMS - CANNOT.keys(), returns=("out", "lse")
    )


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    refuse(sys.modules[__name__], operands, params)
    q, k, v = (convert(operands[name]) for name in ("q", "k", "v"))
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    if n_k == 0:
        raise Inexpressible("no keys (S=0): the row maximum is taken over nothing, an error")
    full = (batch, heads, n_q, n_k)
    mask_mod, score_mod = _mask_mod(operands, params, full), _score_mod(operands, params, full)
    if 0 in full and (mask_mod or score_mod):
        raise Inexpressible("no queries (T=0 or B=0) with a mask_mod or score_mod: indexing by no index is an error")
    with _eager():
        blocks = None if mask_mod is None else create_block_mask(mask_mod, *full, device="cpu")
        grouped = heads != k.shape[1]
        request = AuxRequest(lse=True)
        out, aux = flex_attention(q, k, v, score_mod, blocks, params.get("scale"), enable_gqa=grouped, return_aux=request)
    return out, q.new_empty(full[:3]) if aux.lse is None else aux.lse  # it has no lse of length zero


def _mask_mod(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], full: tuple[int, ...]) -> Any:
    causal, (left, right) = params.get("causal", False), params.get("window") or (None, None)
    mask = None if operands.get("mask") is None else convert(operands["mask"]).expand(full)
    offset = 0 if causal == "top_left" else full[3] - full[2]
    rules = []
    if mask is not None:
        rules.append(lambda b, h, i, j: mask[b, h, i, j])
    if causal:
        rules.append(lambda b, h, i, j: j <= i + offset)
    if left is not None:
        rules.append(lambda b, h, i, j: j >= i + offset - left)
    if right is not None:
        rules.append(lambda b, h, i, j: j <= i + offset + right)
    if not rules:
        return None
    from torch.nn.attention.flex_attention import and_masks

    return and_masks(*rules)


def _score_mod(operands: Mapping[str, np.ndarray], params: Mapping[str, Any], full: tuple[int, ...]) -> Any:
    import torch

    cap = params.get("softcap")
    bias = None if operands.get("bias") is None else convert(operands["bias"]).expand(full)
    if cap is None and bias is None:
        return None

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score if bias is None else score + bias[b, h, i, j]

    return score_mod


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    from torch.nn.attention import flex_attention as module

    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(module, name, False)
    setattr(module, name, True)
    try:
        yield
    finally:
        setattr(module, name, before)
