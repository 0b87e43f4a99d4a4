"""Wall attention: softmax attention whose every query-key channel fades by a gate of its own.

    s_ij  = scale * sum_x q_ix k_jx exp(sum_{l = j+1 .. i} gate_lx) + sum_{l = j+1 .. i} forget_l
    p_ij  = exp(s_ij) / (exp(sink) + sum_{j' <= i} exp(s_ij'))
    out_i = sum_{j <= i} p_ij v_j,       lse_i = log(exp(sink) + sum_{j <= i} exp(s_ij))

``gate`` is the natural logarithm of a factor per query head, token and channel; ``forget`` is the optional scalar gate of `forgetting`, also
natural and unscaled; a sink is a logit per query head that takes part in the denominator only.  A channel whose gate is -inf forgets all of the
past.  Always causal; queries are the last T of S tokens.  Query head h reads key-value head ``h // (Hq // Hkv)``, but gates belong to query heads.

It differs from a forget gate: a faded channel's product goes to 0, which is no vote, not to a score of -inf; with every channel faded the past is
attended evenly.

What people get wrong: splitting the gate over query and key, q exp(G_i) and k exp(-G_j), which overflows as soon as the running sum G passes -88
in float32 (-709 in float64): the decoding caches of the published kernels anchor it per chunk, and the authors bound the gates for it.  Their
kernels work in base 2, so a gate handed to an inner function must be multiplied by log2(e).

Checked against flash-linear-attention's wall_attn, its GPU-only running sum replaced by PyTorch's.
"""

import math

import numpy as np

from refattn.pieces.arrays import faded, softmax, sums_between, up_to_query
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, gate, forget, sinks, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
    scores = np.zeros(n_k)
    faded = np.zeros(d)  # the gates after key j
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i + n_k - n_q
                top = sinks[h]
                for x in range(d):
                    faded[x] = 0.0
                forgotten = 0.0
                for j in range(position, -1, -1):
                    s = 0.0
                    for x in range(d):
                        s += q[b, h, i, x] * k[b, g, j, x] * math.exp(faded[x])
                        faded[x] += gate[b, h, j, x]
                    scores[j] = scale * s + forgotten
                    forgotten += forget[b, h, j]
                    if scores[j] > top or math.isnan(scores[j]):  # NaN must win
                        top = scores[j]
                if top == -np.inf:
                    continue
                total = math.exp(sinks[h] - top)
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
    """Keys in blocks: what fades after a block fades a query, what fades inside it a key; within a block pairs have their own."""
    n_q, n_k, group, block = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1], 32
    q, gate, before = x["q"], x["gate"], n_k - n_q
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    columns = []
    for first in range(0, n_k, block):
        last = min(first + block, n_k)
        inside, after = (max(n - before, 0) for n in (first, last))  # where queries begin at these positions, or the first query
        parts = [np.zeros((*q.shape[:2], min(inside, n_q), last - first))]
        between = sums_between(np.swapaxes(gate[:, :, first:last], -1, -2))
        if after > inside:
            own = np.swapaxes(q[:, :, inside:after], -1, -2)[..., None] * np.swapaxes(k[:, :, first:last], -1, -2)[..., None, :]
            parts.append(np.sum(own * np.exp(between[:, :, :, inside + before - first :]), axis=2))
        if after < n_q:
            left = np.exp(np.cumsum(gate[:, :, last:], axis=2))[:, :, after + before - last :]
            to_come = np.exp(np.swapaxes(between[:, :, :, -1], -1, -2))
            parts.append((q[:, :, after:] * left) @ np.swapaxes(k[:, :, first:last] * to_come, -1, -2))
        columns.append(np.concatenate(parts, axis=2))
    scores = np.where(up_to_query(n_q, n_k), params["scale"] * np.concatenate(columns, axis=3) + faded(x["forget"], n_q), -np.inf)
    sinks = np.broadcast_to(x["sinks"][:, None, None], (*scores.shape[:3], 1))
    weights, lse = softmax(np.concatenate([scores, sinks], axis=3))
    return {"out": weights[..., :-1] @ v, "lse": lse}


def without_gates(run, x):
    kept = {name: x[name] for name in ("q", "k", "v")}
    return run({**x, "gate": 0.0 * x["gate"]}, returns=("out", "lse")), run(kept, name="softmax", causal=True, returns=("out", "lse"))


def gates_in_queries_and_keys(run, x):
    n_q, n_k = x["q"].shape[2], x["k"].shape[2]
    group = x["q"].shape[1] // x["k"].shape[1]
    up_to = np.cumsum(x["gate"], axis=2)
    rows = up_to[:, :, np.clip(np.arange(n_q) + n_k - n_q, 0, None)]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    split = {"q": x["q"] * np.exp(rows), "k": k * np.exp(-up_to), "v": v}
    return run(x, returns=("out", "lse")), run(split, name="softmax", causal=True, returns=("out", "lse"))


def forget_alone(run, x):
    forget = np.log(np.linspace(0.4, 1.0, x["gate"][0, :, :, 0].size)).reshape(1, *x["gate"].shape[1:3]) * np.ones((len(x["q"]), 1, 1))
    kept = {name: x[name] for name in ("q", "k", "v")}
    both = run({**x, "gate": 0.0 * x["gate"], "forget": forget}, returns=("out", "lse"))
    return both, run({**kept, "gate": forget}, name="forgetting", returns=("out", "lse"))


def all_channels_closed(run, x):
    """The past has scores of 0 then; a query sees its own key and the mean of the earlier values."""
    n = min(x["q"].shape[2], x["k"].shape[2])
    own = {**x, **{name: x[name][:, :, -n:] for name in ("q", "k", "v", "gate")}, "gate": np.full_like(x["gate"][:, :, -n:], -np.inf)}
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(own[name], group, axis=1) for name in ("k", "v"))
    weight = np.exp(0.5 * np.sum(own["q"] * k, axis=-1, keepdims=True))
    earlier = np.cumsum(v, axis=2) - v
    return run(own, scale=0.5), (weight * v + earlier) / (weight + np.arange(n)[:, None])


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v", "gate")}, "q": x["q"][:, :, :half]}
    parts = [run(first, returns=("out", "lse")), run({**x, "q": x["q"][:, :, half:]}, returns=("out", "lse"))]
    return run(x, returns=("out", "lse")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


#: Visible pairs of one head.
PAIRS = "(T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"

VARIANT = Variant(
    name="wall",
    family="scored",
    summary="Wall attention: causal softmax attention with a forget gate per channel of the query-key product.",
    equation="out_i = sum_{j <= i} softmax_j(scale sum_x q_ix k_jx exp(sum_{l = j+1..i} gate_lx) + sum_{l = j+1..i} forget_l) v_j",
    paper=Paper(
        title="Wall Attention: Length Generalization With Diagonal Gates",
        authors=("Pai, Dhruv", "Averbuch, Timor", "Zhang, Ashley", "Keigwin, Ben", "Dewulf, Alec"),
        year=2026,
        url="https://blog.tilderesearch.com/blog/wall-attn",
        where="section 2",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, of the last T tokens"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand(
            "gate",
            "B Hq S D",
            "natural logarithm of the factor of every token and channel",
            draw=lambda rng, shape: np.log(rng.uniform(0.3, 1.0, shape)),
        ),
        Operand(
            "forget",
            "B Hq S",
            "natural logarithm of a forget gate of every token",
            absent=0.0,
            draw=lambda rng, shape: np.log(rng.uniform(0.3, 1.0, shape)),
        ),
        Operand("sinks", "Hq", "logit per query head that takes part in the denominator only", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the row's sum of exponentials, sink included; -inf for a row that sees nothing", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies the sum; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*Hq*({PAIRS}*(5*D + 2*E + 6) + T*(E + 4))", memory="B*Hq*T*(E + 1) + S + D"),
    ordered=lambda params: "T S",
    causal={},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[2.0 * math.log(3.0), 50.0], [0.0, 0.0]]]],
                "v": [[[[8.0], [4.0]]]],
                "gate": [[[[9.0, 9.0], [math.log(0.5), -math.inf]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[7.0]]]], "lse": [[[math.log(4.0)]]]},
            source="by hand: a decode step; half of 2 log 3 is left of the first channel, nothing of the second; token 0's gates are never read",
        ),
        Example(
            operands={
                "q": [[[[1.0]]]],
                "k": [[[[7.0], [0.0]]]],
                "v": [[[[8.0], [2.0]]]],
                "gate": [[[[0.0], [-math.inf]]]],
                "forget": [[[0.0, math.log(0.5)]]],
                "sinks": [math.log(2.5)],
            },
            params={"scale": 1.0},
            returns={"out": [[[[1.5]]]], "lse": [[[math.log(4.0)]]]},
            source="by hand: weights 1/2 and 1 beside a sink of 5/2",
        ),
    ),
    identities=(
        Identity("with gates of 0 it is causal softmax attention", without_gates),
        Identity("gates can be put into queries and keys, while they are weak", gates_in_queries_and_keys),
        Identity("with the scalar gate alone it is forgetting attention", forget_alone),
        Identity("with every channel closed the past is attended evenly", all_channels_closed),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
