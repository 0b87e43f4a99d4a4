"""Sequences of different lengths in one call: laid end to end, or with keys and values in the pages of a cache.

Each sequence is a call of its own.  Its positions count from 0, causal masks and windows are aligned by its own numbers of queries
and keys, and what follows from the number of keys (sigmoid's shift) follows from its own.

What people get wrong: aligning a causal mask by the longest sequence of a batch; reading the rest of a last page, where earlier contents lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .errors import DtypeError, OperandError, ParameterError, ShapeError, shown
from .foreign import as_numpy

ORDERS = ("BHTD", "BTHD")


@dataclass(frozen=True, eq=False, init=False)
class Packed:
    """Sequences laid end to end: q is [T, Hq, D], k [S, Hkv, D], v [S, Hkv, E], and out comes back as [T, Hq, E], lse as [Hq, T].

    Of variants that carry a state, every operand with tokens lies so ([T, Hkv, D], a gate [T, Hkv]), and what is carried has one entry per
    sequence, before and after: [sequences, Hkv, D, E].

    Parameters
    ----------
    cu_seqlens_q : array_like of int, shape (sequences + 1,)
        Where each sequence's queries begin, and the number of all queries: 0, not decreasing, and T at the end.
    cu_seqlens_k : array_like of int, optional
        The same of keys and values; the queries' unless said.

    Raises
    ------
    ShapeError, DtypeError, OperandError

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = k = np.zeros((5, 1, 4)); v = np.arange(5.0).reshape(5, 1, 1)
    >>> ra.attention(q, k, v, layout=ra.Packed(np.array([0, 2, 5])), causal=True).ravel().tolist()
    [0.0, 0.5, 2.0, 2.5, 3.0]
    """

    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray

    order: ClassVar[str] = "THD"

    def __init__(self, cu_seqlens_q: Any, cu_seqlens_k: Any = None) -> None:
        queries = _bounds("cu_seqlens_q", cu_seqlens_q)
        keys = queries if cu_seqlens_k is None else _bounds("cu_seqlens_k", cu_seqlens_k)
        if len(keys) != len(queries):
            raise ShapeError(f"Packed: cu_seqlens_k has {len(keys)} entries, but cu_seqlens_q has {len(queries)}; both have one per sequence and one")
        object.__setattr__(self, "cu_seqlens_q", queries)
        object.__setattr__(self, "cu_seqlens_k", keys)

    @property
    def bounds(self) -> dict[str, np.ndarray]:
        """Where sequences begin and end, by the axis that they lie along."""
        return {"T": self.cu_seqlens_q, "S": self.cu_seqlens_k}


@dataclass(frozen=True, eq=False, init=False)
class Paged:
    """Keys and values in pages: q is [B, Hq, T, D], k [P, Hkv, page, D] and v [P, Hkv, page, E], with P pages that any sequence may use.

    Key j of sequence b is row ``j % page`` of page ``block_table[b, j // page]``.  Rows beyond a sequence's length are never read.

    Parameters
    ----------
    block_table : array_like of int, shape (B, most pages)
        Pages of each sequence, in order; entries that its length does not reach may hold anything.
    lengths : array_like of int, shape (B,)
        Keys of each sequence.
    order : {"BHTD", "BTHD"}
        Order of heads and rows: ``"BTHD"`` is q [B, T, Hq, D], k [P, page, Hkv, D], out [B, T, Hq, E].

    Raises
    ------
    ShapeError, DtypeError, OperandError, ParameterError

    Examples
    --------
    >>> import numpy as np, refattn as ra
    >>> q = np.zeros((1, 1, 1, 4)); k = np.zeros((2, 1, 2, 4)); v = np.array([2.0, np.nan, 4.0, 6.0]).reshape(2, 1, 2, 1)
    >>> ra.attention(q, k, v, layout=ra.Paged(np.array([[1, 0]]), np.array([3]))).ravel().tolist()
    [4.0]
    """

    block_table: np.ndarray
    lengths: np.ndarray
    order: str

    def __init__(self, block_table: Any, lengths: Any, order: str = "BHTD") -> None:
        table, counts = _integers("Paged: block_table", block_table, 2), _integers("Paged: lengths", lengths, 1)
        if len(table) != len(counts):
            raise ShapeError(f"Paged: block_table has B={len(table)}, but lengths has B={len(counts)}")
        if counts.size and counts.min() < 0:
            raise OperandError(f"Paged: lengths[{counts.argmin()}]={counts.min()}; must be at least 0")
        if not (isinstance(order, str) and order in ORDERS):
            raise ParameterError(f"Paged: order={shown(order)}; must be one of {', '.join(ORDERS)}")
        object.__setattr__(self, "block_table", table)
        object.__setattr__(self, "lengths", counts)
        object.__setattr__(self, "order", order)


Sequences = Packed | Paged


def check(what: str, sequences: Sequences, given: Mapping[str, np.ndarray], axes: Mapping[str, str]) -> int:
    """Hold sequences against operands of these axes (BHTD); the largest number of keys, all of them where they are packed.

    Raises
    ------
    ShapeError, OperandError
    """
    if isinstance(sequences, Packed):
        bounds = sequences.bounds
        for name, x in given.items():
            for axis, n in zip(axes[name].split(), x.shape, strict=True):
                if axis in bounds and bounds[axis][-1] != n:
                    raise ShapeError(f"{what}: cu_seqlens_{'qk'[axis == 'S']} ends at {bounds[axis][-1]}, but {name} has {axis}={n}")
        if sequences.cu_seqlens_k is not sequences.cu_seqlens_q and not any("S" in axes[name].split() for name in given):
            raise ParameterError(f"{what}: cu_seqlens_k is given, but its keys are its queries' tokens; leave it out")
        return int(sequences.cu_seqlens_k[-1])
    q, k = given["q"], given["k"]
    table, lengths, (pages, page) = sequences.block_table, sequences.lengths, (k.shape[0], k.shape[2])
    if len(lengths) != len(q):
        raise ShapeError(f"{what}: block_table has B={len(lengths)}, but q has B={len(q)}")
    most = table.shape[1] * page
    if lengths.size and lengths.max() > most:
        b = lengths.argmax()
        raise OperandError(f"{what}: lengths[{b}]={lengths[b]}; {table.shape[1]} pages of {page} keys hold at most {most}")
    used = np.arange(table.shape[1]) < -(-lengths[:, None] // page)
    wrong = np.argwhere(used & ((table < 0) | (table >= pages)))
    if len(wrong):
        b, n = wrong[0]
        raise OperandError(f"{what}: block_table[{b}, {n}]={table[b, n]}; must be from 0 to {pages - 1}, as k has P={pages} pages")
    return int(lengths.max(initial=0))


def part(sequences: Sequences, n: int, axes: str) -> tuple[slice, ...]:
    """Where sequence n lies in an array of those axes (BHTD), which is not in pages."""
    names = axes.split()
    if isinstance(sequences, Packed) and sequences.bounds.keys() & set(names):
        bounds = sequences.bounds
        return tuple(slice(int(bounds[a][n]), int(bounds[a][n + 1])) if a in bounds else slice(None) for a in names)
    return (slice(n, n + 1),) if names[:1] == ["B"] else ()


def gathered(sequences: Paged, pages: np.ndarray, b: int) -> np.ndarray:
    """Keys or values of sequence b, [1, Hkv, lengths[b], width], of pages [P, Hkv, page, width]."""
    length, page = int(sequences.lengths[b]), pages.shape[2]
    own = pages[sequences.block_table[b, : -(-length // page)]]
    flat: np.ndarray = own.transpose(1, 0, 2, 3).reshape(1, pages.shape[1], -1, pages.shape[3])
    return flat[:, :, :length]


def _bounds(name: str, value: Any) -> np.ndarray:
    bounds = _integers(f"Packed: {name}", value, 1)
    if not bounds.size or bounds[0] != 0:
        begins = f"begins with {bounds[0]}" if bounds.size else "has no entry"
        raise OperandError(f"Packed: {name} {begins}; must begin with 0")
    falls = np.flatnonzero(np.diff(bounds) < 0)
    if falls.size:
        n = falls[0]
        raise OperandError(f"Packed: {name}[{n + 1}]={bounds[n + 1]} is less than {name}[{n}]={bounds[n]}; must not decrease")
    return bounds


def _integers(what: str, value: Any, axes: int) -> np.ndarray:
    """A copy, which later writes to the caller's array do not reach."""
    x = as_numpy(value, what)
    if x.dtype.kind not in "iu":
        raise DtypeError(f"{what} is {x.dtype}; must be integers")
    if x.ndim != axes:
        raise ShapeError(f"{what} has {x.ndim} axes, shape {x.shape}; must have {axes}")
    copied = np.array(x, np.int64, order="C")
    copied.flags.writeable = False
    return copied
