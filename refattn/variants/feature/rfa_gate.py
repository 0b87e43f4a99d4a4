"""RFA-Gate: random feature attention whose past fades by a gate, which also weighs the new token.

    phi(x) = [sin(w_1 . u) .. sin(w_m . u), cos(w_1 . u) .. cos(w_m . u)] / sqrt(m),   u = sigma x / |x|
    S_t = g_t S_(t-1) + (1 - g_t) phi(k_t) v_t^T,   z_t = g_t z_(t-1) + (1 - g_t) phi(k_t)
    out_t = phi(q_t)^T S_t / (phi(q_t) . z_t)

Always causal.  ``gate`` is the natural logarithm of g, per key-value head; the paper's g is sigmoid(w . x_t + b) of the token.  1 - g is
computed from it without cancellation.  Query head h reads state head ``h // (Hq // Hkv)``.  S and z start at ``initial_state`` and
``initial_mass`` (0 if absent) and are returned after the last token, so that a sequence can be cut anywhere and carried on.  Where the
denominator is 0, so is the output.

What people get wrong: with g = 1 nothing is written, so that `rfa`, which sums, is no limit of this; the output does not change when all 1 -
g_t are multiplied by the same number.  The gate fades the denominator too.

Checked against a composition of PyTorch's normalize, sin, cos and a cumulative product of gates in the quadratic form.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import rfa
from refattn.pieces.maps import one_minus_exp
from refattn.spec import Cost, Example, Factor, Identity, Operand, Output, Paper, Recurrence, Variant, Write


def define(q, k, v, gate, w, sigma, initial_state, initial_mass):
    batch, heads, n, d = q.shape
    kv_heads, d_v, m = v.shape[1], v.shape[3], w.shape[0]
    group = heads // kv_heads
    root_m = math.sqrt(m)
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, 2 * m, d_v))
    mass = np.zeros((batch, kv_heads, 2 * m))
    phi = np.zeros(2 * m)
    stretched = np.zeros(d)
    for b in range(batch):
        for g in range(kv_heads):
            for f in range(2 * m):
                mass[b, g, f] = initial_mass[b, g, f]
                for y in range(d_v):
                    state[b, g, f, y] = initial_state[b, g, f, y]
            for t in range(n):
                square = 0.0
                for x in range(d):
                    square += k[b, g, t, x] * k[b, g, t, x]
                length = math.sqrt(square)
                if length == 0.0:  # no direction
                    length = np.inf
                for x in range(d):
                    stretched[x] = sigma[x] * k[b, g, t, x] / length
                for f in range(m):
                    angle = 0.0
                    for x in range(d):
                        angle += w[f, x] * stretched[x]
                    phi[f] = math.sin(angle) / root_m
                    phi[m + f] = math.cos(angle) / root_m
                kept, let_in = math.exp(gate[b, g, t]), -math.expm1(gate[b, g, t])
                for f in range(2 * m):
                    mass[b, g, f] = kept * mass[b, g, f] + let_in * phi[f]
                    for y in range(d_v):
                        state[b, g, f, y] = kept * state[b, g, f, y] + let_in * phi[f] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    square = 0.0
                    for x in range(d):
                        square += q[b, h, t, x] * q[b, h, t, x]
                    length = math.sqrt(square)
                    if length == 0.0:  # no direction
                        length = np.inf
                    for x in range(d):
                        stretched[x] = sigma[x] * q[b, h, t, x] / length
                    for f in range(m):
                        angle = 0.0
                        for x in range(d):
                            angle += w[f, x] * stretched[x]
                        phi[f] = math.sin(angle) / root_m
                        phi[m + f] = math.cos(angle) / root_m
                    total = 0.0
                    for f in range(2 * m):
                        total += phi[f] * mass[b, g, f]
                        for y in range(d_v):
                            out[b, h, t, y] += phi[f] * state[b, g, f, y]
                    if total == 0.0:  # nothing to weigh: 0
                        total = np.inf
                    for y in range(d_v):
                        out[b, h, t, y] /= total
    return out, state, mass


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=(Factor("k", rfa, (), ("w", "sigma")), Factor("gate", one_minus_exp)), value=("v",)),),
        query=(Factor("q", rfa, (), ("w", "sigma")),),
        log_decay=("gate",),
        normalizer="sum",
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in ("q", "k", "v", "gate")}} for part in (slice(half), slice(half, None)))
    everything = ("out", "state", "mass")
    out_1, state, mass = run(one, returns=everything)
    out_2, state, mass = run({**two, "initial_state": state, "initial_mass": mass}, returns=everything)
    return run(x, returns=everything), (np.concatenate([out_1, out_2], axis=2), state, mass)


def forgets_all(run, x):
    own = np.repeat(x["v"], x["q"].shape[1] // x["k"].shape[1], axis=1)
    return run({**x, "gate": np.full(x["v"].shape[:3], -np.inf)}), own


def lengths_do_not_count(run, x):
    return run(x), run({**x, "q": 3.0 * x["q"], "k": 0.7 * x["k"]})


VARIANT = Variant(
    name="rfa_gate",
    family="feature",
    summary="RFA-Gate: random feature attention with a gate between past and token, frequencies given.",
    equation="S_t = g_t S_(t-1) + (1 - g_t) phi(k_t) v_t^T, z_t = g_t z_(t-1) + (1 - g_t) phi(k_t), out_t = phi(q_t)^T S_t / (phi(q_t) . z_t)",
    paper=Paper(
        title="Random Feature Attention",
        authors=(
            "Peng, Hao",
            "Pappas, Nikolaos",
            "Yogatama, Dani",
            "Schwartz, Roy",
            "Smith, Noah A.",
            "Kong, Lingpeng",
        ),
        year=2021,
        arxiv="2103.02143",
        where="section 3.1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("gate", "B Hkv T", "logarithm of the gate g", draw=lambda rng, shape: -rng.exponential(0.5, shape)),
        Operand("w", "F D", "random frequencies, one a row"),
        Operand("sigma", "D", "learned stretch of each channel", absent=1.0, draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
        Operand("initial_state", "B Hkv F+F E", "state before the first token", absent=0.0),
        Operand("initial_mass", "B Hkv F+F", "mass before the first token", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 1.5, shape)),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("state", "B Hkv F+F E", "state after the last token", wide=True),
        Output("mass", "B Hkv F+F", "mass after the last token", wide=True),
    ),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="1 + B*T*(Hkv*(3 + 4*D + F*(2*D + 8*E + 10)) + Hq*(1 + 4*D + F*(2*D + 4*E + 8) + E))",
        memory="B*(Hq*T*E + 2*Hkv*F*(E + 1)) + 2*F + D",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[3.0], [1.0]]]],
                "k": [[[[2.0], [-0.5]]]],
                "v": [[[[4.0], [8.0]]]],
                "gate": [[[math.log(0.5), math.log(0.5)]]],
                "w": [[math.pi / 6.0]],
            },
            returns={"out": [[[[4.0], [6.0]]]]},
            source="by hand: weights 1/4 and 1/2, times 1 and cos(60 degrees) = 1/2",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("a gate of 0 sees the token alone", forgets_all),
        Identity("the lengths of queries and keys do not count", lengths_do_not_count),
    ),
)
