"""T2R: linear attention with a learned layer and a ReLU for features, of finetuning a transformer into a recurrent network.

    phi_q(x) = max(W_q x + b_q, 0),   phi_k(x) = max(W_k x + b_k, 0)      per head
    out_i = phi_q(q_i)^T Z_i / (phi_q(q_i) . z_i + eps),   Z_i = sum_(j visible) phi_k(k_j) v_j^T,   z_i = sum_(j visible) phi_k(k_j)

The paper has one W and b per head for queries and keys; give them twice.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: the denominator, which is 0 where no feature of a query meets one of a key; the paper adds nothing to it, which is the default
here.  Others clamp features at 1e-12 (lolcats), so that such a query gets the mean of all values, not 0.

Checked against a composition of PyTorch's linear and relu.
"""

import numpy as np

from refattn.pieces.feature_maps import t2r
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, w_q, w_k, b_q, b_k, initial_state, initial_mass, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m = w_q.shape[1]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, m, d_v))
    mass = np.zeros((batch, kv_heads, m))
    phi = np.zeros(m)
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
                    for f in range(m):
                        phi[f] = b_k[g, f]
                        for x in range(d):
                            phi[f] += w_k[g, f, x] * k[b, g, j, x]
                        phi[f] = max(phi[f], 0.0)
                    for f in range(m):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for f in range(m):
                        phi[f] = b_q[h, f]
                        for x in range(d):
                            phi[f] += w_q[h, f, x] * q[b, h, i, x]
                        phi[f] = max(phi[f], 0.0)
                    total = eps
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
    return Recurrence(
        writes=(Write(key=(Factor("k", t2r, (), ("w_k", "b_k")),), value=("v",)),),
        query=(Factor("q", t2r, (), ("w_q", "b_q")),),
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


def rows_of_the_identity(run, x):
    rows = np.eye(x["w_k"].shape[1], x["w_k"].shape[2])  # features 1 .. D are the channels; those beyond are 0
    maps = {"w_q": np.broadcast_to(rows, x["w_q"].shape), "w_k": np.broadcast_to(rows, x["w_k"].shape)}
    keep = min(rows.shape)
    bare = {**{name: x[name][..., :keep] for name in ("q", "k")}, "v": x["v"]}
    return run({**x, **maps}, eps=0.5, causal=False), run(bare, name="relu_linear", eps=0.5, returns="out")


def constant_features(run, x):
    ones = {"w_q": 0.0 * x["w_q"], "b_q": np.ones(x["w_q"].shape[:2]), "w_k": 0.0 * x["w_k"], "b_k": np.ones(x["w_k"].shape[:2])}
    mean = np.repeat(np.mean(x["v"], axis=2, keepdims=True), x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run({**x, **ones}, causal=False), mean


VARIANT = Variant(
    name="t2r",
    family="feature",
    summary="T2R: linear attention with a learned layer and a ReLU for features.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)), phi(x) = max(W x + b, 0)",
    paper=Paper(
        title="Finetuning Pretrained Transformers into RNNs",
        authors=(
            "Kasai, Jungo",
            "Peng, Hao",
            "Zhang, Yizhe",
            "Yogatama, Dani",
            "Ilharco, Gabriel",
            "Pappas, Nikolaos",
            "Mao, Yi",
            "Chen, Weizhu",
            "Smith, Noah A.",
        ),
        year=2021,
        arxiv="2103.13076",
        where="section 2.2",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("w_q", "Hq F D", "weights of the queries' features"),
        Operand("w_k", "Hkv F D", "weights of the keys' features"),
        Operand("b_q", "Hq F", "biases of the queries' features", absent=0.0),
        Operand("b_k", "Hkv F", "biases of the keys' features", absent=0.0),
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
        Param("eps", Number(at_least=0.0), 0.0, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), True, "see no later position; the last query is aligned with the last key", tries=(False,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(Hkv*S*(F*(2*D + 2*E + 1)) + Hq*T*(F*(2*D + 2*E + 2) + E))",
        memory="B*(Hq*T*E + Hkv*F*(E + 1)) + F",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[0.0], [2.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "w_q": [[[1.0], [-1.0]]],
                "w_k": [[[1.0], [-1.0]]],
                "b_q": [[1.0, 2.0]],
                "b_k": [[1.0, 1.0]],
            },
            returns={"out": [[[[4.0], [60.0 / 9.0]]]], "state": [[[[28.0], [4.0]]]], "mass": [[[4.0, 1.0]]]},
            source="by hand: phi(q) = (2, 1), phi(k) = (1, 1) and (3, 0), weights 3 and 6",
        ),
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[-1.0], [-2.0]]]], "v": [[[[4.0], [8.0]]]], "w_q": [[[1.0]]], "w_k": [[[1.0]]]},
            returns={"out": [[[[0.0]]]]},
            source="by hand: no key has a feature",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("with rows of the identity it is the ReLU kernel", rows_of_the_identity),
        Identity("with constant features it is the mean of the values", constant_features),
    ),
)
