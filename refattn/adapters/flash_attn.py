"""flash-attn's ``flash_attn_func`` on a CUDA device.  Written from the documented signature, not run here.

Meaning (version 2.1 and later): layout B S H D; ``causal`` and ``window_size=(left, right)`` are aligned bottom-right, -1 is no limit, the
query's own position is not counted; ``softcap`` acts on scaled scores, 0 is none; grouped heads ``h // (Hq // Hkv)``;
``softmax_scale=None`` is 1/sqrt(D).  A row that sees no key is 0.  ``return_attn_probs=True`` also returns the natural-log lse, (B, H, T), which
for an empty row is +inf in version 2 and -inf in version 3.

Cannot say: masks, biases, sinks, top-left alignment when T != S, value width other than key width, width above 256, float32 and float64.
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

REQUIRES = ("torch", "flash_attn")
INSTALL = "pip install flash-attn --no-build-isolation"
CANNOT = {"mask": "no mask operand", "bias": "no bias operand", "sinks": "no sinks"}
DTYPES = ("float16", "bfloat16")
DEVICE = "cuda"


def load() -> Candidate:
    """flash_attn_func of the installed flash-attn as a candidate.

    Raises
    ------
    BackendUnavailableError
        When there is no CUDA device.
    """
    import flash_attn
    import torch

    if not torch.cuda.is_available():
        raise BackendUnavailableError("flash-attn: its kernels need a CUDA device, and torch.cuda sees none here")
    return Candidate(
        f"flash-attn {flash_attn.__version__} flash_attn_func", _call, OPERANDS - CANNOT.keys(), PARAMS - CANNOT.keys(), returns=("out", "lse")
    )


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> tuple[Any, Any]:
    from flash_attn import flash_attn_func

    refuse(sys.modules[__name__], operands, params)
    (_, _, n_q, d), n_k = operands["q"].shape, operands["k"].shape[2]
    causal = params.get("causal", False)
    if causal == "top_left" and n_q != n_k:
        raise Inexpressible("causal and window are aligned bottom-right only")
    if operands["v"].shape[3] != d or d > 256:
        raise Inexpressible("the value width must equal the key width, and be at most 256")
    if any(0 in operands[name].shape for name in ("q", "k", "v")):
        raise Inexpressible("axes of length zero have no documented answer")
    q, k, v = (convert(operands[name]).to(DEVICE).transpose(1, 2) for name in ("q", "k", "v"))
    out, lse, _ = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=params.get("scale"),
        causal=bool(causal),
        window_size=tuple(-1 if side is None else side for side in params.get("window") or (None, None)),
        softcap=params.get("softcap") or 0.0,
        return_attn_probs=True,
    )
    return out.transpose(1, 2).cpu(), lse.cpu()
