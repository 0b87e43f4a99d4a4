"""A variant that is a recurrence of other operands: these made of its own, its outputs of the recurrence's, and gradients back through both.

Where it is several, one after the other, each pass has its operands made of the variant's and of what the passes before it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...problem import Problem
from ...spec import Operand, Output, Reduction, Variant
from ..run import format_of
from ..tape import Traced, collect, value_of
from ..vectorized import as_given, in_full, leaves_of

Numbers = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Pass:
    """One recurrence: its operands as they were made, and the problem of them, in the kernels' format."""

    made: Mapping[str, Any]
    problem: Problem


class Reduced:
    """One dense problem of a variant with a reduction.

    Parameters
    ----------
    problem : Problem
    trace : bool
        Whether `gradients` will be asked for.

    Attributes
    ----------
    problem : Problem
        That of the first recurrence, in the kernels' format.
    """

    def __init__(self, problem: Problem, trace: bool = False) -> None:
        assert problem.reduction is not None
        self.of, self.rule, self.trace = problem, problem.reduction, trace
        own = in_full(problem)
        self.leaves = leaves_of(problem, own) if trace else {}
        self.own: dict[str, Any] = {**own, **self.leaves}
        self.formatted = [(self.own[name], x) for name, x in problem.given.items() if x.dtype == format_of(problem) and x.shape == own[name].shape]
        self.first = self._made(self.rule, self.own)
        self.problem = self.first.problem

    def outputs(self, forward: Callable[[Problem], Numbers]) -> Numbers:
        """The variant's outputs that were asked for; `forward` runs one recurrence."""
        finished = self._finished(forward)[0]
        found = {name: np.asarray(value_of(finished[name]), format_of(self.of)) for name in self.of.returns}
        return {name: x if x.flags.writeable else x.copy() for name, x in found.items()}  # not the caller's operand itself

    def gradients(self, cotangents: Numbers, forward: Callable[[Problem], Numbers], backward: Callable[[Problem, Numbers], Numbers]) -> Numbers:
        """Of every real operand that was given, by ``d_<operand>``; `forward` runs one recurrence, and `backward` is its gradients."""
        finished, passes = self._finished(forward)
        seeds = [(finished[name], d) for name, d in cotangents.items()]
        for one, ends in reversed(passes):
            found = backward(one.problem, collect(seeds, ends))
            seeds += [(one.made[name.removeprefix("d_")], d) for name, d in found.items()]
        return as_given(self.of, collect(seeds, self.leaves))

    def _made(self, rule: Reduction, x: Mapping[str, Any]) -> _Pass:
        with np.errstate(all="ignore"):
            made = rule.operands(x)
        given = {name: self._in_format(a) for name, a in made.items()}
        found = {axis: n for name, a in given.items() for axis, n in zip(rule.axes[name].split(), a.shape, strict=True) if axis.isidentifier()}
        inner = _inner(self.of.variant, rule)
        outputs, dims = tuple(o.name for o in inner.outputs), {**self.of.dims, **found}
        return _Pass(made, replace(self.of, variant=inner, given=given, dims=dims, returns=outputs, dtype=format_of(self.of)))

    def _finished(self, forward: Callable[[Problem], Numbers]) -> tuple[Mapping[str, Any], list[tuple[_Pass, dict[str, Any]]]]:
        """The variant's outputs, and of every pass what its recurrence found."""
        x, finished = self.own, {}
        passes: list[tuple[_Pass, dict[str, Any]]] = []
        for rule in self.rule.passes:
            one = self._made(rule, x) if passes else self.first
            ends = {name: Traced(a) if self.trace else a for name, a in forward(one.problem).items()}
            passes.append((one, ends))
            with np.errstate(all="ignore"):
                finished = dict(rule.outputs(x, ends))
            x = {**x, **finished}
        return finished, passes

    def _in_format(self, made: Any) -> np.ndarray:
        """In the kernels' format; what is an operand of the variant as it is, or of a pass before, is that array."""
        for x, formatted in self.formatted:
            if made is x:
                return formatted
        self.formatted.append((made, np.asarray(value_of(made), format_of(self.of))))
        return self.formatted[-1][1]


def _inner(variant: Variant, rule: Reduction) -> Variant:
    """What a reduction leads to, as a variant."""
    operands = tuple(Operand(name, axes, "") for name, axes in rule.axes.items() if name != "out")
    carried = tuple(Output(o.name.removeprefix("initial_"), o.axes, "") for o in operands if o.name.startswith("initial_"))
    outputs = (Output("out", rule.axes["out"], ""), *carried)
    return replace(variant, operands=operands, outputs=outputs, recurrence=lambda dims, params: rule.recurrence, reduction=None)
