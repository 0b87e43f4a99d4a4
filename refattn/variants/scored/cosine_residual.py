"""Self-attention by cosine similarity, with the token itself added back.

    c_ij  = v_i . v_j / (|v_i| |v_j|)
    p_ij  = exp(c_ij) / sum_j' exp(c_ij')
    out_i = v_i + sum_j p_ij v_j

One array of token embeddings is query, key and value at once.  The sum runs over the whole sequence, the token itself included; there is
no head, no projection, no scale and no mask.  A zero vector has no direction: its cosine with anything, itself included, is taken as 0.
Lengths are square roots of sums of squares in float64, so elements outside 1e-154 to 1e154 are beyond this definition.

The source is an undated article in Chinese on extending attention in large language models.  Its text names no author and carries no
title of its own; the title cited here renders its stated subject, 如何在大规模语言模型中扩展注意力机制, and it bears no date.
Its prose lets a token attend to the *other* positions, its formula sums over all of them; the formula is what is defined here.
Attention by cosine with learned projections and a learned scale is Henry et al., "Query-Key Normalization for Transformers",
arXiv:2010.04245.

What people get wrong: keeping 1/sqrt(D), although the scores already lie in [-1, 1]; leaving the token itself out; normalising the values
as well as the queries and keys; expecting sharp attention: with scores in [-1, 1] no weight can be more than e**2 times another in its
row, which is what the learned scale of Henry et al. is for.

Checked against a composition of PyTorch's cosine_similarity and softmax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.pieces.similarities import cosine
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Plan, Variant


def define(v):
    batch, n, d = v.shape
    out = np.zeros((batch, n, d))
    weights = np.zeros((batch, n, n))
    scores = np.zeros((batch, n, n))
    norms = np.zeros(n)
    for b in range(batch):
        for i in range(n):
            square = 0.0
            for x in range(d):
                square += v[b, i, x] * v[b, i, x]
            norms[i] = math.sqrt(square)
        for i in range(n):
            total = 0.0
            for j in range(n):
                dot = 0.0
                for x in range(d):
                    dot += v[b, i, x] * v[b, j, x]
                if norms[i] != 0.0 and norms[j] != 0.0:
                    scores[b, i, j] = dot / (norms[i] * norms[j])
                weights[b, i, j] = math.exp(scores[b, i, j])  # a cosine is at most 1, so no maximum need be subtracted
                total += weights[b, i, j]
            for j in range(n):
                weights[b, i, j] /= total
                for x in range(d):
                    out[b, i, x] += weights[b, i, j] * v[b, j, x]
            for x in range(d):
                out[b, i, x] += v[b, i, x]
    return out, weights, scores


def vectorized(x, params):
    v = x["v"]
    squares = np.sum(v * v, axis=-1, keepdims=True)
    unit = v / np.sqrt(np.where(squares == 0.0, 1.0, squares))
    scores = unit @ np.swapaxes(unit, 1, 2)
    weights, _ = softmax(scores)
    return {"out": v + weights @ v, "weights": weights, "scores": scores}


def plan(dims, params):
    return Plan(similarity=cosine, query="v", key="v", value="v", residual="v")


def longer_tokens(run, x):
    return run({"v": 3.0 * x["v"]}), 3.0 * run(x)


def softmax_of_unit_vectors(run, x):
    v = x["v"]
    norms = np.sqrt(np.sum(v * v, axis=-1, keepdims=True))
    unit = np.divide(v, norms, out=np.zeros_like(v), where=norms != 0.0)[:, None]
    attended = run({"q": unit, "k": unit, "v": v[:, None]}, name="softmax", scale=1.0, returns="out")
    return run(x, returns="out"), v + attended[:, 0]


VARIANT = Variant(
    name="cosine_residual",
    family="scored",
    summary="Self-attention by cosine similarity of the tokens, each token added back to what it attends to.",
    equation="out_i = v_i + sum_j softmax_j(v_i . v_j / (|v_i| |v_j|)) v_j",
    paper=Paper(
        title="Extending the attention mechanism in large language models (in Chinese)",
        authors=("Anonymous",),
        where="section 3.3",
    ),
    operands=(Operand("v", "B T D", "token embeddings: queries, keys and values at once"),),
    outputs=(
        Output("out", "B T D", "token plus attention output"),
        Output("weights", "B T T", "p_ij"),
        Output("scores", "B T T", "cosines c_ij"),
    ),
    define=define,
    vectorized=vectorized,
    plan=plan,
    cost=Cost(
        flops="B*(T*(3*D + 1) + T*T*(4*D + 5))",
        memory="B*T*(D + 2*T) + T",
    ),
    examples=(
        Example(
            operands={"v": [[[3.0, 4.0]]]},
            returns={"out": [[[6.0, 8.0]]], "weights": [[[1.0]]], "scores": [[[1.0]]]},
            source="by hand: a token alone attends to itself",
        ),
        Example(
            operands={"v": [[[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]},
            returns={
                "out": [[[3.0 + 3.0 * math.e / (math.e + 3.0), 0.0], [0.75, 0.0], [0.75, 0.0], [0.75, 0.0]]],
                "scores": [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]],
            },
            source="by hand: a zero vector scores 0 with everything, itself included, so it attends evenly",
        ),
        Example(
            operands={"v": [[[2.0, 0.0], [0.0, 5.0], [-4.0, 0.0]]]},
            returns={"scores": [[[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]]},
            source="by hand: equal, right and opposite angles, whatever the lengths",
        ),
    ),
    identities=(
        Identity("tokens three times as long give outputs three times as long", longer_tokens),
        Identity("it is softmax attention of unit vectors with scale 1, plus the token", softmax_of_unit_vectors),
        Identity("each row of weights sums to one", lambda run, x: (run(x, returns="weights").sum(-1), 1.0)),
        Identity("cosines are symmetric", lambda run, x: (run(x, returns="scores"), np.swapaxes(run(x, returns="scores"), -1, -2))),
    ),
)
