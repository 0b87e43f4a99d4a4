"""Where numbers are kept in too narrow a format."""

from __future__ import annotations

from .listing import mutants

_TILED_FORMATS = [{"sums_format": form, "tile": tile} for form in ("float16", "bfloat16") for tile in (16, 32, 64, 8, 128, 4)]

MUTANTS = [
    *mutants(
        "S9", "scale folded into narrow queries", "Queries are multiplied by the scale and stored in a narrow format before they meet the keys.",
        "s_ij = scale (q_i . k_j)", "s_ij = round(scale q_i) . k_j",
        {"folded_format": "bfloat16"}, {"folded_format": "float16"}, evidence="MLX 4c86c1e5", needs="dot", prior=0.5,
    ),
    *mutants(
        "N1", "scores summed in float16", "Products of queries and keys are summed in float16, which rounds and overflows at 65504.",
        "q . k in float32", "q . k in float16",
        {"products_format": "float16"}, evidence="FlashInfer 6e3ea8fc; arXiv:2503.01873", needs="dot", prior=0.5,
    ),
    *mutants(
        "N1", "scores summed in bfloat16", "Products of queries and keys are summed in bfloat16.",
        "q . k in float32", "q . k in bfloat16",
        {"products_format": "bfloat16"}, needs="dot", prior=0.3,
    ),
    *mutants(
        "N2", "scores stored in float16", "Scores go through float16 before the softmax.",
        "s in float32", "s in float16",
        {"scores_format": "float16"}, {"arrays_format": "float16"}, needs="softmax", prior=0.5,
    ),
    *mutants(
        "N2", "scores stored in bfloat16", "Scores go through bfloat16 before the softmax.",
        "s in float32", "s in bfloat16",
        {"scores_format": "bfloat16"}, {"arrays_format": "bfloat16"}, needs="softmax", prior=0.5,
    ),
    *mutants(
        "N4", "softmax in a narrow format", "Scores less the maximum, and weights, are stored in float16 or bfloat16, as the scores are.",
        "s - m, p in float32", "s - m, p in float16 or bfloat16",
        *({"arrays_format": form, "distance_format": form} for form in ("bfloat16", "float16")),
        evidence="transformers, eager attention of gpt_oss and deepseek_v4", needs="softmax", prior=0.3,
    ),
    *mutants(
        "N4", "sums gathered in a narrow format", "Sum and output are kept in float16 or bfloat16 from tile to tile.",
        "l, acc in float32", "l, acc in float16 or bfloat16",
        *_TILED_FORMATS, needs="softmax", prior=0.5,
    ),
    *mutants(
        "X16", "weights in float8", "Weights go through float8 without a scale, so that small ones vanish.",
        "p in bfloat16", "p in float8",
        *({"weights_format": form, "tile": tile} for form in ("float8_e4m3fn", "float8_e5m2") for tile in (0, 16, 32, 64, 128, 8)),
        evidence="arXiv:2606.06521", needs="softmax", prior=0.3,
    ),
    *mutants(
        "X16", "weights in bfloat16", "Weights go through bfloat16 in a kernel of wider operands.",
        "p in float32", "p in bfloat16",
        {"weights_format": "bfloat16"}, {"weights_format": "float16"}, needs="softmax", prior=0.4,
    ),
]  # fmt: skip

FAMILIES = []  # type: ignore[var-annotated]
