"""Global attention with the general score: a bilinear form between query and key.

    s_ij  = q_i . (W k_j)
    p_ij  = exp(s_ij) / sum_{j' visible} exp(s_ij')
    out_i = sum_{j visible} p_ij v_j

W has one row per query coordinate and one column per key coordinate, so queries and keys may differ in width.  In the paper q_i is the
decoder's *current* state h_t, the encoder states are both keys and values, and W is W_a.

What people get wrong: applying W to the query, which is W's transpose; a scale 1/sqrt(D), which the paper does not have.  A row that sees
nothing is 0 here, as in `softmax`.

Checked against a composition of torch.nn.Linear and softmax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.pieces.similarities import bilinear
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Plan, Variant


def define(q, k, v, w, mask):
    batch, n_q, d_q = q.shape
    n_k, d_k, d_v = k.shape[1], k.shape[2], v.shape[2]
    out = np.zeros((batch, n_q, d_v))
    weights = np.zeros((batch, n_q, n_k))
    scores = np.full((batch, n_q, n_k), -np.inf)
    mapped = np.zeros((n_k, d_q))  # W k_j
    for b in range(batch):
        for j in range(n_k):
            for x in range(d_q):
                mapped[j, x] = 0.0
                for y in range(d_k):
                    mapped[j, x] += w[x, y] * k[b, j, y]
        for i in range(n_q):
            top = -np.inf
            for j in range(n_k):
                if mask[b, i, j]:
                    s = 0.0
                    for x in range(d_q):
                        s += q[b, i, x] * mapped[j, x]
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


def vectorized(x, params):
    scores = x["q"] @ x["w"] @ np.swapaxes(x["k"], 1, 2)
    scores = np.where(x["mask"], scores, -np.inf)
    weights, _ = softmax(scores)
    return {"out": weights @ x["v"], "weights": weights, "scores": scores}


def plan(dims, params):
    return Plan(similarity=bilinear, weights=("w",), mask="mask")


def dot_with_mapped_keys(run, x):
    names = ("out", "weights", "scores")
    return run(x, returns=names), run({"q": x["q"], "k": x["k"] @ x["w"].T, "v": x["v"]}, name="luong_dot", returns=names)


def identity_map(run, x):
    d = min(x["w"].shape)
    narrow = {"q": x["q"][..., :d], "k": x["k"][..., :d], "v": x["v"]}
    return run({**x, **narrow, "w": np.eye(d)}), run(narrow, name="luong_dot")


def roles_change_places(run, x):
    exchanged = {"q": x["k"], "k": x["q"], "v": x["q"], "w": x["w"].T}
    return run(x, returns="scores"), np.swapaxes(run(exchanged, returns="scores"), 1, 2)


VARIANT = Variant(
    name="luong_general",
    family="scored",
    summary="Luong's global attention, general score: softmax of the bilinear form q . W k.",
    equation="out_i = sum_j softmax_j(q_i . W k_j) v_j",
    paper=Paper(
        title="Effective Approaches to Attention-based Neural Machine Translation",
        authors=("Luong, Minh-Thang", "Pham, Hieu", "Manning, Christopher D."),
        year=2015,
        arxiv="1508.04025",
        where="section 3.1, score general",
    ),
    operands=(
        Operand("q", "B T Dq", "queries (decoder states)"),
        Operand("k", "B S Dk", "keys (encoder states)"),
        Operand("v", "B S E", "values (in the paper the encoder states again)"),
        Operand("w", "Dq Dk", "bilinear form between query and key", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("mask", "B T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
    ),
    outputs=(
        Output("out", "B T E", "attention output (the context vectors)"),
        Output("weights", "B T S", "p_ij, 0 where hidden"),
        Output("scores", "B T S", "s_ij, -inf where hidden"),
    ),
    define=define,
    vectorized=vectorized,
    plan=plan,
    cost=Cost(flops="B*(2*S*Dq*Dk + pairs*(2*Dq + 2*E + 4))", memory="B*T*(E + 2*S) + S*Dq"),
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[1.0, 5.0]]],
                "k": [[[3.0, 4.0, 0.0], [3.0, 4.0, 1.0]]],
                "v": [[[4.0], [8.0]]],
                "w": [[0.0, 0.0, math.log(3.0)], [0.0, 0.0, 0.0]],
            },
            returns={"out": [[[7.0]]], "weights": [[[0.25, 0.75]]], "scores": [[[0.0, math.log(3.0)]]]},
            source="by hand: the form reads query coordinate 0 and key coordinate 2 only",
        ),
        Example(
            operands={
                "q": [[[1.0, 2.0]]],
                "k": [[[1.0, 3.0], [3.0, 1.0]]],
                "v": [[[4.0], [8.0]]],
                "w": [[1.0, 2.0], [3.0, 4.0]],
                "mask": [[[False, True]]],
            },
            returns={"out": [[[8.0]]], "scores": [[[-math.inf, 31.0]]]},
            source="by hand: W k = (5, 13) for key 1, and 1*5 + 2*13 = 31; with W transposed it would be 26",
        ),
    ),
    identities=(
        Identity("it is luong_dot with keys W k", dot_with_mapped_keys),
        Identity("with the identity for W it is luong_dot", identity_map),
        Identity("queries and keys change places when W is transposed", roles_change_places),
    ),
)
