"""A scaled dot-product attention class as a published article prints it, softmax axis included.

    s_ij  = q_i . k_j / sqrt(D),  and s_ij = -1e9 where mask_ij == 0
    p_ij  = exp(s_ij) / sum_i' exp(s_i'j)        as printed: dim=1 of an array (B, T, S), so over the queries
    p_ij  = exp(s_ij) / sum_j' exp(s_ij')        ``axis=2``: over the keys, surely what was meant
    out_i = sum_j p_ij v_j

As printed, each *key's* column of weights sums to one: every key hands out one unit of attention among the queries, a query's weights sum
to anything from 0 to S, and a query's output changes when other queries do, so nothing that decodes token by token can use it.  With
a head axis, (B, H, T, S), the printed axis 1 would even normalise across heads.  ``axis=2`` is the last axis and gives ordinary attention.

The article's ``embed_dim`` is D, the width of the queries it is handed.  Its class calls ``math.sqrt`` without importing math, declares a
linear layer that nothing uses, and computes the same softmax again when training; none of that changes the result.  Output and
weights are both returned, as there.  The article is undated and unsigned; see `cosine_residual` for how it is cited.

What people get wrong: a mask as a large negative number is not a mask of -inf.  Where every score of a column (``axis=2``: a row) is
masked, all are -1e9 and the weights are uniform over the hidden entries; NaN in a hidden value reaches the output as 0 * NaN.  Both
are kept here, being what the printed code does.

Checked against the printed class itself, run in PyTorch with the missing import.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.pieces.similarities import dot
from refattn.spec import Choice, Cost, Example, Identity, Operand, Output, Paper, Param, Plan, Variant


def define(q, k, v, mask, axis):
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1], v.shape[2]
    out = np.zeros((batch, n_q, d_v))
    weights = np.zeros((batch, n_q, n_k))
    scores = np.zeros((batch, n_q, n_k))
    root = math.sqrt(d)
    for b in range(batch):
        for i in range(n_q):
            for j in range(n_k):
                s = 0.0
                for x in range(d):
                    s += q[b, i, x] * k[b, j, x]
                scores[b, i, j] = -1e9 if mask[b, i, j] == 0.0 else s / root
        if axis == 0:  # the printed dim=1: each column by itself
            for j in range(n_k):
                top = -np.inf
                for i in range(n_q):
                    if scores[b, i, j] > top or math.isnan(scores[b, i, j]):  # NaN must win
                        top = scores[b, i, j]
                total = 0.0
                for i in range(n_q):
                    weights[b, i, j] = math.exp(scores[b, i, j] - top)
                    total += weights[b, i, j]
                for i in range(n_q):
                    weights[b, i, j] /= total
        else:  # dim=2: each row by itself
            for i in range(n_q):
                top = -np.inf
                for j in range(n_k):
                    if scores[b, i, j] > top or math.isnan(scores[b, i, j]):
                        top = scores[b, i, j]
                total = 0.0
                for j in range(n_k):
                    weights[b, i, j] = math.exp(scores[b, i, j] - top)
                    total += weights[b, i, j]
                for j in range(n_k):
                    weights[b, i, j] /= total
        for i in range(n_q):
            for j in range(n_k):
                for y in range(d_v):
                    out[b, i, y] += weights[b, i, j] * v[b, j, y]
    return out, weights, scores


def vectorized(x, params):
    scores = np.where(x["mask"] == 0.0, -1e9, x["q"] @ np.swapaxes(x["k"], 1, 2) / math.sqrt(x["q"].shape[2]))
    weights = np.swapaxes(softmax(np.swapaxes(scores, 1, 2))[0], 1, 2) if params["axis"] == 1 else softmax(scores)[0]
    return {"out": weights @ x["v"], "weights": weights, "scores": scores}


def plan(dims, params):
    return Plan(
        similarity=dot,
        normalizer="softmax over queries" if params["axis"] == 1 else "softmax",
        scale=dims["D"] ** -0.5,
        mask="mask",
        fill=-1e9,
    )


def last_axis_is_softmax(run, x):
    n_q, n_k = x["q"].shape[1], x["k"].shape[1]
    mask = (np.arange(n_q)[:, None] + np.arange(n_k)) % 3 != 0
    mask[:1] = False  # a row without keys: uniform on both sides
    heads = {name: x[name][:, None] for name in ("q", "k", "v")}
    out, weights = run({**heads, "mask": mask}, name="softmax", empty_rows="uniform", returns=("out", "weights"))
    ours = run({**x, "mask": mask.astype(float)}, axis=2, returns=("out", "weights"))
    return ours, (out[:, 0], weights[:, 0])


def axes_are_mirror_images(run, x):
    mirrored = {"q": x["k"], "k": x["q"], "v": x["q"]}
    return run(x, axis=1, returns="weights"), np.swapaxes(run(mirrored, axis=2, returns="weights"), 1, 2)


VARIANT = Variant(
    name="article_sdpa",
    family="scored",
    summary="An article's attention class as printed: softmax over the queries, masked scores -1e9, output and weights returned.",
    equation="out_i = sum_j softmax_i(q_i . k_j / sqrt(D), -1e9 where mask_ij == 0) v_j",
    paper=Paper(
        title="Extending the attention mechanism in large language models (in Chinese)",
        authors=("Anonymous",),
        where="section 4, the class Attention",
    ),
    operands=(
        Operand("q", "B T D", "queries"),
        Operand("k", "B S D", "keys"),
        Operand("v", "B S E", "values"),
        Operand(
            "mask",
            "B T S",
            "0 where the score is replaced by -1e9",
            kind="number",
            absent=1.0,
            broadcast=True,
            draw=lambda rng, shape: rng.integers(0, 2, shape),
        ),
    ),
    outputs=(
        Output("out", "B T E", "attention output"),
        Output("weights", "B T S", "p_ij"),
        Output("scores", "B T S", "s_ij after scale and mask"),
    ),
    params=(Param("axis", Choice((1, 2)), 1, "axis of the (B, T, S) scores that the softmax runs over: 1 as printed, 2 as meant", tries=(2,)),),
    define=define,
    vectorized=vectorized,
    plan=plan,
    returns=("out", "weights"),
    cost=Cost(
        flops="B*T*S*(2*D + 2*E + 5) + 1",
        memory="B*T*(E + 2*S)",
    ),
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[0.0], [math.log(3.0)]]], "k": [[[1.0], [0.0]]], "v": [[[4.0], [8.0]]]},
            returns={"weights": [[[0.25, 0.5], [0.75, 0.5]]], "out": [[[5.0], [7.0]]], "scores": [[[0.0, 0.0], [math.log(3.0), 0.0]]]},
            source="by hand: as printed, columns sum to one",
        ),
        Example(
            operands={"q": [[[0.0], [math.log(3.0)]]], "k": [[[1.0], [0.0]]], "v": [[[4.0], [8.0]]]},
            params={"axis": 2},
            returns={"weights": [[[0.5, 0.5], [0.75, 0.25]]], "out": [[[6.0], [5.0]]]},
            source="by hand: the same operands, rows sum to one",
        ),
        Example(
            operands={"q": [[[7.0], [9.0]]], "k": [[[2.0], [5.0]]], "v": [[[4.0], [8.0]]], "mask": [[[0.0, 0.0], [0.0, 1.0]]]},
            returns={
                "weights": [[[0.5, 0.0], [0.5, 1.0]]],
                "out": [[[2.0], [10.0]]],
                "scores": [[[-1e9, -1e9], [-1e9, 45.0]]],
            },
            source="by hand: key 0 is hidden from both queries, and its weights are uniform",
        ),
    ),
    identities=(
        Identity("over the last axis it is softmax attention whose empty rows are uniform", last_axis_is_softmax),
        Identity("as printed, queries and keys change places", axes_are_mirror_images),
        Identity("as printed, each key's weights sum to one", lambda run, x: (run(x, axis=1, returns="weights").sum(1), 1.0)),
    ),
)
