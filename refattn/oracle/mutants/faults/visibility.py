"""Which keys a query sees: alignment, windows, masks, and what becomes of hidden scores."""

from __future__ import annotations

import math

from ..mutant import TILES
from .listing import family, mutants, skipping, tiled

_CAUSAL = "j <= i + S - T"
_WINDOW = "i + S - T - left <= j <= i + S - T + right"
_HIDDEN = "s_ij = -inf where hidden"

MUTANTS = [
    *mutants(
        "M1", "causal mask aligned with the first key", "Query i sees keys 0..i although queries are the last T of S tokens.",
        _CAUSAL, "j <= i",
        {"causal": "top left"}, {"causal": "top left", "causal_window": False},
        evidence="FlashAttention 9e5e8bc9; mlx#2835; executorch#22426; pytorch#103082; onnx 2816da65", needs="causal, T!=S", prior=6,
    ),
    *mutants(
        "M1", "causal mask aligned with the first key, but for the last query",
        "Query i sees keys 0..i although queries are the last T of S tokens, and the last query, where the loop that hides ends, sees every key.",
        _CAUSAL, "j <= i, and every j where i = T - 1",
        {"causal": "top left but for the last query"}, evidence="onnxruntime CPU MultiHeadAttention, unidirectional", needs="causal, T!=S", prior=2,
    ),
    *mutants(
        "M1", "causal mask aligned with the last key", "Query i sees keys up to i + S - T although it stands at i.",
        "j <= i", _CAUSAL,
        {"causal": "bottom right"}, {"causal": "bottom right", "causal_window": False}, evidence="pytorch#108108", needs="causal, T!=S", prior=2,
    ),
    *mutants(
        "M3", "strictly earlier keys", "A query does not see its own position.",
        _CAUSAL, "j < i + S - T",
        {"causal_offset": -1}, needs="causal", prior=3,
    ),
    *mutants(
        "M3", "one key of the future", "A query sees one key beyond its own position.",
        _CAUSAL, "j <= i + S - T + 1",
        {"causal_offset": 1}, evidence="jax 7d27c319", needs="causal", prior=3,
    ),
    *mutants(
        "M3", "causal mask dropped", "Every query sees the future.",
        _CAUSAL, "every j",
        {"causal": "never"}, {"lost_without_mask": "causal"}, evidence="MLX 00794c42", needs="causal", prior=2,
    ),
    *mutants(
        "M3", "always causal", "Keys of the future are hidden although nothing asks for it.",
        "every j", _CAUSAL,
        {"causal": "always"},
    ),
    *mutants(
        "M6", "mask inverted", "True means hidden instead of visible.",
        "visible where mask", "visible where not mask",
        {"mask": "inverted"}, evidence="TransformerEngine 67bc399d", needs="mask", prior=5,
    ),
    *mutants(
        "M7", "mask added as numbers", "True and False are added to the scores as 1 and 0 instead of hiding keys.",
        _HIDDEN, "s_ij = s_ij + mask_ij",
        {"mask": "added"}, {"mask": "added", "hidden_first": True}, *skipping({"hidden": "added", "hidden_first": True}, {"hidden": "added"}),
        *skipping({"hidden": "added", "hidden_first": True, "mask": "never"}, {"hidden": "added", "mask": "never"}),
        needs="masks", prior=2,
    ),
    *mutants(
        "M8", "mask of batch 0", "Every batch gets the mask of the first.",
        "visible where mask_bhij", "visible where mask_0hij",
        {"mask": "batch 0"}, evidence="line/lighthouse#77; MLX 91c02773", needs="mask, B>1", prior=3,
    ),
    *mutants(
        "M8", "mask of head 0", "Every head gets the mask of the first.",
        "visible where mask_bhij", "visible where mask_b0ij",
        {"mask": "head 0"}, evidence="lsdefine/attention-is-all-you-need-keras#16", needs="mask, Hq>1", prior=2,
    ),
    *mutants(
        "M8", "mask of the key-value head", "The mask is indexed by the key-value head instead of the query head.",
        "visible where mask_bhij", "visible where mask_b(h // G)ij",
        {"mask": "key-value head"}, {"mask": "heads tiled"}, needs="mask, Hq>Hkv",
    ),
    *mutants(
        "M8", "mask transposed", "The mask is read with queries and keys exchanged.",
        "visible where mask_ij", "visible where mask_ji",
        {"mask": "transposed"}, needs="mask", prior=0.5,
    ),
    *mutants(
        "M6", "mask ignored", "The mask hides nothing.",
        "visible where mask", "every j",
        {"mask": "never"}, needs="mask", prior=2,
    ),
    *mutants(
        "M10", "window needs a mask", "Without a mask operand the window, or all hiding, is skipped.",
        _WINDOW, "every j where no mask is given",
        {"lost_without_mask": "window"}, {"lost_without_mask": "causal, window"}, evidence="jax 099f0a17", needs="hidden pairs",
    ),
    *mutants(
        "M12", "NaN on a row that sees nothing", "A row without a visible key divides zero by zero.",
        "out_i = 0", "out_i = 0 / 0",
        {"empty": "nan"}, {"empty": "nan", "lse": "NaN where empty"}, evidence="pytorch#103963; burn#4697; rten#1321",
        needs="hidden pairs, softmax", prior=4,
    ),
    *mutants(
        "M13", "mean on a row that sees nothing", "A row without a visible key averages all values, as a finite fill does.",
        "out_i = 0", "out_i = mean of all v_j",
        *skipping({"empty": "mean"}), {"empty": "mean", "lse": "zero where empty"}, evidence="mlx#2395", needs="hidden pairs, softmax", prior=4,
    ),
    *mutants(
        "M13", "hidden scores of -1e9",
        "Hidden scores are a large negative number instead of minus infinity, so a row that sees nothing averages everything.",
        _HIDDEN, "s_ij = -1e9 where hidden",
        *skipping(*({"hidden": "filled", "fill": fill} for fill in (-1e9, -1e30, -1e10, -1e6, -1e8, -3.4028234663852886e38, -65504.0))),
        evidence="mlx#2395", needs="hidden pairs, softmax", prior=4,
    ),
    *mutants(
        "M15", "hidden scores of -1e4", "Hidden scores are -1e4, which real scores may be below.",
        _HIDDEN, "s_ij = -1e4 where hidden",
        *skipping(*({"hidden": "filled", "fill": fill} for fill in (-1e4, -1e5, -1e3))), needs="hidden pairs, softmax", prior=1,
    ),
    *mutants(
        "M14", "zero times NaN", "Hidden values are multiplied by a weight of zero instead of skipped, which NaN and infinity survive.",
        "out_i = sum over visible j of p_ij v_j", "out_i = sum over all j of p_ij v_j",
        {"pad_values": True}, evidence="pytorch#101967; FlashInfer 27906fdb; jax 11cf85de", needs="hidden pairs, NaN", prior=4,
    ),
    *mutants(
        "M15", "running maximum starts at a number", "The running maximum starts at a finite number, below which every weight vanishes.",
        "m = -inf before the first tile", "m = -5e4 before the first tile",
        *({"start": start} for start in (-5e4, -1e4, -1e5, -65504.0)), evidence="FlashInfer d7f2c646", needs="softmax", prior=1.5,
    ),
    *mutants(
        "M17", "masks that overflow together", "Every mask adds 0.7 times the least number: one of them is absorbed, two are minus infinity.",
        _HIDDEN, "s_ij = s_ij - 0.7 fmax - 0.7 fmax = -inf, and NaN on a row of them",
        *skipping({"hidden": "filled by each", "empty": "nan"}, {"hidden": "filled", "fill": -0.7 * 3.4028234663852886e38, "empty": "nan"}),
        evidence="jax be78ee0f", needs="hidden pairs, softmax",
    ),
    *mutants(
        "M18", "first tiles of a row hidden", "Where the first tiles of a row are hidden, minus infinity less minus infinity is NaN.",
        "shrink = exp(m_old - m_new), 0 where both are -inf", "shrink = exp(-inf - -inf) = NaN",
        *tiled(guarded=False), {"guarded": False}, evidence="xformers 540fcbfd, 63d7f30b", needs="hidden pairs, softmax", prior=3,
    ),
    *mutants(
        "M19", "tiny fill", "Hidden scores are about zero instead of minus infinity.",
        _HIDDEN, "s_ij = -1e-12 where hidden",
        *skipping({"hidden": "filled", "fill": -1e-12}), evidence="hyunwoongko/transformer#10", needs="hidden pairs",
    ),
    *mutants(
        "M20", "plus infinity for minus infinity", "Hidden scores are plus infinity.",
        _HIDDEN, "s_ij = +inf where hidden",
        *skipping({"hidden": "filled", "fill": math.inf}), evidence="lucidrains/memory-compressed-attention#2", needs="hidden pairs",
    ),
    *mutants(
        "M21", "soft-cap after the mask", "The mask is applied before the cap, which makes minus infinity finite.",
        "s_ij = -inf where hidden, after the cap", "s_ij = cap tanh(-inf / cap) = -cap where hidden",
        *skipping({"hidden": "before the cap"}), evidence="onnx fe30560b; FlashInfer f5f7a2a2; FlashAttention PR#1025",
        needs="hidden pairs, softcap", prior=4,
    ),
    *mutants(
        "M24", "scores multiplied by the mask", "Hidden scores become zero instead of minus infinity.",
        _HIDDEN, "s_ij = 0 where hidden",
        *skipping({"hidden": "multiplied"}, {"hidden": "filled", "fill": 0.0}, {"hidden": "multiplied", "hidden_first": True}),
        needs="hidden pairs", prior=2,
    ),
    *mutants(
        "W1", "window one key wider", "The window reaches one key further back.",
        _WINDOW, "j >= i + S - T - left - 1",
        {"window_left_offset": 1}, {"window_left_offset": 1, "window_right_offset": 1}, {"window_right_offset": 1},
        evidence="TransformerEngine c3b3cd21; HF#39408; vllm#3385", needs="window", prior=4,
    ),
    *mutants(
        "W1", "window one key narrower", "The window reaches one key less far back.",
        _WINDOW, "j >= i + S - T - left + 1",
        {"window_left_offset": -1}, {"window_left_offset": -1, "window_right_offset": -1}, {"window_right_offset": -1},
        evidence="HF#29623; zml#763", needs="window", prior=4,
    ),
    *mutants(
        "W2", "right side of the window open", "The window does not limit the future.",
        _WINDOW, "j >= i + S - T - left",
        {"window_right": "open"}, evidence="HF#39408", needs="window", prior=2,
    ),
    *mutants(
        "W2", "right side of the window closed", "The window hides every key of the future.",
        _WINDOW, "i + S - T - left <= j <= i + S - T",
        {"window_right": "closed"}, needs="window",
    ),
    *mutants(
        "W2", "open right side of the window taken for -1",
        "The number that stands for no bound is added as one, so that a query sees earlier keys only.",
        "i + S - T - left <= j", "i + S - T - left <= j <= i + S - T - 1",
        {"window_right": "-1 where open"}, evidence="FlashAttention hopper/test_util.py (reference)", needs="window",
    ),
    *mutants(
        "W2", "open right side of the window taken for 0", "A window without a right bound hides every key of the future.",
        "i + S - T - left <= j", "i + S - T - left <= j <= i + S - T",
        {"window_right": "0 where open"}, needs="window",
    ),
    *mutants(
        "W2", "open right side of the window taken for the left one", "A window without a right bound reaches as far forward as it does back.",
        "i + S - T - left <= j", "i + S - T - left <= j <= i + S - T + left",
        {"window_right": "left where open"}, needs="window",
    ),
    *mutants(
        "W3", "sides of the window exchanged", "Left and right change places.",
        _WINDOW, "i + S - T - right <= j <= i + S - T + left",
        {"window": "exchanged"}, needs="window", prior=2,
    ),
    *mutants(
        "W4", "window aligned with the first key", "The window is laid around key i instead of key i + S - T.",
        _WINDOW, "i - left <= j <= i + right",
        {"window": "top left"}, {"window": "top left", "window_right": "closed"},
        {"window": "top left", "window_right": "closed", "causal": "also top left"}, evidence="TransformerEngine 67bc399d", prior=3,
    ),
    *mutants(
        "W6", "tile at the window's edge skipped", "A tile of keys that the window begins inside of is left out.",
        _WINDOW, "j >= the first whole tile after i + S - T - left",
        *({"window_edge": tile} for tile in TILES), evidence="jax f15f9717", needs="window",
    ),
    *mutants(
        "H2", "causal bound rounded down", "The number of keys a query sees is rounded down to whole groups of heads or of a tile.",
        "ceil((i + S - T + 1) / G) G keys are looked at", "floor((i + S - T + 1) / G) G keys are seen",
        *({"causal_multiple": n, "causal_least": least} for n in (7, 2, 3, 4, 8, 16, 32) for least in (0, 1)),
        evidence="FlashInfer ff6808cc, 9b861cdb", needs="causal",
    ),
    *mutants(
        "W9", "window lost", "The window hides nothing.",
        _WINDOW, "every j",
        {"window": "never"}, evidence="HF#35924", needs="window", prior=3,
    ),
]  # fmt: skip

FAMILIES = [
    family(
        "W1", "window wider or narrower on the left", "The window reaches another number of keys back.",
        _WINDOW, "j >= i + S - T - left - n", "window_left_offset", values=[n for n in range(-4, 9) if n], needs="window", prior=1,
    ),
    family(
        "W1", "window wider or narrower on the right", "The window reaches another number of keys forward.",
        _WINDOW, "j <= i + S - T + right + n", "window_right_offset", values=[n for n in range(-4, 9) if n], needs="window",
    ),
    family(
        "M3", "causal edge displaced", "A query sees another number of keys than up to its own position.",
        _CAUSAL, "j <= i + S - T + n", "causal_offset", values=[n for n in range(-8, 9) if n], needs="causal", prior=1,
    ),
    family(
        "M15", "hidden scores of a number", "Hidden scores are a finite number.",
        _HIDDEN, "s_ij = f where hidden", "fill", bounds=(-200.0, 20.0), needs="hidden pairs", changes={"hidden": "filled"},
    ),
]  # fmt: skip
