"""What every implementation is asked: shapes, masks and functions of the scores, and the operands they are asked with.

A case is one line of a table; `Case.work` makes the call of it, with the same operands every time.  What a case does to the scores or hides is
stated twice: as an array or a number, and, where that is how it would be written, as a function of positions for those that compile one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refattn import precision

DTYPES = ("float32", "float64", "bfloat16")
#: The output; the gradients alone, the forward pass done before; both in one call, as a training step does them.
WAYS = ("forward", "backward", "training")
#: Groups whose ceiling is how fast memory is read, not how fast numbers are multiplied.
READING = ("decode",)
#: Where scores are capped.
CAP = 20.0


# Functions of scores and positions.  They work on NumPy's arrays, torch's tensors and Numba's numbers alike, but for `capped`.


def alibi(score: Any, b: Any, h: Any, i: Any, j: Any, slopes: Any) -> Any:
    """A penalty that grows with the distance, at a slope of its own for every head."""
    return score + slopes[h] * (j - i)


def relative(score: Any, b: Any, h: Any, i: Any, j: Any, table: Any) -> Any:
    """A learned number for every head and distance."""
    return score + table[h, j - i + table.shape[1] // 2]


def same_document(b: Any, h: Any, i: Any, j: Any, document: Any) -> Any:
    """Tokens of one document see one another."""
    return document[i] == document[j]


def capped(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Scores that stay below `CAP`: the costliest function of one that a published model has."""
    return CAP * math.tanh(score / CAP)


def capped_in_torch(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return CAP * (score / CAP).tanh()


@dataclass(frozen=True)
class Functions:
    """What a compiling implementation is given in place of a bias, a soft-cap or a mask; torch another, where it cannot read the same."""

    score_mod: Callable[..., Any] | None = None
    in_torch: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    aux: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Work:
    """One call to be timed.

    Attributes
    ----------
    way : str
        One of `WAYS`.
    operands : mapping
        q, k, v, and where they apply bias and mask, with the axes (Hq) T S, as refattn takes them.
    params : mapping
        Of the softmax variant.
    d_out : ndarray
        Cotangent of the output.
    threads : int
    functions : Functions
        The bias, the soft-cap or the mask said another way.
    """

    way: str
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, Any]
    d_out: np.ndarray
    threads: int
    functions: Functions = field(default_factory=Functions)

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
        allowed = self.allowed
        return triangle if allowed is None else triangle & allowed

    @property
    def flops(self) -> float:
        """Of the products alone, for the pairs that are visible: two forward, five backward, seven for both."""
        q, v, n_k = self.operands["q"], self.operands["v"], self.operands["k"].shape[2]
        visible = self.visible
        pairs = q.shape[2] * n_k if visible is None else int(visible.sum())
        forward = 2.0 * q.shape[0] * q.shape[1] * pairs * (q.shape[3] + v.shape[3])
        return forward * {"forward": 1.0, "backward": 2.5, "training": 3.5}[self.way]

    @property
    def bytes(self) -> int:
        """Of keys and values, each of which has to be read once."""
        return self.operands["k"].nbytes + self.operands["v"].nbytes


@dataclass(frozen=True)
class Case:
    """A shape with a mask or a change of the scores.

    Attributes
    ----------
    group : str
        The line of the table it stands under.
    B, Hq, Hkv, T, S, D : int
    ways, dtypes : tuple of str
        In which it is asked.
    causal : bool
    window : int
        Keys a query sees, its own included; 0 is no window.
    kind : {"", "bias", "documents", "alibi", "relative", "cap"}
    """

    group: str
    B: int
    Hq: int
    Hkv: int
    T: int
    S: int
    D: int
    ways: tuple[str, ...] = ("forward",)
    dtypes: tuple[str, ...] = DTYPES
    causal: bool = False
    window: int = 0
    kind: str = ""

    def work(self, way: str, dtype: str, threads: int) -> Work:
        """Operands drawn from a normal distribution."""
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return precision.round_to(rng.standard_normal(shape, np.float32), precision.as_dtype(dtype))

        q, k, v = draw(self.B, self.Hq, self.T, self.D), draw(self.B, self.Hkv, self.S, self.D), draw(self.B, self.Hkv, self.S, self.D)
        d_out = draw(self.B, self.Hq, self.T, self.D)
        operands, functions = {"q": q, "k": k, "v": v}, Functions()
        i, j = np.arange(self.T)[:, None], np.arange(self.S)
        if self.kind == "bias":
            operands["bias"] = draw(self.T, self.S)
        if self.kind == "documents":
            document = np.arange(max(self.T, self.S), dtype=np.int32) * 8 // max(self.T, self.S)
            functions = Functions(mask_mod=same_document, aux=(document,))
            operands["mask"] = same_document(0, 0, i, j, document)
        if self.kind in ("alibi", "relative"):
            slopes = (2.0 ** (-8.0 * np.arange(1, self.Hq + 1) / self.Hq)).astype(dtype)
            aux = slopes if self.kind == "alibi" else draw(self.Hq, 2 * max(self.T, self.S))
            functions = Functions(score_mod=alibi if self.kind == "alibi" else relative, aux=(aux,))
            operands["bias"] = functions.score_mod(0.0, 0, np.arange(self.Hq)[:, None, None], i, j, aux).astype(dtype)
        params: dict[str, Any] = {"causal": True} if self.causal else {"window": (self.window - 1, 0)} if self.window else {}
        if self.kind == "cap":
            functions, params = Functions(score_mod=capped, in_torch=capped_in_torch), {**params, "softcap": CAP}
        return Work(way, operands, params, d_out, threads, functions)

    @property
    def reads(self) -> bool:
        """Whether memory is what limits it."""
        return self.group in READING


#: B, Hq, Hkv, T = S, D.
SHAPES = (
    (1, 8, 8, 128, 64),
    (1, 8, 8, 512, 64),
    (1, 8, 8, 1024, 64),
    (1, 8, 8, 2048, 64),
    (1, 8, 8, 4096, 64),
    (1, 8, 8, 2048, 128),
    (4, 16, 16, 512, 64),
    (1, 32, 8, 1024, 128),
)
#: Functions of scores are compiled in float32 only by those we compare with (FlexAttention on a CPU has no float64).
_COMPILED = ("float32",)
CASES = (
    *(Case("full", B, Hq, Hkv, T, T, D, ways=WAYS) for B, Hq, Hkv, T, D in SHAPES),
    *(Case("causal", B, Hq, Hkv, T, T, D, ways=WAYS, causal=True) for B, Hq, Hkv, T, D in SHAPES),
    Case("window 256", 1, 8, 8, 4096, 4096, 64, window=256),
    Case("documents", 1, 8, 8, 4096, 4096, 64, kind="documents"),
    Case("bias", 1, 8, 8, 2048, 2048, 64, kind="bias"),
    Case("alibi", 1, 8, 8, 2048, 2048, 64, dtypes=_COMPILED, kind="alibi"),
    Case("relative", 1, 8, 8, 2048, 2048, 64, dtypes=_COMPILED, kind="relative"),
    Case("tanh cap", 1, 8, 8, 2048, 2048, 64, dtypes=_COMPILED, kind="cap"),
    Case("one head", 1, 1, 1, 4096, 4096, 64, ways=("forward", "training")),
    Case("latency", 1, 8, 8, 16, 16, 64),
    Case("decode", 1, 32, 8, 1, 4096, 128),
    Case("decode", 1, 32, 8, 1, 32768, 128),
)
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
