"""The mutation score of a suite, for a reader: which faults it notices by which call, and which it does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console, Group
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ... import precision
from ...errors import ParameterError
from ...spec import Variant
from ..findings import Fault
from ..profiles import resolve
from . import mutants as mutants_of
from .mutant import Mutant
from .score import Verdict, score


def verdicts(variant: Variant, dtype: object, suite: str, codes: str | None = None, profile: str | None = None) -> list[Verdict]:
    """What becomes of every mutant of a variant, or of those whose codes begin as one of `codes` (separated by commas) does.

    Raises
    ------
    ParameterError
        Where the variant has no such mutants.
    """
    stored = precision.as_dtype(dtype)
    wanted = tuple(code.strip() for code in (codes or "").split(",") if code.strip())
    tried = [m for m in mutants_of(variant) if not wanted or any(_begins(m, code) for code in wanted)]
    if not tried:
        known = sorted({m.fault.code for m in mutants_of(variant)}, key=_order)
        raise ParameterError(f"{variant.name} has no mutants" + (f" of {codes!r}; known are {', '.join(known)}" if known else ""))
    tried.sort(key=lambda m: (_order(m.fault.code), m.fault.name))
    console = Console(stderr=True)
    found = score(variant, tried, stored, suite, resolve(profile, stored))
    return list(track(found, "asking mutants", len(tried), console=console, transient=True) if sys.stderr.isatty() else found)


def _begins(mutant: Mutant, code: str) -> bool:
    return mutant.fault.code == code or (code.isalpha() and mutant.fault.code.rstrip("0123456789") == code)


def _order(code: str) -> tuple[str, int]:
    letters = code.rstrip("0123456789")
    return letters, int(code[len(letters) :] or 0)


def survivors(found: Sequence[Verdict]) -> list[Verdict]:
    """Mutants that the suite did not refuse, though some call can."""
    return [v for v in found if v.observable and not v.killed_by]


def mutation_score(found: Sequence[Verdict]) -> tuple[int, int]:
    """How many mutants were refused, of those that can be."""
    return sum(bool(v.killed_by) for v in found), sum(v.observable for v in found)


def by_fault(found: Sequence[Verdict]) -> dict[Fault, list[Verdict]]:
    """Verdicts of each fault, whose mutants differ in a tile's width or the order of two steps."""
    grouped: dict[Fault, list[Verdict]] = {}
    for verdict in found:
        grouped.setdefault(verdict.mutant.fault, []).append(verdict)
    return grouped


def drawn(found: Sequence[Verdict]) -> Group:
    """For a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("fault", "", "refused", "by", "answer", "error / tolerance"):
        table.add_column(column)
    for fault, own in by_fault(found).items():
        refused, possible = mutation_score(own)
        first = next((v for v in own if v.killed_by), own[0])
        state = "[dim]not observable here" if not possible else f"{'[green]' if refused == possible else '[red]'}{refused} of {possible}"
        table.add_row(fault.code, fault.name, state, first.killed_by, first.output, f"{first.ratio:.2g}" if first.killed_by else "")
    refused, possible = mutation_score(found)
    share = f"{100 * refused / possible:.1f} %" if possible else "nothing to refuse"
    lines = [f"mutation score {refused} of {possible} ({share}); {len(found) - possible} of {len(found)} mutants are not observable in these calls"]
    lines += [f"survived: {v.mutant.fault.code} {v.mutant.fault.name} {dict(v.mutant.changes)}" for v in survivors(found)]
    return Group(table, Text(), *(Text(line) for line in lines))
