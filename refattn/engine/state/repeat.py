"""The same step again: where a problem's arrays go is found once, and arrays of the same shapes and formats are put there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...problem import Problem, output_shape
from ...spec import Factor
from ..run import format_of
from . import recurrent
from .lowered import Lowered
from .lowering import HEADS, Lowering, Multiplied

Given = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Part:
    """One array of a `Lowered`: operands, each as [B, heads, tokens, writes, width], multiplied, in full and in its final shape."""

    factors: tuple[tuple[str, tuple[int, ...]], ...]
    full: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, given: Given) -> np.ndarray:
        (name, sizes), *rest = self.factors
        x = given[name].reshape(sizes)
        for name, sizes in rest:
            x = x * given[name].reshape(sizes)
        return np.ascontiguousarray(x if x.shape == self.full else np.broadcast_to(x, self.full)).reshape(self.shape)


class Repeated:
    """A step of a variant that reads its state where it lies, found of one problem by `repeated`."""

    def __init__(self, lowered: Lowered, parts: Mapping[str, _Part], state: str, out: tuple[int, ...]) -> None:
        self.parts, self.state, self.out = dict(parts), state, out
        self.state_shape = lowered.S0.shape
        self.flags = {"old": lowered.old, "exclusive": lowered.exclusive, "scale": lowered.scale}

    def __call__(self, given: Given) -> np.ndarray:
        """What queries read; the array given for the state becomes that after the last token."""
        state = given[self.state].reshape(self.state_shape)
        arrays = {name: part.of(given) for name, part in self.parts.items()}
        return recurrent.advance(Lowered(**arrays, S0=state, **self.flags), state).reshape(self.out)  # type: ignore[arg-type]


def repeated(problem: Problem) -> Repeated | None:
    """The step that a problem is, for other arrays of its shapes and formats; None where more is to be done than to multiply and to reshape.

    Parameters
    ----------
    problem : Problem
        A dense one that `run.reason_against` has nothing against.
    """
    if not _lies_plainly(problem):
        return None
    lowering = Lowering(problem)
    rule, lowered, write = lowering.rule, lowering.lowered, lowering.writes[0]
    home = lowering.home({rule.initial.removeprefix("initial_"): problem.given[rule.initial]})
    products = {"q": lowering.query, "b": write.key, "w": write.value, "g": lowering.decay, "e": write.erase, "u": lowering.bonus}
    targets = {name: getattr(lowered, name) for name in products}
    parts = {name: _part(products[name], target, squeezed=name in "qgu") for name, target in targets.items() if target is not None}
    in_order = list(lowering.out_at()) == sorted(lowering.out_at())
    if home is None or lowered.written_first or lowering.tokens != problem.dims["T"] or not in_order:
        return None
    found = {name: part for name, part in parts.items() if part is not None}
    out = next(o for o in problem.variant.outputs if o.name == "out")
    return Repeated(lowered, found, rule.initial, output_shape(problem, out.axes)) if len(found) == len(parts) else None


def _lies_plainly(problem: Problem) -> bool:
    """Whether every operand is there, in the kernels' format and order, for one write and a read that nothing is done with."""
    rule = problem.recurrence
    if (
        rule is None
        or rule.log_value_decay
        or rule.normalizer
        or rule.input_gate
        or rule.skip
        or len(rule.writes) != 1
        or rule.initial not in problem.given
    ):
        return False
    format_ = format_of(problem)
    plain = all(o.within is None and o.kind == "real" and not o.broadcast and o.name in problem.given for o in problem.variant.operands)
    return plain and problem.dtype == format_ and all(x.dtype == format_ and x.flags.c_contiguous for x in problem.given.values())


def _part(product: Multiplied, target: np.ndarray, squeezed: bool) -> _Part | None:
    """How a product becomes that array, of which the axis of writes may have been taken out."""
    full = (*target.shape[:3], 1, *target.shape[3:]) if squeezed else target.shape
    found: list[tuple[str, tuple[int, ...]]] = []
    for factor in product.factors:
        rule: Factor = factor.rule
        if rule.map is not None or list(factor.at) != sorted(factor.at) or factor.values.shape[HEADS] not in (1, full[HEADS]):
            return None
        found.append((rule.operand, factor.values.shape))
    return _Part(tuple(found), full, target.shape) if found else None
