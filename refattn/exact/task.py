"""What is to be certified: a checked call of the softmax family as plain float64 arrays, or a refusal that names what has no enclosure here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import entrywise
from ..errors import ParameterError
from ..pieces.masks import causal, window
from ..pieces.score_mods import softcap
from ..pieces.similarities import dot
from ..problem import Problem

#: Beyond 2**this, either way, a norm or a value leaves the range in which bounds of float64 hold.
RANGE = 450


@dataclass(frozen=True)
class Task:
    """Softmax over scaled inner products: axes B Hq T D, B Hkv S D, B Hkv S E, whatever axes the variant has.

    Attributes
    ----------
    q, k, v : ndarray
        float64, exactly the operands.
    bias : ndarray or None
        Broadcast to B Hq T S.
    visible : ndarray or None
        The mask operand and mask_mod, broadcast to B Hq T S; True where both let a query attend.
    first, last : ndarray
        Keys that the masks of the plan let each query see, a half-open range.
    sinks : ndarray
        One for each query head; -inf for none.
    scale, cap, fill : float
        A cap of 0 is none.  Hidden entries are skipped where fill is -inf and have that score otherwise.
    empty_rows : str
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    visible: np.ndarray | None
    first: np.ndarray
    last: np.ndarray
    sinks: np.ndarray
    scale: float
    cap: float
    fill: float
    empty_rows: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, Hq, T, S."""
        return (*self.q.shape[:3], self.k.shape[2])

    def group(self, h: int) -> int:
        """The key-value head that query head h reads."""
        return h // (self.q.shape[1] // self.k.shape[1])

    def added(self, b: int, h: int, rows: np.ndarray, columns: int) -> np.ndarray:
        """What is added to the scores of some rows, over the first keys: the bias, -inf where hidden, +inf where the score is `fill`.

        Columns past the last key are hidden.  A bias of +inf becomes NaN, as its score will be.
        """
        n_k = min(columns, self.shape[3])
        out = np.zeros((len(rows), columns))
        if self.bias is not None:
            out[:, :n_k] = self.bias[b, h, rows, :n_k]
            out[out == np.inf] = np.nan
        place, hidden = np.arange(n_k), -np.inf if self.fill == -math.inf else np.inf
        if np.any(self.first[rows] > 0) or np.any(self.last[rows] < n_k):
            out[:, :n_k][(place < self.first[rows, None]) | (place >= self.last[rows, None])] = hidden
        if self.visible is not None:
            out[:, :n_k][~self.visible[b, h, rows, :n_k]] = hidden
        out[:, n_k:] = -np.inf
        return out

    def groups(self) -> Iterator[tuple[int, int]]:
        """Every batch and key-value head."""
        yield from ((b, g) for b in range(self.k.shape[0]) for g in range(self.k.shape[1]))


def task(problem: Problem) -> Task:
    """The problem as arrays.

    Raises
    ------
    ParameterError
        When something in it has no enclosure in this room.
    """
    name, plan = problem.variant.name, problem.plan
    reason = reason_against(problem)
    if plan is None or reason:
        known = "variants of softmax over scaled inner products can, such as softmax, and outputs of recurrences, such as gated_delta"
        raise ParameterError(f"{name}: cannot be certified: {reason}; {known}")
    operands = problem.operands
    n_q, n_k = problem.dims["T"], problem.dims["S"]
    heads = "Hq" in problem.dims

    def array(part: str) -> np.ndarray:
        x = np.ascontiguousarray(operands[part], np.float64)
        return x if heads else x[:, None]

    q, k, v = array(plan.query), array(plan.key), array(plan.value)
    full = (*q.shape[:2], n_q, n_k)

    def pairs(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x if heads else x[:, None], full)

    visible = pairs(operands[plan.mask] != 0) if plan.mask in problem.given else None
    functions = problem.functions
    if functions is not None and functions.mask_mod is not None:
        seen = np.ones(full, np.bool_) if visible is None else visible
        visible = entrywise.allowed(functions.mask_mod, functions.mask_aux, np.ascontiguousarray(seen), functions.first)
    first, last = np.zeros(n_q, np.int64), np.full(n_q, n_k, np.int64)
    for stage in plan.masks:
        low, high = stage.piece.span(np.arange(n_q), n_k, *(int(x) for x in stage.numbers))
        first, last = np.maximum(first, low), np.minimum(last, high)
    return Task(
        q=q,
        k=k,
        v=v,
        bias=pairs(operands[plan.bias]) if plan.bias in problem.given else None,
        visible=visible,
        first=first,
        last=last,
        sinks=np.array(operands[plan.sinks]) if plan.sinks else np.full(q.shape[1], -np.inf),
        scale=float(plan.scale),
        cap=float(plan.score_mods[0].numbers[0]) if plan.score_mods else 0.0,
        fill=plan.fill,
        empty_rows=problem.params.get("empty_rows", "zero") if n_k else "zero",
    )


def reason_against(problem: Problem) -> str:
    """What has no enclosure here, or the empty string."""
    plan = problem.plan
    if plan is None:
        return "it has neither plan nor recurrence" if problem.recurrence is None else "gradients of a recurrence have no enclosure"
    piece = plan.similarity.__name__.rpartition(".")[2]
    stages = [(stage, (causal, window)) for stage in plan.masks] + [(stage, (softcap,)) for stage in plan.score_mods]
    reasons = {
        f"{type(problem.sequences).__name__} sequences have no enclosure; pass one sequence at a time": problem.sequences is not None,
        "a score_mod has no enclosure": problem.functions is not None and problem.functions.score_mod is not None,
        f"the similarity {piece!r} has no enclosure": plan.similarity is not dot,
        f"the normaliser {plan.normalizer!r} has no enclosure": plan.normalizer != "softmax",
        **{f"its {part} has no enclosure": bool(getattr(plan, part)) for part in ("projections", "residual", "shift")},
        **{f"the piece {stage.piece.__name__.rpartition('.')[2]!r} has no enclosure": stage.piece not in known for stage, known in stages},
        f"{len(plan.score_mods)} score modifiers have no enclosure, one has": len(plan.score_mods) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
