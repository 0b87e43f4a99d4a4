"""A report on a terminal: what is wrong first, in the order a kernel's author asks, then the calls, then what the verdict rests on."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import words
from .findings import Explanation, Fact
from .judge import Case
from .localise import channels
from .repeat import folded

if TYPE_CHECKING:
    from .report import Report

_FAILING, _FACTS, _BLIND = 12, 8, 6  # shown, before they are counted instead
_STYLE = {"agrees": "green", "differs": "bold red", "raised": "bold red", "malformed": "bold red", "declined": "dim", "noted": "yellow"}
_Rows = list[tuple[str, RenderableType]]


def shown(report: Report) -> RenderableType:
    """The whole report."""
    found, table, rests = _found(report), _calls(report), _rests(report)
    parts: list[RenderableType] = [*_verdict(report)]
    for part in (_grid(found) if found else None, table, _grid(rests)):
        parts += [Text(), part] if part is not None else []
    if report.reproduce():
        parts += [Text(), Text(folded(report.reproduce()))]
    return Group(*parts)


def _verdict(report: Report) -> list[RenderableType]:
    mark, style = ("PASS", "bold green") if report.passed else ("FAIL", "bold red")
    suite = f"{report.suite} suite, " if report.suite else ""
    what = Text(f"{report.variant.name}, {report.dtype}, {suite}profile {report.profile.name}", "dim")
    sentence = Table.grid(padding=(0, 2))
    sentence.add_column(no_wrap=True)
    sentence.add_column(overflow="fold")
    sentence.add_row(Text(mark, style), Text(f"{report.candidate} {report.verdict}", "bold"))
    sentence.add_row("", what)
    return [sentence]


def _found(report: Report) -> _Rows:
    """What is wrong: the fault by name, facts that disagree, the worst element, what failing rows share."""
    rows: _Rows = []
    diagnosis = report.investigation.diagnosis
    if diagnosis is not None and not report.passed:
        for n, explanation in enumerate(diagnosis.explanations):
            rows += _explained("fault" if n == 0 else "or", explanation)
        rows.append(("confidence" if diagnosis.explanations else "fault", Text(words.certainty(diagnosis))))
    disagreeing = [f for f in report.investigation.facts if not f.agrees]
    for n, fact in enumerate(disagreeing[:_FACTS]):
        rows.append(("found" if n == 0 else "", _fact(fact)))
    if len(disagreeing) > _FACTS:
        rows.append(("", Text(f"and {len(disagreeing) - _FACTS} other facts that are not as specified", "dim")))
    case = report.worst_case
    if case is not None and case.worst is not None:
        rows.append(("worst element" if not report.passed else "closest", Text(words.element(case.worst, report.variant))))
        rows.append(("", Text(f"in the call '{case.probe.title}', {words.sizes(case)}", "dim")))
    if words.outputs(report.cases):
        rows.append(("outputs", Text(words.outputs(report.cases))))
    if report.finding:
        rows.append(("in common", Text(str(report.finding), "bold" if not report.passed else "")))
    if case is not None and case.failed and channels(case):
        rows.append(("channels", Text(channels(case))))
    rows += [("trouble", Text(trouble)) for trouble in words.troubles(report.failures)]
    if report.investigation.growth is not None:
        rows.append(("growth", Text(words.law(report.investigation.growth))))
    return rows


def _explained(label: str, explanation: Explanation) -> _Rows:
    rows: _Rows = []
    for fault in explanation.faults:
        rows.append((label, Text(words.fault(fault), "bold red")))
        rows.append(("", Text(fault.words)))
        if fault.right or fault.wrong:
            right, wrong = words.compared(fault.right, fault.wrong)
            rows.append(("  right", Text.assemble(*((text, "bold green" if differs else "") for text, differs in right))))
            rows.append(("  wrong", Text.assemble(*((text, "bold red" if differs else "") for text, differs in wrong))))
        label = "and"
    if explanation.values:
        rows.append(("  fitted", Text(words.fitted(explanation.values))))
    if explanation.alike:
        rows.append(("  or else", Text(f"{'; '.join(map(words.fault, explanation.alike))} (no call tells them apart)")))
    return rows


def _fact(fact: Fact) -> Text:
    asked = Text(f"  ({fact.call})", "dim") if fact.call else Text()
    return Text.assemble((f"{fact.subject}: ", "bold"), fact.found, "; specified: ", fact.specified, asked)


def _rests(report: Report) -> _Rows:
    """What the verdict rests on, what it says nothing about, and how to see the smallest failure again."""
    rows: _Rows = [("examined", Text(", ".join(report.examined) or "nothing"))]
    facts = report.investigation.facts
    if facts:
        rows.append(("structure", Text(f"{sum(f.agrees for f in facts)} of {len(facts)} facts read off the answers are as specified")))
    unknown = words.unknown(report.unexamined, report.declined)
    if unknown:
        rows.append(("not examined", Text("; ".join(unknown))))
    diagnosis = report.investigation.diagnosis
    if diagnosis is not None and diagnosis.blind_spots:
        listed = [words.fault(f) for f in diagnosis.blind_spots]
        more = [f"and {len(listed) - _BLIND} more"] if len(listed) > _BLIND else []
        rows.append(("blind spots", Text("; ".join(listed[:_BLIND] + more))))
    rows += [("note", Text(note)) for note in report.notes]
    rows += [(name, Text(str(value))) for name, value in report.investigation.about.items()]
    rows.append(("budget", Text(words.budget(report.profile))))
    smallest = report.smallest_failure
    if smallest is not None and not report.given:
        how = "--save FILE.npz writes" if report.target else "report.save('FILE.npz') writes"
        first = f"{how} the operands of the smallest failing call, '{smallest.probe.title}'; then"
        rows.append(("reproduce", Text(first if smallest.probe.repeatable else "by the whole suite, as no call fails by itself:")))
    return rows


def _grid(rows: _Rows) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=len("worst element"))
    grid.add_column(overflow="fold")
    for label, says in rows:
        grid.add_row(label, says)
    return grid


def _calls(report: Report) -> Table | None:
    """Calls that fail or are noted, and how many others there are; nothing where all agree."""
    listed = [c for c in report.cases if c.failed][:_FAILING] + [c for c in report.cases if words.outcome(c) == "noted"]
    if report.passed or not listed:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("call", overflow="fold", ratio=1)
    for column in ("outcome", "worst error", "of tolerance"):
        table.add_column(column, justify="left" if column == "outcome" else "right", no_wrap=True)
    for case in listed:
        table.add_row(case.probe.title, Text(words.outcome(case), _STYLE[words.outcome(case)]), *_numbers(case))
    kept = {id(c) for c in listed}
    for rest, n in Counter(words.outcome(c) for c in report.cases if id(c) not in kept).items():
        table.add_row(Text(f"and {n} more", "dim"), Text(rest, "dim"), "", "")
    return table


def _numbers(case: Case) -> tuple[RenderableType, RenderableType]:
    if case.worst is None:
        return Text(textwrap.shorten(case.reason or "nothing to compare", 24, placeholder="..."), "dim"), ""
    return f"{case.worst.error:.1e}", words.times(case.worst.ratio)
