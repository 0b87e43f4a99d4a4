"""A variant that is a recurrence of other operands: these made of its own, its outputs of the recurrence's, and gradients back through both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Operand, Output, Reduction, Variant, shape
from ..run import format_of
from ..tape import Traced, collect, value_of

Numbers = dict[str, np.ndarray]


class Reduced:
    """One dense problem of a variant with a reduction.

    Parameters
    ----------
    problem : Problem

    Attributes
    ----------
    problem : Problem
        That of the recurrence, in the kernels' format.
    """

    def __init__(self, problem: Problem, trace: bool = False) -> None:
        rule = problem.reduction
        assert rule is not None
        self.of, self.rule = problem, rule
        own = {o.name: _in_full(problem, o) for o in problem.variant.operands}
        self.leaves = {name: Traced(own[name]) for name in problem.given if own[name].dtype != bool} if trace else {}
        self.own: dict[str, Any] = {**own, **self.leaves}
        with np.errstate(all="ignore"):
            self.made = dict(rule.operands(self.own))
        given = {name: np.asarray(value_of(x), format_of(problem)) for name, x in self.made.items()}
        found = {axis: n for name, x in given.items() for axis, n in zip(rule.axes[name].split(), x.shape, strict=True) if axis.isidentifier()}
        inner = _inner(problem.variant, rule)
        outputs = tuple(o.name for o in inner.outputs)
        self.problem = replace(problem, variant=inner, given=given, dims={**problem.dims, **found}, returns=outputs, dtype=format_of(problem))

    def outputs(self, found: Mapping[str, np.ndarray]) -> Numbers:
        """The variant's outputs that were asked for, of the recurrence's."""
        return {name: np.asarray(value_of(x), format_of(self.of)) for name, x in self._finished(found).items() if name in self.of.returns}

    def cotangents(self, given: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Numbers:
        """Those of the recurrence's outputs, from those of the variant's; to be followed by `gradients`."""
        ends = {name: Traced(np.asarray(x, np.float64)) for name, x in found.items()}
        finished = self._finished(ends)
        self.seeds = [(finished[name], d) for name, d in given.items()]
        return collect(self.seeds, ends)

    def gradients(self, found: Mapping[str, np.ndarray]) -> Numbers:
        """Of every real operand that was given, by ``d_<operand>``, from those of the recurrence's operands."""
        collected = collect([*self.seeds, *((self.made[name.removeprefix("d_")], d) for name, d in found.items())], self.leaves)
        real = {o.name for o in self.of.variant.operands if o.kind == "real"}
        return {"d_" + name: self._given(name, d) for name, d in collected.items() if name in real}

    def _finished(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
        with np.errstate(all="ignore"):
            return self.rule.outputs(self.own, found)

    def _given(self, name: str, d: np.ndarray) -> np.ndarray:
        """In the shape the operand was given in; an element that is not finite is a constant."""
        x = self.of.given[name]
        d = d.sum(axis=tuple(range(d.ndim - x.ndim)))
        d = d.sum(axis=tuple(n for n, size in enumerate(x.shape) if size == 1 and d.shape[n] != 1), keepdims=True)
        return np.where(np.isfinite(np.asarray(x, np.float64)), d, 0.0)


def _in_full(problem: Problem, o: Operand) -> np.ndarray:
    """An operand in float64 or boolean, with every axis; one that was not given is its neutral element."""
    x = problem.given.get(o.name, o.absent)
    return np.broadcast_to(np.asarray(x, bool if o.kind == "boolean" else np.float64), shape(o.axes, problem.dims))


def _inner(variant: Variant, rule: Reduction) -> Variant:
    """What a reduction leads to, as a variant."""
    operands = tuple(Operand(name, axes, "") for name, axes in rule.axes.items() if name != "out")
    carried = tuple(Output(o.name.removeprefix("initial_"), o.axes, "") for o in operands if o.name.startswith("initial_"))
    outputs = (Output("out", rule.axes["out"], ""), *carried)
    return replace(variant, operands=operands, outputs=outputs, recurrence=lambda dims, params: rule.recurrence, reduction=None)
