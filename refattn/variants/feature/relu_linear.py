"""ReLU linear attention, of EfficientViT: rectified queries and keys for features.

    phi(x) = max(x, 0)
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i + eps),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

The paper sees all keys (``causal=False``); its layer also concatenates heads of queries, keys and values averaged over neighbouring tokens by
depthwise convolutions, which is not here.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: eps, without which a query that has no positive channel in common with any key divides 0 by 0; the published code has
1e-15, timm 1e-5, which shows where all features are small.  A scale, which cancels but for eps, is not there.

Checked against timm's LiteMLA and, where causal, a composition of PyTorch's relu and matmul.
"""

import numpy as np

from refattn.pieces.feature_maps import relu
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, initial_state, initial_mass, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]

    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    mass = np.zeros((batch, kv_heads, d))
    phi = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(d):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    for x in range(d):
                        phi[x] = max(k[b, g, j, x], 0.0)
                    for f in range(d):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        phi[x] = max(q[b, h, i, x], 0.0)
                    total = eps
                    for f in range(d):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=(Factor("k", relu),), value=("v",)),),
        query=(Factor("q", relu),),
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


def rectified_scores(run, x):
    keys, values = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    weights = np.maximum(x["q"], 0.0) @ np.swapaxes(np.maximum(keys, 0.0), -1, -2)
    return run(x, eps=0.5, causal=False), weights @ values / (np.sum(weights, axis=-1, keepdims=True) + 0.5)


def lengths_of_queries_cancel(run, x):
    return run(x, eps=0.0), run({**x, "q": 3.0 * x["q"]}, eps=0.0)


VARIANT = Variant(
    name="relu_linear",
    family="feature",
    summary="ReLU linear attention (EfficientViT): rectified queries and keys for features.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps), phi(x) = max(x, 0)",
    paper=Paper(
        title="EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction",
        authors=("Cai, Han", "Li, Junyan", "Hu, Muyan", "Gan, Chuang", "Han, Song"),
        year=2022,
        arxiv="2205.14756",
        where="section 3.1",
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
        Param("eps", Number(at_least=0.0), 1e-15, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(Hkv*S*D*(2*E + 1) + Hq*T*(D*(2*E + 2) + E))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0, 2.0]]]], "k": [[[[2.0, -1.0], [1.0, 2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 1.0},
            returns={"out": [[[[48.0 / 8.0]]]], "state": [[[[16.0], [16.0]]]], "mass": [[[3.0, 2.0]]]},
            source="by hand: weights 2 and 5",
        ),
        Example(
            operands={"q": [[[[-1.0], [1.0]]]], "k": [[[[1.0], [3.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 0.0, "causal": True},
            returns={"out": [[[[0.0], [7.0]]]]},
            source="by hand: the first query has no feature; weights 1 and 3 for the second",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("it is attention weighted by products of rectified vectors", rectified_scores),
        Identity("without eps the lengths of queries cancel", lengths_of_queries_cancel),
    ),
)
