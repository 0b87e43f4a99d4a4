"""The implementations that are timed side by side, and how each is called: operands converted beforehand, nothing timed but the call.

A peer is a row of `PEERS`.  Its `prepare` takes a piece of work and returns the calls without arguments that would do it, all the ways a careful
user may write it (the fastest counts, and the table's CSV names it), and how a result becomes NumPy arrays: the output of a forward pass, or d_q,
d_k and d_v.  What a peer cannot say it declines, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import refattn as ra
from refattn import catalog, precision, problem
from refattn.adapters import torch as torch_adapter

from .cases import Functions, Work

#: What torch.compile may compile C++ with.
COMPILERS = ("g++", "c++", "clang++")
#: Operands and parameters that change the scores.
ADDED = {"bias", "softcap"}
#: Bytes of scores up to which a peer that keeps all of them is asked.
SCORES = 2**30


class Declined(Exception):
    """A peer cannot say this, or would need too much memory for it; its text says which."""


@dataclass(frozen=True)
class Prepared:
    """The ways to call it by name ("" where there is only one), and how what they return becomes arrays (B, H, T, D)."""

    calls: Mapping[str, Callable[[], Any]]
    arrays: Callable[[Any], tuple[np.ndarray, ...]]


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
    same : callable
        The work whose right answer it has to give; another than it is asked only where refattn is compared with itself.
    """

    name: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    ways: tuple[str, ...]
    profile: str
    prepare: Callable[[Work], Prepared]
    same: Callable[[Work], Work] = lambda work: work

    def missing(self) -> str:
        """The first package that is not installed; "" where all are."""
        return next((p for p in self.packages if importlib.util.find_spec(p) is None), "")

    def version(self) -> str:
        return " ".join(f"{p} {importlib.metadata.version(p)}" for p in self.packages)


def no_cap(work: Work) -> None:
    """Decline a soft-cap."""
    if "softcap" in work.params:
        raise Declined("knows no soft-cap")


def asked(peer: Peer, work: Work) -> Prepared:
    """The peer's calls for a piece of work.

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
    """By the public calls; a backward pass alone by the engine's own, from out and lse kept, as every framework's is."""
    ra.set_num_threads(work.threads)
    given = _as_functions(work)
    if "score_mod" in given:
        prepare_bare(work).calls[""]()  # the kernels are loaded, so that the first call tells what the function costs
    if work.way == "forward":
        return Prepared({"": lambda: ra.attention(**given, backend="cpu")}, lambda out: (out,))
    if "bias" in given:
        raise Declined("its gradients with a bias include d_bias, which the others are not asked for")
    if "score_mod" in given:
        raise Declined("its gradients need the slope of a function of scores, which the others find out")
    if work.way == "training":
        return Prepared({"": lambda: ra.gradients("softmax", **given, d_out=work.d_out, backend="cpu")}, lambda d: (d.d_q, d.d_k, d.d_v))

    from refattn.engine.call import Call

    bound = problem.bind(catalog.variant("softmax"), (), given, ("out", "lse"))
    kept = Call(bound, work.threads)
    kept.forward()

    def backward() -> tuple[np.ndarray, ...]:
        found = kept.backward(work.d_out)
        return tuple(precision.round_to(found[name], bound.dtype) for name in ("d_q", "d_k", "d_v"))

    return Prepared({"": backward}, lambda found: found)


def _as_functions(work: Work) -> dict[str, Any]:
    """Operands and parameters, a function in place of the bias, the soft-cap or the mask that says the same."""
    functions, given = work.functions, {**work.operands, **work.params}
    if functions.mask_mod is not None:
        n_q, n_k = given["q"].shape[2], given.pop("mask").shape[1]
        given["block_mask"] = ra.block_mask(functions.mask_mod, T=n_q, S=n_k, aux=functions.aux)
    if functions.score_mod is not None:
        given = {name: x for name, x in given.items() if name not in ADDED}
        given.update(score_mod=functions.score_mod, aux=functions.aux or None)
    return given


def bare(work: Work) -> Work:
    """The same without what changes the scores."""
    operands, params = ({name: x for name, x in given.items() if name not in ADDED} for given in (work.operands, work.params))
    return replace(work, operands=operands, params=params, functions=Functions())


def prepare_bare(work: Work) -> Prepared:
    if not ADDED & {*work.operands, *work.params}:
        raise Declined("nothing changes the scores")
    return prepare_refattn(bare(work))


def prepare_alone(work: Work) -> Prepared:
    if work.threads == 1:
        raise Declined("there is only one thread")
    if work.operands["k"].shape[0] * work.operands["k"].shape[1] >= work.threads:
        raise Declined("there are heads enough for every thread")
    prepared = prepare_refattn(work)

    def alone() -> Any:
        ra.set_num_threads(1)
        try:
            return prepared.calls[""]()
        finally:
            ra.set_num_threads(work.threads)

    return Prepared({"": alone}, prepared.arrays)


# ---- torch ---------------------------------------------------------------------------------------------------------------------


def start_torch(threads: int) -> None:
    """torch's threads, to be started before Numba's.

    Both run on GNU OpenMP where Numba has no other layer, and the one that is started first sets whether parallel regions nest, for the whole
    process: Numba wants it, and torch, started later, would open a team of threads inside each of its threads, and be some twenty times slower.

    Raises
    ------
    RuntimeError
        When Numba's threads run already.
    """
    from numba.np.ufunc import parallel

    if parallel._is_initialized:
        raise RuntimeError("Numba's threads were started before torch's, which would slow torch down: start torch first")
    import torch

    torch.set_num_threads(threads)
    square = torch.ones(512, 512)
    (square @ square).exp().sum().item()


def prepare_torch(work: Work) -> Prepared:
    """Grouped heads by `enable_gqa` and by repeating keys and values; a mask as booleans and as -inf to be added."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    no_cap(work)
    q, k, v = (torch_adapter.convert(work.operands[name]) for name in ("q", "k", "v"))
    group, causal = q.shape[1] // k.shape[1], bool(work.params.get("causal"))
    bias, allowed = work.operands.get("bias"), work.allowed
    masks: dict[str, Any] = {"": None}
    if bias is not None:
        masks = {"": torch_adapter.convert(bias if bias.ndim > 2 else bias[None])[None]}
    elif allowed is not None:
        as_bool = torch_adapter.convert(allowed)[None, None]
        masks = {"boolean mask": as_bool, "additive mask": torch.zeros(as_bool.shape, dtype=q.dtype).masked_fill_(~as_bool, -torch.inf)}

    def repeated(x: Any) -> Any:
        return x.repeat_interleave(group, dim=1)

    def sdpa(q: Any, k: Any, v: Any, mask: Any, grouped: bool) -> Any:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        """As float64, for NumPy has no bfloat16 to take them in; exact."""
        return tuple(x.detach().double().numpy() for x in (found if isinstance(found, tuple) else (found,)))

    calls: dict[str, Callable[[], Any]] = {}
    heads = {"enable_gqa": True, "repeated keys": False} if group > 1 else {"": False}
    for (said, mask), (how, grouped) in itertools.product(masks.items(), heads.items()):
        name = ", ".join(x for x in (said, how) if x)
        if work.way == "forward":
            keys = (k, v) if grouped or group == 1 else (repeated(k), repeated(v))  # not timed
            calls[name] = torch.no_grad()(lambda mask=mask, grouped=grouped, keys=keys: sdpa(q, *keys, mask, grouped))
            continue
        inputs, d_out = tuple(x.detach().requires_grad_() for x in (q, k, v)), torch_adapter.convert(work.d_out)

        def attended(inputs: Any = inputs, mask: Any = mask, grouped: bool = grouped) -> Any:
            q, k, v = inputs
            return sdpa(q, *((k, v) if grouped or group == 1 else (repeated(k), repeated(v))), mask, grouped)

        if work.way == "backward":
            out = attended()
            calls[name] = lambda out=out, inputs=inputs, d_out=d_out: torch.autograd.grad(out, inputs, d_out, retain_graph=True)
        else:
            calls[name] = lambda attended=attended, inputs=inputs, d_out=d_out: torch.autograd.grad(attended(), inputs, d_out)
    return Prepared(calls, arrays)


def prepare_flex(work: Work) -> Prepared:
    """FlexAttention, compiled for this shape and these functions; its block mask made beforehand."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if not any(map(shutil.which, COMPILERS)):
        raise Declined("torch.compile needs a C++ compiler, and there is none here")
    if "bias" in work.operands and work.functions.score_mod is None:
        bias = torch_adapter.convert(work.operands["bias"])
        score_mod = lambda score, b, h, i, j: score + bias[i, j]  # noqa: E731 - the shape torch.compile reads
    elif work.functions.score_mod is not None:
        function, aux = work.functions.in_torch or work.functions.score_mod, tuple(map(torch_adapter.convert, work.functions.aux))
        score_mod = lambda score, b, h, i, j: function(score, b, h, i, j, *aux)  # noqa: E731
    else:
        score_mod = None
    q, k, v = (torch_adapter.convert(work.operands[name]) for name in ("q", "k", "v"))
    mask_mod = _mask_mod(work)
    blocks = None if mask_mod is None else flex.create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
    torch._dynamo.config.recompile_limit = 1000  # or it gives up after eight shapes and runs uncompiled
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    @torch.no_grad()
    def call() -> Any:
        return compiled(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return Prepared({"": call}, lambda out: (out.double().numpy(),))


def _mask_mod(work: Work) -> Any:
    offset = work.operands["k"].shape[2] - work.operands["q"].shape[2]
    if work.params.get("causal"):
        return lambda b, h, i, j: j <= i + offset
    if work.params.get("window"):
        left, right = work.params["window"]
        return lambda b, h, i, j: (j >= i + offset - left) & (j <= i + offset + right)
    if work.functions.mask_mod is not None:
        function, aux = work.functions.mask_mod, tuple(map(torch_adapter.convert, work.functions.aux))
        return lambda b, h, i, j: function(b, h, i, j, *aux)
    return None


# ---- jax -----------------------------------------------------------------------------------------------------------------------


def prepare_jax(work: Work) -> Prepared:
    import jax
    import jax.numpy as jnp

    no_cap(work)
    if work.dtype == "float64":
        raise Declined("its softmax is in float32 whatever the operands are")
    if 4 * np.prod(work.operands["q"].shape[:3]) * work.operands["k"].shape[2] > SCORES:
        raise Declined("keeps all scores, which would not fit")
    q, k, v = (jnp.asarray(work.operands[name].swapaxes(1, 2)) for name in ("q", "k", "v"))  # its own order of axes
    d_out = jnp.asarray(work.d_out.swapaxes(1, 2))
    extra = {}
    for name in {"bias", "mask"} & work.operands.keys():
        x = work.operands[name]
        extra[name] = jnp.asarray(x[(None,) * (4 - x.ndim)])
    keywords: dict[str, Any] = {"is_causal": bool(work.params.get("causal")), "implementation": "xla"}
    if work.params.get("window") is not None:
        keywords["local_window_size"] = work.params["window"]

    def attention(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **extra, **keywords)

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(x).swapaxes(1, 2) for x in (found if isinstance(found, tuple) else (found,)))

    if work.way == "forward":
        compiled = jax.jit(attention)
        return Prepared({"": lambda: compiled(q, k, v).block_until_ready()}, arrays)
    if work.way == "training":
        both = jax.jit(lambda q, k, v, d_out: jax.vjp(attention, q, k, v)[1](d_out))
        return Prepared({"": lambda: jax.block_until_ready(both(q, k, v, d_out))}, arrays)
    _, pull = jax.vjp(attention, q, k, v)
    pulled = jax.jit(lambda pull, d_out: pull(d_out))
    return Prepared({"": lambda: jax.block_until_ready(pulled(pull, d_out))}, arrays)


# ---- onnxruntime ---------------------------------------------------------------------------------------------------------------


def prepare_onnxruntime(work: Work) -> Prepared:
    """The standard operator, and where it says the same onnxruntime's own older one, which is another kernel."""
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = work.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call, or its threads would take the others' time
    codes = {"float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}

    def session(operator: str, feeds: Mapping[str, np.ndarray], domain: str, **attributes: float) -> Callable[[], Any]:
        inputs = [helper.make_tensor_value_info(name, codes[x.dtype.name], x.shape) for name, x in feeds.items()]
        node = helper.make_node(operator, list(feeds), ["out"], domain=domain, **attributes)
        graph = helper.make_graph([node], "attention", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])
        opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid(domain, 1)] if domain else [])]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        running = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda: running.run(None, feeds)

    causal = int(bool(work.params.get("causal")))
    extra, cap = work.operands.get("bias", work.allowed), work.params.get("softcap")
    operands = {name: work.operands[name] for name in ("q", "k", "v")}
    calls = {"Attention": session("Attention", operands | ({} if extra is None else {"mask": extra}), "", is_causal=causal, softcap=cap or 0.0)}
    shape = operands["q"].shape
    if extra is None and cap is None and shape[1] == operands["k"].shape[1]:
        side_by_side = {name: np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1) for name, x in operands.items()}
        calls["MultiHeadAttention"] = session("MultiHeadAttention", side_by_side, "com.microsoft", num_heads=shape[1], unidirectional=causal)

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        out = found[0]
        return (out if out.ndim == 4 else out.reshape(shape[0], shape[2], shape[1], -1).swapaxes(1, 2),)

    return Prepared(calls, arrays)


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
    if bias is not None and bias.ndim == 3:
        bias = bias.reshape(k.shape[1], group, n_q, n_k)
    scale, cap = q.dtype.type(1 / np.sqrt(q.shape[-1])), work.params.get("softcap")

    def forward() -> np.ndarray:
        s = np.einsum("bgrid,bgjd->bgrij", q, k, optimize=True)
        s *= scale
        if cap is not None:
            s = cap * np.tanh(s / cap)
        if bias is not None:
            s += bias
        if allowed is not None:
            s[..., ~allowed] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return np.einsum("bgrij,bgje->bgrie", s, v, optimize=True)

    return Prepared({"": forward}, lambda out: (out.reshape(out.shape[0], -1, *out.shape[3:]),))


_ALL, _PASSES = ("float32", "float64", "bfloat16"), ("forward", "backward", "training")
REFATTN = Peer("refattn", ("refattn", "numba"), _ALL, _PASSES, "flash", prepare_refattn)
#: refattn beside itself: what a bias or a function costs, and what more threads are worth to few heads.
BARE = replace(REFATTN, name="bare", prepare=prepare_bare, same=bare)
ALONE = replace(REFATTN, name="1 thread", prepare=prepare_alone)
PEERS = (
    Peer("torch", ("torch",), _ALL, _PASSES, "flash", prepare_torch),
    Peer("flex", ("torch",), ("float32", "bfloat16"), ("forward",), "flash", prepare_flex),
    Peer("jax", ("jax",), ("float32", "bfloat16", "float64"), _PASSES, "flash", prepare_jax),
    Peer("onnxruntime", ("onnxruntime", "onnx"), ("float32",), ("forward",), "eager", prepare_onnxruntime),
    Peer("numpy", ("numpy",), ("float32", "float64"), ("forward",), "math", prepare_numpy),
)
