"""cosFormer: rectified queries and keys, weighted by the cosine of the distance of their positions.

    s_ij  = (max(q_i, 0) . max(k_j, 0)) cos(pi/2 (i - j) / M),   positions counted from 1
    out_i = sum_(j visible) s_ij v_j / max(sum_(j visible) s_ij, eps)

The cosine of a difference is a sum of two products, so that there are features of twice the width:

    phi(x, i) = [max(x, 0) cos(pi/2 i / M), max(x, 0) sin(pi/2 i / M)],   s_ij = phi(q_i, i) . phi(k_j, j)
    out_i = phi(q_i, i)^T Z_i / max(phi(q_i, i) . z_i, eps),   Z_i = sum_(j visible) phi(k_j, j) v_j^T,   z_i = sum_(j visible) phi(k_j, j)

M is ``length``, the longer of both sequences if None.  ``causal=True`` puts query i at key ``i + S - T`` and gives it that key's position; otherwise
every query sees every key and queries count their own positions from 1, as the published code does.  Query head h reads state head
``h // (Hq // Hkv)``.  Z, z and the number of keys so far start at ``initial_state``, ``initial_mass`` and ``initial_position`` (0 if absent) and are
returned after the last key, so that a sequence can be cut anywhere and carried on, if ``length`` is given.

What people get wrong: M is the length of the whole sequence, so that a token's features change with the number of tokens to come: the
published causal mode cannot decode token by token unless M is fixed before.  The denominator is clamped, not added to.  The published code
puts the sines first, which shows in a state that is handed over.

Checked against a composition of PyTorch's relu, cos and matmul in the quadratic form.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import cosine_reweight
from refattn.spec import Choice, Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, initial_state, initial_mass, initial_position, length, eps, causal):
    batch, heads, n_q, d = q.shape
    kv_heads, n_k, d_v = v.shape[1], v.shape[2], v.shape[3]

    group = heads // kv_heads
    quarter = 1.5707963267948966  # of a turn, pi / 2
    out = np.zeros((batch, heads, n_q, d_v))
    state = np.zeros((batch, kv_heads, 2 * d, d_v))
    mass = np.zeros((batch, kv_heads, 2 * d))
    phi = np.zeros(2 * d)
    position = np.zeros(batch)
    for b in range(batch):
        position[b] = initial_position[b] + n_k
        first = initial_position[b] + n_k - n_q if causal == 1 else 0.0
        for g in range(kv_heads):
            for f in range(2 * d):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            written = 0
            for i in range(n_q + 1):
                visible = i + n_k - n_q + 1 if causal == 1 and i < n_q else n_k
                for j in range(written, visible):
                    angle = quarter * (initial_position[b] + j + 1) / length
                    cos, sin = math.cos(angle), math.sin(angle)
                    for x in range(d):
                        phi[x] = max(k[b, g, j, x], 0.0) * cos
                        phi[d + x] = max(k[b, g, j, x], 0.0) * sin
                    for f in range(2 * d):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    angle = quarter * (first + i + 1) / length
                    cos, sin = math.cos(angle), math.sin(angle)
                    for x in range(d):
                        phi[x] = max(q[b, h, i, x], 0.0) * cos
                        phi[d + x] = max(q[b, h, i, x], 0.0) * sin
                    total = 0.0
                    for f in range(2 * d):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, i, y] += phi[f] * state[b, g, f, y]
                    total = max(total, eps)
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, i, y] /= total
    return out, state, mass, position


def reduction(dims, params):
    """Linear attention with a clamped denominator, of the features phi."""
    n_q, n_k = dims["T"], dims["S"]
    length = params["length"] or longest(dims)

    def phi(a, first):
        return cosine_reweight.features(a, first[:, None, None] + np.arange(1, a.shape[2] + 1), length)

    def operands(x):
        first = x["initial_position"]
        aligned = first + (n_k - n_q) if params["causal"] else 0.0 * first
        carried = {name: x[name] for name in ("initial_state", "initial_mass")}
        return {"q": phi(x["q"], aligned), "k": phi(x["k"], first), "v": x["v"], **carried}

    def outputs(x, found):
        return {**found, "position": x["initial_position"] + n_k}

    return Reduction(
        Recurrence((Write(("k",), ("v",)),), normalizer="clamp", eps=params["eps"], causal=params["causal"]),
        {
            "q": "B Hq T D+D",
            "k": "B Hkv S D+D",
            "v": "B Hkv S E",
            "initial_state": "B Hkv D+D E",
            "initial_mass": "B Hkv D+D",
            "out": "B Hq T E",
        },
        operands,
        outputs,
    )


def longest(dims):
    return float(max(dims["T"], dims["S"], 1))


def cut_and_carried_on(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    first = max(n // 2, n - keys)  # queries of the first part; in both parts the last query stands at the last key
    one = {**x, "q": x["q"][:, :, :first], **{name: x[name][:, :, : first + keys - n] for name in ("k", "v")}}
    two = {**x, "q": x["q"][:, :, first:], **{name: x[name][:, :, first + keys - n :] for name in ("k", "v")}}
    results = {"causal": True, "length": 9.0, "returns": ("out", "state", "mass", "position")}
    out_1, state, mass, position = run(one, **results)
    carried = {"initial_state": state, "initial_mass": mass, "initial_position": position}
    out_2, state, mass, position = run({**two, **carried}, **results)
    return run(x, **results), (np.concatenate([out_1, out_2], axis=2), state, mass, position)


def reweighted(run, x):
    n, keys = x["q"].shape[2], x["k"].shape[2]
    k, v = (np.repeat(x[name], x["q"].shape[1] // x["k"].shape[1], axis=1) for name in ("k", "v"))
    distance = np.arange(n)[:, None] - np.arange(keys)
    weights = np.maximum(x["q"], 0.0) @ np.swapaxes(np.maximum(k, 0.0), -1, -2) * np.cos(np.pi / 2.0 * distance / max(n, keys))
    return run(x, eps=0.5, causal=False), weights @ v / np.maximum(np.sum(weights, axis=-1, keepdims=True), 0.5)


def only_distances_count(run, x):
    later = {**x, "initial_position": np.full(x["q"].shape[0], 5.0)}
    return run(x, causal=True, eps=0.5), run(later, causal=True, eps=0.5)


def lengths_of_queries_cancel(run, x):
    return run(x, eps=0.0), run({**x, "q": 3.0 * x["q"]}, eps=0.0)


VARIANT = Variant(
    name="cosformer",
    family="feature",
    summary="cosFormer: rectified queries and keys, weighted by the cosine of the distance of their positions.",
    equation="out_i = sum_j s_ij v_j / max(sum_j s_ij, eps), s_ij = max(q_i, 0) . max(k_j, 0) cos(pi/2 (i - j) / M)",
    paper=Paper(
        title="cosFormer: Rethinking Softmax in Attention",
        authors=(
            "Qin, Zhen",
            "Sun, Weixuan",
            "Deng, Hui",
            "Li, Dongxu",
            "Wei, Yunshen",
            "Lv, Baohong",
            "Yan, Junjie",
            "Kong, Lingpeng",
            "Zhong, Yiran",
        ),
        year=2022,
        arxiv="2202.08791",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv S D", "keys"),
        Operand("v", "B Hkv S E", "values"),
        Operand("initial_state", "B Hkv D+D E", "sum of features times values of earlier keys", absent=0.0),
        Operand(
            "initial_mass",
            "B Hkv D+D",
            "sum of features of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape),
        ),
        Operand(
            "initial_position",
            "B",
            "number of earlier keys",
            absent=0.0,
            draw=lambda rng, shape: rng.integers(0, 3, shape).astype(float),
        ),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D+D E", "sum of features times values, after the last key", wide=True),
        Output("mass", "B Hkv D+D", "sum of features, after the last key", wide=True),
        Output("position", "B", "number of keys so far", wide=True),
    ),
    params=(
        Param("length", Number(above=0.0, optional=True), None, "M; None is the larger of T and S", absent=longest, tries=(20.0,)),
        Param("eps", Number(at_least=0.0), 1e-6, "least value of the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*(1 + 2*causal + Hkv*S*(6 + D*(4*E + 4)) + Hq*T*(6 + D*(4*E + 6) + E))",
        memory="B*(Hq*T*E + 2*Hkv*D*(E + 1) + 1) + 2*D",
    ),
    ordered=lambda params: "T S",
    causal={"causal": True, "length": 7.0},
    examples=(
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[2.0], [-1.0], [3.0]]]], "v": [[[[4.0], [8.0], [16.0]]]]},
            params={"length": 3.0},
            returns={"out": [[[[32.0 / 3.5]]]]},
            source="by hand: cosines 1 and cos(60 degrees) = 1/2 at the first and the third key, weights 2 and 3/2",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[2.0], [3.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"length": 1.5, "causal": True, "eps": 8.0},
            returns={"out": [[[[1.0], [28.0 / 8.0]]]], "position": [2.0]},
            source="by hand: weights 2, and 2 * 1/2 and 3; both sums are below eps",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("it is attention by rectified scores times the cosine of the distance", reweighted),
        Identity("where it begins to count does not matter", only_distances_count),
        Identity("without eps the lengths of queries cancel", lengths_of_queries_cancel),
    ),
)
