"""What happens at the edges of tiles, and on calls without keys."""

from __future__ import annotations

from .listing import mutants, tiled

MUTANTS = [
    *mutants(
        "T1", "padding in the denominator", "Lanes beyond the last key have score 0 and count in the sum.",
        "l_i = sum_(j < S) exp(s_ij)", "l_i = sum_(j < S) exp(s_ij) + number of lanes beyond S",
        *tiled(padding="zero"), evidence="FlashInfer 7f33b208; tenstorrent/tt-metal#54833", needs="softmax", prior=4,
    ),
    *mutants(
        "T3", "padding of the least number",
        "Lanes beyond the last key hold the least finite number, which a row that sees nothing takes for its maximum.",
        "s_ij = -inf for j >= S", "s_ij = -fmax for j >= S",
        *tiled(padding="least", padding_value=1.0), *tiled(padding="least"), evidence="MLX 79071bfb", needs="softmax, hidden pairs",
    ),
    *mutants(
        "T4", "last partial tile dropped", "The number of tiles is rounded down, so the last keys are ignored.",
        "ceil(S / tile) tiles", "floor(S / tile) tiles",
        *tiled(order="whole tiles"), *tiled(order="whole tiles or one"), evidence="jax 7d27c319; MLX 6a40e1c1", needs="softmax", prior=3,
    ),
    *mutants(
        "T4", "first tile dropped", "The loop over keys starts at the second tile.",
        "tiles 0, 1, ...", "tiles 1, 2, ...",
        *tiled(order="no first"), *tiled(order="no first of many"), needs="softmax",
    ),
    *mutants(
        "T4", "last tile dropped", "The loop over keys ends one tile early.",
        "tiles ..., n - 1", "tiles ..., n - 2",
        *tiled(order="no last"), needs="softmax",
    ),
    *mutants(
        "T5", "number of queries for keys", "The loop over keys ends at the number of queries.",
        "j < S", "j < min(T, S)",
        {"order": "queries' extent"}, evidence="jax bd9a10e4", needs="softmax, T!=S", prior=2,
    ),
    *mutants(
        "T7", "NaN without keys", "A call without keys gives NaN.",
        "out_i = 0", "out_i = 0 / 0",
        {"empty": "nan without keys"}, evidence="FlashAttention b46c5875; FlashInfer ac72b1cc", needs="no keys", prior=2,
    ),
]  # fmt: skip

FAMILIES = []  # type: ignore[var-annotated]
