"""How an implementation computes, as far as its rounding errors depend on it.

A tolerance follows from the operands and a profile.  A profile names where values are rounded and how exactly functions are evaluated;
it does not describe an algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..catalog import unknown
from ..errors import ParameterError, UnknownVariantError
from ..precision import as_dtype, format_of

_SINGLE = 2.0**-24
_DOUBLE = 2.0**-53


@dataclass(frozen=True)
class Profile:
    """Where an implementation rounds.

    Attributes
    ----------
    name : str
    accumulate : float
        Unit roundoff of sums, and of everything not named below.
    order : {"sequential", "tree"}
        Whether a sum of k terms may go through k roundings, or through log2(k) because it is summed pairwise.
    products : float
        Unit roundoff of sums of products (queries with keys, weights with values) where they have accumulators of their own; 0 if not.
    block, extra_bits : int
        Products that a matrix instruction adds at once, aligned to the largest with so many more bits than the accumulator has, and truncated:
        an error of one sign, in proportion to the number of blocks.  0 if every sum is rounded to nearest.
    operands : float
        Unit roundoff of operands transformed before use (queries multiplied by the scale and stored); 0 if never.
    scores : float
        Unit roundoff of scores stored before they are normalised; 0 if they stay in the accumulator.
    distances : float
        Unit roundoff of scores less the maximum of their row, which a sink may be, stored before they are exponentiated; 0 if they stay there.
    probabilities : float
        Unit roundoff of weights stored before they meet the values; 0 if they stay in the accumulator.
    smallest_probability : float
        Smallest positive number of that format, over what weights are multiplied by before; weights below half of it vanish.
    normalised : bool
        Whether weights may be divided by their sum before they are stored; else the largest of a row is stored as one.
    sum_rounded : bool
        Whether the sum of weights is that of the stored ones; else of those in the accumulator.
    exp_error, tanh_error : float
        Relative error of the functions.
    log_error : float
        Absolute error of the logarithm in lse beyond a few roundings of it.
    tile : int
        Keys per step where a running maximum rescales earlier sums; 0 where the whole row is at hand.
    splits : int
        Parts of the keys that are computed apart and merged by their lse.
    intermediate : float
        Unit roundoff of arrays handed from one operation to the next inside a layer (projections, gradients of grouped heads); 0 if none
        are stored.
    lse : float
        Unit roundoff of the log-sum-exp that a backward pass reads.
    weights_kept : bool
        Whether a backward pass reads weights as the forward pass stored them, or computes them again from scores and log-sum-exp.
    gradient_weights, gradient_scores : float
        Unit roundoff of gradients of weights, and of scores, stored before they are used; 0 if they stay in the accumulator.
    gradient_tile : int
        Keys or queries per step between which gradients are kept in the `intermediate` format; 0 where they stay in the accumulator.
    state, state_every : float, int
        Unit roundoff of a recurrent state where it is stored, every so many tokens; 0 if it stays in the accumulator.
    chunk : int
        Tokens of a recurrence whose logarithms of decays are added up before they are exponentiated; 0 for the whole sequence.
    source : str
        Where the figures come from.
    """

    name: str
    accumulate: float
    order: str = "sequential"
    products: float = 0.0
    block: int = 0
    extra_bits: int = 0
    operands: float = 0.0
    scores: float = 0.0
    distances: float = 0.0
    probabilities: float = 0.0
    smallest_probability: float = 0.0
    normalised: bool = True
    sum_rounded: bool = False
    exp_error: float = 2 * _SINGLE
    tanh_error: float = 4 * _SINGLE
    log_error: float = 0.0
    tile: int = 0
    splits: int = 1
    intermediate: float = 0.0
    lse: float = 0.0
    weights_kept: bool = False
    gradient_weights: float = 0.0
    gradient_scores: float = 0.0
    gradient_tile: int = 0
    state: float = 0.0
    state_every: int = 1
    chunk: int = 0
    source: str = ""


def _math(dtype: np.dtype) -> Profile:
    """Whole rows; sums in float32, or float64 for float64; results of every operation stored in at least float32."""
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    narrow = format_of(dtype).unit if dtype.itemsize < 4 else u
    return Profile(
        "math", u, scores=u, probabilities=u, exp_error=2 * u, tanh_error=4 * u, intermediate=narrow, source="textbook evaluation in one precision"
    )


def _flash(dtype: np.dtype) -> Profile:
    """Tiles of 32 keys or more; weights rounded to the operands' format before they meet the values."""
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    narrow = format_of(dtype) if dtype.itemsize < 4 else None
    return Profile(
        "flash",
        u,
        operands=u,
        probabilities=narrow.unit if narrow else 0.0,
        smallest_probability=narrow.tiny if narrow else 0.0,
        exp_error=max(2 * u, 2.0**-22 if u == _SINGLE else 0.0),
        tanh_error=1.2e-5 if narrow else 4 * u,
        tile=32,
        intermediate=narrow.unit if narrow else 0.0,
        lse=u,
        gradient_scores=narrow.unit if narrow else 0.0,
        source="FlashAttention-2 (arXiv:2307.08691); ex2.approx within 2^-22 (PTX ISA), tanh.approx within 1.2e-5 (exhaustive measurement on sm_75)",
    )


def _eager(dtype: np.dtype) -> Profile:
    """One framework operation after another, every intermediate array stored in the operands' format."""
    if dtype.itemsize >= 4:
        return replace(_math(dtype), name="eager")
    narrow = format_of(dtype)
    return Profile(
        "eager",
        _SINGLE,
        operands=narrow.unit,
        scores=narrow.unit,
        distances=narrow.unit,
        probabilities=narrow.unit,
        smallest_probability=narrow.tiny,
        exp_error=narrow.unit,
        tanh_error=narrow.unit,
        intermediate=narrow.unit,
        weights_kept=True,
        gradient_weights=narrow.unit,
        gradient_scores=narrow.unit,
        source="the usual `softmax(q @ k.T * scale) @ v` in a framework's half precision",
    )


def _tensor_core(name: str, block: int, extra_bits: int, source: str) -> Callable[[np.dtype], Profile]:
    """Flash attention on matrix instructions of one generation of GPUs, for the 16-bit formats they take."""

    def made(dtype: np.dtype) -> Profile:
        _only(name, dtype, 2)
        return replace(_flash(dtype), name=name, block=block, extra_bits=extra_bits, source=f"{_flash(dtype).source}; {source}")

    return made


def _fa3_fp8(dtype: np.dtype) -> Profile:
    """FlashAttention-3 on 8-bit operands: weights times 2^8 in e4m3, sums of products in 14 bits."""
    _only("fa3-fp8", dtype, 1)
    narrow = format_of(np.dtype("float8_e4m3fn"))
    return replace(
        _flash(dtype),
        name="fa3-fp8",
        products=2.0**-14,
        block=32,
        probabilities=narrow.unit,
        smallest_probability=narrow.tiny / 2**8,
        normalised=False,
        tile=64,
        source="FlashAttention-3 (arXiv:2407.08608), whose weights reach 2^8 in e4m3; accumulators of 14 bits on H100 "
        "(DeepSeek-V3, arXiv:2412.19437, section 3.3.2); 32 products at a time is our assumption",
    )


def _split(dtype: np.dtype) -> Profile:
    """Flash decoding: keys in parts, merged by their lse."""
    return replace(_flash(dtype), name="split", splits=32, source=f"{_flash(dtype).source}; up to 32 parts, merged in the accumulator")


def _torch_cpu_flash(dtype: np.dtype) -> Profile:
    """The flash kernel of PyTorch's CPU build: gradients are added up in the operands' format, tile by tile and head by head."""
    return replace(
        _flash(dtype),
        name="torch-cpu-flash",
        gradient_tile=32,
        source=f"{_flash(dtype).source}; gradients measured on PyTorch 2.13: those of grouped heads differ from any that are added in float32",
    )


def _xla(dtype: np.dtype) -> Profile:
    """jax.nn.dot_product_attention by XLA: a float32 softmax of whole rows; weights and their gradients in the operands' format."""
    narrow = format_of(dtype)
    stored = dtype.itemsize < 4
    return replace(
        _math(dtype),
        name="jax-xla",
        probabilities=narrow.unit,
        smallest_probability=narrow.tiny if stored else 0.0,
        gradient_weights=narrow.unit if stored else 0.0,
        gradient_scores=narrow.unit if stored else 0.0,
        exp_error=max(_math(dtype).exp_error, 2.0**-22 if dtype.itemsize < 8 else 0.0),
        source="the casts in jax.nn.dot_product_attention; exp within 2^-22, which holds with room in our measurements (JAX 0.10 on a CPU)",
    )


def _recurrent(dtype: np.dtype) -> Profile:
    """A state in the accumulator, token by token; no decay is that of several tokens."""
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    return Profile("recurrent", u, exp_error=max(2 * u, 2.0**-22 if u == _SINGLE else 0.0), chunk=1, source="a recurrence evaluated as it is written")


def _chunked(dtype: np.dtype) -> Profile:
    """Chunks of 64 tokens or fewer by matrix products, whose operands are rounded to the operands' format; the state in the accumulator."""
    narrow = format_of(dtype).unit if dtype.itemsize < 4 else 0.0
    u = _DOUBLE if dtype == np.float64 else _SINGLE
    return replace(
        _recurrent(dtype),
        name="chunked",
        chunk=64,
        operands=max(narrow, u),
        source="the casts of flash-linear-attention's chunked kernels: decayed keys and queries, the inverse of the triangular system, changes and "
        "states are rounded before products, and added up in float32",
    )


def _bf16_state(dtype: np.dtype) -> Profile:
    """The chunked form, or the recurrent one, with a state that is stored in bfloat16 after every token."""
    return replace(
        _chunked(dtype),
        name="bf16-state",
        state=format_of(np.dtype("bfloat16")).unit,
        source=f"{_chunked(dtype).source}; a state cache in bfloat16",
    )


def _only(name: str, dtype: np.dtype, size: int) -> None:
    if dtype.itemsize != size:
        raise ParameterError(f"profile {name!r} is for formats of {8 * size} bits, but the operands are {dtype.name}")


_V100 = "V100: 4 products at a time, truncated to the accumulator's bits (Fasi, Higham, Mikaitis and Pranesh, PeerJ Comput. Sci. 7:e330)"
_A100 = "A100: 8 products at a time with one more bit (Fasi, Higham, Mikaitis and Pranesh, PeerJ Comput. Sci. 7:e330)"
_H100 = "H100: 16 products at a time with two more bits (Khattak and Mikaitis, arXiv:2512.07004)"

#: Presets by name; each makes the profile for a dtype, or raises ParameterError for one it is not for.
PRESETS: dict[str, Callable[[np.dtype], Profile]] = {
    "math": _math,
    "flash": _flash,
    "eager": _eager,
    "split": _split,
    "tensor-core-v100": _tensor_core("tensor-core-v100", 4, 0, _V100),
    "tensor-core-a100": _tensor_core("tensor-core-a100", 8, 1, _A100),
    "tensor-core-h100": _tensor_core("tensor-core-h100", 16, 2, _H100),
    "fa3-fp8": _fa3_fp8,
    "torch-cpu-flash": _torch_cpu_flash,
    "jax-xla": _xla,
    "recurrent": _recurrent,
    "chunked": _chunked,
    "bf16-state": _bf16_state,
}


def resolve(name: str | Profile | None, dtype: Any) -> Profile:
    """The profile of that name for operands of `dtype`.

    A name may carry the dtype it is meant for (``"flash-bf16"``).  None is ``"flash"``, which allows everything ``"math"`` does and a
    tiled kernel's additional roundings.

    Raises
    ------
    UnknownVariantError, ParameterError
    """
    if isinstance(name, Profile):
        return name
    dtype = as_dtype(dtype)
    if isinstance(name, str) and name == "auto":
        raise ParameterError("profile 'auto' is found by asking calls, as check does; name one for arrays that exist already")
    if not isinstance(name, str | None):
        raise UnknownVariantError(unknown("profile", name, [*PRESETS, "auto"]))
    kind, _, spelled = (name or "flash", "", "") if name is None or name in PRESETS else name.rpartition("-")
    if kind not in PRESETS:
        raise UnknownVariantError(unknown("profile", name, [*PRESETS, "auto"]))
    if spelled and as_dtype(spelled) != dtype:
        raise ParameterError(f"profile {name!r} is for {as_dtype(spelled).name}, but the operands are {dtype.name}")
    return PRESETS[kind](dtype)
