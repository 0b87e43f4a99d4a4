"""Linear attention: the exponential of softmax replaced by a product of features, so that the keys can be summed once.

    phi(x) = elu(x) + 1             (x + 1 for x > 0, exp(x) for x <= 0)
    out_i  = sum_{j visible} (phi(q_i) . phi(k_j)) v_j / (eps + sum_{j visible} phi(q_i) . phi(k_j))      ``form="quadratic"``
           = phi(q_i)^T Z_i / (eps + phi(q_i) . z_i),                                                     ``form="recurrent"``
             Z_i = sum_{j visible} phi(k_j) v_j^T,   z_i = sum_{j visible} phi(k_j)

Both forms are written out and agree up to rounding; the recurrent one adds each key to the running Z and z when it comes into view, all
of them before the first query if not ``causal``.  ``causal=True`` puts query i at position ``i + S - T``, as in `softmax`.  Query head h reads
key-value head ``h // (Hq // Hkv)``.  A query that sees nothing gives 0.

The paper's equations have no eps; it is the 1e-6 of the authors' published code, there added to the denominator as here.

What people get wrong: a scale.  There is none; without eps a scale could not cancel either, phi not being homogeneous, so flash-linear-attention's
scaled queries give different numbers; its eps is 1e-10.  Computing elu(x) + 1 as (exp(x) - 1) + 1, which loses every digit of a feature
below the unit roundoff.  Clamping the denominator (cosFormer) instead of adding to it.

Checked against a composition of PyTorch's elu and matmul, and against ONNX's reference evaluator (LinearAttention, update rule "linear", one
run for the numerator and one for the denominator).
"""

import math

import numpy as np

from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Variant


def define(q, k, v, causal, eps, form):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    out = np.zeros((batch, heads, n_q, d_v))
    phi_q = np.zeros((batch, heads, n_q, d))
    phi_k = np.zeros((batch, kv_heads, n_k, d))
    state = np.zeros((d, d_v))  # Z of the paper's S
    mass = np.zeros(d)  # z
    for b in range(batch):
        for h in range(heads):
            for i in range(n_q):
                for x in range(d):
                    phi_q[b, h, i, x] = q[b, h, i, x] + 1.0 if q[b, h, i, x] > 0.0 else math.exp(q[b, h, i, x])
        for g in range(kv_heads):
            for j in range(n_k):
                for x in range(d):
                    phi_k[b, g, j, x] = k[b, g, j, x] + 1.0 if k[b, g, j, x] > 0.0 else math.exp(k[b, g, j, x])
        for h in range(heads):
            g = h // (heads // kv_heads)
            if form == 0:  # quadratic: every query meets every key
                for i in range(n_q):
                    visible = n_k if causal == 0 else i + n_k - n_q + 1
                    if visible <= 0:
                        continue
                    total = 0.0
                    for j in range(visible):
                        similarity = 0.0
                        for x in range(d):
                            similarity += phi_q[b, h, i, x] * phi_k[b, g, j, x]
                        total += similarity
                        for y in range(d_v):
                            out[b, h, i, y] += similarity * v[b, g, j, y]
                    total += eps
                    for y in range(d_v):
                        out[b, h, i, y] /= total
            else:  # recurrent: keys are summed as they come into view
                for x in range(d):
                    mass[x] = 0.0
                    for y in range(d_v):
                        state[x, y] = 0.0
                seen = 0
                for i in range(n_q):
                    visible = n_k if causal == 0 else i + n_k - n_q + 1
                    if visible <= 0:
                        continue
                    for j in range(seen, visible):
                        for x in range(d):
                            mass[x] += phi_k[b, g, j, x]
                            for y in range(d_v):
                                state[x, y] += phi_k[b, g, j, x] * v[b, g, j, y]
                    seen = visible
                    total = 0.0
                    for x in range(d):
                        total += phi_q[b, h, i, x] * mass[x]
                        for y in range(d_v):
                            out[b, h, i, y] += phi_q[b, h, i, x] * state[x, y]
                    total += eps
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out


def forms_agree(run, x):
    sides = [(run(x, causal=causal, form="quadratic"), run(x, causal=causal, form="recurrent")) for causal in (False, True)]
    return tuple(zip(*sides, strict=True))


def softmax_of_logarithms(run, x):
    phi = {name: np.where(x[name] > 0.0, x[name] + 1.0, np.exp(np.minimum(x[name], 0.0))) for name in ("q", "k")}
    keys = np.repeat(phi["k"], phi["q"].shape[1] // phi["k"].shape[1], axis=1)
    similarity = phi["q"] @ np.swapaxes(keys, -1, -2)
    return run(x, eps=0.0), run({**x, "bias": np.log(similarity)}, name="softmax", scale=0.0, returns="out")


def last_query_sees_all(run, x):
    last = {**x, "q": x["q"][:, :, -1:]}
    return run(last, causal=True), run(last, causal=False)


def ones_give_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}, eps=0.0), 1.0


#: Visible pairs of one head.
PAIRS = "(T*S if causal == 0 else T*S - T*(T - 1)//2 if T <= S else S*(S + 1)//2)"

VARIANT = Variant(
    name="linear",
    family="feature",
    summary="Linear attention with features elu + 1, in quadratic and recurrent form.",
    equation="out_i = sum_j (phi(q_i) . phi(k_j)) v_j / (eps + sum_j phi(q_i) . phi(k_j)), phi(x) = elu(x) + 1",
    paper=Paper(
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        authors=("Katharopoulos, Angelos", "Vyas, Apoorv", "Pappas, Nikolaos", "Fleuret, François"),
        year=2020,
        arxiv="2006.16236",
        where="sections 3.2 to 3.4, equations 4 to 7 and 16 to 20",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
    ),
    outputs=(Output("out", "B Hq T E", "attention output"),),
    params=(
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
        Param("eps", Number(at_least=0.0), 1e-6, "added to the denominator", tries=(0.0, 0.5)),
        Param("form", Choice(("quadratic", "recurrent")), "quadratic", "every query meets every key, or keys are summed once", tries=("recurrent",)),
    ),
    define=define,
    cost=Cost(
        flops=f"B*(D*(Hq*T + Hkv*S) + Hq*({PAIRS}*(2*D + 2*E + 1) + T*(E + 1) if form == 0"
        " else (S*(2*D*E + D) if T > 0 else 0) + T*(2*D*E + 2*D + E + 1)))",
        memory="B*(Hq*T*(D + E) + Hkv*S*D) + D*(E + 1)",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    linear_in="v",
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 0.0},
            returns={"out": [[[[7.0]]]]},
            source="by hand: phi(q) = 2, phi(k) = 1 and 3, weights 2/8 and 6/8",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[0.0], [2.0], [-math.log(2.0)]]]], "v": [[[[4.0], [8.0], [16.0]]]]},
            params={"causal": True, "eps": 0.5, "form": "recurrent"},
            returns={"out": [[[[28.0 / 4.5], [7.2]]]]},
            source="by hand: T=2, S=3, so query 0 sees keys 0 and 1; phi(k) = 1, 3, 1/2",
        ),
        Example(
            operands={"q": [[[[0.0, 2.0]]]], "k": [[[[3.0, 0.0], [0.0, 1.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 2.0},
            returns={"out": [[[[84.0 / 16.0]]]]},
            source="by hand: phi(q) = (1, 3), phi(k) = (4, 1) and (1, 2), similarities 7 and 7, numerator 84, denominator 14 + 2",
        ),
    ),
    identities=(
        Identity("the quadratic and the recurrent form agree", forms_agree),
        Identity("without eps it is softmax attention on the logarithms of the similarities", softmax_of_logarithms),
        Identity("without eps, values all one give one", ones_give_one),
        Identity("the last query of a causal run sees all keys", last_query_sees_all),
    ),
)
