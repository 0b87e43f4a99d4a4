"""The door: arrays and parameters in, a checked Problem out; results back in the caller's layout and dtype.

`bind` is the only validation in refattn.  Behind it every array is float64 (or boolean), every axis fits, every parameter is a number,
and code trusts what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import precision
from .catalog import unknown
from .errors import DtypeError, OperandError, ParameterError, ShapeError
from .foreign import as_numpy
from .spec import MAY_BE_EMPTY, Dims, Operand, Variant, shape, size

LAYOUTS = ("BHTD", "BTHD")


@dataclass(frozen=True)
class Problem:
    """One checked call.

    Attributes
    ----------
    dims : mapping
        Size of every axis.
    given : mapping
        The caller's operands by name, as NumPy arrays in BHTD layout and their own dtype; absent ones are left out.
    arrays : tuple of ndarray
        What a definition takes: all operands in order, float64 or boolean, absent ones as their neutral element, broadcast.
    params : mapping
        Every parameter, defaults filled in.
    returns : tuple of str
        Outputs asked for.
    dtype : dtype
        What results are rounded to.
    """

    variant: Variant
    dims: Dims
    given: Mapping[str, np.ndarray]
    arrays: tuple[np.ndarray, ...]
    params: Mapping[str, Any]
    returns: tuple[str, ...]
    dtype: np.dtype
    layout: str = "BHTD"

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
    layout: str = "BHTD",
) -> Problem:
    """Check a call and bring it into canonical form.

    Parameters
    ----------
    variant : Variant
    arrays : sequence of array_like
        Operands in the variant's order; trailing optional ones may be left out or None.
    keywords : mapping
        Parameters, and operands given by name.
    returns : str or sequence of str, optional
        Outputs wanted; the variant's usual ones otherwise.
    layout : {"BHTD", "BTHD"}
        Order of the head and sequence axes in operands and outputs that have both and a width.

    Raises
    ------
    ShapeError, DtypeError, OperandError, ParameterError
    """
    wanted = _outputs(variant, returns)
    if layout not in LAYOUTS:
        raise ParameterError(f"{variant.name}: layout={layout!r}; must be one of {', '.join(LAYOUTS)}")
    operands, options = _sort_arguments(variant, arrays, keywords)
    given = {o.name: _operand(variant, o, operands[o.name], layout) for o in variant.operands if operands.get(o.name) is not None}
    dims = _dims(variant, given, layout)
    params = _params(variant, options)
    canonical = tuple(_canonical(variant, o, given.get(o.name), dims) for o in variant.operands)
    required = {o.name: given[o.name].dtype for o in variant.operands if o.kind == "real" and not o.optional}
    return Problem(variant, dims, given, canonical, params, wanted, precision.common(required, variant.name), layout)


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


def swap_layout(axes: str, x: np.ndarray) -> np.ndarray:
    """BHTD to BTHD and back: heads and sequence change places wherever an array has both and a width."""
    return np.swapaxes(x, 1, 2) if _has_layout(axes) else x


def spelled(axes: str, layout: str) -> str:
    """The shape string as the caller of that layout writes it."""
    names = axes.split()
    if layout == "BTHD" and _has_layout(axes):
        names[1], names[2] = names[2], names[1]
    return " ".join(names)


def _has_layout(axes: str) -> bool:
    names = axes.split()
    return len(names) == 4 and names[0] == "B" and names[1].startswith("H") and names[2] in "TS" and names[3] not in ("T", "S")


def _outputs(variant: Variant, returns: str | Sequence[str] | None) -> tuple[str, ...]:
    wanted = variant.returns if returns is None else (returns,) if isinstance(returns, str) else tuple(returns)
    known = [o.name for o in variant.outputs]
    for name in wanted:
        if name not in known:
            raise ParameterError(f"{variant.name}: {unknown('output', name, known)}")
    if not wanted:
        raise ParameterError(f"{variant.name}: returns is empty; name at least one of {', '.join(known)}")
    return wanted


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


def _operand(variant: Variant, operand: Operand, value: Any, layout: str) -> np.ndarray:
    what = f"{variant.name}: {operand.name}"
    x = as_numpy(value, what)
    if operand.kind == "real" and not precision.is_real(x.dtype):
        raise DtypeError(f"{what} is {x.dtype}; must be floating point ({', '.join(('float64', 'float32', 'float16', 'bfloat16', 'float8_*'))})")
    if operand.kind == "boolean" and x.dtype != np.bool_:
        raise DtypeError(f"{what} is {x.dtype}; must be boolean, True where a query may attend (numbers to add to the scores are a bias)")
    if operand.kind == "number" and not (precision.is_real(x.dtype) or x.dtype.kind in "biu"):
        raise DtypeError(f"{what} is {x.dtype}; must be boolean, integer or floating point")
    wanted = operand.axes.split()
    if x.ndim != len(wanted) and not (operand.broadcast and x.ndim < len(wanted)):
        fewer = " or fewer" if operand.broadcast else ""
        raise ShapeError(f"{what} has {x.ndim} axes, shape {x.shape}; must have {len(wanted)}{fewer}: [{spelled(operand.axes, layout)}]")
    if operand.within is not None and x.size:
        low, high = operand.within
        least, most = float(x.min()), float(x.max())
        if not (least >= low and most <= high):
            raise OperandError(f"{what} has values from {least:g} to {most:g}; every value must be from {low:g} to {high:g}")
    return swap_layout(operand.axes, x) if layout == "BTHD" else x


def _dims(variant: Variant, given: Mapping[str, np.ndarray], layout: str) -> dict[str, int]:
    """Bind every axis name to one size; complain where two operands disagree."""
    dims: dict[str, int] = {}
    source: dict[str, str] = {}
    exact = [o for o in variant.operands if o.name in given and not o.broadcast]
    for operand in exact:
        for axis, n in zip(operand.axes.split(), given[operand.name].shape, strict=True):
            if not axis.isidentifier():
                continue
            if dims.setdefault(axis, n) != n:
                raise ShapeError(f"{variant.name}: {operand.name} has {axis}={n}, but {source[axis]} has {axis}={dims[axis]}")
            source.setdefault(axis, operand.name)
            if n == 0 and axis not in MAY_BE_EMPTY:
                raise ShapeError(f"{variant.name}: {operand.name} has {axis}=0; must be at least 1")
    for operand in exact:
        for axis, n in zip(operand.axes.split(), given[operand.name].shape, strict=True):
            if not axis.isidentifier() and n != size(axis, dims):
                raise ShapeError(f"{variant.name}: {operand.name} has {n} along {axis}; must be {size(axis, dims)}")
    if dims.get("Hq", 1) % dims.get("Hkv", 1):
        raise ShapeError(f"{variant.name}: {source['Hkv']} has Hkv={dims['Hkv']}, which does not divide {source['Hq']}'s Hq={dims['Hq']}")
    for operand in variant.operands:
        if operand.name in given and operand.broadcast:
            full, actual = shape(operand.axes, dims), given[operand.name].shape
            for axis, n, m in zip(reversed(operand.axes.split()), reversed(full), reversed(actual), strict=False):
                if m not in (1, n):
                    raise ShapeError(f"{variant.name}: {operand.name} has {axis}={m}, shape {actual}; must be 1 or {axis}={n}, to fit {full}")
    return dims


def _params(variant: Variant, options: Mapping[str, Any]) -> dict[str, Any]:
    params = {}
    for p in variant.params:
        value = options.get(p.name, p.default)
        if not p.kind.accepts(value):
            raise ParameterError(f"{variant.name}: {p.name}={value!r}; must be {p.kind.rule}")
        params[p.name] = p.kind.read(value)
    return params


def _canonical(variant: Variant, operand: Operand, x: np.ndarray | None, dims: Dims) -> np.ndarray:
    dtype = np.bool_ if operand.kind == "boolean" else np.float64
    full = shape(operand.axes, dims)
    if x is None:
        return np.broadcast_to(np.asarray(operand.absent, dtype), full)
    canonical: np.ndarray = np.ascontiguousarray(x, dtype)
    return np.broadcast_to(canonical, full) if operand.broadcast else canonical


def _rounded(problem: Problem, name: str, result: np.ndarray) -> np.ndarray:
    axes = next(o.axes for o in problem.variant.outputs if o.name == name)
    rounded = precision.round_to(result, output_dtype(problem, name))
    return np.ascontiguousarray(swap_layout(axes, rounded)) if problem.layout == "BTHD" else rounded


def check_out(problem: Problem, out: Any) -> tuple[np.ndarray, ...]:
    """The arrays results are to be written into, checked before anything is computed."""
    targets = tuple(out) if isinstance(out, tuple | list) else (out,)
    variant = problem.variant
    if len(targets) != len(problem.returns):
        raise OperandError(f"{variant.name}: out has {len(targets)} arrays for {len(problem.returns)} outputs ({', '.join(problem.returns)})")
    for name, target in zip(problem.returns, targets, strict=True):
        what = f"{variant.name}: out for {name}"
        if not isinstance(target, np.ndarray):
            raise DtypeError(f"{what} is a {type(target).__name__}; must be a NumPy array")
        axes = spelled(next(o.axes for o in variant.outputs if o.name == name), problem.layout)
        if target.shape != shape(axes, problem.dims):
            raise ShapeError(f"{what} has shape {target.shape}; must be {shape(axes, problem.dims)}, [{axes}]")
        if target.dtype != output_dtype(problem, name):
            raise DtypeError(f"{what} is {target.dtype}; must be {output_dtype(problem, name)}")
        if not target.flags.writeable:
            raise OperandError(f"{what} is read-only; pass an array that can be written")
        for operand, x in problem.given.items():
            if np.may_share_memory(target, x):
                raise OperandError(f"{what} overlaps the memory of {operand}; results are written while operands are still read")
    return targets
