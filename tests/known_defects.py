"""Public implementations that compute something else than a caller would expect, each as the judge takes it, from the released package.

Every one is somebody's right answer to another question (PyTorch's ``is_causal`` is what its documentation says), or a mistake that its authors
know about or have mended since.  What they share: they were taken for what this project calls `softmax`, and a comparison on square shapes, on
rows that all see something, or with a loose tolerance would not have shown it.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Optional

import ml_dtypes
import numpy as np
import peer_sources

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported


@dataclass(frozen=True)
class Defect:
    """One of them.

    packages
        What has to be installed.
    source
        Where it can be read.
    code
        Of the fault, in the project's catalogue.
    check
        Keywords of `refattn.check` beside the candidate.
    right, right_variant, right_check
        The same implementation, asked what it is right about: the candidate, the variant and the keywords, where they differ.
    """

    candidate: Callable[..., Any]
    packages: tuple[str, ...]
    source: str
    code: str
    check: Mapping[str, Any] = field(default_factory=dict)
    right: Callable[..., Any] | None = None
    right_variant: str = "softmax"
    right_check: Mapping[str, Any] | None = None


# ---- PyTorch -------------------------------------------------------------------------------------------------------------------


def torch_is_causal(q, k, v, causal=False):
    """Aligned with the first key: FlashAttention's users expect the last."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def torch_multi_head_mask(q, k, v, mask=None):
    """`torch.nn.MultiheadAttention` without projections: True in its attn_mask hides."""
    import torch

    batch, heads, n_q, d = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    width = v.shape[3]
    if width > d or 0 in (batch, n_q, k.shape[2]):
        raise NotImplementedError("values wider than keys, or nothing to compute")
    v = torch.nn.functional.pad(v, (0, d - width))
    joined = [x.transpose(1, 2).flatten(2).transpose(0, 1) for x in (q, k, v)]
    eye = torch.eye(heads * d, dtype=q.dtype)
    hides = None if mask is None else mask.expand(batch, heads, n_q, k.shape[2]).flatten(0, 1)
    out, _ = torch.nn.functional.multi_head_attention_forward(
        *joined, heads * d, heads, None, None, None, None, False, 0.0, eye, None, attn_mask=hides, training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=eye, k_proj_weight=eye, v_proj_weight=eye,
    )  # fmt: skip
    return out.transpose(0, 1).unflatten(2, (heads, d)).transpose(1, 2)[..., :width]


def torch_flash_lse(q, k, v, mask=None):
    """The CPU's flash kernel gives a row that sees no key the log-sum-exp 0."""
    import torch

    if v.shape[3] != q.shape[3] or 0 in (*q.shape, *k.shape):
        raise NotImplementedError("one width, and something to compute")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    added = None if mask is None else torch.zeros(()).masked_fill(~mask, -torch.inf).to(q.dtype)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added)
    return out, lse


def torch_flash_mask_and_causal(q, k, v, mask=None, causal=False):
    """The CPU's flash kernel takes a mask and is_causal together, which the function that calls it refuses; it aligns with the first key."""
    import torch

    if v.shape[3] != q.shape[3] or 0 in (*q.shape, *k.shape):
        raise NotImplementedError("one width, and something to compute")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    added = None if mask is None else torch.zeros(()).masked_fill(~mask, -torch.inf).to(q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=bool(causal), attn_mask=added)[0]


# ---- JAX, MLX ------------------------------------------------------------------------------------------------------------------


def jax_local_window(q, k, v, window=None):
    """Its local_window_size counts from the first key on."""
    import jax

    if v.shape[3] != k.shape[3]:
        raise NotImplementedError("one width")
    sides = None if window is None else tuple(10**6 if side is None else side for side in window)
    swapped = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(*swapped, local_window_size=sides).swapaxes(1, 2)


def jax_hidden_rows(q, k, v, mask=None):
    """A row that sees no key gets the mean of all values: hidden scores are a large negative number."""
    import jax

    if v.shape[3] != k.shape[3]:
        raise NotImplementedError("one width")
    full = None if mask is None else np.broadcast_to(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), mask=full).swapaxes(1, 2)


# ---- ONNX Runtime --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _session(operator: str, inputs: tuple[str, ...], attributes: tuple[tuple[str, Any], ...], outputs: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {"lengths": TensorProto.INT32, "total": TensorProto.INT32}
    given = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in inputs if name]
    names = ["out", "present_k", "present_v"][:outputs]
    node = helper.make_node(operator, list(inputs), names, domain="com.microsoft", **dict(attributes))
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "attention", given, out), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _flat(x: np.ndarray) -> np.ndarray:
    """B H T D as the contrib operators take it: B T H*D."""
    if 0 in x.shape:
        raise NotImplementedError("an axis of length zero")
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def onnxruntime_unidirectional(q, k, v, causal=False):
    """MultiHeadAttention with unidirectional=1: the last query is never masked, whatever the lengths are."""
    heads = q.shape[1]
    k, v = (np.repeat(x, heads // x.shape[1], 1) for x in (k, v))
    session = _session("MultiHeadAttention", ("q", "k", "v"), (("num_heads", heads), ("unidirectional", int(causal))), 1)
    out = session.run(["out"], {name: _flat(x) for name, x in (("q", q), ("k", k), ("v", v))})[0]
    return out.reshape(*q.shape[:1], q.shape[2], heads, -1).swapaxes(1, 2)


def onnxruntime_local_window(q, k, v, window=None):
    """GroupQueryAttention's local_window_size counts the query's own position; it is always causal."""
    if window is None or window[1] != 0 or q.shape[2] != k.shape[2] or q.shape[3] != v.shape[3]:
        raise NotImplementedError("causal windows over one sequence, and one width")
    batch, heads, n, d = q.shape
    empty = np.zeros((batch, k.shape[1], 0, d), np.float32)
    feeds = {"q": _flat(q), "k": _flat(k), "v": _flat(v), "past_k": empty, "past_v": empty}
    feeds |= {"lengths": np.full(batch, n - 1, np.int32), "total": np.array(n, np.int32)}
    attributes = (("num_heads", heads), ("kv_num_heads", k.shape[1]), ("local_window_size", window[0]))
    out = _session("GroupQueryAttention", tuple(feeds), attributes, 3).run(["out"], feeds)[0]
    return out.reshape(batch, n, heads, d).swapaxes(1, 2)


# ---- transformers, x-transformers, attention-gym --------------------------------------------------------------------------------


def gpt_oss_sinks(q, k, v, sinks=None):
    """Its eager attention takes the softmax over scores and sinks in the operands' dtype; a kernel with float32 softmax is expected.

    Scores and weights are stored in that dtype as well, as other models' are; what it does besides shows where sinks are far above the scores.
    """
    if sinks is None:
        raise NotImplementedError("it always has sinks")
    return _eager("gpt_oss", q, k, v, sinks)


def gemma2_scores(q, k, v, softcap=None):
    """Products, scores after every step and weights are stored in the operands' dtype; the softmax itself is in float32."""
    return _eager("gemma2", q, k, v, softcap=softcap)


def _eager(model, q, k, v, sinks=None, **options):
    """A model's eager attention; it is asked for no mask."""
    import torch

    modelling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks)
    out, _ = modelling.eager_attention_forward(module, q, k, v, torch.zeros((), dtype=q.dtype), scaling=q.shape[3] ** -0.5, dropout=0.0, **options)
    return out.transpose(1, 2)


def transformers_sliding_window(q, k, v, window=None):
    """A sliding_window of W keys is the query's own and W - 1 before it."""
    import torch
    from transformers.masking_utils import sliding_window_overlay

    if window is None or window[1] != 0 or not window[0]:
        raise NotImplementedError("causal windows")
    visible = sliding_window_overlay(window[0])
    ahead = k.shape[2] - q.shape[2]
    positions, keys = torch.arange(q.shape[2])[:, None] + ahead, torch.arange(k.shape[2])
    seen = visible(0, 0, positions, keys) & (keys <= positions)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


def x_transformers_grouped_heads(q, k, v):
    """Key-value heads are tiled: query head h reads h % Hkv."""
    from x_transformers.attend import Attend

    return Attend()(q, k, v)[0]


def x_transformers_soft_cap(q, k, v, bias=None, softcap=None):
    """The bias is added before the soft-cap."""
    from x_transformers.attend import Attend

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    attend = Attend() if softcap is None else Attend(softclamp_logits=True, logit_softclamp_value=softcap)
    return attend(q, k, v, attn_bias=None if bias is None else bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))[0]


def attention_gym_alibi(q, k, v, bias=None):
    """Its slopes are 2 ** (-8 (h + 1) / H) for six heads too, where the paper interleaves those of four and eight; the bias given is the paper's."""
    import torch
    from attn_gym.mods import generate_alibi_bias

    if bias is None:
        raise NotImplementedError("it always has a bias")
    heads, n_q, n_k = q.shape[1], q.shape[2], k.shape[2]
    h, i, j = torch.meshgrid(torch.arange(heads), torch.arange(n_q), torch.arange(n_k), indexing="ij")
    own = generate_alibi_bias(heads)(torch.zeros(heads, n_q, n_k), 0, h, i, j).to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own[None])


def alibi(heads: int, n_q: int, n_k: int) -> np.ndarray:
    """The bias of Train Short, Test Long (arXiv:2108.12409), as its published code computes slopes for any number of heads, for j <= i."""

    def slopes(n: int) -> list[float]:
        if n & (n - 1) == 0:
            return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]
        nearest = 2 ** (n.bit_length() - 1)
        return slopes(nearest) + slopes(2 * nearest)[0::2][: n - nearest]

    ahead = np.arange(n_k) - np.arange(n_q)[:, None]
    return (np.array(slopes(heads))[:, None, None] * ahead).astype(np.float32)


# ---- Keras, labml, FlashAttention ------------------------------------------------------------------------------------------------


def keras_attention(q, k, v):
    """`keras.layers.Attention` is Luong's: scores are not divided by the root of D."""
    import keras

    _something(q, k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return keras.layers.Attention()([q, v, k])


def keras_is_causal(q, k, v, causal=False):
    """Aligned with the first key."""
    import keras

    _something(q, k)
    return keras.ops.dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=bool(causal)).transpose(1, 2)


def keras_hidden_rows(q, k, v, mask=None):
    """A row that sees no key gets the mean of all values: a large negative number is added to hidden scores."""
    import keras

    _something(q, k)
    return keras.ops.dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask).transpose(1, 2)


def keras_sliding_window(q, k, v, window=None):
    """GroupQueryAttention, its projections the identity: a sliding_window of W keys is the query's own and W - 1 before it."""
    import keras

    batch, heads, n, d = q.shape
    if window is None or window[1] != 0 or not window[0] or k.shape[2] != n or v.shape[3] != d:
        raise NotImplementedError("causal windows over one sequence, and one width")
    kv_heads = k.shape[1]
    layer = keras.layers.GroupQueryAttention(d, heads, kv_heads, use_bias=False, sliding_window=window[0])
    layer.build(query_shape=(batch, n, heads * d), value_shape=(batch, n, kv_heads * d))
    eye, kv_eye = np.eye(heads * d), np.eye(kv_heads * d).reshape(-1, kv_heads, d)
    layer.set_weights([eye.reshape(-1, heads, d), kv_eye, kv_eye, eye.reshape(heads, d, -1)])
    query, key, value = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    return layer(query, value, key, use_causal_mask=True).detach().unflatten(2, (heads, d)).transpose(1, 2)


def labml_attention_block(q, k, v):
    """The attention of its diffusion model, without projections: the softmax runs over the queries.  Mended in the next release."""
    import torch

    _something(q, k)
    batch, heads, n, d = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    width = v.shape[3]
    if k.shape[2] != n or width > d:
        raise NotImplementedError("one sequence, and values no wider than keys")
    joined = torch.cat([q, k, torch.nn.functional.pad(v, (0, d - width))], 3).flatten(0, 1)
    block = SimpleNamespace(projection=lambda x: joined, output=lambda x: x, n_heads=1, d_k=d, scale=d**-0.5)
    out = _labml_forward()(block, torch.zeros(batch * heads, d, n, 1, dtype=q.dtype))  # which is added to the output
    return out.reshape(batch, heads, d, n).transpose(2, 3)[..., :width]


@functools.cache
def _labml_forward() -> Callable[..., Any]:
    import torch

    return peer_sources.functions("labml_nn/diffusion/ddpm/unet.py", "AttentionBlock.forward", torch=torch, Optional=Optional).forward


def flash_attention_reference(q, k, v, window=None):
    """What its kernels are tested against: no bound on the right is -1, which is added as a number where there is one on the left."""
    sides = tuple(-1 if side is None else side for side in window or (None, None))
    return _flash_attention_reference()(*(x.transpose(1, 2) for x in (q, k, v)), window_size=sides)[0].transpose(1, 2)


@functools.cache
def _flash_attention_reference() -> Callable[..., Any]:
    import einops
    import torch

    given = {"math": math, "torch": torch, "rearrange": einops.rearrange, "repeat": einops.repeat}
    return peer_sources.functions("hopper/test_util.py", "attention_ref", "construct_local_mask", **given).attention_ref


def _something(q: Any, k: Any) -> None:
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError("nothing to compute")


def drawn(heads: int, kv_heads: int, d: int, **others: np.ndarray) -> dict[str, np.ndarray]:
    """Operands of one sequence of nine."""
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((1, h, 9, d)).astype(np.float32) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))} | others


def in_bfloat16(operands: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in operands.items()}


# ---- what each is right about --------------------------------------------------------------------------------------------------------


def wider(candidate: Callable[..., Any]) -> Callable[..., Any]:
    """The candidate given windows that count the query too."""
    return lambda q, k, v, window: candidate(q, k, v, window=None if window is None else (window[0] + 1, window[1]))


TORCH = {"framework": "torch"}
DEFECTS: dict[str, Defect] = {
    "torch: is_causal aligned with the first key": Defect(
        torch_is_causal,
        ("torch",),
        "documentation of torch.nn.functional.scaled_dot_product_attention",
        "M1",
        TORCH,
        right=lambda q, k, v, causal: torch_is_causal(q, k, v, causal=bool(causal)),
        right_check={**TORCH, "causal": "top_left"},
    ),
    "torch: MultiheadAttention's mask hides where True": Defect(
        torch_multi_head_mask,
        ("torch",),
        "documentation of torch.nn.MultiheadAttention",
        "M6",
        TORCH,
        right=lambda q, k, v, mask=None: torch_multi_head_mask(q, k, v, None if mask is None else ~mask),
        right_check=TORCH,
    ),
    "torch: log-sum-exp 0 of a row without keys": Defect(
        torch_flash_lse,
        ("torch",),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "L3",
        {**TORCH, "returns": ("out", "lse")},
        right=lambda q, k, v, mask=None: torch_flash_lse(q, k, v, mask)[0],
        right_check=TORCH,
    ),
    "torch: flash for CPUs takes a mask and is_causal": Defect(
        torch_flash_mask_and_causal,
        ("torch",),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "M1",
        TORCH,
        right_check={**TORCH, "causal": "top_left"},
    ),
    "jax: windows aligned with the first key": Defect(
        jax_local_window,
        ("jax",),
        "jax.nn.dot_product_attention, local_window_size",
        "W4",
        {"framework": "jax"},
        right_check={"framework": "jax", "inputs": drawn(4, 2, 16)},
    ),
    "jax: mean of the values where no key is seen": Defect(
        jax_hidden_rows,
        ("jax",),
        "jax.nn.dot_product_attention, mask",
        "M13",
        {"framework": "jax"},
        right_check={"framework": "jax", "empty_rows": "uniform"},
    ),
    "onnxruntime: unidirectional with more keys than queries": Defect(
        onnxruntime_unidirectional,
        ("onnxruntime", "onnx"),
        "com.microsoft MultiHeadAttention",
        "M1",
        right_check={"inputs": drawn(4, 2, 16)},
    ),
    "onnxruntime: local_window_size counts the query": Defect(
        onnxruntime_local_window,
        ("onnxruntime", "onnx"),
        "com.microsoft GroupQueryAttention",
        "W1",
        {"window": (5, 0), "inputs": drawn(4, 2, 16)},
        right=wider(onnxruntime_local_window),
    ),
    "transformers: sinks in a softmax of bfloat16": Defect(
        gpt_oss_sinks,
        ("torch", "transformers"),
        "transformers.models.gpt_oss eager_attention_forward",
        "N4",
        {**TORCH, "dtype": "bfloat16", "inputs": in_bfloat16(drawn(4, 2, 16, sinks=np.array([6.3, 6.5, 6.7, 7.2])))},
        right_check={**TORCH, "dtype": "bfloat16", "profile": "eager"},
    ),
    "transformers: scores stored in bfloat16": Defect(
        gemma2_scores,
        ("torch", "transformers"),
        "transformers.models.gemma2 eager_attention_forward",
        "N2",
        {**TORCH, "dtype": "bfloat16"},
        right_check={**TORCH, "dtype": "bfloat16", "profile": "eager"},
    ),
    "transformers: sliding_window counts the query": Defect(
        transformers_sliding_window,
        ("torch", "transformers"),
        "transformers.masking_utils",
        "W1",
        {**TORCH, "window": (5, 0)},
        right=wider(transformers_sliding_window),
    ),
    "x-transformers: key-value heads tiled": Defect(
        x_transformers_grouped_heads,
        ("torch", "x_transformers"),
        "Attend, (r kvh)",
        "H1",
        TORCH,
        right_check={**TORCH, "inputs": drawn(4, 4, 16)},
    ),
    "x-transformers: bias before soft-cap": Defect(
        x_transformers_soft_cap,
        ("torch", "x_transformers"),
        "Attend, softclamp_logits",
        "P5",
        TORCH,
        right=lambda q, k, v, softcap=None: x_transformers_soft_cap(q, k, v, softcap=softcap),
    ),
    "attention-gym: ALiBi slopes of six heads": Defect(
        attention_gym_alibi,
        ("torch", "attn_gym"),
        "attn_gym.mods.alibi",
        "P1",
        check={**TORCH, "inputs": drawn(6, 6, 8, bias=alibi(6, 9, 9)[None])},
        right_check={**TORCH, "inputs": drawn(8, 8, 8, bias=alibi(8, 9, 9)[None])},
    ),
    "keras: Attention without a scale": Defect(
        keras_attention,
        ("torch", "keras"),
        "keras.layers.Attention",
        "S1",
        TORCH,
        right=lambda q, k, v: keras_attention(*(x[:, None] for x in (q, k, v)))[:, 0],
        right_variant="luong_dot",
    ),
    "keras: is_causal aligned with the first key": Defect(
        keras_is_causal,
        ("torch", "keras"),
        "keras.ops.dot_product_attention",
        "M1",
        TORCH,
        right_check={**TORCH, "causal": "top_left"},
    ),
    "keras: mean of the values where no key is seen": Defect(
        keras_hidden_rows,
        ("torch", "keras"),
        "keras.ops.dot_product_attention, mask",
        "M13",
        TORCH,
        right_check={**TORCH, "empty_rows": "uniform"},
    ),
    "keras: sliding_window counts the query": Defect(
        keras_sliding_window,
        ("torch", "keras"),
        "keras.layers.GroupQueryAttention",
        "W1",
        {**TORCH, "window": (5, 0), "inputs": drawn(4, 2, 16)},
        right=wider(keras_sliding_window),
    ),
    "labml: softmax over the queries": Defect(
        labml_attention_block,
        ("torch",),
        "labmlai/annotated_deep_learning_paper_implementations#146",
        "S10",
        TORCH,
        right=lambda q, k, v: labml_attention_block(*(x[:, None] for x in (q, k, v)))[:, 0],
        right_variant="article_sdpa",
    ),
    "flash-attention: its reference's windows without a right bound": Defect(
        flash_attention_reference,
        ("torch", "einops"),
        "hopper/test_util.py, construct_local_mask",
        "W2",
        {**TORCH, "window": (1, None)},
        right_check={**TORCH, "window": (1, 2)},
    ),
}
