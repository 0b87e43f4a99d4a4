"""How the specification is read: one field per decision that real kernels got wrong, each at what the specification says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Fields and values, so that they can be hashed.
Changes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Reading:
    """One way to read the specification; ``Reading()`` is the right one.

    The fields stand in the order in which `evaluation` comes to them.  Words say what is done instead; a field that a call gives no occasion
    for (no mask, no group of heads) changes nothing there.
    """

    # ---- operands
    remembered: str = ""  #: the operand or parameter that is an earlier call's
    layout: str = "strides"  #: "reshaped": heads and sequence change places without a transpose; "contiguous": strides are ignored
    folded_format: str = ""  #: in which queries are stored after they were multiplied by the scale
    lanes: int = 1  #: q, k and v are read in whole vectors of so many channels; narrower ones are read whole
    queries: str = "own"  #: "batch 0"
    keys: str = "own"  #: "batch 0", "values", "queries", "one late" (row j - 1 for row j), "one early", "backwards"
    values: str = "own"  #: "batch 0", "keys", "one late", "one early", "width of keys"
    store: int = 0  #: programs of so many output channels all write to channel 0 on
    store_last: bool = True  #: whether the last of them wins, or the second one with zeros after it
    operand_biases: bool = True  #: whether projections add theirs
    output_bias: bool = True
    # ---- heads
    heads: str = "grouped"  #: key-value head of query head h: "tiled" (h mod Hkv), "first", "reversed", "query stride", "time repeated"
    key_heads: bool = True  #: whether keys are read by that map
    value_heads: bool = True  #: whether values are
    # ---- scores
    hidden_layer: str = "tanh"  #: of additive scores: "linear", "product" for the sum, "no bias", "product, no bias"
    parts: str = "queries first"  #: of a concatenated map: "keys first"
    norms: str = "both"  #: of a cosine: "queries", "keys", "none"
    form: str = "given"  #: the matrix of a bilinear form: "identity", "transposed" where it is square
    arrays_format: str = ""  #: in which every array on the way is stored: products, scores after each step, weights
    products_format: str = ""  #: in which products are summed, channel by channel
    scale: str = "given"  #: what q . k is multiplied by: see `evaluation.scale`
    scale_factor: float = 1.0
    shift: str = "given"  #: "none", "queries" (-log T), "negated"
    cap: str = "given"  #: "dropped", "score times tanh", "not multiplied", "unscaled", "clipped"
    cap_factor: float = 1.0
    #: "before the scale", "before the cap"; ALiBi's "even slopes", "interleaved slopes"; or that of "batch 0", "head 0", "key-value head",
    #: "heads tiled", "transposed"
    bias: str = "given"
    bias_factor: float = 1.0
    # ---- visible pairs
    causal: str = "given"  #: "bottom right", "top left", "top left but for the last query", "also top left", "never", "always"
    causal_window: bool = True  #: whether a window moves with the alignment
    causal_multiple: int = 1  #: the number of keys seen is rounded down to a multiple of it
    causal_least: int = 0  #: but not below
    causal_offset: int = 0  #: so many keys more of the future
    window: str = "given"  #: "never", "exchanged", "top left"
    window_edge: int = 0  #: tiles of so many keys are skipped where the window begins inside them
    window_right: str = "given"  #: "open", "closed"; "-1", "0" or "left", "... where open"
    window_left_offset: int = 0
    window_right_offset: int = 0
    lost_without_mask: str = ""  #: what hides nothing unless there is a mask: "causal", "window", "causal, window"
    mask: str = "given"  #: "never", "inverted", "added"; or that of "batch 0", "head 0", "key-value head", "heads tiled", "transposed"
    #: what is done about a hidden score: "filled" with `fill`, "before the cap", "multiplied" by 0, "added" as 0 and 1,
    #: "filled by each" mask that hides it
    hidden: str = "skipped"
    hidden_first: bool = False  #: whether "multiplied" and "added" come before cap and bias
    fill: float = -math.inf
    unseen: str = "given"  #: values that no query sees: "zero"
    pad_values: bool = False  #: hidden values are multiplied by zero, which NaN survives
    scores_format: str = ""  #: in which scores are stored
    # ---- normaliser
    axis: str = "given"  #: that weights sum to one along: "keys", "queries", "heads", "batch"
    function: str = "given"  #: of the weights: see `evaluation.weights_of`
    tile: int = 0  #: keys per step; 0 for the whole row
    order: str = "all"  #: which tiles: "whole tiles", "whole tiles or one", "no first", "no first of many", "no last", "queries' extent"
    padding: str = ""  #: score of lanes beyond the last key, where they count: "zero", "least" finite number
    padding_value: float = 0.0  #: what stands for values there
    start: float = -math.inf  #: of the running maximum
    maximum: bool = True  #: whether it is subtracted
    guarded: bool = True  #: whether -inf less -inf is caught
    rescaled: str = "both"  #: what shrinks when the maximum grows: "sum", "accumulator", "neither"
    distance_format: str = ""  #: in which scores less the maximum, that of keys and sink, are stored
    base: str = "e"  #: "2": exp2 without log2(e); "2 keys": of keys only, sinks with e; "e log2": log2(e) twice
    neighbour: bool = False  #: the sum of every other row includes the next one's
    weights_format: str = ""
    sums_format: str = ""  #: in which sum and accumulator are kept from tile to tile
    # ---- sink
    #: "dropped", "number", "number unshifted", "base 2", "base 2 sum" (only of the sum), "not in the maximum", "not in the maximum, unguarded",
    #: "scaled", "capped", "in every tile"
    sink: str = "given"
    sink_head: str = "own"  #: "before", "next", "first", "key-value head", "reversed"
    sink_factor: float = 1.0
    sink_offset: float = 0.0
    # ---- output
    denominator: str = "sum"  #: "none", "keys", "visible keys", "largest", "queries"
    empty: str = "given"  #: what a row without weight returns: "nan", "mean", "nan without keys"
    residual: bool = True
    averaged: str = "values"  #: what cosine attention averages: "unit vectors"
    #: "base 2", "base 2 sum" (only of the sum), "no maximum", "no scale", "maximum", "no sink", "of the rows", "zero"; "... where empty"
    lse: str = "given"
    lse_head: str = "own"  #: "before", "next", "first"
    threshold: str = "given"  #: "less the maximum", "doubled"
    # ---- backward
    recomputed: Changes = ()  #: fields that the backward pass reads otherwise when it recomputes rows, scores and weights
    d_lse_read: str = "natural"  #: "base 2": the lse of the forward pass is taken for one in base 2
    d_stuck: str = ""  #: rows whose "delta", or "lse and delta", is that of row i mod `d_tile`; "... of the first row" of the tile instead
    d_tile: int = 16  #: rows of queries and keys per step of the backward pass
    d_queries: str = "all"  #: tiles of queries that count: as `order`
    d_keys: str = "all"  #: tiles of keys that count
    d_stored: str = "added"  #: "last": every tile stores its part over the others'; "last for queries", "last for keys"
    d_channels: int = 0  #: how many value channels the weights' gradient is summed over; 0 for all
    d_group: str = "sum"  #: of a key's gradient over its query heads: "last", "first", "mean", "tiled"
    d_out: str = "strides"  #: "contiguous": its memory is read in C order
    d_cap: str = "slope"  #: of the soft-cap: "none", "not squared"
    d_scale: str = "both"  #: "queries" only, "keys" only, "neither"
    d_factor: float = 1.0  #: of d_q and d_k
    d_q_factor: float = 1.0
    d_k_factor: float = 1.0
    delta: str = "given"  #: the row's sum of d_out * out: "none", "negated", "unnormalised", "twice", "for every part" of `d_part` channels
    d_part: int = 8
    d_product: str = "scores"  #: what d_k is a product of: "weights" for the gradient of the scores
    d_bias: str = "reduced"  #: over broadcast axes: "first", "mean", "first head" (of batches and heads), "scaled"
    d_bias_factor: float = 1.0
    d_sink: str = "given"  #: "zero", "negated"
    d_lse: str = "given"  #: its cotangent: "ignored", "negated", "ignored by scores", "negated by scores", "ignored by sinks"
    d_empty: str = "zero"  #: on rows that see nothing: "nan" scores' gradient, "nan weights"


RIGHT = Reading()


def combine(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Both changes together, or None where they give one field two values."""
    if any(other[name] != value for name, value in one.items() if name in other):
        return None
    return {**one, **other}
