"""What the gradients of a call are, exactly: by formula where there is one, else by differentiating the definition numerically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import definition, derivatives
from ..errors import ParameterError
from ..problem import Problem, split
from ..sequences import Packed
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
        parts = [part for _, part in sequences(problem, cotangents)]
        values, errors = (derivatives.joined(problem, [getattr(x, kind) for x in parts]) for kind in ("values", "errors"))
        return Backpropagated(cotangents, values, errors)
    if applies(problem, cotangents):
        assert problem.plan is not None
        exact = Profile("exact", 2.0**-53)  # bounds are not asked for
        return Backpropagated(cotangents, Backward(Scored(problem, truth, problem.plan, exact, 0.0), cotangents).gradients())
    found = derivatives.gradients(problem, cotangents)
    return Backpropagated(cotangents, found.values, found.errors)


def sequences(problem: Problem, cotangents: Mapping[str, np.ndarray]) -> Iterator[tuple[Problem, Backpropagated]]:
    """Packed sequences as problems of their own, and their gradients."""
    if not isinstance(problem.sequences, Packed):
        raise ParameterError(f"{problem.variant.name}: no gradients of Paged keys and values, which are a cache; pass them as Packed")
    for n, one in enumerate(split(problem)):
        yield one, backpropagated(one, definition.run(one), derivatives.cotangents_of(problem, n, cotangents))


def affordable(problem: Problem, outputs: Mapping[str, Any]) -> bool:
    """Whether gradients of that many elements are a matter of seconds."""
    return applies(problem, outputs) or derivatives.work(problem) <= _WORK
