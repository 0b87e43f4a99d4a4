"""One call judged: the candidate's answer against the definition's, element by element, within the computed tolerance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import definition, precision
from ..candidate import Candidate, Inexpressible
from ..errors import RefattnError
from ..foreign import as_numpy
from ..problem import Problem, bind
from ..spec import Variant, shape
from .probes import Probe
from .profiles import Profile
from .tolerance import tolerances


@dataclass(frozen=True)
class Element:
    """One output element, as it is and as it should be."""

    output: str
    index: tuple[int, ...]
    got: float
    expected: float
    error: float
    tolerance: float
    ratio: float


@dataclass(frozen=True)
class Case:
    """The judgement of one call.

    Attributes
    ----------
    outcome : {"agrees", "differs", "raised", "malformed", "declined"}
        Declined: the candidate has no way to say this call, which counts neither for nor against it.
    reason : str
        Why, for everything but agrees and differs.
    worst : Element or None
        The element with the largest error relative to its tolerance.
    failing : int
        Elements beyond their tolerance.
    ratios : mapping of str to ndarray
        Error / tolerance of every element by output.
    """

    probe: Probe
    outcome: str
    reason: str = ""
    worst: Element | None = None
    failing: int = 0
    elements: int = 0
    seconds: float = 0.0
    problem: Problem | None = None
    ratios: Mapping[str, np.ndarray] = field(default_factory=dict)
    truth: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.probe.decides and self.outcome in ("differs", "raised", "malformed")


def judge(variant: Variant, candidate: Candidate, probe: Probe, profile: Profile, alpha: float) -> Case:
    """Ask the candidate and judge what it says."""
    problem = bind(variant, (), {**probe.operands, **probe.params}, returns=candidate.returns)
    before = {name: x.copy() for name, x in probe.operands.items()}
    params = {name: value for name, value in problem.params.items() if name in candidate.params}
    started = time.perf_counter()
    try:
        with np.errstate(all="ignore"):  # poison makes infinities; the verdict is about what comes out
            answer = candidate.call(probe.operands, params)
    except (Inexpressible, NotImplementedError) as refusal:
        return Case(probe, "declined", str(refusal) or type(refusal).__name__, problem=problem)
    except RefattnError:
        raise
    except Exception as trouble:
        return Case(probe, "raised", f"{type(trouble).__name__}: {trouble}".splitlines()[0][:300], problem=problem)
    seconds = time.perf_counter() - started
    changed = [name for name, x in probe.operands.items() if x.tobytes() != before[name].tobytes()]
    if changed:
        return Case(probe, "malformed", f"it wrote into its operand {changed[0]}", problem=problem)
    try:
        outputs = _outputs(problem, answer, candidate)
    except Malformed as complaint:
        return Case(probe, "malformed", str(complaint), seconds=seconds, problem=problem)
    return compare(problem, outputs, probe, profile, alpha, seconds)


def compare(problem: Problem, outputs: Mapping[str, np.ndarray], probe: Probe, profile: Profile, alpha: float, seconds: float = 0.0) -> Case:
    """Judge outputs that exist already, in BHTD layout."""
    truth = definition.run(problem)
    tolerance = tolerances(problem, truth, profile, alpha)
    ratios: dict[str, np.ndarray] = {}
    worst: Element | None = None
    for name, got in outputs.items():
        actual = got.astype(np.float64)
        ratios[name] = ratio(actual, truth[name], tolerance[name])
        if not actual.size:
            continue
        at = np.unravel_index(int(np.argmax(ratios[name])), actual.shape)
        error = float(_errors(actual[at], truth[name][at]))
        where = tuple(int(n) for n in at)
        found = Element(name, where, float(actual[at]), float(truth[name][at]), error, float(tolerance[name][at]), float(ratios[name][at]))
        if worst is None or found.ratio > worst.ratio:
            worst = found
    failing = sum(int((r > 1).sum()) for r in ratios.values())
    elements = sum(r.size for r in ratios.values())
    return Case(probe, "differs" if failing else "agrees", "", worst, failing, elements, seconds, problem, ratios, truth)


def ratio(got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Error / tolerance: 0 where both are the same infinity or both NaN, infinite where only one of them is."""
    error = _errors(got, expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, np.where(np.isinf(error), np.inf, error / tolerance))


def _errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


class Malformed(Exception):
    """An answer is not what the declared output looks like."""


def _outputs(problem: Problem, answer: Any, candidate: Candidate) -> dict[str, np.ndarray]:
    names = candidate.returns
    several = isinstance(answer, tuple | list)
    answers = tuple(answer) if several else (answer,)
    if len(answers) != len(names):
        hint = '; say what it returns: returns=("out", ...)' if len(answers) > len(names) else ""
        raise Malformed(f"it returned {len(answers)} arrays for {len(names)} outputs ({', '.join(names)}){hint}")
    axes = {o.name: o.axes for o in problem.variant.outputs}
    return {name: checked(problem, name, x, axes[name]) for name, x in zip(names, answers, strict=True)}


def checked(problem: Problem, name: str, x: Any, axes: str) -> np.ndarray:
    """An output as a NumPy array of real numbers of the shape `axes` says.

    Raises
    ------
    Malformed
    """
    try:
        array = as_numpy(x, name)
    except RefattnError as trouble:
        raise Malformed(str(trouble)) from trouble
    expected = shape(axes, problem.dims)
    if array.shape != expected:
        raise Malformed(f"{name} has shape {array.shape}; must be {expected}, [{axes}]")
    if not precision.is_real(array.dtype):
        raise Malformed(f"{name} is {array.dtype}; must be floating point")
    return array
