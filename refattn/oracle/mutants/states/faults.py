"""The faults of linear, gated and delta-rule attention that are known."""

from __future__ import annotations

from typing import Any

from ..faults.listing import family, mutants

#: Tokens per chunk of kernels.
CHUNKS = (64, 16, 32, 128, 8)

_FADE = "S~_t = exp(g_t) S_(t-1)"
_DELTA = "S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T"
_READ = "out_t = scale S_t^T q_t"
_CHUNK = "S_t = exp(G_t) S_0 + sum_(j in chunk) exp(G_t - G_j) k_j u_j^T"
_SUM = "out_t = S_t^T phi(q_t) / (eps + phi(q_t) . sum_j phi(k_j))"


def chunked(wrong: str) -> list[dict[str, Any]]:
    """Something wrong about chunks, of every length."""
    return [{"wrong": wrong, "chunk": n} for n in CHUNKS]


MUTANTS = [
    # ---- chunks
    *mutants(
        "D1", "normaliser's sum restarts in every chunk", "The sum of keys that the read is divided by is taken within a chunk only.",
        "n_t = sum_(j <= t) phi(k_j)", "n_t = sum_(j <= t, j in the chunk of t) phi(k_j)",
        *chunked("mass forgets"), evidence="flash-linear-attention 12e2a700 (#850, reference), 1d48579a", needs="recurrence, normalised", prior=2,
    ),
    *mutants(
        "D1", "state restarts in every chunk", "The state is not carried from one chunk to the next.",
        _CHUNK, "S_t = sum_(j in chunk) exp(G_t - G_j) k_j u_j^T",
        *chunked("forgets"), needs="recurrence", prior=2,
    ),
    *mutants(
        "D5", "state read unfaded within a chunk", "Queries read what came before the chunk without the decay since its beginning.",
        "q_t^T exp(G_t) S_0", "q_t^T S_0",
        *chunked("read unfaded"), evidence="FlashInfer ed6f6150", needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D5", "state unfaded throughout a chunk", "Queries and erasures use what came before the chunk without the decay since its beginning.",
        "exp(G_t) S_0", "S_0",
        *chunked("unfaded throughout"), needs="recurrence, fades, erases",
    ),
    *mutants(
        "D5", "state unfaded from chunk to chunk", "What came before a chunk does not fade by the chunk's decay when it is carried on.",
        "S_C = exp(G_C) S_0 + ...", "S_C = S_0 + ...",
        *chunked("carried unfaded"), evidence="FlashInfer ed6f6150", needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D5", "last chunk of a state does not fade", "The decay of a last chunk that is not whole is left out of the last state.",
        "S_T = exp(G_T) S_0 + ...", "S_T = S_0 + ...",
        *chunked("tail unfaded"), needs="recurrence, fades, state", prior=0.5,
    ),
    *mutants(
        "D4", "chunk's writes fade once more", "What a chunk wrote fades by its own token's factor too when it is carried on.",
        "exp(G_C - G_j) k_j u_j^T", "exp(G_C - G_(j-1)) k_j u_j^T",
        *chunked("carried fading once more"), evidence="flash-linear-attention 0c1c0b65, a226c0c9", needs="recurrence, fades",
    ),
    *mutants(
        "D4", "decay since the chunk began ends one token early", "Queries read what came before the chunk without the fading of their own token.",
        "q_t^T exp(G_t) S_0", "q_t^T exp(G_(t-1)) S_0",
        *chunked("read one fade late"), evidence="flash-linear-attention 9d148e32", needs="recurrence, fades",
    ),
    *mutants(
        "D10", "own token hidden", "The mask within a chunk leaves out the diagonal: no query sees its own token.",
        "j <= i", "j < i",
        {"read": "faded, before the write"}, evidence="flash-linear-attention 91d870f8, c57e6c29", needs="recurrence, inclusive, fades", prior=1.5,
    ),
    *mutants(
        "D10", "own token erased", "The triangular system has the diagonal once more: a token's erasure reads what it writes itself.",
        "(I + tril(A, -1)) u = v", "(I + tril(A, 0)) u = v",
        {"wrong": "own token erased", "chunk": 64}, needs="recurrence, erases",
    ),
    *mutants(
        "D15", "erasure to first order", "The inverse of the triangular system is cut off after its first term.",
        "u = (I + A)^-1 v", "u = (I - A) v",
        *chunked("erased to first order"), needs="recurrence, erases", prior=1.5,
    ),
    *mutants(
        "D15", "no erasure within chunks", "Tokens of one chunk do not see each other's writes when they erase.",
        "u = (I + A)^-1 (v - exp(G) S_0^T k)", "u = v - exp(G) S_0^T k",
        *chunked("erased from before"), evidence="flash-linear-attention 23da0a15", needs="recurrence, erases", prior=1.5,
    ),
    *mutants(
        "D15", "erasure within chunks only", "Erasures do not see what came before the chunk.",
        "u = (I + A)^-1 (v - exp(G) S_0^T k)", "u = (I + A)^-1 v",
        *chunked("erased within"), needs="recurrence, erases", prior=1.5,
    ),
    *mutants(
        "D13", "last token of every chunk lost", "The next chunk does not know the last token of the one before.",
        "S_C = ... + sum_(j <= C) ...", "S_C = ... + sum_(j < C) ...",
        *chunked("last token lost"), needs="recurrence",
    ),
    *mutants(
        "D13", "first token of every chunk lost", "The first token of every chunk but the first is not written.",
        "S_C = ... + sum_(1 <= j <= C) ...", "S_C = ... + sum_(1 < j <= C) ...",
        *chunked("first token lost"), needs="recurrence",
    ),
    *mutants(
        "D13", "tokens beyond the last whole chunk lost", "The last tokens, of a chunk that is not whole, are neither written nor read.",
        "T tokens", "T // C * C tokens",
        *chunked("tail lost"), evidence="flash-linear-attention de09abdf", needs="recurrence",
    ),
    *mutants(
        "D13", "last chunk of a state lost", "The last state leaves out the tokens beyond the last whole chunk.",
        "S_T", "S_(T // C * C)",
        *[{"state": f"whole chunks of {n}"} for n in CHUNKS], evidence="flash-linear-attention de09abdf", needs="recurrence, state",
    ),
    *mutants(
        "D12", "queries read their own chunk only", "What came before the chunk is carried on, but not read.",
        _CHUNK, "out_t reads sum_(j in chunk) alone",
        *chunked("read within"), needs="recurrence, causal reads",
    ),
    *mutants(
        "D12", "state of the chunk before", "Queries read the state that the chunk before began with: an index that is one too small.",
        "S_0 of the chunk of t", "S_0 of the chunk before",
        *chunked("starts before"), evidence="flash-linear-attention ddee66d9", needs="recurrence, causal reads",
    ),
    *mutants(
        "D20", "decays as quotients", "Decays within a chunk are formed as exp(G_i) exp(-G_j), which overflows where the state fades strongly.",
        "exp(G_i - G_j)", "exp(G_i) exp(-G_j)",
        *[{"overflow": n} for n in CHUNKS], evidence="flash-linear-attention 458c0186, 4889a8b9", needs="recurrence, fades", prior=2,
    ),
    # ---- decay
    *mutants(
        "D16", "no decay", "The state does not fade.",
        _FADE, "S~_t = S_(t-1)",
        {"gate": "none"}, evidence="flash-linear-attention f636f5a1", needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D16", "gate in base 2", "The natural logarithm of the decay is exponentiated to base 2.",
        "exp(g_t)", "2^g_t",
        {"gate": "base 2"}, needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D16", "gate for the factor", "The logarithm of the decay is used as the decay.",
        "exp(g_t) S_(t-1)", "g_t S_(t-1)",
        {"gate": "factor"}, evidence="flash-linear-attention 9b047584", needs="recurrence, fades, bare",
    ),
    *mutants(
        "D16", "gate of the wrong sign", "The state grows where it should fade.",
        "exp(g_t)", "exp(-g_t)",
        {"gate_factor": -1.0}, evidence="flash-linear-attention 9b047584", needs="recurrence, fades", prior=0.5,
    ),
    *mutants(
        "D4", "gate of the token before", "Every token fades the state by the factor of the one before.",
        "a_t S_(t-1)", "a_(t-1) S_(t-1)",
        {"gate": "one late"}, evidence="flash-linear-attention 0c1c0b65, a226c0c9", needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D4", "gate of the token after", "Every token fades the state by the factor of the next one.",
        "a_t S_(t-1)", "a_(t+1) S_(t-1)",
        {"gate": "one early"}, needs="recurrence, fades",
    ),
    *mutants(
        "D4", "fades after the write", "The token's own write fades with the state.",
        "S_t = a_t S_(t-1) + k_t v_t^T", "S_t = a_t (S_(t-1) + k_t v_t^T)",
        {"order": "write, fade, read"}, evidence="flash-linear-attention 9d148e32", needs="recurrence, fades", prior=2,
    ),
    *mutants(
        "D4", "fades after the read", "The state fades when the token has been read, for the next one.",
        "S_t = a_t S_(t-1) + k_t v_t^T", "S_(t+1) = a_t S_t + k_(t+1) v_(t+1)^T",
        {"order": "write, read, fade"}, needs="recurrence, fades",
    ),
    *mutants(
        "D14", "one gate for all channels", "Rows of the state fade at one rate: that of the first channel, or the mean.",
        "diag(exp(g_t)) S_(t-1)", "exp(g_t,0) S_(t-1)",
        {"gate": "first channel"}, {"gate": "mean channel"}, evidence="flash-linear-attention 31293264", needs="recurrence, rows fade",
    ),
    *mutants(
        "D11", "gate of the first head", "Every head fades by the first one's factors.",
        "g_(h,t)", "g_(0,t)",
        {"gate": "first head"}, evidence="flash-linear-attention 40334f1c", needs="recurrence, fades, states",
    ),
    # ---- strength and erasure
    *mutants(
        "D7", "no strength", "Writes ignore their strength.",
        _DELTA, "S_t = S~_t + k_t (v_t - S~_t^T k_t)^T",
        {"strength": "none"}, evidence="flash-linear-attention#43", needs="recurrence, strength", prior=2,
    ),
    *mutants(
        "D7", "strength of values only", "The strength multiplies the value but not the erasure.",
        _DELTA, "S_t = S~_t + k_t (beta_t v_t - S~_t^T k_t)^T",
        {"strength": "values"}, evidence="flash-linear-attention#43", needs="recurrence, strong keys", prior=2,
    ),
    *mutants(
        "D7", "strength of erasures only", "The strength multiplies the erasure but not the value.",
        _DELTA, "S_t = S~_t + k_t (v_t - beta_t S~_t^T k_t)^T",
        {"strength": "erasures"}, evidence="flash-linear-attention#43", needs="recurrence, strong keys", prior=2,
    ),
    *mutants(
        "D7", "strength squared", "The strength is applied to keys and to values: twice.",
        "beta_t k_t (...)", "beta_t^2 k_t (...)",
        {"strength": "squared"}, needs="recurrence, strength", prior=1.5,
    ),
    *mutants(
        "D7", "strength of values squared", "Values are multiplied by the strength before they are written with it.",
        "beta_t k_t (v_t - ...)", "beta_t k_t (beta_t v_t - ...)",
        {"strength": "twice for values"}, needs="recurrence, strong keys",
    ),
    *mutants(
        "D7", "strength doubled", "The strength is twice what was given, as where negative eigenvalues are allowed.",
        "beta_t", "2 beta_t",
        {"strength": "doubled"}, needs="recurrence, strength",
    ),
    *mutants(
        "D7", "strength of the token before", "Every token is written with the strength of the one before.",
        "beta_t", "beta_(t-1)",
        {"strength": "one late"}, needs="recurrence, strength", prior=0.5,
    ),
    *mutants(
        "D11", "strength of the first head", "Every head writes with the first one's strengths.",
        "beta_(h,t)", "beta_(0,t)",
        {"strength": "first head"}, evidence="flash-linear-attention 40334f1c", needs="recurrence, strength, states",
    ),
    *mutants(
        "D6", "no erasure", "Values are added to the state; what it answers at the key is not taken away.",
        _DELTA, "S_t = S~_t + beta_t k_t v_t^T",
        {"erase": "none"}, evidence="flash-linear-attention f636f5a1, 3ddba2a0", needs="recurrence, erases", prior=2,
    ),
    *mutants(
        "D8", "erases from the state that has not faded", "The erasure reads the state as it was before the token.",
        "v_t - S~_t^T k_t", "v_t - S_(t-1)^T k_t",
        {"erase": "old"}, needs="recurrence, fades, erases", prior=2,
    ),
    *mutants(
        "D8", "erases from the faded state", "The erasure reads the faded state where it should read it as it was before the token.",
        "S_(t-1)^T a_t", "S~_t^T a_t",
        {"erase": "faded"}, needs="recurrence, erases old", prior=2,
    ),
    *mutants(
        "D8", "erasure of the wrong sign", "What the state answers at the key is added instead of taken away.",
        "v_t - S~_t^T k_t", "v_t + S~_t^T k_t",
        {"erase": "negated"}, needs="recurrence, erases",
    ),
    *mutants(
        "D8", "erases at the query", "The erasure asks the state at the query instead of the key.",
        "v_t - S~_t^T k_t", "v_t - S~_t^T q_t",
        {"erase": "with queries"}, needs="recurrence, erases, one shape", prior=0.5,
    ),
    # ---- read
    *mutants(
        "D9", "reads the state before the token", "The query does not see its own token's write.",
        _READ, "out_t = scale S_(t-1)^T q_t",
        {"read": "before the token"}, needs="recurrence, inclusive, causal reads", prior=2,
    ),
    *mutants(
        "D9", "reads the state after the token", "The query sees its own token's write where it should not.",
        "out_t = scale S_(t-1)^T q_t", _READ,
        {"read": "after the write"}, needs="recurrence, exclusive", prior=2,
    ),
    *mutants(
        "D9", "no bonus", "The token itself is left out of what the query reads.",
        "S_(t-1) + (u * k_t) v_t^T", "S_(t-1)",
        {"bonus": "none"}, needs="recurrence, bonus", prior=2,
    ),
    *mutants(
        "D9", "bonus of one", "The token itself counts without its bonus.",
        "S_(t-1) + (u * k_t) v_t^T", "S_(t-1) + k_t v_t^T",
        {"bonus": "ones"}, needs="recurrence, bonus",
    ),
    *mutants(
        "D3", "no scale", "What is read is not multiplied by the scale.",
        _READ, "out_t = S_t^T q_t",
        {"scale": "none by default"}, {"scale": "none"}, evidence="flash-linear-attention 3422c449", needs="recurrence, scaled", prior=3,
    ),
    *mutants(
        "D3", "scale twice", "The caller and the kernel both multiply by the scale.",
        _READ, "out_t = scale^2 S_t^T q_t",
        {"scale": "twice"}, evidence="flash-linear-attention 85992884", needs="recurrence, scaled", prior=2,
    ),
    *mutants(
        "D3", "scale of the width of values", "The scale is 1/sqrt(E) instead of 1/sqrt(D).",
        "1/sqrt(D)", "1/sqrt(E)",
        {"scale": "width of values"}, needs="recurrence, scaled",
    ),
    *mutants(
        "D3", "nothing added to the output", "The direct path from values to the output is missing.",
        "out_t = ... + D x_t", "out_t = ...",
        {"skip": "none"}, needs="recurrence, skip", prior=2,
    ),
    # ---- state
    *mutants(
        "D18", "initial state ignored", "The state before the first token is taken for zero.",
        "S_(-1) = initial_state", "S_(-1) = 0",
        {"initial": "none"}, {"initial": "none of the state"}, evidence="flash-linear-attention cdbd3ac6", needs="recurrence, carried", prior=3,
    ),
    *mutants(
        "D18", "initial state does not fade", "The first token's factor is not applied to the state before it.",
        "S_0 = a_0 S_(-1) + ...", "S_0 = S_(-1) + ...",
        {"initial": "unfaded"}, needs="recurrence, carried, fades",
    ),
    *mutants(
        "D18", "initial state of the first head", "Every head begins with the first one's state.",
        "initial_state_h", "initial_state_0",
        {"initial": "first head"}, needs="recurrence, carried, states",
    ),
    *mutants(
        "D18", "initial state of the first batch", "Every batch begins with the first one's state.",
        "initial_state_b", "initial_state_0",
        {"initial": "batch 0"}, needs="recurrence, carried", prior=0.5,
    ),
    *mutants(
        "D17", "initial state transposed", "The state before the first token is read as values times keys.",
        "initial_state [K, V]", "initial_state [V, K]",
        {"initial": "transposed"}, evidence="FlashInfer c207ad31", needs="recurrence, carried, square state", prior=2,
    ),
    *mutants(
        "D17", "last state transposed", "The state is returned as values times keys.",
        "state [K, V]", "state [V, K]",
        {"state": "transposed"}, evidence="FlashInfer c207ad31", needs="recurrence, state, square state", prior=2,
    ),
    *mutants(
        "D17", "state transposed going in and coming out", "The state is kept as values times keys.",
        "state [K, V]", "state [V, K]",
        {"state": "transposed", "initial": "transposed"}, evidence="FlashInfer c207ad31", needs="recurrence, state, square state",
    ),
    *mutants(
        "D17", "last state one token early", "The state is returned as it was before the last token.",
        "state = S_(T-1)", "state = S_(T-2)",
        {"state": "one early"}, evidence="FlashInfer c207ad31", needs="recurrence, state", prior=2,
    ),
    *mutants(
        "D17", "last state never written", "The state is returned as it came, or as zero.",
        "state = S_(T-1)", "state = S_(-1)",
        {"state": "initial"}, {"state": "zero"}, needs="recurrence, state",
    ),
    # ---- keys and queries
    *mutants(
        "D19", "keys of length one", "Keys are normalised, though they were given as they are meant.",
        "k_t", "k_t / |k_t|",
        {"keys": "unit"}, {"keys": "unit in erasures"}, evidence="flash-linear-attention 9b9e47d7", needs="recurrence", prior=1.5,
    ),
    *mutants(
        "D19", "queries of length one", "Queries are normalised, though they were given as they are meant.",
        "q_t", "q_t / |q_t|",
        {"queries": "unit"}, evidence="flash-linear-attention 9b9e47d7", needs="recurrence", prior=1.5,
    ),
    *mutants(
        "D19", "queries and keys of length one", "Queries and keys are normalised, though they were given as they are meant.",
        "q_t, k_t", "q_t / |q_t|, k_t / |k_t|",
        {"queries": "unit", "keys": "unit"}, evidence="flash-linear-attention 9b9e47d7", needs="recurrence", prior=1.5,
    ),
    *mutants(
        "H12", "queries and keys exchanged", "The state is written with queries and read with keys.",
        "S_t += k_t v_t^T, out_t = S_t^T q_t", "S_t += q_t v_t^T, out_t = S_t^T k_t",
        {"exchanged": True}, evidence="MLX f4f6e17d", needs="recurrence, one shape",
    ),
    *mutants(
        "S13", "keys one token late", "Every token is written with the key of the one before.",
        "k_t v_t^T", "k_(t-1) v_t^T",
        {"keys": "one late"}, needs="recurrence", prior=0.5,
    ),
    *mutants(
        "S13", "values one token late", "Every token is written with the value of the one before.",
        "k_t v_t^T", "k_t v_(t-1)^T",
        {"values": "one late"}, needs="recurrence", prior=0.5,
    ),
    *mutants(
        "H1", "states tiled over query heads", "Query head h reads state h mod H instead of the one of its group.",
        "query head h reads state h // (Hq // H)", "query head h reads state h mod H",
        {"heads": "tiled"}, evidence="onnx 062ee922 (reference)", needs="recurrence, shared states", prior=2,
    ),
    *mutants(
        "H14", "first batch's operand", "Every batch reads the keys, the values or the queries of the first one.",
        "k_b", "k_0",
        {"keys": "batch 0"}, {"values": "batch 0"}, {"queries": "batch 0"}, evidence="MLX 76a977ca", needs="recurrence", prior=0.5,
    ),
    # ---- normaliser and features
    *mutants(
        "D2", "not normalised", "What is read is not divided.",
        _SUM, "out_t = S_t^T phi(q_t)",
        {"normalizer": "none"}, evidence="flash-linear-attention 4b02d15d", needs="recurrence, normalised", prior=3,
    ),
    *mutants(
        "D2", "divided by the number of keys", "What is read is divided by how many keys were seen.",
        _SUM, "out_t = S_t^T phi(q_t) / (t + 1)",
        {"normalizer": "count"}, needs="recurrence, normalised",
    ),
    *mutants(
        "D2", "divisor clamped", "The divisor is the larger of the sum and eps, where eps should be added.",
        "eps + phi(q) . n", "max(phi(q) . n, eps)",
        {"normalizer": "clamp"}, needs="recurrence, divided by a sum, eps",
    ),
    *mutants(
        "D2", "eps added to the divisor", "Eps is added where the divisor should be the larger of both.",
        "max(phi(q) . n, eps)", "phi(q) . n + eps",
        {"normalizer": "sum"}, needs="recurrence, divided by a clamp, eps",
    ),
    *mutants(
        "D2", "no eps", "Nothing is added to the divisor.",
        "eps + phi(q) . n", "phi(q) . n",
        {"eps": "none"}, needs="recurrence, divided by a sum, eps",
    ),
    *mutants(
        "D19", "no feature map", "Queries and keys are used as they are.",
        "phi(q), phi(k)", "q, k",
        {"query_map": "none", "key_map": "none"}, needs="recurrence, plain maps", prior=2,
    ),
    *mutants(
        "D19", "no feature map on queries", "Only keys go through the feature map.",
        "phi(q), phi(k)", "q, phi(k)",
        {"query_map": "none"}, needs="recurrence, plain maps", prior=2,
    ),
    *mutants(
        "D19", "no feature map on keys", "Only queries go through the feature map.",
        "phi(q), phi(k)", "phi(q), k",
        {"key_map": "none"}, needs="recurrence, plain maps", prior=2,
    ),
    *(
        mutant
        for name in ("relu", "elu + 1", "elu", "exp", "silu", "softplus", "relu + 1", "square", "softmax")
        for mutant in mutants(
            "D19", f"{name} for the feature map", f"The feature map is {name} instead of the variant's own.",
            "phi(x)", name,
            {"query_map": name, "key_map": name}, {"query_map": name}, {"key_map": name}, needs="recurrence, plain maps",
        )
    ),
    *mutants(
        "M3", "always causal", "Queries see earlier keys only, though they should see all.",
        "sum over all j", "sum over j <= i + S - T",
        {"causal": "always"}, needs="recurrence, reads of all", prior=2,
    ),
    *mutants(
        "M3", "never causal", "Queries see all keys, though they should see earlier ones only.",
        "sum over j <= i + S - T", "sum over all j",
        {"causal": "never"}, needs="recurrence, causal reads, maps", prior=2,
    ),
    *mutants(
        "M3", "one key of the future", "A query sees the next key too.",
        "j <= i + S - T", "j <= i + S - T + 1",
        {"lookahead": 1}, needs="recurrence, causal reads",
    ),
]  # fmt: skip

FAMILIES = [
    family(
        "D3", "scale off by a factor", "What is read is multiplied by a number.",
        _READ, "out_t = f scale S_t^T q_t", "scale_factor", bounds=(1e-3, 1e3), logarithmic=True, needs="recurrence",
    ),
    family(
        "D16", "gate off by a factor", "The logarithm of the decay is multiplied by a number.",
        "exp(g_t)", "exp(f g_t)", "gate_factor", bounds=(-2.0, 8.0), needs="recurrence, fades",
    ),
]  # fmt: skip
