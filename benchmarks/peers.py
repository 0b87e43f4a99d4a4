"""The implementations that are timed side by side, and how each is called: operands converted beforehand, nothing timed but the call.

A peer is a row of `PEERS`.  Its `prepare` takes a piece of work and returns a call without arguments, and how its result becomes NumPy arrays
(B, H, T, D): the output of a forward pass, or d_q, d_k and d_v of a backward pass.  What a peer cannot say it declines, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import refattn as ra
from refattn import catalog, precision, problem
from refattn.adapters import torch as torch_adapter
from refattn.engine import run as engine

#: Bytes of scores up to which a peer that keeps all of them is asked.
SCORES = 2**30


class Declined(Exception):
    """A peer cannot say this, or would need too much memory for it; its text says which."""


@dataclass(frozen=True)
class Work:
    """One call to be timed.

    Attributes
    ----------
    way : {"forward", "backward"}
    operands : mapping
        q, k, v, and the optional bias and mask with the axes T S, as refattn takes them.
    params : mapping
        Of the softmax variant.
    d_out : ndarray
        Cotangent of the output, for a backward pass.
    threads : int
    """

    way: str
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, Any]
    d_out: np.ndarray
    threads: int

    @property
    def dtype(self) -> str:
        return self.operands["q"].dtype.name

    @property
    def allowed(self) -> np.ndarray | None:
        """The window and the mask as one boolean mask, for those that know no windows; None where there is neither."""
        mask, window = self.operands.get("mask"), self.params.get("window")
        if window is None:
            return mask
        n_q, n_k = self.operands["q"].shape[2], self.operands["k"].shape[2]
        ahead = np.arange(n_k) - np.arange(n_q)[:, None] - (n_k - n_q)
        inside = (ahead >= -window[0]) & (ahead <= window[1])
        return inside if mask is None else inside & mask

    @property
    def visible(self) -> np.ndarray | None:
        """`allowed` and the causal mask; None where every query sees every key."""
        if not self.params.get("causal"):
            return self.allowed
        n_q, n_k = self.operands["q"].shape[2], self.operands["k"].shape[2]
        triangle = np.tri(n_q, n_k, n_k - n_q, dtype=bool)
        return triangle if self.allowed is None else triangle & self.allowed


Prepared = tuple[Callable[[], Any], Callable[[Any], tuple[np.ndarray, ...]]]


@dataclass(frozen=True)
class Peer:
    """An implementation.

    Attributes
    ----------
    name : str
    packages : tuple of str
        What must be installed.
    dtypes, ways : tuple of str
        What it takes.
    profile : str
        How it rounds (`refattn.oracle.profiles`), which sets the tolerance.
    prepare : callable
    """

    name: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    ways: tuple[str, ...]
    profile: str
    prepare: Callable[[Work], Prepared]

    def missing(self) -> str:
        """The first package that is not installed; "" where all are."""
        return next((p for p in self.packages if importlib.util.find_spec(p) is None), "")

    def version(self) -> str:
        return " ".join(f"{p} {importlib.metadata.version(p)}" for p in self.packages)


def asked(peer: Peer, work: Work) -> Prepared:
    """The peer's call for a piece of work.

    Raises
    ------
    Declined
    """
    if work.dtype not in peer.dtypes:
        raise Declined(f"not asked in {work.dtype}")
    if work.way not in peer.ways:
        raise Declined(f"no {work.way} pass")
    return peer.prepare(work)


# ---- refattn -------------------------------------------------------------------------------------------------------------------


def prepare_refattn(work: Work) -> Prepared:
    """Forward by the public call.  Backward from out and lse kept from the forward pass, as a training step has them."""
    operands = dict(work.operands)
    ra.set_num_threads(work.threads)
    if work.way == "forward":
        return lambda: ra.attention(**operands, **work.params, backend="cpu"), lambda out: (out,)

    from refattn.engine import backward

    if "bias" in operands:
        raise Declined("its backward pass with a bias finds d_bias too, which the others are not asked for")
    bound = problem.bind(catalog.variant("softmax"), (), {**operands, **work.params}, ("out", "lse"))
    kept = engine._Call(bound)
    kept.forward(work.threads)
    d_lse = np.zeros_like(kept.lse)
    no_bias = np.zeros((0, 0, 0, 0), kept.format)

    def gradients() -> tuple[np.ndarray, ...]:
        q, k, v, d_out = (engine._rows(x, kept.format) for x in (operands["q"], operands["k"], operands["v"], work.d_out))
        found = tuple(np.zeros(x.shape, kept.format) for x in (q, k, v))
        results = (*found, no_bias, np.zeros(kept.lse.shape, kept.format))
        given = (q, k, v, kept.bias, kept.first, kept.last, kept.scale, kept.cap, kept.out, kept.lse, d_out, d_lse)
        engine._launch(backward.backward, backward.backward_parallel, (*given, *results), 2.5 * kept.work, work.threads)
        return tuple(precision.round_to(x, bound.dtype) for x in found)

    return gradients, lambda found: found


# ---- torch ---------------------------------------------------------------------------------------------------------------------


def prepare_torch(work: Work) -> Prepared:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(work.threads)
    q, k, v = (torch_adapter.convert(work.operands[name]) for name in ("q", "k", "v"))
    keywords: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "is_causal": bool(work.params.get("causal"))}
    bias, allowed = work.operands.get("bias"), work.allowed
    if bias is not None:
        keywords["attn_mask"] = torch_adapter.convert(bias)
    elif allowed is not None:
        keywords["attn_mask"] = torch_adapter.convert(allowed)

    def forward() -> Any:
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, **keywords)

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        """As float64, for NumPy has no bfloat16 to take them in; exact."""
        tensors = found if isinstance(found, tuple) else (found,)
        return tuple(x.detach().double().numpy() for x in tensors)

    if work.way == "forward":
        return forward, arrays
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    out, d_out = scaled_dot_product_attention(*inputs, **keywords), torch_adapter.convert(work.d_out)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True), arrays


# ---- jax -----------------------------------------------------------------------------------------------------------------------


def prepare_jax(work: Work) -> Prepared:
    import jax
    import jax.numpy as jnp

    if work.dtype == "float64":
        raise Declined("its softmax is in float32 whatever the operands are")
    if 4 * np.prod(work.operands["q"].shape[:3]) * work.operands["k"].shape[2] > SCORES:
        raise Declined("keeps all scores, which would not fit")
    q, k, v = (jnp.asarray(work.operands[name].swapaxes(1, 2)) for name in ("q", "k", "v"))  # its own order of axes
    extra = {name: jnp.asarray(work.operands[name][None, None]) for name in ("bias", "mask") if name in work.operands}
    keywords: dict[str, Any] = {"is_causal": bool(work.params.get("causal")), "implementation": "xla"}
    if work.params.get("window") is not None:
        keywords["local_window_size"] = work.params["window"]

    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **extra, **keywords)

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(x).swapaxes(1, 2) for x in (found if isinstance(found, tuple) else (found,)))

    if work.way == "forward":
        compiled = jax.jit(attention)
        return lambda: compiled(q, k, v).block_until_ready(), arrays
    _, pull = jax.vjp(attention, q, k, v)
    d_out = jnp.asarray(work.d_out.swapaxes(1, 2))
    pulled = jax.jit(lambda pull, d_out: pull(d_out))
    return lambda: jax.block_until_ready(pulled(pull, d_out)), arrays


# ---- onnxruntime ---------------------------------------------------------------------------------------------------------------


def prepare_onnxruntime(work: Work) -> Prepared:
    import onnxruntime
    from onnx import TensorProto, helper

    extra = work.operands.get("bias", work.allowed)
    feeds = {name: work.operands[name] for name in ("q", "k", "v")} | ({} if extra is None else {"mask": extra})
    codes = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
    inputs = [helper.make_tensor_value_info(name, codes[x.dtype.name], x.shape) for name, x in feeds.items()]
    node = helper.make_node("Attention", list(feeds), ["out"], is_causal=int(bool(work.params.get("causal"))))
    graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = work.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call, or its threads would take the others' time
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds), lambda found: (found[0],)


# ---- NumPy ---------------------------------------------------------------------------------------------------------------------


def prepare_numpy(work: Work) -> Prepared:
    """What a notebook holds: two einsums and a softmax between them."""
    q, k, v = (work.operands[name] for name in ("q", "k", "v"))
    group = q.shape[1] // k.shape[1]
    q = q.reshape(q.shape[0], k.shape[1], group, *q.shape[2:])
    n_q, n_k = q.shape[3], k.shape[2]
    if q.itemsize * np.prod(q.shape[:4]) * n_k > SCORES:
        raise Declined("keeps all scores, which would not fit")
    allowed = work.visible
    bias = work.operands.get("bias")
    scale = q.dtype.type(1 / np.sqrt(q.shape[-1]))

    def forward() -> np.ndarray:
        s = np.einsum("bgrid,bgjd->bgrij", q, k, optimize=True)
        s *= scale
        if bias is not None:
            s += bias
        if allowed is not None:
            s[..., ~allowed] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return np.einsum("bgrij,bgje->bgrie", s, v, optimize=True)

    return forward, lambda out: (out.reshape(out.shape[0], -1, *out.shape[3:]),)


REFATTN = Peer("refattn", ("refattn", "numba"), ("float32", "float64", "bfloat16"), ("forward", "backward"), "flash", prepare_refattn)
PEERS = (
    Peer("torch", ("torch",), ("float32", "float64", "bfloat16"), ("forward", "backward"), "flash", prepare_torch),
    Peer("jax", ("jax",), ("float32", "float64", "bfloat16"), ("forward", "backward"), "flash", prepare_jax),
    Peer("onnxruntime", ("onnxruntime", "onnx"), ("float32",), ("forward",), "eager", prepare_onnxruntime),
    Peer("numpy", ("numpy",), ("float32", "float64"), ("forward",), "math", prepare_numpy),
)
