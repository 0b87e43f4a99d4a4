"""Published faults that no mutant has, and why; and the catalogue of all faults as a page.

    python -m refattn.oracle.mutants.scope docs/faults.md

writes the tables between the markers of that page anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..findings import Fault
from . import ALL, FAMILIES

#: What the letters of codes stand for, with how many faults each has in the project's catalogue of published ones; 0 for our own letters.
LETTERS: Mapping[str, tuple[str, int]] = {
    "S": ("scale and scores", 14),
    "M": ("masks", 24),
    "W": ("windows", 9),
    "H": ("heads, layout, strides", 14),
    "P": ("bias and position", 17),
    "X": ("softmax, sinks, soft-cap", 17),
    "T": ("tiles, tails, lengths, pages", 20),
    "L": ("log-sum-exp, merging", 10),
    "N": ("precision, overflow", 10),
    "Q": ("quantised operands", 9),
    "B": ("backward pass", 14),
    "R": ("races, caches, lifetime", 7),
    "A": ("latent attention", 5),
    "D": ("linear, gated, delta-rule attention", 20),
    "Y": ("scores of other kinds", 0),
    "Z": ("weights by other functions", 0),
}

_ROTARY = "rotary positions are no operand: a kernel that rotates inside takes other operands than these variants have"
_SEQUENCES = "suites ask dense calls; packed sequences and pages are not asked of an implementation"
_CACHE = "there is no cache among the operands; of a dense call it is M1"
_SLOPES = "slopes are given as a bias, so a wrong slope is a bias of the caller's; what a kernel does with the bias is P1, P5, P7 and M8"
_QUANTISED = "scales of quantised keys and values are no operands"
_BYTES = "needs more bytes or entries than a suite asks for"
_MEMORY = "memory that was never written holds anything: such answers differ from run to run, and poison and repeated calls look for them"
_RACE = "no reading of the formulas: answers differ from run to run, which repeated calls look for"
_DROPOUT = "no variant has dropout"
_LATENT = "no variant has latents"

OUT_OF_SCOPE: Mapping[str, str] = {
    "S6": _ROTARY,
    "M2": _CACHE,
    "M9": "padding of a mask is padding of keys: T1",
    "M11": _SEQUENCES,
    "M16": "in the answers it is M12 with operands in float16",
    "M23": _SEQUENCES,
    "W5": _SEQUENCES,
    "W7": "in the answers it is W9, on one of several paths",
    "W8": "a call has one window",
    "H6": "in the answers it is L2, P7 or W9 of one query",
    "H10": "in the answers it is H8",
    "H13": _MEMORY,
    **dict.fromkeys(("P2", "P4", "P6"), _SLOPES),
    **dict.fromkeys((f"P{n}" for n in range(8, 17)), _ROTARY),
    "P17": _ROTARY,
    "X15": "float8 weights under a maximum that lags behind: a profile, not a reading",
    "X17": _DROPOUT,
    **dict.fromkeys(("T6", "T10", "T11", "T12", "T13", "T14", "T15"), _SEQUENCES),
    "T8": _MEMORY,
    "T16": "hooks with side effects are not asked for",
    "T19": _MEMORY,
    "T20": _BYTES,
    "L5": "in the answers it is N4",
    "L6": "needs several devices",
    "L7": "merging is the caller's",
    "L10": "in the answers it is H2",
    "N3": "below every tolerance: a profile says which sum is divided by",
    "N5": "bits of two paths are not compared",
    "N6": _BYTES,
    "N7": _BYTES,
    "N8": "a miscompiled tile may hold anything",
    "N9": "in the answers it is M12 with operands in float64",
    "N10": "hardware, not a fault: a profile",
    **dict.fromkeys((f"Q{n}" for n in range(1, 10)), _QUANTISED),
    "B4": _DROPOUT,
    "B9": _SEQUENCES,
    "B10": _MEMORY,
    "B11": _RACE,
    "B14": "needs several devices",
    **dict.fromkeys(("R1", "R2", "R5", "R6"), _RACE),
    "R3": "found by comparing operands before and after the call",
    **dict.fromkeys((f"A{n}" for n in range(1, 6)), _LATENT),
}

BEGIN, END = "<!-- generated -->", "<!-- end of what is generated -->"


def faults() -> dict[Fault, int]:
    """Every fault with the number of its mutants; 0 for families, whose number is fitted."""
    counted: dict[Fault, int] = {}
    for mutant in ALL:
        counted[mutant.fault] = counted.get(mutant.fault, 0) + 1
    return counted | {family.fault: 0 for family in FAMILIES if family.fault not in counted}


def _order(code: str) -> tuple[int, int]:
    letter = code.rstrip("0123456789")
    return list(LETTERS).index(letter), int(code[len(letter) :])


def tables() -> str:
    """The catalogue as Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    counted = faults()
    for letter, (title, _) in LETTERS.items():
        own = sorted((f for f in counted if f.code.rstrip("0123456789") == letter), key=lambda f: (_order(f.code), f.name))
        if not own:
            continue
        yield from (
            f"### {title[0].upper()}{title[1:]}",
            "",
            "| code | fault | what happens | right | wrong | forms | met in |",
            "|---|---|---|---|---|---|---|",
        )
        for fault in own:
            forms = str(counted[fault]) if counted[fault] else "fitted"
            cells = (fault.code, fault.name, fault.words, f"`{fault.right}`", f"`{fault.wrong}`", forms, fault.evidence)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    yield from ("### Not among the mutants", "", "| code | why |", "|---|---|")
    by_reason: dict[str, list[str]] = {}
    for code in sorted(OUT_OF_SCOPE, key=_order):
        by_reason.setdefault(OUT_OF_SCOPE[code], []).append(code)
    yield from (f"| {', '.join(codes)} | {why} |" for why, codes in by_reason.items())


def main(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
