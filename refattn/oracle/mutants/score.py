"""Whether a suite notices every known fault: each mutant is asked the suite's calls until one refuses it.

A mutant answers in float64, rounded to the format under test: what it gets wrong is its fault and nothing else.  A mutant that no call refuses has
*survived* where some call of a larger pool would have refused it; where none would, nothing that is asked can show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ... import definition, precision
from ...candidate import Candidate
from ...problem import Problem, bind
from ...spec import Variant, shape
from .. import probes
from ..bounds.backward import applies
from ..gradients import backpropagated
from ..judge import ratio
from ..probes import Probe
from ..profiles import Profile, resolve
from ..tolerance import ALPHA, tolerances
from . import backward, evaluate, shows
from .answers import stored_in
from .mutant import Mutant

#: Outputs that an implementation can be expected to return.
RETURNED = ("out", "lse", "threshold")


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant.

    Attributes
    ----------
    killed_by : str
        Title of the call that refused it, "" where none did.
    output : str
        Which answer was wrong.
    ratio : float
        Its largest error / tolerance there.
    observable : bool
        Whether any call that could be asked refuses it.
    """

    mutant: Mutant
    killed_by: str = ""
    output: str = ""
    ratio: float = 0.0
    observable: bool = True


@dataclass(frozen=True, eq=False)
class Call:
    """One call with its right answers and their tolerances."""

    probe: Probe
    problem: Problem
    truth: Mapping[str, np.ndarray]
    tolerance: Mapping[str, np.ndarray]
    shown: frozenset[str]
    earlier: Problem | None = None

    def answers(self, mutant: Mutant) -> dict[str, np.ndarray]:
        """What the mutant gives, in the formats answers are stored in."""
        said = evaluate(self.problem, mutant.changes, self.probe.cotangents, self.earlier).outputs
        return {name: precision.round_to(said[name], stored_in(self.problem, name)).astype(np.float64) for name in self.truth}

    def refuses(self, mutant: Mutant) -> tuple[float, str]:
        """Largest error / tolerance of the mutant's answers, and of which."""
        if not mutant.needs <= self.shown:
            return 0.0, ""
        answers = self.answers(mutant)
        found = ((float(ratio(x, self.truth[name], self.tolerance[name]).max(initial=0.0)), name) for name, x in answers.items())
        return max(found, default=(0.0, ""))


def everything(variant: Variant) -> Candidate:
    """A candidate that takes all of the variant, for making suites; it is never called."""

    def call(*given: object) -> object:
        raise NotImplementedError

    outputs = tuple(o.name for o in variant.outputs if o.name in (*RETURNED, *variant.carried))
    names, params = frozenset(o.name for o in variant.operands), frozenset(p.name for p in variant.params)
    cotangents = tuple(name for name in outputs if name in ("out", "lse"))
    gradients = call if _differentiable(variant) else None
    return Candidate("every mutant", call, names, params, outputs, variant=variant.name, gradients=gradients, cotangents=cotangents)


def _differentiable(variant: Variant) -> bool:
    """Whether both the right gradients and the mutants' are formulas."""
    if variant.plan is None:
        return False
    small = {o.name: np.ones(shape(o.axes, dict.fromkeys(variant.axes, 1))) for o in variant.operands if not o.optional}
    problem = bind(variant, (), small)
    return backward.knows(problem) and applies(problem, {"out": np.ones(0)})


def calls(variant: Variant, asked: Iterable[Probe], profile: Profile, alpha: float = ALPHA) -> list[Call]:
    """The deciding calls of a suite, with what is right."""
    returns = everything(variant).returns
    found: list[Call] = []
    first: dict[tuple[tuple[int, ...], ...], Problem] = {}
    for probe in asked:
        problem = bind(variant, (), {**probe.operands, **probe.params}, returns)
        earlier = first.setdefault(tuple(problem.given[o.name].shape for o in variant.operands if not o.optional), problem)
        if not probe.decides or probe.cut:
            continue
        truth = definition.run(problem)
        gradients = backpropagated(problem, truth, probe.cotangents) if probe.cotangents else None
        tolerance = tolerances(problem, truth, profile, alpha, backward=gradients)
        right = {name: truth[name] for name in returns} | dict(gradients.values if gradients is not None else {})
        shown = shows(problem, returns, probe.cotangents, None if earlier is problem else earlier)
        found.append(Call(probe, problem, right, tolerance, shown, None if earlier is problem else earlier))
    return found


def score(
    variant: Variant,
    mutants: Sequence[Mutant],
    dtype: np.dtype,
    suite: str = "standard",
    profile: Profile | None = None,
    seed: int = 0,
) -> Iterator[Verdict]:
    """What becomes of each mutant in a suite, in their order.

    Parameters
    ----------
    variant : Variant
        With a plan or a recurrence.
    mutants : sequence of Mutant
    dtype : dtype
        Of the operands.
    suite : {"quick", "standard", "full"}
    profile : Profile, optional
        The usual one of the dtype unless said.
    seed : int
    """
    how, maker = profile or resolve(None, dtype), everything(variant)
    asked = calls(variant, probes.suite(suite, variant, maker, dtype, {}, seed).probes, how)
    further: list[Call] = []
    for mutant in mutants:
        verdict = _tried(mutant, asked)
        if not verdict.killed_by:
            if not further:
                further = calls(variant, probes.pool(variant, maker, dtype, seed), how)
            verdict = Verdict(mutant, observable=bool(_tried(mutant, further).killed_by))
        yield verdict


def _tried(mutant: Mutant, asked: list[Call]) -> Verdict:
    for n, call in enumerate(asked):
        off, name = call.refuses(mutant)
        if off > 1:
            asked.insert(n // 2, asked.pop(n))  # what refuses one mutant is asked early of the next
            return Verdict(mutant, call.probe.title, name, off)
    return Verdict(mutant)
