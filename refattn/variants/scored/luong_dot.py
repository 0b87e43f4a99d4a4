"""Global attention with the dot score: the bare inner product, no scale.

    s_ij  = q_i . k_j
    p_ij  = exp(s_ij) / sum_{j' visible} exp(s_ij')
    out_i = sum_{j visible} p_ij v_j

In the paper q_i is the decoder's *current* state h_t, and the encoder states are both keys and values; out is the context vector c_t, before
it is concatenated with h_t and sent through tanh(W_c [c_t; h_t]).  The name "location" in the same paper scores from the query alone and is
not this variant.

What people get wrong: dividing by sqrt(D), which is Vaswani's addition of two years later; calling this "multiplicative attention", a name
that covers `luong_general` as well.  A row that sees nothing is 0 here, as in `softmax`.

Checked against a composition of PyTorch's bmm and softmax.
"""

import math

import numpy as np

from refattn.pieces.similarities import dot
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Plan, Variant


def define(q, k, v, mask):
    batch, n_q, d = q.shape
    n_k, d_v = v.shape[1], v.shape[2]
    out = np.zeros((batch, n_q, d_v))
    weights = np.zeros((batch, n_q, n_k))
    scores = np.full((batch, n_q, n_k), -np.inf)
    for b in range(batch):
        for i in range(n_q):
            top = -np.inf
            for j in range(n_k):
                if mask[b, i, j]:
                    s = 0.0
                    for x in range(d):
                        s += q[b, i, x] * k[b, j, x]
                    scores[b, i, j] = s
                    if s > top or math.isnan(s):  # NaN must win
                        top = s
            if top == -np.inf:
                continue
            total = 0.0
            for j in range(n_k):
                if scores[b, i, j] != -np.inf:
                    weights[b, i, j] = math.exp(scores[b, i, j] - top)
                    total += weights[b, i, j]
            for j in range(n_k):
                if scores[b, i, j] != -np.inf:
                    weights[b, i, j] /= total
                    for y in range(d_v):
                        out[b, i, y] += weights[b, i, j] * v[b, j, y]
    return out, weights, scores


def plan(dims, params):
    return Plan(similarity=dot, mask="mask")


def softmax_without_scale(run, x):
    heads = {name: x[name][:, None] for name in ("q", "k", "v")}
    theirs = run(heads, name="softmax", scale=1.0, returns=("out", "weights", "scores"))
    return run(x, returns=("out", "weights", "scores")), tuple(y[:, 0] for y in theirs)


def sharper_queries(run, x):
    return run({**x, "q": 2.0 * x["q"]}), run({**x, "k": 2.0 * x["k"]})


def shifted_keys(run, x):
    return run({**x, "k": x["k"] + np.linspace(-1.0, 1.0, x["k"].shape[2])}), run(x)


VARIANT = Variant(
    name="luong_dot",
    family="scored",
    summary="Luong's global attention, dot score: softmax of q . k without a scale.",
    equation="out_i = sum_j softmax_j(q_i . k_j) v_j",
    paper=Paper(
        title="Effective Approaches to Attention-based Neural Machine Translation",
        authors=("Luong, Minh-Thang", "Pham, Hieu", "Manning, Christopher D."),
        year=2015,
        arxiv="1508.04025",
        where="section 3.1, score dot",
    ),
    operands=(
        Operand("q", "B T D", "queries (decoder states)"),
        Operand("k", "B S D", "keys (encoder states)"),
        Operand("v", "B S E", "values (in the paper the encoder states again)"),
        Operand("mask", "B T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
    ),
    outputs=(
        Output("out", "B T E", "attention output (the context vectors)"),
        Output("weights", "B T S", "p_ij, 0 where hidden"),
        Output("scores", "B T S", "s_ij, -inf where hidden"),
    ),
    define=define,
    plan=plan,
    cost=Cost(flops="B*pairs*(2*D + 2*E + 4)", memory="B*T*(E + 2*S)"),
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[1.0, 0.0, 0.0, 0.0]]], "k": [[[0.0, 5.0, 5.0, 5.0], [math.log(3.0), 5.0, 5.0, 5.0]]], "v": [[[4.0], [8.0]]]},
            returns={"out": [[[7.0]]], "weights": [[[0.25, 0.75]]], "scores": [[[0.0, math.log(3.0)]]]},
            source="by hand: D = 4, where a scale of 1/2 would show",
        ),
        Example(
            operands={"q": [[[2.0], [0.0]]], "k": [[[3.0], [1.0]]], "v": [[[4.0], [8.0]]], "mask": [[[True, False], [True, True]]]},
            returns={"out": [[[4.0], [6.0]]], "scores": [[[6.0, -math.inf], [0.0, 0.0]]]},
            source="by hand: query 0 sees key 0 alone, query 1 scores both 0",
        ),
    ),
    identities=(
        Identity("it is softmax attention with scale 1", softmax_without_scale),
        Identity("a factor on the queries is a factor on the keys", sharper_queries),
        Identity("the same vector added to every key changes nothing", shifted_keys),
    ),
)
