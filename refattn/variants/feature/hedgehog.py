"""Hedgehog: linear attention with features learned to mimic softmax attention's spikes.

    y = W x + b
    phi(x) = [softmax(y), softmax(-y)]         ``activation="softmax"``
           = [exp(y), exp(-y)]                 ``activation="exp"``
           = softmax([y, -y])                  ``activation="joint"``
    out_i = phi_q(q_i)^T Z_i / (phi_q(q_i) . z_i + eps),   Z_i = sum_(j visible) phi_k(k_j) v_j^T,   z_i = sum_(j visible) phi_k(k_j)

Queries and keys have a W and b each, per head.  The joint form's divisor cancels for a query, not for a key; so the three differ.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: which of the three it is.  flash-linear-attention has "joint" of 2 y, the authors' lolcats "softmax", each half by itself; its
exponential form subtracts the largest y from the first half and the least from the second, token by token, which is not exp(y) and weighs the halves
against each other differently.  lolcats clamps features at 1e-12.

Checked against compositions of PyTorch's linear, softmax and exp, and flash-linear-attention's recurrent linear attention on those features.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import hedgehog
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w_q, w_k, b_q, b_k, initial_state, initial_mass, activation, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w_q.shape[1]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, 2 * m, d_v))
    mass = np.zeros((batch, kv_heads, 2 * m))
    phi = np.zeros(2 * m)
    y = np.zeros(m)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(2 * m):
                mass[b, g, f] = initial_mass[b, g, f]
                for z in range(d_v):
                    state[b, g, f, z] = initial_state[b, g, f, z]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    top, bottom = -np.inf, np.inf
                    for f in range(m):
                        y[f] = b_k[g, f]
                        for x in range(d):
                            y[f] += w_k[g, f, x] * k[b, g, j, x]
                        top, bottom = max(y[f], top), min(y[f], bottom)
                    if activation == 1:
                        top, bottom = 0.0, 0.0
                    elif activation == 2:
                        top = max(top, -bottom)
                        bottom = -top
                    plus, minus = 0.0, 0.0
                    for f in range(m):
                        phi[f], phi[m + f] = math.exp(y[f] - top), math.exp(bottom - y[f])
                        plus += phi[f]
                        minus += phi[m + f]
                    if activation == 1:
                        plus, minus = 1.0, 1.0
                    elif activation == 2:
                        plus += minus
                        minus = plus
                    for f in range(m):
                        phi[f] /= plus
                        phi[m + f] /= minus
                    for f in range(2 * m):
                        mass[b, g, f] += phi[f]
                        for z in range(d_v):
                            state[b, g, f, z] += phi[f] * v[b, g, j, z]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    top, bottom = -np.inf, np.inf
                    for f in range(m):
                        y[f] = b_q[h, f]
                        for x in range(d):
                            y[f] += w_q[h, f, x] * q[b, h, i, x]
                        top, bottom = max(y[f], top), min(y[f], bottom)
                    if activation == 1:
                        top, bottom = 0.0, 0.0
                    elif activation == 2:
                        top = max(top, -bottom)
                        bottom = -top
                    plus, minus = 0.0, 0.0
                    for f in range(m):
                        phi[f], phi[m + f] = math.exp(y[f] - top), math.exp(bottom - y[f])
                        plus += phi[f]
                        minus += phi[m + f]
                    if activation == 1:
                        plus, minus = 1.0, 1.0
                    elif activation == 2:
                        plus += minus
                        minus = plus
                    for f in range(m):
                        phi[f] /= plus
                        phi[m + f] /= minus
                    total = eps
                    for f in range(2 * m):
                        total += phi[f] * mass[b, g, f]
                        for z in range(d_v):
                            out[b, h, i, z] += phi[f] * state[b, g, f, z]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for z in range(d_v):
                        out[b, h, i, z] /= total
    return out, state, mass


ACTIVATIONS = ("softmax", "exp", "joint")


def recurrence(dims, params):
    activation = ACTIVATIONS.index(params["activation"])
    return Recurrence(
        writes=(Write(key=(Factor("k", hedgehog, (activation,), ("w_k", "b_k")),), value=("v",)),),
        query=(Factor("q", hedgehog, (activation,), ("w_q", "b_q")),),
        normalizer="sum",
        eps=params["eps"],
        causal=params["causal"],
    )


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    results = {"causal": True, "returns": ("out", "state", "mass")}
    out_1, state, mass = run(one, **results)
    out_2, state, mass = run({**two, "initial_state": state, "initial_mass": mass}, **results)
    return run(x, **results), (np.concatenate([out_1, out_2], axis=2), state, mass)


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    state, mass = run(one, causal=False, returns=("state", "mass"))
    return run(x, causal=False), run({**two, "initial_state": state, "initial_mass": mass}, causal=False)


def ones_give_one(run, x):
    return [run({**x, "v": np.ones_like(x["v"])}, activation=activation, causal=False) for activation in ACTIVATIONS], [1.0] * len(ACTIVATIONS)


def both_signs(run, x):
    turned = {"w_q": -x["w_q"], "w_k": -x["w_k"]}
    return [run(x, activation=activation) for activation in ACTIVATIONS], [run({**x, **turned}, activation=activation) for activation in ACTIVATIONS]


def cosh_of_scores(run, x):
    if x["w_q"].shape[1] > 1:
        x = {**x, "w_q": x["w_q"][:, :1], "w_k": x["w_k"][:, :1]}
    group = x["q"].shape[1] // x["k"].shape[1]
    y_q = x["q"] @ np.swapaxes(x["w_q"], -1, -2)
    y_k, values = (np.repeat(side, group, axis=1) for side in (x["k"] @ np.swapaxes(x["w_k"], -1, -2), x["v"]))
    weights = np.cosh(y_q + np.swapaxes(y_k, -1, -2))
    return run(x, activation="exp", causal=False), weights @ values / np.sum(weights, axis=-1, keepdims=True)


VARIANT = Variant(
    name="hedgehog",
    family="feature",
    summary="Hedgehog: linear attention with learned exponentials of both signs for features, as softmax or bare.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x) = [softmax(W x + b), softmax(-W x - b)]",
    paper=Paper(
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        authors=("Zhang, Michael", "Bhatia, Kush", "Kumbong, Hermann", "Ré, Christopher"),
        year=2024,
        arxiv="2402.04347",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w_q", "Hq F D", "weights of the queries' features"),
        Operand("w_k", "Hkv F D", "weights of the keys' features"),
        Operand("b_q", "Hq F", "biases of the queries' features", absent=0.0),
        Operand("b_k", "Hkv F", "biases of the keys' features", absent=0.0),
        Operand("initial_state", "B Hkv F+F E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv F+F",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv F+F E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv F+F", "sum of features, after the last key", wide=True),
    ),
    params=(
        Param(
            "activation",
            Choice(ACTIVATIONS),
            "softmax",
            "what the exponentials are divided by: each half by its own sum, nothing, or both by theirs",
            tries=("exp", "joint"),
        ),
        Param("eps", Number(at_least=0.0), 0.0, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), True, "see no later position; the last query is aligned with the last key", tries=(False,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(Hkv*S*(F*(2*D + 4*E + 10) + (activation == 2)) + Hq*T*(F*(2*D + 4*E + 12) + (activation == 2) + E))",
        memory="B*(Hq*T*E + Hkv*2*F*(E + 1)) + 3*F",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[0.0]]]], "k": [[[[0.0], [math.log(2.0)]]]], "v": [[[[4.0], [8.0]]]], "w_q": [[[1.0]]], "w_k": [[[1.0]]]},
            params={"activation": "exp"},
            returns={"out": [[[[28.0 / 4.5]]]], "mass": [[[3.0, 1.5]]]},
            source="by hand: phi(q) = (1, 1), phi(k) = (1, 1) and (2, 1/2), weights 2 and 5/2",
        ),
        Example(
            operands={
                "q": [[[[0.0], [0.0]]]],
                "k": [[[[0.0], [1.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "w_q": [[[1.0], [0.0]]],
                "w_k": [[[math.log(3.0)], [0.0]]],
            },
            params={"causal": True},
            returns={"out": [[[[4.0], [6.0]]]], "mass": [[[1.25, 0.75, 0.75, 1.25]]]},
            source="by hand: phi(q) = 1/2, phi(k) = 1/2 and (3/4, 1/4, 1/4, 3/4)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("values all one give one", ones_give_one),
        Identity("the other sign of both maps exchanges the halves", both_signs),
        Identity("a single pair of exponentials weighs by cosh of the sum", cosh_of_scores),
    ),
)
