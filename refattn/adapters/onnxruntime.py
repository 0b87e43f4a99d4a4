"""ONNX Runtime on the CPU, running the ONNX operator ``Attention`` in the lowest opset that can say the call (23, 24 or 25).

Meaning: without a cache ``is_causal`` is aligned top-left; ``nonpad_kv_seqlen`` (opset 24) equal to S puts the queries at the end, which is
bottom-right; ``left_window_size``, ``right_window_size`` (opset 25) count keys beside that position.  A boolean ``attn_mask`` is True where a
query may attend and a floating one is added, after soft-cap; both compose with ``is_causal``.  A mask and a bias together are one floating
mask with -inf.  Query head h reads key-value head ``h // (Hq // Hkv)``.  A row that sees no key is 0.  Scale and soft-cap are float32
attributes, and sqrt(scale) multiplies both q and k.

Opsets 23 and 24 run a native kernel, which in float16 keeps scaled operands, scores and weights in float16; opset 25 runs the operator's
definition as a graph.  Broadcast masks are expanded first: the operator pads a short last axis instead of broadcasting it.

Cannot say: sinks, scales that are not positive, axes of length zero; bfloat16 (no kernel); float64 (its scale is a float32).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..candidate import Candidate, Inexpressible
from . import OPERANDS, PARAMS, refuse

REQUIRES = ("onnx", "onnxruntime")
INSTALL = "pip install onnx onnxruntime"
CANNOT = {
    "sinks": "no sinks",
    "float64": "its scale is a float32, whose square root is taken in float32",
    "bfloat16": "no bfloat16 kernel on the CPU",
}
DTYPES = ("float32", "float16")


def load() -> Candidate:
    """The ONNX Attention operator on the installed ONNX Runtime as a candidate."""
    import onnxruntime

    name = f"onnxruntime {onnxruntime.__version__} Attention"
    return Candidate(name, _call, OPERANDS - CANNOT.keys(), PARAMS - CANNOT.keys(), profile="eager")


def convert(x: np.ndarray) -> np.ndarray:
    """`x`, contiguous and in native byte order: a session takes NumPy arrays."""
    return np.asarray(x, x.dtype.newbyteorder("="), order="C")


def _call(operands: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> np.ndarray:
    refuse(sys.modules[__name__], operands, params)
    feeds = {name: convert(operands[name]) for name in ("q", "k", "v")}
    if any(0 in x.shape for x in feeds.values()):
        raise Inexpressible("axes of length zero are refused")
    attributes = _attributes(params)
    n_q, n_k = feeds["q"].shape[2], feeds["k"].shape[2]
    mask = _attn_mask(operands, n_q, n_k)
    if mask is not None:
        feeds["mask"] = mask
    windowed = "left_window_size" in attributes
    at_the_end = n_q != n_k and (params.get("causal") is True or (windowed and not params.get("causal")))
    if at_the_end:
        feeds["nonpad"] = np.full(feeds["q"].shape[0], n_k, np.int64)
    opset = 25 if windowed else 24 if at_the_end else 23
    signature = tuple((name, x.dtype.name, x.ndim) for name, x in feeds.items())
    session = _session(opset, signature, tuple(attributes.items()))
    return session.run(None, feeds)[0]


def _attributes(params: Mapping[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if params.get("causal"):
        attributes["is_causal"] = 1
    if params.get("scale") is not None:
        if params["scale"] <= 0:
            raise Inexpressible("the scale must be positive: its square root is taken")
        attributes["scale"] = float(params["scale"])
    if params.get("softcap") is not None:
        attributes["softcap"] = float(params["softcap"])
    if params.get("window") is not None:
        left, right = params["window"]
        attributes |= {"left_window_size": -1 if left is None else left, "right_window_size": -1 if right is None else right}
    return attributes


def _attn_mask(operands: Mapping[str, np.ndarray], n_q: int, n_k: int) -> np.ndarray | None:
    bias, mask = operands.get("bias"), operands.get("mask")
    if bias is None and mask is None:
        return None
    both = bias if mask is None else mask if bias is None else np.where(mask, bias, bias.dtype.type(-np.inf))
    assert both is not None
    lead = (1,) * (4 - both.ndim) + both.shape[: max(both.ndim - 2, 0)]
    return convert(np.broadcast_to(both, (*lead[:2], n_q, n_k)))


@functools.lru_cache(maxsize=128)
def _session(opset: int, signature: tuple[tuple[str, str, int], ...], attributes: tuple[tuple[str, Any], ...]) -> Any:
    """A session for one node; shapes stay symbolic, so a signature serves every size."""
    import onnxruntime
    from onnx import TensorProto, helper

    codes = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bool": TensorProto.BOOL, "int64": TensorProto.INT64}
    given = {name: helper.make_tensor_value_info(name, codes[dtype], [f"{name}{n}" for n in range(ndim)]) for name, dtype, ndim in signature}
    slots = ["q", "k", "v", "mask", "", "", "nonpad"]  # the two between are the cache's past keys and values
    inputs = [name if name in given else "" for name in slots]
    while not inputs[-1]:  # opset 23 has no slot for nonpad
        inputs.pop()
    node = helper.make_node("Attention", inputs, ["out"], **dict(attributes))
    out = helper.make_tensor_value_info("out", codes[signature[0][1]], None)
    graph = helper.make_graph([node], "attention", list(given.values()), [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error comes back as an exception; the log would say it a second time
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
