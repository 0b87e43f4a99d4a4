"""What a call costs: operations, traffic and memory from a variant's own formulas."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np

from .problem import Problem
from .spec import Dims, Stage, Variant, shape


@dataclass(frozen=True)
class Cost:
    """Cost of one forward call.

    Attributes
    ----------
    flops : int
        Floating-point operations of the definition, function values counted as one.
    bytes : int
        Operands read once and outputs written once, in their own dtypes: the least traffic any implementation has.
    intensity : float
        flops / bytes.
    peak_memory : mapping
        Bytes allocated beyond the caller's operands, by backend.
    formulas : mapping
        The formulas, in axis names and ``pairs``.
    """

    flops: int
    bytes: int
    intensity: float
    peak_memory: Mapping[str, int]
    formulas: Mapping[str, str]


def cost(variant: Variant, dims: Dims, params: Mapping[str, Any], itemsize: int) -> Cost:
    """Cost of a call of those sizes whose arrays have elements of `itemsize` bytes; optional operands are taken as absent."""
    names = formula_names(variant, dims, params)
    operations = _evaluate(variant.cost.flops, names)
    read = sum(_count(o.axes, dims) for o in variant.operands if not o.optional)
    written = sum(_count(o.axes, dims) for o in variant.outputs if o.name in variant.returns)
    moved = itemsize * (read + written)
    converted, rounded = (0, 0) if itemsize == 8 else (8 * read, itemsize * written)
    memory = 8 * _evaluate(variant.cost.memory, names) + converted + rounded
    formulas = {"flops": variant.cost.flops, "memory": variant.cost.memory}
    return Cost(operations, moved, operations / moved if moved else 0.0, {"definition": memory}, formulas)


def flops(problem: Problem) -> int:
    """Floating-point operations of a problem's definition."""
    return _evaluate(problem.variant.cost.flops, formula_names(problem.variant, problem.dims, problem.params))


def formula_names(variant: Variant, dims: Dims, params: Mapping[str, Any]) -> dict[str, Any]:
    """The names a formula may use: the axes, `pairs`, and the parameters as a definition takes them."""
    names = dict(dims) | {p.name: p.encode(params[p.name], dims) for p in variant.params}
    if {"T", "S"} <= dims.keys():
        names["pairs"] = visible_pairs(variant, dims, params)
    return names


def visible_pairs(variant: Variant, dims: Dims, params: Mapping[str, Any]) -> int:
    """Query-key pairs of one head that the variant's structural masks (not a mask operand) leave visible."""
    return visible_range(variant.plan(dims, params).masks if variant.plan else (), dims["T"], dims["S"])[2]


@functools.lru_cache(maxsize=64)
def visible_range(masks: tuple[Stage, ...], n_queries: int, n_keys: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First key each query sees and the one after its last, as structural masks leave them, and how many pairs that are."""
    queries = np.arange(n_queries)
    first, last = np.zeros_like(queries), np.full_like(queries, n_keys)
    for stage in masks:
        low, high = stage.piece.span(queries, n_keys, *stage.numbers)
        first, last = np.maximum(first, low), np.minimum(last, high)
    first = np.minimum(first, n_keys)  # a window may lie beyond the last key
    last = np.maximum(last, first)
    return first, last, int((last - first).sum())


def _count(axes: str, dims: Dims) -> int:
    return int(np.prod(shape(axes, dims), dtype=np.int64))


def _evaluate(formula: str, names: Mapping[str, Any]) -> int:
    """A formula of a variant file: integer arithmetic in the given names and nothing else."""
    return int(eval(_code(formula), {"__builtins__": {}}, dict(names)))  # noqa: S307 - the formula is source code of a variant file


@functools.cache
def _code(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")
