"""A caller's own scalar functions of scores and positions, checked.

    score_mod(score, b, h, i, j, *aux) -> number       takes the place of a score, after scale and soft-cap, before bias and masks
    slope(score, b, h, i, j, *aux)     -> number       d score_mod / d score, for gradients
    mask_mod(b, h, i, j, *aux)         -> bool         True where query i may attend key j

b is the number of the batch or of the sequence, h of the query head, i of the query and j of the key, each from 0 and the last two within
their sequence.  Arrays that a function reads are passed as `aux`: compiled code would keep those it captures as they are today.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from . import precision
from .catalog import catalogue, unknown
from .errors import DtypeError, OperandError, ParameterError, ShapeError, shown
from .foreign import as_numpy
from .spec import Dims, Integer, Variant

#: Keywords of a call that this module reads.
KEYWORDS = frozenset({"score_mod", "slope", "mask_mod", "aux", "block_mask"})

#: Parameters every function begins with.
_OWN = {
    "score_mod": ("score", "b", "h", "i", "j"),
    "slope": ("score", "b", "h", "i", "j"),
    "mask_mod": ("b", "h", "i", "j"),
}

Aux = tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which tiles of the queries x keys plane a mask_mod hides or shows whole, so that kernels skip the ones and need not ask in the others.

    Parameters
    ----------
    mask_mod : callable
    block : (int, int)
        Queries and keys of a tile.
    classes : ndarray of int8, shape (B or 1, Hq or 1, tiles of queries, tiles of keys)
        0 where a tile shows no pair, 1 where some, 2 where all; an axis of size 1 stands for every batch or head.
    T, S : int
    aux : tuple of ndarray
        What mask_mod takes after its own parameters, copied when the map was made.
    """

    mask_mod: Callable[..., Any]
    block: tuple[int, int]
    classes: np.ndarray
    T: int
    S: int
    aux: Aux = ()

    def __repr__(self) -> str:
        tiles, skipped = self.classes.size, int((self.classes == 0).sum())
        share = f"{skipped / tiles:.1%} of {tiles} tiles skipped" if tiles else "no tiles"
        batch, heads = self.classes.shape[:2]
        return f"BlockMask({name_of(self.mask_mod)}, B={batch}, Hq={heads}, T={self.T}, S={self.S}, block={self.block}, {share})"


@dataclass(frozen=True, eq=False)
class Functions:
    """The functions of one call, each with the arrays it takes after its own parameters (C-contiguous).

    Attributes
    ----------
    score_mod, slope, mask_mod : callable or None
        Python functions, or functions compiled by Numba.
    score_aux, slope_aux, mask_aux : tuple of ndarray
    block_mask : BlockMask or None
    first : int
        What functions are told as the number of the first batch.
    """

    score_mod: Callable[..., Any] | None = None
    slope: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    score_aux: Aux = ()
    slope_aux: Aux = ()
    mask_aux: Aux = ()
    block_mask: BlockMask | None = None
    first: int = 0


def bind_functions(variant: Variant, options: Mapping[str, Any], dims: Dims | None) -> Functions | None:
    """The functions among a call's keywords, checked; None where there are none.  No dims: sequences that have no sizes in common.

    Raises
    ------
    ParameterError, ShapeError, DtypeError, OperandError
    """
    chosen = {name: x for name, x in options.items() if x is not None}
    if not chosen:
        return None
    what = variant.name
    if not takes_functions(variant):
        takers = ", ".join(name for name, v in catalogue().items() if takes_functions(v))
        raise ParameterError(f"{what} takes no {min(chosen)}; variants that do are {takers}")
    if "slope" in chosen and "score_mod" not in chosen:
        raise ParameterError(f"{what}: slope is the derivative of a score_mod, and none is given")
    aux = _aux(what, chosen.get("aux"))
    blocks = chosen.get("block_mask")
    implied = blocks is not None and not aux  # a mask_mod given beside its map may leave its arrays to it
    found = {name: _taken(what, name, chosen[name], aux) for name in _OWN if name in chosen and not (implied and name == "mask_mod")}
    if aux and not any(found.values()):
        raise ParameterError(f"{what}: aux is given, but no function takes {'it' if len(aux) == 1 else 'them'}")
    if blocks is not None:
        _check_block_mask(what, blocks, chosen.get("mask_mod"), found.get("mask_mod"), dims)
        chosen["mask_mod"], found["mask_mod"] = blocks.mask_mod, blocks.aux
    return Functions(
        chosen.get("score_mod"), chosen.get("slope"), chosen.get("mask_mod"),
        found.get("score_mod", ()), found.get("slope", ()), found.get("mask_mod", ()),
        blocks,
    )  # fmt: skip


def bind_mask(mask_mod: Any, aux: Any, sizes: Mapping[str, Any], block: Any) -> tuple[Aux, tuple[int, int]]:
    """What a block mask is made of, checked: copies of the arrays that mask_mod takes, and the sizes of a tile.

    Raises
    ------
    ParameterError, DtypeError
    """
    for axis, n in sizes.items():
        least = 0 if axis in "TS" else 1
        if not Integer(least).accepts(n):
            raise ParameterError(f"block_mask: {axis}={shown(n)}; must be {Integer(least).rule}")
    if not (isinstance(block, tuple | list) and len(block) == 2 and all(Integer(1).accepts(n) for n in block)):
        raise ParameterError(f"block_mask: block={shown(block)}; must be a pair of whole numbers from 1: queries and keys of a tile")
    arrays = _aux("block_mask", aux)
    taken = _taken("block_mask", "mask_mod", mask_mod, arrays)
    if arrays and not taken:
        raise ParameterError("block_mask: aux is given, but mask_mod does not take it")
    return tuple(x.copy() for x in taken), (int(block[0]), int(block[1]))


@functools.cache
def takes_functions(variant: Variant) -> bool:
    """Whether its scores are scaled dot products of its own q and k, which a function, a bias and a mask can then change."""
    axes = {o.name: o.axes for o in variant.operands} | {o.name: o.axes for o in variant.outputs}
    usual = {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "bias": "B Hq T S", "mask": "B Hq T S", "scores": "B Hq T S"}
    first = tuple(o.name for o in variant.operands[:3])
    if variant.plan is None or first != ("q", "k", "v") or any(axes.get(name) != spelled for name, spelled in usual.items()):
        return False
    plan = variant.plan(dict.fromkeys(variant.axes, 1), {p.name: p.default for p in variant.params})
    return plan.similarity.__name__.endswith(".dot") and "scale" in [p.name for p in variant.params]


def is_jitted(function: Any) -> bool:
    """Whether Numba made it, without importing Numba: who has such a function has it imported."""
    extending = sys.modules.get("numba.extending")
    return extending is not None and bool(extending.is_jitted(function))


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def captured(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads beside its parameters: enclosed variables, defaults and globals, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    defaults = function.__defaults__ or ()
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name in _globals_read(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


@functools.lru_cache(maxsize=256)
def _globals_read(code: CodeType) -> tuple[str, ...]:
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = (name for x in code.co_consts if isinstance(x, CodeType) for name in _globals_read(x))
    return tuple(sorted(own.union(inner)))


def _aux(what: str, aux: Any) -> dict[Any, np.ndarray]:
    """The arrays of `aux` under their names, or their numbers where they have none."""
    if aux is None:
        return {}
    if isinstance(aux, Mapping):
        for name in aux:
            if not isinstance(name, str):
                raise ParameterError(f"{what}: aux maps names of a function's parameters to arrays; {shown(name)} is no name")
        return {name: _array(f"{what}: aux[{name!r}]", x) for name, x in aux.items()}
    if isinstance(aux, tuple | list):
        return {n: _array(f"{what}: aux[{n}]", x) for n, x in enumerate(aux)}
    return {0: _array(f"{what}: aux", aux)}


def _array(what: str, value: Any) -> np.ndarray:
    """A C-contiguous array of a type that compiled code knows."""
    x = as_numpy(value, what)
    if not (precision.is_real(x.dtype) or x.dtype.kind in "biu"):
        raise DtypeError(f"{what} is {x.dtype}; must be floating point, integer or boolean")
    if x.dtype == np.uint64 and x.size and x.max() > np.iinfo(np.int64).max:
        raise OperandError(f"{what} holds {x.max()}; whole numbers must be less than 2**63")
    narrow = precision.is_real(x.dtype) and x.dtype.itemsize < 4
    dtype = np.dtype(np.float32) if narrow else np.dtype(np.int64) if x.dtype == np.uint64 else x.dtype.newbyteorder("=")
    return np.require(x, dtype, ["C", "ALIGNED"])


def _taken(what: str, name: str, function: Any, aux: Mapping[Any, np.ndarray]) -> Aux:
    """The arrays that a function takes after its own parameters, from its signature."""
    plain = getattr(function, "py_func", None) if is_jitted(function) else function
    if not isinstance(plain, FunctionType):
        raise ParameterError(f"{what}: {name} is a {type(function).__name__}; must be a Python function, or one compiled by numba.njit")
    _refuse_arrays(what, name, plain, set())
    own, parameters = _OWN[name], list(inspect.signature(plain).parameters.values())
    called = f"{what}: {name} {name_of(plain)}({', '.join(map(str, parameters))})"
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        raise ParameterError(f"{called} has a keyword-only parameter; it is called by position: ({', '.join(own)})")
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    least = sum(p.default is p.empty for p in places)
    most = sys.maxsize if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(places)
    if named := any(isinstance(key, str) for key in aux):
        extra = places[len(own) :]
        wanted = [p.name for p in extra if p.name in aux or p.default is p.empty]
        missing = [parameter for parameter in wanted if parameter not in aux]
        if missing:
            raise ParameterError(f"{called}: {unknown('array of aux', missing[0], [*aux])}")
        choices = [tuple(aux[parameter] for parameter in wanted)] if wanted == [p.name for p in extra[: len(wanted)]] else []
    else:
        choices = [tuple(aux.values()), ()]
    for arrays in choices:
        if least <= len(own) + len(arrays) <= most:
            return arrays
    more = ", then parameters that aux names" if named else f", or {len(own) + len(aux)} with the arrays of aux" if aux else ""
    raise ParameterError(f"{called} takes {len(places)} parameters; must take {len(own)}, ({', '.join(own)}){more}")


def _refuse_arrays(what: str, name: str, function: FunctionType, seen: set[FunctionType]) -> None:
    seen.add(function)
    for variable, value in captured(function):
        inner = getattr(value, "py_func", None) if is_jitted(value) else value
        if isinstance(inner, FunctionType) and inner not in seen:
            _refuse_arrays(what, name, inner, seen)
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, np.ndarray) or (hasattr(x, "__array__") and not isinstance(x, type | np.generic)):
                raise ParameterError(
                    f"{what}: {name} captures {variable}, an array, which compiled code would keep as it is today; "
                    "take it as a parameter and pass it as aux"
                )


def _check_block_mask(what: str, blocks: Any, mask_mod: Any, mask_aux: Aux | None, dims: Dims | None) -> None:
    if not isinstance(blocks, BlockMask):
        raise ParameterError(f"{what}: block_mask is a {type(blocks).__name__}; must be what refattn.block_mask returns")
    if mask_mod is not None and mask_mod is not blocks.mask_mod:
        raise ParameterError(f"{what}: block_mask was made of {name_of(blocks.mask_mod)}, but mask_mod is {name_of(mask_mod)}; pass one of the two")
    if mask_aux is not None and not (len(mask_aux) == len(blocks.aux) and all(map(_same, mask_aux, blocks.aux))):
        raise ParameterError(f"{what}: block_mask was made with other arrays than aux now gives mask_mod; make it again")
    if dims is None:
        raise ParameterError(f"{what}: block_mask is of one T and S, and sequences have their own; pass mask_mod alone")
    for axis, n in (("T", blocks.T), ("S", blocks.S)):
        if n != dims[axis]:
            raise ShapeError(f"{what}: block_mask has {axis}={n}, but the operands have {axis}={dims[axis]}")
    for axis, n in zip(("B", "Hq"), blocks.classes.shape, strict=False):
        if n not in (1, dims[axis]):
            raise ShapeError(f"{what}: block_mask has {axis}={n}; must be 1 or {axis}={dims[axis]}")


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and np.array_equal(one, two)
