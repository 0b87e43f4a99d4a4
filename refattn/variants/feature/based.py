"""Based: softmax's exponential replaced by its Taylor polynomial of second order, which is a product of features.

    s_ij  = scale * q_i . k_j
    out_i = sum_(j visible) (1 + s_ij + s_ij^2 / 2) v_j / (sum_(j visible) (1 + s_ij + s_ij^2 / 2) + eps)

The features are 1, x' and the products x'_a x'_b / sqrt(2) of x' = sqrt(scale) x, 1 + D + D^2 of them.  One state and one mass for each order are
carried, the sums over keys of features times values, and of features:

    Z0 = sum v_j^T,   Z1 = sum k'_j v_j^T,   Z2 = sum k'_j k'_j^T / sqrt(2) v_j^T,     z0 = sum 1,   z1 = sum k'_j,   z2 = sum k'_j k'_j^T / sqrt(2)
    out_i = (Z0 + q'_i^T Z1 + q'_i^T Z2 q'_i / sqrt(2)) / (z0 + q'_i . z1 + q'_i^T z2 q'_i / sqrt(2) + eps)

``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.  Query head h reads state head ``h // (Hq // Hkv)``.
States and masses start at their ``initial_...`` (0 if absent) and are returned after the last key, so that a sequence can be cut anywhere and
carried on.  Where the denominator is 0, so is the output.

The polynomial is positive (at least 1/2), so that these are weights; but it grows with s to the left as well.

What people get wrong: D is the small width, 16 in the paper, that queries and keys are projected to.  Products a b and b a are one feature of weight
sqrt(2) in some kernels, two here and in the paper; the state differs, the output does not.  The denominator is clamped at 1e-5 in
taylor-series-linear-attention, and has 1e-6 added in flash-linear-attention, which is the default here; the paper has neither.

Checked against flash-linear-attention's parallel and chunked references and against taylor-series-linear-attention's expansion.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import taylor2
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state_0, initial_state_1, initial_state_2, initial_mass_0, initial_mass_1, initial_mass_2, scale, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // kv_heads
    root, root_2 = math.sqrt(scale), math.sqrt(2.0)
    out = np.zeros((batch, heads, n_q, d_v))
    state_0 = np.zeros((batch, kv_heads, d_v))
    state_1 = np.zeros((batch, kv_heads, d, d_v))
    state_2 = np.zeros((batch, kv_heads, d, d, d_v))
    mass_0 = np.zeros((batch, kv_heads))
    mass_1 = np.zeros((batch, kv_heads, d))
    mass_2 = np.zeros((batch, kv_heads, d, d))
    scaled = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            mass_0[b, g] = initial_mass_0[b, g]
            for y in range(d_v):
                state_0[b, g, y] = initial_state_0[b, g, y]
            for x in range(d):
                mass_1[b, g, x] = initial_mass_1[b, g, x]
                for y in range(d_v):
                    state_1[b, g, x, y] = initial_state_1[b, g, x, y]
                for z in range(d):
                    mass_2[b, g, x, z] = initial_mass_2[b, g, x, z]
                    for y in range(d_v):
                        state_2[b, g, x, z, y] = initial_state_2[b, g, x, z, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    for x in range(d):
                        scaled[x] = root * k[b, g, j, x]
                    mass_0[b, g] += 1.0
                    for y in range(d_v):
                        state_0[b, g, y] += v[b, g, j, y]
                    for x in range(d):
                        mass_1[b, g, x] += scaled[x]
                        for y in range(d_v):
                            state_1[b, g, x, y] += scaled[x] * v[b, g, j, y]
                        for z in range(d):
                            product = scaled[x] * scaled[z] / root_2
                            mass_2[b, g, x, z] += product
                            for y in range(d_v):
                                state_2[b, g, x, z, y] += product * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    for x in range(d):
                        scaled[x] = root * q[b, h, i, x]
                    total = eps + mass_0[b, g]
                    for y in range(d_v):
                        out[b, h, i, y] = state_0[b, g, y]
                    for x in range(d):
                        total += scaled[x] * mass_1[b, g, x]
                        for y in range(d_v):
                            out[b, h, i, y] += scaled[x] * state_1[b, g, x, y]
                        for z in range(d):
                            product = scaled[x] * scaled[z] / root_2
                            total += product * mass_2[b, g, x, z]
                            for y in range(d_v):
                                out[b, h, i, y] += product * state_2[b, g, x, z, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state_0, state_1, state_2, mass_0, mass_1, mass_2


CARRIED = tuple(f"{part}_{order}" for part in ("state", "mass") for order in range(3))


def reduction(dims, params):
    """Linear attention of the features, all orders side by side."""
    d, scale = dims["D"], params["scale"] or dims["D"] ** -0.5
    q, k = (Factor(name, taylor2, (scale,)) for name in "qk")

    def operands(x):
        heads = (dims["B"], dims["Hkv"])
        states = x["initial_state_0"][:, :, None], x["initial_state_1"], x["initial_state_2"].reshape(*heads, d * d, dims["E"])
        masses = x["initial_mass_0"][:, :, None], x["initial_mass_1"], x["initial_mass_2"].reshape(*heads, d * d)
        return {
            "q": x["q"],
            "k": x["k"],
            "v": x["v"],
            "initial_state": np.concatenate(states, axis=2),
            "initial_mass": np.concatenate(masses, axis=2),
        }

    def outputs(x, found):
        state, mass, square = found["state"], found["mass"], (dims["B"], dims["Hkv"], d, d)
        return {
            "out": found["out"],
            "state_0": state[:, :, 0],
            "state_1": state[:, :, 1 : d + 1],
            "state_2": state[:, :, d + 1 :].reshape(*square, dims["E"]),
            "mass_0": mass[:, :, 0],
            "mass_1": mass[:, :, 1 : d + 1],
            "mass_2": mass[:, :, d + 1 :].reshape(*square),
        }

    return Reduction(
        Recurrence((Write((k,), ("v",)),), query=(q,), normalizer="sum", eps=params["eps"], causal=params["causal"]),
        {"q": "B Hq T D", "k": "B Hkv S D", "v": "B Hkv S E", "initial_state": "B Hkv N E", "initial_mass": "B Hkv N", "out": "B Hq T E"},
        operands,
        outputs,
    )


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    results = {"causal": True, "returns": ("out", *CARRIED)}
    out_1, *carried = run(one, **results)
    out_2, *carried = run({**two, **{f"initial_{name}": x for name, x in zip(CARRIED, carried, strict=True)}}, **results)
    return run(x, **results), (np.concatenate([out_1, out_2], axis=2), *carried)


def keys_in_two_parts(run, x):
    half = x["k"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("k", "v")}} for part in (slice(half), slice(half, None)))
    carried = run(one, causal=False, returns=CARRIED)
    return run(x, causal=False), run({**two, **{f"initial_{name}": x for name, x in zip(CARRIED, carried, strict=True)}}, causal=False)


def polynomial_of_scores(run, x):
    scores = run({name: x[name] for name in ("q", "k", "v")}, name="softmax", causal=True, returns="scores")
    seen = scores > -np.inf
    scores = np.where(seen, scores, 0.0)
    weights = seen * (1.0 + scores + scores * scores / 2.0)
    values = np.repeat(x["v"], x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run(x, eps=0.5, causal=True), weights @ values / (np.sum(weights, axis=-1, keepdims=True) + 0.5)


def ones_give_one(run, x):
    return run({**x, "v": np.ones_like(x["v"])}, eps=0.0, causal=False), 1.0


def no_queries_give_the_mean(run, x):
    mean = np.repeat(np.mean(x["v"], axis=2, keepdims=True), x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run({**x, "q": 0.0 * x["q"]}, eps=0.0, causal=False), mean


VARIANT = Variant(
    name="based",
    family="feature",
    summary="Based: linear attention by the second-order Taylor polynomial of softmax's exponential.",
    equation="out_i = sum_j (1 + s_ij + s_ij^2/2) v_j / (sum_j (1 + s_ij + s_ij^2/2) + eps), s_ij = scale q_i . k_j",
    paper=Paper(
        title="Simple linear attention language models balance the recall-throughput tradeoff",
        authors=(
            "Arora, Simran",
            "Eyuboglu, Sabri",
            "Zhang, Michael",
            "Timalsina, Aman",
            "Alberti, Silas",
            "Zinsley, Dylan",
            "Zou, James",
            "Rudra, Atri",
            "Ré, Christopher",
        ),
        year=2024,
        arxiv="2402.18668",
        where="section 4",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("initial_state_0", "B Hkv E", "sum of earlier values", absent=0.0),
        Operand("initial_state_1", "B Hkv D E", "sum of earlier keys times values", absent=0.0),
        Operand("initial_state_2", "B Hkv D D E", "sum of products of earlier keys times values", absent=0.0),
        Operand("initial_mass_0", "B Hkv", "number of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(4.0, 5.0, shape)),
        Operand("initial_mass_1", "B Hkv D", "sum of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(-0.1, 0.1, shape)),
        Operand("initial_mass_2", "B Hkv D D", "sum of products of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(0.9, 1.1, shape)),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state_0", "B Hkv E", "sum of values, after the last key", wide=True),
        Output("state_1", "B Hkv D E", "sum of scaled keys times values", wide=True),
        Output("state_2", "B Hkv D D E", "sum of products of scaled keys times values, over sqrt(2)", wide=True),
        Output("mass_0", "B Hkv", "number of keys", wide=True),
        Output("mass_1", "B Hkv D", "sum of scaled keys", wide=True),
        Output("mass_2", "B Hkv D D", "sum of products of scaled keys, over sqrt(2)", wide=True),
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
        Param("eps", Number(at_least=0.0), 1e-6, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), True, "see no later position; the last query is aligned with the last key", tries=(False,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="2 + B*(Hkv*S*(1 + E + D*(2 + 2*E) + D*D*(3 + 2*E)) + Hq*T*(1 + E + D*(3 + 2*E) + D*D*(4 + 2*E)))",
        memory="B*(Hq*T*E + Hkv*(1 + D + D*D)*(E + 1)) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0], [2.0]]]], "k": [[[[2.0], [-1.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 0.0},
            returns={"out": [[[[4.0], [60.0 / 14.0]]]], "state_0": [[[12.0]]], "state_1": [[[[0.0]]]], "mass_0": [[2.0]], "mass_1": [[[1.0]]]},
            source="by hand: scores 4 and -2, so weights 1 + 4 + 8 = 13 and 1 - 2 + 2 = 1",
        ),
        Example(
            operands={"q": [[[[0.0, 0.0]]]], "k": [[[[3.0, 1.0], [5.0, 2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"causal": False, "eps": 1.0},
            returns={"out": [[[[4.0]]]]},
            source="by hand: scores 0, weights 1 and 1",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("it is attention weighted by the polynomial of softmax's scores", polynomial_of_scores),
        Identity("values all one give one", ones_give_one),
        Identity("queries of zero give the mean of the values", no_queries_give_the_mean),
    ),
)
