"""Forgetting attention (FoX): softmax attention whose scores fade by a gate per query head and token.

    s_ij  = scale * q_i . k_j + sum_{l = j+1 .. i} gate_l
    p_ij  = exp(s_ij) / sum_{j' <= i} exp(s_ij')
    out_i = sum_{j <= i} p_ij v_j,       lse_i = log sum_{j <= i} exp(s_ij)

``gate`` is the natural logarithm of the paper's forget gate f, so the unnormalised weight of a key is multiplied by every f between it and the query:
after the key, up to and with the query's own token.  The gate of the first token is never read.  A gate of -inf closes: nothing before
its token is seen.  Always causal; queries are the last T of S tokens, so a single query is a decode step.  Query head h reads key-value head
``h // (Hq // Hkv)``, but gates belong to query heads.

What people get wrong: shifting the gate by one, so that a key fades by its own gate and not by the query's; forming the difference of running
sums up to i and up to j, which cancels in long sequences and is NaN once a gate is -inf; scaling the gate with the scores.
flash-linear-attention's forgetting attention does not scale it, its path attention does, and its decoding function asks
(``do_gate_scale``).  Padding on the left must have gates of 0.

Checked against flash-linear-attention's naive functions (forgetting_attn, and attn with g) and x-transformers' DataDependentAlibi.
"""

import math

import numpy as np

from refattn.pieces.arrays import faded, softmax, up_to_query
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, gate, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
    scores = np.zeros(n_k)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i + n_k - n_q
                if position < 0:
                    continue
                faded = 0.0  # the gates after key j
                top = -np.inf
                for j in range(position, -1, -1):
                    s = 0.0
                    for x in range(d):
                        s += q[b, h, i, x] * k[b, g, j, x]
                    scores[j] = scale * s + faded
                    faded += gate[b, h, j]
                    if scores[j] > top or math.isnan(scores[j]):  # NaN must win
                        top = scores[j]
                total = 0.0
                for j in range(position + 1):
                    weight = math.exp(scores[j] - top)
                    total += weight
                    for y in range(d_v):
                        out[b, h, i, y] += weight * v[b, g, j, y]
                for y in range(d_v):
                    out[b, h, i, y] /= total
                lse[b, h, i] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    n_q, n_k, group = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    scores = params["scale"] * (x["q"] @ np.swapaxes(k, -1, -2)) + faded(x["gate"], n_q)
    weights, lse = softmax(np.where(up_to_query(n_q, n_k), scores, -np.inf))
    return {"out": weights @ v, "lse": lse}


def open_gates(run, x):
    return run({**x, "gate": 0.0 * x["gate"]}, returns=("out", "lse")), run(without_gate(x), name="softmax", causal=True, returns=("out", "lse"))


def gates_as_a_bias(run, x):
    n_q, n_k = x["q"].shape[2], x["k"].shape[2]
    up_to = np.cumsum(x["gate"], axis=-1)
    rows = up_to[..., np.clip(np.arange(n_q) + n_k - n_q, 0, None)]
    biased = {**without_gate(x), "bias": rows[..., :, None] - up_to[..., None, :]}
    return run(x, returns=("out", "lse")), run(biased, name="softmax", causal=True, returns=("out", "lse"))


def a_closed_gate(run, x):
    n_q, n_k = x["q"].shape[2], x["k"].shape[2]
    first = n_k // 2
    gate = x["gate"].copy()
    gate[..., first] = -np.inf
    late = slice(max(n_q - n_k + first, 0), None)  # queries at or after the gate
    after = {**{name: x[name][:, :, first:] for name in ("k", "v", "gate")}, "q": x["q"][:, :, late]}
    return run({**x, "gate": gate}, returns="out")[:, :, late], run(after, returns="out")


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v", "gate")}, "q": x["q"][:, :, :half]}
    parts = [run(first, returns=("out", "lse")), run({**x, "q": x["q"][:, :, half:]}, returns=("out", "lse"))]
    return run(x, returns=("out", "lse")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


def without_gate(x):
    return {name: x[name] for name in ("q", "k", "v")}


#: Visible pairs of one head, and its rows that see a key.
PAIRS = "(T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if T <= S else S)"

VARIANT = Variant(
    name="forgetting",
    family="scored",
    summary="Forgetting attention (FoX): causal softmax attention with a forget gate per head and token.",
    equation="out_i = sum_{j <= i} softmax_j(scale q_i . k_j + sum_{l = j+1..i} gate_l) v_j",
    paper=Paper(
        title="Forgetting Transformer: Softmax Attention with a Forget Gate",
        authors=("Lin, Zhixuan", "Nikishin, Evgenii", "He, Xu Owen", "Courville, Aaron"),
        year=2025,
        arxiv="2503.02130",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, of the last T tokens"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand(
            "gate",
            "B Hq S",
            "natural logarithm of the forget gate of every token",
            draw=lambda rng, shape: np.log(rng.uniform(0.3, 1.0, shape)),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the row's sum of exponentials; -inf for a query before the first key", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*Hq*({PAIRS}*(2*D + 2*E + 6) + {ROWS}*(E + 2))", memory="B*Hq*T*(E + 1) + S"),
    ordered=lambda params: "T S",
    causal={},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[[0.0], [0.0]]]],
                "k": [[[[5.0], [7.0]]]],
                "v": [[[[8.0], [2.0]]]],
                "gate": [[[9.0, math.log(0.5)]]],
            },
            returns={"out": [[[[8.0], [4.0]]]], "lse": [[[0.0, math.log(1.5)]]]},
            source="by hand: token 1 sees token 0 through its own gate of 1/2, so with weights 1/3 and 2/3; the gate of token 0 is never read",
        ),
        Example(
            operands={
                "q": [[[[1.0]]]],
                "k": [[[[0.0], [math.log(2.0)], [0.0]]]],
                "v": [[[[100.0], [3.0], [6.0]]]],
                "gate": [[[0.0, -math.inf, math.log(0.25)]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[5.0]]]], "lse": [[[math.log(1.5)]]]},
            source="by hand: a decode step; the closed gate of token 1 hides token 0, and token 1 has weight 2/4 beside 1",
        ),
    ),
    identities=(
        Identity("with gates of 0 it is causal softmax attention", open_gates),
        Identity("the gates are a bias, the difference of their running sums", gates_as_a_bias),
        Identity("a closed gate hides everything before its token", a_closed_gate),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
