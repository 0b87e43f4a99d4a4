"""What the page says: one function a section, from a report to markup.  All text passes `html.escape`; a section without a body is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .. import repeat, words
from ..findings import Diagnosis, Explanation, Fact, Fault
from ..judge import Case
from ..localise import channels
from . import charts, pictures

if TYPE_CHECKING:
    from ..report import Report

#: Characters of the pictures of calls that fail besides the worst, and cells a side of them; characters of the operands to save.
_ROOM, _SIDE, _OPERANDS = 500_000, 64, 600_000
#: Cells of all heads together in a picture of the worst call.
_CELLS = 40_000


# ---- the verdict -------------------------------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
    """The sentence, the likeliest cause, how far off the worst is, and what was judged as what."""
    mark = "PASS" if report.passed else "FAIL"
    chips = [("variant", report.variant.name), ("dtype", report.dtype), ("profile", report.profile.name), ("suite", report.suite)]
    chips += [(name, repr(value)) for name, value in report.params.items()]
    seconds = sum(c.seconds for c in report.cases)
    chips += [("calls", str(len(report.cases))), ("time in it", f"{seconds:.2g} s" if seconds else "")]
    listed = "".join(f"<li><span>{escape(name)}</span> {escape(value)}</li>" for name, value in chips if value)
    parts = [f'<h1><span class="lamp">{mark}</span>{escape(report.candidate)} {escape(report.verdict)}</h1>']
    diagnosis = report.investigation.diagnosis
    if diagnosis is not None and diagnosis.explanations and not report.passed:
        likely = "" if diagnosis.confidence == "high" else "Most likely: "
        parts.append(f'<p class="cause">{likely}<b>{escape(words.together(diagnosis.explanations[0]))}</b></p>')
    elif report.finding:
        parts.append(f'<p class="cause">{escape(_sentence(str(report.finding)))}</p>')
    if report.worst_case is not None and report.worst is not None:
        far = f"{words.times(report.worst.ratio)} its tolerance" if math.isfinite(report.worst.ratio) else "beyond any tolerance"
        says = "The worst error is" if not report.passed else "The answer closest to its limit is off by"
        parts.append(f'<p class="soft">{says} {far}.</p>')
    return "".join([*parts, f'<ul class="chips">{listed}</ul>'])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


# ---- the fault ----------------------------------------------------------------------------------------------------------------------


def fault(report: Report) -> str:
    """What explains the answers, each with its two lines of mathematics; then the worst element and what failing calls share."""
    diagnosis = report.investigation.diagnosis
    if report.passed:
        return ""
    parts = []
    if diagnosis is not None:
        parts = [_explanation(e, n) for n, e in enumerate(diagnosis.explanations)]
        parts.append(_confidence(diagnosis))
    rows = []
    if report.finding and parts:
        rows.append(("failing rows", str(report.finding)))
    case = report.worst_case
    if case is not None and case.worst is not None and case.failed:
        rows.append(("worst element", words.element(case.worst, report.variant)))
        rows.append(("in the call", f"{case.probe.title}, {words.sizes(case)}"))
        rows.append(("channels", channels(case)))
    rows.append(("outputs", words.outputs(report.cases)))
    rows += [("trouble", trouble) for trouble in words.troubles(report.failures, most=8)]
    return "".join(parts) + _list(rows)


def _explanation(explanation: Explanation, place: int) -> str:
    parts = []
    for n, fault in enumerate(explanation.faults):
        lead = "Together with " if n else "Or: " if place else ""
        parts.append(f"<h3>{lead}{_named(fault)}</h3><p>{escape(fault.words)}</p>")
        if fault.right or fault.wrong:
            right, wrong = words.compared(fault.right, fault.wrong)
            parts.append(f'<div class="two">{_line("as it should be", "right", right)}{_line("as it was computed", "wrong", wrong)}</div>')
        if fault.evidence not in ("", "common"):
            parts.append(f'<p class="small soft gap">Seen in the wild: {escape(fault.evidence)}</p>')
    rows = [("fitted", words.fitted(explanation.values)), ("no call tells apart", "; ".join(map(words.fault, explanation.alike)))]
    return f'<div class="fault">{"".join(parts)}{_list(rows)}</div>'


def _named(fault: Fault) -> str:
    return f'<span class="code">{escape(fault.code)}</span>{escape(fault.name)}'


def _line(title: str, kind: str, runs: Sequence[tuple[str, bool]]) -> str:
    text = "".join(f"<mark>{escape(run)}</mark>" if differs and run.strip() else escape(run) for run, differs in runs)
    return f'<div class="line {kind}"><h3>{title}</h3><code>{text or "&nbsp;"}</code></div>'


def _confidence(diagnosis: Diagnosis) -> str:
    pips = {"high": 3, "medium": 2, "low": 1}.get(diagnosis.confidence, 0)
    lit = '<i class="on"></i>' * pips + "<i></i>" * (3 - pips)
    return f'<p class="gap"><span class="pips" aria-hidden="true">{lit}</span><b>Confidence</b> {escape(words.certainty(diagnosis))}</p>'


def _list(rows: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in rows if text)
    return f"<dl>{listed}</dl>" if listed else ""


# ---- structure and errors ----------------------------------------------------------------------------------------------------------


def structure(report: Report, drawn: list[dict[str, Any]]) -> str:
    """Facts that are not as specified, with pictures; the others wait to be opened."""
    facts = report.investigation.facts
    if not facts:
        return ""
    wrong, right = ([f for f in facts if f.agrees is agrees] for agrees in (False, True))
    shown = [p for f in wrong if (p := pictures.fact(f)) is not None]
    lines = "".join(_curves(f, svg) for f in wrong if (svg := charts.curves(f)))
    parts = [_facts(wrong) if wrong else "", _gallery(shown, drawn), f'<div class="pictures gap">{lines}</div>' if lines else ""]
    if right:
        says = f"{len(right)} of {len(facts)} facts are as specified"
        parts.append(f'<details class="gap"><summary>{says}</summary>{_facts(right)}</details>')
    return "".join(parts)


def _facts(facts: Sequence[Fact]) -> str:
    head = "".join(f'<th scope="col">{title}</th>' for title in ("fact", "found", "specified", "asked with", ""))
    return f'<div class="scroll"><table class="facts"><thead><tr>{head}</tr></thead><tbody>{"".join(map(_fact, facts))}</tbody></table></div>'


def _curves(fact: Fact, svg: str) -> str:
    legend = '<span class="small soft">solid: found; dashed: specified</span>'
    return f"<figure><figcaption><b>{escape(fact.subject)}</b>{legend}</figcaption>{svg}</figure>"


def _fact(fact: Fact) -> str:
    state, says = ("agrees", "as specified") if fact.agrees else ("differs", "differs")
    labelled = (("found", fact.found), ("specified", fact.specified), ("asked with", fact.call))
    cells = "".join(f'<td data-label="{label}">{escape(text)}</td>' for label, text in labelled)
    return f'<tr class="{state}"><td><b>{escape(fact.subject)}</b></td>{cells}<td class="state">{says}</td></tr>'


def _gallery(shown: Sequence[dict[str, Any]], drawn: list[dict[str, Any]]) -> str:
    """A place for pictures, which the page draws."""
    return f'<div class="pictures gap" data-pictures="{_placed(shown, drawn)}"></div>' if shown else ""


def errors(report: Report, drawn: list[dict[str, Any]]) -> str:
    """A dot for every call, and maps of the worst one."""
    strip = f'<div class="strip">{charts.calls(report.cases)}</div>' if len(report.cases) > 1 else ""
    case = report.worst_case
    groups = [] if case is None else list(pictures.case(case, most_layers=max(1, _CELLS // _area(case))))
    if case is None or not groups:
        return strip
    kind = "closest" if report.passed else "worst"
    which = f'<p class="gap">The {kind} call, <b>{escape(case.probe.title)}</b> <span class="soft mono">{escape(words.sizes(case))}</span></p>'
    return strip + which + "".join(_gallery(shown, drawn) for shown in groups)


def _area(case: Case) -> int:
    """Cells of the largest picture of one head."""
    shapes = [r.shape[-2:] for r in case.ratios.values() if r.ndim >= 2]
    return max((min(a, pictures.SIDE) * min(b, pictures.SIDE) for a, b in shapes), default=1)


def maps(report: Report, drawn: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """Pictures of the calls that fail or are noted, by their place in the table: coarse, of the worst head, as long as there is room."""
    room = _ROOM
    places: dict[str, list[list[int]]] = {}
    for n, case in enumerate(report.cases):
        if words.outcome(case) not in ("differs", "noted"):
            continue
        groups = list(pictures.case(case, most_layers=1, side=_SIDE))
        room -= sum(pictures.size(p) for shown in groups for p in shown)
        if room < 0:
            break
        places[str(n)] = [_placed(shown, drawn) for shown in groups]
    return places


def _placed(shown: Sequence[dict[str, Any]], drawn: list[dict[str, Any]]) -> list[int]:
    """Pictures join those that the page carries; where they are there."""
    drawn.extend(shown)
    return list(range(len(drawn) - len(shown), len(drawn)))


def growth(report: Report) -> str:
    """The law of the error over the number of keys, and its chart."""
    found = report.investigation.growth
    if found is None:
        return ""
    chart = charts.growth(found)
    legend = '<p class="small soft">solid: the largest error; dashed: its tolerance; dotted: slopes 1/2 and 1</p>' if chart else ""
    return f"<p>{escape(_sentence(words.law(found)))}</p>{legend}{chart}"


# ---- the calls ------------------------------------------------------------------------------------------------------------------------


def calls(report: Report) -> str:
    """The table of all calls; the page opens a row to its details."""
    groups = Counter(_group(c) for c in report.cases)
    buttons = [("all", len(report.cases)), *((g, groups[g]) for g in ("fails", "noted", "agrees", "declined") if groups[g])]
    filters = "".join(
        f'<button data-outcome="{name}" aria-pressed="{"true" if name == "all" else "false"}">{name} {n}</button>' for name, n in buttons
    )
    heads = (("call", "call", ""), ("outcome", "outcome", ""), ("error", "worst error", ' class="n"'), ("ratio", "of tolerance", ' class="n"'))
    head = "".join(f'<th data-key="{key}" aria-sort="none"{kind} scope="col"><button>{title}</button></th>' for key, title, kind in heads)
    says = "Every call opens to its sizes, parameters and worst element; failing ones to a map of their errors."
    return (
        f'<p class="small soft">{says}</p><div class="filters" hidden>{filters}'
        '<input id="find" type="search" placeholder="Find a call" aria-label="Find a call">'
        '<span id="left" class="small soft" aria-live="polite"></span></div>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{"".join(_rows(report))}</table></div>'
    )


def _group(case: Case) -> str:
    return "fails" if case.failed else words.outcome(case)


def _rows(report: Report) -> Iterator[str]:
    for n, case in enumerate(report.cases):
        state, worst = words.outcome(case), case.worst
        if worst is None:
            numbers = f'<td colspan="2" class="small soft">{escape(case.reason or "nothing to compare")}</td>'
        else:
            numbers = f'<td class="n">{worst.error:.1e}</td><td class="n">{escape(words.times(worst.ratio))}</td>'
        error, ratio = (_sorting(None if worst is None else getattr(worst, name)) for name in ("error", "ratio"))
        yield (
            f'<tbody id="call-{n}" class="{state}" data-n="{n}" data-group="{_group(case)}" data-error="{error}"'
            f' data-ratio="{ratio}"><tr><td><button aria-expanded="false">{escape(case.probe.title)}</button></td>'
            f'<td class="state">{state}</td>{numbers}</tr></tbody>\n'
        )


def _sorting(x: float | None) -> str:
    return "-1" if x is None else f"{x:.6g}" if math.isfinite(x) else "1e999"


# ---- what it rests on ------------------------------------------------------------------------------------------------------------------


def basis(report: Report) -> str:
    """What was examined and what was not, what a right answer was allowed, and faults that would not have shown."""
    diagnosis = report.investigation.diagnosis
    rows = [
        ("examined", ", ".join(report.examined) or "nothing"),
        ("not examined", "; ".join(words.unknown(report.unexamined, report.declined))),
        *(("note", note) for note in report.notes),
        *((name, str(value)) for name, value in report.investigation.about.items()),
        ("tolerance", words.budget(report.profile)),
        ("figures from", report.profile.source),
    ]
    blind = diagnosis.blind_spots if diagnosis else ()
    says = f"{len(blind)} known fault{'s' * (len(blind) != 1)} that these calls could not have shown"
    listed = "".join(f"<li>{_named(fault)}</li>" for fault in blind)
    return _list(rows) + (f'<details class="gap"><summary>Blind spots: {says}</summary><ul class="spots">{listed}</ul></details>' if blind else "")


# ---- reproducing ------------------------------------------------------------------------------------------------------------------------


def reproduce(report: Report) -> str:
    """The smallest failing call, to paste."""
    case = report.smallest_failure
    saved = '<button id="json" hidden>Save the report as JSON</button>'
    if case is None or report.given:
        return f"<p>{'Nothing failed.' if case is None else 'The arrays were given; there is nobody to ask again.'}</p>{saved}"
    which = f'The smallest failing call: <b>{escape(case.probe.title)}</b> <span class="soft mono">{escape(words.sizes(case))}</span>'
    if not case.probe.repeatable:
        which = "No call fails by itself, so the whole suite is repeated."
    title = "Python, to paste as it is" if report.target else "Python, with your function put in"
    parts = [f"<p>{which}</p>", _paste("python", title, repeat.script(report))]
    if report.target:
        parts.append(_paste("shell", "or in a shell, beside the saved operands", repeat.folded(report.reproduce("operands.npz"))))
    packed = repeat.packed(repeat.operands(report)) if case.probe.repeatable else ""
    if 0 < len(packed) <= _OPERANDS:
        link = f"data:application/octet-stream;base64,{packed}"
        parts.append(f'<p><a download="operands.npz" href="{link}">Save the operands (operands.npz)</a></p>')
    return "".join([*parts, saved])


def _paste(name: str, title: str, text: str) -> str:
    copy = f'<button data-copies="{name}" hidden>Copy</button>'
    return f'<div class="paste"><h3>{title}</h3>{copy}<pre id="{name}" tabindex="0">{escape(text, quote=False)}</pre></div>'
