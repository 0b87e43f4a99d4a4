"""One call judged: the candidate's answer against the definition's, element by element, within the computed tolerance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import definition, precision
from ..candidate import Candidate, Inexpressible
from ..errors import RefattnError
from ..foreign import as_numpy
from ..problem import Problem, bind, output_dtype
from ..spec import Variant, shape
from .gradients import backpropagated
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
    truth, answers : mapping of str to ndarray
        What the definition says, all its outputs and the gradients; and what the candidate did, as it gave it.
    refused : str
        Why gradients were asked for and not given, if so.
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
    answers: Mapping[str, np.ndarray] = field(default_factory=dict)
    refused: str = ""

    @property
    def failed(self) -> bool:
        return self.probe.decides and self.outcome in ("differs", "raised", "malformed")


def judge(variant: Variant, candidate: Candidate, probe: Probe, profile: Profile, alpha: float) -> Case:
    """Ask the candidate and judge what it says."""
    problem = bind(variant, (), {**probe.operands, **probe.params}, returns=candidate.returns)
    given = {**probe.operands, **{"d_" + name: x for name, x in probe.cotangents.items()}}
    before = {name: x.copy() for name, x in given.items()}
    params = {name: value for name, value in problem.params.items() if name in candidate.params}
    cotangents = {name: x for name, x in probe.cotangents.items() if name in candidate.cotangents}
    backward = candidate.gradients if cotangents else None
    started = time.perf_counter()
    seconds, refused = 0.0, ""
    outputs: dict[str, np.ndarray] = {}
    try:
        with np.errstate(all="ignore"):  # poison makes infinities; the verdict is about what comes out
            answer = _carried_on(problem, candidate, probe, params) if probe.cut else candidate.call(probe.operands, params)
        seconds = time.perf_counter() - started
        _untouched(given, before)
        outputs = _outputs(problem, answer, candidate)
        if probe.repeats:
            outputs = {name: x.copy() for name, x in outputs.items()}
            for _ in range(probe.repeats):
                with np.errstate(all="ignore"):
                    answer = candidate.call(probe.operands, params)
                _unchanged(outputs, _outputs(problem, answer, candidate))
        if backward is not None:
            outputs = {name: x.copy() for name, x in outputs.items()}  # the next call may write into the same memory
            try:
                with np.errstate(all="ignore"):
                    answer = backward(probe.operands, params, cotangents)
            except (Inexpressible, NotImplementedError) as refusal:
                refused = str(refusal) or type(refusal).__name__
            else:
                _untouched(given, before)
                outputs |= _gradients(problem, answer)
    except (Inexpressible, NotImplementedError) as refusal:
        return Case(probe, "declined", str(refusal) or type(refusal).__name__, problem=problem)
    except Malformed as complaint:
        return Case(probe, "malformed", str(complaint), seconds=seconds, problem=problem)
    except RefattnError:
        raise
    except Exception as trouble:
        return Case(probe, "raised", f"{type(trouble).__name__}: {trouble}".splitlines()[0][:300], problem=problem)
    return replace(compare(problem, outputs, replace(probe, cotangents=cotangents), profile, alpha, seconds), probe=probe, refused=refused)


def _carried_on(problem: Problem, candidate: Candidate, probe: Probe, params: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """The answer to a call made in two: the second begins with what the first returned."""
    axes = {o.name: o.axes.split() for o in problem.variant.operands} | {o.name: o.axes.split() for o in problem.variant.outputs}
    parts: list[dict[str, np.ndarray]] = []
    operands = dict(probe.operands)
    for where in (slice(0, probe.cut), slice(probe.cut, None)):
        own = {n: np.ascontiguousarray(x[(slice(None),) * axes[n].index("T") + (where,)]) if "T" in axes[n] else x for n, x in operands.items()}
        tokens = next(x.shape[axes[n].index("T")] for n, x in own.items() if "T" in axes[n])
        part = replace(problem, dims={**problem.dims, "T": tokens}, given=own)
        parts.append(_outputs(part, candidate.call(own, params), candidate))
        operands |= {"initial_" + n: np.array(parts[-1][n]) for n in problem.variant.carried}
    first, second = parts
    joined = {n: np.concatenate([first[n], x], axis=axes[n].index("T")) if "T" in axes[n] else x for n, x in second.items()}
    return tuple(joined[n] for n in candidate.returns)


def compare(problem: Problem, outputs: Mapping[str, np.ndarray], probe: Probe, profile: Profile, alpha: float, seconds: float = 0.0) -> Case:
    """Judge outputs that exist already, in BHTD layout, and gradients (``d_q``, ...) for the probe's cotangents."""
    truth = definition.run(problem)
    backward = None
    if any(name.startswith("d_") for name in outputs):
        backward = backpropagated(problem, truth, probe.cotangents)
    tolerance = tolerances(problem, truth, profile, alpha, backward=backward)
    truth = truth if backward is None else {**truth, **backward.values}
    return held_against(truth, tolerance, problem, outputs, probe, seconds)


def held_against(
    truth: Mapping[str, np.ndarray],
    tolerance: Mapping[str, np.ndarray],
    problem: Problem,
    outputs: Mapping[str, np.ndarray],
    probe: Probe,
    seconds: float = 0.0,
) -> Case:
    """Judge outputs and gradients where what they should be, and how far off they may be, is known already."""
    ratios: dict[str, np.ndarray] = {}
    worst: Element | None = None
    own = {o.name for o in problem.variant.outputs}
    for name, got in outputs.items():
        stored = output_dtype(problem, name) if name in own else problem.given[name[2:]].dtype
        actual = got.astype(np.float64)
        excused = _overflowed(actual, truth[name], tolerance[name], stored) | np.isinf(tolerance[name])  # infinite: no answer is wrong, NaN included
        ratios[name] = np.where(excused, 0.0, ratio(actual, truth[name], tolerance[name]))
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
    answers = {name: x.copy() for name, x in outputs.items()}  # a candidate may write its next answer into the same memory
    return Case(probe, "differs" if failing else "agrees", "", worst, failing, elements, seconds, problem, ratios, truth, answers)


def axes_of(variant: Variant, name: str) -> str:
    """Axis names of an output, or of a gradient (``"d_q"``): those of its operand, of which leading ones may be missing where it broadcasts."""
    outputs = {o.name: o.axes for o in variant.outputs}
    return outputs[name] if name in outputs else variant.operand(name.removeprefix("d_")).axes


@np.errstate(invalid="ignore", over="ignore")  # infinity times zero has no sign, which is what is asked
def _overflowed(got: np.ndarray, exact: np.ndarray, tolerance: np.ndarray, stored: np.dtype) -> np.ndarray:
    """Where an answer is what overflow makes of an exact one that may be beyond its format: infinite, NaN without infinities, or the largest."""
    target = precision.format_of(stored)
    beyond = np.isfinite(exact) & (np.abs(exact) + tolerance >= target.largest * (1 + target.unit / 2))
    same_side = np.sign(got) * np.sign(exact) > 0
    says_nothing = np.isnan(got) if not np.isinf(np.asarray(np.inf).astype(stored).astype(np.float64)) else np.isinf(got) & same_side
    saturated = (np.abs(got) >= target.largest) & (np.abs(exact) > target.largest) & same_side
    return np.asarray(beyond & (says_nothing | saturated))


def ratio(got: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Error / tolerance: 0 where both are the same infinity or both NaN, infinite where only one of them is."""
    error = _errors(got, expected)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(error == 0, 0.0, np.where(np.isinf(error), np.inf, error / tolerance))


def _errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


class Malformed(Exception):
    """An answer is not what the declared output looks like."""


def _untouched(given: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> None:
    changed = [name for name, x in given.items() if x.tobytes() != before[name].tobytes()]
    if changed:
        raise Malformed(f"it wrote into its operand {changed[0]}")


def _unchanged(first: Mapping[str, np.ndarray], again: Mapping[str, np.ndarray]) -> None:
    """Refuse answers to the same call that are not the same bits."""
    for name, x in again.items():
        if x.tobytes() != first[name].tobytes():
            raise Malformed(f"the same call again gave another {name}: it differs from run to run")


def _gradients(problem: Problem, answer: Any) -> dict[str, np.ndarray]:
    """Gradients by name, as a mapping or a named tuple gives them, or in the order of real operands; one that is None or missing is not judged."""
    wanted = ["d_" + o.name for o in problem.variant.operands if o.kind == "real" and o.name in problem.given]
    if isinstance(answer, Mapping):
        named = dict(answer)
    elif hasattr(answer, "_asdict"):
        named = answer._asdict()
    else:
        answers = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
        if len(answers) != len(wanted):
            raise Malformed(f"it returned {len(answers)} gradients for {len(wanted)} real operands ({', '.join(wanted)}); name them in a mapping")
        named = dict(zip(wanted, answers, strict=True))
    strange = [name for name in named if name not in wanted]
    if strange:
        raise Malformed(f"it returned a gradient named {strange[0]!r}; expected are {', '.join(wanted)}")
    found = {name: real(named[name], name, problem.given[name[2:]].shape, f"that of {name[2:]}") for name in wanted if named.get(name) is not None}
    if not found:
        raise Malformed("it returned no gradient")
    return found


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
    return real(x, name, shape(axes, problem.dims), f"[{axes}]")


def real(x: Any, name: str, expected: tuple[int, ...], why: str) -> np.ndarray:
    """An array of real numbers of that shape.

    Raises
    ------
    Malformed
    """
    try:
        array = as_numpy(x, name)
    except RefattnError as trouble:
        raise Malformed(str(trouble)) from trouble
    if array.shape != expected:
        raise Malformed(f"{name} has shape {array.shape}; must be {expected}, {why}")
    if not precision.is_real(array.dtype):
        raise Malformed(f"{name} is {array.dtype}; must be floating point")
    return array
