"""Focused linear attention, of FLatten Transformer: features turned towards their largest channels.

    phi(x) = |r| / |r^p| r^p,   r = max(x, 0),   powers number by number
    out_i = phi(q_i)^T Z_i / (phi(q_i) . z_i + eps),   Z_i = sum_(j visible) phi(k_j) v_j^T,   z_i = sum_(j visible) phi(k_j)

p is ``focus``.  The paper sees all keys (``causal=False``).  Its layer adds a depthwise convolution of the values to the output, which restores the
rank of the attention matrix; that is not here.

Query head h reads state head ``h // (Hq // Hkv)``.  ``causal=True`` puts query i at key ``i + S - T``; otherwise every query sees every key.
Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last key as ``state`` and ``mass``, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

What people get wrong: the lengths are over the channels of one head, not of all heads; the published code, which works before the heads are
split, has those of all, divides by a learned positive scale per channel before the power, and adds 1e-6 to r.

Checked against a composition of PyTorch's relu, pow, norm and matmul.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import focused
from refattn.spec import Choice, Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, initial_state, initial_mass, focus, eps, causal):
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
                    square, sharp = 0.0, 0.0
                    for x in range(d):
                        rectified = max(k[b, g, j, x], 0.0)
                        phi[x] = rectified**focus
                        square += rectified * rectified
                        sharp += phi[x] * phi[x]
                    if sharp == 0.0:  # the zero vector stays
                        sharp = 1.0
                    ratio = math.sqrt(square) / math.sqrt(sharp)
                    for x in range(d):
                        phi[x] *= ratio
                    for f in range(d):
                        mass[b, g, f] += phi[f]
                        for y in range(d_v):
                            state[b, g, f, y] += phi[f] * v[b, g, j, y]
                written = max(written, visible)
                if i == n_q:  # no query is left: that turn was for keys that no query saw
                    break
                for h in range(g * group, (g + 1) * group):
                    square, sharp = 0.0, 0.0
                    for x in range(d):
                        rectified = max(q[b, h, i, x], 0.0)
                        phi[x] = rectified**focus
                        square += rectified * rectified
                        sharp += phi[x] * phi[x]
                    if sharp == 0.0:  # the zero vector stays
                        sharp = 1.0
                    ratio = math.sqrt(square) / math.sqrt(sharp)
                    for x in range(d):
                        phi[x] *= ratio
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
        writes=(Write(key=(Factor("k", focused, (params["focus"],)),), value=("v",)),),
        query=(Factor("q", focused, (params["focus"],)),),
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


def unfocused_is_relu(run, x):
    return run(x, focus=1.0, eps=0.5), run(x, name="relu_linear", eps=0.5, returns="out")


def lengths_of_queries_cancel(run, x):
    return run(x, eps=0.0), run({**x, "q": 3.0 * x["q"]}, eps=0.0)


VARIANT = Variant(
    name="focused_linear",
    family="feature",
    summary="Focused linear attention (FLatten): features turned towards their largest channels by a power.",
    equation="out_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps), phi(x) = |r|/|r^p| r^p, r = max(x, 0)",
    paper=Paper(
        title="FLatten Transformer: Vision Transformer using Focused Linear Attention",
        authors=("Han, Dongchen", "Pan, Xuran", "Han, Yizeng", "Song, Shiji", "Huang, Gao"),
        year=2023,
        arxiv="2308.00442",
        where="section 4",
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
        Param("focus", Number(above=0.0), 3.0, "p, the power", tries=(1.5,)),
        Param("eps", Number(at_least=0.0), 1e-6, "added to the denominator", tries=(0.5,)),
        Param("causal", Choice((False, True)), False, "see no later position; the last query is aligned with the last key", tries=(True,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*(Hkv*S*(D*(2*E + 7) + 3) + Hq*T*(D*(2*E + 8) + E + 3))",
        memory="B*(Hq*T*E + Hkv*D*(E + 1)) + D",
    ),
    ordered=lambda params: "T S" if params["causal"] else "",
    causal={"causal": True},
    examples=(
        Example(
            operands={"q": [[[[1.0, 0.0]]]], "k": [[[[2.0, 2.0], [3.0, 0.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"eps": 0.0},
            returns={"out": [[[[32.0 / 5.0]]]], "mass": [[[5.0, 2.0]]]},
            source="by hand: vectors along the diagonal and along an axis stay, weights 2 and 3",
        ),
        Example(
            operands={"q": [[[[1.0, 0.0]]]], "k": [[[[0.0, 5.0], [1.0, 2.0]]]], "v": [[[[4.0], [8.0]]]]},
            params={"focus": 2.0, "eps": math.sqrt(5.0 / 17.0)},
            returns={"out": [[[[4.0]]]]},
            source="by hand: (1, 2) becomes sqrt(5/17) (1, 4), so weights 0 and sqrt(5/17)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("keys can be taken in in two parts", keys_in_two_parts),
        Identity("with p = 1 it is ReLU linear attention", unfocused_is_relu),
        Identity("without eps the lengths of queries cancel", lengths_of_queries_cancel),
    ),
)
