"""The examination of the judge: kernels with faults planted by hand, singly, in pairs, and of kinds that it has never heard of.

    python tests/examination.py [singles] [pairs] [open] [backward] [delta] [features] [--dtype float32] [--pairs 300]

prints a table for each part.  A fault is named *uniquely* when its code is all that is left, and *as a class* when it is among the codes that the
calls could not tell apart.  Another name that explains the answers counts as wrong, and so does any name for a fault that no catalogue holds,
unless a family with a fitted number covers it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import planted
import planted_backward
import planted_delta
import planted_features
import planted_open
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import refattn as ra
from refattn.oracle.report import Report

PARTS = ("singles", "pairs", "open", "backward", "delta", "features")


@dataclass(frozen=True)
class Answer:
    """How the judge did on one candidate.

    outcome is "unique", "class" (named, with others that could not be told apart), "other" (a different name), "none" (no name) or
    "missed" (it passed).
    """

    name: str
    outcome: str
    codes: tuple[str, ...]


def codes(report: Report) -> tuple[tuple[str, ...], ...]:
    """For every explanation, likeliest first, the codes of its faults and of those it could not be told from."""
    diagnosis = report.investigation.diagnosis
    explanations = () if diagnosis is None else diagnosis.explanations
    return tuple(tuple(dict.fromkeys(f.code for f in (*e.faults, *e.alike))) for e in explanations)


def marked(name: str, expected: Iterable[str], report: Report) -> Answer:
    found, wanted = codes(report), frozenset(expected)
    said = tuple(dict.fromkeys(itertools.chain.from_iterable(found)))
    if report.passed:
        return Answer(name, "missed", said)
    if not found:
        return Answer(name, "none", said)
    if not wanted & set(said):
        return Answer(name, "other", said)
    return Answer(name, "unique" if set(said) <= wanted else "class", said)


def singles(dtype: str) -> Iterator[Answer]:
    for name in planted.FAULTS:
        yield marked(name, [name.split()[0]], ra.check(planted.planted(name), dtype=dtype))


def backward(dtype: str) -> Iterator[Answer]:
    for name, stages in planted_backward.FAULTS.items():
        report = ra.check(planted_backward.candidate(stages, name), dtype=dtype)
        yield marked(name, [name.split()[0]], report)


def together(one: planted.Stages, other: planted.Stages) -> planted.Stages | None:
    """A kernel with both faults; None where both replace the same stage."""
    changes: dict[str, Any] = {}
    for stages in (one, other):
        for field in dataclasses.fields(stages):
            value = getattr(stages, field.name)
            if value != getattr(planted.RIGHT, field.name):
                if field.name in changes:
                    return None
                changes[field.name] = value
    return dataclasses.replace(planted.RIGHT, **changes)


def pairs(dtype: str, count: int, seed: int = 0) -> Iterator[Answer]:
    """Random pairs of faults in different stages; both codes are right, and one of them where it hides the other."""
    single = {name: stages for name, stages in planted.FAULTS.items() if isinstance(stages, planted.Stages)}
    every = [(a, b) for a, b in itertools.combinations(single, 2) if a.split()[0] != b.split()[0] and together(single[a], single[b]) is not None]
    for n in np.random.default_rng(seed).permutation(len(every))[:count]:
        a, b = every[n]
        stages = together(single[a], single[b])
        assert stages is not None
        expected = [a.split()[0], b.split()[0]]
        yield marked(f"{a} + {b}", expected, ra.check(planted.candidate(stages, f"{a} + {b}"), dtype=dtype))


def delta(dtype: str) -> Iterator[Answer]:
    """The gated delta rule; right kernels first, which pass as "missed"."""
    for name, stages in {**planted_delta.RIGHT, **planted_delta.FAULTS}.items():
        report = ra.check(planted_delta.candidate(stages, name), "gated_delta", dtype=dtype)
        yield marked(name, [name.split()[0]], report)


def features(dtype: str) -> Iterator[Answer]:
    """Linear attention; right kernels first, which pass as "missed"."""
    for name, stages in {**planted_features.RIGHT, **planted_features.FAULTS}.items():
        report = ra.check(planted_features.candidate(stages, name), stages.variant, dtype=dtype)
        yield marked(name, [name.split()[0]], report)


def open_world(dtype: str) -> Iterator[Answer]:
    for name, (candidate, expected) in planted_open.CANDIDATES.items():
        yield marked(name, expected, ra.check(candidate, dtype=dtype))


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=", ".join(PARTS) + "; all unless said.")] = None,
    dtype: str = "float32",
    count: Annotated[int, typer.Option("--pairs", help="How many pairs.")] = 300,
    seed: int = 0,
) -> None:
    """Examine the judge."""
    screen = Console()
    for part in parts or PARTS:
        run = {"singles": lambda: singles(dtype), "pairs": lambda: pairs(dtype, count, seed), "open": lambda: open_world(dtype)}
        run |= {"backward": lambda: backward(dtype), "delta": lambda: delta(dtype), "features": lambda: features(dtype)}
        answers = list(track(run[part](), f"{part}, {dtype}", console=Console(stderr=True), transient=True))
        table = Table("planted", "outcome", "named", title=f"{part}, {dtype}", title_justify="left", box=None)
        for answer in answers:
            if answer.outcome != "unique":
                table.add_row(answer.name, answer.outcome, " ".join(answer.codes))
        screen.print(table)
        screen.print(f"{part}, {dtype}: " + ", ".join(f"{n} {outcome}" for outcome, n in Counter(a.outcome for a in answers).most_common()))


if __name__ == "__main__":
    typer.run(main)
