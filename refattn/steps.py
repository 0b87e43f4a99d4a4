"""Token by token: what a variant carries from one call to the next, and a call that goes on from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from . import backends, precision
from .catalog import catalogue, unknown
from .errors import OperandError, ParameterError, ShapeError, shown
from .problem import Problem, bind, output_dtype, release
from .spec import MAY_BE_EMPTY, Integer, Variant, shape


def neutral(variant: Variant, dtype: Any, sizes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is carried before the first token of operands of that dtype, by name.

    Raises
    ------
    ParameterError, ShapeError
    """
    carried = _carried(variant)
    given = [name for name in carried if not variant.operand("initial_" + name).optional]
    if given:
        raise ParameterError(f"{variant.name}: {given[0]} has no neutral beginning; it is the operand initial_{given[0]}")
    stored = precision.as_dtype(dtype)
    axes = {name: variant.operand("initial_" + name).axes for name in carried}
    needed = list(dict.fromkeys(term for names in axes.values() for term in re.findall(r"[A-Za-z]\w*", names)))
    for name, n in sizes.items():
        if name not in variant.axes:
            raise ParameterError(f"{variant.name}: {unknown('axis', name, list(variant.axes))}")
        if not Integer(0 if name in MAY_BE_EMPTY else 1).accepts(n):
            raise ShapeError(f"{variant.name}: {name}={shown(n)}; must be {Integer(0 if name in MAY_BE_EMPTY else 1).rule}")
    dims = {**sizes}
    for axis, twin in (("E", "D"), ("Hkv", "Hq")):
        if axis in needed and axis not in dims and twin in dims:
            dims[axis] = dims[twin]
    missing = [axis for axis in needed if axis not in dims]
    if missing:
        raise ShapeError(f"{variant.name}: {', '.join(missing)} missing; what it carries has the axes {', '.join(needed)}")
    wide = np.dtype(np.float32) if stored.itemsize < 4 else stored
    return {name: np.full(shape(axes[name], dims), variant.operand("initial_" + name).absent, wide) for name in carried}


def step(
    variant: Variant,
    state: Mapping[str, Any] | None,
    operands: Sequence[Any],
    returns: str | Sequence[str],
    layout: str,
    backend: str,
    keywords: Mapping[str, Any],
) -> tuple[Any, ...]:
    """The outputs asked for, and what is carried then; arrays of `state` that can hold it are given that content, and back.

    Raises
    ------
    ShapeError, DtypeError, OperandError, ParameterError, BackendUnavailableError
    """
    carried = _carried(variant)
    given = {} if state is None else state
    key = _key(variant, given, operands, returns, layout, backend, keywords)
    if key is not None and (known := _known.get(key)) is not None:
        arrays = dict(zip(known.names, (*operands, *(keywords[name] for name in known.keywords), *given.values()), strict=True))
        return known.run(arrays), {**given}
    if not isinstance(given, Mapping):
        raise OperandError(
            f"{variant.name}: state is a {type(state).__name__}; must be a mapping of {', '.join(carried)}, or None before the first token"
        )
    strange = [name for name in given if name not in carried]
    if strange:
        raise OperandError(f"{variant.name}: state {unknown('array', strange[0], list(carried))}")
    wanted = (returns,) if isinstance(returns, str) else tuple(returns)
    initial = {"initial_" + name: x for name, x in given.items()}
    twice = [name for name in initial if keywords.get(name) is not None]
    if twice:
        raise OperandError(f"{variant.name}: {twice[0]} is given twice, by name and in state")
    call = bind(variant, operands, {**initial, **keywords}, (*wanted, *(name for name in carried if name not in wanted)), layout)
    homes = {name: x for name, x in given.items() if _can_hold(x, output_dtype(call, name))}
    found = backends.run(call, backend, homes=homes)
    outputs = release(replace(call, returns=wanted), found)
    rest = tuple(name for name in carried if name not in homes)
    fresh = dict(zip(rest, _tuple(release(replace(call, returns=rest), found)), strict=True)) if rest else {}
    for name, x in homes.items():
        if found[name] is not x:
            x[...] = found[name]
    after = {name: homes[name] if name in homes else fresh[name] for name in carried}
    if key is not None and not fresh:
        _remember(key, call, operands, keywords, given, backend)
    return (*_tuple(outputs), after)


class _Known(NamedTuple):
    """A step that has been taken: a function of operands by name, and the names of positional operands, keywords and states in their order."""

    run: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    names: tuple[str, ...]
    keywords: tuple[str, ...]


#: Steps that can be taken again without being looked at, by what they were asked with; `None` of those that cannot.
_known: dict[Any, _Known | None] = {}
_MOST_KNOWN = 256


def _key(variant: Variant, state: Any, operands: Sequence[Any], returns: Any, layout: str, backend: str, keywords: Mapping[str, Any]) -> Any:
    """All that a step's way depends on but the numbers in its arrays; None where an array is none of NumPy's, or out is not all that is wanted."""
    if returns not in ("out", ("out",)) or layout != "BHTD" or backend not in ("auto", "cpu") or type(state) is not dict:
        return None
    arrays = [(name, x.shape, x.dtype, x.flags.c_contiguous, x.flags.writeable) for name, x in state.items() if type(x) is np.ndarray]
    arrays += [(None, x.shape, x.dtype, x.flags.c_contiguous, True) for x in operands if type(x) is np.ndarray]
    named: list[Any] = []
    for name, x in keywords.items():
        if type(x) is np.ndarray:
            arrays.append((name, x.shape, x.dtype, x.flags.c_contiguous, True))
        elif x is None or type(x) in (bool, int, float, str):
            named.append((name, type(x), x))
        else:
            return None
    complete = len(arrays) + len(named) == len(state) + len(operands) + len(keywords)
    return (variant, backend, *named, None, *arrays) if complete else None


def _remember(key: Any, call: Problem, operands: Sequence[Any], keywords: Mapping[str, Any], state: Mapping[str, Any], backend: str) -> None:
    """Keep what a step turned out to be, if it is a recurrence that the engine runs and all arrays are operands as they are."""
    if key in _known:
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    own = {id(x): name for name, x in call.given.items()}
    by_name = tuple(name for name, x in keywords.items() if type(x) is np.ndarray)
    arrays = (*operands, *(keywords[name] for name in by_name), *state.values())
    names = tuple(own.get(id(x), "") for x in arrays)
    run = backends.repeated(call, backend) if "" not in names and len(set(names)) == len(call.given) else None
    _known[key] = None if run is None else _Known(run, names, by_name)


def _can_hold(x: Any, dtype: np.dtype) -> bool:
    return type(x) is np.ndarray and x.dtype == dtype and x.flags.writeable


def _carried(variant: Variant) -> tuple[str, ...]:
    if not variant.carried:
        others = ", ".join(name for name, v in catalogue().items() if v.carried)
        raise ParameterError(f"{variant.name} carries nothing from token to token; variants that do are {others}")
    return variant.carried


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
