"""How the files of this folder write their faults down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...findings import Fault
from ..mutant import TILES, Family, Mutant


def mutants(
    code: str,
    name: str,
    words: str,
    right: str,
    wrong: str,
    *changes: Mapping[str, Any],
    evidence: str = "common",
    needs: str = "",
    prior: float = 1.0,
) -> list[Mutant]:
    """One fault in as many forms as there are `changes`, the likeliest first; `needs` are separated by commas."""
    fault = Fault(code, name, words, right, wrong, evidence)
    wanted = frozenset(part.strip() for part in needs.split(",") if part.strip())
    return [Mutant(fault, change, prior * 0.7**n, wanted) for n, change in enumerate(changes)]


def tiled(**change: Any) -> list[dict[str, Any]]:
    """A change for tiles of every width."""
    return [{**change, "tile": tile} for tile in TILES]


def skipping(*changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changes that make hidden keys count; then the same in a kernel that reads zeros where no query looks."""
    return [dict(change) for change in changes] + [{**change, "unseen": "zero"} for change in changes]


def family(
    code: str,
    name: str,
    words: str,
    right: str,
    wrong: str,
    field: str,
    *,
    values: Iterable[float] | None = None,
    bounds: tuple[float, float] | None = None,
    logarithmic: bool = False,
    needs: str = "",
    prior: float = 0.5,
    evidence: str = "common",
    changes: Mapping[str, Any] | None = None,
) -> Family:
    """A fault with a number in it."""
    wanted = frozenset(part.strip() for part in needs.split(",") if part.strip())
    fault = Fault(code, name, words, right, wrong, evidence)
    return Family(fault, field, None if values is None else tuple(values), bounds, logarithmic, prior, wanted, changes or {})
