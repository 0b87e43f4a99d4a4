"""PaTH attention: a key reaches a query through a product of Householder-like matrices, one for every token between them.

    s_ij  = scale * q_i^T H_i H_(i-1) ... H_(j+1) k_j + sum_{l = j+1 .. i} gate_l,       H_l = I - beta_l w_l w_l^T
    p_ij  = exp(s_ij) / sum_{j' <= i} exp(s_ij')
    out_i = sum_{j <= i} p_ij v_j,       lse_i = log sum_{j <= i} exp(s_ij)

The product is empty for a token's own key; w and beta of the first token are never read.  In the paper w has length 1 and beta lies between 0 and
2, so that H shrinks, erases (beta = 1) or mirrors (beta = 2) one direction; nothing here depends on it.  ``gate`` is the optional forget gate of
`forgetting` (the paper's PaTH-FoX), natural logarithms per query head.  Always causal; queries are the last T of S tokens.  Query head h reads
the keys, values, w and beta of head ``h // (Hq // Hkv)``.

Written as transport: the query is carried back from token to token, r <- H_j r, and met by each key on the way.

What people get wrong: the order of the factors, which does not commute; including H_j, the key's own; scaling the gate.  flash-linear-attention's
naive function multiplies the gate by the scale too, which its forgetting attention does not.

Checked against flash-linear-attention's path_attn (its gate divided by the scale), and against products of matrices.
"""

import math

import numpy as np

from refattn.pieces.arrays import faded, softmax, up_to_query
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, w, beta, gate, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
    scores = np.zeros(n_k)
    r = np.zeros(d)  # the query, carried back to token j
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i + n_k - n_q
                if position < 0:
                    continue
                for x in range(d):
                    r[x] = q[b, h, i, x]
                faded = 0.0
                top = -np.inf
                for j in range(position, -1, -1):
                    s = 0.0
                    for x in range(d):
                        s += r[x] * k[b, g, j, x]
                    scores[j] = scale * s + faded
                    faded += gate[b, h, j]
                    along = 0.0  # H_j r, for the key before
                    for x in range(d):
                        along += w[b, g, j, x] * r[x]
                    along *= beta[b, g, j]
                    for x in range(d):
                        r[x] -= along * w[b, g, j, x]
                    if scores[j] > top or math.isnan(scores[j]):  # NaN must win
                        top = scores[j]
                total = 0.0
                for j in range(position + 1):
                    weight = math.exp(scores[j] - top)
                    total += weight
                    for y in range(d_v):
                        out[b, h, i, y] += weight * v[b, g, j, y]
                for y in range(d_v):
                    out[b, h, i, y] /= total
                lse[b, h, i] = top + math.log(total)
    return out, lse


def vectorized(x, params):
    """How much each transformation takes of a query on its way back: a triangular system, the same for all queries."""
    n_q, n_k, group = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    k, v, w, beta = (np.repeat(x[name], group, axis=1) for name in ("k", "v", "w", "beta"))
    keys, reached = np.arange(n_k), up_to_query(n_q, n_k)
    met = beta[..., None] * np.where(keys > keys[:, None], w @ np.swapaxes(w, -1, -2), 0.0)
    asked = np.where(reached.T, beta[..., None] * (w @ np.swapaxes(x["q"], -1, -2)), 0.0)
    taken = np.swapaxes(np.linalg.solve(np.eye(n_k) + met, asked), -1, -2)
    later = np.where(keys[:, None] > keys, w @ np.swapaxes(k, -1, -2), 0.0)
    scores = params["scale"] * (x["q"] @ np.swapaxes(k, -1, -2) - taken @ later) + faded(x["gate"], n_q)
    weights, lse = softmax(np.where(reached, scores, -np.inf))
    return {"out": weights @ v, "lse": lse}


def nothing_written(run, x):
    gate = np.log(np.linspace(0.4, 1.0, x["q"].shape[1] * x["k"].shape[2])).reshape(1, x["q"].shape[1], -1) * np.ones((len(x["q"]), 1, 1))
    forgetting = {**{name: x[name] for name in ("q", "k", "v")}, "gate": gate}
    return run({**x, "beta": 0.0 * x["beta"], "gate": gate}, returns=("out", "lse")), run(forgetting, name="forgetting", returns=("out", "lse"))


def matrices_multiplied(run, x):
    n_q, n_k, d = x["q"].shape[2], x["k"].shape[2], x["q"].shape[3]
    group = x["q"].shape[1] // x["k"].shape[1]
    k, v, w = (np.repeat(x[name], group, axis=1) for name in ("k", "v", "w"))
    beta = np.repeat(x["beta"], group, axis=1)
    reflections = np.eye(d) - beta[..., None, None] * w[..., :, None] * w[..., None, :]
    scores = np.full((*x["q"].shape[:3], n_k), -np.inf)
    for i in range(max(n_q - n_k, 0), n_q):
        carried = np.broadcast_to(np.eye(d), (*reflections.shape[:2], d, d))
        for j in range(i + n_k - n_q, -1, -1):
            scores[:, :, i, j] = np.einsum("bhx,bhxy,bhy->bh", x["q"][:, :, i], carried, k[:, :, j]) * 0.5
            carried = carried @ reflections[:, :, j]
    biased = {"q": x["q"], "k": k, "v": v, "bias": scores}
    return run(x, scale=0.5, returns=("out", "lse")), run(biased, name="softmax", scale=0.0, returns=("out", "lse"))


def length_against_strength(run, x):
    return run(x, returns=("out", "lse")), run({**x, "w": 4.0 * x["w"], "beta": x["beta"] / 16.0}, returns=("out", "lse"))


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v", "w", "beta")}, "q": x["q"][:, :, :half]}
    parts = [run(first, returns=("out", "lse")), run({**x, "q": x["q"][:, :, half:]}, returns=("out", "lse"))]
    return run(x, returns=("out", "lse")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


def directions(rng, shape):
    w = rng.standard_normal(shape)
    return w / np.linalg.norm(w, axis=-1, keepdims=True)


#: Visible pairs of one head, and its rows that see a key.
PAIRS = "(T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if T <= S else S)"

VARIANT = Variant(
    name="path",
    family="scored",
    summary="PaTH attention: positions as accumulated Householder transformations of the data, with an optional forget gate.",
    equation="out_i = sum_{j <= i} softmax_j(scale q_i^T (prod_{l = i..j+1} I - beta_l w_l w_l^T) k_j + sum_{l = j+1..i} gate_l) v_j",
    paper=Paper(
        title="PaTH Attention: Position Encoding via Accumulating Householder Transformations",
        authors=(
            "Yang, Songlin",
            "Shen, Yikang",
            "Wen, Kaiyue",
            "Tan, Shawn",
            "Mishra, Mayank",
            "Ren, Liliang",
            "Panda, Rameswar",
            "Kim, Yoon",
        ),
        year=2025,
        arxiv="2505.16381",
        where="PaTH, and PaTH-FoX for the gate",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, of the last T tokens"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand(
            "w",
            "B Hkv S D",
            "direction that a token acts on",
            draw=directions,
        ),
        Operand("beta", "B Hkv S", "how much of it a token takes away", draw=lambda rng, shape: rng.uniform(0.0, 2.0, shape)),
        Operand(
            "gate",
            "B Hq S",
            "natural logarithm of the forget gate of every token",
            absent=0.0,
            draw=lambda rng, shape: np.log(rng.uniform(0.3, 1.0, shape)),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the row's sum of exponentials; -inf for a query before the first key", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies the product; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*Hq*({PAIRS}*(6*D + 2*E + 7) + {ROWS}*(E + 2))", memory="B*Hq*T*(E + 1) + S + D"),
    ordered=lambda params: "T S",
    causal={},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[4.0, math.log(3.0)], [0.0, 0.0]]]],
                "v": [[[[8.0], [4.0]]]],
                "w": [[[[7.0, 7.0], [1.0, 0.0]]]],
                "beta": [[[5.0, 1.0]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[7.0]]]], "lse": [[[math.log(4.0)]]]},
            source="by hand: a decode step; token 1 erases the first channel, so the scores are log 3 and 0; w and beta of token 0 are never read",
        ),
        Example(
            operands={
                "q": [[[[1.0, 0.0]]]],
                "k": [[[[-math.log(2.0), 0.0], [0.0, 0.0]]]],
                "v": [[[[6.0], [3.0]]]],
                "w": [[[[1.0, 0.0], [1.0, 0.0]]]],
                "beta": [[[0.0, 2.0]]],
                "gate": [[[0.0, math.log(0.25)]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[4.0]]]], "lse": [[[math.log(1.5)]]]},
            source="by hand: token 1 mirrors the first channel, so key 0 scores log 2 plus the gate's log 1/4",
        ),
    ),
    identities=(
        Identity("with beta 0 it is forgetting attention", nothing_written),
        Identity("the scores are those of the matrices multiplied out", matrices_multiplied),
        Identity("four times w and a sixteenth of beta change nothing", length_against_strength),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
