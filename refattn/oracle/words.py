"""How a report says things: the sentences that the terminal and the page share."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence

from ..spec import Variant
from .findings import Diagnosis, Explanation, Fault, Growth
from .judge import Case, Element, axes_of
from .profiles import Profile

#: Axes as people call them.
AXES = {
    "B": "batch",
    "Hq": "query head",
    "Hkv": "key-value head",
    "T": "query",
    "S": "key",
    "D": "channel",
    "E": "value channel",
    "H": "head",
    "N": "channel",
}


def outcome(case: Case) -> str:
    """As tables call it: a disagreement that does not decide is noted."""
    return "noted" if not case.probe.decides and case.outcome not in ("agrees", "declined") else case.outcome


def times(ratio: float) -> str:
    """An error in tolerances."""
    if not math.isfinite(ratio):
        return "infinite"
    if ratio < 10:
        return f"{ratio:.2f} x"
    return f"{ratio:,.0f} x" if ratio < 1e6 else f"{ratio:.1e} x".replace("e+0", "e").replace("e+", "e")


def position(element: Element, variant: Variant) -> str:
    """``out[0, 3, 17, 4] (B, Hq, T, E)``"""
    return f"{element.output}[{', '.join(map(str, element.index))}] ({', '.join(axes_of(variant, element.output).split())})"


def element(found: Element, variant: Variant) -> str:
    """Where, both values, error and tolerance."""
    says = f"{position(found, variant)} is {found.got:.9g}, should be {found.expected:.9g}"
    return f"{says}: error {found.error:.2e}, tolerance {found.tolerance:.2e} ({times(found.ratio)})"


def sizes(case: Case) -> str:
    """``B=2 Hq=4 T=24 S=40``"""
    return " ".join(f"{axis}={n}" for axis, n in case.problem.dims.items()) if case.problem else ""


def outputs(cases: Sequence[Case]) -> str:
    """Which outputs and gradients differ in some call and which in none, where it is not all or the only one."""
    differs: dict[str, bool] = {}
    for case in cases:
        for name, ratios in case.ratios.items() if case.probe.decides else ():
            differs[name] = differs.get(name, False) or bool((ratios > 1).any())
    wrong, right = ([name for name, it in differs.items() if it is wanted] for wanted in (True, False))
    return f"{_listed(wrong, 'differs', 'differ')}; {_listed(right, 'agrees', 'agree')} in every call" if wrong and right else ""


def _listed(names: Sequence[str], one: str, several: str) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]} {several}" if len(names) > 1 else f"{names[0]} {one}"


def fault(found: Fault) -> str:
    """``M1 causal mask aligned with the first key``"""
    return f"{found.code} {found.name}".strip()


def together(explanation: Explanation) -> str:
    """The names of an explanation's faults."""
    return ", together with ".join(map(fault, explanation.faults))


def fitted(values: Mapping[str, float]) -> str:
    """``scale = 1.443``"""
    return ", ".join(f"{name} = {value:.6g}" for name, value in values.items())


def certainty(diagnosis: Diagnosis) -> str:
    """How sure a diagnosis is, and of what."""
    tried = f"{diagnosis.hypotheses} hypotheses" if diagnosis.hypotheses != 1 else "one hypothesis"
    asked = f"{diagnosis.calls} calls" if diagnosis.calls != 1 else "one call"
    if not diagnosis.explanations:
        return f"none of the {tried} that were tried explains the answers of {asked}"
    fits = f"with it every answer of {asked} is within {_share(diagnosis.explanations[0].ratio)} of its tolerance"
    if len(diagnosis.explanations) > 1:
        return f"{diagnosis.confidence}: {len(diagnosis.explanations)} of {tried} explain the answers of {asked}, the likeliest first"
    if math.isfinite(diagnosis.runner_up):
        return f"{diagnosis.confidence}: {fits}; the next of {tried} misses by {times(diagnosis.runner_up)} its tolerance"
    return f"{diagnosis.confidence}: {fits}; it is the only one of {tried} that comes near"


def _share(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio >= 0.01 else "a hundredth"


def compared(right: str, wrong: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two lines of mathematics as runs of text, each with whether it differs from the other line."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", line) for line in (right, wrong))
    left: list[tuple[str, bool]] = []
    below: list[tuple[str, bool]] = []
    for tag, i, j, m, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for runs, tokens in ((left, a[i:j]), (below, b[m:n])):
            if tokens:
                runs.append(("".join(tokens), tag != "equal"))
    return left, below


#: What an exponent below a number means.
_LAWS = (
    (0.15, "does not grow"),
    (0.75, "grows as independent roundings do"),
    (1.25, "grows as roundings of one sign do"),
    (math.inf, "grows faster than any rounding does"),
)


def law(growth: Growth) -> str:
    """What the exponent of the error over the number of keys means."""
    over = f"over {growth.keys[0]} to {growth.keys[-1]} keys the error"
    if not math.isfinite(growth.exponent):
        return f"{over} is not a number everywhere"
    meaning = next(says for most, says in _LAWS if growth.exponent < most)
    return f"{over} {meaning}: exponent {growth.exponent:.2f}; at most {times(max(growth.errors))} its tolerance"


def budget(profile: Profile) -> str:
    """What a correct answer was allowed."""
    parts = [f"sums in unit roundoff {power(profile.accumulate)}"]
    for text, unit in (("transformed operands", profile.operands), ("scores", profile.scores), ("weights", profile.probabilities)):
        if unit:
            parts.append(f"{text} stored to {power(unit)}")
    parts.append(f"exp within {power(profile.exp_error)}")
    return ", ".join(parts) + "; the smaller of worst case and statistical bound, element by element"


def power(unit: float) -> str:
    """``2^-24``"""
    exponent = math.log2(unit)
    return f"2^{exponent:.0f}" if exponent == round(exponent) else f"2^{exponent:.1f}"


def unknown(unexamined: Mapping[str, str], declined: Mapping[str, str]) -> list[str]:
    """What nothing is known about, features of one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, why in unexamined.items():
        reasons.setdefault(why, []).append(name)
    return [f"{', '.join(names)} ({why})" for why, names in reasons.items()] + [f"{why} ({n})" for why, n in declined.items()]


def troubles(failures: Sequence[Case], most: int = 3) -> list[str]:
    """What failing calls that gave no answer, or an unreadable one, complained about, each complaint once."""
    first: dict[str, str] = {}
    for case in failures:
        if case.reason:
            first.setdefault(case.reason, case.probe.title)
    told = [f"in the call '{title}': {reason}" for reason, title in first.items()]
    return told[:most] + ([f"and {len(told) - most} other complaints"] if len(told) > most else [])
