"""The gated Oja rule: the delta rule with keys and values in each other's place, so that the state erases what it already explains of the key.

    S~_t  = S_{t-1} diag(alpha_t),   S_t = S~_t + (k_t - S~_t v_t) beta_t v_t^T,   alpha_t = exp(gate_t) in R^E
    out_t = scale * S_t^T q_t

Always causal.  S_{-1} is ``initial_state`` (0 if absent), and ``state`` is S after the last token, so a sequence can be cut anywhere and
carried on.  ``gate`` is the natural logarithm of the factors, one per value channel: columns of the state fade, not rows; -inf forgets the
channel.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.  The state is the transpose of that of Kimi Delta Attention called
with keys and values exchanged; the reading is not.

What people get wrong: normalising the keys.  Here the values must have length about 1 (flash-linear-attention's tests normalise v), or the
state grows.  Expecting linearity in v: the output is linear in k.  The scale is 1/sqrt(D) by default, as in flash-linear-attention.

Checked against the states of flash-linear-attention's KDA references, transposed; its own test of this rule has the same recurrence.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Reduction, Variant, Write


def define(q, k, v, gate, beta, initial_state, scale):
    batch, heads, n, d = q.shape
    kv_heads, d_v = v.shape[1], v.shape[3]
    group = heads // kv_heads
    out = np.zeros((batch, heads, n, d_v))
    state = np.zeros((batch, kv_heads, d, d_v))
    for b in range(batch):
        for g in range(kv_heads):
            for x in range(d):
                for y in range(d_v):
                    state[b, g, x, y] = initial_state[b, g, x, y]
            for t in range(n):
                for y in range(d_v):
                    alpha = math.exp(gate[b, g, t, y])
                    for x in range(d):
                        state[b, g, x, y] *= alpha
                for x in range(d):
                    explained = 0.0  # what the faded state makes of the value
                    for y in range(d_v):
                        explained += state[b, g, x, y] * v[b, g, t, y]
                    change = beta[b, g, t] * (k[b, g, t, x] - explained)
                    for y in range(d_v):
                        state[b, g, x, y] += change * v[b, g, t, y]
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def reduction(dims, params):
    """Kimi Delta Attention of values for keys and keys for values, read by each token's faded value: what is explained; then writes of the rest."""

    def transposed(x):
        made = {name: x[name] for name in ("k", "v", "gate", "beta")}
        return {**made, "faded": np.exp(x["gate"]) * x["v"], "initial_state": np.swapaxes(x["initial_state"], -1, -2)}

    def rest(x, found):
        return {"rest": x["beta"][..., None] * (x["k"] - found["out"])}

    def written(x):
        return {name: x[name] for name in ("q", "rest", "v", "gate", "initial_state")}

    def outputs(x, found):
        return found

    key, value = "B Hkv T D", "B Hkv T E"
    scale = dims["D"] ** -0.5 if params["scale"] is None else params["scale"]
    return Reduction(
        Recurrence((Write(("beta", "v"), ("k",), ("v",)),), query=("faded",), log_decay=("gate",), exclusive=True),
        {"k": key, "v": value, "gate": value, "beta": "B Hkv T", "faded": value, "initial_state": "B Hkv E D", "out": key},
        transposed,
        rest,
        Reduction(
            Recurrence((Write(("rest",), ("v",)),), log_value_decay=("gate",), scale=scale),
            {"q": "B Hq T D", "rest": key, "v": value, "gate": value, "initial_state": "B Hkv D E", "out": "B Hq T E"},
            written,
            outputs,
        ),
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def exchanged_is_kda_transposed(run, x):
    """q is read by KDA with the wrong width, so the outputs come from its state after each token."""
    n, group = x["q"].shape[2], x["q"].shape[1] // x["k"].shape[1]
    swapped = {"q": np.repeat(0.0 * x["v"], group, axis=1), "k": x["v"], "v": x["k"], "gate": x["gate"], "beta": x["beta"]}
    states = [np.swapaxes(run({name: a[:, :, : t + 1] for name, a in swapped.items()}, name="kda", returns="state"), -1, -2) for t in range(n)]
    out = 0.5 * np.einsum("bhtx,tbhxy->bhty", x["q"], np.repeat(np.stack(states), group, axis=2))
    return run(x, scale=0.5, returns=("out", "state")), (out, states[-1])


def orthonormal_values_keep_keys(run, x):
    """Without fading, with beta 1 and values e_0, e_1, ..., column t of the state is the last key that came with that value."""
    batch, kv_heads, n, d_v = x["v"].shape
    v = np.broadcast_to(np.eye(d_v)[np.arange(n) % d_v], x["v"].shape)
    table = np.zeros((batch, kv_heads, x["k"].shape[3], d_v))
    for t in range(n):
        table[..., t % d_v] = x["k"][:, :, t]
    told = {**x, "v": v, "beta": np.ones_like(x["beta"]), "gate": 0.0 * x["gate"]}
    return run(told, returns="state"), table


def without_writes(run, x):
    batch, kv_heads, _, d = x["k"].shape
    start = np.linspace(-1.0, 1.0, batch * kv_heads * d * x["v"].shape[3]).reshape(batch, kv_heads, d, -1)
    group = x["q"].shape[1] // kv_heads
    faded = np.exp(np.cumsum(x["gate"], axis=2))
    out = 0.5 * (x["q"] @ np.repeat(start, group, axis=1)) * np.repeat(faded, group, axis=1)
    quiet = {**x, "beta": 0.0 * x["beta"], "initial_state": start}
    return run(quiet, scale=0.5, returns=("out", "state")), (out, faded[:, :, -1, None, :] * start)


VARIANT = Variant(
    name="oja",
    family="state",
    summary="Gated Oja rule: the delta rule transposed, correcting what the state explains of the key.",
    equation="S~_t = S_(t-1) diag(exp(gate_t)), S_t = S~_t + (k_t - S~_t v_t) beta_t v_t^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="FLA: A Triton-Based Library for Hardware-Efficient Implementations of Linear Attention Mechanism",
        authors=(
            "Yang, Songlin",
            "Zhang, Yu",
        ),
        year=2024,
        url="https://github.com/fla-org/flash-linear-attention",
        where="gated_oja_rule",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand("k", "B Hkv T D", "keys"),
        Operand(
            "v",
            "B Hkv T E",
            "values, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand(
            "gate",
            "B Hkv T E",
            "natural logarithm of the factors alpha by which columns of the state fade",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand("beta", "B Hkv T", "write strength", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),),
    define=define,
    reduction=reduction,
    cost=Cost(
        flops="B*T*(Hkv*(E + 5*D*E + 2*D) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0], [2.0]]]],
                "k": [[[[8.0], [4.0]]]],
                "v": [[[[1.0, 0.0], [1.0, 1.0]]]],
                "gate": [[[[0.0, 0.0], [math.log(0.5), math.log(0.25)]]]],
                "beta": [[[1.0, 0.5]]],
                "initial_state": [[[[2.0, 8.0]]]],
            },
            returns={"out": [[[[8.0, 8.0], [6.0, 2.0]]]], "state": [[[[3.0, 1.0]]]]},
            source="by hand: S = (2, 8) + (8 - 2) (1, 0) = (8, 8), faded to (4, 2), then + (4 - 6)/2 (1, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("its states are those of KDA with keys and values exchanged, transposed", exchanged_is_kda_transposed),
        Identity("with beta 1, orthonormal values keep keys", orthonormal_values_keep_keys),
        Identity("with beta 0 the columns only fade", without_writes),
    ),
)
