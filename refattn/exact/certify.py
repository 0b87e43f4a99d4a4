"""The ladder: float64 where it decides, then two float64, then balls of growing precision, then rational numbers for what no precision decides.

    tier 0      float64 with a bound                                   refattn.exact.single     narrower results only
    tier 1      two float64 with a bound                               refattn.exact.rows
    tier 2      Arb balls, precision doubled until they decide         refattn.exact.balls      needs python-flint
    tier 3      rational numbers: results that may be ties             refattn.exact.rational

Recurrences have their own first rungs: `refattn.exact.recurrent`.  What is neither softmax of dot products nor a recurrence runs its own loops on
balls: `refattn.exact.loops`.

A result is *decided* when both ends of its enclosure round to the same number; what is not decided climbs.  What remains undecided at the top
(because python-flint is missing, or because operands are not finite) is enclosed only, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from ..errors import ParameterError
from ..problem import Problem, output_dtype
from ..spec import shape
from . import balls, loops, rational, recurrent, trusted
from .blocks import PROGRESS_FROM, Block, blocks, each, progress
from .forward import fill
from .prepared import prepare
from .results import Certified, Draft, draft, released, unknown_are_nan
from .rounding import nearest
from .task import Task, reason_against, task


def certify(problem: Problem) -> dict[str, Certified]:
    """The outputs asked for, in the caller's layout, each element as well known as the ladder can make it.

    Raises
    ------
    ParameterError
        When something in the call has no enclosure here.
    BackendUnavailableError
        When this machine's arithmetic is not what the bounds rest on.
    """
    recurs = problem.plan is None and problem.recurrence is not None
    reason = recurrent.reason_against(problem) if recurs else reason_against(problem)
    if reason and not loops.reason_against(problem):
        return loops.certify(problem)
    if recurs:
        return recurrent.certify(problem)
    trusted.check()
    asked, name = task(problem), problem.variant.name
    axes = {o.name: o.axes for o in problem.variant.outputs}
    last = {"out": asked.v.shape[3], "lse": 1, "weights": asked.shape[3], "scores": asked.shape[3]}
    for output in problem.returns:
        if output not in last:
            raise ParameterError(f"{name}: {output} cannot be certified; {', '.join(x for x in last if x in axes)} can")
    drafts = {output: draft((*asked.shape[:3], last[output]), output_dtype(problem, output)) for output in problem.returns}
    prepared = {(b, g): prepare(asked, b, g) for b, g in asked.groups()}

    def do(block: Block) -> None:
        fill(asked, prepared[block.b, asked.group(block.h)], block, drafts)

    each(do, list(blocks(asked)), f"certifying {name}", math.prod(asked.shape) * (asked.q.shape[3] + asked.v.shape[3]))
    _finish(asked, drafts)
    return {output: released(x, shape(axes[output], problem.dims), axes[output], problem.layout) for output, x in drafts.items()}


def _finish(asked: Task, drafts: Mapping[str, Draft]) -> None:
    """Take what is undecided to rational numbers, where a result is rational, and to balls otherwise."""
    exact = rational.Exact(asked)
    higher = balls.Balls(asked) if balls.available() else None
    work = list(rational.open_rows(drafts))
    for row, wanted in progress(work, len(work), "the last undecided", PROGRESS_FROM if len(work) > 100 else 0.0):
        known = exact.row(*row)
        if known is None:
            continue
        left = []
        for name, numbers in wanted.items():
            for n in numbers.tolist():
                if known.spoilt and not (name == "scores" and n in known.keys):
                    continue
                found = known.found(name, n)
                if found is None:
                    left.append((name, n))
                else:
                    drafts[name].settle((*row, n), found, found, 3)
        if left and higher is not None:
            _climb(higher, known, drafts, row, left)
    unknown_are_nan(drafts)


def _climb(higher: balls.Balls, known: rational.Row, drafts: Mapping[str, Draft], row: tuple[int, int, int], left: list[tuple[str, int]]) -> None:
    """Balls of growing precision; what the first leave open, on which side it is of the number half-way between the two it may be rounded to."""
    for bits in balls.precisions():
        with higher.flint.ctx.workprec(bits):
            ball = higher.row(*row)
            found = [balls.ends(higher.result(ball, *row[:2], name, n)) for name, n in left]
            still = []
            for (name, n), ends in zip(left, found, strict=True):
                at = (*row, n)
                if ends is None or not (drafts[name].settle(at, *ends, 2) or _by_side(higher, ball, known, drafts[name], name, at, ends)):
                    still.append((name, n))
        left = still
        if not left:
            return


def _by_side(
    higher: balls.Balls, ball: balls.Row, known: rational.Row, result: Draft, name: str, at: tuple[int, ...], ends: tuple[Fraction, Fraction]
) -> bool:
    """Decide a result by its side of the middle of the two numbers that it may be rounded to, if they are neighbours."""
    one, two = (nearest(x, result.dtype) for x in ends)
    if not (math.isfinite(float(one)) and math.isfinite(float(two))):
        return False
    middle = (Fraction(float(one)) + Fraction(float(two))) / 2
    if float(nearest(middle, result.dtype)) not in (float(one), float(two)):  # not neighbours
        return False
    coefficients = known.beyond(name, at[-1], middle)
    if coefficients is not None:
        side = balls.sign([(higher.exponent(ball, known.member(key), key), c) for key, c in coefficients.items()])
    else:
        side = known.inside_cap(at[-1], middle) if name == "scores" else None
    if side == 0:
        return result.settle(at, middle, middle, 3)
    if side is not None:
        result.put(at, two if side > 0 else one, *ends, 2, True)
    return side is not None
