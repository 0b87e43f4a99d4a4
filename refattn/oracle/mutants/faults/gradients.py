"""The backward pass."""

from __future__ import annotations

import math

from .listing import family, mutants

_KEYS = "d_k_g = scale sum over heads h of group g of d_s_h^T q_h"
_DS = "d_s = p (d_p - delta)"
_N = "gradients, dot, "
_TILES = (16, 32, 64, 8, 128, 4)


def _again(**fields: object) -> dict[str, object]:
    """A reading of the backward pass alone."""
    return {"recomputed": tuple(sorted(fields.items()))}


MUTANTS = [
    *mutants(
        "M5", "backward without causal mask and window", "The backward pass recomputes weights without hiding anything by position.",
        "p_ij = 0 where hidden", "p_ij = exp(s_ij - lse_i) everywhere",
        _again(causal="never", window="never"), _again(causal="never", window="never", mask="never"), _again(causal="never"), _again(window="never"),
        evidence="triton#5660", needs=_N + "softmax, hidden pairs", prior=2,
    ),
    *mutants(
        "M5", "backward without the mask", "The backward pass recomputes weights without the mask operand.",
        "p_ij = 0 where mask_ij is false", "p_ij = exp(s_ij - lse_i)",
        _again(mask="never"), evidence="triton#5660", needs=_N + "softmax, mask", prior=1,
    ),
    *mutants(
        "M5", "backward always causal", "The backward pass hides the future although the forward pass does not.",
        "p_ij for every visible j", "p_ij for j <= i + S - T only",
        _again(causal="always"), evidence="triton#4541, #7216", needs=_N + "softmax", prior=2,
    ),
    *mutants(
        "M1", "backward aligned with the first key", "The backward pass aligns the causal mask with the first key.",
        "j <= i + S - T", "j <= i",
        _again(causal="top left"), _again(causal="top left", causal_window=False), evidence="FlashAttention 9e5e8bc9",
        needs=_N + "softmax, causal, T!=S", prior=1,
    ),
    *mutants(
        "M1", "backward aligned with the last key", "The backward pass aligns the causal mask with the last key.",
        "j <= i", "j <= i + S - T",
        _again(causal="bottom right"), _again(causal="bottom right", causal_window=False), needs=_N + "softmax, causal, T!=S", prior=1,
    ),
    *mutants(
        "M3", "backward's causal edge displaced", "In the backward pass a query sees one key more or fewer than in the forward pass.",
        "j <= i + S - T", "j <= i + S - T +- 1",
        _again(causal_offset=1), _again(causal_offset=-1), needs=_N + "softmax, causal",
    ),
    *mutants(
        "W1", "backward's window one key wider or narrower", "In the backward pass the window has another bound than in the forward pass.",
        "j >= i + S - T - left", "j >= i + S - T - left +- 1",
        _again(window_left_offset=1), _again(window_left_offset=-1), _again(window_right_offset=1), _again(window_right_offset=-1),
        _again(window_left_offset=1, window_right_offset=1), needs=_N + "softmax, window",
    ),
    *mutants(
        "H1", "heads tiled in the backward pass", "The backward pass reads key-value head h mod Hkv for query head h.",
        "query head h reads key-value head h // G", "query head h reads key-value head h mod Hkv",
        _again(heads="tiled"), needs=_N + "Hq>Hkv, Hkv>1", prior=1,
    ),
    *mutants(
        "X12", "soft-cap left out of the recomputed scores", "The backward pass recomputes scores without the soft-cap.",
        "p_ij = exp(cap tanh(s_ij / cap) - lse_i)", "p_ij = exp(s_ij - lse_i)",
        {**_again(cap="dropped"), "d_cap": "none"}, _again(cap="dropped"), needs=_N + "softmax, softcap",
    ),
    *mutants(
        "P5", "bias left out of the recomputed scores", "The backward pass recomputes scores without the bias.",
        "p_ij = exp(s_ij + bias_ij - lse_i)", "p_ij = exp(s_ij - lse_i)",
        _again(bias_factor=0.0), needs=_N + "softmax, bias",
    ),
    *mutants(
        "L1", "lse in base 2 read as natural", "The backward pass subtracts a natural lse where exp2 needs one in base 2.",
        "p_ij = 2^(s_ij log2(e) - lse_i log2(e))", "p_ij = 2^(s_ij log2(e) - lse_i)",
        {"d_lse_read": "base 2"}, needs=_N + "softmax", prior=1,
    ),
    *mutants(
        "H4", "last head of the group", "Gradients of keys and values are overwritten by each query head of the group.",
        _KEYS, "d_k_g = that of the last head of group g",
        {"d_group": "last"}, {"d_group": "first"}, evidence="levanter#449; NATTEN a407b197 (reference)", needs=_N + "Hq>Hkv", prior=2,
    ),
    *mutants(
        "H4", "mean over the group", "Gradients of keys and values are averaged over the query heads of a group.",
        _KEYS, "d_k_g = mean over heads h of group g",
        {"d_group": "mean"}, evidence="levanter#449", needs=_N + "Hq>Hkv", prior=2,
    ),
    *mutants(
        "H5", "groups tiled in the backward pass", "Gradients of query heads are dealt to key-value heads by h mod Hkv.",
        _KEYS, "d_k_g = sum over heads h with h mod Hkv = g",
        {"d_group": "tiled"}, evidence="XunhaoLai/native-sparse-attention-triton#27", needs=_N + "Hq>Hkv", prior=2,
    ),
    *mutants(
        "H9", "strides of d_out ignored", "A cotangent that is not contiguous is read as if it were.",
        "d_out at its strides", "d_out in the order of memory",
        {"d_out": "contiguous"}, evidence="FlashAttention 88c4e5db, 9ee0ff1d; xformers c733c992", needs=_N + "strided d_out", prior=2,
    ),
    *mutants(
        "B1", "lse and delta of the first tile", "Rows beyond the first tile take lse and delta of a row of the first, or of their tile's first row.",
        "lse_i, delta_i", "lse_(i mod tile), delta_(i mod tile)",
        *({"d_stuck": stuck, "d_tile": tile} for stuck in ("lse and delta", "lse and delta of the first row", "delta",
        "delta of the first row") for tile in _TILES),
        evidence="FlashAttention b3f1b6a5", needs=_N + "softmax",
    ),
    *mutants(
        "B2", "weights for their gradient in d_k", "The wrong fragment is multiplied: weights instead of their gradients.",
        "d_k = d_s^T q", "d_k = p^T q",
        {"d_product": "weights"}, evidence="FlashAttention 10846960", needs=_N,
    ),
    *mutants(
        "B3", "soft-cap without slope", "The backward pass leaves out the derivative of the soft-cap.",
        "d_raw = (1 - tanh^2) d_s", "d_raw = d_s",
        {"d_cap": "none"}, evidence="FlashAttention 14f3627d, 9192248e", needs=_N + "softcap", prior=3,
    ),
    *mutants(
        "B3", "slope of the soft-cap not squared", "The derivative of the soft-cap lacks the square.",
        "d_raw = (1 - tanh^2) d_s", "d_raw = (1 - |tanh|) d_s",
        {"d_cap": "not squared"}, needs=_N + "softcap", prior=0.5,
    ),
    *mutants(
        "B5", "scale missing in d_q", "The gradient of the queries is not multiplied by the scale.",
        "d_q = scale d_s k", "d_q = d_s k",
        {"d_scale": "keys"}, evidence="FlashAttention PR#2657", needs=_N, prior=2,
    ),
    *mutants(
        "B5", "scale missing in d_k", "The gradient of the keys is not multiplied by the scale.",
        "d_k = scale d_s^T q", "d_k = d_s^T q",
        {"d_scale": "queries"}, evidence="FlashAttention PR#2657", needs=_N, prior=2,
    ),
    *mutants(
        "B5", "scale missing in both", "Gradients of queries and keys are not multiplied by the scale.",
        "d_q = scale d_s k, d_k = scale d_s^T q", "d_q = d_s k, d_k = d_s^T q",
        {"d_scale": "neither"}, needs=_N,
    ),
    *mutants(
        "B5", "ln 2 left in the gradient", "Gradients of queries or keys carry the factor of the change of base.",
        "d_q = scale d_s k", "d_q = scale ln(2) d_s k",
        *({field: value} for value in (math.log(2.0), 1.0 / math.log(2.0)) for field in ("d_factor", "d_q_factor", "d_k_factor")), needs=_N, prior=1,
    ),
    *mutants(
        "B6", "delta missing", "The row's sum is not subtracted.",
        _DS, "d_s = p d_p",
        {"delta": "none"}, needs=_N + "softmax", prior=2,
    ),
    *mutants(
        "B6", "delta of the wrong sign", "The row's sum is added instead of subtracted.",
        _DS, "d_s = p (d_p + delta)",
        {"delta": "negated"}, needs=_N + "softmax",
    ),
    *mutants(
        "B6", "delta of the output before division", "The row's sum is taken of the output that was not divided yet.",
        "delta_i = d_out_i . out_i", "delta_i = d_out_i . (l_i out_i)",
        {"delta": "unnormalised"}, needs=_N + "softmax",
    ),
    *mutants(
        "B7", "delta for every part of the values", "Every program of some value channels subtracts the whole delta.",
        _DS, "d_s = p (d_p - n delta), n parts of the channels",
        *({"delta": "for every part", "d_part": part} for part in (8, 16, 32, 64, 128)), {"delta": "twice"},
        evidence="FLA 2cec2a33, e4c7f880", needs=_N + "softmax",
    ),
    *mutants(
        "B7", "weights' gradient of the first channels", "Only the first value channels enter the gradient of the weights.",
        "d_p_ij = sum over channels c of d_out_ic v_jc", "d_p_ij = sum over the first channels",
        *({"d_channels": channels} for channels in (8, 16, 32, 64, 128)), evidence="FLA 2cec2a33, e4c7f880", needs=_N,
    ),
    *mutants(
        "B8", "bias gradient of the first only", "Along an axis the bias is broadcast over, only the first entry counts.",
        "d_bias summed over broadcast axes", "d_bias of entry 0",
        {"d_bias": "first"}, {"d_bias": "first head"}, evidence="jax b7e26ba3, ab9fc2d8", needs=_N + "bias",
    ),
    *mutants(
        "B8", "bias gradient averaged", "Along an axis the bias is broadcast over, the mean is taken.",
        "d_bias summed over broadcast axes", "d_bias averaged",
        {"d_bias": "mean"}, needs=_N + "bias",
    ),
    *mutants(
        "B8", "bias gradient scaled", "The gradient of the bias is multiplied by the scale.",
        "d_bias = d_s", "d_bias = scale d_s",
        {"d_bias": "scaled"}, needs=_N + "bias",
    ),
    *mutants(
        "B12", "NaN gradient on a row that sees nothing", "The gradient goes through the branch that was masked away.",
        "d_s = 0 where hidden", "d_s = exp(-inf - -inf) d_p = NaN",
        {"d_empty": "nan weights"}, {"d_empty": "nan"}, evidence="jax a282d586", needs=_N + "hidden pairs, softmax", prior=2,
    ),
    *mutants(
        "B13", "sink without gradient", "The gradient of the sinks is zero.",
        "d_sink = -sum_i p_sink delta_i", "d_sink = 0",
        {"d_sink": "zero"}, evidence="TransformerEngine PR#3551", needs=_N + "sinks", prior=2,
    ),
    *mutants(
        "B13", "sink gradient negated", "The gradient of the sinks has the other sign.",
        "d_sink = -sum_i p_sink delta_i", "d_sink = sum_i p_sink delta_i",
        {"d_sink": "negated"}, needs=_N + "sinks",
    ),
    *mutants(
        "L8", "cotangent of lse ignored", "Gradients leave out what comes through the log-sum-exp.",
        "d_s = p (d_p - delta + d_lse)", _DS,
        {"d_lse": "ignored"}, {"d_lse": "ignored by scores"}, {"d_lse": "ignored by sinks"}, evidence="MLX da38f3ea; NATTEN 51e7bc1",
        needs=_N + "softmax, d_lse",
    ),
    *mutants(
        "L8", "cotangent of lse negated", "What comes through the log-sum-exp has the other sign.",
        "d_s = p (d_p - delta + d_lse)", "d_s = p (d_p - delta - d_lse)",
        {"d_lse": "negated"}, {"d_lse": "negated by scores"}, needs=_N + "softmax, d_lse",
    ),
    *mutants(
        "T2", "tile of queries dropped in the backward pass", "The last partial or the first tile of queries takes no part in the backward pass.",
        "gradients of every row", "gradients of whole tiles of rows",
        *({"d_queries": order, "d_tile": tile} for order in ("whole tiles or one", "whole tiles", "no first", "no last") for tile in _TILES),
        evidence="FlashAttention a4f148b6, c65b5106", needs=_N, prior=2,
    ),
    *mutants(
        "T4", "tile of keys dropped in the backward pass", "The last partial or the first tile of keys takes no part in the backward pass.",
        "gradients of every key", "gradients of whole tiles of keys",
        *({"d_keys": order, "d_tile": tile} for order in ("whole tiles or one", "whole tiles", "no first", "no last") for tile in _TILES), needs=_N,
    ),
    *mutants(
        "R7", "tiles store over one another", "Every tile stores its part of a gradient instead of adding it.",
        "d_q = sum over tiles", "d_q of the last tile",
        *({"d_stored": which, "d_tile": tile} for which in ("last", "last for queries", "last for keys") for tile in _TILES),
        evidence="FLA 5659576e, 2cec2a33", needs=_N,
    ),
]  # fmt: skip

FAMILIES = [
    family(
        "B5", "gradients off by a factor", "Gradients of queries and keys are multiplied by a number.",
        "d_q = scale d_s k", "d_q = f scale d_s k", "d_factor", bounds=(1e-3, 1e3), logarithmic=True, needs=_N,
    ),
    family(
        "B5", "gradient of queries off by a factor", "The gradient of the queries is multiplied by a number.",
        "d_q = scale d_s k", "d_q = f scale d_s k", "d_q_factor", bounds=(1e-3, 1e3), logarithmic=True, needs=_N,
    ),
    family(
        "B5", "gradient of keys off by a factor", "The gradient of the keys is multiplied by a number.",
        "d_k = scale d_s^T q", "d_k = f scale d_s^T q", "d_k_factor", bounds=(1e-3, 1e3), logarithmic=True, needs=_N,
    ),
    family(
        "B8", "bias gradient off by a factor", "The gradient of the bias is multiplied by a number.",
        "d_bias = d_s", "d_bias = f d_s", "d_bias_factor", bounds=(-16.0, 16.0), needs=_N + "bias",
    ),
]  # fmt: skip
