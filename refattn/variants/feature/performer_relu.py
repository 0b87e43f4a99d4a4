"""Performer-ReLU: generalised attention, rectified random projections for features.

    phi(x)_r = max(w_r . x', 0) + eps,   x' = sqrt(scale) x,   r = 1..m
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

The rows w_r of ``w`` are an operand; with the identity for w this is the bare ReLU kernel.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: eps is added to every feature, not to the denominator, so that every query sees every key a little; there is no 1 / sqrt(m).

Checked against performer-pytorch's generalized_kernel with its full and its causal attention.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import favor, random_relu
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w, initial_state, initial_mass, scale, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w.shape[0]
    group = heads // kv_heads
    root = math.sqrt(scale)
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, m, d_v))
    mass = np.zeros((batch, kv_heads, m))
    phi = np.zeros(m)
    scaled = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(m):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    for x in range(d):
                        scaled[x] = root * k[b, g, j, x]
                    for f in range(m):
                        projected = 0.0
                        for x in range(d):
                            projected += w[f, x] * scaled[x]
                        phi[f] = max(projected, 0.0) + eps
                    for f in range(m):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        scaled[x] = root * q[b, h, i, x]
                    for f in range(m):
                        projected = 0.0
                        for x in range(d):
                            projected += w[f, x] * scaled[x]
                        phi[f] = max(projected, 0.0) + eps
                    total = 0.0
                    for f in range(m):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    numbers = (dims["D"] ** -0.5 if params["scale"] is None else params["scale"], params["eps"])
    return Recurrence(
        writes=(Write(key=(Factor("k", random_relu, numbers, ("w",)),), value=("v",)),),
        query=(Factor("q", random_relu, numbers, ("w",)),),
        normalizer="sum",
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
    return run({**x, "v": np.ones_like(x["v"])}, causal=False), 1.0


def rectified_scores(run, x):
    keys, values = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    phi_q, phi_k = (np.maximum(side @ x["w"].T, 0.0) + 0.5 for side in (x["q"], keys))
    weights = phi_q @ np.swapaxes(phi_k, -1, -2)
    return run(x, scale=1.0, eps=0.5, causal=False), weights @ values / np.sum(weights, axis=-1, keepdims=True)


VARIANT = Variant(
    name="performer_relu",
    family="feature",
    summary="Performer-ReLU: linear attention with rectified random projections for features, projection given.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x) = max(W x, 0) + eps",
    paper=Paper(
        title="Rethinking Attention with Performers",
        authors=(
            "Choromanski, Krzysztof",
            "Likhosherstov, Valerii",
            "Dohan, David",
            "Song, Xingyou",
            "Gane, Andreea",
            "Sarlos, Tamas",
            "Hawkins, Peter",
            "Davis, Jared",
            "Mohiuddin, Afroz",
            "Kaiser, Lukasz",
            "Belanger, David",
            "Colwell, Lucy",
            "Weller, Adrian",
        ),
        year=2020,
        arxiv="2009.14794",
        where="sections 2.2 and 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w", "F D", "random projection, a feature a row", draw=favor.orthogonal),
        Operand("initial_state", "B Hkv F E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv F",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv F E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv F", "sum of features, after the last key", wide=True),
    ),
    params=(
        Param(
            "scale",
            Number(above=0.0, optional=True),
            None,
            "multiplies q . k; None is 1/sqrt(D)",
            absent=lambda dims: dims["D"] ** -0.5,
            tries=(0.37,),
        ),
        Param("eps", Number(at_least=0.0), 1e-3, "added to every feature", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="1 + B*(Hkv*S*(D + F*(2*D + 2*E + 2)) + Hq*T*(D + F*(2*D + 2*E + 3) + E))",
        memory="B*(Hq*T*E + Hkv*F*(E + 1)) + F + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0], [-1.0]]},
            params={"scale": 1.0, "eps": 1.0},
            returns={"out": [[[[68.0 / 10.0]]]]},
            source="by hand: phi(q) = (2, 1), phi(k) = (1, 1) and (3, 1), weights 3 and 7",
        ),
        Example(
            operands={"q": [[[[1.0], [-1.0]]]], "k": [[[[0.0], [2.0]]]], "v": [[[[4.0], [8.0]]]], "w": [[1.0], [-1.0]]},
            params={"scale": 1.0, "eps": 1.0, "causal": True},
            returns={"out": [[[[4.0], [52.0 / 8.0]]]], "state": [[[[28.0], [12.0]]]], "mass": [[[4.0, 2.0]]]},
            source="by hand: the second query has features (1, 2), so weights 3 and 5",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("values all one give one", ones_give_one),
        Identity("it is attention weighted by products of rectified projections", rectified_scores),
    ),
)
