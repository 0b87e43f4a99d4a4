"""What was found: the verdict and what it rests on, as data; `terminal` and `page` show it to people."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, RenderableType

from ..spec import Variant
from . import repeat, terminal, words
from .findings import Diagnosis, Explanation, Fact, Growth, Investigation
from .judge import Case, Element, axes_of
from .localise import Finding
from .profiles import Profile

#: The layout of `Report.to_dict`; it changes where a reader of the old one would stumble.
LAYOUT = 1


@dataclass(frozen=True)
class Report:
    """The judgement of an implementation.

    Attributes
    ----------
    passed : bool
        At least one call was judged and none that decides failed.
    worst : Element or None
        The element with the largest error relative to its tolerance, over all calls.
    finding : Finding or None
        What failing rows have in common.
    examined : tuple of str
        Features that agreed or differed in some call.
    unexamined : mapping of str to str
        Features nothing is known about, with the reason.
    notes : tuple of str
        Observations that do not decide.
    smallest_failure : Case or None
        The failing call with the fewest operand elements, made smaller where that was tried.
    investigation : Investigation
        What was found out beyond the calls: the named fault, facts about structure, growth of the error.
    """

    candidate: str
    variant: Variant
    dtype: str
    profile: Profile
    cases: tuple[Case, ...]
    unexamined: Mapping[str, str] = field(default_factory=dict)
    finding: Finding | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    suite: str = ""
    target: str = ""  # as the command line would name it
    options: Mapping[str, Any] = field(default_factory=dict)  # framework, rename, returns, profile, where they were said
    given: bool = False  # whether the answers existed already, so that there is nobody to ask again
    investigation: Investigation = field(default_factory=Investigation)

    @property
    def passed(self) -> bool:
        return any(c.outcome == "agrees" and c.elements and c.probe.decides for c in self.cases) and not self.failures

    @property
    def failures(self) -> tuple[Case, ...]:
        return tuple(c for c in self.cases if c.failed)

    @property
    def worst_case(self) -> Case | None:
        judged = [c for c in self.cases if c.worst is not None and c.probe.decides]
        return max(judged, key=lambda c: c.worst.ratio if c.worst else 0.0, default=None)

    @property
    def worst(self) -> Element | None:
        return self.worst_case.worst if self.worst_case else None

    @property
    def examined(self) -> tuple[str, ...]:
        names = (f for c in self.cases if c.outcome != "declined" and c.probe.decides for f in c.probe.examines)
        return tuple(dict.fromkeys(names))

    @property
    def declined(self) -> Mapping[str, str]:
        """Calls the candidate could not be asked, by reason."""
        reasons = Counter(c.reason for c in self.cases if c.outcome == "declined")
        return {reason: f"{n} call{'s' if n > 1 else ''}" for reason, n in reasons.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(c.probe.note for c in self.cases if c.outcome in ("differs", "raised") and not c.probe.decides)

    @property
    def smallest_failure(self) -> Case | None:
        if self.investigation.minimal is not None:
            return self.investigation.minimal
        alone = [c for c in self.failures if c.probe.repeatable]
        return min(alone or self.failures, key=lambda c: sum(x.size for x in c.probe.operands.values()), default=None)

    @property
    def verdict(self) -> str:
        judged = [c for c in self.cases if c.outcome != "declined" and c.probe.decides]
        if self.passed:
            return f"agrees with {self.variant.name} in all {len(judged)} calls" if len(judged) > 1 else f"agrees with {self.variant.name}"
        return f"does not agree with {self.variant.name}: {len(self.failures)} of {len(judged)} calls fail"

    def reproduce(self, saved: str = "FILE.npz") -> str:
        """The command, or the Python call, that repeats the smallest failing call, from operands saved with `save`.

        Where strides or earlier calls are what fails, operands alone would not show it, and the whole suite is repeated.
        """
        return repeat.command(self, saved) or repeat.call(self, "it", f"np.load({saved!r})")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the operands of the smallest failing call to an .npz, in a format wide enough to hold them exactly."""
        np.savez(path, **repeat.operands(self))  # type: ignore[arg-type]

    # ---- for machines ------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything the report says, as plain data that JSON can hold; see the page "How the check works" for its layout."""
        return {
            "layout": LAYOUT,
            "candidate": self.candidate,
            "variant": self.variant.name,
            "dtype": self.dtype,
            "params": dict(self.params),
            "profile": self.profile.name,
            "suite": self.suite,
            "passed": self.passed,
            "verdict": self.verdict,
            "worst": _element(self.worst, self.variant),
            "finding": str(self.finding) if self.finding else None,
            "diagnosis": _diagnosis(self.investigation.diagnosis),
            "facts": [_fact(f) for f in self.investigation.facts],
            "growth": _growth(self.investigation.growth),
            "minimal": None if self.investigation.minimal is None else _case(self.investigation.minimal, self.variant),
            "about": _plain(self.investigation.about),
            "examined": list(self.examined),
            "unexamined": {**self.unexamined, **self.declined},
            "notes": list(self.notes),
            "budget": words.budget(self.profile),
            "reproduce": self.reproduce(),
            "cases": [_case(c, self.variant) for c in self.cases],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    # ---- for people --------------------------------------------------------------------------------------------------------------

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page that needs nothing else: pictures of errors and masks, every call, the operands to repeat one.

        Parameters
        ----------
        path : path-like
            The file to write.
        """
        from .page import html

        Path(path).write_text(html(self), encoding="utf-8")

    def __rich__(self) -> RenderableType:
        return terminal.shown(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip()  # type: ignore[attr-defined]


def _element(element: Element | None, variant: Variant) -> dict[str, Any] | None:
    if element is None:
        return None
    axes = axes_of(variant, element.output).split()
    return {
        "output": element.output,
        "index": dict(zip(axes[len(axes) - len(element.index) :], element.index, strict=True)),
        **{name: _plain(getattr(element, name)) for name in ("got", "expected", "error", "tolerance", "ratio")},
    }


def _case(case: Case, variant: Variant) -> dict[str, Any]:
    return {
        "title": case.probe.title,
        "outcome": case.outcome,
        "decides": case.probe.decides,
        "reason": case.reason,
        "dims": dict(case.problem.dims) if case.problem else {},
        "params": {n: v for n, v in case.problem.params.items() if n in case.probe.params} if case.problem else {},
        "elements": case.elements,
        "failing": case.failing,
        "seconds": case.seconds,
        "worst": _element(case.worst, variant),
    }


def _diagnosis(diagnosis: Diagnosis | None) -> dict[str, Any] | None:
    if diagnosis is None:
        return None
    return {
        "confidence": diagnosis.confidence,
        "explanations": [_explanation(e) for e in diagnosis.explanations],
        "runner_up": _plain(diagnosis.runner_up),
        "hypotheses": diagnosis.hypotheses,
        "calls": diagnosis.calls,
        "blind_spots": [asdict(f) for f in diagnosis.blind_spots],
    }


def _explanation(explanation: Explanation) -> dict[str, Any]:
    return {
        "faults": [asdict(f) for f in explanation.faults],
        "ratio": _plain(explanation.ratio),
        "values": _plain(explanation.values),
        "alike": [asdict(f) for f in explanation.alike],
    }


def _fact(fact: Fact) -> dict[str, Any]:
    said = {"subject": fact.subject, "found": fact.found, "specified": fact.specified, "agrees": fact.agrees, "call": fact.call}
    return {**said, "values": _plain(fact.values)}


def _growth(growth: Growth | None) -> dict[str, Any] | None:
    return None if growth is None else _plain(asdict(growth))


def _plain(x: Any) -> Any:
    """As JSON has it: no infinities and no NaN, no tuples, no arrays, no NumPy numbers; boolean arrays as rows of 0 and 1."""
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, Mapping):
        return {str(name): _plain(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return [_plain(value) for value in x]
    if isinstance(x, np.ndarray):
        return {"shape": list(x.shape), **({"rows": _rows(x)} if x.dtype == bool and x.ndim else {"values": _plain(x.reshape(-1).tolist())})}
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if isinstance(x, bool | int | float | str) or x is None else str(x)


def _rows(x: np.ndarray) -> list[str]:
    """Booleans along the last axis as a word of 0 and 1, all rows one after the other."""
    return ["".join("01"[int(value)] for value in row) for row in x.reshape(math.prod(x.shape[:-1]), x.shape[-1])]
