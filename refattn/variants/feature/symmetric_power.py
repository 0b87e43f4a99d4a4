"""Power attention of degree two: weights that are squares of products, with a gate, by a state of products of channels.

    s_ij  = scale * q_i . k_j,   G_i = gate_0 + ... + gate_i
    out_i = sum_(j <= i) exp(G_i - G_j) s_ij^2 v_j / (sum_(j <= i) exp(G_i - G_j) s_ij^2 + eps)

The features are all products of two channels, D^2 of them, whose sums over keys are carried:

    Z_t = exp(gate_t) Z_(t-1) + k'_t (x) k'_t (x) v_t,   z_t = exp(gate_t) z_(t-1) + k'_t (x) k'_t,   x' = sqrt(scale) x
    out_t = sum_ab q'_ta q'_tb Z_tab / (sum_ab q'_ta q'_tb z_tab + eps)

Always causal; ``gate`` is the natural logarithm of a factor (0 if absent; -inf forgets all), per key-value head.  Query head h reads state head
``h // (Hq // Hkv)``.  Z and z start at ``initial_state`` and ``initial_mass`` (0 if absent) and are returned after the last token, so that a
sequence can be cut anywhere and carried on.  Where the denominator is 0, so is the output.

The paper has any even degree p; this is p = 2, for which Z is D x D x E.  p must be even for the weights to be no less than 0.

What people get wrong: k_a k_b and k_b k_a are the same number; the paper's symmetric power keeps one of them, times sqrt(2), D (D + 1) / 2 in
all, so that its state differs while the output does not.  The scale, 1 here, squared by the kernel, cancels but for eps.  A token's own gate
fades the past, not the token.

Checked against the closed-form weights by PyTorch's matmul, and against flash-linear-attention's ReBased reference.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import power
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, initial_state, initial_mass, scale, eps):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    root = math.sqrt(scale)
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d, d_v))
    mass = np.zeros((batch, kv_heads, d, d))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for z in range(d):
                    mass[b, g, x, z] = initial_mass[b, g, x, z]
                    for y in range(d_v):
                        state[b, g, x, z, y] = initial_state[b, g, x, z, y]
            for t in range(n):
                kept = math.exp(gate[b, g, t])
                for x in range(d):
                    for z in range(d):
                        product = root * k[b, g, t, x] * root * k[b, g, t, z]
                        mass[b, g, x, z] = kept * mass[b, g, x, z] + product
                        for y in range(d_v):
                            state[b, g, x, z, y] = kept * state[b, g, x, z, y] + product * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    total = eps
                    for x in range(d):
                        for z in range(d):
                            product = root * q[b, h, t, x] * root * q[b, h, t, z]
                            total += product * mass[b, g, x, z]
                            for y in range(d_v):
                                out[b, h, t, y] += product * state[b, g, x, z, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, t, y] /= total
    return out, state, mass


def recurrence(dims, params):
    numbers = (2, params["scale"])
    return Recurrence(
        writes=(Write(key=(Factor("k", power, numbers),), value=("v",)),),
        query=(Factor("q", power, numbers),),
        log_decay=("gate",),
        normalizer="sum",
        eps=params["eps"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("q", "k", "v")}} for part in (slice(half), slice(half, None)))
    gates = np.linspace(-2.0, 0.0, x["v"].shape[0] * x["v"].shape[1] * x["v"].shape[2]).reshape(x["v"].shape[:3])
    everything = ("out", "state", "mass")
    out_1, state, mass = run({**one, "gate": gates[:, :, :half]}, returns=everything)
    carried = {"gate": gates[:, :, half:], "initial_state": state, "initial_mass": mass}
    out_2, state, mass = run({**two, **carried}, returns=everything)
    return run({**x, "gate": gates}, returns=everything), (np.concatenate([out_1, out_2], axis=2), state, mass)


def squares_of_scores(run, x):
    scores = run(x, name="softmax", causal=True, scale=1.0, returns="scores")
    weights = np.where(scores > -np.inf, scores * scores, 0.0)
    values = np.repeat(x["v"], x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run(x, eps=0.5), weights @ values / (np.sum(weights, axis=-1, keepdims=True) + 0.5)


def forgets_all(run, x):
    own = np.repeat(x["v"], x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run({**x, "gate": np.full(x["v"].shape[:3], -np.inf)}), own


def lengths_cancel(run, x):
    return run(x), run({**x, "q": 3.0 * x["q"]}, scale=0.5)


VARIANT = Variant(
    name="symmetric_power",
    family="feature",
    summary="Power attention of degree two: linear attention weighted by squared products, with a gate.",
    equation="out_i = sum_(j<=i) exp(G_i - G_j) (q_i . k_j)^2 v_j / sum_(j<=i) exp(G_i - G_j) (q_i . k_j)^2",
    paper=Paper(
        title="Scaling Context Requires Rethinking Attention",
        authors=("Gelada, Carles", "Buckman, Jacob", "Zhang, Sean", "Bach, Txus"),
        year=2025,
        arxiv="2507.04239",
        where="section 3",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate", "B Hkv T", "logarithm of the factor by which the past fades", absent=0.0, draw=lambda rng, shape: -rng.exponential(0.5, shape)
        ),
        Operand("initial_state", "B Hkv D D E", "sum of products of earlier keys times values", absent=0.0),
        Operand("initial_mass", "B Hkv D D", "sum of products of earlier keys", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv D D E", "sum of products of keys' channels times values, after the last key", wide=True),
        Output("mass", "B Hkv D D", "sum of products of keys' channels, after the last key", wide=True),
    ),
    params=(
        Param("scale", Number(above=0.0), 1.0, "multiplies q . k", tries=(0.37,)),
        Param("eps", Number(at_least=0.0), 0.0, "added to the denominator", tries=(0.5,)),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="1 + B*T*(Hkv*(1 + D*D*(5 + 3*E)) + Hq*(D*D*(5 + 2*E) + E))",
        memory="B*(Hq*T*E + Hkv*D*D*(E + 1))",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 0.0], [1.0, 1.0]]]],
                "k": [[[[2.0, 0.0], [-1.0, 2.0]]]],
                "v": [[[[4.0], [8.0]]]],
                "gate": [[[0.0, math.log(0.5)]]],
            },
            params={"eps": 1.0},
            returns={"out": [[[[16.0 / 5.0], [16.0 / 4.0]]]], "mass": [[[[3.0, -2.0], [-2.0, 4.0]]]]},
            source="by hand: squares 4; then 4 faded to 2 and 1, of values 4 and 8",
        ),
        Example(
            operands={"q": [[[[1.0]]]], "k": [[[[2.0]]]], "v": [[[[6.0]]]], "initial_state": [[[[[8.0]]]]], "initial_mass": [[[[4.0]]]]},
            returns={"out": [[[[32.0 / 8.0]]]], "state": [[[[[32.0]]]]]},
            source="by hand: 8 + 4 * 6 over 4 + 4",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("without a gate it is causal attention weighted by squared scores", squares_of_scores),
        Identity("a gate of -inf forgets everything before the token", forgets_all),
        Identity("without eps neither scale nor length of a query counts", lengths_cancel),
    ),
)
