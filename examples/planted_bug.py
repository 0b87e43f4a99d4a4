"""Flash attention in NumPy, with one mistake planted.

    refattn check examples/planted_bug.py:attention

The algorithm is FlashAttention's (Dao et al., arXiv:2205.14135, algorithm 1): keys come in tiles, and a running maximum `top`, a running
sum `total` and an accumulator `acc` hold the softmax of the tiles seen so far.  When a tile raises the maximum, everything gathered under
the old one has to shrink by exp(old - new).  Can you see what is wrong before the report points at it?
"""

import numpy as np

TILE = 16


def attention(q, k, v, causal=False, scale=None):
    """q (B, Hq, T, D), k (B, Hkv, S, D), v (B, Hkv, S, E) -> (B, Hq, T, E); causal aligns the last query with the last key."""
    batch, heads, n_q, d = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    scale = 1 / np.sqrt(d) if scale is None else scale
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    position = np.arange(n_q)[:, None] + n_k - n_q

    top = np.full((batch, heads, n_q, 1), -np.inf, q.dtype)
    total = np.zeros((batch, heads, n_q, 1), q.dtype)
    acc = np.zeros((batch, heads, n_q, v.shape[3]), q.dtype)
    for start in range(0, n_k, TILE):
        tile = slice(start, min(start + TILE, n_k))
        scores = scale * np.einsum("bhtd,bhsd->bhts", q, k[:, :, tile])
        if causal:
            scores = np.where(np.arange(tile.start, tile.stop) <= position, scores, -np.inf)
        new = np.maximum(top, scores.max(-1, keepdims=True))
        safe = np.where(np.isfinite(new), new, 0)  # a row that has seen no key yet
        weights = np.exp(scores - safe)
        shrink = np.exp(top - safe)
        total = shrink * total + weights.sum(-1, keepdims=True)
        acc = acc + np.einsum("bhts,bhse->bhte", weights, v[:, :, tile])
        top = new
    return acc / np.where(total > 0, total, 1)
