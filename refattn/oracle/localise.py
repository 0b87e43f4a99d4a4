"""What failing rows have in common: the shortest statement about rows that separates those that fail from those that do not.

A row is one query of one head in one call.  Statements are about what the call was given, and thresholds, residues and equalities over a
few facts about rows: where they are, how much they see, where their largest weight lies.  They are scored by how well they tell failing from
passing rows over all calls; ties go to the simpler one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..problem import Problem
from .judge import Case


@dataclass(frozen=True)
class Finding:
    """A statement about rows: of all `rows` it holds for `holding`, of the `failing` ones for `both`.  No text: all rows fail."""

    text: str
    failing: int
    both: int
    holding: int
    rows: int

    @property
    def score(self) -> float:
        """How well it tells failing rows from passing ones, 1 at best.

        The harmonic mean of the share of failing rows it covers and the share of its rows that fail is easily high where most rows fail;
        the share of failing rows it covers less that of passing ones, where few do.  The smaller counts.
        """
        if not self.failing or self.failing == self.rows:
            return 0.0
        harmonic = 2 * self.both / (self.failing + self.holding)
        return min(harmonic, self.both / self.failing - (self.holding - self.both) / (self.rows - self.failing))

    def __str__(self) -> str:
        if not self.text:
            return f"all {self.failing} rows that were judged fail"
        covered = "every failing row" if self.both == self.failing else f"each of {self.both} failing rows ({self.failing} in all)"
        others = self.holding - self.both
        being = self.text.startswith("is ")
        verb = ("is" if being else "does") if others <= 1 else ("are" if being else "do")
        return f"{covered} {self.text}; " + (f"no passing row {verb}" if others == 0 else f"{others} passing row{'s' * (others > 1)} {verb} too")


#: Facts about rows: what a row does when the fact is at least, below, or equal to a number; and the fact's name for remainders.
_PHRASES = {
    "query": ("is query {} or a later one", "is a query before {}", "is query {}", "query index"),
    "from the end": ("is {} or more queries before the last", "is fewer than {} queries before the last", "is {} queries before the last", ""),
    "head": ("is of query head {} or a later one", "is of a query head before {}", "is of query head {}", "query head"),
    "place in group": (
        "is of a query head at place {} or later among those that share a key-value head",
        "is of a query head before place {} among those that share a key-value head",
        "is of the query head at place {} among those that share a key-value head",
        "",
    ),
    "kv head": ("reads key-value head {} or a later one", "reads a key-value head before {}", "reads key-value head {}", ""),
    "batch": ("is of batch {} or a later one", "is of a batch before {}", "is of batch {}", ""),
    "visible keys": ("sees {} keys or more", "sees fewer than {} keys", "sees {} keys", "number of visible keys"),
    "largest weight": (
        "has its largest weight at key {} or later",
        "has its largest weight before key {}",
        "has its largest weight at key {}",
        "key of the largest weight",
    ),
    "last visible key": ("sees key {} or later ones", "sees no key from {} on", "sees key {} as its last", "last visible key"),
    "first visible key": ("sees no key before {}", "sees a key before {}", "sees key {} as its first", "first visible key"),
    "keys": ("is in a call of {} keys or more", "is in a call of fewer than {} keys", "is in a call of {} keys", "number of keys"),
    "queries": ("is in a call of {} queries or more", "is in a call of fewer than {} queries", "is in a call of {} queries", "number of queries"),
    "longer": ("is in a call with S - T at least {}", "is in a call with S - T below {}", "is in a call with S - T = {}", ""),
}
_MODULI = (2, 4, 8, 16, 32, 64)
_TILES = (8, 16, 32, 64, 128)
_CALL = "with "  # begins the facts that are one truth for a whole call
_ROW = ": "  # begins those that are whole statements about a row


def localise(cases: Sequence[Case]) -> Finding | None:
    """The best statement about failing rows, or None where no call differs or nothing tells them apart."""
    judged = [c for c in cases if c.outcome in ("agrees", "differs") and c.probe.decides and c.ratios]
    tables = [t for t in (_rows(c) for c in judged) if t is not None]
    if not tables or not any(t["fails"].any() for t in tables):
        return None
    shared = [name for name in tables[0] if all(name in t for t in tables)]  # in order, which decides between statements that are as good
    rows = {name: np.concatenate([t[name] for t in tables]) for name in shared}
    fails = rows.pop("fails")
    if fails.all():
        return Finding("", len(fails), len(fails), len(fails), len(fails))
    best: Finding | None = None
    for text, holds in _statements(rows, fails):
        found = Finding(text, int(fails.sum()), int((fails & holds).sum()), int(holds.sum()), len(fails))
        if best is None or found.score > best.score + 0.005:  # statements come simplest first
            best = found
    return best if best is not None and best.score >= 0.8 else None


def channels(case: Case) -> str:
    """Which channels of the failing rows fail, where it is not all of them: a run, every so many, or a list."""
    ratios = case.ratios.get("out")
    if ratios is None or ratios.ndim < 2 or not ratios.size:
        return ""
    failing = np.flatnonzero((ratios > 1).any(axis=tuple(range(ratios.ndim - 1))))
    if not len(failing) or len(failing) > 0.75 * ratios.shape[-1]:
        return ""
    steps = set(np.diff(failing).tolist())
    step = steps.pop() if len(steps) == 1 else 0
    if step > 1 and len(failing) > 2 and failing[0] < step and failing[-1] + step >= ratios.shape[-1]:
        return f"only channels of index {failing[0]} modulo {step} of {ratios.shape[-1]} differ"
    together = step == 1
    listed = ", ".join(map(str, failing[:8])) + (", ..." if len(failing) > 8 else "")
    run = f"{failing[0]} to {failing[-1]}" if together else listed
    return f"only channels {run} of {ratios.shape[-1]} differ"


def _rows(case: Case) -> dict[str, np.ndarray] | None:
    failing = _failing_rows(case)
    if case.problem is None or failing is None or not failing.size:
        return None
    batch, heads, n_q = failing.shape
    dims = case.problem.dims
    n_k = dims.get("S", n_q)
    b, h, i = np.indices(failing.shape)
    group = max(1, heads // max(1, dims.get("Hkv", heads)))
    table = {
        "fails": failing,
        "query": i,
        "from the end": n_q - 1 - i,
        "head": h,
        "place in group": h % group,
        "kv head": h // group,
        "batch": b,
        "keys": np.full_like(i, n_k),
        "queries": np.full_like(i, n_q),
        "longer": np.full_like(i, n_k - n_q),
    }
    table |= {_CALL + text: np.full(i.shape, holds) for text, holds in _call(case.problem)}
    table |= {_ROW + f"is in the last, partial tile of {m} queries": (i >= n_q // m * m) & (n_q > m) for m in _TILES}
    partial = {m: n_k % m > 0 and n_k > m for m in _TILES}
    table |= {_ROW + f"is in a call of more than {m} keys whose last tile of {m} is partial": np.full(i.shape, holds) for m, holds in partial.items()}
    weights = case.truth.get("weights")
    if weights is not None and weights.size == failing.size * n_k:  # not where rows mix heads, after an output projection
        weights = weights.reshape(batch, heads, n_q, n_k) if n_k else np.zeros((batch, heads, n_q, 1))
        seen = weights > 0
        table["visible keys"] = seen.sum(-1)
        table["largest weight"] = np.where(seen.any(-1), np.argmax(np.nan_to_num(weights), -1), -1)
        table["first visible key"] = np.where(seen.any(-1), np.argmax(seen, -1), -1)
        table["last visible key"] = np.where(seen.any(-1), seen.shape[-1] - 1 - np.argmax(seen[..., ::-1], -1), -1)
    return {name: x.reshape(-1) for name, x in table.items()}


def _call(problem: Problem) -> Iterator[tuple[str, bool]]:
    """What a call was given beyond the required operands: ``mask``, ``window``, ``window=(5, 0)``."""
    for o in problem.variant.operands:
        if o.optional:
            yield o.name, o.name in problem.given
    for p in problem.variant.params:
        value = problem.params[p.name]
        yield p.name, value != p.default
        for other in p.tries if len(p.tries) > 1 else ():
            yield f"{p.name}={other!r}", type(value) is type(other) and value == other


def _failing_rows(case: Case) -> np.ndarray | None:
    """Rows (B, Hq, T) of which some element of some output fails; outputs without rows, such as a state, are left out."""
    found: np.ndarray | None = None
    for output in case.problem.variant.outputs if case.problem else ():
        axes = output.axes.split()
        if output.name in case.ratios and "T" in axes:
            failing = np.asarray(case.ratios[output.name] > 1)
            rows = failing if axes.index("T") == len(axes) - 1 else np.asarray(failing.any(axis=-1))
            rows = rows[:, None] if rows.ndim == 2 else rows
            if found is None or found.shape == rows.shape:
                found = rows if found is None else found | rows
    return found


def _statements(rows: dict[str, np.ndarray], fails: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Statements and the rows they hold for, simplest first."""
    calls = sorted((name for name in rows if name.startswith(_CALL)), key=lambda name: "=" in name)
    yield from ((f"is in a call {name}", rows[name]) for name in calls)
    yield from ((f"is in a call without {name.removeprefix(_CALL)}", ~rows[name]) for name in calls)
    whole = [(name.removeprefix(_ROW), x) for name, x in rows.items() if name.startswith(_ROW)]
    named = [(phrases, rows[name]) for name, phrases in _PHRASES.items() if name in rows]
    for (at_least, below, _, _), x in named:
        for n in _edges(x, fails):
            yield _numbered(at_least, n), x >= n
            yield _numbered(below, n), x < n
    for (_, _, equal, _), x in named:
        for n in np.unique(x[fails])[:64]:
            yield _numbered(equal, n), x == n
    for (_, _, _, fact), x in named:
        for m in _MODULI if fact else ():
            yield f"has a {fact} that is no multiple of {m}", x % m != 0
            for r in np.unique(x[fails] % m)[:2]:
                yield f"has a {fact} of {r} modulo {m}", x % m == r
    yield from whole


def _numbered(phrase: str, n: int) -> str:
    return phrase.format(n).replace("fewer than 1 keys", "no key").replace(" 1 keys", " 1 key").replace(" 1 queries", " 1 query")


def _edges(x: np.ndarray, fails: np.ndarray) -> list[int]:
    """Thresholds at which failing rows begin or end."""
    inside = x[fails]
    values = {int(inside.min()), int(inside.max()) + 1, *(int(n) for n in np.percentile(inside, (1, 5, 95, 99)))}
    return sorted(values)
