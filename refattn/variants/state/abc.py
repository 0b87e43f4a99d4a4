"""ABC: attention over a fixed number of slots, each a mean of all keys and values so far under weights of its own.

    K_t[z] = sum_{j <= t} exp(write_jz) k_j / sum_{j <= t} exp(write_jz),     V_t[z] the same of values
    out_t  = sum_z softmax_z(scale q_t . K_t[z]) V_t[z]

``write`` is the logarithm of a token's weight in each slot (the paper's W_phi x, before its exp).  The sums are carried relative to a
running maximum, so that no weight overflows: ``slot_keys``, ``slot_values``, ``mass`` and ``max`` are exp(-max) times the sums of weighted
keys, weighted values and weights, and the logarithm they are relative to, after the last token.  They are carried together; sums whose
``initial_max`` is -inf count for nothing.  A weight of -inf writes nothing; a slot into which nothing was written holds key and value 0,
and takes part in the softmax.

Query head h reads the slots of head ``h // (Hq // Hkv)``.  ``scale`` is 1/sqrt(D) if None.

What people get wrong: weights that are not divided by their sum; exponentials of uncentred logits; carrying on the normalised slots without
their mass, as flash-linear-attention's naive function does, whose normaliser starts afresh at a cut.

Checked against flash-linear-attention: naive_recurrent_abc (a cumulative logarithm of sums) and naive_cumsum_abc; values and gradients.
"""

import math

import numpy as np

from refattn.pieces.feature_maps import softmax_features
from refattn.spec import Cost, Example, Factor, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, write, initial_slot_keys, initial_slot_values, initial_mass, initial_max, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v, slots = v.shape[1], v.shape[3], write.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    slot_keys = np.zeros((batch, kv_heads, slots, d))
    slot_values = np.zeros((batch, kv_heads, slots, d_v))
    mass = np.zeros((batch, kv_heads, slots))
    top = np.zeros((batch, kv_heads, slots))
    weight = np.zeros(slots)
    for b in range(batch):
        for g in range(kv_heads):
            for z in range(slots):
                mass[b, g, z], top[b, g, z] = initial_mass[b, g, z], initial_max[b, g, z]
                for x in range(d):
                    slot_keys[b, g, z, x] = initial_slot_keys[b, g, z, x]
                for y in range(d_v):
                    slot_values[b, g, z, y] = initial_slot_values[b, g, z, y]
            for t in range(n):
                for z in range(slots):
                    high = top[b, g, z] if write[b, g, t, z] <= top[b, g, z] else write[b, g, t, z]  # NaN must win
                    old = new = 0.0
                    if high != -np.inf:
                        old, new = math.exp(top[b, g, z] - high), math.exp(write[b, g, t, z] - high)
                    top[b, g, z] = high
                    mass[b, g, z] = old * mass[b, g, z] + new
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
                        weight[z] /= mass[b, g, z] if mass[b, g, z] != 0.0 else 1.0
                        highest = highest if weight[z] <= highest else weight[z]
                    total = 0.0
                    for z in range(slots):
                        weight[z] = math.exp(weight[z] - highest)
                        total += weight[z]
                    for z in range(slots):
                        weight[z] /= total
                        weight[z] /= mass[b, g, z] if mass[b, g, z] != 0.0 else 1.0
                        for y in range(d_v):
                            out[b, h, t, y] += weight[z] * slot_values[b, g, z, y]
    return out, slot_keys, slot_values, mass, top


def reduction(dims, params):
    """What has been written to each slot, then gated linear attention of keys, a column each slot, then of values, a row each slot."""
    slots = "B Hkv T Z"

    def relative(x):
        """Weights and gates relative to the running maximum, and the last maximum."""
        m = np.maximum.accumulate(np.concatenate([x["initial_max"][:, :, None], x["write"]], axis=2), axis=2)
        before, after = m[:, :, :-1], np.where(m[:, :, 1:] == -np.inf, 0.0, m[:, :, 1:])
        return np.exp(x["write"] - after), before - after, m[:, :, -1]

    def weights(x):
        new, gate, _ = relative(x)
        return {"new": new, "gate": gate, "initial_state": x["initial_mass"]}

    def masses(x, found):
        new, gate, top = relative(x)
        return {"new": new, "gate": gate, "share": 1.0 / np.where(found["out"] == 0.0, 1.0, found["out"]), "mass": found["state"], "max": top}

    def keys(x):
        return {**{name: x[name] for name in ("q", "k", "new", "gate")}, "initial_state": np.swapaxes(x["initial_slot_keys"], -1, -2)}

    def scores(x, found):
        share = np.repeat(x["share"], dims["Hq"] // dims["Hkv"], axis=1)
        return {"scores": found["out"] * share, "slot_keys": np.swapaxes(found["state"], -1, -2)}

    def values(x):
        return {**{name: x[name] for name in ("scores", "share", "new", "gate", "v")}, "initial_state": x["initial_slot_values"]}

    def outputs(x, found):
        return {"out": found["out"], "slot_values": found["state"], **{name: x[name] for name in ("slot_keys", "mass", "max")}}

    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    of_values = Reduction(
        Recurrence((Write(("new",), ("v",)),), query=(Factor("scores", softmax_features), "share"), log_decay=("gate",)),
        {"scores": "B Hq T Z", "share": slots, "new": slots, "gate": slots, "v": "B Hkv T E", "initial_state": "B Hkv Z E", "out": "B Hq T E"},
        values,
        outputs,
    )
    of_keys = Reduction(
        Recurrence((Write(("k",), ("new",)),), log_value_decay=("gate",), scale=scale),
        {"q": "B Hq T D", "k": "B Hkv T D", "new": slots, "gate": slots, "initial_state": "B Hkv D Z", "out": "B Hq T Z"},
        keys,
        scores,
        of_values,
    )
    return Reduction(
        Recurrence((Write((), ("new",)),), query=(), log_value_decay=("gate",)),
        {"new": slots, "gate": slots, "initial_state": "B Hkv Z", "out": slots},
        weights,
        masses,
        of_keys,
    )


CARRIED = ("slot_keys", "slot_values", "mass", "max")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    names = ("q", "k", "v", "write")
    one = {**x, **{name: x[name][:, :, :half] for name in names}}
    two = {**x, **{name: x[name][:, :, half:] for name in names}}
    out_1, *carried = run(one, returns=("out", *CARRIED))
    out_2, *carried = run({**two, **{"initial_" + name: c for name, c in zip(CARRIED, carried, strict=True)}}, returns=("out", *CARRIED))
    return run(x, returns=("out", *CARRIED)), (np.concatenate([out_1, out_2], axis=2), *carried)


def causal_means(x, weights):
    """Of x, under weights (..., T), without any running sum."""
    weights = np.tril(weights[..., None, :] + np.zeros((x.shape[2], 1)))
    return weights @ x / weights.sum(-1, keepdims=True)


def equal_weights_give_the_mean(run, x):
    values = np.repeat(x["v"], x["q"].shape[1] // x["v"].shape[1], axis=1)
    return run({**x, "write": 0.0 * x["write"] + 3.0}), causal_means(values, np.ones(values.shape[:3]))


def shifted_weights(run, x):
    shift = np.linspace(-3.0, 3.0, x["write"].shape[3])
    return run({**x, "write": x["write"] + shift}), run(x)


def two_softmax_attentions(run, x):
    """Each slot's key and value is softmax attention with the logarithms of its weights for scores."""
    batch, kv_heads, n, slots = x["write"].shape
    group = x["q"].shape[1] // kv_heads
    bias = np.moveaxis(x["write"], 3, 2).reshape(batch, kv_heads * slots, 1, n) + np.zeros((n, 1))

    def slot(values):
        nothing = np.zeros((batch, kv_heads * slots, n, 1))
        each = run(
            {"q": nothing, "k": nothing, "v": np.repeat(values, slots, axis=1), "bias": bias}, name="softmax", causal=True, returns="out"
        )  # one head per slot
        return np.repeat(each.reshape(batch, kv_heads, slots, n, -1), group, axis=1)

    scores = np.einsum("bhtd,bhztd->bhtz", x["q"], slot(x["k"])) * x["q"].shape[3] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return run(x), np.einsum("bhtz,bhzte->bhte", weights / weights.sum(-1, keepdims=True), slot(x["v"]))


VARIANT = Variant(
    name="abc",
    family="state",
    summary="Attention with bounded-memory control: softmax over slots that are weighted means of all keys and values so far.",
    equation="out_t = sum_z softmax_z(scale q_t . K_t[z]) V_t[z], K_t[z] = sum_{j<=t} e^(write_jz) k_j / sum_{j<=t} e^(write_jz), V_t alike",
    paper=Paper(
        title="ABC: Attention with Bounded-memory Control",
        authors=(
            "Peng, Hao",
            "Kasai, Jungo",
            "Pappas, Nikolaos",
            "Yogatama, Dani",
            "Wu, Zhaofeng",
            "Kong, Lingpeng",
            "Schwartz, Roy",
            "Smith, Noah A.",
        ),
        year=2021,
        arxiv="2110.02488",
        where="section 2 and the learned control of section 4, causal",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("write", "B Hkv T Z", "natural logarithm of a token's weight in each slot", draw=lambda rng, shape: 2.0 * rng.standard_normal(shape)),
        Operand("initial_slot_keys", "B Hkv Z D", "weighted sums of the keys before the first token", absent=0.0),
        Operand("initial_slot_values", "B Hkv Z E", "weighted sums of the values before the first token", absent=0.0),
        Operand(
            "initial_mass", "B Hkv Z", "sums of the weights before the first token", absent=0.0, draw=lambda rng, shape: rng.uniform(0.5, 2.0, shape)
        ),
        Operand("initial_max", "B Hkv Z", "logarithms that they are relative to", absent=-math.inf),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("slot_keys", "B Hkv Z D", "weighted sums of the keys after the last token, times exp(-max)", wide=True),
        Output("slot_values", "B Hkv Z E", "weighted sums of the values after the last token, times exp(-max)", wide=True),
        Output("mass", "B Hkv Z", "sums of the weights after the last token, times exp(-max)", wide=True),
        Output("max", "B Hkv Z", "largest logarithm of a weight so far", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies q . K; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*Z*(Hkv*(6 + 3*D + 3*E) + Hq*(2*D + 7 + 2*E))",
        memory="B*(Hq*T*E + Hkv*Z*(D + E + 2)) + Z",
    ),
    ordered=lambda params: "T",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[0.0], [4.0 * math.log(3.0)]]]],
                "v": [[[[4.0], [8.0]]]],
                "write": [[[[math.log(3.0), 0.0], [0.0, 0.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[4.0], [5.0 * 0.25 + 6.0 * 0.75]]]], "mass": [[[4.0 / 3.0, 2.0]]], "max": [[[math.log(3.0), 0.0]]]},
            source="by hand: slot keys log 3 and 2 log 3, so weights 1/4 and 3/4; slot values (3 x 4 + 8)/4 and (4 + 8)/2",
        ),
        Example(
            operands={"q": [[[[1.0], [1.0]]]], "k": [[[[1.0], [1.0]]]], "v": [[[[4.0], [8.0]]]], "write": [[[[-1000.0], [1000.0]]]]},
            returns={"out": [[[[4.0], [8.0]]]], "mass": [[[1.0]]], "max": [[[1000.0]]]},
            source="by hand: the second weighs exp(2000) times the first",
        ),
        Example(
            operands={"q": [[[[2.0]]]], "k": [[[[1.0]]]], "v": [[[[6.0]]]], "write": [[[[-math.inf, -math.inf]]]]},
            returns={"out": [[[[0.0]]]], "slot_keys": [[[[0.0], [0.0]]]], "mass": [[[0.0, 0.0]]], "max": [[[-math.inf, -math.inf]]]},
            source="by hand: nothing was written",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its slots, mass and maximum", cut_and_carried_on),
        Identity("equal weights give the causal mean of the values", equal_weights_give_the_mean),
        Identity("a constant added to a slot's weights changes nothing", shifted_weights),
        Identity("slots are softmax attentions over the tokens, under a softmax over slots", two_softmax_attentions),
    ),
)
