"""Whether an answer depends on anything but the question: the same call at once again, and again after all the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..findings import Fact
from .asking import Kernel, Reading, fact


def facts(kernel: Kernel) -> Iterator[Fact]:
    """The first call of all, asked again twice."""
    dims = kernel.sizes()
    first, later, again = kernel.weights(dims), kernel.weights(dims, again=True), kernel.weights(dims, again=True)
    if first is None or later is None or again is None:
        return
    same = Reading("the same bits", np.array(True))
    other = Reading("other bits", np.array(False))
    for call, (one, two) in {"the same call twice": (later, again), "the first call again after all others": (first, later)}.items():
        bits = np.array_equal(one.found.out, two.found.out, equal_nan=True)
        yield fact("the same call gives", call, same if bits else other, same)
    written = sorted(kernel.overwritten)
    left = Reading("as they were", np.array(0))
    yield fact("operands after a call are", "any", Reading(f"overwritten: {', '.join(written)}", np.array(len(written))) if written else left, left)
