"""Hypothesis strategies: unkind calls of any variant of the catalogue, drawn from what the variant declares.

    from hypothesis import given
    import refattn as ra
    from refattn import strategies

    @given(strategies.problems("softmax", dtype="float32"))
    def test_my_kernel(drawn):
        ra.assert_matches(my_kernel(**drawn.operands, **drawn.params), drawn.variant, **drawn.keywords)

Sizes, parameters and the kind of values are drawn choice by choice and shrink; the numbers within an array come from a seeded generator,
so that large arrays cost one draw.  The first of every list of choices is the plainest: a failing call shrinks towards one batch, one head, one
query, zeros, contiguous arrays and default parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import catalog, precision
from .errors import BackendUnavailableError, ParameterError
from .problem import LAYOUTS, to_layout
from .spec import GROUPED, MAY_BE_EMPTY, Choice, Dims, Integer, Number, Operand, Param, Variant, Window, normal, shape

try:
    from hypothesis import strategies as st
except ImportError as missing:
    raise BackendUnavailableError("refattn.strategies needs hypothesis; pip install 'refattn[strategies]'") from missing

#: What may make a drawn call unkind, by name.
FEATURES: Mapping[str, str] = {
    "empty sizes": "no batch, no queries or no keys",
    "different lengths": "T and S differ",
    "grouped heads": "2, 3 or 7 query heads to a key-value head",
    "optional operands": "a bias, a mask, sinks, ...",
    "broadcast": "operands that may broadcast have axes of size 1 or fewer axes",
    "empty rows": "masks under which a query sees no key",
    "parameters": "parameters other than their defaults",
    "ties": "rows that stand there twice, and values from a few whole numbers",
    "outliers": "one element far larger than the others",
    "extremes": "numbers about the smallest and large ones of the format, and the ends of an operand's domain",
    "infinities": "-inf in a bias, and sinks that are absent for one head",
    "layouts": "BTHD beside BHTD",
    "strides": "arrays that are not contiguous, run backwards or are read-only",
}

FORMATS = ("float32", "float64", "float16", "bfloat16")
_RATIOS = (1, 2, 3, 7)


@dataclass(frozen=True, eq=False)
class Drawn:
    """One call.

    Attributes
    ----------
    variant : str
    operands : mapping of str to ndarray
        Those given, in the order of the variant and in `layout`.
    params : mapping
        Those that are not at their default.
    layout : {"BHTD", "BTHD"}
    """

    variant: str
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, Any]
    layout: str = "BHTD"

    @property
    def keywords(self) -> dict[str, Any]:
        """What `refattn.attend`, `refattn.compare` and `refattn.tolerance` take beside the name."""
        return {**self.operands, **self.params, "layout": self.layout}

    def __repr__(self) -> str:
        parts = [f"{name}={x.dtype.name}{list(x.shape)}" for name, x in self.operands.items()]
        parts += [f"{name}={value!r}" for name, value in self.params.items()]
        return f"Drawn({self.variant!r}, {', '.join(parts)}, layout={self.layout!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How Hypothesis shows it: shapes and parameters, not the numbers."""
        printer.text(repr(self))


def problems(
    variant: str = "softmax",
    *,
    dtype: Any = FORMATS,
    max_size: int = 20,
    features: Collection[str] | None = None,
) -> st.SearchStrategy[Drawn]:
    """Calls of a variant.

    Parameters
    ----------
    variant : str
        A name from `refattn.variants`.
    dtype : str or dtype, or a sequence of them
        Format of the real operands, one for all of them in a call.
    max_size : int
        Most queries, keys and entries of a width.
    features : collection of str, optional
        Which of `FEATURES` may be drawn; all of them unless said, none at all for plain calls.

    Returns
    -------
    SearchStrategy of Drawn

    Raises
    ------
    UnknownVariantError, DtypeError, ParameterError
    """
    found = catalog.variant(variant)
    several = isinstance(dtype, Sequence) and not isinstance(dtype, str)
    formats = [precision.as_dtype(d) for d in (dtype if several else [dtype])]
    if not formats:
        raise ParameterError(f"{variant}: dtype is empty; name at least one format")
    if not Integer(1).accepts(max_size):
        raise ParameterError(f"{variant}: max_size={max_size!r}; must be {Integer(1).rule}")
    return _problems(found, formats, int(max_size), _features(features))


@st.composite
def _problems(draw: Any, variant: Variant, formats: list[np.dtype], max_size: int, features: frozenset[str]) -> Drawn:
    dtype = draw(st.sampled_from(formats))
    dims = draw(sizes(variant, max_size, features))
    layout = draw(st.sampled_from(LAYOUTS)) if "layouts" in features else LAYOUTS[0]
    given = [o for o in variant.operands if not o.optional or ("optional operands" in features and draw(st.booleans()))]
    values = {p.name: draw(param(p, max_size)) for p in variant.params if "parameters" in features and draw(st.booleans())}
    params = {p.name: values[p.name] for p in variant.params if values.get(p.name, p.default) != p.default}
    operands = {}
    for o in given:  # last, so that leaving one out moves no other choice when a call shrinks
        x, axes = draw(_operand(variant, o, dims, dtype, features)), len(o.axes.split())
        if layout != "BHTD":  # axes that are missing in front cannot change places
            x = to_layout(o.axes, x[(None,) * (axes - x.ndim)], layout, operand=True)
        operands[o.name] = draw(strided(x)) if "strides" in features else np.array(x, order="C")
    return Drawn(variant.name, operands, params, layout)


@st.composite
def sizes(draw: Any, variant: Variant, max_size: int = 20, features: Collection[str] | None = None) -> dict[str, int]:
    """A size for every axis of a variant, by name.

    Parameters
    ----------
    variant : Variant
    max_size : int
    features : collection of str, optional
        As `problems` takes them; "empty sizes", "different lengths" and "grouped heads" matter here.
    """
    allowed = _features(features)
    dims = {axis: draw(st.integers(1, {"B": 3, "Hq": 3, "Hkv": 2, "H": 3, "G": 2}.get(axis, max_size))) for axis in variant.axes}
    if "empty sizes" in allowed and draw(st.integers(0, 9)) == 9:  # not more often: a call without numbers tests little else
        dims[draw(st.sampled_from([axis for axis in variant.axes if axis in MAY_BE_EMPTY]))] = 0
    for whole, group in GROUPED:
        if {whole, group} <= dims.keys():
            dims[whole] = dims[group] * (draw(st.sampled_from(_RATIOS)) if "grouped heads" in allowed else 1)
    if {"T", "S"} <= dims.keys() and "different lengths" not in allowed:
        dims["S"] = dims["T"]
    return dims


def operand(variant: str, name: str, dims: Dims, *, dtype: Any = "float32", features: Collection[str] | None = None) -> st.SearchStrategy[np.ndarray]:
    """Values of one operand of a variant, in BHTD layout.

    Parameters
    ----------
    variant : str
    name : str
        Of the operand.
    dims : mapping
        Size of each of its axes.
    dtype : str or dtype
        Its format; a boolean operand stays boolean.
    features : collection of str, optional
        As `problems` takes them.

    Returns
    -------
    SearchStrategy of ndarray

    Raises
    ------
    UnknownVariantError, DtypeError, ParameterError
    """
    found = catalog.variant(variant)
    names = [o.name for o in found.operands]
    if name not in names:
        raise ParameterError(f"{variant}: {catalog.unknown('operand', name, names)}")
    axes = found.operand(name).axes
    missing = [a for term in axes.split() for a in term.split("+") if a.isidentifier() and a not in dims]
    if missing:
        raise ParameterError(f"{variant}: {name} has axes {axes}; dims has no {missing[0]}")
    allowed = _features(features)
    whole = _operand(found, found.operand(name), dims, precision.as_dtype(dtype), allowed)
    return whole.flatmap(strided) if "strides" in allowed else whole


@st.composite
def _operand(draw: Any, variant: Variant, o: Operand, dims: Dims, dtype: np.dtype, features: frozenset[str]) -> np.ndarray:
    full = shape(o.axes, dims)
    if o.kind == "real":
        x = draw(_numbers(variant, o, full, dtype, features))
    elif o.draw is normal:
        x = draw(_allowed(full, features)).astype(bool if o.kind == "boolean" else dtype)
    else:
        x = np.asarray(o.draw(draw(_generator()), full)).astype(bool if o.kind == "boolean" else dtype)
    return draw(broadcast(x)) if o.broadcast and "broadcast" in features else x


@st.composite
def _numbers(draw: Any, variant: Variant, o: Operand, full: tuple[int, ...], dtype: np.dtype, features: frozenset[str]) -> np.ndarray:
    """Real numbers of one pattern, within the operand's domain."""
    patterns = ["zeros", "normal"] if o.within is None else ["normal"]
    patterns += [name for name in ("ties", "outliers") if name in features and o.within is None]
    patterns += ["smallest", "large"] if "extremes" in features and o.within is None else ["ends"] if "extremes" in features else []
    pattern = draw(st.sampled_from(patterns))
    rng, known = draw(_generator()), precision.format_of(dtype)
    x = np.zeros(full) if pattern == "zeros" else np.array(o.draw(rng, full), np.float64)
    if pattern == "ties":
        x = np.round(x)
        _twice(x, o.axes)
    elif pattern == "outliers" and x.size:
        x.flat[rng.integers(x.size)] *= 16.0
        _twice(x, o.axes)
    elif pattern == "smallest":
        x = known.tiny * np.round(4.0 * x)
    elif pattern == "large":  # the square root of the square root of the largest: sums of products of three operands stay within the format
        x *= known.largest**0.25 / 4.0
    elif pattern == "ends" and o.within is not None:
        x = np.where(rng.random(full) < 0.3, rng.choice(o.within, full), x)
    if "infinities" in features and _may_be_minus_infinity(variant, o, dtype):
        x = np.where(rng.random(full) < draw(st.sampled_from([0.0, 0.1, 0.5])), -np.inf, x)
    if o.within is not None:
        x = np.clip(x, *o.within)
    return precision.round_to(x, dtype)


def _twice(x: np.ndarray, axes: str) -> None:
    """The last query or key becomes a copy of the first."""
    for n, axis in enumerate(axes.split()):
        if axis in ("T", "S") and x.shape[n]:
            np.moveaxis(x, n, 0)[-1] = np.moveaxis(x, n, 0)[0]


def _may_be_minus_infinity(variant: Variant, o: Operand, dtype: np.dtype) -> bool:
    """Whether -inf is a number the operand may hold, as an absent sink is and a bias that hides a key."""
    if not np.isinf(np.array(-np.inf).astype(dtype).astype(np.float64)):  # float8_e4m3fn has no infinity
        return False
    if variant.plan is None:
        return o.absent == -math.inf
    plan = variant.plan(dict.fromkeys(variant.axes, 1), {p.name: p.default for p in variant.params})
    return o.absent == -math.inf or o.name == plan.bias


@st.composite
def _allowed(draw: Any, full: tuple[int, ...], features: frozenset[str]) -> np.ndarray:
    """Which keys may be attended: most of them, about half, few; rows without any where that is a feature."""
    share = draw(st.sampled_from([1.0, 0.7, 0.3]))
    mask: np.ndarray = draw(_generator()).random(full) < share
    if "empty rows" in features:
        if mask.size and draw(st.booleans()):
            mask[..., draw(st.integers(0, full[-2] - 1)), :] = False
    elif mask.size:
        mask[..., 0] = True
    return mask


@st.composite
def broadcast(draw: Any, x: np.ndarray) -> np.ndarray:
    """The array, with some axes of size 1 and some of the first ones left out: it broadcasts to the shape it had."""
    kept = [draw(st.booleans()) for _ in range(x.ndim)]
    small = x[tuple(slice(None) if keep else slice(None, 1) for keep in kept)]
    leading = next((n for n, keep in enumerate(kept) if keep), x.ndim)
    dropped = draw(st.integers(0, leading)) if small.size else 0
    result: np.ndarray = small[(0,) * dropped]
    return result


@st.composite
def strided(draw: Any, x: np.ndarray) -> np.ndarray:
    """The same numbers otherwise laid out in memory."""
    how = draw(st.sampled_from(["contiguous", "swapped", "every other", "backwards", "read-only"]))
    if how == "swapped" and x.ndim > 1:
        return np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)
    if how == "every other" and x.ndim:
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if how == "backwards" and x.ndim:
        return np.ascontiguousarray(x[::-1])[::-1]
    same = np.array(x, order="C")
    same.flags.writeable = how != "read-only"
    return same


def param(p: Param, max_size: int = 20) -> st.SearchStrategy[Any]:
    """Values of a parameter: its default, those worth trying, and any other of its kind, within bounds.

    Parameters
    ----------
    p : Param
    max_size : int
        About how far windows reach.
    """
    known = st.sampled_from([p.default, *p.tries])
    kind = p.kind
    if isinstance(kind, Choice):
        return st.sampled_from([p.default, *(v for v in kind.values if v != p.default)])
    if isinstance(kind, Window):
        side = st.none() | st.integers(0, max_size + 2)
        return known | st.tuples(side, side)
    if isinstance(kind, Integer):
        return known | st.integers(kind.at_least, min(kind.at_most, kind.at_least + max_size))
    return known | _real(kind)


def _real(kind: Number) -> st.SearchStrategy[Any]:
    """Numbers of moderate size that float32 holds: the point of a parameter is its meaning."""
    least = max(kind.above, kind.at_least)
    if least == -math.inf:
        return st.floats(-2.0, 2.0, width=32)
    return st.floats(least, least + 50.0, exclude_min=kind.above >= kind.at_least, width=32).filter(lambda x: x == least or x - least > 1e-3)


def _generator() -> st.SearchStrategy[np.random.Generator]:
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def _features(features: Collection[str] | None) -> frozenset[str]:
    if features is None:
        return frozenset(FEATURES)
    chosen = [features] if isinstance(features, str) else features
    for name in chosen:
        if name not in FEATURES:
            raise ParameterError(f"strategies: {catalog.unknown('feature', name, FEATURES)}")
    return frozenset(chosen)
