"""How scores become weights: normalisation, running maximum, sinks, log-sum-exp, and functions other than softmax."""

from __future__ import annotations

import math

from .listing import family, mutants, tiled

_SOFTMAX = "p_ij = exp(s_ij - m_i) / sum_j exp(s_ij - m_i)"
_SINK = "p_ij = exp(s_ij) / (exp(sink) + sum_j exp(s_ij))"
_LSE = "lse_i = m_i + ln(sum_j exp(s_ij - m_i))"

MUTANTS = [
    *mutants(
        "S7", "exp2 without log2(e)", "Exponentials are taken to base 2 of scores that were not multiplied by log2(e).",
        "p_ij ~ exp(s_ij)", "p_ij ~ 2^s_ij",
        {"base": "2"}, {"base": "2 keys"}, {"base": "2", "lse": "base 2 sum"}, {"base": "2", "lse": "base 2"},
        {"base": "2 keys", "lse": "base 2 sum"},
        evidence="FlashInfer 23413e00", needs="softmax", prior=3,
    ),
    *mutants(
        "S7", "log2(e) twice", "Scores are multiplied by log2(e) twice before exp2.",
        "p_ij ~ exp(s_ij)", "p_ij ~ exp(s_ij log2(e))",
        {"base": "e log2"}, needs="softmax",
    ),
    *mutants(
        "S10", "softmax over queries", "The weights of one key sum to one over the queries: softmax along the wrong axis.",
        _SOFTMAX, "p_ij = exp(s_ij) / sum_i exp(s_ij)",
        {"axis": "queries"}, {"axis": "queries", "lse": "of the rows"}, {"axis": "queries", "sink": "dropped"},
        evidence="labmlai/annotated_deep_learning_paper_implementations#146; jadore801120/attention-is-all-you-need-pytorch#52",
        needs="softmax", prior=3,
    ),
    *mutants(
        "S10", "softmax over keys", "The weights of one query sum to one, where those of one key should.",
        "p_ij = exp(s_ij) / sum_i exp(s_ij)", _SOFTMAX,
        {"axis": "keys"}, needs="softmax over queries", prior=2,
    ),
    *mutants(
        "S11", "softmax over heads", "The weights of one pair sum to one over the heads.",
        _SOFTMAX, "p_hij = exp(s_hij) / sum_h exp(s_hij)",
        {"axis": "heads"}, {"axis": "heads", "lse": "of the rows"}, {"axis": "heads", "sink": "dropped"},
        evidence="FastNLP#254; PyTorch-NLP#2", needs="softmax, heads",
    ),
    *mutants(
        "S11", "softmax over batches", "The weights of one pair sum to one over the batches.",
        _SOFTMAX, "p_bij = exp(s_bij) / sum_b exp(s_bij)",
        {"axis": "batch"}, {"axis": "batch", "lse": "of the rows"}, {"axis": "batch", "sink": "dropped"}, evidence="FastNLP#254", needs="softmax",
    ),
    *mutants(
        "S14", "no maximum subtracted", "Exponentials are taken of the scores as they are, and overflow.",
        "exp(s_ij - m_i)", "exp(s_ij)",
        {"maximum": False}, needs="softmax", prior=2,
    ),
    *mutants(
        "X1", "not normalised", "Weights are not divided by their sum.",
        _SOFTMAX, "p_ij = exp(s_ij - m_i)",
        {"denominator": "none"}, needs="softmax", prior=2,
    ),
    *mutants(
        "X1", "divided by the number of keys", "Weights are divided by the number of keys instead of their sum.",
        _SOFTMAX, "p_ij = exp(s_ij - m_i) / S",
        {"denominator": "keys"}, needs="softmax",
    ),
    *mutants(
        "X1", "divided by the largest weight", "Weights are divided by the largest instead of their sum.",
        _SOFTMAX, "p_ij = exp(s_ij) / max_j exp(s_ij)",
        {"denominator": "largest"}, needs="softmax", prior=0.5,
    ),
    *mutants(
        "X2", "accumulator not rescaled", "When a later tile raises the maximum, the output gathered so far keeps the old scale.",
        "acc = exp(m_old - m_new) acc + p v", "acc = acc + p v",
        *tiled(rescaled="sum"), needs="softmax", prior=4,
    ),
    *mutants(
        "X3", "sum not rescaled", "When a later tile raises the maximum, the sum gathered so far keeps the old scale.",
        "l = exp(m_old - m_new) l + sum p", "l = l + sum p",
        *tiled(rescaled="accumulator"), needs="softmax", prior=3,
    ),
    *mutants(
        "X3", "neither sum nor accumulator rescaled", "Every tile keeps the maximum it was computed with.",
        "l, acc shrink by exp(m_old - m_new)", "l, acc stay",
        *tiled(rescaled="neither"), needs="softmax", prior=2,
    ),
    *mutants(
        "X4", "maximum starts at zero", "The running maximum starts at 0, so that rows of very negative scores vanish.",
        "m = -inf before the first tile", "m = 0 before the first tile",
        {"start": 0.0}, evidence="MLX 79071bfb", needs="softmax", prior=2,
    ),
    *mutants(
        "X5", "neighbour's sum", "The reduction of a row's sum spans the next row.",
        "l_i = sum_j p_ij", "l_i = sum_j p_ij + sum_j p_(i+1)j for even i",
        {"neighbour": True}, *tiled(neighbour=True), evidence="FlashInfer 6e3ea8fc", needs="softmax",
    ),
    *mutants(
        "X6", "sink as a number", "The sink is added to the sum itself instead of its exponential.",
        "l = l + exp(sink - m)", "l = l + sink",
        {"sink": "number"}, {"sink": "number unshifted"}, evidence="FlashAttention e81c237e (kernel and reference)", needs="sinks", prior=2,
    ),
    *mutants(
        "X7", "sink not in the maximum", "The sink is left out of the maximum, so that a large one overflows.",
        "m = max(m, sink)", "l = l + exp(sink - m)",
        {"sink": "not in the maximum"}, {"sink": "not in the maximum, unguarded"}, evidence="FlashAttention PR#2752", needs="sinks",
    ),
    *mutants(
        "X8", "sink in every tile", "The sink counts once per tile of keys.",
        _SINK, "p_ij = exp(s_ij) / (n exp(sink) + sum_j exp(s_ij)), n tiles",
        {"sink_offset": math.log(2.0)}, *tiled(sink="in every tile"), evidence="ROCm/rocm-libraries#12229", needs="sinks",
    ),
    *mutants(
        "X9", "sink dropped", "The sink takes no part.",
        _SINK, _SOFTMAX,
        {"sink": "dropped"}, evidence="TransformerEngine#2541; vllm-metal#550", needs="sinks", prior=3,
    ),
    *mutants(
        "X9", "sink not in lse", "The sink counts in the weights, but lse leaves it out.",
        "lse_i = ln(exp(sink) + sum_j exp(s_ij))", "lse_i = ln(sum_j exp(s_ij))",
        {"lse": "no sink"}, needs="sinks, lse", prior=2,
    ),
    *mutants(
        "X10", "sink against base 2", "The output is multiplied by sigmoid(lse - sink) with lse in base 2.",
        "out = out' sigmoid(lse - sink)", "out = out' sigmoid(lse / ln 2 - sink)",
        {"sink": "base 2"}, {"sink": "base 2 sum"}, evidence="torchtitan PR#2211", needs="sinks",
    ),
    *mutants(
        "X10", "sink scaled", "The sink is multiplied by the scale as scores are.",
        _SINK, "p_ij = exp(s_ij) / (exp(scale sink) + sum_j exp(s_ij))",
        {"sink": "scaled"}, needs="sinks",
    ),
    *mutants(
        "X10", "sink capped", "The sink is soft-capped as scores are.",
        _SINK, "p_ij = exp(s_ij) / (exp(cap tanh(sink / cap)) + sum_j exp(s_ij))",
        {"sink": "capped"}, needs="sinks, softcap", prior=0.5,
    ),
    *mutants(
        "X11", "sink of another head", "A query head takes the sink of another.",
        "sink_h", "sink_(h-1)",
        {"sink_head": "before"}, {"sink_head": "next"}, {"sink_head": "reversed"}, evidence="FlashInfer 065795ea", needs="sinks, Hq>1",
    ),
    *mutants(
        "X11", "sink of head 0", "Every query head takes the sink of the first.",
        "sink_h", "sink_0",
        {"sink_head": "first"}, needs="sinks, Hq>1",
    ),
    *mutants(
        "X11", "sink of the key-value head", "Sinks are indexed by the key-value head.",
        "sink_h", "sink_(h // G)",
        {"sink_head": "key-value head"}, needs="sinks, Hq>Hkv", prior=2,
    ),
    *mutants(
        "L1", "lse in base 2", "The log-sum-exp is given in base 2.",
        _LSE, "lse_i = log2(sum_j exp(s_ij))",
        {"lse": "base 2"}, {"lse": "base 2 sum"}, evidence="FlashAttention#404; FlashInfer state.cuh", needs="lse", prior=4,
    ),
    *mutants(
        "L2", "lse without the maximum", "The maximum is not added back.",
        _LSE, "lse_i = ln(sum_j exp(s_ij - m_i))",
        {"lse": "no maximum"}, evidence="FlashInfer 6e3ea8fc, 7bdadce0", needs="lse", prior=2,
    ),
    *mutants(
        "L2", "lse without scale", "The maximum is added back unscaled.",
        _LSE, "lse_i = m_i / scale + ln(sum_j exp(s_ij - m_i))",
        {"lse": "no scale"}, evidence="FlashAttention#404", needs="lse", prior=2,
    ),
    *mutants(
        "L2", "lse is the maximum", "The logarithm of the sum is not added.",
        _LSE, "lse_i = m_i",
        {"lse": "maximum"}, needs="lse",
    ),
    *mutants(
        "L2", "lse never written", "The log-sum-exp is zero throughout.",
        _LSE, "lse_i = 0",
        {"lse": "zero"}, evidence="FlashAttention#404", needs="lse",
    ),
    *mutants(
        "L3", "lse of zero for an empty row", "A row that sees nothing has a log-sum-exp of zero instead of minus infinity.",
        "lse_i = -inf", "lse_i = 0",
        {"lse": "zero where empty"}, evidence="FlashAttention 31920dda, 26d7d92f", needs="lse, hidden pairs", prior=2,
    ),
    *mutants(
        "L9", "lse of plus infinity for an empty row", "A row that sees nothing has a log-sum-exp of plus infinity.",
        "lse_i = -inf", "lse_i = +inf",
        {"lse": "plus infinity where empty"}, evidence="xformers 76173784", needs="lse, hidden pairs",
    ),
    *mutants(
        "L4", "lse of another head", "The log-sum-exp is stored at the place of another head.",
        "lse_h", "lse_(h-1)",
        {"lse_head": "before"}, {"lse_head": "next"}, {"lse_head": "first"}, evidence="FlashAttention 28ef22c9", needs="lse, Hq>1",
    ),
    # ---- weights by other functions
    *mutants(
        "Z1", "shift left out", "Scores of sigmoid attention are not shifted by -log S.",
        "p_ij = sigmoid(s_ij + shift)", "p_ij = sigmoid(s_ij)",
        {"shift": "none"}, needs="sigmoid",
    ),
    *mutants(
        "Z1", "shift of the number of queries", "The shift is -log T instead of -log S.",
        "shift = -log S", "shift = -log T",
        {"shift": "queries"}, needs="sigmoid, T!=S",
    ),
    *mutants(
        "Z1", "shift negated", "The shift has the other sign.",
        "p_ij = sigmoid(s_ij + shift)", "p_ij = sigmoid(s_ij - shift)",
        {"shift": "negated"}, needs="sigmoid",
    ),
    *mutants(
        "Z1", "sigmoids normalised", "Sigmoid weights are divided by their sum.",
        "p_ij = sigmoid(s_ij)", "p_ij = sigmoid(s_ij) / sum_j sigmoid(s_ij)",
        {"function": "sigmoid normalised"}, {"function": "sigmoid normalised, unguarded"}, needs="sigmoid",
    ),
    *mutants(
        "Z2", "divided by the keys seen", "Weights are divided by the number of visible keys instead of all.",
        "p_ij = max(s_ij, 0)^r / S", "p_ij = max(s_ij, 0)^r / number of visible j",
        {"denominator": "visible keys"}, needs="relu",
    ),
    *mutants(
        "Z2", "divided by the queries", "Weights are divided by the number of queries.",
        "p_ij = max(s_ij, 0)^r / S", "p_ij = max(s_ij, 0)^r / T",
        {"denominator": "queries"}, needs="relu",
    ),
    *mutants(
        "Z2", "not divided", "Weights are not divided.",
        "p_ij = max(s_ij, 0)^r / S", "p_ij = max(s_ij, 0)^r",
        {"denominator": "none"}, needs="relu",
    ),
    *mutants(
        "Z2", "divided before the power", "The divisor is raised to the power too.",
        "p_ij = max(s_ij, 0)^r / n", "p_ij = (max(s_ij, 0) / n)^r",
        {"function": "divided before the power"}, needs="relu",
    ),
    *mutants(
        "Z2", "power ignored", "Positive parts are not raised to the power.",
        "p_ij = max(s_ij, 0)^r / n", "p_ij = max(s_ij, 0) / n",
        {"function": "power ignored"}, needs="relu",
    ),
    *mutants(
        "Z2", "softplus for ReLU", "A smooth function stands for the positive part.",
        "max(s, 0)", "log(1 + exp(s))",
        {"function": "softplus"}, {"function": "softplus, overflowing"}, needs="relu",
    ),
    *mutants(
        "Z2", "magnitudes for positive parts", "Negative scores count by their magnitude.",
        "max(s, 0)", "|s|",
        {"function": "magnitude"}, needs="relu",
    ),
    *(
        mutant
        for which in ("sparsemax", "entmax15")
        for mutant in [
            *mutants(
                "Z3", "every key in the support", "The threshold is computed as if no weight were zero.",
                "tau over the support", "tau over all keys",
                {"function": f"{which}, every key"}, needs=which,
            ),
            *mutants(
                "Z3", "softmax for sparse weights", "Weights are a softmax.",
                "p_ij = max(z_ij - tau_i, 0)^r", _SOFTMAX,
                {"function": "softmax"}, needs=which,
            ),
            *mutants(
                "Z3", "positive parts divided by their sum", "No threshold is computed.",
                "p_ij = max(z_ij - tau_i, 0)^r", "p_ij = max(s_ij, 0) / sum_j max(s_ij, 0)",
                {"function": "positive parts"}, needs=which,
            ),
            *mutants(
                "Z3", "threshold less the maximum", "The threshold is given relative to the row's maximum.",
                "tau_i", "tau_i - m_i",
                {"threshold": "less the maximum"}, needs=f"{which}, threshold",
            ),
            *mutants(
                "Z3", "threshold doubled", "The threshold is that of whole scores where halves are meant.",
                "tau_i", "2 tau_i",
                {"threshold": "doubled"}, needs=f"{which}, threshold",
            ),
        ]
    ),
    *mutants(
        "Z3", "1.5-entmax for sparsemax", "Weights are those of 1.5-entmax.",
        "p_ij = max(s_ij - tau_i, 0)", "p_ij = max(s_ij / 2 - tau_i, 0)^2",
        {"function": "entmax15"}, needs="sparsemax",
    ),
    *mutants(
        "Z3", "scores not halved", "Scores are not halved before the threshold.",
        "p_ij = max(s_ij / 2 - tau_i, 0)^2", "p_ij = max(s_ij - tau_i, 0)^2",
        {"function": "entmax15 of whole scores"}, needs="entmax15",
    ),
    *mutants(
        "Z3", "not squared", "What is beyond the threshold is not squared.",
        "p_ij = max(s_ij / 2 - tau_i, 0)^2", "p_ij = max(s_ij / 2 - tau_i, 0)",
        {"function": "entmax15, not squared"}, needs="entmax15",
    ),
    *mutants(
        "Z3", "sparsemax for 1.5-entmax", "Weights are those of sparsemax.",
        "p_ij = max(s_ij / 2 - tau_i, 0)^2", "p_ij = max(s_ij - tau_i, 0)",
        {"function": "sparsemax"}, {"function": "sparsemax of halves"}, {"function": "sparsemax squared"}, needs="entmax15",
    ),
]  # fmt: skip

FAMILIES = [
    family(
        "X10", "sink off by a factor", "The sink is multiplied by a number.",
        _SINK, "p_ij = exp(s_ij) / (exp(f sink) + sum_j exp(s_ij))", "sink_factor", bounds=(-4.0, 4.0), needs="sinks",
    ),
    family(
        "X8", "sink off by an offset", "A number is added to the sink, as by counting it several times.",
        _SINK, "p_ij = exp(s_ij) / (exp(sink + f) + sum_j exp(s_ij))", "sink_offset", bounds=(-8.0, 8.0), needs="sinks",
    ),
]  # fmt: skip
