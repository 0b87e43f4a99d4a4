"""Efficient additive attention (SwiftFormer): queries pooled into one, which marks every key; no keys meet queries and there are no values.

    qn_i  = q_i / max(|q_i|, 1e-12),      kn_i = k_i / max(|k_i|, 1e-12)
    a_i   = scale * w . qn_i
    Q     = sum_i a_i qn_i / max(|a|, 1e-12)      ``pooling="unit"``
          = sum_i a_i qn_i                        ``pooling="raw"``
          = sum_i softmax_i(a) qn_i               ``pooling="softmax"``
    out_i = W (Q * kn_i) + bias + qn_i

The paper's equations pool with the a_i as they are and put the hat of the normalised query on the last term only; the authors' code, followed here
by default, normalises queries and keys first and divides a by its length over the tokens, under which scale cancels.  The last linear map of the
layer is not here.

What people get wrong: transformers takes a softmax of a along its last axis, which has length one, so that its weights are all 1, w is never
trained and the query is the plain sum of all; meant over the tokens it would be ``pooling="softmax"``.  That and the original differ.

Checked against a composition of torch.nn.functional.normalize and torch.nn.Linear, and against transformers'
SwiftFormerEfficientAdditiveAttention, whose output is shown not to depend on w.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, w, w_o, bias, scale, pooling):
    batch, n, d = q.shape
    out = np.zeros((batch, n, d))
    a = np.zeros(n)
    unit = np.zeros((n, d))  # the normalised queries
    query = np.zeros(d)  # Q
    for b in range(batch):
        for i in range(n):
            squares = 0.0
            for x in range(d):
                squares += q[b, i, x] * q[b, i, x]
            length = max(math.sqrt(squares), 1e-12)
            a[i] = 0.0
            for x in range(d):
                unit[i, x] = q[b, i, x] / length
                a[i] += w[x] * unit[i, x]
            a[i] *= scale
        if pooling == 0:  # unit
            squares = 0.0
            for i in range(n):
                squares += a[i] * a[i]
            length = max(math.sqrt(squares), 1e-12)
            for i in range(n):
                a[i] /= length
        elif pooling == 2:  # softmax
            top = -np.inf
            for i in range(n):
                if a[i] > top or math.isnan(a[i]):  # NaN must win
                    top = a[i]
            total = 0.0
            for i in range(n):
                a[i] = math.exp(a[i] - top)
                total += a[i]
            for i in range(n):
                a[i] /= total
        for x in range(d):
            query[x] = 0.0
            for i in range(n):
                query[x] += a[i] * unit[i, x]
        for i in range(n):
            squares = 0.0
            for x in range(d):
                squares += k[b, i, x] * k[b, i, x]
            length = max(math.sqrt(squares), 1e-12)
            for y in range(d):
                out[b, i, y] = bias[y] + unit[i, y]
                for x in range(d):
                    out[b, i, y] += w_o[y, x] * query[x] * k[b, i, x] / length
    return out


def vectorized(x, params):
    def unit(a):
        squares = np.sum(a * a, axis=-1, keepdims=True)
        return a / np.sqrt(np.where(squares < 1e-24, 1e-24, squares))

    queries = unit(x["q"])
    weights = params["scale"] * np.sum(x["w"] * queries, axis=-1)
    if params["pooling"] != "raw":
        weights = unit(weights) if params["pooling"] == "unit" else softmax(weights)[0]
    pooled = weights[:, None] @ queries
    return {"out": (pooled * unit(x["k"])) @ np.swapaxes(x["w_o"], -1, -2) + x["bias"] + queries}


def from_the_pooled(x, pool):
    qn, kn = (x[name] / np.linalg.norm(x[name], axis=-1, keepdims=True) for name in ("q", "k"))
    query = np.einsum("bn,bnx->bx", pool(qn @ x["w"]), qn)
    return (query[:, None] * kn) @ x["w_o"].T + qn


def pooled_by_softmax(run, x):
    def pool(a):
        one = {"q": np.ones((len(a), 1, 1, 1)), "k": a[:, None, :, None], "v": np.ones((*a.shape, 1))[:, None]}
        return run(one, name="softmax", scale=0.5, returns="weights")[:, 0, 0]

    return run(x, scale=0.5, pooling="softmax"), from_the_pooled(x, pool)


VARIANT = Variant(
    name="efficient_additive",
    family="feature",
    summary="Efficient additive attention (SwiftFormer): one pooled query multiplies every key, in linear time.",
    equation="Q = sum_i a_i qn_i / |a|, a_i = scale w . qn_i, out_i = W (Q * kn_i) + bias + qn_i, qn and kn normalised",
    paper=Paper(
        title="SwiftFormer: Efficient Additive Attention for Transformer-based Real-time Mobile Vision Applications",
        authors=("Shaker, Abdelrahman", "Maaz, Muhammad", "Rasheed, Hanoona", "Khan, Salman", "Yang, Ming-Hsuan", "Khan, Fahad Shahbaz"),
        year=2023,
        arxiv="2303.15446",
        where="section 3.2, equations 4 to 6",
    ),
    operands=(
        Operand("q", "B T D", "queries"),
        Operand("k", "B T D", "keys"),
        Operand("w", "D", "scores a query"),
        Operand("w_o", "D D", "matrix of the output, applied from the left", draw=lambda rng, shape: rng.standard_normal(shape) / shape[-1] ** 0.5),
        Operand("bias", "D", "added to the output", absent=0.0),
    ),
    outputs=(Output("out", "B T D", "output, normalised queries added"),),
    params=(
        Param("scale", Number(optional=True), None, "multiplies the scores; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("pooling", Choice(("unit", "raw", "softmax")), "unit", "what the scores become before they pool", tries=("raw", "softmax")),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops="B*(T*(4*D*D + 10*D + 3) + (3*T + 1 if pooling == 0 else 0 if pooling == 1 else 4*T))",
        memory="B*T*D + T + T*D + D",
    ),
    examples=(
        Example(
            operands={"q": [[[3.0, 4.0], [0.0, 2.0]]], "k": [[[5.0, 0.0], [0.0, 0.0]]], "w": [5.0, 0.0], "w_o": [[10.0, 0.0], [1.0, 0.0]]},
            params={"scale": 1.0, "pooling": "raw"},
            returns={"out": [[[18.6, 2.6], [0.0, 1.0]]]},
            source="by hand: unit queries (0.6, 0.8) and (0, 1), a = 3 and 0, Q = (1.8, 2.4), the first key marked is (1.8, 0), the other 0",
        ),
        Example(
            operands={"q": [[[2.0], [3.0], [-4.0]]], "k": [[[7.0], [-1.0], [0.0]]], "w": [5.0], "w_o": [[math.sqrt(3.0)]], "bias": [1.0]},
            returns={"out": [[[5.0], [-1.0], [0.0]]]},
            source="by hand: a = 5, 5, -5, over its length 1/sqrt(3) each, so Q = sqrt(3) and W Q = 3",
        ),
    ),
    identities=(
        Identity("pooled as it is, it is two products", lambda run, x: (run(x, scale=0.5, pooling="raw"), from_the_pooled(x, lambda a: 0.5 * a))),
        Identity(
            "in unit length it is too",
            lambda run, x: (run(x), from_the_pooled(x, lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True))),
        ),
        Identity("pooled by softmax it is softmax attention with one query, and two products", pooled_by_softmax),
        Identity("in unit length the scale cancels", lambda run, x: (run(x, scale=0.25), run(x, scale=4.0))),
        Identity("lengths of queries and keys mean nothing", lambda run, x: (run({**x, "q": 4.0 * x["q"], "k": 0.5 * x["k"]}), run(x))),
    ),
)
