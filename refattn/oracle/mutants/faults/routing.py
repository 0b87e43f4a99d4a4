"""Which rows are read: heads, batches, strides, widths, and what earlier calls left behind."""

from __future__ import annotations

from .listing import mutants

_OWN = "query head h reads key-value head h // G"

MUTANTS = [
    *mutants(
        "H1", "heads tiled", "Key-value heads are repeated one after another, so query head h reads h mod Hkv.",
        _OWN, "query head h reads key-value head h mod Hkv",
        {"heads": "tiled"}, {"heads": "tiled", "key_heads": False}, {"heads": "tiled", "value_heads": False},
        evidence="onnx 062ee922 (reference)", needs="Hq>Hkv", prior=5,
    ),
    *mutants(
        "H1", "key-value head 0 for all", "Every query head reads the first key-value head.",
        _OWN, "query head h reads key-value head 0",
        {"heads": "first"}, {"heads": "first", "key_heads": False}, {"heads": "first", "value_heads": False}, needs="Hkv>1", prior=1,
    ),
    *mutants(
        "H1", "heads reversed", "Key-value heads are read from the last to the first.",
        _OWN, "query head h reads key-value head Hkv - 1 - h // G",
        {"heads": "reversed"}, needs="Hkv>1", prior=0.3,
    ),
    *mutants(
        "H3", "key-value heads at the stride of query heads", "The offset of a key-value head is counted as if there were as many as query heads.",
        "offset of head g: g S D", "offset of head g: g G S D",
        {"heads": "query stride"}, evidence="jax be78ee0f", needs="Hq>Hkv, Hkv>1",
    ),
    *mutants(
        "H7", "time repeated", "Keys and values are repeated along the sequence instead of the heads.",
        _OWN, "repeat(k, G, axis=sequence), read as Hq heads",
        {"heads": "time repeated"}, evidence="VeOmni#162", needs="Hq>Hkv",
    ),
    *mutants(
        "S12", "heads by reshape", "(B, H, T, D) is reshaped to (B, T, H, D) without a transpose, so heads and time mix.",
        "x[b, h, t] is token t of head h", "x.reshape(B, T, H, D)[b, t, h] is taken for it",
        {"layout": "reshaped"}, evidence="onnx b9a3100a (reference)", needs="Hq>1", prior=2,
    ),
    *mutants(
        "H8", "strides ignored", "Operands that are not contiguous are read as if they were.",
        "x[b, h, t] at its strides", "x[b, h, t] at b H T + h T + t",
        {"layout": "contiguous"}, evidence="pytorch#112577, #163597, #181133; torch-spyre#4331", needs="strided", prior=4,
    ),
    *mutants(
        "H11", "value width from the keys", "Values are read as wide as keys: their further channels are lost.",
        "E channels of values", "min(D, E) channels of values",
        {"values": "width of keys"}, evidence="FlashAttention 9e07d6d3, e3b2400a; FLA 1c403c3a", needs="D!=E", prior=3,
    ),
    *mutants(
        "H12", "values for keys", "The values are taken for the keys.",
        "s_ij = scale q_i . k_j", "s_ij = scale q_i . v_j",
        {"keys": "values"}, evidence="MLX f4f6e17d, a8776b7b",
    ),
    *mutants(
        "H12", "keys for values", "The keys are taken for the values.",
        "out_i = sum_j p_ij v_j", "out_i = sum_j p_ij k_j",
        {"values": "keys"}, evidence="MLX f4f6e17d, a8776b7b",
    ),
    *mutants(
        "H12", "queries for keys", "The queries are taken for the keys, as in self-attention.",
        "s_ij = scale q_i . k_j", "s_ij = scale q_i . q_j",
        {"keys": "queries"}, prior=0.5,
    ),
    *mutants(
        "H14", "keys of batch 0", "Every batch reads the keys of the first.",
        "s_bij = scale q_bi . k_bj", "s_bij = scale q_bi . k_0j",
        {"keys": "batch 0"}, {"keys": "batch 0", "values": "batch 0"}, evidence="MLX 76a977ca", needs="B>1", prior=2,
    ),
    *mutants(
        "H14", "values of batch 0", "Every batch reads the values of the first.",
        "out_bi = sum_j p_bij v_bj", "out_bi = sum_j p_bij v_0j",
        {"values": "batch 0"}, needs="B>1",
    ),
    *mutants(
        "H14", "queries of batch 0", "Every batch reads the queries of the first.",
        "s_bij = scale q_bi . k_bj", "s_bij = scale q_0i . k_bj",
        {"queries": "batch 0"}, needs="B>1",
    ),
    *mutants(
        "T9", "values of a neighbouring key", "Value j is read from a neighbouring row.",
        "out_i = sum_j p_ij v_j", "out_i = sum_j p_ij v_(j-1)",
        {"values": "one late"}, {"values": "one early"}, evidence="FlashInfer 103fcf86", prior=0.7,
    ),
    *mutants(
        "T17", "half of the values", "Programs that share the value channels all store at channel 0.",
        "out[c0:c0+n] of each program", "out[0:n] of each program",
        *({"store": n, "store_last": last} for n in (16, 32, 64) for last in (True, False)), evidence="FLA ccb0ff94", needs="E>16",
    ),
    *mutants(
        "T18", "width in whole vectors", "The last channels of a width that is no multiple of the vector are not read.",
        "D channels", "D // n * n channels",
        *({"lanes": n} for n in (8, 16, 4, 32, 64)), evidence="FlashAttention 215930bc, e78d509c", prior=2,
    ),
    *mutants(
        "S5", "scale of an earlier call", "The kernel kept the scale of an earlier call of these shapes.",
        "the scale of this call", "the scale of an earlier call",
        {"remembered": "scale"}, evidence="FlashInfer 82784bb1", needs="earlier call, dot", prior=2,
    ),
    *mutants(
        "M4", "causal of an earlier call", "The kernel kept the alignment of an earlier call of these shapes.",
        "causal of this call", "causal of an earlier call",
        {"remembered": "causal"}, evidence="MLX 00794c42", needs="earlier call, any causal", prior=2,
    ),
    *mutants(
        "M22", "mask of an earlier call", "The kernel kept the mask of an earlier call of these shapes.",
        "mask of this call", "mask of an earlier call",
        {"remembered": "mask"}, evidence="FlashInfer 40c89fd5", needs="earlier call, any mask", prior=2,
    ),
    *(
        mutant
        for name, where in (("k", "keys"), ("v", "values"), ("q", "queries"), ("bias", "bias"), ("sinks", "sinks"), ("window", "window"),
        ("softcap", "soft-cap"))
        for mutant in mutants(
            "R4", f"{where} of an earlier call", f"The kernel kept the {where} of an earlier call of these shapes.",
            f"{where} of this call", f"{where} of an earlier call",
            {"remembered": name}, evidence="FlashAttention 14f3627d, e317aa49", needs=f"earlier call, any {name}", prior=1,
        )
    ),
]  # fmt: skip

FAMILIES = []  # type: ignore[var-annotated]
