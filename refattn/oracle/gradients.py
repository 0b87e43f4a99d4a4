"""What the gradients of a call are, exactly: by formula where there is one, else by differentiating the definition numerically."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import definition, derivatives
from ..errors import ParameterError
from ..problem import Problem, split
from ..sequences import Packed, rows
from .bounds.backward import Backward, applies
from .bounds.scored import Scored
from .profiles import Profile

#: Operations up to which a definition is differentiated numerically in a suite: nine times in a second or so.
_WORK = 3e6


@dataclass(frozen=True)
class Backpropagated:
    """Gradients of one problem.

    Attributes
    ----------
    cotangents : mapping of str to ndarray
        By output name, BHTD.
    values : mapping of str to ndarray
        ``d_<operand>`` of every real operand given, in its shape: float64, BHTD.
    errors : mapping of str to ndarray
        Estimated absolute errors where a definition was differentiated; empty where a formula was evaluated.
    """

    cotangents: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray] = field(default_factory=dict)


def backpropagated(problem: Problem, truth: Mapping[str, np.ndarray], cotangents: Mapping[str, np.ndarray]) -> Backpropagated:
    """Gradients of a problem whose outputs are `truth`, for cotangents by output."""
    cotangents = {name: np.asarray(x, np.float64) for name, x in cotangents.items()}
    if problem.sequences is not None:
        parts = [(part, where) for _, part, where in sequences(problem, cotangents)]
        values, errors = (joined(problem, ((getattr(x, kind), where) for x, where in parts)) for kind in ("values", "errors"))
        return Backpropagated(cotangents, values, errors)
    if applies(problem, cotangents):
        assert problem.plan is not None
        exact = Profile("exact", 2.0**-53)  # bounds are not asked for
        return Backpropagated(cotangents, Backward(Scored(problem, truth, problem.plan, exact, 0.0), cotangents).gradients())
    found = derivatives.gradients(problem, cotangents)
    return Backpropagated(cotangents, found.values, found.errors)


def sequences(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> Iterator[tuple[Problem, Backpropagated, dict[str, tuple[slice, ...]]]]:
    """Packed sequences as problems of their own, their gradients, and where those lie; an operand they share is left out there."""
    places = problem.sequences
    if not isinstance(places, Packed):
        raise ParameterError(f"{problem.variant.name}: no gradients of Paged keys and values, which are a cache; pass them as Packed")
    for n, (one, queries) in enumerate(split(problem)):
        keys = rows(places.cu_seqlens_k, n)
        own = {name: x[queries] for name, x in cotangents.items()}
        yield one, backpropagated(one, definition.run(one), own), {"d_q": queries, "d_k": keys, "d_v": keys}


def joined(problem: Problem, parts: Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, tuple[slice, ...]]]]) -> dict[str, np.ndarray]:
    """What sequences have, each where it lies; of operands they share, the sum."""
    found: dict[str, np.ndarray] = {}
    for values, where in parts:
        for name, x in values.items():
            found.setdefault(name, np.zeros(problem.given[name[2:]].shape))[where.get(name, ...)] += x
    return found


def affordable(problem: Problem, outputs: Mapping[str, Any]) -> bool:
    """Whether gradients of that many elements are a matter of seconds."""
    return applies(problem, outputs) or derivatives.work(problem) <= _WORK
