"""What the derived tests share: every variant with the parameters worth trying, operands that are small and unkind, and a computed tolerance."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from refattn import costs, definition
from refattn.catalog import catalogue
from refattn.problem import Problem, bind
from refattn.spec import Variant, every_size, normal, shape

#: Odd widths, three query heads to a key-value head, T and S differ, D and E differ.
GENERAL = every_size({"B": 2, "Hq": 6, "Hkv": 2, "T": 4, "S": 7, "D": 3, "E": 5, "Dq": 3, "Dk": 4, "A": 4, "M": 5, "Z": 4, "F": 6, "L": 4})
SQUARE = {**GENERAL, "T": 5, "S": 5}
ONE = {**dict.fromkeys(GENERAL, 1), "Hq": 3, "H": 3}
LADDER = {"general": GENERAL, "more queries than keys": {**GENERAL, "T": 7, "S": 4}, "square": SQUARE, "one": ONE}

VARIANTS = [pytest.param(v, id=name) for name, v in catalogue().items()]


def tried(variant: Variant) -> Iterator[dict[str, Any]]:
    """The defaults, then each other value worth trying, one at a time."""
    yield {}
    for p in variant.params:
        yield from ({p.name: value} for value in p.tries)


CALLS = [
    pytest.param(v, params, id="-".join([name, *(f"{p}={value}" for p, value in params.items())]))
    for name, v in catalogue().items()
    for params in tried(v)
]


def draw(variant: Variant, dims: Mapping[str, int], seed: int = 0, optional: bool = True) -> dict[str, Any]:
    """Operands by name, with outliers and repeated rows where nothing says how to draw them."""
    rng = np.random.default_rng(seed)
    operands = {}
    for o in variant.operands:
        if o.optional and not optional:
            continue
        x = np.asarray(o.draw(rng, shape(o.axes, dims)))
        if o.kind == "boolean":
            x = x > -0.7 if o.draw is normal else x.astype(bool)
        elif o.draw is normal and o.within is None and x.size:
            x.flat[rng.integers(x.size)] *= 8.0
            for n, axis in enumerate(o.axes.split()):
                if axis in ("T", "S"):
                    np.moveaxis(x, n, 0)[-1] = np.moveaxis(x, n, 0)[0]
        operands[o.name] = x
    return operands


def problem_of(variant: Variant, operands: Mapping[str, Any], params: Mapping[str, Any]) -> Problem:
    return bind(variant, (), {**operands, **params}, [o.name for o in variant.outputs])


def outputs(variant: Variant, operands: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All outputs of the definition, float64."""
    return definition.run(problem_of(variant, operands, params))


def flops(variant: Variant, operands: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    return costs.flops(problem_of(variant, operands, params))


#: Elements of an array that do not all cancel by accident.
FEW = 8


def rounding(f: Callable[[dict[str, Any]], Any], operands: Mapping[str, Any], variant: Variant, operations: int) -> list[np.ndarray]:
    """How far two computations of each array of `f`, equal on paper, may lie apart after that many operations, element by element.

    Each operation rounds once, by at most 2**-53 of what it computes; to first order that is as if the numbers going in had been off
    by as much.  How much an array answers to that is measured, its most sensitive element counting for all: the operands are moved by
    2**-26 of themselves.
    """
    rng = np.random.default_rng(99)
    exact = arrays_of(f(dict(operands)))
    answers = [0.0] * len(exact)
    for _ in range(1 if min(x.size for x in exact) >= FEW else 4):  # what cancels in all of few elements does so by accident
        moved = {}
        for name, x in operands.items():
            real = np.asarray(x).dtype.kind == "f"
            moved[name] = x * (1 + 2.0**-26 * rng.choice([-1.0, 1.0], np.shape(x))) if real else x
            if variant.operand(name).within is not None:
                moved[name] = np.clip(moved[name], *variant.operand(name).within)
        for n, (here, there) in enumerate(zip(exact, arrays_of(f(moved)), strict=True)):
            finite = np.isfinite(here) & np.isfinite(there)
            answers[n] = max(answers[n], 2.0**26 * np.max(np.abs(here[finite] - there[finite]), initial=0.0))
    sizes = (np.where(np.isfinite(here), np.abs(here), 0.0) for here in exact)
    return [2.0**-53 * operations * np.maximum(size, answer) for size, answer in zip(sizes, answers, strict=True)]


def arrays_of(results: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in (results if isinstance(results, tuple | list) else (results,))]
