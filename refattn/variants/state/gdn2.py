"""Gated DeltaNet-2: Kimi Delta Attention with its write strength split into one for erasing, per key channel, and one for writing, per value channel.

    S~_t  = diag(alpha_t) S_{t-1},   S_t = S~_t + k_t (w_t * v_t - S~_t^T (b_t * k_t))^T,   alpha_t = exp(gate_t)
    out_t = scale * S_t^T q_t

b is the operand ``erase``, w the operand ``write``, both usually in [0, 1].  Always causal.  S_{-1} is ``initial_state`` (0 if absent), and
``state`` is S after the last token, so a sequence can be cut anywhere and carried on.  ``gate`` is the natural logarithm of the factors, one
per key channel; -inf forgets the channel.  Query head h reads the state of key-value head ``h // (Hq // Hkv)``.  Keys are taken as they come.

What people get wrong: the names.  flash-linear-attention calls the erasing strength b and takes (q, k, v, g, b, w), no beta among them.  Putting the
erasing strength on the written key too, (b * k) (...)^T: it belongs to what the state is asked only.  The scale: none in the paper,
1/sqrt(D) here as in flash-linear-attention.

Checked against flash-linear-attention's recurrent and chunked references.
"""

import math

import numpy as np

from refattn.spec import Cost, Example, Identity, Number, Operand, Output, Paper, Param, Recurrence, Variant, Write


def define(q, k, v, gate, erase, write, initial_state, scale):
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
                for x in range(d):
                    alpha = math.exp(gate[b, g, t, x])
                    for y in range(d_v):
                        state[b, g, x, y] *= alpha
                for y in range(d_v):
                    held = 0.0  # what the faded state answers at the part of the key that erases
                    for x in range(d):
                        held += erase[b, g, t, x] * k[b, g, t, x] * state[b, g, x, y]
                    change = write[b, g, t, y] * v[b, g, t, y] - held
                    for x in range(d):
                        state[b, g, x, y] += k[b, g, t, x] * change
                for h in range(g * group, (g + 1) * group):
                    for y in range(d_v):
                        for x in range(d):
                            out[b, h, t, y] += q[b, h, t, x] * state[b, g, x, y]
                        out[b, h, t, y] *= scale
    return out, state


def recurrence(dims, params):
    return Recurrence(
        writes=(Write(key=("k",), value=("write", "v"), erase=("erase", "k")),),
        log_decay=("gate",),
        scale=dims["D"] ** -0.5 if params["scale"] is None else params["scale"],
    )


def cut_and_carried_on(run, x):
    half = x["q"].shape[2] // 2
    out_1, state = run({name: a[:, :, :half] for name, a in x.items()}, returns=("out", "state"))
    out_2, state = run({**{name: a[:, :, half:] for name, a in x.items()}, "initial_state": state}, returns=("out", "state"))
    return run(x, returns=("out", "state")), (np.concatenate([out_1, out_2], axis=2), state)


def one_strength_is_kda(run, x):
    beta = x["erase"][..., 0]
    tied = {**x, **{name: np.broadcast_to(beta[..., None], x[name].shape) for name in ("erase", "write")}}
    plain = {name: x[name] for name in ("q", "k", "v", "gate")}
    return run(tied, returns=("out", "state")), run({**plain, "beta": beta}, name="kda", returns=("out", "state"))


def nothing_erased_is_gated_linear_attention(run, x):
    plain = {"q": x["q"], "k": x["k"], "v": x["write"] * x["v"], "gate": x["gate"]}
    return run({**x, "erase": 0.0 * x["erase"]}, returns=("out", "state")), run(plain, name="gla", returns=("out", "state"))


def as_products_of_transitions(run, x):
    """Everything written, carried to each token by the product of the transitions in between."""
    fading = np.exp(x["gate"])[..., None, :]
    transition = fading * (np.eye(fading.shape[-1]) - x["k"][..., :, None] * (x["erase"] * x["k"])[..., None, :])
    written = x["k"][..., :, None] * (x["write"] * x["v"])[..., None, :]
    states = np.zeros_like(written)
    for t in range(written.shape[2]):
        product = np.eye(written.shape[3])
        for j in range(t, -1, -1):
            states[:, :, t] += product @ written[:, :, j]
            product = product @ transition[:, :, j]
    out = 0.5 * np.einsum("bhtx,bhtxy->bhty", x["q"], np.repeat(states, x["q"].shape[1] // states.shape[1], axis=1))
    return run(x, scale=0.5, returns=("out", "state")), (out, states[:, :, -1])


VARIANT = Variant(
    name="gdn2",
    family="state",
    summary="Gated DeltaNet-2: a delta rule with separate strengths for erasing and for writing, channel by channel.",
    equation="S~_t = diag(exp(gate_t)) S_(t-1), S_t = S~_t + k_t (write_t * v_t - S~_t^T (erase_t * k_t))^T, out_t = scale S_t^T q_t",
    paper=Paper(
        title="Gated DeltaNet-2: Decoupling Erase and Write in Linear Attention",
        authors=(
            "Hatamizadeh, Ali",
            "Choi, Yejin",
            "Kautz, Jan",
        ),
        year=2026,
        arxiv="2605.22791",
    ),
    operands=(
        Operand("q", "B Hq T D", "queries"),
        Operand(
            "k",
            "B Hkv T D",
            "keys, not normalised here",
            draw=lambda rng, shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True),
        ),
        Operand("v", "B Hkv T E", "values"),
        Operand(
            "gate",
            "B Hkv T D",
            "natural logarithm of the factors alpha by which rows of the state fade",
            draw=lambda rng, shape: -rng.exponential(0.2, shape),
        ),
        Operand("erase", "B Hkv T D", "strength of the erasure, b of the paper", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("write", "B Hkv T E", "strength of the write, w of the paper", draw=lambda rng, shape: rng.uniform(0.0, 1.0, shape)),
        Operand("initial_state", "B Hkv D E", "state before the first token", absent=0.0),
    ),
    outputs=(
        Output("out", "B Hq T E", "what the state answers at the queries"),
        Output("state", "B Hkv D E", "state after the last token", wide=True),
    ),
    params=(Param("scale", Number(optional=True), None, "multiplies q; None is 1/sqrt(D)", absent=lambda dims: dims["D"] ** -0.5, tries=(0.37,)),),
    define=define,
    recurrence=recurrence,
    cost=Cost(
        flops="B*T*(Hkv*(D + E*(6*D + 2)) + Hq*E*(2*D + 1))",
        memory="B*(Hq*T*E + Hkv*D*E)",
    ),
    ordered=lambda params: "T",
    causal={},
    linear_in="q",
    examples=(
        Example(
            operands={
                "q": [[[[1.0, 1.0]]]],
                "k": [[[[1.0, 2.0]]]],
                "v": [[[[8.0, 4.0]]]],
                "gate": [[[[math.log(0.5), 0.0]]]],
                "erase": [[[[0.5, 0.25]]]],
                "write": [[[[1.0, 0.5]]]],
                "initial_state": [[[[4.0, 0.0], [2.0, 2.0]]]],
            },
            params={"scale": 1.0},
            returns={"out": [[[[22.0, 5.0]]]], "state": [[[[8.0, 1.0], [14.0, 4.0]]]]},
            source="by hand: faded to ((2, 0), (2, 2)), held (2, 1), change (8 - 2, 2 - 1), then + (1, 2) (6, 1)",
        ),
    ),
    identities=(
        Identity("a sequence cut in two is carried on by its state", cut_and_carried_on),
        Identity("with one strength for both it is KDA", one_strength_is_kda),
        Identity("with nothing erased it is gated linear attention", nothing_erased_is_gated_linear_attention),
        Identity("what is written is carried on by products of transitions", as_products_of_transitions),
    ),
)
