"""Global attention with the concat score: one tanh layer on query and key laid end to end.

    s_ij  = w . tanh(W [q_i; k_j])
    p_ij  = exp(s_ij) / sum_{j' visible} exp(s_ij')
    out_i = sum_{j visible} p_ij v_j

The first Dq columns of W meet the query, the other Dk the key; w and W are v_a and W_a in the paper.  There q_i is the decoder's *current*
state h_t, and the encoder states are both keys and values.

What people get wrong: the order in the concatenation, query first; taking concat for something other than `additive`, which it equals with
W = [W_q W_k] and no bias, the difference between the two papers being which decoder state asks.  A row that sees nothing is 0 here, as in
`softmax`.

Checked against a composition of torch.cat, torch.nn.Linear, tanh and softmax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.pieces.similarities import concat
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Plan, Variant


def define(q, k, v, weight, w, mask):
    batch, n_q, d_q = q.shape
    n_k, d_k, d_v = k.shape[1], k.shape[2], v.shape[2]
    hidden = w.shape[0]
    out = np.zeros((batch, n_q, d_v))
    weights = np.zeros((batch, n_q, n_k))
    scores = np.full((batch, n_q, n_k), -np.inf)
    from_query = np.zeros((n_q, hidden))  # what the two halves of W make of their halves of the joined vector
    from_key = np.zeros((n_k, hidden))
    for b in range(batch):
        for i in range(n_q):
            for a in range(hidden):
                from_query[i, a] = 0.0
                for x in range(d_q):
                    from_query[i, a] += weight[a, x] * q[b, i, x]
        for j in range(n_k):
            for a in range(hidden):
                from_key[j, a] = 0.0
                for y in range(d_k):
                    from_key[j, a] += weight[a, d_q + y] * k[b, j, y]
        for i in range(n_q):
            top = -np.inf
            for j in range(n_k):
                if mask[b, i, j]:
                    s = 0.0
                    for a in range(hidden):
                        s += w[a] * math.tanh(from_query[i, a] + from_key[j, a])
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
    d_q = x["q"].shape[2]
    of_query, of_key = (np.swapaxes(x["weight"][:, part], 0, 1) for part in (slice(d_q), slice(d_q, None)))
    scores = np.sum(x["w"] * np.tanh((x["q"] @ of_query)[:, :, None] + (x["k"] @ of_key)[:, None]), axis=-1)
    scores = np.where(x["mask"], scores, -np.inf)
    weights, _ = softmax(scores)
    return {"out": weights @ x["v"], "weights": weights, "scores": scores}


def plan(dims, params):
    return Plan(similarity=concat, weights=("weight", "w"), mask="mask")


def additive_with_split_map(run, x):
    d_q = x["q"].shape[2]
    split = {**{n: x[n] for n in ("q", "k", "v", "w")}, "w_q": x["weight"][:, :d_q], "w_k": x["weight"][:, d_q:]}
    names = ("out", "weights", "scores")
    return run(x, returns=names), run(split, name="additive", returns=names)


def roles_change_places(run, x):
    d_q = x["q"].shape[2]
    turned = np.concatenate([x["weight"][:, d_q:], x["weight"][:, :d_q]], axis=1)
    exchanged = {"q": x["k"], "k": x["q"], "v": x["q"], "weight": turned, "w": x["w"]}
    return run(x, returns="scores"), np.swapaxes(run(exchanged, returns="scores"), 1, 2)


def blind_to_the_query(run, x):
    d_q = x["q"].shape[2]
    weight = np.concatenate([np.zeros_like(x["weight"][:, :d_q]), x["weight"][:, d_q:]], axis=1)
    return run({**x, "weight": weight}), run({**x, "weight": weight, "q": 1.0 - x["q"]})


VARIANT = Variant(
    name="luong_concat",
    family="scored",
    summary="Luong's global attention, concat score: a tanh layer on query and key laid end to end.",
    equation="out_i = sum_j softmax_j(w . tanh(W [q_i; k_j])) v_j",
    paper=Paper(
        title="Effective Approaches to Attention-based Neural Machine Translation",
        authors=("Luong, Minh-Thang", "Pham, Hieu", "Manning, Christopher D."),
        year=2015,
        arxiv="1508.04025",
        where="section 3.1, score concat",
    ),
    operands=(
        Operand("q", "B T Dq", "queries (decoder states)"),
        Operand("k", "B S Dk", "keys (encoder states)"),
        Operand("v", "B S E", "values (in the paper the encoder states again)"),
        Operand(
            "weight",
            "A Dq+Dk",
            "map of the concatenation to the hidden layer",
            draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5,
        ),
        Operand("w", "A", "from the hidden layer to the score"),
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
    cost=Cost(flops="B*(2*A*(T*Dq + S*Dk) + pairs*(4*A + 2*E + 4))", memory="B*T*(E + 2*S) + A*(T + S)"),
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[5.0]]],
                "k": [[[0.0], [math.atanh(0.5)]]],
                "v": [[[4.0], [8.0]]],
                "weight": [[0.0, 1.0]],
                "w": [2.0 * math.log(3.0)],
            },
            returns={"out": [[[7.0]]], "weights": [[[0.25, 0.75]]], "scores": [[[0.0, math.log(3.0)]]]},
            source="by hand: the query's column is 0, and tanh of the key is 0 and 1/2",
        ),
        Example(
            operands={"q": [[[2.0]]], "k": [[[-2.0], [-2.0]]], "v": [[[4.0], [8.0]]], "weight": [[3.0, 3.0], [1.0, 1.0]], "w": [9.0, -1.0]},
            returns={"out": [[[6.0]]], "weights": [[[0.5, 0.5]]], "scores": [[[0.0, 0.0]]]},
            source="by hand: query and key cancel in both hidden units",
        ),
    ),
    identities=(
        Identity("it is additive attention with W split in two", additive_with_split_map),
        Identity("queries and keys change places when W's halves do", roles_change_places),
        Identity("when W ignores the query, all queries get the same", blind_to_the_query),
    ),
)
