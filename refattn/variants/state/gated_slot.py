"""Gated slot attention: softmax attention over slots that forget with every token and take in as much of it as they forget.

    K_t[z] = alpha_tz K_{t-1}[z] + (1 - alpha_tz) k_t,     V_t[z] = alpha_tz V_{t-1}[z] + (1 - alpha_tz) v_t,     alpha = exp(gate)
    out_t  = sum_z softmax_z(scale q_t . K_t[z]) V_t[z]

The paper calls it GSA, a name that global self-attention also has.  ``slot_keys`` and ``slot_values`` are K and V after the last token,
``initial_slot_keys`` and ``initial_slot_values`` those before the first (0 if absent).  A gate of 0 keeps a slot as it is, a gate of -inf
puts the token in its place.  Query head h reads the slots of head ``h // (Hq // Hkv)``.  ``scale`` is 1/sqrt(D) if None, as in
flash-linear-attention.

It is two gated linear attentions, of keys and of values, with a softmax between: the paper's way of computing it, the engine's, and an
identity here.

What people get wrong: 1 - exp(gate) of a gate near 0, which loses its digits; the write weight as an operand that need not be 1 - alpha
(flash-linear-attention's s, from which it makes attention with bounded-memory control where the gate is absent); slots empty at first,
which hold key and value 0 and take their share of the softmax.

Checked against flash-linear-attention's naive_recurrent_gsa: values, gradients, state.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import softmax_features
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, gate, initial_slot_keys, initial_slot_values, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v, slots = v.shape[1], v.shape[3], gate.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    slot_keys = np.zeros((batch, kv_heads, slots, d))
    slot_values = np.zeros((batch, kv_heads, slots, d_v))
    weight = np.zeros(slots)
    for b in range(batch):
        for g in range(kv_heads):
            for z in range(slots):
                for x in range(d):
                    slot_keys[b, g, z, x] = initial_slot_keys[b, g, z, x]
                for y in range(d_v):
                    slot_values[b, g, z, y] = initial_slot_values[b, g, z, y]
            for t in range(n):
                for z in range(slots):
                    old, new = math.exp(gate[b, g, t, z]), -math.expm1(gate[b, g, t, z])
                    for x in range(d):
                        slot_keys[b, g, z, x] = old * slot_keys[b, g, z, x] + new * k[b, g, t, x]
                    for y in range(d_v):
                        slot_values[b, g, z, y] = old * slot_values[b, g, z, y] + new * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    highest = -np.inf
                    for z in range(slots):
                        weight[z] = 0.0  # the score first
                        for x in range(d):
                            weight[z] += q[b, h, t, x] * slot_keys[b, g, z, x]
                        weight[z] *= scale
                        highest = highest if weight[z] <= highest else weight[z]  # NaN must win
                    total = 0.0
                    for z in range(slots):
                        weight[z] = math.exp(weight[z] - highest)
                        total += weight[z]
                    for z in range(slots):
                        weight[z] /= total
                        for y in range(d_v):
                            out[b, h, t, y] += weight[z] * slot_values[b, g, z, y]
    return out, slot_keys, slot_values


def reduction(dims, params):
    """Gated linear attention of keys, a column each slot, then of values, a row each slot; a softmax of the first's reads is the second's queries."""
    slots = "B Hkv T Z"

    def keys(x):
        slot_keys = np.swapaxes(x["initial_slot_keys"], -1, -2)
        return {"q": x["q"], "k": x["k"], "new": -np.expm1(x["gate"]), "gate": x["gate"], "initial_state": slot_keys}

    def scores(x, found):
        return {"scores": found["out"], "slot_keys": np.swapaxes(found["state"], -1, -2)}

    def values(x):
        return {"scores": x["scores"], "new": -np.expm1(x["gate"]), "v": x["v"], "gate": x["gate"], "initial_state": x["initial_slot_values"]}

    def outputs(x, found):
        return {"out": found["out"], "slot_keys": x["slot_keys"], "slot_values": found["state"]}

    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    return Reduction(
        Recurrence((Write(("k",), ("new",)),), log_value_decay=("gate",), scale=scale),
        {"q": "B Hq T D", "k": "B Hkv T D", "new": slots, "gate": slots, "initial_state": "B Hkv D Z", "out": "B Hq T Z"},
        keys,
        scores,
        Reduction(
            Recurrence((Write(("new",), ("v",)),), query=(Factor("scores", softmax_features),), log_decay=("gate",)),
            {"scores": "B Hq T Z", "new": slots, "v": "B Hkv T E", "gate": slots, "initial_state": "B Hkv Z E", "out": "B Hq T E"},
            values,
            outputs,
        ),
    )


CARRIED = ("slot_keys", "slot_values")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    names = ("q", "k", "v", "gate")
    one = {**x, **{name: x[name][:, :, :half] for name in names}}
    two = {**x, **{name: x[name][:, :, half:] for name in names}}
    out_1, *carried = run(one, returns=("out", *CARRIED))
    out_2, *carried = run({**two, **{"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}}, returns=("out", *CARRIED))
    return run(x, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)


def two_gated_linear_attentions(run, x):
    batch, kv_heads, n, slots = x["gate"].shape
    group = x["q"].shape[1] // kv_heads
    new = -np.expm1(x["gate"])
    each = np.broadcast_to(np.tile(np.eye(slots), (kv_heads, 1))[None, :, None], (batch, kv_heads * slots, n, slots))  # a query per slot
    keys = run({"q": each, "k": new, "v": x["k"], "gate": x["gate"]}, name="gla", scale=1.0, returns="out")
    keys = np.repeat(keys.reshape(batch, kv_heads, slots, n, -1), group, axis=1)
    scores = np.einsum("bhtd,bhztd->bhtz", x["q"], keys) * x["q"].shape[3] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return run(x), run({"q": weights, "k": new, "v": x["v"], "gate": x["gate"]}, name="gla", scale=1.0, returns="out")


def slots_alike_are_one_average(run, x):
    """Slots of one gate hold the same, and the softmax over them changes nothing: retention of (1 - alpha) v."""
    kv_heads = x["gate"].shape[1]
    decay = np.linspace(0.3, 0.9, kv_heads)
    gate = np.log(decay)[:, None, None] + 0.0 * x["gate"]
    ones = np.ones_like(x["q"][..., :1])
    average = run(
        {"q": ones, "k": ones[:, :kv_heads], "v": (1.0 - decay[:, None, None]) * x["v"], "decay": decay}, name="retention", scale=1.0, returns="out"
    )
    return run({**x, "gate": gate}), average


def forgetting_everything_returns_the_value(run, x):
    return run({**x, "gate": np.full_like(x["gate"], -np.inf)}), np.repeat(x["v"], x["q"].shape[1] // x["v"].shape[1], axis=1)


def a_closed_gate_writes_nothing(run, x):
    return run({**x, "gate": 0.0 * x["gate"]}), 0.0


VARIANT = Variant(
    name="gated_slot",
    family="state",
    summary="Gated slot attention (GSA): softmax over slots that forget and take in with complementary gates.",
    equation="out_t = sum_z softmax_z(scale q_t . K_t[z]) V_t[z], K_t[z] = alpha_tz K_(t-1)[z] + (1 - alpha_tz) k_t, V_t alike",
    paper=Paper(
        title="Gated Slot Attention for Efficient Linear-Time Sequence Modeling",
        authors=(
            "Zhang, Yu",
            "Yang, Songlin",
            "Zhu, Ruijie",
            "Zhang, Yue",
            "Cui, Leyang",
            "Wang, Yiqiao",
            "Wang, Bolun",
            "Shi, Freda",
            "Wang, Bailin",
            "Bi, Wei",
            "Zhou, Peng",
            "Fu, Guohong",
        ),
        year=2024,
        arxiv="2409.07146",
        where="section 3.1",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T Z",
            "natural logarithm of alpha, what a slot keeps of itself",
            draw=lambda rng, shape: -np.log1p(np.exp(-2.0 * rng.standard_normal(shape))),
        ),
        Operand("initial_slot_keys", "B Hkv Z D", "keys of the slots before the first token", absent=0.0),
        Operand("initial_slot_values", "B Hkv Z E", "values of the slots before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("slot_keys", "B Hkv Z D", "keys of the slots after the last token", wide=True),
        Output("slot_values", "B Hkv Z E", "values of the slots after the last token", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . K; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*Z*(Hkv*(2 + 3*D + 3*E) + Hq*(2*D + 5 + 2*E))",
        memory="B*(Hq*T*E + Hkv*Z*(D + E)) + Z",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[0.0], [4.0 * math.log(3.0)]]]],
                "v": [[[[4.0], [8.0]]]],
                "gate": [[[[-math.inf, -math.inf], [math.log(0.75), math.log(0.5)]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[4.0], [5.0 * 0.25 + 6.0 * 0.75]]]], "slot_values": [[[[5.0], [6.0]]]]},
            source="by hand: the first token fills both slots; then keys log 3 and 2 log 3, so weights 1/4 and 3/4, values 3 + 2 and 2 + 4",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its slots", cut_and_carried_on),
        Identity("it is two gated linear attentions around a softmax", two_gated_linear_attentions),
        Identity("slots of one constant gate give a fading mean of the values", slots_alike_are_one_average),
        Identity("slots that forget everything return the value of the token", forgetting_everything_returns_the_value),
        Identity("gates of 0 write nothing", a_closed_gate_writes_nothing),
    ),
)
