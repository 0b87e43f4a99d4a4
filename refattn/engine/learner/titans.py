"""Titans' linear memory: errors of keys at the memory before their chunk, of which the gradient has twice."""

from __future__ import annotations

import numpy as np

from ...problem import Problem
from .arrays import carried, positions, results, whole
from .momentum import CHUNK, learn_and_read

__all__ = ["CHUNK", "outputs"]


def outputs(problem: Problem, threads: int | None = None) -> dict[str, np.ndarray]:
    """All outputs of a dense problem, in float32 or float64; they do not depend on the number of threads."""
    q, k, v, eta, theta, alpha = whole(problem, "q", "k", "v", "eta", "theta", "alpha")
    names = ("state", "surprise", "anchor")
    memories, (out,), starts = carried(problem, *names), results(problem, "out"), positions(problem)
    tokens = (q, k, v, np.empty((0, 0, 0, 0), q.dtype), eta, 1 - alpha, 2 * theta, np.ones_like(alpha))
    learn_and_read(tokens, starts, memories, out, 1.0, problem.params["chunk"], threads)
    return {"out": out, **dict(zip(names, memories, strict=True)), "position": starts + float(problem.dims["T"])}
