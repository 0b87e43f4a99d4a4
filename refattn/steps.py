"""Token by token: what a variant carries from one call to the next, and a call that goes on from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import backends, precision, repeats
from .catalog import catalogue, unknown
from .errors import OperandError, ParameterError, ShapeError, shown
from .problem import bind, output_dtype, release
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
    key = repeats.key_of(variant, backend, returns, layout, operands, keywords, given)
    if (known := repeats.known(key)) is not None:
        return known(operands, keywords, given), {**given}
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
    if not fresh:
        repeats.remember(key, call, backend, operands, keywords, given)
    return (*_tuple(outputs), after)


def _can_hold(x: Any, dtype: np.dtype) -> bool:
    return type(x) is np.ndarray and x.dtype == dtype and x.flags.writeable


def _carried(variant: Variant) -> tuple[str, ...]:
    if not variant.carried:
        others = ", ".join(name for name, v in catalogue().items() if v.carried)
        raise ParameterError(f"{variant.name} carries nothing from token to token; variants that do are {others}")
    return variant.carried


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
