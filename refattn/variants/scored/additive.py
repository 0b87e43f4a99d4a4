"""Additive attention: a small network scores each query against each key.

    s_ij  = w . tanh(W_q q_i + W_k k_j + b)
    p_ij  = exp(s_ij) / sum_{j' visible} exp(s_ij')
    out_i = sum_{j visible} p_ij v_j

In the paper q_i is the decoder's previous state s_{i-1}, and the keys are the encoder's annotations h_j, which are the values as well
(v = k); W_q, W_k, w are W_a, U_a, v_a there, and there is no b.  The keys' half of the hidden layer does not depend on the query, so it is
computed once per key.  Matrices are applied from the left, as torch.nn.Linear stores them.

What people get wrong: a factor 1/sqrt(D), which has no place here; the query of step i being the *previous* decoder state (Luong's
attention takes the current one); Keras' AdditiveAttention, which has the vector w only, and neither W_q nor W_k nor b.  A row that sees
nothing is 0 here, as in `softmax`.

Checked against a composition of torch.nn.Linear, tanh and softmax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax
from refattn.pieces.similarities import additive
from refattn.spec import Cost, Example, Identity, Operand, Output, Paper, Plan, Variant


def define(q, k, v, w_q, w_k, w, b, mask):
    batch, n_q, d_q = q.shape
    n_k, d_k, d_v = k.shape[1], k.shape[2], v.shape[2]
    hidden = w.shape[0]
    out = np.zeros((batch, n_q, d_v))
    weights = np.zeros((batch, n_q, n_k))
    scores = np.full((batch, n_q, n_k), -np.inf)
    from_query = np.zeros((n_q, hidden))
    from_key = np.zeros((n_k, hidden))
    for n in range(batch):
        for i in range(n_q):
            for a in range(hidden):
                from_query[i, a] = 0.0
                for x in range(d_q):
                    from_query[i, a] += w_q[a, x] * q[n, i, x]
        for j in range(n_k):
            for a in range(hidden):
                from_key[j, a] = 0.0
                for y in range(d_k):
                    from_key[j, a] += w_k[a, y] * k[n, j, y]
        for i in range(n_q):
            top = -np.inf
            for j in range(n_k):
                if mask[n, i, j]:
                    s = 0.0
                    for a in range(hidden):
                        s += w[a] * math.tanh(from_query[i, a] + from_key[j, a] + b[a])
                    scores[n, i, j] = s
                    if s > top or math.isnan(s):  # NaN must win
                        top = s
            if top == -np.inf:
                continue
            total = 0.0
            for j in range(n_k):
                if scores[n, i, j] != -np.inf:
                    weights[n, i, j] = math.exp(scores[n, i, j] - top)
                    total += weights[n, i, j]
            for j in range(n_k):
                if scores[n, i, j] != -np.inf:
                    weights[n, i, j] /= total
                    for y in range(d_v):
                        out[n, i, y] += weights[n, i, j] * v[n, j, y]
    return out, weights, scores


def vectorized(x, params):
    hidden = (x["q"] @ np.swapaxes(x["w_q"], 0, 1))[:, :, None] + (x["k"] @ np.swapaxes(x["w_k"], 0, 1))[:, None] + x["b"]
    scores = np.sum(x["w"] * np.tanh(hidden), axis=-1)
    scores = np.where(x["mask"], scores, -np.inf)
    weights, _ = softmax(scores)
    return {"out": weights @ x["v"], "weights": weights, "scores": scores}


def plan(dims, params):
    return Plan(similarity=additive, weights=("w_q", "w_k", "w", "b"), mask="mask")


def concat_of_joined_maps(run, x):
    joined = {"q": x["q"], "k": x["k"], "v": x["v"], "weight": np.concatenate([x["w_q"], x["w_k"]], axis=1), "w": x["w"]}
    names = ("out", "weights", "scores")
    return run({**x, "b": np.zeros_like(x["w"])}, returns=names), run(joined, name="luong_concat", returns=names)


def bias_is_a_column(run, x):
    b = np.linspace(-1.0, 1.0, len(x["w"]))
    ones = np.ones((*x["q"].shape[:2], 1))
    wider = {**x, "q": np.concatenate([x["q"], ones], axis=2), "w_q": np.concatenate([x["w_q"], b[:, None]], axis=1), "b": 0.0 * b}
    return run({**x, "b": b}, returns="scores"), run(wider, returns="scores")


def tanh_is_odd(run, x):
    b = np.linspace(-1.0, 1.0, len(x["w"]))
    negated = {**x, "w_q": -x["w_q"], "w_k": -x["w_k"], "w": -x["w"], "b": -b}
    return run({**x, "b": b}), run(negated)


VARIANT = Variant(
    name="additive",
    family="scored",
    summary="Additive attention (Bahdanau): scores from a network of one tanh layer.",
    equation="out_i = sum_j softmax_j(w . tanh(W_q q_i + W_k k_j + b)) v_j",
    paper=Paper(
        title="Neural Machine Translation by Jointly Learning to Align and Translate",
        authors=("Bahdanau, Dzmitry", "Cho, Kyunghyun", "Bengio, Yoshua"),
        year=2014,
        arxiv="1409.0473",
        where="section 3.1 and appendix A.1.2",
    ),
    operands=(
        Operand("q", "B T Dq", "queries (decoder states)"),
        Operand("k", "B S Dk", "keys (annotations)"),
        Operand("v", "B S E", "values (in the paper the annotations again)"),
        Operand("w_q", "A Dq", "map of queries to the hidden layer", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("w_k", "A Dk", "map of keys to the hidden layer", draw=lambda rng, shape: rng.standard_normal(shape) / shape[1] ** 0.5),
        Operand("w", "A", "from the hidden layer to the score"),
        Operand("b", "A", "added in the hidden layer", absent=0.0),
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
    cost=Cost(
        flops="B*(2*A*(T*Dq + S*Dk) + pairs*(5*A + 2*E + 4))",
        memory="B*T*(E + 2*S) + A*(T + S)",
    ),
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[0.0]]],
                "k": [[[0.0], [math.atanh(0.5)]]],
                "v": [[[4.0], [8.0]]],
                "w_q": [[1.0]],
                "w_k": [[1.0]],
                "w": [2.0 * math.log(3.0)],
            },
            returns={"out": [[[7.0]]], "weights": [[[0.25, 0.75]]], "scores": [[[0.0, math.log(3.0)]]]},
            source="by hand: tanh gives 0 and 1/2, so the scores are 0 and log 3",
        ),
        Example(
            operands={
                "q": [[[1.0, 2.0]]],
                "k": [[[1.0], [2.0], [-6.0]]],
                "v": [[[3.0], [9.0], [50.0]]],
                "w_q": [[1.0, 1.0], [0.0, 1.0]],
                "w_k": [[1.0], [0.0]],
                "w": [0.0, 7.0],
                "b": [5.0, -2.0],
                "mask": [[[True, True, False]]],
            },
            returns={"out": [[[6.0]]], "weights": [[[0.5, 0.5, 0.0]]], "scores": [[[0.0, 0.0, -math.inf]]]},
            source="by hand: only the second hidden unit counts, its input 2 - 2 is 0 for every key, and key 2 is hidden",
        ),
    ),
    identities=(
        Identity("without b it is luong_concat with the two maps side by side", concat_of_joined_maps),
        Identity("b is one more column of the query map, read by a constant 1", bias_is_a_column),
        Identity("tanh is odd: negating the hidden layer and w changes nothing", tanh_is_odd),
    ),
)
