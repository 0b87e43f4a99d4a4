"""Stick-breaking attention: going back from the query, each key breaks its share off what is left of a stick of length one.

    z_ij  = scale * q_i . k_j,      b_ij = 1 / (1 + exp(-z_ij))
    p_ij  = b_ij prod_{j < l < i} (1 - b_il)
    out_i = sum_{j < i} p_ij v_j,       rem_i = prod_{l < i} (1 - b_il) = 1 - sum_{j < i} p_ij

The nearest key breaks first, so the order of the keys is the position encoding.  A query does not see its own key, nor does its own key break, unless
``attend_current``.  What is left, ``rem``, is returned and given to no one; layers may add rem_i times the own value.
Always causal; queries are the last T of S tokens.  Query head h reads key-value head ``h // (Hq // Hkv)``.  A query that sees nothing gives 0 and has
a remainder of 1.

What people get wrong: the diagonal, which is in or out by convention; normalising, which is not needed and not done; forming 1 - b, which cancels for
large scores: it is the sigmoid of -z.  Multiplying the shares is safe, taking logarithms is what blocked kernels need; the published kernels take
them in base 2.

Checked against flash-linear-attention's stickbreaking_attn.
"""

import math

import numpy as np

from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, scale, attend_current):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    rem = np.full((batch, heads, n_q), 1.0)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(n_q):
                position = i + n_k - n_q
                for j in range(position, -1, -1):
                    z = 0.0
                    for x in range(d):
                        z += q[b, h, i, x] * k[b, g, j, x]
                    z *= scale
                    if j == position and attend_current == 0:
                        continue
                    e = math.exp(-abs(z))  # cannot overflow; both sigmoids from it
                    larger, smaller = 1.0 / (1.0 + e), e / (1.0 + e)
                    share, left = (larger, smaller) if z >= 0.0 else (smaller, larger)
                    weight = rem[b, h, i] * share
                    for y in range(d_v):
                        out[b, h, i, y] += weight * v[b, g, j, y]
                    rem[b, h, i] *= left
    return out, rem


def vectorized(x, params):
    n_q, n_k, group = x["q"].shape[2], x["k"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    k, v = (np.repeat(x[name], group, axis=1) for name in ("k", "v"))
    scores = params["scale"] * (x["q"] @ np.swapaxes(k, -1, -2))
    visible = np.arange(n_k) < np.arange(n_q)[:, None] + n_k - n_q + params["attend_current"]
    log_left = np.where(visible, -np.logaddexp(0.0, scores), 0.0)
    from_here = np.cumsum(log_left[..., ::-1], axis=-1)[..., ::-1]
    nearer = np.concatenate([from_here[..., 1:], np.zeros((*scores.shape[:3], 1))], axis=-1)
    weights = np.where(visible, np.exp(nearer - np.logaddexp(0.0, -scores)), 0.0)
    return {"out": weights @ v, "rem": np.exp(from_here[..., 0])}


def nothing_is_lost(run, x):
    sides = [run({**x, "v": np.ones_like(x["v"])}, attend_current=current, returns=("out", "rem")) for current in (False, True)]
    return tuple(out + rem[..., None] for out, rem in sides), (1.0, 1.0)


def even_shares(run, x):
    """Scores of 0: every key takes half of what is left."""
    n_q, n_k = x["q"].shape[2], x["k"].shape[2]
    between = np.arange(n_q)[:, None] + n_k - n_q - np.arange(n_k)
    halves = np.where(between >= 0, 0.5 ** np.maximum(between + 1.0, 0.0), 0.0)
    values = np.repeat(x["v"], x["q"].shape[1] // x["v"].shape[1], axis=1)
    out, rem = run({**x, "q": 0.0 * x["q"]}, attend_current=True, returns=("out", "rem"))
    return (out, rem), (halves @ values, np.broadcast_to(1.0 - halves.sum(-1), rem.shape))


def current_is_next(run, x):
    """Without the own key, a query sees what one token earlier would with it."""
    n = min(x["q"].shape[2], x["k"].shape[2]) - 1
    late, early = {**x, "q": x["q"][:, :, -n:] if n else x["q"][:, :, :0]}, {name: y[:, :, :-1] for name, y in x.items()}
    return run(late, returns=("out", "rem")), run({**early, "q": late["q"]}, attend_current=True, returns=("out", "rem"))


def keys_in_halves(run, x):
    """The farther half sees what the nearer half has left."""
    n_q, n_k = x["q"].shape[2], x["k"].shape[2]
    far = n_k // 2
    last = {**x, "q": x["q"][:, :, n_q - min(n_q, n_k - far) :]}
    near_out, near_rem = run({**last, **{name: x[name][:, :, far:] for name in ("k", "v")}}, attend_current=True, returns=("out", "rem"))
    whole = run(last, attend_current=True, returns=("out", "rem"))
    far_out, far_rem = np.zeros_like(near_out), np.ones_like(near_rem)
    for i in range(near_out.shape[2]):  # each query alone, as if it came right after the farther half
        one = {"q": last["q"][:, :, i : i + 1], **{name: x[name][:, :, :far] for name in ("k", "v")}}
        out, rem = run(one, attend_current=True, returns=("out", "rem"))
        far_out[:, :, i : i + 1], far_rem[:, :, i : i + 1] = out, rem
    return whole, (near_out + near_rem[..., None] * far_out, near_rem * far_rem)


def in_two_calls(run, x):
    half, n_q, n_k = x["q"].shape[2] // 2, x["q"].shape[2], x["k"].shape[2]
    seen = max(n_k - n_q + half, 0)
    first = {**{name: x[name][:, :, :seen] for name in ("k", "v")}, "q": x["q"][:, :, :half]}
    parts = [run(first, returns=("out", "rem")), run({**x, "q": x["q"][:, :, half:]}, returns=("out", "rem"))]
    return run(x, returns=("out", "rem")), tuple(np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))


#: Pairs of a query and a key it sees, of one head, its own key counted; and how many of them are own keys.
PAIRS = "(T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"
OWN = "(T if T <= S else S)"

VARIANT = Variant(
    name="stick_breaking",
    family="scored",
    summary="Stick-breaking attention: each key takes a sigmoid share of what nearer keys have left.",
    equation="out_i = sum_{j < i} sigmoid(z_ij) prod_{j < l < i} (1 - sigmoid(z_il)) v_j, z_ij = scale q_i . k_j",
    paper=Paper(
        title="Scaling Stick-Breaking Attention: An Efficient Implementation and In-depth Study",
        authors=("Tan, Shawn", "Yang, Songlin", "Courville, Aaron", "Panda, Rameswar", "Shen, Yikang"),
        year=2024,
        arxiv="2410.17980",
        where="section 2",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries, of the last T tokens"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("rem", "B Hq T", "what is left of the stick", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . k; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
        Param("attend_current", Choice((False, True)), False, "whether a query's own key takes a share, the first one", tries=(True,)),
    ),
    define=define,
    vectorized=vectorized,
    cost=Cost(flops=f"B*Hq*({PAIRS}*(2*D + 2*E + 8) - (0 if attend_current else {OWN}*(2*E + 7)))", memory="B*Hq*T*(E + 1)"),
    ordered=lambda params: "T S",
    causal={},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[math.log(3.0)], [0.0], [50.0]]]], "v": [[[[8.0], [4.0], [100.0]]]]},
            params={"scale": 1.0},
            returns={"out": [[[[6.0], [5.0]]]], "rem": [[[0.25, 0.125]]]},
            source="by hand: T=2, S=3; query 0 sees key 0 only: 3/4 of 8; query 1 gives half to key 1 and 3/4 of the other half to key 0",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[0.0], [math.log(3.0)]]]], "v": [[[[8.0], [4.0]]]]},
            params={"scale": 1.0, "attend_current": True},
            returns={"out": [[[[4.0], [4.0]]]], "rem": [[[0.5, 0.125]]]},
            source="by hand: 1/2 of 8; then 3/4 of 4 and 1/2 of 1/4 of 8",
        ),
    ),
    identities=(
        Identity("the shares and the remainder add up to one", nothing_is_lost),
        Identity("at scores of 0 every key takes half of what is left", even_shares),
        Identity("without its own key a query sees what one token earlier does with it", current_is_next),
        Identity("two halves of the keys merge by the nearer one's remainder", keys_in_halves),
        Identity("two calls, the second with all the keys, are one", in_two_calls),
    ),
)
