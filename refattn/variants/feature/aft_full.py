"""AFT-full: no queries meet keys; each channel of the values is averaged by its own key and a learned position bias, and gated by the query.

    m_ix   = sum_{j visible} exp(k_jx + w_ij) v_jx / sum_{j visible} exp(k_jx + w_ij)
    out_ix = m_ix / (1 + exp(-q_ix)),       lse_ix = log sum_{j visible} exp(k_jx + w_ij)

Channel by channel, so queries, keys and values have one width and heads would mean nothing.  w is a parameter of the positions, shared by channels
and sequences; the paper also factorises it, w = u v^T.  ``causal=True`` puts query i at position ``i + S - T``, as in `softmax`.  A w of -inf
hides; a query that sees nothing gives 0.

What people get wrong: exponentials of raw keys, which overflow from 89 in float32 on (aft_pytorch does so): they want each channel's maximum taken
out; a softmax over channels instead of tokens.

Checked against aft_pytorch's AFTFull, which is not causal.
"""

import math

import numpy as np

from refattn.pieces.arrays import mixed, sigmoid, up_to_query
from refattn.spec import Choice, Cost, Example, Identity, Operand, Output, Paper, Param, Variant


def define(q, k, v, w, causal):
    batch, n_q, width = q.shape
    n_k = k.shape[1]
    out = np.zeros((batch, n_q, width))
    lse = np.full((batch, n_q, width), -np.inf)
    for b in range(batch):
        for i in range(n_q):
            visible = n_k if causal == 0 else max(i + n_k - n_q + 1, 0)
            for x in range(width):
                top = -np.inf
                for j in range(visible):
                    s = k[b, j, x] + w[i, j]
                    if s > top or math.isnan(s):  # NaN must win
                        top = s
                if top == -np.inf:
                    continue
                total = 0.0
                for j in range(visible):
                    weight = math.exp(k[b, j, x] + w[i, j] - top)
                    total += weight
                    out[b, i, x] += weight * v[b, j, x]
                if q[b, i, x] >= 0.0:
                    gate = 1.0 / (1.0 + math.exp(-q[b, i, x]))
                else:  # the same number, with an exponential that cannot overflow
                    gate = math.exp(q[b, i, x])
                    gate = gate / (1.0 + gate)
                out[b, i, x] *= gate / total
                lse[b, i, x] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    n_q, n_k = x["w"].shape
    means, lse = mixed(x["k"], np.where(up_to_query(n_q, n_k) | (not params["causal"]), x["w"], -np.inf), x["v"])
    return {"out": sigmoid(x["q"]) * means, "lse": lse}


def without_positions(run, x):
    kept = {name: x[name] for name in ("q", "k", "v")}
    sides = [(run({**x, "w": 0.0 * x["w"]}, causal=causal), run(kept, name="aft_simple", causal=causal)) for causal in (False, True)]
    return tuple(zip(*sides, strict=True))


def a_head_per_channel(run, x):
    """Each channel is softmax attention of width one to the keys as a bias."""
    channels = {"q": np.ones((*x["q"].shape, 1)).swapaxes(1, 2)} | {name: x[name].swapaxes(1, 2)[..., None] for name in ("k", "v")}
    out, lse = run({**channels, "bias": x["w"]}, name="softmax", scale=1.0, causal=True, returns=("out", "lse"))
    gated = out[..., 0].swapaxes(1, 2) * np.exp(-np.logaddexp(0.0, -x["q"]))
    return run(x, causal=True, returns=("out", "lse")), (gated, lse.swapaxes(1, 2))


def hidden_is_causal(run, x):
    n_q, n_k = x["w"].shape
    ahead = np.arange(n_k) > np.arange(n_q)[:, None] + n_k - n_q
    return run({**x, "w": np.where(ahead, -np.inf, x["w"])}, returns=("out", "lse")), run(x, causal=True, returns=("out", "lse"))


def two_halves(run, x):
    half = x["k"].shape[1] // 2
    parts = [{**x, "k": x["k"][:, part], "v": x["v"][:, part], "w": x["w"][:, part]} for part in (slice(None, half), slice(half, None))]
    (one, lse_1), (two, lse_2) = (run(part, returns=("out", "lse")) for part in parts)
    lse = np.logaddexp(lse_1, lse_2)
    return run(x, returns=("out", "lse")), (np.exp(lse_1 - lse) * one + np.exp(lse_2 - lse) * two, lse)


def constant_values(run, x):
    return run({**x, "v": np.ones_like(x["v"])}), np.exp(-np.logaddexp(0.0, -x["q"]))


#: Visible pairs, and queries that see a key.
PAIRS = "(T*S if causal == 0 else T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if causal == 0 or T <= S else S)"

VARIANT = Variant(
    name="aft_full",
    family="feature",
    summary="AFT-full (attention free transformer): values averaged per channel by keys and position biases, gated by queries.",
    equation="out_i = sigmoid(q_i) * sum_j exp(k_j + w_ij) v_j / sum_j exp(k_j + w_ij)",
    paper=Paper(
        title="An Attention Free Transformer",
        authors=(
            "Zhai, Shuangfei",
            "Talbott, Walter",
            "Srivastava, Nitish",
            "Huang, Chen",
            "Goh, Hanlin",
            "Zhang, Ruixiang",
            "Susskind, Josh",
        ),
        year=2021,
        arxiv="2105.14103",
        where="equation 2",
    ),
    operands=(
        Operand("q", "B T M", "queries, whose sigmoid gates"),
        Operand("k", "B S M", "keys"),
        Operand("v", "B S M", "values"),
        Operand("w", "T S", "position biases"),
    ),
    outputs=(
        Output("out", "B T M", "output"),
        Output("lse", "B T M", "natural log of each channel's sum of exponentials; -inf where nothing is seen", wide=True),
    ),
    params=(Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*M*({PAIRS}*7 + {ROWS}*7)", memory="2*B*T*M"),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[math.log(3.0)], [0.0]]],
                "k": [[[0.0], [0.0]]],
                "v": [[[4.0], [8.0]]],
                "w": [[0.0, math.log(3.0)], [5.0, 5.0]],
            },
            returns={"out": [[[5.25], [3.0]]], "lse": [[[math.log(4.0)], [5.0 + math.log(2.0)]]]},
            source="by hand: weights 1/4 and 3/4 give 7, gated by 3/4; even weights give 6, gated by 1/2",
        ),
        Example(
            operands={
                "q": [[[0.0, 0.0]]],
                "k": [[[0.0, 100.0], [math.log(3.0), 0.0]]],
                "v": [[[4.0, 4.0], [8.0, 8.0]]],
                "w": [[0.0, -math.inf]],
            },
            params={"causal": True},
            returns={"out": [[[2.0, 2.0]]], "lse": [[[0.0, 100.0]]]},
            source="by hand: the second key is hidden",
        ),
    ),
    identities=(
        Identity("without position biases it is aft_simple", without_positions),
        Identity("each channel is softmax attention of one head and width one", a_head_per_channel),
        Identity("causal is a bias of -inf ahead", hidden_is_causal),
        Identity("two halves of the keys merge by their lse", two_halves),
        Identity("values all one give the gate", constant_values),
    ),
)
