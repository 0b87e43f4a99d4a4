"""ReBased: linear attention by the square of the product of normalised queries and keys.

    q' = sqrt(scale) (gamma_q norm(q) + beta_q),   k' = sqrt(scale) (gamma_k norm(k) + beta_k),   norm(x) = (x - mean) / sqrt(variance + norm_eps)
    out_i = sum_(j visible) (q'_i . k'_j)^2 v_j / (sum_(j visible) (q'_i . k'_j)^2 + eps)

The features are all products of two channels, D^2 of them; the sums over keys of k'_a k'_b v_j^T and of k'_a k'_b are carried:

    out_i = sum_ab q'_ia q'_ib Z_iab / (sum_ab q'_ia q'_ib z_iab + eps)

gamma and beta are learned, per channel and head, separately for queries and keys in the paper.  Mean and variance are over the channels of one
head, the variance divided by D.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: scale, squared by the kernel, cancels but for eps.  flash-linear-attention's reference takes queries and keys already
normalised; its layer has one gamma and beta for both, and keeps only the products a <= b, those of different channels weighted by sqrt(2): the
state differs, the output does not.  The Taylor terms 1 and s of Based are gone: the learned shift makes up for them.

Checked against flash-linear-attention's parallel reference behind PyTorch's layer_norm.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import rebased
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gamma_q, beta_q, gamma_k, beta_k, initial_state, initial_mass, scale, norm_eps, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // kv_heads
    root = math.sqrt(scale)
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, d, d, d_v))
    mass = np.zeros((batch, kv_heads, d, d))
    prime = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for z in range(d):
                    mass[b, g, x, z] = initial_mass[b, g, x, z]
                    for y in range(d_v):
                        state[b, g, x, z, y] = initial_state[b, g, x, z, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    mean, variance = 0.0, 0.0
                    for x in range(d):
                        mean += k[b, g, j, x]
                    mean /= d
                    for x in range(d):
                        variance += (k[b, g, j, x] - mean) * (k[b, g, j, x] - mean)
                    deviation = math.sqrt(variance / d + norm_eps)
                    for x in range(d):
                        prime[x] = root * (gamma_k[g, x] * (k[b, g, j, x] - mean) / deviation + beta_k[g, x])
                    for x in range(d):
                        for z in range(d):
                            product = prime[x] * prime[z]
                            mass[b, g, x, z] += product
                            for y in range(d_v):
                                state[b, g, x, z, y] += product * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    mean, variance = 0.0, 0.0
                    for x in range(d):
                        mean += q[b, h, i, x]
                    mean /= d
                    for x in range(d):
                        variance += (q[b, h, i, x] - mean) * (q[b, h, i, x] - mean)
                    deviation = math.sqrt(variance / d + norm_eps)
                    for x in range(d):
                        prime[x] = root * (gamma_q[h, x] * (q[b, h, i, x] - mean) / deviation + beta_q[h, x])
                    total = eps
                    for x in range(d):
                        for z in range(d):
                            product = prime[x] * prime[z]
                            total += product * mass[b, g, x, z]
                            for y in range(d_v):
                                out[b, h, i, y] += product * state[b, g, x, z, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass


def recurrence(dims, params):
    numbers = (params["norm_eps"], dims["D"] ** -0.5 if params["scale"] is None else params["scale"])
    return Recurrence(
        writes=(Write(key=(Factor("k", rebased, numbers, ("gamma_k", "beta_k")),), value=("v",)),),
        query=(Factor("q", rebased, numbers, ("gamma_q", "beta_q")),),
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


def squares_of_scores(run, x):
    normed = {}
    for name in ("q", "k"):
        centred = x[name] - np.mean(x[name], axis=-1, keepdims=True)
        normed[name] = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)
    scores = run({**normed, "v": x["v"]}, name="softmax", causal=True, returns="scores")
    weights = np.where(scores > -np.inf, scores * scores, 0.0)
    values = np.repeat(x["v"], x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run(x, eps=0.5, causal=True), weights @ values / (np.sum(weights, axis=-1, keepdims=True) + 0.5)


def shifts_give_the_mean(run, x):
    heads, kv_heads, d = x["q"].shape[1], x["k"].shape[1], x["q"].shape[3]
    shapes = {"q": (heads, d), "k": (kv_heads, d)}
    learned = {f"{part}_{name}": np.full(shape, part == "beta", float) for name, shape in shapes.items() for part in ("gamma", "beta")}
    mean = np.repeat(np.mean(x["v"], axis=2, keepdims=True), heads // kv_heads, axis=1)
    return run({**x, **learned}, eps=0.0, causal=False), mean


def only_shapes_count(run, x):
    return run(x, norm_eps=0.0, eps=0.5), run({**x, "q": 3.0 * x["q"] + 1.0, "k": 0.5 * x["k"] - 2.0}, norm_eps=0.0, eps=0.5)


VARIANT = Variant(
    name="rebased",
    family="feature",
    summary="ReBased: linear attention by the square of the product of normalised, learnedly stretched and shifted queries and keys.",
    equation="out_i = sum_j (q'_i . k'_j)^2 v_j / (sum_j (q'_i . k'_j)^2 + eps), x' = gamma norm(x) + beta",
    paper=Paper(
        title="Linear Transformers with Learnable Kernel Functions are Better In-Context Models",
        authors=(
            "Aksenov, Yaroslav",
            "Balagansky, Nikita",
            "Lo Cicero Vaina, Sofia Maria",
            "Shaposhnikov, Boris",
            "Gorbatovski, Alexey",
            "Gavrilov, Daniil",
        ),
        year=2024,
        arxiv="2402.10644",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("gamma_q", "Hq D", "stretch of the normalised queries", absent=1.0),
        Operand("beta_q", "Hq D", "shift of the normalised queries", absent=0.0),
        Operand("gamma_k", "Hkv D", "stretch of the normalised keys", absent=1.0),
        Operand("beta_k", "Hkv D", "shift of the normalised keys", absent=0.0),
        Operand("initial_state", "B Hkv D D E", "sum of products of earlier keys times values", absent=0.0),
        Operand("initial_mass", "B Hkv D D", "sum of products of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D D E", "sum of products of keys' channels times values, after the last key", wide=True),
        Output("mass", "B Hkv D D", "sum of products of keys' channels, after the last key", wide=True),
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
        Param("norm_eps", Number(at_least=0.0), 1e-5, "added to the variance", tries=(0.1,)),
        Param("eps", Number(at_least=0.0), 1e-6, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), True, "see no later position; the last query is aligned with the last key", tries=(False,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="1 + B*(Hkv*S*(4 + 10*D + D*D*(2 + 2*E)) + Hq*T*(4 + 10*D + D*D*(3 + 2*E) + E))",
        memory="B*(Hq*T*E + Hkv*D*D*(E + 1)) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0, 3.0], [1.0, 3.0]]]], "k": [[[[5.0, 9.0], [7.0, -1.0]]]], "v": [[[[4.0], [8.0]]]], "beta_k": [[0.0, 2.0]]},
            params={"scale": 1.0, "norm_eps": 0.0, "eps": 0.0},
            returns={"out": [[[[4.0], [4.0]]]], "mass": [[[[2.0, -2.0], [-2.0, 10.0]]]]},
            source="by hand: norms (-1, 1), keys (-1, 3) and (1, 1), scores 4 and 0",
        ),
        Example(
            operands={"q": [[[[1.0, 3.0]]]], "k": [[[[5.0, 9.0], [7.0, -1.0]]]], "v": [[[[4.0], [8.0]]]], "gamma_k": [[1.0, 2.0]]},
            params={"scale": 1.0, "norm_eps": 0.0, "eps": 6.0, "causal": False},
            returns={"out": [[[[108.0 / 24.0]]]]},
            source="by hand: keys (-1, 2) and (1, -2), scores 3 and -3, squares 9 and 9",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("it is attention weighted by squared scores of normalised vectors", squares_of_scores),
        Identity("with shifts alone it is the mean of the values", shifts_give_the_mean),
        Identity("without norm_eps neither length nor mean of a vector counts", only_shapes_count),
    ),
)
