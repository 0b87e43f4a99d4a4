"""CyFA: softmax attention over slots of a cyclic memory that moves with every token, so that a slot holds what is about so old.

    K_t   = alpha_t P(delta_t) K_{t-1} + beta_t e_0 k_t^T,     V_t the same of values,     alpha = exp(gate)
    out_t = (R V_t)^T softmax(scale R K_t q_t)
    P(delta)_zw = 1/Z (1 + 2 sum_{p=1}^{(Z-1)/2} cos(2 pi p (z - w - delta) / Z))

P moves all slots on by delta, round a circle of Z: by whole numbers it permutes them, between those it interpolates with the trigonometric
polynomial through them.  A token is written to slot 0 after the move and read from there at once.  A row of R, ``readout``, is one
combination of slots that the softmax is over; there are as many as slots.  ``slot_keys`` and ``slot_values`` are K and V after the last
token, slot by slot, ``initial_slot_keys`` and ``initial_slot_values`` those before the first (0 if absent).  ``gate`` is the natural
logarithm of alpha; the paper's delta lies in (0, 1).  Query head h has a readout of its own and reads the slots of head
``h // (Hq // Hkv)``.  ``scale`` is 1/sqrt(D) if None, as in flash-linear-attention.

For odd Z moves add up, P(a) P(b) = P(a + b), so that what is as old as lambda_t - lambda_j, with lambda the sum of the deltas so far, has the
weight P(lambda_t - lambda_j)_z0 in slot z.  The Fourier coefficients of the slots, turned back by lambda_t, only fade, which makes it two
linear attentions of one gate a head with a softmax between: the authors' way of computing it, an identity here, and the engine's form; it rounds
what a slot holds to the size of the fullest, where the definition keeps an empty slot empty.  For even Z, which the authors' code refuses, the
last cosine counts once; moves by parts of a slot then do not add up.

What people get wrong: the number of slots, which is flash-linear-attention's num_slots - 1, its readout's width (one of the num_slots numbers
it stores per channel, the sine of frequency 0, is always 0); carrying its state on without the clock lambda, which says how far it is
turned, where the slots themselves need none; keys and queries, which its functions first divide by their root mean square and here come as
they are; slots empty at first, which hold key and value 0 and take their share of the softmax; taking P for an average, where it has negative
entries, though its rows and columns sum to 1.

Checked against flash-linear-attention's naive_recurrent_cyfa: values, gradients, state.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, gate, delta, beta, readout, initial_slot_keys, initial_slot_values, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v, slots = v.shape[1], v.shape[3], readout.shape[2]
    group = heads // kv_heads
    turn = 6.283185307179586  # 2 pi
    out = np.zeros((batch, heads, n, d_v))
    slot_keys = np.zeros((batch, kv_heads, slots, d))
    slot_values = np.zeros((batch, kv_heads, slots, d_v))
    moved_keys, moved_values = np.zeros((slots, d)), np.zeros((slots, d_v))
    move, score, weight, share = np.zeros(slots), np.zeros(slots), np.zeros(slots), np.zeros(slots)
    for b in range(batch):
        for g in range(kv_heads):
            for z in range(slots):
                for x in range(d):
                    slot_keys[b, g, z, x] = initial_slot_keys[b, g, z, x]
                for y in range(d_v):
                    slot_values[b, g, z, y] = initial_slot_values[b, g, z, y]
            for t in range(n):
                for z in range(slots):  # the first column of P; each further one is that before, moved on by a slot
                    move[z] = 1.0
                    for p in range(1, slots // 2 + 1):
                        times = 1.0 if 2 * p == slots else 2.0
                        move[z] += times * math.cos(turn * p * (z - delta[b, g, t]) / slots)
                    move[z] /= slots
                for z in range(slots):
                    for x in range(d):
                        moved_keys[z, x] = 0.0
                        for w in range(slots):
                            moved_keys[z, x] += move[(z - w) % slots] * slot_keys[b, g, w, x]
                    for y in range(d_v):
                        moved_values[z, y] = 0.0
                        for w in range(slots):
                            moved_values[z, y] += move[(z - w) % slots] * slot_values[b, g, w, y]
                alpha = math.exp(gate[b, g, t])
                for z in range(slots):
                    for x in range(d):
                        slot_keys[b, g, z, x] = alpha * moved_keys[z, x]
                    for y in range(d_v):
                        slot_values[b, g, z, y] = alpha * moved_values[z, y]
                for x in range(d):
                    slot_keys[b, g, 0, x] += beta[b, g, t] * k[b, g, t, x]
                for y in range(d_v):
                    slot_values[b, g, 0, y] += beta[b, g, t] * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for w in range(slots):
                        score[w] = 0.0
                        for x in range(d):
                            score[w] += q[b, h, t, x] * slot_keys[b, g, w, x]
                    highest = -np.inf
                    for z in range(slots):
                        weight[z] = 0.0  # the logit first
                        for w in range(slots):
                            weight[z] += readout[h, z, w] * score[w]
                        weight[z] *= scale
                        highest = highest if weight[z] <= highest else weight[z]  # NaN must win
                    total = 0.0
                    for z in range(slots):
                        weight[z] = math.exp(weight[z] - highest)
                        total += weight[z]
                    for z in range(slots):
                        weight[z] /= total
                    for w in range(slots):
                        share[w] = 0.0
                        for z in range(slots):
                            share[w] += weight[z] * readout[h, z, w]
                        for y in range(d_v):
                            out[b, h, t, y] += share[w] * slot_values[b, g, w, y]
    return out, slot_keys, slot_values


def reduction(dims, params):
    """For odd Z: the slots' Fourier coefficients, turned back by the clock, are those of two linear attentions of one gate a head."""
    slots, group = dims["Z"], dims["Hq"] // dims["Hkv"]
    if slots % 2 == 0:
        return None
    p = np.arange(slots // 2 + 1)
    size, at = np.sqrt(np.minimum(p + 1, 2) / slots), 2.0 * math.pi / slots * p
    places = at * np.arange(slots)[:, None]
    basis = np.concatenate([size * np.cos(places), size * np.sin(places)], axis=-1)

    def turned(x, clock):
        """Coefficients, moved on by so many slots."""
        cos, sin = np.cos(at * clock[..., None]), np.sin(at * clock[..., None])
        even, odd = x[..., : len(p)], x[..., len(p) :]
        return np.concatenate([cos * even - sin * odd, sin * even + cos * odd], axis=-1)

    def clock(x):
        return np.cumsum(x["delta"], axis=2)

    def after(x, state):
        """Slots after the last token, a column each."""
        return turned(state, np.sum(x["delta"], axis=2)[..., None]) @ basis.T

    def keys(x):
        write = x["beta"][..., None] * turned(basis[0], -clock(x))
        start = np.swapaxes(x["initial_slot_keys"], -1, -2) @ basis
        return {"q": x["q"], "k": x["k"], "write": write, "gate": x["gate"], "initial_state": start}

    def read(x, found):
        now, rows = np.repeat(clock(x), group, axis=1), x["readout"] @ basis
        scores = turned(found["out"], now) @ np.swapaxes(rows, -1, -2)
        weights = np.exp(scores - np.maximum.accumulate(scores, axis=-1)[..., -1:])
        weights = weights / np.sum(weights, axis=-1, keepdims=True)
        return {"read": turned(weights @ rows, -now), "slot_keys": np.swapaxes(after(x, found["state"]), -1, -2)}

    def values(x):
        write = x["beta"][..., None] * turned(basis[0], -clock(x))
        start = np.swapaxes(basis, 0, 1) @ x["initial_slot_values"]
        return {"read": x["read"], "write": write, "v": x["v"], "gate": x["gate"], "initial_state": start}

    def outputs(x, found):
        if dims["T"] == 0:  # not to coefficients and back
            return {"out": found["out"], "slot_keys": x["initial_slot_keys"], "slot_values": x["initial_slot_values"]}
        slot_values = np.swapaxes(after(x, np.swapaxes(found["state"], -1, -2)), -1, -2)
        return {"out": found["out"], "slot_keys": x["slot_keys"], "slot_values": slot_values}

    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    return Reduction(
        Recurrence((Write(("k",), ("write",)),), log_decay=("gate",), scale=scale),
        {"q": "B Hq T D", "k": "B Hkv T D", "write": "B Hkv T N", "gate": "B Hkv T", "initial_state": "B Hkv D N", "out": "B Hq T N"},
        keys,
        read,
        Reduction(
            Recurrence((Write(("write",), ("v",)),), query=("read",), log_decay=("gate",)),
            {"read": "B Hq T N", "write": "B Hkv T N", "v": "B Hkv T E", "gate": "B Hkv T", "initial_state": "B Hkv N E", "out": "B Hq T E"},
            values,
            outputs,
        ),
    )


TOKENS = ("q", "k", "v", "gate", "delta", "beta")
ALL = ("out", "slot_keys", "slot_values")


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    one, two = ({**x, **{name: x[name][:, :, part] for name in TOKENS}} for part in (slice(half), slice(half, None)))
    out_1, keys, values = run(one, returns=ALL)
    out_2, keys, values = run({**two, "initial_slot_keys": keys, "initial_slot_values": values}, returns=ALL)
    return run(x, returns=ALL), (np.concatenate([out_1, out_2], axis=2), keys, values)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def two_gated_linear_attentions(run, x):
    """Of an odd number of slots: Fourier coefficients, written turned by the clock of the token and read turned by that of the reading one."""
    slots = x["readout"].shape[2] - 1 + x["readout"].shape[2] % 2
    readout = x["readout"][:, :slots, :slots]
    group = x["q"].shape[1] // x["k"].shape[1]
    clock = np.cumsum(x["delta"], axis=2)[..., None]
    p = np.arange(slots // 2 + 1)
    size, at = np.sqrt(np.minimum(p + 1, 2) / slots), 2.0 * math.pi / slots * p
    write = x["beta"][..., None] * np.concatenate([size * np.cos(at * clock), -size * np.sin(at * clock)], axis=-1)
    ahead = at * (np.arange(slots)[:, None] - np.repeat(clock, group, axis=1)[..., None, :])  # slots of the clock of the reading token
    basis = np.concatenate([size * np.cos(ahead), size * np.sin(ahead)], axis=-1)
    rows = np.einsum("hrz,bhtzm->bhtrm", readout, basis)
    found = run({"q": x["q"], "k": x["k"], "v": write, "gate": x["gate"]}, name="simple_gla", returns="out")
    read = np.einsum("bhtr,bhtrm->bhtm", softmax(np.einsum("bhtrm,bhtm->bhtr", rows, found)), rows)
    out = run({"q": read, "k": write, "v": x["v"], "gate": x["gate"]}, name="simple_gla", scale=1.0, returns="out")
    return run({**x, "readout": readout}), out


def whole_slots_are_a_window(run, x):
    """A slot a token, read one by one: softmax attention to the last Z tokens, with empty ones before the first."""
    slots, n = x["readout"].shape[1], min(x["readout"].shape[1], x["q"].shape[2])
    q, k, v = (x[name][:, :, :n] for name in ("q", "k", "v"))
    one = np.ones_like(x["gate"][:, :, :n])
    each = np.eye(slots) + 0.0 * x["readout"]
    padded = {name: np.concatenate([np.zeros_like(a[:, :, :1]).repeat(slots, axis=2), a], axis=2) for name, a in (("k", k), ("v", v))}
    ours = run({"q": q, "k": k, "v": v, "gate": 0.0 * one, "delta": one, "beta": one, "readout": each})
    return ours, run({"q": q, **padded}, name="softmax", window=(slots - 1, 0), returns="out")


def a_whole_turn_changes_nothing(run, x):
    slots = x["readout"].shape[1]
    return run({**x, "delta": x["delta"] + slots}, returns=ALL), run(x, returns=ALL)


def order_of_readouts(run, x):
    return run({**x, "readout": x["readout"][:, ::-1]}), run(x)


def moving_the_readout_too(run, x):
    """Nothing is written, since what is written goes to slot 0 wherever the others are."""
    rng = np.random.default_rng(0)
    (batch, kv_heads, _, d), d_v, slots = x["k"].shape, x["v"].shape[3], x["readout"].shape[1]
    keys, values = rng.standard_normal((batch, kv_heads, slots, d)), rng.standard_normal((batch, kv_heads, slots, d_v))
    x = {**x, "beta": 0.0 * x["beta"], "initial_slot_keys": keys, "initial_slot_values": values}
    moved = {"initial_slot_keys": np.roll(keys, 1, axis=2), "initial_slot_values": np.roll(values, 1, axis=2)}
    return run({**x, **moved, "readout": np.roll(x["readout"], 1, axis=2)}), run(x)


def logistic(rng, shape):
    return 1.0 / (1.0 + np.exp(-rng.standard_normal(shape)))


VARIANT = Variant(
    name="cyfa",
    family="state",
    summary="Cyclic flow attention (CyFA): softmax over slots that move round a circle as they age.",
    equation="out_t = (R V_t)^T softmax(scale R K_t q_t), K_t = exp(gate_t) P(delta_t) K_(t-1) + beta_t e_0 k_t^T, V_t alike",
    paper=Paper(
        title="CyFA: Linear Sequence Modeling with Relative-Time-Partitioned Memory",
        authors=("Chen, Yixiao", "Yang, Shuojin", "Hu, Shi-Min"),
        year=2026,
        arxiv="2609.36259",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand("v", "B Hkv T E", "values"),
        Operand("gate", "B Hkv T", "natural logarithm of alpha, by which all slots fade", draw=lambda rng, shape: -rng.exponential(0.5, shape)),
        Operand("delta", "B Hkv T", "how many slots the memory moves on before the token is written", draw=logistic),
        Operand("beta", "B Hkv T", "how much of the token is written", draw=logistic),
        Operand("readout", "Hq Z Z", "combinations of slots, one a row, that the softmax is over"),
        Operand("initial_slot_keys", "B Hkv Z D", "keys of the slots before the first token", absent=0.0),
        Operand("initial_slot_values", "B Hkv Z E", "values of the slots before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "attention output"),
        Output("slot_keys", "B Hkv Z D", "keys of the slots after the last token", wide=True),
        Output("slot_values", "B Hkv Z E", "values of the slots after the last token", wide=True),
    ),
    params=(
        Param("scale", Number(optional=True), None, "multiplies R K q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),
    ),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*(Hkv*(1 + Z*(7*(Z//2) + 1 + (2*Z + 1)*(D + E)) + 2*(D + E)) + Hq*Z*(2*D + 4*Z + 5 + 2*E))",
        memory="B*(Hq*T*E + Hkv*Z*(D + E)) + Z*(D + E + 4)",
    ),
    ordered=lambda params: "T Z",
    causal={},
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [1.0]]]],
                "k": [[[[math.log(2.0)], [math.log(5.0)]]]],
                "v": [[[[4.0], [8.0]]]],
                "gate": [[[0.0, 0.0]]],
                "delta": [[[0.5, 1.0]]],
                "beta": [[[1.0, 1.0]]],
                "readout": [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]],
            },
            returns={"out": [[[[2.0], [6.0]]]], "slot_values": [[[[8.0], [4.0], [0.0]]]]},
            source="by hand: weights 2/4, 1/4, 1/4 of 4, 0, 0; then the first token is in slot 1, and weights 5/8, 2/8, 1/8 of 8, 4, 0",
        ),
        Example(
            operands={
                "q": [[[[0.0], [0.0]]]],
                "k": [[[[1.0], [1.0]]]],
                "v": [[[[12.0], [7.0]]]],
                "gate": [[[0.0, -math.log(2.0)]]],
                "delta": [[[0.0, 0.5]]],
                "beta": [[[1.0, 0.0]]],
                "readout": [[[1.0, 0.0, 0.0], [1.0, 0.0, 3.0], [1.0, 0.0, 0.0]]],
            },
            returns={"out": [[[[12.0], [2.0]]]], "slot_values": [[[[4.0], [4.0], [-2.0]]]]},
            source="by hand: half a slot on, of which 2/3 lie in slot 0, 2/3 in slot 1 and -1/3 in slot 2; the middle readout is 4 - 6",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its slots", cut_and_carried_on),
        Identity("it is two gated linear attentions around a softmax, by an absolute clock", two_gated_linear_attentions),
        Identity("moving a slot a token it is softmax attention within a window", whole_slots_are_a_window),
        Identity("moving all the way round changes nothing", a_whole_turn_changes_nothing),
        Identity("the order of the readouts means nothing", order_of_readouts),
        Identity("slots and readouts moved on together read the same", moving_the_readout_too),
    ),
)
