"""DeltaFormer: softmax attention over values from which earlier ones were first erased, the delta rule with an exponential kernel.

    u_i   = v_i - beta_i sum_{j < i} a_ij u_j,      a_ij = softmax over j < i of scale * w_i . k_j
    out_i = sum_{j <= i} p_ij u_j,                  p_ij = softmax over j <= i of scale * q_i . k_j

u depends on all u before it, a triangular system as in the delta rule; the first token has nothing to erase, so u_0 = v_0.  ``u`` is an output: with
the keys it is the cache that decoding needs.  Always causal; queries are the last T of S tokens, which w, k, v and beta describe whole.  Query
head h reads head ``h // (Hq // Hkv)`` of the others.  ``lse`` is that of the second softmax.

What people get wrong: erasing with j <= i, which takes the token's own value away; one softmax for both, though the two run over different keys.
The paper erases with a vector w of its own; flash-linear-attention's naive function and kernel use the query (w = q, and as many
key-value heads as query heads), and beta = 1 where it is not given.

Checked against flash-linear-attention's deltaformer.
"""

import math

import numpy as np

from refattn.pieces.arrays import softmax, up_to_query
from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, w, beta, scale):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    lse = np.full((batch, heads, n_q), -np.inf)
    u = np.zeros((batch, kv_heads, n_k, d_v))
    scores = np.zeros(n_k)
    for b in range(batch):
        for g in range(kv_heads):
            for i in range(n_k):
                top = -np.inf
                for j in range(i):
                    s = 0.0
                    for x in range(d):
                        s += w[b, g, i, x] * k[b, g, j, x]
                    scores[j] = scale * s
                    if scores[j] > top or math.isnan(scores[j]):  # NaN must win
                        top = scores[j]
                total = 0.0
                for j in range(i):
                    weight = math.exp(scores[j] - top)
                    total += weight
                    for y in range(d_v):
                        u[b, g, i, y] += weight * u[b, g, j, y]
                for y in range(d_v):
                    u[b, g, i, y] = v[b, g, i, y] - beta[b, g, i] * u[b, g, i, y] / total if i > 0 else v[b, g, i, y]
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i + n_k - n_q
                if position < 0:
                    continue
                top = -np.inf
                for j in range(position + 1):
                    s = 0.0
                    for x in range(d):
                        s += q[b, h, i, x] * k[b, g, j, x]
                    scores[j] = scale * s
                    if scores[j] > top or math.isnan(scores[j]):
                        top = scores[j]
                total = 0.0
                for j in range(position + 1):
                    weight = math.exp(scores[j] - top)
                    total += weight
                    for y in range(d_v):
                        out[b, h, i, y] += weight * u[b, g, j, y]
                for y in range(d_v):
                    out[b, h, i, y] /= total
                lse[b, h, i] = top + math.log(total)
    return out, lse, u


def vectorized(x, params):
    n_q, n_k, group, scale = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1], params["scale"]
    k = x["k"]
    erased, _ = softmax(np.where(np.tri(n_k, k=-1, dtype=bool), scale * (x["w"] @ np.swapaxes(k, -1, -2)), -np.inf))
    u = np.linalg.solve(np.eye(n_k) + x["beta"][..., None] * erased, x["v"])
    scores = scale * (x["q"] @ np.swapaxes(np.repeat(k, group, axis=1), -1, -2))
    weights, lse = softmax(np.where(up_to_query(n_q, n_k), scores, -np.inf))
    return {"out": weights @ np.repeat(u, group, axis=1), "lse": lse, "u": u}


def nothing_erased(run, x):
    kept = {name: x[name] for name in ("q", "k", "v")}
    return run({**x, "beta": 0.0 * x["beta"]}, returns=("out", "lse")), run(kept, name="softmax", causal=True, returns=("out", "lse"))


def attention_to_u(run, x):
    u = run(x, returns="u")
    return run(x, returns=("out", "lse")), run({"q": x["q"], "k": x["k"], "v": u}, name="softmax", causal=True, returns=("out", "lse"))


def triangular_system(run, x):
    """(I + diag(beta) A) u = v."""
    n_k = x["k"].shape[2]
    a = np.zeros((*x["k"].shape[:3], n_k))
    if n_k > 1:
        late = {"q": x["w"][:, :, 1:], "k": x["k"][:, :, :-1], "v": x["v"][:, :, :-1]}
        a[:, :, 1:, :-1] = run(late, name="softmax", causal=True, returns="weights")
    u = run(x, returns="u")
    return u + x["beta"][..., None] * (a @ u), x["v"]


def constant_values(run, x):
    """Erased whole, equal values leave only the first token's."""
    ones = {**x, "v": np.ones_like(x["v"]), "beta": np.ones_like(x["beta"])}
    u = run(ones, returns="u")
    return u[:, :, :2], np.where(np.arange(x["k"].shape[2])[:2, None] == 0, 1.0, 0.0)


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v", "w", "beta")}, "q": x["q"][:, :, :half]}
    parts = [run(first, returns=("out", "lse")), run({**x, "q": x["q"][:, :, half:]}, returns=("out", "lse"))]
    return run(x, returns=("out", "lse")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


#: Visible pairs of one head, and its rows that see a key.
PAIRS = "(T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
ROWS = "(T if T <= S else S)"

VARIANT = Variant(
    name="deltaformer",
    family="scored",
    summary="DeltaFormer: causal softmax attention over values with the earlier ones erased, the delta rule of an exponential kernel.",
    equation="u_i = v_i - beta_i sum_{j < i} softmax_{j < i}(scale w_i . k_j) u_j, out_i = sum_{j <= i} softmax_{j <= i}(scale q_i . k_j) u_j",
    paper=Paper(
        title="Understanding Transformer from the Perspective of Associative Memory",
        authors=("Zhong, Shu", "Xu, Mingyu", "Ao, Tenglong", "Shi, Guang"),
        year=2025,
        arxiv="2505.19488",
        where="DeltaFormer",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, of the last T tokens"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w", "B Hkv S D", "queries that erase"),
        Operand("beta", "B Hkv S", "how much is erased", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("lse", "B Hq T", "natural log of the sum of exponentials that out was divided by; -inf for a query before the first key", wide=True),
        Output("u", "B Hkv S E", "values after erasing"),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q . k and w . k; None is 1/sqrt(D)", lambda dims: dims["D"] ** -0.5, (0.37,)),),
    define=define,
    vectorized=vectorized,
    cost=Cost(
        flops=f"B*(Hkv*(S*(S - 1)//2*(2*D + 2*E + 4) + (S - 1 if S > 0 else 0)*3*E) + Hq*({PAIRS}*(2*D + 2*E + 4) + {ROWS}*(E + 2)))",
        memory="B*(Hq*T*(E + 1) + Hkv*S*E) + S",
    ),
    ordered=lambda params: "T S",
    causal={},
    linear_in="v",
    examples=(
        Example(
            operands={
                "q": [[[[0.0], [0.0], [0.0]]]],
                "k": [[[[1.0], [0.0], [0.0]]]],
                "v": [[[[8.0], [4.0], [6.0]]]],
                "w": [[[[0.0], [0.0], [math.log(3.0)]]]],
                "beta": [[[1.0, 0.5, 1.0]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[8.0], [4.0], [8.0 / 3.0]]]], "lse": [[[0.0, math.log(2.0), math.log(3.0)]]], "u": [[[[8.0], [0.0], [0.0]]]]},
            source="by hand: u = 8, then 4 - 8/2, then 6 - (3/4 * 8 + 1/4 * 0); out is their running mean",
        ),
    ),
    identities=(
        Identity("with beta 0 it is causal softmax attention", nothing_erased),
        Identity("it is causal softmax attention to u", attention_to_u),
        Identity("u solves a triangular system of strictly causal softmax weights", triangular_system),
        Identity("of equal values, erased whole, the second token keeps nothing", constant_values),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
