"""What the benchmarks run on: operands of every variant at a given length, drawn as the variant says.

The sizes are part of every benchmark's meaning; changing one ends its history.
"""

from __future__ import annotations

from typing import Any

import numba  # noqa: F401 - every definition needs it; asv forks its processes from one that has imported this file
import numpy as np

from refattn import catalog, precision
from refattn.spec import shape

#: Sizes of the axes that are not lengths; every axis that is not named here has 32.  An odd number of slots, or CyFA is no recurrence.
SIZES = {"B": 1, "Hq": 2, "Hkv": 2, "Z": 33}
LENGTHS = (64, 256)

VARIANTS = catalog.names()
if not VARIANTS:
    raise RuntimeError("the catalogue is empty: there is nothing to measure, and an empty run would look like a fast one")


def dims(name: str, length: int) -> dict[str, int]:
    """The size of every axis of a variant, with ``T = S = length``."""
    return {axis: length if axis in ("T", "S") else SIZES.get(axis, 32) for axis in catalog.variant(name).axes}


def operands(name: str, length: int, dtype: str = "float64") -> dict[str, Any]:
    """The required operands of a variant by name, real ones in `dtype`."""
    rng = np.random.default_rng(0)
    variant, sizes = catalog.variant(name), dims(name, length)
    drawn = {o.name: (o, o.draw(rng, shape(o.axes, sizes))) for o in variant.operands if not o.optional}
    return {key: precision.round_to(x, precision.as_dtype(dtype)) if o.kind == "real" else x for key, (o, x) in drawn.items()}
