"""Linear attention: the exponential of softmax replaced by a product of features, so that the keys can be summed once.

    phi(x) = elu(x) + 1             (x + 1 for x > 0, exp(x) for x <= 0)
    out_i  = phi(q_i)^T Z_i / (eps + phi(q_i) . z_i),   Z_i = sum_{j visible} phi(k_j) v_j^T,   z_i = sum_{j visible} phi(k_j)
           = sum_{j visible} (phi(q_i) . phi(k_j)) v_j / (eps + sum_{j visible} phi(q_i) . phi(k_j))

The first line is the definition: each key is added to the running Z and z when it comes into view, all of them before the first query if not
``causal``.  ``causal=True`` puts query i at position ``i + S - T``, as in `softmax`.  Query head h reads key-value head ``h // (Hq // Hkv)``.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

The paper's equations have no eps; it is the 1e-6 of the authors' published code, there added to the denominator as here.

What people get wrong: a scale.  There is none; without eps a scale could not cancel either, phi not being homogeneous, so flash-linear-attention's
scaled queries give different numbers; its eps is 1e-10.  Computing elu(x) + 1 as (exp(x) - 1) + 1, which loses every digit of a feature
below the unit roundoff.  Clamping the denominator (cosFormer) instead of adding to it.

Checked against a composition of PyTorch's elu and matmul, and against ONNX's reference evaluator (LinearAttention, update rule "linear", one
run for the numerator and one for the denominator).
"""

import math

import numpy as np

from refattn.pieces.feature_maps import elu_plus_one
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, initial_state, initial_mass, causal, eps):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))  # Z, the paper's S
    mass = np.zeros((batch, kv_heads, d))  # z
    phi = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                mass[b, g, x] = initial_mass[b, g, x]
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            seen = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(seen, visible):
                    for x in range(d):
                        phi[x] = k[b, g, j, x] + 1.0 if k[b, g, j, x] > 0.0 else math.exp(k[b, g, j, x])
                    for x in range(d):
                        mass[b, g, x] += phi[x]
                        for y in range(d_v):
                            state[b, g, x, y] += phi[x] * v[b, g, j, y]
                seen = max(seen, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        phi[x] = q[b, h, i, x] + 1.0 if q[b, h, i, x] > 0.0 else math.exp(q[b, h, i, x])
                    total = eps
                    for x in range(d):
                        total += phi[x] * mass[b, g, x]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[x] * state[b, g, x, y]
                    if total == 0.0:  # nothing was seen
                        total = math.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=(Factor("k", elu_plus_one),), value=("v",)),),
        query=(Factor("q", elu_plus_one),),
        normalizer="sum",
        eps=params["eps"],
        causal=params["causal"],
    )


def features(x):
    return np.where(x > 0.0, x + 1.0, np.exp(np.minimum(x, 0.0)))


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    results = {"causal": True, "returns": ("out", "state", "mass")}
    out_1, state, mass = run(one, **results)
    out_2, state, mass = run({**two, "initial_state": state, "initial_mass": mass}, **results)
    return run(x, **results), (np.concatenate([out_1, out_2], axis=2), state, mass)


def every_query_meets_every_key(run, x):
    """The quadratic form, causal and not."""
    k, v = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    n, keys = x["q"].shape[2], k.shape[2]
    similarity = features(x["q"]) @ np.swapaxes(features(k), -1, -2)
    seen = np.arange(keys) <= np.arange(n)[:, None] + keys - n
    looked = [weights @ v / (np.sum(weights, axis=-1, keepdims=True) + 0.5) for weights in (similarity, np.where(seen, similarity, 0.0))]
    return tuple(run(x, causal=causal, eps=0.5) for causal in (False, True)), tuple(looked)


def softmax_of_logarithms(run, x):
    keys = np.repeat(features(x["k"]), x["q"].shape[1] // x["k"].shape[1], axis=1)
    similarity = features(x["q"]) @ np.swapaxes(keys, -1, -2)
    return run(x, eps=0.0), run({**x, "bias": np.log(similarity)}, name="softmax", scale=0.0, returns="out")


def last_query_sees_all(run, x):
    last = {**x, "q": x["q"][:, :, -1:]}
    return run(last, causal=True), run(last, causal=False)


def ones_give_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}, eps=0.0), 1.0


VARIANT = Variant(
    name="linear",
    family="feature",
    summary="Linear attention with features elu + 1.",
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
        Operand("initial_state", "B Hkv D E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv D",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv D", "sum of features, after the last key", wide=True),
    ),
    params=(
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
        Param("eps", Number(at_least=0.0), 1e-6, "added to the denominator", tries=(0.0, 0.5)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(Hkv*S*D*(2*E + 2) + Hq*T*(D*(2*E + 3) + E))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 0.0},
            returns={"out": [[[[7.0]]]]},
            source="by hand: phi(q) = 2, phi(k) = 1 and 3, weights 2/8 and 6/8",
        ),
        Example(
            operands={"q": [[[[0.0], [0.0]]]], "k": [[[[0.0], [2.0], [-math.log(2.0)]]]], "v": [[[[4.0], [8.0], [16.0]]]]},
            params={"causal": True, "eps": 0.5},
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
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("the quadratic form is the same", every_query_meets_every_key),
        Identity("without eps it is softmax attention on the logarithms of the similarities", softmax_of_logarithms),
        Identity("without eps, values all one give one", ones_give_one),
        Identity("the last query of a causal run sees all keys", last_query_sees_all),
    ),
)
