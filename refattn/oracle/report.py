"""What was found, for people and for machines."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..spec import Variant
from .judge import Case, Element
from .localise import Finding, channels
from .profiles import Profile

_ROWS = 30  # of the table of calls, before it is shortened
_STYLE = {"agrees": "green", "differs": "bold red", "raised": "bold red", "malformed": "bold red", "declined": "dim", "noted": "yellow"}


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
        The failing call with the fewest operand elements.
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
        case = self.smallest_failure
        if case is None or self.given:
            return ""
        params = case.problem.params if case.problem else case.probe.params
        changed = {p.name: params[p.name] for p in self.variant.params if params.get(p.name, p.default) != p.default}
        if not case.probe.repeatable:
            changed = dict(self.params)
        if not self.target:
            words = [f"dtype={self.dtype!r}", *(f"{n}={v!r}" for n, v in self.options.items())]
            words += [f"inputs=np.load({saved!r})"] if case.probe.repeatable else [f"suite={self.suite!r}"]
            words += [f"{n}={v!r}" for n, v in changed.items()]
            return f"ra.check(it, {self.variant.name!r}, {', '.join(words)})"
        words = ["refattn", "check", self.target, "--variant", self.variant.name, "--dtype", self.dtype]
        for name, value in self.options.items():
            for text in [f"{n}={v}" for n, v in value.items()] if name == "rename" else [value if name != "returns" else ",".join(value)]:
                words += [f"--{name}", str(getattr(text, "name", text))]
        for name, value in changed.items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"]
        return shlex.join([*words, *(("--inputs", saved) if case.probe.repeatable else ("--suite", self.suite))])

    def save(self, path: str) -> None:
        """Write the operands of the smallest failing call to an .npz, in a format wide enough to hold them exactly."""
        case = self.smallest_failure
        if case is None:
            raise ValueError("nothing failed; there is no call to save")
        wide: dict[str, Any] = {
            n: x if x.dtype.kind == "b" or x.dtype.itemsize == 8 else x.astype(np.float32) for n, x in case.probe.operands.items()
        }
        np.savez(path, **wide)

    # ---- for machines ------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything the report says, as plain data that JSON can hold."""
        return {
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
            "examined": list(self.examined),
            "unexamined": {**self.unexamined, **self.declined},
            "notes": list(self.notes),
            "reproduce": self.reproduce(),
            "cases": [_case(c, self.variant) for c in self.cases],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    # ---- for people --------------------------------------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        return Group(*self._parts())

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _parts(self) -> list[RenderableType]:
        parts: list[RenderableType] = [self._table(), Text()]
        mark, style = ("PASS", "bold green") if self.passed else ("FAIL", "bold red")
        parts.append(Text.assemble((f"{mark}  ", style), (f"{self.candidate} {self.verdict}", "bold")))
        parts.append(Text())
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, text in self._facts():
            facts.add_row(name, text)
        parts.append(facts)
        if self.reproduce():
            parts += [Text(), Text(_folded(self.reproduce()))]
        return parts

    def _table(self) -> Table:
        suite = f"{self.suite} suite, " if self.suite else ""
        title = f"{self.variant.name}, {self.dtype}, {suite}profile {self.profile.name}"
        table = Table(title=title, title_justify="left", title_style="", box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("call", overflow="fold")
        table.add_column("outcome", no_wrap=True)
        table.add_column("worst error", justify="right", no_wrap=True)
        table.add_column("of tolerance", justify="right", no_wrap=True)
        for case in self._shown():
            outcome = Text(_outcome(case), _STYLE[_outcome(case)])
            if case.worst is None:
                table.add_row(
                    case.probe.title, outcome, Text(textwrap.shorten(case.reason or "nothing to compare", 24, placeholder="..."), "dim"), ""
                )
            else:
                table.add_row(case.probe.title, outcome, f"{case.worst.error:.1e}", _times(case.worst.ratio))
        shown = {id(c) for c in self._shown()}
        for rest, n in Counter(_outcome(c) for c in self.cases if id(c) not in shown).items():
            table.add_row(Text(f"and {n} more", "dim"), Text(rest, "dim"), "", "")
        return table

    def _shown(self) -> Sequence[Case]:
        """All calls when there are few; otherwise some of every outcome, in order."""
        if len(self.cases) <= _ROWS:
            return self.cases
        failures = self.failures[: _ROWS // 2]
        others = [c for c in self.cases if _outcome(c) == "noted"] + [c for c in self.cases if not c.failed and _outcome(c) != "noted"]
        others = others[: _ROWS - len(failures)]
        kept = {id(c) for c in (*failures, *others)}
        return [c for c in self.cases if id(c) in kept]

    def _facts(self) -> list[tuple[str, RenderableType]]:
        facts: list[tuple[str, RenderableType]] = []
        worst, case = self.worst, self.worst_case
        if worst is not None and case is not None and case.problem is not None:
            says = f"{_position(worst, self.variant)} is {worst.got:.9g}, should be {worst.expected:.9g}"
            line = f"{says}: error {worst.error:.2e}, tolerance {worst.tolerance:.2e} ({_times(worst.ratio)})"
            facts.append(("worst element", Text(line)))
            sizes = " ".join(f"{a}={n}" for a, n in case.problem.dims.items())
            facts.append(("", Text(f"in the call '{case.probe.title}', {sizes}", "dim")))
        if self.finding:
            facts.append(("in common", Text(str(self.finding), "bold" if not self.passed else "")))
        if case is not None and case.failed and channels(case):
            facts.append(("channels", Text(channels(case))))
        for reason, title in list({c.reason: c.probe.title for c in reversed(self.failures) if c.reason}.items())[-3:]:
            facts.append(("trouble", Text(f"in the call '{title}': {reason}")))
        facts.append(("examined", Text(", ".join(self.examined) or "nothing")))
        reasons = {reason: [n for n, why in self.unexamined.items() if why == reason] for reason in self.unexamined.values()}
        unknown = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()] + [f"{reason} ({n})" for reason, n in self.declined.items()]
        if unknown:
            facts.append(("not examined", Text("; ".join(unknown))))
        for note in self.notes:
            facts.append(("note", Text(note)))
        facts.append(("budget", Text(_budget(self.profile))))
        smallest = self.smallest_failure
        if smallest is not None and not self.given:
            how = "--save FILE.npz writes" if self.target else "report.save('FILE.npz') writes"
            first = f"{how} the operands of the smallest failing call, '{smallest.probe.title}'; then"
            facts.append(("reproduce", Text(first if smallest.probe.repeatable else "by the whole suite, as no call fails by itself:")))
        return facts


def _outcome(case: Case) -> str:
    """As the table calls it: a disagreement that does not decide is noted."""
    return "noted" if not case.probe.decides and case.outcome not in ("agrees", "declined") else case.outcome


def _folded(command: str, width: int = 76) -> str:
    """A command over several lines that can be pasted as they are: a shell reads on after a backslash, Python within brackets."""
    shell = not command.startswith("ra.")
    lines = [""]
    for word in re.split(r" (?=--)" if shell else r"(?<=,) ", command):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines[-1] += " \\" if shell else ""
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def _budget(profile: Profile) -> str:
    """What a correct answer was allowed, in words."""
    parts = [f"sums in unit roundoff {_power(profile.accumulate)}"]
    for text, unit in (("transformed operands", profile.operands), ("scores", profile.scores), ("weights", profile.probabilities)):
        if unit:
            parts.append(f"{text} stored to {_power(unit)}")
    parts.append(f"exp within {_power(profile.exp_error)}")
    return ", ".join(parts) + "; the smaller of worst case and statistical bound, element by element"


def _power(unit: float) -> str:
    exponent = math.log2(unit)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"2^{exponent:.1f}"


def _times(ratio: float) -> str:
    if math.isinf(ratio):
        return "infinite"
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:,.0f} x"


def _position(element: Element, variant: Variant) -> str:
    axes = next(o.axes for o in variant.outputs if o.name == element.output).split()
    return f"{element.output}[{', '.join(map(str, element.index))}] ({', '.join(axes)})"


def _element(element: Element | None, variant: Variant) -> dict[str, Any] | None:
    if element is None:
        return None
    axes = next(o.axes for o in variant.outputs if o.name == element.output).split()
    return {
        "output": element.output,
        "index": dict(zip(axes, element.index, strict=True)),
        "got": _plain(element.got),
        "expected": _plain(element.expected),
        "error": _plain(element.error),
        "tolerance": _plain(element.tolerance),
        "ratio": _plain(element.ratio),
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


def _plain(x: float) -> float | str:
    """JSON has no infinities and no NaN."""
    return x if math.isfinite(x) else str(x)
