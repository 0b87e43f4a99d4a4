"""Fastformer: a global query of all queries marks the keys, a global key of those marks the values, each an average by additive attention.

    a_i   = softmax over i of scale * w_q . q_i,      Q = sum_i a_i q_i
    p_i   = Q * k_i                                                              (entry by entry)
    b_i   = softmax over i of scale * w_k . p_i,      K = sum_i b_i p_i
    out_i = W (K * v_i) + bias + q_i

per head.  Linear in the number of tokens, and not causal: every token needs both averages over all of them.

What people get wrong: averaging the raw keys k_i instead of the marked p_i, as fast_transformer_pytorch does, which leaves one factor Q out; the
queries added at the end, which belong to the operation.  The authors' code takes v = q (their weight sharing), lets a head's score see the
channels of all heads, and W mix the heads.

Checked against fast_transformer_pytorch, its missing factor put back, and against a composition of torch.nn.Linear and softmax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, w_q, w_k, w, bias, scale):
    batch, heads, n, d = q.shape
    out = np.zeros((batch, heads, n, d))
    scores = np.zeros(n)
    query = np.zeros(d)  # Q
    key = np.zeros(d)  # K
    for b in range(batch):
        for h in range(heads):
            top = -np.inf
            for i in range(n):
                s = 0.0
                for x in range(d):
                    s += w_q[h, x] * q[b, h, i, x]
                scores[i] = scale * s
                if scores[i] > top or math.isnan(scores[i]):  # NaN must win
                    top = scores[i]
            total = 0.0
            for x in range(d):
                query[x] = 0.0
            for i in range(n):
                weight = math.exp(scores[i] - top)
                total += weight
                for x in range(d):
                    query[x] += weight * q[b, h, i, x]
            for x in range(d):
                query[x] /= total
            top = -np.inf
            for i in range(n):
                s = 0.0
                for x in range(d):
                    s += w_k[h, x] * query[x] * k[b, h, i, x]
                scores[i] = scale * s
                if scores[i] > top or math.isnan(scores[i]):
                    top = scores[i]
            total = 0.0
            for x in range(d):
                key[x] = 0.0
            for i in range(n):
                weight = math.exp(scores[i] - top)
                total += weight
                for x in range(d):
                    key[x] += weight * query[x] * k[b, h, i, x]
            for x in range(d):
                key[x] /= total
            for i in range(n):
                for y in range(d):
                    out[b, h, i, y] = bias[h, y] + q[b, h, i, y]
                    for x in range(d):
                        out[b, h, i, y] += w[h, y, x] * key[x] * v[b, h, i, x]
    return out


def vectorized(x, params):
    def pooled(tokens, weight):
        weights, _ = softmax(params["scale"] * np.sum(weight[:, None] * tokens, axis=-1))
        return weights[:, :, None] @ tokens

    marked = pooled(x["q"], x["w_q"]) * x["k"]
    return {"out": (pooled(marked, x["w_k"]) * x["v"]) @ np.swapaxes(x["w"], -1, -2) + x["bias"][:, None] + x["q"]}


def two_separable(run, x):
    """Each average is softmax attention with one query, of width one."""

    def average(scores, values):
        one = {"q": np.ones((*values.shape[:2], 1, 1)), "k": scores[..., None], "v": values}
        return run(one, name="softmax", scale=x["q"].shape[3] ** -0.5, returns="out")

    query = average(np.einsum("hx,bhnx->bhn", x["w_q"], x["q"]), x["q"])
    marked = query * x["k"]
    key = average(np.einsum("hx,bhnx->bhn", x["w_k"], marked), marked)
    return run(x), np.einsum("hyx,bhnx->bhny", x["w"], key * x["v"]) + x["q"]


def means(run, x):
    query = x["q"].mean(axis=2, keepdims=True)
    key = query * x["k"].mean(axis=2, keepdims=True)
    even = {**x, "w_q": 0.0 * x["w_q"], "w_k": 0.0 * x["w_k"]}
    return run(even), np.einsum("hyx,bhnx->bhny", x["w"], key * x["v"]) + x["q"]


def repeated_tokens(run, x):
    twice = {**x, **{name: np.concatenate([x[name], x[name]], axis=2) for name in ("q", "k", "v")}}
    out = run(x)
    return run(twice), np.concatenate([out, out], axis=2)


VARIANT = Variant(
    name="fastformer",
    family="feature",
    summary="Fastformer: additive attention to one global query and one global key, in linear time.",
    equation="Q = sum_i softmax_i(scale w_q . q_i) q_i, p_i = Q * k_i, K = sum_i softmax_i(scale w_k . p_i) p_i, out_i = W (K * v_i) + bias + q_i",
    paper=Paper(
        title="Fastformer: Additive Attention Can Be All You Need",
        authors=("Wu, Chuhan", "Wu, Fangzhao", "Qi, Tao", "Huang, Yongfeng", "Xie, Xing"),
        year=2021,
        arxiv="2108.09084",
        where="section 3.1, equations 1 to 4",
    ),
    operands=(
        Operand("q", "B H T D", "queries"),
        Operand("k", "B H T D", "keys"),
        Operand("v", "B H T D", "values (in the authors' code the queries again)"),
        Operand("w_q", "H D", "scores a query"),
        Operand("w_k", "H D", "scores a marked key"),
        Operand("w", "H D D", "matrix of the output, applied from the left", draw=lambda rng, shape: rng.standard_normal(shape) / shape[-1] ** 0.5),
        Operand("bias", "H D", "added to the output", absent=0.0),
    ),
    outputs=(Output("out", "B H T D", "output, queries added"),),
    params=(Param("scale", Number(optional=True), None, "multiplies both scores; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops="B*H*(T*(3*D*D + 11*D + 8) + 2*D)", memory="B*H*T*D + T + 2*D"),
    examples=(
        Example(
            operands={
                "q": [[[[0.0], [2.0 * math.log(3.0)]]]],
                "k": [[[[2.0], [2.0]]]],
                "v": [[[[1.0], [0.0]]]],
                "w_q": [[0.5]],
                "w_k": [[7.0]],
                "w": [[[2.0]]],
                "bias": [[5.0]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[5.0 + 6.0 * math.log(3.0)], [5.0 + 2.0 * math.log(3.0)]]]]},
            source="by hand: weights 1/4 and 3/4, Q = 3/2 log 3, K = 2 Q, and twice that, the bias and the query",
        ),
        Example(
            operands={
                "q": [[[[1.0, 2.0]]]],
                "k": [[[[4.0, 3.0]]]],
                "v": [[[[2.0, 1.0]]]],
                "w_q": [[1.0, 5.0]],
                "w_k": [[1.0, 5.0]],
                "w": [[[1.0, 0.0], [1.0, 1.0]]],
            },
            returns={"out": [[[[9.0, 16.0]]]]},
            source="by hand: one token, so Q = (1, 2) and K = (4, 6); K * v = (8, 6)",
        ),
    ),
    identities=(
        Identity("each average is softmax attention with one query", two_separable),
        Identity("with scorers of 0 the averages are means", means),
        Identity("every token twice changes nothing", repeated_tokens),
    ),
)
