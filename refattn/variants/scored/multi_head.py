"""Multi-head attention with its projections: heads of scaled dot-product attention between four linear maps.

    q_hi  = x_i W_q[h] + b_q[h],      k_gj = y_j W_k[g] + b_k[g],      v_gj = z_j W_v[g] + b_v[g]
    p_hij = softmax_j(scale * q_hi . k_gj),      head_hi = sum_j p_hij v_gj
    out_i = sum_h head_hi W_o[h] + b_o

x, y, z are the operands query, key and value, all of model width M; self-attention passes the same array three times.  Each head's map is
its own matrix, applied from the right.  Query head h reads key-value head ``g = h // (Hq // Hkv)``; the paper has Hq == Hkv, D == E == M / Hq,
and no biases.  Masks and ``causal`` mean what they mean in `softmax`; a query that sees nothing gives b_o alone.

From PyTorch's ``nn.MultiheadAttention`` of H heads and width M, with D = M // H:

    w_q, w_k, w_v = (w.reshape(H, D, M).transpose(0, 2, 1) for w in np.split(in_proj_weight, 3))
    b_q, b_k, b_v = (b.reshape(H, D) for b in np.split(in_proj_bias, 3))
    w_o, b_o = out_proj.weight.T.reshape(H, D, M), out_proj.bias

What people get wrong: PyTorch's layer stores its matrices transposed and its boolean masks inverted (there True *hides* a key), and returns
weights averaged over heads unless told otherwise; a fused projection may be ordered (3, H, D) or (H, 3, D); scaling by the model width instead
of the head width.  A key bias shifts a whole row of scores and so changes nothing, although most implementations carry one.

Checked against PyTorch's nn.MultiheadAttention.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax, up_to_query
from refattn.pieces.masks import causal as causal_mask
from refattn.pieces.similarities import dot
from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Plan, Stage, Variant


def define(query, key, value, w_q, w_k, w_v, w_o, b_q, b_k, b_v, b_o, mask, scale, causal):
    batch, n_q, width = query.shape
    n_k = key.shape[1]
    heads, kv_heads, d, d_v = w_q.shape[0], w_k.shape[0], w_q.shape[2], w_v.shape[2]
    out = np.zeros((batch, n_q, width))
    weights = np.zeros((batch, heads, n_q, n_k))
    q = np.zeros((heads, n_q, d))
    k = np.zeros((kv_heads, n_k, d))
    v = np.zeros((kv_heads, n_k, d_v))
    head = np.zeros((heads, n_q, d_v))
    scores = np.zeros(n_k)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                for x in range(d):
                    q[h, i, x] = b_q[h, x]
                    for m in range(width):
                        q[h, i, x] += query[b, i, m] * w_q[h, m, x]
        for g in range(kv_heads):
            for j in range(n_k):
                for x in range(d):
                    k[g, j, x] = b_k[g, x]
                    for m in range(width):
                        k[g, j, x] += key[b, j, m] * w_k[g, m, x]
                for y in range(d_v):
                    v[g, j, y] = b_v[g, y]
                    for m in range(width):
                        v[g, j, y] += value[b, j, m] * w_v[g, m, y]
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                for y in range(d_v):
                    head[h, i, y] = 0.0
                position = i if causal == 2 else i + n_k - n_q  # causal: 0 no, 1 bottom-right, 2 top-left
                top = -np.inf
                for j in range(n_k):
                    scores[j] = -np.inf
                    if (causal == 0 or j <= position) and mask[b, h, i, j]:
                        s = 0.0
                        for x in range(d):
                            s += q[h, i, x] * k[g, j, x]
                        scores[j] = scale * s
                        if scores[j] > top or math.isnan(scores[j]):  # NaN must win
                            top = scores[j]
                if top == -np.inf:
                    continue
                total = 0.0
                for j in range(n_k):
                    if scores[j] != -np.inf:
                        weights[b, h, i, j] = math.exp(scores[j] - top)
                        total += weights[b, h, i, j]
                for j in range(n_k):
                    if scores[j] != -np.inf:
                        weights[b, h, i, j] /= total
                        for y in range(d_v):
                            head[h, i, y] += weights[b, h, i, j] * v[g, j, y]
        for i in range(n_q):
            for m in range(width):
                out[b, i, m] = b_o[m]
                for h in range(heads):
                    for y in range(d_v):
                        out[b, i, m] += head[h, i, y] * w_o[h, y, m]
    return out, weights


def vectorized(x, params):
    n_q, n_k, group = x["query"].shape[1], x["key"].shape[1], x["w_q"].shape[0] // x["w_k"].shape[0]
    q, k, v = (x[name][:, None] @ x["w_" + name[0]] + x["b_" + name[0]][:, None] for name in ("query", "key", "value"))
    scores = params["scale"] * (q @ np.swapaxes(np.repeat(k, group, axis=1), -1, -2))
    causal = np.tri(n_q, n_k, dtype=bool) if params["causal"] == "top_left" else up_to_query(n_q, n_k)
    visible = x["mask"] & (causal | (not params["causal"]))
    weights, _ = softmax(np.where(visible, scores, -np.inf))
    heads = weights @ np.repeat(v, group, axis=1) @ x["w_o"]
    return {"out": np.sum(heads, axis=1) + x["b_o"], "weights": weights}


def plan(dims, params):
    offset = 0 if params["causal"] == "top_left" else dims["S"] - dims["T"]
    return Plan(
        similarity=dot,
        query="query",
        key="key",
        value="value",
        projections=(("w_q", "b_q"), ("w_k", "b_k"), ("w_v", "b_v"), ("w_o", "b_o")),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        masks=(Stage(causal_mask, (offset,)),) if params["causal"] else (),
        mask="mask",
    )


def projected(x, name, weight):
    return np.einsum("bnm,hmd->bhnd", x[name], x[weight])


def grouped(x, per_kv_head):
    """One entry per query head from one per key-value head."""
    return np.repeat(per_kv_head, x["w_q"].shape[0] // x["w_k"].shape[0], axis=0)


def softmax_between_projections(run, x):
    inner = {"q": projected(x, "query", "w_q"), "k": projected(x, "key", "w_k"), "v": projected(x, "value", "w_v")}
    heads, weights = run(inner, name="softmax", causal=True, returns=("out", "weights"))
    return run(x, causal=True, returns=("out", "weights")), (np.einsum("bhne,hem->bnm", heads, x["w_o"]), weights)


def key_bias_changes_nothing(run, x):
    kv_heads, _, d = x["w_k"].shape
    return run(x, returns="out"), run({**x, "b_k": np.linspace(-1.0, 1.0, kv_heads * d).reshape(kv_heads, d)}, returns="out")


def value_bias_passes_through(run, x):
    kv_heads, _, d_v = x["w_v"].shape
    b_v = np.linspace(-1.0, 2.0, kv_heads * d_v).reshape(kv_heads, d_v)
    out, weights = run(x, returns=("out", "weights"))
    mass = weights.sum(-1)  # 1, or 0 for a query that sees nothing
    return run({**x, "b_v": b_v}, returns="out"), out + np.einsum("bhn,he,hem->bnm", mass, grouped(x, b_v), x["w_o"])


def heads_add_up(run, x):
    group = x["w_q"].shape[0] // x["w_k"].shape[0]
    separate = [
        run({**x, **{w: x[w][h : h + 1] for w in ("w_q", "w_o")}, **{w: x[w][h // group : h // group + 1] for w in ("w_k", "w_v")}}, returns="out")
        for h in range(x["w_q"].shape[0])
    ]
    return run(x, returns="out"), np.sum(separate, axis=0)


VARIANT = Variant(
    name="multi_head",
    family="scored",
    summary="Multi-head attention with query, key, value and output projections and their biases.",
    equation="out_i = sum_h softmax_j(scale (x_i W_q[h]) . (y_j W_k[h])) (z_j W_v[h]) W_o[h]",
    paper=Paper(
        title="Attention Is All You Need",
        authors=(
            "Vaswani, Ashish",
            "Shazeer, Noam",
            "Parmar, Niki",
            "Uszkoreit, Jakob",
            "Jones, Llion",
            "Gomez, Aidan N.",
            "Kaiser, Lukasz",
            "Polosukhin, Illia",
        ),
        year=2017,
        arxiv="1706.03762",
        where="section 3.2.2",
    ),
    operands=(
        Operand("query", "B T M", "tokens the queries are made from"),
        Operand("key", "B S M", "tokens the keys are made from"),
        Operand("value", "B S M", "tokens the values are made from"),
        Operand("w_q", "Hq M D", "query map of each head", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("w_k", "Hkv M D", "key map of each key-value head", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("w_v", "Hkv M E", "value map of each key-value head", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("w_o", "Hq E M", "each head's part of the output map", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("b_q", "Hq D", "added to the queries", absent=0.0),
        Operand("b_k", "Hkv D", "added to the keys", absent=0.0),
        Operand("b_v", "Hkv E", "added to the values", absent=0.0),
        Operand("b_o", "M", "added to the output", absent=0.0),
        Operand("mask", "B Hq T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
    ),
    outputs=(
        Output("out", "B T M", "attention output"),
        Output("weights", "B Hq T S", "p_hij, 0 where hidden"),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param(
            "causal",
            Choice((False, True, "top_left")),
            False,
            "see no later position; True aligns the last query with the last key",
            tries=(True, "top_left"),
        ),
    ),
    define=define,
    vectorized=vectorized,
    plan=plan,
    cost=Cost(
        flops="B*(2*M*(Hq*T*(D + E) + Hkv*S*(D + E)) + Hq*pairs*(2*D + 2*E + 5))",
        memory="B*T*M + B*Hq*T*S + Hq*T*(D + E) + Hkv*S*(D + E) + S",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={
                "query": [[[1.0, 2.0]]],
                "key": [[[0.0, 0.0], [1.0, 0.0]]],
                "value": [[[4.0, 1.0], [8.0, 5.0]]],
                "w_q": [[[math.log(3.0)], [0.0]]],
                "w_k": [[[1.0], [0.0]]],
                "w_v": [[[1.0], [-1.0]]],
                "w_o": [[[10.0, 1.0]]],
                "b_v": [[4.0]],
                "b_o": [0.0, 100.0],
            },
            returns={"out": [[[70.0, 107.0]]], "weights": [[[[0.25, 0.75]]]]},
            source="by hand: q = log 3, k = 0 and 1, v = 3 + 4 for both keys",
        ),
        Example(
            operands={
                "query": [[[0.0, 0.0], [0.0, 0.0]]],
                "key": [[[5.0, 6.0], [7.0, 8.0]]],
                "value": [[[1.0, 2.0], [3.0, 6.0]]],
                "w_q": [[[1.0], [1.0]], [[2.0], [3.0]]],
                "w_k": [[[1.0], [1.0]], [[2.0], [1.0]]],
                "w_v": [[[1.0], [0.0]], [[0.0], [1.0]]],
                "w_o": [[[1.0, 0.0]], [[0.0, 1.0]]],
            },
            params={"causal": True},
            returns={
                "out": [[[1.0, 2.0], [2.0, 4.0]]],
                "weights": [[[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]],
            },
            source="by hand: scores all 0, two heads that each carry one coordinate of the values",
        ),
    ),
    identities=(
        Identity("it is softmax attention between projections", softmax_between_projections),
        Identity("a key bias changes nothing", key_bias_changes_nothing),
        Identity("a value bias passes through the weights, which sum to one", value_bias_passes_through),
        Identity("the heads' contributions add up", heads_add_up),
    ),
)
