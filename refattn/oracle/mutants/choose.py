"""Chooses the quick suite: few calls that refuse every mutant and tell the mutants apart.

    python -m refattn.oracle.mutants.choose

evaluates the mutants of softmax, which has every feature, in every call of the pool.  Two mutants h and h' are told apart by a call where

    max over elements |f_h - f_h'| / (tolerance_h + tolerance_h') > 1

and greedily takes the call that refuses most mutants not refused yet, and of those the one that tells most pairs of different faults apart, until
nothing is gained.  Operands are bfloat16, whose tolerances hide most; roundings that only float32 shows count there.  It prints the titles for
`refattn.oracle.designs.QUICK`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ... import catalog, precision
from .. import probes
from ..profiles import resolve
from ..tolerance import ALPHA
from . import mutants as mutants_of
from .answers import evaluate
from .mutant import Mutant
from .score import Call, calls, everything

#: Elements of an output that pairs are compared in; a pair that differs in few others only counts as not told apart.
COMPARED = 2000


@dataclass(frozen=True, eq=False)
class Worth:
    """What a call is good for: which mutants it refuses, by dtype, and which pairs it tells apart."""

    title: str
    refused: np.ndarray
    apart: np.ndarray


def worth(call: Call, wide: Call, tried: Sequence[Mutant], dtypes: tuple[np.dtype, np.dtype]) -> Worth:
    """Of one call in two formats."""
    refused = np.zeros((2, len(tried)), bool)
    for n, mutant in enumerate(tried):
        refused[0, n] = call.refuses(mutant)[0] > 1
        refused[1, n] = wide.refuses(mutant)[0] > 1
    return Worth(call.probe.title, refused, told_apart(call, tried, dtypes[0]))


def told_apart(call: Call, tried: Sequence[Mutant], dtype: np.dtype) -> np.ndarray:
    """Which pairs of mutants of different faults give different outputs in a call."""
    profile, rng = resolve(None, dtype), np.random.default_rng(0)
    size = call.truth["out"].size
    some = rng.permutation(size)[:COMPARED]
    f, t = np.empty((len(tried), len(some))), np.empty((len(tried), len(some)))
    for n, mutant in enumerate(tried):
        showing = mutant.needs <= call.shown and not mutant.needs & {"gradients"}
        said = evaluate(call.problem, mutant.changes if showing else {}, None, call.earlier)
        f[n] = said.outputs["out"].reshape(-1)[some]
        t[n] = said.tolerance(profile, ALPHA)["out"].reshape(-1)[some]
    nan = np.isnan(f)
    codes = np.array([hash(m.fault) for m in tried])
    apart = np.zeros((len(tried), len(tried)), bool)
    with np.errstate(invalid="ignore"):
        for n in range(len(tried)):
            differs = (np.abs(f - f[n]) > t + t[n]) | (nan != nan[n])
            apart[n] = differs.any(1) & (codes != codes[n])
    return apart | apart.T


def chosen(worths: Sequence[Worth], most: int) -> list[Worth]:
    """Greedily, those that refuse and tell apart most."""
    taken: list[Worth] = []
    refused, apart = np.zeros_like(worths[0].refused), np.zeros_like(worths[0].apart)
    while len(taken) < most:
        gains = [(int((w.refused & ~refused).sum()), int((w.apart & ~apart).sum()) // 2, -n) for n, w in enumerate(worths)]
        best = max(gains, key=lambda gain: (gain[0] * 20 + gain[1], gain[2]))
        if not any(best[:2]):
            break
        taken.append(worths[-best[2]])
        refused, apart = refused | taken[-1].refused, apart | taken[-1].apart
    return taken


def main(most: int = 30) -> None:
    variant = catalog.variant("softmax")
    tried = [m for m in mutants_of(variant) if "earlier call" not in m.needs]
    dtypes = (precision.as_dtype("bfloat16"), precision.as_dtype("float32"))
    narrow, wide = (calls(variant, probes.pool(variant, everything(variant), dtype), resolve(None, dtype)) for dtype in dtypes)
    worths = []
    for one, other in zip(narrow, wide, strict=True):
        worths.append(worth(one, other, tried, dtypes))
        print(
            f"{worths[-1].title}: refuses {worths[-1].refused.sum(1)}, tells {worths[-1].apart.sum() // 2} pairs apart", file=sys.stderr, flush=True
        )
    refused, apart = (np.any([getattr(w, name) for w in worths], axis=0) for name in ("refused", "apart"))
    left, pairs = refused.copy(), apart.copy()
    for w in chosen(worths, most):
        new = int((left & w.refused).sum()), int((pairs & w.apart).sum()) // 2
        left, pairs = left & ~w.refused, pairs & ~w.apart
        remains = f"{left.sum()} of {refused.sum()} and {pairs.sum() // 2} of {apart.sum() // 2} left"
        print(f"    {w.title!r},  # {new[0]} more refused, {new[1]} more pairs; {remains}")


if __name__ == "__main__":
    main()
