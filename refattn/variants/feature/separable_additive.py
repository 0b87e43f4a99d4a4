"""Separable self-attention (MobileViTv2): one score per token pools the keys into a context vector, which multiplies every value.

    c_i   = exp(q_i) / sum_j exp(q_j)
    C     = sum_i c_i k_i
    out_i = max(v_i, 0) * C                        (entry by entry)

q_i is one number per token, the input mapped to a width of one (the paper's branch I).  Linear in the number of tokens; every token shares the
context.  The paper's output map follows and is not here.  In the network the softmax runs over the patches, apart for each pixel of a patch.

What people get wrong: the axis of the softmax; the ReLU, on the values and not on the context.

Checked against transformers' MobileViTV2LinearSelfAttention.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Variant


def define(q, k, v):
    batch, n, width = k.shape
    out = np.zeros((batch, n, width))
    context = np.zeros((batch, width))
    for b in range(batch):
        top = -np.inf
        for i in range(n):
            if q[b, i] > top or math.isnan(q[b, i]):  # NaN must win
                top = q[b, i]
        total = 0.0
        for i in range(n):
            weight = math.exp(q[b, i] - top)
            total += weight
            for x in range(width):
                context[b, x] += weight * k[b, i, x]
        for x in range(width):
            context[b, x] = context[b, x] / total if n > 0 else 0.0
        for i in range(n):
            for x in range(width):
                out[b, i, x] = (v[b, i, x] if v[b, i, x] > 0.0 else 0.0) * context[b, x]
    return out, context


def vectorized(x, params):
    context = softmax(x["q"])[0][:, None] @ x["k"]
    return {"out": np.maximum(x["v"], 0.0) * context, "context": context[:, 0]}


def pooled_by_softmax(run, x):
    one = {"q": np.ones((len(x["q"]), 1, 1, 1)), "k": x["q"][:, None, :, None], "v": x["k"][:, None]}
    return run(x, returns="context"), run(one, name="softmax", scale=1.0, returns="out")[:, 0, 0]


def equal_scores(run, x):
    return run({**x, "q": 0.0 * x["q"] + 3.0}, returns="context"), x["k"].mean(axis=1)


def ones_give_the_context(run, x):
    return run({**x, "v": np.ones_like(x["v"])}), run(x, returns="context")[:, None]


VARIANT = Variant(
    name="separable_additive",
    family="feature",
    summary="Separable self-attention (MobileViTv2): one pooled context vector multiplies the rectified values.",
    equation="out_i = relu(v_i) * sum_j softmax_j(q_j) k_j",
    paper=Paper(
        title="Separable Self-attention for Mobile Vision Transformers",
        authors=("Mehta, Sachin", "Rastegari, Mohammad"),
        year=2022,
        arxiv="2206.02680",
        where="section 3.2",
    ),
    operands=(
        Operand("q", "B T", "one score per token"),
        Operand("k", "B T E", "keys"),
        Operand("v", "B T E", "values"),
    ),
    outputs=(
        Output("out", "B T E", "output, before its map"),
        Output("context", "B E", "the context vector"),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops="B*(T*(3*E + 3) + (E if T > 0 else 0))", memory="B*E*(T + 1)"),
    linear_in="k",
    examples=(
        Example(
            operands={"q": [[0.0, math.log(3.0)]], "k": [[[4.0, 0.0], [8.0, 4.0]]], "v": [[[2.0, -1.0], [0.0, 5.0]]]},
            returns={"out": [[[14.0, 0.0], [0.0, 15.0]]], "context": [[7.0, 3.0]]},
            source="by hand: weights 1/4 and 3/4",
        ),
    ),
    identities=(
        Identity("the context is softmax attention with one query", pooled_by_softmax),
        Identity("equal scores give the mean of the keys", equal_scores),
        Identity("values all one give the context to everyone", ones_give_the_context),
    ),
)
