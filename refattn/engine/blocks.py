"""Block maps of a mask: which blocks of queries and keys hold no visible pair, and which hide none.

Kernels skip the former and do not ask the mask about the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from ..errors import ParameterError
from .simd import address, register_bytes
from .stages import aux_table, call, lifted

#: What a block may be.
NONE, SOME, ALL = 0, 1, 2
#: Scores of a mask that are looked at in one call: they stay in the first-level cache.
_CHUNK = 4096


def classes(
    mask_mod: Callable[..., Any], aux: tuple[np.ndarray, ...], B: int, Hq: int, T: int, S: int, block: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """Whether no pair of a block is visible, some are, or all.

    Parameters
    ----------
    mask_mod : callable
        ``g(b, h, i, j, *aux)``, true where query i of head h sees key j; see `stages.lifted`.
    aux : tuple of ndarray
        What else it reads.
    B, Hq, T, S : int
        Batch, query heads, queries and keys.
    block : (int, int)
        Queries and keys of a block.

    Returns
    -------
    ndarray of int8, B x Hq x ceil(T / block[0]) x ceil(S / block[1])
        `NONE`, `SOME` or `ALL`; a block at an edge is judged by the pairs that exist.

    Raises
    ------
    ParameterError
        It does not compile, or raises.
    """
    queries, keys = block
    found = np.empty((B, Hq, -(-T // queries), -(-S // keys)), np.int8)
    if not found.size:
        return found
    stage, table = lifted(mask_mod, "mask", np.float32, "queries", aux), aux_table(aux)
    lanes = register_bytes() // np.dtype(np.float32).itemsize
    width = min(queries, max(lanes, _CHUNK // keys // lanes * lanes))
    if not _classify(stage.address, table, T, S, queries, keys, width, found):
        raise ParameterError("block_mask: mask_mod raised an error, which Numba has printed")
    return found


@njit(error_model="numpy", nogil=True, cache=True)
def _classify(stage, aux, n_queries, n_keys, block_queries, block_keys, width, found):  # type: ignore[no-untyped-def]
    """`width` queries of a block at a time; whether the function never raised."""
    rows = max(1, min(block_keys, _CHUNK // width))
    scores, heads, queries = np.empty(rows * width, np.float32), np.empty(width, np.int32), np.empty(width, np.int32)
    for b, h, m, n in np.ndindex(found.shape):
        heads[:] = h
        last_query, last_key = min(n_queries, (m + 1) * block_queries), min(n_keys, (n + 1) * block_keys)
        true = looked_at = 0
        for i in range(m * block_queries, last_query, width):
            lanes = min(width, last_query - i)
            for lane in range(lanes):
                queries[lane] = i + lane
            for j in range(n * block_keys, last_key, rows):
                keys = min(rows, last_key - j)
                seen = call(stage, address(scores, 0), width, keys, j, b, address(heads, 0), address(queries, 0), lanes, address(aux, 0))
                if seen < 0:
                    return False
                true += seen
                looked_at += lanes * keys
                if 0 < true < looked_at:
                    break
            if 0 < true < looked_at:
                break
        found[b, h, m, n] = NONE if not true else ALL if true == looked_at else SOME
    return True
