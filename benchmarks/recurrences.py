"""Linear-time attention beside its public CPU implementations: cases, peers and a referee for versus.py (``--only state``).

Eight heads of 4096 tokens, keys and values of 64, float32; forward, and forward with gradients.  Operations are those of the chunked algorithm,
chunks of 64, products alone and triangles counted as triangles: with C tokens, a chunk of a head multiplies and adds

    C (C + 1) / 2 (K + V) + 2 C K V                         forward: P, P U, Q^ S and B~^T U
    C (C - 1) / 2 (K + V) + C K V                           erasures: A, the substitution and E^ S
    twice the first and, with erasures, twice the second    gradients: each product has two; what is computed again is not counted
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import refattn as ra
from refattn import catalog
from refattn.adapters import torch as torch_adapter
from refattn.spec import shape

from .peers import Declined, Peer, Prepared

#: Tokens of a chunk in counting operations.
CHUNK = 64
WAYS = ("forward", "training")
#: Variants by the line of the table, and whether they erase.
VARIANTS = {
    "simple GLA": ("simple_gla", False),
    "GLA": ("gla", False),
    "Mamba-2": ("mamba2", False),
    "delta": ("delta", True),
    "gated delta": ("gated_delta", True),
    "KDA": ("kda", True),
}


@dataclass(frozen=True)
class RecurrenceWork:
    """One call to be timed; as `cases.Work`, for a variant with a state."""

    way: str
    group: str
    operands: Mapping[str, np.ndarray]
    d_out: np.ndarray
    threads: int

    @property
    def dtype(self) -> str:
        return self.d_out.dtype.name

    @property
    def variant(self) -> str:
        return VARIANTS[self.group][0]

    @property
    def flops(self) -> float:
        batch, heads, tokens, values = self.d_out.shape
        keys = (self.operands["B"] if self.variant == "mamba2" else self.operands["k"]).shape[-1]
        whole = CHUNK * keys * values
        chunk = CHUNK * (CHUNK + 1) / 2 * (keys + values) + 2 * whole
        if VARIANTS[self.group][1]:
            chunk += CHUNK * (CHUNK - 1) / 2 * (keys + values) + whole
        return 2.0 * batch * heads * tokens / CHUNK * chunk * {"forward": 1, "training": 3}[self.way]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.operands.values())

    @functools.cached_property
    def truth(self) -> tuple[np.ndarray, ...]:
        """The right answer: token by token in float64."""
        exact = {name: x.astype(np.float64) for name, x in self.operands.items()}
        if self.way == "forward":
            return (ra.attend(self.variant, **exact, backend="definition"),)
        found = ra.gradients(self.variant, **exact, d_out=self.d_out.astype(np.float64), backend="cpu", form="recurrent")
        return tuple(getattr(found, f"d_{name}") for name in self.operands)


@dataclass(frozen=True)
class RecurrenceCase:
    """A line of the table; as `cases.Case`."""

    group: str
    B: int = 1
    Hq: int = 8
    T: int = 4096
    D: int = 64
    ways: tuple[str, ...] = WAYS
    dtypes: tuple[str, ...] = ("float32",)
    reads: bool = False

    @property
    def Hkv(self) -> int:
        return self.Hq

    @property
    def S(self) -> int:
        return self.T

    def work(self, way: str, dtype: str, threads: int) -> RecurrenceWork:
        """Operands as the variant draws them."""
        rng, variant = np.random.default_rng(0), catalog.variant(VARIANTS[self.group][0])
        dims = {"B": self.B, "Hq": self.Hq, "Hkv": self.Hq, "H": self.Hq, "G": 1, "T": self.T, "D": self.D, "E": self.D, "N": self.D}
        operands = {o.name: o.draw(rng, shape(o.axes, dims)).astype(dtype) for o in variant.operands if not o.optional}
        d_out = rng.standard_normal((self.B, self.Hq, self.T, self.D)).astype(dtype)
        return RecurrenceWork(way, self.group, operands, d_out, threads)


CASES = tuple(map(RecurrenceCase, VARIANTS))
GROUPS = tuple(VARIANTS)


def worst(work: RecurrenceWork, found: Sequence[np.ndarray], profile: str) -> float:
    """Largest error over its tolerance; infinite where the answer has another shape or is not finite.

    A result has gone through about keys + values + 4 chunks' worth of roundings (sums, products of decays, the substitution), each worth its unit of
    the largest number there is.
    """
    if [x.shape for x in found] != [x.shape for x in work.truth] or not all(np.isfinite(x).all() for x in found):
        return np.inf
    unit, roundings = 2.0**-24, work.d_out.shape[-1] * 2 + 4 * CHUNK
    largest = 0.0
    for x, exact in zip(found, work.truth, strict=True):
        largest = max(largest, float(np.abs(x - exact).max() / (unit * roundings * max(np.abs(exact).max(), 1.0))))
    return largest


# ---- refattn -------------------------------------------------------------------------------------------------------------------


def prepare_refattn(work: RecurrenceWork) -> Prepared:
    ra.set_num_threads(work.threads)
    if work.way == "forward":
        return Prepared({"": lambda: ra.attend(work.variant, **work.operands, backend="cpu")}, lambda out: (out,))
    names = tuple(f"d_{name}" for name in work.operands)
    return Prepared(
        {"": lambda: ra.gradients(work.variant, **work.operands, d_out=work.d_out, backend="cpu")},
        lambda found: tuple(getattr(found, name) for name in names),
    )  # fmt: skip


# ---- torch ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _sources() -> Any:
    """tests/peer_sources.py, which loads reference code by its file."""
    spec = importlib.util.spec_from_file_location("peer_sources", Path(__file__).parents[1] / "tests" / "peer_sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prepare_torch(work: RecurrenceWork, functions: Mapping[str, Callable[..., Any]], tokens_first: bool) -> Prepared:
    """A function of the operands in their own order, which returns the output first; axes B T H D, or B H T D."""
    import torch

    if not functions:
        raise Declined("it has no such function")
    turned = {name: x.swapaxes(1, 2) if tokens_first and x.ndim > 1 else x for name, x in work.operands.items()}
    inputs = tuple(torch_adapter.convert(np.ascontiguousarray(x)) for x in turned.values())
    d_out = torch_adapter.convert(np.ascontiguousarray(work.d_out.swapaxes(1, 2) if tokens_first else work.d_out))

    def arrays(found: Any) -> tuple[np.ndarray, ...]:
        found = found if work.way == "training" else found[:1]
        return tuple(x.detach().numpy().swapaxes(1, 2) if tokens_first and x.ndim > 1 else x.detach().numpy() for x in found)

    if work.way == "forward":
        return Prepared({name: torch.no_grad()(lambda f=f: f(*inputs)) for name, f in functions.items()}, arrays)
    inputs = tuple(x.requires_grad_() for x in inputs)
    return Prepared({name: lambda f=f: torch.autograd.grad(f(*inputs)[0], inputs, d_out) for name, f in functions.items()}, arrays)


def prepare_fla(work: RecurrenceWork) -> Prepared:
    """flash-linear-attention's plain PyTorch, chunked where it has that."""
    fla = _sources().fla
    functions = {
        "simple_gla": lambda: fla("simple_gla").naive_chunk_simple_gla,
        "gla": lambda: fla("gla").naive_recurrent_gla,
        "delta": lambda: fla("delta_rule").delta_rule_chunkwise,
        "gated_delta": lambda: fla("gated_delta_rule").naive_chunk_gated_delta_rule,
        "kda": lambda: fla("kda").naive_chunk_kda,
    }
    if work.variant not in functions:
        raise Declined("it has no such function")
    return _prepare_torch(work, {"": functions[work.variant]()}, work.variant != "delta")


def prepare_transformers(work: RecurrenceWork) -> Prepared:
    if work.variant == "gated_delta":
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        return _prepare_torch(work, {"": torch_chunk_gated_delta_rule}, True)
    if work.variant == "mamba2":
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        functions = {f"chunks of {n}": lambda x, dt, A, B, C, n=n: (mamba2_chunk_scan(x, dt, A, B, C, chunk_size=n),) for n in (64, 256)}
        return _prepare_torch(work, functions, True)
    raise Declined("it has no such function")


REFATTN = Peer("refattn", ("refattn", "numba"), ("float32", "float64"), WAYS, "flash", prepare_refattn)
PEERS = (
    Peer("fla", ("torch", "einops"), ("float32",), WAYS, "flash", prepare_fla),
    replace(REFATTN, name="transformers", packages=("transformers", "torch"), dtypes=("float32",), prepare=prepare_transformers),
)
