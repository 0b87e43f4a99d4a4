"""The door: arrays and parameters in, a checked Problem out; results back in the caller's layout and dtype.

`bind` is the only validation in refattn.  Behind it every axis fits, every parameter is a number, and code trusts what it gets.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import precision, sequences
from .catalog import catalogue, unknown
from .errors import DtypeError, OperandError, ParameterError, ShapeError, shown
from .foreign import as_numpy
from .functions import KEYWORDS as FUNCTION_KEYWORDS
from .functions import Functions, bind_functions
from .sequences import Packed, Paged, Sequences
from .spec import GROUPED, MAY_BE_EMPTY, Dims, Integer, Operand, Output, Plan, Recurrence, Reduction, Variant, shape, size

LAYOUTS = ("BHTD", "BTHD")
#: Axis of what packed sequences carry, each its own.
SEQUENCES = "sequences"


@dataclass(frozen=True)
class Problem:
    """One checked call.

    Attributes
    ----------
    dims : mapping
        Size of every axis.  Of packed sequences B is 1, T and S count all rows; of paged ones S is the largest length.
    given : mapping
        The caller's operands by name, as NumPy arrays in BHTD layout and their own dtype; absent ones are left out.  Packed sequences lie in
        one batch; k and v in pages have the axes P Hkv page D (E).
    params : mapping
        Every parameter, defaults filled in.
    returns : tuple of str
        Outputs asked for.
    dtype : dtype
        What results are rounded to.
    layout : {"BHTD", "BTHD", "THD"}
        The caller's: "THD" of packed sequences.
    functions : Functions or None
        The caller's own functions of scores and positions.
    sequences : Packed or Paged or None
        Where sequences of different lengths lie; a dense call unless said.
    """

    variant: Variant
    dims: Dims
    given: Mapping[str, np.ndarray]
    params: Mapping[str, Any]
    returns: tuple[str, ...]
    dtype: np.dtype
    layout: str = "BHTD"
    functions: Functions | None = None
    sequences: Sequences | None = None

    @functools.cached_property
    def plan(self) -> Plan | None:
        """The variant as data, where it is one; of sequences, as if they were one call."""
        return None if self.variant.plan is None else self.variant.plan(self.dims, self.params)

    @functools.cached_property
    def recurrence(self) -> Recurrence | None:
        """The variant as data, where it is one of those."""
        return None if self.variant.recurrence is None else self.variant.recurrence(self.dims, self.params)

    @functools.cached_property
    def reduction(self) -> Reduction | None:
        """The variant as a recurrence of other operands, where it is one."""
        return None if self.variant.reduction is None else self.variant.reduction(self.dims, self.params)

    @functools.cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What a definition takes: all operands in order, float64 or boolean, absent ones as their neutral element, broadcast."""
        return tuple(_canonical(o, self.given.get(o.name), self.dims) for o in self.variant.operands)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The parameters as a definition takes them."""
        return tuple(p.encode(self.params[p.name], self.dims) for p in self.variant.params)

    @property
    def operands(self) -> dict[str, np.ndarray]:
        """`arrays` by name."""
        return {o.name: x for o, x in zip(self.variant.operands, self.arrays, strict=True)}


def bind(
    variant: Variant,
    arrays: Sequence[Any],
    keywords: Mapping[str, Any],
    returns: str | Sequence[str] | None = None,
    layout: str | Sequences = "BHTD",
) -> Problem:
    """Check a call and bring it into canonical form.

    Parameters
    ----------
    variant : Variant
    arrays : sequence of array_like
        Operands in the variant's order; trailing optional ones may be left out or None.
    keywords : mapping
        Parameters, operands given by name, and the functions that `refattn.functions` reads.
    returns : str or sequence of str, optional
        Outputs wanted; the variant's usual ones otherwise.
    layout : {"BHTD", "BTHD"} or Packed or Paged
        Order of the head and sequence axes in operands and outputs that have both and a width; or where sequences lie.

    Raises
    ------
    ShapeError, DtypeError, OperandError, ParameterError
    """
    wanted = _outputs(variant, returns)
    places = layout if isinstance(layout, Packed | Paged) else None
    if places is not None:
        layout = places.order
    elif not (isinstance(layout, str) and layout in LAYOUTS):
        raise ParameterError(f"{variant.name}: layout={shown(layout)}; must be one of {', '.join(LAYOUTS)}, or a Packed or Paged")
    mods = {}
    if not FUNCTION_KEYWORDS.isdisjoint(keywords):
        mods = {name: x for name, x in keywords.items() if name in FUNCTION_KEYWORDS and name not in _names(variant)}
        keywords = {name: x for name, x in keywords.items() if name not in mods}
    operands, options = _sort_arguments(variant, arrays, keywords)
    if places is not None:
        _check_sequenced(variant, places, operands, wanted)
    axes = _axes(variant, layout if isinstance(places, Packed) else "pages" if places else "")
    given = {o.name: _operand(variant, o, operands[o.name], axes[o.name], layout) for o in variant.operands if operands.get(o.name) is not None}
    try:
        dims = _dims(variant, given, axes, places)
    except ShapeError as mismatch:
        raise ShapeError(f"{mismatch}{'' if places else _other_layout(variant, given, layout)}") from None
    if places is not None:
        most = sequences.check(variant.name, places, given, axes)
        dims = {axis: dims.get(axis, most) for axis in (*variant.axes, *({SEQUENCES} & dims.keys()))}
    params = _params(variant, options)
    required = {o.name: given[o.name].dtype.newbyteorder("=") for o in variant.operands if o.kind == "real" and not o.optional}
    functions = bind_functions(variant, mods, None if places else dims) if mods else None
    return Problem(variant, dims, given, params, wanted, precision.common(required, variant.name), layout, functions, places)


def bind_sizes(variant: Variant, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Sizes and parameters without operands: what a cost is asked for.

    A missing E is D, a missing S is T, a missing Hkv is Hq and a missing Dk is Dq; any other missing axis is an error.
    """
    dims = dict(sizes)
    for axis, twin in (("E", "D"), ("S", "T"), ("Hkv", "Hq"), ("Dk", "Dq")):
        if axis in variant.axes and axis not in dims and twin in dims:
            dims[axis] = dims[twin]
    missing = [axis for axis in variant.axes if axis not in dims]
    if missing:
        raise ShapeError(f"{variant.name}: {', '.join(missing)} missing; its axes are {', '.join(variant.axes)}")
    for axis, n in dims.items():
        least = 0 if axis in MAY_BE_EMPTY else 1
        if not Integer(least).accepts(n):
            raise ShapeError(f"{variant.name}: {axis}={n!r}; must be {Integer(least).rule}")
    for whole, group in GROUPED:
        if {whole, group} <= dims.keys() and dims[whole] % dims[group]:
            raise ShapeError(f"{variant.name}: {group}={dims[group]} does not divide {whole}={dims[whole]}")
    known = [p.name for p in variant.params]
    for name in options:
        if name not in known:
            raise ParameterError(f"{variant.name}: {unknown('axis or parameter', name, [*variant.axes, *known])}")
    return {axis: int(n) for axis, n in dims.items()}, _params(variant, options)


def release(problem: Problem, results: Mapping[str, np.ndarray], out: Sequence[np.ndarray] | None = None) -> Any:
    """The outputs asked for, rounded once to the caller's dtype and put in the caller's layout: one array, or a tuple.

    With `out`, as `check_out` passed it, they are written there instead.
    """
    released = tuple(_rounded(problem, name, results[name]) for name in problem.returns)
    if out is not None:
        for target, result in zip(out, released, strict=True):
            target[...] = result
        released = tuple(out)
    return released[0] if len(released) == 1 else released


def output_dtype(problem: Problem, name: str) -> np.dtype:
    """The dtype an output comes back in: the caller's, or at least float32 where the output is wide."""
    output = next(o for o in problem.variant.outputs if o.name == name)
    return np.dtype(np.float32) if output.wide and problem.dtype.itemsize < 4 else problem.dtype


def from_layout(axes: str, x: np.ndarray, layout: str, operand: bool = False) -> np.ndarray:
    """An array of the caller's layout in BHTD: heads and tokens change places wherever it has both and a width; packed ones get a batch.

    An operand's do without a width too, a gate's [B, T, H]; outputs without, such as a log-sum-exp, are [B, H, T] in every layout.
    """
    if layout == "BHTD":
        return x
    if _in_one_batch(axes, layout):
        x = x[None]
    return np.swapaxes(x, 1, 2) if _has_layout(axes, operand) else x


def to_layout(axes: str, x: np.ndarray, layout: str, operand: bool = False) -> np.ndarray:
    """An array of BHTD in the caller's layout."""
    if layout == "BHTD":
        return x
    x = np.swapaxes(x, 1, 2) if _has_layout(axes, operand) else x
    return x[0] if _in_one_batch(axes, layout) else x


def spelled(axes: str, layout: str, operand: bool = False) -> str:
    """The shape string as the caller of that layout writes it."""
    names = axes.split()
    if layout != "BHTD" and _has_layout(axes, operand):
        names[1], names[2] = names[2], names[1]
    if _in_one_batch(axes, layout):
        names = names[1:]
    elif layout == "THD" and _each_its_own(axes):
        names[0] = SEQUENCES
    return " ".join(names)


def output_shape(problem: Problem, axes: str) -> tuple[int, ...]:
    """Sizes of an output of those axes, BHTD."""
    carried = problem.layout == "THD" and not _in_one_batch(axes, problem.layout)
    return shape(spelled(axes, problem.layout) if carried else axes, problem.dims)


def sequence_dims(problem: Problem) -> list[dict[str, int]]:
    """Sizes of each sequence as a dense problem of its own."""
    places = problem.sequences
    assert places is not None
    if isinstance(places, Paged):
        return [{**problem.dims, "B": 1, "S": n_k} for n_k in places.lengths.tolist()]
    sizes = zip(np.diff(places.cu_seqlens_q).tolist(), np.diff(places.cu_seqlens_k).tolist(), strict=True)
    return [{**problem.dims, "B": 1, "T": n_q, "S": n_k} for n_q, n_k in sizes]


def split(problem: Problem) -> list[Problem]:
    """Each sequence as a dense problem of its own."""
    places = problem.sequences
    assert places is not None
    found = []
    for n, dims in enumerate(sequence_dims(problem)):
        given = {
            name: sequences.gathered(places, x, n) if isinstance(places, Paged) and name in ("k", "v") else x[part_of(problem, n, name)]
            for name, x in problem.given.items()
        }
        functions = None if problem.functions is None else replace(problem.functions, first=n)
        found.append(replace(problem, dims=dims, given=given, layout="BHTD", functions=functions, sequences=None))
    return found


def part_of(problem: Problem, n: int, name: str) -> tuple[slice, ...]:
    """Where sequence n lies in an operand or output of that name, or in an operand's gradient (BHTD); all of it, where sequences share it."""
    assert problem.sequences is not None
    variant = problem.variant
    axes = {o.name: o.axes for o in variant.outputs} | {p + o.name: o.axes for o in variant.operands for p in ("", "d_")}
    return sequences.part(problem.sequences, n, axes[name])


def _each_its_own(axes: str) -> bool:
    """Whether an array has one entry for each packed sequence, not their tokens."""
    names = axes.split()
    return names[:1] == ["B"] and not {"T", "S"} & set(names)


def _in_one_batch(axes: str, layout: str) -> bool:
    """Whether it is of tokens of packed sequences, in one batch, which the caller's array does without."""
    return layout == "THD" and axes.split()[:1] == ["B"] and not _each_its_own(axes)


def _has_layout(axes: str, operand: bool) -> bool:
    names = axes.split()
    if len(names) < (3 if operand else 4) or names[0] not in ("B", "P") or not {"T", "S"}.isdisjoint(names[3:]):
        return False
    return (names[1].startswith("H") or names[1] == "G") and names[2] in ("T", "S", "page")


@functools.cache
def _names(variant: Variant) -> frozenset[str]:
    return frozenset([*(o.name for o in variant.operands), *(p.name for p in variant.params)])


@functools.cache
def takes_sequences(variant: Variant, packed: bool) -> bool:
    """Whether its operands can be of sequences of different lengths, packed or in pages."""
    required = {o.name: o.axes for o in variant.operands if not o.optional}
    if required == {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E"}:
        return True
    with_tokens = [o.axes.split() for o in variant.operands if {"T", "S"} & set(o.axes.split())]
    return (
        packed
        and variant.family in ("feature", "state", "learner")
        and bool(with_tokens)
        and all(axes[0] == "B" and len({"T", "S"} & set(axes)) == axes.count("T") + axes.count("S") == 1 for axes in with_tokens)
    )


def _check_sequenced(variant: Variant, places: Sequences, operands: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    """Refuse what sequences of different lengths have no shape for."""
    what = f"{type(places).__name__} sequences"
    packed = isinstance(places, Packed)
    if not takes_sequences(variant, packed):
        takers = ", ".join(name for name, v in catalogue().items() if takes_sequences(v, packed))
        raise ParameterError(f"{variant.name} takes no {what}; variants that do are {takers}")
    for o in variant.operands if variant.family == "scored" else ():
        if o.optional and operands.get(o.name) is not None and not {"B", "T", "S"}.isdisjoint(o.axes.split()):
            raise OperandError(f"{variant.name}: {o.name} has axes {o.axes}, which {what} do not share; say the same by a score_mod or a mask_mod")
    known = [o.name for o in variant.outputs if "S" not in o.axes.split()]
    for name in wanted:
        if name not in known:
            raise ParameterError(f"{variant.name}: {name} of {what} has no shape; returned can be {', '.join(known)}")


def _outputs(variant: Variant, returns: str | Sequence[str] | None) -> tuple[str, ...]:
    known = [o.name for o in variant.outputs]
    wanted = variant.returns if returns is None else (returns,) if isinstance(returns, str) else returns
    if not (isinstance(wanted, tuple | list) and all(isinstance(name, str) for name in wanted)):
        raise ParameterError(f"{variant.name}: returns={shown(returns)}; must be a name or a tuple of names of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise ParameterError(f"{variant.name}: {unknown('output', name, known)}")
    if not wanted:
        raise ParameterError(f"{variant.name}: returns is empty; name at least one of {', '.join(known)}")
    return tuple(wanted)


def _sort_arguments(variant: Variant, arrays: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a call into operands by name and parameters by name."""
    names = [o.name for o in variant.operands]
    if len(arrays) > len(names):
        raise OperandError(f"{variant.name} takes {len(names)} operands ({', '.join(names)}), got {len(arrays)}")
    operands: dict[str, Any] = dict(zip(names, arrays, strict=False))
    options: dict[str, Any] = {}
    known = names + [p.name for p in variant.params]
    for name, value in keywords.items():
        if name not in known:
            raise ParameterError(f"{variant.name}: {unknown('operand or parameter', name, known)}")
        if name in names and operands.get(name) is not None:
            raise OperandError(f"{variant.name}: {name} is given twice, by position and by name")
        (operands if name in names else options)[name] = value
    missing = [o.name for o in variant.operands if operands.get(o.name) is None and not o.optional]
    if missing:
        raise OperandError(f"{variant.name}: {', '.join(missing)} missing; operands are {', '.join(names)}")
    return operands, options


def _operand(variant: Variant, operand: Operand, value: Any, axes: str, layout: str) -> np.ndarray:
    what = f"{variant.name}: {operand.name}"
    x = as_numpy(value, what)
    if operand.kind == "real" and not precision.is_real(x.dtype):
        raise DtypeError(f"{what} is {x.dtype}; must be float64, float32, float16, bfloat16 or float8_*")
    if operand.kind == "boolean" and x.dtype != np.bool_:
        raise DtypeError(f"{what} is {x.dtype}; must be boolean, True where a query may attend (numbers to add to the scores are a bias)")
    if operand.kind == "number" and not (precision.is_real(x.dtype) or x.dtype.kind in "biu"):
        raise DtypeError(f"{what} is {x.dtype}; must be boolean, integer or floating point")
    wanted = len(spelled(axes, layout).split())
    if x.ndim != wanted and not (operand.broadcast and x.ndim < wanted):
        fewer = " or fewer" if operand.broadcast else ""
        raise ShapeError(f"{what} has {x.ndim} axes, shape {x.shape}; must have {wanted}{fewer}: [{spelled(axes, layout, operand=True)}]")
    if operand.within is not None and x.size:
        low, high = operand.within
        with np.errstate(invalid="ignore"):  # NaN stays NaN, and fails below
            values = x.astype(np.float64)
            least, most = float(values.min()), float(values.max())
        if not (least >= low and most <= high):
            raise OperandError(f"{what} has values from {least:g} to {most:g}; every value must be from {low:g} to {high:g}")
    return from_layout(axes, x, layout, operand=True)


@functools.cache
def _axes(variant: Variant, how: str) -> Mapping[str, str]:
    """Axes of each operand; keys in pages have a page and a row for a batch and a key, what packed sequences carry one entry for each."""
    if how == "pages":
        return {o.name: o.axes.replace("B Hkv S", "P Hkv page") for o in variant.operands}
    if how == "THD":
        return {o.name: o.axes if _in_one_batch(o.axes, how) else spelled(o.axes, how) for o in variant.operands}
    return {o.name: o.axes for o in variant.operands}


def _dims(variant: Variant, given: Mapping[str, np.ndarray], axes: Mapping[str, str], places: Sequences | None = None) -> dict[str, int]:
    """Bind every axis name to one size; complain where two operands disagree."""
    dims: dict[str, int] = {}
    source: dict[str, str] = {}
    arrays: tuple[Operand | Output, ...] = (*variant.operands, *variant.outputs)
    if isinstance(places, Packed) and any(_each_its_own(o.axes) for o in arrays):
        dims[SEQUENCES], source[SEQUENCES] = len(places.cu_seqlens_q) - 1, "cu_seqlens_q"
    computed: list[tuple[str, str, int]] = []
    for operand in variant.operands:
        if operand.name not in given or operand.broadcast:
            continue
        for axis, n in zip(axes[operand.name].split(), given[operand.name].shape, strict=True):
            if not axis.isidentifier():
                computed.append((operand.name, axis, n))
                continue
            if dims.setdefault(axis, n) != n:
                raise ShapeError(f"{variant.name}: {operand.name} has {axis}={n}, but {source[axis]} has {axis}={dims[axis]}")
            source.setdefault(axis, operand.name)
            if n == 0 and axis not in MAY_BE_EMPTY:
                raise ShapeError(f"{variant.name}: {operand.name} has {axis}=0; must be at least 1")
    for name, axis, n in computed:
        if n != size(axis, dims):
            raise ShapeError(f"{variant.name}: {name} has {n} along {axis}; must be {_sum(axis, dims, source)}")
    for whole, group in GROUPED:
        if {whole, group} <= dims.keys() and dims[whole] % dims[group]:
            raise ShapeError(
                f"{variant.name}: {source[group]} has {group}={dims[group]}, which does not divide {source[whole]}'s {whole}={dims[whole]}"
            )
    for operand in variant.operands:
        if operand.broadcast and operand.name in given:
            full, actual = shape(operand.axes, dims), given[operand.name].shape
            for axis, n, m in zip(reversed(operand.axes.split()), reversed(full), reversed(actual), strict=False):
                if m not in (1, n):
                    raise ShapeError(f"{variant.name}: {operand.name} has {axis}={m}, shape {actual}; must be 1 or {axis}={n}, to fit {full}")
    return dims


def _other_layout(variant: Variant, given: Mapping[str, np.ndarray], layout: str) -> str:
    """A hint where shapes that do not fit would do so in the other layout, or the empty string."""
    other = next(name for name in LAYOUTS if name != layout)
    try:
        _dims(
            variant,
            {o.name: from_layout(o.axes, given[o.name], "BTHD", operand=True) for o in variant.operands if o.name in given},
            {o.name: o.axes for o in variant.operands},
        )
    except ShapeError:
        return ""
    return f"; these shapes fit layout={other!r}"


def _sum(axis: str, dims: Dims, source: Mapping[str, str]) -> str:
    """How the size of a computed axis comes about: ``8 (Dq=5 of q, Dk=3 of k)``."""
    terms = ", ".join(f"{term}={dims[term]} of {source[term]}" for term in axis.split("+") if term in dims)
    return f"{size(axis, dims)} ({terms})"


def _params(variant: Variant, options: Mapping[str, Any]) -> dict[str, Any]:
    params = dict(_defaults(variant))
    for p in variant.params if options else ():
        value = options.get(p.name, p.default)
        if not p.kind.accepts(value):
            raise ParameterError(f"{variant.name}: {p.name}={shown(value)}; must be {p.kind.rule}")
        params[p.name] = p.kind.read(value)
    return params


@functools.cache
def _defaults(variant: Variant) -> Mapping[str, Any]:
    return {p.name: p.kind.read(p.default) for p in variant.params}


def _canonical(operand: Operand, x: np.ndarray | None, dims: Dims) -> np.ndarray:
    dtype = np.bool_ if operand.kind == "boolean" else np.float64
    full = shape(operand.axes, dims)
    if x is None:
        return np.broadcast_to(np.asarray(operand.absent, dtype), full)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        canonical = np.require(x, dtype, ["C", "ALIGNED"])
    return np.broadcast_to(canonical, full) if operand.broadcast else canonical


def _rounded(problem: Problem, name: str, result: np.ndarray) -> np.ndarray:
    axes = next(o.axes for o in problem.variant.outputs if o.name == name)
    rounded = precision.round_to(result, output_dtype(problem, name))
    return rounded if problem.layout == "BHTD" else np.ascontiguousarray(to_layout(axes, rounded, problem.layout))


def check_out(problem: Problem, out: Any) -> tuple[np.ndarray, ...]:
    """The arrays results are to be written into, checked before anything is computed."""
    targets = tuple(out) if isinstance(out, tuple | list) else (out,)
    variant = problem.variant
    if len(targets) != len(problem.returns):
        raise OperandError(f"{variant.name}: out has {len(targets)} arrays for {len(problem.returns)} outputs ({', '.join(problem.returns)})")
    for n_checked, (name, target) in enumerate(zip(problem.returns, targets, strict=True)):
        what = f"{variant.name}: out for {name}"
        if not isinstance(target, np.ndarray) or isinstance(target, np.ma.MaskedArray):
            raise DtypeError(f"{what} is a {type(target).__name__}; must be a NumPy array")
        axes = spelled(next(o.axes for o in variant.outputs if o.name == name), problem.layout)
        if target.shape != shape(axes, problem.dims):
            raise ShapeError(f"{what} has shape {target.shape}; must be {shape(axes, problem.dims)}, [{axes}]")
        if target.dtype != output_dtype(problem, name):
            raise DtypeError(f"{what} is {target.dtype}; must be {output_dtype(problem, name)}")
        if not target.flags.writeable:
            raise OperandError(f"{what} is read-only; pass an array that can be written")
        if any(n > 1 and stride == 0 for n, stride in zip(target.shape, target.strides, strict=True)):
            raise OperandError(f"{what} keeps several elements in one place (strides {target.strides}); pass an array of its own")
        for operand, x in problem.given.items():
            if _overlap(target, x):
                raise OperandError(f"{what} overlaps the memory of {operand}; results are written while operands are still read")
        for other, earlier in zip(problem.returns[:n_checked], targets, strict=False):
            if _overlap(target, earlier):
                raise OperandError(f"{what} overlaps the memory of out for {other}; each output needs an array of its own")
    return targets


def _overlap(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether they share an element; taken as so when finding out would take long."""
    steps: Any = 10_000  # NumPy's stub knows -1 and 0 only
    try:
        return np.shares_memory(one, two, max_work=steps)
    except np.exceptions.TooHardError:
        return True
