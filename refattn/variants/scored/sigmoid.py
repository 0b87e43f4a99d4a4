"""Sigmoid attention: each weight is a sigmoid of its own score, and nothing is normalised.

    s_ij  = scale * q_i . k_j + shift + bias_ij
    p_ij  = 1 / (1 + exp(-s_ij))
    out_i = sum_{j visible} p_ij v_j

The paper writes b for shift and recommends b = -log n for sequences of n keys, which is the default here with n = S: at scores of 0 a row then sums
to about one, as softmax's does.  S counts all keys, hidden ones included.  A hidden key has weight 0, and a row that sees nothing is 0.
Masks, ``causal`` and grouped heads mean what they mean in `softmax`; a key whose score is -inf is never read.

What people get wrong: the shift.  It belongs to the length a model was trained with, so evaluating with a growing key cache and
-log S of the moment changes the model: pass ``shift`` then.  x-transformers' sigmoid option has no shift at all.  Outputs over two
halves of the keys add up without any log-sum-exp, but only under one common shift.

Checked against a composition of PyTorch's matmul and sigmoid.
"""

import math

import numpy as np

from refattn.pieces.masks import causal as causal_mask
from refattn.pieces.similarities import dot
from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Plan, Stage, Variant


def define(q, k, v, bias, mask, scale, shift, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    weights = np.zeros((batch, heads, n_q, n_k))
    scores = np.full((batch, heads, n_q, n_k), -np.inf)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i if causal == 2 else i + n_k - n_q  # causal: 0 no, 1 bottom-right, 2 top-left
                for j in range(n_k):
                    if (causal == 0 or j <= position) and mask[b, h, i, j] and bias[b, h, i, j] != -np.inf:
                        s = 0.0
                        for x in range(d):
                            s += q[b, h, i, x] * k[b, g, j, x]
                        scores[b, h, i, j] = scale * s + shift + bias[b, h, i, j]
                    if scores[b, h, i, j] != -np.inf:
                        if scores[b, h, i, j] >= 0.0:
                            weights[b, h, i, j] = 1.0 / (1.0 + math.exp(-scores[b, h, i, j]))
                        else:  # the same number, with an exponential that cannot overflow
                            e = math.exp(scores[b, h, i, j])
                            weights[b, h, i, j] = e / (1.0 + e)
                        for y in range(d_v):
                            out[b, h, i, y] += weights[b, h, i, j] * v[b, g, j, y]
    return out, weights, scores


def default_shift(dims):
    return -math.log(max(dims["S"], 1))


def plan(dims, params):
    offset = 0 if params["causal"] == "top_left" else dims["S"] - dims["T"]
    return Plan(
        similarity=dot,
        normalizer="sigmoid",
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
        shift=default_shift(dims) if params["shift"] is None else params["shift"],
        masks=(Stage(causal_mask, (offset,)),) if params["causal"] else (),
        bias="bias",
        mask="mask",
    )


def keys_against_nothing(run, x):
    """A sigmoid is a softmax over the key and one sink of logit 0."""
    heads = x["q"].shape[1]
    alone = [
        run({**x, "k": x["k"][:, :, [j]], "v": x["v"][:, :, [j]], "sinks": np.zeros(heads), "bias": np.array(-1.5)}, name="softmax", returns="out")
        for j in range(x["k"].shape[2])
    ]
    return run(x, shift=-1.5, returns="out"), np.sum(alone, axis=0) if alone else np.zeros_like(run(x, returns="out"))


def complement(run, x):
    return run(x, shift=0.7, returns="weights"), 1.0 - run({**x, "q": -x["q"]}, shift=-0.7, returns="weights")


def halves_add(run, x):
    half = x["k"].shape[2] // 2
    one = run({**x, "k": x["k"][:, :, :half], "v": x["v"][:, :, :half]}, shift=-1.0, returns="out")
    two = run({**x, "k": x["k"][:, :, half:], "v": x["v"][:, :, half:]}, shift=-1.0, returns="out")
    return run(x, shift=-1.0, returns="out"), one + two


def shift_is_a_bias(run, x):
    return run(x, shift=-2.0, returns="out"), run({**x, "bias": np.array(-2.0)}, shift=0.0, returns="out")


VARIANT = Variant(
    name="sigmoid",
    family="scored",
    summary="Sigmoid attention: every weight a sigmoid of its own score, no normalisation over keys.",
    equation="out_i = sum_j sigmoid(scale q_i . k_j - log S + bias_ij) v_j",
    paper=Paper(
        title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        authors=(
            "Ramapuram, Jason",
            "Danieli, Federico",
            "Dhekane, Eeshan",
            "Weers, Floris",
            "Busbridge, Dan",
            "Ablin, Pierre",
            "Likhomanenko, Tatiana",
            "Digani, Jagrit",
            "Gu, Zijin",
            "Shidani, Amitis",
            "Webb, Russ",
        ),
        year=2024,
        arxiv="2409.04431",
        where="section 2",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("bias", "B Hq T S", "added to the scores after scale and shift", absent=0.0, broadcast=True),
        Operand("mask", "B Hq T S", "True where a query may attend", kind="boolean", absent=True, broadcast=True),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("weights", "B Hq T S", "p_ij, 0 where hidden"),
        Output("scores", "B Hq T S", "s_ij after scale, shift and bias, -inf where hidden"),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("shift", Number(optional=True), None, "added to every score; None is -log(S)", absent=default_shift, tries=(0.0, -2.5)),
        Param(
            "causal",
            Choice((False, True, "top_left")),
            False,
            "see no later position; True aligns the last query with the last key",
            tries=(True, "top_left"),
        ),
    ),
    define=define,
    plan=plan,
    cost=Cost(
        flops="B*Hq*pairs*(2*D + 2*E + 6)",
        memory="B*Hq*T*(E + 2*S)",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.0], [math.log(3.0)]]]], "v": [[[[4.0], [8.0]]]]},
            params={"scale": 1.0, "shift": 0.0},
            returns={"out": [[[[8.0]]]], "weights": [[[[0.5, 0.75]]]], "scores": [[[[0.0, math.log(3.0)]]]]},
            source="by hand: sigmoid(log 3) = 3/4; the weights sum to 5/4",
        ),
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[1.0], [2.0], [3.0]]]], "v": [[[[4.0], [8.0], [12.0]]]]},
            returns={"out": [[[[6.0]]]], "weights": [[[[0.25, 0.25, 0.25]]]]},
            source="by hand: scores 0, S = 3, so every weight is 1/(1 + 3)",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[1.0], [2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"causal": True, "shift": 0.0},
            returns={"out": [[[[2.0], [6.0]]]], "weights": [[[[0.5, 0.0], [0.5, 0.5]]]]},
            source="by hand: query 0 sees key 0 only",
        ),
    ),
    identities=(
        Identity("each key's weight is softmax of that key against one sink of logit 0", keys_against_nothing),
        Identity("weights of negated scores are the complements", complement),
        Identity("two halves of the keys add up under a common shift", halves_add),
        Identity("the shift is a constant bias", shift_is_a_bias),
    ),
)
