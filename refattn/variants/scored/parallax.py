"""Parallax: softmax attention corrected to first order by the covariance of keys and values, probed by a second query.

    p_ij  = exp(scale * q_i . k_j) / sum_{j' visible} exp(scale * q_i . k_j'),      t_ij = r_i . k_j,      tbar_i = sum_{j visible} p_ij t_ij
    out_i = sum_{j visible} p_ij (1 + tbar_i - t_ij) v_j,       lse_i = log sum_{j visible} exp(scale * q_i . k_j)

So out_i is softmax attention less the covariance of r_i . k and v under p_i: the local linear estimate of a regression, with r in place of the
solution of its normal equations.  The weights sum to one and may be negative.  ``causal=True``, the default here, puts query i at position
``i + S - T``, as in `softmax`.  Query head h reads key-value head ``h // (Hq // Hkv)``.  A query that sees nothing gives 0.

What people get wrong: scaling t, which has no scale; the sign of the correction; clipping the weights, which are no probabilities.

Checked against flash-linear-attention's parallax.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax, up_to_query
from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, r, k, v, scale, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
    p = np.zeros(n_k)
    t = np.zeros(n_k)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                visible = n_k if causal == 0 else i + n_k - n_q + 1
                if visible <= 0:
                    continue
                top = -np.inf
                for j in range(visible):
                    s = 0.0
                    t[j] = 0.0
                    for x in range(d):
                        s += q[b, h, i, x] * k[b, g, j, x]
                        t[j] += r[b, h, i, x] * k[b, g, j, x]
                    p[j] = scale * s
                    if p[j] > top or math.isnan(p[j]):  # NaN must win
                        top = p[j]
                total = 0.0
                for j in range(visible):
                    p[j] = math.exp(p[j] - top)
                    total += p[j]
                mean = 0.0
                for j in range(visible):
                    p[j] /= total
                    mean += p[j] * t[j]
                for j in range(visible):
                    weight = p[j] * (1.0 + (mean - t[j]))
                    for y in range(d_v):
                        out[b, h, i, y] += weight * v[b, g, j, y]
                lse[b, h, i] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    n_q, n_k, group = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    scores, probed = (a @ np.swapaxes(k, -1, -2) for a in (params["scale"] * x["q"], x["r"]))
    visible = up_to_query(n_q, n_k) | (not params["causal"])
    weights, lse = softmax(np.where(visible, scores, -np.inf))
    mean = np.sum(weights * probed, axis=-1, keepdims=True)
    return {"out": (weights * (1.0 + (mean - probed))) @ v, "lse": lse}


def without_probe(run, x):
    kept = {name: x[name] for name in ("q", "k", "v")}
    sides = []
    for causal in (False, True):
        ours = run({**x, "r": 0.0 * x["r"]}, causal=causal, returns=("out", "lse"))
        sides.append((ours, run(kept, name="softmax", causal=causal, returns=("out", "lse"))))
    return tuple(a for ours, _ in sides for a in ours), tuple(b for _, theirs in sides for b in theirs)


def covariance(run, x):
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    p = run({name: x[name] for name in ("q", "k", "v")}, name="softmax", causal=True, returns="weights")
    t = x["r"] @ np.swapaxes(k, -1, -2)
    centred = t - np.sum(p * t, axis=-1, keepdims=True)
    return run(x), p @ v - (p * centred) @ (v - v.mean(axis=2, keepdims=True))


def moved_keys(run, x):
    """A vector added to every key moves all t of a row, and all scores, alike."""
    step = np.linspace(-1.0, 1.0, x["k"].shape[3])
    return run(x), run({**x, "k": x["k"] + step})


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v")}, **{name: x[name][:, :, :half] for name in ("q", "r")}}
    second = {**x, **{name: x[name][:, :, half:] for name in ("q", "r")}}
    parts = [run(part, returns=("out", "lse")) for part in (first, second)]
    return run(x, returns=("out", "lse")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


#: Visible pairs of one head, and its rows that see a key.
PAIRS = "(T*S if causal == 0 else T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if causal == 0 or T <= S else S)"

VARIANT = Variant(
    name="parallax",
    family="scored",
    summary="Parallax: softmax attention with a first-order correction from a second query, a parameterised local linear attention.",
    equation="out_i = sum_j p_ij (1 + sum_j' p_ij' r_i . k_j' - r_i . k_j) v_j, p_ij = softmax_j(scale q_i . k_j)",
    paper=Paper(
        title="Parallax: Parameterized Local Linear Attention for Language Modeling",
        authors=("Zuo, Yifei", "Pai, Dhruv", "Zeng, Zhichen", "Dewulf, Alec", "Hu, Shuming", "Wang, Zhaoran"),
        year=2026,
        arxiv="2605.29157",
        where="algorithm 1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("r", "B Hq T D", "second queries, which probe the covariance"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the row's sum of exponentials; -inf for a row that sees nothing", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . k, not r . k; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),
        Param("causal", Choice((False, True)), True, "see no later position; the last query is aligned with the last key", tries=(False,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*Hq*({PAIRS}*(4*D + 2*E + 10) + {ROWS}*2)", memory="B*Hq*T*(E + 1) + 2*S"),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "r": [[[[2.0]]]], "k": [[[[0.0], [math.log(3.0)]]]], "v": [[[[4.0], [8.0]]]]},
            params={"scale": 1.0, "causal": False},
            returns={"out": [[[[7.0 - 1.5 * math.log(3.0)]]]], "lse": [[[math.log(4.0)]]]},
            source="by hand: weights 1/4 and 3/4, t = 0 and 2 log 3; the covariance of t and v is 3/16 * 2 log 3 * 4",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "r": [[[[5.0], [1.0]]]], "k": [[[[3.0], [1.0]]]], "v": [[[[4.0], [8.0]]]]},
            returns={"out": [[[[4.0], [8.0]]]]},
            source="by hand: one key has no covariance; two of even weights 1/2 and t = 3 and 1 have weights 1/2 (1 - 1) and 1/2 (1 + 1)",
        ),
    ),
    identities=(
        Identity("with r = 0 it is softmax attention", without_probe),
        Identity("it is softmax attention less the covariance of r . k and v", covariance),
        Identity("a vector added to every key changes nothing", moved_keys),
        Identity("values all one give one", lambda run, x: (run({**x, "v": np.ones_like(x["v"])}, causal=False), 1.0)),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
