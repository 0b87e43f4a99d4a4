"""Momentum DeltaNet: errors at p of the state before each token, of which the momentum holds the gradient, and so is subtracted."""

from __future__ import annotations

import numpy as np

from ...problem import Problem
from .arrays import carried, results, whole
from .momentum import CHUNK, learn_and_read

__all__ = ["CHUNK", "outputs"]


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    q, k, v, p, eta, beta = whole(problem, "q", "k", "v", "p", "eta", "beta")
    kept, momentum = (np.exp(x) for x in whole(problem, "gate", "momentum_gate"))
    (out,), (state, surprise) = results(problem, "out"), carried(problem, "state", "momentum")
    starts = np.zeros(problem.dims["B"], np.int64)
    scale = problem.params["scale"]
    learn_and_read(
        (q, k, v, p, momentum, kept, -eta, -beta),
        starts,
        (state, surprise, np.zeros_like(state)),  # no token reads the anchor
        out,
        problem.dims["D"] ** -0.5 if scale is None else scale,
        1,
        threads,
    )
    return {"out": out, "state": state, "momentum": surprise}
