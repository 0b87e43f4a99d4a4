"""How a score comes about: similarity, scale, soft-cap, bias."""

from __future__ import annotations

from .listing import family, mutants

_SCALED = "s_ij = scale q_i . k_j"

MUTANTS = [
    *mutants(
        "S1", "scale omitted", "Products are not multiplied by 1/sqrt(D), so the weights are too peaked.",
        "s_ij = q_i . k_j / sqrt(D)", "s_ij = q_i . k_j",
        {"scale": "omitted"}, evidence="FLA 3422c449", needs="default scale, dot", prior=4,
    ),
    *mutants(
        "S2", "multiplied by the root of D", "Products are multiplied by sqrt(D) instead of divided by it.",
        "s_ij = q_i . k_j / sqrt(D)", "s_ij = q_i . k_j sqrt(D)",
        {"scale": "root"}, evidence="AI-Hypercomputer/maxtext#1370", needs="default scale, dot", prior=2,
    ),
    *mutants(
        "S3", "root of the value width", "The scale is taken from the width of the values instead of the queries'.",
        "s_ij = q_i . k_j / sqrt(D)", "s_ij = q_i . k_j / sqrt(E)",
        {"scale": "value width"}, evidence="ollama#13893", needs="default scale, dot, D!=E", prior=2,
    ),
    *mutants(
        "S3", "root of the model width", "The scale is taken from the width of all heads together.",
        "s_ij = q_i . k_j / sqrt(D)", "s_ij = q_i . k_j / sqrt(Hq D)",
        {"scale": "model width"}, {"scale": "key-value model width"}, evidence="Megatron-LM#1501", needs="default scale, dot", prior=3,
    ),
    *mutants(
        "S3", "root of a padded width", "The scale is taken from the width that rows are padded to.",
        "s_ij = q_i . k_j / sqrt(D)", "s_ij = q_i . k_j / sqrt(padded D)",
        *({"scale": f"padded to {n}"} for n in ("a power of two", 16, 32, 64, 8, 128)), needs="default scale, dot",
    ),
    *mutants(
        "S4", "user's scale ignored", "The scale that was given is not used: 1/sqrt(D) stands in the kernel.",
        _SCALED, "s_ij = q_i . k_j / sqrt(D)",
        {"scale": "default always"}, evidence="FlashInfer fc62e3f2", needs="dot", prior=2,
    ),
    *mutants(
        "S8", "scale applied twice", "Queries are scaled before the kernel scales the products.",
        _SCALED, "s_ij = scale^2 q_i . k_j",
        {"scale": "squared"}, evidence="jax 916e53a8; Megatron-LM PR#848", needs="dot", prior=2,
    ),
    *mutants(
        "S13", "keys shifted by one", "Key j is read from a neighbouring row, so scores belong to other values.",
        _SCALED, "s_ij = scale q_i . k_(j-1)",
        {"keys": "one late"}, {"keys": "one early"},
    ),
    *mutants(
        "S13", "keys backwards", "Keys are read from the last to the first.",
        _SCALED, "s_ij = scale q_i . k_(S-1-j)",
        {"keys": "backwards"}, prior=0.3,
    ),
    *mutants(
        "P5", "bias before the scale", "The bias is added to the products before they are scaled.",
        "s_ij = scale q_i . k_j + bias_ij", "s_ij = scale (q_i . k_j + bias_ij)",
        {"bias": "before the scale"}, evidence="TransformerEngine b6020e3b", needs="bias", prior=2,
    ),
    *mutants(
        "P5", "bias added twice", "The bias counts twice.",
        "s_ij = scale q_i . k_j + bias_ij", "s_ij = scale q_i . k_j + 2 bias_ij",
        {"bias_factor": 2.0}, evidence="TransformerEngine b6020e3b", needs="bias",
    ),
    *mutants(
        "P5", "bias before the soft-cap", "The bias is added before the cap, which bounds it too.",
        "s_ij = cap tanh(scale q_i . k_j / cap) + bias_ij", "s_ij = cap tanh((scale q_i . k_j + bias_ij) / cap)",
        {"bias": "before the cap"}, needs="bias, softcap",
    ),
    *mutants(
        "P1", "slopes of ALiBi as one geometric sequence",
        "Slopes are 2^(-8h/H) for every number of heads; published ones are those of a power of two, filled up with every second of twice as many.",
        "m_h of 2^(-8h/n), n the power of two below H, then every second of 2n", "m_h = 2^(-8h/H)",
        {"bias": "even slopes"}, evidence="mlx#343; TensorRT-LLM#1611; attention-gym", needs="bias, Hq>1", prior=0.7,
    ),
    *mutants(
        "P1", "slopes of ALiBi filled up", "Slopes are those of a power of two of heads, filled up, where one geometric sequence is meant.",
        "m_h = 2^(-8h/H)", "m_h of 2^(-8h/n), n the power of two below H, then every second of 2n",
        {"bias": "interleaved slopes"}, evidence="Baichuan2#225", needs="bias, Hq>1", prior=0.3,
    ),
    *mutants(
        "P3", "sign of the bias", "The bias is subtracted.",
        "s_ij = scale q_i . k_j + bias_ij", "s_ij = scale q_i . k_j - bias_ij",
        {"bias_factor": -1.0}, evidence="x-transformers 4ed4d0a", needs="bias",
    ),
    *mutants(
        "P5", "bias ignored", "The bias is not added.",
        "s_ij = scale q_i . k_j + bias_ij", "s_ij = scale q_i . k_j",
        {"bias_factor": 0.0}, needs="bias",
    ),
    *mutants(
        "P7", "bias of the key-value head", "The bias is indexed by the key-value head instead of the query head.",
        "s_hij = ... + bias_hij", "s_hij = ... + bias_(h // G)ij",
        {"bias": "key-value head"}, {"bias": "heads tiled"}, needs="bias, Hq>Hkv",
    ),
    *mutants(
        "M8", "bias of batch 0", "Every batch gets the bias of the first.",
        "s_bhij = ... + bias_bhij", "s_bhij = ... + bias_0hij",
        {"bias": "batch 0"}, evidence="x-transformers d41cffd", needs="bias, B>1",
    ),
    *mutants(
        "M8", "bias of head 0", "Every head gets the bias of the first.",
        "s_bhij = ... + bias_bhij", "s_bhij = ... + bias_b0ij",
        {"bias": "head 0"}, needs="bias, Hq>1",
    ),
    *mutants(
        "M8", "bias transposed", "The bias is read with queries and keys exchanged.",
        "s_ij = ... + bias_ij", "s_ij = ... + bias_ji",
        {"bias": "transposed"}, needs="bias", prior=0.5,
    ),
    *mutants(
        "X12", "soft-cap dropped", "Scores are not capped.",
        "s = cap tanh(s / cap)", "s = s",
        {"cap": "dropped"}, evidence="sglang#33915; vllm-metal#665; FlashAttention 72e27c63", needs="softcap", prior=3,
    ),
    *mutants(
        "X13", "scores times tanh", "The score instead of the cap is multiplied with the tanh.",
        "s = cap tanh(s / cap)", "s = s tanh(s / cap)",
        {"cap": "score times tanh"}, evidence="FlashAttention 14f3627d", needs="softcap",
    ),
    *mutants(
        "X13", "no final multiplication", "The tanh is not multiplied by the cap.",
        "s = cap tanh(s / cap)", "s = tanh(s / cap)",
        {"cap": "not multiplied"}, needs="softcap",
    ),
    *mutants(
        "X13", "scores clipped", "Scores are cut off at the cap instead of bent towards it.",
        "s = cap tanh(s / cap)", "s = min(max(s, -cap), cap)",
        {"cap": "clipped"}, needs="softcap", prior=0.5,
    ),
    *mutants(
        "X14", "cap on unscaled scores", "The cap bounds the products before they are scaled.",
        "s = cap tanh(scale q . k / cap)", "s = scale cap tanh(q . k / cap)",
        {"cap": "unscaled"}, needs="softcap, dot",
    ),
    *mutants(
        "Y1", "hidden layer without tanh", "The score network is linear.",
        "s_ij = w . tanh(a_i + b_j)", "s_ij = w . (a_i + b_j)",
        {"hidden_layer": "linear"}, needs="additive",
    ),
    *mutants(
        "Y1", "hidden layer without tanh", "The score network is linear.",
        "s_ij = w . tanh(W [q_i; k_j])", "s_ij = w . W [q_i; k_j]",
        {"hidden_layer": "linear"}, needs="concat",
    ),
    *mutants(
        "Y1", "product for sum in the hidden layer", "The two maps are multiplied instead of added.",
        "s_ij = w . tanh(a_i + b_j)", "s_ij = w . tanh(a_i b_j)",
        {"hidden_layer": "product"}, {"hidden_layer": "product, no bias"}, needs="additive", prior=0.5,
    ),
    *mutants(
        "Y1", "bias of the hidden layer dropped", "The hidden layer's bias is not added.",
        "s_ij = w . tanh(a_i + b_j + b)", "s_ij = w . tanh(a_i + b_j)",
        {"hidden_layer": "no bias"}, needs="additive, b",
    ),
    *mutants(
        "Y1", "keys first in the concatenation", "The map's first columns are applied to the keys.",
        "s_ij = w . tanh(W [q_i; k_j])", "s_ij = w . tanh(W [k_j; q_i])",
        {"parts": "keys first"}, needs="concat",
    ),
    *mutants(
        "Y1", "map left out", "Queries meet keys without the map between them.",
        "s_ij = q_i . W k_j", "s_ij = q_i . k_j",
        {"form": "identity"}, needs="bilinear",
    ),
    *mutants(
        "Y1", "map transposed", "The map is applied to the queries' side as if it were the keys'.",
        "s_ij = q_i . W k_j", "s_ij = q_i . W^T k_j",
        {"form": "transposed"}, needs="bilinear",
    ),
    *mutants(
        "Y1", "one side not normalised", "Only one of the two vectors of a cosine is divided by its length.",
        "s_ij = v_i . v_j / (|v_i| |v_j|)", "s_ij = v_i . v_j / |v_i|",
        {"norms": "queries"}, {"norms": "keys"}, needs="cosine",
    ),
    *mutants(
        "Y1", "inner product for cosine", "Vectors are not divided by their lengths.",
        "s_ij = v_i . v_j / (|v_i| |v_j|)", "s_ij = v_i . v_j",
        {"norms": "none"}, needs="cosine",
    ),
    *mutants(
        "Y1", "unit vectors averaged", "The normalised vectors are averaged instead of the tokens themselves.",
        "out_i = v_i + sum_j p_ij v_j", "out_i = v_i + sum_j p_ij v_j / |v_j|",
        {"averaged": "unit vectors"}, needs="cosine",
    ),
    *mutants(
        "Y1", "residual left out", "The token itself is not added to the output.",
        "out_i = v_i + sum_j p_ij v_j", "out_i = sum_j p_ij v_j",
        {"residual": False}, needs="residual",
    ),
    *mutants(
        "Y1", "biases of the projections dropped", "Projections multiply only.",
        "q = x W + b", "q = x W",
        {"operand_biases": False, "output_bias": False}, {"operand_biases": False}, needs="projections",
    ),
    *mutants(
        "Y1", "bias of the output projection dropped", "The output projection multiplies only.",
        "out = concat(heads) W_o + b_o", "out = concat(heads) W_o",
        {"output_bias": False}, needs="projections, b_o",
    ),
]  # fmt: skip

FAMILIES = [
    family(
        "S3", "scale off by a factor", "Products are multiplied by another number than the scale.",
        _SCALED, "s_ij = f scale q_i . k_j", "scale_factor", bounds=(1e-3, 1e3), logarithmic=True, needs="", prior=1,
    ),
    family(
        "P5", "bias off by a factor", "The bias counts more or less than once.",
        "s_ij = scale q_i . k_j + bias_ij", "s_ij = scale q_i . k_j + f bias_ij", "bias_factor", bounds=(-8.0, 8.0), needs="bias",
    ),
    family(
        "X14", "cap off by a factor", "Scores are capped at another number.",
        "s = cap tanh(s / cap)", "s = f cap tanh(s / (f cap))", "cap_factor", bounds=(1e-2, 1e2), logarithmic=True, needs="softcap",
    ),
]  # fmt: skip
